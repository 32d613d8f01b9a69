//! Failure detection: confirms after a lost link that the process of the peer is gone, long before its lease expires.
//!
//! # Overview
//!
//! A lost link alone proves little, so it is followed by probes. A refused connection proves that no process listens at
//! the address: the host responded, and the process is gone. An inconclusive probe is repeated. An exiting process
//! accepts connections until its last moment, its successor accepts them before it responds, and a busy host responds
//! late.
//!
//! If two probes in a row are refused or reach another process of the peer's broker, two things happen:
//!
//! - Leaders on this broker remove the peer from the ISR at once (`DisconnectCause::ProcessGone`), so that `acks=all`
//!   does not wait for the lease.
//! - The controller receives a failure report, and probes the peer itself. If the process is gone, the controller
//!   deletes the registration with a compare on the broker epoch, and then elects other leaders. There may be no
//!   controller, or the controller may be the suspect or not be registered. The other brokers then try to delete the
//!   registration, in the order of their ids with growing delays.
//!
//! A link that was lost by a timeout is not followed by probes. A host that disappeared or is unreachable keeps its
//! registration until its lease expires.
//!
//! # Invariants
//!
//! - A false report costs time, never correctness: the broker registers again under a new broker epoch, and every
//!   partition update is a compare-and-set.
//! - If an incarnation registers again after its registration was deleted, it was running, and something between the
//!   brokers refuses connections. So the controller ignores reports about that incarnation for
//!   [`REVOKE_COOLDOWN_INTERVAL`] after the deletion.

mod probe;
mod shared_checks;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use futures::{StreamExt as _, stream};
use tokio::time::Instant;

use self::{
    probe::{PROBE_INTERVAL, ProbeResult, SuspectedPeer, probe},
    shared_checks::SharedChecks,
};
use super::{
    peer_client::{DisconnectReason, PeerClient},
    peer_table::LinkLossListener,
};
use crate::{
    broker::{node_context::NodeContext, partitions::table::PartitionTable},
    cluster::{
        BrokerValue, Compare, Keys, MetaStore, MetaStoreError, MetadataCache, MetadataSnapshot, Revision, Transaction,
        TxnOutcome, Versioned,
    },
    model::BrokerId,
    partition::leader::member::{DisconnectCause, PeerId},
    proto::v1,
    task::{Backoff, Tasks, clock, lock::Mutex},
    telemetry::LogThrottle,
};

/// First pause before inconclusive probes are repeated: the successor of an exited process may not respond yet. The
/// pause doubles each time, up to [`MAX_CHECK_DELAY`].
const MIN_CHECK_DELAY: Duration = Duration::from_millis(500);

/// Longest pause before inconclusive probes are repeated.
const MAX_CHECK_DELAY: Duration = Duration::from_secs(2);

/// Maximum time for the led partitions to process that a follower's process is gone. A partition that is too busy
/// processes the deletion of the registration later instead.
const DISCONNECT_TIMEOUT: Duration = Duration::from_secs(1);

/// Timeout of a report. The controller responds after its probes of the peer and, if the process is gone, the deletion
/// of the registration.
const REPORT_TIMEOUT: Duration = Duration::from_secs(3);

/// Maximum number of attempts to report one failed process.
const MAX_REPORT_ATTEMPTS: u32 = 10;

/// Pause between two such attempts.
const REPORT_RETRY_INTERVAL: Duration = Duration::from_millis(200);

/// Maximum number of brokers that are probed concurrently because of reports.
const MAX_CONCURRENT_REPORT_PROBES: usize = 4;

/// Maximum number of attempts to delete a registration. Retries are safe, because the deletion compares the broker
/// epoch.
const MAX_REVOKE_ATTEMPTS: u32 = 3;

/// Delay between the attempts of two brokers with successive ids to delete a registration while there is no controller.
const FALLBACK_DELAY: Duration = Duration::from_millis(30);

/// Time for which reports about an incarnation are ignored after its registration was deleted.
const REVOKE_COOLDOWN_INTERVAL: Duration = Duration::from_secs(60);

/// Registrations that this broker deleted as the controller, the last one of each broker id.
#[derive(Default)]
struct RevokeCooldown(BTreeMap<BrokerId, RevokedRegistration>);

/// A registration that this broker deleted as the controller.
struct RevokedRegistration {
    incarnation: String,
    epoch: Revision,
    /// Time of the deletion.
    at: Instant,
    /// Log throttle for reports about the broker of this registration that are ignored during the cooldown.
    ignored_reports: LogThrottle,
}

