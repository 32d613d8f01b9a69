//! Finds the local replica that serves a request, or the leader in the metadata, which the error then names.

use std::{sync::Arc, time::Duration};

use super::table::{HostedPartition, PartitionTable, TableLookup};
use crate::{
    broker::node_context::NodeContext,
    cluster::{MetadataCache, UnknownTopic},
    model::{BrokerId, LeaderEpoch, PartitionId, TopicId, TopicName},
    partition::{Partition, ReplicaStatus},
    proto::{
        error::{ApiError, ErrorCode},
        v1,
    },
};

/// Maximum time that a request waits for an unknown topic: another broker may have created the topic a moment ago.
const TOPIC_TIMEOUT: Duration = Duration::from_millis(300);

/// Leader of a partition according to the metadata, for a client that contacted a broker that does not lead.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::broker) struct LeaderHint {
    pub(in crate::broker) broker: BrokerId,
    pub(in crate::broker) epoch: LeaderEpoch,
    /// True if the leader is this broker.
    is_this_broker: bool,
    /// Address for clients; `None` while the leader is not registered.
    pub(in crate::broker) address: Option<String>,
}

impl LeaderHint {
    /// Returns `error` with the leader in its details, as docs/errors.md specifies.
    pub(in crate::broker) fn add_to(&self, error: ApiError) -> ApiError {
        let error = error.with("leader", self.broker).with("leader_epoch", self.epoch);
        match &self.address {
            Some(address) => error.with("address", address),
            None => error,
        }
    }
}

/// Describes what a client does after a `NOT_LEADER` error.
fn describe_retry(leader: Option<&LeaderHint>) -> String {
    match leader {
        // The replica on this broker does not lead yet, or no longer.
        Some(LeaderHint { is_this_broker: true, .. }) => "its leadership is starting or ending; retry".to_owned(),
        Some(LeaderHint { broker, address: Some(address), .. }) => {
            format!("send the request to broker {broker} at {address}")
        }
        Some(LeaderHint { broker, address: None, .. }) => {
            format!(
                "its leader, broker {broker}, is offline; another in-sync replica, if there is one, is elected \
                 automatically: retry"
            )
        }
        None => "the partition has no leader; refresh the metadata and retry".to_owned(),
    }
}

/// Error for a topic or partition that this broker cannot serve.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(in crate::broker) enum LookupError {
    /// The topic with this name has another id than the requested one.
    #[error(
        "topic {topic:?} has id {id}, not {requested}: the topic was deleted and recreated; refresh the metadata and \
         retry"
    )]
    Replaced {
        topic: String,
        id: TopicId,
        /// Id that the request contains.
        requested: TopicId,
    },
    /// The topic has no partition with this number.
    #[error("topic {topic:?} has no partition {partition}: it has {count}, numbered from 0")]
    UnknownPartition {
        topic: String,
        /// Requested partition number.
        partition: i32,
        /// Number of partitions of the topic.
        count: usize,
    },
    /// This broker does not serve the request. Either another broker leads, or there is no leader. Or the local replica
    /// is not open, does not lead yet, or is in an older leader epoch than the reader.
    #[error("this broker does not lead partition {partition} of topic {topic:?}: {}", describe_retry(leader.as_ref()))]
    NotLeader {
        topic: String,
        partition: i32,
        /// Leader according to the metadata; `None` if there is none.
        leader: Option<LeaderHint>,
    },
    /// The local replica is offline, and the metadata names no other broker as the leader.
    #[error("partition {partition} of topic {topic:?} is offline on this broker: {reason}")]
    Unusable { topic: String, partition: i32, reason: String },
}

