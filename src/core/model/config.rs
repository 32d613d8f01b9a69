//! Topic configuration: keys of Kafka, and the additional key `durability`.
//!
//! [`TopicConfig::resolve`] turns strings into typed values. A value of the topic has precedence over the broker's
//! `[topic_defaults]`, and these over the built-in defaults. [`TOPIC_CONFIG_KEYS`] is the only list of keys: help texts
//! and `docs/configuration.md` are generated from it, and any other key is rejected.

use std::{collections::BTreeMap, time::Duration};

use super::named_values::{Compression, Durability, TimestampType};

/// Topic configuration as strings, by key.
pub type ConfigMap = BTreeMap<String, String>;

/// A key of the topic configuration.
#[derive(Clone, Copy, Debug)]
pub struct ConfigKey {
    /// Name of the key.
    pub name: &'static str,
    /// The built-in default.
    pub default: &'static str,
    /// The allowed values, as error messages and docs name them.
    pub allowed: &'static str,
    /// One line of documentation.
    pub doc: &'static str,
}

/// All keys of the topic configuration, in alphabetical order.
pub const TOPIC_CONFIG_KEYS: &[ConfigKey] = &[
    ConfigKey {
        name: "cleanup.policy",
        default: "delete",
        allowed: "delete",
        doc: "What happens to old records: `delete` drops whole segments by `retention.ms` and `retention.bytes`.",
    },
    ConfigKey {
        name: "compression.type",
        default: "producer",
        allowed: "producer, uncompressed, gzip, snappy, lz4 or zstd",
        doc: "`producer` stores batches as the producer sent them. With any other value the leader stores every batch in that codec, and refuses a batch in another codec whose records take more than 64 MiB uncompressed.",
    },
    ConfigKey {
        name: "durability",
        default: "persisted",
        allowed: "persisted or replicated",
        doc: "When a replica acknowledges a record: `persisted` = after the sync to its disk, `replicated` = after the write to its page cache.",
    },
    ConfigKey {
        name: "local.retention.bytes",
        default: "-2",
        allowed: "a number of bytes up to 2305843009213693951, -1 for no limit, or -2 for the value of retention.bytes",
        doc: "Minimum size of the local log of each partition that eviction keeps. The oldest uploaded segment is deleted from the local disk while the other segments on it, the active one included, have at least this size. Segments below the log start are deleted regardless of this setting.",
    },
    ConfigKey {
        name: "local.retention.ms",
        default: "86400000",
        allowed: "a number of milliseconds up to 2305843009213693951, -1 for no limit, or -2 for the value of retention.ms",
        doc: "How long an uploaded segment stays on local disk. The time counts from the last write to the segment, regardless of the timestamps of its records. A segment that is not uploaded yet stays.",
    },
    ConfigKey {
        name: "max.message.bytes",
        default: "1048588",
        allowed: "a number of bytes from 1024 to 67108864",
        doc: "Maximum size of a batch as stored. A batch that the producer built must not exceed it as sent either.",
    },
    ConfigKey {
        name: "message.timestamp.after.max.ms",
        default: "3600000",
        allowed: "a number of milliseconds up to 2305843009213693951, or -1 for no limit",
        doc: "How far a record's timestamp may lie after the broker's clock; a batch beyond that is refused (`INVALID_TIMESTAMP`). Of a compressed batch that is stored unchanged, the first and the largest timestamp of the header are checked. Without this limit, idempotent producers expire by their number alone, not by `producer.id.expiration.ms`. Has no effect with `message.timestamp.type=LogAppendTime`.",
    },
    ConfigKey {
        name: "message.timestamp.before.max.ms",
        default: "-1",
        allowed: "a number of milliseconds up to 2305843009213693951, or -1 for no limit",
        doc: "How far a record's timestamp may lie before the broker's clock; a batch beyond that is refused (`INVALID_TIMESTAMP`). Has no effect with `message.timestamp.type=LogAppendTime`.",
    },
    ConfigKey {
        name: "message.timestamp.type",
        default: "CreateTime",
        allowed: "CreateTime or LogAppendTime",
        doc: "Source of a record's timestamp: the producer (`CreateTime`), or the leader at the append (`LogAppendTime`).",
    },
    ConfigKey {
        name: "min.insync.replicas",
        default: "1",
        allowed: "a number from 1 to 32",
        doc: "Minimum size of the ISR. While the ISR is smaller, appends with `acks=all` and `acks=tiered` are refused, and no record is committed. `acks=all` waits for all members of the ISR.",
    },
    ConfigKey {
        name: "producer.id.expiration.ms",
        default: "86400000",
        allowed: "a number of milliseconds from 1 to 2305843009213693951",
        doc: "How long a partition keeps the state of an idempotent producer after its last write. The time is measured by the largest timestamp in the partition, not by a clock. A partition keeps at most 16,384 producers, the last ones that wrote. Has no effect with `message.timestamp.after.max.ms=-1`.",
    },
    ConfigKey {
        name: "remote.storage.enable",
        default: "true",
        allowed: "true or false",
        doc: "Whether sealed segments are uploaded to the object store.",
    },
    ConfigKey {
        name: "retention.bytes",
        default: "-1",
        allowed: "a number of bytes up to 2305843009213693951, or -1 for no limit",
        doc: "Minimum size of each partition that retention keeps, on local disk and in the object store together. The oldest segment is deleted from both while the other segments, the active one included, have at least this size.",
    },
    ConfigKey {
        name: "retention.ms",
        default: "604800000",
        allowed: "a number of milliseconds up to 2305843009213693951, or -1 for no limit",
        doc: "How long records are kept. A segment is deleted from the local disk and the object store when its largest timestamp is older than this. If that timestamp is missing or in the future, the time of the last write counts instead. The object itself is deleted after `tier.garbage_grace`.",
    },
    ConfigKey {
        name: "segment.bytes",
        default: "67108864",
        allowed: "a number of bytes from 16384 to 2147483647",
        doc: "Maximum size of a segment, unless one append exceeds it: the active segment is sealed before an append that does not fit.",
    },
    ConfigKey {
        name: "segment.ms",
        default: "3600000",
        allowed: "a number of milliseconds from 100 to 2305843009213693951",
        doc: "Age at which an active segment with records is sealed. It bounds how late records reach the object store.",
    },
];

