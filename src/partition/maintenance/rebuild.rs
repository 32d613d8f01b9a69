//! Failed attempts to rebuild a lost manifest.
//!
//! Reading every footer of a long history is expensive. So the broker repeats a failed attempt for the same manifest
//! only after [`RETRY_INTERVAL`]. An operator may rebuild the manifest earlier (`strandline partition
//! rebuild-manifest`).

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use tokio::time::Instant;

use crate::{model::PartitionId, task::lock::Mutex};

/// Pause after a failed attempt to rebuild a manifest, before the next attempt.
const RETRY_INTERVAL: Duration = Duration::from_secs(600);

/// Last failed attempt of each partition. Clones share the attempts.
#[derive(Clone, Debug, Default)]
pub(super) struct FailedRebuilds {
    failed: Arc<Mutex<BTreeMap<PartitionId, Failure>>>,
}

/// A failed attempt.
#[derive(Clone, Debug)]
struct Failure {
    /// Version of the lost manifest.
    version: u64,
    at: Instant,
    reason: String,
}

impl FailedRebuilds {
    /// Returns the reason of the last failed attempt for this version of the manifest, if the attempt was made less
    /// than [`RETRY_INTERVAL`] ago. The caller must then not try again yet.
    pub(super) fn recent_failure(&self, id: PartitionId, version: u64, now: Instant) -> Option<String> {
        let failed = self.failed.lock();
        let failure = failed.get(&id)?;
        let is_recent = failure.version == version && now.duration_since(failure.at) < RETRY_INTERVAL;
        is_recent.then(|| failure.reason.clone())
    }

    /// Stores a failed attempt for this version of the manifest, in place of an earlier one.
    pub(super) fn add_failure(&self, id: PartitionId, version: u64, at: Instant, reason: String) {
        self.failed.lock().insert(id, Failure { version, at, reason });
    }

    /// Removes the failure of a partition whose manifest was rebuilt.
    pub(super) fn remove(&self, id: PartitionId) {
        self.failed.lock().remove(&id);
    }
}
