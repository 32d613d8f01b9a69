//! Upkeep of one partition: carry out what [`retention`] plans, one step at a time.
//!
//! The order is what makes a crash harmless: object, manifest, commit in the metadata store, and only then the local
//! files. A crash between any two leaves an object that nobody names, or files below the log start, and the next try begins
//! anew: every step is planned from what is there.
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
    tier::{self, PartitionTier, SegmentSource, Staged, Staging, TierState},
};

/// How many segments of the bucket one plan looks at.
const TIERED_PER_PLAN: usize = 256;

/// How long what has been uploaded waits for what is uploaded after it, to be committed with it: `acks=tiered` waits for the commit.
const COMMIT_WITHIN: Duration = Duration::from_secs(1);

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
        use tier::{ClaimError, ReadError, StoreError, UploadError};
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

/// What one step did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    /// There may be more to do at once.
    pub more: bool,
    /// It sealed a segment and came to nothing else: whatever failed before was not tried.
    pub only_sealed: bool,
    /// What was uploaded and committed.
    pub uploaded: Uploaded,
}

/// Segments that were uploaded and committed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Uploaded {
    /// How many.
    pub segments: u64,
    /// Bytes of their batches on the disk.
    pub bytes: u64,
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

    /// Plans and carries out one step. A manifest that was found to be lost, by this step or by a reader, is made again first.
    pub async fn step(&self, partition: &Partition) -> Result<Step, UpkeepError> {
        let outcome = self.planned_step(partition).await;
        let lost = partition.tier.as_ref().and_then(|tier| Some((tier, tier.lost_manifest()?)));
        let Some((tier, object)) = lost else { return outcome };
        // What does not need the manifest was done.
        self.rebuild(partition, tier, &object).await?;
        match outcome {
            Err(UpkeepError::Manifest(_) | UpkeepError::Upload(tier::UploadError::Manifest(_))) => {
                Ok(Step { more: true, only_sealed: true, uploaded: Uploaded::default() })
            }
            other => other,
        }
    }

    async fn planned_step(&self, partition: &Partition) -> Result<Step, UpkeepError> {
        let local = local(partition).await?;
        let plan = plan(partition, &local).await?;
        // What is committed is committed in the epoch that the plan was made in: who is deposed meanwhile is refused.
        let epoch = local.leads.map(|(epoch, _)| epoch).unwrap_or_default();
        if plan.seal {
            partition.command(Command::Seal).await;
            // Where nothing can be written the segment stays open, and is looked at again in time.
            let more = partition.fault().is_none();
            return Ok(Step { more, only_sealed: true, uploaded: Uploaded::default() });
        }
        if let Some(start) = plan.log_start {
            self.move_log_start(partition, start, epoch).await?;
        }
        let mut uploaded = Uploaded::default();
        if plan.upload.is_some() {
            self.commits.accepts(partition.id).await?;
        }
        if let (Some(bases), Some(tier)) = (&plan.upload, &partition.tier) {
            uploaded = self.upload(partition, tier, bases, &local, epoch).await?;
        }
        if let Some(below) = plan.evict_below {
            partition.command(Command::Evict(below)).await;
        }
        let more = plan.upload.is_some() || plan.log_start.is_some();
        Ok(Step { more, only_sealed: false, uploaded })
    }

    async fn move_log_start(
        &self,
        partition: &Partition,
        start: Offset,
        epoch: LeaderEpoch,
    ) -> Result<(), UpkeepError> {
        match &partition.tier {
            Some(tier) => {
                let staged = tier.stage_trim(start, epoch).await?;
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
        let staged = staging.finish().await?;
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

async fn plan(partition: &Partition, local: &Local) -> Result<Plan, UpkeepError> {
    let marks: Watermarks = partition.marks();
    let config = partition.config();
    let tiered = match &partition.tier {
        Some(tier) if local.leads.is_some() && wants_tiered(&config) => {
            tier.segments(marks.log_start, TIERED_PER_PLAN).await?
        }
        _ => Vec::new(),
    };
    let tiered: Vec<Segment> = tiered
        .iter()
        .map(|segment| Segment {
            base: segment.stamp.base,
            end: segment.stamp.end,
            bytes: segment.data_bytes,
            youngest_ms: youngest(segment.max_timestamp_ms, segment.created_ms),
            written_ms: segment.created_ms,
        })
        .collect();
    let sealed: Vec<Segment> = local.sealed.iter().map(segment).collect();
    Ok(retention::plan(&retention::Input {
        config: &config,
        now_ms: clock::wall_ms(),
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
        hurry: local.awaits_tier,
    }))
}

/// Whether the plan depends on what the bucket holds: without limits on the whole log it does not.
fn wants_tiered(config: &crate::model::TopicConfig) -> bool {
    config.retention.is_some() || config.retention_bytes.is_some()
}

fn segment(info: &SegmentInfo) -> Segment {
    let youngest_ms = youngest(info.max_timestamp, info.written_ms);
    Segment { base: info.base, end: info.end, bytes: info.bytes, youngest_ms, written_ms: info.written_ms }
}

/// What a segment's age counts from, on the disk and in the bucket. One of which nothing is known is as young as can be.
fn youngest(max_timestamp: i64, written_ms: i64) -> i64 {
    match (max_timestamp, written_ms) {
        (0.., _) => max_timestamp,
        (_, 1..) => written_ms,
        _ => i64::MAX,
    }
}
