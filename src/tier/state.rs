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
    /// First offset that can be read. Never falls, never above the tiered end.
    pub log_start: Offset,
    /// The leader epoch that committed it.
    pub epoch: LeaderEpoch,
    /// Bytes of batches in the bucket that the manifest lists.
    #[serde(default)]
    pub bytes: u64,
}

impl TierState {
    /// The manifest's version; 0 before the first commit.
    pub fn version(&self) -> u64 {
        self.manifest.map_or(0, |name| name.version)
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

    /// Whether `root` is what this state was committed with.
    pub(super) fn agrees(&self, root: &Root) -> bool {
        self.manifest.is_some_and(|name| Self::of(root, name) == *self && name.version == root.version())
    }
}
