//! One broker: the partitions that it hosts, the requests that it serves, and its background tasks.
//!
//! # Overview
//!
//! [`Broker`] composes parts, and each part gets only the values that it needs. Of these parts, each imports only the
//! parts to its right:
//!
//! ```text
//!   api ─▶ background ─▶ replication ─▶ partitions ─▶ node_context
//! ```
//!
//! | folder or file | content |
//! | --- | --- |
//! | `api` | requests of clients and operators, the gRPC services, the mapping from errors to responses |
//! | `background` | maintenance, garbage collection, producer ids, lease, disk, shutdown, metrics |
//! | `replication` | links between brokers, failure detection, ISR updates, requests to peers |
//! | `partitions` | the partition table, its only writer (the reconciler), and the look-ups |
//! | `health` | readiness and impairments |
//! | `budget` | memory of requests and responses in progress |
//! | `token_bucket` | rate limits |
//! | `node_context` | configuration, stores and tasks that all parts share |
//!
//! Every broker of a cluster runs a `cluster::Controller`, and one broker at a time holds the controller key. Only that
//! broker, or a standalone broker, collects garbage.
//!
//! # Start
//!
//! 1. [`OpenedBroker::open`] opens the replicas on disk and leaves them idle. Peers can identify the process.
//! 2. [`OpenedBroker::intact_replicas`] returns the intact replicas for the startup verification.
//! 3. [`OpenedBroker::activate`] assigns every replica its role and returns the serving [`Broker`]. The broker is
//!    registered by then, and its metadata cache contains the registration.
//!
//! # Shutdown
//!
//! A broker of a cluster first calls [`Broker::transfer_leadership`], which transfers leadership while requests are
//! still served. [`Broker::stop`] ends the streams of clients, the tasks, the partitions and the links, in this order:
//! partitions unsubscribe over the links. After the stop, `server` closes the log and the metadata store.

mod api;
mod background;
mod budget;
mod health;
mod node_context;
mod partitions;
mod replication;
#[cfg(test)]
mod tests;
mod token_bucket;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use self::{
    api::Api,
    background::Background,
    budget::Pools,
    health::Health,
    partitions::{
        maintenance_failures::MaintenanceFailures,
        reconciler::{PeersUpdate, Reconciler},
        stray_cleaner::StrayCleaner,
        table::PartitionTable,
    },
    replication::{BrokerStatsSource, PeerService, ReplicationManager, peer_status::PeerStatus},
};
pub use self::{
    api::{AdminService, LogService, Requests},
    background::{producer_ids::ProducerIdQuota, starts_under_pressure},
    budget::{
        Budgets, CallMemory, ConnectionMemory, Grant, IncompleteGuard, SMALL_BYTES, SendingResponse, WAITING_BYTES,
    },
    health::Readiness,
    node_context::{NodeContext, TierHandle},
};
use crate::{
    client::Connector,
    cluster::{Revision, Session, TierCommits, Topics},
    model::{BrokerId, Offset, PartitionId},
    partition::{MaintenanceQueue, PartitionContext, PartitionCounters},
    proto::v1::{admin_server::AdminServer, peer_server::PeerServer},
    task,
};

/// State that requests and background tasks share. Cheap to clone.
#[derive(Clone)]
struct SharedState {
    partitions: Arc<PartitionTable>,
    failures: Arc<MaintenanceFailures>,
    health: Arc<Health>,
    topics: Topics,
    budgets: Budgets,
    produce_memory: Pools,
    /// Writer of tier commits. All clones share one flag for a metadata store without space.
    commits: TierCommits,
}

/// A broker before its activation: its replicas are open and idle.
pub struct OpenedBroker {
    ctx: NodeContext,
    shared: SharedState,
    reconciler: Reconciler,
    queue: MaintenanceQueue,
    stats: BrokerStatsSource,
    replication: Option<Arc<ReplicationManager>>,
}

