//! Bytes in flight on a link, and the rate at which replicas catch up.
//!
//! ```text
//!   leader: sent ─▶ … link … ─▶ follower's queue ─▶ written ─▶ acknowledged
//!           ╰──────────────── in flight ─────────────────────────────╯
//! ```
//! Bytes are in flight from their read until the follower has acknowledged them as written. The reads in flight of one
//! subscription fit into the queue of the follower's partition. So the follower's broker receives without waiting, and
//! a slow partition delays no other partition.

use std::{collections::VecDeque, time::Duration};

use tokio::time::Instant;

use crate::{
    model::Offset,
    task::{clock, lock::Mutex},
};

/// Limit on the bytes in flight of one subscription, which is not read at the limit. A read returns at least one batch,
/// so the last read may exceed the limit by one batch.
pub(super) const MAX_SUBSCRIPTION_BYTES: usize = 4 << 20;

/// Maximum reads in flight of one subscription. The follower's partition queues the batches of each read as one event.
pub(super) const MAX_SUBSCRIPTION_READS: usize = 64;

/// Limit on the bytes in flight of all subscriptions of a link. At the limit, only subscriptions with nothing in flight
/// are read, each up to [`MIN_SEND_BYTES`] or one larger batch beyond the limit.
pub(super) const MAX_LINK_BYTES: usize = 64 << 20;

/// Maximum bytes of one read, unless the read is one larger batch.
const READ_BYTES: usize = 256 << 10;

/// Bytes that a subscription with nothing in flight may always read, even if other subscriptions fill the link.
const MIN_SEND_BYTES: usize = 16 << 10;

/// Error of an acknowledgement beyond the sent records.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("acknowledged offset {acknowledged} is above the end {sent_end} of the sent records")]
pub(super) struct AckBeyondSent {
    /// Log end that the follower acknowledged.
    acknowledged: Offset,
    /// End of the sent records.
    sent_end: Offset,
}

/// Records in flight of one subscription.
#[derive(Debug)]
pub(super) struct SendWindow {
    /// End and bytes of each read, oldest first.
    in_flight: VecDeque<(Offset, usize)>,
    /// Sum of the bytes of `in_flight`.
    bytes: usize,
    /// End of the sent records.
    sent_end: Offset,
}

impl SendWindow {
    /// Creates the window of a subscription whose follower has all records below `start`.
    pub(super) fn new(start: Offset) -> Self {
        Self { in_flight: VecDeque::new(), bytes: 0, sent_end: start }
    }

    /// Returns the end of the sent records, where the next read starts.
    pub(super) fn sent_end(&self) -> Offset {
        self.sent_end
    }

    /// Returns the bytes in flight.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Returns the maximum bytes of the next read; `None` if the window is full. `link_bytes` are the bytes in flight
    /// of the link. A read returns one batch at least, so a batch that is larger than any window is sent too.
    pub(super) fn max_read_bytes(&self, link_bytes: usize) -> Option<usize> {
        if self.in_flight.is_empty() {
            return Some(MAX_LINK_BYTES.saturating_sub(link_bytes).clamp(MIN_SEND_BYTES, READ_BYTES));
        }
        let space = MAX_SUBSCRIPTION_BYTES.saturating_sub(self.bytes).min(MAX_LINK_BYTES.saturating_sub(link_bytes));
        (self.in_flight.len() < MAX_SUBSCRIPTION_READS && space > 0).then_some(space.min(READ_BYTES))
    }

    /// Adds a finished read of `bytes` that ends at `end`. Its records count as sent from now on.
    pub(super) fn add_read(&mut self, end: Offset, bytes: usize) {
        debug_assert!(end > self.sent_end, "batches are sent in the order of their offsets");
        self.in_flight.push_back((end, bytes));
        self.bytes += bytes;
        self.sent_end = end;
    }

    /// Applies an acknowledgement: the follower has written all records below `log_end`. Returns the bytes that are no
    /// longer in flight.
    ///
    /// # Errors
    /// The follower acknowledges records that were not sent. Nothing changes.
    pub(super) fn acknowledge(&mut self, log_end: Offset) -> Result<usize, AckBeyondSent> {
        if log_end > self.sent_end {
            return Err(AckBeyondSent { acknowledged: log_end, sent_end: self.sent_end });
        }
        let before = self.bytes;
        while let Some((end, bytes)) = self.in_flight.front().copied()
            && end <= log_end
        {
            self.bytes -= bytes;
            self.in_flight.pop_front();
        }
        Ok(before - self.bytes)
    }
}

/// Token bucket for the bytes that all catching-up replicas together read from a leader's broker.
///
/// The bytes of a read are taken after the read. So a read may overdraw the bucket, and the next read waits until the
/// bucket has bytes again.
#[derive(Debug)]
pub(super) struct RateLimiter {
    bytes_per_second: Option<u64>,
    /// Bytes that may be taken now; negative if overdrawn. Never more than the bytes of one second.
    available: i64,
    /// Time of the last fill, in milliseconds.
    filled_ms: u64,
}

impl RateLimiter {
    /// Creates a bucket of this number of bytes per second; `None` is no limit.
    pub(super) fn new(bytes_per_second: Option<u64>) -> Self {
        let available = bytes_per_second.map_or(0, to_signed);
        Self { bytes_per_second, available, filled_ms: 0 }
    }

