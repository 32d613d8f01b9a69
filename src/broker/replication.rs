//! Replication between this broker and its peers: outbound and inbound links, and failure detection.

use std::{
    collections::BTreeMap,
    sync::{Arc, Weak},
};

use parking_lot::Mutex;

use super::{
    Broker, Readiness,
    claims::Claims,
    failure_detector::FailureDetector,
    links::LinkManager,
    peer::{self, FailureReport, LookUp, PeerCallbacks, PeerServer, PeerService, PeerTable},
};
use crate::{
    client::{Connector, peers::PeerClient},
    cluster::{MetadataSnapshot, Revision, Session, SessionState},
    model::BrokerId,
    partition::{ReplicationLinks, replication::PartitionLookup},
    proto::v1::{self, peer_server},
    task::Tasks,
    telemetry::Metrics,
};

/// Links and failure detection between this broker and its peers.
pub(super) struct ReplicationManager {
    links: Arc<LinkManager>,
    server: Arc<PeerServer>,
    /// Registrations without a peer address, each of which was logged.
    unreachable: Mutex<BTreeMap<BrokerId, Revision>>,
    /// Tasks of links and probes. These tasks end after the partitions, which unsubscribe over the links.
    tasks: Tasks,
}

/// Identity and dependencies of the local broker.
pub(super) struct LocalBroker {
    pub(super) id: BrokerId,
    pub(super) cluster: String,
    pub(super) incarnation: String,
    pub(super) catchup_bytes_per_second: Option<u64>,
    pub(super) metrics: Metrics,
    /// Verifies claims of peers in the metadata store.
    pub(super) claims: Arc<Claims>,
}

impl ReplicationManager {
    /// Creates the links and the failure detector of a broker that is being opened. Before its registration, the broker
    /// only identifies itself to peers.
    pub(super) fn new(local: LocalBroker, connect: Arc<dyn Connector>, broker: &Weak<Broker>) -> Self {
        let LocalBroker { id, cluster, incarnation, catchup_bytes_per_second, metrics, claims } = local;
        let tasks = Tasks::new();
        let peers = PeerTable::new(id, cluster);
        let links = LinkManager::new(Arc::clone(&peers), connect, metrics.replication_received_bytes, tasks.clone());
        let detector = FailureDetector::new(Weak::clone(broker), links.peers().clone(), tasks.clone());
        let owner = Weak::clone(broker);
        let find: PartitionLookup = Arc::new(move |id| owner.upgrade()?.partitions.by_id(id));
        let registrations = Arc::clone(&claims);
        let look_up: LookUp = Arc::new(move |broker| {
            let claims = Arc::clone(&registrations);
            Box::pin(async move { claims.broker_epoch(broker).await })
        });
        links.set_callbacks(find, Arc::clone(&detector) as _, look_up);
        let callbacks = callbacks(broker, detector, claims);
        let server = PeerServer::new(
            peers,
            incarnation,
            callbacks,
            catchup_bytes_per_second,
            metrics.replication_sent_bytes,
            tasks.clone(),
        );
        Self { links, server, unreachable: Mutex::default(), tasks }
    }

    /// Returns the replication links for partitions.
    pub(super) fn links(&self) -> Arc<dyn ReplicationLinks> {
        Arc::clone(&self.links) as _
    }

    /// Returns the client for requests to peers.
    pub(super) fn peers(&self) -> &PeerClient {
        self.links.peers()
    }

    /// Returns the service that peers call.
    pub(super) fn service(&self) -> peer_server::PeerServer<PeerService> {
        peer::service(&self.server)
    }

    /// Updates the peers from the registrations.
    pub(super) fn update_peers(&self, state: &MetadataSnapshot) {
        let peers = state
            .brokers()
            .iter()
            .filter_map(|(id, entry)| Some((*id, (entry.value.listeners.peer()?.to_owned(), entry.create_revision))));
        self.links.brokers(peers.collect::<BTreeMap<_, _>>());
        let unreachable = state.brokers().iter().filter(|(_, entry)| entry.value.listeners.peer().is_none());
        let unreachable: BTreeMap<_, _> = unreachable.map(|(id, entry)| (*id, entry.create_revision)).collect();
        let mut logged = self.unreachable.lock();
        for (broker, _) in unreachable.iter().filter(|(id, epoch)| logged.get(id) != Some(*epoch)) {
            tracing::warn!(
                %broker,
                "a broker is registered without a peer address that this version supports: its replicas cannot be in \
                 sync"
            );
        }
        *logged = unreachable;
    }

