//! Cancellation of reassignments.

use super::{ClusterOperations, OperationResult, TargetError, WriteError};
use crate::{
    cluster::partition_value::PartitionValue,
    model::{BrokerId, TopicName},
};

/// Error of a cancellation.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CancelError {
    /// The topic or partition does not exist.
    #[error(transparent)]
    Unknown(#[from] TargetError),
    /// No reassignment is in progress or queued.
    #[error("nothing to cancel: {what}")]
    NotReassigning {
        /// Statement that none of the requested partitions is being reassigned.
        what: String,
    },
    /// No replica from before the reassignment is in the ISR. Or an added replica leads, and none of the earlier ISR
    /// members is live, so none can be elected.
    #[error(
        "the reassignment of partition {partition} cannot be cancelled, because none of the earlier replicas is in \
         sync: let it complete, or reassign the partition"
    )]
    NoEarlierReplicaInSync {
        /// The partition, as `topic/number`.
        partition: String,
    },
    /// The values could not be written.
    #[error(transparent)]
    Write(#[from] WriteError),
}

impl CancelError {
    /// Returns true if the same operation may succeed later.
    pub const fn retryable(&self) -> bool {
        match self {
            Self::Write(error) => error.retryable(),
            _ => false,
        }
    }
}

impl ClusterOperations {
    /// Cancels the reassignments, in progress or queued, of one partition, of a whole topic, or of the cluster if
    /// `topic` is `None`. If a reassignment in progress is cancelled, the partition has the replicas from before it
    /// again. If a replica that was being added leads, the same change elects an earlier replica. If the metadata cache
    /// shows one reassignment that cannot be cancelled, none is.
    pub async fn cancel(
        &self,
        topic: Option<&TopicName>,
        partition: Option<u32>,
    ) -> Result<Vec<OperationResult>, CancelError> {
        let reassigning = self.list_reassignments(topic, partition)?;
        if reassigning.is_empty() {
            let what = match (topic, partition) {
                (None, _) => "no partition is being reassigned".to_owned(),
                (Some(topic), None) => format!("no partition of topic {topic} is being reassigned"),
                (Some(topic), Some(number)) => format!("partition {topic}/{number} is not being reassigned"),
            };
            return Err(CancelError::NotReassigning { what });
        }
        let ids: Vec<_> = reassigning.iter().map(|result| result.id).collect();
        self.edit(&ids, |id, value, _| {
            if !value.is_reassigning() {
                return Ok(value.has_queued().then(|| value.clone().clear_queued()));
            }
            let state = self.metadata.state();
            let cancelled =
                without_reassignment(value, |id| state.brokers().contains_key(&id), self.min_insync(id.topic));
            cancelled
                .map(|cancelled| Some(cancelled.clear_queued()))
                .ok_or_else(|| CancelError::NoEarlierReplicaInSync { partition: self.display_name(id) })
        })
        .await
    }
}

/// Returns the value with the replicas from before the reassignment in progress. If a replica that is being added
/// leads, the same change elects the first live ISR member from before the reassignment. Returns `None` if there is no
/// such member.
fn without_reassignment(
    value: &PartitionValue,
    is_live: impl Fn(BrokerId) -> bool,
    min_insync: usize,
) -> Option<PartitionValue> {
    if let Some(cancelled) = value.cancel_reassignment() {
        return Some(cancelled);
    }
    let is_candidate = |id: &BrokerId| !value.adding.contains(id) && value.isr.contains(id) && is_live(*id);
    let successor = value.replicas.iter().copied().find(is_candidate)?;
    value.elect(successor, is_live, min_insync)?.cancel_reassignment()
}
