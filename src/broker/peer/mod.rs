//! The `Peer` service, which other brokers call.
//!
//! `replicate` serves the replication streams. `peers` holds the state about peers for both directions. This file
//! serves the other requests. No part of the service is for clients.

mod clocks;
mod peer_table;
mod replicate;
#[cfg(test)]
mod tests;

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use futures::future::BoxFuture;
use parking_lot::Mutex;
use tonic::{Request, Response, Status, Streaming};

pub(super) use self::peer_table::{LinkLossListener, LookUp, PeerInfo, PeerTable, Unconfirmed};
use self::replicate::{InboundLink, ReplicateStream};
use crate::{
    cluster::Revision,
    limits,
    model::{BrokerId, LeaderEpoch, PartitionId},
    partition::replication::{CatchUpThrottle, StoredEpoch},
    proto::{
        error::{ApiError, ErrorCode},
        v1::{self, peer_server},
    },
    task::Tasks,
    telemetry::{LogThrottle, PeerCounters},
};

/// Report of a broker that a process is gone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct FailureReport {
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
pub(super) struct PeerCallbacks {
    /// Returns the state of this broker.
    pub(super) status: Box<dyn Fn() -> v1::GetBrokerStatsResponse + Send + Sync>,
    /// Returns why a local replica is unusable; `None` if there is no replica or it is usable.
    pub(super) unusable: Box<dyn Fn(PartitionId) -> Option<String> + Send + Sync>,
    /// Returns the leader epoch of a partition in the metadata store.
    pub(super) stored_epoch: StoredEpoch,
    /// Verifies a report. Returns true if the registration was deleted, and an error if the report must be repeated.
    pub(super) report: Box<dyn Fn(FailureReport) -> BoxFuture<'static, Result<bool, ApiError>> + Send + Sync>,
}

/// Server side of the connections between brokers.
pub(super) struct PeerServer {
    peers: Arc<PeerTable>,
    incarnation: String,
    callbacks: PeerCallbacks,
    catch_up: Arc<CatchUpThrottle>,
    /// False while this broker serves only `GetIdentity`.
    is_started: AtomicBool,
    /// Bytes of sent batches, by follower.
    sent: PeerCounters,
    /// Inbound link of each following broker.
    links: Mutex<BTreeMap<BrokerId, InboundLink>>,
    /// Log throttle for the links of each broker's registration.
    link_logs: Mutex<BTreeMap<BrokerId, (Revision, LogThrottle)>>,
    tasks: Tasks,
}

impl PeerServer {
    /// Creates the server of the process with this incarnation. Replicas that catch up share the rate limit, if there
    /// is one. Sent bytes are counted in `sent`. Links run as tasks of `tasks`.
    pub(super) fn new(
        peers: Arc<PeerTable>,
        incarnation: String,
        callbacks: PeerCallbacks,
        catchup_bytes_per_second: Option<u64>,
        sent: PeerCounters,
        tasks: Tasks,
    ) -> Arc<Self> {
        let catch_up = Arc::new(CatchUpThrottle::new(catchup_bytes_per_second));
        Arc::new(Self {
            peers,
            incarnation,
            callbacks,
            catch_up,
            is_started: AtomicBool::new(false),
            sent,
            links: Mutex::default(),
            link_logs: Mutex::default(),
            tasks,
        })
    }

    /// Serves all requests from now on. Before this call, the broker only identifies itself, so that peers can see that
    /// its earlier process is gone.
    pub(super) fn begin(&self) {
        self.is_started.store(true, Ordering::Release);
    }

    fn started(&self) -> Result<&Self, ApiError> {
        let is_started = self.is_started.load(Ordering::Acquire);
        is_started.then_some(self).ok_or_else(|| ApiError::new(ErrorCode::NotReady, "this broker is starting: retry"))
    }

