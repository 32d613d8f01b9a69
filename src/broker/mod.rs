//! This node: the partitions it holds, and one file per family of requests.
//!
//! # Overview
//!
//! Every request does the same steps: validate, find the partition (or refuse with who serves it), serve. `service` is
//! the gRPC face; `produce`, `fetch`, `offsets`, `admin`, `describe` and `cluster_admin` serve; `faults` maps every error once. `reconcile` follows the
//! cluster's metadata and opens, configures and closes partitions; `upkeep` gives partitions their turn at sealing,
//! uploading and deleting; `garbage` takes away what crashes and deletions left in the bucket and in the metadata.
//!
//! # Shutdown
//!
//! [`Broker::stop`]: refuse new writes, end the fetch streams, let the partitions answer what is written, end upkeep. What it
//! owns (log, metadata store) is closed by `server` after it.

mod admin;
mod cluster_admin;
mod describe;
mod faults;
mod fetch;
mod figures;
mod garbage;
mod hosted;
mod metadata;
mod offsets;
mod produce;
mod producer_ids;
mod reconcile;
mod service;
#[cfg(test)]
mod tests;
mod upkeep;

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use futures::{StreamExt as _, stream};

pub use self::service::services;
use self::{hosted::Hosted, producer_ids::ProducerIds};
use crate::{
    cluster::{Keys, MetaStore, Orders, TierCommits, Topics, View},
    limits,
    log::Log,
    model::{BrokerId, ConfigMap},
    partition::{Memory, Opener, Partition, Upkeep, UpkeepQueue},
    proto::fault::Fault,
    task::Tasks,
    telemetry::Metrics,
    tier::{Cache, Store},
};

/// What a broker is told about itself.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Its number.
    pub id: BrokerId,
    /// The cluster's name.
    pub cluster: String,
    /// What topics have that set nothing else.
    pub topic_defaults: ConfigMap,
    /// Bytes of writes that may be under way.
    pub produce_memory_bytes: u64,
    /// Partitions that may have upkeep at the same moment, which bounds uploads.
    pub upkeep_workers: usize,
    /// How often retention looks at every partition that holds records.
    pub retention_interval: std::time::Duration,
    /// How long an object that no manifest names is kept.
    pub garbage_grace: std::time::Duration,
    /// How long a multipart upload may take before it counts as abandoned.
    pub upload_grace: std::time::Duration,
}

/// The object store and the cache before it.
#[derive(Clone)]
pub struct Tier {
    /// The store.
    pub store: Store,
    /// The cache of all partitions.
    pub cache: Cache,
}

/// What a broker is made of.
pub struct Parts {
    /// Settings.
    pub settings: Settings,
    /// The data directory.
    pub log: Log,
    /// The metadata store.
    pub store: Arc<dyn MetaStore>,
    /// Its keys.
    pub keys: Keys,
    /// The mirror of the metadata.
    pub view: View,
    /// The object store, where there is one.
    pub tier: Option<Tier>,
    /// Figures.
    pub metrics: Metrics,
}

/// One running broker.
pub struct Broker {
    settings: Settings,
    log: Log,
    view: View,
    topics: Topics,
    orders: Orders,
    producer_ids: ProducerIds,
    tier: Option<Tier>,
    hosted: Hosted,
    produce_memory: Memory,
    /// Who opens compressed batches goes through it.
    opener: Opener,
    commits: TierCommits,
    upkeep: Upkeep,
    upkeep_queue: UpkeepQueue,
    metrics: Metrics,
    /// Partitions' tasks.
    partitions: Tasks,
    /// The broker's own.
    tasks: Tasks,
    /// Ends the streams of readers.
    readers: Tasks,
    ready: AtomicBool,
}

