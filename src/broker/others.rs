//! Replication between this broker and its peers: outbound and inbound links, and failure detection.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError, Weak},
};

use super::{
    Broker, Readiness,
    claims::Claims,
    evidence::Evidence,
    following::Following,
    peer::{self, LookUp, Neighbours, PeerService, Peering, Questions, Report},
};
use crate::{
    client::{Connect, peers::Peers},
    cluster::{Revision, Session, Standing, ViewState},
    model::BrokerId,
    partition::{Links, session::Find},
    proto::v1::{self, peer_server::PeerServer},
    task::Tasks,
    telemetry::Metrics,
};

/// Links and failure detection between this broker and its peers.
pub(super) struct Others {
    following: Arc<Following>,
    peering: Arc<Peering>,
    /// Registrations without a peer address, each of which was logged.
    unreachable: Mutex<BTreeMap<BrokerId, Revision>>,
    /// Tasks of links and probes. These tasks end after the partitions, which unsubscribe over the links.
    tasks: Tasks,
}

/// Identity and dependencies of the local broker.
pub(super) struct Known {
    pub(super) id: BrokerId,
    pub(super) cluster: String,
    pub(super) incarnation: String,
    pub(super) catchup_bytes_per_second: Option<u64>,
    pub(super) metrics: Metrics,
    /// Verifies claims of peers in the metadata store.
    pub(super) claims: Arc<Claims>,
}

impl Others {
    /// Creates the links and the failure detector of a broker that is being opened. Before its registration, the broker only identifies
    /// itself to peers.
    pub(super) fn new(known: Known, connect: Arc<dyn Connect>, broker: &Weak<Broker>) -> Self {
        let Known { id, cluster, incarnation, catchup_bytes_per_second, metrics, claims } = known;
        let tasks = Tasks::new();
        let neighbours = Neighbours::new(id, cluster);
        let following =
            Following::new(Arc::clone(&neighbours), connect, metrics.replication_received_bytes, tasks.clone());
        let evidence = Evidence::new(Weak::clone(broker), following.peers().clone(), tasks.clone());
        let holder = Weak::clone(broker);
        let find: Find = Arc::new(move |id| holder.upgrade()?.hosted.by_id(id));
        let asked = Arc::clone(&claims);
        let look_up: LookUp = Arc::new(move |broker| {
            let claims = Arc::clone(&asked);
            Box::pin(async move { claims.broker_epoch(broker).await })
        });
        following.hosts(find, Arc::clone(&evidence) as _, look_up);
        let questions = questions(broker, evidence, claims);
        let peering = Peering::new(
            neighbours,
            incarnation,
            questions,
            catchup_bytes_per_second,
            metrics.replication_sent_bytes,
            tasks.clone(),
        );
        Self { following, peering, unreachable: Mutex::default(), tasks }
    }

    /// Returns the replication links for partitions.
    pub(super) fn links(&self) -> Arc<dyn Links> {
        Arc::clone(&self.following) as _
    }

    /// Returns the client for requests to peers.
    pub(super) fn peers(&self) -> &Peers {
        self.following.peers()
    }

    /// Returns the service that peers call.
    pub(super) fn service(&self) -> PeerServer<PeerService> {
        peer::service(&self.peering)
    }

    /// Updates the peers from the registrations.
    pub(super) fn know(&self, state: &ViewState) {
        let known = state.brokers().iter();
        let known = known
            .filter_map(|(id, known)| Some((*id, (known.value.listeners.peer()?.to_owned(), known.create_revision))));
        self.following.brokers(known.collect::<BTreeMap<_, _>>());
        let without = state.brokers().iter().filter(|(_, known)| known.value.listeners.peer().is_none());
        let without: BTreeMap<_, _> = without.map(|(id, known)| (*id, known.create_revision)).collect();
        let mut logged = self.unreachable.lock().unwrap_or_else(PoisonError::into_inner);
        for (broker, _) in without.iter().filter(|(id, epoch)| logged.get(id) != Some(*epoch)) {
            tracing::warn!(
                %broker,
                "a broker is registered without an address for other brokers that this version knows: no replica there is in sync"
            );
        }
        *logged = without;
    }

