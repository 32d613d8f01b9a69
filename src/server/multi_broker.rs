//! Several brokers in one process, for trials of a cluster. They share the process and, without etcd, a metadata store.
//! Apart from that each is a normal broker, and they communicate only through their listeners.

use std::{future::Future, path::PathBuf, pin::pin, sync::Arc, time::Duration};

use anyhow::Context as _;
use futures::future;
use tokio::net::TcpListener;
use tracing::{Instrument as _, Span};

use super::{
    Listeners, Node, NodeDeps, ServingAddresses, StoreHandles, admission, broker_deps,
    connection_limits::ConnectionLimits, endpoints, http::HttpState, listen, listen_for_peers, node, open_objects,
};
use crate::{
    client::{self, TcpConnector},
    cluster::{EmbeddedStore, Endpoints, MetaStore},
    config::Config,
    log::RealDisk,
    task::{Tasks, clock},
    telemetry::Metrics,
};

/// Maximum time that the start waits until the metadata cache of each broker contains all brokers.
const VISIBLE_TIMEOUT: Duration = Duration::from_secs(10);

/// Bound listeners of a broker that does not serve yet.
struct BoundPorts {
    grpc: TcpListener,
    http: TcpListener,
    peer: TcpListener,
    endpoints: Endpoints,
}

/// A broker that serves.
struct RunningBroker {
    node: Node,
    listeners: Listeners,
    addresses: ServingAddresses,
    /// Span of the broker's log lines.
    span: Span,
    shutdown_timeout: Duration,
}

/// State that the brokers share, for their start.
struct SharedDeps {
    /// Metadata store; `None` if each broker uses the etcd of its settings.
    meta: Option<Arc<dyn MetaStore>>,
    /// Tasks that expire the leases of an embedded metadata store.
    background: Tasks,
    /// Cancelled to end the waits of all starts.
    stop: Tasks,
    /// Connection limits of each broker.
    limits: ConnectionLimits,
}

/// Runs brokers until `shutdown` resolves or one of them must stop. Returns when all have stopped. `metadata` is the
/// directory of their shared metadata store; without it, each broker uses the etcd of its settings. If a broker fails
/// to start, the others are stopped. `ready` is called once all brokers serve and each metadata cache contains all of
/// them, or after `VISIBLE_TIMEOUT`, unless a stop was requested before.
pub async fn run_several(
    configs: Vec<Config>,
    metadata: Option<PathBuf>,
    shutdown: impl Future<Output = ()>,
    ready: impl FnOnce(&[ServingAddresses]),
) -> anyhow::Result<()> {
    let ports = bind_ports(&configs).await?;
    for config in &configs {
        config.prepare_data_dir()?;
    }
    let memory_bytes = configs.iter().map(|config| config.limits.memory_bytes).min().unwrap_or_default();
    let limits = ConnectionLimits::of(configs.len(), false, memory_bytes);
    let mut shared = SharedDeps { meta: None, background: Tasks::new(), stop: Tasks::new(), limits };
    if let Some(folder) = &metadata {
        let store = EmbeddedStore::open(folder).await?;
        store.spawn_lease_expiry(&shared.background);
        shared.meta = Some(Arc::new(store));
    }
    let mut shutdown = pin!(shutdown);
    let StartedBrokers { brokers, error, mut stop_requested } =
        start_all(&configs, ports, &shared, shutdown.as_mut()).await;
    let mut outcome = error.map_or(Ok(()), Err);
    if outcome.is_ok() && !stop_requested {
        // After `ready`, a client may create a topic. It must not get an error about too few brokers, so each metadata
        // cache must contain all brokers first.
        let waits = brokers.iter().map(|broker| broker.node.broker().wait_for_brokers(brokers.len()));
        let all_visible = future::join_all(waits);
        tokio::select! {
            biased;
            () = &mut shutdown => stop_requested = true,
            _visible_or_timeout = tokio::time::timeout(VISIBLE_TIMEOUT, all_visible) => {}
        }
    }
    if outcome.is_ok() && !stop_requested {
        let addresses: Vec<ServingAddresses> = brokers.iter().map(|broker| broker.addresses.clone()).collect();
        ready(&addresses);
        let must_stop = future::select_all(brokers.iter().map(|broker| Box::pin(broker.node.must_stop())));
        tokio::select! {
            biased;
            () = &mut shutdown => {}
            (error, ..) = must_stop => outcome = Err(error),
        }
    }
    tracing::info!("stopping");
    let stopped: anyhow::Result<Vec<()>> = future::join_all(brokers.into_iter().map(stop)).await.into_iter().collect();
    shared.background.stop().await;
    tracing::info!("stopped");
    outcome.and(stopped.map(|_| ()))
}

