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

/// Partition to which the follower has subscribed on this link, with the current subscription.
pub(super) struct SenderSlot {
    /// The partition may have been deleted since.
    pub(super) partition: Weak<Partition>,
    /// Number of the follower's current subscription, from its request until its end.
    pub(super) number: Option<u32>,
    /// State of that subscription, from its acceptance until its end.
    pub(super) subscription: Option<SenderSubscription>,
    /// Notifications for the partition that are not sent yet.
    pub(super) notifications: PendingNotifications,
    /// True while a notification is being delivered: only one at a time.
    pub(super) notifying: bool,
    /// True if the follower reported its shutdown, and has not subscribed this partition since.
    pub(super) is_shutting_down: bool,
}

/// Pending notifications for a partition, in the order in which they are sent.
#[derive(Default)]
pub(super) struct PendingNotifications {
    /// Newest leader epoch that the follower reported.
    pub(super) reported_epoch: Option<LeaderEpoch>,
    /// End of the follower's subscription.
    pub(super) disconnected: Option<DisconnectCause>,
    /// Requested subscription, with its number.
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
    /// True if the follower was not in sync when it subscribed, and has not been sent all records since: its reads are
    /// throttled.
    pub(super) catches_up: bool,
    /// True while a read is in progress.
    pub(super) reading: bool,
    /// True if the slot was marked or queued during the read, so that the read must be followed by another.
    pub(super) moved_during_read: bool,
    /// True while the subscription waits in `catch_up_queue`.
    pub(super) queued: bool,
    /// True if new records wait for space in the window of the subscription or the link.
    pub(super) blocked: bool,
}

/// Result of a notification.
pub(super) enum NotificationResult {
    /// The notification has no response.
    Delivered,
    /// The partition's response to the subscription `number` in `epoch`.
    Subscribed { partition: Arc<Partition>, number: u32, epoch: LeaderEpoch, response: SubscribeResponse },
}

impl SenderSubscription {
    /// Creates the subscription of a follower that has all records below `start` and is sent `high_watermark` with the
    /// response. Every commit waits for the in-sync followers, so the reads for such a follower are not throttled.
    pub(super) fn new(
        partition: Arc<Partition>,
        tail: TailReader,
        start: Offset,
        high_watermark: Offset,
        in_sync: bool,
    ) -> Self {
        Self {
            partition,
            epoch: tail.epoch(),
            tail,
            window: SendWindow::new(start),
            sent_high_watermark: high_watermark,
            catches_up: !in_sync,
            reading: false,
            moved_during_read: false,
            queued: false,
            blocked: false,
        }
    }
}

/// Returns the error for a subscription of a partition that is not open on this broker.
pub(super) fn no_replica_error(partition: PartitionId) -> ApiError {
    ApiError::new(ErrorCode::NotLeader, format!("this broker has no open replica of partition {partition}"))
}

/// Returns the error that a follower receives for a failed read.
pub(super) fn read_failure(error: &ReadError) -> ApiError {
    let code = match error {
        ReadError::OutOfRange { .. } => ErrorCode::OffsetOutOfRange,
        ReadError::Closed => ErrorCode::NotLeader,
        ReadError::Corrupt { .. } => ErrorCode::DataCorrupt,
        ReadError::BatchTooLarge { .. } => ErrorCode::Overloaded,
        ReadError::Disk { .. } | ReadError::ObjectStore { .. } => ErrorCode::StorageFailed,
    };
    let message = match error {
        ReadError::Closed => "this broker no longer leads in that epoch".to_owned(),
        // The full text advises consumers.
        ReadError::Corrupt { reason, .. } => reason.clone(),
        other => other.to_string(),
    };
    ApiError::new(code, message)
}
