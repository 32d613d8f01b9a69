//! Steps of maintenance: they apply plans, upload segments, commit the log start and the uploads, and rebuild lost
//! manifests.

use std::{ops::Range, time::Duration};

use tokio::sync::oneshot;

use super::{
    MaintenanceError, MaintenanceResult, StepScope, UploadStats,
    plan::{MaintenancePlan, plan_step},
    rebuild::FailedRebuilds,
};
use crate::{
    cluster::{TierCommitError, TierCommits},
    log::SegmentInfo,
    model::{LeaderEpoch, Offset},
    partition::{actor::ActorCommand, handle::Partition, role::LocalSegments},
    task::{clock, random},
    tier::{PartitionTier, SegmentSource, StagedManifest, SurveyVerdict, TierState, UploadBatch, UploadError},
};

/// Time since the start of the uploads for a commit after which no further segment is added to the commit. It is short,
/// because writes with `acks=tiered` wait for the commit.
const MAX_COMMIT_DELAY: Duration = Duration::from_secs(1);

/// Time since the confirmation of an outage of the object store after which uploads fail. The caller retries the step.
const UPLOAD_OUTAGE_TIMEOUT: Duration = Duration::from_secs(2);

/// Runs the maintenance steps of all partitions of a broker.
#[derive(Clone)]
pub struct MaintenanceRunner {
    commits: TierCommits,
    failed_rebuilds: FailedRebuilds,
    /// Base of the retry delay. Each consecutive failure of a step doubles the delay, up to the fourth.
    base_retry_delay: Duration,
}

impl MaintenanceRunner {
    /// Creates a runner that commits through `commits`.
    pub fn new(commits: TierCommits) -> Self {
        Self { commits, failed_rebuilds: FailedRebuilds::default(), base_retry_delay: Duration::from_millis(500) }
    }

    /// Returns the delay, with jitter, before the retry of a step that has failed `failures` times in a row.
    pub fn delay(&self, failures: u32) -> Duration {
        // At most 8 s: after an outage of the object store, writes with `acks=tiered` and a full disk wait for the next
        // attempt.
        let doubled = self.base_retry_delay * 2u32.saturating_pow(failures.min(4));
        doubled.mul_f64(random::in_range(0.5..1.0))
    }

    /// Plans and applies one step without uploads. If another step of this partition is in progress, nothing happens,
    /// and the result is that an upload is due.
    pub async fn step_without_uploads(&self, partition: &Partition) -> Result<MaintenanceResult, MaintenanceError> {
        match partition.maintenance_lock.try_lock() {
            Ok(_guard) => self.locked_step(partition, StepScope::WithoutUploads).await,
            Err(_busy) => Ok(MaintenanceResult::UPLOAD_DUE),
        }
    }

    /// Plans and applies one step, after any other step of this partition. Then tries to rebuild the manifest, if this
    /// step or a reader found it lost and this broker leads.
    pub async fn step(&self, partition: &Partition) -> Result<MaintenanceResult, MaintenanceError> {
        let _guard = partition.maintenance_lock.lock().await;
        self.locked_step(partition, StepScope::All).await
    }

    /// Runs the planned step, then rebuilds the manifest if it is lost. A step without uploads does not rebuild the
    /// manifest: its result, even after an error, is that an upload is due. The caller holds the partition's
    /// maintenance lock.
    async fn locked_step(
        &self,
        partition: &Partition,
        scope: StepScope,
    ) -> Result<MaintenanceResult, MaintenanceError> {
        let result = self.planned_step(partition, scope).await;
        let lost = partition.tier.as_ref().and_then(|tier| Some((tier, tier.lost_manifest()?)));
        let Some((tier, object)) = lost else { return result };
        if scope == StepScope::WithoutUploads {
            // A rebuild writes to the object store, so a step with uploads makes it.
            return Ok(MaintenanceResult::UPLOAD_DUE);
        }
        self.rebuild(partition, tier, &object).await?;
        match result {
            // Most likely, the step failed because the manifest was lost. The next step reads the rebuilt manifest.
            Err(MaintenanceError::Manifest(_) | MaintenanceError::Upload(UploadError::Manifest(_))) => {
                Ok(MaintenanceResult::PARTIAL)
            }
            result => result,
        }
    }

