//! Applies the cluster's metadata to the partitions of this broker. The reconciler opens assigned replicas, assigns
//! their roles, passes on changed configurations, and closes and deletes removed partitions.
//!
//! # Overview
//!
//! ```text
//!   topic key      ─▶ number of partitions and configuration; key removed: replicas are closed, files deleted if there
//!                     is a tombstone
//!   tombstone key  ─▶ files of a topic that was not hosted: deleted
//!   partition key  ─▶ replica here: opened and assigned (`Partition::assign`); none here: closed, then a stray replica
//!   tier key       ─▶ committed tier state, passed to the replica here
//!   broker key     ─▶ status of followers' brokers, for leaders; address of the leader, for followers
//! ```
//!
//! A starting broker opens the replicas on disk and assigns no roles, because the startup verification comes first.
//! Every replica gets its assignment after the registration, from a metadata snapshot that contains the registration.
//!
//! # Invariants
//!
//! - The metadata cache only triggers actions. The reconciler elects no leader; it only resigns for an offline replica,
//!   by a compare-and-set in the metadata store.
//! - A missing entry in the metadata never causes the deletion of files. Deletion requires the tombstone of the topic,
//!   or the partition's own key with other replicas, read from the metadata store right before. Partitions without
//!   topic and tombstone are kept and logged: lost, corrupt or restored metadata must not cause the loss of records.
//! - An unusable local replica is discarded only when this broker is in neither ISR nor ELR, so no commit depends on
//!   the replica's content. The exception is an unusable replica that an operator elected in order to discard it.
//! - A replica whose partition value was unreadable at the startup verification is unverified. An operator may restore
//!   an older value, which names this broker as the leader of an epoch from before this process. So the replica is held
//!   back: it stays offline until the next start, or until the broker is in neither ISR nor ELR.
//! - A replica that is held back may be the only intact one. A resignation would remove its broker from the ISR. So the
//!   broker resigns only if another ISR member can lead. This member is a running broker that registered before the
//!   unreadable value was written. The startup verification of this member therefore read a valid value.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use futures::{StreamExt as _, stream};

use super::{
    opener::PartitionOpener,
    stray_cleaner::StrayCleaner,
    table::{HostedPartition, HostedTopic, OfflineReplica, PartitionTable},
};
use crate::{
    broker::node_context::NodeContext,
    cluster::{BrokerState, Key, MetadataChange, MetadataSnapshot, PartitionValue, Revision, TopicValue},
    model::{BrokerId, PartitionId, TopicConfig, TopicName},
    partition::{IsrUpdater, MaintenanceQueue, PartitionAssignment, PartitionContext, leader::member::BrokerStatus},
    task::{clock, lock::Mutex},
    telemetry::LogThrottle,
    tier::TopicRecord,
};

/// Maximum number of partitions that process an assignment, a broker status or a stop concurrently.
const MAX_CONCURRENT_ASSIGNMENTS: usize = 256;

/// Function that updates the peers' addresses and broker epochs from a metadata snapshot.
pub(in crate::broker) type PeersUpdate = Box<dyn Fn(&MetadataSnapshot) + Send + Sync>;

/// Event that the reconciler handles next.
enum ReconcilerEvent {
    Changed(MetadataChange),
    /// Stray replicas must be checked now.
    StraysDue,
}

/// The only writer of the partition table.
pub(in crate::broker) struct Reconciler {
    ctx: NodeContext,
    partitions: Arc<PartitionTable>,
    opener: PartitionOpener,
    strays: StrayCleaner,
    isr_updater: Arc<dyn IsrUpdater>,
    update_peers: PeersUpdate,
    /// True from the activation on: replicas receive their assignments.
    is_active: bool,
    /// Partitions whose values were unreadable at the startup verification, with the revisions of those values. A
    /// partition leaves the map when a readable value has this broker as a replica that neither leads nor is in the ISR
    /// or ELR.
    unverified: BTreeMap<PartitionId, Revision>,
    /// Log throttle, shared by all topics, for failed writes of topic records to the object store.
    failed_topic_records: Arc<Mutex<LogThrottle>>,
}

