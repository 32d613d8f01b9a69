//! Outbound links: one to each broker that leads a partition with a follower on this broker.
//!
//! Partitions name the leaders that they follow ([`ReplicationLinks`]). The link to a broker is opened when the first
//! partition names the broker as its leader. A broken link is reopened: at once, then after pauses that grow to a
//! second. A link ends when a new broker epoch of either side begins. A lost link is reported to the peer table.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use super::{
    peer_client::{DisconnectReason, PeerClient, PeerError, ReplicationStream, error_from_status},
    peer_table::{PeerInfo, PeerTable, Unconfirmed},
};
use crate::{
    cluster::Revision,
    model::{BrokerId, LeaderEpoch, PartitionId},
    partition::{
        ReplicationLinks,
        leader::{divergence::LogPosition, member::ReplicaProgress},
        replication::{self, LinkEnd, LinkRequests},
    },
    proto::v1,
    task::{Backoff, Tasks, clock, lock::Mutex},
    telemetry::{Counter, LogThrottle, PeerCounters},
};

/// Version of the protocol between brokers.
pub(super) const PROTOCOL_VERSION: u32 = 1;

/// Timeout for opening a connection, and separately for the peer's Welcome.
pub(super) const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);

/// First pause before a link is reopened, after it was reopened once without a pause.
const MIN_RETRY_DELAY: Duration = Duration::from_millis(20);

/// Longest pause before a link is reopened.
const MAX_RETRY_DELAY: Duration = Duration::from_secs(1);

/// Outbound links of this broker.
pub(super) struct LinkManager {
    peer_table: Arc<PeerTable>,
    peers: PeerClient,
    state: Mutex<LinkTable>,
    /// Bytes of received batches, by the leader's broker.
    received: PeerCounters,
    tasks: Tasks,
}

#[derive(Default)]
struct LinkTable {
    /// Leader that each local follower follows.
    leaders: BTreeMap<PartitionId, BrokerId>,
    /// Requests of the link to each leader's broker. Links are never removed.
    links: BTreeMap<BrokerId, Arc<LinkRequests>>,
}

