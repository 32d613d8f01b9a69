//! Deletes garbage: objects of failed attempts, segments below a log start, superseded manifests, deleted topics. Also
//! aborts multipart uploads that a killed process left incomplete: until then, the store keeps their parts and bills
//! them.
//!
//! # Invariants
//!
//! An object is deleted only if all of this holds:
//!
//! 1. The object lies in a partition's folder and has the name of a segment, page or manifest. As the only other
//!    object, the `topic.json` of a deleted topic is deleted, after all objects of the topic.
//! 2. The object is older than the grace period, by the store's clock, so that no object of an upload in progress is
//!    deleted.
//! 3. The partition's current manifest, read *after* the listing, does not reference the object. Or it references the
//!    object only through a page, as a segment below the log start. A deleted topic has no manifest.
//!
//! A manifest gains only objects that were new when it was staged. So an object that the current manifest does not
//! reference, and that is older than any upload in progress, is never referenced again. The exception is a manifest
//! that replaces a lost one and lists old objects. But if a manifest cannot be read, nothing of its partition is
//! deleted.
//!
//! Only S3 lists incomplete uploads (`s3_admin`), so other stores are skipped. Azure and Google delete them by
//! themselves, and those of a folder are local files. An upload is aborted only if it is of a segment in a partition's
//! folder and older than the grace period, by the store's clock. If an upload in progress is aborted nevertheless, its
//! attempt fails and a new upload follows: nothing is referenced before its object is verified.

use std::{collections::BTreeSet, time::Duration};

use super::{
    error::{BindingError, TierStoreError},
    manifest::{ManifestPage, ManifestRoot},
    name::{self, ManifestName, ObjectId, partition_folder},
    state::TierState,
    store::{ObjectInfo, TierStore},
};
use crate::model::{PartitionId, TopicId};

/// A partition's state in the metadata store. It must be read from the metadata store itself, because the metadata
/// cache may lag.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PartitionLiveness {
    /// The partition exists and has this tier state: the default state before its first commit.
    Current(TierState),
    /// The partition's topic was deleted.
    Deleted,
    /// The state is not known. The partition is skipped.
    Unknown,
}

/// Result of one garbage collection.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct GarbageReport {
    pub deleted: u64,
    /// Bytes of the deleted objects.
    pub deleted_bytes: u64,
    /// Number of objects that are kept only because of the grace period.
    pub young: u64,
    /// Bytes of the objects that `young` counts.
    pub young_bytes: u64,
    /// Partitions whose garbage was not or only partly deleted because of an error, each with the error.
    pub skipped: Vec<(PartitionId, String)>,
    /// Number of objects in partition folders whose names no broker writes. They are never deleted.
    pub foreign: u64,
}

/// Result of one run of [`abort_abandoned_uploads`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MultipartAbortReport {
    pub aborted: u64,
    /// Number of segment uploads that are younger than the grace period, or whose start time the store does not return.
    pub young: u64,
    /// Number of uploads below the prefix that are not of segments. They are never aborted.
    pub foreign: u64,
    /// Objects whose uploads could not be aborted, each with the error.
    pub failed: Vec<(String, String)>,
}

/// Error of a run of [`abort_abandoned_uploads`] that aborted nothing.
#[derive(Clone, Debug, thiserror::Error)]
pub enum MultipartAbortError {
    /// The prefix does not belong to this cluster, or its owner is not known yet.
    #[error(transparent)]
    Binding(#[from] BindingError),
    /// The uploads cannot be listed: the store does not respond or does not support it, or the credentials do not allow
    /// it (`s3:ListBucketMultipartUploads`).
    #[error(
        "cannot list the incomplete uploads in {url} ({reason}): give the bucket a life-cycle rule that aborts them"
    )]
    List { url: String, reason: String },
}

/// Deletes the garbage of all topics in the object store once. `live` reads a partition's current state. It is called
/// after the partition's objects were listed, and once more for partition 0 after all partitions of a topic. `now_ms`
/// is the time of the store's clock ([`TierStore::clock_ms`]).
///
/// # Errors
/// - The prefix is not known to belong to this cluster.
/// - A folder of topics or partitions cannot be listed.
/// - A deleted topic's record cannot be deleted.
/// - The store is stopping.
///
/// The error of one partition is in the report.
pub async fn collect_garbage<F, Fut>(
    store: &TierStore,
    live: F,
    grace: Duration,
    now_ms: i64,
) -> Result<GarbageReport, BindingError>
where
    F: Fn(PartitionId) -> Fut,
    Fut: Future<Output = PartitionLiveness>,
{
    store.bind().await?;
    let grace_ms = i64::try_from(grace.as_millis()).unwrap_or(i64::MAX);
    let mut collection =
        GarbageCollector { store, oldest_young_ms: now_ms.saturating_sub(grace_ms), report: GarbageReport::default() };
    for topic in store.folders(name::TOPICS).await? {
        let Ok(topic) = topic.parse::<TopicId>() else { continue };
        collection.collect_topic(topic, &live).await?;
    }
    Ok(collection.report)
}