impl Reconciler {
    /// Creates the reconciler of a broker that is being opened. Opened partitions get `partition_ctx`, and are queued
    /// for maintenance in `queue`.
    pub(in crate::broker) fn new(
        ctx: NodeContext,
        partitions: Arc<PartitionTable>,
        strays: StrayCleaner,
        partition_ctx: PartitionContext,
        queue: MaintenanceQueue,
        update_peers: PeersUpdate,
    ) -> Self {
        let isr_updater = Arc::clone(&partition_ctx.isr_updater);
        let opener = PartitionOpener { ctx: ctx.clone(), partitions: Arc::clone(&partitions), partition_ctx, queue };
        Self {
            ctx,
            partitions,
            opener,
            strays,
            isr_updater,
            update_peers,
            is_active: false,
            unverified: BTreeMap::new(),
            failed_topic_records: Arc::default(),
        }
    }

    /// From this call on, reconciling assigns roles, except to replicas of `unverified` partitions that are held back.
    /// The call itself assigns no role. It deletes the files of topics with a tombstone, and queues the other stray
    /// replicas for a check.
    pub(in crate::broker) async fn activate(
        &mut self,
        unverified: BTreeMap<PartitionId, Revision>,
        state: &MetadataSnapshot,
    ) {
        (self.is_active, self.unverified) = (true, unverified);
        self.strays.delete_removed_topics(state).await;
        self.ctx.log.stray_partitions().into_iter().for_each(|id| self.strays.add(id));
    }

    /// Applies every metadata change, and checks stray replicas, until the broker stops. A stop does not interrupt the
    /// work on a change.
    pub(in crate::broker) async fn run(mut self) {
        let mut feed = self.ctx.metadata.feed();
        let tasks = self.ctx.tasks.clone();
        loop {
            let next = async {
                tokio::select! {
                    biased;
                    change = feed.next() => change.map(ReconcilerEvent::Changed),
                    () = self.strays.due() => Some(ReconcilerEvent::StraysDue),
                }
            };
            // `None` means that the broker stops, or that the metadata cache was stopped.
            let Some(event) = tasks.run_until_cancelled(next).await.flatten() else { return };
            match event {
                ReconcilerEvent::StraysDue => self.strays.check_and_delete().await,
                ReconcilerEvent::Changed(MetadataChange::Relisted) => {
                    let state = self.ctx.metadata.state();
                    self.reconcile(&state).await;
                }
                ReconcilerEvent::Changed(MetadataChange::Keys(keys)) => {
                    let state = self.ctx.metadata.state();
                    self.reconcile_keys(&keys, &state).await;
                }
            }
        }
    }

    /// Applies the complete metadata snapshot, also to hosted topics that the snapshot no longer contains.
    pub(in crate::broker) async fn reconcile(&mut self, state: &MetadataSnapshot) {
        let mut names: BTreeSet<TopicName> = state.topics().keys().cloned().collect();
        names.extend(self.partitions.names());
        let (ids, revisions) = self.apply_topics(names.iter(), state).await;
        (self.update_peers)(state);
        self.reconcile_partitions(ids, state).await;
        self.partitions.set_revisions(revisions);
    }

    /// Applies the values that these changed keys have in `state`.
    async fn reconcile_keys(&mut self, keys: &[Key], state: &MetadataSnapshot) {
        let topics = keys.iter().filter_map(|key| match key {
            Key::Topic(name) => Some(name),
            _ => None,
        });
        let (ids, revisions) = self.apply_topics(topics, state).await;
        let mut ids: BTreeSet<PartitionId> = ids.into_iter().collect();
        let (mut brokers, mut deleted_topics) = (Vec::new(), Vec::new());
        for key in keys {
            match key {
                Key::Partition(id) => {
                    ids.insert(*id);
                }
                Key::Tier(id) => self.pass_tier_state(*id, state).await,
                Key::Broker(id) => brokers.push(*id),
                // A topic that was not hosted, because its value or configuration was invalid, may have files too.
                Key::Tombstone(id) if state.name(*id).is_none() => deleted_topics.push(*id),
                // Topic keys were applied above. Other keys do not concern the partitions of this broker.
                _ => {}
            }
        }
        if !brokers.is_empty() {
            (self.update_peers)(state);
            self.notify_leaders(&brokers, state).await;
        }
        self.reconcile_partitions(ids.into_iter().collect(), state).await;
        self.partitions.set_revisions(revisions);
        // These deletions come last, because they may take long, and leadership changes are more urgent.
        self.strays.on_tombstones_changed(deleted_topics).await;
    }

