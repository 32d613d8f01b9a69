//! One broker without its listeners: builds it in order from its dependencies, and stops it in order.
//!
//! All access to the world outside the process is in [`Outside`]: the disk, the metadata store, the object store, the connections to other
//! brokers. `server::run` provides the real ones. A simulation provides its own, with many nodes in one process.

use std::{sync::Arc, time::Duration};

use anyhow::Context as _;
use futures::future::BoxFuture;
use tokio::sync::oneshot;
use tonic::service::Routes;
use tonic_health::{ServingStatus, server::HealthReporter};
use uuid::Uuid;

use super::{
    admission::{Admission, Noted, Stopped},
    grpc,
};
use crate::{
    broker::{self, Broker, Tier},
    client::Connect,
    cluster::{
        BrokerState, BrokerValue, Endpoints, Keys, Measured, MetaStore, MonotonicStore, ObjectStoreKey, RegisterError,
        Registration, Revision, Session, Standing, Unread, View, planner::Limits,
    },
    config::Config,
    log::{Disk, Identity, Log, Options, Stepper},
    task::{self, Tasks, random},
    telemetry::Metrics,
    tier::{Cache, CacheOptions, ClaimError, Store},
};

/// Default maximum time that a stop waits for the transfer of leadership.
const HAND_OVER: Duration = Duration::from_secs(30);

/// Maximum time that a start waits for the owner of the object store, and pause before the object store is queried again.
const CLAIM_WAIT: Duration = Duration::from_millis(500);
const CLAIM_AGAIN: Duration = Duration::from_secs(5);

/// Maximum memory for read-ahead from the object store, of all readers together, in bytes.
const READ_AHEAD_BYTES: u64 = 32 << 20;

/// Dependencies of a node outside the process.
pub struct Outside {
    /// Disk with the data directory.
    pub disk: Arc<dyn Disk>,
    /// The stores. They are opened after the data directory is open and locked, because they may be inside it.
    pub stores: BoxFuture<'static, anyhow::Result<Stores>>,
    /// Connector to other brokers.
    pub connect: Arc<dyn Connect>,
    /// True for a standalone broker: the metadata lies beside the data, and is lost or restored together with it. Then there are no other
    /// brokers, and there is nothing to verify.
    pub alone: bool,
    /// Callback to the driver of the log's steps ([`Log::journal_step`], [`Log::sync_step`]); `None` if threads run the steps.
    pub stepper: Option<Stepper>,
}

/// Stores that a node shares with other nodes.
pub struct Stores {
    /// Metadata store.
    pub meta: Arc<dyn MetaStore>,
    /// Object store; `None` without one.
    pub objects: Option<Store>,
}

/// A running broker and everything that it owns.
pub struct Node {
    log: Log,
    tier: Option<Tier>,
    broker: Arc<Broker>,
    session: Session,
    connect: Arc<dyn Connect>,
    alone: bool,
    routes: Routes,
    health: HealthReporter,
    tasks: Tasks,
    metrics: Metrics,
}

impl Node {
    /// Opens the data directory and its replicas, registers the broker with these endpoints, and activates it. From then on its routes
    /// serve requests. Waits for a metadata store that does not respond.
    ///
    /// `opened` is called with the open log first. From then on the driver of the log's steps must run them, because replicas may be closed
    /// before the node is complete. `serve_peers` is called with the services for other brokers, if there are any, before the registration.
    /// Through these services, peers see that an earlier process of this broker is gone.
    ///
    /// # Errors
    /// The directory or a store cannot be used, or another broker has the broker id. A directory that was closed cleanly stays clean.
    pub async fn open(
        config: &Config,
        outside: Outside,
        endpoints: Endpoints,
        opened: impl FnOnce(&Log),
        serve_peers: impl FnOnce(Routes),
    ) -> anyhow::Result<Self> {
        let metrics = Metrics::new();
        let log = open_log(config, &outside, metrics.clone()).await?;
        opened(&log);
        Self::over(config, log, outside, endpoints, metrics, &Tasks::new(), serve_peers).await
    }

