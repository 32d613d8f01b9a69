//! The `Peer` service, which other brokers call.
//!
//! `replicate` serves the replication streams. `neighbours` holds the state about peers for both directions. This file serves the other
//! requests. No part of the service is for clients.

mod clocks;
mod neighbours;
mod replicate;
#[cfg(test)]
mod tests;

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
};

use futures::future::BoxFuture;
use tonic::{Request, Response, Status, Streaming};

pub(super) use self::neighbours::{LinkLost, LookUp, Neighbour, Neighbours, Unconfirmed};
use self::replicate::{Answers, Incoming};
use crate::{
    cluster::Revision,
    limits,
    model::{BrokerId, LeaderEpoch, PartitionId},
    partition::session::{CatchUp, StoredEpoch},
    proto::{
        error::{ApiError, ErrorCode},
        v1::{self, peer_server},
    },
    task::Tasks,
    telemetry::{LogThrottle, PeerCounters},
};

/// Report of a broker that a process is gone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Report {
    /// Reporting broker, as named by the unauthenticated caller. Used in the log only.
    pub(super) reporter: BrokerId,
    /// Broker of the process.
    pub(super) broker: BrokerId,
    /// Broker epoch of the process.
    pub(super) epoch: Revision,
    /// Observation of the reporter.
    pub(super) seen: String,
}

/// Callbacks that serve requests of peers.
pub(super) struct Questions {
    /// Returns the state of this broker.
    pub(super) status: Box<dyn Fn() -> v1::StatusResponse + Send + Sync>,
    /// Returns why a local replica is unusable; `None` if there is no replica or it is usable.
    pub(super) unusable: Box<dyn Fn(PartitionId) -> Option<String> + Send + Sync>,
    /// Returns the leader epoch of a partition in the metadata store.
    pub(super) stored_epoch: StoredEpoch,
    /// Verifies a report. Returns true if the registration was deleted, and an error if the report must be repeated.
    pub(super) report: Box<dyn Fn(Report) -> BoxFuture<'static, Result<bool, ApiError>> + Send + Sync>,
}

/// Server side of the connections between brokers.
pub(super) struct Peering {
    neighbours: Arc<Neighbours>,
    incarnation: String,
    questions: Questions,
    catch_up: Arc<CatchUp>,
    /// False while this broker serves only `WhoIs`.
    has_begun: AtomicBool,
    /// Bytes of sent batches, by follower.
    sent: PeerCounters,
    /// Inbound link of each following broker.
    links: Mutex<BTreeMap<BrokerId, Incoming>>,
    /// Log throttle for the links of each broker's registration.
    link_logs: Mutex<BTreeMap<BrokerId, (Revision, LogThrottle)>>,
    tasks: Tasks,
}

impl Peering {
    /// Creates the server of the process with this incarnation. Replicas that catch up share the rate limit, if there is one. Sent bytes
    /// are counted in `sent`. Links run as tasks of `tasks`.
    pub(super) fn new(
        neighbours: Arc<Neighbours>,
        incarnation: String,
        questions: Questions,
        catchup_bytes_per_second: Option<u64>,
        sent: PeerCounters,
        tasks: Tasks,
    ) -> Arc<Self> {
        let catch_up = Arc::new(CatchUp::new(catchup_bytes_per_second));
        Arc::new(Self {
            neighbours,
            incarnation,
            questions,
            catch_up,
            has_begun: AtomicBool::new(false),
            sent,
            links: Mutex::default(),
            link_logs: Mutex::default(),
            tasks,
        })
    }

    /// Serves all requests from now on. Before this call, the broker only identifies itself, so that peers can see that its earlier process
    /// is gone.
    pub(super) fn begin(&self) {
        self.has_begun.store(true, Ordering::Release);
    }

    fn begun(&self) -> Result<&Self, ApiError> {
        let has_begun = self.has_begun.load(Ordering::Acquire);
        has_begun
            .then_some(self)
            .ok_or_else(|| ApiError::new(ErrorCode::NotReady, "this broker is starting; try again"))
    }