impl OpenedBroker {
    /// Opens every replica that the metadata assigns to this broker and that has files on disk. A standalone broker
    /// also creates replicas without files. All replicas stay idle until the broker is activated.
    pub async fn open(ctx: NodeContext, connect: Arc<dyn Connector>) -> Self {
        let (partitions, failures): (Arc<PartitionTable>, Arc<MaintenanceFailures>) = Default::default();
        let health = Arc::new(Health::new(ctx.clone(), Arc::clone(&partitions), Arc::clone(&failures)));
        let stats_health = Arc::clone(&health);
        let stats: BrokerStatsSource = Arc::new(move || stats_health.stats());
        let replication = (!ctx.standalone)
            .then(|| Arc::new(ReplicationManager::new(&ctx, connect, &partitions, Arc::clone(&stats))));
        let counters = PartitionCounters::of(&ctx.metrics);
        let (partition_ctx, update_peers): (_, PeersUpdate) = match &replication {
            None => (PartitionContext { counters, ..PartitionContext::standalone() }, Box::new(|_| {})),
            Some(replication) => {
                let peers = Arc::clone(replication);
                (replication.partition_context(counters), Box::new(move |state| peers.update_peers(state)))
            }
        };
        let topics = Topics::new(
            Arc::clone(&ctx.store),
            ctx.keys.clone(),
            ctx.metadata.clone(),
            ctx.config.topic_defaults.clone(),
        );
        let queue = MaintenanceQueue::default();
        let strays = StrayCleaner::new(&ctx, topics.clone(), Arc::clone(&partitions));
        let mut reconciler =
            Reconciler::new(ctx.clone(), Arc::clone(&partitions), strays, partition_ctx, queue.clone(), update_peers);
        let state = ctx.metadata.state();
        reconciler.reconcile(&state).await;
        let limits = &ctx.config.limits;
        let budgets = Budgets::new(limits.request_memory_bytes, limits.response_memory_bytes);
        let produce_memory = Pools::halves(limits.produce_memory_bytes);
        let commits = TierCommits::new(Arc::clone(&ctx.store), ctx.keys.clone());
        let shared = SharedState { partitions, failures, health, topics, budgets, produce_memory, commits };
        Self { ctx, shared, reconciler, queue, stats, replication }
    }

    /// Returns the service that other brokers call; `None` for a standalone broker. Until the activation, the service
    /// only identifies the process.
    pub fn peer_service(&self) -> Option<PeerServer<PeerService>> {
        self.replication.as_ref().map(|replication| replication.service())
    }

    /// Returns the local replicas that are intact. A hosted replica is intact if it is open. A replica whose topic is
    /// not hosted, for example because the topic value is unreadable, is opened only for this check. Such a replica is
    /// intact if its log reaches the committed log start and tiered end.
    pub async fn intact_replicas(&self) -> BTreeSet<PartitionId> {
        let mut intact: BTreeSet<PartitionId> =
            self.shared.partitions.open().iter().map(|partition| partition.id()).collect();
        let (state, me) = (self.ctx.metadata.state(), self.ctx.id);
        let unhosted = self.ctx.log.partitions().into_iter().filter_map(|id| {
            let entry = state.entry(id).filter(|_| self.shared.partitions.get(id).is_none())?;
            entry.partition.as_ref().filter(|stored| stored.value.replicas.contains(&me))?;
            let tier = entry.tier.as_ref().map(|stored| &stored.value);
            Some((id, tier.map_or(Offset::ZERO, |tier| tier.log_start.max(tier.tiered_end()))))
        });
        let (log, unhosted) = (self.ctx.log.clone(), unhosted.collect::<Vec<_>>());
        let is_intact = move |(id, min_log_end): &(PartitionId, Offset)| {
            log.open_replica(*id, Offset::ZERO).is_ok_and(|replica| replica.log_end() >= *min_log_end)
        };
        let find_intact = move || unhosted.into_iter().filter(is_intact).map(|(id, _)| id).collect::<Vec<_>>();
        intact.extend(task::run_blocking(find_intact).await);
        intact
    }

    /// Activates the broker: every replica is assigned its role, and requests are served.
    ///
    /// The metadata cache must contain the registration of `session`. An older snapshot may name this broker as the
    /// leader of partitions that the startup verification released. `unverified` contains each partition whose value
    /// was unreadable at the startup verification, with the revision of that value. The local replica of an unverified
    /// partition stays offline while this broker leads the partition or is in its ISR or ELR.
    pub async fn activate(self, session: Session, unverified: BTreeMap<PartitionId, Revision>) -> Arc<Broker> {
        let Self { ctx, shared, mut reconciler, queue, stats, replication } = self;
        let background = Background::new(ctx.clone(), shared.clone(), queue, session.clone());
        let peers = replication.as_ref().map(|replication| replication.peers().clone());
        let peer_status = PeerStatus::new(&ctx, Arc::clone(&shared.partitions), peers, stats);
        let (partitions, health) = (Arc::clone(&shared.partitions), Arc::clone(&shared.health));
        let api = Api::new(&ctx, &background, shared, peer_status);
        let state = ctx.metadata.state();
        health.begin_catching_up();
        reconciler.activate(unverified, &state).await;
        if let Some(replication) = &replication {
            replication.update_peers(&state);
            replication.activate(&session, &ctx.tasks);
        }
        background.spawn_monitors();
        reconciler.reconcile(&state).await;
        drop(state);
        health.begin_serving();
        if let Some(replication) = &replication {
            replication.begin_serving();
        }
        ctx.tasks.spawn("reconcile", reconciler.run());
        background.spawn_workers();
        Arc::new(Broker { ctx, api: Arc::new(api), partitions, replication, background, health })
    }

