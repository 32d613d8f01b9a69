//! The partitions that this broker hosts, found by topic name or id without a lock.
//!
//! Each partition has its own cell, so opening or closing a partition copies no other entry. The table does not contain
//! roles: each open partition publishes its own.

mod parts;

use std::{collections::BTreeMap, fmt, sync::Arc};

use arc_swap::ArcSwap;
use futures::{StreamExt as _, stream};
use tokio::sync::watch;

use self::parts::ShardedMap;
use crate::{
    cluster::Revision,
    model::{LeaderEpoch, PartitionId, TopicConfig, TopicId, TopicName},
    partition::Partition,
    task::Tasks,
};

/// Maximum number of partitions that are stopped concurrently.
const MAX_CONCURRENT_STOPS: usize = 64;

/// State of one partition on this broker.
#[derive(Clone)]
pub(in crate::broker) enum HostedPartition {
    /// A replica that leads, follows or is idle.
    Online(Arc<Partition>),
    /// No replica is open: none is assigned, its partition value is missing or unreadable, or it is not opened yet.
    None,
    /// The local replica cannot be used, for this reason.
    Offline(OfflineReplica),
}

/// Reason for which a local replica is offline.
#[derive(Clone)]
pub(in crate::broker) enum OfflineReplica {
    /// The partition value was unreadable at the startup verification. The current value is readable, and has this
    /// broker as the leader or in the ISR or ELR.
    Unverified,
    /// The last attempt to open the replica failed.
    OpenFailed {
        /// Error of the last attempt.
        reason: Arc<str>,
        /// Leader epoch of the partition at the first failed attempt. An unclean election in a later epoch may discard
        /// the replica.
        since: LeaderEpoch,
    },
}

impl fmt::Display for OfflineReplica {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Unverified => {
                "its metadata was unreadable when this broker started and is readable now: restart the broker"
            }
            Self::OpenFailed { reason, .. } => reason,
        })
    }
}

/// State of one topic on this broker.
#[derive(Clone)]
pub(in crate::broker) struct HostedTopic {
    pub(in crate::broker) id: TopicId,
    /// Revision of the topic key that has been applied to all partitions of the topic; zero before a revision was
    /// applied.
    pub(in crate::broker) revision: Revision,
    pub(in crate::broker) config: Arc<TopicConfig>,
    /// State of each partition, by partition number.
    cells: Arc<[ArcSwap<HostedPartition>]>,
}

impl HostedTopic {
    /// Creates the entry of a topic with this number of partitions. It takes the applied revision and the partition
    /// states from `before`, the previous entry of the same topic, if there is one. If both have the same number of
    /// partitions, they share the states, and a later change shows in both; else the states are copied.
    pub(in crate::broker) fn new(
        id: TopicId,
        config: Arc<TopicConfig>,
        partitions: u32,
        before: Option<&Self>,
    ) -> Self {
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
    pub(in crate::broker) fn count(&self) -> usize {
        self.cells.len()
    }

    /// Returns the state of a partition, or `None` if the topic has no such partition.
    pub(in crate::broker) fn partition(&self, number: u32) -> Option<Arc<HostedPartition>> {
        Some(self.cells.get(usize::try_from(number).ok()?)?.load_full())
    }

    /// Returns the states of all partitions, by partition number.
    pub(in crate::broker) fn partitions(&self) -> impl Iterator<Item = Arc<HostedPartition>> + '_ {
        self.cells.iter().map(ArcSwap::load_full)
    }
}

/// Table of all hosted topics. A reader gets a consistent configuration and revision of one topic, and the current
/// state of each partition.
pub(in crate::broker) struct PartitionTable {
    topics: ShardedMap<TopicName, HostedTopic>,
    /// Topic names by topic id.
    ids: ShardedMap<TopicId, TopicName>,
    /// Wakes the callers of [`PartitionTable::until`] after changes.
    changed: watch::Sender<()>,
    /// Tasks of the partitions.
    tasks: Tasks,
}

impl Default for PartitionTable {
    fn default() -> Self {
        Self {
            topics: ShardedMap::default(),
            ids: ShardedMap::default(),
            changed: watch::Sender::new(()),
            tasks: Tasks::new(),
        }
    }
}

/// Result of a lookup by topic name and partition number.
pub(in crate::broker) enum TableLookup {
    /// Id and state of the partition.
    Held(PartitionId, Arc<HostedPartition>),
    /// The topic has no such partition. Contains the number of its partitions.
    NoPartition(usize),
}

impl PartitionTable {
    /// Looks up a partition by topic name and number. Returns `None` if no topic has the name.
    pub(in crate::broker) fn find(&self, topic: &str, partition: i32) -> Option<TableLookup> {
        let topics = self.topics.of_name(topic);
        let topic = topics.get(topic)?;
        let number = u32::try_from(partition).ok();
        let found = number.and_then(|number| Some((PartitionId::new(topic.id, number), topic.partition(number)?)));
        Some(
            found.map_or_else(
                || TableLookup::NoPartition(topic.count()),
                |(id, replica)| TableLookup::Held(id, replica),
            ),
        )
    }

    /// Returns the entry of a topic.
    pub(in crate::broker) fn topic(&self, name: &TopicName) -> Option<HostedTopic> {
        self.topics.of(name).get(name).cloned()
    }

    /// Returns the name of the topic with this id; `None` if the topic is not hosted.
    pub(in crate::broker) fn name(&self, id: TopicId) -> Option<TopicName> {
        self.ids.of(&id).get(&id).cloned()
    }

