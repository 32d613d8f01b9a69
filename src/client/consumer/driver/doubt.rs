//! Leaders with an expired lease: the consumer refreshes metadata from other brokers and moves to the new leaders.
//!
//! A leader that is partitioned from its cluster, but not from its consumers, sends no more records and resembles the
//! leader of an idle log. It reports its expired lease (`FetchResponse.in_doubt`). A consumer of an idle log with a
//! healthy leader therefore needs no metadata requests.

use std::{collections::BTreeSet, time::Duration};

use tokio::time::Instant;

use super::{super::super::connection::Address, Driver};
use crate::task::clock;

/// Interval of metadata refreshes while a broker that serves this consumer reports an expired lease.
const ASK_EVERY: Duration = Duration::from_secs(2);

impl Driver {
    /// Records whether a broker reports an expired lease.
    pub(super) fn note_doubt(&mut self, stream: u64, doubts: bool) {
        let Some(source) = self.sources.get_mut(&stream) else { return };
        if std::mem::replace(&mut source.doubts, doubts) != doubts && doubts {
            tracing::debug!(
                address = source.address.as_str(),
                "the broker doubts whether it still leads; others are asked"
            );
            self.arrange_soon(clock::monotonic());
        }
    }

    /// Returns the brokers that serve this consumer and report an expired lease.
    pub(super) fn doubted(&self) -> BTreeSet<Address> {
        self.sources.values().filter(|source| source.doubts).map(|source| source.address.clone()).collect()
    }

    /// Refreshes metadata at intervals while a broker reports an expired lease. Returns the time of the next refresh.
    pub(super) fn ask_around(&mut self, now: Instant) -> Option<Instant> {
        if !self.sources.values().any(|source| source.doubts) {
            return None;
        }
        let due = self.asked_around.map_or(now, |asked| asked + ASK_EVERY);
        if due > now {
            return Some(due);
        }
        self.asked_around = Some(now);
        self.route();
        Some(now + ASK_EVERY)
    }

    /// Leaves brokers with an expired lease if new metadata names another broker in a newer epoch. All partitions of
    /// their streams get new streams.
    pub(super) fn leave_doubted(&mut self) {
        let mut left = BTreeSet::new();
        for (topic, partitions) in &self.topics {
            for (number, state) in partitions.iter().filter(|(_, state)| !state.parked) {
                let Some(stream) = state.stream else { continue };
                let Some(from) = self.sources.get(&stream).filter(|source| source.doubts) else { continue };
                let to = self.source(topic, *number, state);
                if to.is_some_and(|to| to.address != from.address && to.epoch > state.epoch()) {
                    left.insert(stream);
                }
            }
        }
        for stream in left {
            self.drop_stream(stream);
        }
    }
}
