//! The partitions that this broker hosts, found by topic name without a lock.
//!
//! Each partition has its own cell, so opening or closing a partition copies no other entry. The role of a partition is
//! published by the partition itself.

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

/// State of one partition on this broker.
#[derive(Clone)]
pub(super) enum HostedPartition {
    /// A replica that leads, follows or is idle.
    Online(Arc<Partition>),
    /// No replica, or one that is being opened.
    None,
    /// The local replica is unusable.
    Offline(OfflineReplica),
}

/// A replica that cannot be opened.
#[derive(Clone)]
pub(super) struct OfflineReplica {
    /// Error of the open.
    pub(super) reason: Arc<str>,
    /// Leader epoch in which the replica was found unusable. A later unclean election takes that into account.
    pub(super) since: LeaderEpoch,
}

/// State of one topic on this broker.
#[derive(Clone)]
pub(super) struct HostedTopic {
    pub(super) id: TopicId,
    /// Revision of the topic key that has been applied to all of its partitions; zero before the first one.
    pub(super) revision: Revision,
    pub(super) config: Arc<TopicConfig>,
    cells: Arc<[ArcSwap<HostedPartition>]>,
}

impl HostedTopic {
    /// Creates a topic with this number of partitions. Keeps the partitions and the applied revision of `before`.
    pub(super) fn new(id: TopicId, config: Arc<TopicConfig>, partitions: u32, before: Option<&Self>) -> Self {
        let cells = match before {
            Some(before) if before.count() == partitions as usize => Arc::clone(&before.cells),
            before => (0..partitions)
                .map(|number| {
                    let cell = before.and_then(|before| before.cells.get(number as usize));
                    cell.map_or_else(
                        || ArcSwap::from_pointee(HostedPartition::None),
                        |cell| ArcSwap::new(cell.load_full()),
                    )
                })
                .collect(),
        };
        let revision = before.map_or(Revision::ZERO, |before| before.revision);
        Self { id, revision, config, cells }
    }

    /// Returns the number of partitions.
    pub(super) fn count(&self) -> usize {
        self.cells.len()
    }

    /// Returns the state of a partition, or `None` if the topic has no such partition.
    pub(super) fn holding(&self, number: u32) -> Option<Arc<HostedPartition>> {
        Some(self.cells.get(usize::try_from(number).ok()?)?.load_full())
    }

    /// Returns the states of all partitions, by partition number.
    pub(super) fn holdings(&self) -> impl Iterator<Item = Arc<HostedPartition>> + '_ {
        self.cells.iter().map(ArcSwap::load_full)
    }
}

/// Table of all hosted topics. Readers get a consistent entry of each topic.
pub(super) struct PartitionTable {
    topics: Parts<TopicName, HostedTopic>,
    ids: Parts<TopicId, TopicName>,
    changed: watch::Sender<()>,
}

impl Default for PartitionTable {
    fn default() -> Self {
        Self { topics: Parts::default(), ids: Parts::default(), changed: watch::Sender::new(()) }
    }
}

/// Result of a lookup by topic name and partition number.
pub(super) enum TableLookup {
    /// State of the partition.
    Held(PartitionId, Arc<HostedPartition>),
    /// The topic has no such partition. Holds the number of its partitions.
    NoPartition(usize),
}

impl PartitionTable {
    /// Looks up a partition by topic name and number. Returns `None` if no topic has the name.
    pub(super) fn find(&self, topic: &str, partition: i32) -> Option<TableLookup> {
        let topics = self.topics.of_name(topic);
        let partitions = topics.get(topic)?;
        let number = u32::try_from(partition).ok();
        let found =
            number.and_then(|number| Some((PartitionId::new(partitions.id, number), partitions.holding(number)?)));
        Some(found.map_or_else(
            || TableLookup::NoPartition(partitions.count()),
            |(id, replica)| TableLookup::Held(id, replica),
        ))
    }