    /// Plans one step and applies the plan: roll, move the log start, evict, then upload or trim the manifest. If the
    /// log start moved, the step ends after the eviction, so that the next step is planned with the new log start. A
    /// step without uploads ends there too, and reports an upload as due if one is needed.
    async fn planned_step(
        &self,
        partition: &Partition,
        scope: StepScope,
    ) -> Result<MaintenanceResult, MaintenanceError> {
        let mut local = describe_segments(partition).await?;
        let mut plan = plan_step(partition, &local, scope).await;
        let rolled = plan.retention.roll;
        if rolled {
            partition.command(ActorCommand::Roll).await;
            if partition.error().is_some() {
                // The replica accepts no writes, so the segment stays active. A later step checks this again.
                return Ok(MaintenanceResult { more: false, ..MaintenanceResult::PARTIAL });
            }
            local = describe_segments(partition).await?;
            // Under load, the new plan may contain another roll. This step ignores that roll, and processes the sealed
            // segments.
            plan = plan_step(partition, &local, scope).await;
        }
        let MaintenancePlan { retention, removed_bytes, manifest_lags } = plan;
        // Commits are made in the epoch of the plan. They fail if the partition has another leader epoch by then.
        let epoch = local.leads.map(|(epoch, _)| epoch).unwrap_or_default();
        let moved = match retention.log_start {
            Some(start) => self.move_log_start(partition, start, removed_bytes, epoch).await,
            None => Ok(()),
        };
        if let Some(below) = retention.evict_below {
            let watermarks = partition.watermarks();
            // If the log start could not move, only segments below the committed log start or tiered end are evicted.
            let below = if moved.is_ok() { below } else { below.min(watermarks.tiered_end.max(watermarks.log_start)) };
            partition.command(ActorCommand::Evict(below)).await;
        }
        moved?;
        if retention.log_start.is_some() {
            return Ok(MaintenanceResult::PARTIAL);
        }
        let manifest_lags = manifest_lags?;
        match (&retention.upload, &partition.tier) {
            (upload, Some(_))
                if scope == StepScope::WithoutUploads && (upload.is_some() || manifest_lags || local.awaits_tier) =>
            {
                Ok(MaintenanceResult::UPLOAD_DUE)
            }
            (Some(bases), Some(tier)) => {
                self.commits.check_can_commit(partition.id()).await?;
                let uploaded = self.upload(partition, tier, bases, &local, epoch).await?;
                Ok(MaintenanceResult { more: true, uploaded, ..MaintenanceResult::default() })
            }
            (None, Some(tier)) if manifest_lags => {
                let staged = while_available(tier, async { Ok(tier.stage_trim(epoch).await?) }).await?;
                self.commit(partition, tier, staged, epoch).await?;
                Ok(MaintenanceResult { more: true, ..MaintenanceResult::default() })
            }
            // No work is left. After a roll, another step follows: the new active segment may be due already.
            _ => Ok(MaintenanceResult { more: rolled, is_partial: rolled, ..MaintenanceResult::default() }),
        }
    }

    /// Moves the log start in the metadata store. `removed_bytes` is the size of the object store's segments that lie
    /// wholly below the new log start.
    async fn move_log_start(
        &self,
        partition: &Partition,
        start: Offset,
        removed_bytes: u64,
        epoch: LeaderEpoch,
    ) -> Result<(), MaintenanceError> {
        match &partition.tier {
            Some(tier) => {
                let staged = tier.stage_log_start(start, removed_bytes, epoch)?;
                self.commit(partition, tier, staged, epoch).await?;
            }
            None => {
                let before = partition.committed().unwrap_or_default();
                let after = TierState { log_start: start, epoch, ..before };
                self.replace_state(partition, partition.committed().as_ref(), &after, epoch).await?;
            }
        }
        tracing::info!(partition = %partition.id(), log_start = %start, "retention moved the log start");
        Ok(())
    }