/// An invalid topic configuration.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidConfig {
    /// The key is not in [`TOPIC_CONFIG_KEYS`].
    #[error("topic configuration {key:?} does not exist; known keys: {}", known_keys())]
    UnknownKey {
        /// The unknown key.
        key: String,
    },
    /// The key does not allow this value.
    #[error("topic configuration {key}={value:?} is not valid: allowed is {allowed}")]
    Value {
        /// The key.
        key: String,
        /// The value.
        value: String,
        /// The allowed values.
        allowed: String,
    },
    /// The topic sets a local retention above the retention of the whole log. The error names both keys, because either
    /// may have changed.
    #[error(
        "topic configuration {local}={local_value} keeps more on local disk than {whole}={whole_value} keeps at all: \
         lower {local} to at most {whole_value}, or set it to -2, which follows {whole}; or raise {whole}"
    )]
    LocalAboveWhole {
        /// The key of the local limit.
        local: &'static str,
        /// Value of that key.
        local_value: String,
        /// The key of the limit for the whole log.
        whole: &'static str,
        /// Value of that key.
        whole_value: String,
    },
}

/// Returns the names of all keys, for the error message.
fn known_keys() -> String {
    TOPIC_CONFIG_KEYS.iter().map(|key| key.name).collect::<Vec<_>>().join(", ")
}

/// A topic's effective configuration. A limit that is `None` does not apply.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TopicConfig {
    /// `retention.ms`
    pub retention: Option<Duration>,
    /// `retention.bytes`
    pub retention_bytes: Option<u64>,
    /// `local.retention.ms`, never above `retention`.
    pub local_retention: Option<Duration>,
    /// `local.retention.bytes`, never above `retention_bytes`.
    pub local_retention_bytes: Option<u64>,
    /// `remote.storage.enable`
    pub tiered: bool,
    /// `segment.bytes`
    pub segment_bytes: u64,
    /// `segment.ms`
    pub segment_age: Duration,
    /// `max.message.bytes`
    pub max_message_bytes: usize,
    /// `min.insync.replicas`
    pub min_insync_replicas: usize,
    /// `producer.id.expiration.ms`; `None` if `message.timestamp.after.max.ms` sets no limit. Any record may then move
    /// the partition's time, so only the number of producers limits how many are kept.
    pub producer_expiration: Option<Duration>,
    /// `message.timestamp.before.max.ms`
    pub timestamp_before: Option<Duration>,
    /// `message.timestamp.after.max.ms`
    pub timestamp_after: Option<Duration>,
    /// `message.timestamp.type`
    pub timestamp_type: TimestampType,
    /// `compression.type`; `None` is `producer`.
    pub compression: Option<Compression>,
    /// `durability`
    pub durability: Durability,
}

