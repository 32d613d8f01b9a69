//! Typed calls and responses for the administration of topics and of the cluster.

mod cluster;
mod manifest;

pub use self::{
    cluster::{
        BrokerDescription, BrokerStats, ClusterDescription, DrainStatus, ElectionResult, Reassignment,
        ReplicaDescription, UnreadableKey,
    },
    manifest::ManifestRebuild,
};

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use super::{
    Client, FIRST_RESPONSE_TIMEOUT,
    address::BrokerAddress,
    call::{NoResponse, with_timeout},
    connection::{admin_client, log_client},
    error::CallError,
    metadata::ReadTarget,
};
use crate::{
    model::{BrokerId, ConfigMap, LeaderEpoch, Offset, TopicId, Watermarks},
    proto::{
        error::{ApiError, ErrorCode},
        v1,
    },
};

/// Administers topics and the cluster. Any broker can serve these calls, except [`Admin::offset`], which calls the
/// leader of the partition.
///
/// ```no_run
/// # async fn example(client: strandline_client::Client) -> Result<(), Box<dyn std::error::Error>> {
/// use strandline_client::NewTopic;
///
/// let admin = client.admin();
/// admin.create_topic(&NewTopic::new("orders").partitions(3).config("retention.ms", "86400000")).await?;
/// for partition in admin.describe_topic("orders").await?.partitions {
///     println!("{} ends at {}", partition.partition, partition.watermarks.high_watermark);
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Admin {
    client: Client,
}

/// Definition of a topic to create.
#[derive(Clone, Debug, Default)]
pub struct NewTopic {
    request: v1::CreateTopicRequest,
}

impl NewTopic {
    /// Creates a definition with one partition and the brokers' defaults.
    pub fn new(name: &str) -> Self {
        Self { request: v1::CreateTopicRequest { name: name.to_owned(), ..Default::default() } }
    }

    /// Sets the number of partitions; 0 means 1.
    #[must_use]
    pub fn partitions(mut self, partitions: u32) -> Self {
        self.request.partitions = partitions;
        self
    }

    /// Sets the number of replicas of each partition; 0 means the brokers' default.
    #[must_use]
    pub fn replication_factor(mut self, replicas: u32) -> Self {
        self.request.replication_factor = replicas;
        self
    }

    /// Sets one key of the topic's configuration.
    #[must_use]
    pub fn config(mut self, key: &str, value: &str) -> Self {
        self.request.config.insert(key.to_owned(), value.to_owned());
        self
    }

    /// Limits the call to validation: the topic is not created.
    #[must_use]
    pub fn validate_only(mut self) -> Self {
        self.request.validate_only = true;
        self
    }
}

/// Change of a topic. Settings that are not named keep their values.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TopicAlteration {
    /// Configuration keys to set.
    pub set: ConfigMap,
    /// Configuration keys to reset to their defaults.
    pub unset: Vec<String>,
    /// New number of replicas of each partition. The controller adds or removes replicas.
    pub replication_factor: Option<u32>,
}

/// Name and registered brokers of a cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClusterInfo {
    /// Name of the cluster.
    pub name: String,
    /// Registered brokers.
    pub brokers: Vec<BrokerInfo>,
}

/// Registered broker.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BrokerInfo {
    /// Broker id.
    pub id: BrokerId,
    /// `host:port` of the broker's gRPC listener.
    pub address: String,
    /// Rack of the broker; empty if it has none.
    pub rack: String,
}

/// Topic as an entry of a list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TopicSummary {
    /// Name of the topic.
    pub name: String,
    /// Id of the topic; a topic created later under the same name has another id.
    pub id: TopicId,
    /// Number of partitions.
    pub partitions: u32,
    /// Number of replicas of each partition.
    pub replication_factor: u32,
    /// Configuration keys that the topic itself sets.
    pub config: ConfigMap,
}

/// Full description of one topic.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TopicDescription {
    /// Summary of the topic, as [`Admin::list_topics`] returns it.
    pub summary: TopicSummary,
    /// Every configuration key with its effective value.
    pub effective_config: ConfigMap,
    /// The source of each of these keys.
    pub config_source: BTreeMap<String, ConfigSource>,
    /// Partitions by number.
    pub partitions: Vec<PartitionDescription>,
}

/// Source of a configuration value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConfigSource {
    /// The built-in default.
    Default,
    /// The `[topic_defaults]` of the broker that responded.
    Broker,
    /// The topic itself.
    Topic,
}

