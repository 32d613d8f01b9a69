//! Replication between this broker and its peers: links in both directions, failure detection, and ISR updates.
//!
//! [`ReplicationManager`] composes the parts. No part opens, closes or assigns a partition; the reconciler does that.

mod claim_verifier;
mod failure_detector;
mod isr_updates;
mod links;
mod peer_client;
mod peer_server;
pub(super) mod peer_status;
mod peer_table;
#[cfg(test)]
mod tests;

use std::{collections::BTreeMap, sync::Arc};

use self::{
    claim_verifier::ClaimVerifier,
    failure_detector::FailureDetector,
    isr_updates::IsrUpdateManager,
    links::LinkManager,
    peer_server::{PeerCallbacks, PeerServer},
    peer_table::PeerTable,
};
pub(super) use self::{peer_client::PeerClient, peer_server::PeerService, peer_status::BrokerStatsSource};
use super::{node_context::NodeContext, partitions::table::PartitionTable};
use crate::{
    client::Connector,
    cluster::{MetadataSnapshot, PartitionUpdater, Revision, Session, SessionState},
    model::BrokerId,
    partition::{PartitionContext, PartitionCounters},
    proto::v1::peer_server as peer_service,
    task::{Tasks, lock::Mutex},
};

/// Links, failure detection and ISR updates of one broker.
pub(super) struct ReplicationManager {
    peer_table: Arc<PeerTable>,
    peers: PeerClient,
    links: Arc<LinkManager>,
    server: Arc<PeerServer>,
    isr_updates: Arc<IsrUpdateManager>,
    /// Registrations without a peer address, which were already logged.
    unreachable: Mutex<BTreeMap<BrokerId, Revision>>,
    /// Tasks of links and of the failure detector. These tasks end after the partitions, which unsubscribe over the
    /// links.
    tasks: Tasks,
}

impl ReplicationManager {
    /// Creates the parts of a broker that is being opened. Until [`Self::begin_serving`], the broker only identifies
    /// itself to peers.
    pub(super) fn new(
        ctx: &NodeContext,
        connect: Arc<dyn Connector>,
        partitions: &Arc<PartitionTable>,
        stats: BrokerStatsSource,
    ) -> Self {
        let tasks = Tasks::new();
        let peers = PeerClient::new(connect, links::CONNECT_TIMEOUT);
        let detector = Arc::new(FailureDetector::new(ctx, Arc::clone(partitions), peers.clone(), tasks.clone()));
        let verifier = Arc::new(ClaimVerifier::new(Arc::clone(&ctx.store), ctx.keys.clone()));
        let (cluster, listener) = (ctx.config.cluster.clone(), Arc::clone(&detector));
        let peer_table = PeerTable::new(ctx.id, cluster, Arc::clone(partitions), listener, verifier);
        let report = Box::new(move |report| {
            let detector = Arc::clone(&detector);
            Box::pin(async move { Ok(detector.confirm_failure(report).await?) }) as _
        });
        let received = ctx.metrics.replication_received_bytes.clone();
        let links = LinkManager::new(Arc::clone(&peer_table), peers.clone(), received, tasks.clone());
        let server = PeerServer::new(
            Arc::clone(&peer_table),
            ctx.incarnation.to_string(),
            PeerCallbacks { stats, report },
            ctx.config.replication.catchup_bytes_per_second,
            ctx.metrics.replication_sent_bytes.clone(),
            tasks.clone(),
        );
        let updater = PartitionUpdater::new(Arc::clone(&ctx.store), ctx.keys.clone());
        let isr_updates = IsrUpdateManager::new(ctx.id, ctx.keys.clone(), updater, Arc::clone(partitions));
        Self { peer_table, peers, links, server, isr_updates, unreachable: Mutex::default(), tasks }
    }

    /// Returns the context of opened partitions: the replication links, the ISR updates, and these counters.
    pub(super) fn partition_context(&self, counters: PartitionCounters) -> PartitionContext {
        PartitionContext {
            links: Arc::clone(&self.links) as _,
            isr_updater: Arc::clone(&self.isr_updates) as _,
            counters,
        }
    }

    /// Returns the client for requests to peers.
    pub(super) fn peers(&self) -> &PeerClient {
        &self.peers
    }

    /// Returns the service that peers call.
    pub(super) fn service(&self) -> peer_service::PeerServer<PeerService> {
        peer_server::service(&self.server)
    }

    /// Updates the peer table from the registrations. Logs each registration without a peer address once.
    pub(super) fn update_peers(&self, state: &MetadataSnapshot) {
        let peers = state
            .brokers()
            .iter()
            .filter_map(|(id, entry)| Some((*id, (entry.value.listeners.peer()?.to_owned(), entry.create_revision))));
        self.peer_table.update_peers(peers.collect());
        let unreachable = state.brokers().iter().filter(|(_, entry)| entry.value.listeners.peer().is_none());
        let mut logged = self.unreachable.lock();
        for (broker, entry) in unreachable.clone() {
            if logged.get(broker) != Some(&entry.create_revision) {
                tracing::warn!(
                    %broker, version = entry.value.version,
                    "a broker is registered without a peer address that this version supports, so its replicas cannot \
                     be in sync: run the same version on all brokers"
                );
            }
        }
        *logged = unreachable.map(|(id, entry)| (*id, entry.create_revision)).collect();
    }

    /// Starts two activities as tasks of `tasks`: tracking this broker's own broker epoch, and sending ISR updates.
    pub(super) fn activate(&self, session: &Session, tasks: &Tasks) {
        let (mut status, peer_table) = (session.state(), Arc::clone(&self.peer_table));
        peer_table.set_own_epoch(session.epoch());
        let track = async move {
            while status.changed().await.is_ok() {
                peer_table.set_own_epoch(match *status.borrow_and_update() {
                    SessionState::Registered { epoch, .. } => Some(epoch),
                    SessionState::Lost | SessionState::Superseded { .. } => None,
                });
            }
        };
        tasks.spawn_until_cancelled("broker-epoch", track);
        self.isr_updates.spawn(tasks);
    }

    /// From this call on, all requests of peers are served. Before this call, the broker only identifies itself.
    pub(super) fn begin_serving(&self) {
        self.server.begin_serving();
    }

    /// Ends all links and probes.
    pub(super) async fn stop(&self) {
        self.tasks.stop().await;
    }
}