impl Default for TopicConfig {
    fn default() -> Self {
        let none = ConfigMap::new();
        Self::resolve(&none, &none).expect("the built-in defaults are valid")
    }
}

impl TopicConfig {
    /// Returns the effective configuration of a topic with `overrides`, on a broker with `defaults`.
    ///
    /// # Errors
    /// A key is unknown, a value is not allowed, or `overrides` set a local limit above the limit of the whole log.
    pub fn resolve(defaults: &ConfigMap, overrides: &ConfigMap) -> Result<Self, InvalidConfig> {
        for key in defaults.keys().chain(overrides.keys()) {
            find_key(key)?;
        }
        let values = ConfigLayers { defaults, overrides };
        let retention = values.limit("retention.ms")?.map(Duration::from_millis);
        let retention_bytes = values.limit("retention.bytes")?;
        let local_ms = values.local_limit("local.retention.ms", retention.map(millis))?;
        let local_retention_bytes = values.local_limit("local.retention.bytes", retention_bytes)?;
        let timestamp_after = values.limit("message.timestamp.after.max.ms")?.map(Duration::from_millis);
        let expiration = Duration::from_millis(values.number("producer.id.expiration.ms", 1, MAX_MS)?);
        let _only_delete: &str = values.parse("cleanup.policy", |name| (name == "delete").then_some("delete"))?;
        Ok(Self {
            retention,
            retention_bytes,
            local_retention: local_ms.map(Duration::from_millis),
            local_retention_bytes,
            tiered: values.parse("remote.storage.enable", |text| text.parse().ok())?,
            segment_bytes: values.number("segment.bytes", 16_384, 2_147_483_647)?,
            segment_age: Duration::from_millis(values.number("segment.ms", 100, MAX_MS)?),
            max_message_bytes: usize::try_from(values.number("max.message.bytes", 1024, 67_108_864)?)
                .expect("below 2^32"),
            min_insync_replicas: usize::try_from(values.number("min.insync.replicas", 1, 32)?).expect("below 2^32"),
            producer_expiration: timestamp_after.map(|_| expiration),
            timestamp_before: values.limit("message.timestamp.before.max.ms")?.map(Duration::from_millis),
            timestamp_after,
            timestamp_type: values.parse("message.timestamp.type", |name| name.parse().ok())?,
            compression: values.parse("compression.type", |name| match name {
                "producer" => Some(None),
                "uncompressed" => Some(Some(Compression::None)),
                "none" => None,
                codec => codec.parse().ok().map(Some),
            })?,
            durability: values.parse("durability", |name| name.parse().ok())?,
        })
    }

    /// Checks that `min.insync.replicas` is at most the replication factor. Otherwise no append with `acks=all` could
    /// be acknowledged.
    pub fn check_replicas(&self, replicas: u32) -> Result<(), InvalidConfig> {
        if u32::try_from(self.min_insync_replicas).is_ok_and(|min| min <= replicas) {
            return Ok(());
        }
        Err(InvalidConfig::Value {
            key: "min.insync.replicas".to_owned(),
            value: self.min_insync_replicas.to_string(),
            allowed: format!(
                "at most the topic's replication factor, which is {replicas}: with more, no append with acks=all would ever \
                 be acknowledged; set min.insync.replicas={replicas} for this topic, or give it more replicas"
            ),
        })
    }

    /// Rewrites the values of keys that take numbers in their usual form: `+5` and `007` become 5 and 7. Other values
    /// stay.
    pub fn normalize(config: ConfigMap) -> ConfigMap {
        // A key takes numbers if its default is a number.
        let normalize_value = |key: &str, text: String| {
            let is_numeric = find_key(key).is_ok_and(|key| key.default.parse::<i64>().is_ok());
            text.parse::<i64>().ok().filter(|_| is_numeric).map_or(text, |number| number.to_string())
        };
        config
            .into_iter()
            .map(|(key, value)| {
                let value = normalize_value(&key, value);
                (key, value)
            })
            .collect()
    }