impl ConfigSource {
    /// Returns `default`, `broker` or `topic`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Default => "default",
            Self::Broker => "broker",
            Self::Topic => "topic",
        }
    }

    fn new(source: i32) -> Self {
        match v1::ConfigSource::try_from(source) {
            Ok(v1::ConfigSource::Topic) => Self::Topic,
            Ok(v1::ConfigSource::Broker) => Self::Broker,
            _ => Self::Default,
        }
    }
}

/// Full description of one partition: its replicas by the metadata of the broker that responded, and its watermarks and
/// sizes as its leader reports them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PartitionDescription {
    /// Partition number.
    pub partition: u32,
    /// Leader; `None` if there is none.
    pub leader: Option<BrokerId>,
    /// Leader epoch.
    pub leader_epoch: LeaderEpoch,
    /// Brokers that hold a replica.
    pub replicas: Vec<BrokerId>,
    /// In-sync replicas.
    pub isr: Vec<BrokerId>,
    /// Eligible leader replicas: outside the ISR, and able to lead without loss.
    pub elr: Vec<BrokerId>,
    /// Replicas that a reassignment adds.
    pub adding: Vec<BrokerId>,
    /// Replicas that a reassignment removes once the added replicas are in sync.
    pub removing: Vec<BrokerId>,
    /// Newest leader epoch before which committed records may have been lost; `None` if there was no such epoch.
    pub unclean_epoch: Option<LeaderEpoch>,
    /// Watermarks of the log.
    pub watermarks: Watermarks,
    /// Bytes on the leader's disk.
    pub local_bytes: u64,
    /// Bytes in the object store.
    pub tiered_bytes: u64,
    /// Error for which the leader refuses writes, or for which the replica on the broker that responded is offline;
    /// `None` if there is neither.
    pub error: Option<ApiError>,
    /// Reason why there is no report of a leader, if there is none. The log start and the tiered end are then those of
    /// the metadata store; the other watermarks and the byte counts are 0.
    pub leader_error: Option<ApiError>,
}

/// Position in a partition whose offset is looked up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OffsetSpec {
    /// First offset that can be read.
    Earliest,
    /// First uncommitted offset.
    Latest,
    /// First record with at least this timestamp, in milliseconds since 1970; the high watermark if there is no such
    /// record.
    Time(i64),
}

impl Admin {
    pub(super) fn new(client: Client) -> Self {
        Self { client }
    }

    /// Returns the cluster's name and brokers.
    ///
    /// # Errors
    /// No broker responds.
    pub async fn cluster(&self) -> Result<ClusterInfo, CallError> {
        let call = |channel| async move { admin_client(channel).get_metadata(v1::GetMetadataRequest::default()).await };
        let response = self.client.retried(|| self.client.call_any(call)).await?;
        let brokers = response.brokers.into_iter();
        let brokers =
            brokers.map(|broker| BrokerInfo { id: BrokerId(broker.id), address: broker.address, rack: broker.rack });
        Ok(ClusterInfo { name: response.cluster, brokers: brokers.collect() })
    }

    /// Creates a topic.
    ///
    /// # Errors
    /// The topic exists, its name or configuration is invalid, the cluster has too few brokers or no capacity for it,
    /// or no broker responds.
    pub async fn create_topic(&self, topic: &NewTopic) -> Result<TopicSummary, CallError> {
        let call = |channel| {
            let request = topic.request.clone();
            async move { admin_client(channel).create_topic(request).await }
        };
        summary(self.client.change_any(call).await?.topic)
    }

    /// Returns all topics, ordered by name.
    ///
    /// # Errors
    /// No broker responds.
    pub async fn list_topics(&self) -> Result<Vec<TopicSummary>, CallError> {
        let call = |channel| async move { admin_client(channel).list_topics(v1::ListTopicsRequest {}).await };
        let response = self.client.retried(|| self.client.call_any(call)).await?;
        response.topics.into_iter().map(|topic| summary(Some(topic))).collect()
    }

    /// Returns the full description of a topic.
    ///
    /// # Errors
    /// The topic does not exist, or no broker responds.
    pub async fn describe_topic(&self, name: &str) -> Result<TopicDescription, CallError> {
        let call = |channel| {
            let request = v1::DescribeTopicRequest { name: name.to_owned() };
            async move { admin_client(channel).describe_topic(request).await }
        };
        let response = self.client.retried(|| self.client.call_any(call)).await?;
        Ok(TopicDescription {
            summary: summary(response.topic)?,
            effective_config: response.effective_config.into_iter().collect(),
            config_source: response
                .config_source
                .into_iter()
                .map(|(key, source)| (key, ConfigSource::new(source)))
                .collect(),
            partitions: response.partitions.into_iter().map(partition_description).collect::<Result<_, _>>()?,
        })
    }

