//! The composition root: build, listen, run, stop in order.
//!
//! # Start
//!
//! 1. Take the ports: the likeliest mistake, found before any data is touched.
//! 2. Open the data directory (lock, journal replay): nothing is claimed for a broker that cannot run. Ask the object store
//!    whose it is: another cluster's prefix ends the start. A bucket that does not answer at once delays uploads, not the
//!    start. Then open the metadata store.
//! 3. Mirror the metadata and open the partitions that it gives this broker: they do nothing yet. The listener for brokers answers who this
//!    process is, so that the others see that an earlier one is gone.
//! 4. A broker of several shows what it holds and gives up what it cannot prove (`admission`). Register.
//! 5. Take part: lead, follow, serve; say that it is ready.
//!
//! # Stop
//!
//! 1. `/readyz` and gRPC health say no, so that nobody new comes. A broker of several says that it stops, and waits until others
//!    lead what it led and need it for no commit, within half of `broker.shutdown_timeout`.
//! 2. The broker refuses new writes, ends readers' streams, answers what is written, ends upkeep. One of several gives up its
//!    registration.
//! 3. The listeners end their connections, within `broker.shutdown_timeout`.
//! 4. The object store's tasks end; the log is synced and marked as closed.
//! 5. The registration of a broker alone is given up, and the metadata store closes.
//!
//! A second signal is not waited for: what a kill interrupts here, recovery finishes.

mod admission;
mod advertised;
mod calls;
mod connection;
mod generation;
mod grpc;
mod http;
mod listen;
mod node;
mod places;
mod request_body;
mod room;
mod several;
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
use tokio::net::TcpListener;
use tonic::service::Routes;

