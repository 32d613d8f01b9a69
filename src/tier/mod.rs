//! History in object storage: segment objects, the manifest that names them, uploads, cold reads, garbage.
//!
//! # Overview
//!
//! ```text
//! leader    sealed file ─ check every batch ─► put object ─► verify ─► put manifest ─► Staged
//!           Staged::state ─ compare-and-set in the metadata store (the caller's) ─► install
//! reader    offset ─► manifest root ─► page? ─► footer ─► chunks (memory, folder, ranged GET) ─► checked batches
//! garbage   list ─► ask which manifest is current ─► delete what it does not name and is older than the grace
//! ```
//!
//! This room knows neither the log nor the metadata store. A [`PartitionTier`] is one partition's view; a [`Store`] is the
//! prefix that the cluster owns; a [`Cache`] is shared by all partitions. Every byte of every object is in
//! `docs/format.md`.
//!
//! # Invariants
//!
//! - An object is written once, under a name that no other attempt has, and is verified before a manifest names it.
//! - A manifest covers its range without gap or overlap; its versions form one chain, because only a compare-and-set
//!   makes one current.
//! - Nothing is served that was not checked: a flipped bit anywhere is found or harmless.
//! - No segment is ever whole in memory: uploads hold at most eight parts of 8 MiB over all partitions, reads at most the
//!   chunks of one answer.
//! - Garbage is what the current manifest does not name and what is older than the grace. No conditional request is
//!   needed for any of this; some stores ignore them silently.
//!
//! # A lost manifest
//!
//! Segments and their footers hold all that a manifest says. One that is gone is made again from them (`rebuild`): by the leader where the
//! result is what was committed, else by a person.
//!
//! # What a crash leaves
//!
//! Objects that no manifest names, and perhaps a multipart upload without an end. Never a manifest that names what is not
//! there: the manifest is written after its objects are verified, and becomes current after that. Garbage collection takes
//! the objects, and `uploads` ends the uploads where the store is S3.
//!
//! # Shutdown
//!
//! [`Store::stop`] cancels every retry and joins read-ahead; what was being staged answers `Stopped` and is garbage.

mod ahead;
mod cache;
mod claim;
pub mod doctor;
mod files;
mod flights;
mod folder;
pub mod footer;
#[doc(hidden)]
pub mod fuzzing;
mod garbage;
pub mod manifest;
pub mod name;
mod open;
mod partition;
mod reach;
mod read;
mod rebuild;
#[cfg(feature = "aws-sdk")]
mod s3;
mod segment;
mod state;
mod store;
#[cfg(test)]
mod tests;
mod upload;
mod uploads;
mod wire;

pub use cache::{Cache, CacheOptions};
pub use claim::{ClaimError, StoreNote, StoreNotes};
pub use footer::Footer;
pub use garbage::{GarbageReport, Live, collect_garbage};
pub use manifest::SegmentLine;
pub use name::ManifestName;
pub use open::{Keys, OpenError, StoreOptions};
pub use partition::{PartitionTier, Staged, Staging};
pub use reach::Outage;
pub use read::{Read, ReadError};
pub use rebuild::{Survey, Verdict};
pub use segment::{SegmentSource, SourceError};
pub use state::TierState;
pub use store::{Listed, Store, StoreError, TopicRecord};
pub use upload::UploadError;
pub use uploads::{UploadsError, UploadsReport, end_abandoned_uploads};
pub use wire::Invalid;
