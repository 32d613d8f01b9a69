//! Bytes in flight on a link, and the rate at which replicas catch up.
//!
//! ```text
//!   leader: sent ─▶ … link … ─▶ follower's queue ─▶ written ─▶ acknowledged
//!           ╰──────────────── in flight ─────────────────────────────╯
//! ```
//! Bytes are in flight from their read until the follower has acknowledged them as written. The bytes in flight of one
//! subscription fit the queue of the follower's partition. So a follower takes messages without waiting, and a slow
//! partition takes no space from others.

use std::{collections::VecDeque, time::Duration};

use parking_lot::Mutex;
use tokio::time::Instant;

use crate::{model::Offset, task::clock};

/// Maximum bytes in flight of one subscription, except for one batch that is larger.
pub(super) const MAX_SUBSCRIPTION_BYTES: usize = 4 << 20;

/// Maximum reads in flight of one subscription: the follower's partition queues the batches of each.
pub(super) const MAX_SUBSCRIPTION_READS: usize = 64;

/// Maximum bytes in flight of all subscriptions of a link.
pub(super) const MAX_LINK_BYTES: usize = 64 << 20;

/// Maximum bytes of one read, except for one batch that is larger.
const READ_BYTES: usize = 256 << 10;

/// Bytes that a subscription with nothing in flight may read, even if other subscriptions fill the link: blocked
/// subscriptions do not stop it.
const MIN_SEND_BYTES: usize = 16 << 10;

/// Error of an acknowledgement beyond the sent records.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("acknowledged offset {acknowledged} is above the end {sent} of the sent records")]
pub(super) struct AckBeyondSent {
    /// Log end that the follower acknowledged.
    acknowledged: Offset,
    /// End of the sent records.
    sent: Offset,
}

/// Records in flight of one subscription.
#[derive(Debug)]
pub(super) struct SendWindow {
    /// End and bytes of each read, oldest first.
    in_flight: VecDeque<(Offset, usize)>,
    bytes: usize,
    /// End of the sent records.
    sent: Offset,
}

impl SendWindow {
    /// Creates the window of a subscription whose follower has all records below `at`.
    pub(super) fn new(at: Offset) -> Self {
        Self { in_flight: VecDeque::new(), bytes: 0, sent: at }
    }

    /// Returns the first offset of the next read.
    pub(super) fn sent(&self) -> Offset {
        self.sent
    }

    /// Returns the bytes in flight.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Returns the maximum bytes of the next read, if a read is allowed. A read returns one batch at least, so a batch
    /// that is larger than any window is sent too.
    pub(super) fn room(&self, link_bytes: usize) -> Option<usize> {
        if self.in_flight.is_empty() {
            return Some(MAX_LINK_BYTES.saturating_sub(link_bytes).clamp(MIN_SEND_BYTES, READ_BYTES));
        }
        let space = MAX_SUBSCRIPTION_BYTES.saturating_sub(self.bytes).min(MAX_LINK_BYTES.saturating_sub(link_bytes));
        (self.in_flight.len() < MAX_SUBSCRIPTION_READS && space > 0).then_some(space.min(READ_BYTES))
    }

    /// Records a read that ends at `end`.
    pub(super) fn send(&mut self, end: Offset, bytes: usize) {
        debug_assert!(end > self.sent, "batches are sent in the order of their offsets");
        self.in_flight.push_back((end, bytes));
        self.bytes += bytes;
        self.sent = end;
    }

    /// Applies an acknowledgement: the follower has written all records below `written`. Returns the bytes that this
    /// frees.
    pub(super) fn acknowledge(&mut self, written: Offset) -> Result<usize, AckBeyondSent> {
        if written > self.sent {
            return Err(AckBeyondSent { acknowledged: written, sent: self.sent });
        }
        let before = self.bytes;
        while let Some((end, bytes)) = self.in_flight.front().copied()
            && end <= written
        {
            self.bytes -= bytes;
            self.in_flight.pop_front();
        }
        Ok(before - self.bytes)
    }
}

/// Token bucket: the bytes that catching-up replicas may read from a leader's broker in a second, all together.
///
/// The bytes of a read are taken afterwards. So one read may overdraw the bucket, and the next read waits until
/// the bucket is filled again.
#[derive(Debug)]
pub(super) struct RateLimiter {
    bytes_per_second: Option<u64>,
    /// Bytes that may be taken now; negative if overdrawn. Never more than those of one second.
    available: i64,
    /// Time of the last fill, in milliseconds.
    filled_ms: u64,
}

impl RateLimiter {
    /// Creates a throttle of this number of bytes per second; `None` is no limit.
    pub(super) fn new(bytes_per_second: Option<u64>) -> Self {
        let available = bytes_per_second.map_or(0, signed);
        Self { bytes_per_second, available, filled_ms: 0 }
    }