    /// Applies topic values to the partition table. Returns the partitions that the caller must reconcile, and the
    /// revision of each changed topic, which is applied once these partitions are reconciled.
    async fn apply_topics<'a>(
        &mut self,
        names: impl Iterator<Item = &'a TopicName> + Send,
        state: &MetadataSnapshot,
    ) -> (Vec<PartitionId>, BTreeMap<TopicName, Revision>) {
        let (mut topics, mut ids, mut revisions) = (Vec::new(), Vec::new(), BTreeMap::new());
        for name in names {
            if let Some((topic, revision)) = self.apply_topic(name, state).await {
                let count = u32::try_from(topic.count()).unwrap_or(u32::MAX);
                ids.extend((0..count).map(|number| PartitionId::new(topic.id, number)));
                if topic.revision != revision {
                    revisions.insert(name.clone(), revision);
                }
                topics.push((name.clone(), topic));
            }
        }
        // One call for all topics, because each call copies the changed parts of the table.
        if !topics.is_empty() {
            self.partitions.put(topics);
        }
        (ids, revisions)
    }

    /// Applies one topic value: drops a topic that was removed or replaced, and passes a changed configuration to the
    /// open partitions. For a topic that is new on this broker, starts the write of its topic record. Returns the new
    /// entry of the topic, which the caller puts into the table, and the revision of the value. Returns `None` if the
    /// topic was removed, or if its value or configuration is unreadable or invalid. In the latter case the previous
    /// entry of the same topic stays.
    async fn apply_topic(&mut self, name: &TopicName, state: &MetadataSnapshot) -> Option<(HostedTopic, Revision)> {
        let hosted = self.partitions.topic(name);
        let stored = state.topic(name);
        if stored.is_none() && state.unreadable().contains_key(&Key::Topic(name.clone())) {
            // The new value is unreadable, so a hosted topic stays as it is.
            return None;
        }
        if let Some(hosted) = &hosted
            && stored.is_none_or(|topic| topic.value.id != hosted.id)
        {
            self.drop_topic(name, hosted).await;
        }
        let stored = stored?;
        let topic = &stored.value;
        let before = hosted.filter(|hosted| hosted.id == topic.id);
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
            for replica in after.partitions() {
                if let HostedPartition::Online(partition) = &*replica {
                    partition.update_config(Arc::clone(&config)).await;
                }
            }
        }
        if before.is_none() {
            self.write_topic_record(name, topic, state);
        }
        Some((after, stored.mod_revision))
    }

    /// Applies the metadata to these partitions: opens, closes or holds back their replicas, and queues stray replicas
    /// for a check. If the broker is active, then opens unusable replicas that may be discarded again as empty ones,
    /// resigns for offline replicas, and sends the assignments.
    async fn reconcile_partitions(&mut self, ids: Vec<PartitionId>, state: &MetadataSnapshot) {
        let log = self.ctx.log.clone();
        let is_on_disk = |id: &PartitionId| log.holds(*id);
        let (mut to_open, mut to_assign) = (Vec::new(), Vec::new());
        for id in ids {
            // Partitions of a topic that is not hosted are skipped.
            let Some(replica) = self.partitions.get(id) else { continue };
            // `entry` also finds a partition whose topic now has an unreadable value: that topic stays hosted.
            let stored = state.entry(id).and_then(|entry| entry.partition.as_ref());
            match stored {
                Some(stored) if stored.value.replicas.contains(&self.ctx.id) => {
                    if self.must_hold_back(id, &stored.value) {
                        self.hold_back(id, &replica, state).await;
                    } else if !matches!(&*replica, HostedPartition::Online(_)) {
                        to_open.extend(self.opener.spec(
                            id,
                            state,
                            &stored.value,
                            &replica,
                            is_on_disk(&id),
                            self.is_active,
                        ));
                    }
                    to_assign.push(id);
                }
                Some(_) => {
                    self.close(id, &replica).await;
                    if is_on_disk(&id) {
                        self.strays.add(id);
                    }
                }
                // The value has not arrived, was deleted or is unreadable, so the leader is unknown.
                None => self.close(id, &replica).await,
            }
        }
        let opened: Vec<_> = to_open.iter().map(|spec| spec.id).collect();
        self.opener.open_all(to_open).await;
        if self.is_active {
            // An unusable replica that may be discarded is replaced by an empty one now, because perhaps no later
            // metadata change of the partition follows.
            let to_reopen = opened.into_iter().filter_map(|id| {
                let replica = self.partitions.get(id)?;
                let stored = state.entry(id)?.partition.as_ref()?;
                let is_offline = matches!(*replica, HostedPartition::Offline(_));
                is_offline
                    .then(|| self.opener.spec(id, state, &stored.value, &replica, true, self.is_active))
                    .flatten()
                    .filter(|spec| spec.discard_local)
            });
            self.opener.open_all(to_reopen.collect()).await;
            to_assign.iter().for_each(|id| self.resign_if_offline(*id, state));
            let this = &*self;
            stream::iter(to_assign).for_each_concurrent(MAX_CONCURRENT_ASSIGNMENTS, |id| this.assign(id, state)).await;
        }
    }

    /// Returns true if the local replica is unverified and `value` has this broker as the leader or in the ISR or ELR.
    /// Otherwise no commit depends on the replica, so its partition is removed from `unverified`.
    fn must_hold_back(&mut self, id: PartitionId, value: &PartitionValue) -> bool {
        let is_member = value.isr.contains(&self.ctx.id) || value.elr.contains(&self.ctx.id);
        if !is_member && value.leader != Some(self.ctx.id) {
            self.unverified.remove(&id);
        }
        self.unverified.contains_key(&id)
    }

    /// Closes an unverified replica and sets its entry to offline. The replica may be open if its value was readable
    /// before the verification.
    async fn hold_back(&self, id: PartitionId, replica: &HostedPartition, state: &MetadataSnapshot) {
        if matches!(replica, HostedPartition::Offline(OfflineReplica::Unverified)) {
            return;
        }
        self.close(id, replica).await;
        tracing::error!(
            partition = %id, topic = state.name(id.topic).map(TopicName::as_str),
            "the partition's metadata was unreadable when this broker started and is readable now, but the replica \
             stays offline until this broker is restarted, or is in neither ISR nor ELR"
        );
        self.partitions.set(id, HostedPartition::Offline(OfflineReplica::Unverified));
    }

    /// Stops the local replica if it is open, and sets its entry to [`HostedPartition::None`]. The files stay.
    async fn close(&self, id: PartitionId, replica: &HostedPartition) {
        if let HostedPartition::Online(partition) = replica {
            partition.stop().await;
        }
        if !matches!(replica, HostedPartition::None) {
            self.partitions.set(id, HostedPartition::None);
        }
    }

    /// Resigns from the leadership of a partition whose local replica is offline, so that another broker can lead. Does
    /// nothing if the replica is not offline, if this broker does not lead, if [`Self::may_resign`] forbids it, or on a
    /// standalone broker.
    fn resign_if_offline(&self, id: PartitionId, state: &MetadataSnapshot) {
        let is_offline = self.partitions.get(id).is_some_and(|replica| matches!(*replica, HostedPartition::Offline(_)));
        let stored = state.entry(id).and_then(|entry| entry.partition.as_ref());
        let leads = stored.filter(|stored| !self.ctx.standalone && stored.value.leader == Some(self.ctx.id));
        if let Some(stored) = leads
            && is_offline
            && self.may_resign(id, &stored.value, state)
        {
            self.isr_updater.resign(id, stored.value.leader_epoch);
        }
    }

    /// Returns true if this broker may resign the leadership of a partition whose local replica is offline. A
    /// resignation also removes this broker from the ISR. An unverified replica stays offline and may be the only
    /// intact one. So the broker resigns only if another running ISR member is certain to be verified. The broker epoch
    /// of this member is below the revision of the unreadable value. So its startup verification read an earlier, valid
    /// value.
    fn may_resign(&self, id: PartitionId, value: &PartitionValue, state: &MetadataSnapshot) -> bool {
        let Some(unreadable) = self.unverified.get(&id) else { return true };
        value.isr.iter().filter(|member| **member != self.ctx.id).any(|member| match broker_status(state, *member) {
            BrokerStatus::Registered(epoch) => epoch < *unreadable,
            BrokerStatus::ShuttingDown | BrokerStatus::Unregistered => false,
        })
    }

    /// Returns true if another process, for example on a copy of this broker's data directory, is registered with this
    /// broker's id. The leader with this id is then that process.
    fn is_replaced(&self, state: &MetadataSnapshot) -> bool {
        let registered = state.brokers().get(&self.ctx.id);
        registered.is_some_and(|registration| registration.value.incarnation != *self.ctx.incarnation)
    }

    /// Sends the assignment to a replica, if the replica is open and the partition value is readable. If another
    /// process is registered with this broker's id, the assignment never names this broker as the leader.
    async fn assign(&self, id: PartitionId, state: &MetadataSnapshot) {
        let Some(partition) = self.partitions.by_id(id) else { return };
        let Some(entry) = state.entry(id) else { return };
        let Some(stored) = &entry.partition else { return };
        let registered = stored.value.replicas.iter().map(|broker| (*broker, broker_status(state, *broker)));
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

    /// Passes the committed tier state to a partition, in any role. A leader already has the states that it committed
    /// itself, but not a state that was unreadable when its replica was opened.
    async fn pass_tier_state(&self, id: PartitionId, state: &MetadataSnapshot) {
        let Some(partition) = self.partitions.by_id(id) else { return };
        if let Some(stored) = state.entry(id).and_then(|entry| entry.tier.as_ref()) {
            partition.apply_tier_state(stored.value.clone()).await;
        }
    }

    /// Sends the status of each of these brokers to the partitions that this broker leads and in which that broker has
    /// a replica.
    async fn notify_leaders(&self, brokers: &[BrokerId], state: &MetadataSnapshot) {
        let me = self.ctx.id;
        let led = self.partitions.open().into_iter().filter_map(|partition| {
            let stored = state.entry(partition.id())?.partition.as_ref()?;
            let is_replica = |broker: &&BrokerId| stored.value.replicas.contains(broker);
            let replicas: Vec<BrokerId> = brokers.iter().filter(is_replica).copied().collect();
            (stored.value.leader == Some(me) && !replicas.is_empty()).then_some((partition, replicas))
        });
        stream::iter(led)
            .for_each_concurrent(MAX_CONCURRENT_ASSIGNMENTS, |(partition, replicas)| async move {
                for broker in replicas {
                    partition.on_broker_status(broker, broker_status(state, broker)).await;
                }
            })
            .await;
    }

    /// Starts a task that writes the topic record (`topic.json`) to the object store, from which a restore can create
    /// the topic again. Only the broker of the preferred leader of partition 0, or a standalone broker, writes it. A
    /// failed write is logged and not retried, because the broker writes the record again at its next start.
    fn write_topic_record(&self, name: &TopicName, topic: &TopicValue, state: &MetadataSnapshot) {
        let Some(tier) = &self.ctx.tier else { return };
        let first = state.partition(PartitionId::new(topic.id, 0)).and_then(|entry| entry.partition.as_ref());
        if !self.ctx.standalone && first.is_none_or(|first| first.value.replicas.first() != Some(&self.ctx.id)) {
            return;
        }
        let (store, log) = (tier.store.clone(), Arc::clone(&self.failed_topic_records));
        let record = TopicRecord {
            name: name.clone(),
            id: topic.id,
            partitions: topic.partitions,
            config: topic.config.clone(),
        };
        let write = async move {
            if let Err(error) = store.put_topic(&record).await
                && let Some(failures) = log.lock().occur(clock::monotonic())
            {
                tracing::warn!(
                    topic = %record.name, %error, failures,
                    "could not write topic records to the object store, this topic's included: they are written at the \
                     next start"
                );
            }
        };
        self.ctx.tasks.spawn_until_cancelled("topic-record", write);
    }

    /// Removes a topic that the metadata no longer contains from the table, and closes its partitions. Deletes their
    /// files if the topic has a tombstone.
    async fn drop_topic(&mut self, name: &TopicName, topic: &HostedTopic) {
        self.partitions.remove(name);
        let stop = async |replica: Arc<HostedPartition>| {
            if let HostedPartition::Online(partition) = &*replica {
                partition.stop().await;
            }
        };
        stream::iter(topic.partitions()).for_each_concurrent(MAX_CONCURRENT_ASSIGNMENTS, stop).await;
        if self.strays.delete_removed_topic(topic.id).await {
            tracing::info!(topic = %name, id = %topic.id, "deleted the topic from this broker");
        }
        self.partitions.notify_changed();
    }
}

/// Returns the status of a broker according to its registration.
fn broker_status(state: &MetadataSnapshot, broker: BrokerId) -> BrokerStatus {
    match state.brokers().get(&broker).map(|entry| (entry.value.state, entry.create_revision)) {
        Some((BrokerState::Running, epoch)) => BrokerStatus::Registered(epoch),
        Some((BrokerState::Stopping, _)) => BrokerStatus::ShuttingDown,
        None => BrokerStatus::Unregistered,
    }
}