use self::{
    connection::{ConnectionLimiter, Port},
    http::Pages,
    room::Room,
};
pub use self::{
    generation::{Raised, raise_generation},
    node::{Node, Outside, Stores},
    several::run_several,
};
use crate::{
    client::{self, Tcp},
    cluster::{EmbeddedStore, Endpoints, EtcdStore, MetaStore},
    config::Config,
    log::{Log, RealDisk},
    task::{self, Tasks, clock},
    telemetry::Metrics,
    tier::{Store, StoreOptions},
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

/// How long a stop waits for a data directory that is being opened.
const OPEN_WAIT: Duration = Duration::from_secs(1);

/// Runs a broker until `shutdown` resolves and everything has stopped.
pub async fn run(config: Config, shutdown: impl Future<Output = ()>, ready: impl FnOnce(&Ready)) -> anyhow::Result<()> {
    let began = clock::monotonic();
    let grpc = listen::listen(config.grpc.listen, "gRPC", "--listen").await?;
    let http = listen::listen(config.http.listen, "HTTP", "--http").await?;
    let alone = config.metadata.etcd.is_empty();
    let peer = if alone { None } else { Some(listen_for_peers(&config).await?) };
    let endpoints = endpoints(&config, &grpc, &http, peer.as_ref())?;
    let (told, peers_told) = (endpoints.client().to_owned(), endpoints.peer().map(str::to_owned));
    config.prepare_data_dir()?;

    let metrics = Metrics::new();
    let time = Tasks::new();
    let outside = outside(&config, &time);
    let mut shutdown = pin!(shutdown);
    let http_at = http.local_addr()?;
    let pages = Arc::new(Pages::new(metrics.clone()));
    let room = Room::of(1, alone, config.limits.memory_bytes);
    let listeners = Listeners::begin(Arc::clone(&pages), http, room, &config, &metrics);
    let opened = {
        let mut opening = pin!(node::open_log(&config, &outside, metrics.clone()));
        tokio::select! {
            biased;
            log = &mut opening => log.map(Some),
            () = &mut shutdown => stop_opening(opening).await.map(|()| None),
        }
    };
    let log = match opened {
        Ok(Some(log)) => log,
        ended => {
            listeners.stop(config.broker.shutdown_timeout).await;
            return ended.map(drop);
        }
    };
    let stop = Tasks::new();
    let serve_peers = |routes| listeners.serve_peers(routes, peer, &metrics);
    let starting = Node::over(&config, log.clone(), outside, endpoints, metrics.clone(), &stop, serve_peers);
    let give_up = || {
        stop.cancel();
        log.expect_close();
    };
    let (node, asked) = match start_unless(starting, give_up, shutdown.as_mut()).await {
        Ok(Some(started)) => started,
        ended => {
            listeners.stop(config.broker.shutdown_timeout).await;
            return ended.map(drop);
        }
    };
    pages.tell_of(node.broker());
    let state = Ready {
        grpc: grpc.local_addr()?,
        http: http_at,
        data_dir: config.broker.data_dir.clone(),
        object_store: config.object_store.url.clone(),
        partitions: node.broker().partitions(),
        took: began.elapsed(),
    };
    listeners.serve(&node, grpc);
    advertised::check(&told, "correct grpc.advertise, or leave it out where clients reach grpc.listen", &time);
    if let Some(peers_told) = peers_told.filter(|_| config.peer.advertise.is_some()) {
        let remedy = "correct peer.advertise, or leave it out where other brokers reach the host that clients are told";
        advertised::check(&peers_told, remedy, &time);
    }
    let mut outcome = Ok(());
    if !asked {
        ready(&state);
        tokio::select! {
            biased;
            () = &mut shutdown => {}
            error = node.must_stop() => outcome = Err(error),
        }
    }
    tracing::info!("stopping");
    node.retire(config.broker.shutdown_timeout).await;
    listeners.stop(config.broker.shutdown_timeout).await;
    node.close().await?;
    time.stop().await;
    tracing::info!("stopped");
    outcome
}

/// A node, and whether the process was asked to stop meanwhile; `None` when it was, and the start ended by that.
async fn start_unless(
    starting: impl Future<Output = anyhow::Result<Node>>,
    give_up: impl FnOnce(),
    shutdown: Pin<&mut impl Future<Output = ()>>,
) -> anyhow::Result<Option<(Node, bool)>> {
    let mut starting = pin!(starting);
    tokio::select! {
        biased;
        node = &mut starting => return Ok(Some((node?, false))),
        () = shutdown => {}
    }
    tracing::info!("stopping before the broker has started");
    give_up();
    match starting.await {
        Ok(node) => Ok(Some((node, true))),
        Err(error) if error.is::<admission::Stopped>() => Ok(None),
        Err(error) => Err(error),
    }
}

/// Ends a start that has come no further than the data directory. A clean one is open in a moment and is left clean. Reading a long
/// journal after a crash is not waited for: the next start does it again.
async fn stop_opening(opening: impl Future<Output = anyhow::Result<Log>>) -> anyhow::Result<()> {
    tracing::info!("stopping before the data directory is open");
    if let Ok(Ok(log)) = tokio::time::timeout(OPEN_WAIT, opening).await {
        task::run_blocking(move || log.close()).await.context("cannot close the data directory")?;
    }
    Ok(())
}

/// The listeners while they serve.
struct Listeners {
    tasks: Tasks,
    room: Room,
    connections_per_address: Option<usize>,
    /// What clients can make the broker hold.
    memory_bytes: u64,
}

impl Listeners {
    /// The pages come first: a start that reads a long journal, or waits for others, can be asked how it is.
    fn begin(pages: Arc<Pages>, http: TcpListener, room: Room, config: &Config, metrics: &Metrics) -> Self {
        let tasks = Tasks::new();
        let connections_per_address = config.limits.connections_per_address;
        let limiter = ConnectionLimiter::new(Port::Http, room.http, connections_per_address, u64::MAX, None, metrics);
        tasks.spawn("http", http::serve(pages, connection::accept(http, limiter), tasks.clone()));
        Self { tasks, room, connections_per_address, memory_bytes: config.limits.memory_bytes }
    }

    fn serve(&self, node: &Node, grpc: TcpListener) {
        let (metrics, per_address) = (node.metrics(), self.connections_per_address);
        let open = Some(metrics.connections.clone());
        let limiter = ConnectionLimiter::new(Port::Grpc, self.room.grpc, per_address, self.memory_bytes, open, metrics);
        self.carry("grpc", node.routes(), grpc, limiter, grpc::Windows::of_clients(self.memory_bytes));
    }

    fn serve_peers(&self, routes: Routes, peer: Option<TcpListener>, metrics: &Metrics) {
        if let (Some(peer), Some(capacity)) = (peer, self.room.peer) {
            // No bound by address: brokers on one host, in one /64 or behind one NAT share an address.
            let limiter = ConnectionLimiter::new(Port::Peer, capacity, Some(capacity.places), u64::MAX, None, metrics);
            self.carry("peer", routes, peer, limiter, grpc::Windows::of_brokers());
        }
    }

    fn carry(
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

    /// Ends the connections; those that have not ended in time are cut.
    async fn stop(&self, timeout: Duration) {
        if tokio::time::timeout(timeout, self.tasks.stop()).await.is_err() {
            tracing::warn!(timeout_s = timeout.as_secs(), "connections were still open after the timeout and are cut");
        }
    }
}

/// The world of a broker: this machine's disk, the object store of the settings, and the metadata beside the log or in etcd.
fn outside(config: &Config, time: &Tasks) -> Outside {
    let (of, time) = (config.clone(), time.clone());
    Outside {
        disk: Arc::new(RealDisk::default()),
        stores: Box::pin(async move {
            let objects = of.object_store.url.as_deref().map(|url| open_objects(&of, url)).transpose()?;
            let meta: Arc<dyn MetaStore> = match of.etcd()? {
                Some(options) => Arc::new(EtcdStore::open(options).await?),
                None => {
                    let meta = EmbeddedStore::open(&of.broker.data_dir).await?;
                    meta.keep_time(&time);
                    Arc::new(meta)
                }
            };
            Ok(Stores { meta, objects })
        }),
        connect: Arc::new(Tcp::between_brokers(client::Options::default().connect_timeout)),
        alone: config.metadata.etcd.is_empty(),
        stepper: None,
    }
}

pub(super) fn open_objects(config: &Config, url: &str) -> anyhow::Result<Store> {
    let from = &config.object_store;
    let options = StoreOptions {
        endpoint: from.endpoint.clone(),
        region: from.region.clone(),
        path_style: from.path_style,
        ..StoreOptions::new(url)
    };
    Ok(Store::open(&options, &config.cluster)?)
}

async fn listen_for_peers(config: &Config) -> anyhow::Result<TcpListener> {
    Ok(listen::listen(config.peer.listen, "other brokers", "peer.listen").await?)
}

/// What others are told of the listeners: the addresses configured, or, where a port was left to the system, the real ones.
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
    use crate::config::Sources;

    /// Port 0 was advertised as it stands where the listener's own port was set, and clients were told the listener's address where it was 0.
    #[tokio::test]
    async fn endpoints_with_port_0_tell_the_bound_ports() {
        let any = || async { TcpListener::bind("127.0.0.1:0").await.expect("a free port") };
        let (grpc, http, peer) = (any().await, any().await, any().await);
        let port = |listener: &TcpListener| listener.local_addr().expect("it is bound").port();
        for (text, client, others) in [
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
            let config = Sources::new().file(Path::new("s.toml"), text).load().expect("valid").config;
            let told = endpoints(&config, &grpc, &http, Some(&peer)).expect("all are bound");
            assert_eq!((told.client(), told.peer()), (client.as_str(), Some(others.as_str())), "{text}");
        }
    }
}
