//! Maintenance of one partition: it applies the plans of [`retention`], one step at a time.
//!
//! # Overview
//!
//! The log start moves in the metadata store first, which needs no object store. Then the segments below it are evicted, and the manifest
//! follows. Uploads come last, and a step that cannot upload ends. So an unavailable object store keeps no deleted records on the disk.
//!
//! An upload may take long, and a failing one continues until its retries are used up. So a step may leave out uploads: workers of their
//! own apply the retention of all partitions and never wait for an upload.
//!
//! Only the leader uploads and moves the log start. A follower seals by age, and evicts what its leader committed to the object store.
//!
//! # Crash
//!
//! The order makes a crash harmless: object, manifest, commit in the metadata store, and only then local files. A crash between any two
//! leaves an orphan object, or files below the log start. The next attempt starts again: every step is planned from the state that it
//! finds.

use std::{ops::Range, time::Duration};

use tokio::sync::oneshot;

use super::{
    Partition,
    actor::Command,
    rebuild::Rebuilds,
    retention::{self, Plan, Segment},
};
use crate::{
    cluster::{TierCommitError, TierCommits},
    log::SegmentInfo,
    model::{LeaderEpoch, Offset, Watermarks},
    task::{clock, random},
    tier::{self, PartitionTier, ReadError, SegmentSource, Staged, Staging, TierState},
};

/// Maximum number of segments in the object store that one plan reads.
const TIERED_PER_PLAN: usize = 256;

/// Maximum time that an uploaded segment waits for later uploads of the same commit: `acks=tiered` waits for the commit.
const COMMIT_WITHIN: Duration = Duration::from_secs(1);

/// Maximum time of an upload once the object store is known to be unavailable, before the partition is planned again.
const RETRY_WITHIN: Duration = Duration::from_secs(2);

