//! Failures of maintenance: why a partition is not uploaded, and throttled log lines about the failures.
//!
//! The maintenance workers report the result of each step. Health, appends with `acks=tiered` and the description of
//! the cluster read the failures.

use std::{collections::BTreeMap, fmt};

use tokio::{
    sync::Notify,
    time::{Duration, Instant},
};

use crate::{
    cluster::{MetaStoreError, TierCommitError},
    model::{PartitionId, TopicName},
    partition::{MaintenanceError, Partition},
    task::{clock, lock::Mutex},
    telemetry::LogThrottle,
    tier::{self, UploadError},
};

/// Number of consecutive failed steps of a partition from which the status reports the partition.
const FAILURES_BEFORE_REPORT: u32 = 3;

/// Time without a successful upload of any partition after which the status reports the failing uploads, even if no
/// partition has failed [`FAILURES_BEFORE_REPORT`] times.
const UPLOAD_REPORT_DELAY: Duration = Duration::from_secs(30);

/// Partitions whose last maintenance steps failed. `Display` writes the status: the number of reported partitions, and
/// the one that has failed for longest with its error. If no partition is reported, `Display` writes the error of the
/// uploads once they have failed for [`UPLOAD_REPORT_DELAY`], or nothing.
#[derive(Default)]
pub(in crate::broker) struct MaintenanceFailures {
    partitions: Mutex<BTreeMap<PartitionId, FailingPartition>>,
    /// Notified when a step of any partition fails, unless the failure is reported elsewhere.
    failed: Notify,
    /// Log throttle, shared by all partitions, for tier commits that the metadata store rejects.
    commits: Mutex<LogThrottle>,
    /// Time since which the object store has accepted no upload of any partition, and the error; `None` after a
    /// successful upload.
    uploads: Mutex<Option<(Instant, String)>>,
}

/// Failures of one partition.
struct FailingPartition {
    /// Number of consecutive failed steps; 0 after a successful step.
    steps: u32,
    log: LogThrottle,
    /// Time of the first of the consecutive failed steps.
    since: Instant,
    topic: TopicName,
    /// Error of the last step; `None` after a success, or for a failure that is reported elsewhere, such as an outage
    /// of a store.
    reason: Option<String>,
}

impl MaintenanceFailures {
    /// Removes the failures of a partition that is not open on this broker.
    pub(in crate::broker) fn remove(&self, id: PartitionId) {
        self.partitions.lock().remove(&id);
    }

    /// Returns why the last step of this partition failed; `None` if the step succeeded, or if the failure is reported
    /// elsewhere.
    fn reason(&self, id: PartitionId) -> Option<String> {
        self.partitions.lock().get(&id)?.reason.clone()
    }

    /// Returns why this partition has not been uploaded: its last step failed, or the object store accepts no uploads.
    /// Returns `None` if neither holds.
    pub(in crate::broker) fn why_not_uploaded(&self, id: PartitionId) -> Option<String> {
        self.reason(id).or_else(|| Some(format!("uploads fail: {}", self.failing_uploads(&self.partitions.lock())?.1)))
    }

    /// Waits until [`Self::why_not_uploaded`] has a reason for this partition, and returns the reason.
    pub(in crate::broker) async fn until_not_uploaded(&self, id: PartitionId) -> String {
        loop {
            let failed = self.failed.notified();
            if let Some(reason) = self.why_not_uploaded(id) {
                return reason;
            }
            failed.await;
        }
    }

