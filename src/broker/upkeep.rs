//! Gives partitions their turn at upkeep.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::time::Instant;

use super::Broker;
use crate::{
    cluster::TierCommitError,
    model::{PartitionId, TopicName},
    partition::{Partition, UpkeepError},
    task::clock,
};

/// How often old active segments are looked for, at most.
const SEAL_INTERVAL: Duration = Duration::from_millis(500);

/// The look at all partitions is made so much more rarely than it takes: thousands of idle ones must not cost a core's percent.
const LOOK_SHARE: u32 = 500;

/// A failure that is over after so many tries is not worth telling of.
const TRIES: u32 = 3;

/// Starts the workers and the clockwork.
pub(super) fn spawn(broker: &Arc<Broker>) {
    for _ in 0..broker.settings.upkeep_workers.max(1) {
        broker.tasks.spawn("upkeep", work(Arc::clone(broker)));
    }
    broker.tasks.spawn("upkeep clock", tick(Arc::clone(broker)));
}

/// Partitions whose last steps failed. Shown, it is how many, and the one that has failed for longest; nothing while all is well.
#[derive(Default)]
pub(super) struct Failures {
    of: Mutex<BTreeMap<PartitionId, Failing>>,
}

#[derive(Clone)]
struct Failing {
    /// How many in a row.
    steps: u32,
    said: bool,
    since: Instant,
    name: TopicName,
    /// What is wrong with this partition; `None` where a store does not answer, of which the stores' clients speak.
    why: Option<String>,
}

impl Failures {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<PartitionId, Failing>> {
        self.of.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Display for Failures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let failing = self.lock();
        let told = || {
            let lasting = failing.iter().filter(|(_, failing)| failing.steps >= TRIES);
            lasting.filter_map(|(id, failing)| Some((id.number, failing, failing.why.as_ref()?)))
        };
        let Some((number, first, why)) = told().min_by_key(|(_, failing, _)| failing.since) else { return Ok(()) };
        let count = told().count();
        let (s, seconds) = (if count == 1 { "" } else { "s" }, first.since.elapsed().as_secs());
        write!(f, "{count} partition{s}, {}/{number} for {seconds} s: {why}", first.name)
    }
}

async fn work(broker: Arc<Broker>) {
    let failures = &broker.upkeep_failures;
    loop {
        let id = tokio::select! {
            biased;
            () = broker.tasks.cancelled() => return,
            id = broker.upkeep_queue.next() => id,
        };
        let Some(partition) = broker.hosted.by_id(id) else {
            failures.lock().remove(&id);
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
                broker.metrics.tier_uploads.inc_by(step.uploaded.segments);
                broker.metrics.tier_upload_bytes.inc_by(step.uploaded.bytes);
                if failures.lock().remove(&id).is_some_and(|failing| failing.said) {
                    tracing::info!(partition = %id, topic = %partition.topic(), "upkeep works again");
                }
                broker.upkeep_queue.done(id, step.more);
            }
            Err(UpkeepError::Closed) => {
                failures.lock().remove(&id);
                broker.upkeep_queue.done(id, false);
            }
            Err(error) => {
                let mut failing = failures.lock().get(&id).cloned().unwrap_or_else(|| Failing {
                    steps: 0,
                    said: false,
                    since: clock::monotonic(),
                    name: partition.topic().clone(),
                    why: None,
                });
                report(&broker, &partition, &error, &mut failing);
                failing.steps = failing.steps.saturating_add(1);
                failing.why = (!is_told_elsewhere(&broker, &error)).then(|| error.to_string());
                let tries = failing.steps;
                failures.lock().insert(id, failing);
                broker.upkeep_queue.failed(id, broker.upkeep.delay(tries));
            }
        }
    }
}

/// Whether it is an outage that has been spoken of, or nothing but another leader's turn.
fn is_told_elsewhere(broker: &Broker, error: &UpkeepError) -> bool {
    is_of_another_leader(error) || error.is_outage() && broker.is_cut_off()
}

/// What a change of leader interrupts, the new one does.
const fn is_of_another_leader(error: &UpkeepError) -> bool {
    matches!(error, UpkeepError::Commit(TierCommitError::Deposed { .. }))
}

/// Says a failure once aloud, and then only softly until it is over: a bucket that is gone for an hour must not fill the log. Of an outage
/// the stores' own clients speak, once for all partitions.
fn report(broker: &Broker, partition: &Partition, error: &UpkeepError, failing: &mut Failing) {
    broker.metrics.tier_upload_failures.inc();
    let (id, topic) = (partition.id(), partition.topic());
    let spoken_of = failing.said || is_told_elsewhere(broker, error);
    if is_of_another_leader(error) {
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
