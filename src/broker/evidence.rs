//! Failure detection: confirms after a lost link that the process of the peer is gone, long before its lease expires.
//!
//! # Overview
//!
//! A broken link alone proves little. A refused connection proves that no process listens at the address: the host responded, and the
//! process is gone. So a lost link is followed by probes. An inconclusive probe is repeated: an exiting process accepts connections until
//! its last moment, its successor accepts them before it responds, and a busy host responds late.
//!
//! If two probes in a row are refused or reach another process of that broker, two things happen:
//!
//! - Leaders on this broker remove the peer from the ISR at once (`Departure::Gone`), so that `acks=all` does not wait for the lease.
//! - The controller receives a failure report. The controller probes the peer itself, for any reporter, deletes the registration with a
//!   compare on the broker epoch, and then elects other leaders. If the controller is the suspect, the other brokers delete its
//!   registration, in the order of their ids, each a little later than the one before.
//!
//! A timeout is no failure here: a host that disappeared or is unreachable keeps its lease until the lease expires.
//!
//! # Invariants
//!
//! - A false report costs time, never correctness: the broker registers again under a new broker epoch, and every partition update is a
//!   compare-and-set.
//! - A process that returns after it was declared gone was running, so something between the brokers refuses connections. Reports about
//!   that broker are then ignored, for a minute at first and twice as long each time.

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

/// Timeout of a probe.
const PROBE: Duration = Duration::from_millis(200);

/// Pause between two probes. A port that refuses connections for a shorter time is being taken over by another process.
const BETWEEN: Duration = Duration::from_millis(50);

/// Maximum time for which inconclusive probes are repeated.
const UNCLEAR: Duration = Duration::from_secs(1);

/// First and longest pause before an inconclusive check is repeated. The pause doubles each time: the successor of an exited process may
/// not respond yet.
const LOOK_AGAIN: Duration = Duration::from_millis(500);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

/// Maximum time for the partitions to process the failure. A partition that is too busy receives the end of the registration instead.
const NOTED: Duration = Duration::from_secs(1);

/// Timeout of a report, in which the controller probes the peer and deletes its registration.
const REPORT: Duration = Duration::from_secs(3);

/// Maximum number of report attempts, and the pause between them.
const REPORTS: u32 = 10;
const REPORT_AGAIN: Duration = Duration::from_millis(200);

/// Maximum number of brokers that are probed concurrently because of reports.
const REPORT_PROBES: usize = 4;

/// Maximum number of attempts to delete a registration. A second deletion has no effect.
const REVOKES: u32 = 3;

/// Delay between two successive brokers that act when the controller itself is gone.
const RANK: Duration = Duration::from_millis(30);

/// Result of a probe.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Seen {
    /// No process listens at the address.
    Refused,
    /// Another process responds.
    Replaced,
    /// The process responds.
    There,
    /// Inconclusive: the connection broke, or no response arrived in time.
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

    /// Returns true if the process is gone.
    fn is_gone(self) -> bool {
        matches!(self, Self::Refused | Self::Replaced)
    }
}

/// Failure detector of one broker.
pub(super) struct Evidence {
    itself: Weak<Self>,
    broker: Weak<Broker>,
    peers: Peers,
    tasks: Tasks,
    /// Checks in progress. A broker has several links, and all of them break at once.
    looks: Mutex<BTreeSet<(BrokerId, Revision)>>,
    trust: Mutex<Trust>,
    /// Reports of other brokers that are being verified.
    reports: SharedChecks<(BrokerId, Revision), Result<bool, StoreError>>,
    /// Log throttle for reports about brokers that were running.
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
    /// Creates the failure detector of this broker. Probes run as tasks of `tasks`.
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
    /// Probes the process of a lost link and handles its failure. Returns when the result is conclusive, or the registration is gone.
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