    /// Uploads the segments that begin in `bases` and commits them together. Commits fewer segments if the uploads take
    /// long, or if an upload after the first fails. The next step then continues after the committed segments. Returns
    /// the number and the bytes of the committed segments.
    async fn upload(
        &self,
        partition: &Partition,
        tier: &PartitionTier,
        bases: &Range<Offset>,
        local: &LocalSegments,
        epoch: LeaderEpoch,
    ) -> Result<UploadStats, MaintenanceError> {
        let uploads = upload_segments(partition, tier, bases, local, epoch);
        let (staged, uploaded) = while_available(tier, uploads).await?;
        let end = staged.state().tiered_end;
        self.commit(partition, tier, staged, epoch).await?;
        tracing::debug!(
            partition = %partition.id(), base = %bases.start, %end, uploaded.segments,
            "uploaded segments to the object store"
        );
        Ok(uploaded)
    }

    /// Commits a staged tier state, which names its manifest, in the metadata store. Then makes it the current state of
    /// this broker.
    async fn commit(
        &self,
        partition: &Partition,
        tier: &PartitionTier,
        staged: StagedManifest,
        epoch: LeaderEpoch,
    ) -> Result<(), MaintenanceError> {
        let state = staged.state().clone();
        // The compare-and-set expects the state from which the staged state was made. The staged state lacks any later
        // commit, so the compare-and-set must fail after such a commit.
        self.replace_state(partition, Some(staged.replaces()), &state, epoch).await?;
        tier.install(staged);
        Ok(())
    }

    /// Rebuilds the partition's lost manifest. If an attempt for the same manifest failed a short time ago, returns the
    /// error of that attempt instead. Does nothing on a replica that does not lead in a committed epoch.
    async fn rebuild(&self, partition: &Partition, tier: &PartitionTier, object: &str) -> Result<(), MaintenanceError> {
        let Some((epoch, true)) = describe_segments(partition).await?.leads else { return Ok(()) };
        let (version, now) = (tier.state().version(), clock::monotonic());
        let manifest_lost = |reason: String| MaintenanceError::ManifestLost {
            object: object.to_owned(),
            partition: format!("{}/{}", partition.topic(), partition.id().number),
            reason,
        };
        if let Some(reason) = self.failed_rebuilds.recent_failure(partition.id(), version, now) {
            return Err(manifest_lost(reason));
        }
        match self.rebuild_now(partition, tier, epoch).await? {
            None => {
                self.failed_rebuilds.remove(partition.id());
                Ok(())
            }
            Some(reason) => {
                self.failed_rebuilds.add_failure(partition.id(), version, now, reason.clone());
                Err(manifest_lost(reason))
            }
        }
    }

    /// Rebuilds the manifest from the segment footers and commits it, if its segments are exactly the committed ones.
    /// Returns `None` after the commit. Otherwise returns the reason why only an operator can rebuild the manifest.
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
            partition = %partition.id(), topic = %partition.topic(), segments = survey.chain.len(),
            bytes = survey.bytes(),
            unused = survey.unused,
            "rebuilt the lost manifest from the segment footers: its segments are the committed ones"
        );
        Ok(None)
    }

    /// Replaces the tier state `before` with `after` in the metadata store, and applies the new state to the partition.
    /// The commit may fail because the stored state or the partition was changed. The function then applies the stored
    /// state instead, if that can be read, and returns the error.
    async fn replace_state(
        &self,
        partition: &Partition,
        before: Option<&TierState>,
        after: &TierState,
        epoch: LeaderEpoch,
    ) -> Result<(), MaintenanceError> {
        let committed = self.commits.commit(partition.id(), epoch, before, after).await;
        if let Err(TierCommitError::Changed { .. }) = committed
            && let Ok(Some(current)) = self.commits.current(partition.id()).await
        {
            // Most likely, an earlier commit of this broker wrote the current state, and its response was lost. The
            // next step continues from that state.
            partition.apply_tier_state(current).await;
        }
        committed?;
        partition.apply_tier_state(after.clone()).await;
        Ok(())
    }
}

