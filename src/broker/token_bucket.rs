//! A token bucket: a rate limit per minute. Pure; each caller keeps its bucket under its own lock.

use tokio::time::Instant;

/// Token bucket. Tokens return evenly, up to the number for one minute.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct TokenBucket {
    tokens: f64,
    /// Time of the last taken token.
    taken_at: Instant,
}

impl TokenBucket {
    /// Takes a token from `bucket`; `None` is a full bucket. Returns the bucket without that token, or `None` if the
    /// bucket has no token now.
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
