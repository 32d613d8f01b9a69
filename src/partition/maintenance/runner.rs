//! Steps of maintenance: they apply plans, upload segments, and commit the log start and the uploads.

use std::{ops::Range, time::Duration};

use tokio::sync::oneshot;

use super::{
    MaintenanceError, MaintenanceResult, StepScope, UploadStats,
    plan::{MaintenancePlan, plan},
    rebuild::Rebuilds,
};
use crate::{
    cluster::{TierCommitError, TierCommits},
    log::SegmentInfo,
    model::{LeaderEpoch, Offset},
    partition::{actor::ActorCommand, handle::Partition, role::LocalSegments},
    task::{clock, random},
    tier::{PartitionTier, SegmentSource, StagedManifest, SurveyVerdict, TierState, UploadBatch, UploadError},
};

/// Maximum time that an uploaded segment waits for later uploads of the same commit: `acks=tiered` waits for the
/// commit.
const MAX_COMMIT_DELAY: Duration = Duration::from_secs(1);

/// Maximum time of an upload once the object store is known to be unavailable, before the partition is planned again.
const MAX_UPLOAD_RETRY_DELAY: Duration = Duration::from_secs(2);

/// Runs maintenance, for all partitions of a broker.
#[derive(Clone)]
pub struct MaintenanceRunner {
    commits: TierCommits,
    rebuilds: Rebuilds,
    retry: Duration,
}

impl MaintenanceRunner {
    /// Creates a runner that commits through `commits`.
    pub fn new(commits: TierCommits) -> Self {
        Self { commits, rebuilds: Rebuilds::default(), retry: Duration::from_millis(500) }
    }

    /// Returns the delay before the attempt after `failures` consecutive failures.
    pub fn delay(&self, failures: u32) -> Duration {
        // At most 8 s: after an outage of the object store, `acks=tiered` and a full disk wait for the next attempt.
        let doubled = self.retry * 2u32.saturating_pow(failures.min(4));
        doubled.mul_f64(random::in_range(0.5..1.0))
    }

    /// Plans and applies one step without uploads. If another step of this partition is under way, that one does the
    /// work.
    pub async fn step_without_uploads(&self, partition: &Partition) -> Result<MaintenanceResult, MaintenanceError> {
        match partition.maintenance.try_lock() {
            Ok(_turn) => self.step_of(partition, StepScope::WithoutUploads).await,
            Err(_busy) => Ok(MaintenanceResult::UPLOAD_DUE),
        }
    }

    /// Plans and applies one step. A manifest that this step or a reader found to be lost is rebuilt.
    pub async fn step(&self, partition: &Partition) -> Result<MaintenanceResult, MaintenanceError> {
        let _turn = partition.maintenance.lock().await;
        self.step_of(partition, StepScope::All).await
    }

    async fn step_of(&self, partition: &Partition, scope: StepScope) -> Result<MaintenanceResult, MaintenanceError> {
        let outcome = self.planned_step(partition, scope).await;
        let lost = partition.tier.as_ref().and_then(|tier| Some((tier, tier.lost_manifest()?)));
        let Some((tier, object)) = lost else { return outcome };
        if scope == StepScope::WithoutUploads {
            return Ok(MaintenanceResult::UPLOAD_DUE);
        }
        // The work that does not need the manifest was done.
        self.rebuild(partition, tier, &object).await?;
        match outcome {
            Err(MaintenanceError::Manifest(_) | MaintenanceError::Upload(UploadError::Manifest(_))) => {
                Ok(MaintenanceResult::BEGUN)
            }
            other => other,
        }
    }

