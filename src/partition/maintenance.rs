//! Maintenance of one partition: it applies the plans of [`retention`], one step at a time.
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

use std::{ops::Range, time::Duration};

use tokio::sync::oneshot;

use super::{
    Partition,
    actor::PartitionCommand,
    rebuild::Rebuilds,
    retention::{self, RetentionPlan, RetentionSegment},
};
use crate::{
    cluster::{TierCommitError, TierCommits},
    log::SegmentInfo,
    model::{LeaderEpoch, Offset, Watermarks},
    task::{clock, random},
    tier::{self, PartitionTier, SegmentSource, StagedManifest, TierReadError, TierState, UploadBatch},
};

/// Maximum number of segments in the object store that one plan reads.
const MAX_TIERED_SEGMENTS_PER_PLAN: usize = 256;

/// Maximum time that an uploaded segment waits for later uploads of the same commit: `acks=tiered` waits for the
/// commit.
const MAX_COMMIT_DELAY: Duration = Duration::from_secs(1);

/// Maximum time of an upload once the object store is known to be unavailable, before the partition is planned again.
const MAX_UPLOAD_RETRY_DELAY: Duration = Duration::from_secs(2);

/// State of a partition's segments in its task.
pub(super) struct LocalSegments {
    pub(super) sealed: Vec<SegmentInfo>,
    pub(super) active: SegmentInfo,
    /// Time since the first batch in the active segment; `None` while the segment is empty.
    pub(super) active_age: Option<Duration>,
    pub(super) awaits_tier: bool,
    /// Epoch in which this broker leads, and true if that epoch is committed; `None` while it does not lead.
    pub(super) leads: Option<(LeaderEpoch, bool)>,
}

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
    Upload(#[from] tier::UploadError),
    /// The manifest could not be read.
    #[error("cannot read the manifest: {0}")]
    Manifest(#[from] tier::TierReadError),
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
        use tier::{BindingError, TierStoreError, UploadError};
        let away = |error: &TierStoreError| {
            matches!(error, TierStoreError::Unavailable { .. } | TierStoreError::Denied { .. })
        };
        match self {
            Self::Upload(UploadError::Store(error) | UploadError::Binding(BindingError::Store(error))) => away(error),
            Self::Upload(UploadError::Manifest(TierReadError::Store(error)))
            | Self::Manifest(TierReadError::Store(error)) => away(error),
            Self::Commit(crate::cluster::TierCommitError::Store(error)) => error.retryable(),
            _ => false,
        }
    }
}

/// Work of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Scope {
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

