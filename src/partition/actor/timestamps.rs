//! Bounds on the timestamps that producers set (KIP-937). A pure function of configuration, timestamps and time.

use std::time::Duration;

use crate::{
    model::{TimestampType, TopicConfig},
    partition::leader::AdmitError,
    record::TimestampRange,
};

/// Rejects timestamps that lie further from `now_ms` than the topic allows. With
/// `message.timestamp.type=LogAppendTime`, every timestamp is accepted: the broker replaces it.
///
/// # Errors
/// [`AdmitError::Timestamp`] with the latest timestamp if it is too late, otherwise with the earliest if it is too
/// early.
pub(super) fn check(config: &TopicConfig, range: TimestampRange, now_ms: i64) -> Result<(), AdmitError> {
    if config.timestamp_type == TimestampType::LogAppendTime {
        return Ok(());
    }
    // Returns the limit in milliseconds if the timestamp exceeds it; `None` if there is no limit or the timestamp is
    // within it.
    let exceeded_limit = |limit: Option<Duration>, timestamp_ms: i64| {
        limit
            .map(|limit| u64::try_from(limit.as_millis()).unwrap_or(u64::MAX))
            .filter(|limit_ms| timestamp_ms.abs_diff(now_ms) > *limit_ms)
    };
    let rejection = |timestamp_ms, side, setting, limit_ms| {
        Err(AdmitError::Timestamp { timestamp_ms, now_ms, side, setting, limit_ms })
    };
    if range.max > now_ms
        && let Some(limit_ms) = exceeded_limit(config.timestamp_after, range.max)
    {
        return rejection(range.max, "after", "message.timestamp.after.max.ms", limit_ms);
    }
    if range.min < now_ms
        && let Some(limit_ms) = exceeded_limit(config.timestamp_before, range.min)
    {
        return rejection(range.min, "before", "message.timestamp.before.max.ms", limit_ms);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::ConfigMap;

    const NOW_MS: i64 = 1_700_000_000_000;
    const AFTER: &str = "message.timestamp.after.max.ms";
    const BEFORE: &str = "message.timestamp.before.max.ms";

    fn config(pairs: &[(&str, &str)]) -> TopicConfig {
        let set = pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        TopicConfig::resolve(&ConfigMap::new(), &set).unwrap()
    }

    fn range(timestamps: &[i64]) -> TimestampRange {
        let mut range = TimestampRange::EMPTY;
        timestamps.iter().for_each(|timestamp_ms| range.extend(*timestamp_ms));
        range
    }

    /// Returns the timestamp, the setting and the limit of the rejection; `None` if the timestamps are accepted.
    fn rejected(pairs: &[(&str, &str)], timestamps: &[i64]) -> Option<(i64, &'static str, u64)> {
        match check(&config(pairs), range(timestamps), NOW_MS) {
            Ok(()) => None,
            Err(AdmitError::Timestamp { timestamp_ms, setting, limit_ms, .. }) => {
                Some((timestamp_ms, setting, limit_ms))
            }
            Err(other) => panic!("{other}"),
        }
    }

    #[test]
    fn default_bounds_refuse_only_more_than_an_hour_ahead() {
        let hour = 3_600_000;
        for allowed in [i64::MIN, -2, -1, 0, NOW_MS, NOW_MS + hour] {
            assert_eq!(rejected(&[], &[allowed]), None, "{allowed}");
        }
        for ahead in [NOW_MS + hour + 1, 1 << 62, i64::MAX] {
            assert_eq!(rejected(&[], &[0, ahead, 1]), Some((ahead, AFTER, 3_600_000)));
        }
        let error = check(&config(&[]), range(&[NOW_MS + hour + 1]), NOW_MS).unwrap_err().to_string();
        assert!(error.contains("1700003600001 lies 3600001 ms after") && error.contains(AFTER), "{error}");
    }

    #[test]
    fn bounds_apply_only_to_records_with_timestamp() {
        let bounds = [(BEFORE, "10"), (AFTER, "0")];
        for allowed in [&[-1][..], &[-1, NOW_MS], &[NOW_MS - 10, NOW_MS, -1]] {
            assert_eq!(rejected(&bounds, allowed), None, "{allowed:?}");
        }
        assert_eq!(rejected(&bounds, &[NOW_MS, NOW_MS - 11, -1]), Some((NOW_MS - 11, BEFORE, 10)));
        assert_eq!(rejected(&bounds, &[i64::MIN, -1]), Some((i64::MIN, BEFORE, 10)));
        assert_eq!(rejected(&bounds, &[NOW_MS + 1, -1]), Some((NOW_MS + 1, AFTER, 0)));
    }

    #[test]
    fn bounds_are_off_without_limit_or_with_append_time() {
        assert_eq!(rejected(&[(AFTER, "-1")], &[i64::MIN, i64::MAX]), None);
        assert_eq!(rejected(&[("message.timestamp.type", "LogAppendTime"), (BEFORE, "0")], &[0, i64::MAX]), None);
    }
}
