//! What this broker is told of a partition, and what it is in it. Values only: the task decides by them, and publishes what it became.
//!
//! ```text
//!   assign ─▶ Waiting ◀──────────▶ Follower { leader } ◀──────────▶ Leader { settled }
//!              nobody leads, or this      another leads                the value names this broker
//!              broker is no replica
//! ```

use std::{collections::BTreeMap, sync::Arc};

use bytes::Bytes;

use super::leader::insync::Registration;
use crate::{
    cluster::{PartitionValue, Revision},
    model::{BrokerId, LeaderEpoch, Offset},
    record::Batch,
    tier::TierState,
};

/// What the metadata says of a partition. One whose revision is older than the known one is dropped; one of the same revision
/// brings news of the tier and of the brokers.
#[derive(Clone, Debug)]
pub struct Assignment {
    /// The partition's value.
    pub value: Arc<PartitionValue>,
    /// The revision of that value: the transaction that last wrote it.
    pub revision: Revision,
    /// The value of the partition's tier key; `None` before the first commit.
    pub committed: Option<TierState>,
    /// What the view says of the brokers that the value names as replicas. Who is not in it is not registered.
    pub registered: BTreeMap<BrokerId, Registration>,
}

/// What a broker is in a partition.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Nothing: nobody leads as far as is known here, or this broker is no replica any more, or cannot follow.
    Waiting,
    /// It orders the writes.
    Leader {
        /// Whether all that its log held when its epoch began is committed. Before, it tells nobody a latest offset.
        settled: bool,
    },
    /// It copies.
    Follower {
        /// From whom.
        leader: BrokerId,
        /// It follows now, has joined, and is in the value's ISR.
        in_sync: bool,
    },
}

impl Role {
    /// Whether it orders the writes.
    pub fn leads(self) -> bool {
        matches!(self, Self::Leader { .. })
    }

    /// Whether it serves readers: a leader all of them, a follower those who take any replica, while it is in sync.
    pub fn serves(self, any_replica: bool) -> bool {
        self.leads() || any_replica && matches!(self, Self::Follower { in_sync: true, .. })
    }
}

/// What a broker is in a partition, and since when.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Standing {
    /// What it is.
    pub role: Role,
    /// The newest leader epoch that its metadata named; 0 before the first.
    pub epoch: LeaderEpoch,
    /// Whom the value of that epoch names as the leader.
    pub leader: Option<BrokerId>,
}

impl Standing {
    /// Before anything is known.
    pub(super) const UNKNOWN: Self = Self { role: Role::Waiting, epoch: LeaderEpoch(0), leader: None };
}

/// What a leader answers to a follower that joins.
#[derive(Clone, Debug)]
pub struct Answered {
    /// The epoch in which the asked broker leads, or the newest that it knows of.
    pub epoch: LeaderEpoch,
    /// The leader's high watermark.
    pub high_watermark: Offset,
    /// Where to go on.
    pub join: Joined,
    /// Whether the leader counts the follower as in sync. For its own side of the link: nobody is told.
    pub in_sync: bool,
}

impl Answered {
    /// It may not go on.
    pub(super) fn refused(epoch: LeaderEpoch, why: String) -> Self {
        Self { epoch, high_watermark: Offset::ZERO, join: Joined::Refused(why), in_sync: false }
    }
}

/// Where a follower goes on.
#[derive(Clone, Debug)]
pub enum Joined {
    /// At the end that it claimed.
    At(Offset),
    /// Its log parts from the leader's: the newest of the leader's epochs that it may have, and where that ends.
    Diverged {
        /// The epoch.
        epoch: LeaderEpoch,
        /// The first offset after what it wrote.
        end: Offset,
    },
    /// Nothing that it has is of use.
    Begin(Box<Beginning>),
    /// It may not join now, and why. It asks again a little later.
    Refused(String),
}

/// Where a replica begins that has nothing of use, and what is known of the log before that place.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Beginning {
    /// The first offset that it will have.
    pub at: Offset,
    /// The bucket holds all before it, and in its last segment's footer the tables.
    pub in_bucket: bool,
    /// Else: the epochs of what lies before, each with its first offset, both ascending.
    pub epochs: Vec<(LeaderEpoch, Offset)>,
    /// And its producers, as [`ProducerTable::to_bytes`](crate::log::ProducerTable::to_bytes) writes them.
    pub producers: Bytes,
}

/// What the link to the leader brings.
#[derive(Clone, Debug)]
pub enum FromLink {
    /// It stands, or stands again, or it is time to claim again.
    Up,
    /// It is lost.
    Down,
    /// The leader's answer to the claim.
    Answer(Answered),
    /// Batches, and the leader's high watermark.
    Pieces {
        /// The leader epoch in which they are sent.
        epoch: LeaderEpoch,
        /// The leader's high watermark.
        high_watermark: Offset,
        /// Checked batches that follow each other; none when only the mark moved.
        batches: Vec<Batch>,
    },
}

/// The partition's task is too far behind to take more from the link: the place is dropped and joined again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the partition has too many messages of its leader waiting")]
pub struct Overrun;

/// What wakes somebody who follows a partition's marks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum On {
    /// The high watermark moved.
    Committed,
    /// The log end moved.
    Written,
    /// The log end or the persisted end moved, or a leader has just confirmed them: there is something to acknowledge.
    Progress,
}
