//! Disk usage of this broker, and its publication to peers. A standalone broker publishes nothing; its state is only in
//! the metrics and in the health.
//!
//! # Overview
//!
//! Two states are published. Under disk pressure, above a threshold of disk usage, the broker gets no new replicas.
//! With a full disk, after a write found no space, in-sync brokers with space take over its leaderships, because its
//! partitions cannot be written.
//!
//! Both states are in the registration, which placement and elections read anyway. The registration is written only
//! when a state changes. Each state ends at a lower disk usage than it begins. So a disk at the threshold does not
//! cause a write at each check.

use std::{path::Path, sync::Arc, time::Duration};

use crate::{
    broker::{health::Health, node_context::NodeContext},
    cluster::Session,
    limits,
    log::{DataDir, DiskSpace},
    task,
};

/// Interval between checks whether a write found the disk full.
const CHECK_INTERVAL: Duration = Duration::from_millis(500);

/// Number of such checks after which the free space is queried. Every check queries the free space while
/// [`DataDir::is_full`] differs from the disk-full state of this broker.
const TICKS_PER_DISK_CHECK: u32 = 10;

/// Difference between the disk usage at which disk pressure begins and the usage at which it ends, in percent of the
/// disk.
const RELEASE_PERCENT: u64 = 5;

/// Returns true if disk usage is above `percent`, or above a lower limit if the disk already was under pressure. A disk
/// of unknown size (0 bytes) is not under pressure.
fn is_under_pressure(was_under_pressure: bool, space: DiskSpace, percent: u64) -> bool {
    let DiskSpace { free_bytes, total_bytes } = space;
    let used = u128::from(total_bytes.saturating_sub(free_bytes)) * 100;
    let limit = if was_under_pressure { percent.saturating_sub(RELEASE_PERCENT) } else { percent };
    used > u128::from(total_bytes) * u128::from(limit)
}

/// Free bytes with which a batch of the maximum size fits. With as many free bytes, an earlier refused write no longer
/// counts, also if no record has been written since.
const MIN_SPACE_BYTES: u64 = limits::MIN_FREE_DISK_BYTES + limits::MAX_BATCH_BYTES as u64;

/// Returns true if records do not fit on the disk. `has_refused` is true after an append, truncation or reset found the
/// disk full, until the next successful append.
const fn is_too_full(has_refused: bool, space: DiskSpace) -> bool {
    has_refused && space.free_bytes < MIN_SPACE_BYTES
}

/// Returns true if other brokers are to lead this broker's partitions. This state begins when records do not fit
/// ([`is_too_full`]), and ends when disk usage is not above `percent`, or 95 percent if that is less.
fn is_disk_full(was_full: bool, has_refused: bool, space: DiskSpace, percent: u64) -> bool {
    is_too_full(has_refused, space) || (was_full && is_under_pressure(false, space, percent.min(100 - RELEASE_PERCENT)))
}

/// Returns true if the disk of this log is under pressure, without a previous state. Called before this process
/// registers. Blocks on the file system.
pub fn starts_under_pressure(log: &DataDir, percent: u64) -> bool {
    log.space().is_ok_and(|space| is_under_pressure(false, space, percent))
}

/// Task that checks the disk of this broker.
pub(super) struct DiskPressure {
    ctx: NodeContext,
    health: Arc<Health>,
    session: Session,
}

impl DiskPressure {
    pub(super) fn new(ctx: NodeContext, health: Arc<Health>, session: Session) -> Self {
        Self { ctx, health, session }
    }

    /// Checks the disk at intervals, and updates the metric and the health. In a cluster, writes changed states to the
    /// registration, and retries a failed write at the next check. Never returns.
    pub(super) async fn run(self) {
        let percent = self.ctx.config.broker.disk_pressure_percent;
        let (mut under_pressure, mut full, mut published) = (self.session.is_under_disk_pressure(), false, true);
        for tick in 1u32.. {
            self.ctx.metrics.disk_pressure.set(u64::from(under_pressure || self.health.is_full()));
            tokio::time::sleep(CHECK_INTERVAL).await;
            let has_refused = self.ctx.log.is_full();
            let is_due = tick.is_multiple_of(TICKS_PER_DISK_CHECK) || has_refused != full;
            if is_due && let Some(space) = self.space().await {
                let now = is_under_pressure(under_pressure, space, percent);
                if std::mem::replace(&mut under_pressure, now) != now && !self.ctx.standalone {
                    published = false;
                    log_disk_pressure(now, space, percent, &self.ctx.config.broker.data_dir);
                }
                self.health.set_full(is_too_full(has_refused, space));
                let now = is_disk_full(full && !self.ctx.standalone, has_refused, space, percent);
                if std::mem::replace(&mut full, now) != now && !self.ctx.standalone {
                    published = false;
                    log_disk_full(now, space, &self.ctx.config.broker.data_dir);
                }
            }
            if !published && !self.ctx.standalone {
                match self.session.set_disk_pressure(under_pressure).await.and(self.session.set_disk_full(full).await) {
                    Ok(()) => published = true,
                    Err(error) => {
                        tracing::debug!(%error, "could not publish the disk state to the metadata store: retrying")
                    }
                }
            }
        }
    }

