//! One broker without its listeners: builds it in order from its dependencies, and stops it in order.
//!
//! All access to the world outside the process is in [`NodeDeps`]: the disk, the metadata store, the object store, the
//! connections to other brokers. `server::run` provides the real ones. A simulation provides its own, with many nodes
//! in one process.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use anyhow::Context as _;
use futures::future::BoxFuture;
use tokio::sync::oneshot;
use tonic::service::Routes;
use tonic_health::{ServingStatus, server::HealthReporter};
use uuid::Uuid;

use super::{
    admission::{ClusterAdmission, PendingStart, StartCancelled},
    grpc,
};
use crate::{
    broker::{self, Broker, NodeContext, OpenedBroker, TierHandle},
    client::Connector,
    cluster::{
        BrokerState, BrokerValue, Endpoints, Keys, MetaBindingStore, MetaStore, MetadataCache, MeteredStore,
        MonotonicStore, RegisterError, RegistrationRequest, Revision, Session, SessionState,
    },
    config::Config,
    log::{DataDir, DataDirIdentity, Disk, LogOptions, SimHook},
    model::PartitionId,
    task::{self, Tasks, random},
    telemetry::Metrics,
    tier::{BindingError, ChunkCache, ChunkCacheOptions, StoreOwner, TierStore},
};

/// Timeout of [`Node::stop`]. The transfer of leadership takes at most half of it.
const STOP_TIMEOUT: Duration = Duration::from_secs(30);

/// Maximum time that a start waits for the first verification of the object store's owner.
const BINDING_TIMEOUT: Duration = Duration::from_millis(500);

/// Pause between two verifications of the object store's owner.
const BINDING_RETRY_INTERVAL: Duration = Duration::from_secs(5);

/// Maximum memory for read-ahead from the object store, of all readers together, in bytes. At most a quarter of
/// `cache.memory_bytes` is used.
const READ_AHEAD_BYTES: u64 = 32 << 20;

/// Dependencies of a node outside the process.
pub struct NodeDeps {
    /// Disk with the data directory.
    pub disk: Arc<dyn Disk>,
    /// The stores. They are opened after the data directory is open and locked, because they may be inside it.
    pub stores: BoxFuture<'static, anyhow::Result<StoreHandles>>,
    /// Connector to other brokers.
    pub connect: Arc<dyn Connector>,
    /// True for a standalone broker. Its metadata store is in its data directory, so both are lost or restored
    /// together. There are no other brokers, and there is nothing to verify.
    pub standalone: bool,
    /// Callback to the driver of the log's steps ([`DataDir::journal_step`], [`DataDir::sync_step`]); `None` if threads
    /// run the steps.
    pub sim_hook: Option<SimHook>,
}

/// The metadata store and the object store of a node. Other nodes may use the same stores.
pub struct StoreHandles {
    /// Metadata store.
    pub meta: Arc<dyn MetaStore>,
    /// Object store; `None` without one.
    pub objects: Option<TierStore>,
}

/// A running broker and everything that it owns.
pub struct Node {
    log: DataDir,
    tier: Option<TierHandle>,
    broker: Arc<Broker>,
    session: Session,
    connect: Arc<dyn Connector>,
    standalone: bool,
    routes: Routes,
    health: HealthReporter,
    tasks: Tasks,
    metrics: Metrics,
}

impl Node {
    /// Opens the data directory and its replicas, registers the broker with these endpoints, and activates it. The
    /// routes of the returned node then serve requests. Waits for a metadata store that does not respond.
    ///
    /// `opened` is called with the open log. From this call on, the driver of the log's steps must run these steps,
    /// because replicas may be closed before the node is complete. `serve_peers` is called before the registration,
    /// with the services for other brokers; a standalone broker has none. Through these services, peers see that an
    /// earlier process of this broker has ended.
    ///
    /// # Errors
    /// The directory or a store cannot be used, or another broker has the broker id. The log is then closed, so a
    /// directory that was closed cleanly before stays clean.
    pub async fn open(
        config: &Config,
        deps: NodeDeps,
        endpoints: Endpoints,
        opened: impl FnOnce(&DataDir),
        serve_peers: impl FnOnce(Routes),
    ) -> anyhow::Result<Self> {
        let metrics = Metrics::new();
        let log = open_log(config, &deps, metrics.clone()).await?;
        opened(&log);
        Self::from_log(config, log, deps, endpoints, metrics, &Tasks::new(), serve_peers).await
    }

