//! Whether a partition is read in the consumer's rack, and when it is not. Pure.
//!
//! ```text
//!           nothing came for ASK_AFTER            the log ends elsewhere            GRACE later
//!   quiet ──────────────────────────────▶ asked ─────────────────────────▶ behind ──────────────▶ away
//!    ▲ ▲                                    │                                │                     │
//!    │ ╰──── it ends here; or nobody knows ─╯                                │                     │
//!    ╰────── something came ◀────────────────────────────────────────────────╯                     │
//!    ╰────── the stay at the leader is over, and metadata was asked for since ◀────────────────────╯
//! ```
//!
//! A follower that is cut off from its leader and from the metadata has no way to know that the log goes on: it is silent, as at the end
//! of a log. Only the leader can tell the two apart, so it is asked, once in each silence. What a follower refuses or breaks sends its
//! reader to the leader at once. Stays there become longer while the follower does not hold for a minute.

use std::time::Duration;

use tokio::time::Instant;

/// How long a follower may be silent until the leader is asked where the log ends.
pub(super) const ASK_AFTER: Duration = Duration::from_secs(4);

/// How much longer, where the log does not end at the consumer's position.
pub(super) const GRACE: Duration = Duration::from_secs(1);

/// The first stay at the leader, and the longest: each is double the one before.
const STAY: (Duration, Duration) = (Duration::from_secs(5), Duration::from_secs(60));

/// How one partition is read.
#[derive(Clone, Copy, Debug)]
pub(super) struct Nearness {
    /// At its leader until then, whoever stands in the rack.
    away_until: Option<Instant>,
    /// How long the next stay at the leader is.
    stay: Duration,
    /// Since when the rack was not given up.
    since: Instant,
    silence: Silence,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Silence {
    /// Nothing has come since then.
    Quiet(Instant),
    /// The leader is being asked.
    Asked,
    /// It has said since then that the log does not end here.
    Behind(Instant),
}

/// What is to be done about a follower.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// Nothing before then.
    Wait(Instant),
    /// Nothing before the leader's answer.
    Pass,
    /// Ask the leader where the log ends, and say [`Nearness::asked`].
    Ask,
    /// Read at the leader: say [`Nearness::leave`].
    Leave,
}

impl Nearness {
    pub(super) fn new(now: Instant) -> Self {
        Self { away_until: None, stay: STAY.0, since: now, silence: Silence::Quiet(now) }
    }

    /// Something came, or it is read anew, or it was not listened to: silence begins now.
    pub(super) fn heard(&mut self, now: Instant) {
        self.silence = Silence::Quiet(now);
    }

    /// What to do about a follower that is read.
    pub(super) fn step(&self, now: Instant) -> Step {
        let (at, then) = match self.silence {
            Silence::Quiet(since) => (since + ASK_AFTER, Step::Ask),
            Silence::Behind(since) => (since + GRACE, Step::Leave),
            Silence::Asked => return Step::Pass,
        };
        if now < at { Step::Wait(at) } else { then }
    }

    /// The leader is asked where the log ends.
    pub(super) fn asked(&mut self) {
        self.silence = Silence::Asked;
    }

    /// The leader has answered: whether the log ends at the position. What came meanwhile makes its answer void.
    pub(super) fn answered(&mut self, now: Instant, ends_here: bool) {
        if self.silence == Silence::Asked {
            self.silence = if ends_here { Silence::Quiet(now) } else { Silence::Behind(now) };
        }
    }

    /// The follower did not serve as it should: it is read at the leader for a while.
    pub(super) fn leave(&mut self, now: Instant) {
        let (first, longest) = STAY;
        if now.duration_since(self.since) >= longest {
            self.stay = first;
        }
        self.away_until = Some(now + self.stay);
        self.stay = (self.stay * 2).min(longest);
        self.silence = Silence::Quiet(now);
    }

    /// Until when it is read at the leader; from then on metadata of that time or later says where.
    pub(super) fn away_until(&self) -> Option<Instant> {
        self.away_until
    }

    /// The rack may serve it again, by metadata of `known`.
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
    fn a_silent_follower_is_left_only_when_its_leader_has_more() {
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
    fn the_rack_is_tried_again_by_newer_metadata_and_later_each_time() {
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
