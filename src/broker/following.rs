//! Outbound links: one for each broker that leads a partition which this broker follows.
//!
//! Partitions name their leaders ([`Links`]). A link is opened when the first partition names its broker, and reopened whenever it breaks:
//! at once, then after pauses that grow to a second. A link lasts for one broker epoch of either side. The end of a link is reported to
//! [`LinkLost`], which draws the conclusions.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use super::peer::{LinkLost, LookUp, Neighbour, Neighbours, Unconfirmed};
use crate::{
    client::{
        Connect,
        peers::{self, How, PeerError, Peers, Replicating},
    },
    cluster::Revision,
    model::{BrokerId, LeaderEpoch, PartitionId},
    partition::{
        Links,
        leader::{insync::Ends, join::Claim},
        session::{self, Asked, Ended, Find},
    },
    proto::v1,
    task::{Tasks, clock},
    telemetry::{Counter, LogThrottle, PeerCounters},
};

/// Version of the protocol between brokers.
pub(super) const VERSION: u32 = 1;

/// Timeout for a connection, and for the peer's welcome.
const CONNECT: Duration = Duration::from_secs(2);

/// First pause before a link is reopened.
const PAUSE: Duration = Duration::from_millis(20);

/// Longest pause before a link is reopened.
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// Outbound links of this broker.
pub(super) struct Following {
    neighbours: Arc<Neighbours>,
    peers: Peers,
    state: Mutex<State>,
    /// Bytes of received batches, by leader.
    received: PeerCounters,
    tasks: Tasks,
}

#[derive(Default)]
struct State {
    /// Leader that each partition follows.
    leaders: BTreeMap<PartitionId, BrokerId>,
    links: BTreeMap<BrokerId, Arc<Asked>>,
}

