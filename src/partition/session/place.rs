//! State of each subscribed partition on the leader's side of a link.

use std::sync::{Arc, Weak};

use super::{frames::JoinFrame, window::Window};
use crate::{
    model::{LeaderEpoch, Offset, PartitionId},
    partition::{Answered, Partition, ReadError, TailReader, leader::insync::Departure},
    proto::error::{ApiError, ErrorCode},
};

/// One partition that was ever subscribed on this link.
pub(super) struct Slot {
    /// The partition may have been deleted since.
    pub(super) partition: Weak<Partition>,
    /// Number and state of the follower's current subscription. The number is set from the request until the end.
    pub(super) number: Option<u32>,
    pub(super) place: Option<Place>,
    /// Pending notifications for the partition, sent one after the other.
    pub(super) asks: Asks,
    /// True while a notification is under way.
    pub(super) asking: bool,
    /// True if the follower reported its shutdown.
    pub(super) stops: bool,
}

/// Pending notifications for a partition, in this order.
#[derive(Default)]
pub(super) struct Asks {
    /// Newer leader epoch, by the follower's report.
    pub(super) deposed: Option<LeaderEpoch>,
    pub(super) left: Option<Departure>,
    pub(super) join: Option<(u32, JoinFrame)>,
}

/// An accepted subscription.
pub(super) struct Place {
    pub(super) partition: Arc<Partition>,
    pub(super) epoch: LeaderEpoch,
    pub(super) tail: TailReader,
    pub(super) window: Window,
    /// High watermark that the follower was sent last.
    pub(super) told: Offset,
    /// True if the follower is not in sync, and has not reached the log end since it subscribed.
    pub(super) catches_up: bool,
    pub(super) reading: bool,
    /// True if the log end moved during that read.
    pub(super) again: bool,
    /// True while the subscription waits in `behind`.
    pub(super) queued: bool,
    /// True if there are new records and no space in the window.
    pub(super) blocked: bool,
}

/// Result of a notification.
pub(super) enum Told {
    Noted,
    Joined { partition: Arc<Partition>, number: u32, epoch: LeaderEpoch, answered: Answered },
}

impl Place {
    /// Creates the subscription of a follower that has all records below `at` and was sent the high watermark `told`. Every commit waits
    /// for a follower that is in sync, so its reads are not throttled.
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

pub(super) fn not_here(partition: PartitionId) -> ApiError {
    ApiError::new(ErrorCode::NotLeader, format!("this broker has no replica of partition {partition} open"))
}

/// Returns the error that a follower is sent for a read that failed.
pub(super) fn unreadable(error: &ReadError) -> ApiError {
    let reason = match error {
        ReadError::OutOfRange { .. } => ErrorCode::OffsetOutOfRange,
        ReadError::Closed => ErrorCode::NotLeader,
        ReadError::Damaged { .. } => ErrorCode::DataDamaged,
        ReadError::BatchTooLarge { .. } => ErrorCode::Overloaded,
        ReadError::Disk { .. } | ReadError::ObjectStore { .. } => ErrorCode::StorageFailed,
    };
    let message = match error {
        ReadError::Closed => "this broker does not lead in that epoch any more".to_owned(),
        other => other.to_string(),
    };
    ApiError::new(reason, message)
}