    fn replica_report(&self, name: &v1::TopicIdPartition) -> v1::ReplicaReport {
        let topic = name.topic_id.parse().ok();
        let id = topic.zip(u32::try_from(name.partition).ok()).map(|(topic, number)| PartitionId::new(topic, number));
        let Some(partition) = id.and_then(|id| self.peers.partition(id)) else {
            let failed = id.and_then(&self.callbacks.unusable).unwrap_or_default();
            return v1::ReplicaReport { failed, ..v1::ReplicaReport::default() };
        };
        let (watermarks, status) = (partition.watermarks(), partition.status());
        v1::ReplicaReport {
            exists: true,
            leader_epoch: status.epoch.as_i32(),
            is_leader: status.role.leads(),
            log_start: watermarks.log_start.as_i64(),
            local_start: watermarks.local_start.as_i64(),
            tiered_end: watermarks.tiered_end.as_i64(),
            high_watermark: watermarks.high_watermark.as_i64(),
            persisted_end: watermarks.persisted_end.as_i64(),
            log_end: watermarks.log_end.as_i64(),
            last_epoch: partition.last_epoch().map(LeaderEpoch::as_i32),
            failed: partition.error().map(|reason| reason.to_string()).unwrap_or_default(),
            local_bytes: partition.local_bytes(),
            tiered_bytes: partition.tiered_bytes(),
        }
    }
}

/// The `Peer` service of a broker.
#[derive(Clone)]
pub struct PeerService(Arc<PeerServer>);

/// Returns the service with its message limits.
pub(super) fn service(server: &Arc<PeerServer>) -> peer_server::PeerServer<PeerService> {
    peer_server::PeerServer::new(PeerService(Arc::clone(server)))
        .max_decoding_message_size(limits::MAX_PEER_REQUEST_BYTES)
        .max_encoding_message_size(limits::MAX_MESSAGE_BYTES)
}

#[tonic::async_trait]
impl peer_server::Peer for PeerService {
    type ReplicateStream = ReplicateStream;

    async fn replicate(
        &self,
        request: Request<Streaming<v1::ReplicateRequest>>,
    ) -> Result<Response<ReplicateStream>, Status> {
        self.0.started()?;
        Ok(Response::new(self.0.replicate(request.into_inner())))
    }

    async fn get_identity(
        &self,
        _request: Request<v1::GetIdentityRequest>,
    ) -> Result<Response<v1::GetIdentityResponse>, Status> {
        let peers = &self.0.peers;
        Ok(Response::new(v1::GetIdentityResponse {
            cluster: peers.cluster().to_owned(),
            broker_id: peers.me().0,
            broker_epoch: peers.own_registration().map(|epoch| epoch.0),
            incarnation: self.0.incarnation.clone(),
        }))
    }

    async fn report_failure(
        &self,
        request: Request<v1::ReportFailureRequest>,
    ) -> Result<Response<v1::ReportFailureResponse>, Status> {
        let request = request.into_inner();
        self.0.started()?.is_of_this_cluster(&request.cluster)?;
        let report = FailureReport {
            reporter: BrokerId(request.reporter),
            broker: BrokerId(request.broker_id),
            epoch: Revision(request.broker_epoch),
            seen: request.observation.chars().take(200).collect(),
        };
        let revoked = (self.0.callbacks.report)(report).await?;
        Ok(Response::new(v1::ReportFailureResponse { revoked }))
    }

    async fn describe_replicas(
        &self,
        request: Request<v1::DescribeReplicasRequest>,
    ) -> Result<Response<v1::DescribeReplicasResponse>, Status> {
        let replicas = request.into_inner().replicas;
        if replicas.len() > limits::MAX_PEER_REPLICAS {
            let message = format!(
                "{} replicas in one request, at most {} are allowed: send several requests",
                replicas.len(),
                limits::MAX_PEER_REPLICAS
            );
            return Err(ApiError::new(ErrorCode::InvalidRequest, message).into());
        }
        let server = self.0.started()?;
        let replicas = replicas.iter().map(|name| server.replica_report(name)).collect();
        Ok(Response::new(v1::DescribeReplicasResponse { replicas }))
    }

    async fn get_broker_stats(
        &self,
        _request: Request<v1::GetBrokerStatsRequest>,
    ) -> Result<Response<v1::GetBrokerStatsResponse>, Status> {
        Ok(Response::new((self.0.started()?.callbacks.status)()))
    }
}