    /// Stops a broker that was not activated.
    pub async fn stop(self) {
        stop(&self.ctx, &self.shared.partitions, self.replication.as_deref()).await;
    }
}

/// Stops the tasks of the broker, then the partitions, then the links.
async fn stop(ctx: &NodeContext, partitions: &PartitionTable, replication: Option<&ReplicationManager>) {
    // A partition stops only after the journal has completed the partition's entries. This call bounds the time that
    // the journal waits for a free file, so the stop cannot hang on a full journal.
    ctx.log.begin_shutdown();
    ctx.tasks.stop().await;
    partitions.stop().await;
    if let Some(replication) = replication {
        replication.stop().await;
    }
}

/// One running broker.
pub struct Broker {
    ctx: NodeContext,
    api: Arc<Api>,
    partitions: Arc<PartitionTable>,
    /// Replication links and failure detection; `None` for a standalone broker.
    replication: Option<Arc<ReplicationManager>>,
    background: Background,
    health: Arc<Health>,
}

impl Broker {
    pub fn id(&self) -> BrokerId {
        self.ctx.id
    }

    /// Returns the `Log` service.
    pub fn log_service(&self) -> LogService {
        LogService::new(Arc::clone(&self.api))
    }

    /// Returns the `Admin` service.
    pub fn admin_service(&self) -> AdminServer<AdminService> {
        AdminService::new(Arc::clone(&self.api), Arc::clone(&self.background.lease)).server()
    }

    /// Returns the memory budgets of requests and responses.
    pub fn budgets(&self) -> &Budgets {
        self.api.budgets()
    }

    /// Returns an error if this process should be restarted, because its data directory accepts no writes.
    pub fn health(&self) -> Result<(), String> {
        self.health.health()
    }

    /// Returns the readiness of the broker, with its impairments if it is ready.
    pub fn readiness(&self) -> Readiness {
        self.health.readiness()
    }

    /// Updates this broker's gauges; called before each rendering of the metrics page. Only one call may run at a time.
    /// Each call removes the lag gauges of all followers' brokers and sets them again. So a second call could remove
    /// gauges that the first one has just set.
    pub fn observe(&self) {
        self.background.observe();
    }

    /// Returns the current metadata snapshot, for the simulator's checker.
    #[cfg(feature = "sim")]
    pub fn metadata_snapshot(&self) -> Arc<crate::cluster::MetadataSnapshot> {
        self.ctx.metadata.state()
    }

    /// Waits until the metadata cache contains at least this number of registered brokers.
    pub async fn wait_for_brokers(&self, brokers: usize) {
        self.ctx.metadata.wait_until(|state| state.brokers().len() >= brokers).await;
    }

    /// Returns the number of partitions with an open local replica.
    pub fn open_partition_count(&self) -> usize {
        self.partitions.open().len()
    }

    /// Publishes that this broker stops, so that the controller transfers its leaderships and leaders remove it from
    /// their ISR. Waits, at most `timeout`, until no leadership or ISR membership is left that can be transferred. From
    /// this call on, the broker is not ready.
    pub async fn transfer_leadership(&self, timeout: Duration) {
        self.health.begin_shutdown();
        self.background.transfer_leadership(timeout).await;
    }

    /// Ends the streams of clients, the tasks, the partitions and the links, in this order. Returns when no task of the
    /// broker runs.
    pub async fn stop(&self) {
        self.health.begin_shutdown();
        self.ctx.log.begin_shutdown();
        self.api.stop().await;
        stop(&self.ctx, &self.partitions, self.replication.as_deref()).await;
    }
}