    /// Removes a broker from the ISR of all partitions led here. A partition that is blocked by its disk delays no other partition, and the
    /// call does not wait for it longer than a bounded time.
    async fn drop_everywhere(&self, peer: Peer) {
        let led = self.hosted.open().into_iter().filter(|partition| partition.standing().role.leads());
        let told = stream::iter(led)
            .for_each_concurrent(None, |partition| async move { partition.left(peer, Departure::Gone).await });
        if tokio::time::timeout(NOTED, told).await.is_err() {
            tracing::warn!(broker = %peer.broker, "some partitions took no note of a process that is gone: their tasks are busy");
        }
    }

    /// Reports a failed process until its registration is deleted, or until no report was accepted for long. If the controller failed at
    /// the same time, another controller is elected soon.
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

    /// Reports a failed process once. Returns true if its registration was deleted.
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
            // This broker is the controller and has already probed.
            (Some(controller), _) if controller == me => {
                self.take_away(report, evidence).await.is_ok_and(|revoked| revoked)
            }
            // Only the controller may delete the registration, and the controller is registered without a peer address. The lease will
            // expire.
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
                // Not revoked: the controller's probe was inconclusive, or another broker is the controller by now.
                response.is_ok_and(|response| response.revoked)
            }
            // The controller is the suspect, or there is none: the first of the remaining brokers acts in its place.
            _ => {
                tokio::time::sleep(RANK * u32::try_from(rank).unwrap_or(u32::MAX)).await;
                let revoked = self.revoke(broker, epoch).await;
                if let Err(error) = &revoked {
                    tracing::debug!(%broker, %error, "the registration could not be taken away");
                }
                // The compare failed because another broker was faster, or because the controller changed. The metadata cache will show
                // which.
                revoked == Ok(true)
            }
        }
    }

    /// Verifies a report that arrived over the network, as the controller: this broker probes the suspect itself, for any reporter. Waiting
    /// reports about one registration share one probe, so reports about one live broker do not delay reports about others. Returns true if
    /// the registration was deleted.
    ///
    /// # Errors
    /// The metadata store did not apply the deletion: the reporter must report again.
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

    /// Deletes the registration of a process that this broker found gone, if this broker is the controller. Returns true if it is deleted.
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
            // The report is repeated while the registration exists.
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

    /// Deletes a registration if it still has this broker epoch. Returns true if this call deleted the registration.
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

    /// Makes one attempt. Also deletes the controller key, if the same broker holds it.
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

/// Returns the registration with this broker epoch, while the metadata cache contains it.
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

/// Probes until the process responds, until two probes in a row found it gone, or until probes were inconclusive for too long.
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
    /// Derives the state of the process from the response at its address.
    fn judge(self, answer: &Result<v1::WhoIsResponse, PeerError>) -> Seen {
        let Self { cluster, broker, registered } = self;
        match answer {
            // A wrong address, or one that is used twice, proves nothing about the process.
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

    /// Returns a listener and a broker that is registered at its address.
    async fn listening() -> (Peers, TcpListener, BrokerValue) {
        let wait = Duration::from_secs(5);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let registered = BrokerValue::running_at(listener.local_addr().unwrap().to_string());
        (Peers::new(Arc::new(Tcp::between_brokers(wait)), wait), listener, registered)
    }

    /// A killed process accepts connections until its listener is closed, which may be after its other sockets. Regression: after one such
    /// probe, the partitions of the process waited until its lease expired.
    #[tokio::test]
    async fn process_exiting_during_probe_is_detected() {
        let (peers, listener, registered) = listening().await;
        let (seen, ()) = tokio::join!(probe(&peers, suspect(&registered)), async {
            // One connection breaks, one gets no response, then the listener is closed.
            drop(listener.accept().await.unwrap());
            let silent = listener.accept().await.unwrap();
            tokio::time::sleep(PROBE).await;
            drop((listener, silent));
        });
        assert_eq!(seen, Seen::Refused);
    }

    #[test]
    fn response_of_other_broker_or_cluster_is_inconclusive() {
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
    async fn unresponsive_process_is_not_declared_gone() {
        let (peers, _listener, registered) = listening().await;
        assert_eq!(probe(&peers, suspect(&registered)).await, Seen::Unclear);
    }
}