    /// Changes a topic's configuration or its replication factor.
    ///
    /// # Errors
    /// The topic does not exist, a key or value is invalid, the cluster has too few brokers or no capacity, or no
    /// broker responds.
    pub async fn alter_topic(&self, name: &str, change: &TopicAlteration) -> Result<TopicSummary, CallError> {
        let call = |channel| {
            let request = v1::AlterTopicRequest {
                name: name.to_owned(),
                set: change.set.clone().into_iter().collect(),
                unset: change.unset.clone(),
                replication_factor: change.replication_factor.unwrap_or(0),
            };
            async move { admin_client(channel).alter_topic(request).await }
        };
        summary(self.client.change_any(call).await?.topic)
    }

    /// Raises the number of partitions of a topic to `partition_count`.
    ///
    /// # Errors
    /// The topic does not exist or already has at least `partition_count` partitions, the cluster has no capacity, or
    /// no broker responds.
    pub async fn add_partitions(&self, name: &str, partition_count: u32) -> Result<TopicSummary, CallError> {
        let call = |channel| {
            let request = v1::AddPartitionsRequest { name: name.to_owned(), partition_count };
            async move { admin_client(channel).add_partitions(request).await }
        };
        summary(self.client.change_any(call).await?.topic)
    }

    /// Deletes a topic with all its records. Returns the longest time for which objects of the topic stay in the object
    /// store: `tier.garbage_grace` plus the time until the next garbage collection. Returns `None` if the brokers have
    /// no object store.
    ///
    /// # Errors
    /// The topic does not exist, or no broker responds.
    pub async fn delete_topic(&self, name: &str) -> Result<Option<Duration>, CallError> {
        let call = |channel| {
            let request = v1::DeleteTopicRequest { name: name.to_owned() };
            async move { admin_client(channel).delete_topic(request).await }
        };
        let response = self.client.change_any(call).await?;
        Ok(response.object_grace_ms.map(Duration::from_millis))
    }

    /// Looks up one offset; see [`OffsetSpec`].
    ///
    /// # Errors
    /// The topic or the partition does not exist, or no leader responds within the request timeout.
    pub async fn offset(&self, topic: &str, partition: u32, at: OffsetSpec) -> Result<Offset, CallError> {
        self.client.topic(topic).await?;
        let number = i32::try_from(partition).unwrap_or(i32::MAX);
        let at = match at {
            OffsetSpec::Earliest => v1::offset_query::At::Earliest(true),
            OffsetSpec::Latest => v1::offset_query::At::Latest(true),
            OffsetSpec::Time(ms) => v1::offset_query::At::TimestampMs(ms),
        };
        let query = v1::OffsetQuery { topic: topic.to_owned(), partition: number, at: Some(at) };
        self.client
            .retried(|| async {
                let used_generation = self.client.routing().generation();
                let result = self.query_leader_of(topic, partition, &query).await;
                if let Ok(queried) = &result
                    && self.has_newer_leader(topic, partition, queried, used_generation).await
                {
                    return self.query_leader_of(topic, partition, &query).await.map(|queried| queried.offset);
                }
                let result = result.map(|queried| queried.offset);
                if let Err(CallError::Api(error)) = &result
                    && self.client.routing().apply_leader_hint(topic, partition, error)
                {
                    return self.query_leader_of(topic, partition, &query).await.map(|queried| queried.offset);
                }
                if result.as_ref().is_err_and(CallError::retryable) {
                    self.client.refresh(used_generation, &[topic]).await?;
                }
                result
            })
            .await
    }

    /// Refreshes the metadata if the leader that returned `queried` reports an expired lease. Returns true if the new
    /// metadata names another leader in a newer epoch. The refresh calls the old leader after all other brokers.
    /// Returns false without a refresh if no expired lease is reported, and also if the refresh fails.
    async fn has_newer_leader(
        &self,
        topic: &str,
        partition: u32,
        queried: &LeaderOffset,
        used_generation: u64,
    ) -> bool {
        let Some(expired) = &queried.lease_expired else { return false };
        let refreshed =
            self.client.refresh_deferring(&BTreeSet::from([expired.clone()]), used_generation, &[topic]).await;
        let leader = self.client.routing().read_target(topic, partition, None).filter(|_| refreshed.is_ok());
        leader.is_some_and(|leader| leader.address != *expired && leader.epoch > queried.epoch)
    }

