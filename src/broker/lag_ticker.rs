//! One clock for all partitions that need ticks, because an in-sync replica is behind or the leader waits for metadata.
//! A timer per partition would wake as many tasks continually.

use std::{sync::Arc, time::Duration};

use super::Broker;
use crate::task::clock;

/// Interval between ticks.
const TICK_INTERVAL: Duration = Duration::from_millis(250);

/// Sends clock ticks to the partitions that need ticks, until the broker stops.
pub(super) async fn run(broker: Arc<Broker>) {
    let began = clock::monotonic();
    loop {
        if broker.ctx.tasks.sleep_until_cancelled(TICK_INTERVAL).await.is_none() {
            return;
        }
        let now_ms = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
        for partition in broker.partitions.open() {
            if partition.wants_ticks() {
                partition.tick(now_ms);
            }
        }
    }
}