    async fn planned_step(
        &self,
        partition: &Partition,
        scope: StepScope,
    ) -> Result<MaintenanceResult, MaintenanceError> {
        let mut local = local(partition).await?;
        let mut planned = plan(partition, &local, scope).await;
        let sealed = planned.plan.roll;
        if sealed {
            partition.command(ActorCommand::Roll).await;
            if partition.error().is_some() {
                // If nothing can be written the segment stays active, and a later step checks it again.
                return Ok(MaintenanceResult { more: false, ..MaintenanceResult::BEGUN });
            }
            // Under load the next segment may be due already: the step continues with the sealed ones all the same.
            local = self::local(partition).await?;
            planned = plan(partition, &local, scope).await;
        }
        let MaintenancePlan { plan, removed_bytes, manifest } = planned;
        // Commits belong to the epoch of the plan: a leader that is deposed meanwhile is refused.
        let epoch = local.leads.map(|(epoch, _)| epoch).unwrap_or_default();
        let moved = match plan.log_start {
            Some(start) => self.move_log_start(partition, start, removed_bytes, epoch).await,
            None => Ok(()),
        };
        if let Some(below) = plan.evict_below {
            let watermarks = partition.watermarks();
            // If the log start could not move, segments below the committed one are evicted all the same.
            let below = if moved.is_ok() { below } else { below.min(watermarks.tiered_end.max(watermarks.log_start)) };
            partition.command(ActorCommand::Evict(below)).await;
        }
        moved?;
        if plan.log_start.is_some() {
            return Ok(MaintenanceResult::BEGUN);
        }
        let lags = manifest?;
        match (&plan.upload, &partition.tier) {
            (upload, Some(_))
                if scope == StepScope::WithoutUploads && (upload.is_some() || lags || local.awaits_tier) =>
            {
                Ok(MaintenanceResult::UPLOAD_DUE)
            }
            (Some(bases), Some(tier)) => {
                self.commits.accepts(partition.id()).await?;
                let uploaded = self.upload(partition, tier, bases, &local, epoch).await?;
                Ok(MaintenanceResult { more: true, uploaded, ..MaintenanceResult::default() })
            }
            (None, Some(tier)) if lags => {
                let staged = unless_away(tier, async { Ok(tier.stage_trim(epoch).await?) }).await?;
                self.commit(partition, tier, staged, epoch).await?;
                Ok(MaintenanceResult { more: true, ..MaintenanceResult::default() })
            }
            _ => Ok(MaintenanceResult { more: sealed, is_partial: sealed, ..MaintenanceResult::default() }),
        }
    }

    /// Moves the log start in the metadata store. `removed_bytes` are those of the object store's segments that lie
    /// wholly below it.
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
                self.commit_state(partition, &after, epoch).await?;
            }
        }
        tracing::info!(partition = %partition.id(), log_start = %start, "retention moved the log start");
        Ok(())
    }

    /// Uploads the segments that begin in `bases` and commits them together. It commits fewer of them if the uploads
    /// take long, or if one after the first fails; the next step then starts with the failed one.
    async fn upload(
        &self,
        partition: &Partition,
        tier: &PartitionTier,
        bases: &Range<Offset>,
        local: &LocalSegments,
        epoch: LeaderEpoch,
    ) -> Result<UploadStats, MaintenanceError> {
        let (staged, uploaded) = unless_away(tier, stage(partition, tier, bases, local, epoch)).await?;
        let end = staged.state().tiered_end;
        self.commit(partition, tier, staged, epoch).await?;
        tracing::debug!(
            partition = %partition.id(), base = %bases.start, %end, uploaded.segments,
            "uploaded segments to the object store"
        );
        Ok(uploaded)
    }

    async fn commit(
        &self,
        partition: &Partition,
        tier: &PartitionTier,
        staged: StagedManifest,
        epoch: LeaderEpoch,
    ) -> Result<(), MaintenanceError> {
        let state = staged.state().clone();
        // Not the newest known state: a commit made meanwhile is not in the manifest that was staged.
        self.commit_after(partition, Some(staged.replaces()), &state, epoch).await?;
        tier.install(staged);
        Ok(())
    }

    /// Rebuilds the partition's lost manifest. Only a leader whose epoch is committed does so; on other replicas
    /// nothing happens.
    async fn rebuild(&self, partition: &Partition, tier: &PartitionTier, object: &str) -> Result<(), MaintenanceError> {
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
                self.rebuilds.remove(partition.id());
                Ok(())
            }
            Some(reason) => {
                self.rebuilds.record_failure(partition.id(), version, now, reason.clone());
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
            partition = %partition.id(), topic = %partition.topic(), segments = survey.chain.len(),
            bytes = survey.bytes(),
            left_over = survey.left_over,
            "rebuilt the lost manifest from the segment footers: its segments are the committed ones"
        );
        Ok(None)
    }

    async fn commit_state(
        &self,
        partition: &Partition,
        after: &TierState,
        epoch: LeaderEpoch,
    ) -> Result<(), MaintenanceError> {
        self.commit_after(partition, partition.committed().as_ref(), after, epoch).await
    }

    async fn commit_after(
        &self,
        partition: &Partition,
        before: Option<&TierState>,
        after: &TierState,
        epoch: LeaderEpoch,
    ) -> Result<(), MaintenanceError> {
        let done = self.commits.commit(partition.id(), epoch, before, after).await;
        if let Err(TierCommitError::Changed { .. }) = done
            && let Ok(Some(current)) = self.commits.current(partition.id()).await
        {
            // Most likely an earlier attempt whose response was lost: the next attempt continues from there.
            partition.apply_tier_state(current).await;
        }
        done?;
        partition.apply_tier_state(after.clone()).await;
        Ok(())
    }
}

