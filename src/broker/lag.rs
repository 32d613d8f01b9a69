//! One clock for all partitions that have a member behind: a timer in each would wake as many tasks, all the time.

use std::{sync::Arc, time::Duration};

use super::Broker;
use crate::task::clock;

/// How often the partitions with a member behind are told the time.
const EVERY: Duration = Duration::from_millis(250);

/// Tells the time to the partitions that want it, until the broker stops.
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
