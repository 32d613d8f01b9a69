//! The composition root: build, listen, run, stop in order.
//!
//! # Start
//!
//! 1. Take the ports: the likeliest mistake, found before any data is touched.
//! 2. Open the data directory (lock, journal replay): nothing is claimed for a broker that cannot run. Ask the object store
//!    whose it is: another cluster's prefix ends the start. A bucket that does not answer at once delays uploads, not the
//!    start. Then open the metadata store.
//! 3. Mirror the metadata, register the broker, open its partitions.
//! 4. Serve; say that it is ready.
//!
//! # Stop
//!
//! 1. `/readyz` and gRPC health say no, so that nobody new comes.
//! 2. The broker refuses new writes, ends readers' streams, answers what is written, ends upkeep.
//! 3. The listeners end their connections, within `broker.shutdown_timeout`.
//! 4. The object store's tasks end; the log is synced and marked as closed.
//! 5. The registration is given up, and the metadata store closes.
//!
//! A second signal is not waited for: what a kill interrupts here, recovery finishes.

mod connection;
mod grpc;
mod http;
mod listen;

use std::{future::Future, net::SocketAddr, path::PathBuf, pin::pin, sync::Arc, time::Duration};

use anyhow::Context as _;
use tokio::net::TcpListener;
use uuid::Uuid;

use crate::{
    broker::{self, Broker, Tier},
    cluster::{
        Addresses, BrokerState, BrokerValue, EmbeddedStore, Keys, MetaStore, RegisterError, Registration, Revision,
        Session, View,
    },
    config::Config,
    log::{Identity, Log, Options, RealDisk},
    model::BrokerId,
    task::{self, Tasks, clock},
    telemetry::{Level, Metrics},
    tier::{Cache, CacheOptions, ClaimError, Store, StoreOptions},
};

/// Where a broker serves, for the lines that are printed when it does.
#[derive(Clone, Debug)]
pub struct Ready {
    /// Address of the gRPC listener.
    pub grpc: SocketAddr,
    /// Address of the HTTP listener.
    pub http: SocketAddr,
    /// The data directory.
    pub data_dir: PathBuf,
    /// The object store's address; `None` when there is none.
    pub object_store: Option<String>,
    /// Partitions that it serves.
    pub partitions: usize,
    /// How long the start took.
    pub took: Duration,
}

/// How long a lease of the registration lasts without being renewed.
const SESSION: Duration = Duration::from_secs(10);

/// How long a start waits for the object store to say whose it is.
const CLAIM_WAIT: Duration = Duration::from_millis(500);

/// How long a stop waits for a data directory that is being opened.
const OPEN_WAIT: Duration = Duration::from_secs(1);

/// Memory for reading ahead in the bucket, of all readers together.
const READ_AHEAD_BYTES: u64 = 32 << 20;

/// Runs a broker until `shutdown` resolves and everything has stopped.
pub async fn run(config: Config, shutdown: impl Future<Output = ()>, ready: impl FnOnce(&Ready)) -> anyhow::Result<()> {
    let began = clock::monotonic();
    let grpc = listen::listen(config.grpc.listen, "gRPC", "--listen").await?;
    let http = listen::listen(config.http.listen, "HTTP", "--http").await?;
    config.prepare_data_dir()?;

    let metrics = Metrics::new();
    let mut shutdown = pin!(shutdown);
    let mut opening = pin!(open_log(&config, metrics.clone()));
    let log = tokio::select! {
        biased;
        log = &mut opening => log?,
        () = &mut shutdown => return stop_opening(opening).await,
    };
    let node = match Node::start(&config, &grpc, &http, log.clone(), metrics).await {
        Ok(node) => node,
        Err(error) => {
            // What was found clean is left clean. Why the start failed is the news, not what comes after.
            drop(task::blocking(move || log.close()).await);
            return Err(error);
        }
    };
    let state = Ready {
        grpc: grpc.local_addr()?,
        http: http.local_addr()?,
        data_dir: config.broker.data_dir.clone(),
        object_store: config.object_store.url.clone(),
        partitions: node.broker.partitions(),
        took: began.elapsed(),
    };
    let listeners = Listeners::serve(&node.broker, grpc, http, node.metrics.connections.clone());
    ready(&state);
    shutdown.await;
    tracing::info!("stopping");
    node.stop(listeners, config.broker.shutdown_timeout).await
}

