//! Applies the cluster's metadata to the partitions of this broker: opens assigned replicas, assigns their roles, passes on changed
//! configurations, and closes and deletes removed partitions.
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
//! A starting broker opens the replicas on disk and assigns no roles, because the startup verification comes first. Every replica gets its
//! assignment after the registration, from a metadata snapshot that contains the registration.
//!
//! # Invariants
//!
//! - Metadata is a hint for the next action. Nothing here decides about leadership.
//! - A missing entry in the metadata never causes the deletion of files. Deletion requires the tombstone of the topic, or the partition's
//!   own key with other replicas, read from the metadata store at that moment. Partitions without topic and tombstone are kept and logged:
//!   lost, corrupt or restored metadata must not cost data as well.
//! - A local replica is discarded only when it is in neither ISR nor ELR, so no commit depends on its content. The exception is an unusable
//!   replica that an operator elected in order to discard it.
//! - A replica whose partition value was unreadable during the startup verification gets no assignment until it is verified (`unproven`).

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, PoisonError},
};

use futures::{StreamExt as _, stream};

use super::{
    Broker,
    hosted::{Holding, HostedTopic, Unusable},
    leftovers::Leftovers,
};
use crate::{
    cluster::{BrokerState, Key, Moved, PartitionValue, Revision, TopicValue, ViewState},
    model::{BrokerId, LeaderEpoch, PartitionId, TopicConfig, TopicName},
    partition::{Agreement as _, Assignment, Partition, PartitionError, Spec, leader::insync::Registration},
    task::{self, clock},
    tier::{PartitionTier, TopicRecord},
};

/// Number of partitions that one thread opens in sequence. One hand-over per partition would start dozens of threads, which are not faster
/// and leave memory behind.
const OPENED_TOGETHER: usize = 64;

/// Maximum number of threads that open partitions concurrently. Each partition may have to recover its tail.
const OPENINGS: usize = 4;

/// Maximum number of partitions that are notified of a change concurrently.
const TOLD_TOGETHER: usize = 256;

/// Applies every metadata change until the broker stops.
pub(super) async fn follow(broker: Arc<Broker>, mut leftovers: Leftovers) {
    let mut feed = broker.view.feed();
    loop {
        let moved = tokio::select! {
            biased;
            () = broker.tasks.cancelled() => return,
            moved = feed.next() => moved,
            () = broker.unproven.due() => {
                let proven = broker.unproven.see_to(&broker).await;
                broker.hold(proven, &broker.view.state(), &mut leftovers).await;
                continue;
            }
            () = leftovers.due() => {
                leftovers.see_to(&broker).await;
                continue;
            }
        };
        let Some(moved) = moved else { return };
        let state = broker.view.state();
        match moved {
            Moved::Everything => broker.reconcile(&state, &mut leftovers).await,
            Moved::Keys(keys) => broker.reconcile_keys(&keys, &state, &mut leftovers).await,
        }
    }
}

impl Broker {
    /// Applies all of the metadata.
    pub(super) async fn reconcile(&self, state: &ViewState, leftovers: &mut Leftovers) {
        let mut names: BTreeSet<TopicName> = state.topics().keys().cloned().collect();
        names.extend(self.hosted.names());
        let (ids, acted) = self.hold_topics(names.iter(), state, leftovers).await;
        self.know_brokers(state);
        self.hold(ids, state, leftovers).await;
        self.hosted.acted(acted);
    }

    fn know_brokers(&self, state: &ViewState) {
        if let Some(others) = &self.others {
            others.know(state);
        }
    }

    async fn reconcile_keys(&self, keys: &[Key], state: &ViewState, leftovers: &mut Leftovers) {
        let topics = keys.iter().filter_map(|key| match key {
            Key::Topic(name) => Some(name),
            _ => None,
        });
        let (ids, acted) = self.hold_topics(topics, state, leftovers).await;
        let mut ids: BTreeSet<PartitionId> = ids.into_iter().collect();
        let (mut brokers, mut gone) = (Vec::new(), Vec::new());
        for key in keys {
            match key {
                Key::Partition(id) => {
                    ids.insert(*id);
                }
                Key::Tier(id) => self.adopt(*id, state).await,
                Key::Broker(id) => brokers.push(*id),
                // A topic that was never hosted, because its configuration was unreadable, is deleted too.
                Key::Deleted(id) if state.name(*id).is_none() => gone.push(*id),
                _ => {}
            }
        }
        if !brokers.is_empty() {
            self.know_brokers(state);
            self.tell_leaders(&brokers, state).await;
        }
        self.hold(ids.into_iter().collect(), state, leftovers).await;
        self.hosted.acted(acted);
        // Last, because deletion may take long, and leadership changes are more urgent.
        leftovers.see_to_deleted(self, gone).await;
    }