impl RevokeCooldown {
    /// Returns true if this broker has deleted the registration with this broker epoch. The metadata cache may still
    /// contain the registration for a moment.
    fn is_revoked(&self, broker: BrokerId, epoch: Revision) -> bool {
        self.0.get(&broker).is_some_and(|revoked| revoked.epoch == epoch)
    }

    /// Returns true if a registration of this incarnation may be deleted now: no cooldown of the incarnation is in
    /// progress.
    fn allows(&self, broker: BrokerId, incarnation: &str, now: Instant) -> bool {
        self.0.get(&broker).is_none_or(|revoked| {
            revoked.incarnation != incarnation || now.duration_since(revoked.at) >= REVOKE_COOLDOWN_INTERVAL
        })
    }

    /// Counts an ignored report about a broker. Returns the number of ignored reports since the last log line, if the
    /// caller must log a line.
    fn count_ignored(&mut self, broker: BrokerId, now: Instant) -> Option<u64> {
        self.0.get_mut(&broker)?.ignored_reports.occur(now)
    }
}

/// Report of a broker that a process is gone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct FailureReport {
    /// Reporting broker, as named by the unauthenticated caller. Used in the log only.
    pub(super) reporter: BrokerId,
    /// Broker whose process is reported as gone.
    pub(super) broker: BrokerId,
    /// Broker epoch of the reported registration.
    pub(super) epoch: Revision,
    /// Result of the reporter's probe as text. Used in the log only.
    pub(super) observation: String,
}

/// Failure detector of one broker.
pub(super) struct FailureDetector {
    id: BrokerId,
    cluster: String,
    metadata: MetadataCache,
    store: Arc<dyn MetaStore>,
    keys: Keys,
    partitions: Arc<PartitionTable>,
    peers: PeerClient,
    tasks: Tasks,
    /// Registrations whose processes are being probed or reported after a lost link. Several links to and from one
    /// broker may break at once.
    checks: Mutex<BTreeSet<(BrokerId, Revision)>>,
    cooldown: Mutex<RevokeCooldown>,
    /// Verifications of reports from other brokers, by registration.
    reports: SharedChecks<(BrokerId, Revision), Result<bool, MetaStoreError>>,
    /// Log throttle for reports about brokers that respond.
    false_reports: Mutex<LogThrottle>,
}

impl LinkLossListener for FailureDetector {
    fn link_lost(self: Arc<Self>, broker: BrokerId, epoch: Revision, reason: DisconnectReason) {
        // A timeout proves nothing about the process. One task per registration is enough.
        if reason == DisconnectReason::TimedOut
            || self.tasks.is_cancelled()
            || !self.checks.lock().insert((broker, epoch))
        {
            return;
        }
        let tasks = self.tasks.clone();
        tasks.spawn("failure-detector", async move {
            self.tasks.run_until_cancelled(self.probe_peer(broker, epoch)).await;
            self.checks.lock().remove(&(broker, epoch));
        });
    }
}

impl FailureDetector {
    /// Creates the failure detector of this broker. Probes run as tasks of `tasks`.
    pub(super) fn new(ctx: &NodeContext, partitions: Arc<PartitionTable>, peers: PeerClient, tasks: Tasks) -> Self {
        Self {
            id: ctx.id,
            cluster: ctx.config.cluster.clone(),
            metadata: ctx.metadata.clone(),
            store: Arc::clone(&ctx.store),
            keys: ctx.keys.clone(),
            partitions,
            peers,
            tasks,
            checks: Mutex::default(),
            cooldown: Mutex::default(),
            reports: SharedChecks::new(MAX_CONCURRENT_REPORT_PROBES),
            false_reports: Mutex::default(),
        }
    }

    /// Probes the process of this registration until the result is conclusive. If the process is gone, removes it from
    /// the ISRs of led partitions and reports it. Returns early if the registration is gone.
    async fn probe_peer(&self, broker: BrokerId, epoch: Revision) {
        let mut backoff = Backoff::new(MIN_CHECK_DELAY, MAX_CHECK_DELAY);
        let result = loop {
            let Some(registration) = registered(&self.metadata.state(), broker, epoch) else { return };
            match self.probe(broker, &registration.value).await {
                ProbeResult::Alive => return,
                ProbeResult::Inconclusive => backoff.pause().await,
                result @ (ProbeResult::Refused | ProbeResult::Replaced) => break result,
            }
        };
        tracing::info!(%broker, observation = result.describe(), "the process of a broker is gone");
        tokio::join!(self.remove_from_isrs(PeerId { broker, epoch }), self.report(broker, epoch, result));
    }

