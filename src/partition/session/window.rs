//! How much may be under way on a link, and how fast a replica may catch up. Pure.
//!
//! ```text
//!   leader: sent ─▶ … pipe … ─▶ follower's queue ─▶ written ─▶ acknowledged
//!           ╰──────────────── under way ─────────────────────────────╯
//! ```
//! Bytes are under way from when they are read until the follower has acknowledged them as written. What a place may have under way fits
//! the queue of the follower's partition, so a follower takes what comes without waiting, and one slow partition takes no room from others.

use std::collections::VecDeque;

use crate::model::Offset;

/// Bytes of one place that may be under way, but for one batch that is larger.
pub(super) const PLACE_BYTES: usize = 4 << 20;

/// Pieces of one place that may be under way: the follower's partition queues each of them.
pub(super) const PLACE_PIECES: usize = 64;

/// Bytes of all places of a link that may be under way.
pub(super) const LINK_BYTES: usize = 64 << 20;

/// Bytes that one read asks for.
const READ_BYTES: usize = 256 << 10;

/// Bytes that a place with nothing under way may ask for whatever the others have under way: however many of them are stuck, it goes on.
const LEAST_BYTES: usize = 16 << 10;

/// More was acknowledged than was sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("offset {acknowledged} is acknowledged, and only what is below {sent} was sent")]
pub(super) struct NeverSent {
    /// What the follower says it has.
    acknowledged: Offset,
    /// The end of what it was sent.
    sent: Offset,
}

/// What is under way at one place.
#[derive(Debug)]
pub(super) struct Window {
    /// Each piece's end and bytes, oldest first.
    pieces: VecDeque<(Offset, usize)>,
    bytes: usize,
    /// The end of what was sent.
    sent: Offset,
}

impl Window {
    /// Of a place whose follower has all below `at`.
    pub(super) fn new(at: Offset) -> Self {
        Self { pieces: VecDeque::new(), bytes: 0, sent: at }
    }

    /// Where the next piece begins.
    pub(super) fn sent(&self) -> Offset {
        self.sent
    }

    /// Bytes under way.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// How many bytes the next read may ask for, when it may. A read gives one batch at least, so one that is larger than any window
    /// goes too.
    pub(super) fn room(&self, link_bytes: usize) -> Option<usize> {
        if self.pieces.is_empty() {
            return Some(LINK_BYTES.saturating_sub(link_bytes).clamp(LEAST_BYTES, READ_BYTES));
        }
        let left = PLACE_BYTES.saturating_sub(self.bytes).min(LINK_BYTES.saturating_sub(link_bytes));
        (self.pieces.len() < PLACE_PIECES && left > 0).then_some(left.min(READ_BYTES))
    }

    /// A piece was read that ends at `end`.
    pub(super) fn send(&mut self, end: Offset, bytes: usize) {
        debug_assert!(end > self.sent, "pieces follow each other");
        self.pieces.push_back((end, bytes));
        self.bytes += bytes;
        self.sent = end;
    }

    /// The follower has written all below `written`. Gives the bytes that this frees.
    pub(super) fn acknowledge(&mut self, written: Offset) -> Result<usize, NeverSent> {
        if written > self.sent {
            return Err(NeverSent { acknowledged: written, sent: self.sent });
        }
        let before = self.bytes;
        while let Some((end, bytes)) = self.pieces.front().copied()
            && end <= written
        {
            self.bytes -= bytes;
            self.pieces.pop_front();
        }
        Ok(before - self.bytes)
    }
}

/// A bucket of tokens: what replicas that catch up may take of a leader's broker in a second, all together.
///
/// What is read is taken afterwards, whatever it was: the bucket may be overdrawn by one read, and the next one waits until it is paid.
#[derive(Debug)]
pub(super) struct Throttle {
    bytes_per_second: Option<u64>,
    /// What may be taken now; negative when overdrawn. Never more than one second's.
    left: i64,
    /// When it was last filled, in milliseconds.
    filled_ms: u64,
}

