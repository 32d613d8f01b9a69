//! Aborts multipart uploads that a killed process left incomplete. Until then, the store keeps their parts and bills
//! them.
//!
//! # Invariants
//!
//! Only S3 lists such uploads, so other stores are skipped: Azure and Google delete them by themselves, and those of a
//! folder are local files. An upload is aborted only if all of this holds:
//!
//! 1. The prefix belongs to this cluster.
//! 2. The key is that of a segment in a partition's folder below the prefix.
//! 3. The upload was started longer ago than the grace period, by the store's clock.
//!
//! So an upload in progress, of this broker or another one, is safe as long as the grace period is longer than any
//! upload takes. If an upload is aborted nevertheless, its attempt fails and a new upload follows: nothing is
//! referenced before its object is verified.
//!
//! An upload that cannot be aborted is in the report and is tried again in the next run. It does not stop anything
//! else.

use std::time::Duration;

use super::{error::BindingError, store::TierStore};

/// Result of one run.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct UploadsReport {
    /// Number of aborted uploads.
    pub ended: u64,
    /// Number of segment uploads that are younger than the grace period, or whose age the store does not return.
    pub young: u64,
    /// Number of uploads below the prefix that are not of segments. They are never aborted.
    pub foreign: u64,
    /// Objects whose uploads could not be aborted, each with the error.
    pub failed: Vec<(String, String)>,
}

/// Error of a run that aborted nothing.
#[derive(Clone, Debug, thiserror::Error)]
pub enum UploadsError {
    /// The prefix does not belong to this cluster, or its owner is not known yet.
    #[error(transparent)]
    Binding(#[from] BindingError),
    /// The uploads cannot be listed: the store does not support it, or the credentials do not allow it
    /// (`s3:ListBucketMultipartUploads`).
    #[error(
        "cannot list the incomplete uploads in {url} ({reason}): give the bucket a life-cycle rule that aborts them"
    )]
    List {
        /// URL of the store.
        url: String,
        /// Error of the store.
        reason: String,
    },
}

/// Aborts the uploads below the prefix that were started longer ago than `grace`. `now_ms` is the time of the store's
/// clock, in milliseconds since 1970.
///
/// # Errors
/// The prefix is not known to belong to this cluster, or its uploads cannot be listed. The error of one upload is in
/// the report.
pub async fn abort_abandoned_uploads(
    store: &TierStore,
    grace: Duration,
    now_ms: i64,
) -> Result<UploadsReport, UploadsError> {
    if !store.options().is_s3() {
        return Ok(UploadsReport::default());
    }
    store.bind().await?;
    let grace_ms = i64::try_from(grace.as_millis()).unwrap_or(i64::MAX);
    sweep(store, now_ms.saturating_sub(grace_ms)).await
}

#[cfg(feature = "aws-sdk")]
async fn sweep(store: &TierStore, oldest_young_ms: i64) -> Result<UploadsReport, UploadsError> {
    let refuse = |reason: String| UploadsError::List { url: store.url().to_owned(), reason };
    let s3 = super::s3::S3::connect(store.options()).await.map_err(|error| refuse(error.to_string()))?;
    let mut report = UploadsReport::default();
    for upload in s3.uploads().await.map_err(refuse)? {
        match verdict(&upload.object, upload.started_ms, oldest_young_ms) {
            UploadVerdict::Foreign => report.foreign += 1,
            UploadVerdict::Young => report.young += 1,
            UploadVerdict::Abandoned => match s3.abort_upload(&upload).await {
                Ok(()) => {
                    tracing::debug!(object = upload.object, "aborted an incomplete upload");
                    report.ended += 1;
                }
                Err(reason) => report.failed.push((upload.object, reason)),
            },
        }
    }
    Ok(report)
}

/// Does nothing. Without the vendor's client uploads cannot be listed, so a life-cycle rule of the bucket must abort
/// them.
#[cfg(not(feature = "aws-sdk"))]
async fn sweep(_: &TierStore, _: i64) -> Result<UploadsReport, UploadsError> {
    Ok(UploadsReport::default())
}

/// Class of an upload.
#[cfg(any(test, feature = "aws-sdk"))]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum UploadVerdict {
    Foreign,
    Young,
    Abandoned,
}

/// Classifies an upload by the name of its object below the prefix and by its start time.
#[cfg(any(test, feature = "aws-sdk"))]
fn verdict(object: &str, started_ms: Option<i64>, oldest_young_ms: i64) -> UploadVerdict {
    match started_ms {
        _ if !super::name::is_segment(object) => UploadVerdict::Foreign,
        Some(started_ms) if started_ms < oldest_young_ms => UploadVerdict::Abandoned,
        _ => UploadVerdict::Young,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        model::{LeaderEpoch, Offset, PartitionId, TopicId},
        tier::name,
    };

    #[test]
    fn only_an_old_upload_of_a_segment_is_abandoned() {
        let folder = name::partition_folder(PartitionId::new(TopicId::from_bytes([1; 16]), 0));
        let stamp = name::ObjectId::draw(Offset::new(5).unwrap(), Offset::new(6).unwrap(), LeaderEpoch(0));
        let segment = format!("{folder}/{}", stamp.segment());
        assert_eq!(verdict(&segment, Some(99), 100), UploadVerdict::Abandoned);
        assert_eq!(verdict(&segment, Some(100), 100), UploadVerdict::Young);
        assert_eq!(verdict(&segment, None, 100), UploadVerdict::Young);
        assert_eq!(verdict("topics/backup.tar", Some(0), 100), UploadVerdict::Foreign);
        assert_eq!(verdict(&format!("{folder}/notes.segment"), Some(0), 100), UploadVerdict::Foreign);
    }

    #[tokio::test]
    async fn store_other_than_s3_is_skipped() {
        let store = TierStore::open(&crate::tier::ObjectStoreOptions::new("memory://"), "c").unwrap();
        let report = abort_abandoned_uploads(&store, Duration::ZERO, i64::MAX).await.unwrap();
        assert_eq!(report, UploadsReport::default());
        assert!(store.list("").await.unwrap().is_empty(), "no request was sent");
    }
}
