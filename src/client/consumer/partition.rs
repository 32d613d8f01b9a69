//! State of one partition in the consumer's task.

use std::time::Duration;

use tokio::time::Instant;

use super::{
    super::{options::Pauses, routing::Source, trouble::Party},
    nearness::Nearness,
};
use crate::{
    model::{LeaderEpoch, Offset, TopicId},
    proto::v1,
};

/// Time for which a stream must be open before a problem with the leader is cleared. At the end of a log no record
/// arrives that would clear it.
pub(super) const SETTLED: Duration = Duration::from_secs(2);

/// Problem that blocks a partition.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Trouble {
    /// The leader is unreachable or does not lead the partition. Cleared when a stream stays open.
    Leader,
    /// The records cannot be read. Cleared when records arrive.
    Records,
}

pub(super) struct Partition {
    pub(super) generation: u64,
    pub(super) position: Offset,
    /// Stream of the partition.
    pub(super) stream: Option<u64>,
    /// True if a follower serves the partition on that stream.
    pub(super) follows: bool,
    pub(super) near: Nearness,
    /// Id of the topic that is read: the position is invalid in another topic of the same name.
    pub(super) topic: TopicId,
    /// True once a broker rejected the topic id. The broker's metadata may be older than the client's, so the read is
    /// repeated once.
    pub(super) mismatched: bool,
    /// Newest leader epoch from metadata or from a response.
    known: LeaderEpoch,
    /// True if the partition failed and waits for a seek.
    pub(super) parked: bool,
    pub(super) pauses: Option<Pauses>,
    pub(super) not_before: Option<Instant>,
    pub(super) damaged: u32,
    pub(super) trouble: Option<Trouble>,
    /// Time since which the stream is open.
    pub(super) open_since: Option<Instant>,
}

impl Partition {
    /// Creates the state of a partition that is read from `position` on. The follower state and, for the same topic id,
    /// the leader epoch of an earlier assignment remain valid.
    pub(super) fn new(generation: u64, topic: TopicId, position: Offset, now: Instant, before: Option<&Self>) -> Self {
        Self {
            topic,
            mismatched: false,
            generation,
            position,
            stream: None,
            follows: false,
            near: before.map_or_else(|| Nearness::new(now), |before| before.near),
            known: before.filter(|before| before.topic == topic).map(|before| before.known).unwrap_or_default(),
            parked: false,
            pauses: None,
            not_before: None,
            damaged: 0,
            trouble: None,
            open_since: None,
        }
    }

    /// Attaches the partition to a stream. Returns the offset and the leader epoch to request.
    pub(super) fn carried(&mut self, stream: u64, source: &Source, now: Instant) -> (i64, i32) {
        self.stream = Some(stream);
        self.follows = source.follows;
        self.near.heard(now);
        if source.topic == self.topic {
            self.known = self.known.max(source.epoch);
        }
        (self.position.as_i64(), self.known.as_i32())
    }

    /// Returns true for the first rejection of the topic id: the metadata of the broker may be old.
    pub(super) fn doubts_mismatch(&mut self) -> bool {
        !std::mem::replace(&mut self.mismatched, true)
    }

    /// Returns true if the partition may be read and has no stream.
    pub(super) fn is_free(&self, now: Instant) -> bool {
        !self.parked && self.stream.is_none() && self.not_before.is_none_or(|at| at <= now)
    }

    /// Detaches the partition from its stream.
    pub(super) fn uncarried(&mut self) {
        self.stream = None;
        self.open_since = None;
    }

    /// Records the role and the leader epoch of the broker that responded. Returns true if the epoch is newer than the
    /// known one.
    pub(super) fn answered(&mut self, fetched: &v1::FetchedPartition) -> bool {
        self.follows = fetched.from_follower;
        let epoch = LeaderEpoch::from_i32(fetched.leader_epoch).filter(|epoch| *epoch > self.known);
        self.known = epoch.unwrap_or(self.known);
        epoch.is_some()
    }

    /// Returns the newest known leader epoch.
    pub(super) fn epoch(&self) -> LeaderEpoch {
        self.known
    }

    /// Clears a problem with the leader once the stream has been open for [`SETTLED`]. Returns the time of the next
    /// check if it is too early.
    pub(super) fn settle(&mut self, now: Instant, troubles: &Party) -> Option<Instant> {
        let settled = self.open_since? + SETTLED;
        if self.trouble != Some(Trouble::Leader) {
            return None;
        }
        if settled > now {
            return Some(settled);
        }
        self.over(troubles);
        None
    }

    pub(super) fn over(&mut self, troubles: &Party) {
        if self.trouble.take().is_some() {
            troubles.leave(self.generation);
        }
    }
}