    fn marks(&self, name: &v1::ReplicaName) -> v1::ReplicaMarks {
        let topic = name.topic_id.parse().ok();
        let id = topic.zip(u32::try_from(name.partition).ok()).map(|(topic, number)| PartitionId::new(topic, number));
        let Some(partition) = id.and_then(|id| self.neighbours.partition(id)) else {
            let failed = id.and_then(&self.questions.unusable).unwrap_or_default();
            return v1::ReplicaMarks { failed, ..v1::ReplicaMarks::default() };
        };
        let (marks, standing) = (partition.marks(), partition.standing());
        v1::ReplicaMarks {
            here: true,
            leader_epoch: standing.epoch.as_i32(),
            leads: standing.role.leads(),
            log_start: marks.log_start.as_i64(),
            local_start: marks.local_start.as_i64(),
            tiered_end: marks.tiered_end.as_i64(),
            high_watermark: marks.high_watermark.as_i64(),
            persisted_end: marks.persisted_end.as_i64(),
            log_end: marks.log_end.as_i64(),
            last_epoch: partition.last_epoch().map(LeaderEpoch::as_i32),
            failed: partition.fault().map(|why| why.to_string()).unwrap_or_default(),
            local_bytes: partition.local_bytes(),
            tiered_bytes: partition.tiered_bytes(),
        }
    }
}

/// The `Peer` service of a broker.
#[derive(Clone)]
pub struct PeerService(Arc<Peering>);

/// Returns the service with its message limits.
pub(super) fn service(peering: &Arc<Peering>) -> peer_server::PeerServer<PeerService> {
    peer_server::PeerServer::new(PeerService(Arc::clone(peering)))
        .max_decoding_message_size(limits::MAX_PEER_REQUEST_BYTES)
        .max_encoding_message_size(limits::MAX_MESSAGE_BYTES)
}

#[tonic::async_trait]
impl peer_server::Peer for PeerService {
    type ReplicateStream = Answers;

    async fn replicate(&self, request: Request<Streaming<v1::ToLeader>>) -> Result<Response<Answers>, Status> {
        self.0.begun()?;
        Ok(Response::new(self.0.replicate(request.into_inner())))
    }

    async fn who_is(&self, _request: Request<v1::WhoIsRequest>) -> Result<Response<v1::WhoIsResponse>, Status> {
        let neighbours = &self.0.neighbours;
        Ok(Response::new(v1::WhoIsResponse {
            cluster: neighbours.cluster().to_owned(),
            broker: neighbours.me().0,
            broker_epoch: neighbours.own_registered().map(|epoch| epoch.0),
            incarnation: self.0.incarnation.clone(),
        }))
    }

    async fn report_gone(
        &self,
        request: Request<v1::ReportGoneRequest>,
    ) -> Result<Response<v1::ReportGoneResponse>, Status> {
        let request = request.into_inner();
        self.0.begun()?.is_of_this_cluster(&request.cluster)?;
        let report = Report {
            reporter: BrokerId(request.reporter),
            broker: BrokerId(request.broker),
            epoch: Revision(request.broker_epoch),
            seen: request.seen.chars().take(200).collect(),
        };
        let revoked = (self.0.questions.report)(report).await?;
        Ok(Response::new(v1::ReportGoneResponse { revoked }))
    }

    async fn marks(&self, request: Request<v1::MarksRequest>) -> Result<Response<v1::MarksResponse>, Status> {
        let replicas = request.into_inner().replicas;
        if replicas.len() > limits::MAX_PEER_REPLICAS {
            let message = format!(
                "{} replicas in one question; at most {} are allowed",
                replicas.len(),
                limits::MAX_PEER_REPLICAS
            );
            return Err(ApiError::new(ErrorCode::InvalidRequest, message).into());
        }
        let peering = self.0.begun()?;
        let replicas = replicas.iter().map(|name| peering.marks(name)).collect();
        Ok(Response::new(v1::MarksResponse { replicas }))
    }

    async fn status(&self, _request: Request<v1::StatusRequest>) -> Result<Response<v1::StatusResponse>, Status> {
        Ok(Response::new((self.0.begun()?.questions.status)()))
    }
}
