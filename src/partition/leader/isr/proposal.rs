//! A proposed ISR change, and its possible outcomes.

use super::PeerId;
use crate::{
    cluster::{PartitionValue, Revision},
    model::LeaderEpoch,
};

/// An ISR change, to be written by compare-and-set.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct IsrProposal {
    /// Revision that the partition's key must still have.
    pub expect: Revision,
    pub value: PartitionValue,
    /// New ISR members. The create revisions of their registrations must still be these broker epochs.
    pub added: Vec<PeerId>,
}

/// Known outcome of a proposal.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum ProposalOutcome {
    /// The proposed value was written at this revision.
    Committed(Revision),
    /// The proposal was refused, or the key was read back after [`ProposalOutcome::Unknown`]: the current value and its
    /// revision.
    CurrentValue(PartitionValue, Revision),
    /// The key does not exist: the topic is being deleted.
    Deleted,
    /// The outcome is unknown. The key has to be read back, and its value reported as
    /// [`ProposalOutcome::CurrentValue`].
    Unknown,
}

/// Effect of a partition's value on its leader.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ValueUpdate {
    /// No effect: the value is known, or older than the known value.
    Unchanged,
    /// The value is now the committed value.
    Adopted,
    /// Another epoch has begun: this leader is deposed.
    Deposed { epoch: LeaderEpoch },
    /// The partition is being deleted.
    Deleted,
}
