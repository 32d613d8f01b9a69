//! Collects the garbage of crashes and deletions: objects and uploads in the object store, and keys in the metadata
//! store.
//!
//! One task collects all kinds of garbage, one kind after the other, at intervals. The failure of one kind is logged
//! and counted, and does not stop the run; the next run tries again. `tier` decides about objects and uploads, and
//! `cluster` about keys. Anything that may still be needed stays.

use std::{collections::BTreeSet, time::Duration};

use crate::{
    broker::node_context::{NodeContext, TierHandle},
    cluster::{MetaStoreError as MetaError, StaleKeySweeper, TierCommits, Topics},
    model::{PartitionId, TopicId},
    task::clock,
    telemetry::LogThrottle,
    tier::{self, PartitionLiveness, abort_abandoned_uploads, collect_garbage},
};

/// Maximum interval between two runs. The interval is `tier.garbage_grace`, if that is shorter, but at least a second.
const COLLECTION_INTERVAL: Duration = Duration::from_secs(3600);

/// Time for which a tombstone is kept after the last data of its topic was found to be deleted. A broker that was
/// offline for longer finds no tombstone, and keeps its files of the topic.
const TOMBSTONE_EXPIRY_DELAY: Duration = Duration::from_secs(30 * 24 * 3600);

/// Age at which an unfinished multipart upload counts as abandoned. It exceeds the duration of any segment upload.
const ABANDONED_UPLOAD_TIMEOUT: Duration = Duration::from_secs(24 * 3600);

/// Returns the interval between two runs, which depends on the grace period of orphan objects.
fn interval(grace: Duration) -> Duration {
    COLLECTION_INTERVAL.min(grace.max(Duration::from_secs(1)))
}

/// Returns the maximum time that an orphan object stays in the object store if no run fails. This is the grace period,
/// and one interval until the next run.
pub(in crate::broker) fn max_retention(grace: Duration) -> Duration {
    grace.saturating_add(interval(grace))
}

/// Garbage collection of one broker, with the state that is kept from run to run.
pub(super) struct GarbageRun {
    ctx: NodeContext,
    topics: Topics,
    commits: TierCommits,
    key_sweeper: StaleKeySweeper,
    /// Log throttle for failed listings of multipart uploads. A store or policy that forbids the listing rejects it in
    /// every run.
    failed_listings: LogThrottle,
}

impl GarbageRun {
    pub(super) fn new(ctx: NodeContext, topics: Topics, commits: TierCommits) -> Self {
        Self { ctx, topics, commits, key_sweeper: StaleKeySweeper::default(), failed_listings: LogThrottle::default() }
    }

    /// Collects garbage at intervals while this broker is the controller or standalone. Cancelling a run is safe: the
    /// next run collects the rest.
    pub(super) async fn run(mut self) {
        let interval = interval(self.ctx.config.tier.garbage_grace);
        loop {
            tokio::time::sleep(interval).await;
            if self.ctx.is_controller() {
                self.run_once().await;
                self.ctx.metrics.garbage_collections.inc();
            } else {
                // The controller collects the garbage of the whole cluster. This broker drops the state of its last
                // term, so that a later term starts without that state. A term that was lost and regained between two
                // runs keeps its state, which is harmless.
                (self.key_sweeper, self.failed_listings) = Default::default();
                self.ctx.metrics.tier_garbage_bytes.set(0);
            }
        }
    }

    /// Collects all kinds of garbage once. Without an object store, only stale keys are collected. If the clock of the
    /// object store cannot be read, objects and uploads are skipped.
    async fn run_once(&mut self) {
        if let Err(error) = self.key_sweeper.run(&self.topics).await {
            self.log_failure(&error, "could not delete the stale keys of unfinished topic changes");
        }
        let Some(tier) = self.ctx.tier.clone() else { return };
        match tier.store.clock_ms().await {
            Ok(now_ms) => {
                self.delete_orphans(&tier, now_ms).await;
                self.abort_uploads(&tier, now_ms).await;
            }
            Err(error) => self.log_failure(
                &error,
                "could not read the time of the object store, so this run deletes no orphan objects and no abandoned \
                 uploads",
            ),
        }
        if let Err(error) = self.expire_tombstones(&tier).await {
            self.log_failure(&error, "could not check whether data of deleted topics remains: tombstones are kept");
        }
    }