    /// Returns the entry of a topic.
    pub(super) fn topic(&self, name: &TopicName) -> Option<HostedTopic> {
        self.topics.of(name).get(name).cloned()
    }

    /// Returns the names of all topics.
    pub(super) fn names(&self) -> Vec<TopicName> {
        self.topics.all().flat_map(|part| part.keys().cloned().collect::<Vec<_>>()).collect()
    }

    /// Returns the open replica of a partition, in any role.
    pub(super) fn by_id(&self, id: PartitionId) -> Option<Arc<Partition>> {
        match &*self.get(id)? {
            HostedPartition::Online(partition) => Some(Arc::clone(partition)),
            _ => None,
        }
    }

    /// Returns the state of a partition.
    pub(super) fn get(&self, id: PartitionId) -> Option<Arc<HostedPartition>> {
        let ids = self.ids.of(&id.topic);
        let name = ids.get(&id.topic)?;
        self.topics.of(name).get(name).filter(|topic| topic.id == id.topic)?.holding(id.number)
    }

    /// Returns the configuration that is applied to a partition.
    pub(super) fn config(&self, id: PartitionId) -> Option<Arc<TopicConfig>> {
        let ids = self.ids.of(&id.topic);
        let name = ids.get(&id.topic)?;
        Some(Arc::clone(&self.topics.of(name).get(name)?.config))
    }

    /// Waits until `holds` returns true for the table.
    pub(super) async fn until(&self, holds: impl Fn(&Self) -> bool) {
        let mut changed = self.changed.subscribe();
        while !holds(self) {
            if changed.changed().await.is_err() {
                return;
            }
        }
    }

    /// Returns all open replicas.
    pub(super) fn open(&self) -> Vec<Arc<Partition>> {
        let mut open = Vec::new();
        for part in self.topics.all() {
            for replica in part.values().flat_map(HostedTopic::holdings) {
                if let HostedPartition::Online(partition) = &*replica {
                    open.push(Arc::clone(partition));
                }
            }
        }
        open
    }

    /// Adds or replaces topics. Only the task that applies the metadata changes the table, so no change is lost.
    pub(super) fn put(&self, some: impl IntoIterator<Item = (TopicName, HostedTopic)>) {
        let mut ids = BTreeMap::new();
        let topics = some.into_iter().map(|(name, topic)| {
            // A recreated topic has the same name and another id.
            ids.extend(self.topic(&name).map(|before| (before.id, None)));
            ids.insert(topic.id, Some(name.clone()));
            (name, Some(topic))
        });
        self.topics.apply(topics);
        self.ids.apply(ids);
    }

    /// Removes a topic.
    pub(super) fn remove(&self, name: &TopicName) {
        if let Some(topic) = self.topic(name) {
            self.ids.apply([(topic.id, None)]);
            self.topics.apply([(name.clone(), None)]);
        }
    }

    /// Sets the state of a partition.
    pub(super) fn set(&self, id: PartitionId, replica: HostedPartition) {
        let ids = self.ids.of(&id.topic);
        let Some(name) = ids.get(&id.topic) else { return };
        let topics = self.topics.of(name);
        let partitions = topics.get(name).filter(|topic| topic.id == id.topic);
        if let Some(cell) = partitions.and_then(|topic| topic.cells.get(id.number as usize)) {
            cell.store(Arc::new(replica));
        }
    }

    /// Records the applied revisions of these topics and wakes waiting tasks. All preceding changes of the table are
    /// visible by then.
    pub(super) fn set_revisions(&self, revisions: BTreeMap<TopicName, Revision>) {
        let applied = revisions.into_iter().filter_map(|(name, revision)| {
            let topic = HostedTopic { revision, ..self.topic(&name)? };
            Some((name, Some(topic)))
        });
        self.topics.apply(applied);
        self.notify_changed();
    }

    /// Wakes the tasks that wait for a change of the table.
    pub(super) fn notify_changed(&self) {
        self.changed.send_replace(());
    }
}
