//! Topic administration: converts requests to calls of `cluster::Topics`.
//!
//! The response to a change is sent after this broker has applied the change, or after [`APPLY_TIMEOUT`]. Unless this
//! time passes, the broker hosts a created topic when the client sends its next request.

use std::{collections::HashMap, sync::Arc, time::Duration};

use crate::{
    broker::{background::garbage, node_context::NodeContext, partitions::table::PartitionTable},
    cluster::{TopicInfo, TopicSpec, TopicValue, Topics},
    model::{ConfigMap, TopicId, TopicName},
    proto::{
        error::{ApiError, ErrorCode},
        v1,
    },
};

/// Maximum time that a response waits until this broker has applied the change. After this time the response is sent
/// without it, because the change is committed.
const APPLY_TIMEOUT: Duration = Duration::from_secs(10);

/// Handler of topic administration.
pub(in crate::broker) struct TopicAdmin {
    pub(super) ctx: NodeContext,
    pub(super) topics: Topics,
    pub(super) partitions: Arc<PartitionTable>,
}

impl TopicAdmin {
    #[cfg(test)]
    pub(in crate::broker) fn topics(&self) -> &Topics {
        &self.topics
    }

    /// Creates a topic and waits until this broker has applied it. With `validate_only`, only validates the request.
    pub(super) async fn create_topic(
        &self,
        request: v1::CreateTopicRequest,
    ) -> Result<v1::CreateTopicResponse, ApiError> {
        let topic = TopicSpec {
            name: parse_topic_name(&request.name)?,
            partitions: request.partitions.max(1),
            replication_factor: match request.replication_factor {
                0 => self.ctx.config.replication.default_factor,
                factor => factor,
            },
            config: request.config.into_iter().collect(),
            validate_only: request.validate_only,
        };
        let info = self.topics.create(topic).await?;
        if !request.validate_only {
            self.wait_until_applied(&info).await;
        }
        Ok(v1::CreateTopicResponse { topic: Some(topic_summary(&info.name, &info.value)) })
    }

    pub(super) fn list_topics(&self) -> v1::ListTopicsResponse {
        let state = self.ctx.metadata.state();
        let topics = state.topics().iter().map(|(name, topic)| topic_summary(name, &topic.value)).collect();
        v1::ListTopicsResponse { topics }
    }

    /// Changes the configuration or the replication factor of a topic, and waits until this broker has applied the
    /// change.
    pub(super) async fn alter_topic(&self, request: v1::AlterTopicRequest) -> Result<v1::AlterTopicResponse, ApiError> {
        let topic = parse_topic_name(&request.name)?;
        // In the request, 0 means that the replication factor does not change.
        let factor = Some(request.replication_factor).filter(|factor| *factor > 0);
        let info = self.topics.alter(&topic, request.set.into_iter().collect(), request.unset, factor).await?;
        self.wait_until_applied(&info).await;
        Ok(v1::AlterTopicResponse { topic: Some(topic_summary(&info.name, &info.value)) })
    }

    /// Increases the number of partitions of a topic, and waits until this broker has applied the change.
    pub(super) async fn add_partitions(
        &self,
        request: v1::AddPartitionsRequest,
    ) -> Result<v1::AddPartitionsResponse, ApiError> {
        let info = self.topics.add_partitions(&parse_topic_name(&request.name)?, request.partition_count).await?;
        self.wait_until_applied(&info).await;
        Ok(v1::AddPartitionsResponse { topic: Some(topic_summary(&info.name, &info.value)) })
    }

    /// Deletes a topic and waits until this broker has removed it, at most [`APPLY_TIMEOUT`]. With an object store, the
    /// response contains the maximum time for which the topic's objects remain there.
    pub(super) async fn delete_topic(&self, topic: &str) -> Result<v1::DeleteTopicResponse, ApiError> {
        let topic = parse_topic_name(topic)?;
        let id: TopicId = self.topics.delete(&topic).await?;
        let removed =
            self.partitions.until(|partitions| partitions.topic(&topic).is_none_or(|partitions| partitions.id != id));
        let _late = tokio::time::timeout(APPLY_TIMEOUT, removed).await;
        let retention = self.ctx.tier.as_ref().map(|_| garbage::max_retention(self.ctx.config.tier.garbage_grace));
        Ok(v1::DeleteTopicResponse {
            object_grace_ms: retention.map(|time| u64::try_from(time.as_millis()).unwrap_or(u64::MAX)),
        })
    }

    /// Waits until this broker has applied a change of a topic, at most [`APPLY_TIMEOUT`].
    async fn wait_until_applied(&self, info: &TopicInfo) {
        let (name, value) = (&info.name, &info.value);
        let applied = self.partitions.until(|partitions| {
            partitions.topic(name).is_some_and(|topic| {
                topic.id == value.id && topic.count() >= value.partitions as usize && topic.revision >= info.revision
            })
        });
        let _late = tokio::time::timeout(APPLY_TIMEOUT, applied).await;
    }
}

/// Parses the topic name of a request.
pub(super) fn parse_topic_name(text: &str) -> Result<TopicName, ApiError> {
    TopicName::new(text).map_err(|error| ApiError::new(ErrorCode::InvalidTopic, error.to_string()))
}

/// Converts a topic configuration to its protocol form.
pub(super) fn config_to_proto(config: ConfigMap) -> HashMap<String, String> {
    config.into_iter().collect()
}

pub(super) fn topic_summary(name: &TopicName, value: &TopicValue) -> v1::TopicSummary {
    v1::TopicSummary {
        name: name.to_string(),
        topic_id: value.id.to_string(),
        partitions: value.partitions,
        replication_factor: value.replication_factor,
        config: config_to_proto(value.config.clone()),
    }
}
