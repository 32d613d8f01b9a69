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

/// Maximum number of segments in the object store that one plan reads.
const MAX_TIERED_SEGMENTS_PER_PLAN: usize = 256;

/// A plan, with the parts of the manifest that belong to it.
pub(super) struct MaintenancePlan {
    pub(super) plan: RetentionPlan,
    /// Bytes of the object store's segments that lie wholly below the new log start.
    pub(super) removed_bytes: u64,
    /// True if the manifest has yet to follow the log start. An error if the manifest could not be read: then the plan
    /// was made without it.
    pub(super) manifest: Result<bool, MaintenanceError>,
}

/// Plans a step from the state of both tiers.
pub(super) async fn plan(partition: &Partition, local: &LocalSegments, scope: StepScope) -> MaintenancePlan {
    let watermarks = partition.watermarks();
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
        urgent: local.awaits_tier && scope == StepScope::All,
    };
    partition.published.set_future_segments(if input.leads { retention::in_future(&input) } else { 0 });
    let plan = retention::plan(&input);
    let removed_bytes = plan.log_start.map_or(0, |start| retention::removed_bytes(&input, start));
    MaintenancePlan { removed_bytes, plan, manifest }
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
            Err(TierReadError::Store(error @ TierStoreError::Unavailable { .. })) => {
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
fn wants_tiered(config: &TopicConfig) -> bool {
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
