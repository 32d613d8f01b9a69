//! This node: the partitions it holds, and one file per family of requests.
//!
//! # Overview
//!
//! Every request does the same steps: validate, find the partition (or refuse with who serves it), serve. `service` is
//! the gRPC face; `produce`, `fetch`, `offsets`, `admin`, `describe` and `cluster_admin` serve; `lookup` finds, `figures` asks other
//! brokers; `faults` maps every error once. `reconcile` follows the cluster's metadata and opens, configures and closes partitions,
//! and `leftovers` deletes what is nobody's here any more; `upkeep` gives partitions their turn at sealing, uploading and deleting;
//! `garbage` takes away what crashes and deletions left in the bucket and in the metadata.
//!
//! Among several brokers `following` and `peer` are the links over which replicas follow, `evidence` says what a lost one means,
//! `agree` carries what leaders propose to the metadata store, `lag` tells them the time, and one of the brokers is the
//! controller (`cluster::Controller`), which alone collects garbage.
//!
//! # Start
//!
//! [`Broker::open`] opens what the disk holds and does nothing with it. What came up whole is shown to the others ([`Broker::whole`]).
//! [`Broker::begin`], once the broker is registered and its mirror shows that, tells every replica its place and serves.
//!
//! # Shutdown
//!
//! Among several brokers first [`Broker::hand_over`]: others lead what is led here, while requests are served.
//! [`Broker::stop`]: refuse new writes, end the fetch streams, let the partitions answer what is written, end upkeep. What it
//! owns (log, metadata store) is closed by `server` after it.

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
    /// Bytes that requests may take until their batches wait for an acknowledgement.
    pub request_memory_bytes: u64,
    /// Bytes that responses may take until they have been sent.
    pub response_memory_bytes: u64,
    /// Bytes that opened batches may take.
    pub decompression_memory_bytes: u64,
    /// New producers of one connection in a minute.
    pub producer_ids_per_minute: u32,
    /// Partitions that may upload at the same moment; as many others may have the rest of their upkeep.
    pub upkeep_workers: usize,
    /// How often retention looks at every partition that holds records.
    pub retention_interval: Duration,
    /// How long a single read waits for records that exist.
    pub fetch_max_wait: Duration,
    /// How long an object that no manifest names is kept.
    pub garbage_grace: Duration,
    /// How long a multipart upload may take before it counts as abandoned.
    pub upload_grace: Duration,
    /// Replicas of a partition of a topic whose creation does not say.
    pub default_factor: u32,
    /// How long a member of the in-sync replicas may take to catch up.
    pub lag_time: Duration,
    /// How fast replicas that are not in sync copy from this broker, in bytes per second; `None`: as fast as they can.
    pub catchup_bytes_per_second: Option<u64>,
    /// How full the disk is, in percent, when this broker is given no new replicas.
    pub disk_full_percent: u64,
    /// How long a start may last because replicas are not in sync yet.
    pub catch_up_timeout: Duration,
    /// How much this broker moves at the same time when it is the controller.
    pub controller: Limits,
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
    /// How other brokers are reached.
    pub connect: Arc<dyn Connect>,
    /// Whether there are no other brokers: the metadata lies beside the data.
    pub alone: bool,
    /// This uptime, as it is or will be registered.
    pub incarnation: String,
    /// Figures.
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
    /// This uptime, as it is registered.
    incarnation: String,
    /// Links and evidence, where there are other brokers.
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
    /// Places of appends that wait for the object store.
    tiered_appends: Arc<Semaphore>,
    /// Who opens compressed batches goes through it.
    opener: Opener,
    commits: TierCommits,
    upkeep: Upkeep,
    upkeep_queue: UpkeepQueue,
    /// Partitions with something to upload.
    upload_queue: UpkeepQueue,
    upkeep_failures: upkeep::Failures,
    /// Of all topics: their records could not be written to the object store.
    failed_topic_records: Arc<Mutex<LogThrottle>>,
    metrics: Metrics,
    session: OnceLock<Session>,
    health: health::Health,
    /// Whether others may lead by now what this broker leads.
    doubt: watch::Sender<bool>,
    /// Partitions' tasks.
    partitions: Tasks,
    /// The broker's own.
    tasks: Tasks,
    /// Ends the streams of readers.
    readers: Tasks,
    /// Since when it takes part.
    begun: OnceLock<tokio::time::Instant>,
    ready: AtomicBool,
    /// Others are asked to take over: it serves, and nobody new should come.
    leaving: AtomicBool,
}

impl Broker {
    /// What requests and responses take their memory from.
    pub fn budgets(&self) -> &Budgets {
        &self.budgets
    }

    /// The memory of a call that came by no connection.
    fn call_memory(&self) -> CallMemory {
        CallMemory::new(self.budgets.clone(), self.budgets.connection(|| {}))
    }

    /// Opens every replica that the metadata gives this broker and its disk holds. Nothing is done with them yet.
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

    /// The replicas that came up whole. Those of a topic that cannot be read, which are not held, are opened for this answer alone.
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

    /// Takes part: every replica is told its place, and requests are served. The mirror must show the registration of `session`: what it
    /// showed before may name this broker for what it has given up since. What is `unread` it takes part in when that is proven.
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

    /// Stops in order; returns when nothing of it runs.
    pub async fn stop(&self) {
        self.ready.store(false, Ordering::Release);
        // Partitions end when the journal has answered them, which a disk must not keep from happening.
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

    /// Its mirror of the metadata, for the simulator's judge.
    #[cfg(feature = "sim")]
    pub fn mirror(&self) -> Arc<crate::cluster::ViewState> {
        self.view.state()
    }

    /// Its number.
    pub fn id(&self) -> BrokerId {
        self.settings.id
    }

    /// Waits until it knows of so many brokers that are alive.
    pub async fn meets(&self, brokers: usize) {
        self.view.until(|state| state.brokers().len() >= brokers).await;
    }

    /// How many partitions it serves.
    pub fn partitions(&self) -> usize {
        self.hosted.open().len()
    }

    /// Records of a partition that are not in the bucket yet and are to go there.
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

    /// The outage of the object store, while it is away.
    fn store_away(&self) -> Option<Outage> {
        self.tier.as_ref()?.store.away()
    }

    /// Waits until the object store is away.
    async fn until_store_away(&self) -> Outage {
        match &self.tier {
            Some(tier) => tier.store.until_away().await,
            None => std::future::pending().await,
        }
    }

    /// Whether replicas are told their places.
    fn takes_part(&self) -> bool {
        self.begun.get().is_some()
    }

    /// Whether it is this broker that does what one of them does for all.
    fn is_controller(&self) -> bool {
        self.alone || self.view.state().controller() == Some(self.settings.id)
    }

    /// Where its partitions' tasks reach others.
    fn around(&self) -> Surroundings {
        let counts = Counts::of(&self.metrics);
        match &self.others {
            None => Surroundings { counts, ..Surroundings::alone() },
            Some(others) => Surroundings { links: others.links(), agreement: Arc::clone(&self.agree) as _, counts },
        }
    }

    /// From now on nobody new should come.
    fn leave(&self) {
        self.leaving.store(true, Ordering::Release);
    }

    fn is_stopping(&self) -> bool {
        !self.ready.load(Ordering::Acquire)
    }

    /// Resolves when readers' streams must end.
    async fn stopping(&self) {
        self.readers.cancelled().await;
    }
}
