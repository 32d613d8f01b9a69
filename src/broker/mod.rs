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
mod node_context;
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
    node_context::{NodeContext, TierHandle},
    producer_ids::ProducerIdQuota,
    service::{LogService, Requests, admin_service, peer_service},
};
use crate::{
    client::Connector,
    cluster::{ClusterOperations, Controller, PartitionUpdater, Session, TierCommits, Topics, planner::PlannerLimits},
    config::ControllerConfig,
    limits,
    model::{BrokerId, Offset, PartitionId},
    partition::{Decompressor, MaintenanceQueue, MaintenanceRunner, Partition, PartitionContext, PartitionCounters},
    task::{self, Tasks, clock},
    telemetry::LogThrottle,
    tier::Outage,
};

/// One running broker.
pub struct Broker {
    ctx: NodeContext,
    /// Replication links and failure detection; `None` for a standalone broker.
    replication: Option<ReplicationManager>,
    topics: Topics,
    operations: ClusterOperations,
    updater: PartitionUpdater,
    isr_updates: Arc<IsrUpdateManager>,
    producer_ids: ProducerIds,
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
    session: OnceLock<Session>,
    health: health::Health,
    /// True while the lease has expired: other brokers may lead the partitions that this broker leads.
    doubt: watch::Sender<bool>,
    /// Tasks of the partitions.
    partition_tasks: Tasks,
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
    pub async fn open(ctx: NodeContext, connect: Arc<dyn Connector>) -> Arc<Self> {
        let NodeContext { store, keys, config, .. } = &ctx.clone();
        let commits = TierCommits::new(Arc::clone(store), keys.clone());
        let updater = PartitionUpdater::new(Arc::clone(store), keys.clone());
        let partitions: Arc<PartitionTable> = Arc::default();
        let local = replication::LocalBroker {
            id: ctx.id,
            cluster: config.cluster.clone(),
            incarnation: ctx.incarnation.to_string(),
            catchup_bytes_per_second: config.replication.catchup_bytes_per_second,
            metrics: ctx.metrics.clone(),
            claims: Arc::new(Claims::new(Arc::clone(store), keys.clone())),
        };
        let broker = Arc::new_cyclic(|broker| Self {
            replication: (!ctx.standalone).then(|| ReplicationManager::new(local, connect, broker)),
            operations: ClusterOperations::new(
                Arc::clone(store),
                keys.clone(),
                ctx.metadata.clone(),
                config.topic_defaults.clone(),
            ),
            topics: Topics::new(Arc::clone(store), keys.clone(), ctx.metadata.clone(), config.topic_defaults.clone()),
            producer_ids: ProducerIds::default(),
            budgets: Budgets::new(config.limits.request_memory_bytes, config.limits.response_memory_bytes),
            produce_memory: Pools::halves(config.limits.produce_memory_bytes),
            tiered_appends: Arc::new(Semaphore::new(limits::MAX_TIERED_APPENDS)),
            decompressor: Decompressor::new(config.limits.decompression_memory_bytes),
            maintenance: MaintenanceRunner::new(commits.clone()),
            commits,
            isr_updates: IsrUpdateManager::new(ctx.id, keys.clone(), updater.clone(), Arc::clone(&partitions)),
            updater,
            partitions,
            unverified: OnceLock::new(),
            maintenance_queue: MaintenanceQueue::default(),
            upload_queue: MaintenanceQueue::default(),
            maintenance_failures: maintenance::MaintenanceFailures::default(),
            failed_topic_records: Arc::default(),
            partition_tasks: Tasks::new(),
            readers: Tasks::new(),
            session: OnceLock::new(),
            health: health::Health::default(),
            doubt: watch::Sender::new(false),
            begun: OnceLock::new(),
            ready: AtomicBool::new(false),
            leaving: AtomicBool::new(false),
            ctx,
        });
        let state = broker.ctx.metadata.state();
        broker.reconcile(&state, &mut StrayCleaner::default()).await;
        broker
    }