impl Broker {
    /// Opens every partition that the metadata gives this broker, and begins to follow it.
    pub async fn start(parts: Parts) -> Arc<Self> {
        let Parts { settings, log, store, keys, view, tier, metrics } = parts;
        let commits = TierCommits::new(Arc::clone(&store), keys.clone());
        let broker = Arc::new(Self {
            orders: Orders::new(Arc::clone(&store), keys.clone(), view.clone(), settings.topic_defaults.clone()),
            topics: Topics::new(store, keys, view.clone(), settings.topic_defaults.clone()),
            producer_ids: ProducerIds::default(),
            hosted: Hosted::default(),
            produce_memory: Memory::new(settings.produce_memory_bytes),
            opener: Opener::new(limits::OPENING_BYTES),
            upkeep: Upkeep::new(commits.clone()),
            commits,
            upkeep_queue: UpkeepQueue::default(),
            partitions: Tasks::new(),
            tasks: Tasks::new(),
            readers: Tasks::new(),
            ready: AtomicBool::new(false),
            settings,
            log,
            view,
            tier,
            metrics,
        });
        let state = broker.view.state();
        broker.see_to_strays(&state).await;
        broker.reconcile(&state).await;
        broker.ready.store(true, Ordering::Release);
        broker.tasks.spawn("reconcile", reconcile::follow(Arc::clone(&broker)));
        upkeep::spawn(&broker);
        garbage::spawn(&broker);
        broker
    }

    /// Stops in order; returns when nothing of it runs.
    pub async fn stop(&self) {
        self.ready.store(false, Ordering::Release);
        self.readers.stop().await;
        self.tasks.stop().await;
        self.partitions.stop().await;
        stream::iter(self.hosted.open())
            .for_each_concurrent(64, |partition| async move { partition.stop().await })
            .await;
    }

    /// The partition that serves requests for this name and number.
    fn partition(&self, topic: &str, partition: i32) -> Result<Arc<Partition>, Fault> {
        match self.hosted.find(topic, partition) {
            Some(found) => found.map_err(Fault::from),
            None => Err(self.topics.unknown(topic).into()),
        }
    }

    /// How many partitions it serves.
    pub fn partitions(&self) -> usize {
        self.hosted.open().len()
    }

    fn has_object_store(&self) -> bool {
        self.tier.is_some()
    }

    /// Records of a partition that are not in the bucket yet and are to go there.
    fn tier_lag(&self, partition: &Partition) -> u64 {
        if !partition.config().tiered || !self.has_object_store() {
            return 0;
        }
        let marks = partition.marks();
        marks.log_end.since(marks.tiered_end.max(marks.log_start))
    }

    fn is_stopping(&self) -> bool {
        !self.ready.load(Ordering::Acquire)
    }

    /// Resolves when readers' streams must end.
    async fn stopping(&self) {
        self.readers.cancelled().await;
    }

    /// Why this process should be restarted, if it should.
    pub fn health(&self) -> Result<(), String> {
        match self.log.status().failed {
            None => Ok(()),
            Some(why) => Err(format!("the data directory takes no writes: {why}")),
        }
    }

    /// Why it takes no requests, if it takes none.
    pub fn readiness(&self) -> Result<(), String> {
        if self.is_stopping() {
            return Err("not ready: starting or stopping".to_owned());
        }
        self.health()
    }

    /// All figures in Prometheus' text format.
    pub fn render_metrics(&self) -> String {
        self.observe();
        self.metrics.render()
    }

    /// Brings the figures up to date that are read rather than counted.
    fn observe(&self) {
        let open = self.hosted.open();
        let status = self.log.status();
        let metrics = &self.metrics;
        metrics.partitions.set(open.len() as u64);
        metrics.partitions_failed.set(open.iter().filter(|partition| partition.fault().is_some()).count() as u64);
        metrics.tier_lag_records.set(open.iter().map(|partition| self.tier_lag(partition)).sum());
        metrics.disk_used_bytes.set(open.iter().map(|partition| partition.local_bytes()).sum());
        metrics.tiered_bytes.set(open.iter().map(|partition| partition.tiered_bytes()).sum());
        metrics.disk_free_bytes.set(status.free_bytes);
        metrics.tail_memory_bytes.set(status.tail_bytes as u64);
        metrics.produce_memory_bytes.set(self.produce_memory.taken() as u64);
    }
}
