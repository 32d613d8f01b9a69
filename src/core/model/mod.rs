//! Plain types that every other module uses: names, ids, offsets, epochs and topic configuration.
//!
//! This module does no I/O, reads no clock and imports no other module.

mod ack_durability;
mod config;
mod ids;
mod named_values;
mod offset;

pub use ack_durability::AckDurability;
pub use config::{ConfigKey, ConfigMap, InvalidConfig, TOPIC_CONFIG_KEYS, TopicConfig};
pub use ids::{BrokerId, InvalidTopicName, PartitionId, TopicId, TopicName, format_ids};
pub use named_values::{Acks, Compression, Durability, TimestampType, UnknownName};
pub use offset::{LeaderEpoch, Offset, Watermarks};