    /// Serves all requests of peers from now on. Before this call, the broker only identifies itself.
    pub(super) fn begin(&self) {
        self.peering.begin();
    }

    /// Starts to track this broker's own registration.
    pub(super) fn follow(&self, session: &Session, tasks: &Tasks) {
        let (mut standing, following, stop) = (session.standing(), Arc::clone(&self.following), tasks.clone());
        following.registered(session.epoch());
        tasks.spawn("own epoch", async move {
            loop {
                let changed = tokio::select! {
                    biased;
                    () = stop.cancelled() => return,
                    changed = standing.changed() => changed,
                };
                if changed.is_err() {
                    return;
                }
                following.registered(match *standing.borrow_and_update() {
                    Standing::Registered { epoch, .. } => Some(epoch),
                    Standing::Lost | Standing::Superseded { .. } => None,
                });
            }
        });
    }

    /// Ends all links.
    pub(super) async fn stop(&self) {
        self.tasks.stop().await;
    }
}

fn questions(broker: &Weak<Broker>, evidence: Arc<Evidence>, claims: Arc<Claims>) -> Questions {
    let (asked, looked, reported) = (Weak::clone(broker), Weak::clone(broker), Weak::clone(broker));
    Questions {
        unusable: Box::new(move |id| looked.upgrade()?.unusable(id)),
        status: Box::new(move || asked.upgrade().map_or_else(v1::StatusResponse::default, |broker| broker.status())),
        stored_epoch: Arc::new(move |id| {
            let claims = Arc::clone(&claims);
            Box::pin(async move { claims.leader_epoch(id).await })
        }),
        report: Box::new(move |report: Report| {
            let (broker, evidence) = (reported.upgrade(), Arc::clone(&evidence));
            Box::pin(async move {
                match broker {
                    Some(broker) => Ok(broker.judge(report, &evidence).await?),
                    None => Ok(false),
                }
            })
        }),
    }
}

impl Broker {
    /// Returns the state of this broker, for peers that place partitions or describe the cluster.
    pub(super) fn status(&self) -> v1::StatusResponse {
        let (open, log) = (self.hosted.open(), self.log.status());
        let count = |number: usize| u32::try_from(number).unwrap_or(u32::MAX);
        let led = || open.iter().filter(|partition| partition.standing().role.leads());
        let segment_bytes = open.iter().map(|partition| partition.local_bytes()).sum();
        let (impaired, not_ready) = match self.readiness() {
            Readiness::Ready(impaired) => (impaired, String::new()),
            Readiness::NotReady(why) => (Vec::new(), why),
        };
        v1::StatusResponse {
            leaders: count(led().count()),
            replicas: count(open.len()),
            segment_bytes,
            free_bytes: log.free_bytes,
            disk_bytes: log.free_bytes.saturating_add(segment_bytes),
            tier_lag_records: led().map(|partition| self.tier_lag(partition)).sum(),
            failed: log.failed.unwrap_or_default(),
            object_store: self
                .tier
                .as_ref()
                .and_then(|tier| tier.store.outage())
                .map_or_else(String::new, |o| o.to_string()),
            upkeep: self.upkeep_failures.to_string(),
            impaired,
            not_ready,
            future_timestamps: future_timestamps(&open),
            metadata_regressed: self.store.regression().map_or_else(String::new, |regression| regression.to_string()),
        }
    }
}

/// Describes the segments with timestamps in the future: their number, and the partition with most of them. Empty if there are none.
fn future_timestamps(open: &[Arc<crate::partition::Partition>]) -> String {
    let with: Vec<_> = open.iter().filter(|partition| partition.future_segments() > 0).collect();
    let Some(most) = with.iter().max_by_key(|partition| partition.future_segments()) else { return String::new() };
    let segments: u64 = with.iter().map(|partition| partition.future_segments()).sum();
    let ending = |count: usize| if count == 1 { "" } else { "s" };
    let (s, partitions) = (ending(usize::try_from(segments).unwrap_or(2)), with.len());
    format!(
        "{segments} segment{s} of {partitions} partition{}, most in {}/{}",
        ending(partitions),
        most.topic(),
        most.id().number
    )
}