/// Waits for an upload. Fails if the object store is known to be unavailable, or becomes unavailable and stays so for a
/// while.
async fn unless_away<T>(
    tier: &PartitionTier,
    upload: impl Future<Output = Result<T, MaintenanceError>>,
) -> Result<T, MaintenanceError> {
    tokio::select! {
        biased;
        // Polled first: nothing is exported during a known outage.
        error = tier.until_away_for(MAX_UPLOAD_RETRY_DELAY) => Err(MaintenanceError::Upload(error.into())),
        done = upload => done,
    }
}

/// Uploads the segments that begin in `bases`, for one commit.
async fn stage(
    partition: &Partition,
    tier: &PartitionTier,
    bases: &Range<Offset>,
    local: &LocalSegments,
    epoch: LeaderEpoch,
) -> Result<(StagedManifest, UploadStats), MaintenanceError> {
    let began = clock::monotonic();
    let mut staging = tier.start_upload_batch(epoch).await?;
    let mut uploaded = UploadStats::default();
    for info in local.sealed.iter().filter(|info| bases.contains(&info.base)) {
        if uploaded.segments > 0 && began.elapsed() > MAX_COMMIT_DELAY {
            break;
        }
        match add(partition, &mut staging, info).await {
            Err(error) if uploaded.segments > 0 => {
                tracing::debug!(
                    partition = %partition.id(), base = %info.base, %error,
                    "committing the segments uploaded so far"
                );
                break;
            }
            added => added?,
        }
        uploaded.segments += 1;
        uploaded.bytes += info.bytes;
    }
    Ok((staging.finish().await?, uploaded))
}

async fn local(partition: &Partition) -> Result<LocalSegments, MaintenanceError> {
    partition.describe_segments().await.ok_or(MaintenanceError::Closed)
}

/// Uploads a segment, to be committed with the segments that were added before.
async fn add(partition: &Partition, staging: &mut UploadBatch<'_>, info: &SegmentInfo) -> Result<(), MaintenanceError> {
    let source = source(partition, info).await?;
    if mutant!(EvictBeforeCommit) {
        partition.command(ActorCommand::Evict(source.end())).await;
    }
    Ok(staging.add(&source).await?)
}

async fn source(partition: &Partition, info: &SegmentInfo) -> Result<SegmentSource, MaintenanceError> {
    let (responder, export) = oneshot::channel();
    partition.command(ActorCommand::ExportSegment(info.base, responder)).await;
    let export = export.await.map_err(|_| MaintenanceError::Closed)?;
    let export = export.map_err(|source| MaintenanceError::Export { base: info.base, source })?;
    Ok(SegmentSource::new(export))
}
