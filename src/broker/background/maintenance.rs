//! Runs the maintenance of partitions, uploads included, and schedules it.
//!
//! Retention must continue while the object store accepts nothing. So the workers of the first queue write nothing to
//! the object store. They put a partition with a due upload, or with other work that they leave out, into a second
//! queue. The workers of the second queue may wait for the object store.

use std::{sync::Arc, time::Duration};

use super::lease_monitor::LeaseMonitor;
use crate::{
    broker::{
        node_context::NodeContext,
        partitions::{maintenance_failures::MaintenanceFailures, table::PartitionTable},
    },
    cluster::TierCommits,
    partition::{MaintenanceError, MaintenanceQueue, MaintenanceRunner},
    task::clock,
    tier::TierStore,
};

/// Minimum pause between two searches for partitions with due work, unless `tier.check_interval` is shorter.
const ROLL_CHECK_INTERVAL: Duration = Duration::from_millis(500);

/// Minimum pause after a search over all partitions, as a multiple of the duration of the search. Thousands of idle
/// partitions must not cost a percent of a core.
const MIN_PAUSE_PER_CHECK: u32 = 500;

/// Queue that a worker serves, and the work on its partitions.
#[derive(Clone, Copy, Debug)]
enum WorkerKind {
    /// Serves `queue`, and does the work that writes nothing to the object store.
    Maintenance,
    /// Serves `upload_queue`, and does all work, including uploads.
    Uploads,
}

/// Workers and scheduler of one broker.
pub(super) struct Maintenance {
    ctx: NodeContext,
    partitions: Arc<PartitionTable>,
    failures: Arc<MaintenanceFailures>,
    lease: Arc<LeaseMonitor>,
    runner: MaintenanceRunner,
    queue: MaintenanceQueue,
    /// Partitions with a due upload, or with other work that the workers of `queue` leave out.
    upload_queue: MaintenanceQueue,
}

impl Maintenance {
    pub(super) fn new(
        ctx: NodeContext,
        partitions: Arc<PartitionTable>,
        failures: Arc<MaintenanceFailures>,
        commits: TierCommits,
        queue: MaintenanceQueue,
        lease: Arc<LeaseMonitor>,
    ) -> Self {
        let runner = MaintenanceRunner::new(commits);
        Self { ctx, partitions, failures, lease, runner, queue, upload_queue: MaintenanceQueue::default() }
    }

    /// Starts the scheduler and, for each kind of work, `tier.upload_concurrency` workers (at least one). With an
    /// object store, also starts the task that resumes the work after an outage of the store.
    pub(super) fn spawn(self: &Arc<Self>) {
        let tasks = &self.ctx.tasks;
        for _ in 0..self.ctx.config.tier.upload_concurrency.max(1) {
            for (name, kind) in [("maintenance", WorkerKind::Maintenance), ("uploads", WorkerKind::Uploads)] {
                let this = Arc::clone(self);
                tasks.spawn_until_cancelled(name, async move { this.work(kind).await });
            }
        }
        let this = Arc::clone(self);
        tasks.spawn_until_cancelled("maintenance-clock", async move { this.schedule().await });
        if let Some(tier) = &self.ctx.tier {
            let (this, store) = (Arc::clone(self), tier.store.clone());
            tasks.spawn_until_cancelled("maintenance-outages", async move { this.resume_after_outages(&store).await });
        }
    }

    /// Runs the steps of queued partitions, one after the other, and reports the results to `failures`. Never returns.
    /// A step that is cancelled leaves at most orphan objects and an unfinished multipart upload. Garbage collection
    /// deletes both.
    async fn work(&self, kind: WorkerKind) {
        let failures = &self.failures;
        let queue = match kind {
            WorkerKind::Maintenance => &self.queue,
            WorkerKind::Uploads => &self.upload_queue,
        };
        loop {
            let id = queue.next().await;
            let Some(partition) = self.partitions.by_id(id) else {
                failures.remove(id);
                queue.done(id, false);
                continue;
            };
            let step = async {
                match kind {
                    WorkerKind::Maintenance => self.runner.step_without_uploads(&partition).await,
                    WorkerKind::Uploads => self.runner.step(&partition).await,
                }
            };
            match Box::pin(step).await {
                Ok(step) => {
                    self.ctx.metrics.tier_uploads.inc_by(step.uploaded.segments);
                    self.ctx.metrics.tier_upload_bytes.inc_by(step.uploaded.bytes);
                    if step.uploaded.segments > 0 {
                        failures.on_upload(Ok(()));
                    }
                    if !step.is_partial {
                        failures.on_success(&partition);
                    }
                    if step.is_upload_due {
                        self.upload_queue.push(id);
                    }
                    queue.done(id, step.more);
                }
                Err(MaintenanceError::Closed) => {
                    failures.remove(id);
                    queue.done(id, false);
                }
                Err(error) => {
                    self.ctx.metrics.maintenance_failures.inc();
                    let failed_steps = failures.on_failure(&partition, &error, self.has_outage());
                    queue.failed(id, self.runner.delay(failed_steps));
                }
            }
        }
    }

    /// Returns true during an outage of the object store or of the metadata store. Health and the clients of the stores
    /// report these outages.
    fn has_outage(&self) -> bool {
        let has_store_outage = self.ctx.tier.as_ref().is_some_and(|tier| tier.store.outage().is_some());
        has_store_outage || !self.lease.metadata_staleness().is_zero()
    }

    /// Retries failed steps as soon as an outage of the object store is over. Never returns.
    async fn resume_after_outages(&self, store: &TierStore) {
        loop {
            store.wait_until_unavailable().await;
            store.wait_until_available().await;
            self.queue.retry_now();
            self.upload_queue.retry_now();
        }
    }

    /// Queues each partition whose active segment must be rolled by age. Every `tier.check_interval`, also queues all
    /// partitions that may need retention. Never returns.
    async fn schedule(&self) {
        let interval = self.ctx.config.tier.check_interval;
        let min_pause = ROLL_CHECK_INTERVAL.min(interval);
        let mut pause = min_pause;
        let mut retention_at = clock::monotonic();
        loop {
            tokio::time::sleep(pause).await;
            let now = clock::monotonic();
            let is_retention_due = now >= retention_at;
            if is_retention_due {
                retention_at = now + interval;
            }
            for partition in self.partitions.open() {
                if partition.roll_is_due(now) || (is_retention_due && partition.may_need_retention()) {
                    self.queue.push(partition.id());
                }
            }
            pause = min_pause.max(now.elapsed() * MIN_PAUSE_PER_CHECK);
        }
    }
}