/// One garbage collection.
struct GarbageCollector<'a> {
    store: &'a TierStore,
    /// Start of the grace period: an object written at or after this time is young.
    oldest_young_ms: i64,
    report: GarbageReport,
}

impl GarbageCollector<'_> {
    /// Deletes the garbage of each partition of a topic. Deletes the topic record of a deleted topic last.
    async fn collect_topic<F, Fut>(&mut self, topic: TopicId, live: &F) -> Result<(), TierStoreError>
    where
        F: Fn(PartitionId) -> Fut,
        Fut: Future<Output = PartitionLiveness>,
    {
        for folder in self.store.folders(&name::topic_folder(topic)).await? {
            let Ok(number) = folder.parse::<u32>() else { continue };
            let partition = PartitionId::new(topic, number);
            let folder = partition_folder(partition);
            let listed = match self.store.list(&folder).await {
                Ok(listed) => listed,
                Err(TierStoreError::Stopped) => return Err(TierStoreError::Stopped),
                Err(error) => {
                    self.report.skipped.push((partition, error.to_string()));
                    continue;
                }
            };
            let referenced = match live(partition).await {
                PartitionLiveness::Unknown => continue,
                PartitionLiveness::Deleted => BTreeSet::new(),
                PartitionLiveness::Current(state) => match self.list_referenced(partition, &state).await {
                    Ok(referenced) => referenced,
                    Err(reason) => {
                        self.report.skipped.push((partition, reason));
                        continue;
                    }
                },
            };
            self.collect_partition(partition, &folder, &listed, &referenced).await;
        }
        if live(PartitionId::new(topic, 0)).await == PartitionLiveness::Deleted {
            self.delete_topic_record(topic).await?;
        }
        Ok(())
    }

    /// Deletes the topic record of a deleted topic, if the topic has no other object and the record is not young.
    async fn delete_topic_record(&mut self, topic: TopicId) -> Result<(), TierStoreError> {
        let remaining = self.store.list(&name::topic_folder(topic)).await?;
        let record = name::topic_object(topic);
        if let [only] = remaining.as_slice()
            && only.object == record
        {
            if only.modified_ms >= self.oldest_young_ms {
                self.report.young += 1;
                self.report.young_bytes += only.bytes;
            } else {
                self.store.delete(&record).await?;
                self.report.deleted += 1;
                self.report.deleted_bytes += only.bytes;
            }
        }
        Ok(())
    }

    /// Returns the file names of the current manifest, of its pages and of their segments; nothing without a manifest.
    /// Leaves out a page's segment if the segment ends at or below the log start. Fails if the manifest or a page
    /// cannot be read or is invalid, or if the manifest does not agree with `state`.
    async fn list_referenced(&self, partition: PartitionId, state: &TierState) -> Result<BTreeSet<String>, String> {
        let mut referenced = BTreeSet::new();
        let Some(manifest) = state.manifest else { return Ok(referenced) };
        let folder = partition_folder(partition);
        let object = format!("{folder}/{manifest}");
        let bytes = self.store.get(&object).await.map_err(|error| error.to_string())?;
        let root = ManifestRoot::parse(&bytes).map_err(|error| format!("{object}: {error}"))?;
        if root.partition() != partition || !state.agrees(&root) {
            return Err(format!("{object} is not the committed manifest"));
        }
        referenced.insert(manifest.to_string());
        let is_readable = |stamp: &ObjectId| stamp.end > state.log_start;
        for entry in root.pages() {
            let object = format!("{folder}/{}", entry.stamp.page());
            referenced.insert(entry.stamp.page());
            let bytes = self.store.get(&object).await.map_err(|error| error.to_string())?;
            let page = ManifestPage::parse(&bytes, partition, entry).map_err(|error| format!("{object}: {error}"))?;
            let segments = page.segments().iter().filter(|entry| is_readable(&entry.stamp));
            referenced.extend(segments.map(|entry| entry.stamp.segment()));
        }
        referenced.extend(root.segments().iter().map(|entry| entry.stamp.segment()));
        Ok(referenced)
    }

    /// Deletes the objects of a partition that are not in `referenced` and not young. Counts the deleted, the young and
    /// the foreign objects in the report. The first failed deletion ends the work on this partition.
    async fn collect_partition(
        &mut self,
        id: PartitionId,
        folder: &str,
        listed: &[ObjectInfo],
        referenced: &BTreeSet<String>,
    ) {
        for object in listed {
            let name = object.object.strip_prefix(folder).unwrap_or_default().trim_start_matches('/');
            if referenced.contains(name) && !mutant!(CollectReferenced) {
                continue;
            }
            let is_known_name = ObjectId::from_segment(name).is_ok()
                || ObjectId::from_page(name).is_ok()
                || name.parse::<ManifestName>().is_ok();
            if !is_known_name {
                self.report.foreign += 1;
            } else if object.modified_ms >= self.oldest_young_ms {
                self.report.young += 1;
                self.report.young_bytes += object.bytes;
            } else if let Err(error) = self.store.delete(&object.object).await {
                self.report.skipped.push((id, error.to_string()));
                return;
            } else {
                tracing::debug!(object = object.object, bytes = object.bytes, "deleted garbage");
                self.report.deleted += 1;
                self.report.deleted_bytes += object.bytes;
            }
        }
    }
}

