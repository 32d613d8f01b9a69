//! Decides whether a partition is read in the consumer's rack or at its leader. Pure.
//!
//! ```text
//!        no data for QUERY_LEADER_AFTER          log end is not the position   ANSWER_GRACE_DELAY later
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
pub(super) const QUERY_LEADER_AFTER: Duration = Duration::from_secs(4);

/// Further time without data, if the log does not end at the consumer's position, after which the partition moves to
/// the leader.
pub(super) const RESPONSE_GRACE_DELAY: Duration = Duration::from_secs(1);

/// First and longest stay at the leader; each stay is twice as long as the one before.
const LEADER_STAY: (Duration, Duration) = (Duration::from_secs(5), Duration::from_secs(60));

/// Choice between rack and leader for one partition.
#[derive(Clone, Copy, Debug)]
pub(super) struct FollowerBackoff {
    /// Time until which the partition is read at its leader, regardless of replicas in the rack.
    away_until: Option<Instant>,
    /// Length of the next stay at the leader.
    stay: Duration,
    /// Time since which the rack serves the partition.
    since: Instant,
    silence: SilenceState,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum SilenceState {
    /// No data has arrived since this time.
    Quiet(Instant),
    /// The leader is being queried.
    Asked,
    /// The leader responded at this time that the log does not end at the position.
    Behind(Instant),
}

/// Next action for a follower.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FollowerStep {
    /// Wait until this time.
    Wait(Instant),
    /// Wait for the leader's response.
    Pass,
    /// Query the leader for the log end, and call [`FollowerBackoff::on_query_sent`].
    Ask,
    /// Read at the leader: call [`FollowerBackoff::leave_follower`].
    Leave,
}

impl FollowerBackoff {
    pub(super) fn new(now: Instant) -> Self {
        Self { away_until: None, stay: LEADER_STAY.0, since: now, silence: SilenceState::Quiet(now) }
    }

    /// Restarts the period without data: data arrived, the partition has a new stream, or the stream was not read.
    pub(super) fn on_data(&mut self, now: Instant) {
        self.silence = SilenceState::Quiet(now);
    }

    /// Returns the next action for a follower that serves the partition.
    pub(super) fn step(&self, now: Instant) -> FollowerStep {
        let (at, then) = match self.silence {
            SilenceState::Quiet(since) => (since + QUERY_LEADER_AFTER, FollowerStep::Ask),
            SilenceState::Behind(since) => (since + RESPONSE_GRACE_DELAY, FollowerStep::Leave),
            SilenceState::Asked => return FollowerStep::Pass,
        };
        if now < at { FollowerStep::Wait(at) } else { then }
    }

    /// Records that the leader is being queried.
    pub(super) fn on_query_sent(&mut self) {
        self.silence = SilenceState::Asked;
    }

    /// Processes the leader's response; `ends_here` is true if the log ends at the position. The response is void if
    /// data arrived in the meantime.
    pub(super) fn on_latest(&mut self, now: Instant, ends_here: bool) {
        if self.silence == SilenceState::Asked {
            self.silence = if ends_here { SilenceState::Quiet(now) } else { SilenceState::Behind(now) };
        }
    }

    /// Moves the partition to the leader for a stay, because of a problem with the follower.
    pub(super) fn leave_follower(&mut self, now: Instant) {
        let (first, longest) = LEADER_STAY;
        if now.duration_since(self.since) >= longest {
            self.stay = first;
        }
        self.away_until = Some(now + self.stay);
        self.stay = (self.stay * 2).min(longest);
        self.silence = SilenceState::Quiet(now);
    }

    /// Returns the time until which the partition is read at the leader. Metadata from that time or later decides where
    /// it is read next.
    pub(super) fn away_until(&self) -> Option<Instant> {
        self.away_until
    }

    /// Ends the stay at the leader if it was over when metadata was received at `received`.
    pub(super) fn on_metadata(&mut self, received: Instant) {
        if self.away_until.is_some_and(|until| until <= received) {
            self.away_until = None;
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
    fn follower_without_data_is_left_only_if_leader_has_more() {
        let start = clock::monotonic();
        let mut backoff = FollowerBackoff::new(start);
        assert_eq!(backoff.step(start), FollowerStep::Wait(start + seconds(4)));
        assert_eq!(backoff.step(start + seconds(4)), FollowerStep::Ask);
        backoff.on_query_sent();
        assert_eq!(backoff.step(start + seconds(100)), FollowerStep::Pass);
        backoff.on_latest(start + seconds(5), true);
        assert_eq!(backoff.step(start + seconds(5)), FollowerStep::Wait(start + seconds(9)), "the log ends here");
        backoff.on_query_sent();
        backoff.on_latest(start + seconds(9), false);
        assert_eq!(backoff.step(start + seconds(9)), FollowerStep::Wait(start + seconds(10)), "records in flight");
        assert_eq!(backoff.step(start + seconds(10)), FollowerStep::Leave);
        backoff.on_data(start + seconds(10));
        assert_eq!(backoff.step(start + seconds(10)), FollowerStep::Wait(start + seconds(14)), "records arrived");
        backoff.on_query_sent();
        backoff.on_data(start + seconds(15));
        backoff.on_latest(start + seconds(16), false);
        assert_eq!(
            backoff.step(start + seconds(16)),
            FollowerStep::Wait(start + seconds(19)),
            "a response after the data is ignored"
        );
    }

    #[test]
    fn rack_is_retried_with_newer_metadata_after_longer_stays() {
        let start = clock::monotonic();
        let (mut backoff, mut now) = (FollowerBackoff::new(start), start);
        for stay in [5, 10, 20, 40, 60, 60] {
            backoff.leave_follower(now);
            let until = now + seconds(stay);
            assert_eq!(backoff.away_until(), Some(until));
            backoff.on_metadata(until - seconds(1));
            assert_eq!(backoff.away_until(), Some(until), "older metadata does not end the stay");
            backoff.on_metadata(until);
            assert_eq!(backoff.away_until(), None);
            now = until + seconds(1);
        }
        backoff.leave_follower(now + seconds(60));
        assert_eq!(backoff.away_until(), Some(now + seconds(65)), "after a minute in the rack the stay is short again");
    }
}
