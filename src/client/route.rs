//! Routing metadata of a topic: leaders and replicas of its partitions.

use crate::{
    model::{BrokerId, LeaderEpoch, TopicId},
    proto::{
        error::{ApiError, ErrorCode},
        v1,
    },
};

/// Routing metadata of one topic.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TopicRoute {
    /// Topic id; a topic created later under the same name has another id.
    pub id: TopicId,
    /// Partitions by number.
    pub partitions: Vec<PartitionRoute>,
    /// Maximum size of a stored batch in bytes.
    pub max_message_bytes: usize,
    /// Configured `compression.type`.
    pub compression_type: String,
}

/// Leader and replicas of one partition.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PartitionRoute {
    /// Leader; `None` during an election.
    pub leader: Option<BrokerId>,
    /// Leader epoch.
    pub epoch: LeaderEpoch,
    /// Replicas, the preferred leader first.
    pub replicas: Vec<BrokerId>,
    /// In-sync replicas.
    pub isr: Vec<BrokerId>,
}

impl TopicRoute {
    /// Reads a topic from metadata. If `cached` has the same topic id, each of its partitions with a newer leader epoch
    /// replaces the received partition. Fails with the topic's error in the metadata, or if the metadata is invalid.
    pub(super) fn from_metadata(topic: v1::TopicMetadata, cached: Option<&Self>) -> Result<Self, ApiError> {
        if let Some(error) = topic.error {
            return Err(error.into());
        }
        let invalid = |problem: &str| {
            ApiError::new(ErrorCode::Internal, format!("metadata of topic {:?} has {problem}", topic.name))
        };
        let id: TopicId = topic.topic_id.parse().map_err(|_| invalid("no valid topic id"))?;
        let cached = cached.filter(|cached| cached.id == id);
        let mut partitions = Vec::new();
        for (number, partition) in topic.partitions.iter().enumerate() {
            if usize::try_from(partition.partition) != Ok(number) {
                return Err(invalid("partitions out of order"));
            }
            let received = PartitionRoute {
                leader: partition.leader.map(BrokerId),
                epoch: LeaderEpoch::from_i32(partition.leader_epoch).unwrap_or_default(),
                replicas: partition.replicas.iter().copied().map(BrokerId).collect(),
                isr: partition.isr.iter().copied().map(BrokerId).collect(),
            };
            let newer = cached.and_then(|cached| cached.partitions.get(number));
            let newer = newer.filter(|newer| newer.epoch > received.epoch);
            partitions.push(newer.cloned().unwrap_or(received));
        }
        Ok(Self {
            id,
            partitions,
            max_message_bytes: usize::try_from(topic.max_message_bytes).unwrap_or(usize::MAX),
            compression_type: topic.compression_type,
        })
    }
}