/// Ends a start that has come no further than the data directory. A clean one is open in a moment and is left clean. Reading a long
/// journal after a crash is not waited for: the next start does it again.
async fn stop_opening(opening: impl Future<Output = anyhow::Result<Log>>) -> anyhow::Result<()> {
    tracing::info!("stopping before the data directory is open");
    if let Ok(Ok(log)) = tokio::time::timeout(OPEN_WAIT, opening).await {
        task::blocking(move || log.close()).await.context("cannot close the data directory")?;
    }
    Ok(())
}

/// Everything that a running broker owns.
struct Node {
    log: Log,
    store: EmbeddedStore,
    tier: Option<Tier>,
    broker: Arc<Broker>,
    session: Session,
    tasks: Tasks,
    metrics: Metrics,
}

impl Node {
    async fn start(
        config: &Config,
        grpc: &TcpListener,
        http: &TcpListener,
        log: Log,
        metrics: Metrics,
    ) -> anyhow::Result<Self> {
        let tasks = Tasks::new();
        let tier = config.object_store.url.as_deref().map(|url| open_tier(config, url, &metrics)).transpose()?;
        let store = EmbeddedStore::open(&config.broker.data_dir).await?;
        store.keep_time(&tasks);

        let keys = Keys::new(&config.cluster)?;
        let shared: Arc<dyn MetaStore> = Arc::new(store.clone());
        let view = View::start(Arc::clone(&shared), keys.clone(), &tasks);
        view.reached(Revision::ZERO).await;
        if let Some(tier) = &tier {
            if view.state().names_history() {
                tier.store.expect_history();
            }
            claim(&tier.store, &tasks).await?;
        }
        let value = BrokerValue {
            addresses: Addresses { grpc: advertised(config, grpc)?, http: Some(http.local_addr()?.to_string()) },
            rack: config.broker.rack.clone(),
            directory_id: log.directory_id().to_string(),
            incarnation: Uuid::new_v4().to_string(),
            state: BrokerState::Running,
            version: env!("CARGO_PKG_VERSION").to_owned(),
        };
        let session = register(&shared, &keys, config.broker.id, value, &view, &tasks)
            .await
            .context("cannot register the broker in the metadata store")?;
        let broker = Broker::start(broker::Parts {
            settings: settings(config),
            log: log.clone(),
            store: shared,
            keys,
            view,
            tier: tier.clone(),
            metrics: metrics.clone(),
        })
        .await;
        Ok(Self { log, store, tier, broker, session, tasks, metrics })
    }

    /// The numbered list of the module's documentation, from 1 on.
    async fn stop(self, listeners: Listeners, timeout: Duration) -> anyhow::Result<()> {
        listeners.unready().await;
        self.broker.stop().await;
        listeners.stop(timeout).await;
        if let Some(tier) = &self.tier {
            tier.store.stop().await;
        }
        let log = self.log;
        task::blocking(move || log.close()).await.context("cannot close the data directory")?;
        self.session.leave().await;
        self.tasks.stop().await;
        drop(self.store);
        tracing::info!("stopped");
        Ok(())
    }
}

/// The two listeners while they serve.
struct Listeners {
    tasks: Tasks,
    health: tonic_health::server::HealthReporter,
}

impl Listeners {
    fn serve(broker: &Arc<Broker>, grpc: TcpListener, http: TcpListener, connections: Level) -> Self {
        let tasks = Tasks::new();
        let (reporter, health) = grpc::health();
        let stop = tasks.clone();
        let served = Arc::clone(broker);
        let setter = reporter.clone();
        tasks.spawn("grpc", async move {
            grpc::report(&setter, tonic_health::ServingStatus::Serving).await;
            if let Err(error) =
                grpc::serve(
                    &served,
                    health,
                    connection::accept(grpc, connections),
                    async move { stop.cancelled().await },
                )
                .await
            {
                tracing::error!(%error, "the gRPC listener failed; restart the broker");
            }
        });
        let stop = tasks.clone();
        let served = Arc::clone(broker);
        tasks.spawn("http", async move {
            if let Err(error) = http::serve(served, http, async move { stop.cancelled().await }).await {
                tracing::error!(%error, "the HTTP listener failed; restart the broker");
            }
        });
        Self { tasks, health: reporter }
    }