/// Runs maintenance, for all partitions of a broker.
#[derive(Clone)]
pub struct MaintenanceRunner {
    commits: TierCommits,
    pub(super) rebuilds: Rebuilds,
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
            Ok(_turn) => self.step_of(partition, Scope::WithoutUploads).await,
            Err(_busy) => Ok(MaintenanceResult::UPLOAD_DUE),
        }
    }

    /// Plans and applies one step. A manifest that this step or a reader found to be lost is rebuilt.
    pub async fn step(&self, partition: &Partition) -> Result<MaintenanceResult, MaintenanceError> {
        let _turn = partition.maintenance.lock().await;
        self.step_of(partition, Scope::All).await
    }

    async fn step_of(&self, partition: &Partition, scope: Scope) -> Result<MaintenanceResult, MaintenanceError> {
        let outcome = self.planned_step(partition, scope).await;
        let lost = partition.tier.as_ref().and_then(|tier| Some((tier, tier.lost_manifest()?)));
        let Some((tier, object)) = lost else { return outcome };
        if scope == Scope::WithoutUploads {
            return Ok(MaintenanceResult::UPLOAD_DUE);
        }
        // The work that does not need the manifest was done.
        self.rebuild(partition, tier, &object).await?;
        match outcome {
            Err(MaintenanceError::Manifest(_) | MaintenanceError::Upload(tier::UploadError::Manifest(_))) => {
                Ok(MaintenanceResult::BEGUN)
            }
            other => other,
        }
    }

    async fn planned_step(&self, partition: &Partition, scope: Scope) -> Result<MaintenanceResult, MaintenanceError> {
        let mut local = local(partition).await?;
        let mut planned = plan(partition, &local, scope).await;
        let sealed = planned.plan.seal;
        if sealed {
            partition.command(PartitionCommand::Roll).await;
            if partition.error().is_some() {
                // If nothing can be written the segment stays active, and a later step checks it again.
                return Ok(MaintenanceResult { more: false, ..MaintenanceResult::BEGUN });
            }
            // Under load the next segment may be due already: the step continues with the sealed ones all the same.
            local = self::local(partition).await?;
            planned = plan(partition, &local, scope).await;
        }
        let Planned { plan, removed_bytes, manifest } = planned;
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
            partition.command(PartitionCommand::Evict(below)).await;
        }
        moved?;
        if plan.log_start.is_some() {
            return Ok(MaintenanceResult::BEGUN);
        }
        let lags = manifest?;
        match (&plan.upload, &partition.tier) {
            (upload, Some(_)) if scope == Scope::WithoutUploads && (upload.is_some() || lags || local.awaits_tier) => {
                Ok(MaintenanceResult::UPLOAD_DUE)
            }
            (Some(bases), Some(tier)) => {
                self.commits.accepts(partition.id).await?;
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
        tracing::info!(partition = %partition.id, log_start = %start, "retention moved the log start");
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
            partition = %partition.id, base = %bases.start, %end, uploaded.segments,
            "uploaded segments to the object store"
        );
        Ok(uploaded)
    }

    pub(super) async fn commit(
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
        let done = self.commits.commit(partition.id, epoch, before, after).await;
        if let Err(TierCommitError::Changed { .. }) = done
            && let Ok(Some(current)) = self.commits.current(partition.id).await
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
                    partition = %partition.id, base = %info.base, %error,
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

pub(super) async fn local(partition: &Partition) -> Result<LocalSegments, MaintenanceError> {
    let (responder, local) = oneshot::channel();
    partition.command(PartitionCommand::DescribeSegments(responder)).await;
    local.await.map_err(|_| MaintenanceError::Closed)
}

/// Uploads a segment, to be committed with the segments that were added before.
async fn add(partition: &Partition, staging: &mut UploadBatch<'_>, info: &SegmentInfo) -> Result<(), MaintenanceError> {
    let source = source(partition, info).await?;
    if mutant!(EvictBeforeCommit) {
        partition.command(PartitionCommand::Evict(source.end())).await;
    }
    Ok(staging.add(&source).await?)
}

async fn source(partition: &Partition, info: &SegmentInfo) -> Result<SegmentSource, MaintenanceError> {
    let (responder, export) = oneshot::channel();
    partition.command(PartitionCommand::ExportSegment(info.base, responder)).await;
    let export = export.await.map_err(|_| MaintenanceError::Closed)?;
    let export = export.map_err(|source| MaintenanceError::Export { base: info.base, source })?;
    Ok(SegmentSource::new(export))
}

/// A plan, with the parts of the manifest that belong to it.
struct Planned {
    plan: RetentionPlan,
    /// Bytes of the object store's segments that lie wholly below the new log start.
    removed_bytes: u64,
    /// True if the manifest has yet to follow the log start. An error if the manifest could not be read: then the plan
    /// was made without it.
    manifest: Result<bool, MaintenanceError>,
}

async fn plan(partition: &Partition, local: &LocalSegments, scope: Scope) -> Planned {
    let watermarks: Watermarks = partition.watermarks();
    let config = partition.config();
    let now_ms = clock::wall_ms();
    let read = match &partition.tier {
        Some(tier) if local.leads.is_some() && wants_tiered(&config) => {
            tiered(tier, watermarks.log_start, now_ms).await
        }
        _ => Ok((Vec::new(), false)),
    };
    let (tiered, manifest) = match read {
        Ok((segments, lags)) => (segments, Ok(lags)),
        Err(error) => (Vec::new(), Err(error.into())),
    };
    let sealed: Vec<RetentionSegment> = local.sealed.iter().map(segment).collect();
    let input = retention::RetentionInput {
        config: &config,
        now_ms,
        log_start: watermarks.log_start,
        tiered_end: watermarks.tiered_end,
        high_watermark: watermarks.high_watermark,
        local: &sealed,
        active: segment(&local.active),
        active_age: local.active_age,
        tiered: &tiered,
        tiered_bytes: partition.tiered_bytes(),
        uploads: config.tiered
            && partition.tier.is_some()
            && local.leads.is_some_and(|(_, epoch_committed)| epoch_committed),
        leads: local.leads.is_some(),
        // A segment that is sealed but not uploaded at once would hold no more than one waiting append.
        hurry: local.awaits_tier && scope == Scope::All,
    };
    partition.published.set_future_segments(if input.leads { retention::in_future(&input) } else { 0 });
    let plan = retention::plan(&input);
    let removed_bytes = plan.log_start.map_or(0, |start| retention::removed_bytes(&input, start));
    Planned { removed_bytes, plan, manifest }
}

/// Returns the object store's first segments from `log_start` on, and true if the manifest lists others before them.
async fn tiered(
    tier: &PartitionTier,
    log_start: Offset,
    now_ms: i64,
) -> Result<(Vec<RetentionSegment>, bool), TierReadError> {
    let lags = tier.manifest_lags().await?;
    let entries = tier.segments(log_start, MAX_TIERED_SEGMENTS_PER_PLAN).await?;
    let mut segments: Vec<RetentionSegment> = entries
        .iter()
        .map(|entry| RetentionSegment {
            base: entry.stamp.base,
            end: entry.stamp.end,
            bytes: entry.data_bytes,
            max_timestamp_ms: entry.max_timestamp_ms,
            written_ms: if (1..=now_ms).contains(&entry.created_ms) { entry.created_ms } else { i64::MAX },
        })
        .collect();
    // If the manifest has no time of a segment's creation, or one in the future, the object has one. Only the first
    // segment is looked up: retention stops there until that segment is deleted.
    if let (Some(first), Some(entry)) = (segments.first_mut(), entries.first())
        && first.written_ms == i64::MAX
        && !(0..=now_ms).contains(&first.max_timestamp_ms)
    {
        match tier.modified_ms(entry).await {
            Ok(modified_ms) => first.written_ms = modified_ms,
            Err(TierReadError::Store(error @ tier::TierStoreError::Unavailable { .. })) => {
                return Err(TierReadError::Store(error));
            }
            // The age is unknown: the segment stays, and uploads continue.
            Err(error) => tracing::debug!(
                partition = %tier.id(), %error,
                "cannot read the modification time of an object"
            ),
        }
    }
    Ok((segments, lags))
}

/// Returns true if the plan depends on the object store's segments: without limits on the whole log it does not.
fn wants_tiered(config: &crate::model::TopicConfig) -> bool {
    config.retention.is_some() || config.retention_bytes.is_some()
}

fn segment(info: &SegmentInfo) -> RetentionSegment {
    RetentionSegment {
        base: info.base,
        end: info.end,
        bytes: info.bytes,
        max_timestamp_ms: info.max_timestamp,
        written_ms: info.written_ms,
    }
}
