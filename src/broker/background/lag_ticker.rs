//! One clock for all partitions that need ticks, because an in-sync replica is behind or the leader waits for metadata.
//! A timer per partition would wake as many tasks continually.

use std::time::Duration;

use crate::{broker::partitions::table::PartitionTable, task::clock};

/// Interval between ticks.
const TICK_INTERVAL: Duration = Duration::from_millis(250);

/// Sends clock ticks to the partitions that need ticks.
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
