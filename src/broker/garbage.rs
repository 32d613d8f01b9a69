//! Takes away what crashes and deletions left behind: objects and uploads in the bucket, keys in the metadata.
//!
//! One task goes through all of it at intervals, each part for itself: what fails is said, counted, and tried again the next
//! time. What may be deleted is decided where it is known: `tier` for objects and uploads, `cluster` for keys. In doubt
//! everything stays.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use super::{Broker, Tier};
use crate::{
    cluster::{StoreError as MetaError, Sweep},
    model::{PartitionId, TopicId},
    task::clock,
    tier::{self, Live, collect_garbage, end_abandoned_uploads},
};

/// How often a search is made, at most; a shorter grace means a shorter interval.
const INTERVAL: Duration = Duration::from_secs(3600);

/// How long the mark of a deleted topic outlives the last of it: brokers that were away so long keep what they have of it.
const MARKS_KEPT: Duration = Duration::from_secs(30 * 24 * 3600);

const UPLOADS: &str = "uploads without an end could not be looked for";

/// How often a search is made.
fn interval(grace: Duration) -> Duration {
    INTERVAL.min(grace.max(Duration::from_secs(1)))
}

/// How long an object stays in the bucket at most once nothing names it: the grace, and then until the next search.
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
            // One of them does it for all. What it remembered is another one's to find.
            search = Search::default();
            broker.metrics.tier_garbage_bytes.set(0);
            continue;
        }
        tokio::select! {
            biased;
            // What is cut off here is done by the next one.
            () = broker.tasks.cancelled() => return,
            () = search.run(&broker) => {}
        }
        broker.metrics.garbage_searches.inc();
    }
}

/// What one search remembers for the next.
#[derive(Default)]
struct Search {
    sweep: Sweep,
    /// Whether it has been said that uploads cannot be listed. A store or a policy that does not allow it never will, and
    /// is not to fill the log.
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

    /// Multipart uploads that a killed broker left.
    async fn uploads(&mut self, broker: &Broker, tier: &Tier, now_ms: i64) {
        // Boxed: the vendor's futures are large.
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

/// Objects that no manifest names.
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

/// Why marks were not looked at.
#[derive(Debug, thiserror::Error)]
enum MarksError {
    #[error(transparent)]
    Meta(#[from] MetaError),
    #[error(transparent)]
    Objects(#[from] tier::StoreError),
}

/// Marks of deleted topics of which nothing is left. Without an object store they stay: there might be one again.
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
    /// What the metadata store says of a partition at this moment, for whoever is about to delete objects.
    async fn live(&self, id: PartitionId) -> Live {
        match (self.topics.was_deleted(id.topic).await, self.commits.current(id).await) {
            (Ok(true), _) => Live::Deleted,
            (Ok(false), Ok(Some(state))) => Live::Current(state),
            _ => Live::Unknown,
        }
    }
}
