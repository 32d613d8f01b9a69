//! Schedules partitions for maintenance and for uploads.
//!
//! Retention must continue while the object store accepts nothing, so maintenance has its own workers. These workers
//! put partitions with uploads into a second queue, whose workers may wait for the object store.

use std::{collections::BTreeMap, fmt, sync::Arc, time::Duration};

use parking_lot::Mutex;
use tokio::{sync::Notify, time::Instant};

use super::Broker;
use crate::{
    cluster::{MetaStoreError, TierCommitError},
    model::{PartitionId, TopicName},
    partition::{MaintenanceError, Partition},
    task::clock,
    telemetry::LogThrottle,
    tier::{self, TierStore, UploadError},
};

/// Minimum interval between two searches for old active segments.
const ROLL_CHECK_INTERVAL: Duration = Duration::from_millis(500);

/// Minimum ratio of the pause to the duration of a search over all partitions. Thousands of idle partitions must not
/// cost a percent of a core.
const MIN_PAUSE_PER_CHECK: u32 = 500;

/// Number of consecutive failures from which a partition is reported.
const FAILURES_BEFORE_REPORT: u32 = 3;

/// Time without a successful upload after which the status shows that, for failures of any partition.
const UPLOADS_IMPAIRED_AFTER: Duration = Duration::from_secs(30);

/// Starts the workers and the scheduler.
pub(super) fn spawn(broker: &Arc<Broker>) {
    for _ in 0..broker.ctx.config.tier.upload_concurrency.max(1) {
        broker.ctx.tasks.spawn("maintenance", work(Arc::clone(broker), WorkerKind::Maintenance));
        broker.ctx.tasks.spawn("uploads", work(Arc::clone(broker), WorkerKind::Uploads));
    }
    broker.ctx.tasks.spawn("maintenance-clock", tick(Arc::clone(broker)));
    if let Some(tier) = &broker.ctx.tier {
        broker.ctx.tasks.spawn("maintenance-outages", resume_after_outages(Arc::clone(broker), tier.store.clone()));
    }
}

/// Partitions whose last maintenance steps failed. `Display` writes their number and the partition that has failed for
/// longest, or nothing if there are none.
#[derive(Default)]
pub(super) struct MaintenanceFailures {
    partitions: Mutex<BTreeMap<PartitionId, FailingPartition>>,
    /// Notified when a step fails for a reason of its partition.
    failed: Notify,
    /// Log throttle, shared by all partitions, for commits that the metadata store rejects.
    commits: Mutex<LogThrottle>,
    /// Time since which the object store has accepted no upload of any partition, and the error; `None` after a
    /// successful upload.
    uploads: Mutex<Option<(Instant, String)>>,
}

#[derive(Clone)]
struct FailingPartition {
    /// Number of consecutive failures; 0 after a successful step.
    steps: u32,
    log: LogThrottle,
    since: Instant,
    name: TopicName,
    /// Error of this partition; `None` for a failure that is reported elsewhere, such as an outage of a store.
    reason: Option<String>,
}

impl MaintenanceFailures {
    /// Returns why the last step of this partition failed.
    fn reason(&self, id: PartitionId) -> Option<String> {
        self.partitions.lock().get(&id)?.reason.clone()
    }

    /// Returns why this partition has not been uploaded: its last step failed, or the partition waits behind failing
    /// uploads of other partitions.
    pub(super) fn why_not_uploaded(&self, id: PartitionId) -> Option<String> {
        self.reason(id).or_else(|| Some(format!("uploads fail: {}", self.failing_uploads(&self.partitions.lock())?.1)))
    }

    /// Waits until there is a reason why this partition has not been uploaded, and returns the reason.
    pub(super) async fn until_not_uploaded(&self, id: PartitionId) -> String {
        loop {
            let failed = self.failed.notified();
            if let Some(reason) = self.why_not_uploaded(id) {
                return reason;
            }
            failed.await;
        }
    }

    /// Records the result of an upload. The failure of one partition for its own reason does not concern other
    /// partitions.
    fn record_upload(&self, outcome: Result<(), &MaintenanceError>) {
        match outcome {
            Ok(()) => *self.uploads.lock() = None,
            Err(error @ MaintenanceError::Upload(UploadError::Store(tier::TierStoreError::Unavailable { .. }))) => {
                let earlier = self.failing_uploads(&self.partitions.lock());
                let since = earlier.map_or_else(clock::monotonic, |(since, _)| since);
                *self.uploads.lock() = Some((since, error.to_string()));
            }
            Err(_) => {}
        }
    }

    /// Returns the time since which no upload has succeeded, and the error. Returns `None` if no partition fails any
    /// longer: the failing one was deleted, or another broker leads it.
    fn failing_uploads(&self, partitions: &BTreeMap<PartitionId, FailingPartition>) -> Option<(Instant, String)> {
        self.uploads.lock().clone().filter(|_| partitions.values().any(|failing| failing.steps > 0))
    }
}

