//! Maintenance of one partition: it applies the plans of [`retention`](super::retention), one step at a time.
//!
//! # Overview
//!
//! The log start moves in the metadata store first, which needs no object store. Then the segments below it are
//! evicted, and the manifest follows. Uploads come last, and a step that cannot upload ends. So an unavailable object
//! store keeps no deleted records on the disk.
//!
//! An upload may take long, and a failing one continues until its retries are used up. So a step may leave out uploads:
//! workers of their own apply the retention of all partitions and never wait for an upload.
//!
//! Only the leader uploads and moves the log start. A follower seals by age, and evicts what its leader committed to
//! the object store.
//!
//! # Crash
//!
//! The order makes a crash harmless: object, manifest, commit in the metadata store, and only then local files. A crash
//! between any two leaves an orphan object, or files below the log start. The next attempt starts again: every step is
//! planned from the state that it finds.

mod plan;
mod rebuild;
mod runner;

pub use self::runner::MaintenanceRunner;
use crate::{
    cluster::TierCommitError,
    model::Offset,
    tier::{BindingError, TierReadError, TierStoreError, UploadError},
};

/// Error of a step. Every one is tried again.
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
        /// Reason against a rebuild.
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
        let away = |error: &TierStoreError| {
            matches!(error, TierStoreError::Unavailable { .. } | TierStoreError::Denied { .. })
        };
        match self {
            Self::Upload(UploadError::Store(error) | UploadError::Binding(BindingError::Store(error))) => away(error),
            Self::Upload(UploadError::Manifest(TierReadError::Store(error)))
            | Self::Manifest(TierReadError::Store(error)) => away(error),
            Self::Commit(TierCommitError::Store(error)) => error.retryable(),
            _ => false,
        }
    }
}

/// Work of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum StepScope {
    All,
    WithoutUploads,
}

/// Result of one step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MaintenanceResult {
    /// True if there may be more to do at once.
    pub more: bool,
    /// True if only the first part of the work was done: an action that failed before may not have been tried.
    pub is_partial: bool,
    /// True if an upload was left out.
    pub is_upload_due: bool,
    /// Segments that were uploaded and committed.
    pub uploaded: UploadStats,
}

impl MaintenanceResult {
    /// The first part of the work is done, and the rest follows at once.
    const BEGUN: Self = Self { more: true, is_partial: true, is_upload_due: false, uploaded: UploadStats::NONE };
    /// All work but uploads is done.
    const UPLOAD_DUE: Self = Self { more: false, is_upload_due: true, ..Self::BEGUN };
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
