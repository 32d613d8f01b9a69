//! The composition root: binds ports, builds the broker, runs it, and stops everything in order.
//!
//! # Start
//!
//! 1. Bind the ports. A port conflict is the most likely error, and is found before any data is touched. The HTTP
//!    listener serves from here on.
//! 2. Open the data directory (lock, journal replay). A broker that cannot run must not reach the stores.
//! 3. Open the metadata store, and compare its cluster generation with the data directory. A broker of a cluster waits
//!    until the store responds, and writes a new incarnation to its data directory (`admission`).
//! 4. Start the metadata cache. Verify the owner of the object store: a prefix that the cluster must not use ends the
//!    start. An object store that does not respond at once delays uploads, not the start.
//! 5. Open the partitions that the metadata assigns to this broker. They stay idle. A broker of a cluster serves its
//!    peer listener, through which peers see that an earlier process has ended.
//! 6. A broker of a cluster verifies its local inventory, and releases its leaderships and its unverified ISR and ELR
//!    memberships (`admission`). Every broker registers.
//! 7. Activate: lead, follow, serve. Report that the broker is ready.
//!
//! # Stop
//!
//! 1. `/readyz` and gRPC health report that the broker is not ready, so that no new clients connect. A broker of a
//!    cluster begins a controlled shutdown. It waits until other brokers lead its partitions and no commit needs it,
//!    for at most half of `broker.shutdown_timeout`.
//! 2. The broker refuses new writes, ends the streams of readers, acknowledges written data and ends maintenance. A
//!    broker of a cluster ends its registration.
//! 3. The listeners end their connections within `broker.shutdown_timeout`.
//! 4. The tasks of the object store end. The log is synced and marked as closed.
//! 5. The registration of a standalone broker ends, and the metadata store closes.
//!
//! A second stop signal has no effect. If the process is killed during the stop, recovery completes the work at the
//! next start.

mod admission;
mod advertised;
mod calls;
mod connection;
mod connection_limits;
mod connection_slots;
mod generation;
mod grpc;
mod http;
mod listen;
mod multi_broker;
mod node;
mod request_body;
mod streams;

use std::{
    future::Future,
    net::SocketAddr,
    path::PathBuf,
    pin::{Pin, pin},
    sync::Arc,
    time::Duration,
};

use anyhow::Context as _;
use tokio::{net::TcpListener, time::Instant};
use tonic::service::Routes;

use self::{
    connection::{ConnectionLimiter, ListenerKind},
    connection_limits::ConnectionLimits,
    http::HttpState,
};
pub use self::{
    generation::{Raised, raise_generation},
    multi_broker::run_several,
    node::{Node, NodeDeps, StoreHandles},
};
use crate::{
    client::{self, TcpConnector},
    cluster::{EmbeddedStore, Endpoints, EtcdStore, MetaStore},
    config::Config,
    log::{DataDir, RealDisk},
    task::{self, Tasks, clock},
    telemetry::Metrics,
    tier::{ObjectStoreOptions, TierStore},
};

/// Addresses and start statistics of a serving broker, for the output of the start.
#[derive(Clone, Debug)]
pub struct ServingAddresses {
    /// Address of the gRPC listener.
    pub grpc: SocketAddr,
    /// Address of the HTTP listener.
    pub http: SocketAddr,
    /// Data directory.
    pub data_dir: PathBuf,
    /// URL of the object store; `None` without one.
    pub object_store: Option<String>,
    /// Number of open partitions.
    pub partitions: usize,
    /// Duration of the start.
    pub took: Duration,
}

impl ServingAddresses {
    fn new(config: &Config, grpc: SocketAddr, http: SocketAddr, node: &Node, began: Instant) -> Self {
        Self {
            grpc,
            http,
            data_dir: config.broker.data_dir.clone(),
            object_store: config.object_store.url.clone(),
            partitions: node.broker().open_partition_count(),
            took: began.elapsed(),
        }
    }
}

/// Maximum time that a stop of the process waits for a data directory that is being opened.
const OPEN_TIMEOUT: Duration = Duration::from_secs(1);

