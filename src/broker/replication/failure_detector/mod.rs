//! Failure detection: confirms after a lost link that the process of the peer is gone, long before its lease expires.
//!
//! # Overview
//!
//! A broken link alone proves little. A refused connection proves that no process listens at the address: the host
//! responded, and the process is gone. So a lost link is followed by probes. An inconclusive probe is repeated: an
//! exiting process accepts connections until its last moment, its successor accepts them before it responds, and a busy
//! host responds late.
//!
//! If two probes in a row are refused or reach another process of that broker, two things happen:
//!
//! - Leaders on this broker remove the peer from the ISR at once (`DisconnectCause::ProcessGone`), so that `acks=all`
//!   does not wait for the lease.
//! - The controller receives a failure report. The controller probes the peer itself, for any reporter, deletes the
//!   registration with a compare on the broker epoch, and then elects other leaders. If the controller is the suspect,
//!   the other brokers delete its registration, in the order of their ids, each a little later than the one before.
//!
//! A timeout is no failure here: a host that disappeared or is unreachable keeps its lease until the lease expires.
//!
//! # Invariants
//!
//! - A false report costs time, never correctness: the broker registers again under a new broker epoch, and every
//!   partition update is a compare-and-set.
//! - A process that registers again after it was declared gone was running, so something between the brokers refuses
//!   connections. After a deletion, reports about the same incarnation are ignored for [`REVOKE_COOLDOWN`].

mod probe;
mod shared_checks;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use futures::{StreamExt as _, stream};
use parking_lot::Mutex;
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
    task::{Backoff, Tasks, clock},
    telemetry::LogThrottle,
};

/// First and longest pause before an inconclusive check is repeated. The pause doubles each time: the successor of an
/// exited process may not respond yet.
const MIN_CHECK_DELAY: Duration = Duration::from_millis(500);
const MAX_CHECK_DELAY: Duration = Duration::from_secs(2);

/// Maximum time for the partitions to process the failure. A partition that is too busy receives the end of the
/// registration instead.
const DISCONNECT_TIMEOUT: Duration = Duration::from_secs(1);

/// Timeout of a report, in which the controller probes the peer and deletes its registration.
const REPORT_TIMEOUT: Duration = Duration::from_secs(3);

/// Maximum number of report attempts, and the pause between them.
const MAX_REPORT_ATTEMPTS: u32 = 10;
const REPORT_RETRY_INTERVAL: Duration = Duration::from_millis(200);

/// Maximum number of brokers that are probed concurrently because of reports.
const MAX_CONCURRENT_REPORT_PROBES: usize = 4;

/// Maximum number of attempts to delete a registration. A second deletion has no effect.
const MAX_REVOKE_ATTEMPTS: u32 = 3;

/// Delay between two successive brokers that act when the controller itself is gone.
const FALLBACK_DELAY: Duration = Duration::from_millis(30);

/// Time after the deletion of a registration for which reports about the same incarnation are ignored.
const REVOKE_COOLDOWN: Duration = Duration::from_secs(60);

/// Registrations that this broker deleted, the last one of each broker id.
#[derive(Default)]
struct RevokeCooldown(BTreeMap<BrokerId, RevokedRegistration>);

/// A registration that this broker deleted.
struct RevokedRegistration {
    incarnation: String,
    epoch: Revision,
    /// Time of the deletion.
    at: Instant,
    /// Log throttle for reports about this broker that the cooldown ignores.
    ignored_reports: LogThrottle,
}

impl RevokeCooldown {
    /// Returns true if this registration was deleted. The metadata cache may contain it a moment longer.
    fn is_revoked(&self, broker: BrokerId, epoch: Revision) -> bool {
        self.0.get(&broker).is_some_and(|revoked| revoked.epoch == epoch)
    }

    /// Returns true if a registration of this incarnation may be deleted now.
    fn allows(&self, broker: BrokerId, incarnation: &str, now: Instant) -> bool {
        self.0.get(&broker).is_none_or(|revoked| {
            revoked.incarnation != incarnation || now.duration_since(revoked.at) >= REVOKE_COOLDOWN
        })
    }

