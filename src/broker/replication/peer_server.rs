//! The `Peer` service, which other brokers call.
//!
//! At most one inbound link of each follower's broker is open. A link with a newer broker epoch ends the previous link.
//! Brokers do not authenticate, so a link with the same broker epoch is rejected if the previous link responds to a
//! ping. The new link starts after every partition has processed the end of the previous link. So a late message of the
//! old link cannot end a subscription on the new one.

use std::{
    collections::BTreeMap,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use futures::{Stream, future::BoxFuture};
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::{
    failure_detector::FailureReport,
    links::PROTOCOL_VERSION,
    peer_client::{DisconnectReason, PeerError, error_from_status},
    peer_status::BrokerStatsSource,
    peer_table::PeerTable,
};
use crate::{
    cluster::Revision,
    limits,
    model::{BrokerId, LeaderEpoch, PartitionId},
    partition::{
        leader::member::PeerId,
        replication::{self, CatchUpThrottle, LinkEnd, LinkProbe, SenderConfig},
    },
    proto::{
        error::{ApiError, ErrorCode},
        v1::{self, peer_server, replicate_request, replicate_response},
    },
    task::{Tasks, clock, lock::Mutex},
    telemetry::{LogThrottle, PeerCounters},
};

/// Timeout for the Hello of a new stream.
const HELLO_TIMEOUT: Duration = Duration::from_secs(5);

/// Maximum time for passing the final error of a stream to its connection.
const LAST_RESPONSE_TIMEOUT: Duration = Duration::from_millis(500);

/// Timeout of a ping on the existing link. The ping is sent when another link with the same broker epoch arrives.
const PING_TIMEOUT: Duration = Duration::from_secs(1);

/// Maximum number of messages of a link that wait for the connection. The link's sender collects data in each message,
/// so a longer queue is of no use.
const QUEUE_LEN: usize = 1;

type ReplicateStream = Pin<Box<dyn Stream<Item = Result<v1::ReplicateResponse, Status>> + Send>>;

/// Inbound link of one follower's broker.
struct InboundLink {
    /// Broker epoch of the follower's broker.
    epoch: Revision,
    /// Sends pings on the link, to test whether the follower's broker responds.
    probe: Arc<LinkProbe>,
    /// Cancels the link.
    link: Tasks,
    /// Closed when the link has ended and every partition has processed its end.
    ended: watch::Receiver<()>,
}

/// Callbacks that serve requests of peers.
pub(super) struct PeerCallbacks {
    pub(super) stats: BrokerStatsSource,
    /// Verifies a failure report. Returns true if the reported registration was deleted, and an error if the reporter
    /// must send the report again.
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
    /// Bytes of sent batches, by the follower's broker.
    sent: PeerCounters,
    /// Inbound link of each follower's broker.
    links: Mutex<BTreeMap<BrokerId, InboundLink>>,
    /// Broker epoch of each follower's broker, and the log throttle for the links of that registration.
    link_logs: Mutex<BTreeMap<BrokerId, (Revision, LogThrottle)>>,
    tasks: Tasks,
}

impl PeerServer {
    /// Creates the server of the process with this incarnation. `catchup_bytes_per_second` limits the bytes that are
    /// sent to all catching-up replicas together. Sent bytes are counted in `sent`. Links run as tasks of `tasks`.
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

    /// From this call on, all requests are served. Before this call, only `GetIdentity` is served, from which peers can
    /// conclude that the broker's earlier process is gone.
    pub(super) fn begin_serving(&self) {
        self.is_started.store(true, Ordering::Release);
    }

    /// Returns the server if it serves all requests already, else the error `NOT_READY`.
    fn require_started(&self) -> Result<&Self, ApiError> {
        let is_started = self.is_started.load(Ordering::Acquire);
        is_started.then_some(self).ok_or_else(|| ApiError::new(ErrorCode::NotReady, "this broker is starting: retry"))
    }

    /// Returns the report about a local replica. For a replica that is not open, the report contains only the reason
    /// why it is offline, if there is one.
    fn replica_report(&self, name: &v1::TopicIdPartition) -> v1::ReplicaReport {
        let topic = name.topic_id.parse().ok();
        let id = topic.zip(u32::try_from(name.partition).ok()).map(|(topic, number)| PartitionId::new(topic, number));
        let Some(partition) = id.and_then(|id| self.peers.partition(id)) else {
            let failed = id.and_then(|id| self.peers.offline_reason(id)).unwrap_or_default();
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

impl PeerServer {
    /// Serves the stream of a follower's broker in its own task, until the stream ends.
    fn replicate(self: &Arc<Self>, incoming: Streaming<v1::ReplicateRequest>) -> ReplicateStream {
        let (outgoing, messages) = mpsc::channel(QUEUE_LEN);
        let server = Arc::clone(self);
        self.tasks.spawn("replicate", async move {
            if let Err(error) = server.serve(incoming, &outgoing).await {
                // The stream ends with this error. A timeout or a closed channel means that the peer is gone.
                let _gone = tokio::time::timeout(LAST_RESPONSE_TIMEOUT, outgoing.send(Err(error.into()))).await;
            }
        });
        Box::pin(ReceiverStream::new(messages))
    }

    /// Verifies the Hello of a stream, replaces the previous link of the follower's broker, and runs the link until it
    /// ends.
    async fn serve(
        &self,
        mut incoming: Streaming<v1::ReplicateRequest>,
        outgoing: &replication::ResponseSender,
    ) -> Result<(), ApiError> {
        let Some(first) = self.tasks.run_until_cancelled(tokio::time::timeout(HELLO_TIMEOUT, incoming.message())).await
        else {
            return Err(link_ended_error());
        };
        let hello = match first {
            Ok(Ok(Some(v1::ReplicateRequest { message: Some(replicate_request::Message::Hello(hello)), .. }))) => hello,
            Ok(Ok(_)) => {
                return Err(invalid_request(
                    "the first message of the stream is not Hello: send Hello first".to_owned(),
                ));
            }
            Ok(Err(status)) => return Err(ApiError::from(&status)),
            Err(_) => {
                return Err(invalid_request(format!("no Hello arrived within {HELLO_TIMEOUT:?}: send Hello first")));
            }
        };
        let (peer, own_epoch) = self.verify_hello(&hello).await?;
        self.peers.clocks.compare(peer.broker, hello.wall_clock_ms);
        let link = self.tasks.child();
        let (end_sender, ended) = watch::channel(());
        let probe = Arc::new(LinkProbe::default());
        let inbound = InboundLink { epoch: peer.epoch, probe: Arc::clone(&probe), link: link.clone(), ended };
        self.replace_link(peer, inbound).await?;
        let result = self.run_link(peer, own_epoch, probe, incoming, outgoing, &link).await;
        drop(end_sender);
        // Removes only this link: a newer link of the broker, whose `ended` channel is open, stays.
        let mut links = self.links.lock();
        if links.get(&peer.broker).is_some_and(|link| link.ended.has_changed().is_err()) {
            links.remove(&peer.broker);
        }
        result
    }

    /// Verifies a Hello. Returns the follower's broker with its confirmed broker epoch, and this broker's own broker
    /// epoch.
    async fn verify_hello(&self, hello: &v1::Hello) -> Result<(PeerId, Revision), ApiError> {
        let (me, broker) = (self.peers.me(), BrokerId(hello.broker_id));
        if hello.version != PROTOCOL_VERSION {
            return Err(invalid_request(format!(
                "protocol version {} is not supported: use version {PROTOCOL_VERSION}",
                hello.version
            )));
        }
        self.check_cluster(&hello.cluster)?;
        if hello.target_broker != me.0 {
            let target = hello.target_broker;
            return Err(invalid_request(format!("this is broker {me}, not broker {target}: correct the peer address")));
        }
        if broker == me {
            return Err(invalid_request(format!(
                "broker {broker} connects to itself: give each process its own broker.id"
            )));
        }
        let Some(own_epoch) = self.peers.own_epoch() else {
            return Err(ApiError::new(ErrorCode::NotReady, format!("broker {me} is not registered yet: retry")));
        };
        let epoch = Revision(hello.broker_epoch);
        self.peers.confirm(broker, epoch).await?;
        Ok((PeerId { broker, epoch }, own_epoch))
    }

    /// Fails unless `cluster` is the name of this broker's cluster.
    fn check_cluster(&self, cluster: &str) -> Result<(), ApiError> {
        let ours = self.peers.cluster();
        if cluster == ours {
            return Ok(());
        }
        let theirs: String = cluster.chars().take(200).collect();
        Err(invalid_request(format!(
            "this broker belongs to cluster {ours:?}, not to {theirs:?}: correct the peer address or the cluster name"
        )))
    }

    /// Stores `link` as the link of the broker of `peer`, ends the previous link of that broker, and waits for this
    /// end. Fails if the previous link has a later broker epoch, or has the same one and responds to a ping.
    async fn replace_link(&self, peer: PeerId, link: InboundLink) -> Result<(), ApiError> {
        // Probe of the last link in `links` that ended, or did not respond in time.
        let mut unresponsive: Option<Arc<LinkProbe>> = None;
        let previous = loop {
            let (probe, mut ended) = {
                let mut links = self.links.lock();
                match links.get(&peer.broker) {
                    Some(existing) if existing.epoch > peer.epoch => {
                        let (broker, epoch) = (peer.broker, existing.epoch);
                        let message = format!("broker {broker} has a link with the later broker epoch {epoch}");
                        return Err(invalid_request(message));
                    }
                    Some(existing)
                        if existing.epoch == peer.epoch
                            && !unresponsive.as_ref().is_some_and(|probe| Arc::ptr_eq(probe, &existing.probe)) =>
                    {
                        (Arc::clone(&existing.probe), existing.ended.clone())
                    }
                    _ => break links.insert(peer.broker, link),
                }
            };
            tokio::select! {
                biased;
                // The value in the channel never changes, so this branch runs when the channel is closed.
                _closed = ended.changed() => {}
                () = probe.ping_and_wait() => {
                    let broker = peer.broker;
                    let message = format!("broker {broker} already has a link to this broker, and that link responds");
                    return Err(ApiError::new(ErrorCode::NotReady, message));
                }
                () = tokio::time::sleep(PING_TIMEOUT) => {}
            }
            unresponsive = Some(probe);
        };
        if let Some(mut previous) = previous {
            previous.link.cancel();
            while previous.ended.changed().await.is_ok() {}
        }
        Ok(())
    }

    /// Sends the Welcome, and serves the link until it ends. Reports a lost link to the peer table.
    async fn run_link(
        &self,
        peer: PeerId,
        own_epoch: Revision,
        probe: Arc<LinkProbe>,
        incoming: Streaming<v1::ReplicateRequest>,
        outgoing: &replication::ResponseSender,
        link: &Tasks,
    ) -> Result<(), ApiError> {
        let welcome = v1::Welcome {
            broker_id: self.peers.me().0,
            broker_epoch: own_epoch.0,
            wall_clock_ms: Some(clock::wall_ms()),
        };
        let welcome = v1::ReplicateResponse {
            message: Some(replicate_response::Message::Welcome(welcome)),
            ..Default::default()
        };
        let _gone = outgoing.try_send(Ok(welcome));
        if let Some(links) = self.link_log(peer, |log| log.occur(clock::monotonic())) {
            tracing::info!(
                follower = %peer.broker, epoch = %peer.epoch, links,
                "opened the link of a follower's broker"
            );
        }
        let (find, sent) = (self.peers.partition_lookup(), self.sent.of(peer.broker.0));
        let stored_epoch = self.peers.leader_epoch_reader();
        let config = SenderConfig { peer, find, catch_up: Arc::clone(&self.catch_up), probe, stored_epoch, sent };
        let ended = tokio::select! {
            biased;
            // Never completes: this future cancels the link after a change, and `run_sender` then returns.
            () = async {
                self.peers.cancel_at_change(own_epoch, peer.broker, peer.epoch, link).await;
                std::future::pending().await
            } => LinkEnd::Stopped,
            ended = replication::run_sender(config, incoming, outgoing.clone(), link) => ended,
        };
        if self.link_log(peer, LogThrottle::recover).is_some() {
            tracing::info!(
                follower = %peer.broker, epoch = %peer.epoch, reason = %ended,
                "the link of a follower's broker ended"
            );
        }
        match ended {
            LinkEnd::Stopped => Err(link_ended_error()),
            LinkEnd::Bad(error) => Err(error),
            LinkEnd::Closed => {
                self.peers.on_link_lost(peer.broker, peer.epoch, DisconnectReason::Closed);
                Ok(())
            }
            LinkEnd::Broken(status) => {
                if let PeerError::Lost { reason, .. } = error_from_status("", &status) {
                    self.peers.on_link_lost(peer.broker, peer.epoch, reason);
                }
                Ok(())
            }
        }
    }

    /// Applies `update` to the log throttle for the links of this registration, because links may open and break many
    /// times a second. A new registration starts with a new throttle.
    fn link_log<T>(&self, peer: PeerId, update: impl FnOnce(&mut LogThrottle) -> T) -> T {
        let mut logs = self.link_logs.lock();
        let (epoch, log) = logs.entry(peer.broker).or_default();
        if *epoch != peer.epoch {
            (*epoch, *log) = (peer.epoch, LogThrottle::default());
        }
        update(log)
    }
}

/// The `Peer` service of a broker.
#[derive(Clone)]
pub struct PeerService(Arc<PeerServer>);

/// Returns the `Peer` service with its message limits.
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
        self.0.require_started()?;
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
        self.0.require_started()?.check_cluster(&request.cluster)?;
        let report = FailureReport {
            reporter: BrokerId(request.reporter),
            broker: BrokerId(request.broker_id),
            epoch: Revision(request.broker_epoch),
            observation: request.observation.chars().take(200).collect(),
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
        let server = self.0.require_started()?;
        let replicas = replicas.iter().map(|name| server.replica_report(name)).collect();
        Ok(Response::new(v1::DescribeReplicasResponse { replicas }))
    }

    async fn get_broker_stats(
        &self,
        _request: Request<v1::GetBrokerStatsRequest>,
    ) -> Result<Response<v1::GetBrokerStatsResponse>, Status> {
        Ok(Response::new((self.0.require_started()?.callbacks.stats)()))
    }
}

fn invalid_request(message: String) -> ApiError {
    ApiError::new(ErrorCode::InvalidRequest, message)
}

/// Returns the error that ends a link which this broker cancelled.
fn link_ended_error() -> ApiError {
    let message = "the link ended: this broker is stopping, or another link of the same broker replaced it";
    ApiError::new(ErrorCode::NotReady, message)
}
