//! Rebuild of a lost manifest by the partition's leader, if the remaining objects are the committed ones.
//!
//! Reading every footer of a long history is expensive. So a failed attempt is repeated only after [`RETRY_INTERVAL`],
//! or when an operator requests it (`strandline partition rebuild-manifest`).

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use parking_lot::Mutex;
use tokio::time::Instant;

use super::{
    Partition,
    maintenance::{MaintenanceError, MaintenanceRunner, local},
};
use crate::{
    model::{LeaderEpoch, PartitionId},
    task::clock,
    tier::{PartitionTier, SurveyVerdict},
};

/// Pause before another attempt to rebuild a manifest.
const RETRY_INTERVAL: Duration = Duration::from_secs(600);

/// Failed attempts.
#[derive(Clone, Debug, Default)]
pub(super) struct Rebuilds {
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

impl Rebuilds {
    /// Returns the error of the last attempt for this version, if it is too early for another.
    fn pending(&self, id: PartitionId, version: u64, now: Instant) -> Option<String> {
        let failed = self.failed.lock();
        let failure = failed.get(&id)?;
        let is_recent = failure.version == version && now.duration_since(failure.at) < RETRY_INTERVAL;
        is_recent.then(|| failure.reason.clone())
    }

    fn record_outcome(&self, id: PartitionId, outcome: Option<Failure>) {
        let mut failed = self.failed.lock();
        match outcome {
            Some(failure) => drop(failed.insert(id, failure)),
            None => drop(failed.remove(&id)),
        }
    }
}

impl MaintenanceRunner {
    /// Rebuilds the partition's lost manifest. Only a leader whose epoch is committed does so; on other replicas
    /// nothing happens.
    pub(super) async fn rebuild(
        &self,
        partition: &Partition,
        tier: &PartitionTier,
        object: &str,
    ) -> Result<(), MaintenanceError> {
        let Some((epoch, true)) = local(partition).await?.leads else { return Ok(()) };
        let (version, now) = (tier.state().version(), clock::monotonic());
        let lost = |reason: String| MaintenanceError::ManifestLost {
            object: object.to_owned(),
            partition: format!("{}/{}", partition.topic(), partition.id().number),
            reason,
        };
        if let Some(reason) = self.rebuilds.pending(partition.id(), version, now) {
            return Err(lost(reason));
        }
        match self.rebuild_now(partition, tier, epoch).await? {
            None => {
                self.rebuilds.record_outcome(partition.id(), None);
                Ok(())
            }
            Some(reason) => {
                self.rebuilds
                    .record_outcome(partition.id(), Some(Failure { version, at: now, reason: reason.clone() }));
                Err(lost(reason))
            }
        }
    }

    /// Returns the reason why the rebuild is left to an operator; `None` after the commit.
    async fn rebuild_now(
        &self,
        partition: &Partition,
        tier: &PartitionTier,
        epoch: LeaderEpoch,
    ) -> Result<Option<String>, MaintenanceError> {
        let survey = tier.survey().await?;
        if survey.verdict != SurveyVerdict::Committed {
            return Ok(survey.obstacle());
        }
        let staged = tier.stage_rebuilt(&survey.chain, survey.log_start, epoch).await?;
        self.commit(partition, tier, staged, epoch).await?;
        tracing::warn!(
            partition = %partition.id(), topic = %partition.topic(), segments = survey.chain.len(), bytes = survey.bytes(),
            left_over = survey.left_over,
            "rebuilt the lost manifest from the segment footers: its segments are the committed ones"
        );
        Ok(None)
    }
}
