//! Applies the cluster's metadata to the partitions of this broker: opens assigned replicas, assigns their roles,
//! passes on changed configurations, and closes and deletes removed partitions.
//!
//! # Overview
//!
//! ```text
//!   topic key      ─▶ number of partitions and configuration; key removed: closed, and deleted if there is a tombstone
//!   partition key  ─▶ replica here: opened and assigned (`Partition::assign`); none here: closed, then a stray replica
//!   tier key       ─▶ tier state that followers take as committed
//!   broker key     ─▶ status of followers' brokers, for leaders; address of the leader, for followers
//! ```
//!
//! A starting broker opens the replicas on disk and assigns no roles, because the startup verification comes first.
//! Every replica gets its assignment after the registration, from a metadata snapshot that contains the registration.
//!
//! # Invariants
//!
//! - Metadata is a hint for the next action. Nothing here decides about leadership.
//! - A missing entry in the metadata never causes the deletion of files. Deletion requires the tombstone of the topic,
//!   or the partition's own key with other replicas, read from the metadata store at that moment. Partitions without
//!   topic and tombstone are kept and logged: lost, corrupt or restored metadata must not cost data as well.
//! - A local replica is discarded only when it is in neither ISR nor ELR, so no commit depends on its content. The
//!   exception is an unusable replica that an operator elected in order to discard it.
//! - A replica whose partition value was unreadable at the startup verification is unverified. The value may be restored
//!   as it was, and name this broker as the leader of an epoch from before this process. So the replica stays offline
//!   until the next start.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use futures::{StreamExt as _, stream};

use super::{
    Broker,
    stray_cleaner::StrayCleaner,
    table::{HostedPartition, HostedTopic, OfflineReplica},
};
use crate::{
    cluster::{BrokerState, Key, MetadataChange, MetadataSnapshot, PartitionValue, Revision, TopicValue},
    model::{BrokerId, LeaderEpoch, PartitionId, TopicConfig, TopicName},
    partition::{
        IsrUpdater as _, Partition, PartitionAssignment, PartitionError, ReplicaSpec, leader::isr::BrokerStatus,
    },
    task::{self, clock},
    tier::{PartitionTier, TopicRecord},
};

/// Number of partitions that one thread opens in sequence. One task per partition would start dozens of threads, which
/// are not faster and whose memory is not returned.
const MAX_OPENED_PER_BATCH: usize = 64;

/// Maximum number of threads that open partitions concurrently. Each partition may have to recover its tail.
const MAX_CONCURRENT_OPENS: usize = 4;

/// Maximum number of partitions that are notified of a change concurrently.
const MAX_CONCURRENT_ASSIGNMENTS: usize = 256;

/// Reason for which an unverified replica is offline.
const UNVERIFIED: &str = "its partition value was unreadable when this broker started: restart the broker";

/// Applies every metadata change until the broker stops.
pub(super) async fn run(broker: Arc<Broker>, mut strays: StrayCleaner) {
    let mut feed = broker.ctx.metadata.feed();
    loop {
        let change = tokio::select! {
            biased;
            () = broker.ctx.tasks.cancelled() => return,
            change = feed.next() => change,
            () = strays.due() => {
                strays.process(&broker).await;
                continue;
            }
        };
        let Some(change) = change else { return };
        let state = broker.ctx.metadata.state();
        match change {
            MetadataChange::Relisted => broker.reconcile(&state, &mut strays).await,
            MetadataChange::Keys(keys) => broker.reconcile_keys(&keys, &state, &mut strays).await,
        }
    }
}

impl Broker {
    /// Applies all of the metadata.
    pub(super) async fn reconcile(&self, state: &MetadataSnapshot, strays: &mut StrayCleaner) {
        let mut names: BTreeSet<TopicName> = state.topics().keys().cloned().collect();
        names.extend(self.partitions.names());
        let (ids, revisions) = self.apply_topics(names.iter(), state, strays).await;
        self.update_peers(state);
        self.reconcile_partitions(ids, state, strays).await;
        self.partitions.set_revisions(revisions);
    }

    fn update_peers(&self, state: &MetadataSnapshot) {
        if let Some(replication) = &self.replication {
            replication.update_peers(state);
        }
    }

