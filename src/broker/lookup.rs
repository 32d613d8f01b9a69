//! Finds the broker that serves a partition: this broker, or the leader in the metadata.

use std::{sync::Arc, time::Duration};

use super::{
    Broker,
    errors::{self, LeaderHint, LookupError},
    table::{HostedPartition, OfflineReplica, PartitionTable, TableLookup},
};
use crate::{
    cluster::UnknownTopic,
    model::{LeaderEpoch, PartitionId, TopicId, TopicName},
    partition::{AppendError, Partition, ReadError, ReplicaStatus},
    proto::{
        error::{ApiError, ErrorCode},
        v1,
    },
};

/// Maximum time to wait for an unknown topic: another broker may have created the topic a moment ago.
const TOPIC_WAIT: Duration = Duration::from_millis(300);

impl Broker {
    /// Returns the partition with this name and number, if it is led here.
    pub(super) fn partition(&self, topic: &str, partition: i32) -> Result<Arc<Partition>, ApiError> {
        self.partition_of(topic, None, partition)
    }

    /// Returns a partition as [`Self::partition`] does. Requires this topic id, if one is given.
    pub(super) fn partition_of(
        &self,
        topic: &str,
        id: Option<TopicId>,
        partition: i32,
    ) -> Result<Arc<Partition>, ApiError> {
        self.replica(topic, id, partition, |status| status.role.leads())
    }

    /// Returns the partition for a reader, if it is led here or, for a reader that accepts any replica, followed in
    /// sync. The reader names the newest leader epoch that it has received. A replica in an older epoch is rejected,
    /// because it may lack records that the reader has read.
    pub(super) fn readable(&self, want: &v1::FetchPartition, any_replica: bool) -> Result<Arc<Partition>, ApiError> {
        let min_epoch = LeaderEpoch::from_i32(want.leader_epoch).unwrap_or_default();
        let id = errors::topic_id(&want.topic_id)?;
        let serves = |status: ReplicaStatus| status.epoch >= min_epoch && status.role.serves(any_replica);
        self.replica(&want.topic, id, want.partition, serves)
    }

    /// Returns the response entry of a partition that is not read here, with the watermarks of the replica if one is
    /// open.
    pub(super) fn refused_partition(&self, want: v1::FetchPartition, error: ApiError) -> v1::FetchedPartition {
        let replica = match self.partitions.find(&want.topic, want.partition) {
            Some(TableLookup::Held(id, replica))
                if errors::topic_id(&want.topic_id)
                    .is_ok_and(|requested| requested.is_none_or(|requested| requested == id.topic)) =>
            {
                Some(replica)
            }
            _ => None,
        };
        let mut refused =
            v1::FetchedPartition { next_offset: want.offset, error: Some(error.into()), ..Default::default() };
        if let Some(replica) = replica
            && let HostedPartition::Online(open) = &*replica
        {
            let watermarks = open.watermarks();
            (refused.log_start, refused.high_watermark) =
                (watermarks.log_start.as_i64(), watermarks.high_watermark.as_i64());
        }
        (refused.topic, refused.partition) = (want.topic, want.partition);
        refused
    }

    /// Returns the partition with this name and number, if `serves` accepts its role and epoch.
    fn replica(
        &self,
        topic: &str,
        requested: Option<TopicId>,
        partition: i32,
        serves: impl FnOnce(ReplicaStatus) -> bool,
    ) -> Result<Arc<Partition>, ApiError> {
        let lookup = |error: LookupError| Err(ApiError::from(error));
        let topic = topic.to_owned();
        let (id, replica) = match self.partitions.find(&topic, partition) {
            Some(TableLookup::Held(id, _))
                if let Some(requested) = requested
                    && requested != id.topic =>
            {
                return lookup(LookupError::Replaced { topic, id: id.topic, asked: requested });
            }
            Some(TableLookup::Held(id, replica)) => (id, replica),
            Some(TableLookup::NoPartition(count)) => {
                return lookup(LookupError::UnknownPartition { topic, partition, count });
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
            HostedPartition::Offline(OfflineReplica { reason, .. })
                if leader.as_ref().is_none_or(|leader| leader.broker == self.ctx.id) =>
            {
                lookup(LookupError::Unusable { topic, partition, reason: reason.as_ref().to_owned() })
            }
            _ => lookup(LookupError::NotLeader { topic, partition, leader }),
        }
    }

    /// Waits a moment for topics, by name and id, that are unknown here: another broker may have created them just now.
    pub(super) async fn wait_for_topics(&self, topics: impl Iterator<Item = (&str, &str)>) {
        if self.ctx.standalone {
            return;
        }
        let unknown = |(name, id): &(&str, &str)| match self.partitions.find(name, 0) {
            Some(TableLookup::Held(found, _)) => {
                !id.is_empty() && id.parse::<TopicId>().is_ok_and(|id| id != found.topic)
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
        let found = self.partitions.until(|partitions| missing.iter().all(|topic| is_known(partitions, topic)));
        let _late = tokio::time::timeout(TOPIC_WAIT, found).await;
    }

    /// Returns the leader of a partition according to the metadata.
    pub(super) fn leader(&self, id: PartitionId) -> Option<LeaderHint> {
        let state = self.ctx.metadata.state();
        let value = &state.partition(id)?.partition.as_ref()?.value;
        let broker = value.leader?;
        let address = state.brokers().get(&broker).map(|entry| entry.value.listeners.client().to_owned());
        Some(LeaderHint { broker, epoch: value.leader_epoch, address })
    }

    /// Returns the error for a write while this broker stops, with the new leader if there is one.
    pub(super) fn stopping_refusal(&self, partition: &Partition) -> ApiError {
        let id = partition.id();
        match self.leader(id).filter(|leader| leader.broker != self.ctx.id) {
            Some(leader) => {
                let (topic, partition) = (partition.topic().to_string(), id.number.cast_signed());
                LookupError::NotLeader { topic, partition, leader: Some(leader) }.into()
            }
            None => ApiError::new(ErrorCode::NotReady, "this broker is stopping: retry on another broker, or later"),
        }
    }

    /// Returns the error for a read of a partition that this broker no longer leads.
    pub(super) fn not_leader(&self, topic: &str, partition: i32, id: PartitionId) -> ApiError {
        LookupError::NotLeader { topic: topic.to_owned(), partition, leader: self.leader(id) }.into()
    }

    /// Returns the error for a rejected write, with the leader to contact instead.
    pub(super) fn append_refused(&self, id: PartitionId, error: AppendError) -> ApiError {
        let is_led_elsewhere =
            matches!(error, AppendError::NotLeader { .. } | AppendError::Deposed | AppendError::Closing);
        let error = ApiError::from(error);
        if is_led_elsewhere { self.with_leader_hint(id, error) } else { error }
    }

    /// Returns the error for a rejected read, with the leader to contact instead.
    pub(super) fn read_refused(&self, id: PartitionId, error: ReadError) -> ApiError {
        let is_led_elsewhere = matches!(error, ReadError::Closed);
        let error = ApiError::from(error);
        if is_led_elsewhere { self.with_leader_hint(id, error) } else { error }
    }

    /// Adds the leader to an error, if it is another broker.
    fn with_leader_hint(&self, id: PartitionId, error: ApiError) -> ApiError {
        match self.leader(id) {
            Some(leader) if leader.broker != self.ctx.id => leader.add_to(error),
            _ => error,
        }
    }
}
