//! A change of the ISR on its way through the metadata store, and what may come back.

use super::Peer;
use crate::{
    cluster::{PartitionValue, Revision},
    model::LeaderEpoch,
};

/// A change of the ISR, to be written by compare-and-set.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Proposal {
    /// The revision that the partition's key must still have.
    pub expect: Revision,
    /// The new value.
    pub value: PartitionValue,
    /// Whom it adds to the ISR: their registrations must still have these broker epochs as create revision.
    pub added: Vec<Peer>,
}

/// How a proposal ended, as far as is known.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Agreed {
    /// It is the value, since this revision.
    Done(Revision),
    /// It was refused, or the key was read back after [`Agreed::Unknown`]: this is the value, of this revision.
    Found(PartitionValue, Revision),
    /// The key is gone: the topic is being deleted.
    Gone,
    /// Nobody knows. The key is to be read back, and the answer told as [`Agreed::Found`].
    Unknown,
}

/// What a newer value of the partition means to its leader.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Observed {
    /// Nothing: it is known, or older than what is known.
    Same,
    /// It is the committed value now.
    Adopted,
    /// Another epoch has begun: this leader's time is over.
    Deposed {
        /// That epoch.
        epoch: LeaderEpoch,
    },
    /// The partition is being deleted.
    Gone,
}