    /// Opens a node as [`Node::open`] does, with a log that is already open. The log is closed on failure. Cancelling `stop` ends the waits
    /// of the start.
    pub(super) async fn over(
        config: &Config,
        log: Log,
        outside: Outside,
        endpoints: Endpoints,
        metrics: Metrics,
        stop: &Tasks,
        serve_peers: impl FnOnce(Routes),
    ) -> anyhow::Result<Self> {
        let tasks = Tasks::new();
        let start = Start { config, log: log.clone(), endpoints, metrics, tasks: tasks.clone(), stop };
        let opened = start.run(outside, serve_peers).await;
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
    pub fn connect(&self) -> &Arc<dyn Connect> {
        &self.connect
    }

    /// Returns the metrics.
    pub fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    /// Resolves when this process must stop, with the reason. Either another process has superseded this broker, or the object store is
    /// another cluster's or of a later generation. A wrong object store is found here only if it did not respond at the start.
    pub async fn must_stop(&self) -> anyhow::Error {
        let refused = async {
            match &self.tier {
                Some(tier) => tier.store.until_refused().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            error = self.superseded() => error,
            why = refused => anyhow::anyhow!("this broker cannot go on: {why}"),
        }
    }

    async fn superseded(&self) -> anyhow::Error {
        let mut standing = self.session.standing();
        let last = standing.wait_for(|standing| matches!(standing, Standing::Superseded { .. })).await;
        match last.as_deref() {
            Ok(Standing::Superseded { address }) => anyhow::anyhow!(
                "broker {} is now run by another process, at {address}, with a copy of this data directory; one of the two must go",
                self.broker.id()
            ),
            // The session has ended, so its state no longer changes.
            _ => std::future::pending().await,
        }
    }

    /// Runs the first half of a stop. No new clients connect, other brokers take over the leaderships, written data is acknowledged, and
    /// the streams of readers and maintenance end. The transfer of leadership takes at most half of `within`.
    pub async fn retire(&self, within: Duration) {
        grpc::report(&self.health, ServingStatus::NotServing).await;
        if !self.alone {
            self.broker.hand_over(&self.session, within / 2).await;
        }
        self.broker.stop().await;
        if !self.alone {
            // Ends the registration before the listeners close. Otherwise peers would take the closed listener for a crash.
            self.session.leave().await;
        }
    }

    /// Runs the second half of a stop, once no call is open: closes the log and ends the registration.
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

    /// Stops a node that has no listeners.
    ///
    /// # Errors
    /// As for [`Node::close`].
    pub async fn stop(self) -> anyhow::Result<()> {
        self.retire(HAND_OVER).await;
        self.close().await
    }
}

/// A node that is being built.
struct Start<'a> {
    config: &'a Config,
    log: Log,
    endpoints: Endpoints,
    metrics: Metrics,
    /// Tasks of the node.
    tasks: Tasks,
    /// Cancelled to end the waits.
    stop: &'a Tasks,
}

impl Start<'_> {
    async fn run(self, outside: Outside, serve_peers: impl FnOnce(Routes)) -> anyhow::Result<Node> {
        let (config, alone) = (self.config, outside.alone);
        let Stores { meta, objects } = outside.stores.await?;
        // A store inside the data directory cannot be set back without the directory, so its revisions need no check.
        let meta: Arc<dyn MetaStore> = if alone { meta } else { Arc::new(MonotonicStore::new(meta)) };
        let meta: Arc<dyn MetaStore> = Arc::new(Measured::new(meta, self.metrics.clone()));
        let tier = objects.map(|store| with_cache(config, store, &self.metrics)).transpose()?;
        let keys = Keys::new(&config.cluster)?;
        let admission =
            Admission { store: &meta, keys: &keys, log: &self.log, defaults: &config.topic_defaults, stop: self.stop };
        if !alone {
            admission.reach().await?;
        }
        let generation = admission.generation().await?;
        let noted = if alone { None } else { Some(admission.note().await?) };
        let incarnation = noted.as_ref().map_or_else(random::uuid, |noted| noted.incarnation);
        let view = View::counted(Arc::clone(&meta), keys.clone(), &self.tasks, self.metrics.metadata_listings.clone());
        self.waited(view.reached(Revision::ZERO)).await?;
        if let Some(tier) = &tier {
            if view.state().names_history() {
                tier.store.expect_history();
            }
            let notes = ObjectStoreKey::new(Arc::clone(&meta), keys.clone(), view.clone(), alone);
            tier.store.go_by(Arc::new(notes));
            tier.store.in_generation(generation);
            claim(&tier.store, &self.tasks).await?;
        }
        // The generation is recorded only now, so that a mismatch of directory and stores changes nothing.
        let log = self.log.clone();
        let noting = task::run_blocking(move || log.note_generation(generation)).await;
        noting.context("cannot note the cluster generation in the data directory")?;
        let broker = Broker::open(broker::Parts {
            settings: settings(config),
            log: self.log.clone(),
            store: Arc::clone(&meta),
            keys: keys.clone(),
            view: view.clone(),
            tier: tier.clone(),
            connect: Arc::clone(&outside.connect),
            alone,
            incarnation: incarnation.to_string(),
            metrics: self.metrics.clone(),
        })
        .await;
        if let Some(routes) = grpc::peer_routes(&broker) {
            serve_peers(routes);
        }
        let registered = self.register(&admission, noted, incarnation, &broker, &view).await;
        let (session, unread) = match registered {
            Ok(registered) => registered,
            Err(error) => {
                broker.stop().await;
                return Err(error);
            }
        };
        broker.begin(&session, unread).await;
        let (health, service) = grpc::health();
        let routes = grpc::routes(&broker, service, config.grpc.reflection)?;
        grpc::report(&health, ServingStatus::Serving).await;
        let Self { log, tasks, metrics, .. } = self;
        let connect = outside.connect;
        Ok(Node { log, tier, broker, session, connect, alone, routes, health, tasks, metrics })
    }

