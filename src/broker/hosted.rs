//! The partitions that this broker holds, found by topic name without a lock.
//!
//! A partition has a cell of its own: that it is opened, or let go, costs no copy of what is held beside it. What this broker is in a
//! partition is said by the partition itself.

use std::{collections::BTreeMap, sync::Arc};

use arc_swap::ArcSwap;
use tokio::sync::watch;

use crate::{
    cluster::Revision,
    model::{LeaderEpoch, PartitionId, TopicConfig, TopicId, TopicName},
    partition::Partition,
};

/// What this broker has of one partition.
#[derive(Clone)]
pub(super) enum Holding {
    /// A replica, which leads, follows or waits.
    Open(Arc<Partition>),
    /// Nothing, or it is being opened.
    Elsewhere,
    /// The replica here cannot be used.
    Unusable(Unusable),
}

/// A replica that cannot be opened.
#[derive(Clone)]
pub(super) struct Unusable {
    /// What is wrong with it.
    pub(super) why: Arc<str>,
    /// The leader epoch in which that was found. Who elects it unclean later knows.
    pub(super) since: LeaderEpoch,
}

/// What this broker has of one topic.
#[derive(Clone)]
pub(super) struct HostedTopic {
    /// Its identity.
    pub(super) id: TopicId,
    /// The revision of the topic's key that is acted by: its partitions are what that makes of them. Zero before the first.
    pub(super) revision: Revision,
    /// Its configuration.
    pub(super) config: Arc<TopicConfig>,
    cells: Arc<[ArcSwap<Holding>]>,
}

impl HostedTopic {
    /// A topic with so many partitions; those that `before` had are as they were, and so is what is acted by.
    pub(super) fn new(id: TopicId, config: Arc<TopicConfig>, partitions: u32, before: Option<&Self>) -> Self {
        let cells = match before {
            Some(before) if before.count() == partitions as usize => Arc::clone(&before.cells),
            before => (0..partitions)
                .map(|number| {
                    let known = before.and_then(|before| before.cells.get(number as usize));
                    known.map_or_else(
                        || ArcSwap::from_pointee(Holding::Elsewhere),
                        |cell| ArcSwap::new(cell.load_full()),
                    )
                })
                .collect(),
        };
        let revision = before.map_or(Revision::ZERO, |before| before.revision);
        Self { id, revision, config, cells }
    }

    /// How many partitions it has.
    pub(super) fn count(&self) -> usize {
        self.cells.len()
    }

    /// What is held of a partition; `None` when the topic has none of this number.
    pub(super) fn holding(&self, number: u32) -> Option<Arc<Holding>> {
        Some(self.cells.get(usize::try_from(number).ok()?)?.load_full())
    }

    /// What is held, by partition number.
    pub(super) fn holdings(&self) -> impl Iterator<Item = Arc<Holding>> + '_ {
        self.cells.iter().map(ArcSwap::load_full)
    }
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

/// What is found under a name and a number.
pub(super) enum Found {
    /// What is held of this partition.
    Held(PartitionId, Arc<Holding>),
    /// The topic has only so many.
    NoPartition(usize),
}

impl Hosted {
    /// What there is for this name and number; `None` when no topic has the name.
    pub(super) fn find(&self, topic: &str, partition: i32) -> Option<Found> {
        let topics = self.topics.load();
        let hosted = topics.get(topic)?;
        let number = u32::try_from(partition).ok();
        let held = number.and_then(|number| Some((PartitionId::new(hosted.id, number), hosted.holding(number)?)));
        Some(held.map_or_else(|| Found::NoPartition(hosted.count()), |(id, holding)| Found::Held(id, holding)))
    }

    /// What is held of a topic.
    pub(super) fn topic(&self, name: &TopicName) -> Option<HostedTopic> {
        self.topics.load().get(name).cloned()
    }

    /// Every topic's name.
    pub(super) fn names(&self) -> Vec<TopicName> {
        self.topics.load().keys().cloned().collect()
    }

    /// The replica of this partition, whatever it does.
    pub(super) fn by_id(&self, id: PartitionId) -> Option<Arc<Partition>> {
        match &*self.held(id)? {
            Holding::Open(partition) => Some(Arc::clone(partition)),
            _ => None,
        }
    }

    /// What is held of this partition.
    pub(super) fn held(&self, id: PartitionId) -> Option<Arc<Holding>> {
        let ids = self.ids.load();
        let name = ids.get(&id.topic)?;
        let topics = self.topics.load();
        topics.get(name).filter(|topic| topic.id == id.topic)?.holding(id.number)
    }

    /// The configuration by which this partition is held.
    pub(super) fn config(&self, id: PartitionId) -> Option<Arc<TopicConfig>> {
        let ids = self.ids.load();
        let topics = self.topics.load();
        Some(Arc::clone(&topics.get(ids.get(&id.topic)?)?.config))
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

    /// Every replica.
    pub(super) fn open(&self) -> Vec<Arc<Partition>> {
        let topics = self.topics.load();
        let holdings = topics.values().flat_map(HostedTopic::holdings);
        holdings
            .filter_map(|holding| match &*holding {
                Holding::Open(partition) => Some(Arc::clone(partition)),
                _ => None,
            })
            .collect()
    }

    /// Takes topics in, or takes over what is new of them. Only the task that follows the metadata changes the set, so no
    /// change is lost.
    pub(super) fn put(&self, some: impl IntoIterator<Item = (TopicName, HostedTopic)>) {
        self.update(|topics| topics.extend(some));
    }

    /// Lets a topic go.
    pub(super) fn remove(&self, name: &TopicName) {
        self.update(|topics| {
            topics.remove(name);
        });
    }

    /// From now on this is held of a partition.
    pub(super) fn set(&self, id: PartitionId, holding: Holding) {
        let ids = self.ids.load();
        let topics = self.topics.load();
        let hosted = ids.get(&id.topic).and_then(|name| topics.get(name)).filter(|topic| topic.id == id.topic);
        if let Some(cell) = hosted.and_then(|topic| topic.cells.get(id.number as usize)) {
            cell.store(Arc::new(holding));
        }
    }

    /// Everything that was put or set is so, and these topics are acted by at these revisions.
    pub(super) fn acted(&self, revisions: BTreeMap<TopicName, Revision>) {
        if !revisions.is_empty() {
            self.update(|topics| {
                for (name, revision) in revisions {
                    if let Some(topic) = topics.get_mut(&name) {
                        topic.revision = revision;
                    }
                }
            });
        }
        self.tell();
    }

    /// Tells those who wait that something has changed.
    pub(super) fn tell(&self) {
        self.changed.send_replace(());
    }

    fn update(&self, change: impl FnOnce(&mut BTreeMap<TopicName, HostedTopic>)) {
        let mut topics = BTreeMap::clone(&self.topics.load());
        change(&mut topics);
        self.ids.store(Arc::new(topics.iter().map(|(name, topic)| (topic.id, name.clone())).collect()));
        self.topics.store(Arc::new(topics));
    }
}
