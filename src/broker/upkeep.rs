//! Gives partitions their turn at upkeep.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use super::Broker;
use crate::{
    cluster::TierCommitError,
    model::PartitionId,
    partition::{Partition, UpkeepError},
    task::clock,
};

/// How often old active segments are looked for, at most.
const SEAL_INTERVAL: Duration = Duration::from_millis(500);

/// The look at all partitions is made so much more rarely than it takes: thousands of idle ones must not cost a core's percent.
const LOOK_SHARE: u32 = 500;

/// Starts the workers and the clockwork.
pub(super) fn spawn(broker: &Arc<Broker>) {
    for _ in 0..broker.settings.upkeep_workers.max(1) {
        broker.tasks.spawn("upkeep", work(Arc::clone(broker)));
    }
    broker.tasks.spawn("upkeep clock", tick(Arc::clone(broker)));
}

async fn work(broker: Arc<Broker>) {
    let mut failures: BTreeMap<PartitionId, u32> = BTreeMap::new();
    loop {
        let id = tokio::select! {
            biased;
            () = broker.tasks.cancelled() => return,
            id = broker.upkeep_queue.next() => id,
        };
        let Some(partition) = broker.hosted.by_id(id) else {
            failures.remove(&id);
            broker.upkeep_queue.done(id, false);
            continue;
        };
        let outcome = tokio::select! {
            biased;
            // A step that is cut off here leaves at most an object that nobody names.
            () = broker.tasks.cancelled() => return,
            outcome = broker.upkeep.step(&partition) => outcome,
        };
        match outcome {
            Ok(step) => {
                if let Some(bytes) = step.uploaded {
                    broker.metrics.tier_uploads.inc();
                    broker.metrics.tier_upload_bytes.inc_by(bytes);
                }
                if failures.remove(&id).is_some() {
                    tracing::info!(partition = %id, topic = %partition.topic(), "upkeep works again");
                }
                broker.upkeep_queue.done(id, step.more);
            }
            Err(UpkeepError::Closed) => broker.upkeep_queue.done(id, false),
            Err(error) => {
                let count = failures.entry(id).or_default();
                report(&broker, &partition, &error, *count);
                *count = count.saturating_add(1);
                broker.upkeep_queue.failed(id, broker.upkeep.delay(*count));
            }
        }
    }
}

/// Says a failure once aloud, and then only softly until it is over: a bucket that is gone for an hour must not fill the log.
fn report(broker: &Broker, partition: &Partition, error: &UpkeepError, earlier: u32) {
    broker.metrics.tier_upload_failures.inc();
    let (id, topic) = (partition.id(), partition.topic());
    if let UpkeepError::Commit(TierCommitError::Deposed { .. }) = error {
        // What a change of leader interrupts, the new one does.
        tracing::debug!(partition = %id, %topic, %error, "another broker leads; its uploads go on there");
    } else if earlier == 0 {
        tracing::warn!(
            partition = %id, %topic, %error,
            "upkeep failed and is tried again until it works; segments stay on disk meanwhile"
        );
    } else {
        tracing::debug!(partition = %id, %topic, %error, tries = earlier + 1, "upkeep failed again");
    }
}

async fn tick(broker: Arc<Broker>) {
    let least = SEAL_INTERVAL.min(broker.settings.retention_interval);
    let mut pause = least;
    let mut retention_at = clock::monotonic();
    loop {
        tokio::select! {
            biased;
            () = broker.tasks.cancelled() => return,
            () = tokio::time::sleep(pause) => {}
        }
        let began = clock::monotonic();
        let retention = began >= retention_at;
        if retention {
            retention_at = began + broker.settings.retention_interval;
        }
        let now_ms = clock::wall_ms();
        for partition in broker.hosted.open() {
            if partition.seal_is_due(now_ms) || (retention && !partition.is_empty()) {
                broker.upkeep_queue.push(partition.id());
            }
        }
        pause = least.max(began.elapsed() * LOOK_SHARE);
    }
}