impl From<LookupError> for ApiError {
    fn from(error: LookupError) -> Self {
        let message = error.to_string();
        match error {
            LookupError::Replaced { topic, id, requested } => Self::new(ErrorCode::TopicIdMismatch, message)
                .with("topic", topic)
                .with("topic_id", id)
                .with("requested_topic_id", requested),
            LookupError::UnknownPartition { topic, partition, count } => {
                Self::new(ErrorCode::UnknownPartition, message)
                    .with("topic", topic)
                    .with("partition", partition)
                    .with("partitions", count)
            }
            LookupError::NotLeader { topic, partition, leader } => {
                let error = Self::new(ErrorCode::NotLeader, message).with("topic", topic).with("partition", partition);
                leader.map_or(error.clone(), |leader| leader.add_to(error))
            }
            LookupError::Unusable { topic, partition, .. } => {
                Self::new(ErrorCode::StorageFailed, message).with("topic", topic).with("partition", partition)
            }
        }
    }
}

/// Finds partitions and their leaders.
#[derive(Clone)]
pub(in crate::broker) struct ReplicaLookup {
    id: BrokerId,
    standalone: bool,
    metadata: MetadataCache,
    partitions: Arc<PartitionTable>,
}

impl ReplicaLookup {
    pub(in crate::broker) fn new(ctx: &NodeContext, partitions: Arc<PartitionTable>) -> Self {
        Self { id: ctx.id, standalone: ctx.standalone, metadata: ctx.metadata.clone(), partitions }
    }

    /// Returns the partition with this topic name and number, if this broker leads it.
    pub(in crate::broker) fn partition(&self, topic: &str, partition: i32) -> Result<Arc<Partition>, ApiError> {
        self.partition_of(topic, None, partition)
    }

    /// Returns a partition as [`Self::partition`] does. If an id is given, the topic must have it.
    pub(in crate::broker) fn partition_of(
        &self,
        topic: &str,
        id: Option<TopicId>,
        partition: i32,
    ) -> Result<Arc<Partition>, ApiError> {
        self.replica(topic, id, partition, |status| status.role.leads())
    }

    /// Returns the partition for a reader, if this broker leads it. A reader that accepts `any_replica` also gets an
    /// in-sync follower. `requested` contains the newest leader epoch that the reader has received. A replica in an
    /// older epoch is rejected, because that replica may lack records that the reader has read.
    pub(in crate::broker) fn readable(
        &self,
        requested: &v1::FetchPartition,
        id: Option<TopicId>,
        any_replica: bool,
    ) -> Result<Arc<Partition>, ApiError> {
        let min_epoch = LeaderEpoch::from_i32(requested.leader_epoch).unwrap_or_default();
        let serves = |status: ReplicaStatus| status.epoch >= min_epoch && status.role.serves(any_replica);
        self.replica(&requested.topic, id, requested.partition, serves)
    }

    /// Returns the open replica with this topic name and number, in any role. If an id is `requested`, the topic must
    /// have it.
    pub(in crate::broker) fn open_replica(
        &self,
        topic: &str,
        requested: Option<TopicId>,
        partition: i32,
    ) -> Option<Arc<Partition>> {
        let Some(TableLookup::Held(id, replica)) = self.partitions.find(topic, partition) else { return None };
        match &*replica {
            HostedPartition::Online(open) if requested.is_none_or(|requested| requested == id.topic) => {
                Some(Arc::clone(open))
            }
            _ => None,
        }
    }

    /// Returns the partition with this topic name and number, if it is open and `serves` accepts its status. If an id
    /// is `requested`, the topic must have it. Errors: `UnknownTopic`, or a [`LookupError`].
    fn replica(
        &self,
        topic: &str,
        requested: Option<TopicId>,
        partition: i32,
        serves: impl FnOnce(ReplicaStatus) -> bool,
    ) -> Result<Arc<Partition>, ApiError> {
        let fail = |error: LookupError| Err(ApiError::from(error));
        let topic = topic.to_owned();
        let (id, replica) = match self.partitions.find(&topic, partition) {
            Some(TableLookup::Held(id, _))
                if let Some(requested) = requested
                    && requested != id.topic =>
            {
                return fail(LookupError::Replaced { topic, id: id.topic, requested });
            }
            Some(TableLookup::Held(id, replica)) => (id, replica),
            Some(TableLookup::NoPartition(count)) => {
                return fail(LookupError::UnknownPartition { topic, partition, count });
            }
            None => return Err(UnknownTopic::new(&topic).into()),
        };
        if let HostedPartition::Online(open) = &*replica
            && serves(open.status())
        {
            return Ok(Arc::clone(open));
        }
        let leader = self.leader(id);
        match &*replica {
            HostedPartition::Offline(offline) if leader.as_ref().is_none_or(|leader| leader.broker == self.id) => {
                fail(LookupError::Unusable { topic, partition, reason: offline.to_string() })
            }
            _ => fail(LookupError::NotLeader { topic, partition, leader }),
        }
    }