    async fn reconcile_keys(&self, keys: &[Key], state: &MetadataSnapshot, strays: &mut StrayCleaner) {
        let topics = keys.iter().filter_map(|key| match key {
            Key::Topic(name) => Some(name),
            _ => None,
        });
        let (ids, revisions) = self.apply_topics(topics, state, strays).await;
        let mut ids: BTreeSet<PartitionId> = ids.into_iter().collect();
        let (mut brokers, mut gone) = (Vec::new(), Vec::new());
        for key in keys {
            match key {
                Key::Partition(id) => {
                    ids.insert(*id);
                }
                Key::Tier(id) => self.pass_tier_state(*id, state).await,
                Key::Broker(id) => brokers.push(*id),
                // A topic that was never hosted, because its configuration was unreadable, is deleted too.
                Key::Tombstone(id) if state.name(*id).is_none() => gone.push(*id),
                _ => {}
            }
        }
        if !brokers.is_empty() {
            self.update_peers(state);
            self.notify_leaders(&brokers, state).await;
        }
        self.reconcile_partitions(ids.into_iter().collect(), state, strays).await;
        self.partitions.set_revisions(revisions);
        // Last, because deletion may take long, and leadership changes are more urgent.
        strays.process_deleted(self, gone).await;
    }

    /// Applies topic values to the partition table. Returns the partitions to reconcile, and the revision that each
    /// topic reaches by that.
    async fn apply_topics<'a>(
        &self,
        names: impl Iterator<Item = &'a TopicName> + Send,
        state: &MetadataSnapshot,
        strays: &mut StrayCleaner,
    ) -> (Vec<PartitionId>, BTreeMap<TopicName, Revision>) {
        let (mut topics, mut ids, mut revisions) = (Vec::new(), Vec::new(), BTreeMap::new());
        for name in names {
            if let Some((topic, revision)) = self.apply_topic(name, state, strays).await {
                let count = u32::try_from(topic.count()).unwrap_or(u32::MAX);
                ids.extend((0..count).map(|number| PartitionId::new(topic.id, number)));
                if topic.revision != revision {
                    revisions.insert(name.clone(), revision);
                }
                topics.push((name.clone(), topic));
            }
        }
        // In one call, because each change copies a part of the topic table.
        if !topics.is_empty() {
            self.partitions.put(topics);
        }
        (ids, revisions)
    }

    /// Applies one topic value. Returns the new entry of the topic and its revision, or `None` if there is nothing to
    /// apply.
    async fn apply_topic(
        &self,
        name: &TopicName,
        state: &MetadataSnapshot,
        strays: &mut StrayCleaner,
    ) -> Option<(HostedTopic, Revision)> {
        let partitions = self.partitions.topic(name);
        let wanted = state.topic(name);
        if wanted.is_none() && state.unreadable().contains_key(&Key::Topic(name.clone())) {
            // The new value is unreadable, so nothing changes.
            return None;
        }
        if let Some(partitions) = &partitions
            && wanted.is_none_or(|topic| topic.value.id != partitions.id)
        {
            self.drop_topic(name, partitions, strays).await;
        }
        let wanted = wanted?;
        let topic = &wanted.value;
        let before = partitions.filter(|partitions| partitions.id == topic.id);
        let config = match TopicConfig::resolve(&self.ctx.config.topic_defaults, &topic.config) {
            Ok(config) => Arc::new(config),
            Err(error) => {
                tracing::error!(
                    topic = %name, %error,
                    "the stored configuration of the topic is invalid: alter the topic"
                );
                return None;
            }
        };
        let changed = before.as_ref().is_some_and(|before| *before.config != *config);
        let after = HostedTopic::new(topic.id, Arc::clone(&config), topic.partitions, before.as_ref());
        if changed {
            for replica in after.holdings() {
                if let HostedPartition::Online(partition) = &*replica {
                    partition.update_config(Arc::clone(&config)).await;
                }
            }
        }
        if before.is_none() {
            self.record_topic(name, topic, state);
        }
        Some((after, wanted.mod_revision))
    }

    /// Applies the metadata to these partitions.
    async fn reconcile_partitions(&self, ids: Vec<PartitionId>, state: &MetadataSnapshot, strays: &mut StrayCleaner) {
        let is_on_disk = |id: &PartitionId| self.ctx.log.holds(*id);
        let (mut to_open, mut to_assign) = (Vec::new(), Vec::new());
        for id in ids {
            // Partitions of a topic that is not hosted are skipped.
            let Some(replica) = self.partitions.get(id) else { continue };
            let stored = state.partition(id).and_then(|entry| entry.partition.as_ref());
            match stored {
                Some(stored) if stored.value.replicas.contains(&self.ctx.id) => {
                    if self.is_unverified(id) {
                        self.hold_back(id, stored.value.leader_epoch);
                    } else if !matches!(&*replica, HostedPartition::Online(_)) {
                        to_open.extend(self.spec(id, state, &stored.value, &replica, is_on_disk(&id)));
                    }
                    to_assign.push(id);
                }
                Some(_) => {
                    self.close(id, &replica).await;
                    if is_on_disk(&id) {
                        strays.add(id);
                    }
                }
                // The value has not arrived, was deleted or is unreadable, so the leader is unknown.
                None => self.close(id, &replica).await,
            }
        }
        let tried: Vec<_> = to_open.iter().map(|spec| spec.id).collect();
        self.open_all(to_open).await;
        if self.is_active() {
            // An unusable replica that may be discarded is replaced by an empty one now, because no later metadata
            // change may trigger that.
            let to_reopen = tried.into_iter().filter_map(|id| {
                let replica = self.partitions.get(id)?;
                let stored = state.partition(id)?.partition.as_ref()?;
                let is_offline = matches!(*replica, HostedPartition::Offline(_));
                is_offline
                    .then(|| self.spec(id, state, &stored.value, &replica, true))
                    .flatten()
                    .filter(|spec| spec.discard_local)
            });
            self.open_all(to_reopen.collect()).await;
            to_assign.iter().for_each(|id| self.resign_if_offline(*id, state));
            stream::iter(to_assign).for_each_concurrent(MAX_CONCURRENT_ASSIGNMENTS, |id| self.assign(id, state)).await;
        }
    }

    /// Returns true if the value of the partition was unreadable at the startup verification.
    pub(super) fn is_unverified(&self, id: PartitionId) -> bool {
        self.unverified.get().is_some_and(|unverified| unverified.contains(&id))
    }

    /// Takes an unverified replica offline.
    fn hold_back(&self, id: PartitionId, since: LeaderEpoch) {
        if let Some(HostedPartition::None) = self.partitions.get(id).as_deref() {
            tracing::error!(
                partition = %id,
                "the partition value was unreadable when this broker started: the replica stays offline until this \
                 broker is restarted"
            );
            self.partitions.set(id, HostedPartition::Offline(OfflineReplica { reason: UNVERIFIED.into(), since }));
        }
    }

    /// Stops the local replica, if there is one. The files stay.
    async fn close(&self, id: PartitionId, replica: &HostedPartition) {
        if let HostedPartition::Online(partition) = replica {
            partition.stop().await;
        }
        if !matches!(replica, HostedPartition::None) {
            self.partitions.set(id, HostedPartition::None);
        }
    }

    /// Returns the parameters for opening a replica, or `None` if it must not be opened now.
    fn spec(
        &self,
        id: PartitionId,
        state: &MetadataSnapshot,
        value: &PartitionValue,
        replica: &HostedPartition,
        on_disk: bool,
    ) -> Option<ReplicaSpec> {
        let (standalone, me) = (self.ctx.standalone, self.ctx.id);
        if !on_disk && !standalone && !self.is_active() {
            // There is nothing to verify. The replica is created after the activation.
            return None;
        }
        let start_with_counter = value.isr.contains(&me) || value.elr.contains(&me);
        let offline = match replica {
            HostedPartition::Offline(offline) => Some(offline),
            HostedPartition::Online(_) | HostedPartition::None => None,
        };
        let discard_local = !on_disk
            || offline.is_some_and(|offline| match value.leader {
                // An operator elected this replica after the report that it is offline and will be discarded.
                Some(leader) if leader == me => {
                    value.isr == [me]
                        && value.discard_local
                        && value.unclean_epoch.is_some_and(|epoch| epoch > offline.since)
                }
                Some(_) => !start_with_counter,
                // There is no leader to copy from, so the files stay even if the replica cannot be opened.
                None => false,
            });
        let discard_local = discard_local && !standalone;
        let name = state.name(id.topic)?;
        let committed = state.partition(id)?.tier.as_ref().map(|stored| stored.value.clone());
        let tier = self.ctx.tier.as_ref().map(|tier| {
            let state = committed.clone().unwrap_or_default();
            PartitionTier::new(tier.store.clone(), tier.cache.clone(), id, state)
        });
        let config = self.partitions.topic(name)?.config;
        let max_lag_time = self.ctx.config.replication.max_lag_time;
        Some(ReplicaSpec { id, topic: name.clone(), config, committed, tier, standalone, discard_local, max_lag_time })
    }

    /// Opens replicas concurrently.
    async fn open_all(&self, specs: Vec<ReplicaSpec>) {
        let opened =
            stream::iter(chunks(specs)).map(|specs| self.open_batch(specs)).buffer_unordered(MAX_CONCURRENT_OPENS);
        opened
            .for_each(|results| {
                for (id, topic, opened) in results {
                    let replica = match opened {
                        Ok(partition) => HostedPartition::Online(partition),
                        Err(error) => self.offline_entry(id, &topic, &error),
                    };
                    self.partitions.set(id, replica);
                }
                std::future::ready(())
            })
            .await;
    }

    fn leader_epoch(&self, id: PartitionId) -> LeaderEpoch {
        let state = self.ctx.metadata.state();
        let stored = state.partition(id).and_then(|entry| entry.partition.as_ref());
        stored.map(|stored| stored.value.leader_epoch).unwrap_or_default()
    }

    /// Returns the entry of a replica that could not be opened. Logs each error once, although every metadata change
    /// retries the open.
    fn offline_entry(&self, id: PartitionId, topic: &TopicName, error: &PartitionError) -> HostedPartition {
        let reason: Arc<str> = error.to_string().into();
        let earlier = self.partitions.get(id).and_then(|replica| match &*replica {
            HostedPartition::Offline(offline) => Some(offline.clone()),
            HostedPartition::Online(_) | HostedPartition::None => None,
        });
        let since = earlier.as_ref().map_or_else(|| self.leader_epoch(id), |earlier| earlier.since);
        match error {
            _ if earlier.is_some_and(|earlier| earlier.reason == reason) => {}
            PartitionError::Lost { .. } => tracing::warn!(
                partition = %id, %topic, %error,
                "the replica lacks committed records and is offline: it is copied again once another replica leads"
            ),
            _ => tracing::error!(partition = %id, %topic, %error, "could not open the partition on this broker"),
        }
        HostedPartition::Offline(OfflineReplica { reason, since })
    }

    /// Opens replicas in sequence, on a blocking thread.
    async fn open_batch(
        &self,
        specs: Vec<ReplicaSpec>,
    ) -> Vec<(PartitionId, TopicName, Result<Arc<Partition>, PartitionError>)> {
        let (log, queue, tasks) = (self.ctx.log.clone(), self.maintenance_queue.clone(), self.partition_tasks.clone());
        let (broker, ctx) = (self.ctx.id, self.ctx());
        let open = move |spec: ReplicaSpec| {
            let (id, topic) = (spec.id, spec.topic.clone());
            let opened = Partition::open(broker, &log, spec, ctx.clone(), &queue, &tasks);
            if opened.is_ok() {
                queue.push(id);
            }
            (id, topic, opened)
        };
        task::run_blocking(move || specs.into_iter().map(open).collect()).await
    }

    /// Resigns from the leadership of a partition whose local replica is unusable, because another broker may have a
    /// usable replica.
    fn resign_if_offline(&self, id: PartitionId, state: &MetadataSnapshot) {
        let is_offline = self.partitions.get(id).is_some_and(|replica| matches!(*replica, HostedPartition::Offline(_)));
        let stored = state.partition(id).and_then(|entry| entry.partition.as_ref());
        if let Some(stored) =
            stored.filter(|stored| is_offline && !self.ctx.standalone && stored.value.leader == Some(self.ctx.id))
        {
            self.isr_updates.resign(id, stored.value.leader_epoch);
        }
    }

    /// Returns true if another process is registered with this broker's id, on a copy of its data directory. That
    /// process leads the partitions then.
    fn is_replaced(&self, state: &MetadataSnapshot) -> bool {
        let registered = state.brokers().get(&self.ctx.id);
        registered.is_some_and(|registration| registration.value.incarnation != *self.ctx.incarnation)
    }

    /// Sends a replica its assignment.
    async fn assign(&self, id: PartitionId, state: &MetadataSnapshot) {
        let Some(partition) = self.partitions.by_id(id) else { return };
        let Some(entry) = state.partition(id) else { return };
        let Some(stored) = &entry.partition else { return };
        let registered = stored.value.replicas.iter().map(|broker| (*broker, registration(state, *broker)));
        let mut value = stored.value.clone();
        if value.leader == Some(self.ctx.id) && self.is_replaced(state) {
            value.leader = None;
        }
        let assignment = PartitionAssignment {
            value: Arc::new(value),
            revision: stored.mod_revision,
            committed: entry.tier.as_ref().map(|stored| stored.value.clone()),
            registered: registered.collect(),
        };
        partition.assign(assignment).await;
    }

    /// Passes the committed tier state to a partition. A leader has applied its own commits, but not a value that was
    /// unreadable when the replica was opened.
    async fn pass_tier_state(&self, id: PartitionId, state: &MetadataSnapshot) {
        let Some(partition) = self.partitions.by_id(id) else { return };
        if let Some(stored) = state.partition(id).and_then(|entry| entry.tier.as_ref()) {
            partition.apply_tier_state(stored.value.clone()).await;
        }
    }

    /// Sends the status of these brokers to the partitions that this broker leads according to the metadata.
    async fn notify_leaders(&self, brokers: &[BrokerId], state: &MetadataSnapshot) {
        let me = self.ctx.id;
        let led = self.partitions.open().into_iter().filter_map(|partition| {
            let stored = state.partition(partition.id())?.partition.as_ref()?;
            let concerned = |broker: &&BrokerId| stored.value.replicas.contains(broker);
            let concerned: Vec<BrokerId> = brokers.iter().filter(concerned).copied().collect();
            (stored.value.leader == Some(me) && !concerned.is_empty()).then_some((partition, concerned))
        });
        stream::iter(led)
            .for_each_concurrent(MAX_CONCURRENT_ASSIGNMENTS, |(partition, concerned)| async move {
                for broker in concerned {
                    partition.on_broker_status(broker, registration(state, broker)).await;
                }
            })
            .await;
    }

    /// Writes the topic record to the object store, for `undrain`. Best effort: the preferred leader of the first
    /// partition writes the record again at each start.
    fn record_topic(&self, name: &TopicName, topic: &TopicValue, state: &MetadataSnapshot) {
        let Some(tier) = &self.ctx.tier else { return };
        let first = state.partition(PartitionId::new(topic.id, 0)).and_then(|entry| entry.partition.as_ref());
        if !self.ctx.standalone && first.is_none_or(|first| first.value.replicas.first() != Some(&self.ctx.id)) {
            return;
        }
        let (store, tasks, failed) =
            (tier.store.clone(), self.ctx.tasks.clone(), Arc::clone(&self.failed_topic_records));
        let record = TopicRecord {
            name: name.clone(),
            id: topic.id,
            partitions: topic.partitions,
            config: topic.config.clone(),
        };
        self.ctx.tasks.spawn("topic record", async move {
            tokio::select! {
                biased;
                () = tasks.cancelled() => {}
                outcome = store.put_topic(&record) => if let Err(error) = outcome
                    && let Some(failures) = failed.lock().occur(clock::monotonic())
                {
                    tracing::warn!(
                        topic = %record.name, %error, failures,
                        "could not write topic records to the object store, this topic's included: they are written at \
                         the next start"
                    );
                }
            }
        });
    }

    /// Closes the partitions of a topic that the metadata no longer contains. Deletes their files if the topic was
    /// deleted on purpose.
    async fn drop_topic(&self, name: &TopicName, partitions: &HostedTopic, strays: &mut StrayCleaner) {
        self.partitions.remove(name);
        let stop = async |replica: Arc<HostedPartition>| {
            if let HostedPartition::Online(partition) = &*replica {
                partition.stop().await;
            }
        };
        stream::iter(partitions.holdings()).for_each_concurrent(MAX_CONCURRENT_ASSIGNMENTS, stop).await;
        if strays.process_topic(self, partitions.id).await {
            tracing::info!(topic = %name, id = %partitions.id, "deleted the topic from this broker");
        }
        self.partitions.notify_changed();
    }
}

