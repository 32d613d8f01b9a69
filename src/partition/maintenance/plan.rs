//! Inputs of a retention plan: the segments of both tiers and the watermarks. [`retention`] makes the plan.

use super::{MaintenanceError, StepScope};
use crate::{
    log::SegmentInfo,
    model::{Offset, TopicConfig},
    partition::{
        handle::Partition,
        retention::{self, RetentionPlan, RetentionSegment},
        role::LocalSegments,
    },
    task::clock,
    tier::{PartitionTier, TierReadError, TierStoreError},
};

/// Maximum number of segments in the object store that one plan reads from the manifest.
const MAX_TIERED_SEGMENTS_PER_PLAN: usize = 256;

/// A retention plan, and its effects on the manifest.
pub(super) struct MaintenancePlan {
    pub(super) retention: RetentionPlan,
    /// Bytes of the object store's segments that lie wholly below the planned log start; 0 if the log start stays.
    pub(super) removed_bytes: u64,
    /// True if the manifest still lists or counts segments below the log start. False also if the plan did not need the
    /// manifest. An error if the manifest, or the modification time of an object, could not be read. The plan was then
    /// made without the object store's segments.
    pub(super) manifest_lags: Result<bool, MaintenanceError>,
}

/// Plans a step from the state of both tiers: `local` describes the segments on the disk, and the manifest those in the
/// object store. Also publishes the number of segments with timestamps in the future; 0 on a follower.
pub(super) async fn plan_step(partition: &Partition, local: &LocalSegments, scope: StepScope) -> MaintenancePlan {
    let watermarks = partition.watermarks();
    let config = partition.config();
    let now_ms = clock::wall_ms();
    let manifest = match &partition.tier {
        Some(tier) if local.leads.is_some() && needs_tiered_segments(&config) => {
            read_manifest(tier, watermarks.log_start, now_ms).await
        }
        // There is no object store, or its segments are not needed. A follower does not move the log start, and neither
        // does a leader without limits on the whole log.
        _ => Ok((Vec::new(), false)),
    };
    let (tiered, manifest_lags) = match manifest {
        Ok((segments, lags)) => (segments, Ok(lags)),
        Err(error) => (Vec::new(), Err(error.into())),
    };
    let sealed: Vec<RetentionSegment> = local.sealed.iter().map(retention_segment).collect();
    let input = retention::RetentionInput {
        config: &config,
        now_ms,
        log_start: watermarks.log_start,
        tiered_end: watermarks.tiered_end,
        high_watermark: watermarks.high_watermark,
        local: &sealed,
        active: retention_segment(&local.active),
        active_age: local.active_age,
        tiered: &tiered,
        tiered_bytes: partition.tiered_bytes(),
        uploads: config.tiered
            && partition.tier.is_some()
            && local.leads.is_some_and(|(_, epoch_committed)| epoch_committed),
        leads: local.leads.is_some(),
        // A step without uploads does not roll for a waiting append. Otherwise each append that waits for the object
        // store would get a segment of its own.
        urgent: local.awaits_tier && scope == StepScope::All,
    };
    partition.published.set_future_segments(if input.leads { retention::count_future_segments(&input) } else { 0 });
    let retention = retention::plan(&input);
    let removed_bytes = retention.log_start.map_or(0, |start| retention::removed_bytes(&input, start));
    MaintenancePlan { retention, removed_bytes, manifest_lags }
}

/// Reads the manifest. Returns its first segments from `log_start` on, and true if it still lists or counts segments
/// below the log start.
async fn read_manifest(
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
    // The age of a segment without a usable record timestamp counts from the time in its manifest entry (`created_ms`).
    // If the entry has no time, or one in the future, the modification time of the object is used. Only the first
    // segment is looked up: retention stops at that segment until it is deleted.
    if let (Some(first), Some(entry)) = (segments.first_mut(), entries.first())
        && first.written_ms == i64::MAX
        && !(0..=now_ms).contains(&first.max_timestamp_ms)
    {
        match tier.modified_ms(entry).await {
            Ok(modified_ms) => first.written_ms = modified_ms,
            Err(TierReadError::Store(error @ TierStoreError::Unavailable { .. })) => {
                return Err(TierReadError::Store(error));
            }
            // The age is unknown: the segment does not expire by time, and uploads continue.
            Err(error) => tracing::debug!(
                partition = %tier.id(), %error,
                "cannot read the modification time of an object"
            ),
        }
    }
    Ok((segments, lags))
}

/// Returns true if the plan depends on the object store's segments. It does if the whole log has a limit by age or
/// size.
fn needs_tiered_segments(config: &TopicConfig) -> bool {
    config.retention.is_some() || config.retention_bytes.is_some()
}

fn retention_segment(info: &SegmentInfo) -> RetentionSegment {
    RetentionSegment {
        base: info.base,
        end: info.end,
        bytes: info.bytes,
        max_timestamp_ms: info.max_timestamp,
        written_ms: info.written_ms,
    }
}
