//! The partitions that this broker holds, found by topic name without a lock.
//!
//! A partition has a cell of its own: that it is opened, or let go, costs no copy of what is held beside it. What this broker is in a
//! partition is said by the partition itself.

mod parts;

use std::{collections::BTreeMap, sync::Arc};

use arc_swap::ArcSwap;
use tokio::sync::watch;

use self::parts::Parts;
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

/// All of them. Readers see each topic whole.
pub(super) struct Hosted {
    topics: Parts<TopicName, HostedTopic>,
    ids: Parts<TopicId, TopicName>,
    changed: watch::Sender<()>,
}

impl Default for Hosted {
    fn default() -> Self {
        Self { topics: Parts::default(), ids: Parts::default(), changed: watch::Sender::new(()) }
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
        let topics = self.topics.of_name(topic);
        let hosted = topics.get(topic)?;
        let number = u32::try_from(partition).ok();
        let held = number.and_then(|number| Some((PartitionId::new(hosted.id, number), hosted.holding(number)?)));
        Some(held.map_or_else(|| Found::NoPartition(hosted.count()), |(id, holding)| Found::Held(id, holding)))
    }

    /// What is held of a topic.
    pub(super) fn topic(&self, name: &TopicName) -> Option<HostedTopic> {
        self.topics.of(name).get(name).cloned()
    }

    /// Every topic's name.
    pub(super) fn names(&self) -> Vec<TopicName> {
        self.topics.all().flat_map(|part| part.keys().cloned().collect::<Vec<_>>()).collect()
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
        let ids = self.ids.of(&id.topic);
        let name = ids.get(&id.topic)?;
        self.topics.of(name).get(name).filter(|topic| topic.id == id.topic)?.holding(id.number)
    }

    /// The configuration by which this partition is held.
    pub(super) fn config(&self, id: PartitionId) -> Option<Arc<TopicConfig>> {
        let ids = self.ids.of(&id.topic);
        let name = ids.get(&id.topic)?;
        Some(Arc::clone(&self.topics.of(name).get(name)?.config))
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
        let mut open = Vec::new();
        for part in self.topics.all() {
            for holding in part.values().flat_map(HostedTopic::holdings) {
                if let Holding::Open(partition) = &*holding {
                    open.push(Arc::clone(partition));
                }
            }
        }
        open
    }

    /// Takes topics in, or takes over what is new of them. Only the task that follows the metadata changes the set, so no
    /// change is lost.
    pub(super) fn put(&self, some: impl IntoIterator<Item = (TopicName, HostedTopic)>) {
        let mut ids = BTreeMap::new();
        let topics = some.into_iter().map(|(name, topic)| {
            // A topic that was made again under its name has another id.
            ids.extend(self.topic(&name).map(|before| (before.id, None)));
            ids.insert(topic.id, Some(name.clone()));
            (name, Some(topic))
        });
        self.topics.apply(topics);
        self.ids.apply(ids);
    }

    /// Lets a topic go.
    pub(super) fn remove(&self, name: &TopicName) {
        if let Some(topic) = self.topic(name) {
            self.ids.apply([(topic.id, None)]);
            self.topics.apply([(name.clone(), None)]);
        }
    }

    /// From now on this is held of a partition.
    pub(super) fn set(&self, id: PartitionId, holding: Holding) {
        let ids = self.ids.of(&id.topic);
        let Some(name) = ids.get(&id.topic) else { return };
        let topics = self.topics.of(name);
        let hosted = topics.get(name).filter(|topic| topic.id == id.topic);
        if let Some(cell) = hosted.and_then(|topic| topic.cells.get(id.number as usize)) {
            cell.store(Arc::new(holding));
        }
    }

    /// Everything that was put or set is so, and these topics are acted by at these revisions.
    pub(super) fn acted(&self, revisions: BTreeMap<TopicName, Revision>) {
        let acted = revisions.into_iter().filter_map(|(name, revision)| {
            let topic = HostedTopic { revision, ..self.topic(&name)? };
            Some((name, Some(topic)))
        });
        self.topics.apply(acted);
        self.tell();
    }

    /// Tells those who wait that something has changed.
    pub(super) fn tell(&self) {
        self.changed.send_replace(());
    }
}
