//! Upkeep of one partition: carry out what [`retention`] plans, one step at a time.
//!
//! The order is what makes a crash harmless: object, manifest, commit in the metadata store, and only then the local
//! files. A crash between any two leaves an object that nobody names, or files below the log start, and the next try begins
//! anew: every step is planned from what is there.
//!
//! The log start moves in the metadata store first, which asks nothing of the bucket; then what lies below it leaves the disk, and the
//! manifest follows. Uploads come last, and a step that cannot upload ends: so a bucket that is away keeps nothing on the disk that
//! nobody may read.
//!
//! An upload may take long, and one that the store does not take goes on until its retries are used up. So a step may leave uploads out:
//! retention of all partitions is carried out by workers of its own, which never wait for one.
//!
//! Only the leader uploads and moves the log start. A follower seals by age, and lets go what its leader committed to the bucket.

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

/// How many segments of the bucket one plan looks at.
const TIERED_PER_PLAN: usize = 256;

/// How long what has been uploaded waits for what is uploaded after it, to be committed with it: `acks=tiered` waits for the commit.
const COMMIT_WITHIN: Duration = Duration::from_secs(1);

/// How long an upload is tried on once the store is known to be away, before the partition is planned again.
const RETRY_WITHIN: Duration = Duration::from_secs(2);

/// What the partition's task says of its segments.
pub(super) struct Local {
    pub(super) sealed: Vec<SegmentInfo>,
    pub(super) active: SegmentInfo,
    /// How long ago the active segment took its first batch; `None` while it is empty.
    pub(super) active_age: Option<Duration>,
    pub(super) awaits_tier: bool,
    /// The epoch in which it leads, and whether it is settled; `None` while it does not lead.
    pub(super) leads: Option<(LeaderEpoch, bool)>,
}

/// Why a step failed. All of them are tried again.
#[derive(Debug, thiserror::Error)]
pub enum UpkeepError {
    /// The partition's task has ended.
    #[error("the partition is closed")]
    Closed,
    /// The segment could not be read for its upload.
    #[error("the segment at {base} cannot be uploaded: {source}")]
    Export {
        /// Its first offset.
        base: Offset,
        /// Why.
        source: std::io::Error,
    },
    /// The object store did not take the segment or the manifest.
    #[error("the upload failed: {0}")]
    Upload(#[from] tier::UploadError),
    /// The manifest could not be read.
    #[error("the manifest cannot be read: {0}")]
    Manifest(#[from] tier::ReadError),
    /// The manifest is gone, and what is left in the bucket is not what was committed.
    #[error(
        "{object} is missing or damaged, and cannot be made again without a person: {why}; `strandline partition rebuild-manifest {partition}` \
         shows what is left"
    )]
    ManifestLost {
        /// The manifest, or a page of it.
        object: String,
        /// The partition, as `topic/number`.
        partition: String,
        /// What does not fit.
        why: String,
    },
    /// The metadata store did not take the commit.
    #[error("the commit failed: {0}")]
    Commit(#[from] TierCommitError),
}

impl UpkeepError {
    /// Whether the object store or the metadata store does not answer. That is said where it is noticed, once for all partitions.
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

/// The work of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Scope {
    All,
    WithoutUploads,
}

/// The result of one step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Step {
    /// There may be more to do at once.
    pub more: bool,
    /// It did only the first of what there is to do: whatever failed before may not have been tried.
    pub is_partial: bool,
    /// It left out what is to be uploaded.
    pub is_upload_due: bool,
    /// What was uploaded and committed.
    pub uploaded: Uploaded,
}

impl Step {
    /// Of what there is to do the first is done, and the rest follows at once.
    const BEGUN: Self = Self { more: true, is_partial: true, is_upload_due: false, uploaded: Uploaded::NONE };
    /// All is done but uploads.
    const UPLOAD_DUE: Self = Self { more: false, is_upload_due: true, ..Self::BEGUN };
}

/// Segments that were uploaded and committed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Uploaded {
    /// How many.
    pub segments: u64,
    /// Bytes of their batches on the disk.
    pub bytes: u64,
}

impl Uploaded {
    const NONE: Self = Self { segments: 0, bytes: 0 };
}

/// Carries out upkeep, for all partitions of a broker.
#[derive(Clone)]
pub struct Upkeep {
    commits: TierCommits,
    pub(super) rebuilds: Rebuilds,
    retry: Duration,
}

