//! Brokers that doubt whether they still lead: others are asked who does, and what is led elsewhere is read there.
//!
//! A leader that is cut off from its cluster, and not from its readers, has nothing more for them, and looks like one whose log nobody
//! writes to. It says so itself (`FetchResponse.in_doubt`); a consumer of a quiet log whose leader is well asks nobody anything.

use std::{collections::BTreeSet, time::Duration};

use tokio::time::Instant;

use super::{super::super::connection::Address, Driver};
use crate::task::clock;

/// How often others are asked while a broker that is read from is in doubt.
const ASK_EVERY: Duration = Duration::from_secs(2);

impl Driver {
    /// A broker says whether it is in doubt.
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

    /// Those that are in doubt, of the brokers that are read from.
    pub(super) fn doubted(&self) -> BTreeSet<Address> {
        self.sources.values().filter(|source| source.doubts).map(|source| source.address.clone()).collect()
    }

    /// Asks others who leads, now and then while a broker is in doubt. When to do so next.
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

    /// Metadata is new: leaves brokers that are in doubt where it names another one in a newer epoch. All that their streams carry is
    /// given a stream again.
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