/// Runs a broker until `shutdown` resolves or the broker must stop ([`Node::must_stop`]). Returns when everything has
/// stopped; the error is that of the start, the reason why the broker must stop, or that of the stop. `ready` is called
/// once the broker serves, unless `shutdown` resolved during the start.
pub async fn run(
    config: Config,
    shutdown: impl Future<Output = ()>,
    ready: impl FnOnce(&ServingAddresses),
) -> anyhow::Result<()> {
    let began = clock::monotonic();
    let grpc = listen::listen(config.grpc.listen, "gRPC", "--listen").await?;
    let http = listen::listen(config.http.listen, "HTTP", "--http").await?;
    let standalone = config.metadata.etcd.is_empty();
    let peer = if standalone { None } else { Some(listen_for_peers(&config).await?) };
    let endpoints = endpoints(&config, &grpc, &http, peer.as_ref())?;
    let (client_address, peer_address) = (endpoints.client().to_owned(), endpoints.peer().map(str::to_owned));
    config.prepare_data_dir()?;

    let metrics = Metrics::new();
    let background = Tasks::new();
    let deps = broker_deps(&config, &background);
    let mut shutdown = pin!(shutdown);
    let http_address = http.local_addr()?;
    let http_state = Arc::new(HttpState::new(metrics.clone()));
    let limits = ConnectionLimits::of(1, standalone, config.limits.memory_bytes);
    let listeners = Listeners::begin(Arc::clone(&http_state), http, limits, &config, &metrics);
    let opened = open_unless(node::open_log(&config, &deps, metrics.clone()), shutdown.as_mut()).await;
    let log = match opened {
        Ok(Some(log)) => log,
        stopped_or_failed => {
            listeners.stop(config.broker.shutdown_timeout).await;
            return stopped_or_failed.map(drop);
        }
    };
    let stop = Tasks::new();
    let serve_peers = |routes| listeners.serve_peers(routes, peer, &metrics);
    let starting = Node::from_log(&config, log.clone(), deps, endpoints, metrics.clone(), &stop, serve_peers);
    let cancel_start = || {
        stop.cancel();
        log.begin_shutdown();
    };
    let StartedNode { node, stop_requested } = match start_unless(starting, cancel_start, shutdown.as_mut()).await {
        Ok(Some(started)) => started,
        stopped_or_failed => {
            listeners.stop(config.broker.shutdown_timeout).await;
            return stopped_or_failed.map(drop);
        }
    };
    http_state.set_broker(node.broker());
    let addresses = ServingAddresses::new(&config, grpc.local_addr()?, http_address, &node, began);
    listeners.serve_clients(&node, grpc);
    check_advertised(&config, &client_address, peer_address.as_deref(), &background);
    let mut outcome = Ok(());
    if !stop_requested {
        ready(&addresses);
        tokio::select! {
            biased;
            () = &mut shutdown => {}
            error = node.must_stop() => outcome = Err(error),
        }
    }
    tracing::info!("stopping");
    node.begin_stop(config.broker.shutdown_timeout).await;
    listeners.stop(config.broker.shutdown_timeout).await;
    node.close().await?;
    background.stop().await;
    tracing::info!("stopped");
    outcome
}

/// Warns in the background if an advertised name does not resolve. The peer address is checked only if `peer.advertise`
/// is set: otherwise it has the host of the client address.
fn check_advertised(config: &Config, client_address: &str, peer_address: Option<&str>, tasks: &Tasks) {
    advertised::check(
        client_address,
        "correct grpc.advertise, or leave it out if clients connect to grpc.listen",
        tasks,
    );
    if let Some(peer_address) = peer_address.filter(|_| config.peer.advertise.is_some()) {
        let remedy = "correct peer.advertise, or leave it out if other brokers connect to the host of grpc.advertise";
        advertised::check(peer_address, remedy, tasks);
    }
}

/// Waits for a data directory that is being opened. Returns `None` if `shutdown` resolved first; the directory is then
/// closed again if it opens within [`OPEN_TIMEOUT`].
async fn open_unless(
    opening: impl Future<Output = anyhow::Result<DataDir>>,
    shutdown: Pin<&mut impl Future<Output = ()>>,
) -> anyhow::Result<Option<DataDir>> {
    let mut opening = pin!(opening);
    tokio::select! {
        biased;
        log = &mut opening => log.map(Some),
        () = shutdown => stop_opening(opening).await.map(|()| None),
    }
}

/// A node whose start is complete.
struct StartedNode {
    node: Node,
    /// True if a stop of the process was requested during the start. The caller then stops the node without serving.
    stop_requested: bool,
}

