//! What a lost link means: whether the process at its other end is gone, long before its lease says so.
//!
//! # Overview
//!
//! A link that breaks says little. A connection that is then refused says that nobody listens at that address any more: the system
//! there answered, and the process is gone. So a lost link is followed by a probe, twice; when both are refused, or another
//! process of that broker answers, two things happen (a probe that breaks, or is not answered at once, is repeated: a process that is dying
//! takes connections until its last moment, one in its place takes them before it answers, and on a busy machine every answer is late):
//!
//! - leaders here drop the broker from their in-sync replicas at once (`Departure::Gone`), so that `acks=all` does not wait for its lease;
//! - the controller is told. It probes for itself, whoever told it, and takes the registration away, by comparing the broker epoch; it then elects
//!   others. Is the controller itself the suspect, the brokers with the lowest numbers do the same, each a little later than the
//!   one before.
//!
//! Silence means nothing here: a host that vanished, or is cut off, keeps its lease until that ends.
//!
//! # Invariants
//!
//! - Nothing becomes wrong by wrong evidence, only slow: who is declared gone registers again under a new broker epoch, and every
//!   change of a partition is a compare-and-set as always.
//! - A process that was declared gone and comes back was not dead, so something between lies. Evidence against that broker then
//!   counts for nothing, for a minute at first and twice as long each time.

mod shared_checks;
mod trust;

use std::{
    collections::BTreeSet,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::Duration,
};

use self::{shared_checks::SharedChecks, trust::Trust};
use super::{
    Broker,
    peer::{LinkLost, Report},
};
use crate::{
    client::peers::{How, PeerError, Peers},
    cluster::{BrokerValue, Compare, Known, Outcome, Revision, StoreError, Transaction, ViewState},
    model::BrokerId,
    partition::leader::insync::{Departure, Peer},
    proto::v1,
    task::{Tasks, clock},
    telemetry::LogThrottle,
};
use futures::{StreamExt as _, stream};

/// How long a probe waits for an answer.
const PROBE: Duration = Duration::from_millis(200);

/// Between two probes: a port that is refused for less is one that is being taken over.
const BETWEEN: Duration = Duration::from_millis(50);

/// How long probes are repeated while it is not clear what they show.
const UNCLEAR: Duration = Duration::from_secs(1);

/// Pause before a look that showed nothing is repeated, twice as long each time up to the longest: the process that takes a dead one's place may not answer yet.
const LOOK_AGAIN: Duration = Duration::from_millis(500);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

/// How long partitions may take to note it. One that is too busy hears of the registration's end instead.
const NOTED: Duration = Duration::from_secs(1);

/// How long the controller may take to look for itself, and to take the registration away.
const REPORT: Duration = Duration::from_secs(3);

/// How often, and after which pause, somebody is looked for who takes a report.
const REPORTS: u32 = 10;
const REPORT_AGAIN: Duration = Duration::from_millis(200);

/// Brokers that are looked at, because others reported them, at the same time.
const REPORT_PROBES: usize = 4;

/// How often a registration is tried to be taken away. Done twice it does no more than once.
const REVOKES: u32 = 3;

/// How much later than the one before a broker acts when the controller itself is gone.
const RANK: Duration = Duration::from_millis(30);

/// What is known of a broker's process from the outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Seen {
    /// Nobody listens there any more.
    Refused,
    /// Another process answers.
    Replaced,
    /// It answers.
    There,
    /// Nothing can be said: the connection broke, or nobody answered in time.
    Unclear,
}

impl Seen {
    fn words(self) -> &'static str {
        match self {
            Self::Refused => "connections are refused",
            Self::Replaced => "another process answers",
            Self::There => "it answers",
            Self::Unclear => "nothing",
        }
    }

    /// Whether the process is gone.
    fn is_gone(self) -> bool {
        matches!(self, Self::Refused | Self::Replaced)
    }
}

/// The evidence of one broker.
pub(super) struct Evidence {
    itself: Weak<Self>,
    broker: Weak<Broker>,
    peers: Peers,
    tasks: Tasks,
    /// Looks that are under way: a broker has many links, and all of them break at once.
    looks: Mutex<BTreeSet<(BrokerId, Revision)>>,
    trust: Mutex<Trust>,
    /// Reports by others that are being looked into.
    reports: SharedChecks<(BrokerId, Revision), Result<bool, StoreError>>,
    /// Reports about brokers that were there.
    false_reports: Mutex<LogThrottle>,
}

