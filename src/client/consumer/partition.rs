//! What a consumer's task knows of one partition that it reads.

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

/// How long a stream is open without a word until what went wrong before it counts as over: at the end of a log no record
/// comes to prove it.
pub(super) const SETTLED: Duration = Duration::from_secs(2);

/// What stands in the way of a partition.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Trouble {
    /// Its leader cannot be reached, or does not lead it: over when a stream stays open.
    Leader,
    /// Its records cannot be read: over when some come.
    Records,
}

pub(super) struct Partition {
    pub(super) generation: u64,
    pub(super) position: Offset,
    /// The stream that carries it.
    pub(super) stream: Option<u64>,
    /// Whether a follower serves it there.
    pub(super) follows: bool,
    pub(super) near: Nearness,
    /// The topic that is read: its position means nothing in another one of the same name.
    pub(super) topic: TopicId,
    /// A broker refused that id. It may know less than this client, so it is asked twice.
    pub(super) mismatched: bool,
    /// The newest leader epoch that metadata or an answer named.
    known: LeaderEpoch,
    /// It failed for good, and waits to be sought.
    pub(super) parked: bool,
    pub(super) pauses: Option<Pauses>,
    pub(super) not_before: Option<Instant>,
    pub(super) damaged: u32,
    pub(super) trouble: Option<Trouble>,
    /// Since when its stream is open.
    pub(super) open_since: Option<Instant>,
}

impl Partition {
    /// A partition to be read from `position` on. What an earlier assignment knew of its leader still holds.
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

    /// It is read on this stream from now on; what is asked for there.
    pub(super) fn carried(&mut self, stream: u64, source: &Source, now: Instant) -> (i64, i32) {
        self.stream = Some(stream);
        self.follows = source.follows;
        self.near.heard(now);
        if source.topic == self.topic {
            self.known = self.known.max(source.epoch);
        }
        (self.position.as_i64(), self.known.as_i32())
    }

    /// Whether the refusal of its topic id may be a broker's that lags: the first one, before the metadata was refreshed.
    pub(super) fn doubts_mismatch(&mut self) -> bool {
        !std::mem::replace(&mut self.mismatched, true)
    }

    /// Whether it may be read, and no stream carries it.
    pub(super) fn is_free(&self, now: Instant) -> bool {
        !self.parked && self.stream.is_none() && self.not_before.is_none_or(|at| at <= now)
    }

    /// Its stream carries it no more.
    pub(super) fn uncarried(&mut self) {
        self.stream = None;
        self.open_since = None;
    }

    /// Takes note of who answered; whether that was in an epoch of which nothing was known.
    pub(super) fn answered(&mut self, fetched: &v1::FetchedPartition) -> bool {
        self.follows = fetched.from_follower;
        let epoch = LeaderEpoch::from_i32(fetched.leader_epoch).filter(|epoch| *epoch > self.known);
        self.known = epoch.unwrap_or(self.known);
        epoch.is_some()
    }

    /// The newest leader epoch that is known of it.
    pub(super) fn epoch(&self) -> LeaderEpoch {
        self.known
    }

    /// A stream that stays open proves that its leader is there again; when to look next, if it is too early to tell.
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