    /// Returns the time at which the next read may begin, in milliseconds of the monotonic clock of `now_ms`. `None`:
    /// now.
    pub(super) fn next_send_at(&mut self, now_ms: u64) -> Option<u64> {
        let rate = self.bytes_per_second?.max(1);
        let passed = now_ms.saturating_sub(self.filled_ms).min(60_000);
        let gained = signed(rate.saturating_mul(passed) / 1000);
        if gained > 0 {
            self.available = self.available.saturating_add(gained).min(signed(rate));
            self.filled_ms = now_ms;
        }
        (self.available <= 0).then(|| now_ms + 1 + self.available.unsigned_abs().saturating_mul(1000) / rate)
    }

    /// Takes the bytes of a read.
    pub(super) fn take(&mut self, bytes: usize) {
        if self.bytes_per_second.is_some() {
            self.available = self.available.saturating_sub(i64::try_from(bytes).unwrap_or(i64::MAX));
        }
    }
}

/// Limit on the bytes that catching-up replicas read from this broker, over all links together.
#[derive(Debug)]
pub struct CatchUpThrottle {
    began: Instant,
    throttle: Mutex<RateLimiter>,
}

impl CatchUpThrottle {
    /// Creates a limit in bytes per second; `None` is no limit.
    pub fn new(bytes_per_second: Option<u64>) -> Self {
        Self { began: clock::monotonic(), throttle: Mutex::new(RateLimiter::new(bytes_per_second)) }
    }

    /// Returns the time at which the next read may begin; `None` if it may begin now.
    pub(super) fn next_send_at(&self) -> Option<Instant> {
        let now = clock::monotonic();
        let now_ms = u64::try_from(now.saturating_duration_since(self.began).as_millis()).unwrap_or(u64::MAX);
        let until_ms = self.throttle.lock().next_send_at(now_ms)?;
        Some(now + Duration::from_millis(until_ms.saturating_sub(now_ms)))
    }

    pub(super) fn take(&self, bytes: usize) {
        self.throttle.lock().take(bytes);
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
    fn full_window_blocks_and_one_large_batch_always_fits() {
        let mut window = SendWindow::new(at(10));
        assert_eq!(window.room(0), Some(READ_BYTES));
        window.send(at(11), 60 << 20);
        assert_eq!(window.room(0), None, "a batch above the window fills the window");
        assert_eq!(window.acknowledge(at(10)), Ok(0));
        assert_eq!(window.acknowledge(at(11)), Ok(60 << 20));
        assert_eq!(window.room(MAX_LINK_BYTES), Some(MIN_SEND_BYTES), "blocked subscriptions do not stop others");
        window.send(at(12), 1);
        assert_eq!(window.room(MAX_LINK_BYTES - 5), Some(5), "the space of the link limits a read");
        assert_eq!(window.room(MAX_LINK_BYTES), None);
        assert_eq!(window.acknowledge(at(12)), Ok(1));
        for n in 0..64 {
            assert!(window.room(0).is_some());
            window.send(at(13 + n), 1);
        }
        assert_eq!(window.room(0), None, "the number of reads in flight is limited");
        assert!(window.acknowledge(at(77)).is_err(), "unsent records cannot be acknowledged");
        assert_eq!(window.acknowledge(at(76)), Ok(64));
    }

    #[test]
    fn throttle_keeps_the_configured_rate() {
        let mut throttle = RateLimiter::new(Some(1000));
        assert_eq!(throttle.next_send_at(5), None);
        throttle.take(3000);
        let until = throttle.next_send_at(5).expect("the bucket is overdrawn by two seconds");
        assert!((2005..2010).contains(&until), "{until}");
        assert!(throttle.next_send_at(until - 2).is_some());
        assert_eq!(throttle.next_send_at(until), None);
        let mut none = RateLimiter::new(None);
        none.take(usize::MAX);
        assert_eq!(none.next_send_at(0), None);
    }

    proptest! {
        #[test]
        fn bytes_in_flight_are_sent_and_not_acknowledged(steps in prop::collection::vec((1u64..9, 0usize..9000, 0u64..12), 1..200)) {
            let mut window = SendWindow::new(at(0));
            let (mut sent, mut unacknowledged) = (Vec::new(), 0);
            for (records, bytes, back) in steps {
                let end = at(window.sent().get() + records);
                if window.room(0).is_some() {
                    window.send(end, bytes);
                    sent.push((end, bytes));
                    unacknowledged += bytes;
                }
                let written = at(window.sent().get().saturating_sub(back));
                unacknowledged -= window.acknowledge(written).unwrap();
                sent.retain(|(end, _)| *end > written);
                prop_assert_eq!(window.bytes(), unacknowledged);
                prop_assert_eq!(unacknowledged, sent.iter().map(|(_, bytes)| bytes).sum::<usize>());
                prop_assert!(sent.len() <= MAX_SUBSCRIPTION_READS);
            }
        }
    }
}