    /// Opens a node as [`Node::open`] does, with a log that is already open. The log is closed on failure. Cancelling
    /// `stop` ends the waits of the start, which then fails with [`StartCancelled`].
    pub(super) async fn from_log(
        config: &Config,
        log: DataDir,
        deps: NodeDeps,
        endpoints: Endpoints,
        metrics: Metrics,
        stop: &Tasks,
        serve_peers: impl FnOnce(Routes),
    ) -> anyhow::Result<Self> {
        let tasks = Tasks::new();
        let start = NodeStart { config, log: log.clone(), endpoints, metrics, tasks: tasks.clone(), stop };
        // Boxed, because the future is large.
        let opened = Box::pin(start.run(deps, serve_peers)).await;
        if opened.is_err() {
            tasks.stop().await;
            // The caller needs the error of the start, not that of the close.
            drop(task::run_blocking(move || log.close()).await);
        }
        opened
    }

    /// Returns the gRPC services for clients. Clones share the broker.
    pub fn routes(&self) -> Routes {
        self.routes.clone()
    }

    /// Returns the broker.
    pub fn broker(&self) -> &Arc<Broker> {
        &self.broker
    }

    /// Returns the connector to other brokers.
    pub fn connect(&self) -> &Arc<dyn Connector> {
        &self.connect
    }

    /// Returns the metrics.
    pub fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    /// Resolves when this process must stop, with the reason. Either another process has superseded this broker, or the
    /// object store is another cluster's, not the bound one, or of a later generation. A wrong object store is found
    /// here only if its first verification did not end during the start.
    pub async fn must_stop(&self) -> anyhow::Error {
        let refused_by_store = async {
            match &self.tier {
                Some(tier) => tier.store.until_refused().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            error = self.superseded() => error,
            reason = refused_by_store => anyhow::anyhow!("this broker must stop: {reason}"),
        }
    }

    /// Resolves when another process has superseded this broker.
    async fn superseded(&self) -> anyhow::Error {
        let mut state = self.session.state();
        let last = state.wait_for(|state| matches!(state, SessionState::Superseded { .. })).await;
        match last.as_deref() {
            Ok(SessionState::Superseded { address }) => {
                anyhow::Error::new(RegisterError::Superseded { id: self.broker.id(), address: address.clone() })
            }
            // The session has ended, so its state no longer changes.
            _ => std::future::pending().await,
        }
    }

    /// Runs the first half of a stop. No new clients connect, other brokers take over the leaderships, written data is
    /// acknowledged, and the streams of readers and maintenance end. A broker of a cluster then ends its registration.
    /// The transfer of leadership takes at most half of `timeout`.
    pub async fn begin_stop(&self, timeout: Duration) {
        grpc::set_health_status(&self.health, ServingStatus::NotServing).await;
        if !self.standalone {
            self.broker.transfer_leadership(timeout / 2).await;
        }
        self.broker.stop().await;
        if !self.standalone {
            // Ends the registration before the listeners close. Otherwise the failure detectors of peers would report a
            // crash.
            self.session.leave().await;
        }
    }

    /// Runs the second half of a stop, after [`Node::begin_stop`], once no call is open. Stops the tasks of the object
    /// store, and closes the log. Ends the registration of a standalone broker and stops the tasks of the node.
    ///
    /// # Errors
    /// The log cannot be closed cleanly.
    pub async fn close(self) -> anyhow::Result<()> {
        if let Some(tier) = &self.tier {
            tier.store.stop().await;
        }
        let log = self.log;
        task::run_blocking(move || log.close()).await.context("cannot close the data directory")?;
        self.session.leave().await;
        self.tasks.stop().await;
        Ok(())
    }

    /// Runs both halves of a stop, for a node without listeners.
    ///
    /// # Errors
    /// As for [`Node::close`].
    pub async fn stop(self) -> anyhow::Result<()> {
        self.begin_stop(STOP_TIMEOUT).await;
        self.close().await
    }
}

/// A node that is being built.
struct NodeStart<'a> {
    config: &'a Config,
    log: DataDir,
    endpoints: Endpoints,
    metrics: Metrics,
    /// Tasks of the node.
    tasks: Tasks,
    /// Cancelled to end the waits of the start.
    stop: &'a Tasks,
}