/// Splits replicas into chunks that are opened together. Each chunk has its own allocation: chunks split off one vector
/// would keep capacity for all later replicas, which is quadratic.
fn chunks<T>(all: Vec<T>) -> impl Iterator<Item = Vec<T>> {
    let mut rest = all.into_iter();
    std::iter::from_fn(move || {
        let chunk: Vec<T> = rest.by_ref().take(MAX_OPENED_PER_BATCH).collect();
        (!chunk.is_empty()).then_some(chunk)
    })
}

/// Returns the status of a broker according to the metadata.
fn registration(state: &MetadataSnapshot, broker: BrokerId) -> BrokerStatus {
    match state.brokers().get(&broker).map(|entry| (entry.value.state, entry.create_revision)) {
        Some((BrokerState::Running, epoch)) => BrokerStatus::Registered(epoch),
        Some((BrokerState::Stopping, _)) => BrokerStatus::ShuttingDown,
        None => BrokerStatus::Unregistered,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replica_chunks_keep_no_excess_capacity() {
        let chunks: Vec<Vec<u64>> = chunks((0..10_000).collect()).collect();
        assert!(chunks.iter().flatten().copied().eq(0..10_000), "all replicas, in order");
        let kept: usize = chunks.iter().map(Vec::capacity).sum();
        assert!(kept <= 2 * 10_000, "capacity for {kept} of 10,000 numbers");
    }
}
