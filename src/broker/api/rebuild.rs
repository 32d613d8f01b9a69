//! `RebuildManifest`: an operator has a lost manifest built again from the objects that exist. Any broker with an
//! object store serves the request, because the commit is a compare-and-set that requires the current leader epoch.

use std::sync::Arc;

use super::{errors::invalid_request, topics::parse_topic_name};
use crate::{
    broker::node_context::NodeContext,
    cluster::{PartitionUpdater, TierCommitError, TierCommits, UnknownTopic},
    model::{Offset, PartitionId},
    proto::{
        error::{ApiError, ErrorCode},
        v1,
    },
    tier::{BindingError, PartitionTier, Survey, TierReadError, TierStoreError, UploadError},
};

/// Handler of manifest rebuilds.
pub(super) struct ManifestRebuilder {
    ctx: NodeContext,
    commits: TierCommits,
    updater: PartitionUpdater,
}

impl ManifestRebuilder {
    pub(super) fn new(ctx: NodeContext, commits: TierCommits) -> Self {
        let updater = PartitionUpdater::new(Arc::clone(&ctx.store), ctx.keys.clone());
        Self { ctx, commits, updater }
    }

    /// Surveys the objects of a partition whose manifest is lost, and returns a plan of the new manifest. If the
    /// request contains the id of exactly this plan, also commits the new manifest. Rejects a request with another
    /// plan, and a request for a partition whose manifest exists.
    pub(super) async fn rebuild_manifest(
        &self,
        request: v1::RebuildManifestRequest,
    ) -> Result<v1::RebuildManifestResponse, ApiError> {
        let topic = parse_topic_name(&request.topic)?;
        let number = u32::try_from(request.partition)
            .map_err(|_| invalid_request(format!("partition {} is negative: use 0 or more", request.partition)))?;
        let state = self.ctx.metadata.state();
        let Some(stored) = state.topic(&topic) else { return Err(UnknownTopic::new(&request.topic).into()) };
        if number >= stored.value.partitions {
            let count = stored.value.partitions;
            let message = format!("topic {topic} has no partition {number}: it has {count}, numbered from 0");
            return Err(ApiError::new(ErrorCode::UnknownPartition, message));
        }
        let id = PartitionId::new(stored.value.id, number);
        drop(state);
        let failed_precondition = |message: String| ApiError::new(ErrorCode::FailedPrecondition, message);
        let Some(objects) = &self.ctx.tier else {
            let message = "this broker has no object store: send the request to a broker with one";
            return Err(failed_precondition(message.to_owned()));
        };
        let committed = self.commits.current(id).await.map_err(commit_error)?;
        let Some(committed) = committed else { return Err(partition_being_deleted_error()) };
        let tier = PartitionTier::new(objects.store.clone(), objects.cache.clone(), id, committed);
        let lost = match tier.check_manifest().await {
            Ok(()) => {
                let message = format!("the manifest of {topic}/{number} exists: there is nothing to rebuild");
                return Err(failed_precondition(message));
            }
            Err(error) => match error.lost_manifest() {
                Some(object) => object.to_owned(),
                None => return Err(read_error(&error)),
            },
        };
        let survey = tier.survey().await.map_err(|error| upload_error(&error))?;
        let plan_id = plan_id(&survey);
        let is_confirmed = request.plan.is_some();
        if request.plan.is_some_and(|confirmed| confirmed != plan_id) {
            return Err(ApiError::new(
                ErrorCode::Conflict,
                "the objects of the partition changed since the plan was shown: request a new plan",
            ));
        }
        if is_confirmed {
            self.commit_rebuilt(&tier, &survey).await?;
        }
        Ok(response(survey, lost, plan_id, is_confirmed))
    }