impl LinkLost for Evidence {
    fn link_lost(&self, broker: BrokerId, epoch: Revision, how: How) {
        if how == How::Silent || self.tasks.is_cancelled() || !self.looks().insert((broker, epoch)) {
            return;
        }
        let (Some(held), Some(evidence)) = (self.broker.upgrade(), self.itself.upgrade()) else { return };
        self.tasks.spawn("evidence", async move {
            tokio::select! {
                biased;
                () = evidence.tasks.cancelled() => {}
                () = held.look_after(broker, epoch, &evidence) => {}
            }
            evidence.looks().remove(&(broker, epoch));
        });
    }
}

impl Evidence {
    /// Of this broker. Probes run as tasks of `tasks`.
    pub(super) fn new(broker: Weak<Broker>, peers: Peers, tasks: Tasks) -> Arc<Self> {
        Arc::new_cyclic(|itself| Self {
            itself: Weak::clone(itself),
            broker,
            peers,
            tasks,
            looks: Mutex::default(),
            trust: Mutex::default(),
            reports: SharedChecks::new(REPORT_PROBES),
            false_reports: Mutex::default(),
        })
    }

    fn looks(&self) -> MutexGuard<'_, BTreeSet<(BrokerId, Revision)>> {
        self.looks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn trust(&self) -> MutexGuard<'_, Trust> {
        self.trust.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Broker {
    /// Looks whether the process of a lost link is gone, and acts by it. Ends when that is clear or its registration is gone.
    async fn look_after(&self, broker: BrokerId, epoch: Revision, evidence: &Evidence) {
        let mut pause = LOOK_AGAIN;
        let seen = loop {
            let Some(known) = registered(&self.view.state(), broker, epoch) else { return };
            match self.probe(broker, &known.value, evidence).await {
                Seen::There => return,
                Seen::Unclear => tokio::time::sleep(pause).await,
                gone => break gone,
            }
            pause = (pause * 2).min(LONGEST_PAUSE);
        };
        tracing::info!(%broker, seen = seen.words(), "a broker's process is gone");
        tokio::join!(self.drop_everywhere(Peer { broker, epoch }), self.report(broker, epoch, seen, evidence));
    }

    async fn probe(&self, broker: BrokerId, registered: &BrokerValue, evidence: &Evidence) -> Seen {
        let suspect = Suspect { cluster: &self.settings.cluster, broker, registered };
        probe(&evidence.peers, suspect).await
    }

    /// Has leaders here drop a broker. One whose task is stuck at its disk holds up no other, and is not waited for.
    async fn drop_everywhere(&self, peer: Peer) {
        let led = self.hosted.open().into_iter().filter(|partition| partition.standing().role.leads());
        let told = stream::iter(led)
            .for_each_concurrent(None, |partition| async move { partition.left(peer, Departure::Gone).await });
        if tokio::time::timeout(NOTED, told).await.is_err() {
            tracing::warn!(broker = %peer.broker, "some partitions took no note of a process that is gone: their tasks are busy");
        }
    }

    /// Sees to it that the registration of a process that is gone is taken away: until it is, or nobody could be told for long. Two
    /// processes may have gone at once, and one of them been the controller: then there is another one soon.
    async fn report(&self, broker: BrokerId, epoch: Revision, seen: Seen, evidence: &Evidence) {
        for _ in 0..REPORTS {
            if registered(&self.view.state(), broker, epoch).is_none()
                || self.report_once(broker, epoch, seen, evidence).await
            {
                return;
            }
            tokio::time::sleep(REPORT_AGAIN).await;
            let Some(known) = registered(&self.view.state(), broker, epoch) else { return };
            if self.probe(broker, &known.value, evidence).await == Seen::There {
                return;
            }
        }
        tracing::debug!(%broker, "nobody took the report of a process that is gone; its lease will end");
    }

    /// True when somebody has taken the registration away.
    async fn report_once(&self, broker: BrokerId, epoch: Revision, seen: Seen, evidence: &Evidence) -> bool {
        let me = self.settings.id;
        let state = self.view.state();
        let controller = state.controller().filter(|controller| *controller != broker);
        let known = controller.and_then(|id| state.brokers().get(&id));
        let address = known.map(|known| known.value.listeners.peer().map(str::to_owned));
        let rank = state.brokers().keys().filter(|id| **id != broker && **id < me).count();
        drop(state);
        let report = Report { reporter: me, broker, epoch, seen: seen.words().to_owned() };
        match (controller, address) {
            // Its own look was the probe.
            (Some(controller), _) if controller == me => {
                self.take_away(report, evidence).await.is_ok_and(|revoked| revoked)
            }
            // The controller alone may look, and is registered without an address: the lease will end.
            (Some(_), Some(None)) => false,
            (Some(_), Some(Some(address))) => {
                let request = v1::ReportGoneRequest {
                    cluster: self.settings.cluster.clone(),
                    reporter: me.0,
                    broker: broker.0,
                    broker_epoch: epoch.0,
                    seen: report.seen,
                };
                let response = evidence.peers.report_gone(&address, request, REPORT).await;
                if let Err(error) = &response {
                    tracing::debug!(%broker, %error, "the controller did not take the report");
                }
                // Not taken away: what the controller saw was not clear, or it is another one by now.
                response.is_ok_and(|response| response.revoked)
            }
            // The suspect itself, or nobody: the first of those that are left acts in its place.
            _ => {
                tokio::time::sleep(RANK * u32::try_from(rank).unwrap_or(u32::MAX)).await;
                let revoked = self.revoke(broker, epoch).await;
                if let Err(error) = &revoked {
                    tracing::debug!(%broker, %error, "the registration could not be taken away");
                }
                // Refused by one that was faster, or because the controller is another one by now: the mirror will tell.
                revoked == Ok(true)
            }
        }
    }

    /// The controller's look at a report that came by the network: this broker probes, no matter which reporter it names. Reports about the same
    /// registration that wait share one probe, so reports about one live broker do not hold up those about others. True when it took the
    /// registration away.
    ///
    /// # Errors
    /// When the store did not do it: whoever reported is to report again.
    pub(super) async fn judge(&self, report: Report, evidence: &Evidence) -> Result<bool, StoreError> {
        let Report { reporter, broker, epoch, .. } = report;
        if self.view.state().controller() != Some(self.settings.id) {
            return Ok(false);
        }
        if registered(&self.view.state(), broker, epoch).is_none() {
            return Ok(false);
        }
        let look = async move || {
            let Some(known) = registered(&self.view.state(), broker, epoch) else { return Ok(false) };
            match self.probe(broker, &known.value, evidence).await {
                Seen::There => {}
                Seen::Unclear => return Ok(false),
                Seen::Refused | Seen::Replaced => return self.take_away(report, evidence).await,
            }
            let reports =
                evidence.false_reports.lock().unwrap_or_else(PoisonError::into_inner).occur(clock::monotonic());
            if let Some(reports) = reports {
                let seen = report.seen;
                tracing::info!(%broker, %reporter, seen, reports, "a broker was reported as gone, and is there for its controller");
            }
            Ok(false)
        };
        evidence.reports.run((broker, epoch), look).await
    }

    /// Takes the registration of a process away that this broker has seen to be gone, if it is the controller. True when that was done.
    async fn take_away(&self, report: Report, evidence: &Evidence) -> Result<bool, StoreError> {
        let Report { reporter, broker, epoch, seen } = report;
        if self.view.state().controller() != Some(self.settings.id) {
            return Ok(false);
        }
        let Some(known) = registered(&self.view.state(), broker, epoch) else { return Ok(false) };
        if evidence.trust().is_revoked(broker, epoch) {
            return Ok(true);
        }
        let now = clock::monotonic();
        if !evidence.trust().believes(broker, &known.value.incarnation, now) {
            // The report is made several times while the registration stands.
            if let Some(reports) = evidence.trust().distrusted(broker, now) {
                tracing::info!(
                    %broker, %reporter, seen, reports,
                    "evidence against a broker that was not dead the last time counts for nothing"
                );
            }
            return Ok(false);
        }
        let revoked = self.revoke(broker, epoch).await.inspect_err(|error| {
            tracing::debug!(%broker, %error, "the registration could not be taken away yet");
        })?;
        if revoked {
            tracing::warn!(%broker, %reporter, seen, "a broker's process is gone; its registration was taken away");
            let now = clock::monotonic();
            evidence.trust().revoked(broker, &known.value.incarnation, epoch, now);
        }
        Ok(revoked)
    }

    /// Takes a registration away, if it still is that uptime's. True when that was done here.
    async fn revoke(&self, broker: BrokerId, epoch: Revision) -> Result<bool, StoreError> {
        let mut tries = 1;
        loop {
            match self.revoke_once(broker, epoch).await {
                Err(error) if error.retryable() && tries < REVOKES => {
                    tracing::debug!(%broker, %error, "the registration could not be taken away yet; trying again");
                    tries += 1;
                    tokio::time::sleep(BETWEEN).await;
                }
                outcome => return outcome,
            }
        }
    }

    /// One try, and with the registration the controller's key, if that is the same broker's.
    async fn revoke_once(&self, broker: BrokerId, epoch: Revision) -> Result<bool, StoreError> {
        let key = self.keys.broker(broker);
        let mut transaction = Transaction::new().when(Compare::CreateRevision(key.clone(), epoch)).delete(key);
        let state = self.view.state();
        if let Some(revision) = state.controller_revision().filter(|_| state.controller() == Some(broker)) {
            let controller = self.keys.controller();
            transaction = transaction.when(Compare::ModRevision(controller.clone(), revision)).delete(controller);
        }
        drop(state);
        Ok(matches!(self.store.transact(transaction).await?, Outcome::Done { .. }))
    }
}

/// The registration of this uptime, while the mirror shows it.
fn registered(state: &ViewState, broker: BrokerId, epoch: Revision) -> Option<Arc<Known<BrokerValue>>> {
    state.brokers().get(&broker).filter(|known| known.create_revision == epoch).cloned()
}

/// A broker whose process may be gone.
#[derive(Clone, Copy)]
struct Suspect<'a> {
    cluster: &'a str,
    broker: BrokerId,
    registered: &'a BrokerValue,
}

