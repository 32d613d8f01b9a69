//! Rebuilding the manifest of a partition after the manifest was lost from the object store.

use std::ops::Range;

use super::{Admin, offset};
use crate::{connection::admin_client, error::CallError, model::Offset, proto::v1};

/// Remains of a partition in the object store, and the manifest that they allow.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ManifestRebuild {
    /// Name of the missing or corrupt object: the manifest or a manifest page.
    pub lost: String,
    /// Range of all offsets in the object store, as of the last tier commit.
    pub range: Range<Offset>,
    /// Bytes of all batches in the object store, as of the last tier commit.
    pub committed_bytes: u64,
    /// Log start after the rebuild, which keeps only the remaining segments.
    pub log_start: Offset,
    /// Number of remaining segments: segment objects that cover the offsets up to the tiered end without a gap.
    pub segments: u32,
    /// Bytes of batches in the remaining segments.
    pub bytes: u64,
    /// Reason for which the remains cannot be verified against the committed state; `None` if they match.
    pub obstacle: Option<String>,
    /// Parts of `range` that no usable segment object covers.
    pub missing: Vec<Range<Offset>>,
    /// Errors of the objects that cannot be used. Each text names its object.
    pub unusable: Vec<String>,
    /// Number of usable segment objects that the rebuild leaves out.
    pub unused: u32,
    /// Identifier of this survey's result, which [`Admin::rebuild_manifest`] repeats.
    pub plan: String,
    /// True if the manifest was rebuilt.
    pub committed: bool,
}

impl Admin {
    /// Determines what remains of a partition whose manifest is lost. Changes nothing.
    ///
    /// # Errors
    /// - The manifest exists.
    /// - The topic or partition is unknown.
    /// - The broker has no object store.
    /// - No broker responds.
    /// - The object store or the metadata store does not respond.
    pub async fn survey_manifest(&self, topic: &str, partition: u32) -> Result<ManifestRebuild, CallError> {
        self.rebuild(topic, partition, None).await
    }

    /// Rebuilds a lost manifest exactly as [`Admin::survey_manifest`] described it in `survey`.
    ///
    /// # Errors
    /// See [`Admin::survey_manifest`]; also, the remains have changed since the survey.
    pub async fn rebuild_manifest(
        &self,
        topic: &str,
        partition: u32,
        survey: &ManifestRebuild,
    ) -> Result<ManifestRebuild, CallError> {
        self.rebuild(topic, partition, Some(survey.plan.clone())).await
    }

    /// Sends the request: a survey if `plan` is `None`, else the rebuild that the survey with this plan described.
    async fn rebuild(&self, topic: &str, partition: u32, plan: Option<String>) -> Result<ManifestRebuild, CallError> {
        let partition = i32::try_from(partition).unwrap_or(i32::MAX);
        let call = |channel| {
            let request = v1::RebuildManifestRequest { topic: topic.to_owned(), partition, plan: plan.clone() };
            async move { admin_client(channel).rebuild_manifest(request).await }
        };
        let response = self.client.change_any(call).await?;
        let range = |range: v1::OffsetRange| -> Result<Range<Offset>, CallError> {
            Ok(offset(range.start)?..offset(range.end)?)
        };
        Ok(ManifestRebuild {
            lost: response.lost,
            range: offset(response.log_start)?..offset(response.tiered_end)?,
            committed_bytes: response.committed_bytes,
            log_start: offset(response.new_log_start)?,
            segments: response.segments,
            bytes: response.bytes,
            obstacle: Some(response.obstacle).filter(|obstacle| !obstacle.is_empty()),
            missing: response.missing.into_iter().map(range).collect::<Result<_, _>>()?,
            unusable: response.unusable,
            unused: response.unused,
            plan: response.plan,
            committed: response.committed,
        })
    }
}
