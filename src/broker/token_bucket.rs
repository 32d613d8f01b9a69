//! A token bucket: a rate limit per minute. The code reads no clock and has no lock: each caller stores its bucket
//! under a lock of its own.

use tokio::time::Instant;

/// Token bucket. Tokens are added at an even rate. A full bucket has the tokens of one minute.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct TokenBucket {
    tokens: f64,
    /// Time at which the last token was taken.
    taken_at: Instant,
}

impl TokenBucket {
    /// Takes a token from `bucket`, where `None` stands for a full bucket. Returns the bucket after that, or `None` if
    /// there is no token at time `now`; the caller then keeps its old bucket.
    pub(super) fn take(bucket: Option<Self>, per_minute: u32, now: Instant) -> Option<Self> {
        let max = f64::from(per_minute);
        let tokens = bucket.map_or(max, |bucket| {
            let returned = now.saturating_duration_since(bucket.taken_at).as_secs_f64() / 60.0 * max;
            (bucket.tokens + returned).min(max)
        });
        (tokens >= 1.0).then_some(Self { tokens: tokens - 1.0, taken_at: now })
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::task::clock;

    #[test]
    fn bucket_refills_evenly_up_to_one_minute() {
        let start = clock::monotonic();
        let after = |seconds| start + Duration::from_secs(seconds);
        let take_all = |mut bucket, now| {
            let mut taken = 0;
            while let Some(remaining) = TokenBucket::take(bucket, 60, now) {
                (bucket, taken) = (Some(remaining), taken + 1);
            }
            (bucket, taken)
        };
        let (bucket, taken) = take_all(None, start);
        assert_eq!(taken, 60);
        let (bucket, taken) = take_all(bucket, after(10));
        assert_eq!(taken, 10);
        assert_eq!(take_all(bucket, after(3600)).1, 60);
    }
}