/// Waits for `upload`. Fails, and drops `upload`, once an outage of the object store has been confirmed for
/// [`UPLOAD_OUTAGE_TIMEOUT`].
async fn while_available<T>(
    tier: &PartitionTier,
    upload: impl Future<Output = Result<T, MaintenanceError>>,
) -> Result<T, MaintenanceError> {
    tokio::select! {
        biased;
        // The outage is polled before the upload, so that no segment is exported during such an outage.
        error = tier.wait_until_unavailable_for(UPLOAD_OUTAGE_TIMEOUT) => Err(MaintenanceError::Upload(error.into())),
        result = upload => result,
    }
}

/// Uploads the segments that begin in `bases`, then writes a manifest that lists them too. Stops early after
/// [`MAX_COMMIT_DELAY`], or if an upload after the first fails. Returns the manifest, which the caller has to commit,
/// with the number and the bytes of the uploaded segments.
async fn upload_segments(
    partition: &Partition,
    tier: &PartitionTier,
    bases: &Range<Offset>,
    local: &LocalSegments,
    epoch: LeaderEpoch,
) -> Result<(StagedManifest, UploadStats), MaintenanceError> {
    let began = clock::monotonic();
    let mut upload_batch = tier.start_upload_batch(epoch).await?;
    let mut uploaded = UploadStats::default();
    for info in local.sealed.iter().filter(|info| bases.contains(&info.base)) {
        if uploaded.segments > 0 && began.elapsed() > MAX_COMMIT_DELAY {
            break;
        }
        match upload_segment(partition, &mut upload_batch, info).await {
            Err(error) if uploaded.segments > 0 => {
                tracing::debug!(
                    partition = %partition.id(), base = %info.base, %error,
                    "committing the segments uploaded so far"
                );
                break;
            }
            result => result?,
        }
        uploaded.segments += 1;
        uploaded.bytes += info.bytes;
    }
    Ok((upload_batch.finish().await?, uploaded))
}

/// Returns the segments on this broker's disk, and what maintenance needs of the state of the partition's task. Fails
/// if this task has ended.
async fn describe_segments(partition: &Partition) -> Result<LocalSegments, MaintenanceError> {
    partition.describe_segments().await.ok_or(MaintenanceError::Closed)
}

/// Uploads a segment and adds it to the upload batch, whose segments are committed together.
async fn upload_segment(
    partition: &Partition,
    upload_batch: &mut UploadBatch<'_>,
    info: &SegmentInfo,
) -> Result<(), MaintenanceError> {
    let source = open_source(partition, info).await?;
    if mutant!(EvictBeforeCommit) {
        partition.command(ActorCommand::Evict(source.end())).await;
    }
    Ok(upload_batch.add(&source).await?)
}

/// Opens a sealed segment for its upload. The partition's task exports the segment and the tables for its footer.
async fn open_source(partition: &Partition, info: &SegmentInfo) -> Result<SegmentSource, MaintenanceError> {
    let (responder, export) = oneshot::channel();
    partition.command(ActorCommand::ExportSegment(info.base, responder)).await;
    let export = export.await.map_err(|_| MaintenanceError::Closed)?;
    let export = export.map_err(|source| MaintenanceError::SegmentRead { base: info.base, source })?;
    Ok(SegmentSource::new(export))
}
