//! Decides at which replica a consumer reads a partition: in the consumer's rack or at the leader. Pure.
//!
//! A problem with a follower moves the partition to its leader for a limited time, a stay. Each stay is twice as long
//! as the one before, up to a minute. A minute after the last stay, the next one is short again.

use std::time::Duration;

use tokio::time::Instant;

use super::super::metadata::{ReadTarget, RoutingTable};
use crate::task::Backoff;

/// First stay at the leader, after which a replica in the rack is read again.
const MIN_FOLLOWER_RETRY_DELAY: Duration = Duration::from_secs(5);

/// Longest stay at the leader, and time since the last stay after which the next one is short again.
const MAX_FOLLOWER_RETRY_DELAY: Duration = Duration::from_secs(60);

/// Choice between a replica in the rack and the leader for one partition.
#[derive(Debug)]
pub(super) struct FollowerBackoff {
    /// Time until which the partition is read at its leader, regardless of replicas in the rack.
    leader_until: Option<Instant>,
    /// Lengths of the next stays at the leader.
    stays: Backoff,
    /// Time since which a replica in the rack may serve the partition: the creation, or the end of the last stay.
    since: Instant,
}

impl FollowerBackoff {
    pub(super) fn new(now: Instant) -> Self {
        Self { leader_until: None, stays: Backoff::new(MIN_FOLLOWER_RETRY_DELAY, MAX_FOLLOWER_RETRY_DELAY), since: now }
    }

    /// Moves the partition to the leader for a stay, because of a problem with the follower.
    pub(super) fn leave_follower(&mut self, now: Instant) {
        if now.duration_since(self.since) >= MAX_FOLLOWER_RETRY_DELAY {
            self.stays.reset();
        }
        self.leader_until = Some(now + self.stays.next_pause());
    }

    /// Returns the time until which the partition is read at the leader; `None` if there is no such stay. Metadata from
    /// that time or later decides where the partition is read next.
    pub(super) fn leader_until(&self) -> Option<Instant> {
        self.leader_until
    }

    /// Returns the broker at which the partition is read. During a stay this is the leader, otherwise an in-sync
    /// replica in `rack`, or the leader if the rack has none. Returns `None` if the metadata has no such broker, or no
    /// address of that broker.
    pub(super) fn read_target(
        &self,
        routing: &RoutingTable,
        rack: Option<&str>,
        topic: &str,
        partition: u32,
    ) -> Option<ReadTarget> {
        routing.read_target(topic, partition, rack.filter(|_| self.leader_until.is_none()))
    }

    /// Ends the stay at the leader if its time has passed at `received`, when metadata was received.
    pub(super) fn on_metadata(&mut self, received: Instant) {
        if self.leader_until.is_some_and(|until| until <= received) {
            self.leader_until = None;
            self.since = received;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::task::clock;

    fn seconds(n: u64) -> Duration {
        Duration::from_secs(n)
    }

    #[test]
    fn rack_is_retried_with_newer_metadata_after_longer_stays() {
        let start = clock::monotonic();
        let (mut backoff, mut now) = (FollowerBackoff::new(start), start);
        for stay in [5, 10, 20, 40, 60, 60] {
            backoff.leave_follower(now);
            let until = now + seconds(stay);
            assert_eq!(backoff.leader_until(), Some(until));
            backoff.on_metadata(until - seconds(1));
            assert_eq!(backoff.leader_until(), Some(until), "older metadata does not end the stay");
            backoff.on_metadata(until);
            assert_eq!(backoff.leader_until(), None);
            now = until + seconds(1);
        }
        backoff.leave_follower(now + seconds(60));
        assert_eq!(
            backoff.leader_until(),
            Some(now + seconds(65)),
            "after a minute in the rack the stay is short again"
        );
    }
}