/// Looks until it is there, or was seen to be gone twice in a row, or nothing has become clear for long.
async fn probe(peers: &Peers, suspect: Suspect<'_>) -> Seen {
    let until = clock::monotonic() + UNCLEAR;
    let mut gone = false;
    loop {
        let seen = probe_once(peers, suspect).await;
        let twice = gone && seen.is_gone();
        if twice || seen == Seen::There || seen == Seen::Unclear && clock::monotonic() >= until {
            return seen;
        }
        gone = seen.is_gone();
        tokio::time::sleep(BETWEEN).await;
    }
}

async fn probe_once(peers: &Peers, suspect: Suspect<'_>) -> Seen {
    let Some(address) = suspect.registered.listeners.peer() else { return Seen::Unclear };
    suspect.judge(&peers.who_is(address, PROBE).await)
}

impl Suspect<'_> {
    /// Judges the process by the answer at its address.
    fn judge(self, answer: &Result<v1::WhoIsResponse, PeerError>) -> Seen {
        let Self { cluster, broker, registered } = self;
        match answer {
            // An address that is wrong or used twice says nothing about the process.
            Ok(there) if there.cluster != cluster || there.broker != broker.0 => Seen::Unclear,
            Ok(there) if there.incarnation != registered.incarnation => Seen::Replaced,
            Ok(_) | Err(PeerError::Refused(_)) => Seen::There,
            Err(PeerError::Lost { how: How::Refused, .. }) => Seen::Refused,
            Err(PeerError::Lost { .. } | PeerError::Address(_)) => Seen::Unclear,
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;
    use crate::client::Tcp;

    fn suspect(registered: &BrokerValue) -> Suspect<'_> {
        Suspect { cluster: "test", broker: BrokerId(1), registered }
    }

    /// A port, and a broker that is registered there.
    async fn listening() -> (Peers, TcpListener, BrokerValue) {
        let wait = Duration::from_secs(5);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let registered = BrokerValue::running_at(listener.local_addr().unwrap().to_string());
        (Peers::new(Arc::new(Tcp::between_brokers(wait)), wait), listener, registered)
    }

    /// A process that is killed takes connections until its listener is closed, which may be after its other ones. One such probe,
    /// and its partitions waited for the lease's end.
    #[tokio::test]
    async fn a_process_that_dies_while_it_is_probed_is_seen_to_be_gone() {
        let (peers, listener, registered) = listening().await;
        let (seen, ()) = tokio::join!(probe(&peers, suspect(&registered)), async {
            // One connection breaks, one is not answered; then nobody listens any more.
            drop(listener.accept().await.unwrap());
            let silent = listener.accept().await.unwrap();
            tokio::time::sleep(PROBE).await;
            drop((listener, silent));
        });
        assert_eq!(seen, Seen::Refused);
    }

    #[test]
    fn answer_of_another_broker_or_cluster_is_no_proof_that_a_process_is_gone() {
        let registered = BrokerValue::running_at("127.0.0.1:9470".to_owned());
        let answer = |cluster: &str, broker, incarnation: &str| {
            let answer = v1::WhoIsResponse {
                cluster: cluster.to_owned(),
                broker,
                incarnation: incarnation.to_owned(),
                ..Default::default()
            };
            suspect(&registered).judge(&Ok(answer))
        };
        assert_eq!(answer("test", 1, &registered.incarnation), Seen::There);
        assert_eq!(answer("test", 1, "another"), Seen::Replaced);
        assert_eq!(answer("other", 1, "another"), Seen::Unclear, "an address that two clusters use");
        assert_eq!(answer("test", 2, "another"), Seen::Unclear, "an address that two brokers use");
    }

    #[tokio::test]
    async fn a_process_that_says_nothing_is_not_taken_for_dead() {
        let (peers, _listener, registered) = listening().await;
        assert_eq!(probe(&peers, suspect(&registered)).await, Seen::Unclear);
    }
}
