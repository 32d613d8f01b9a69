//! Routing metadata for clients: brokers, topics, leaders.

use std::collections::BTreeSet;

use super::{Broker, errors};
use crate::{
    cluster::{BrokerState, MetadataSnapshot, TopicValue, UnknownTopic},
    limits,
    model::{BrokerId, TopicConfig, TopicName},
    proto::{error::ApiError, v1},
};

impl Broker {
    /// Returns all brokers and the requested topics.
    pub(super) fn metadata(&self, request: &v1::GetMetadataRequest) -> Result<v1::GetMetadataResponse, ApiError> {
        if request.topics.len() > limits::MAX_METADATA_TOPICS {
            return Err(errors::invalid(format!(
                "{} topics in one request, at most {} are allowed: send several requests, or set all_topics",
                request.topics.len(),
                limits::MAX_METADATA_TOPICS
            )));
        }
        let mut named = BTreeSet::new();
        if let Some(twice) = request.topics.iter().find(|topic| !named.insert(topic.as_str())) {
            return Err(errors::invalid(format!(
                "topic {twice:?} is named twice in one request: name each topic once"
            )));
        }
        let state = self.ctx.metadata.state();
        // Clients contact brokers in the order of this list, so brokers that shut down come last.
        let (running, stopping): (Vec<_>, Vec<_>) =
            state.brokers().iter().partition(|(_, entry)| entry.value.state == BrokerState::Running);
        let brokers = running.into_iter().chain(stopping).map(|(id, entry)| v1::Broker {
            id: id.0,
            address: entry.value.listeners.client().to_owned(),
            rack: entry.value.rack.clone().unwrap_or_default(),
        });
        let topics = if request.all_topics {
            state.topics().iter().map(|(name, topic)| self.describe_routes(&state, name, &topic.value)).collect()
        } else {
            request.topics.iter().map(|topic| self.routes(&state, topic)).collect()
        };
        Ok(v1::GetMetadataResponse {
            cluster: self.ctx.config.cluster.clone(),
            brokers: brokers.collect(),
            topics,
            controller: state.controller().map(|id| id.0),
            lease_expired: self.is_lease_expired(),
        })
    }

    fn routes(&self, state: &MetadataSnapshot, topic: &str) -> v1::TopicMetadata {
        let found = TopicName::new(topic).ok().and_then(|name| Some((state.topic(&name)?, name)));
        match found {
            Some((topic, name)) => self.describe_routes(state, &name, &topic.value),
            None => v1::TopicMetadata {
                name: topic.to_owned(),
                error: Some(ApiError::from(UnknownTopic::new(topic)).into()),
                ..Default::default()
            },
        }
    }

    fn describe_routes(&self, state: &MetadataSnapshot, name: &TopicName, topic: &TopicValue) -> v1::TopicMetadata {
        let config = TopicConfig::resolve(&self.ctx.config.topic_defaults, &topic.config).unwrap_or_default();
        let partitions = state.partitions_of(topic).map(|(number, entry)| {
            let value = entry.partition.as_ref().map(|stored| &stored.value);
            let ids = |set: &[BrokerId]| set.iter().map(|id| id.0).collect::<Vec<_>>();
            v1::PartitionMetadata {
                partition: number.cast_signed(),
                leader: value.and_then(|value| value.leader).map(|leader| leader.0),
                replicas: value.map(|value| ids(&value.replicas)).unwrap_or_default(),
                isr: value.map(|value| ids(&value.isr)).unwrap_or_default(),
                leader_epoch: value.map_or(-1, |value| value.leader_epoch.as_i32()),
            }
        });
        v1::TopicMetadata {
            name: name.to_string(),
            error: None,
            topic_id: topic.id.to_string(),
            partitions: partitions.collect(),
            max_message_bytes: u32::try_from(config.max_message_bytes).unwrap_or(u32::MAX),
            compression_type: config.compression.map_or("producer", |codec| codec.as_str()).to_owned(),
        }
    }
}