impl Throttle {
    /// So many bytes in a second; without a number as many as there are.
    pub(super) fn new(bytes_per_second: Option<u64>) -> Self {
        let left = bytes_per_second.map_or(0, signed);
        Self { bytes_per_second, left, filled_ms: 0 }
    }

    /// When the next read may begin, in milliseconds of the clock that `now_ms` is of, which never goes back. `None`: now.
    pub(super) fn wait(&mut self, now_ms: u64) -> Option<u64> {
        let rate = self.bytes_per_second?.max(1);
        let passed = now_ms.saturating_sub(self.filled_ms).min(60_000);
        let gained = signed(rate.saturating_mul(passed) / 1000);
        if gained > 0 {
            self.left = self.left.saturating_add(gained).min(signed(rate));
            self.filled_ms = now_ms;
        }
        (self.left <= 0).then(|| now_ms + 1 + self.left.unsigned_abs().saturating_mul(1000) / rate)
    }

    /// So many bytes were read.
    pub(super) fn take(&mut self, bytes: usize) {
        if self.bytes_per_second.is_some() {
            self.left = self.left.saturating_sub(i64::try_from(bytes).unwrap_or(i64::MAX));
        }
    }
}

fn signed(bytes: u64) -> i64 {
    i64::try_from(bytes).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn at(offset: u64) -> Offset {
        Offset::new(offset).unwrap()
    }

    #[test]
    fn a_full_place_waits_for_acknowledgements_and_one_large_batch_always_goes() {
        let mut window = Window::new(at(10));
        assert_eq!(window.room(0), Some(READ_BYTES));
        window.send(at(11), 60 << 20);
        assert_eq!(window.room(0), None, "a batch above the window fills it");
        assert_eq!(window.acknowledge(at(10)), Ok(0));
        assert_eq!(window.acknowledge(at(11)), Ok(60 << 20));
        assert_eq!(window.room(LINK_BYTES), Some(LEAST_BYTES), "stuck places do not stop the others");
        window.send(at(12), 1);
        assert_eq!(window.room(LINK_BYTES - 5), Some(5), "the link's room binds too");
        assert_eq!(window.room(LINK_BYTES), None);
        assert_eq!(window.acknowledge(at(12)), Ok(1));
        for n in 0..64 {
            assert!(window.room(0).is_some());
            window.send(at(13 + n), 1);
        }
        assert_eq!(window.room(0), None, "so many pieces are as many as the follower queues");
        assert!(window.acknowledge(at(77)).is_err(), "nobody has what was not sent");
        assert_eq!(window.acknowledge(at(76)), Ok(64));
    }

    #[test]
    fn a_throttle_gives_what_was_set_and_not_more() {
        let mut throttle = Throttle::new(Some(1000));
        assert_eq!(throttle.wait(5), None);
        throttle.take(3000);
        let until = throttle.wait(5).expect("overdrawn by two seconds");
        assert!((2005..2010).contains(&until), "{until}");
        assert!(throttle.wait(until - 2).is_some());
        assert_eq!(throttle.wait(until), None);
        let mut none = Throttle::new(None);
        none.take(usize::MAX);
        assert_eq!(none.wait(0), None);
    }

    proptest! {
        #[test]
        fn what_is_under_way_is_what_was_sent_and_not_acknowledged(steps in prop::collection::vec((1u64..9, 0usize..9000, 0u64..12), 1..200)) {
            let mut window = Window::new(at(0));
            let (mut sent, mut under_way) = (Vec::new(), 0);
            for (records, bytes, back) in steps {
                let end = at(window.sent().get() + records);
                if window.room(0).is_some() {
                    window.send(end, bytes);
                    sent.push((end, bytes));
                    under_way += bytes;
                }
                let written = at(window.sent().get().saturating_sub(back));
                under_way -= window.acknowledge(written).unwrap();
                sent.retain(|(end, _)| *end > written);
                prop_assert_eq!(window.bytes(), under_way);
                prop_assert_eq!(under_way, sent.iter().map(|(_, bytes)| bytes).sum::<usize>());
                prop_assert!(sent.len() <= PLACE_PIECES);
            }
        }
    }
}