    /// Serves all requests of peers from now on. Before this call, the broker only identifies itself.
    pub(super) fn begin(&self) {
        self.server.begin();
    }

    /// Starts to track this broker's own registration.
    pub(super) fn track_own_registration(&self, session: &Session, tasks: &Tasks) {
        let (mut status, links, stop) = (session.state(), Arc::clone(&self.links), tasks.clone());
        links.registered(session.epoch());
        tasks.spawn("broker-epoch", async move {
            loop {
                let Some(changed) = stop.run_until_cancelled(status.changed()).await else {
                    return;
                };
                if changed.is_err() {
                    return;
                }
                links.registered(match *status.borrow_and_update() {
                    SessionState::Registered { epoch, .. } => Some(epoch),
                    SessionState::Lost | SessionState::Superseded { .. } => None,
                });
            }
        });
    }

    /// Ends all links.
    pub(super) async fn stop(&self) {
        self.tasks.stop().await;
    }
}

fn callbacks(broker: &Weak<Broker>, detector: Arc<FailureDetector>, claims: Arc<Claims>) -> PeerCallbacks {
    let (for_stats, for_replicas, for_reports) = (Weak::clone(broker), Weak::clone(broker), Weak::clone(broker));
    PeerCallbacks {
        unusable: Box::new(move |id| for_replicas.upgrade()?.unusable(id)),
        status: Box::new(move || {
            for_stats.upgrade().map_or_else(v1::GetBrokerStatsResponse::default, |broker| broker.status())
        }),
        stored_epoch: Arc::new(move |id| {
            let claims = Arc::clone(&claims);
            Box::pin(async move { claims.leader_epoch(id).await })
        }),
        report: Box::new(move |report: FailureReport| {
            let (broker, detector) = (for_reports.upgrade(), Arc::clone(&detector));
            Box::pin(async move {
                match broker {
                    Some(broker) => Ok(broker.confirm_failure(report, &detector).await?),
                    None => Ok(false),
                }
            })
        }),
    }
}

impl Broker {
    /// Returns the state of this broker, for peers that place partitions or describe the cluster.
    pub(super) fn status(&self) -> v1::GetBrokerStatsResponse {
        let (open, log) = (self.partitions.open(), self.ctx.log.status());
        let count = |number: usize| u32::try_from(number).unwrap_or(u32::MAX);
        let led = || open.iter().filter(|partition| partition.status().role.leads());
        let segment_bytes = open.iter().map(|partition| partition.local_bytes()).sum();
        let (impaired, not_ready) = match self.readiness() {
            Readiness::Ready(impaired) => (impaired, String::new()),
            Readiness::NotReady(reason) => (Vec::new(), reason),
        };
        v1::GetBrokerStatsResponse {
            leader_count: count(led().count()),
            replica_count: count(open.len()),
            segment_bytes,
            free_bytes: log.free_bytes,
            disk_bytes: log.free_bytes.saturating_add(segment_bytes),
            tier_lag_records: led().map(|partition| self.tier_lag(partition)).sum(),
            failed: log.failed.unwrap_or_default(),
            object_store: self
                .ctx
                .tier
                .as_ref()
                .and_then(|tier| tier.store.outage())
                .map_or_else(String::new, |outage| outage.to_string()),
            maintenance: self.maintenance_failures.to_string(),
            impaired,
            not_ready,
            future_timestamps: future_timestamps(&open),
            metadata_regressed: self
                .ctx
                .store
                .regression()
                .map_or_else(String::new, |regression| regression.to_string()),
        }
    }
}

/// Describes the segments with timestamps in the future: their number, and the partition with most of them. Empty if
/// there are none.
fn future_timestamps(open: &[Arc<crate::partition::Partition>]) -> String {
    let with: Vec<_> = open.iter().filter(|partition| partition.future_segments() > 0).collect();
    let Some(largest) = with.iter().max_by_key(|partition| partition.future_segments()) else { return String::new() };
    let segments: u64 = with.iter().map(|partition| partition.future_segments()).sum();
    let ending = |count: usize| if count == 1 { "" } else { "s" };
    let (s, partitions) = (ending(usize::try_from(segments).unwrap_or(2)), with.len());
    format!(
        "{segments} segment{s} of {partitions} partition{}, most in {}/{}",
        ending(partitions),
        largest.topic(),
        largest.id().number
    )
}
