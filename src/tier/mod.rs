//! Tiered storage: segment objects, the manifests that list them, uploads, cold reads and garbage collection.
//!
//! # Overview
//!
//! ```text
//! leader    sealed file ─ check every batch ─► put object ─► verify ─► put manifest ─► StagedManifest
//!           StagedManifest::state ─ compare-and-set in the metadata store (the caller's) ─► install
//! reader    offset ─► manifest root ─► page? ─► footer ─► chunks (memory, folder, ranged GET) ─► checked batches
//! garbage   list ─► read the current manifest ─► delete garbage
//! ```
//!
//! The module accesses the metadata store only through [`BindingStore`], for the store binding. It reads a log only
//! through the sealed segments that the caller passes ([`SegmentSource`]). A [`PartitionTier`] is one partition's
//! history in the object store; a [`TierStore`] is the prefix that the cluster owns; all partitions share a
//! [`ChunkCache`]. `docs/format.md` describes every byte of every object.
//!
//! # Invariants
//!
//! - A segment, page or manifest object never changes: its name belongs to one upload, whose retries write the same
//!   content. It is verified before a manifest or a commit references it.
//! - A manifest covers its range without gap or overlap. The versions form one chain, because only a compare-and-set
//!   makes a manifest current.
//! - Nothing is served unchecked: a flipped bit is detected or harmless.
//! - At most eight parts of multipart uploads, of 8 MiB each, are in flight over all partitions. In addition, each
//!   upload buffers at most 16 MiB and one read from its file. A read holds at most the chunks of one response.
//! - Garbage is an object that is older than the grace period, and that the current manifest does not reference. An
//!   object that the manifest references only through a page, as a segment below the log start, counts as not
//!   referenced.
//! - None of these invariants needs conditional requests, which some stores silently ignore.
//!
//! # Lost manifest
//!
//! Segment objects and their footers contain all that a manifest lists, except the write times. If the current manifest
//! is lost, `rebuild` finds its segments by their footers, and [`PartitionTier::stage_rebuilt`] writes a manifest of
//! them. The leader commits this manifest if it matches the committed state; otherwise an operator decides.
//!
//! # Crash
//!
//! A crash may leave objects that no manifest references, and an incomplete multipart upload. A manifest never
//! references a missing object: it is written after its objects are verified, and becomes current after that. Garbage
//! collection deletes the orphan objects, and aborts the multipart uploads if the store is S3.
//!
//! # Shutdown
//!
//! [`TierStore::stop`] cancels every request and joins the background tasks. An upload in progress returns `Stopped`,
//! and its objects are garbage.

mod chunk_cache;
mod cluster_marker;
mod codec;
pub mod doctor;
mod error;
mod files;
mod folder;
pub mod footer;
#[doc(hidden)]
pub mod fuzzing;
mod garbage;
pub mod manifest;
pub mod name;
mod open;
mod outage;
mod partition;
mod read;
mod read_ahead;
mod rebuild;
#[cfg(feature = "s3-admin")]
mod s3_admin;
mod segment;
mod single_flight;
mod state;
mod store;
mod store_binding;
#[cfg(test)]
mod tests;
mod upload;

pub use chunk_cache::{ChunkCache, ChunkCacheOptions};
pub use codec::InvalidObject;
pub use error::{BindingError, TierReadError, TierStoreError};
pub use footer::Footer;
pub use garbage::{
    GarbageReport, MultipartAbortError, MultipartAbortReport, PartitionLiveness, abort_abandoned_uploads,
    collect_garbage,
};
pub use manifest::SegmentEntry;
pub use name::ManifestName;
pub use open::{AccessKeys, ObjectStoreOptions, ObjectStoreOptionsError};
pub use outage::Outage;
pub use partition::{PartitionTier, StagedManifest, UploadBatch};
pub use read::TierRead;
pub use rebuild::{Survey, SurveyVerdict};
pub use segment::{SegmentSource, SegmentSourceError};
pub use state::TierState;
pub use store::{ObjectInfo, TierStore, TopicRecord};
pub use store_binding::{BindingStore, StoreBinding, StoreOwner};
pub use upload::UploadError;
