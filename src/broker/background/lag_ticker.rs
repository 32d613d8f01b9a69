//! One clock for all partitions that need ticks. A leader needs ticks while an ISR member is behind or a refused
//! proposal waits for metadata; an idle replica, while its metadata is late. A timer for each partition would wake the
//! tasks of all partitions again and again.

use std::time::Duration;

use crate::{broker::partitions::table::PartitionTable, task::clock};

/// Interval between ticks.
const TICK_INTERVAL: Duration = Duration::from_millis(250);

/// Sends clock ticks to the partitions that need ticks. Never returns.
pub(super) async fn run(partitions: &PartitionTable) {
    let began = clock::monotonic();
    loop {
        tokio::time::sleep(TICK_INTERVAL).await;
        let now_ms = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
        for partition in partitions.open() {
            if partition.wants_ticks() {
                partition.tick(now_ms);
            }
        }
    }
}
