//! What the metadata store holds for one partition's tier.

use serde::{Deserialize, Serialize};

use super::{manifest::Root, name::ManifestName};
use crate::model::{LeaderEpoch, Offset};

/// The value of a partition's `tier` key: which manifest is current, and what it says in short.
///
/// Only a compare-and-set moves it, so its versions form one chain. Every field but the manifest's name can be read in
/// the manifest as well; here they are known without asking the bucket.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TierState {
    /// The current manifest; none before the first commit.
    pub manifest: Option<ManifestName>,
    /// First offset not committed to the bucket. Never falls.
    pub tiered_end: Offset,
    /// First offset that can be read. Never falls. It moves here first, and the manifest follows: what that lists below is read by nobody.
    /// Above the tiered end where retention deleted what was not uploaded.
    pub log_start: Offset,
    /// The leader epoch that committed it.
    pub epoch: LeaderEpoch,
    /// Bytes of batches in the bucket, in segments that reach above the log start.
    #[serde(default)]
    pub bytes: u64,
}

impl TierState {
    /// The manifest's version; 0 before the first commit.
    pub fn version(&self) -> u64 {
        self.manifest.map_or(0, |name| name.version)
    }

    /// The end of what the bucket holds; 0 before anything was uploaded.
    pub fn bucket_end(&self) -> Offset {
        if self.manifest.is_some() { self.tiered_end } else { Offset::ZERO }
    }

    pub(super) fn of(root: &Root, name: ManifestName) -> Self {
        Self {
            manifest: Some(name),
            tiered_end: root.end(),
            log_start: root.log_start(),
            epoch: root.epoch(),
            bytes: root.bytes(),
        }
    }

    /// Whether `root` is the manifest that this state names. The log start may have gone on since it was written.
    pub(super) fn agrees(&self, root: &Root) -> bool {
        self.manifest.is_some_and(|name| {
            let of_root = (root.version(), root.epoch(), root.end());
            let says_as_much = if self.is_ahead_of(root) {
                root.bytes() >= self.bytes
            } else {
                root.log_start() == self.log_start.min(self.tiered_end) && root.bytes() == self.bytes
            };
            of_root == (name.version, name.epoch, self.tiered_end) && says_as_much
        })
    }

    /// Whether the log start has moved past that of `root`.
    pub(super) fn is_ahead_of(&self, root: &Root) -> bool {
        root.log_start() < self.log_start.min(self.tiered_end)
    }
}
