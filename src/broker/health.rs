//! Health of this broker, for probes and `cluster health`. A broker that serves requests is ready even if it is
//! impaired. An outage of a store affects all brokers, and must not take all of them out of service. A started broker
//! is not ready until every local replica has been in sync once, or `broker.catch_up_timeout` has passed. So a rolling
//! restart waits for that. Replicas of partitions without a leader are exempt after [`ELECTION_TIMEOUT`].

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, SystemTime},
};

use tokio::time::Instant;

use super::{
    node_context::NodeContext,
    partitions::{maintenance_failures::MaintenanceFailures, table::PartitionTable},
};
use crate::{
    cluster::MetadataSnapshot,
    model::PartitionId,
    partition::{Partition, ReplicaRole},
    proto::v1,
    task::{clock, lock::Mutex},
};

/// Minimum pause between two checks whether the start is over.
const CHECK_INTERVAL: Duration = Duration::from_millis(250);

/// Minimum pause after such a check, as a multiple of the duration of the check.
const MIN_PAUSE_PER_CHECK: u32 = 20;

/// Maximum time that a start waits for the election of a leader of one partition. By default, an election that waits
/// for the end of a lease takes 7 s.
const ELECTION_TIMEOUT: Duration = Duration::from_secs(8);

/// Readiness of a broker for requests.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Readiness {
    /// The broker is not ready, for this reason.
    NotReady(String),
    /// The broker is ready. Contains its impairments, one line each.
    Ready(Vec<String>),
}

/// Health of one broker.
pub(super) struct Health {
    ctx: NodeContext,
    partitions: Arc<PartitionTable>,
    failures: Arc<MaintenanceFailures>,
    phase: Mutex<Phase>,
    start: Mutex<StartState>,
    /// Time at which the registration was lost; `None` while this broker is registered.
    unregistered: Mutex<Option<Instant>>,
    /// Time since which records do not fit on the disk; `None` while they fit.
    full: Mutex<Option<Instant>>,
}

/// Phase of the process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Starting,
    Serving,
    /// A shutdown has begun. During a controlled shutdown, requests are still served.
    Stopping,
}

/// Progress of the start.
#[derive(Debug)]
enum StartState {
    /// Before the activation: the replicas are idle.
    Opening,
    /// From the activation on, while some replicas have not been in sync yet.
    CatchingUp {
        since: Instant,
        /// Replicas that have not been in sync yet; the outer `None` before the first check. The value is the time
        /// since which the partition has no leader, or `None` if it has one.
        pending: Option<BTreeMap<PartitionId, Option<Instant>>>,
    },
    Over,
}

impl Health {
    pub(super) fn new(ctx: NodeContext, partitions: Arc<PartitionTable>, failures: Arc<MaintenanceFailures>) -> Self {
        Self {
            ctx,
            partitions,
            failures,
            phase: Mutex::new(Phase::Starting),
            start: Mutex::new(StartState::Opening),
            unregistered: Mutex::default(),
            full: Mutex::default(),
        }
    }

    /// Starts the wait until every local replica has been in sync once. Called once, when the broker is activated.
    pub(super) fn begin_catching_up(&self) {
        *self.start.lock() = StartState::CatchingUp { since: clock::monotonic(), pending: None };
    }

    /// Enters the phase in which requests are served. Called at the end of the activation.
    pub(super) fn begin_serving(&self) {
        *self.phase.lock() = Phase::Serving;
    }

    /// Enters the last phase: the broker stops, and is not ready from now on.
    pub(super) fn begin_shutdown(&self) {
        *self.phase.lock() = Phase::Stopping;
    }

    /// Sets whether records do not fit on the disk.
    pub(super) fn set_full(&self, full: bool) {
        update_since(&self.full, full);
    }

    /// Returns true if records do not fit on the disk.
    pub(super) fn is_full(&self) -> bool {
        self.full.lock().is_some()
    }

    /// Sets whether the registration is lost: deleted, or its lease has expired.
    pub(super) fn set_unregistered(&self, unregistered: bool) {
        update_since(&self.unregistered, unregistered);
    }

    /// Returns an error if this process should be restarted, because its data directory accepts no writes.
    pub(super) fn health(&self) -> Result<(), String> {
        self.ctx.log.failure().map_or(Ok(()), |reason| Err(describe_failed_directory(&reason)))
    }

    /// Returns the readiness of the broker, with its impairments if it is ready. The broker is not ready while it
    /// starts or stops, or if the data directory has failed and no partition is open.
    pub(super) fn readiness(&self) -> Readiness {
        let not_ready = |reason: String| Readiness::NotReady(reason);
        let phase = *self.phase.lock();
        match phase {
            Phase::Starting => return not_ready("starting".to_owned()),
            Phase::Serving => {}
            Phase::Stopping => return not_ready("stopping".to_owned()),
        }
        if let (Err(reason), 0) = (self.health(), self.partitions.open().len()) {
            return not_ready(format!("no partition can be served: {reason}"));
        }
        match self.count_catching_up() {
            0 => Readiness::Ready(self.impairments()),
            pending => not_ready(format!(
                "starting: local replicas that have not been in sync yet: {pending}; ready in {} s at the latest \
                 (broker.catch_up_timeout)",
                self.remaining_start_time().as_millis().div_ceil(1000)
            )),
        }
    }

