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
//!
//! So deleted records do not stay on the disk while the object store is unavailable.
//!
//! An upload may take long, and a failing upload continues until its retries are used up. So there are steps without
//! uploads. Separate workers run them for all partitions, and never wait for an upload.
//!
//! Only the leader uploads and moves the log start. A follower rolls by age, and evicts the segments that its leader
//! committed to the object store.
//!
//! # Crash
//!
//! The order of writes makes a crash harmless: object, manifest, commit in the metadata store, eviction of local files.
//! A crash between two of them leaves an orphan object, or files below the log start. The next step is planned from the
//! state of both tiers, so it completes the work.

mod plan;
mod rebuild;
mod runner;

pub use self::runner::MaintenanceRunner;
use crate::{
    cluster::TierCommitError,
    model::Offset,
    tier::{BindingError, TierReadError, TierStoreError, UploadError},
};

/// Error of a step. The step is tried again after every error.
#[derive(Debug, thiserror::Error)]
pub enum MaintenanceError {
    /// The partition's task has ended.
    #[error("the partition is closed")]
    Closed,
    /// The segment could not be read for its upload.
    #[error("cannot upload the segment at {base}: {source}")]
    Export {
        /// First offset of the segment.
        base: Offset,
        source: std::io::Error,
    },
    /// The object store did not accept the segment or the manifest.
    #[error("the upload failed: {0}")]
    Upload(#[from] UploadError),
    /// The manifest could not be read.
    #[error("cannot read the manifest: {0}")]
    Manifest(#[from] TierReadError),
    /// The manifest is lost, and the remaining objects are not the committed ones.
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
    /// The metadata store did not accept the commit.
    #[error("the commit failed: {0}")]
    Commit(#[from] TierCommitError),
}

impl MaintenanceError {
    /// Returns true if the object store or the metadata store is unavailable. Such an outage is logged once for all
    /// partitions, by its detector.
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
    /// All actions but writes to the object store.
    WithoutUploads,
}

/// Result of one step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MaintenanceResult {
    /// True if the next step should follow at once.
    pub more: bool,
    /// True if only the first actions of the step ran: an action that failed in an earlier step may not have run again.
    pub is_partial: bool,
    /// True if an upload is due that this step was not allowed to make.
    pub is_upload_due: bool,
    /// Segments that were uploaded and committed.
    pub uploaded: UploadStats,
}

impl MaintenanceResult {
    /// The first actions ran, and another step with the remaining actions follows at once.
    const PARTIAL: Self = Self { more: true, is_partial: true, is_upload_due: false, uploaded: UploadStats::NONE };
    /// All actions but uploads ran.
    const UPLOAD_DUE: Self = Self { more: false, is_upload_due: true, ..Self::PARTIAL };
}

/// Segments that were uploaded and committed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct UploadStats {
    /// Number of segments.
    pub segments: u64,
    /// Bytes of their batches on the disk.
    pub bytes: u64,
}

impl UploadStats {
    const NONE: Self = Self { segments: 0, bytes: 0 };
}
