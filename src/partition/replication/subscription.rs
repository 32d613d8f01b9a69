//! State of each subscribed partition on the leader's side of a link.

use std::sync::{Arc, Weak};

use super::{flow_control::SendWindow, messages::SubscribeRequest};
use crate::{
    model::{LeaderEpoch, Offset, PartitionId},
    partition::{
        handle::Partition,
        leader::member::DisconnectCause,
        read::{ReadError, TailReader},
        role::SubscribeResponse,
    },
    proto::error::{ApiError, ErrorCode},
};

/// One partition that was ever subscribed on this link.
pub(super) struct SenderSlot {
    /// The partition may have been deleted since.
    pub(super) partition: Weak<Partition>,
    /// Number and state of the follower's current subscription. The number is set from the request until the end.
    pub(super) number: Option<u32>,
    pub(super) subscription: Option<SenderSubscription>,
    /// Pending notifications for the partition, sent one after the other.
    pub(super) notifications: PendingNotifications,
    /// True while a notification is under way.
    pub(super) notifying: bool,
    /// True if the follower reported its shutdown.
    pub(super) is_shutting_down: bool,
}

/// Pending notifications for a partition, in this order.
#[derive(Default)]
pub(super) struct PendingNotifications {
    /// Newer leader epoch, by the follower's report.
    pub(super) deposed: Option<LeaderEpoch>,
    pub(super) left: Option<DisconnectCause>,
    pub(super) subscribe: Option<(u32, SubscribeRequest)>,
}

/// An accepted subscription.
pub(super) struct SenderSubscription {
    pub(super) partition: Arc<Partition>,
    pub(super) epoch: LeaderEpoch,
    pub(super) tail: TailReader,
    pub(super) window: SendWindow,
    /// High watermark that the follower was sent last.
    pub(super) sent_high_watermark: Offset,
    /// True if the follower is not in sync, and has not reached the log end since it subscribed.
    pub(super) catches_up: bool,
    pub(super) reading: bool,
    /// True if the log end moved during that read.
    pub(super) moved_during_read: bool,
    /// True while the subscription waits in `catch_up_queue`.
    pub(super) queued: bool,
    /// True if there are new records and no space in the window.
    pub(super) blocked: bool,
}

/// Result of a notification.
pub(super) enum NotificationResult {
    Delivered,
    Subscribed { partition: Arc<Partition>, number: u32, epoch: LeaderEpoch, response: SubscribeResponse },
}

impl SenderSubscription {
    /// Creates the subscription of a follower that has all records below `at` and was sent `high_watermark`. Every
    /// commit waits for a follower that is in sync, so its reads are not throttled.
    pub(super) fn new(
        partition: Arc<Partition>,
        tail: TailReader,
        at: Offset,
        high_watermark: Offset,
        in_sync: bool,
    ) -> Self {
        Self {
            partition,
            epoch: tail.epoch(),
            tail,
            window: SendWindow::new(at),
            sent_high_watermark: high_watermark,
            catches_up: !in_sync,
            reading: false,
            moved_during_read: false,
            queued: false,
            blocked: false,
        }
    }
}

pub(super) fn not_here(partition: PartitionId) -> ApiError {
    ApiError::new(ErrorCode::NotLeader, format!("this broker has no open replica of partition {partition}"))
}

/// Returns the error that a follower is sent for a read that failed.
pub(super) fn unreadable(error: &ReadError) -> ApiError {
    let reason = match error {
        ReadError::OutOfRange { .. } => ErrorCode::OffsetOutOfRange,
        ReadError::Closed => ErrorCode::NotLeader,
        ReadError::Corrupt { .. } => ErrorCode::DataCorrupt,
        ReadError::BatchTooLarge { .. } => ErrorCode::Overloaded,
        ReadError::Disk { .. } | ReadError::ObjectStore { .. } => ErrorCode::StorageFailed,
    };
    let message = match error {
        ReadError::Closed => "this broker no longer leads in that epoch".to_owned(),
        other => other.to_string(),
    };
    ApiError::new(reason, message)
}
