//! Gives partitions their turn at upkeep.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

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
    let failing: Arc<Mutex<BTreeMap<PartitionId, Failing>>> = Arc::default();
    for _ in 0..broker.settings.upkeep_workers.max(1) {
        broker.tasks.spawn("upkeep", work(Arc::clone(broker), Arc::clone(&failing)));
    }
    broker.tasks.spawn("upkeep clock", tick(Arc::clone(broker)));
}

/// A partition whose last steps failed.
#[derive(Clone, Copy, Default)]
struct Failing {
    /// How many in a row.
    steps: u32,
    said: bool,
}

async fn work(broker: Arc<Broker>, failing: Arc<Mutex<BTreeMap<PartitionId, Failing>>>) {
    let failing = || failing.lock().unwrap_or_else(PoisonError::into_inner);
    loop {
        let id = tokio::select! {
            biased;
            () = broker.tasks.cancelled() => return,
            id = broker.upkeep_queue.next() => id,
        };
        let Some(partition) = broker.hosted.by_id(id) else {
            failing().remove(&id);
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
                if failing().remove(&id).is_some_and(|failing| failing.said) {
                    tracing::info!(partition = %id, topic = %partition.topic(), "upkeep works again");
                }
                broker.upkeep_queue.done(id, step.more);
            }
            Err(UpkeepError::Closed) => broker.upkeep_queue.done(id, false),
            Err(error) => {
                let mut earlier = failing().get(&id).copied().unwrap_or_default();
                report(&broker, &partition, &error, &mut earlier);
                earlier.steps = earlier.steps.saturating_add(1);
                failing().insert(id, earlier);
                broker.upkeep_queue.failed(id, broker.upkeep.delay(earlier.steps));
            }
        }
    }
}

/// Says a failure once aloud, and then only softly until it is over: a bucket that is gone for an hour must not fill the log. Of an outage
/// the stores' own clients speak, once for all partitions.
fn report(broker: &Broker, partition: &Partition, error: &UpkeepError, failing: &mut Failing) {
    broker.metrics.tier_upload_failures.inc();
    let (id, topic) = (partition.id(), partition.topic());
    let spoken_of = failing.said || error.is_outage() && broker.is_cut_off();
    if let UpkeepError::Commit(TierCommitError::Deposed { .. }) = error {
        // What a change of leader interrupts, the new one does.
        tracing::debug!(partition = %id, %topic, %error, "another broker leads; its uploads go on there");
    } else if !spoken_of {
        failing.said = true;
        tracing::warn!(
            partition = %id, %topic, %error,
            "upkeep failed and is tried again until it works; segments stay on disk meanwhile"
        );
    } else {
        tracing::debug!(partition = %id, %topic, %error, tries = failing.steps + 1, "upkeep failed again");
    }
}

impl Broker {
    /// Whether an outage of the object store or of the metadata store has been spoken of and is not over.
    fn is_cut_off(&self) -> bool {
        let unserved = self.tier.as_ref().is_some_and(|tier| tier.store.outage().is_some());
        unserved || !self.metadata_silence().is_zero()
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
            if partition.seal_is_due(now_ms) || (retention && partition.holds_any()) {
                broker.upkeep_queue.push(partition.id());
            }
        }
        pause = least.max(began.elapsed() * LOOK_SHARE);
    }
}
