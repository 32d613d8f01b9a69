//! A proposed ISR change, and its possible outcomes.

use super::Peer;
use crate::{
    cluster::{PartitionValue, Revision},
    model::LeaderEpoch,
};

/// An ISR change, to be written by compare-and-set.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Proposal {
    /// Revision that the partition's key must still have.
    pub expect: Revision,
    pub value: PartitionValue,
    /// New ISR members. The create revisions of their registrations must still be these broker epochs.
    pub added: Vec<Peer>,
}

/// Known outcome of a proposal.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Agreed {
    /// The proposed value was written at this revision.
    Done(Revision),
    /// The proposal was refused, or the key was read back after [`Agreed::Unknown`]: the current value and its revision.
    Found(PartitionValue, Revision),
    /// The key does not exist: the topic is being deleted.
    Gone,
    /// The outcome is unknown. The key has to be read back, and its value reported as [`Agreed::Found`].
    Unknown,
}

/// Effect of a partition's value on its leader.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Observed {
    /// No effect: the value is known, or older than the known value.
    Same,
    /// The value is now the committed value.
    Adopted,
    /// Another epoch has begun: this leader is deposed.
    Deposed { epoch: LeaderEpoch },
    /// The partition is being deleted.
    Gone,
}