    /// Applies topic values to the partition table. Returns the partitions to reconcile, and the revision that each topic reaches by that.
    async fn hold_topics<'a>(
        &self,
        names: impl Iterator<Item = &'a TopicName> + Send,
        state: &ViewState,
        leftovers: &mut Leftovers,
    ) -> (Vec<PartitionId>, BTreeMap<TopicName, Revision>) {
        let (mut topics, mut ids, mut acted) = (Vec::new(), Vec::new(), BTreeMap::new());
        for name in names {
            if let Some((topic, revision)) = self.hold_topic(name, state, leftovers).await {
                let count = u32::try_from(topic.count()).unwrap_or(u32::MAX);
                ids.extend((0..count).map(|number| PartitionId::new(topic.id, number)));
                if topic.revision != revision {
                    acted.insert(name.clone(), revision);
                }
                topics.push((name.clone(), topic));
            }
        }
        // In one call, because each change copies a part of the topic table.
        if !topics.is_empty() {
            self.hosted.put(topics);
        }
        (ids, acted)
    }

    /// Applies one topic value. Returns the new entry of the topic and its revision, or `None` if there is nothing to apply.
    async fn hold_topic(
        &self,
        name: &TopicName,
        state: &ViewState,
        leftovers: &mut Leftovers,
    ) -> Option<(HostedTopic, Revision)> {
        let hosted = self.hosted.topic(name);
        let wanted = state.topic(name);
        if wanted.is_none() && state.unreadable().contains_key(&Key::Topic(name.clone())) {
            // The new value is unreadable, so nothing changes.
            return None;
        }
        if let Some(hosted) = &hosted
            && wanted.is_none_or(|topic| topic.value.id != hosted.id)
        {
            self.let_go(name, hosted, leftovers).await;
        }
        let wanted = wanted?;
        let topic = &wanted.value;
        let held = hosted.filter(|hosted| hosted.id == topic.id);
        let config = match TopicConfig::resolve(&self.settings.topic_defaults, &topic.config) {
            Ok(config) => Arc::new(config),
            Err(error) => {
                tracing::error!(topic = %name, %error, "the topic's stored configuration is not valid; alter it to repair it");
                return None;
            }
        };
        let changed = held.as_ref().is_some_and(|held| *held.config != *config);
        let now = HostedTopic::new(topic.id, Arc::clone(&config), topic.partitions, held.as_ref());
        if changed {
            for holding in now.holdings() {
                if let Holding::Open(partition) = &*holding {
                    partition.configure(Arc::clone(&config)).await;
                }
            }
        }
        if held.is_none() {
            self.record_topic(name, topic, state);
        }
        Some((now, wanted.mod_revision))
    }

    /// Applies the metadata to these partitions.
    async fn hold(&self, ids: Vec<PartitionId>, state: &ViewState, leftovers: &mut Leftovers) {
        let is_on_disk = |id: &PartitionId| self.log.holds(*id);
        let (mut opened, mut told, mut readable) = (Vec::new(), Vec::new(), Vec::new());
        for id in ids {
            // Partitions of a topic that is not hosted are skipped.
            let Some(holding) = self.hosted.held(id) else { continue };
            let known = state.partition(id).and_then(|entry| entry.partition.as_ref());
            match known {
                Some(known) if known.value.replicas.contains(&self.settings.id) => {
                    let unproven = self.unproven.holds_back(id);
                    if !matches!(&*holding, Holding::Open(_)) && (!unproven || is_on_disk(&id)) {
                        opened.extend(self.spec(id, state, &known.value, &holding, is_on_disk(&id)));
                    }
                    if unproven {
                        readable.push(id);
                    } else {
                        told.push(id);
                    }
                }
                Some(_) => {
                    self.close(id, &holding).await;
                    if is_on_disk(&id) {
                        leftovers.add(id);
                    }
                }
                // The value has not arrived, was deleted or is unreadable, so the leader is unknown.
                None => self.close(id, &holding).await,
            }
        }
        let tried: Vec<_> = opened.iter().map(|spec| spec.id).collect();
        self.open_all(opened).await;
        readable.into_iter().for_each(|id| self.unproven.can_be_read(id));
        if self.takes_part() {
            // An unusable replica that may be discarded is replaced by an empty one now, because no later metadata change may trigger that.
            let again = tried.into_iter().filter_map(|id| {
                let holding = self.hosted.held(id)?;
                let known = state.partition(id)?.partition.as_ref()?;
                let useless = matches!(*holding, Holding::Unusable(_));
                useless.then(|| self.spec(id, state, &known.value, &holding, true)).flatten().filter(|spec| spec.anew)
            });
            self.open_all(again.collect()).await;
            told.iter().for_each(|id| self.give_up_unusable(*id, state));
            stream::iter(told).for_each_concurrent(TOLD_TOGETHER, |id| self.tell(id, state)).await;
        }
    }

    /// Returns true if the local replica is intact, and `None` if it is on disk and was not opened.
    pub(super) fn came_up_whole(&self, id: PartitionId) -> Option<bool> {
        match self.hosted.held(id).as_deref() {
            Some(Holding::Open(_)) => Some(true),
            Some(Holding::Unusable(_)) => Some(false),
            Some(Holding::Elsewhere) | None => (!self.log.holds(id)).then_some(false),
        }
    }

    /// Stops the local replica, if there is one. The files stay.
    async fn close(&self, id: PartitionId, holding: &Holding) {
        if let Holding::Open(partition) = holding {
            partition.stop().await;
        }
        if !matches!(holding, Holding::Elsewhere) {
            self.hosted.set(id, Holding::Elsewhere);
        }
    }

    /// Returns the parameters for opening a replica, or `None` if it must not be opened now.
    fn spec(
        &self,
        id: PartitionId,
        state: &ViewState,
        value: &PartitionValue,
        holding: &Holding,
        on_disk: bool,
    ) -> Option<Spec> {
        let (alone, me) = (self.alone, self.settings.id);
        if !on_disk && !alone && !self.takes_part() {
            // There is nothing to verify. The replica is created after the activation.
            return None;
        }
        let counted = value.isr.contains(&me) || value.elr.contains(&me);
        let useless = match holding {
            Holding::Unusable(unusable) => Some(unusable),
            Holding::Open(_) | Holding::Elsewhere => None,
        };
        let anew = !on_disk
            || useless.is_some_and(|useless| match value.leader {
                // An operator elected this replica, knowing that it is unusable and will be discarded.
                Some(leader) if leader == me => {
                    value.isr == [me] && value.discard && value.unclean.is_some_and(|epoch| epoch > useless.since)
                }
                Some(_) => !counted,
                // There is no leader to copy from, so the files stay even if their content is useless.
                None => false,
            });
        let anew = anew && !alone;
        let name = state.name(id.topic)?;
        let committed = state.partition(id)?.tier.as_ref().map(|known| known.value.clone());
        let tier = self.tier.as_ref().map(|tier| {
            let state = committed.clone().unwrap_or_default();
            PartitionTier::new(tier.store.clone(), tier.cache.clone(), id, state)
        });
        let config = self.hosted.topic(name)?.config;
        let lag_time = self.settings.lag_time;
        Some(Spec { id, topic: name.clone(), config, committed, tier, alone, anew, lag_time })
    }

    /// Opens replicas concurrently.
    async fn open_all(&self, specs: Vec<Spec>) {
        let opened = stream::iter(chunks(specs)).map(|specs| self.open_some(specs)).buffer_unordered(OPENINGS);
        opened
            .for_each(|held| {
                for (id, topic, opened) in held {
                    let holding = match opened {
                        Ok(partition) => Holding::Open(partition),
                        Err(error) => self.not_opened(id, &topic, &error),
                    };
                    self.hosted.set(id, holding);
                }
                std::future::ready(())
            })
            .await;
    }

    fn leader_epoch(&self, id: PartitionId) -> LeaderEpoch {
        let state = self.view.state();
        let known = state.partition(id).and_then(|entry| entry.partition.as_ref());
        known.map(|known| known.value.leader_epoch).unwrap_or_default()
    }

    /// Returns the entry of a replica that could not be opened. Logs each error once, although every metadata change retries the open.
    fn not_opened(&self, id: PartitionId, topic: &TopicName, error: &PartitionError) -> Holding {
        let why: Arc<str> = error.to_string().into();
        let earlier = self.hosted.held(id).and_then(|held| match &*held {
            Holding::Unusable(unusable) => Some(unusable.clone()),
            Holding::Open(_) | Holding::Elsewhere => None,
        });
        let since = earlier.as_ref().map_or_else(|| self.leader_epoch(id), |earlier| earlier.since);
        match error {
            _ if earlier.is_some_and(|earlier| earlier.why == why) => {}
            PartitionError::Lost { .. } => tracing::warn!(
                partition = %id, %topic, %error,
                "this replica lacks committed records and counts for nothing; it is copied anew as soon as another one leads, if there is one"
            ),
            _ => tracing::error!(partition = %id, %topic, %error, "the partition cannot be opened on this broker"),
        }
        Holding::Unusable(Unusable { why, since })
    }

    /// Opens replicas in sequence, on a blocking thread.
    async fn open_some(
        &self,
        specs: Vec<Spec>,
    ) -> Vec<(PartitionId, TopicName, Result<Arc<Partition>, PartitionError>)> {
        let (log, queue, tasks) = (self.log.clone(), self.upkeep_queue.clone(), self.partitions.clone());
        let (broker, around) = (self.settings.id, self.around());
        let open = move |spec: Spec| {
            let (id, topic) = (spec.id, spec.topic.clone());
            let opened = Partition::open(broker, &log, spec, around.clone(), &queue, &tasks);
            if opened.is_ok() {
                queue.push(id);
            }
            (id, topic, opened)
        };
        task::run_blocking(move || specs.into_iter().map(open).collect()).await
    }

    /// Resigns from the leadership of a partition whose local replica is unusable, because another broker may have a usable replica.
    fn give_up_unusable(&self, id: PartitionId, state: &ViewState) {
        let unusable = self.hosted.held(id).is_some_and(|holding| matches!(*holding, Holding::Unusable(_)));
        let known = state.partition(id).and_then(|entry| entry.partition.as_ref());
        if let Some(known) =
            known.filter(|known| unusable && !self.alone && known.value.leader == Some(self.settings.id))
        {
            self.agree.resign(id, known.value.leader_epoch);
        }
    }

    /// Returns true if another process is registered with this broker's id, on a copy of its data directory. That process leads the
    /// partitions then.
    fn is_replaced(&self, state: &ViewState) -> bool {
        let registered = state.brokers().get(&self.settings.id);
        registered.is_some_and(|known| known.value.incarnation != self.incarnation)
    }

    /// Sends a replica its assignment.
    async fn tell(&self, id: PartitionId, state: &ViewState) {
        let Some(partition) = self.hosted.by_id(id) else { return };
        let Some(entry) = state.partition(id) else { return };
        let Some(known) = &entry.partition else { return };
        let registered = known.value.replicas.iter().map(|broker| (*broker, registration(state, *broker)));
        let mut value = known.value.clone();
        if value.leader == Some(self.settings.id) && self.is_replaced(state) {
            value.leader = None;
        }
        let assignment = Assignment {
            value: Arc::new(value),
            revision: known.mod_revision,
            committed: entry.tier.as_ref().map(|known| known.value.clone()),
            registered: registered.collect(),
        };
        partition.assign(assignment).await;
    }

    /// Passes the committed tier state to a partition. A leader knows its own commits, but not a value that was unreadable when the replica
    /// was opened.
    async fn adopt(&self, id: PartitionId, state: &ViewState) {
        let Some(partition) = self.hosted.by_id(id) else { return };
        if let Some(known) = state.partition(id).and_then(|entry| entry.tier.as_ref()) {
            partition.adopt(known.value.clone()).await;
        }
    }

    /// Sends the status of these brokers to the partitions that this broker leads according to the metadata.
    async fn tell_leaders(&self, brokers: &[BrokerId], state: &ViewState) {
        let me = self.settings.id;
        let led = self.hosted.open().into_iter().filter_map(|partition| {
            let known = state.partition(partition.id())?.partition.as_ref()?;
            let concerned = |broker: &&BrokerId| known.value.replicas.contains(broker);
            let concerned: Vec<BrokerId> = brokers.iter().filter(concerned).copied().collect();
            (known.value.leader == Some(me) && !concerned.is_empty()).then_some((partition, concerned))
        });
        stream::iter(led)
            .for_each_concurrent(TOLD_TOGETHER, |(partition, concerned)| async move {
                for broker in concerned {
                    partition.seen(broker, registration(state, broker)).await;
                }
            })
            .await;
    }

    /// Writes the topic record to the object store, for `restore`. Best effort: the preferred leader of the first partition writes the
    /// record again at each start.
    fn record_topic(&self, name: &TopicName, topic: &TopicValue, state: &ViewState) {
        let Some(tier) = &self.tier else { return };
        let first = state.partition(PartitionId::new(topic.id, 0)).and_then(|entry| entry.partition.as_ref());
        if !self.alone && first.is_none_or(|first| first.value.replicas.first() != Some(&self.settings.id)) {
            return;
        }
        let (store, tasks, failed) = (tier.store.clone(), self.tasks.clone(), Arc::clone(&self.failed_topic_records));
        let record = TopicRecord {
            name: name.clone(),
            id: topic.id,
            partitions: topic.partitions,
            config: topic.config.clone(),
        };
        self.tasks.spawn("topic record", async move {
            tokio::select! {
                biased;
                () = tasks.cancelled() => {}
                outcome = store.put_topic(&record) => if let Err(error) = outcome
                    && let Some(failures) = failed.lock().unwrap_or_else(PoisonError::into_inner).occur(clock::monotonic())
                {
                    tracing::warn!(
                        topic = %record.name, %error, failures,
                        "could not write records of topics to the object store, among them this topic's; they are written again at the next start"
                    );
                }
            }
        });
    }

    /// Closes the partitions of a topic that the metadata no longer contains. Deletes their files if the topic was deleted on purpose.
    async fn let_go(&self, name: &TopicName, hosted: &HostedTopic, leftovers: &mut Leftovers) {
        self.hosted.remove(name);
        let stop = async |holding: Arc<Holding>| {
            if let Holding::Open(partition) = &*holding {
                partition.stop().await;
            }
        };
        stream::iter(hosted.holdings()).for_each_concurrent(TOLD_TOGETHER, stop).await;
        if leftovers.see_to_topic(self, hosted.id).await {
            tracing::info!(topic = %name, id = %hosted.id, "the topic is deleted from this broker");
        }
        self.hosted.tell();
    }
}