    /// Aborts multipart uploads older than [`ABANDONED_UPLOAD_TIMEOUT`], which a killed broker did not complete.
    async fn abort_uploads(&mut self, tier: &TierHandle, now_ms: i64) {
        // The future is boxed, because the futures of the S3 library are large.
        let aborted = Box::pin(abort_abandoned_uploads(&tier.store, ABANDONED_UPLOAD_TIMEOUT, now_ms)).await;
        match aborted {
            Ok(report) => {
                self.failed_listings.recover();
                self.ctx.metrics.garbage_collection_failures.inc_by(report.failed.len() as u64);
                for (object, reason) in &report.failed {
                    tracing::warn!(object, reason, "could not abort an abandoned upload: retrying in the next run");
                }
                if report.aborted > 0 {
                    tracing::info!(uploads = report.aborted, "aborted abandoned uploads of killed brokers");
                }
            }
            Err(error) => {
                self.ctx.metrics.garbage_collection_failures.inc();
                if let Some(failures) = self.failed_listings.occur(clock::monotonic()) {
                    tracing::warn!(%error, failures, "could not list abandoned uploads; retrying in the next run");
                }
            }
        }
    }

    /// Counts and logs a failure in a run. `problem` states what the run could not do.
    fn log_failure(&self, error: &dyn std::fmt::Display, problem: &str) {
        self.ctx.metrics.garbage_collection_failures.inc();
        let next_run = interval(self.ctx.config.tier.garbage_grace);
        tracing::warn!(%error, next_run_s = next_run.as_secs(), "{problem}; retrying in the next run");
    }

    /// Deletes orphan objects older than the grace period.
    async fn delete_orphans(&self, tier: &TierHandle, now_ms: i64) {
        let grace = self.ctx.config.tier.garbage_grace;
        match collect_garbage(&tier.store, |id| self.liveness(id), grace, now_ms).await {
            Ok(report) => {
                self.ctx.metrics.tier_objects_deleted.inc_by(report.deleted);
                self.ctx.metrics.tier_garbage_bytes.set(report.young_bytes);
                self.ctx.metrics.garbage_collection_failures.inc_by(report.skipped.len() as u64);
                for (partition, reason) in &report.skipped {
                    tracing::warn!(
                        %partition, reason,
                        "could not collect the garbage of a partition: retrying in the next run"
                    );
                }
                if report.deleted > 0 {
                    let (objects, bytes) = (report.deleted, report.deleted_bytes);
                    tracing::info!(objects, bytes, "deleted orphan objects from the object store");
                }
            }
            Err(error) => self.log_failure(&error, "could not collect garbage in the object store"),
        }
    }

    /// Deletes the tombstones of topics of which no data has remained for [`TOMBSTONE_EXPIRY_DELAY`]: no objects, no
    /// metadata keys, and no partitions on this broker. Stores in each other tombstone the time since which no data
    /// remains, or clears that time. Without an object store this function is not called, because a store that contains
    /// data may be configured again.
    async fn expire_tombstones(&self, tier: &TierHandle) -> Result<(), TombstoneError> {
        let tombstones = self.topics.tombstones().await?;
        if tombstones.is_empty() {
            return Ok(());
        }
        let deleted: BTreeSet<TopicId> = tombstones.iter().map(|tombstone| tombstone.id).collect();
        let mut with_data = tier.store.topics_with_objects(&deleted).await?;
        with_data.extend(self.ctx.log.partitions().iter().map(|id| id.topic));
        for tombstone in tombstones {
            let has_data = with_data.contains(&tombstone.id);
            if self.topics.expire(&tombstone, has_data, clock::wall_ms(), TOMBSTONE_EXPIRY_DELAY).await? {
                tracing::info!(topic = %tombstone.id, "deleted the tombstone of a topic without remaining data");
            }
        }
        Ok(())
    }

    /// Reads from the metadata store whether a partition is deleted, and its tier state if not. Called after the
    /// objects of the partition were listed, and before its orphan objects are deleted.
    async fn liveness(&self, id: PartitionId) -> PartitionLiveness {
        match (self.topics.was_deleted(id.topic).await, self.commits.current(id).await) {
            (Ok(true), _) => PartitionLiveness::Deleted,
            (Ok(false), Ok(Some(state))) => PartitionLiveness::Current(state),
            // The store did not respond, or has neither a tombstone of the topic nor a tier state of the partition.
            _ => PartitionLiveness::Unknown,
        }
    }
}

/// Error of processing tombstones.
#[derive(Debug, thiserror::Error)]
enum TombstoneError {
    #[error(transparent)]
    Meta(#[from] MetaError),
    #[error(transparent)]
    Objects(#[from] tier::TierStoreError),
}