    /// Probes the process of a registration.
    async fn probe(&self, broker: BrokerId, registered: &BrokerValue) -> ProbeResult {
        let suspect = SuspectedPeer { cluster: &self.cluster, broker, registered };
        probe(&self.peers, suspect).await
    }

    /// Requests the removal of a broker from the ISR of every partition that this broker leads. A partition that is
    /// blocked by its disk delays no other partition. The call returns after [`DISCONNECT_TIMEOUT`] at the latest.
    async fn remove_from_isrs(&self, peer: PeerId) {
        let led = self.partitions.open().into_iter().filter(|partition| partition.status().role.leads());
        let notified = stream::iter(led).for_each_concurrent(None, |partition| async move {
            partition.on_follower_disconnected(peer, DisconnectCause::ProcessGone).await
        });
        if tokio::time::timeout(DISCONNECT_TIMEOUT, notified).await.is_err() {
            tracing::warn!(
                broker = %peer.broker, timeout = ?DISCONNECT_TIMEOUT,
                "the process of a broker ended, and some partitions were too busy to remove its replicas from their \
                 ISR in time: they do so when its registration is deleted, and acks=all waits until then"
            );
        }
    }

    /// Reports a failed process until its registration is deleted or the process responds to a probe, at most
    /// [`MAX_REPORT_ATTEMPTS`] times. Attempts are repeated because a controller that failed at the same time is
    /// replaced soon.
    async fn report(&self, broker: BrokerId, epoch: Revision, result: ProbeResult) {
        for _ in 0..MAX_REPORT_ATTEMPTS {
            if registered(&self.metadata.state(), broker, epoch).is_none()
                || self.report_once(broker, epoch, result).await
            {
                return;
            }
            tokio::time::sleep(REPORT_RETRY_INTERVAL).await;
            let Some(registration) = registered(&self.metadata.state(), broker, epoch) else { return };
            if self.probe(broker, &registration.value).await == ProbeResult::Alive {
                return;
            }
        }
        tracing::debug!(
            %broker,
            "no controller accepted the report about a process that is gone: its lease will expire"
        );
    }

    /// Makes one attempt to have the registration of a failed process deleted. The controller deletes it or, without a
    /// registered controller besides the suspect, this broker after a delay. Returns true if the controller or this
    /// broker has deleted the registration.
    async fn report_once(&self, broker: BrokerId, epoch: Revision, result: ProbeResult) -> bool {
        let me = self.id;
        let state = self.metadata.state();
        let controller = state.controller().filter(|controller| *controller != broker);
        let registration = controller.and_then(|id| state.brokers().get(&id));
        let address = registration.map(|registration| registration.value.listeners.peer().map(str::to_owned));
        // Number of registered brokers with lower ids than this broker, without the suspect.
        let rank = state.brokers().keys().filter(|id| **id != broker && **id < me).count();
        drop(state);
        let report = FailureReport { reporter: me, broker, epoch, observation: result.describe().to_owned() };
        match (controller, address) {
            // This broker is the controller, and has already probed the process.
            (Some(controller), _) if controller == me => {
                self.delete_registration(report).await.is_ok_and(|revoked| revoked)
            }
            // There is a registered controller, so only the controller may delete the registration. The report cannot
            // be sent, because the controller has no peer address, so the lease will expire.
            (Some(_), Some(None)) => false,
            (Some(_), Some(Some(address))) => {
                let request = v1::ReportFailureRequest {
                    cluster: self.cluster.clone(),
                    reporter: me.0,
                    broker_id: broker.0,
                    broker_epoch: epoch.0,
                    observation: report.observation,
                };
                let response = self.peers.report_failure(&address, request, REPORT_TIMEOUT).await;
                if let Err(error) = &response {
                    tracing::debug!(%broker, %error, "the controller did not accept the report");
                }
                // `revoked` is false if the controller did not find the process gone, ignored the report in a cooldown,
                // or is no longer the controller.
                response.is_ok_and(|response| response.revoked)
            }
            // The controller is the suspect, is not registered, or does not exist. Each remaining broker tries to
            // delete the registration itself, after a delay that grows with its rank.
            (None, _) | (Some(_), None) => {
                tokio::time::sleep(FALLBACK_DELAY * u32::try_from(rank).unwrap_or(u32::MAX)).await;
                let revoked = self.revoke(broker, epoch).await;
                if let Err(error) = &revoked {
                    tracing::debug!(%broker, %error, "could not delete the registration");
                }
                // If nothing was deleted, another broker deleted the registration first, or the controller has changed.
                // The metadata cache will show that before the next attempt.
                revoked == Ok(true)
            }
        }
    }

