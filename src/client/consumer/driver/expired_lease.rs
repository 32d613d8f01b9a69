//! Leaders with an expired lease: the consumer refreshes metadata from other brokers and moves to the new leaders.
//!
//! A leader that is partitioned from its cluster, but not from its consumers, sends no more records and resembles the
//! leader of an idle log. It reports its expired lease (`FetchResponse.lease_expired`). A consumer of an idle log with
//! a healthy leader therefore needs no metadata requests.

use std::{collections::BTreeSet, time::Duration};

use tokio::time::Instant;

use super::{super::super::connection::BrokerAddress, ConsumerDriver};
use crate::task::clock;

/// Interval of metadata refreshes while a broker that serves this consumer reports an expired lease.
const REFRESH_INTERVAL: Duration = Duration::from_secs(2);

impl ConsumerDriver {
    /// Records whether a broker reports an expired lease.
    pub(super) fn set_lease_expired(&mut self, stream: u64, lease_expired: bool) {
        let Some(source) = self.sources.get_mut(&stream) else { return };
        if std::mem::replace(&mut source.doubts, lease_expired) != lease_expired && lease_expired {
            tracing::debug!(
                address = source.address.as_str(),
                "broker reports an expired lease, refreshing metadata from other brokers"
            );
            self.arrange_soon(clock::monotonic());
        }
    }

    /// Returns the brokers that serve this consumer and report an expired lease.
    pub(super) fn expired_leaders(&self) -> BTreeSet<BrokerAddress> {
        self.sources.values().filter(|source| source.doubts).map(|source| source.address.clone()).collect()
    }

    /// Refreshes metadata at intervals while a broker reports an expired lease. Returns the time of the next refresh.
    pub(super) fn refresh_if_lease_expired(&mut self, now: Instant) -> Option<Instant> {
        if !self.sources.values().any(|source| source.doubts) {
            return None;
        }
        let due = self.last_lease_refresh.map_or(now, |last| last + REFRESH_INTERVAL);
        if due > now {
            return Some(due);
        }
        self.last_lease_refresh = Some(now);
        self.route();
        Some(now + REFRESH_INTERVAL)
    }

    /// Leaves brokers with an expired lease if new metadata names another broker in a newer epoch. All partitions of
    /// their streams get new streams.
    pub(super) fn leave_expired_leaders(&mut self) {
        let mut outdated = BTreeSet::new();
        for (topic, partitions) in &self.topics {
            for (number, state) in partitions.iter().filter(|(_, state)| !state.failed) {
                let Some(stream) = state.stream else { continue };
                let Some(from) = self.sources.get(&stream).filter(|source| source.doubts) else { continue };
                let to = self.source(topic, *number, state);
                if to.is_some_and(|to| to.address != from.address && to.epoch > state.epoch()) {
                    outdated.insert(stream);
                }
            }
        }
        for stream in outdated {
            self.drop_stream(stream);
        }
    }
}
