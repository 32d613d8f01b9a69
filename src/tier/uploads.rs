//! Ends multipart uploads that a killed process left without an end: until then the store keeps their parts, and bills them.
//!
//! Only S3 has a list of them, so other stores are left alone; theirs end by themselves (Azure, Google) or are files of the
//! machine. An upload is ended only if all of this holds: the prefix is this cluster's; the key is that of a segment in a
//! partition's folder below it; and it was begun, by the store's clock, longer ago than the grace. An upload under way, of
//! this broker or another, is therefore left in peace as long as the grace is longer than any upload takes. Were it not, that
//! attempt would fail and be repeated under a new upload: nothing counts before its object is verified.
//!
//! What cannot be ended is in the report and is tried again the next time; it never keeps anything else from happening.

use std::time::Duration;

use super::{claim::ClaimError, store::Store};

/// What one sweep did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct UploadsReport {
    /// Uploads that were ended.
    pub ended: u64,
    /// Uploads of segments that are younger than the grace, or whose age the store does not tell.
    pub young: u64,
    /// Uploads below our prefix that are not of segments. They are never ended.
    pub foreign: u64,
    /// Objects whose uploads could not be ended, and why.
    pub failed: Vec<(String, String)>,
}

/// Why nothing was swept.
#[derive(Clone, Debug, thiserror::Error)]
pub enum UploadsError {
    /// The prefix is not ours, or that is not known yet.
    #[error(transparent)]
    Claim(#[from] ClaimError),
    /// The uploads cannot be listed: the store does not know how, or the credentials do not allow it
    /// (`s3:ListBucketMultipartUploads`).
    #[error(
        "uploads without an end cannot be listed in {place}: {reason}; give the bucket a life-cycle rule that ends them"
    )]
    List {
        /// The store's URL.
        place: String,
        /// What the store said.
        reason: String,
    },
}

/// Ends the uploads below the prefix that were begun longer ago than `grace`. `now_ms` is the wall clock in milliseconds.
///
/// # Errors
/// When the prefix is not known to be ours, or its uploads cannot be listed. Trouble with one upload is in the report.
pub async fn end_abandoned_uploads(store: &Store, grace: Duration, now_ms: i64) -> Result<UploadsReport, UploadsError> {
    if !store.options().is_s3() {
        return Ok(UploadsReport::default());
    }
    store.claim().await?;
    let grace_ms = i64::try_from(grace.as_millis()).unwrap_or(i64::MAX);
    sweep(store, now_ms.saturating_sub(grace_ms)).await
}

#[cfg(feature = "aws-sdk")]
async fn sweep(store: &Store, oldest_young_ms: i64) -> Result<UploadsReport, UploadsError> {
    let refuse = |reason: String| UploadsError::List { place: store.place().to_owned(), reason };
    let s3 = super::s3::S3::connect(store.options()).await.map_err(|error| refuse(error.to_string()))?;
    let mut report = UploadsReport::default();
    for upload in s3.uploads().await.map_err(refuse)? {
        match judge(&upload.object, upload.begun_ms, oldest_young_ms) {
            Verdict::Foreign => report.foreign += 1,
            Verdict::Young => report.young += 1,
            Verdict::Abandoned => match s3.end_upload(&upload).await {
                Ok(()) => {
                    tracing::debug!(object = upload.object, "an upload without an end was ended");
                    report.ended += 1;
                }
                Err(reason) => report.failed.push((upload.object, reason)),
            },
        }
    }
    Ok(report)
}

/// Without the vendor's client nothing can be listed: a life-cycle rule of the bucket must do it.
#[cfg(not(feature = "aws-sdk"))]
async fn sweep(_: &Store, _: i64) -> Result<UploadsReport, UploadsError> {
    Ok(UploadsReport::default())
}

/// What an upload is to us.
#[cfg(any(test, feature = "aws-sdk"))]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    Foreign,
    Young,
    Abandoned,
}

/// Judges one upload by the name of its object below our prefix and by when it was begun.
#[cfg(any(test, feature = "aws-sdk"))]
fn judge(object: &str, begun_ms: Option<i64>, oldest_young_ms: i64) -> Verdict {
    match begun_ms {
        _ if !super::name::is_segment(object) => Verdict::Foreign,
        Some(begun_ms) if begun_ms < oldest_young_ms => Verdict::Abandoned,
        _ => Verdict::Young,
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
        let stamp = name::Stamp::draw(Offset::new(5).unwrap(), Offset::new(6).unwrap(), LeaderEpoch(0));
        let segment = format!("{folder}/{}", stamp.segment());
        assert_eq!(judge(&segment, Some(99), 100), Verdict::Abandoned);
        assert_eq!(judge(&segment, Some(100), 100), Verdict::Young);
        assert_eq!(judge(&segment, None, 100), Verdict::Young);
        assert_eq!(judge("topics/backup.tar", Some(0), 100), Verdict::Foreign);
        assert_eq!(judge(&format!("{folder}/notes.segment"), Some(0), 100), Verdict::Foreign);
    }

    #[tokio::test]
    async fn a_store_that_is_not_s3_is_left_alone() {
        let store = Store::open(&crate::tier::StoreOptions::new("memory://"), "c").unwrap();
        let report = end_abandoned_uploads(&store, Duration::ZERO, i64::MAX).await.unwrap();
        assert_eq!(report, UploadsReport::default());
        assert!(store.list("").await.unwrap().is_empty(), "nothing was asked of it");
    }
}