/// State of a partition's segments in its task.
pub(super) struct Local {
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
pub enum UpkeepError {
    /// The partition's task has ended.
    #[error("the partition is closed")]
    Closed,
    /// The segment could not be read for its upload.
    #[error("the segment at {base} cannot be uploaded: {source}")]
    Export {
        /// First offset of the segment.
        base: Offset,
        source: std::io::Error,
    },
    /// The object store did not accept the segment or the manifest.
    #[error("the upload failed: {0}")]
    Upload(#[from] tier::UploadError),
    /// The manifest could not be read.
    #[error("the manifest cannot be read: {0}")]
    Manifest(#[from] tier::ReadError),
    /// The manifest is lost, and the remaining objects are not the committed ones.
    #[error(
        "{object} is missing or damaged, and cannot be made again without a person: {why}; `strandline partition rebuild-manifest {partition}` \
         shows what is left"
    )]
    ManifestLost {
        /// The manifest, or a page of it.
        object: String,
        /// The partition, as `topic/number`.
        partition: String,
        /// Reason against a rebuild.
        why: String,
    },
    /// The metadata store did not accept the commit.
    #[error("the commit failed: {0}")]
    Commit(#[from] TierCommitError),
}

impl UpkeepError {
    /// Returns true if the object store or the metadata store is unavailable. Such an outage is logged once for all partitions, by its
    /// detector.
    pub fn is_outage(&self) -> bool {
        use tier::{ClaimError, StoreError, UploadError};
        let away = |error: &StoreError| matches!(error, StoreError::Unavailable { .. } | StoreError::Denied { .. });
        match self {
            Self::Upload(UploadError::Store(error) | UploadError::Claim(ClaimError::Store(error))) => away(error),
            Self::Upload(UploadError::Manifest(ReadError::Store(error))) | Self::Manifest(ReadError::Store(error)) => {
                away(error)
            }
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
pub struct Step {
    /// True if there may be more to do at once.
    pub more: bool,
    /// True if only the first part of the work was done: an action that failed before may not have been tried.
    pub is_partial: bool,
    /// True if an upload was left out.
    pub is_upload_due: bool,
    /// Segments that were uploaded and committed.
    pub uploaded: Uploaded,
}

impl Step {
    /// The first part of the work is done, and the rest follows at once.
    const BEGUN: Self = Self { more: true, is_partial: true, is_upload_due: false, uploaded: Uploaded::NONE };
    /// All work but uploads is done.
    const UPLOAD_DUE: Self = Self { more: false, is_upload_due: true, ..Self::BEGUN };
}

/// Segments that were uploaded and committed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Uploaded {
    /// Number of segments.
    pub segments: u64,
    /// Bytes of their batches on the disk.
    pub bytes: u64,
}

impl Uploaded {
    const NONE: Self = Self { segments: 0, bytes: 0 };
}

/// Runs maintenance, for all partitions of a broker.
#[derive(Clone)]
pub struct Upkeep {
    commits: TierCommits,
    pub(super) rebuilds: Rebuilds,
    retry: Duration,
}

impl Upkeep {
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

    /// Plans and applies one step without uploads. If another step of this partition is under way, that one does the work.
    pub async fn step_without_uploads(&self, partition: &Partition) -> Result<Step, UpkeepError> {
        match partition.upkeep.try_lock() {
            Ok(_turn) => self.step_of(partition, Scope::WithoutUploads).await,
            Err(_busy) => Ok(Step::UPLOAD_DUE),
        }
    }

    /// Plans and applies one step. A manifest that this step or a reader found to be lost is rebuilt.
    pub async fn step(&self, partition: &Partition) -> Result<Step, UpkeepError> {
        let _turn = partition.upkeep.lock().await;
        self.step_of(partition, Scope::All).await
    }

    async fn step_of(&self, partition: &Partition, scope: Scope) -> Result<Step, UpkeepError> {
        let outcome = self.planned_step(partition, scope).await;
        let lost = partition.tier.as_ref().and_then(|tier| Some((tier, tier.lost_manifest()?)));
        let Some((tier, object)) = lost else { return outcome };
        if scope == Scope::WithoutUploads {
            return Ok(Step::UPLOAD_DUE);
        }
        // The work that does not need the manifest was done.
        self.rebuild(partition, tier, &object).await?;
        match outcome {
            Err(UpkeepError::Manifest(_) | UpkeepError::Upload(tier::UploadError::Manifest(_))) => Ok(Step::BEGUN),
            other => other,
        }
    }

    async fn planned_step(&self, partition: &Partition, scope: Scope) -> Result<Step, UpkeepError> {
        let mut local = local(partition).await?;
        let mut planned = plan(partition, &local, scope).await;
        let sealed = planned.plan.seal;
        if sealed {
            partition.command(Command::Seal).await;
            if partition.fault().is_some() {
                // If nothing can be written the segment stays active, and a later step checks it again.
                return Ok(Step { more: false, ..Step::BEGUN });
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
            let marks = partition.marks();
            // If the log start could not move, segments below the committed one are evicted all the same.
            let below = if moved.is_ok() { below } else { below.min(marks.tiered_end.max(marks.log_start)) };
            partition.command(Command::Evict(below)).await;
        }
        moved?;
        if plan.log_start.is_some() {
            return Ok(Step::BEGUN);
        }
        let lags = manifest?;
        match (&plan.upload, &partition.tier) {
            (upload, Some(_)) if scope == Scope::WithoutUploads && (upload.is_some() || lags || local.awaits_tier) => {
                Ok(Step::UPLOAD_DUE)
            }
            (Some(bases), Some(tier)) => {
                self.commits.accepts(partition.id).await?;
                let uploaded = self.upload(partition, tier, bases, &local, epoch).await?;
                Ok(Step { more: true, uploaded, ..Step::default() })
            }
            (None, Some(tier)) if lags => {
                let staged = unless_away(tier, async { Ok(tier.stage_trim(epoch).await?) }).await?;
                self.commit(partition, tier, staged, epoch).await?;
                Ok(Step { more: true, ..Step::default() })
            }
            _ => Ok(Step { more: sealed, is_partial: sealed, ..Step::default() }),
        }
    }

    /// Moves the log start in the metadata store. `removed_bytes` are those of the object store's segments that lie wholly below it.
    async fn move_log_start(
        &self,
        partition: &Partition,
        start: Offset,
        removed_bytes: u64,
        epoch: LeaderEpoch,
    ) -> Result<(), UpkeepError> {
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

    /// Uploads the segments that begin in `bases` and commits them together. It commits fewer of them if the uploads take long, or if one
    /// after the first fails; the next step then starts with the failed one.
    async fn upload(
        &self,
        partition: &Partition,
        tier: &PartitionTier,
        bases: &Range<Offset>,
        local: &Local,
        epoch: LeaderEpoch,
    ) -> Result<Uploaded, UpkeepError> {
        let (staged, uploaded) = unless_away(tier, stage(partition, tier, bases, local, epoch)).await?;
        let end = staged.state().tiered_end;
        self.commit(partition, tier, staged, epoch).await?;
        tracing::debug!(partition = %partition.id, base = %bases.start, %end, uploaded.segments, "segments are in the bucket");
        Ok(uploaded)
    }

    pub(super) async fn commit(
        &self,
        partition: &Partition,
        tier: &PartitionTier,
        staged: Staged,
        epoch: LeaderEpoch,
    ) -> Result<(), UpkeepError> {
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
    ) -> Result<(), UpkeepError> {
        self.commit_after(partition, partition.committed().as_ref(), after, epoch).await
    }

    async fn commit_after(
        &self,
        partition: &Partition,
        before: Option<&TierState>,
        after: &TierState,
        epoch: LeaderEpoch,
    ) -> Result<(), UpkeepError> {
        let done = self.commits.commit(partition.id, epoch, before, after).await;
        if let Err(TierCommitError::Changed { .. }) = done
            && let Ok(Some(current)) = self.commits.current(partition.id).await
        {
            // Most likely an earlier attempt whose response was lost: the next attempt continues from there.
            partition.adopt(current).await;
        }
        done?;
        partition.adopt(after.clone()).await;
        Ok(())
    }
}

/// Waits for an upload. Fails if the object store is known to be unavailable, or becomes unavailable and stays so for a while.
async fn unless_away<T>(
    tier: &PartitionTier,
    upload: impl Future<Output = Result<T, UpkeepError>>,
) -> Result<T, UpkeepError> {
    tokio::select! {
        biased;
        // Polled first: nothing is exported during a known outage.
        error = tier.until_away_for(RETRY_WITHIN) => Err(UpkeepError::Upload(error.into())),
        done = upload => done,
    }
}

/// Uploads the segments that begin in `bases`, for one commit.
async fn stage(
    partition: &Partition,
    tier: &PartitionTier,
    bases: &Range<Offset>,
    local: &Local,
    epoch: LeaderEpoch,
) -> Result<(Staged, Uploaded), UpkeepError> {
    let began = clock::monotonic();
    let mut staging = tier.staging(epoch).await?;
    let mut uploaded = Uploaded::default();
    for info in local.sealed.iter().filter(|info| bases.contains(&info.base)) {
        if uploaded.segments > 0 && began.elapsed() > COMMIT_WITHIN {
            break;
        }
        match add(partition, &mut staging, info).await {
            Err(error) if uploaded.segments > 0 => {
                tracing::debug!(partition = %partition.id, base = %info.base, %error, "committing what is there already");
                break;
            }
            added => added?,
        }
        uploaded.segments += 1;
        uploaded.bytes += info.bytes;
    }
    Ok((staging.finish().await?, uploaded))
}

pub(super) async fn local(partition: &Partition) -> Result<Local, UpkeepError> {
    let (answer, local) = oneshot::channel();
    partition.command(Command::Local(answer)).await;
    local.await.map_err(|_| UpkeepError::Closed)
}

/// Uploads a segment, to be committed with the segments that were added before.
async fn add(partition: &Partition, staging: &mut Staging<'_>, info: &SegmentInfo) -> Result<(), UpkeepError> {
    let source = source(partition, info).await?;
    if mutant!(EvictBeforeCommit) {
        partition.command(Command::Evict(source.end())).await;
    }
    Ok(staging.add(&source).await?)
}

async fn source(partition: &Partition, info: &SegmentInfo) -> Result<SegmentSource, UpkeepError> {
    let (answer, export) = oneshot::channel();
    partition.command(Command::Export(info.base, answer)).await;
    let export = export.await.map_err(|_| UpkeepError::Closed)?;
    let export = export.map_err(|source| UpkeepError::Export { base: info.base, source })?;
    Ok(SegmentSource::new(export))
}

/// A plan, with the parts of the manifest that belong to it.
struct Planned {
    plan: Plan,
    /// Bytes of the object store's segments that lie wholly below the new log start.
    removed_bytes: u64,
    /// True if the manifest has yet to follow the log start. An error if the manifest could not be read: then the plan was made without
    /// it.
    manifest: Result<bool, UpkeepError>,
}

async fn plan(partition: &Partition, local: &Local, scope: Scope) -> Planned {
    let marks: Watermarks = partition.marks();
    let config = partition.config();
    let now_ms = clock::wall_ms();
    let read = match &partition.tier {
        Some(tier) if local.leads.is_some() && wants_tiered(&config) => tiered(tier, marks.log_start, now_ms).await,
        _ => Ok((Vec::new(), false)),
    };
    let (tiered, manifest) = match read {
        Ok((segments, lags)) => (segments, Ok(lags)),
        Err(error) => (Vec::new(), Err(error.into())),
    };
    let sealed: Vec<Segment> = local.sealed.iter().map(segment).collect();
    let input = retention::Input {
        config: &config,
        now_ms,
        log_start: marks.log_start,
        tiered_end: marks.tiered_end,
        high_watermark: marks.high_watermark,
        local: &sealed,
        active: segment(&local.active),
        active_age: local.active_age,
        tiered: &tiered,
        tiered_bytes: partition.tiered_bytes(),
        uploads: config.tiered && partition.tier.is_some() && local.leads.is_some_and(|(_, settled)| settled),
        leads: local.leads.is_some(),
        // A segment that is sealed but not uploaded at once would hold no more than one waiting append.
        hurry: local.awaits_tier && scope == Scope::All,
    };
    partition.shared.set_future_segments(if input.leads { retention::in_future(&input) } else { 0 });
    let plan = retention::plan(&input);
    let removed_bytes = plan.log_start.map_or(0, |start| retention::removed_bytes(&input, start));
    Planned { removed_bytes, plan, manifest }
}

/// Returns the object store's first segments from `log_start` on, and true if the manifest lists others before them.
async fn tiered(tier: &PartitionTier, log_start: Offset, now_ms: i64) -> Result<(Vec<Segment>, bool), ReadError> {
    let lags = tier.manifest_lags().await?;
    let lines = tier.segments(log_start, TIERED_PER_PLAN).await?;
    let mut segments: Vec<Segment> = lines
        .iter()
        .map(|line| Segment {
            base: line.stamp.base,
            end: line.stamp.end,
            bytes: line.data_bytes,
            max_timestamp_ms: line.max_timestamp_ms,
            written_ms: if (1..=now_ms).contains(&line.created_ms) { line.created_ms } else { i64::MAX },
        })
        .collect();
    // If the manifest has no time of a segment's creation, or one in the future, the object has one. Only the first segment is looked up:
    // retention stops there until that segment is deleted.
    if let (Some(first), Some(line)) = (segments.first_mut(), lines.first())
        && first.written_ms == i64::MAX
        && !(0..=now_ms).contains(&first.max_timestamp_ms)
    {
        match tier.modified_ms(line).await {
            Ok(modified_ms) => first.written_ms = modified_ms,
            Err(ReadError::Store(error @ tier::StoreError::Unavailable { .. })) => return Err(ReadError::Store(error)),
            // The age is unknown: the segment stays, and uploads continue.
            Err(error) => tracing::debug!(partition = %tier.id(), %error, "the time of an object is not known"),
        }
    }
    Ok((segments, lags))
}

/// Returns true if the plan depends on the object store's segments: without limits on the whole log it does not.
fn wants_tiered(config: &crate::model::TopicConfig) -> bool {
    config.retention.is_some() || config.retention_bytes.is_some()
}

fn segment(info: &SegmentInfo) -> Segment {
    Segment {
        base: info.base,
        end: info.end,
        bytes: info.bytes,
        max_timestamp_ms: info.max_timestamp,
        written_ms: info.written_ms,
    }
}
