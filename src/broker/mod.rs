//! One broker: the partitions that it hosts, and one file per family of requests.
//!
//! # Overview
//!
//! Every request takes the same steps: validate, look up the partition (or reject with the leader), serve.
//!
//! | files | content |
//! | --- | --- |
//! | `service` | gRPC services |
//! | `produce`, `fetch`, `offsets`, `admin`, `describe`, `cluster_admin` | request handlers |
//! | `lookup`, `figures` | partition lookup; requests to other brokers |
//! | `faults` | the one mapping from errors to responses |
//! | `reconcile`, `leftovers` | opening, configuring and closing partitions by the metadata; deleting stray replicas |
//! | `upkeep`, `garbage` | maintenance (rolling, uploading, deleting); garbage of crashes and deletions in object store and metadata |
//! | `following`, `peer` | replication links between brokers |
//! | `evidence` | failure detection after a lost link |
//! | `agree` | ISR proposals of leaders to the metadata store |
//! | `lag` | clock ticks for leaders |
//!
//! The controller (`cluster::Controller`) runs on one broker of the cluster. Garbage is collected only there, or on a standalone broker.
//!
//! # Start
//!
//! [`Broker::open`] opens the replicas on disk and leaves them idle. [`Broker::whole`] returns the intact ones for the startup
//! verification. [`Broker::begin`] assigns every replica its role and serves requests. The broker is registered by then, and its metadata
//! cache contains the registration.
//!
//! # Shutdown
//!
//! A broker of a cluster first calls [`Broker::hand_over`], which transfers leadership while requests are still served. [`Broker::stop`]
//! refuses new writes, ends the fetch streams, completes the queued writes and ends maintenance. `server` closes the log and the metadata
//! store after that.

mod admin;
mod agree;
mod budget;
mod claims;
mod cluster_admin;
mod describe;
mod doubt;
mod evidence;
mod faults;
mod fetch;
mod figures;
mod fill;
mod following;
mod garbage;
mod handover;
mod health;
mod hosted;
mod lag;
mod leftovers;
mod lookup;
mod metadata;
mod metrics;
mod offsets;
mod others;
mod peer;
mod produce;
mod producer_ids;
mod rebuild;
mod reconcile;
mod service;
#[cfg(test)]
mod tests;
mod unproven;
mod upkeep;