    /// Returns the impairments of this broker, one line each.
    fn impairments(&self) -> Vec<String> {
        let failed = self.partitions.open().iter().filter(|partition| partition.error().is_some()).count();
        let unverified = self.partitions.count_unverified();
        let maintenance = self.failures.to_string();
        let lines = [
            self.health().err(),
            (failed > 0).then(|| {
                format!(
                    "replicas that accept no writes after an error: {failed}; repair the disk and restart this broker"
                )
            }),
            (unverified > 0).then(|| {
                format!(
                    "replicas offline, because the metadata of their partitions was unreadable at the start: \
                     {unverified}; it is readable now: restart this broker"
                )
            }),
            self.full.lock().map(|at| {
                format!(
                    "disk full {}, appends are refused: add space, or lower local.retention.* or retention.*",
                    format_since(at.elapsed())
                )
            }),
            self.ctx.tier.as_ref().and_then(|tier| tier.store.outage()).map(|outage| {
                format!(
                    "object store unavailable {}: {}; until a retry succeeds, segments stay on disk, and reads from \
                     the object store fail",
                    format_since(outage.lasted),
                    one_line(&outage.reason)
                )
            }),
            self.unregistered.lock().map(|at| {
                let reason = registration_loss_reason(self.ctx.metadata.unresponsive_for());
                format!(
                    "registration lost {}: {reason}; other brokers may lead this broker's partitions, and this broker \
                     registers again by itself",
                    format_since(at.elapsed())
                )
            }),
            self.ctx.store.regression().map(|reason| one_line(&reason.to_string())),
            (!maintenance.is_empty())
                .then(|| format!("uploads or retention fail, and are retried: {}", one_line(&maintenance))),
        ];
        lines.into_iter().flatten().collect()
    }

    /// Checks at intervals whether the start is over, and returns when it is. Without this task, a start would end only
    /// at a request that checks the readiness.
    pub(super) async fn watch_start(&self) {
        loop {
            let check_start = clock::monotonic();
            if self.is_started() {
                return;
            }
            tokio::time::sleep(CHECK_INTERVAL.max(check_start.elapsed() * MIN_PAUSE_PER_CHECK)).await;
        }
    }

    /// Checks the replicas, which may end the start, and returns true if the start is over.
    pub(super) fn is_started(&self) -> bool {
        self.count_catching_up();
        matches!(*self.start.lock(), StartState::Over)
    }

    /// Returns the number of local replicas that have not been in sync yet, without those of partitions that have had
    /// no leader for [`ELECTION_TIMEOUT`]. Returns 0 before the activation and once the start is over. Ends the start
    /// if every replica has been in sync once or was closed, after `broker.catch_up_timeout`, and on a standalone
    /// broker.
    pub(super) fn count_catching_up(&self) -> usize {
        let mut start = self.start.lock();
        let StartState::CatchingUp { since, pending } = &mut *start else { return 0 };
        let needs_no_wait = self.ctx.standalone || since.elapsed() >= self.ctx.config.broker.catch_up_timeout;
        let all_open = || self.partitions.open().iter().map(|partition| (partition.id(), None)).collect();
        let pending = pending.get_or_insert_with(all_open);
        pending.retain(|id, _| self.partitions.by_id(*id).is_some_and(|partition| !is_in_sync(&partition)));
        if needs_no_wait || pending.is_empty() {
            *start = StartState::Over;
            return 0;
        }
        let (state, now) = (self.ctx.metadata.state(), clock::monotonic());
        // A replica whose partition stays leaderless does not count: there is no log that the replica could copy.
        let is_catching_up = |(id, leaderless_since): (&PartitionId, &mut Option<Instant>)| {
            *leaderless_since = if has_leader(&state, *id) { None } else { Some(leaderless_since.unwrap_or(now)) };
            leaderless_since.is_none_or(|since| now.saturating_duration_since(since) < ELECTION_TIMEOUT)
        };
        pending.iter_mut().map(is_catching_up).filter(|catching_up| *catching_up).count()
    }

    /// Returns the maximum time until the start is over; zero unless replicas are catching up.
    fn remaining_start_time(&self) -> Duration {
        match &*self.start.lock() {
            StartState::CatchingUp { since, .. } => {
                self.ctx.config.broker.catch_up_timeout.saturating_sub(since.elapsed())
            }
            StartState::Opening | StartState::Over => Duration::ZERO,
        }
    }

