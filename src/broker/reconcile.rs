//! Follows the cluster's metadata, partition by partition: opens replicas that this broker is given and tells each what it is to be,
//! passes on changed configurations, closes and deletes what is gone.
//!
//! # Overview
//!
//! ```text
//!   topic key      ─▶ how many partitions, and by which configuration; gone: closed, and deleted where a mark says so
//!   partition key  ─▶ a replica here: opened, and told its place (`Partition::assign`); none here: closed, and a leftover
//!   tier key       ─▶ what followers know as committed to the bucket
//!   broker key     ─▶ what leaders know of their followers' brokers, and where this one finds its leaders
//! ```
//!
//! A broker that starts opens what its disk holds, and tells nobody anything: first it shows to the others what it still has.
//! Only when it is registered is every replica told its place, from a state that knows of the registration.
//!
//! # Invariants
//!
//! - Metadata is only a hint of what to do next; nothing here decides who leads.
//! - Nothing is deleted from the disk because the metadata does not name it: only the mark that a deletion leaves is a licence, or
//!   the partition's own key, read from the store at that moment, that names other replicas. What is in no topic and without a
//!   mark is kept and named: metadata that was lost, damaged or taken back to an older state must not cost data as well.
//! - A replica is begun anew only when no set has it, so that nobody counts on what it held.
//! - A replica whose value could not be read when this broker showed what it holds is told nothing before that is made up for (`unproven`).

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

/// Partitions that one thread opens one after the other. A hand-over for each would start threads by the dozen, which open
/// none sooner and leave memory behind.
const OPENED_TOGETHER: usize = 64;

/// Threads that open partitions side by side: each partition may have to recover its tail.
const OPENINGS: usize = 4;

/// Partitions that are told of a change side by side.
const TOLD_TOGETHER: usize = 256;

