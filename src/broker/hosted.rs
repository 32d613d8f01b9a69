//! The partitions that this broker holds, found by topic name without a lock.

use std::{collections::BTreeMap, sync::Arc};

use arc_swap::ArcSwap;
use tokio::sync::watch;

use super::faults::LookupError;
use crate::{
    cluster::Revision,
    model::{PartitionId, TopicId, TopicName},
    partition::Partition,
};

/// What this broker has of one partition.
#[derive(Clone)]
pub(super) enum Holding {
    /// It is led and served here.
    Open(Arc<Partition>),
    /// It is led elsewhere, or is being opened.
    Elsewhere,
    /// The replica here cannot be used.
    Unusable(Arc<str>),
}

/// What this broker has of one topic.
#[derive(Clone)]
pub(super) struct HostedTopic {
    /// Its identity.
    pub(super) id: TopicId,
    /// The revision of the metadata that is acted by.
    pub(super) revision: Revision,
    /// By partition number.
    pub(super) partitions: Arc<[Holding]>,
}

/// All of them. Readers see whole snapshots.
pub(super) struct Hosted {
    topics: ArcSwap<BTreeMap<TopicName, HostedTopic>>,
    ids: ArcSwap<BTreeMap<TopicId, TopicName>>,
    changed: watch::Sender<()>,
}

impl Default for Hosted {
    fn default() -> Self {
        Self { topics: ArcSwap::default(), ids: ArcSwap::default(), changed: watch::Sender::new(()) }
    }
}

impl Hosted {
    /// The partition that serves requests for this name and number; `None` when no topic has the name.
    pub(super) fn find(&self, topic: &str, partition: i32) -> Option<Result<Arc<Partition>, LookupError>> {
        let topics = self.topics.load();
        let hosted = topics.get(topic)?;
        let holding = usize::try_from(partition).ok().and_then(|number| hosted.partitions.get(number));
        if let Some(Holding::Open(open)) = holding {
            return Some(Ok(Arc::clone(open)));
        }
        let topic = topic.to_owned();
        Some(Err(match holding {
            Some(Holding::Unusable(why)) => LookupError::Unusable { topic, partition, why: why.as_ref().to_owned() },
            Some(_) => LookupError::NotLeader { topic, partition },
            None => LookupError::UnknownPartition { topic, partition, count: hosted.partitions.len() },
        }))
    }

    /// What is held of a topic.
    pub(super) fn topic(&self, name: &TopicName) -> Option<HostedTopic> {
        self.topics.load().get(name).cloned()
    }

    /// Every topic's name.
    pub(super) fn names(&self) -> Vec<TopicName> {
        self.topics.load().keys().cloned().collect()
    }

    /// The open partition with this id.
    pub(super) fn by_id(&self, id: PartitionId) -> Option<Arc<Partition>> {
        let ids = self.ids.load();
        let name = ids.get(&id.topic)?;
        match self.topics.load().get(name)?.partitions.get(id.number as usize)? {
            Holding::Open(partition) if partition.id() == id => Some(Arc::clone(partition)),
            _ => None,
        }
    }

    /// Waits until `holds` is true of what is held.
    pub(super) async fn until(&self, holds: impl Fn(&Self) -> bool) {
        let mut changed = self.changed.subscribe();
        while !holds(self) {
            if changed.changed().await.is_err() {
                return;
            }
        }
    }

    /// Every open partition.
    pub(super) fn open(&self) -> Vec<Arc<Partition>> {
        let topics = self.topics.load();
        let holdings = topics.values().flat_map(|topic| topic.partitions.iter());
        holdings
            .filter_map(|holding| match holding {
                Holding::Open(partition) => Some(Arc::clone(partition)),
                _ => None,
            })
            .collect()
    }

    /// Changes the set. Only the task that follows the metadata calls it, so no change is lost.
    pub(super) fn update(&self, change: impl FnOnce(&mut BTreeMap<TopicName, HostedTopic>)) {
        let mut topics = BTreeMap::clone(&self.topics.load());
        change(&mut topics);
        self.ids.store(Arc::new(topics.iter().map(|(name, topic)| (topic.id, name.clone())).collect()));
        self.topics.store(Arc::new(topics));
        self.changed.send_replace(());
    }
}