    /// Handles the result of a step of any partition. A successful upload clears the error that all partitions share.
    /// Only an unavailable object store sets this error, because other errors concern one partition.
    pub(in crate::broker) fn on_upload(&self, outcome: Result<(), &MaintenanceError>) {
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

    /// Returns the time since which no upload has succeeded, and the last error. Returns `None` after a successful
    /// upload, and if no partition fails now: a deleted partition, or one that another broker leads, no longer counts.
    fn failing_uploads(&self, partitions: &BTreeMap<PartitionId, FailingPartition>) -> Option<(Instant, String)> {
        self.uploads.lock().clone().filter(|_| partitions.values().any(|failing| failing.steps > 0))
    }

    /// Counts and logs a failed step of a partition, and wakes [`Self::until_not_uploaded`] unless the failure is
    /// reported elsewhere. `has_outage` is true during an outage of the object store or the metadata store, which is
    /// reported elsewhere. Returns the number of consecutive failed steps.
    pub(in crate::broker) fn on_failure(
        &self,
        partition: &Partition,
        error: &MaintenanceError,
        has_outage: bool,
    ) -> u32 {
        let (id, now) = (partition.id(), clock::monotonic());
        let is_reported_elsewhere = is_deposed(error) || refuses_commits(error) || error.is_outage() && has_outage;
        if !is_reported_elsewhere {
            self.on_upload(Err(error));
        }
        let mut partitions = self.partitions.lock();
        let failing = partitions.entry(id).or_insert_with(|| FailingPartition {
            steps: 0,
            log: LogThrottle::default(),
            since: now,
            topic: partition.topic().clone(),
            reason: None,
        });
        if failing.steps == 0 {
            failing.since = now;
        }
        failing.steps = failing.steps.saturating_add(1);
        failing.reason = (!is_reported_elsewhere).then(|| error.to_string());
        let steps = failing.steps;
        let failures = if is_reported_elsewhere { None } else { failing.log.occur(now) };
        drop(partitions);
        self.log_failure(partition, error, failures, steps);
        if !is_reported_elsewhere {
            self.failed.notify_waiters();
        }
        steps
    }

    /// Logs a failed step. The line is a warning if `failures` is present: the number of failures since the last
    /// warning about the partition. Rejected tier commits cause throttled warnings that concern all partitions. Any
    /// other failure is a debug line: one between two warnings, a deposed leader, or an outage, which the store's
    /// client logs.
    fn log_failure(&self, partition: &Partition, error: &MaintenanceError, failures: Option<u64>, steps: u32) {
        let (id, topic) = (partition.id(), partition.topic());
        if is_deposed(error) {
            tracing::debug!(
                partition = %id, %topic, %error,
                "another broker leads the partition and continues its uploads"
            );
        } else if refuses_commits(error) {
            if let Some(failures) = self.commits.lock().occur(clock::monotonic()) {
                tracing::warn!(
                    %error, failures,
                    "the metadata store refuses the results of uploads: segments of all partitions stay on disk, and \
                     the broker retries"
                );
            }
        } else if let Some(failures) = failures {
            tracing::warn!(
                partition = %id, %topic, %error, failures,
                "uploads or retention of the partition failed: its segments stay on disk, and the broker retries"
            );
        } else {
            tracing::debug!(
                partition = %id, %topic, %error, tries = steps,
                "uploads or retention of the partition failed again"
            );
        }
    }

    /// Handles a successful step of this partition, and logs the first one after a warning. The entry stays until its
    /// log throttle is quiet, so that alternating failures and successes do not fill the log.
    pub(in crate::broker) fn on_success(&self, partition: &Partition) {
        let mut partitions = self.partitions.lock();
        let Some(failing) = partitions.get_mut(&partition.id()) else { return };
        (failing.steps, failing.reason) = (0, None);
        if let Some(failures) = failing.log.recover() {
            tracing::info!(
                partition = %partition.id(), topic = %partition.topic(), failures,
                "uploads and retention of the partition succeed again"
            );
        }
        if failing.log.is_quiet(clock::monotonic()) {
            partitions.remove(&partition.id());
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
        let Some((number, longest, reason)) = reported().min_by_key(|(_, failing, _)| failing.since) else {
            // With many partitions, it takes long until the first of them has failed `FAILURES_BEFORE_REPORT` times.
            return match self.failing_uploads(&failing) {
                Some((since, reason)) if since.elapsed() >= UPLOAD_REPORT_DELAY => {
                    write!(f, "no upload has succeeded for {} s: {reason}", since.elapsed().as_secs())
                }
                _ => Ok(()),
            };
        };
        let (topic, seconds) = (&longest.topic, longest.since.elapsed().as_secs());
        match reported().count() {
            1 => write!(f, "1 partition, {topic}/{number} for {seconds} s: {reason}"),
            count => write!(f, "{count} partitions (longest: {topic}/{number}, for {seconds} s): {reason}"),
        }
    }
}

/// Returns true if the partition's leader epoch in the metadata store is not the one of this step any longer. The
/// leader of the new epoch continues the maintenance.
const fn is_deposed(error: &MaintenanceError) -> bool {
    matches!(error, MaintenanceError::Commit(TierCommitError::Deposed { .. }))
}

/// Returns true if the metadata store responds and rejects tier commits of every partition: it has no space, or has
/// returned to an older state.
const fn refuses_commits(error: &MaintenanceError) -> bool {
    let MaintenanceError::Commit(TierCommitError::Store(error)) = error else { return false };
    matches!(error, MetaStoreError::NoSpace { .. } | MetaStoreError::Regressed(_))
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
            topic: TopicName::new("t").expect("the name is valid"),
            reason: None,
        };
        let store = tier::TierStoreError::Unavailable { object: "segment".to_owned(), reason: "quota".to_owned() };
        let error = MaintenanceError::Upload(store.into());
        let other = PartitionId::new(TopicId::from_bytes([1; 16]), 1);
        failures.partitions.lock().insert(id, failing(1));
        failures.on_upload(Err(&error));
        assert!(failures.why_not_uploaded(other).expect("the partition waits for the failing one").contains("quota"));
        assert_eq!(failures.to_string(), "", "a short failure is not shown");
        tokio::time::advance(UPLOAD_REPORT_DELAY).await;
        failures.on_upload(Err(&error));
        assert!(failures.to_string().starts_with("no upload has succeeded for 30 s: "), "{failures}");
        // The topic was deleted.
        failures.partitions.lock().remove(&id);
        assert_eq!((failures.to_string().as_str(), failures.why_not_uploaded(other)), ("", None));

        failures.partitions.lock().insert(id, failing(1));
        failures.on_upload(Ok(()));
        assert_eq!(failures.why_not_uploaded(other), None);
    }
}