impl NodeStart<'_> {
    /// Runs steps 3 to 7 of the start (module documentation of `server`). Serving begins with the listeners, which the
    /// caller starts.
    async fn run(self, deps: NodeDeps, serve_peers: impl FnOnce(Routes)) -> anyhow::Result<Node> {
        let (config, standalone) = (self.config, deps.standalone);
        let StoreHandles { meta, objects } = deps.stores.await?;
        // A store inside the data directory returns to an older state only together with the directory, so its
        // revisions need no check.
        let meta: Arc<dyn MetaStore> = if standalone { meta } else { Arc::new(MonotonicStore::new(meta)) };
        let meta: Arc<dyn MetaStore> = Arc::new(MeteredStore::new(meta, self.metrics.clone()));
        let mut tier = objects.map(|store| with_cache(config, store, &self.metrics)).transpose()?;
        let keys = Keys::new(&config.cluster)?;
        let admission = ClusterAdmission {
            store: &meta,
            keys: &keys,
            log: &self.log,
            defaults: &config.topic_defaults,
            stop: self.stop,
        };
        if !standalone {
            admission.reach().await?;
        }
        let generation = admission.generation().await?;
        let pending_start = if standalone { None } else { Some(admission.record_start().await?) };
        let incarnation = pending_start.as_ref().map_or_else(random::uuid, |pending_start| pending_start.incarnation);
        let metadata = MetadataCache::start_with_counter(
            Arc::clone(&meta),
            keys.clone(),
            &self.tasks,
            self.metrics.metadata_lists.clone(),
        );
        self.run_until_stopped(metadata.wait_for_revision(Revision::ZERO)).await?;
        if let Some(tier) = &mut tier {
            let bindings = MetaBindingStore::new(Arc::clone(&meta), keys.clone(), metadata.clone(), standalone);
            let has_data = metadata.state().has_tiered_data();
            let owner = StoreOwner { bindings: Some(Arc::new(bindings)), generation, has_data };
            tier.store = tier.store.clone().owned_by(owner);
            bind_store(&tier.store, &self.tasks).await?;
        }
        self.record_generation(generation).await?;
        let ctx = NodeContext {
            config: Arc::new(config.clone()),
            id: config.broker.id,
            log: self.log.clone(),
            store: Arc::clone(&meta),
            keys: keys.clone(),
            metadata: metadata.clone(),
            tier: tier.clone(),
            metrics: Arc::new(self.metrics.clone()),
            incarnation: incarnation.to_string().into(),
            standalone,
            tasks: Tasks::new(),
        };
        let opened = OpenedBroker::open(ctx, Arc::clone(&deps.connect)).await;
        if let Some(routes) = grpc::peer_routes(&opened) {
            serve_peers(routes);
        }
        let registered = self.register(&admission, pending_start, incarnation, &opened, &metadata).await;
        let (session, unverified) = match registered {
            Ok(registered) => registered,
            Err(error) => {
                opened.stop().await;
                return Err(error);
            }
        };
        let broker = opened.activate(session.clone(), unverified).await;
        let (health, service) = grpc::health();
        let routes = grpc::routes(&broker, service, config.grpc.reflection)?;
        grpc::set_health_status(&health, ServingStatus::Serving).await;
        let Self { log, tasks, metrics, .. } = self;
        let connect = deps.connect;
        Ok(Node { log, tier, broker, session, connect, standalone, routes, health, tasks, metrics })
    }

    /// Writes the cluster generation to the data directory. Called after both stores have been verified, so that a
    /// start with a wrong store changes nothing in the directory.
    async fn record_generation(&self, generation: u64) -> anyhow::Result<()> {
        let log = self.log.clone();
        let recorded = task::run_blocking(move || log.record_generation(generation)).await;
        recorded.context("cannot record the cluster generation in the data directory")
    }

    /// Registers the broker, and waits until its metadata cache contains the registration. The cache then also contains
    /// the changes of the startup verification. Also returns the partitions whose values could not be verified, with
    /// the revisions of those values. `pending_start` is `None` for a standalone broker.
    async fn register(
        &self,
        admission: &ClusterAdmission<'_>,
        pending_start: Option<PendingStart>,
        incarnation: Uuid,
        broker: &OpenedBroker,
        metadata: &MetadataCache,
    ) -> anyhow::Result<(Session, BTreeMap<PartitionId, Revision>)> {
        let (log, percent) = (self.log.clone(), self.config.broker.disk_pressure_percent);
        // A standalone broker has no peer that could get new replicas instead.
        let disk_pressure =
            pending_start.is_some() && task::run_blocking(move || broker::starts_under_pressure(&log, percent)).await;
        let registration = RegistrationRequest {
            store: Arc::clone(admission.store),
            keys: admission.keys.clone(),
            id: self.config.broker.id,
            value: BrokerValue {
                listeners: self.endpoints.clone(),
                rack: self.config.broker.rack.clone(),
                directory_id: self.log.directory_id().to_string(),
                incarnation: incarnation.to_string(),
                state: BrokerState::Running,
                disk_pressure,
                disk_full: false,
                max_replicas: Some(self.config.broker.max_replicas),
                version: env!("CARGO_PKG_VERSION").to_owned(),
            },
            session_timeout: self.config.metadata.session_timeout,
        };
        let (session, unverified) = match pending_start {
            Some(pending_start) => {
                admission
                    .admit(&registration, pending_start, broker.intact_replicas().await, metadata, &self.tasks)
                    .await?
            }
            None => {
                let registered = register_standalone(registration, metadata, &self.tasks).await;
                (registered.context("cannot register the broker in the metadata store")?, BTreeMap::new())
            }
        };
        // The epoch is the revision of the registration.
        let registered_at = session.epoch().unwrap_or(Revision::ZERO);
        match self.run_until_stopped(metadata.wait_for_revision(registered_at)).await {
            Ok(()) => Ok((session, unverified)),
            Err(cancelled) => {
                session.leave().await;
                Err(cancelled)
            }
        }
    }

    /// Runs a wait of the start. Fails with [`StartCancelled`] if the start is cancelled first.
    async fn run_until_stopped(&self, wait: impl Future<Output = ()>) -> anyhow::Result<()> {
        self.stop.run_until_cancelled(wait).await.ok_or_else(|| StartCancelled.into())
    }
}