    /// Handles a report from another broker. If this broker is the controller, it probes the suspect itself, and
    /// deletes the registration if the process is gone. Waiting reports about one registration share one probe. Reports
    /// about one broker therefore do not delay reports about other brokers. Returns true if the registration was
    /// deleted.
    ///
    /// # Errors
    /// The metadata store did not apply the deletion, or its response is unknown: the reporter must report again.
    pub(super) async fn confirm_failure(&self, report: FailureReport) -> Result<bool, MetaStoreError> {
        let FailureReport { reporter, broker, epoch, .. } = report;
        if self.metadata.state().controller() != Some(self.id) {
            return Ok(false);
        }
        if registered(&self.metadata.state(), broker, epoch).is_none() {
            return Ok(false);
        }
        let check = async move || {
            let Some(entry) = registered(&self.metadata.state(), broker, epoch) else { return Ok(false) };
            match self.probe(broker, &entry.value).await {
                ProbeResult::Alive => {}
                ProbeResult::Inconclusive => return Ok(false),
                ProbeResult::Refused | ProbeResult::Replaced => {
                    return self.delete_registration(report).await;
                }
            }
            let reports = self.false_reports.lock().occur(clock::monotonic());
            if let Some(reports) = reports {
                tracing::info!(
                    %broker, %reporter, observation = report.observation, reports,
                    "a broker was reported as gone, but it responds to the controller"
                );
            }
            Ok(false)
        };
        self.reports.run((broker, epoch), check).await
    }

    /// Deletes the registration of a process that this broker found gone. Does nothing unless this broker is the
    /// controller and no cooldown of the incarnation is in progress. A deletion starts a cooldown. Returns true if this
    /// call or an earlier one deleted the registration.
    async fn delete_registration(&self, report: FailureReport) -> Result<bool, MetaStoreError> {
        let FailureReport { reporter, broker, epoch, observation } = report;
        if self.metadata.state().controller() != Some(self.id) {
            return Ok(false);
        }
        let Some(entry) = registered(&self.metadata.state(), broker, epoch) else { return Ok(false) };
        if self.cooldown.lock().is_revoked(broker, epoch) {
            return Ok(true);
        }
        let now = clock::monotonic();
        if !self.cooldown.lock().allows(broker, &entry.value.incarnation, now) {
            // Reporters repeat the report while the registration exists, so the line is throttled.
            let reports = self.cooldown.lock().count_ignored(broker, now);
            if let Some(reports) = reports {
                tracing::info!(
                    %broker, %reporter, observation, reports,
                    "ignoring failure report: an earlier report about this broker was false"
                );
            }
            return Ok(false);
        }
        let revoked = self.revoke(broker, epoch).await.inspect_err(|error| {
            tracing::debug!(%broker, %error, "could not delete the registration yet");
        })?;
        if revoked {
            tracing::warn!(%broker, %reporter, observation, "the process of a broker is gone: its registration was deleted");
            let incarnation = entry.value.incarnation.clone();
            let (at, ignored_reports) = (clock::monotonic(), LogThrottle::default());
            let revoked = RevokedRegistration { incarnation, epoch, at, ignored_reports };
            self.cooldown.lock().0.insert(broker, revoked);
        }
        Ok(revoked)
    }

    /// Deletes a registration if it still has this broker epoch, with at most [`MAX_REVOKE_ATTEMPTS`]. Returns true if
    /// the last attempt deleted it. False does not prove that the registration exists: an earlier attempt with an
    /// unknown outcome may have deleted it.
    async fn revoke(&self, broker: BrokerId, epoch: Revision) -> Result<bool, MetaStoreError> {
        let mut attempts = 1;
        loop {
            match self.revoke_once(broker, epoch).await {
                Err(error) if error.retryable() && attempts < MAX_REVOKE_ATTEMPTS => {
                    tracing::debug!(%broker, %error, "could not delete the registration yet: retrying");
                    attempts += 1;
                    tokio::time::sleep(PROBE_INTERVAL).await;
                }
                outcome => return outcome,
            }
        }
    }

