//! The nouns of the system as types that cannot be mixed up: names, ids, offsets, epochs, topic configuration.
//!
//! Nothing here does I/O, reads a clock or knows another module. The words are those of `docs/architecture.md`.

mod config;
mod ids;
#[cfg(feature = "server")]
pub mod near;
mod offset;

pub use config::{
    Acks, Compression, ConfigKey, ConfigMap, Durability, InvalidConfig, TOPIC_CONFIG_KEYS, TimestampType, TopicConfig,
};
pub use ids::{BrokerId, InvalidTopicName, PartitionId, TopicId, TopicName, listed};
pub use offset::{LeaderEpoch, Offset, Watermarks};
