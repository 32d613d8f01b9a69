//! One broker: the partitions that it hosts, and one file per family of requests.
//!
//! # Overview
//!
//! Every request takes the same steps: validate, look up the partition (or reject with the leader), serve.
//!
//! | files | content |
//! | --- | --- |
//! | `service` | gRPC services |
//! | `produce`, `fetch`, `offsets`, `metadata`, `topics`, `describe`, `operations`, `rebuild` | request handlers |
//! | `lookup`, `peer_status` | partition lookup; requests to other brokers |
//! | `errors` | the one mapping from errors to responses |
//! | `reconciler`, `stray_cleaner` | opening, configuring and closing partitions by the metadata; deleting stray replicas |
//! | `maintenance`, `garbage` | maintenance (rolling, uploading, deleting); garbage of crashes and deletions in object store and metadata |
//! | `replication`, `links`, `peer` | replication links between brokers |
//! | `failure_detector` | failure detection after a lost link |
//! | `isr_updates` | ISR proposals of leaders to the metadata store |
//! | `lag_ticker` | clock ticks for leaders |
//!
//! The controller (`cluster::Controller`) runs on one broker of the cluster. Garbage is collected only there, or on a
//! standalone broker.
//!
//! # Start
//!
//! [`Broker::open`] opens the replicas on disk and leaves them idle. [`Broker::intact_replicas`] returns the intact
//! replicas for the startup verification. [`Broker::activate`] assigns every replica its role and serves requests. The
//! broker is registered by then, and its metadata cache contains the registration.
//!
//! # Shutdown
//!
//! A broker of a cluster first calls [`Broker::transfer_leadership`], which transfers leadership while requests are
//! still served. [`Broker::stop`] refuses new writes, ends the fetch streams, completes the queued writes and ends
//! maintenance. `server` closes the log and the metadata store after that.

mod budget;
mod claims;
mod controlled_shutdown;
mod describe;
mod disk_pressure;
mod errors;
mod failure_detector;
mod fetch;
mod garbage;
mod health;
mod isr_updates;
mod lag_ticker;
mod lease_monitor;
mod links;
mod lookup;
mod maintenance;
mod metadata;
mod metrics;
mod offsets;
mod operations;
mod peer;
mod peer_status;
mod produce;
mod producer_ids;
mod rebuild;
mod reconciler;
mod replication;
mod service;
mod stray_cleaner;
mod table;
#[cfg(test)]
mod tests;
mod topics;