    /// Writes the manifest of the surveyed objects to the object store, and commits it in the partition's current
    /// leader epoch. Fails with `CONFLICT` if the tier state or the leader epoch changes before the commit.
    async fn commit_rebuilt(&self, tier: &PartitionTier, survey: &Survey) -> Result<(), ApiError> {
        let id = tier.id();
        let Some((value, _)) = self.updater.read_back(id).await? else { return Err(partition_being_deleted_error()) };
        let staged = tier.stage_rebuilt(&survey.chain, survey.log_start, value.leader_epoch).await;
        let staged = staged.map_err(|error| upload_error(&error))?;
        let (before, after) = (staged.replaces().clone(), staged.state().clone());
        self.commits.commit(id, value.leader_epoch, Some(&before), &after).await.map_err(commit_error)?;
        tracing::warn!(
            partition = %id, segments = survey.chain.len(), log_start = %after.log_start, obstacle = survey.obstacle(),
            "rebuilt a lost manifest on request of an operator"
        );
        Ok(())
    }
}

/// Returns the identifier of the plan that follows from a survey. A survey with other objects gives another identifier,
/// so an operator confirms only the displayed plan.
fn plan_id(survey: &Survey) -> String {
    let mut attempts = Vec::with_capacity(survey.chain.len() * 16);
    survey.chain.iter().for_each(|entry| attempts.extend_from_slice(entry.stamp.attempt.as_bytes()));
    format!("{}-{}-{:08x}", survey.state.version(), survey.log_start, crc32c::crc32c(&attempts))
}

/// Returns the response with the result of a survey. `lost` is the name of the lost manifest object or page, and `plan`
/// the identifier of this result. `committed` is true if the manifest was rebuilt. Each entry of `unusable` is an error
/// text that names its object.
fn response(survey: Survey, lost: String, plan: String, committed: bool) -> v1::RebuildManifestResponse {
    let range = |(from, to): &(Offset, Offset)| v1::OffsetRange { start: from.as_i64(), end: to.as_i64() };
    v1::RebuildManifestResponse {
        lost,
        log_start: survey.state.log_start.as_i64(),
        tiered_end: survey.state.tiered_end.as_i64(),
        committed_bytes: survey.state.bytes,
        new_log_start: survey.log_start.max(survey.state.log_start).as_i64(),
        segments: u32::try_from(survey.chain.len()).unwrap_or(u32::MAX),
        bytes: survey.bytes(),
        obstacle: survey.obstacle().unwrap_or_default(),
        missing: survey.missing.iter().map(range).collect(),
        unused: u32::try_from(survey.unused).unwrap_or(u32::MAX),
        unusable: survey.unusable.into_iter().map(|(_, reason)| reason).collect(),
        plan,
        committed,
    }
}

fn partition_being_deleted_error() -> ApiError {
    ApiError::new(ErrorCode::Conflict, "the partition is being deleted: its manifest cannot be rebuilt")
}

/// Converts the error of reading or committing the tier state.
fn commit_error(error: TierCommitError) -> ApiError {
    match error {
        TierCommitError::Store(error) => error.into(),
        TierCommitError::Deposed { .. } => ApiError::new(
            ErrorCode::Conflict,
            "the partition got another leader during the rebuild: run `strandline partition rebuild-manifest` again",
        ),
        TierCommitError::Changed { .. } => ApiError::new(
            ErrorCode::Conflict,
            "the metadata of the partition changed during the rebuild, or its topic was deleted: run `strandline \
             partition rebuild-manifest` again",
        ),
        TierCommitError::Invalid(error) => ApiError::new(ErrorCode::Conflict, error.to_string()),
    }
}

/// Converts the error of a check that could not determine whether the manifest is lost.
fn read_error(error: &TierReadError) -> ApiError {
    ApiError::new(ErrorCode::ObjectStoreUnavailable, error.to_string())
}

/// Converts the error of a survey, or of writing the new manifest.
fn upload_error(error: &UploadError) -> ApiError {
    let code = match error {
        UploadError::Deposed { .. } => ErrorCode::Conflict,
        UploadError::Store(TierStoreError::Denied { .. }) | UploadError::Binding(BindingError::Foreign { .. }) => {
            ErrorCode::FailedPrecondition
        }
        // `Source` is the error of a local segment file, which a rebuild does not read.
        UploadError::Source(_)
        | UploadError::Binding(_)
        | UploadError::Store(_)
        | UploadError::Mismatch { .. }
        | UploadError::Manifest(_) => ErrorCode::ObjectStoreUnavailable,
    };
    ApiError::new(code, error.to_string())
}
