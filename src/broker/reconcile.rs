//! Follows the cluster's metadata: opens the partitions that this broker is given, passes on changed configurations, closes
//! and deletes what is gone.
//!
//! Metadata is only a hint of what to do next; nothing here decides who leads. Nothing is deleted from the disk because the
//! metadata does not name it: only the mark that a deletion leaves is the licence. Replicas in no topic and without a mark are
//! kept and named: metadata that was lost, damaged or taken back to an older state must not cost data as well.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use futures::{StreamExt as _, stream};

use super::{
    Broker,
    hosted::{Holding, HostedTopic},
};
use crate::{
    cluster::{Key, Moved, PartitionEntry, TopicValue, ViewState},
    model::{PartitionId, TopicConfig, TopicId, TopicName},
    partition::{Assignment, Partition, Spec, Surroundings},
    task,
    tier::{PartitionTier, TopicRecord},
};

/// Partitions that one thread opens one after the other. A hand-over for each would start threads by the dozen, which open
/// none sooner and leave memory behind.
const OPENED_TOGETHER: usize = 64;

/// Threads that open partitions of a topic side by side: each partition may have to recover its tail.
const OPENINGS: usize = 4;

/// Topics that are seen to side by side.
const TOPICS: usize = 2;

/// Applies every change of the metadata until the broker stops.
pub(super) async fn follow(broker: Arc<Broker>) {
    let mut feed = broker.view.feed();
    loop {
        let moved = tokio::select! {
            biased;
            () = broker.tasks.cancelled() => return,
            moved = feed.next() => moved,
        };
        let Some(moved) = moved else { return };
        let state = broker.view.state();
        match moved {
            Moved::Everything => broker.reconcile(&state).await,
            Moved::Keys(keys) => broker.reconcile_topics(topics_of(&keys, &state), &state).await,
        }
    }
}

/// The topics that changed keys belong to.
fn topics_of(keys: &[Key], state: &ViewState) -> BTreeSet<TopicName> {
    let by_id = |id: TopicId| state.name(id).cloned();
    keys.iter()
        .filter_map(|key| match key {
            Key::Topic(name) => Some(name.clone()),
            Key::Partition(id) => by_id(id.topic),
            // Tier keys are written by the leader itself.
            _ => None,
        })
        .collect()
}

impl Broker {
    /// Brings what is held in line with all of the metadata.
    pub(super) async fn reconcile(&self, state: &ViewState) {
        let mut names: BTreeSet<TopicName> = state.topics().keys().cloned().collect();
        names.extend(self.hosted.names());
        self.reconcile_topics(names, state).await;
    }

    async fn reconcile_topics(&self, names: BTreeSet<TopicName>, state: &ViewState) {
        let held: Vec<(TopicName, HostedTopic)> = stream::iter(names)
            .map(|name| async move { Some((name.clone(), self.hold_topic(&name, state).await?)) })
            .buffer_unordered(TOPICS)
            .filter_map(std::future::ready)
            .collect()
            .await;
        self.hosted.update(|topics| topics.extend(held));
    }

    /// Sees to the replicas on the disk that no topic has: those of a topic that was deleted go, others are named.
    pub(super) async fn see_to_strays(&self, state: &ViewState) {
        let known: BTreeSet<TopicId> = state.topics().values().map(|topic| topic.value.id).collect();
        let strays: BTreeSet<TopicId> =
            self.log.partitions().iter().map(|id| id.topic).filter(|topic| !known.contains(topic)).collect();
        for topic in strays {
            if self.delete_marked(topic).await {
                tracing::info!(%topic, "deleted what a stop had left of a deleted topic");
            }
        }
    }

