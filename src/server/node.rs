//! One broker without its listeners: what it owns, built in order over a world that is given to it, and stopped in order.
//!
//! Everything that reaches beyond the process is in [`Outside`]: the disk, the metadata store, the object store, the way to other
//! brokers. `server::run` gives it the real ones; a simulation gives others, many nodes in one process.

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

/// How long a stop waits for others to lead, where nobody says otherwise.
const HAND_OVER: Duration = Duration::from_secs(30);

/// How long a start waits for the object store to say whose it is, and after which pause it is asked again where it did not.
const CLAIM_WAIT: Duration = Duration::from_millis(500);
const CLAIM_AGAIN: Duration = Duration::from_secs(5);

/// Memory for reading ahead in the bucket, of all readers together.
const READ_AHEAD_BYTES: u64 = 32 << 20;

/// The world outside a node.
pub struct Outside {
    /// Where the data directory lies.
    pub disk: Arc<dyn Disk>,
    /// The stores. Waited for when the data directory is open and nobody else's: they may lie in it.
    pub stores: BoxFuture<'static, anyhow::Result<Stores>>,
    /// How other brokers are reached.
    pub connect: Arc<dyn Connect>,
    /// Whether the metadata lies beside the data and shares its fate: then there are no other brokers, and nothing to prove.
    pub alone: bool,
    /// Who does the log's steps ([`Log::journal_step`], [`Log::sync_step`]). Where there is none, threads do.
    pub stepper: Option<Stepper>,
}

/// What a node shares with others.
pub struct Stores {
    /// The metadata store.
    pub meta: Arc<dyn MetaStore>,
    /// The object store, where there is one.
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
    /// Opens the data directory and the replicas in it, registers the broker with these endpoints, and takes part. From then on its
    /// routes answer. A metadata store that does not answer is waited for. `opened` hears of the log first: whoever does its steps begins
    /// with them then, for replicas may be closed again before the node is there. `serve_peers` gets the services for other brokers, where
    /// there are any, before the broker is registered: by them the others see that an earlier process of this broker is gone.
    ///
    /// # Errors
    /// When the directory or a store cannot be used, or the broker's number is taken. What was found clean is left clean.
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

    /// As [`Node::open`], over a log that is open. It is closed when this fails. While the start waits for others, the end of `stop`
    /// ends it.
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
            // Why the start failed is the news, not what comes after.
            drop(task::run_blocking(move || log.close()).await);
        }
        opened
    }

    /// Its gRPC services for clients, for whatever carries calls to them. Clones share the broker.
    pub fn routes(&self) -> Routes {
        self.routes.clone()
    }

    /// The broker itself.
    pub fn broker(&self) -> &Arc<Broker> {
        &self.broker
    }

    /// How it reaches other brokers.
    pub fn connect(&self) -> &Arc<dyn Connect> {
        &self.connect
    }

    /// Its figures.
    pub fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    /// Resolves when this process has to stop, with the reason: another one has taken this broker's place, or the object store, which was
    /// slow or away at the start, is not this cluster's or of a later generation.
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
            // The session was left: nothing comes any more.
            _ => std::future::pending().await,
        }
    }

    /// The first half of a stop: nobody new comes, others lead what was led here, what is written is answered, readers' streams
    /// and upkeep end. `within` bounds the wait for others.
    pub async fn retire(&self, within: Duration) {
        grpc::report(&self.health, ServingStatus::NotServing).await;
        if !self.alone {
            self.broker.hand_over(&self.session, within / 2).await;
        }
        self.broker.stop().await;
        if !self.alone {
            // Before the listeners: who finds nobody at this address any more must not take it for a crash.
            self.session.leave().await;
        }
    }

    /// The second half, once no call is under way: the log is closed and the registration given up.
    ///
    /// # Errors
    /// When the log cannot be closed cleanly.
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

    /// Stops it, for one that nobody else carries calls to.
    ///
    /// # Errors
    /// As [`Node::close`].
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
    /// The node's own.
    tasks: Tasks,
    /// Ends the waits.
    stop: &'a Tasks,
}

impl Start<'_> {
    async fn run(self, outside: Outside, serve_peers: impl FnOnce(Routes)) -> anyhow::Result<Node> {
        let (config, alone) = (self.config, outside.alone);
        let Stores { meta, objects } = outside.stores.await?;
        // A store that lies in the data directory cannot go back without it.
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
        // Only now: what does not fit together is left as it was found.
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

    /// Registers the broker, and waits until its mirror shows that: what was given up before is in it as well then. Returns as well what is
    /// still to be proven.
    async fn register(
        &self,
        admission: &Admission<'_>,
        noted: Option<Noted>,
        incarnation: Uuid,
        broker: &Arc<Broker>,
        view: &View,
    ) -> anyhow::Result<(Session, Unread)> {
        let (log, percent) = (self.log.clone(), self.config.broker.disk_full_percent);
        // One that is alone has nobody to leave new replicas to.
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

/// The part of all memory that producer state takes, beside the parts that are settings, as a divisor.
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

/// The cache before an object store.
fn with_cache(config: &Config, store: Store, metrics: &Metrics) -> anyhow::Result<Tier> {
    let cache_dir = config.cache.dir.clone().unwrap_or_else(|| config.broker.data_dir.join("cache"));
    // What lies in a folder of this machine need not lie in another one.
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

/// Registers a broker whose metadata lies beside its data, and shares the data's fate: there is nothing to prove.
async fn register_alone(registration: Registration, view: &View, tasks: &Tasks) -> Result<Session, RegisterError> {
    registration.clear().await?;
    let record = registration.store.get(&registration.keys.directory(registration.id)).await?.entry;
    registration.register(record.map(|entry| entry.mod_revision), view, tasks).await
}

/// Makes sure that the object store is this cluster's and not another one. Waits a moment only: a store that is away or slow is asked
/// again until it answers, and what it says then ends the broker.
async fn claim(store: &Store, tasks: &Tasks) -> Result<(), ClaimError> {
    let (asked, stop) = (store.clone(), tasks.clone());
    let (first, answer) = oneshot::channel();
    let claims = async move {
        let mut first = Some(first);
        loop {
            let claimed = asked.claim().await;
            let is_over = claimed.as_ref().map_or_else(ClaimError::ends_start, |()| true);
            if let Some(first) = first.take() {
                // Nobody waits for it after CLAIM_WAIT.
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