    /// Makes one attempt of [`Self::revoke`]. If the same broker holds the controller key, deletes that key in the same
    /// transaction.
    async fn revoke_once(&self, broker: BrokerId, epoch: Revision) -> Result<bool, MetaStoreError> {
        let key = self.keys.broker(broker);
        let mut transaction = Transaction::new().when(Compare::CreateRevision(key.clone(), epoch)).delete(key);
        let state = self.metadata.state();
        if let Some(revision) = state.controller_revision().filter(|_| state.controller() == Some(broker)) {
            let controller = self.keys.controller();
            transaction = transaction.when(Compare::ModRevision(controller.clone(), revision)).delete(controller);
        }
        drop(state);
        Ok(matches!(self.store.transact(transaction).await?, TxnOutcome::Committed { .. }))
    }
}

/// Returns the registration with this broker epoch; `None` if the snapshot does not contain it.
fn registered(state: &MetadataSnapshot, broker: BrokerId, epoch: Revision) -> Option<Arc<Versioned<BrokerValue>>> {
    state.brokers().get(&broker).filter(|entry| entry.create_revision == epoch).cloned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        broker::tests::TestBroker,
        client::TcpConnector,
        cluster::{Value as _, faulty},
        task::test_timeout::wait_for,
    };

    #[tokio::test(start_paused = true)]
    async fn cooldown_applies_to_one_incarnation_for_fixed_time() {
        let (mut cooldown, broker, now) = (RevokeCooldown::default(), BrokerId(2), clock::monotonic());
        assert!(cooldown.allows(broker, "a", now));
        let revoked = || RevokedRegistration {
            incarnation: "a".to_owned(),
            epoch: Revision(7),
            at: now,
            ignored_reports: LogThrottle::default(),
        };
        cooldown.0.insert(broker, revoked());
        cooldown.0.insert(BrokerId(3), revoked());
        assert!(cooldown.is_revoked(broker, Revision(7)), "a second report about the same registration");
        assert!(!cooldown.is_revoked(broker, Revision(9)), "the process has registered again");
        assert!(!cooldown.allows(broker, "a", now + REVOKE_COOLDOWN_INTERVAL - Duration::from_secs(1)));
        assert!(cooldown.allows(broker, "a", now + REVOKE_COOLDOWN_INTERVAL));
        assert!(cooldown.allows(broker, "b", now), "another process starts without a cooldown");
        let logged = [broker, broker, BrokerId(3)].map(|broker| cooldown.count_ignored(broker, now));
        assert_eq!(logged, [Some(1), None, Some(1)], "each broker has its own log throttle");
    }

    /// A deletion that fails is retried. Regression: a process exited while etcd had no leader.
    /// Its partitions had no leader until the lease of the process expired, although all peers had detected the exit.
    #[tokio::test]
    async fn failed_deletion_of_registration_is_retried() {
        let dir = tempfile::tempdir().unwrap();
        let bench = TestBroker::start(dir.path(), false).await;
        bench.broker.ctx.metadata.wait_until(|state| state.controller() == Some(BrokerId(1))).await;
        let key = bench.keys.broker(BrokerId(2));
        // No process listens at port 1.
        let gone = BrokerValue::running_at("127.0.0.1:1".to_owned());
        bench.store.transact(Transaction::new().put(key.clone(), gone.encode())).await.unwrap();
        let epoch = bench.store.get(&key).await.unwrap().entry.unwrap().create_revision;
        bench.broker.ctx.metadata.wait_for_revision(epoch).await;
        let wait = Duration::from_secs(1);
        let peers = PeerClient::new(Arc::new(TcpConnector::between_brokers(wait)), wait);
        let detector = Arc::new(FailureDetector::new(
            &bench.broker.ctx,
            Arc::clone(&bench.broker.partitions),
            peers,
            bench.tasks.clone(),
        ));
        bench.faulty_store.fail_transactions([Some(faulty::Fault::Refused); 4]);
        Arc::clone(&detector).link_lost(BrokerId(2), epoch, DisconnectReason::Refused);
        wait_for("the registration is deleted", async || {
            bench.store.get(&key).await.unwrap().entry.is_none().then_some(())
        })
        .await;
        // The same incarnation is registered again, so the first report was false, and further reports are ignored.
        bench.change(Transaction::new().put(key.clone(), gone.encode())).await;
        let epoch = bench.store.get(&key).await.unwrap().entry.unwrap().create_revision;
        let report = FailureReport { reporter: BrokerId(1), broker: BrokerId(2), epoch, observation: String::new() };
        assert_eq!(detector.confirm_failure(report).await, Ok(false));
        bench.stop().await;
    }
}
