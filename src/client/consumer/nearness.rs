//! Decides whether a partition is read in the consumer's rack or at its leader. Pure.
//!
//! ```text
//!           no data for ASK_AFTER                log end is not the position         GRACE later
//!   quiet ──────────────────────────────▶ asked ─────────────────────────▶ behind ──────────────▶ away
//!    ▲ ▲                                    │                                │                     │
//!    │ ╰── log end is position, or unknown ─╯                                │                     │
//!    ╰────── data arrived ◀──────────────────────────────────────────────────╯                     │
//!    ╰────── the stay at the leader is over, and metadata was refreshed since ◀────────────────────╯
//! ```
//!
//! A follower that is partitioned from its leader and from the metadata store cannot detect that the log grows. It
//! sends nothing, as at the end of a log. Only the leader can distinguish the two cases, so the consumer queries it
//! once per period without data. An error or a broken stream of the follower moves the partition to the leader at once.
//! Each stay at the leader is longer than the one before, until the follower has served for a minute.

use std::time::Duration;

use tokio::time::Instant;

/// Time without data from a follower after which the leader is queried for the log end.
pub(super) const ASK_AFTER: Duration = Duration::from_secs(4);

/// Further time without data, if the log does not end at the consumer's position, after which the partition moves to
/// the leader.
pub(super) const GRACE: Duration = Duration::from_secs(1);

/// First and longest stay at the leader; each stay is twice as long as the one before.
const STAY: (Duration, Duration) = (Duration::from_secs(5), Duration::from_secs(60));

/// Choice between rack and leader for one partition.
#[derive(Clone, Copy, Debug)]
pub(super) struct Nearness {
    /// Time until which the partition is read at its leader, regardless of replicas in the rack.
    away_until: Option<Instant>,
    /// Length of the next stay at the leader.
    stay: Duration,
    /// Time since which the rack serves the partition.
    since: Instant,
    silence: Silence,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Silence {
    /// No data has arrived since this time.
    Quiet(Instant),
    /// The leader is being queried.
    Asked,
    /// The leader responded at this time that the log does not end at the position.
    Behind(Instant),
}

/// Next action for a follower.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// Wait until this time.
    Wait(Instant),
    /// Wait for the leader's response.
    Pass,
    /// Query the leader for the log end, and call [`Nearness::asked`].
    Ask,
    /// Read at the leader: call [`Nearness::leave`].
    Leave,
}

impl Nearness {
    pub(super) fn new(now: Instant) -> Self {
        Self { away_until: None, stay: STAY.0, since: now, silence: Silence::Quiet(now) }
    }

    /// Restarts the period without data: data arrived, the partition has a new stream, or the stream was not read.
    pub(super) fn heard(&mut self, now: Instant) {
        self.silence = Silence::Quiet(now);
    }

    /// Returns the next action for a follower that serves the partition.
    pub(super) fn step(&self, now: Instant) -> Step {
        let (at, then) = match self.silence {
            Silence::Quiet(since) => (since + ASK_AFTER, Step::Ask),
            Silence::Behind(since) => (since + GRACE, Step::Leave),
            Silence::Asked => return Step::Pass,
        };
        if now < at { Step::Wait(at) } else { then }
    }

    /// Records that the leader is being queried.
    pub(super) fn asked(&mut self) {
        self.silence = Silence::Asked;
    }

    /// Processes the leader's response; `ends_here` is true if the log ends at the position. The response is void if
    /// data arrived in the meantime.
    pub(super) fn answered(&mut self, now: Instant, ends_here: bool) {
        if self.silence == Silence::Asked {
            self.silence = if ends_here { Silence::Quiet(now) } else { Silence::Behind(now) };
        }
    }

    /// Moves the partition to the leader for a stay, because of a problem with the follower.
    pub(super) fn leave(&mut self, now: Instant) {
        let (first, longest) = STAY;
        if now.duration_since(self.since) >= longest {
            self.stay = first;
        }
        self.away_until = Some(now + self.stay);
        self.stay = (self.stay * 2).min(longest);
        self.silence = Silence::Quiet(now);
    }

    /// Returns the time until which the partition is read at the leader. Metadata from that time or later decides where
    /// it is read next.
    pub(super) fn away_until(&self) -> Option<Instant> {
        self.away_until
    }

    /// Ends the stay at the leader if it was over when metadata was received at `known`.
    pub(super) fn learned(&mut self, known: Instant) {
        if self.away_until.is_some_and(|until| until <= known) {
            self.away_until = None;
            self.since = known;
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
    fn silent_follower_is_left_only_if_leader_has_more() {
        let start = clock::monotonic();
        let mut near = Nearness::new(start);
        assert_eq!(near.step(start), Step::Wait(start + seconds(4)));
        assert_eq!(near.step(start + seconds(4)), Step::Ask);
        near.asked();
        assert_eq!(near.step(start + seconds(100)), Step::Pass);
        near.answered(start + seconds(5), true);
        assert_eq!(near.step(start + seconds(5)), Step::Wait(start + seconds(9)), "the log ends here");
        near.asked();
        near.answered(start + seconds(9), false);
        assert_eq!(near.step(start + seconds(9)), Step::Wait(start + seconds(10)), "it may be on its way");
        assert_eq!(near.step(start + seconds(10)), Step::Leave);
        near.heard(start + seconds(10));
        assert_eq!(near.step(start + seconds(10)), Step::Wait(start + seconds(14)), "it was");
        near.asked();
        near.heard(start + seconds(15));
        near.answered(start + seconds(16), false);
        assert_eq!(near.step(start + seconds(16)), Step::Wait(start + seconds(19)), "an answer that came too late");
    }

    #[test]
    fn rack_is_retried_with_newer_metadata_after_longer_stays() {
        let start = clock::monotonic();
        let (mut near, mut now) = (Nearness::new(start), start);
        for stay in [5, 10, 20, 40, 60, 60] {
            near.leave(now);
            let until = now + seconds(stay);
            assert_eq!(near.away_until(), Some(until));
            near.learned(until - seconds(1));
            assert_eq!(near.away_until(), Some(until), "what was known before says nothing");
            near.learned(until);
            assert_eq!(near.away_until(), None);
            now = until + seconds(1);
        }
        near.leave(now + seconds(60));
        assert_eq!(near.away_until(), Some(now + seconds(65)), "it had held for a minute");
    }
}