/// Waits for a node that is being started. If `shutdown` resolves first, calls `cancel_start` and still waits for the
/// end of the start. Returns `None` if the cancellation ended the start.
async fn start_unless(
    starting: impl Future<Output = anyhow::Result<Node>>,
    cancel_start: impl FnOnce(),
    shutdown: Pin<&mut impl Future<Output = ()>>,
) -> anyhow::Result<Option<StartedNode>> {
    let mut starting = pin!(starting);
    tokio::select! {
        biased;
        node = &mut starting => return Ok(Some(StartedNode { node: node?, stop_requested: false })),
        () = shutdown => {}
    }
    tracing::info!("stopping before the broker has started");
    cancel_start();
    match starting.await {
        Ok(node) => Ok(Some(StartedNode { node, stop_requested: true })),
        Err(error) if error.is::<admission::StartCancelled>() => Ok(None),
        Err(error) => Err(error),
    }
}

/// Ends a start that is still opening the data directory. A directory that opens within [`OPEN_TIMEOUT`] is closed
/// cleanly. A long journal after a crash takes longer to read; the next start reads that journal again.
async fn stop_opening(opening: impl Future<Output = anyhow::Result<DataDir>>) -> anyhow::Result<()> {
    tracing::info!("stopping before the data directory is open");
    if let Ok(Ok(log)) = tokio::time::timeout(OPEN_TIMEOUT, opening).await {
        task::run_blocking(move || log.close()).await.context("cannot close the data directory")?;
    }
    Ok(())
}

/// Listeners of one broker that serve connections.
struct Listeners {
    tasks: Tasks,
    limits: ConnectionLimits,
    /// Maximum number of connections from one address; `None` for half of a listener's connections.
    connections_per_address: Option<usize>,
    /// Maximum memory that clients can make the broker use (`limits.memory_bytes`).
    memory_bytes: u64,
}

impl Listeners {
    /// Starts the HTTP listener. The listener already serves during the start, so that probes see a start that reads a
    /// long journal or waits for other brokers.
    fn begin(
        http_state: Arc<HttpState>,
        http: TcpListener,
        limits: ConnectionLimits,
        config: &Config,
        metrics: &Metrics,
    ) -> Self {
        let tasks = Tasks::new();
        let connections_per_address = config.limits.connections_per_address;
        let limiter =
            ConnectionLimiter::new(ListenerKind::Http, limits.http, connections_per_address, u64::MAX, None, metrics);
        tasks.spawn("http", http::serve(http_state, connection::accept(http, limiter), tasks.clone()));
        Self { tasks, limits, connections_per_address, memory_bytes: config.limits.memory_bytes }
    }

    /// Starts the gRPC listener for clients.
    fn serve_clients(&self, node: &Node, grpc: TcpListener) {
        let (metrics, per_address) = (node.metrics(), self.connections_per_address);
        let open = Some(metrics.connections.clone());
        let limiter =
            ConnectionLimiter::new(ListenerKind::Grpc, self.limits.grpc, per_address, self.memory_bytes, open, metrics);
        self.spawn_grpc("grpc", node.routes(), grpc, limiter, grpc::Windows::of_clients(self.memory_bytes));
    }

    /// Starts the gRPC listener for other brokers. A standalone broker has none.
    fn serve_peers(&self, routes: Routes, peer: Option<TcpListener>, metrics: &Metrics) {
        if let (Some(peer), Some(capacity)) = (peer, self.limits.peer) {
            // One address may use all slots: brokers on one host, in one /64 or behind one NAT share an address.
            let limiter =
                ConnectionLimiter::new(ListenerKind::Peer, capacity, Some(capacity.slots), u64::MAX, None, metrics);
            self.spawn_grpc("peer", routes, peer, limiter, grpc::Windows::of_brokers());
        }
    }

    /// Serves a gRPC listener in a task called `name`.
    fn spawn_grpc(
        &self,
        name: &'static str,
        routes: Routes,
        listener: TcpListener,
        limiter: ConnectionLimiter,
        windows: grpc::Windows,
    ) {
        let connections = connection::accept(listener, limiter);
        self.tasks.spawn(name, grpc::serve(routes, connections, windows, self.tasks.clone()));
    }

    /// Stops accepting connections, and waits until each open connection has ended after its open calls. Returns after
    /// `timeout` at the latest; the exit of the process then aborts the remaining connections.
    async fn stop(&self, timeout: Duration) {
        if tokio::time::timeout(timeout, self.tasks.stop()).await.is_err() {
            tracing::warn!(timeout_s = timeout.as_secs(), "closing connections that are still open after the timeout");
        }
    }
}

