//! `RebuildManifest`: an operator decides about a lost manifest. Any broker serves the request, because the commit is a compare-and-set in
//! the leader's epoch.

use super::{Broker, admin::name, faults::invalid};
use crate::{
    cluster::TierCommitError,
    model::{Offset, PartitionId},
    proto::{
        error::{ApiError, ErrorCode},
        v1,
    },
    tier::{ClaimError, PartitionTier, ReadError, StoreError, Survey, UploadError},
};

impl Broker {
    pub(super) async fn rebuild_manifest(
        &self,
        request: v1::RebuildManifestRequest,
    ) -> Result<v1::RebuildManifestResponse, ApiError> {
        let topic = name(&request.topic)?;
        let number = u32::try_from(request.partition).map_err(|_| invalid("the partition is negative"))?;
        let state = self.view.state();
        let Some(known) = state.topic(&topic) else { return Err(self.topics.unknown(&request.topic).into()) };
        if number >= known.value.partitions {
            let message = format!("topic {topic} has {} partitions, numbered from 0", known.value.partitions);
            return Err(ApiError::new(ErrorCode::UnknownPartition, message));
        }
        let id = PartitionId::new(known.value.id, number);
        drop(state);
        let impossible = |message: String| ApiError::new(ErrorCode::NotPossible, message);
        let Some(objects) = &self.tier else { return Err(impossible("this broker has no object store".to_owned())) };
        let committed = self.commits.current(id).await.map_err(commit_fault)?;
        let Some(committed) = committed else {
            return Err(ApiError::new(ErrorCode::Conflict, "the partition is being deleted"));
        };
        let tier = PartitionTier::new(objects.store.clone(), objects.cache.clone(), id, committed);
        let lost = match tier.check_manifest().await {
            Ok(()) => {
                return Err(impossible(format!("the manifest of {topic}/{number} is there: nothing is to be rebuilt")));
            }
            Err(error) => match error.lost_manifest() {
                Some(object) => object.to_owned(),
                None => return Err(read_fault(&error)),
            },
        };
        let survey = tier.survey().await.map_err(|error| upload_fault(&error))?;
        let plan = plan(&survey);
        let commits = request.plan.is_some();
        if request.plan.is_some_and(|agreed| agreed != plan) {
            return Err(ApiError::new(
                ErrorCode::Conflict,
                "what is in the bucket has changed since it was shown: look again",
            ));
        }
        if commits {
            self.commit_rebuilt(&tier, &survey).await?;
        }
        Ok(answer(survey, lost, plan, commits))
    }

    async fn commit_rebuilt(&self, tier: &PartitionTier, survey: &Survey) -> Result<(), ApiError> {
        let id = tier.id();
        let Some((value, _)) = self.changes.read_back(id).await? else {
            return Err(ApiError::new(ErrorCode::Conflict, "the partition is being deleted"));
        };
        let staged = tier.stage_rebuilt(&survey.chain, survey.log_start, value.leader_epoch).await;
        let staged = staged.map_err(|error| upload_fault(&error))?;
        let (before, after) = (staged.replaces().clone(), staged.state().clone());
        self.commits.commit(id, value.leader_epoch, Some(&before), &after).await.map_err(commit_fault)?;
        tracing::warn!(
            partition = %id, segments = survey.chain.len(), log_start = %after.log_start, doubt = survey.doubt(),
            "a lost manifest was made again by order"
        );
        Ok(())
    }
}

/// Returns an identifier of exactly this survey result, so that the operator's consent covers the displayed plan and no other.
fn plan(survey: &Survey) -> String {
    let mut attempts = Vec::with_capacity(survey.chain.len() * 16);
    survey.chain.iter().for_each(|line| attempts.extend_from_slice(line.stamp.attempt.as_bytes()));
    format!("{}-{}-{:08x}", survey.state.version(), survey.log_start, crc32c::crc32c(&attempts))
}

fn answer(survey: Survey, lost: String, plan: String, committed: bool) -> v1::RebuildManifestResponse {
    let range = |(from, to): &(Offset, Offset)| v1::OffsetRange { from: from.as_i64(), to: to.as_i64() };
    v1::RebuildManifestResponse {
        lost,
        log_start: survey.state.log_start.as_i64(),
        tiered_end: survey.state.tiered_end.as_i64(),
        committed_bytes: survey.state.bytes,
        new_log_start: survey.log_start.max(survey.state.log_start).as_i64(),
        segments: u32::try_from(survey.chain.len()).unwrap_or(u32::MAX),
        bytes: survey.bytes(),
        doubt: survey.doubt().unwrap_or_default(),
        missing: survey.missing.iter().map(range).collect(),
        left_over: u32::try_from(survey.left_over).unwrap_or(u32::MAX),
        unusable: survey.unusable.into_iter().map(|(_, why)| why).collect(),
        plan,
        committed,
    }
}

fn commit_fault(error: TierCommitError) -> ApiError {
    match error {
        TierCommitError::Store(error) => error.into(),
        other => ApiError::new(ErrorCode::Conflict, other.to_string()),
    }
}

fn read_fault(error: &ReadError) -> ApiError {
    ApiError::new(ErrorCode::ObjectStoreUnavailable, error.to_string())
}

fn upload_fault(error: &UploadError) -> ApiError {
    let reason = match error {
        UploadError::Deposed { .. } => ErrorCode::Conflict,
        UploadError::Store(StoreError::Denied { .. }) | UploadError::Claim(ClaimError::Foreign { .. }) => {
            ErrorCode::NotPossible
        }
        _ => ErrorCode::ObjectStoreUnavailable,
    };
    ApiError::new(reason, error.to_string())
}