/// Aborts the multipart uploads of segments below the prefix that were started longer ago than `grace`. Aborts nothing
/// in a store other than S3, or without the feature `s3-admin`. `now_ms` is the time of the store's clock, in
/// milliseconds since 1970.
///
/// # Errors
/// The prefix is not known to belong to this cluster, or its uploads cannot be listed. The error of one upload is in
/// the report.
pub async fn abort_abandoned_uploads(
    store: &TierStore,
    grace: Duration,
    now_ms: i64,
) -> Result<MultipartAbortReport, MultipartAbortError> {
    if !store.options().is_s3() {
        return Ok(MultipartAbortReport::default());
    }
    store.bind().await?;
    let grace_ms = i64::try_from(grace.as_millis()).unwrap_or(i64::MAX);
    abort_uploads(store, now_ms.saturating_sub(grace_ms)).await
}

/// Aborts all segment uploads that were started before `oldest_young_ms`.
#[cfg(feature = "s3-admin")]
async fn abort_uploads(store: &TierStore, oldest_young_ms: i64) -> Result<MultipartAbortReport, MultipartAbortError> {
    let refuse = |reason: String| MultipartAbortError::List { url: store.url().to_owned(), reason };
    let s3 = super::s3_admin::S3Admin::connect(store.options()).await.map_err(|error| refuse(error.to_string()))?;
    let mut report = MultipartAbortReport::default();
    for upload in s3.uploads().await.map_err(refuse)? {
        match classify_upload(&upload.object, upload.started_ms, oldest_young_ms) {
            UploadVerdict::Foreign => report.foreign += 1,
            UploadVerdict::Young => report.young += 1,
            UploadVerdict::Abandoned => match s3.abort_upload(&upload).await {
                Ok(()) => {
                    tracing::debug!(object = upload.object, "aborted an incomplete upload");
                    report.aborted += 1;
                }
                Err(reason) => report.failed.push((upload.object, reason)),
            },
        }
    }
    Ok(report)
}

/// Does nothing. Without the vendor's client uploads cannot be listed, so a life-cycle rule of the bucket must abort
/// them.
#[cfg(not(feature = "s3-admin"))]
async fn abort_uploads(_: &TierStore, _: i64) -> Result<MultipartAbortReport, MultipartAbortError> {
    Ok(MultipartAbortReport::default())
}

/// Class of an incomplete multipart upload.
#[cfg(any(test, feature = "s3-admin"))]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum UploadVerdict {
    /// Not an upload of a segment.
    Foreign,
    /// Started within the grace period, or at an unknown time.
    Young,
    /// Started before the grace period.
    Abandoned,
}

/// Classifies an upload by the name of its object below the prefix and by its start time.
#[cfg(any(test, feature = "s3-admin"))]
fn classify_upload(object: &str, started_ms: Option<i64>, oldest_young_ms: i64) -> UploadVerdict {
    match started_ms {
        _ if !name::is_segment(object) => UploadVerdict::Foreign,
        Some(started_ms) if started_ms < oldest_young_ms => UploadVerdict::Abandoned,
        _ => UploadVerdict::Young,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{LeaderEpoch, Offset};

    #[test]
    fn only_an_old_upload_of_a_segment_is_abandoned() {
        let folder = partition_folder(PartitionId::new(TopicId::from_bytes([1; 16]), 0));
        let stamp = ObjectId::draw(Offset::new(5).unwrap(), Offset::new(6).unwrap(), LeaderEpoch(0));
        let segment = format!("{folder}/{}", stamp.segment());
        assert_eq!(classify_upload(&segment, Some(99), 100), UploadVerdict::Abandoned);
        assert_eq!(classify_upload(&segment, Some(100), 100), UploadVerdict::Young);
        assert_eq!(classify_upload(&segment, None, 100), UploadVerdict::Young);
        assert_eq!(classify_upload("topics/backup.tar", Some(0), 100), UploadVerdict::Foreign);
        assert_eq!(classify_upload(&format!("{folder}/notes.segment"), Some(0), 100), UploadVerdict::Foreign);
    }

    #[tokio::test]
    async fn store_other_than_s3_is_skipped() {
        let store = TierStore::open(&crate::tier::ObjectStoreOptions::new("memory://"), "c").unwrap();
        let report = abort_abandoned_uploads(&store, Duration::ZERO, i64::MAX).await.unwrap();
        assert_eq!(report, MultipartAbortReport::default());
        assert!(store.list("").await.unwrap().is_empty(), "no request was sent");
    }
}