    /// Returns the effective value of every key as a string, without validation.
    pub fn effective_values(defaults: &ConfigMap, overrides: &ConfigMap) -> ConfigMap {
        let values = ConfigLayers { defaults, overrides };
        TOPIC_CONFIG_KEYS.iter().map(|key| (key.name.to_owned(), values.text(key.name).to_owned())).collect()
    }
}

/// Maximum of every duration, in milliseconds, and of every retention in bytes, so that sums never overflow.
const MAX_MS: u64 = i64::MAX as u64 / 4;

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(MAX_MS)
}

/// Returns the key with this name. The error repeats at most 100 characters of an unknown name.
fn find_key(name: &str) -> Result<&'static ConfigKey, InvalidConfig> {
    TOPIC_CONFIG_KEYS
        .iter()
        .find(|key| key.name == name)
        .ok_or_else(|| InvalidConfig::UnknownKey { key: name.chars().take(100).collect() })
}

/// Configured values of a topic. An effective value comes from `overrides` (of the topic), else from `defaults` (of the
/// broker), else from the built-in default.
struct ConfigLayers<'a> {
    defaults: &'a ConfigMap,
    overrides: &'a ConfigMap,
}

impl ConfigLayers<'_> {
    /// Returns the effective value of a key as a string.
    fn text(&self, name: &str) -> &str {
        let value = self.overrides.get(name).or_else(|| self.defaults.get(name));
        value.map_or_else(|| find_key(name).expect("a key of the list").default, String::as_str)
    }

    /// Parses the effective value of a key. `parse` returns `None` for a value that is not allowed.
    fn parse<T>(&self, name: &str, parse: impl FnOnce(&str) -> Option<T>) -> Result<T, InvalidConfig> {
        let text = self.text(name);
        parse(text).ok_or_else(|| self.invalid_value(name))
    }

    fn number(&self, name: &str, min: u64, max: u64) -> Result<u64, InvalidConfig> {
        self.parse(name, |text| text.parse().ok().filter(|number| (min..=max).contains(number)))
    }

    /// Parses a limit. Returns `None` for no limit: -1, or the largest `i64`, which Kafka users write as well.
    fn limit(&self, name: &str) -> Result<Option<u64>, InvalidConfig> {
        self.parse(name, |text| match text.parse::<i64>().ok()? {
            -1 | i64::MAX => Some(None),
            number => u64::try_from(number).ok().filter(|number| *number <= MAX_MS).map(Some),
        })
    }

    /// Parses a local limit. `whole` is the limit of the whole log, which a local limit never exceeds and to which -2
    /// refers. A larger default of the broker is lowered to `whole`; a larger value of the topic is an error.
    fn local_limit(&self, name: &'static str, whole: Option<u64>) -> Result<Option<u64>, InvalidConfig> {
        if self.text(name) == "-2" {
            return Ok(whole);
        }
        let limit = self.limit(name)?;
        let is_above_whole = whole.is_some_and(|whole| limit.is_none_or(|limit| limit > whole));
        if is_above_whole && self.overrides.contains_key(name) {
            let (local, whole) = (name, name.trim_start_matches("local."));
            let (local_value, whole_value) = (self.text(local).to_owned(), self.text(whole).to_owned());
            return Err(InvalidConfig::LocalAboveWhole { local, local_value, whole, whole_value });
        }
        Ok(if is_above_whole { whole } else { limit })
    }

    /// Returns the error for a key whose effective value is not allowed. The error repeats at most 100 characters of
    /// the value.
    fn invalid_value(&self, name: &str) -> InvalidConfig {
        InvalidConfig::Value {
            key: name.to_owned(),
            value: self.text(name).chars().take(100).collect(),
            allowed: find_key(name).expect("a key of the list").allowed.to_owned(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(pairs: &[(&str, &str)]) -> ConfigMap {
        pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    }

    fn resolve(pairs: &[(&str, &str)]) -> Result<TopicConfig, InvalidConfig> {
        TopicConfig::resolve(&ConfigMap::new(), &map(pairs))
    }

    #[test]
    fn every_default_is_valid_and_keys_are_sorted() {
        TopicConfig::default();
        assert!(TOPIC_CONFIG_KEYS.is_sorted_by_key(|key| key.name));
    }

    #[test]
    fn invalid_value_error_names_key_value_and_allowed_values() {
        for key in TOPIC_CONFIG_KEYS {
            let error = resolve(&[(key.name, "nonsense")]).expect_err(key.name).to_string();
            assert!(error.contains(key.name) && error.contains("nonsense") && error.contains(key.allowed), "{error}");
        }
    }

    #[test]
    fn unknown_key_error_lists_known_keys() {
        let error = resolve(&[("retention.mss", "1")]).expect_err("unknown").to_string();
        assert!(error.contains("retention.mss") && error.contains("retention.ms,"), "{error}");
    }

    #[test]
    fn topic_value_overrides_broker_default() {
        let defaults = map(&[("segment.bytes", "1000000")]);
        let broker = TopicConfig::resolve(&defaults, &ConfigMap::new()).expect("valid");
        assert_eq!(broker.segment_bytes, 1_000_000);
        let topic = TopicConfig::resolve(&defaults, &map(&[("segment.bytes", "20000")])).expect("valid");
        assert_eq!(topic.segment_bytes, 20_000);
    }

    #[test]
    fn no_limit_takes_spellings_of_kafka_users() {
        for text in ["-1", "9223372036854775807"] {
            let config = resolve(&[("retention.ms", text), ("retention.bytes", text)]).expect(text);
            assert_eq!((config.retention, config.retention_bytes), (None, None));
        }
        let max = MAX_MS.to_string();
        let config = resolve(&[("retention.ms", &max)]).expect("the bound itself");
        assert_eq!(config.retention, Some(Duration::from_millis(MAX_MS)));
        for key in TOPIC_CONFIG_KEYS.iter().filter(|key| key.allowed.contains("milliseconds")) {
            let above = resolve(&[(key.name, "9223372036854775806")]).expect_err(key.name).to_string();
            assert!(above.contains(&max), "{above}");
        }
    }

    #[test]
    fn producers_do_not_expire_without_timestamp_limit() {
        let expiration = |pairs: &[(&str, &str)]| resolve(pairs).expect("valid").producer_expiration;
        assert_eq!(expiration(&[]), Some(Duration::from_secs(86_400)));
        let bound = [("message.timestamp.after.max.ms", "0"), ("producer.id.expiration.ms", "5")];
        assert_eq!(expiration(&bound), Some(Duration::from_millis(5)));
        for none in ["-1", "9223372036854775807"] {
            let lifted = [("message.timestamp.after.max.ms", none), ("producer.id.expiration.ms", "5")];
            assert_eq!(expiration(&lifted), None, "{none}");
        }
    }

    #[test]
    fn numbers_are_normalized() {
        let values = map(&[("retention.ms", "+5"), ("segment.bytes", "0020000"), ("durability", "persisted")]);
        let normalized = TopicConfig::normalize(values);
        assert_eq!(normalized, map(&[("retention.ms", "5"), ("segment.bytes", "20000"), ("durability", "persisted")]));
    }

    #[test]
    fn min_insync_replicas_above_factor_is_rejected() {
        let config = resolve(&[("min.insync.replicas", "3")]).expect("valid in itself");
        assert_eq!(config.check_replicas(3), Ok(()));
        let error = config.check_replicas(2).expect_err("one too few").to_string();
        assert!(error.contains("min.insync.replicas=\"3\"") && error.contains("factor, which is 2"), "{error}");
        assert!(error.contains("set min.insync.replicas=2 for this topic"), "{error}");
    }

    #[test]
    fn local_retention_never_exceeds_retention() {
        assert!(resolve(&[("retention.ms", "10"), ("local.retention.ms", "11")]).is_err());
        assert!(resolve(&[("retention.ms", "10"), ("local.retention.ms", "-1")]).is_err());
        let error = resolve(&[("retention.bytes", "0"), ("local.retention.bytes", "1")]).expect_err("above");
        let text = error.to_string();
        assert!(text.contains("local.retention.bytes=1 ") && text.contains(" retention.bytes=0 "), "{text}");
        assert!(text.contains("lower local.retention.bytes") && text.contains("or raise retention.bytes"), "{text}");
        let lowered = resolve(&[("retention.ms", "10")]).expect("the default follows");
        assert_eq!(lowered.local_retention, Some(Duration::from_millis(10)));
        let same = resolve(&[("retention.bytes", "99")]).expect("valid");
        assert_eq!(same.local_retention_bytes, Some(99));
    }
}