    async fn unready(&self) {
        grpc::report(&self.health, tonic_health::ServingStatus::NotServing).await;
    }

    /// Ends the connections; those that have not ended in time are cut.
    async fn stop(&self, timeout: Duration) {
        if tokio::time::timeout(timeout, self.tasks.stop()).await.is_err() {
            tracing::warn!(timeout_s = timeout.as_secs(), "connections were still open after the timeout and are cut");
        }
    }
}

/// Registers a broker whose metadata lies beside its data, and shares the data's fate: there is nothing to prove.
async fn register(
    store: &Arc<dyn MetaStore>,
    keys: &Keys,
    id: BrokerId,
    value: BrokerValue,
    view: &View,
    tasks: &Tasks,
) -> Result<Session, RegisterError> {
    let registration = Registration { store: Arc::clone(store), keys: keys.clone(), id, value, time: SESSION };
    registration.clear().await?;
    let record = store.get(&keys.directory(id)).await?.entry;
    registration.register(record.map(|entry| entry.mod_revision), view, tasks).await
}

async fn open_log(config: &Config, metrics: Metrics) -> anyhow::Result<Log> {
    let identity = Identity { cluster: config.cluster.clone(), broker: config.broker.id };
    let options = Options {
        journal_bytes: config.log.journal_bytes,
        journal_dir: config.log.journal_dir.clone(),
        accept_journal_loss: config.log.accept_journal_loss,
        tail_bytes: usize::try_from(config.log.tail_memory_bytes).unwrap_or(usize::MAX),
        metrics,
        ..Options::default()
    };
    let dir = config.broker.data_dir.clone();
    Ok(task::blocking(move || Log::open(Arc::new(RealDisk), &dir, &identity, options)).await?)
}

fn open_tier(config: &Config, url: &str, metrics: &Metrics) -> anyhow::Result<Tier> {
    let from = &config.object_store;
    let options = StoreOptions {
        endpoint: from.endpoint.clone(),
        region: from.region.clone(),
        path_style: from.path_style,
        ..StoreOptions::new(url)
    };
    let store = Store::open(&options, &config.cluster)?;
    let cache_dir = config.cache.dir.clone().unwrap_or_else(|| config.broker.data_dir.join("cache"));
    // What lies in a folder of this machine need not lie in another one.
    let on_disk = config.cache.disk_bytes > 0 && !store.is_folder();
    let options = CacheOptions {
        memory_bytes: config.cache.memory_bytes,
        disk: on_disk.then_some((cache_dir.clone(), config.cache.disk_bytes)),
        read_ahead_bytes: READ_AHEAD_BYTES,
    };
    let cache = Cache::open(&options, metrics)
        .with_context(|| format!("cannot use the cache directory {}", cache_dir.display()))?;
    Ok(Tier { store, cache })
}

/// Makes sure that the object store is not another cluster's. Waits a moment only: a store that is away or slow is asked
/// again by every upload.
async fn claim(store: &Store, tasks: &Tasks) -> Result<(), ClaimError> {
    let asked = store.clone();
    let answer = tasks.spawn("claim", async move { asked.claim().await });
    match tokio::time::timeout(CLAIM_WAIT, answer).await {
        Ok(Ok(Err(foreign @ ClaimError::Foreign { .. }))) => Err(foreign),
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

/// The address that clients are told: the one configured, or, where a port was left to the system, the real one.
fn advertised(config: &Config, grpc: &TcpListener) -> anyhow::Result<String> {
    if config.grpc.listen.port() == 0 {
        return Ok(grpc.local_addr()?.to_string());
    }
    Ok(config.grpc.advertise.clone().unwrap_or_else(|| config.grpc.listen.to_string()))
}

fn settings(config: &Config) -> broker::Settings {
    broker::Settings {
        id: config.broker.id,
        cluster: config.cluster.clone(),
        topic_defaults: config.topic_defaults.clone(),
        produce_memory_bytes: config.limits.produce_memory_bytes,
        upkeep_workers: config.tier.upload_concurrency,
        retention_interval: config.tier.check_interval,
        garbage_grace: config.tier.garbage_grace,
        upload_grace: config.tier.upload_grace,
    }
}
