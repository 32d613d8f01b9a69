//! Finds the broker that serves a partition: this broker, or the leader in the metadata.

use std::{sync::Arc, time::Duration};

use super::{
    Broker,
    faults::{self, Leader, LookupError},
    hosted::{Found, Holding, Hosted, Unusable},
};
use crate::{
    model::{LeaderEpoch, PartitionId, TopicId, TopicName},
    partition::{AppendError, Partition, ReadError, Standing},
    proto::{
        error::{ApiError, ErrorCode},
        v1,
    },
};

/// Maximum time to wait for an unknown topic: another broker may have created the topic a moment ago.
const NEWS: Duration = Duration::from_millis(300);

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
        self.replica(topic, id, partition, |standing| standing.role.leads())
    }

    /// Returns the partition for a reader, if it is led here or, for a reader that accepts any replica, followed in sync. The reader names
    /// the newest leader epoch that it knows. A replica in an older epoch is rejected, because it may know less than the reader has seen.
    pub(super) fn readable(&self, want: &v1::FetchPartition, any_replica: bool) -> Result<Arc<Partition>, ApiError> {
        let known = LeaderEpoch::from_i32(want.leader_epoch).unwrap_or_default();
        let id = faults::topic_id(&want.topic_id)?;
        self.replica(&want.topic, id, want.partition, |standing| {
            standing.epoch >= known && standing.role.serves(any_replica)
        })
    }

    /// Returns the response entry of a partition that is not read here, with the watermarks of the replica if one is open.
    pub(super) fn refused_partition(&self, want: v1::FetchPartition, fault: ApiError) -> v1::FetchedPartition {
        let holding = match self.hosted.find(&want.topic, want.partition) {
            Some(Found::Held(id, holding))
                if faults::topic_id(&want.topic_id).is_ok_and(|asked| asked.is_none_or(|asked| asked == id.topic)) =>
            {
                Some(holding)
            }
            _ => None,
        };
        let mut refused =
            v1::FetchedPartition { next_offset: want.offset, error: Some(fault.into()), ..Default::default() };
        if let Some(holding) = holding
            && let Holding::Open(open) = &*holding
        {
            let marks = open.marks();
            (refused.log_start, refused.high_watermark) = (marks.log_start.as_i64(), marks.high_watermark.as_i64());
        }
        (refused.topic, refused.partition) = (want.topic, want.partition);
        refused
    }

    /// Returns the partition with this name and number, if `serves` accepts its role and epoch.
    fn replica(
        &self,
        topic: &str,
        asked: Option<TopicId>,
        partition: i32,
        serves: impl FnOnce(Standing) -> bool,
    ) -> Result<Arc<Partition>, ApiError> {
        let lookup = |error: LookupError| Err(ApiError::from(error));
        let topic = topic.to_owned();
        let (id, holding) = match self.hosted.find(&topic, partition) {
            Some(Found::Held(id, _))
                if let Some(asked) = asked
                    && asked != id.topic =>
            {
                return lookup(LookupError::Replaced { topic, id: id.topic, asked });
            }
            Some(Found::Held(id, holding)) => (id, holding),
            Some(Found::NoPartition(count)) => {
                return lookup(LookupError::UnknownPartition { topic, partition, count });
            }
            None => return Err(self.topics.unknown(&topic).into()),
        };
        if let Holding::Open(open) = &*holding
            && serves(open.standing())
        {
            return Ok(Arc::clone(open));
        }
        let leader = self.leader(id);
        match &*holding {
            Holding::Unusable(Unusable { why, .. })
                if leader.as_ref().is_none_or(|leader| leader.broker == self.settings.id) =>
            {
                lookup(LookupError::Unusable { topic, partition, why: why.as_ref().to_owned() })
            }
            _ => lookup(LookupError::NotLeader { topic, partition, leader }),
        }
    }

    /// Waits a moment for topics, by name and id, that are unknown here: another broker may have created them just now.
    pub(super) async fn acquaint(&self, topics: impl Iterator<Item = (&str, &str)>) {
        if self.alone {
            return;
        }
        let unknown = |(name, id): &(&str, &str)| match self.hosted.find(name, 0) {
            Some(Found::Held(held, _)) => !id.is_empty() && id.parse::<TopicId>().is_ok_and(|id| id != held.topic),
            Some(Found::NoPartition(_)) => false,
            None => true,
        };
        let strangers: Vec<(TopicName, Option<TopicId>)> = topics
            .filter(unknown)
            .filter_map(|(name, id)| Some((TopicName::new(name).ok()?, id.parse::<TopicId>().ok())))
            .collect();
        if strangers.is_empty() {
            return;
        }
        let is_known = |hosted: &Hosted, (name, id): &(TopicName, Option<TopicId>)| {
            hosted.topic(name).is_some_and(|topic| id.is_none_or(|id| id == topic.id))
        };
        let known = self.hosted.until(|hosted| strangers.iter().all(|stranger| is_known(hosted, stranger)));
        let _late = tokio::time::timeout(NEWS, known).await;
    }

    /// Returns the leader of a partition according to the metadata.
    pub(super) fn leader(&self, id: PartitionId) -> Option<Leader> {
        let state = self.view.state();
        let value = &state.partition(id)?.partition.as_ref()?.value;
        let broker = value.leader?;
        let address = state.brokers().get(&broker).map(|known| known.value.listeners.client().to_owned());
        Some(Leader { broker, epoch: value.leader_epoch, address })
    }

    /// Returns the error for a write while this broker stops, with the new leader if there is one.
    pub(super) fn stopping_refusal(&self, partition: &Partition) -> ApiError {
        let id = partition.id();
        match self.leader(id).filter(|leader| leader.broker != self.settings.id) {
            Some(leader) => {
                let (topic, partition) = (partition.topic().to_string(), id.number.cast_signed());
                LookupError::NotLeader { topic, partition, leader: Some(leader) }.into()
            }
            None => ApiError::new(ErrorCode::NotReady, "this broker is stopping; try another, or again later"),
        }
    }

    /// Returns the error for a read of a partition that this broker no longer leads.
    pub(super) fn not_leader(&self, topic: &str, partition: i32, id: PartitionId) -> ApiError {
        LookupError::NotLeader { topic: topic.to_owned(), partition, leader: self.leader(id) }.into()
    }

    /// Returns the error for a rejected write, with the leader to contact instead.
    pub(super) fn append_refused(&self, id: PartitionId, error: AppendError) -> ApiError {
        let elsewhere = matches!(error, AppendError::NotLeader { .. } | AppendError::Deposed | AppendError::Closing);
        let fault = ApiError::from(error);
        if elsewhere { self.pointing(id, fault) } else { fault }
    }

    /// Returns the error for a rejected read, with the leader to contact instead.
    pub(super) fn read_refused(&self, id: PartitionId, error: ReadError) -> ApiError {
        let elsewhere = matches!(error, ReadError::Closed);
        let fault = ApiError::from(error);
        if elsewhere { self.pointing(id, fault) } else { fault }
    }

    /// Adds the leader to an error, if it is another broker.
    fn pointing(&self, id: PartitionId, fault: ApiError) -> ApiError {
        match self.leader(id) {
            Some(leader) if leader.broker != self.settings.id => leader.told(fault),
            _ => fault,
        }
    }
}