    /// Fills the bucket for the time since the last fill. Returns the time at which the next read may begin, by the
    /// monotonic clock of `now_ms`; `None` if it may begin now.
    pub(super) fn next_send_at(&mut self, now_ms: u64) -> Option<u64> {
        let rate = self.bytes_per_second?.max(1);
        let passed_ms = now_ms.saturating_sub(self.filled_ms).min(60_000);
        let gained = to_signed(rate.saturating_mul(passed_ms) / 1000);
        // Time that is too short for one byte counts for the next fill.
        if gained > 0 {
            self.available = self.available.saturating_add(gained).min(to_signed(rate));
            self.filled_ms = now_ms;
        }
        (self.available <= 0).then(|| now_ms + 1 + self.available.unsigned_abs().saturating_mul(1000) / rate)
    }

    /// Takes the bytes of a finished read from the bucket, even if that overdraws the bucket.
    pub(super) fn take(&mut self, bytes: usize) {
        if self.bytes_per_second.is_some() {
            self.available = self.available.saturating_sub(i64::try_from(bytes).unwrap_or(i64::MAX));
        }
    }
}

/// Limit on the bytes that catching-up replicas read from this broker, over all links together.
#[derive(Debug)]
pub struct CatchUpThrottle {
    /// Time 0 of the rate limiter.
    created_at: Instant,
    limiter: Mutex<RateLimiter>,
}

impl CatchUpThrottle {
    /// Creates a limit in bytes per second; `None` is no limit.
    pub fn new(bytes_per_second: Option<u64>) -> Self {
        Self { created_at: clock::monotonic(), limiter: Mutex::new(RateLimiter::new(bytes_per_second)) }
    }

    /// Returns the time at which the next read may begin; `None` if it may begin now.
    pub(super) fn next_send_at(&self) -> Option<Instant> {
        let now = clock::monotonic();
        let now_ms = u64::try_from(now.saturating_duration_since(self.created_at).as_millis()).unwrap_or(u64::MAX);
        let until_ms = self.limiter.lock().next_send_at(now_ms)?;
        Some(now + Duration::from_millis(until_ms.saturating_sub(now_ms)))
    }

    /// Counts the bytes of a finished read against the limit.
    pub(super) fn take(&self, bytes: usize) {
        self.limiter.lock().take(bytes);
    }
}

/// Converts a number of bytes, at most to the largest signed number.
fn to_signed(bytes: u64) -> i64 {
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
        assert_eq!(window.max_read_bytes(0), Some(READ_BYTES));
        window.add_read(at(11), 60 << 20);
        assert_eq!(window.max_read_bytes(0), None, "a batch above the window fills the window");
        assert_eq!(window.acknowledge(at(10)), Ok(0));
        assert_eq!(window.acknowledge(at(11)), Ok(60 << 20));
        assert_eq!(
            window.max_read_bytes(MAX_LINK_BYTES),
            Some(MIN_SEND_BYTES),
            "blocked subscriptions do not stop others"
        );
        window.add_read(at(12), 1);
        assert_eq!(window.max_read_bytes(MAX_LINK_BYTES - 5), Some(5), "the space of the link limits a read");
        assert_eq!(window.max_read_bytes(MAX_LINK_BYTES), None);
        assert_eq!(window.acknowledge(at(12)), Ok(1));
        for n in 0..64 {
            assert!(window.max_read_bytes(0).is_some());
            window.add_read(at(13 + n), 1);
        }
        assert_eq!(window.max_read_bytes(0), None, "the number of reads in flight is limited");
        assert!(window.acknowledge(at(77)).is_err(), "unsent records cannot be acknowledged");
        assert_eq!(window.acknowledge(at(76)), Ok(64));
    }

    #[test]
    fn throttle_keeps_the_configured_rate() {
        let mut limiter = RateLimiter::new(Some(1000));
        assert_eq!(limiter.next_send_at(5), None);
        limiter.take(3000);
        let until_ms = limiter.next_send_at(5).expect("the bucket is overdrawn by two seconds");
        assert!((2005..2010).contains(&until_ms), "{until_ms}");
        assert!(limiter.next_send_at(until_ms - 2).is_some());
        assert_eq!(limiter.next_send_at(until_ms), None);
        let mut unlimited = RateLimiter::new(None);
        unlimited.take(usize::MAX);
        assert_eq!(unlimited.next_send_at(0), None);
    }

    proptest! {
        #[test]
        fn bytes_in_flight_are_sent_and_not_acknowledged(steps in prop::collection::vec((1u64..9, 0usize..9000, 0u64..12), 1..200)) {
            let mut window = SendWindow::new(at(0));
            let (mut sent, mut unacknowledged) = (Vec::new(), 0);
            for (records, bytes, unwritten) in steps {
                let end = at(window.sent_end().get() + records);
                if window.max_read_bytes(0).is_some() {
                    window.add_read(end, bytes);
                    sent.push((end, bytes));
                    unacknowledged += bytes;
                }
                let written = at(window.sent_end().get().saturating_sub(unwritten));
                unacknowledged -= window.acknowledge(written).unwrap();
                sent.retain(|(end, _)| *end > written);
                prop_assert_eq!(window.bytes(), unacknowledged);
                prop_assert_eq!(unacknowledged, sent.iter().map(|(_, bytes)| bytes).sum::<usize>());
                prop_assert!(sent.len() <= MAX_SUBSCRIPTION_READS);
            }
        }
    }
}