/// Binds the ports of all brokers. A port conflict is the most likely error, and is found before any data is touched.
async fn bind_ports(configs: &[Config]) -> anyhow::Result<Vec<BoundPorts>> {
    let mut client_ports = Vec::with_capacity(configs.len());
    for config in configs {
        let grpc = listen::listen(config.grpc.listen, "gRPC", "--listen").await?;
        client_ports.push((grpc, listen::listen(config.http.listen, "HTTP", "--http").await?));
    }
    // If the system chooses the peer ports, it must choose none of the configured client ports. So peer ports are bound
    // last.
    let mut ports = Vec::with_capacity(configs.len());
    for (config, (grpc, http)) in configs.iter().zip(client_ports) {
        let peer = listen_for_peers(config).await?;
        let endpoints = endpoints(config, &grpc, &http, Some(&peer))?;
        ports.push(BoundPorts { grpc, http, peer, endpoints });
    }
    Ok(ports)
}

/// Result of starting all brokers.
struct StartedBrokers {
    brokers: Vec<RunningBroker>,
    /// Error of the first broker that failed to start.
    error: Option<anyhow::Error>,
    /// True if a stop of the process was requested during the start.
    stop_requested: bool,
}

/// Starts all brokers concurrently. The failure of one broker, or `shutdown`, cancels the waits of all starts.
async fn start_all(
    configs: &[Config],
    ports: Vec<BoundPorts>,
    shared: &SharedDeps,
    shutdown: impl Future<Output = ()>,
) -> StartedBrokers {
    let starting = configs.iter().zip(ports).map(async |(config, ports)| {
        // Every task that a broker starts inherits this span.
        let span = tracing::info_span!("broker", id = %config.broker.id);
        let started = start(config, ports, shared, span.clone()).instrument(span).await;
        if started.is_err() {
            // Ends the waits of the other brokers.
            shared.stop.cancel();
        }
        started.map_err(|error| (config.broker.id, error))
    });
    let mut starting = pin!(future::join_all(starting));
    let mut stop_requested = false;
    let started = tokio::select! {
        biased;
        started = &mut starting => started,
        () = shutdown => {
            tracing::info!("stopping before every broker has started");
            stop_requested = true;
            shared.stop.cancel();
            starting.await
        }
    };
    let (mut brokers, mut first_error) = (Vec::with_capacity(configs.len()), None);
    for outcome in started {
        match outcome {
            Ok(broker) => brokers.push(broker),
            Err((_, error)) if error.is::<admission::StartCancelled>() => {}
            Err((id, error)) => first_error = first_error.or(Some(error.context(format!("broker {id} cannot start")))),
        }
    }
    StartedBrokers { brokers, error: first_error, stop_requested }
}

/// Starts one broker and its listeners. If the start fails, its listeners are stopped.
async fn start(config: &Config, ports: BoundPorts, shared: &SharedDeps, span: Span) -> anyhow::Result<RunningBroker> {
    let began = clock::monotonic();
    let metrics = Metrics::new();
    let deps = match &shared.meta {
        None => broker_deps(config, &shared.background),
        Some(meta) => deps_with_shared_metadata(config, Arc::clone(meta)),
    };
    let (shutdown_timeout, http_address) = (config.broker.shutdown_timeout, ports.http.local_addr()?);
    let http_state = Arc::new(HttpState::new(metrics.clone()));
    let listeners = Listeners::begin(Arc::clone(&http_state), ports.http, shared.limits, config, &metrics);
    let node = async {
        let log = node::open_log(config, &deps, metrics.clone()).await?;
        let serve_peers = |routes| listeners.serve_peers(routes, Some(ports.peer), &metrics);
        Node::from_log(config, log, deps, ports.endpoints, metrics.clone(), &shared.stop, serve_peers).await
    };
    let node = match node.await {
        Ok(node) => node,
        Err(error) => {
            listeners.stop(shutdown_timeout).await;
            return Err(error);
        }
    };
    http_state.set_broker(node.broker());
    let addresses = ServingAddresses::new(config, ports.grpc.local_addr()?, http_address, &node, began);
    listeners.serve_clients(&node, ports.grpc);
    Ok(RunningBroker { node, listeners, addresses, span, shutdown_timeout })
}

/// Returns the dependencies of a broker with a shared metadata store. This store is not in the broker's data directory,
/// so the broker is not standalone and needs the startup verification.
fn deps_with_shared_metadata(config: &Config, meta: Arc<dyn MetaStore>) -> NodeDeps {
    let config = config.clone();
    NodeDeps {
        disk: Arc::new(RealDisk::default()),
        stores: Box::pin(async move {
            let objects = config.object_store.url.as_deref().map(|url| open_objects(&config, url)).transpose()?;
            Ok(StoreHandles { meta, objects })
        }),
        connect: Arc::new(TcpConnector::between_brokers(client::ClientOptions::default().connect_timeout)),
        standalone: false,
        sim_hook: None,
    }
}

/// Stops one broker and its listeners.
async fn stop(broker: RunningBroker) -> anyhow::Result<()> {
    let RunningBroker { node, listeners, span, shutdown_timeout, .. } = broker;
    let id = node.broker().id();
    let stopped = async {
        node.begin_stop(shutdown_timeout).await;
        listeners.stop(shutdown_timeout).await;
        node.close().await.with_context(|| format!("broker {id}"))
    };
    stopped.instrument(span).await
}