/// Reason why a link ended, or was not opened.
#[derive(Debug, thiserror::Error)]
enum LinkFailure {
    #[error("the link was stopped by this broker")]
    Stopped,
    #[error("the peer closed the connection")]
    Closed,
    #[error(transparent)]
    Call(#[from] PeerError),
    #[error("the peer sent no Welcome within {CONNECT_TIMEOUT:?}")]
    TimedOut,
    #[error("broker {responder} responds at this address: give each broker a peer address of its own")]
    WrongBroker { responder: u32 },
    #[error("the first message of the peer is not Welcome")]
    NoWelcome,
    #[error(transparent)]
    Unconfirmed(#[from] Unconfirmed),
    #[error("the peer sent an invalid message: {0}")]
    InvalidMessage(String),
}

impl LinkManager {
    /// Creates a manager without links. Links will run as tasks of `tasks`. Received bytes are counted in `received`.
    pub(super) fn new(
        peer_table: Arc<PeerTable>,
        peers: PeerClient,
        received: PeerCounters,
        tasks: Tasks,
    ) -> Arc<Self> {
        Arc::new(Self { peer_table, peers, state: Mutex::default(), received, tasks })
    }

    /// Returns the link on which a partition follows; `None` if the partition does not follow.
    fn link(&self, partition: PartitionId) -> Option<Arc<LinkRequests>> {
        let state = self.state.lock();
        state.links.get(state.leaders.get(&partition)?).cloned()
    }

    /// Returns the newest leader epoch of the local partition; zero if the partition is not open.
    fn newest_epoch(&self, partition: PartitionId) -> LeaderEpoch {
        self.peer_table.partition(partition).map_or(LeaderEpoch::default(), |partition| partition.epoch())
    }

    /// Starts a task that opens and reopens the link to `leader` until the broker stops. Returns the requests that the
    /// partitions and this task share.
    fn open(&self, leader: BrokerId) -> Arc<LinkRequests> {
        let requests = Arc::new(LinkRequests::default());
        let link = OutboundLink {
            leader,
            requests: Arc::clone(&requests),
            peer_table: Arc::clone(&self.peer_table),
            peers: self.peers.clone(),
            received: self.received.of(leader.0),
            log: Mutex::default(),
            tasks: self.tasks.clone(),
        };
        self.tasks.spawn("link", async move { link.run().await });
        requests
    }
}

impl ReplicationLinks for LinkManager {
    fn start_following(&self, partition: PartitionId, leader: BrokerId) {
        let mut state = self.state.lock();
        let previous = state.leaders.insert(partition, leader).filter(|previous| *previous != leader);
        let previous = previous.and_then(|previous| state.links.get(&previous).cloned());
        let link = Arc::clone(state.links.entry(leader).or_insert_with(|| self.open(leader)));
        drop(state);
        if let Some(previous) = previous {
            previous.unsubscribe(partition, self.newest_epoch(partition), false);
        }
        link.start_following(partition);
    }

    fn subscribe(&self, partition: PartitionId, epoch: LeaderEpoch, position: LogPosition, progress: ReplicaProgress) {
        if let Some(link) = self.link(partition) {
            link.subscribe(partition, epoch, position, progress);
        }
    }

    fn retry_later(&self, partition: PartitionId) {
        if let Some(link) = self.link(partition) {
            link.retry_later(partition);
        }
    }

    fn unsubscribe(&self, partition: PartitionId, newest_epoch: LeaderEpoch, stopping: bool) {
        let link = {
            let mut state = self.state.lock();
            let leader = state.leaders.remove(&partition);
            leader.and_then(|leader| state.links.get(&leader).cloned())
        };
        if let Some(link) = link {
            link.unsubscribe(partition, newest_epoch, stopping);
        }
    }
}

/// Link to one broker, and the task that runs it.
struct OutboundLink {
    leader: BrokerId,
    requests: Arc<LinkRequests>,
    peer_table: Arc<PeerTable>,
    peers: PeerClient,
    received: Counter,
    log: Mutex<LinkLog>,
    tasks: Tasks,
}

/// Log throttles for the links to one registration of a broker, because links may break and reopen many times a second.
#[derive(Default)]
struct LinkLog {
    epoch: Revision,
    opened: LogThrottle,
    ended: LogThrottle,
}

impl OutboundLink {
    /// Opens the link while a partition follows on it, runs it to its end, and reopens it. Returns when the broker
    /// stops.
    async fn run(self) {
        let mut backoff = Backoff::new(MIN_RETRY_DELAY, MAX_RETRY_DELAY);
        let mut reopen_at_once = true;
        loop {
            let ready = async {
                self.requests.wait_until_followed().await;
                self.peer_table.wait_for_registrations(self.leader).await
            };
            let Some((own_epoch, peer)) = self.tasks.run_until_cancelled(ready).await else {
                return;
            };
            let began = clock::monotonic();
            let mut peer_epoch = peer.epoch;
            let failure = self.run_once(own_epoch, &peer, &mut peer_epoch).await;
            if self.tasks.is_cancelled() {
                return;
            }
            self.report_link_end(&peer.address, peer_epoch, &failure);
            // A link that lasted for some time, or that this broker stopped, is reopened at once.
            if matches!(failure, LinkFailure::Stopped) || began.elapsed() > CONNECT_TIMEOUT + MAX_RETRY_DELAY {
                backoff.reset();
                reopen_at_once = true;
            }
            let pause = if reopen_at_once { Duration::ZERO } else { backoff.next_pause() };
            reopen_at_once = false;
            if self.tasks.sleep_until_cancelled(pause).await.is_none() {
                return;
            }
        }
    }

    /// Logs how a link ended, or why it could not be opened. If the connection failed or ended, reports that to the
    /// peer table: the peer's process may have exited. Other failures prove nothing about the process, and are not
    /// reported.
    fn report_link_end(&self, address: &str, epoch: Revision, failure: &LinkFailure) {
        let reason = match failure {
            LinkFailure::Call(PeerError::Lost { reason, .. }) => Some(*reason),
            LinkFailure::Closed => Some(DisconnectReason::Closed),
            LinkFailure::TimedOut => Some(DisconnectReason::TimedOut),
            _ => None,
        };
        let leader = self.leader;
        // Number of ended links since the last log line; `None` if the log throttle permits no line.
        let links = match failure {
            LinkFailure::Stopped => Some(1),
            _ => self.count_event(epoch, |log| &mut log.ended),
        };
        match failure {
            _ if links.is_none() => {
                tracing::debug!(%leader, address, reason = %failure, "the link to the leader's broker ended again");
            }
            LinkFailure::Stopped => tracing::debug!(%leader, "reopening the link to the leader's broker"),
            // The metadata cache may not contain the peer's registration yet, and the metadata store could not be read.
            LinkFailure::Unconfirmed(Unconfirmed::Unsure { .. }) => {
                tracing::info!(
                    %leader, address, links, reason = %failure,
                    "could not open the link to the leader's broker yet: retrying"
                );
            }
            LinkFailure::Call(PeerError::Refused(error)) if error.retryable => {
                tracing::info!(
                    %leader, address, links, reason = %error,
                    "could not open the link to the leader's broker yet: retrying"
                );
            }
            _ if reason.is_some() => {
                tracing::info!(
                    %leader, address, links, reason = %failure,
                    "lost the link to the leader's broker: reopening it"
                )
            }
            // Usually a wrong configuration or version of one of the two brokers, which an operator has to correct. A
            // broker epoch that could not be confirmed may also be temporary, after a registration.
            _ => tracing::warn!(
                %leader, address, links, reason = %failure,
                "could not open the link to the leader's broker: retrying"
            ),
        }
        if let Some(reason) = reason {
            self.peer_table.on_link_lost(leader, epoch, reason);
        }
    }

    /// Counts an opened or ended link, in the log throttle that `throttle` selects. Returns the number since the last
    /// log line if the caller must log a line. A new broker epoch of the peer starts with new throttles.
    fn count_event(&self, epoch: Revision, throttle: impl FnOnce(&mut LinkLog) -> &mut LogThrottle) -> Option<u64> {
        let mut log = self.log.lock();
        if log.epoch != epoch {
            *log = LinkLog { epoch, ..LinkLog::default() };
        }
        throttle(&mut log).occur(clock::monotonic())
    }

    /// Runs one link from its opening to its end. Sets `peer_epoch` to the broker epoch in the peer's Welcome, if one
    /// arrives.
    async fn run_once(&self, own_epoch: Revision, peer: &PeerInfo, peer_epoch: &mut Revision) -> LinkFailure {
        let link = self.tasks.child();
        let Some(opened) = link.run_until_cancelled(self.open_stream(own_epoch, peer)).await else {
            return LinkFailure::Stopped;
        };
        let ReplicationStream { sender, receiver } = match opened {
            Ok((stream, welcome_epoch)) => {
                *peer_epoch = welcome_epoch;
                stream
            }
            Err(failure) => return failure,
        };
        if let Some(links) = self.count_event(*peer_epoch, |log| &mut log.opened) {
            tracing::info!(
                leader = %self.leader, address = peer.address, links,
                "opened the link to the leader's broker"
            );
        }
        let find = self.peer_table.partition_lookup();
        let following = replication::run_receiver(&self.requests, &find, receiver, sender, &self.received, &link);
        let ended = tokio::select! {
            biased;
            // Never completes: this future cancels the link after a change, and `run_receiver` then returns.
            () = async {
                self.peer_table.cancel_at_change(own_epoch, self.leader, *peer_epoch, &link).await;
                std::future::pending().await
            } => LinkEnd::Stopped,
            ended = following => ended,
        };
        match ended {
            LinkEnd::Stopped => LinkFailure::Stopped,
            LinkEnd::Closed => LinkFailure::Closed,
            LinkEnd::Broken(status) => error_from_status(&peer.address, &status).into(),
            LinkEnd::Bad(error) => LinkFailure::InvalidMessage(error.message),
        }
    }

    /// Opens the stream and waits for the peer's Welcome. Verifies the broker id and the broker epoch in the Welcome,
    /// and compares the peer's clock with the local one. Returns the stream and the peer's broker epoch.
    async fn open_stream(
        &self,
        own_epoch: Revision,
        peer: &PeerInfo,
    ) -> Result<(ReplicationStream, Revision), LinkFailure> {
        let hello = v1::Hello {
            cluster: self.peer_table.cluster().to_owned(),
            broker_id: self.peer_table.me().0,
            broker_epoch: own_epoch.0,
            target_broker: self.leader.0,
            version: PROTOCOL_VERSION,
            wall_clock_ms: Some(clock::wall_ms()),
        };
        let mut stream = self.peers.replicate(&peer.address, hello).await?;
        let first = match tokio::time::timeout(CONNECT_TIMEOUT, stream.receiver.message()).await {
            Ok(Ok(Some(first))) => first,
            Ok(Ok(None)) => return Err(LinkFailure::Closed),
            Ok(Err(status)) => return Err(error_from_status(&peer.address, &status).into()),
            Err(_) => return Err(LinkFailure::TimedOut),
        };
        let Some(v1::replicate_response::Message::Welcome(welcome)) = first.message else {
            return Err(LinkFailure::NoWelcome);
        };
        if welcome.broker_id != self.leader.0 {
            return Err(LinkFailure::WrongBroker { responder: welcome.broker_id });
        }
        let epoch = Revision(welcome.broker_epoch);
        self.peer_table.confirm(self.leader, epoch).await?;
        self.peer_table.clocks.compare(self.leader, welcome.wall_clock_ms);
        Ok((stream, epoch))
    }
}
