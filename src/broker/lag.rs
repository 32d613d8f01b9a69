//! One clock for all partitions that need ticks, because an in-sync replica is behind or the leader waits for metadata. A timer per
//! partition would wake as many tasks continually.

use std::{sync::Arc, time::Duration};

use super::Broker;
use crate::task::clock;

/// Interval between ticks.
const EVERY: Duration = Duration::from_millis(250);

/// Sends clock ticks to the partitions that need ticks, until the broker stops.
pub(super) async fn run(broker: Arc<Broker>) {
    let began = clock::monotonic();
    loop {
        tokio::select! {
            biased;
            () = broker.tasks.cancelled() => return,
            () = tokio::time::sleep(EVERY) => {}
        }
        let now_ms = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
        for partition in broker.hosted.open() {
            if partition.is_behind() {
                partition.tick(now_ms);
            }
        }
    }
}