    /// Returns the names of all hosted topics.
    pub(in crate::broker) fn names(&self) -> Vec<TopicName> {
        self.topics.all().flat_map(|part| part.keys().cloned().collect::<Vec<_>>()).collect()
    }

    /// Returns the open local replica of a partition, in any role.
    pub(in crate::broker) fn by_id(&self, id: PartitionId) -> Option<Arc<Partition>> {
        match &*self.get(id)? {
            HostedPartition::Online(partition) => Some(Arc::clone(partition)),
            _ => None,
        }
    }

    /// Returns the state of a partition on this broker; `None` if its topic is not hosted.
    pub(in crate::broker) fn get(&self, id: PartitionId) -> Option<Arc<HostedPartition>> {
        let ids = self.ids.of(&id.topic);
        let name = ids.get(&id.topic)?;
        self.topics.of(name).get(name).filter(|topic| topic.id == id.topic)?.partition(id.number)
    }

    /// Returns why the local replica is offline; `None` if it is not.
    pub(in crate::broker) fn offline_reason(&self, id: PartitionId) -> Option<String> {
        match &*self.get(id)? {
            HostedPartition::Offline(offline) => Some(offline.to_string()),
            HostedPartition::Online(_) | HostedPartition::None => None,
        }
    }

    /// Returns the configuration of a partition's topic, as this broker has applied it.
    pub(in crate::broker) fn config(&self, id: PartitionId) -> Option<Arc<TopicConfig>> {
        let ids = self.ids.of(&id.topic);
        let name = ids.get(&id.topic)?;
        Some(Arc::clone(&self.topics.of(name).get(name)?.config))
    }

    /// Waits until `holds` returns true for the table. Checks again after [`Self::notify_changed`] and
    /// [`Self::set_revisions`].
    pub(in crate::broker) async fn until(&self, holds: impl Fn(&Self) -> bool) {
        let mut changed = self.changed.subscribe();
        while !holds(self) {
            if changed.changed().await.is_err() {
                return;
            }
        }
    }

    /// Returns all open local replicas.
    pub(in crate::broker) fn open(&self) -> Vec<Arc<Partition>> {
        let mut open = Vec::new();
        for part in self.topics.all() {
            for replica in part.values().flat_map(HostedTopic::partitions) {
                if let HostedPartition::Online(partition) = &*replica {
                    open.push(Arc::clone(partition));
                }
            }
        }
        open
    }

    /// Returns the number of replicas that are offline because they are unverified.
    pub(in crate::broker) fn count_unverified(&self) -> usize {
        let is_unverified =
            |replica: &Arc<HostedPartition>| matches!(**replica, HostedPartition::Offline(OfflineReplica::Unverified));
        let count = |topic: &HostedTopic| topic.partitions().filter(is_unverified).count();
        self.topics.all().map(|part| part.values().map(count).sum::<usize>()).sum()
    }

    /// Adds or replaces topics. Only the reconciler may change the table: concurrent changes would be lost.
    pub(in crate::broker) fn put(&self, entries: impl IntoIterator<Item = (TopicName, HostedTopic)>) {
        let mut ids = BTreeMap::new();
        let topics = entries.into_iter().map(|(name, topic)| {
            // A recreated topic has the same name and another id.
            ids.extend(self.topic(&name).map(|before| (before.id, None)));
            ids.insert(topic.id, Some(name.clone()));
            (name, Some(topic))
        });
        self.topics.apply(topics);
        self.ids.apply(ids);
    }

    /// Removes a topic.
    pub(in crate::broker) fn remove(&self, name: &TopicName) {
        if let Some(topic) = self.topic(name) {
            self.ids.apply([(topic.id, None)]);
            self.topics.apply([(name.clone(), None)]);
        }
    }

    /// Sets the state of a partition. Does nothing if the table has no such partition. Wakes no waiting task.
    pub(in crate::broker) fn set(&self, id: PartitionId, replica: HostedPartition) {
        let ids = self.ids.of(&id.topic);
        let Some(name) = ids.get(&id.topic) else { return };
        let topics = self.topics.of(name);
        let topic = topics.get(name).filter(|topic| topic.id == id.topic);
        if let Some(cell) = topic.and_then(|topic| topic.cells.get(id.number as usize)) {
            cell.store(Arc::new(replica));
        }
    }

    /// Stores the applied revisions of these topics and wakes the tasks that wait for a change. The reconciler calls
    /// this function after its other changes of the table, so a visible revision means that all changes of that
    /// revision are visible.
    pub(in crate::broker) fn set_revisions(&self, revisions: BTreeMap<TopicName, Revision>) {
        let applied = revisions.into_iter().filter_map(|(name, revision)| {
            let topic = HostedTopic { revision, ..self.topic(&name)? };
            Some((name, Some(topic)))
        });
        self.topics.apply(applied);
        self.notify_changed();
    }

    /// Returns the tasks of the partitions.
    pub(in crate::broker) fn tasks(&self) -> &Tasks {
        &self.tasks
    }

    /// Ends the tasks of all partitions, and then stops every open partition.
    pub(in crate::broker) async fn stop(&self) {
        self.tasks.stop().await;
        stream::iter(self.open())
            .for_each_concurrent(MAX_CONCURRENT_STOPS, |partition| async move { partition.stop().await })
            .await;
    }

    /// Wakes the tasks that wait for a change of the table.
    pub(in crate::broker) fn notify_changed(&self) {
        self.changed.send_replace(());
    }
}