impl Upkeep {
    /// Upkeep that commits through `commits`.
    pub fn new(commits: TierCommits) -> Self {
        Self { commits, rebuilds: Rebuilds::default(), retry: Duration::from_millis(500) }
    }

    /// How long to wait before the try after `failures` failures in a row.
    pub fn delay(&self, failures: u32) -> Duration {
        // At most 8 s: when the bucket is back, acks=tiered and a full disk wait for the next try.
        let doubled = self.retry * 2u32.saturating_pow(failures.min(4));
        doubled.mul_f64(random::in_range(0.5..1.0))
    }

    /// Plans and carries out one step of everything but what is uploaded. Where another step of this partition is under way, that one does it.
    pub async fn step_without_uploads(&self, partition: &Partition) -> Result<Step, UpkeepError> {
        match partition.upkeep.try_lock() {
            Ok(_turn) => self.step_of(partition, Scope::WithoutUploads).await,
            Err(_busy) => Ok(Step::UPLOAD_DUE),
        }
    }

    /// Plans and carries out one step. A manifest that was found to be lost, by this step or by a reader, is made again first.
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
        // What does not need the manifest was done.
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
                // Where nothing can be written the segment stays open, and is looked at again in time.
                return Ok(Step { more: false, ..Step::BEGUN });
            }
            // Under load the next segment may be due already: what is sealed goes on all the same.
            local = self::local(partition).await?;
            planned = plan(partition, &local, scope).await;
        }
        let Planned { plan, removed_bytes, manifest } = planned;
        // What is committed is committed in the epoch that the plan was made in: who is deposed meanwhile is refused.
        let epoch = local.leads.map(|(epoch, _)| epoch).unwrap_or_default();
        let moved = match plan.log_start {
            Some(start) => self.move_log_start(partition, start, removed_bytes, epoch).await,
            None => Ok(()),
        };
        if let Some(below) = plan.evict_below {
            let marks = partition.marks();
            // Where the log start could not move, what lies below the committed one goes all the same.
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

    /// Moves it in the metadata store. `removed_bytes` are those of the bucket's segments that lie wholly below it.
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

    /// Uploads the segments that begin in `bases` and commits them at once: fewer of them where that takes long, or where one after the
    /// first fails, which the next step then meets as its first.
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
        // Not what is known by now: what was committed meanwhile is not in the manifest that was staged.
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
            // An earlier try whose answer was lost, most likely: the next try goes on from there.
            partition.adopt(current).await;
        }
        done?;
        partition.adopt(after.clone()).await;
        Ok(())
    }
}

/// Waits for an upload, unless it is known that the store is away, or becomes known and stays so for a while.
async fn unless_away<T>(
    tier: &PartitionTier,
    upload: impl Future<Output = Result<T, UpkeepError>>,
) -> Result<T, UpkeepError> {
    tokio::select! {
        biased;
        // First: nothing is exported while that is known.
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

/// Uploads a segment, to be committed with what was added before.
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

/// A plan, and what the manifest says that belongs to it.
struct Planned {
    plan: Plan,
    /// Bytes of the bucket's segments that lie wholly below the new log start.
    removed_bytes: u64,
    /// Whether the manifest has still to follow the log start; or why it could not be read, and the plan was made without it.
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
        // A segment that is sealed and not uploaded at once would hold no more than one append that waits.
        hurry: local.awaits_tier && scope == Scope::All,
    };
    partition.shared.set_future_segments(if input.leads { retention::in_future(&input) } else { 0 });
    let plan = retention::plan(&input);
    let removed_bytes = plan.log_start.map_or(0, |start| retention::removed_bytes(&input, start));
    Planned { removed_bytes, plan, manifest }
}

/// The bucket's first segments from `log_start` on, and whether the manifest lists others before them.
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
    // Where the manifest does not say when a segment was made, or says that it will be, its object does. Only the first is asked for:
    // retention stops there until that one goes.
    if let (Some(first), Some(line)) = (segments.first_mut(), lines.first())
        && first.written_ms == i64::MAX
        && !(0..=now_ms).contains(&first.max_timestamp_ms)
    {
        match tier.modified_ms(line).await {
            Ok(modified_ms) => first.written_ms = modified_ms,
            Err(ReadError::Store(error @ tier::StoreError::Unavailable { .. })) => return Err(ReadError::Store(error)),
            // Its age is not known: it stays, and uploads go on.
            Err(error) => tracing::debug!(partition = %tier.id(), %error, "the time of an object is not known"),
        }
    }
    Ok((segments, lags))
}

/// Whether the plan depends on what the bucket holds: without limits on the whole log it does not.
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
