//! A partition whose manifest was lost from the bucket, and what is left of it.

use std::ops::Range;

use super::{Admin, offset};
use crate::{
    client::{connection::admin_client, error::CallError},
    model::Offset,
    proto::v1,
};

/// What is left of a partition's history in the bucket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ManifestRebuild {
    /// The object that is missing or damaged.
    pub lost: String,
    /// What the bucket held when the manifest was last committed.
    pub range: Range<Offset>,
    /// Bytes of batches that were committed.
    pub committed_bytes: u64,
    /// Where the log starts with what is left.
    pub log_start: Offset,
    /// Segments that are left, without a gap up to the end.
    pub segments: u32,
    /// Bytes of their batches.
    pub bytes: u64,
    /// Why that is not known to be what was committed; none where it is.
    pub doubt: Option<String>,
    /// Ranges that no object covers.
    pub missing: Vec<Range<Offset>>,
    /// Objects that cannot be used.
    pub unusable: Vec<String>,
    /// Segment objects that are not used.
    pub left_over: u32,
    /// Names this outcome.
    pub plan: String,
    /// Whether the manifest was made again.
    pub committed: bool,
}

impl Admin {
    /// Looks for what is left of a partition whose manifest is lost. Changes nothing.
    ///
    /// # Errors
    /// When the manifest is there, topic or partition are not known, or a store does not answer.
    pub async fn survey_manifest(&self, topic: &str, partition: u32) -> Result<ManifestRebuild, CallError> {
        self.rebuild(topic, partition, None).await
    }

    /// Makes a lost manifest again, of what [`Admin::survey_manifest`] found and nothing else.
    ///
    /// # Errors
    /// As there, and when what is there has changed since.
    pub async fn rebuild_manifest(
        &self,
        topic: &str,
        partition: u32,
        agreed: &ManifestRebuild,
    ) -> Result<ManifestRebuild, CallError> {
        self.rebuild(topic, partition, Some(agreed.plan.clone())).await
    }

    async fn rebuild(&self, topic: &str, partition: u32, plan: Option<String>) -> Result<ManifestRebuild, CallError> {
        let partition = i32::try_from(partition).unwrap_or(i32::MAX);
        let call = |wire| {
            let request = v1::RebuildManifestRequest { topic: topic.to_owned(), partition, plan: plan.clone() };
            async move { admin_client(wire).rebuild_manifest(request).await }
        };
        let answer = self.client.tell_any(call).await?;
        let range =
            |range: v1::OffsetRange| -> Result<Range<Offset>, CallError> { Ok(offset(range.from)?..offset(range.to)?) };
        Ok(ManifestRebuild {
            lost: answer.lost,
            range: offset(answer.log_start)?..offset(answer.tiered_end)?,
            committed_bytes: answer.committed_bytes,
            log_start: offset(answer.new_log_start)?,
            segments: answer.segments,
            bytes: answer.bytes,
            doubt: Some(answer.doubt).filter(|doubt| !doubt.is_empty()),
            missing: answer.missing.into_iter().map(range).collect::<Result<_, _>>()?,
            unusable: answer.unusable,
            left_over: answer.left_over,
            plan: answer.plan,
            committed: answer.committed,
        })
    }
}