    /// Returns the stats of this broker, for descriptions of the cluster and for peers.
    pub(super) fn stats(&self) -> v1::GetBrokerStatsResponse {
        let (open, log) = (self.partitions.open(), self.ctx.log.status());
        let count = |number: usize| u32::try_from(number).unwrap_or(u32::MAX);
        let led = || open.iter().filter(|partition| partition.status().role.leads());
        let segment_bytes = open.iter().map(|partition| partition.local_bytes()).sum();
        let (impaired, not_ready) = match self.readiness() {
            Readiness::Ready(impaired) => (impaired, String::new()),
            Readiness::NotReady(reason) => (Vec::new(), reason),
        };
        let outage = self.ctx.tier.as_ref().and_then(|tier| tier.store.outage());
        let regression = self.ctx.store.regression();
        v1::GetBrokerStatsResponse {
            leader_count: count(led().count()),
            replica_count: count(open.len()),
            segment_bytes,
            free_bytes: log.free_bytes,
            disk_bytes: log.free_bytes.saturating_add(segment_bytes),
            tier_lag_records: led().map(|partition| self.ctx.tier_lag(partition)).sum(),
            failed: log.failed.unwrap_or_default(),
            object_store: outage.map_or_else(String::new, |outage| outage.to_string()),
            maintenance: self.failures.to_string(),
            impaired,
            not_ready,
            future_timestamps: future_timestamps(&open),
            metadata_regressed: regression.map_or_else(String::new, |regression| regression.to_string()),
        }
    }
}

/// Sets `since` to the current time when a condition begins, and to `None` when it ends. While the condition `holds`,
/// the time stays.
fn update_since(since: &Mutex<Option<Instant>>, holds: bool) {
    let mut since = since.lock();
    *since = holds.then(|| since.unwrap_or_else(clock::monotonic));
}

/// Returns the reason for a lost registration. `unresponsive_for` is the time for which the metadata store has not
/// responded; zero if it responds.
pub(super) fn registration_loss_reason(unresponsive_for: Duration) -> String {
    match unresponsive_for {
        Duration::ZERO => "the registration was deleted from the metadata store".to_owned(),
        time => format!("the metadata store has not responded for {} s", time.as_secs()),
    }
}

/// Returns true if the local replica leads, or follows as a member of the ISR.
fn is_in_sync(partition: &Partition) -> bool {
    matches!(partition.status().role, ReplicaRole::Leader { .. } | ReplicaRole::Follower { in_sync: true, .. })
}

fn has_leader(state: &MetadataSnapshot, id: PartitionId) -> bool {
    let stored = state.partition(id).and_then(|entry| entry.partition.as_ref());
    stored.is_some_and(|stored| stored.value.leader.is_some())
}

/// Describes a data directory that has failed for this reason.
fn describe_failed_directory(reason: &str) -> String {
    format!("the data directory accepts no writes: {}; repair the disk and restart this broker", one_line(reason))
}

/// Returns the text on one line, with single spaces.
fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Formats the time at which a condition began that has lasted for `lasted`, and `lasted` in seconds.
fn format_since(lasted: Duration) -> String {
    let now = Duration::from_millis(u64::try_from(clock::wall_ms()).unwrap_or(0));
    let at = SystemTime::UNIX_EPOCH + now.saturating_sub(lasted);
    format!("since {} ({} s)", humantime::format_rfc3339_seconds(at), lasted.as_secs())
}

/// Describes the segments with timestamps in the future: their number, the number of their partitions, and the
/// partition with most of these segments. Empty if there are none.
fn future_timestamps(open: &[Arc<Partition>]) -> String {
    let affected: Vec<_> = open.iter().filter(|partition| partition.future_segments() > 0).collect();
    let Some(largest) = affected.iter().max_by_key(|partition| partition.future_segments()) else {
        return String::new();
    };
    let segments: u64 = affected.iter().map(|partition| partition.future_segments()).sum();
    let plural = |count: u64| if count == 1 { "" } else { "s" };
    let (s, partitions) = (plural(segments), affected.len());
    format!(
        "{segments} segment{s} of {partitions} partition{}, most in {}/{}",
        plural(partitions as u64),
        largest.topic(),
        largest.id().number
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn condition_keeps_its_start_time() {
        let full = Mutex::default();
        update_since(&full, true);
        let began = *full.lock();
        tokio::time::advance(Duration::from_secs(5)).await;
        update_since(&full, true);
        assert_eq!(*full.lock(), began);
        update_since(&full, false);
        assert!(full.lock().is_none());
    }

    #[test]
    fn impairment_is_one_line() {
        assert_eq!(one_line("status 503:\n <Error>\r\n</Error>"), "status 503: <Error> </Error>");
        assert!(format_since(Duration::from_secs(75)).ends_with("Z (75 s)"));
    }
}
