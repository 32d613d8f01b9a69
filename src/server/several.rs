//! Several brokers in one process, for trials of a cluster. They share the process, the object store and, without etcd, a metadata store.
//! Apart from that each is a normal broker, and they communicate only through their listeners.

use std::{future::Future, path::PathBuf, pin::pin, sync::Arc, time::Duration};

use anyhow::Context as _;
use futures::future;
use tokio::net::TcpListener;
use tracing::{Instrument as _, Span};

use super::{
    Listeners, Node, Outside, Ready, Stores, admission, endpoints, http::Pages, listen, listen_for_peers, node,
    open_objects, outside, room::Room,
};
use crate::{
    client::{self, Tcp},
    cluster::{EmbeddedStore, Endpoints, MetaStore},
    config::Config,
    log::RealDisk,
    task::{Tasks, clock},
    telemetry::Metrics,
};

/// Maximum time that started brokers wait until the metadata cache of each contains all of them.
const MEETING: Duration = Duration::from_secs(10);

/// Bound listeners of a broker that does not serve yet.
struct Ports {
    grpc: TcpListener,
    http: TcpListener,
    peer: TcpListener,
    endpoints: Endpoints,
}

/// A broker that serves.
struct Member {
    node: Node,
    listeners: Listeners,
    state: Ready,
    /// Span of the broker's log lines.
    span: Span,
    /// Timeout of the stop.
    within: Duration,
}

/// State that brokers share during their start.
struct Shared {
    /// Metadata store; `None` if each broker uses the etcd of its settings.
    meta: Option<Arc<dyn MetaStore>>,
    /// Tasks that expire leases.
    time: Tasks,
    /// Cancelled to end the waits of a start.
    stop: Tasks,
    /// Connection limits of each broker.
    room: Room,
}

/// Runs brokers until `shutdown` resolves or one of them must stop. Returns when all have stopped. `metadata` is the directory of their
/// shared metadata store; without it, each broker uses the etcd of its settings. A broker that fails to start stops the other brokers.
pub async fn run_several(
    configs: Vec<Config>,
    metadata: Option<PathBuf>,
    shutdown: impl Future<Output = ()>,
    ready: impl FnOnce(&[Ready]),
) -> anyhow::Result<()> {
    let ports = take_ports(&configs).await?;
    for config in &configs {
        config.prepare_data_dir()?;
    }
    let memory_bytes = configs.iter().map(|config| config.limits.memory_bytes).min().unwrap_or_default();
    let room = Room::of(configs.len(), false, memory_bytes);
    let mut shared = Shared { meta: None, time: Tasks::new(), stop: Tasks::new(), room };
    if let Some(folder) = &metadata {
        let store = EmbeddedStore::open(folder).await?;
        store.keep_time(&shared.time);
        shared.meta = Some(Arc::new(store));
    }
    let mut shutdown = pin!(shutdown);
    let (members, failed, mut asked) = start_all(&configs, ports, &shared, shutdown.as_mut()).await;
    let mut outcome = failed.map_or(Ok(()), Err);
    if outcome.is_ok() && !asked {
        // A client that creates a topic now must not get an error about too few brokers.
        let meeting = future::join_all(members.iter().map(|member| member.node.broker().meets(members.len())));
        tokio::select! {
            biased;
            () = &mut shutdown => asked = true,
            _all_or_late = tokio::time::timeout(MEETING, meeting) => {}
        }
    }
    if outcome.is_ok() && !asked {
        let states: Vec<Ready> = members.iter().map(|member| member.state.clone()).collect();
        ready(&states);
        let must_stop = future::select_all(members.iter().map(|member| Box::pin(member.node.must_stop())));
        tokio::select! {
            biased;
            () = &mut shutdown => {}
            (error, ..) = must_stop => outcome = Err(error),
        }
    }
    tracing::info!("stopping");
    let stopped: anyhow::Result<Vec<()>> = future::join_all(members.into_iter().map(stop)).await.into_iter().collect();
    shared.time.stop().await;
    tracing::info!("stopped");
    outcome.and(stopped.map(|_| ()))
}

