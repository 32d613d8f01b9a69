//! Collects the garbage of crashes and deletions: objects and uploads in the object store, and keys in the metadata store.
//!
//! One task processes each kind on its own, at intervals. A failure is logged, counted, and retried in the next run. `tier` decides about
//! objects and uploads, and `cluster` about keys. Anything that may still be needed stays.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use super::{Broker, Tier};
use crate::{
    cluster::{StoreError as MetaError, Sweep},
    model::{PartitionId, TopicId},
    task::clock,
    tier::{self, Live, collect_garbage, end_abandoned_uploads},
};

/// Maximum interval between two runs. A shorter grace period shortens the interval.
const INTERVAL: Duration = Duration::from_secs(3600);

/// Time for which a tombstone outlives the last data of its topic. A broker that was offline for longer keeps its files of the topic.
const MARKS_KEPT: Duration = Duration::from_secs(30 * 24 * 3600);

const UPLOADS: &str = "uploads without an end could not be looked for";

/// Returns the interval between two runs.
fn interval(grace: Duration) -> Duration {
    INTERVAL.min(grace.max(Duration::from_secs(1)))
}

/// Returns the maximum time that an orphan object stays in the object store: the grace period, and then one interval.
pub(super) fn most_kept(grace: Duration) -> Duration {
    grace.saturating_add(interval(grace))
}

pub(super) fn spawn(broker: &Arc<Broker>) {
    broker.tasks.spawn("garbage", run(Arc::clone(broker)));
}

async fn run(broker: Arc<Broker>) {
    let interval = interval(broker.settings.garbage_grace);
    let mut search = Search::default();
    loop {
        tokio::select! {
            biased;
            () = broker.tasks.cancelled() => return,
            () = tokio::time::sleep(interval) => {}
        }
        if !broker.is_controller() {
            // The controller collects for the whole cluster. The next controller starts without the state of this one.
            search = Search::default();
            broker.metrics.tier_garbage_bytes.set(0);
            continue;
        }
        tokio::select! {
            biased;
            // The next run completes a cancelled one.
            () = broker.tasks.cancelled() => return,
            () = search.run(&broker) => {}
        }
        broker.metrics.garbage_searches.inc();
    }
}

/// State that one run keeps for the next.
#[derive(Default)]
struct Search {
    sweep: Sweep,
    /// True if it was logged that uploads cannot be listed. A store or a policy that forbids the listing does so for ever, and must not
    /// fill the log.
    said: bool,
}

impl Search {
    async fn run(&mut self, broker: &Broker) {
        if let Err(error) = self.sweep.run(&broker.topics).await {
            failed(broker, &error, "what half-done changes of topics left in the metadata could not be swept");
        }
        let Some(tier) = &broker.tier else { return };
        match tier.store.clock_ms().await {
            Ok(now_ms) => {
                objects(broker, tier, now_ms).await;
                self.uploads(broker, tier, now_ms).await;
            }
            Err(error) => {
                failed(broker, &error, "the object store does not say what time it is, and nothing there counts as old")
            }
        }
        if let Err(error) = marks(broker, tier).await {
            failed(broker, &error, "marks of deleted topics could not be looked at");
        }
    }

    /// Ends multipart uploads that a killed broker left.
    async fn uploads(&mut self, broker: &Broker, tier: &Tier, now_ms: i64) {
        // Boxed, because the futures of the SDK are large.
        let swept = Box::pin(end_abandoned_uploads(&tier.store, broker.settings.upload_grace, now_ms)).await;
        match swept {
            Ok(report) => {
                self.said = false;
                broker.metrics.tier_uploads_ended.inc_by(report.ended);
                broker.metrics.tier_garbage_failures.inc_by(report.failed.len() as u64);
                for (object, why) in &report.failed {
                    tracing::warn!(object, why, "an upload without an end was left for the next time");
                }
                if report.ended > 0 {
                    tracing::info!(uploads = report.ended, "ended uploads that a killed broker had left");
                }
            }
            Err(error) if !std::mem::replace(&mut self.said, true) => failed(broker, &error, UPLOADS),
            Err(error) => {
                broker.metrics.tier_garbage_failures.inc();
                tracing::debug!(%error, "{UPLOADS}");
            }
        }
    }
}

fn failed(broker: &Broker, error: &dyn std::fmt::Display, what: &str) {
    broker.metrics.tier_garbage_failures.inc();
    tracing::warn!(%error, "{what}; it is tried again");
}

/// Deletes orphan objects.
async fn objects(broker: &Broker, tier: &Tier, now_ms: i64) {
    let grace = broker.settings.garbage_grace;
    match collect_garbage(&tier.store, |id| broker.live(id), grace, now_ms).await {
        Ok(report) => {
            broker.metrics.tier_objects_deleted.inc_by(report.deleted);
            broker.metrics.tier_garbage_bytes.set(report.young_bytes);
            broker.metrics.tier_garbage_failures.inc_by(report.skipped.len() as u64);
            for (partition, why) in &report.skipped {
                tracing::warn!(%partition, why, "garbage of this partition was left for the next time");
            }
            if report.deleted > 0 {
                let (objects, bytes) = (report.deleted, report.deleted_bytes);
                tracing::info!(objects, bytes, "collected garbage in the object store");
            }
        }
        Err(error) => failed(broker, &error, "garbage in the object store could not be collected"),
    }
}

/// Error of processing tombstones.
#[derive(Debug, thiserror::Error)]
enum MarksError {
    #[error(transparent)]
    Meta(#[from] MetaError),
    #[error(transparent)]
    Objects(#[from] tier::StoreError),
}

/// Deletes the tombstones of topics without any remaining data. Without an object store they stay, because one may be configured again.
async fn marks(broker: &Broker, tier: &Tier) -> Result<(), MarksError> {
    let marks = broker.topics.marks().await?;
    if marks.is_empty() {
        return Ok(());
    }
    let marked: BTreeSet<TopicId> = marks.iter().map(|mark| mark.id).collect();
    let mut held = tier.store.held(&marked).await?;
    held.extend(broker.log.partitions().iter().map(|id| id.topic));
    for mark in marks {
        let left = held.contains(&mark.id);
        if broker.topics.age(&mark, left, clock::wall_ms(), MARKS_KEPT).await? {
            tracing::info!(topic = %mark.id, "nothing is left of a deleted topic; its mark was ended");
        }
    }
    Ok(())
}

impl Broker {
    /// Returns the state of a partition in the metadata store at this moment, before objects are deleted.
    async fn live(&self, id: PartitionId) -> Live {
        match (self.topics.was_deleted(id.topic).await, self.commits.current(id).await) {
            (Ok(true), _) => Live::Deleted,
            (Ok(false), Ok(Some(state))) => Live::Current(state),
            _ => Live::Unknown,
        }
    }
}