impl MaintenanceFailures {
    /// Records a successful step of this partition. The failures of a partition are kept for a while, so that
    /// alternating failures and successes do not fill the log.
    fn recover(&self, partition: &Partition) {
        let mut all = self.partitions.lock();
        let Some(failing) = all.get_mut(&partition.id()) else { return };
        (failing.steps, failing.reason) = (0, None);
        if let Some(failures) = failing.log.recover() {
            tracing::info!(
                partition = %partition.id(), topic = %partition.topic(), failures,
                "maintenance succeeds again"
            );
        }
        if failing.log.is_quiet(clock::monotonic()) {
            all.remove(&partition.id());
        }
    }
}

impl fmt::Display for MaintenanceFailures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let failing = self.partitions.lock();
        let reported = || {
            let lasting = failing.iter().filter(|(_, failing)| failing.steps >= FAILURES_BEFORE_REPORT);
            lasting.filter_map(|(id, failing)| Some((id.number, failing, failing.reason.as_ref()?)))
        };
        let Some((number, first, reason)) = reported().min_by_key(|(_, failing, _)| failing.since) else {
            // With many partitions, it takes long until one of them has failed that often.
            return match self.failing_uploads(&failing) {
                Some((since, reason)) if since.elapsed() >= UPLOADS_IMPAIRED_AFTER => {
                    write!(f, "no upload has succeeded for {} s: {reason}", since.elapsed().as_secs())
                }
                _ => Ok(()),
            };
        };
        let count = reported().count();
        let (s, seconds) = (if count == 1 { "" } else { "s" }, first.since.elapsed().as_secs());
        write!(f, "{count} partition{s}, {}/{number} for {seconds} s: {reason}", first.name)
    }
}

/// Queue that a worker serves, and the work on its partitions.
#[derive(Clone, Copy, Debug)]
enum WorkerKind {
    /// Everything except uploads.
    Maintenance,
    /// Everything, including uploads.
    Uploads,
}

async fn work(broker: Arc<Broker>, kind: WorkerKind) {
    let failures = &broker.maintenance_failures;
    let queue = match kind {
        WorkerKind::Maintenance => &broker.maintenance_queue,
        WorkerKind::Uploads => &broker.upload_queue,
    };
    loop {
        let Some(id) = broker.ctx.tasks.run_until_cancelled(queue.next()).await else {
            return;
        };
        let Some(partition) = broker.partitions.by_id(id) else {
            failures.partitions.lock().remove(&id);
            queue.done(id, false);
            continue;
        };
        let step = async {
            match kind {
                WorkerKind::Maintenance => broker.maintenance.step_without_uploads(&partition).await,
                WorkerKind::Uploads => broker.maintenance.step(&partition).await,
            }
        };
        // A step that is cancelled here leaves at most an orphan object.
        let Some(outcome) = broker.ctx.tasks.run_until_cancelled(Box::pin(step)).await else {
            return;
        };
        match outcome {
            Ok(step) => {
                broker.ctx.metrics.tier_uploads.inc_by(step.uploaded.segments);
                broker.ctx.metrics.tier_upload_bytes.inc_by(step.uploaded.bytes);
                if step.uploaded.segments > 0 {
                    failures.record_upload(Ok(()));
                }
                if !step.is_partial {
                    failures.recover(&partition);
                }
                if step.is_upload_due {
                    broker.upload_queue.push(id);
                }
                queue.done(id, step.more);
            }
            Err(MaintenanceError::Closed) => {
                failures.partitions.lock().remove(&id);
                queue.done(id, false);
            }
            Err(error) => {
                let mut failing = failures.partitions.lock().get(&id).cloned().unwrap_or_else(|| FailingPartition {
                    steps: 0,
                    log: LogThrottle::default(),
                    since: clock::monotonic(),
                    name: partition.topic().clone(),
                    reason: None,
                });
                if failing.steps == 0 {
                    failing.since = clock::monotonic();
                }
                if !is_reported_elsewhere(&broker, &error) {
                    failures.record_upload(Err(&error));
                }
                report(&broker, &partition, &error, &mut failing);
                failing.steps = failing.steps.saturating_add(1);
                failing.reason = (!is_reported_elsewhere(&broker, &error)).then(|| error.to_string());
                let tries = failing.steps;
                let has_reason = failing.reason.is_some();
                failures.partitions.lock().insert(id, failing);
                if has_reason {
                    failures.failed.notify_waiters();
                }
                queue.failed(id, broker.maintenance.delay(tries));
            }
        }
    }
}

/// Returns true if the error is reported elsewhere, or if it only means that another broker leads.
fn is_reported_elsewhere(broker: &Broker, error: &MaintenanceError) -> bool {
    is_of_another_leader(error) || refuses_commits(error) || error.is_outage() && broker.is_cut_off()
}

/// Returns true if a change of leader interrupted the step. The new leader continues the maintenance.
const fn is_of_another_leader(error: &MaintenanceError) -> bool {
    matches!(error, MaintenanceError::Commit(TierCommitError::Deposed { .. }))
}

