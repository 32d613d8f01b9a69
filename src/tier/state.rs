//! The tier state of a partition: its value in the metadata store.

use serde::{Deserialize, Serialize};

use super::{manifest::ManifestRoot, name::ManifestName};
use crate::model::{LeaderEpoch, Offset};

/// Value of a partition's `tier` key: the name of the current manifest, and a summary of the manifest.
///
/// Only a compare-and-set changes the value, so its versions form one chain. All fields except the name are copies from
/// the manifest, for use without a request to the object store. `log_start`, `epoch` and `bytes` may be newer than in
/// the manifest.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TierState {
    /// Name of the current manifest; `None` before the first commit of a manifest.
    pub manifest: Option<ManifestName>,
    /// First offset not committed to the object store. Never decreases.
    pub tiered_end: Offset,
    /// First offset that can be read. Never decreases. Retention raises this value first, and a later manifest follows:
    /// until then, the manifest may list segments below this value, which are not read. The value lies above the tiered
    /// end if retention deleted records that were not uploaded.
    pub log_start: Offset,
    /// Leader epoch that committed the state.
    pub epoch: LeaderEpoch,
    /// Bytes of batches in the object store, in segments that end above the log start.
    #[serde(default)]
    pub bytes: u64,
}

impl TierState {
    /// Returns the manifest's version, or 0 if there is no manifest.
    pub fn version(&self) -> u64 {
        self.manifest.map_or(0, |name| name.version)
    }

    /// Returns the tiered end, or offset 0 if there is no manifest.
    pub fn tiered_end(&self) -> Offset {
        if self.manifest.is_some() { self.tiered_end } else { Offset::ZERO }
    }

    /// Returns the state that makes `root`, with this name, the current manifest.
    pub(super) fn of(root: &ManifestRoot, name: ManifestName) -> Self {
        Self {
            manifest: Some(name),
            tiered_end: root.end(),
            log_start: root.log_start(),
            epoch: root.epoch(),
            bytes: root.bytes(),
        }
    }

    /// Returns true if `root` has the version, epoch and end of the manifest that this state names. The log start and
    /// number of bytes of `root` must also be consistent. The log start of the state may have been raised since `root`
    /// was written.
    pub(super) fn agrees(&self, root: &ManifestRoot) -> bool {
        self.manifest.is_some_and(|name| {
            let identity = (root.version(), root.epoch(), root.end());
            let is_consistent = if self.is_ahead_of(root) {
                root.bytes() >= self.bytes
            } else {
                root.log_start() == self.log_start.min(self.tiered_end) && root.bytes() == self.bytes
            };
            identity == (name.version, name.epoch, self.tiered_end) && is_consistent
        })
    }

    /// Returns true if the log start, or the tiered end if that is lower, is above the log start of `root`.
    pub(super) fn is_ahead_of(&self, root: &ManifestRoot) -> bool {
        root.log_start() < self.log_start.min(self.tiered_end)
    }
}