    /// What this broker has of one topic from now on; `None` when that is nothing, or nothing new.
    async fn hold_topic(&self, name: &TopicName, state: &ViewState) -> Option<HostedTopic> {
        let hosted = self.hosted.topic(name);
        let wanted = state.topic(name);
        if wanted.is_none() && state.unreadable().contains_key(&Key::Topic(name.clone())) {
            // What it says is not known, so nothing new is to be done.
            return None;
        }
        if let Some(hosted) = &hosted
            && wanted.is_none_or(|topic| topic.value.id != hosted.id)
        {
            self.let_go(name, hosted).await;
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
        if held.is_none() {
            self.record_topic(name, topic);
        }
        let partitions: Vec<Wanted> = stream::iter(state.partitions_of(topic))
            .then(|(number, entry)| {
                let before = held.as_ref().and_then(|held| held.partitions.get(number as usize)).cloned();
                self.want(name, PartitionId::new(topic.id, number), entry, &config, before)
            })
            .collect()
            .await;
        let holdings: Vec<Vec<Holding>> =
            stream::iter(chunks(partitions)).map(|wanted| self.open(wanted)).buffered(OPENINGS).collect().await;
        let holdings: Vec<Holding> = holdings.into_iter().flatten().collect();
        Some(HostedTopic { id: topic.id, revision: wanted.mod_revision, partitions: holdings.into() })
    }

    /// What this broker is to have of one partition from now on. What it no longer leads is stopped.
    async fn want(
        &self,
        name: &TopicName,
        id: PartitionId,
        entry: PartitionEntry,
        config: &Arc<TopicConfig>,
        before: Option<Holding>,
    ) -> Wanted {
        let elsewhere = Wanted::Held(Holding::Elsewhere);
        let Some(known) = entry.partition else { return elsewhere };
        let assigned = &known.value;
        if assigned.leader != Some(self.settings.id) {
            if let Some(Holding::Open(partition)) = before {
                partition.stop().await;
            }
            return elsewhere;
        }
        let committed = entry.tier.map(|known| known.value.clone());
        let assignment = Assignment {
            value: Arc::new(assigned.clone()),
            revision: known.mod_revision,
            committed: committed.clone(),
            registered: BTreeMap::new(),
        };
        if let Some(Holding::Open(partition)) = before {
            if *partition.config() != **config {
                partition.configure(Arc::clone(config)).await;
            }
            partition.assign(assignment).await;
            return Wanted::Held(Holding::Open(partition));
        }
        let tier = self.tier.as_ref().map(|tier| {
            let state = committed.clone().unwrap_or_default();
            PartitionTier::new(tier.store.clone(), tier.cache.clone(), id, state)
        });
        let spec = Spec {
            id,
            topic: name.clone(),
            config: Arc::clone(config),
            committed,
            tier,
            alone: true,
            anew: false,
            lag_time: Duration::MAX,
        };
        Wanted::Opened(Box::new((spec, assignment)))
    }

    /// Opens what is to be opened, one after the other.
    async fn open(&self, wanted: Vec<Wanted>) -> Vec<Holding> {
        if wanted.iter().all(|wanted| matches!(wanted, Wanted::Held(_))) {
            return wanted.into_iter().filter_map(Wanted::held).collect();
        }
        let (log, queue, tasks) = (self.log.clone(), self.upkeep_queue.clone(), self.partitions.clone());
        let broker = self.settings.id;
        let open = move |wanted| match wanted {
            Wanted::Held(holding) => (holding, None),
            Wanted::Opened(opened) => {
                let (spec, assignment) = *opened;
                let (id, topic) = (spec.id, spec.topic.clone());
                match Partition::open(broker, &log, spec, Surroundings::alone(), &queue, &tasks) {
                    Ok(partition) => {
                        queue.push(id);
                        (Holding::Open(partition), Some(assignment))
                    }
                    Err(error) => {
                        tracing::error!(partition = %id, %topic, %error, "the partition cannot be opened on this broker");
                        (Holding::Unusable(error.to_string().into()), None)
                    }
                }
            }
        };
        let opened: Vec<_> = task::blocking(move || wanted.into_iter().map(open).collect()).await;
        stream::iter(opened)
            .then(|(holding, assignment)| async move {
                if let (Holding::Open(partition), Some(assignment)) = (&holding, assignment) {
                    partition.assign(assignment).await;
                }
                holding
            })
            .collect()
            .await
    }

    /// Writes down in the bucket what the topic is called, for `restore`. Best effort: it is written again at each start.
    fn record_topic(&self, name: &TopicName, topic: &TopicValue) {
        let Some(tier) = &self.tier else { return };
        let (store, tasks) = (tier.store.clone(), self.tasks.clone());
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
                outcome = store.put_topic(&record) => if let Err(error) = outcome {
                    tracing::warn!(topic = %record.name, %error, "could not write the topic's record to the object store");
                }
            }
        });
    }

    /// Ends what is held of a topic that the metadata does not name any more, and deletes it where that was meant.
    async fn let_go(&self, name: &TopicName, hosted: &HostedTopic) {
        self.hosted.update(|topics| {
            topics.remove(name);
        });
        for holding in hosted.partitions.iter() {
            if let Holding::Open(partition) = holding {
                partition.stop().await;
            }
        }
        if self.delete_marked(hosted.id).await {
            tracing::info!(topic = %name, id = %hosted.id, "the topic is deleted from this broker");
        }
    }

    /// Deletes what the disk holds of a topic, when its deletion left a mark; says so when it is kept.
    async fn delete_marked(&self, topic: TopicId) -> bool {
        if !self.topics.was_deleted(topic).await.unwrap_or(false) {
            tracing::warn!(
                %topic,
                "the data directory holds partitions of a topic that the metadata does not know; they are kept and not served: \
                 if the topic was deleted, remove its folder while the broker is stopped"
            );
            return false;
        }
        let left = self.log.partitions().into_iter().filter(|id| id.topic == topic);
        for id in left {
            self.delete_replica(id).await;
        }
        true
    }

    async fn delete_replica(&self, id: PartitionId) {
        let log = self.log.clone();
        if let Err(error) = task::blocking(move || log.delete_replica(id)).await {
            tracing::warn!(partition = %id, %error, "could not delete the partition's files; they go at the next start");
        }
    }
}

/// What is to become of a partition here.
enum Wanted {
    /// Nothing new.
    Held(Holding),
    /// It is opened, and assigned this.
    Opened(Box<(Spec, Assignment)>),
}

impl Wanted {
    fn held(self) -> Option<Holding> {
        match self {
            Self::Held(holding) => Some(holding),
            Self::Opened(_) => None,
        }
    }
}

/// In order, as many together as one thread opens.
fn chunks(mut wanted: Vec<Wanted>) -> Vec<Vec<Wanted>> {
    let mut chunks = Vec::new();
    while wanted.len() > OPENED_TOGETHER {
        let rest = wanted.split_off(OPENED_TOGETHER);
        chunks.push(std::mem::replace(&mut wanted, rest));
    }
    chunks.push(wanted);
    chunks
}
