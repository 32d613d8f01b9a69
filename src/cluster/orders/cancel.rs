//! Cancellation of reassignments.

use super::{FindError, Ordered, Orders, WriteError};
use crate::{
    cluster::partition_value::PartitionValue,
    model::{BrokerId, TopicName},
};

/// Error of a cancellation.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CancelError {
    /// The topic or partition does not exist.
    #[error(transparent)]
    Unknown(#[from] FindError),
    /// No reassignment is in progress or queued.
    #[error("nothing to cancel: {what}")]
    Nothing {
        /// Description of the partitions without a reassignment.
        what: String,
    },
    /// Only replicas that the reassignment added are in sync.
    #[error(
        "the move of partition {partition} cannot be taken back: none of the replicas of before is in sync; let it end, or \
         reassign the partition"
    )]
    OnlyNew {
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

impl Orders {
    /// Restores the replicas from before the reassignment, for one topic, one partition, or all. If a new replica leads
    /// already, an earlier replica is elected.
    pub async fn cancel(&self, topic: Option<&TopicName>, partition: Option<u32>) -> Result<Vec<Ordered>, CancelError> {
        let moving = self.moving(topic, partition)?;
        if moving.is_empty() {
            let what = match (topic, partition) {
                (None, _) => "no partition is being moved".to_owned(),
                (Some(topic), None) => format!("no partition of topic {topic} is being moved"),
                (Some(topic), Some(number)) => format!("partition {topic}/{number} is not being moved"),
            };
            return Err(CancelError::Nothing { what });
        }
        let ids: Vec<_> = moving.iter().map(|one| one.id).collect();
        self.edit(&ids, |id, value, _| {
            if !value.is_moving() {
                return Ok(value.is_ordered().then(|| value.clone().without_order()));
            }
            let state = self.view.state();
            let back = back(value, |id| state.brokers().contains_key(&id), self.min_insync(id.topic));
            back.map(|back| Some(back.without_order()))
                .ok_or_else(|| CancelError::OnlyNew { partition: self.spoken(id) })
        })
        .await
    }
}

/// Returns the value without the reassignment. If an added replica leads, the same change elects another leader.
fn back(value: &PartitionValue, live: impl Fn(BrokerId) -> bool, min_insync: usize) -> Option<PartitionValue> {
    if let Some(back) = value.cancel_move() {
        return Some(back);
    }
    let stays = |id: &BrokerId| !value.adding.contains(id) && value.isr.contains(id) && live(*id);
    let to = value.replicas.iter().copied().find(stays)?;
    value.elect(to, live, min_insync)?.cancel_move()
}