/// Splits replicas into chunks that are opened together. Each chunk has its own allocation: chunks split off one vector would keep capacity
/// for all later replicas, which is quadratic.
fn chunks<T>(all: Vec<T>) -> impl Iterator<Item = Vec<T>> {
    let mut rest = all.into_iter();
    std::iter::from_fn(move || {
        let chunk: Vec<T> = rest.by_ref().take(OPENED_TOGETHER).collect();
        (!chunk.is_empty()).then_some(chunk)
    })
}

/// Returns the status of a broker according to the metadata.
fn registration(state: &ViewState, broker: BrokerId) -> Registration {
    match state.brokers().get(&broker).map(|known| (known.value.state, known.create_revision)) {
        Some((BrokerState::Running, epoch)) => Registration::Running(epoch),
        Some((BrokerState::Stopping, _)) => Registration::Stopping,
        None => Registration::None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replica_chunks_keep_no_excess_capacity() {
        let chunks: Vec<Vec<u64>> = chunks((0..10_000).collect()).collect();
        assert!(chunks.iter().flatten().copied().eq(0..10_000), "all of them, in order");
        let kept: usize = chunks.iter().map(Vec::capacity).sum();
        assert!(kept <= 2 * 10_000, "room for {kept} numbers is kept for 10,000");
    }
}
