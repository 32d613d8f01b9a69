//! Replication between two brokers: one link for each pair and direction, for any number of partitions.
//!
//! # Overview
//!
//! ```text
//!     follower's broker                                              leader's broker
//!
//!   partition ─ subscribe ─▶ LinkRequests ─▶╮  Subscribe, Unsubscribe  ╭─▶ Partition::subscribe
//!   partition ◀─────── on_link_event ───────┤ ─────── Progress ──────▶ ├─▶ Partition::on_acknowledged
//!   partition ────────── progress ─────────▶┤                          │
//!                             run_receiver ◀── SubscribeResponse, ──── run_sender ◀── TailReader::read
//!                                              Batches
//! ```
//!
//! [`run_receiver`] is the follower's side of a link and [`run_sender`] the leader's. Each is one task that owns its
//! state, and exchanges messages over a stream and a channel; this module does not depend on the transport. On a link a
//! partition has a *subscription* with a number that the follower chose. Each new subscription has a new number, so
//! messages for an earlier subscription are recognised and dropped.
//!
//! Catch-up and tail are one loop. A subscription with new records and space in its window is read towards the log end,
//! from memory or from the disk. The batches of a read go into the next message. A message is sent when it is full, or
//! when nothing else can be read at once. Only a high watermark without batches waits for a timer. Whenever the link
//! can send, the follower's side acknowledges in one message the subscriptions whose progress changed.
//!
//! # Invariants
//!
//! - Acknowledged progress was read from the partition while the acknowledged subscription was its current one. Once
//!   `ReplicationLinks::unsubscribe` or `ReplicationLinks::subscribe` has returned, nothing is acknowledged, or
//!   delivered to the partition, for an earlier subscription ([`LinkRequests`]).
//! - A subscription is served only while this broker leads in the epoch of the subscription: its reader checks that
//!   before and after each read.
//! - No subscription blocks another. The window of each limits its bytes in flight to what the follower's partition can
//!   queue. Subscribing and unsubscribing wait for a partition's task outside the loop. Disk reads run in parallel.
//! - A follower's report of a newer leader epoch has no effect by itself. The report causes a read of the metadata
//!   store, and only the stored epoch ends a leadership.
//! - Messages are input. An error in one subscription ends that subscription; the follower subscribes again with
//!   growing pauses. Only these errors end the link:
//!   - a message of an unexpected kind
//!   - an invalid progress message
//!   - a subscription number in use
//!   - the response to a ping that was never sent
//!
//! # Disconnect and shutdown
//!
//! A broken link leaves no state: the partitions are notified
//! ([`LinkEvent::Disconnected`](super::LinkEvent::Disconnected), `DisconnectCause::LinkLost`), and subscribe again on
//! the next link. On a stop the leader's side ends at once. The follower's side ends when the other side has received
//! its unsubscriptions, or does not respond. Messages in flight are lost as on a broken link.

mod flow_control;
mod link_requests;
mod messages;
mod probe;
mod receiver;
mod sender;
mod subscription;
#[cfg(test)]
mod tests;

use std::{fmt, sync::Arc};

use futures::future::BoxFuture;
use tokio::sync::mpsc;

pub use self::{
    flow_control::CatchUpThrottle,
    link_requests::LinkRequests,
    probe::LinkProbe,
    receiver::run_receiver,
    sender::{SenderConfig, run_sender},
};
use super::handle::Partition;
use crate::{
    model::{LeaderEpoch, PartitionId},
    proto::{error::ApiError, status::Status, v1},
};

/// Finds an open partition of this broker, in any role; `None` if the partition is not open here.
pub type PartitionLookup = Arc<dyn Fn(PartitionId) -> Option<Arc<Partition>> + Send + Sync>;

/// Reads a partition's leader epoch from the metadata store; `None` if it cannot be read now.
pub type StoredEpoch = Arc<dyn Fn(PartitionId) -> BoxFuture<'static, Option<LeaderEpoch>> + Send + Sync>;

/// Channel for messages of the leader's side: the transport sends them in order, and ends the stream after the first
/// error.
pub type ResponseSender = mpsc::Sender<Result<v1::ReplicateResponse, Status>>;

/// End of one side of a link.
#[derive(Debug)]
pub enum LinkEnd {
    /// This broker ended the link.
    Stopped,
    /// The other side ended the link without an error, or takes no more messages.
    Closed,
    /// The link broke, or the other side refused to continue.
    Broken(Status),
    /// The other side sent an invalid message.
    Bad(ApiError),
}

impl fmt::Display for LinkEnd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stopped => f.write_str("closed by this broker"),
            Self::Closed => f.write_str("closed by the other broker"),
            Self::Broken(status) => f.write_str(status.message()),
            Self::Bad(error) => write!(f, "invalid message: {error}"),
        }
    }
}