    /// Counts an ignored report about a broker. Returns the number of ignored reports if the caller must log them.
    fn count_ignored(&mut self, broker: BrokerId, now: Instant) -> Option<u64> {
        self.0.get_mut(&broker)?.ignored_reports.occur(now)
    }
}

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
    /// Registrations whose processes are being probed after a lost link. A broker has several links, and all of them
    /// break at once.
    checks: Mutex<BTreeSet<(BrokerId, Revision)>>,
    cooldown: Mutex<RevokeCooldown>,
    /// Reports of other brokers that are being verified.
    reports: SharedChecks<(BrokerId, Revision), Result<bool, MetaStoreError>>,
    /// Log throttle for reports about brokers that respond.
    false_reports: Mutex<LogThrottle>,
}

impl LinkLossListener for FailureDetector {
    fn link_lost(self: Arc<Self>, broker: BrokerId, epoch: Revision, reason: DisconnectReason) {
        // A timeout proves nothing about the process.
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

    /// Probes the process of a lost link and handles its failure. Returns when the result is conclusive, or the
    /// registration is gone.
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
        tracing::info!(%broker, seen = result.describe(), "the process of a broker is gone");
        tokio::join!(self.remove_from_isrs(PeerId { broker, epoch }), self.report(broker, epoch, result));
    }

    /// Probes the process of a registration.
    async fn probe(&self, broker: BrokerId, registered: &BrokerValue) -> ProbeResult {
        let suspect = SuspectedPeer { cluster: &self.cluster, broker, registered };
        probe(&self.peers, suspect).await
    }

    /// Removes a broker from the ISR of all partitions led here. A partition that is blocked by its disk delays no
    /// other partition, and the call does not wait for it longer than a bounded time.
    async fn remove_from_isrs(&self, peer: PeerId) {
        let led = self.partitions.open().into_iter().filter(|partition| partition.status().role.leads());
        let notified = stream::iter(led).for_each_concurrent(None, |partition| async move {
            partition.on_follower_disconnected(peer, DisconnectCause::ProcessGone).await
        });
        if tokio::time::timeout(DISCONNECT_TIMEOUT, notified).await.is_err() {
            tracing::warn!(
                broker = %peer.broker,
                "some partitions did not process the end of a broker's process in time: their tasks are busy"
            );
        }
    }

    /// Reports a failed process until its registration is deleted, until the process responds, or for the maximum
    /// number of attempts. If the controller failed at the same time, another controller is elected soon.
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