/// Share of `limits.memory_bytes` for producer state, as a divisor, in addition to the shares that are settings.
const PRODUCER_SHARE: u64 = 16;

/// Opens and locks the data directory, and replays its journal.
pub(super) async fn open_log(config: &Config, deps: &NodeDeps, metrics: Metrics) -> anyhow::Result<DataDir> {
    let identity = DataDirIdentity { cluster: config.cluster.clone(), broker: config.broker.id };
    let options = LogOptions {
        journal_bytes: config.log.journal_bytes,
        journal_dir: config.log.journal_dir.clone(),
        accept_journal_loss: config.log.accept_journal_loss,
        tail_bytes: usize::try_from(config.log.tail_cache_bytes).unwrap_or(usize::MAX),
        producer_bytes: usize::try_from(config.limits.memory_bytes / PRODUCER_SHARE).unwrap_or(usize::MAX),
        metrics,
        step_mode: deps.sim_hook.is_some(),
        sim_hook: deps.sim_hook.clone(),
        ..LogOptions::default()
    };
    let (disk, dir) = (Arc::clone(&deps.disk), config.broker.data_dir.clone());
    Ok(task::run_blocking(move || DataDir::open(disk, &dir, &identity, options)).await?)
}

/// Opens the chunk cache of an object store. Returns a handle of both.
fn with_cache(config: &Config, store: TierStore, metrics: &Metrics) -> anyhow::Result<TierHandle> {
    let cache_dir = config.cache.dir.clone().unwrap_or_else(|| config.broker.data_dir.join("cache"));
    // Objects that are files of this machine need no second copy on its disk.
    let on_disk = config.cache.disk_bytes > 0 && !store.is_folder();
    let options = ChunkCacheOptions {
        memory_bytes: config.cache.memory_bytes,
        disk: on_disk.then_some((cache_dir.clone(), config.cache.disk_bytes)),
        data_dir: config.cache.dir.is_none().then(|| config.broker.data_dir.clone()),
        read_ahead_bytes: READ_AHEAD_BYTES.min(config.cache.memory_bytes / 4),
    };
    let cache = ChunkCache::open(&options, metrics)
        .with_context(|| format!("cannot use the cache directory {}", cache_dir.display()))?;
    Ok(TierHandle { store, cache })
}