/// Binds the ports of all brokers. A port conflict is the most likely error, and is found before any data is touched.
async fn take_ports(configs: &[Config]) -> anyhow::Result<Vec<Ports>> {
    let mut fixed = Vec::with_capacity(configs.len());
    for config in configs {
        let grpc = listen::listen(config.grpc.listen, "gRPC", "--listen").await?;
        fixed.push((grpc, listen::listen(config.http.listen, "HTTP", "--http").await?));
    }
    // The system may choose these ports. They are bound after the fixed ports, so that the system chooses none of those.
    let mut ports = Vec::with_capacity(configs.len());
    for (config, (grpc, http)) in configs.iter().zip(fixed) {
        let peer = listen_for_peers(config).await?;
        let endpoints = endpoints(config, &grpc, &http, Some(&peer))?;
        ports.push(Ports { grpc, http, peer, endpoints });
    }
    Ok(ports)
}

/// Starts all brokers concurrently. Returns the started brokers, the error of a broker that failed, and true if the process was asked to
/// stop meanwhile.
async fn start_all(
    configs: &[Config],
    ports: Vec<Ports>,
    shared: &Shared,
    shutdown: impl Future<Output = ()>,
) -> (Vec<Member>, Option<anyhow::Error>, bool) {
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
    let mut asked = false;
    let started = tokio::select! {
        biased;
        started = &mut starting => started,
        () = shutdown => {
            tracing::info!("stopping before every broker has started");
            asked = true;
            shared.stop.cancel();
            starting.await
        }
    };
    let (mut members, mut failed) = (Vec::with_capacity(configs.len()), None);
    for outcome in started {
        match outcome {
            Ok(member) => members.push(member),
            Err((_, error)) if error.is::<admission::Stopped>() => {}
            Err((id, error)) => failed = failed.or(Some(error.context(format!("broker {id} does not start")))),
        }
    }
    (members, failed, asked)
}

async fn start(config: &Config, ports: Ports, shared: &Shared, span: Span) -> anyhow::Result<Member> {
    let began = clock::monotonic();
    let metrics = Metrics::new();
    let outside = match &shared.meta {
        None => outside(config, &shared.time),
        Some(meta) => around(config, Arc::clone(meta)),
    };
    let (within, http) = (config.broker.shutdown_timeout, ports.http.local_addr()?);
    let pages = Arc::new(Pages::new(metrics.clone()));
    let listeners = Listeners::begin(Arc::clone(&pages), ports.http, shared.room, config, &metrics);
    let node = async {
        let log = node::open_log(config, &outside, metrics.clone()).await?;
        let serve_peers = |routes| listeners.serve_peers(routes, Some(ports.peer), &metrics);
        Node::over(config, log, outside, ports.endpoints, metrics.clone(), &shared.stop, serve_peers).await
    };
    let node = match node.await {
        Ok(node) => node,
        Err(error) => {
            listeners.stop(within).await;
            return Err(error);
        }
    };
    pages.tell_of(node.broker());
    let state = Ready {
        grpc: ports.grpc.local_addr()?,
        http,
        data_dir: config.broker.data_dir.clone(),
        object_store: config.object_store.url.clone(),
        partitions: node.broker().partitions(),
        took: began.elapsed(),
    };
    listeners.serve(&node, ports.grpc);
    Ok(Member { node, listeners, state, span, within })
}

/// Returns the dependencies of a broker with a shared metadata store. That store is not part of the broker's data directory, so the startup
/// verification is needed.
fn around(config: &Config, meta: Arc<dyn MetaStore>) -> Outside {
    let of = config.clone();
    Outside {
        disk: Arc::new(RealDisk::default()),
        stores: Box::pin(async move {
            let objects = of.object_store.url.as_deref().map(|url| open_objects(&of, url)).transpose()?;
            Ok(Stores { meta, objects })
        }),
        connect: Arc::new(Tcp::between_brokers(client::Options::default().connect_timeout)),
        alone: false,
        stepper: None,
    }
}

async fn stop(member: Member) -> anyhow::Result<()> {
    let Member { node, listeners, span, within, .. } = member;
    let id = node.broker().id();
    let stopped = async {
        node.retire(within).await;
        listeners.stop(within).await;
        node.close().await.with_context(|| format!("broker {id}"))
    };
    stopped.instrument(span).await
}
