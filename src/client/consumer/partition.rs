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
    /// The newest leader epoch that metadata or an answer named, of the topic with this id.
    known: Option<(TopicId, LeaderEpoch)>,
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
    pub(super) fn new(generation: u64, position: Offset, now: Instant, before: Option<&Self>) -> Self {
        Self {
            generation,
            position,
            stream: None,
            follows: false,
            near: before.map_or_else(|| Nearness::new(now), |before| before.near),
            known: before.and_then(|before| before.known),
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
        let before = self.known.filter(|(topic, _)| *topic == source.topic).map(|(_, epoch)| epoch);
        let epoch = before.map_or(source.epoch, |before| before.max(source.epoch));
        self.known = Some((source.topic, epoch));
        (self.position.as_i64(), epoch.as_i32())
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
        match (&mut self.known, LeaderEpoch::from_i32(fetched.leader_epoch)) {
            (Some((_, known)), Some(epoch)) if epoch > *known => {
                *known = epoch;
                true
            }
            _ => false,
        }
    }

    /// The newest leader epoch that is known of it.
    pub(super) fn epoch(&self) -> LeaderEpoch {
        self.known.map(|(_, epoch)| epoch).unwrap_or_default()
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