/// Deletes an earlier registration of a standalone broker and registers the broker. Its metadata store is in its data
/// directory, so there is nothing to verify.
async fn register_standalone(
    registration: RegistrationRequest,
    metadata: &MetadataCache,
    tasks: &Tasks,
) -> Result<Session, RegisterError> {
    registration.clear().await?;
    let directory = registration.store.get(&registration.keys.directory(registration.id)).await?.entry;
    registration.register(directory.map(|entry| entry.mod_revision), metadata, tasks).await
}

/// Verifies that the object store belongs to this cluster. Waits at most [`BINDING_TIMEOUT`] for the first attempt, and
/// fails only if that attempt finds a fatal error. Otherwise the attempts continue in the background until one succeeds
/// or finds a fatal error. A fatal error found later stops the broker ([`Node::must_stop`]).
async fn bind_store(store: &TierStore, tasks: &Tasks) -> Result<(), BindingError> {
    let (store, url) = (store.clone(), store.url());
    let (first_sender, first_result) = oneshot::channel();
    let attempts = async move {
        let mut first_sender = Some(first_sender);
        loop {
            let bound = store.bind().await;
            let is_final = bound.as_ref().map_or_else(BindingError::is_fatal_at_start, |()| true);
            if let Some(sender) = first_sender.take() {
                // After `BINDING_TIMEOUT`, the receiver is dropped.
                let _late = sender.send(bound);
            }
            if is_final {
                return;
            }
            tokio::time::sleep(BINDING_RETRY_INTERVAL).await;
        }
    };
    tasks.spawn_until_cancelled("store-binding", attempts);
    let error = match tokio::time::timeout(BINDING_TIMEOUT, first_result).await {
        Ok(Ok(Err(error))) if error.is_fatal_at_start() => return Err(error),
        Ok(Ok(Ok(()))) => return Ok(()),
        Ok(Ok(Err(error))) => error.to_string(),
        _ => format!("no response in {BINDING_TIMEOUT:?}"),
    };
    tracing::warn!(
        url,
        error,
        "the object store cannot be used yet, retrying: until then, segments stay on disk, and reads of records that \
         only the object store has may fail"
    );
    Ok(())
}
