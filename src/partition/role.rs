//! Assignment, role, link events and segments of a replica. Plain values, which the task and its callers exchange.
//!
//! The applied partition value decides the role; any role may follow any other:
//!
//! ```text
//!   Idle                        the value has no leader, or this broker is no replica
//!   Follower { leader }         another broker leads
//!   Leader { epoch_committed }  the value names this broker as the leader
//! ```
//!
//! [`ReplicaRole::Idle`] lists the cases in which the task is idle instead.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use super::leader::{
    divergence::{SubscribeError, SubscribeOutcome},
    member::BrokerStatus,
};
use crate::{
    cluster::{PartitionValue, Revision},
    log::SegmentInfo,
    model::{BrokerId, LeaderEpoch, Offset},
    record::Batch,
    tier::TierState,
};

/// Metadata of a partition. The task drops an assignment with an older revision than the applied one. One with the same
/// revision updates the tier state and the broker statuses. It also makes the task follow again if that role had ended.
#[derive(Clone, Debug)]
pub struct PartitionAssignment {
    pub value: Arc<PartitionValue>,
    /// Revision of the transaction that last wrote the value.
    pub revision: Revision,
    /// Value of the partition's tier key; `None` before the first commit.
    pub committed: Option<TierState>,
    /// Statuses, from the metadata cache, of the brokers that the value names as replicas. A broker that is missing in
    /// this map is not registered.
    pub registered: BTreeMap<BrokerId, BrokerStatus>,
}

/// Role of this broker in a partition.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReplicaRole {
    /// Neither leads nor follows. The reason is one of these:
    /// - No value was applied yet.
    /// - The value has no leader.
    /// - This broker is no replica.
    /// - This broker's disk failed while it did not lead.
    /// - The task waits for newer metadata.
    /// - The task reads the object store before it leads.
    Idle,
    /// Orders the writes.
    Leader {
        /// True if all records that the log held when the epoch began are committed. While false, the leader serves no
        /// latest offset.
        epoch_committed: bool,
    },
    /// Copies from the leader.
    Follower {
        leader: BrokerId,
        /// True if the leader has accepted the subscription, and the replica is in the ISR of the applied value.
        in_sync: bool,
    },
}

impl ReplicaRole {
    pub fn leads(self) -> bool {
        matches!(self, Self::Leader { .. })
    }

    /// Returns true if a replica in this role serves a read. A leader serves every read. An in-sync follower serves it
    /// if the reader accepts `any_replica`.
    pub fn serves(self, any_replica: bool) -> bool {
        self.leads() || any_replica && matches!(self, Self::Follower { in_sync: true, .. })
    }
}

/// Status of a replica: its role, and the epoch and leader of the applied value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReplicaStatus {
    pub role: ReplicaRole,
    /// Leader epoch of the applied value; 0 before the first assignment.
    pub epoch: LeaderEpoch,
    /// Leader that the applied value names. `None` if the value has no leader, or if it names this broker and the role
    /// is [`ReplicaRole::Idle`].
    pub leader: Option<BrokerId>,
}

impl ReplicaStatus {
    /// Status before the first assignment.
    pub(super) const UNKNOWN: Self = Self { role: ReplicaRole::Idle, epoch: LeaderEpoch(0), leader: None };
}

/// Leader's response to a subscription.
#[derive(Clone, Debug)]
pub struct SubscribeResponse {
    /// Epoch in which the responding broker leads; otherwise the epoch of the value that it applied.
    pub epoch: LeaderEpoch,
    pub high_watermark: Offset,
    /// Outcome of the subscription.
    pub outcome: SubscribeOutcome,
    /// True if the committed ISR contains the follower. Used by the leader's side of the link, and not sent.
    pub in_sync: bool,
}

impl SubscribeResponse {
    /// Returns a response that rejects the subscription for this reason.
    pub(super) fn rejected(epoch: LeaderEpoch, reason: String) -> Self {
        let outcome = SubscribeOutcome::Rejected(SubscribeError::Unavailable { reason });
        Self { epoch, high_watermark: Offset::ZERO, outcome, in_sync: false }
    }
}

/// Event of the replication link to the leader.
#[derive(Clone, Debug)]
pub enum LinkEvent {
    /// The link is connected, or the pause before the next subscription is over: the partition has to subscribe.
    Connected,
    /// The link ended, and the subscription with it.
    Disconnected,
    /// Response of the leader to the subscription.
    Response(SubscribeResponse),
    /// Batches, and the leader's high watermark.
    Batches {
        /// Leader epoch in which the batches are sent.
        epoch: LeaderEpoch,
        high_watermark: Offset,
        /// Batches with verified checksums, in the order in which they were sent; none if only the high watermark
        /// moved.
        batches: Vec<Batch>,
    },
}

/// Error of a full control queue: the event was dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the partition's control queue is full of messages from its leader")]
pub struct QueueFull;

/// Kind of event that wakes a listener of watermarks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WatermarkKind {
    /// The high watermark moved.
    HighWatermark,
    /// The log end moved.
    LogEnd,
    /// The log end or the persisted end moved, or a leader has just accepted the subscription: an acknowledgement is
    /// due.
    AnyEnd,
}

/// Segments of a replica on this broker's disk, and the state of its task that maintenance needs.
pub(super) struct LocalSegments {
    pub(super) sealed: Vec<SegmentInfo>,
    pub(super) active: SegmentInfo,
    /// Time since the first batch in the active segment; `None` while the segment is empty.
    pub(super) active_age: Option<Duration>,
    /// True if a writer waits for the object store.
    pub(super) awaits_tier: bool,
    /// `None` while this broker does not lead; otherwise its leader epoch, and true if that epoch is committed.
    pub(super) leads: Option<(LeaderEpoch, bool)>,
}
