//! Reads in the consumer's rack: when a partition moves there, and when it returns to its leader.

use std::collections::{BTreeMap, BTreeSet};

use tokio::time::Instant;

use super::{
    super::{super::metadata::ReadTarget, fetch_state::PartitionFetchState},
    ConsumerDriver,
};

impl ConsumerDriver {
    /// Returns the broker that should serve a partition.
    pub(super) fn source(&self, topic: &str, partition: u32, state: &PartitionFetchState) -> Option<ReadTarget> {
        let rack = self.options.rack.as_deref().filter(|_| state.follower_backoff.leader_until().is_none());
        self.client.routing().source(topic, partition, rack)
    }

    /// Refreshes metadata that is too old or precedes the end of a stay at a leader, and moves partitions. Returns the
    /// time of the next check.
    pub(super) fn check_read_replicas(&mut self, now: Instant) -> Option<Instant> {
        self.options.rack.as_ref()?;
        let states = self.topics.values().flat_map(BTreeMap::values).filter(|state| !state.failed);
        let stay_ends = states.filter_map(|state| state.follower_backoff.leader_until());
        let refresh_at = self.refreshed + self.client.options().metadata_age;
        let (due, later): (Vec<Instant>, Vec<Instant>) = stay_ends.chain([refresh_at]).partition(|at| *at <= now);
        if !due.is_empty() {
            self.route();
        }
        self.move_partitions();
        later.into_iter().min()
    }

    /// Ends the streams of partitions that another broker should serve. All partitions of these streams get new
    /// streams.
    fn move_partitions(&mut self) {
        let mut moving = BTreeSet::new();
        for (topic, partitions) in &self.topics {
            for (number, state) in partitions.iter().filter(|(_, state)| !state.failed) {
                let Some(stream) = state.stream.filter(|stream| !moving.contains(stream)) else { continue };
                let current = self.sources.get(&stream).map(|source| &source.address);
                if self.source(topic, *number, state).is_some_and(|source| Some(&source.address) != current) {
                    moving.insert(stream);
                }
            }
        }
        for stream in moving {
            self.drop_stream(stream);
        }
    }
}
