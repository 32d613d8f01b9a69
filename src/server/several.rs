//! Several brokers in one process, for trying a cluster out: they share the process and the object store, and, unless there is
//! etcd, a metadata store. Each is a broker like any other: what they tell each other goes through their listeners.

use std::{future::Future, path::PathBuf, pin::pin, sync::Arc};

use anyhow::Context as _;
use futures::future;
use tokio::net::TcpListener;

use super::{Listeners, Node, Outside, Ready, Stores, advertised, listen, node, open_objects};
use crate::{
    client::{self, Tcp},
    cluster::{Addresses, EmbeddedStore, MetaStore},
    config::Config,
    log::RealDisk,
    task::{Tasks, clock},
    telemetry::Metrics,
};

/// One broker's listeners before it serves.
struct Ports {
    grpc: TcpListener,
    http: TcpListener,
    addresses: Addresses,
}

/// One broker that serves.
struct Member {
    node: Node,
    listeners: Listeners,
}

/// Runs brokers until `shutdown` resolves and all have stopped. `metadata` is the folder of the metadata store that they share; without it
/// each goes to the etcd of its settings.
pub async fn run_several(
    configs: Vec<Config>,
    metadata: Option<PathBuf>,
    shutdown: impl Future<Output = ()>,
    ready: impl FnOnce(&[Ready]),
) -> anyhow::Result<()> {
    let mut ports = Vec::with_capacity(configs.len());
    for config in &configs {
        ports.push(take(config).await?);
    }
    for config in &configs {
        config.prepare_data_dir()?;
    }
    let time = Tasks::new();
    let shared = match &metadata {
        None => None,
        Some(folder) => {
            let store = EmbeddedStore::open(folder).await?;
            store.keep_time(&time);
            Some(Arc::new(store) as Arc<dyn MetaStore>)
        }
    };
    let mut shutdown = pin!(shutdown);
    let starting = configs.iter().zip(ports).map(|(config, ports)| start(config, ports, shared.clone()));
    let started = tokio::select! {
        biased;
        started = future::join_all(starting) => started,
        () = &mut shutdown => {
            tracing::info!("stopping before every broker has started");
            return Ok(());
        }
    };
    let mut members = Vec::with_capacity(configs.len());
    let (mut states, mut failed) = (Vec::with_capacity(configs.len()), None);
    for (config, outcome) in configs.iter().zip(started) {
        match outcome.with_context(|| format!("broker {} does not start", config.broker.id)) {
            Ok((member, state)) => {
                members.push(member);
                states.push(state);
            }
            Err(error) => failed = failed.or(Some(error)),
        }
    }
    if failed.is_none() {
        ready(&states);
        shutdown.await;
        tracing::info!("stopping");
    }
    let stopping = members.into_iter().zip(&configs).map(|(member, config)| stop(member, config));
    let stopped: anyhow::Result<Vec<()>> = future::join_all(stopping).await.into_iter().collect();
    time.stop().await;
    tracing::info!("stopped");
    match failed {
        Some(error) => Err(error),
        None => stopped.map(|_| ()),
    }
}

/// Takes a broker's ports: the likeliest mistake, found before any data is touched.
async fn take(config: &Config) -> anyhow::Result<Ports> {
    let grpc = listen::listen(config.grpc.listen, "gRPC", "--listen").await?;
    let http = listen::listen(config.http.listen, "HTTP", "--http").await?;
    let addresses = Addresses { grpc: advertised(config, &grpc)?, http: Some(http.local_addr()?.to_string()) };
    Ok(Ports { grpc, http, addresses })
}

async fn start(config: &Config, ports: Ports, shared: Option<Arc<dyn MetaStore>>) -> anyhow::Result<(Member, Ready)> {
    let began = clock::monotonic();
    let metrics = Metrics::new();
    let outside = outside(config, shared);
    let log = node::open_log(config, &outside, metrics.clone()).await?;
    let node = Node::over(config, log, outside, ports.addresses, metrics).await?;
    let state = Ready {
        grpc: ports.grpc.local_addr()?,
        http: ports.http.local_addr()?,
        data_dir: config.broker.data_dir.clone(),
        object_store: config.object_store.url.clone(),
        partitions: node.broker().partitions(),
        took: began.elapsed(),
    };
    let listeners = Listeners::serve(&node, ports.grpc, ports.http);
    Ok((Member { node, listeners }, state))
}

/// The world of one of several brokers.
fn outside(config: &Config, shared: Option<Arc<dyn MetaStore>>) -> Outside {
    let of = config.clone();
    Outside {
        disk: Arc::new(RealDisk),
        stores: Box::pin(async move {
            let objects = of.object_store.url.as_deref().map(|url| open_objects(&of, url)).transpose()?;
            let meta = shared.context("no metadata store is shared")?;
            Ok(Stores { meta, objects })
        }),
        connect: Arc::new(Tcp::new(client::Options::default().connect_timeout)),
        stepper: None,
    }
}

async fn stop(member: Member, config: &Config) -> anyhow::Result<()> {
    member.node.retire().await;
    member.listeners.stop(config.broker.shutdown_timeout).await;
    member.node.close().await
}