    /// Reports a failed process once. Returns true if its registration was deleted.
    async fn report_once(&self, broker: BrokerId, epoch: Revision, result: ProbeResult) -> bool {
        let me = self.id;
        let state = self.metadata.state();
        let controller = state.controller().filter(|controller| *controller != broker);
        let registration = controller.and_then(|id| state.brokers().get(&id));
        let address = registration.map(|registration| registration.value.listeners.peer().map(str::to_owned));
        // Position of this broker among the remaining brokers.
        let rank = state.brokers().keys().filter(|id| **id != broker && **id < me).count();
        drop(state);
        let report = FailureReport { reporter: me, broker, epoch, observation: result.describe().to_owned() };
        match (controller, address) {
            // This broker is the controller and has already probed.
            (Some(controller), _) if controller == me => {
                self.delete_registration(report).await.is_ok_and(|revoked| revoked)
            }
            // Only the controller may delete the registration, and the controller is registered without a peer address.
            // The lease will expire.
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
                // Not revoked: the controller's probe was inconclusive, or another broker is the controller by now.
                response.is_ok_and(|response| response.revoked)
            }
            // The controller is the suspect, is not registered, or does not exist: the first of the remaining brokers
            // acts in its place.
            (None, _) | (Some(_), None) => {
                tokio::time::sleep(FALLBACK_DELAY * u32::try_from(rank).unwrap_or(u32::MAX)).await;
                let revoked = self.revoke(broker, epoch).await;
                if let Err(error) = &revoked {
                    tracing::debug!(%broker, %error, "could not delete the registration");
                }
                // The compare failed because another broker was faster, or because the controller changed. The metadata
                // cache will show which.
                revoked == Ok(true)
            }
        }
    }

    /// Verifies a report that arrived over the network, if this broker is the controller: this broker probes the
    /// suspect itself, for any reporter. Waiting reports about one registration share one probe, so reports about one
    /// live broker do not delay reports about other brokers. Returns true if the registration was deleted.
    ///
    /// # Errors
    /// The metadata store did not apply the deletion: the reporter must report again.
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
                    %broker, %reporter, seen = report.observation, reports,
                    "a broker was reported as gone, but it responds to the controller"
                );
            }
            Ok(false)
        };
        self.reports.run((broker, epoch), check).await
    }

    /// Deletes the registration of a process that this broker found gone, if this broker is the controller and the
    /// cooldown of the incarnation permits that. Returns true if the registration is deleted.
    async fn delete_registration(&self, report: FailureReport) -> Result<bool, MetaStoreError> {
        let FailureReport { reporter, broker, epoch, observation: seen } = report;
        if self.metadata.state().controller() != Some(self.id) {
            return Ok(false);
        }
        let Some(entry) = registered(&self.metadata.state(), broker, epoch) else { return Ok(false) };
        if self.cooldown.lock().is_revoked(broker, epoch) {
            return Ok(true);
        }
        let now = clock::monotonic();
        if !self.cooldown.lock().allows(broker, &entry.value.incarnation, now) {
            // The report is repeated while the registration exists.
            let reports = self.cooldown.lock().count_ignored(broker, now);
            if let Some(reports) = reports {
                tracing::info!(
                    %broker, %reporter, seen, reports,
                    "ignoring failure report: an earlier report about this broker was false"
                );
            }
            return Ok(false);
        }
        let revoked = self.revoke(broker, epoch).await.inspect_err(|error| {
            tracing::debug!(%broker, %error, "could not delete the registration yet");
        })?;
        if revoked {
            tracing::warn!(%broker, %reporter, seen, "the process of a broker is gone: its registration was deleted");
            let incarnation = entry.value.incarnation.clone();
            let (at, ignored_reports) = (clock::monotonic(), LogThrottle::default());
            let revoked = RevokedRegistration { incarnation, epoch, at, ignored_reports };
            self.cooldown.lock().0.insert(broker, revoked);
        }
        Ok(revoked)
    }

    /// Deletes a registration if it still has this broker epoch. Returns true if this call deleted the registration.
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

    /// Makes one attempt of [`Self::revoke`]. Also deletes the controller key, if the same broker holds it.
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

/// Returns the registration with this broker epoch, while the metadata cache contains it.
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
        assert!(!cooldown.allows(broker, "a", now + REVOKE_COOLDOWN - Duration::from_secs(1)));
        assert!(cooldown.allows(broker, "a", now + REVOKE_COOLDOWN));
        assert!(cooldown.allows(broker, "b", now), "another process starts without a cooldown");
        let logged = [broker, broker, BrokerId(3)].map(|broker| cooldown.count_ignored(broker, now));
        assert_eq!(logged, [Some(1), None, Some(1)], "each broker has its own log throttle");
    }

    /// Regression: a process exited while the store had no leader. The partitions waited until the lease of that
    /// process expired, although all peers had detected the exit.
    #[tokio::test]
    async fn failed_deletion_of_registration_is_retried() {
        let dir = tempfile::tempdir().unwrap();
        let bench = TestBroker::start(dir.path(), false).await;
        bench.broker.ctx.metadata.wait_until(|state| state.controller() == Some(BrokerId(1))).await;
        let key = bench.keys.broker(BrokerId(2));
        // No process listens at that port.
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
        // The same process is registered again, so the report was false, and further reports are ignored.
        bench.change(Transaction::new().put(key.clone(), gone.encode())).await;
        let epoch = bench.store.get(&key).await.unwrap().entry.unwrap().create_revision;
        let report = FailureReport { reporter: BrokerId(1), broker: BrokerId(2), epoch, observation: String::new() };
        assert_eq!(detector.confirm_failure(report).await, Ok(false));
        bench.stop().await;
    }
}