    /// Queries the broker that leads a partition according to the cached metadata, once. Requests the metadata of the
    /// topic first if none is cached.
    async fn query_leader_of(
        &self,
        topic: &str,
        partition: u32,
        query: &v1::OffsetQuery,
    ) -> Result<LeaderOffset, CallError> {
        let route = self.client.topic(topic).await?;
        if usize::try_from(partition).is_ok_and(|number| number >= route.partitions.len()) {
            let count = route.partitions.len();
            let message = format!("topic {topic:?} has no partition {partition}: it has {count}, numbered from 0");
            return Err(ApiError::new(ErrorCode::UnknownPartition, message).into());
        }
        let Some(ReadTarget { address, epoch, .. }) = self.client.routing().read_target(topic, partition, None) else {
            let message = format!(
                "partition {topic}/{partition} has no leader: `strandline topic describe {topic}` shows how it gets one"
            );
            return Err(ApiError::new(ErrorCode::NotLeader, message).into());
        };
        let unreachable = |problem: String| {
            let message = format!("the leader of {topic}/{partition}, {}: {problem}", address.as_str());
            CallError::from(ApiError::new(ErrorCode::NotReady, message))
        };
        let channel = self.client.channel(&address).await.map_err(|error| unreachable(error.problem()))?;
        let timeout = match query.at {
            // A lookup by time may read the object store.
            Some(v1::offset_query::At::TimestampMs(_)) => self.client.options().request_timeout,
            _ => self.client.options().request_timeout.min(FIRST_RESPONSE_TIMEOUT),
        };
        let is_start = matches!(query.at, Some(v1::offset_query::At::Earliest(_)));
        let request = v1::ListOffsetsRequest { queries: vec![query.clone()] };
        let response = match with_timeout(timeout, log_client(channel).list_offsets(request)).await {
            Ok(response) => response,
            Err(NoResponse::Refused(error)) => return Err(error.into()),
            Err(no_response) => return Err(unreachable(no_response.into_error().message)),
        };
        // The log start of a leader with an expired lease is accepted, because no other broker has a better one.
        let lease_expired = (response.lease_expired && !is_start).then_some(address);
        let Some(result) = response.results.into_iter().next() else {
            return Err(invalid_response("an empty response to an offset query").into());
        };
        match result.error {
            Some(error) => Err(ApiError::from(error).into()),
            None => Ok(LeaderOffset { offset: offset(result.offset)?, epoch, lease_expired }),
        }
    }
}

/// Offset that a leader returned.
struct LeaderOffset {
    offset: Offset,
    /// Leader epoch of the partition in the client's metadata at the call.
    epoch: LeaderEpoch,
    /// Address of the leader if it reports that its lease expired; always `None` for a query of the log start.
    lease_expired: Option<BrokerAddress>,
}

/// Returns the error for a response that no correct broker sends. `content` describes the invalid content.
fn invalid_response(content: &str) -> ApiError {
    ApiError::new(ErrorCode::Internal, format!("the broker sent {content}"))
}

fn offset(value: i64) -> Result<Offset, ApiError> {
    Offset::from_i64(value).ok_or_else(|| invalid_response("a negative offset"))
}

/// Converts the topic of a response, which must be set.
fn summary(topic: Option<v1::TopicSummary>) -> Result<TopicSummary, CallError> {
    let topic = topic.ok_or_else(|| invalid_response("a response without a topic"))?;
    Ok(TopicSummary {
        id: topic.topic_id.parse().map_err(|_| invalid_response("a topic id that is not a UUID"))?,
        name: topic.name,
        partitions: topic.partitions,
        replication_factor: topic.replication_factor,
        config: topic.config.into_iter().collect(),
    })
}

/// Converts a partition of a response.
fn partition_description(state: v1::PartitionDescription) -> Result<PartitionDescription, CallError> {
    Ok(PartitionDescription {
        partition: u32::try_from(state.partition).map_err(|_| invalid_response("a negative partition"))?,
        leader: state.leader.map(BrokerId),
        leader_epoch: LeaderEpoch::from_i32(state.leader_epoch).unwrap_or_default(),
        replicas: brokers(state.replicas),
        isr: brokers(state.isr),
        elr: brokers(state.elr),
        adding: brokers(state.adding),
        removing: brokers(state.removing),
        unclean_epoch: state.unclean_epoch.and_then(LeaderEpoch::from_i32),
        watermarks: Watermarks {
            log_start: offset(state.log_start)?,
            local_start: offset(state.local_start)?,
            tiered_end: offset(state.tiered_end)?,
            high_watermark: offset(state.high_watermark)?,
            persisted_end: offset(state.persisted_end)?,
            log_end: offset(state.log_end)?,
        },
        local_bytes: state.local_bytes,
        tiered_bytes: state.tiered_bytes,
        error: state.error.map(ApiError::from),
        leader_error: state.leader_error.map(ApiError::from),
    })
}

fn brokers(ids: Vec<u32>) -> Vec<BrokerId> {
    ids.into_iter().map(BrokerId).collect()
}