/// Returns the dependencies of a broker. These are the disk of this machine, the configured object store, and the
/// metadata store in the data directory or in etcd. A task of `background` expires the leases of a metadata store in
/// the data directory.
fn broker_deps(config: &Config, background: &Tasks) -> NodeDeps {
    let (config, background) = (config.clone(), background.clone());
    let standalone = config.metadata.etcd.is_empty();
    NodeDeps {
        disk: Arc::new(RealDisk::default()),
        stores: Box::pin(async move {
            let objects = config.object_store.url.as_deref().map(|url| open_objects(&config, url)).transpose()?;
            let meta: Arc<dyn MetaStore> = match config.etcd()? {
                Some(options) => Arc::new(EtcdStore::open(options).await?),
                None => {
                    let meta = EmbeddedStore::open(&config.broker.data_dir).await?;
                    meta.spawn_lease_expiry(&background);
                    Arc::new(meta)
                }
            };
            Ok(StoreHandles { meta, objects })
        }),
        connect: Arc::new(TcpConnector::between_brokers(client::ClientOptions::default().connect_timeout)),
        standalone,
        sim_hook: None,
    }
}

/// Opens the object store at `url` with the endpoint and region of the configuration. Sends no request.
pub(super) fn open_objects(config: &Config, url: &str) -> anyhow::Result<TierStore> {
    let settings = &config.object_store;
    let options = ObjectStoreOptions {
        endpoint: settings.endpoint.clone(),
        region: settings.region.clone(),
        path_style: settings.path_style,
        ..ObjectStoreOptions::new(url)
    };
    Ok(TierStore::open(&options, &config.cluster)?)
}

async fn listen_for_peers(config: &Config) -> anyhow::Result<TcpListener> {
    Ok(listen::listen(config.peer.listen, "other brokers", "peer.listen").await?)
}

/// Returns the endpoints for the registration: the advertised addresses of the listeners, with the bound port instead
/// of port 0.
fn endpoints(
    config: &Config,
    grpc: &TcpListener,
    http: &TcpListener,
    peer: Option<&TcpListener>,
) -> anyhow::Result<Endpoints> {
    let endpoints =
        Endpoints::new(config.grpc.advertised(grpc.local_addr()?)).with_http(http.local_addr()?.to_string());
    Ok(match peer {
        Some(peer) => endpoints.with_peer(config.peer.advertised(peer.local_addr()?, &config.grpc)),
        None => endpoints,
    })
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::config::ConfigSources;

    /// Regression: an advertised port 0 was sent unchanged if the port of the listener was set. If the port of the
    /// listener was 0 as well, clients received the listen address instead of the advertised one.
    #[tokio::test]
    async fn advertised_port_0_becomes_bound_port() {
        let bind_any = || async { TcpListener::bind("127.0.0.1:0").await.expect("a free port") };
        let (grpc, http, peer) = (bind_any().await, bind_any().await, bind_any().await);
        let port = |listener: &TcpListener| listener.local_addr().expect("the listener is bound").port();
        for (text, client_address, peer_address) in [
            ("", format!("127.0.0.1:{}", port(&grpc)), format!("127.0.0.1:{}", port(&peer))),
            (
                "[grpc]\nlisten = \"0.0.0.0:0\"\nadvertise = \"b:0\"",
                format!("b:{}", port(&grpc)),
                format!("b:{}", port(&peer)),
            ),
            ("[grpc]\nadvertise = \"b:0\"", format!("b:{}", port(&grpc)), format!("b:{}", port(&peer))),
            ("[grpc]\nlisten = \"0.0.0.0:0\"\nadvertise = \"b:7\"", "b:7".to_owned(), format!("b:{}", port(&peer))),
            ("[peer]\nadvertise = \"p:0\"", format!("127.0.0.1:{}", port(&grpc)), format!("p:{}", port(&peer))),
            ("[peer]\nadvertise = \"[::1]:0\"", format!("127.0.0.1:{}", port(&grpc)), format!("[::1]:{}", port(&peer))),
        ] {
            let config = ConfigSources::new().file(Path::new("s.toml"), text).load().expect("valid").config;
            let endpoints = endpoints(&config, &grpc, &http, Some(&peer)).expect("all are bound");
            assert_eq!(
                (endpoints.client(), endpoints.peer()),
                (client_address.as_str(), Some(peer_address.as_str())),
                "{text}"
            );
        }
    }
}