use std::{
    collections::BTreeSet,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use futures::{StreamExt as _, stream};
use parking_lot::Mutex;
use tokio::sync::{Semaphore, watch};

use self::{
    budget::Pools, claims::Claims, isr_updates::IsrUpdateManager, producer_ids::ProducerIds,
    replication::ReplicationManager, stray_cleaner::StrayCleaner, table::PartitionTable,
};
pub use self::{
    budget::{
        Budgets, CallMemory, ConnectionMemory, Grant, IncompleteGuard, SMALL_BYTES, SendingResponse, WAITING_BYTES,
    },
    disk_pressure::starts_under_pressure,
    health::Readiness,
    producer_ids::ProducerIdQuota,
    service::{LogService, Requests, admin_service, peer_service},
};
use crate::{
    client::Connector,
    cluster::{
        ClusterOperations, Controller, Keys, MetaStore, MetadataCache, PartitionUpdater, Session, TierCommits, Topics,
        planner::PlannerLimits,
    },
    limits,
    log::DataDir,
    model::{BrokerId, ConfigMap, Offset, PartitionId},
    partition::{Decompressor, MaintenanceQueue, MaintenanceRunner, Partition, PartitionContext, PartitionCounters},
    task::{self, Tasks, clock},
    telemetry::{LogThrottle, Metrics},
    tier::{ChunkCache, Outage, TierStore},
};

/// Configuration of one broker.
#[derive(Clone, Debug)]
pub struct Settings {
    pub id: BrokerId,
    /// Name of the cluster.
    pub cluster: String,
    /// Values of topic configuration keys that a topic does not set.
    pub topic_defaults: ConfigMap,
    /// Maximum bytes of unacknowledged writes.
    pub produce_memory_bytes: u64,
    /// Maximum bytes of requests until their batches have produce memory.
    pub request_memory_bytes: u64,
    /// Maximum bytes of responses until they have been sent.
    pub response_memory_bytes: u64,
    /// Maximum bytes of decompressed batches.
    pub decompression_memory_bytes: u64,
    /// Maximum number of new producers per connection and minute.
    pub producer_ids_per_minute: u32,
    /// Number of upload workers, and also of workers for all other maintenance. Each worker processes one partition at
    /// a time.
    pub maintenance_workers: usize,
    /// Interval at which retention checks every partition that holds records.
    pub retention_interval: Duration,
    /// Maximum time that a unary read waits for records that exist.
    pub fetch_max_wait: Duration,
    /// Age from which an object that no manifest references is deleted.
    pub garbage_grace: Duration,
    /// Age from which an unfinished multipart upload counts as abandoned.
    pub upload_grace: Duration,
    /// Replication factor of a topic whose creation request names none.
    pub default_factor: u32,
    /// Time after which an in-sync replica that has not caught up counts as lagging.
    pub max_lag_time: Duration,
    /// Rate limit for copying to replicas outside the ISR, in bytes per second; `None` means no limit.
    pub catchup_bytes_per_second: Option<u64>,
    /// Disk usage, in percent, above which this broker gets no new replicas.
    pub disk_pressure_percent: u64,
    /// Maximum time that a start waits for its replicas to be in sync.
    pub catch_up_timeout: Duration,
    /// Limits of the planner while this broker is the controller.
    pub controller: PlannerLimits,
}

/// The object store and the chunk cache in front of it.
#[derive(Clone)]
pub struct TierHandle {
    pub store: TierStore,
    /// Chunk cache shared by all partitions.
    pub cache: ChunkCache,
}

/// Dependencies of a broker.
pub struct BrokerDeps {
    pub settings: Settings,
    /// Data directory.
    pub log: DataDir,
    /// Metadata store.
    pub store: Arc<dyn MetaStore>,
    /// Keys of the cluster in the metadata store.
    pub keys: Keys,
    /// Metadata cache.
    pub metadata: MetadataCache,
    /// Object store; `None` for a broker without one.
    pub tier: Option<TierHandle>,
    /// Connector to other brokers.
    pub connect: Arc<dyn Connector>,
    /// True for a standalone broker, whose metadata lies beside its data.
    pub standalone: bool,
    /// Incarnation of this process, as it is or will be registered.
    pub incarnation: String,
    pub metrics: Metrics,
}

/// One running broker.
pub struct Broker {
    settings: Settings,
    log: DataDir,
    store: Arc<dyn MetaStore>,
    keys: Keys,
    metadata: MetadataCache,
    standalone: bool,
    /// Incarnation of this process, as it is registered.
    incarnation: String,
    /// Replication links and failure detection; `None` for a standalone broker.
    replication: Option<ReplicationManager>,
    topics: Topics,
    operations: ClusterOperations,
    updater: PartitionUpdater,
    isr_updates: Arc<IsrUpdateManager>,
    producer_ids: ProducerIds,
    tier: Option<TierHandle>,
    partitions: Arc<PartitionTable>,
    /// Partitions whose values were unreadable at the startup verification. Their replicas stay offline until the next
    /// start.
    unverified: OnceLock<BTreeSet<PartitionId>>,
    budgets: Budgets,
    produce_memory: Pools,
    /// Permits for appends that wait for the object store.
    tiered_appends: Arc<Semaphore>,
    /// Decompressor for all compressed batches; bounds their memory.
    decompressor: Decompressor,
    commits: TierCommits,
    maintenance: MaintenanceRunner,
    maintenance_queue: MaintenanceQueue,
    /// Partitions with segments to upload.
    upload_queue: MaintenanceQueue,
    maintenance_failures: maintenance::MaintenanceFailures,
    /// Log throttle, shared by all topics, for failed writes of topic records to the object store.
    failed_topic_records: Arc<Mutex<LogThrottle>>,
    metrics: Metrics,
    session: OnceLock<Session>,
    health: health::Health,
    /// True while the lease has expired: other brokers may lead the partitions that this broker leads.
    doubt: watch::Sender<bool>,
    /// Tasks of the partitions.
    partition_tasks: Tasks,
    /// Tasks of the broker itself.
    tasks: Tasks,
    /// Cancels the streams of clients.
    readers: Tasks,
    /// Time of activation.
    begun: OnceLock<tokio::time::Instant>,
    ready: AtomicBool,
    /// True during a controlled shutdown: the broker still serves requests, but reports that it is not ready.
    leaving: AtomicBool,
}

impl Broker {
    /// Returns the memory budgets of requests and responses.
    pub fn budgets(&self) -> &Budgets {
        &self.budgets
    }

    /// Returns the memory of a call that arrived on no connection.
    fn call_memory(&self) -> CallMemory {
        CallMemory::new(self.budgets.clone(), self.budgets.connection(|| {}))
    }

    /// Opens every replica that the metadata assigns to this broker and that is on disk. A standalone broker also
    /// creates missing replicas. All replicas stay idle until the broker is activated.
    pub async fn open(deps: BrokerDeps) -> Arc<Self> {
        let BrokerDeps { settings, log, store, keys, metadata, tier, connect, standalone, incarnation, metrics } = deps;
        let commits = TierCommits::new(Arc::clone(&store), keys.clone());
        let updater = PartitionUpdater::new(Arc::clone(&store), keys.clone());
        let partitions: Arc<PartitionTable> = Arc::default();
        let local = replication::LocalBroker {
            id: settings.id,
            cluster: settings.cluster.clone(),
            incarnation: incarnation.clone(),
            catchup_bytes_per_second: settings.catchup_bytes_per_second,
            metrics: metrics.clone(),
            claims: Arc::new(Claims::new(Arc::clone(&store), keys.clone())),
        };
        let broker = Arc::new_cyclic(|broker| Self {
            incarnation,
            replication: (!standalone).then(|| ReplicationManager::new(local, connect, broker)),
            operations: ClusterOperations::new(
                Arc::clone(&store),
                keys.clone(),
                metadata.clone(),
                settings.topic_defaults.clone(),
            ),
            topics: Topics::new(Arc::clone(&store), keys.clone(), metadata.clone(), settings.topic_defaults.clone()),
            producer_ids: ProducerIds::default(),
            budgets: Budgets::new(settings.request_memory_bytes, settings.response_memory_bytes),
            produce_memory: Pools::halves(settings.produce_memory_bytes),
            tiered_appends: Arc::new(Semaphore::new(limits::MAX_TIERED_APPENDS)),
            decompressor: Decompressor::new(settings.decompression_memory_bytes),
            maintenance: MaintenanceRunner::new(commits.clone()),
            commits,
            isr_updates: IsrUpdateManager::new(settings.id, keys.clone(), updater.clone(), Arc::clone(&partitions)),
            updater,
            partitions,
            unverified: OnceLock::new(),
            maintenance_queue: MaintenanceQueue::default(),
            upload_queue: MaintenanceQueue::default(),
            maintenance_failures: maintenance::MaintenanceFailures::default(),
            failed_topic_records: Arc::default(),
            partition_tasks: Tasks::new(),
            tasks: Tasks::new(),
            readers: Tasks::new(),
            session: OnceLock::new(),
            health: health::Health::default(),
            doubt: watch::Sender::new(false),
            begun: OnceLock::new(),
            ready: AtomicBool::new(false),
            leaving: AtomicBool::new(false),
            settings,
            log,
            store,
            keys,
            metadata,
            standalone,
            tier,
            metrics,
        });
        let state = broker.metadata.state();
        broker.reconcile(&state, &mut StrayCleaner::default()).await;
        broker
    }

    /// Returns the intact replicas. A replica whose topic value cannot be read is not hosted; that replica is opened
    /// only for this check.
    pub async fn intact_replicas(&self) -> BTreeSet<PartitionId> {
        let mut intact: BTreeSet<PartitionId> = self.partitions.open().iter().map(|partition| partition.id()).collect();
        let (state, me) = (self.metadata.state(), self.settings.id);
        let unhosted = self.log.partitions().into_iter().filter_map(|id| {
            let entry = state.entry(id).filter(|_| self.partitions.get(id).is_none())?;
            entry.partition.as_ref().filter(|stored| stored.value.replicas.contains(&me))?;
            let tier = entry.tier.as_ref().map(|stored| &stored.value);
            Some((id, tier.map_or(Offset::ZERO, |tier| tier.log_start.max(tier.tiered_end()))))
        });
        let (log, unhosted) = (self.log.clone(), unhosted.collect::<Vec<_>>());
        let is_intact = move |(id, committed): &(PartitionId, Offset)| {
            log.open_replica(*id, Offset::ZERO).is_ok_and(|replica| replica.log_end() >= *committed)
        };
        let found = move || unhosted.into_iter().filter(is_intact).map(|(id, _)| id).collect::<Vec<_>>();
        intact.extend(task::run_blocking(found).await);
        intact
    }

    /// Activates the broker: every replica is assigned its role, and requests are served.
    ///
    /// The metadata cache must contain the registration of `session`. An older state may name this broker as the leader
    /// of partitions that it has released since. Partitions in `unverified` stay offline.
    pub async fn activate(self: &Arc<Self>, session: &Session, unverified: BTreeSet<PartitionId>) {
        let state = self.metadata.state();
        self.begun.get_or_init(clock::monotonic);
        self.session.get_or_init(|| session.clone());
        let mut strays = StrayCleaner::default();
        self.unverified.get_or_init(|| unverified);
        strays.check_strays(self, &state).await;
        self.log.stray_partitions().into_iter().for_each(|id| strays.add(id));
        if let Some(replication) = &self.replication {
            replication.update_peers(&state);
            replication.track_own_registration(session, &self.tasks);
            self.isr_updates.spawn(&self.tasks);
            self.tasks.spawn("lag-ticker", lag_ticker::run(Arc::clone(self)));
            self.tasks.spawn("lease-monitor", lease_monitor::run(Arc::clone(self), session.clone()));
        }
        self.tasks.spawn("producer ids", producer_ids::keep(Arc::clone(self)));
        self.reconcile(&state, &mut strays).await;
        drop(state);
        self.ready.store(true, Ordering::Release);
        if let Some(replication) = &self.replication {
            replication.begin();
        }
        self.tasks.spawn("reconcile", reconciler::run(Arc::clone(self), strays));
        maintenance::spawn(self);
        garbage::spawn(self);
        self.tasks.spawn("start", health::watch_start(Arc::clone(self)));
        self.tasks.spawn("disk-pressure", disk_pressure::run(Arc::clone(self), session.clone()));
        if !self.standalone {
            let controller = Controller {
                store: Arc::clone(&self.store),
                keys: self.keys.clone(),
                metadata: self.metadata.clone(),
                session: session.clone(),
                id: self.settings.id,
                defaults: self.settings.topic_defaults.clone(),
                limits: self.settings.controller,
                metrics: self.metrics.clone(),
            };
            controller.spawn(&self.tasks);
        }
    }

    /// Stops everything in order, and returns when no task of the broker runs.
    pub async fn stop(&self) {
        self.ready.store(false, Ordering::Release);
        // Partitions end after the journal has completed their entries. From this call on, a full journal fails after a
        // bounded wait.
        self.log.begin_shutdown();
        self.readers.stop().await;
        self.tasks.stop().await;
        self.partition_tasks.stop().await;
        stream::iter(self.partitions.open())
            .for_each_concurrent(64, |partition| async move { partition.stop().await })
            .await;
        if let Some(replication) = &self.replication {
            replication.stop().await;
        }
    }

    /// Returns the current metadata snapshot, for the simulator's checker.
    #[cfg(feature = "sim")]
    pub fn mirror(&self) -> Arc<crate::cluster::MetadataSnapshot> {
        self.metadata.state()
    }

    pub fn id(&self) -> BrokerId {
        self.settings.id
    }

    /// Waits until the metadata cache contains at least this number of registered brokers.
    pub async fn wait_for_brokers(&self, brokers: usize) {
        self.metadata.wait_until(|state| state.brokers().len() >= brokers).await;
    }

    /// Returns the number of open partitions.
    pub fn partitions(&self) -> usize {
        self.partitions.open().len()
    }

    /// Returns the number of records that are due for the object store and not there yet.
    fn tier_lag(&self, partition: &Partition) -> u64 {
        if !partition.config().tiered || !self.has_object_store() {
            return 0;
        }
        let watermarks = partition.watermarks();
        watermarks.log_end.since(watermarks.tiered_end.max(watermarks.log_start))
    }

    fn has_object_store(&self) -> bool {
        self.tier.is_some()
    }

    /// Returns the outage of the object store, if there is one.
    fn store_outage(&self) -> Option<Outage> {
        self.tier.as_ref()?.store.away()
    }

    /// Waits until the object store is unavailable.
    async fn until_store_outage(&self) -> Outage {
        match &self.tier {
            Some(tier) => tier.store.until_away().await,
            None => std::future::pending().await,
        }
    }

    /// Returns true once replicas receive their assignments.
    fn is_active(&self) -> bool {
        self.begun.get().is_some()
    }

    /// Returns true if this broker does the work that one broker does for the cluster: it is standalone, or the
    /// controller.
    fn is_controller(&self) -> bool {
        self.standalone || self.metadata.state().controller() == Some(self.settings.id)
    }

    /// Returns the context through which partitions reach other brokers.
    fn ctx(&self) -> PartitionContext {
        let counters = PartitionCounters::of(&self.metrics);
        match &self.replication {
            None => PartitionContext { counters, ..PartitionContext::standalone() },
            Some(replication) => PartitionContext {
                links: replication.links(),
                isr_updater: Arc::clone(&self.isr_updates) as _,
                counters,
            },
        }
    }

    /// Begins the controlled shutdown: from now on the broker reports that it is not ready.
    fn begin_shutdown(&self) {
        self.leaving.store(true, Ordering::Release);
    }

    fn is_stopping(&self) -> bool {
        !self.ready.load(Ordering::Acquire)
    }

    /// Resolves when the streams of clients must end.
    async fn stopping(&self) {
        self.readers.cancelled().await;
    }
}
