//! The `Peer` service: what other brokers ask of this one.
//!
//! `replicate` carries the stream over which they follow; `neighbours` is what both directions know of the brokers around; the
//! questions are answered here. Nothing of it is for clients.

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
        fault::{Fault, Reason},
        v1::{self, peer_server},
    },
    task::Tasks,
    telemetry::{LogThrottle, PeerCounters},
};

/// Somebody's word that a process is gone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Report {
    /// Who says so, as far as whoever calls may be believed: for the log, and nothing else.
    pub(super) reporter: BrokerId,
    /// Whose process.
    pub(super) broker: BrokerId,
    /// In which uptime.
    pub(super) epoch: Revision,
    /// What was seen.
    pub(super) seen: String,
}

/// What the service has others answer.
pub(super) struct Questions {
    /// How this broker is.
    pub(super) status: Box<dyn Fn() -> v1::StatusResponse + Send + Sync>,
    /// Why a replica here cannot be used; `None` where there is none, or it can be.
    pub(super) unusable: Box<dyn Fn(PartitionId) -> Option<String> + Send + Sync>,
    /// The leader epoch of a partition, by the metadata store.
    pub(super) stored_epoch: StoredEpoch,
    /// Looks into a report. True when the registration was taken away; a fault when that is to be tried again.
    pub(super) report: Box<dyn Fn(Report) -> BoxFuture<'static, Result<bool, Fault>> + Send + Sync>,
}

/// What other brokers have going on with this one.
pub(super) struct Peering {
    neighbours: Arc<Neighbours>,
    incarnation: String,
    questions: Questions,
    catch_up: Arc<CatchUp>,
    /// False while this broker answers only `WhoIs`.
    has_begun: AtomicBool,
    /// Bytes of batches that went out, by follower.
    sent: PeerCounters,
    /// The link of each broker that follows here.
    links: Mutex<BTreeMap<BrokerId, Incoming>>,
    /// How often the links of each broker's uptime were logged.
    link_logs: Mutex<BTreeMap<BrokerId, (Revision, LogThrottle)>>,
    tasks: Tasks,
}

impl Peering {
    /// Of the process of this incarnation. Replicas that catch up here take so many bytes in a second, where a number is given.
    /// What goes out is counted in `sent`. Links run as tasks of `tasks`.
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

    /// Answers all questions from now on. Before that this broker answers who it is, so that others see that an earlier process of it is
    /// gone.
    pub(super) fn begin(&self) {
        self.has_begun.store(true, Ordering::Release);
    }

    fn begun(&self) -> Result<&Self, Fault> {
        let has_begun = self.has_begun.load(Ordering::Acquire);
        has_begun.then_some(self).ok_or_else(|| Fault::new(Reason::NotReady, "this broker is starting; try again"))
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

/// The service, with its message limits.
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
            return Err(Fault::new(Reason::InvalidRequest, message).into());
        }
        let peering = self.0.begun()?;
        let replicas = replicas.iter().map(|name| peering.marks(name)).collect();
        Ok(Response::new(v1::MarksResponse { replicas }))
    }

    async fn status(&self, _request: Request<v1::StatusRequest>) -> Result<Response<v1::StatusResponse>, Status> {
        Ok(Response::new((self.0.begun()?.questions.status)()))
    }
}