use std::{
    collections::BTreeSet,
    sync::{
        Arc, Mutex, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use futures::{StreamExt as _, stream};
use tokio::sync::{Semaphore, watch};

use self::{
    agree::Agree, budget::Pools, claims::Claims, hosted::Hosted, leftovers::Leftovers, others::Others,
    producer_ids::ProducerIds, unproven::Unproven,
};
pub use self::{
    budget::{
        Budgets, CallMemory, ConnectionMemory, Grant, HandedResponse, IncompleteGuard, SMALL_BYTES, WAITING_BYTES,
    },
    fill::starts_full,
    health::Readiness,
    producer_ids::ProducerIdQuota,
    service::{LogService, Requests, admin_service, peer_service},
};
use crate::{
    client::Connect,
    cluster::{
        Controller, Keys, MetaStore, Orders, PartitionChanges, Session, TierCommits, Topics, Unread, View,
        planner::Limits,
    },
    limits,
    log::Log,
    model::{BrokerId, ConfigMap, Offset, PartitionId},
    partition::{Counts, Opener, Partition, Surroundings, Upkeep, UpkeepQueue},
    task::{self, Tasks, clock},
    telemetry::{LogThrottle, Metrics},
    tier::{Cache, Outage, Store},
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
    /// Number of upload workers, and also of workers for all other maintenance. Each worker processes one partition at a time.
    pub upkeep_workers: usize,
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
    pub lag_time: Duration,
    /// Rate limit for copying to replicas outside the ISR, in bytes per second; `None` means no limit.
    pub catchup_bytes_per_second: Option<u64>,
    /// Disk usage, in percent, above which this broker gets no new replicas.
    pub disk_full_percent: u64,
    /// Maximum time that a start waits for its replicas to be in sync.
    pub catch_up_timeout: Duration,
    /// Limits of the planner while this broker is the controller.
    pub controller: Limits,
}

/// The object store and the chunk cache in front of it.
#[derive(Clone)]
pub struct Tier {
    pub store: Store,
    /// Chunk cache shared by all partitions.
    pub cache: Cache,
}

/// Dependencies of a broker.
pub struct Parts {
    pub settings: Settings,
    /// Data directory.
    pub log: Log,
    /// Metadata store.
    pub store: Arc<dyn MetaStore>,
    /// Keys of the cluster in the metadata store.
    pub keys: Keys,
    /// Metadata cache.
    pub view: View,
    /// Object store; `None` for a broker without one.
    pub tier: Option<Tier>,
    /// Connector to other brokers.
    pub connect: Arc<dyn Connect>,
    /// True for a standalone broker, whose metadata lies beside its data.
    pub alone: bool,
    /// Incarnation of this process, as it is or will be registered.
    pub incarnation: String,
    pub metrics: Metrics,
}

/// One running broker.
pub struct Broker {
    settings: Settings,
    log: Log,
    store: Arc<dyn MetaStore>,
    keys: Keys,
    view: View,
    alone: bool,
    /// Incarnation of this process, as it is registered.
    incarnation: String,
    /// Replication links and failure detection; `None` for a standalone broker.
    others: Option<Others>,
    topics: Topics,
    orders: Orders,
    changes: PartitionChanges,
    agree: Arc<Agree>,
    producer_ids: ProducerIds,
    tier: Option<Tier>,
    hosted: Arc<Hosted>,
    unproven: Unproven,
    budgets: Budgets,
    produce_memory: Pools,
    /// Permits for appends that wait for the object store.
    tiered_appends: Arc<Semaphore>,
    /// Decompressor for all compressed batches; bounds their memory.
    opener: Opener,
    commits: TierCommits,
    upkeep: Upkeep,
    upkeep_queue: UpkeepQueue,
    /// Partitions with segments to upload.
    upload_queue: UpkeepQueue,
    upkeep_failures: upkeep::Failures,
    /// Log throttle, shared by all topics, for failed writes of topic records to the object store.
    failed_topic_records: Arc<Mutex<LogThrottle>>,
    metrics: Metrics,
    session: OnceLock<Session>,
    health: health::Health,
    /// True while the lease has expired: other brokers may lead the partitions that this broker leads.
    doubt: watch::Sender<bool>,
    /// Tasks of the partitions.
    partitions: Tasks,
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

    /// Opens every replica that the metadata assigns to this broker and that is on disk. A standalone broker also creates missing replicas.
    /// All replicas stay idle until the broker is activated.
    pub async fn open(parts: Parts) -> Arc<Self> {
        let Parts { settings, log, store, keys, view, tier, connect, alone, incarnation, metrics } = parts;
        let commits = TierCommits::new(Arc::clone(&store), keys.clone());
        let changes = PartitionChanges::new(Arc::clone(&store), keys.clone());
        let hosted: Arc<Hosted> = Arc::default();
        let known = others::Known {
            id: settings.id,
            cluster: settings.cluster.clone(),
            incarnation: incarnation.clone(),
            catchup_bytes_per_second: settings.catchup_bytes_per_second,
            metrics: metrics.clone(),
            claims: Arc::new(Claims::new(Arc::clone(&store), keys.clone())),
        };
        let broker = Arc::new_cyclic(|broker| Self {
            incarnation,
            others: (!alone).then(|| Others::new(known, connect, broker)),
            orders: Orders::new(Arc::clone(&store), keys.clone(), view.clone(), settings.topic_defaults.clone()),
            topics: Topics::new(Arc::clone(&store), keys.clone(), view.clone(), settings.topic_defaults.clone()),
            producer_ids: ProducerIds::default(),
            budgets: Budgets::new(settings.request_memory_bytes, settings.response_memory_bytes),
            produce_memory: Pools::halves(settings.produce_memory_bytes),
            tiered_appends: Arc::new(Semaphore::new(limits::MAX_TIERED_APPENDS)),
            opener: Opener::new(settings.decompression_memory_bytes),
            upkeep: Upkeep::new(commits.clone()),
            commits,
            agree: Agree::new(settings.id, keys.clone(), changes.clone(), Arc::clone(&hosted)),
            changes,
            hosted,
            unproven: Unproven::default(),
            upkeep_queue: UpkeepQueue::default(),
            upload_queue: UpkeepQueue::default(),
            upkeep_failures: upkeep::Failures::default(),
            failed_topic_records: Arc::default(),
            partitions: Tasks::new(),
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
            view,
            alone,
            tier,
            metrics,
        });
        let state = broker.view.state();
        broker.reconcile(&state, &mut Leftovers::default()).await;
        broker
    }

    /// Returns the intact replicas. A replica whose topic value cannot be read is not hosted; that replica is opened only for this check.
    pub async fn whole(&self) -> BTreeSet<PartitionId> {
        let mut whole: BTreeSet<PartitionId> = self.hosted.open().iter().map(|partition| partition.id()).collect();
        let (state, me) = (self.view.state(), self.settings.id);
        let aside = self.log.partitions().into_iter().filter_map(|id| {
            let entry = state.entry(id).filter(|_| self.hosted.held(id).is_none())?;
            entry.partition.as_ref().filter(|known| known.value.replicas.contains(&me))?;
            let tier = entry.tier.as_ref().map(|known| &known.value);
            Some((id, tier.map_or(Offset::ZERO, |tier| tier.log_start.max(tier.bucket_end()))))
        });
        let (log, aside) = (self.log.clone(), aside.collect::<Vec<_>>());
        let is_whole = move |(id, committed): &(PartitionId, Offset)| {
            log.open_replica(*id, Offset::ZERO).is_ok_and(|replica| replica.log_end() >= *committed)
        };
        whole.extend(
            task::run_blocking(move || aside.into_iter().filter(is_whole).map(|(id, _)| id).collect::<Vec<_>>()).await,
        );
        whole
    }

    /// Activates the broker: every replica is assigned its role, and requests are served.
    ///
    /// The metadata cache must contain the registration of `session`. An older state may name this broker as the leader of partitions that
    /// it has released since. Partitions in `unread` become active after their verification.
    pub async fn begin(self: &Arc<Self>, session: &Session, unread: Unread) {
        let state = self.view.state();
        self.begun.get_or_init(clock::monotonic);
        self.session.get_or_init(|| session.clone());
        let mut leftovers = Leftovers::default();
        self.unproven.take(unread);
        leftovers.see_to_strays(self, &state).await;
        self.log.unclaimed().into_iter().for_each(|id| leftovers.add(id));
        if let Some(others) = &self.others {
            others.know(&state);
            others.follow(session, &self.tasks);
            self.agree.spawn(&self.tasks);
            self.tasks.spawn("lag", lag::run(Arc::clone(self)));
            self.tasks.spawn("doubt", doubt::run(Arc::clone(self), session.clone()));
        }
        self.tasks.spawn("producer ids", producer_ids::keep(Arc::clone(self)));
        self.reconcile(&state, &mut leftovers).await;
        drop(state);
        self.ready.store(true, Ordering::Release);
        if let Some(others) = &self.others {
            others.begin();
        }
        self.tasks.spawn("reconcile", reconcile::follow(Arc::clone(self), leftovers));
        upkeep::spawn(self);
        garbage::spawn(self);
        self.tasks.spawn("start", health::watch_start(Arc::clone(self)));
        self.tasks.spawn("fill", fill::run(Arc::clone(self), session.clone()));
        if !self.alone {
            let controller = Controller {
                store: Arc::clone(&self.store),
                keys: self.keys.clone(),
                view: self.view.clone(),
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
        // Partitions end after the journal has completed their entries. From this call on, a full journal fails after a bounded wait.
        self.log.expect_close();
        self.readers.stop().await;
        self.tasks.stop().await;
        self.partitions.stop().await;
        stream::iter(self.hosted.open())
            .for_each_concurrent(64, |partition| async move { partition.stop().await })
            .await;
        if let Some(others) = &self.others {
            others.stop().await;
        }
    }

    /// Returns the current metadata snapshot, for the simulator's checker.
    #[cfg(feature = "sim")]
    pub fn mirror(&self) -> Arc<crate::cluster::ViewState> {
        self.view.state()
    }

    pub fn id(&self) -> BrokerId {
        self.settings.id
    }

    /// Waits until the metadata cache contains at least this number of registered brokers.
    pub async fn meets(&self, brokers: usize) {
        self.view.until(|state| state.brokers().len() >= brokers).await;
    }

    /// Returns the number of open partitions.
    pub fn partitions(&self) -> usize {
        self.hosted.open().len()
    }

    /// Returns the number of records that are due for the object store and not there yet.
    fn tier_lag(&self, partition: &Partition) -> u64 {
        if !partition.config().tiered || !self.has_object_store() {
            return 0;
        }
        let marks = partition.marks();
        marks.log_end.since(marks.tiered_end.max(marks.log_start))
    }

    fn has_object_store(&self) -> bool {
        self.tier.is_some()
    }

    /// Returns the outage of the object store, if there is one.
    fn store_away(&self) -> Option<Outage> {
        self.tier.as_ref()?.store.away()
    }

    /// Waits until the object store is unavailable.
    async fn until_store_away(&self) -> Outage {
        match &self.tier {
            Some(tier) => tier.store.until_away().await,
            None => std::future::pending().await,
        }
    }

    /// Returns true once replicas receive their assignments.
    fn takes_part(&self) -> bool {
        self.begun.get().is_some()
    }

    /// Returns true if this broker does the work that one broker does for the cluster: it is standalone, or the controller.
    fn is_controller(&self) -> bool {
        self.alone || self.view.state().controller() == Some(self.settings.id)
    }

    /// Returns the context through which partitions reach other brokers.
    fn around(&self) -> Surroundings {
        let counts = Counts::of(&self.metrics);
        match &self.others {
            None => Surroundings { counts, ..Surroundings::alone() },
            Some(others) => Surroundings { links: others.links(), agreement: Arc::clone(&self.agree) as _, counts },
        }
    }

    /// Begins the controlled shutdown: from now on the broker reports that it is not ready.
    fn leave(&self) {
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