    /// Registers the broker, and waits until its metadata cache contains the registration. The cache then also contains everything that was
    /// released before. Also returns the partitions that could not be verified.
    async fn register(
        &self,
        admission: &Admission<'_>,
        noted: Option<Noted>,
        incarnation: Uuid,
        broker: &Arc<Broker>,
        view: &View,
    ) -> anyhow::Result<(Session, Unread)> {
        let (log, percent) = (self.log.clone(), self.config.broker.disk_full_percent);
        // A standalone broker has no peer that could get new replicas instead.
        let disk_full = noted.is_some() && task::run_blocking(move || broker::starts_full(&log, percent)).await;
        let registration = Registration {
            store: Arc::clone(admission.store),
            keys: admission.keys.clone(),
            id: self.config.broker.id,
            value: BrokerValue {
                listeners: self.endpoints.clone(),
                rack: self.config.broker.rack.clone(),
                directory_id: self.log.directory_id().to_string(),
                incarnation: incarnation.to_string(),
                state: BrokerState::Running,
                disk_full,
                no_room: false,
                max_replicas: Some(self.config.broker.max_replicas),
                version: env!("CARGO_PKG_VERSION").to_owned(),
            },
            time: self.config.metadata.session_timeout,
        };
        let (session, unread) = match noted {
            Some(noted) => admission.admit(&registration, noted, broker.whole().await, view, &self.tasks).await?,
            None => {
                let registered = register_alone(registration, view, &self.tasks).await;
                (registered.context("cannot register the broker in the metadata store")?, Unread::default())
            }
        };
        let shown = session.epoch().unwrap_or(Revision::ZERO);
        match self.waited(view.reached(shown)).await {
            Ok(()) => Ok((session, unread)),
            Err(stopped) => {
                session.leave().await;
                Err(stopped)
            }
        }
    }

    async fn waited(&self, until: impl Future<Output = ()>) -> anyhow::Result<()> {
        tokio::select! {
            biased;
            () = self.stop.cancelled() => Err(Stopped.into()),
            () = until => Ok(()),
        }
    }
}

/// Share of `limits.memory_bytes` for producer state, as a divisor, in addition to the shares that are settings.
const PRODUCER_SHARE: u64 = 16;

/// Opens the data directory: lock, journal replay.
pub(super) async fn open_log(config: &Config, outside: &Outside, metrics: Metrics) -> anyhow::Result<Log> {
    let identity = Identity { cluster: config.cluster.clone(), broker: config.broker.id };
    let options = Options {
        journal_bytes: config.log.journal_bytes,
        journal_dir: config.log.journal_dir.clone(),
        accept_journal_loss: config.log.accept_journal_loss,
        tail_bytes: usize::try_from(config.log.tail_memory_bytes).unwrap_or(usize::MAX),
        producer_bytes: usize::try_from(config.limits.memory_bytes / PRODUCER_SHARE).unwrap_or(usize::MAX),
        metrics,
        manual: outside.stepper.is_some(),
        stepper: outside.stepper.clone(),
        ..Options::default()
    };
    let (disk, dir) = (Arc::clone(&outside.disk), config.broker.data_dir.clone());
    Ok(task::run_blocking(move || Log::open(disk, &dir, &identity, options)).await?)
}