    /// Waits until this broker hosts all of these topics, at most [`TOPIC_TIMEOUT`]: another broker may have created
    /// one a moment ago. Each topic is a name and an id, which may be empty. Does not wait for an invalid name, or on a
    /// standalone broker.
    pub(in crate::broker) async fn wait_for_topics(&self, topics: impl Iterator<Item = (&str, &str)>) {
        if self.standalone {
            return;
        }
        let unknown = |(name, id): &(&str, &str)| match self.partitions.find(name, 0) {
            // The hosted topic with this name may be an older one, with another id.
            Some(TableLookup::Held(hosted, _)) => {
                !id.is_empty() && id.parse::<TopicId>().is_ok_and(|id| id != hosted.topic)
            }
            Some(TableLookup::NoPartition(_)) => false,
            None => true,
        };
        let missing: Vec<(TopicName, Option<TopicId>)> = topics
            .filter(unknown)
            .filter_map(|(name, id)| Some((TopicName::new(name).ok()?, id.parse::<TopicId>().ok())))
            .collect();
        if missing.is_empty() {
            return;
        }
        let is_known = |partitions: &PartitionTable, (name, id): &(TopicName, Option<TopicId>)| {
            partitions.topic(name).is_some_and(|topic| id.is_none_or(|id| id == topic.id))
        };
        let all_known = self.partitions.until(|partitions| missing.iter().all(|topic| is_known(partitions, topic)));
        let _late = tokio::time::timeout(TOPIC_TIMEOUT, all_known).await;
    }

    /// Returns the leader of a partition according to the metadata; `None` if there is no leader or no readable value.
    pub(in crate::broker) fn leader(&self, id: PartitionId) -> Option<LeaderHint> {
        let state = self.metadata.state();
        let value = &state.partition(id)?.partition.as_ref()?.value;
        let broker = value.leader?;
        let address = state.brokers().get(&broker).map(|entry| entry.value.listeners.client().to_owned());
        Some(LeaderHint { broker, epoch: value.leader_epoch, is_this_broker: broker == self.id, address })
    }

    /// Returns the error for a write while this broker stops: `NOT_LEADER` with the new leader if another broker leads,
    /// else `NOT_READY`.
    pub(in crate::broker) fn broker_stopping_error(&self, partition: &Partition) -> ApiError {
        let id = partition.id();
        match self.leader(id).filter(|leader| leader.broker != self.id) {
            Some(leader) => {
                let (topic, partition) = (partition.topic().to_string(), id.number.cast_signed());
                LookupError::NotLeader { topic, partition, leader: Some(leader) }.into()
            }
            None => ApiError::new(ErrorCode::NotReady, "this broker is stopping: retry on another broker, or later"),
        }
    }

    /// Returns the `NOT_LEADER` error for a read of a partition that this broker no longer serves, with the leader in
    /// the metadata.
    pub(in crate::broker) fn not_leader_error(&self, topic: &str, partition: i32, id: PartitionId) -> ApiError {
        LookupError::NotLeader { topic: topic.to_owned(), partition, leader: self.leader(id) }.into()
    }

    /// Returns `error`, with the leader in its details if the leader is another broker.
    pub(in crate::broker) fn with_leader_hint(&self, id: PartitionId, error: ApiError) -> ApiError {
        match self.leader(id) {
            Some(leader) if leader.broker != self.id => leader.add_to(error),
            _ => error,
        }
    }
}
