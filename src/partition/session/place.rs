//! What the leader's side of a link knows of each partition that a follower joined.

use std::sync::{Arc, Weak};

use super::{frames::JoinFrame, window::Window};
use crate::{
    model::{LeaderEpoch, Offset, PartitionId},
    partition::{Answered, Partition, ReadError, TailReader, leader::insync::Departure},
    proto::fault::{Fault, Reason},
};

/// One partition that was ever joined on this link.
pub(super) struct Slot {
    /// It may have been deleted since.
    pub(super) partition: Weak<Partition>,
    /// The number by which the follower calls it now, and how it joined; from the join on, until it leaves.
    pub(super) number: Option<u32>,
    pub(super) place: Option<Place>,
    /// What the partition is still to be told, one after the other.
    pub(super) asks: Asks,
    /// Something of it is under way.
    pub(super) asking: bool,
    /// The follower said that it stops.
    pub(super) stops: bool,
}

/// What a partition is to be told, in this order.
#[derive(Default)]
pub(super) struct Asks {
    /// A newer leader epoch, as the follower says.
    pub(super) deposed: Option<LeaderEpoch>,
    pub(super) left: Option<Departure>,
    pub(super) join: Option<(u32, JoinFrame)>,
}

/// A partition that is being sent.
pub(super) struct Place {
    pub(super) partition: Arc<Partition>,
    pub(super) epoch: LeaderEpoch,
    pub(super) tail: TailReader,
    pub(super) window: Window,
    /// The high watermark that the follower was told.
    pub(super) told: Offset,
    /// It is not in sync, and has not reached the log end since it joined.
    pub(super) catches_up: bool,
    pub(super) reading: bool,
    /// Something new came during that read.
    pub(super) again: bool,
    /// It waits in `behind`.
    pub(super) queued: bool,
    /// It has news and no room.
    pub(super) blocked: bool,
}

/// What became of something that a partition was told.
pub(super) enum Told {
    Noted,
    Joined { partition: Arc<Partition>, number: u32, epoch: LeaderEpoch, answered: Answered },
}

impl Place {
    /// One whose follower has all below `at`, and was told the high watermark `told`. Every commit waits for one that is in sync.
    pub(super) fn new(partition: Arc<Partition>, tail: TailReader, at: Offset, told: Offset, in_sync: bool) -> Self {
        Self {
            partition,
            epoch: tail.epoch(),
            tail,
            window: Window::new(at),
            told,
            catches_up: !in_sync,
            reading: false,
            again: false,
            queued: false,
            blocked: false,
        }
    }
}

pub(super) fn not_here(partition: PartitionId) -> Fault {
    Fault::new(Reason::NotLeader, format!("this broker has no replica of partition {partition} open"))
}

/// What a follower is told of a read that failed.
pub(super) fn unreadable(error: &ReadError) -> Fault {
    let reason = match error {
        ReadError::OutOfRange { .. } => Reason::OffsetOutOfRange,
        ReadError::Closed => Reason::NotLeader,
        ReadError::Damaged { .. } => Reason::DataDamaged,
        ReadError::BatchTooLarge { .. } => Reason::Overloaded,
        ReadError::Disk { .. } | ReadError::ObjectStore { .. } => Reason::StorageFailed,
    };
    let message = match error {
        ReadError::Closed => "this broker does not lead in that epoch any more".to_owned(),
        other => other.to_string(),
    };
    Fault::new(reason, message)
}
