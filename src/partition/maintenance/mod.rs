//! Maintenance of one partition: it applies the plans of [`retention`](super::retention), one step at a time.
//!
//! # Overview
//!
//! The actions of a step, in order:
//!
//! 1. The active segment is rolled if it is due.
//! 2. The log start moves in the metadata store, which needs no object store.
//! 3. Segments below the log start, and uploaded segments beyond the local retention, are evicted.
//! 4. Sealed segments are uploaded, or the manifest drops the segments below the log start.
//! 5. The leader rebuilds a lost manifest.
//!
//! Because of this order, deleted records do not stay on the disk while the object store is unavailable.
//!
//! An upload may take long, and a failing upload continues until its retries are used up. So there are steps without
//! uploads. Separate workers run such steps for all partitions, and never wait for an upload.
//!
//! Only the leader uploads and moves the log start. A follower rolls by age. It evicts segments below its leader's log
//! start, and, by the local retention, segments that its leader committed to the object store.
//!
//! # Crash
//!
//! The order of writes makes a crash harmless: object, manifest, commit in the metadata store, eviction of local files.
//! A crash between two of these writes leaves an orphan object, or local files that need not be kept. The next step is
//! planned from the state of both tiers, so it completes the work.

mod plan;
mod rebuild;
mod runner;

pub use self::runner::MaintenanceRunner;
use crate::{
    cluster::TierCommitError,
    model::Offset,
    tier::{BindingError, TierReadError, TierStoreError, UploadError},
};

/// Error of a step. The caller retries the step later, except after [`MaintenanceError::Closed`].
#[derive(Debug, thiserror::Error)]
pub enum MaintenanceError {
    /// The partition's task has ended.
    #[error("the partition is closed")]
    Closed,
    /// The segment could not be read for its upload.
    #[error("cannot upload the segment at {base}: {source}")]
    SegmentRead {
        /// First offset of the segment.
        base: Offset,
        source: std::io::Error,
    },
    /// A change in the object store failed or was not started, for one of these reasons:
    /// - The store is unavailable or did not accept an object.
    /// - The prefix does not belong to this cluster.
    /// - The segment file or the current manifest cannot be read.
    /// - A newer leader has committed.
    #[error("the upload failed: {0}")]
    Upload(#[from] UploadError),
    /// The manifest, or the modification time of a segment object, could not be read.
    #[error("cannot read the manifest: {0}")]
    Manifest(#[from] TierReadError),
    /// The manifest is lost, and the last attempt to rebuild it did not show that the remaining segment objects are
    /// exactly the committed ones.
    #[error(
        "{object} is missing or corrupt, and only an operator can rebuild it: {reason}; \
         `strandline partition rebuild-manifest {partition}` lists the remaining objects"
    )]
    ManifestLost {
        /// The manifest, or a page of it.
        object: String,
        /// The partition, as `topic/number`.
        partition: String,
        /// Why the broker did not rebuild the manifest.
        reason: String,
    },
    /// The metadata store did not accept the commit, or did not respond, or is known to accept no commit now.
    #[error("the commit failed: {0}")]
    Commit(#[from] TierCommitError),
}

impl MaintenanceError {
    /// Returns true if the object store is unavailable or denies access, or if the metadata store is unavailable. The
    /// detector of such an outage logs it once for all partitions.
    pub fn is_outage(&self) -> bool {
        let is_unavailable = |error: &TierStoreError| {
            matches!(error, TierStoreError::Unavailable { .. } | TierStoreError::Denied { .. })
        };
        match self {
            Self::Upload(UploadError::Store(error) | UploadError::Binding(BindingError::Store(error))) => {
                is_unavailable(error)
            }
            Self::Upload(UploadError::Manifest(TierReadError::Store(error)))
            | Self::Manifest(TierReadError::Store(error)) => is_unavailable(error),
            Self::Commit(TierCommitError::Store(error)) => error.retryable(),
            _ => false,
        }
    }
}

/// Actions that a step may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum StepScope {
    All,
    /// All actions except writes to the object store.
    WithoutUploads,
}

/// Result of one step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MaintenanceResult {
    /// True if another step of the partition must follow at once.
    pub more: bool,
    /// True if the step may have left out actions. The caller must not count such a step as a success: an action that
    /// failed in an earlier step may not have run again.
    pub is_partial: bool,
    /// True if a step with uploads must follow. This step was not allowed to upload or to rebuild a lost manifest. Or
    /// it did not run because another step of the partition was in progress.
    pub is_upload_due: bool,
    /// Segments that were uploaded and committed.
    pub uploaded: UploadStats,
}

impl MaintenanceResult {
    /// The first actions ran, and another step with the remaining actions must follow at once.
    const PARTIAL: Self = Self { more: true, is_partial: true, is_upload_due: false, uploaded: UploadStats::NONE };
    /// Result of a step without uploads after which a step with uploads must follow.
    const UPLOAD_DUE: Self = Self { more: false, is_upload_due: true, ..Self::PARTIAL };
}

/// Segments that were uploaded and committed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct UploadStats {
    /// Number of segments.
    pub segments: u64,
    /// Bytes of the segment files on the disk.
    pub bytes: u64,
}

impl UploadStats {
    const NONE: Self = Self { segments: 0, bytes: 0 };
}