    /// Returns the intact replicas. A replica whose topic value cannot be read is not hosted; that replica is opened
    /// only for this check.
    pub async fn intact_replicas(&self) -> BTreeSet<PartitionId> {
        let mut intact: BTreeSet<PartitionId> = self.partitions.open().iter().map(|partition| partition.id()).collect();
        let (state, me) = (self.ctx.metadata.state(), self.ctx.id);
        let unhosted = self.ctx.log.partitions().into_iter().filter_map(|id| {
            let entry = state.entry(id).filter(|_| self.partitions.get(id).is_none())?;
            entry.partition.as_ref().filter(|stored| stored.value.replicas.contains(&me))?;
            let tier = entry.tier.as_ref().map(|stored| &stored.value);
            Some((id, tier.map_or(Offset::ZERO, |tier| tier.log_start.max(tier.tiered_end()))))
        });
        let (log, unhosted) = (self.ctx.log.clone(), unhosted.collect::<Vec<_>>());
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
        let state = self.ctx.metadata.state();
        self.begun.get_or_init(clock::monotonic);
        self.session.get_or_init(|| session.clone());
        let mut strays = StrayCleaner::default();
        self.unverified.get_or_init(|| unverified);
        strays.check_strays(self, &state).await;
        self.ctx.log.stray_partitions().into_iter().for_each(|id| strays.add(id));
        if let Some(replication) = &self.replication {
            replication.update_peers(&state);
            replication.track_own_registration(session, &self.ctx.tasks);
            self.isr_updates.spawn(&self.ctx.tasks);
            self.ctx.tasks.spawn("lag-ticker", lag_ticker::run(Arc::clone(self)));
            self.ctx.tasks.spawn("lease-monitor", lease_monitor::run(Arc::clone(self), session.clone()));
        }
        self.ctx.tasks.spawn("producer ids", producer_ids::keep(Arc::clone(self)));
        self.reconcile(&state, &mut strays).await;
        drop(state);
        self.ready.store(true, Ordering::Release);
        if let Some(replication) = &self.replication {
            replication.begin();
        }
        self.ctx.tasks.spawn("reconcile", reconciler::run(Arc::clone(self), strays));
        maintenance::spawn(self);
        garbage::spawn(self);
        self.ctx.tasks.spawn("start", health::watch_start(Arc::clone(self)));
        self.ctx.tasks.spawn("disk-pressure", disk_pressure::run(Arc::clone(self), session.clone()));
        if !self.ctx.standalone {
            let controller = Controller {
                store: Arc::clone(&self.ctx.store),
                keys: self.ctx.keys.clone(),
                metadata: self.ctx.metadata.clone(),
                session: session.clone(),
                id: self.ctx.id,
                defaults: self.ctx.config.topic_defaults.clone(),
                limits: planner_limits(&self.ctx.config.controller),
                metrics: self.ctx.metrics.clone(),
            };
            controller.spawn(&self.ctx.tasks);
        }
    }

    /// Stops everything in order, and returns when no task of the broker runs.
    pub async fn stop(&self) {
        self.ready.store(false, Ordering::Release);
        // Partitions end after the journal has completed their entries. From this call on, a full journal fails after a
        // bounded wait.
        self.ctx.log.begin_shutdown();
        self.readers.stop().await;
        self.ctx.tasks.stop().await;
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
        self.ctx.metadata.state()
    }

    pub fn id(&self) -> BrokerId {
        self.ctx.id
    }

    /// Waits until the metadata cache contains at least this number of registered brokers.
    pub async fn wait_for_brokers(&self, brokers: usize) {
        self.ctx.metadata.wait_until(|state| state.brokers().len() >= brokers).await;
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
        self.ctx.tier.is_some()
    }

    /// Returns the outage of the object store, if there is one.
    fn store_outage(&self) -> Option<Outage> {
        self.ctx.tier.as_ref()?.store.away()
    }

    /// Waits until the object store is unavailable.
    async fn until_store_outage(&self) -> Outage {
        match &self.ctx.tier {
            Some(tier) => tier.store.until_away().await,
            None => std::future::pending().await,
        }
    }

    /// Returns true once replicas receive their assignments.
    fn is_active(&self) -> bool {
        self.begun.get().is_some()
    }

    /// Returns the context through which partitions reach other brokers.
    fn ctx(&self) -> PartitionContext {
        let counters = PartitionCounters::of(&self.ctx.metrics);
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

fn planner_limits(config: &ControllerConfig) -> PlannerLimits {
    PlannerLimits {
        moves: config.max_concurrent_reassignments,
        replace_after_ms: config.replace_after.map(|time| u64::try_from(time.as_millis()).unwrap_or(u64::MAX)),
        balance: config.balance,
        ..PlannerLimits::default()
    }
}
