//! Deletes what no manifest names: objects of attempts that failed, segments below a log start, superseded manifests,
//! deleted topics.
//!
//! An object is taken only if all of this holds: it lies in a partition's folder and has a name of ours; it is older than the
//! grace, by the store's clock, so that uploads under way are safe; and the partition's current manifest, read *after* the
//! listing, does not name it. A manifest only ever gains objects that were new when it was staged, so what the current one
//! does not name and what is older than any stage under way will never be named again. When a manifest cannot be read,
//! nothing of its partition is deleted.

use std::{collections::BTreeSet, time::Duration};

use super::{
    manifest::{Page, Root},
    name::{self, ManifestName, Stamp, partition_folder},
    state::TierState,
    store::{Listed, Store, StoreError},
};
use crate::model::{PartitionId, TopicId};

/// What the metadata store says about a partition, read at this moment and not from a mirror that may lag.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Live {
    /// It exists, and this is its tier state: the default state when there is none yet.
    Current(TierState),
    /// Its topic does not exist any more.
    Deleted,
    /// It is not known, or another broker cares for it: leave it alone.
    Unknown,
}

/// What one collection did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct GarbageReport {
    /// Objects that were deleted.
    pub deleted: u64,
    /// Their bytes.
    pub deleted_bytes: u64,
    /// Objects that nothing names but that are younger than the grace.
    pub young: u64,
    /// Their bytes.
    pub young_bytes: u64,
    /// Partitions that were left alone because something went wrong, and what.
    pub skipped: Vec<(PartitionId, String)>,
    /// Objects that have no name of ours. They are never deleted.
    pub foreign: u64,
}

/// Goes through all topics in the bucket once. `now_ms` is the store's clock ([`Store::clock_ms`]).
///
/// # Errors
/// When the prefix is not known to be ours, or its topics cannot be listed. Trouble with one partition is in the report.
pub async fn collect_garbage<F, Fut>(
    store: &Store,
    live: F,
    grace: Duration,
    now_ms: i64,
) -> Result<GarbageReport, super::claim::ClaimError>
where
    F: Fn(PartitionId) -> Fut,
    Fut: Future<Output = Live>,
{
    store.claim().await?;
    let grace_ms = i64::try_from(grace.as_millis()).unwrap_or(i64::MAX);
    let mut collection =
        Collection { store, oldest_young_ms: now_ms.saturating_sub(grace_ms), report: GarbageReport::default() };
    for topic in store.folders(name::TOPICS).await? {
        let Ok(topic) = topic.parse::<TopicId>() else { continue };
        collection.topic(topic, &live).await?;
    }
    Ok(collection.report)
}

struct Collection<'a> {
    store: &'a Store,
    /// What was written at or after this moment is young.
    oldest_young_ms: i64,
    report: GarbageReport,
}

impl Collection<'_> {
    async fn topic<F, Fut>(&mut self, topic: TopicId, live: &F) -> Result<(), StoreError>
    where
        F: Fn(PartitionId) -> Fut,
        Fut: Future<Output = Live>,
    {
        for folder in self.store.folders(&name::topic_folder(topic)).await? {
            let Ok(number) = folder.parse::<u32>() else { continue };
            let partition = PartitionId::new(topic, number);
            let folder = partition_folder(partition);
            let listed = match self.store.list(&folder).await {
                Ok(listed) => listed,
                Err(StoreError::Stopped) => return Err(StoreError::Stopped),
                Err(error) => {
                    self.report.skipped.push((partition, error.to_string()));
                    continue;
                }
            };
            let named = match live(partition).await {
                Live::Unknown => continue,
                Live::Deleted => BTreeSet::new(),
                Live::Current(state) => match self.named(partition, &state).await {
                    Ok(named) => named,
                    Err(reason) => {
                        self.report.skipped.push((partition, reason));
                        continue;
                    }
                },
            };
            self.partition(partition, &folder, &listed, &named).await;
        }
        if live(PartitionId::new(topic, 0)).await == Live::Deleted {
            self.topic_object(topic).await?;
        }
        Ok(())
    }

    /// A deleted topic's description goes last, when nothing else is left of it.
    async fn topic_object(&mut self, topic: TopicId) -> Result<(), StoreError> {
        let left = self.store.list(&name::topic_folder(topic)).await?;
        let description = name::topic_object(topic);
        if let [only] = left.as_slice()
            && only.object == description
        {
            if only.modified_ms >= self.oldest_young_ms {
                self.report.young += 1;
                self.report.young_bytes += only.bytes;
            } else {
                self.store.delete(&description).await?;
                self.report.deleted += 1;
                self.report.deleted_bytes += only.bytes;
            }
        }
        Ok(())
    }

    /// The names of all objects that a state reaches.
    async fn named(&self, partition: PartitionId, state: &TierState) -> Result<BTreeSet<String>, String> {
        let mut named = BTreeSet::new();
        let Some(manifest) = state.manifest else { return Ok(named) };
        let folder = partition_folder(partition);
        let object = format!("{folder}/{manifest}");
        let bytes = self.store.get(&object).await.map_err(|error| error.to_string())?;
        let root = Root::parse(&bytes).map_err(|error| format!("{object}: {error}"))?;
        if root.partition() != partition || !state.agrees(&root) {
            return Err(format!("{object} is not the manifest that was committed"));
        }
        named.insert(manifest.to_string());
        let above = |stamp: &Stamp| stamp.end > state.log_start;
        for line in root.pages() {
            let object = format!("{folder}/{}", line.stamp.page());
            named.insert(line.stamp.page());
            let bytes = self.store.get(&object).await.map_err(|error| error.to_string())?;
            let page = Page::parse(&bytes, partition, line).map_err(|error| format!("{object}: {error}"))?;
            named.extend(page.segments().iter().filter(|line| above(&line.stamp)).map(|line| line.stamp.segment()));
        }
        named.extend(root.segments().iter().map(|line| line.stamp.segment()));
        Ok(named)
    }

    async fn partition(&mut self, id: PartitionId, folder: &str, listed: &[Listed], named: &BTreeSet<String>) {
        for object in listed {
            let name = object.object.strip_prefix(folder).unwrap_or_default().trim_start_matches('/');
            if named.contains(name) && !mutant!(CollectReferenced) {
                continue;
            }
            let ours = Stamp::from_segment(name).is_ok()
                || Stamp::from_page(name).is_ok()
                || name.parse::<ManifestName>().is_ok();
            if !ours {
                self.report.foreign += 1;
            } else if object.modified_ms >= self.oldest_young_ms {
                self.report.young += 1;
                self.report.young_bytes += object.bytes;
            } else if let Err(error) = self.store.delete(&object.object).await {
                self.report.skipped.push((id, error.to_string()));
                return;
            } else {
                tracing::debug!(object = object.object, bytes = object.bytes, "garbage deleted");
                self.report.deleted += 1;
                self.report.deleted_bytes += object.bytes;
            }
        }
    }
}