/// Logs a failure once, then reminders with a count: an outage of an hour must not fill the log. An outage is logged
/// once for all partitions, by the clients of the stores, or here if the metadata store responds but rejects commits.
fn report(broker: &Broker, partition: &Partition, error: &MaintenanceError, failing: &mut FailingPartition) {
    broker.ctx.metrics.tier_upload_failures.inc();
    let (id, topic, now) = (partition.id(), partition.topic(), clock::monotonic());
    if is_of_another_leader(error) {
        tracing::debug!(
            partition = %id, %topic, %error,
            "another broker leads the partition and continues its uploads"
        );
    } else if refuses_commits(error) {
        let commits = &broker.maintenance_failures.commits;
        if let Some(failures) = commits.lock().occur(now) {
            tracing::warn!(
                %error, failures,
                "the metadata store rejects the tier commits of all partitions: segments stay on disk, and maintenance \
                 is retried"
            );
        }
    } else if !is_reported_elsewhere(broker, error)
        && let Some(failures) = failing.log.occur(now)
    {
        tracing::warn!(
            partition = %id, %topic, %error, failures,
            "maintenance of the partition failed: segments stay on disk, and maintenance is retried"
        );
    } else {
        tracing::debug!(
            partition = %id, %topic, %error, tries = failing.steps + 1,
            "maintenance of the partition failed again"
        );
    }
}

/// Returns true if the metadata store responds but rejects the commits of all partitions.
const fn refuses_commits(error: &MaintenanceError) -> bool {
    let MaintenanceError::Commit(TierCommitError::Store(error)) = error else { return false };
    matches!(error, MetaStoreError::NoSpace { .. } | MetaStoreError::Regressed(_))
}

impl Broker {
    /// Returns true during a reported outage of the object store or of the metadata store.
    fn is_cut_off(&self) -> bool {
        let has_store_outage = self.ctx.tier.as_ref().is_some_and(|tier| tier.store.outage().is_some());
        has_store_outage || !self.metadata_staleness().is_zero()
    }
}

/// Retries failed steps as soon as an outage of the object store is over.
async fn resume_after_outages(broker: Arc<Broker>, store: TierStore) {
    loop {
        if broker.ctx.tasks.run_until_cancelled(outage(&store)).await.is_none() {
            return;
        }
        broker.maintenance_queue.retry_now();
        broker.upload_queue.retry_now();
    }
}

/// Waits for the start and the end of one outage.
async fn outage(store: &TierStore) {
    store.until_away().await;
    store.until_back().await;
}

async fn tick(broker: Arc<Broker>) {
    let min_pause = ROLL_CHECK_INTERVAL.min(broker.ctx.config.tier.check_interval);
    let mut pause = min_pause;
    let mut retention_at = clock::monotonic();
    loop {
        if broker.ctx.tasks.sleep_until_cancelled(pause).await.is_none() {
            return;
        }
        let began = clock::monotonic();
        let retention = began >= retention_at;
        if retention {
            retention_at = began + broker.ctx.config.tier.check_interval;
        }
        for partition in broker.partitions.open() {
            if partition.roll_is_due(began) || (retention && partition.holds_any()) {
                broker.maintenance_queue.push(partition.id());
            }
        }
        pause = min_pause.max(began.elapsed() * MIN_PAUSE_PER_CHECK);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::TopicId;

    #[tokio::test(start_paused = true)]
    async fn upload_failures_are_reported_until_one_succeeds() {
        let (failures, id) = (MaintenanceFailures::default(), PartitionId::new(TopicId::from_bytes([1; 16]), 0));
        let failing = |steps| FailingPartition {
            steps,
            log: LogThrottle::default(),
            since: clock::monotonic(),
            name: TopicName::new("t").expect("the name is valid"),
            reason: None,
        };
        let store = tier::TierStoreError::Unavailable { object: "segment".to_owned(), reason: "quota".to_owned() };
        let error = MaintenanceError::Upload(store.into());
        let other = PartitionId::new(TopicId::from_bytes([1; 16]), 1);
        failures.partitions.lock().insert(id, failing(1));
        failures.record_upload(Err(&error));
        assert!(failures.why_not_uploaded(other).expect("the partition waits for the failing one").contains("quota"));
        assert_eq!(failures.to_string(), "", "a short failure is not shown");
        tokio::time::advance(UPLOADS_IMPAIRED_AFTER).await;
        failures.record_upload(Err(&error));
        assert!(failures.to_string().starts_with("no upload has succeeded for 30 s: "), "{failures}");
        // The topic was deleted.
        failures.partitions.lock().remove(&id);
        assert_eq!((failures.to_string().as_str(), failures.why_not_uploaded(other)), ("", None));

        failures.partitions.lock().insert(id, failing(1));
        failures.record_upload(Ok(()));
        assert_eq!(failures.why_not_uploaded(other), None);
    }
}