    /// Reads the disk space from the file system; `None` if that failed.
    async fn space(&self) -> Option<DiskSpace> {
        let log = self.ctx.log.clone();
        let space = task::run_blocking(move || log.space()).await;
        space.inspect_err(|error| tracing::debug!(%error, "could not read the disk space from the file system")).ok()
    }
}

/// Returns the disk usage in percent, rounded up; 0 for a disk of unknown size.
fn used_percent(space: DiskSpace) -> u64 {
    let used = u128::from(space.total_bytes.saturating_sub(space.free_bytes)) * 100;
    u64::try_from(used.div_ceil(u128::from(space.total_bytes.max(1)))).unwrap_or(100)
}

fn log_disk_pressure(under_pressure: bool, space: DiskSpace, threshold_percent: u64, path: &Path) {
    match under_pressure {
        true => tracing::warn!(
            path = %path.display(),
            used_percent = used_percent(space),
            threshold_percent,
            free_bytes = space.free_bytes,
            total_bytes = space.total_bytes,
            "disk usage is above broker.disk_pressure_percent, so this broker gets no new replicas until usage is five \
             percentage points below that setting: add space, or lower local.retention.* or retention.*"
        ),
        false => tracing::info!("the disk has space again: this broker may get new replicas"),
    }
}

fn log_disk_full(full: bool, space: DiskSpace, path: &Path) {
    match full {
        true => tracing::error!(
            path = %path.display(),
            free_bytes = space.free_bytes,
            total_bytes = space.total_bytes,
            "records do not fit on the disk, so in-sync replicas on other brokers lead this broker's partitions until \
             there is space: add space, or lower local.retention.* or retention.*"
        ),
        false => tracing::info!("records fit on the disk again: this broker may lead"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disk_pressure_ends_well_below_threshold() {
        let space = |used: u64| DiskSpace { free_bytes: 1000 - used, total_bytes: 1000 };
        let checks = [(850, false), (851, true), (850, true), (801, true), (800, false), (850, false), (1000, true)];
        let mut under_pressure = false;
        for (used, expected) in checks {
            under_pressure = is_under_pressure(under_pressure, space(used), 85);
            assert_eq!(under_pressure, expected, "{used} of 1000 bytes");
        }
        assert!(!is_under_pressure(false, space(1000), 100), "100 percent is never exceeded");
        let unknown = DiskSpace { free_bytes: 0, total_bytes: 0 };
        assert!(!is_under_pressure(false, unknown, 85), "the size of the disk is unknown");
        let huge = DiskSpace { free_bytes: 1, total_bytes: u64::MAX };
        assert!(is_under_pressure(false, huge, 99), "the product does not overflow");
    }

    #[test]
    fn disk_full_lasts_until_there_is_space_for_replicas() {
        let with_used = |used: u64| DiskSpace { free_bytes: 1000 - used, total_bytes: 1000 };
        assert!(!is_disk_full(false, false, with_used(999), 85), "no record was refused");
        assert!(is_disk_full(false, true, with_used(999), 85));
        assert!(is_disk_full(true, false, with_used(851), 85), "one written record does not end the state");
        assert!(!is_disk_full(true, false, with_used(850), 85));
        assert!(!is_disk_full(true, false, with_used(950), 100), "with a threshold of 100 percent");
        let space = DiskSpace { free_bytes: MIN_SPACE_BYTES, total_bytes: 4 * MIN_SPACE_BYTES };
        assert!(!is_disk_full(false, true, space, 85), "any record fits, though none has arrived");
        assert!(is_disk_full(false, true, DiskSpace { free_bytes: MIN_SPACE_BYTES - 1, ..space }, 85));
    }
}