/// Opens the chunk cache in front of an object store.
fn with_cache(config: &Config, store: Store, metrics: &Metrics) -> anyhow::Result<Tier> {
    let cache_dir = config.cache.dir.clone().unwrap_or_else(|| config.broker.data_dir.join("cache"));
    // Objects that are files of this machine need no second copy on its disk.
    let on_disk = config.cache.disk_bytes > 0 && !store.is_folder();
    let options = CacheOptions {
        memory_bytes: config.cache.memory_bytes,
        disk: on_disk.then_some((cache_dir.clone(), config.cache.disk_bytes)),
        data_dir: config.cache.dir.is_none().then(|| config.broker.data_dir.clone()),
        read_ahead_bytes: READ_AHEAD_BYTES.min(config.cache.memory_bytes / 4),
    };
    let cache = Cache::open(&options, metrics)
        .with_context(|| format!("cannot use the cache directory {}", cache_dir.display()))?;
    Ok(Tier { store, cache })
}

/// Registers a standalone broker. Its metadata lies beside its data and is lost or restored together with it, so there is nothing to
/// verify.
async fn register_alone(registration: Registration, view: &View, tasks: &Tasks) -> Result<Session, RegisterError> {
    registration.clear().await?;
    let record = registration.store.get(&registration.keys.directory(registration.id)).await?.entry;
    registration.register(record.map(|entry| entry.mod_revision), view, tasks).await
}

/// Verifies that the object store belongs to this cluster. Waits only for a moment: an object store that does not respond is queried again
/// until it does, and a rejection then stops the broker.
async fn claim(store: &Store, tasks: &Tasks) -> Result<(), ClaimError> {
    let (asked, stop) = (store.clone(), tasks.clone());
    let (first, answer) = oneshot::channel();
    let claims = async move {
        let mut first = Some(first);
        loop {
            let claimed = asked.claim().await;
            let is_over = claimed.as_ref().map_or_else(ClaimError::ends_start, |()| true);
            if let Some(first) = first.take() {
                // After `CLAIM_WAIT`, the receiver is dropped.
                let _late = first.send(claimed);
            }
            if is_over {
                return;
            }
            tokio::time::sleep(CLAIM_AGAIN).await;
        }
    };
    tasks.spawn("claim", async move {
        tokio::select! {
            biased;
            () = stop.cancelled() => {}
            () = claims => {}
        }
    });
    match tokio::time::timeout(CLAIM_WAIT, answer).await {
        Ok(Ok(Err(error))) if error.ends_start() => Err(error),
        Ok(Ok(Ok(()))) => Ok(()),
        Ok(Ok(Err(error))) => {
            tracing::warn!(%error, "the object store cannot be used yet; segments stay on disk until it can");
            Ok(())
        }
        _ => {
            tracing::warn!("the object store does not answer yet; segments stay on disk until it does");
            Ok(())
        }
    }
}

fn settings(config: &Config) -> broker::Settings {
    broker::Settings {
        id: config.broker.id,
        cluster: config.cluster.clone(),
        topic_defaults: config.topic_defaults.clone(),
        produce_memory_bytes: config.limits.produce_memory_bytes,
        request_memory_bytes: config.limits.request_memory_bytes,
        response_memory_bytes: config.limits.response_memory_bytes,
        decompression_memory_bytes: config.limits.decompression_memory_bytes,
        producer_ids_per_minute: config.limits.producer_ids_per_minute,
        upkeep_workers: config.tier.upload_concurrency,
        retention_interval: config.tier.check_interval,
        fetch_max_wait: config.tier.fetch_max_wait,
        garbage_grace: config.tier.garbage_grace,
        upload_grace: config.tier.upload_grace,
        default_factor: config.replication.default_factor,
        lag_time: config.replication.lag_time,
        catchup_bytes_per_second: config.replication.catchup_bytes_per_second,
        disk_full_percent: config.broker.disk_full_percent,
        catch_up_timeout: config.broker.catch_up_timeout,
        controller: Limits {
            moves: config.controller.moves_at_once,
            replace_after_ms: config
                .controller
                .replace_after
                .map(|time| u64::try_from(time.as_millis()).unwrap_or(u64::MAX)),
            balance: config.controller.balance,
            ..Limits::default()
        },
    }
}
