//! State of one partition in the consumer's task.

use std::time::Duration;

use tokio::time::Instant;

use super::{
    super::{metadata::ReadTarget, retry_status::RetryReporter},
    follower_backoff::FollowerBackoff,
};
use crate::{
    model::{LeaderEpoch, Offset, TopicId},
    proto::v1,
    task::Backoff,
};

/// Time for which a stream must be open before a problem with the leader is cleared. At the end of a log no record
/// arrives that would clear it.
pub(super) const STABLE_AFTER: Duration = Duration::from_secs(2);

/// Problem that blocks a partition.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FetchProblem {
    /// The leader is unreachable or does not lead the partition. Cleared when a stream stays open.
    Leader,
    /// The records cannot be read. Cleared when records arrive.
    Records,
}

pub(super) struct PartitionFetchState {
    pub(super) generation: u64,
    pub(super) position: Offset,
    /// Stream of the partition.
    pub(super) stream: Option<u64>,
    /// True if a follower serves the partition on that stream.
    pub(super) follows: bool,
    pub(super) follower_backoff: FollowerBackoff,
    /// Id of the topic that is read: the position is invalid in another topic of the same name.
    pub(super) topic: TopicId,
    /// True once a broker rejected the topic id. The broker's metadata may be older than the client's, so the read is
    /// repeated once.
    pub(super) mismatched: bool,
    /// Newest leader epoch from metadata or from a response.
    leader_epoch: LeaderEpoch,
    /// True if the partition failed and waits for a seek.
    pub(super) failed: bool,
    pub(super) backoff: Option<Backoff>,
    pub(super) not_before: Option<Instant>,
    pub(super) corrupt_reads: u32,
    pub(super) problem: Option<FetchProblem>,
    /// Time since which the stream is open.
    pub(super) open_since: Option<Instant>,
}

impl PartitionFetchState {
    /// Creates the state of a partition that is read from `position` on. The follower state and, for the same topic id,
    /// the leader epoch of an earlier assignment remain valid.
    pub(super) fn new(generation: u64, topic: TopicId, position: Offset, now: Instant, earlier: Option<Self>) -> Self {
        let leader_epoch =
            earlier.as_ref().filter(|earlier| earlier.topic == topic).map(|earlier| earlier.leader_epoch);
        Self {
            topic,
            mismatched: false,
            generation,
            position,
            stream: None,
            follows: false,
            follower_backoff: earlier.map_or_else(|| FollowerBackoff::new(now), |earlier| earlier.follower_backoff),
            leader_epoch: leader_epoch.unwrap_or_default(),
            failed: false,
            backoff: None,
            not_before: None,
            corrupt_reads: 0,
            problem: None,
            open_since: None,
        }
    }

    /// Attaches the partition to a stream. Returns the offset and the leader epoch to request.
    pub(super) fn attach(&mut self, stream: u64, source: &ReadTarget) -> (i64, i32) {
        self.stream = Some(stream);
        self.follows = source.follows;
        if source.topic == self.topic {
            self.leader_epoch = self.leader_epoch.max(source.epoch);
        }
        (self.position.as_i64(), self.leader_epoch.as_i32())
    }

    /// Returns true for the first rejection of the topic id: the metadata of the broker may be old.
    pub(super) fn retries_mismatch(&mut self) -> bool {
        !std::mem::replace(&mut self.mismatched, true)
    }

    /// Returns true if the partition may be read and has no stream.
    pub(super) fn is_free(&self, now: Instant) -> bool {
        !self.failed && self.stream.is_none() && self.not_before.is_none_or(|at| at <= now)
    }

    /// Detaches the partition from its stream.
    pub(super) fn detach(&mut self) {
        self.stream = None;
        self.open_since = None;
    }

    /// Records the role and the leader epoch of the broker that responded. Returns true if the epoch is newer than the
    /// epoch before.
    pub(super) fn on_response(&mut self, fetched: &v1::FetchedPartition) -> bool {
        self.follows = fetched.from_follower;
        let epoch = LeaderEpoch::from_i32(fetched.leader_epoch).filter(|epoch| *epoch > self.leader_epoch);
        self.leader_epoch = epoch.unwrap_or(self.leader_epoch);
        epoch.is_some()
    }

    /// Returns the newest leader epoch from metadata or from a response.
    pub(super) fn epoch(&self) -> LeaderEpoch {
        self.leader_epoch
    }

    /// Clears a problem with the leader once the stream has been open for [`STABLE_AFTER`]. Returns the time of the
    /// next check if it is too early.
    pub(super) fn after_stable_stream(&mut self, now: Instant, retries: &RetryReporter) -> Option<Instant> {
        let stable_at = self.open_since? + STABLE_AFTER;
        if self.problem != Some(FetchProblem::Leader) {
            return None;
        }
        if stable_at > now {
            return Some(stable_at);
        }
        self.clear_problem(retries);
        None
    }

    pub(super) fn clear_problem(&mut self, retries: &RetryReporter) {
        if self.problem.take().is_some() {
            retries.clear(self.generation);
        }
    }
}
