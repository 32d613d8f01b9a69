//! Finding who serves a partition: this broker, or the one that the metadata names.

use std::{sync::Arc, time::Duration};

use super::{
    Broker,
    faults::{Leader, LookupError},
    hosted::{Found, Holding, Unusable},
};
use crate::{
    model::{LeaderEpoch, PartitionId, TopicName},
    partition::{AppendError, Partition, ReadError, Standing},
    proto::fault::{Fault, Reason},
};

/// How long a name that is not known here is waited for: another broker may have made the topic a moment ago.
const NEWS: Duration = Duration::from_millis(300);

impl Broker {
    /// The partition that serves requests for this name and number: it is led here.
    pub(super) fn partition(&self, topic: &str, partition: i32) -> Result<Arc<Partition>, Fault> {
        self.replica(topic, partition, |standing| standing.role.leads())
    }

    /// The partition that serves a reader who knows of leader epoch `known`: it is led here or, where the reader takes any replica,
    /// followed in sync. A replica that has not heard of that epoch may know less than the reader has seen.
    pub(super) fn readable(
        &self,
        topic: &str,
        partition: i32,
        any_replica: bool,
        known: LeaderEpoch,
    ) -> Result<Arc<Partition>, Fault> {
        self.replica(topic, partition, |standing| standing.epoch >= known && standing.role.serves(any_replica))
    }

    /// The partition of this name and number, if its standing here is one that `serves`.
    fn replica(
        &self,
        topic: &str,
        partition: i32,
        serves: impl FnOnce(Standing) -> bool,
    ) -> Result<Arc<Partition>, Fault> {
        let lookup = |error: LookupError| Err(Fault::from(error));
        let topic = topic.to_owned();
        let (id, holding) = match self.hosted.find(&topic, partition) {
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

    /// Waits a moment for topics that are not known here, where another broker may have made them just now.
    pub(super) async fn acquaint(&self, topics: impl Iterator<Item = &str>) {
        if self.alone {
            return;
        }
        let unknown = |name: &&str| self.hosted.find(name, 0).is_none();
        let strangers: Vec<TopicName> = topics.filter(unknown).filter_map(|name| TopicName::new(name).ok()).collect();
        if strangers.is_empty() {
            return;
        }
        let known = self.hosted.until(|hosted| strangers.iter().all(|name| hosted.topic(name).is_some()));
        let _late = tokio::time::timeout(NEWS, known).await;
    }

    /// Who leads a partition, by the metadata.
    pub(super) fn leader(&self, id: PartitionId) -> Option<Leader> {
        let state = self.view.state();
        let value = &state.partition(id)?.partition.as_ref()?.value;
        let broker = value.leader?;
        let address = state.brokers().get(&broker).map(|known| known.value.addresses.grpc.clone());
        Some(Leader { broker, epoch: value.leader_epoch, address })
    }

    /// What a write is told that comes while this broker stops: where to go, if others lead already.
    pub(super) fn stopping_refusal(&self, partition: &Partition) -> Fault {
        let id = partition.id();
        match self.leader(id).filter(|leader| leader.broker != self.settings.id) {
            Some(leader) => {
                let (topic, partition) = (partition.topic().to_string(), id.number.cast_signed());
                LookupError::NotLeader { topic, partition, leader: Some(leader) }.into()
            }
            None => Fault::new(Reason::NotReady, "this broker is stopping; try another, or again later"),
        }
    }

    /// A fault for whoever reads a partition that is not led here any more.
    pub(super) fn not_leader(&self, topic: &str, partition: i32, id: PartitionId) -> Fault {
        LookupError::NotLeader { topic: topic.to_owned(), partition, leader: self.leader(id) }.into()
    }

    /// Why a write was refused, with whom to turn to instead.
    pub(super) fn append_refused(&self, id: PartitionId, error: AppendError) -> Fault {
        let elsewhere = matches!(error, AppendError::NotLeader { .. } | AppendError::Deposed | AppendError::Closing);
        let fault = Fault::from(error);
        if elsewhere { self.pointing(id, fault) } else { fault }
    }

    /// Why a read was refused, with whom to turn to instead.
    pub(super) fn read_refused(&self, id: PartitionId, error: ReadError) -> Fault {
        let elsewhere = matches!(error, ReadError::Closed);
        let fault = Fault::from(error);
        if elsewhere { self.pointing(id, fault) } else { fault }
    }

    /// A fault that says who leads, where that is another broker.
    fn pointing(&self, id: PartitionId, fault: Fault) -> Fault {
        match self.leader(id) {
            Some(leader) if leader.broker != self.settings.id => leader.told(fault),
            _ => fault,
        }
    }
}