/// Reason why a link ended, or was not opened.
#[derive(Debug, thiserror::Error)]
enum Over {
    #[error("this side ends it")]
    Stopped,
    #[error("the connection was closed by the other side")]
    Closed,
    #[error(transparent)]
    Call(#[from] PeerError),
    #[error("it said nothing for {CONNECT:?}")]
    Silent,
    #[error("broker {answers} answers there: the address in the metadata is wrong, or used twice")]
    Other { answers: u32 },
    #[error("it has not said hello")]
    NoWelcome,
    #[error(transparent)]
    Unconfirmed(#[from] Unconfirmed),
    #[error("it sent what cannot be: {0}")]
    Bad(String),
}

impl Following {
    /// Creates links over `connect`, which run as tasks of `tasks`. Received bytes are counted in `received`.
    pub(super) fn new(
        neighbours: Arc<Neighbours>,
        connect: Arc<dyn Connect>,
        received: PeerCounters,
        tasks: Tasks,
    ) -> Arc<Self> {
        let peers = Peers::new(connect, CONNECT);
        Arc::new(Self { neighbours, peers, state: Mutex::default(), received, tasks })
    }

    /// Returns the client for requests to peers.
    pub(super) fn peers(&self) -> &Peers {
        &self.peers
    }

    /// Sets how local partitions are found, where lost links are reported, and how registrations are looked up. Called once, before the
    /// first partition is assigned.
    pub(super) fn hosts(&self, find: Find, lost: Arc<dyn LinkLost>, look_up: LookUp) {
        self.neighbours.serve(find, lost, look_up);
    }

    /// Updates the registered brokers with their peer addresses and broker epochs. Called at every change.
    pub(super) fn brokers(&self, known: BTreeMap<BrokerId, (String, Revision)>) {
        let known = known.into_iter().map(|(id, (address, epoch))| (id, Neighbour { address, epoch }));
        self.neighbours.know(known.collect());
    }

    /// Updates this broker's own broker epoch. A new epoch reopens the links.
    pub(super) fn registered(&self, epoch: Option<Revision>) {
        self.neighbours.registered(epoch);
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the link on which a partition follows.
    fn link(&self, partition: PartitionId) -> Option<Arc<Asked>> {
        let state = self.state();
        state.links.get(state.leaders.get(&partition)?).cloned()
    }

    fn known_epoch(&self, partition: PartitionId) -> LeaderEpoch {
        self.neighbours.find()(partition).map_or(LeaderEpoch::default(), |partition| partition.epoch())
    }

    /// Starts a task for the link to `leader`. The task owns the requests of the partitions, and may outlive the returned handle.
    fn open(&self, leader: BrokerId) -> Arc<Asked> {
        let asked = Arc::new(Asked::default());
        let link = Link {
            leader,
            asked: Arc::clone(&asked),
            neighbours: Arc::clone(&self.neighbours),
            peers: self.peers.clone(),
            received: self.received.of(leader.0),
            log: Mutex::default(),
            tasks: self.tasks.clone(),
        };
        self.tasks.spawn("link", async move { link.keep().await });
        asked
    }
}

impl Links for Following {
    fn follow(&self, partition: PartitionId, leader: BrokerId) {
        let mut state = self.state();
        let before = state.leaders.insert(partition, leader).filter(|before| *before != leader);
        let before = before.and_then(|before| state.links.get(&before).cloned());
        let link = Arc::clone(state.links.entry(leader).or_insert_with(|| self.open(leader)));
        drop(state);
        if let Some(before) = before {
            before.leave(partition, self.known_epoch(partition), false);
        }
        link.follow(partition);
    }

    fn join(&self, partition: PartitionId, epoch: LeaderEpoch, claim: Claim, ends: Ends) {
        if let Some(link) = self.link(partition) {
            link.join(partition, epoch, claim, ends);
        }
    }

    fn again(&self, partition: PartitionId) {
        if let Some(link) = self.link(partition) {
            link.again(partition);
        }
    }

    fn leave(&self, partition: PartitionId, known: LeaderEpoch, stopping: bool) {
        let link = {
            let mut state = self.state();
            let leader = state.leaders.remove(&partition);
            leader.and_then(|leader| state.links.get(&leader).cloned())
        };
        if let Some(link) = link {
            link.leave(partition, known, stopping);
        }
    }
}

/// Link to one broker.
struct Link {
    leader: BrokerId,
    asked: Arc<Asked>,
    neighbours: Arc<Neighbours>,
    peers: Peers,
    received: Counter,
    log: Mutex<LinkLog>,
    tasks: Tasks,
}

/// Log throttles for the links to one registration of a broker, because links may break and reopen without a pause.
#[derive(Default)]
struct LinkLog {
    epoch: Revision,
    stood: LogThrottle,
    over: LogThrottle,
}

impl Link {
    /// Opens the link whenever a partition follows on it, until the broker stops.
    async fn keep(self) {
        let mut pause: Option<Duration> = None;
        loop {
            let wanted = async {
                self.asked.followed().await;
                self.neighbours.both(self.leader).await
            };
            let (own, to) = tokio::select! {
                biased;
                () = self.tasks.cancelled() => return,
                wanted = wanted => wanted,
            };
            let began = clock::monotonic();
            let mut epoch = to.epoch;
            let over = self.once(own, &to, &mut epoch).await;
            if self.tasks.is_cancelled() {
                return;
            }
            self.conclude(&to.address, epoch, &over);
            // A link that was up for some time is reopened at once.
            if matches!(over, Over::Stopped) || began.elapsed() > CONNECT + LONGEST_PAUSE {
                pause = None;
            }
            let wait = pause.map_or(Duration::ZERO, |pause| (pause * 2).clamp(PAUSE, LONGEST_PAUSE));
            pause = Some(wait);
            tokio::select! {
                biased;
                () = self.tasks.cancelled() => return,
                () = tokio::time::sleep(wait) => {}
            }
        }
    }

    /// Logs how a link ended, and reports a lost link.
    fn conclude(&self, address: &str, epoch: Revision, over: &Over) {
        let how = match over {
            Over::Call(PeerError::Lost { how, .. }) => Some(*how),
            Over::Closed => Some(How::Ended),
            Over::Silent => Some(How::Silent),
            _ => None,
        };
        let leader = self.leader;
        let links = match over {
            Over::Stopped => Some(1),
            _ => self.log(epoch, |log| &mut log.over),
        };
        match over {
            _ if links.is_none() => {
                tracing::debug!(%leader, address, why = %over, "the link to a leader's broker is over again");
            }
            Over::Stopped => tracing::debug!(%leader, "the link to a leader's broker begins anew"),
            // One of the two brokers may not have received the registration of the other yet.
            Over::Unconfirmed(Unconfirmed::Unsure { .. }) => {
                tracing::info!(%leader, address, links, why = %over, "the link to a leader's broker cannot stand yet");
            }
            Over::Call(PeerError::Refused(fault)) if fault.retryable => {
                tracing::info!(%leader, address, links, why = %fault, "the link to a leader's broker cannot stand yet");
            }
            _ if how.is_some() => {
                tracing::info!(%leader, address, links, why = %over, "the link to a leader's broker is lost")
            }
            // Repeats until one of the two brokers is repaired.
            _ => tracing::warn!(%leader, address, links, why = %over, "the link to a leader's broker cannot stand"),
        }
        if let Some(how) = how {
            self.neighbours.lost(leader, epoch, how);
        }
    }

    /// Counts a link event. Returns the number of events since the last log line if one is due.
    fn log(&self, epoch: Revision, throttle: impl FnOnce(&mut LinkLog) -> &mut LogThrottle) -> Option<u64> {
        let mut log = self.log.lock().unwrap_or_else(PoisonError::into_inner);
        if log.epoch != epoch {
            *log = LinkLog { epoch, ..LinkLog::default() };
        }
        throttle(&mut log).occur(clock::monotonic())
    }

    /// Runs one link from its opening to its end. Sets `epoch` to that of the responding process, if one responds.
    async fn once(&self, own: Revision, to: &Neighbour, epoch: &mut Revision) -> Over {
        let link = self.tasks.child();
        let made = tokio::select! {
            biased;
            () = link.cancelled() => return Over::Stopped,
            made = self.make(own, to) => made,
        };
        let Replicating { sender, receiver } = match made {
            Ok((stream, answers)) => {
                *epoch = answers;
                stream
            }
            Err(over) => return over,
        };
        if let Some(links) = self.log(*epoch, |log| &mut log.stood) {
            tracing::info!(leader = %self.leader, address = to.address, links, "the link to a leader's broker stands");
        }
        let find = self.neighbours.find();
        let following = session::follow(&self.asked, &find, receiver, sender, &self.received, &link);
        let ended = tokio::select! {
            biased;
            // Pending for ever after it has cancelled the link.
            () = async {
                self.neighbours.cancel_at_change(own, self.leader, *epoch, &link).await;
                std::future::pending().await
            } => Ended::Stopped,
            ended = following => ended,
        };
        match ended {
            Ended::Stopped => Over::Stopped,
            Ended::Closed => Over::Closed,
            Ended::Broken(status) => peers::lost(&to.address, &status).into(),
            Ended::Bad(fault) => Over::Bad(fault.message),
        }
    }

    /// Opens the stream and waits for the peer's welcome.
    async fn make(&self, own: Revision, to: &Neighbour) -> Result<(Replicating, Revision), Over> {
        let hello = v1::Hello {
            cluster: self.neighbours.cluster().to_owned(),
            broker: self.neighbours.me().0,
            broker_epoch: own.0,
            to: self.leader.0,
            version: VERSION,
            wall_ms: Some(clock::wall_ms()),
        };
        let mut stream = self.peers.replicate(&to.address, hello).await?;
        let first = match tokio::time::timeout(CONNECT, stream.receiver.message()).await {
            Ok(Ok(Some(first))) => first,
            Ok(Ok(None)) => return Err(Over::Closed),
            Ok(Err(status)) => return Err(peers::lost(&to.address, &status).into()),
            Err(_) => return Err(Over::Silent),
        };
        let Some(v1::to_follower::Is::Welcome(welcome)) = first.is else { return Err(Over::NoWelcome) };
        if welcome.broker != self.leader.0 {
            return Err(Over::Other { answers: welcome.broker });
        }
        let epoch = Revision(welcome.broker_epoch);
        self.neighbours.confirm(self.leader, epoch).await?;
        self.neighbours.clocks.compare(self.leader, welcome.wall_ms);
        Ok((stream, epoch))
    }
}