/// Applies every change of the metadata until the broker stops.
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
    /// Brings what is held in line with all of the metadata.
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
                // What this broker never held, because it could not read its configuration, goes too.
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
        // Last: it may take long, and who leads is more urgent.
        leftovers.see_to_deleted(self, gone).await;
    }

    /// Takes over what is new of topics. Returns their partitions, which are to be looked at one by one, and the revision that
    /// each is acted by once that is done.
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
        // All at once: each change copies a part of the table of topics.
        if !topics.is_empty() {
            self.hosted.put(topics);
        }
        (ids, acted)
    }

    /// What this broker has of a topic from now on; `None` when that is nothing, or nothing new.
    async fn hold_topic(
        &self,
        name: &TopicName,
        state: &ViewState,
        leftovers: &mut Leftovers,
    ) -> Option<(HostedTopic, Revision)> {
        let hosted = self.hosted.topic(name);
        let wanted = state.topic(name);
        if wanted.is_none() && state.unreadable().contains_key(&Key::Topic(name.clone())) {
            // What it says is not known, so nothing new is to be done.
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

    /// Brings partitions in line with what the metadata says of them.
    async fn hold(&self, ids: Vec<PartitionId>, state: &ViewState, leftovers: &mut Leftovers) {
        let is_on_disk = |id: &PartitionId| self.log.holds(*id);
        let (mut opened, mut told, mut readable) = (Vec::new(), Vec::new(), Vec::new());
        for id in ids {
            // Of a topic that is not acted by, nothing is done.
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
                // It is on its way, or being deleted, or cannot be read: nobody knows who leads.
                None => self.close(id, &holding).await,
            }
        }
        let tried: Vec<_> = opened.iter().map(|spec| spec.id).collect();
        self.open_all(opened).await;
        readable.into_iter().for_each(|id| self.unproven.can_be_read(id));
        if self.takes_part() {
            // What turns out to be of no use, and nobody counts on, begins anew now: no other change may come that would ask for it.
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

    /// Whether the replica here came up whole; `None` where it is on the disk and was not opened.
    pub(super) fn came_up_whole(&self, id: PartitionId) -> Option<bool> {
        match self.hosted.held(id).as_deref() {
            Some(Holding::Open(_)) => Some(true),
            Some(Holding::Unusable(_)) => Some(false),
            Some(Holding::Elsewhere) | None => (!self.log.holds(id)).then_some(false),
        }
    }

    /// Ends a replica here, if there is one. Its files stay.
    async fn close(&self, id: PartitionId, holding: &Holding) {
        if let Holding::Open(partition) = holding {
            partition.stop().await;
        }
        if !matches!(holding, Holding::Elsewhere) {
            self.hosted.set(id, Holding::Elsewhere);
        }
    }

    /// How a replica is to be opened; `None` where it must not be now.
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
            // Nothing to show. It begins when the others know that.
            return None;
        }
        let counted = value.isr.contains(&me) || value.elr.contains(&me);
        let useless = match holding {
            Holding::Unusable(unusable) => Some(unusable),
            Holding::Open(_) | Holding::Elsewhere => None,
        };
        let anew = !on_disk
            || useless.is_some_and(|useless| match value.leader {
                // An operator has it lead, and was told that it cannot be used and goes.
                Some(leader) if leader == me => {
                    value.isr == [me] && value.discard && value.unclean.is_some_and(|epoch| epoch > useless.since)
                }
                Some(_) => !counted,
                // There is nobody to copy from: what is here stays, whatever it is worth.
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

    /// Opens replicas, side by side.
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

    /// What cannot be opened, and why: said once, though it is tried again at each change.
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

    /// Opens replicas one after the other, on a thread that may block.
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

    /// Gives up a leadership for which there is no replica: somebody else may have one.
    fn give_up_unusable(&self, id: PartitionId, state: &ViewState) {
        let unusable = self.hosted.held(id).is_some_and(|holding| matches!(*holding, Holding::Unusable(_)));
        let known = state.partition(id).and_then(|entry| entry.partition.as_ref());
        if let Some(known) =
            known.filter(|known| unusable && !self.alone && known.value.leader == Some(self.settings.id))
        {
            self.agree.resign(id, known.value.leader_epoch);
        }
    }

    /// Whether another process has this broker's number by now, with a copy of its data directory: then it is that one who leads.
    fn is_replaced(&self, state: &ViewState) -> bool {
        let registered = state.brokers().get(&self.settings.id);
        registered.is_some_and(|known| known.value.incarnation != self.incarnation)
    }

    /// Tells a replica its place.
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

    /// Passes on what is committed of a partition's tier. A leader knows what it commits itself, and not what was there before in a value
    /// that could not be read when it was opened.
    async fn adopt(&self, id: PartitionId, state: &ViewState) {
        let Some(partition) = self.hosted.by_id(id) else { return };
        if let Some(known) = state.partition(id).and_then(|entry| entry.tier.as_ref()) {
            partition.adopt(known.value.clone()).await;
        }
    }

    /// Tells the partitions that this broker leads, as far as is known, what the metadata says of these brokers now.
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

    /// Writes down in the bucket what the topic is called, for `restore`. Best effort: it is written again at each start, by
    /// whoever leads its first partition.
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

    /// Ends what is held of a topic that the metadata does not name any more, and deletes it where that was meant.
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

/// Replicas in parts that are opened together. Each part has memory of its own: one that was split off kept room for all that came after
/// it, which was quadratic in their number.
fn chunks<T>(all: Vec<T>) -> impl Iterator<Item = Vec<T>> {
    let mut rest = all.into_iter();
    std::iter::from_fn(move || {
        let chunk: Vec<T> = rest.by_ref().take(OPENED_TOGETHER).collect();
        (!chunk.is_empty()).then_some(chunk)
    })
}

/// What the metadata says of a broker.
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
    fn chunks_of_replicas_keep_no_room_for_others() {
        let chunks: Vec<Vec<u64>> = chunks((0..10_000).collect()).collect();
        assert!(chunks.iter().flatten().copied().eq(0..10_000), "all of them, in order");
        let kept: usize = chunks.iter().map(Vec::capacity).sum();
        assert!(kept <= 2 * 10_000, "room for {kept} numbers is kept for 10,000");
    }
}
