//! Replication between two brokers: one link for each pair and direction, whatever the number of partitions.
//!
//! # Overview
//!
//! ```text
//!     follower's broker                                           leader's broker
//!
//!   partition ─ Links::join ─▶ Asked ─▶╮        Join, Leave       ╭─▶ Partition::join, left
//!   partition ◀── from_link ───────────┤ ─────── Progress ──────▶ ├─▶ Partition::acknowledged
//!   partition ─── ends ────────────────┤                          │
//!                              following ◀─── Answer, Batches ─── leading ◀── TailReader::read
//! ```
//!
//! [`follow`] is the follower's side of a link and [`lead`] the leader's. Each is one task that owns its state, between a stream of messages
//! and a channel of them; what carries these is not known here. On a link a partition goes by a *place*, a number of the follower's
//! choice. Joining again takes a new one, so whatever is on its way for an earlier join is recognised and dropped.
//!
//! Catch-up and tail are one loop: a place with news and room is read up to the log end, from memory or from the disk, and what was read
//! goes into the next message. A message is sent when it is full, or when nothing else can be had at once: batching comes from the
//! queue and not from a timer. The follower's side tells of all places that moved in one message, whenever the pipe is free.
//!
//! # Invariants
//!
//! - What is acknowledged was read from the partition while its last join on this link held: once `Links::leave` or `Links::join`
//!   has returned, nothing is acknowledged, or handed on, for what was joined before ([`Asked`]).
//! - A place is served only while this broker leads in the epoch in which it was joined: its reader looks at that before and after each
//!   read.
//! - No place waits for another: windows bound what each has under way to what the follower's partition can queue; joins and
//!   departures wait for a partition's task beside the loop; reads from a disk run side by side.
//! - Nobody proves who he is: a follower's word that another broker leads by now has the metadata store asked, and only what that says
//!   deposes.
//! - What comes is input. What is wrong with one place ends that place; the follower joins again with growing pauses. Only
//!   what names no place, or lies about its windows, ends the link.
//!
//! # What a broken link leaves
//!
//! Nothing: the partitions are told ([`FromLink::Down`](super::FromLink::Down), `Departure::LinkLost`), and join anew on the next one.
//! On a stop the leader's side ends at once, and the follower's when the other side has heard who leaves, or does not answer; what was
//! under way is as on a broken link.

mod asked;
mod catch_up;
mod following;
mod frames;
mod leading;
mod place;
mod probe;
#[cfg(test)]
mod tests;
mod window;

use std::{fmt, sync::Arc};

use futures::future::BoxFuture;
use tokio::sync::mpsc;

pub use self::{
    asked::Asked,
    catch_up::CatchUp,
    following::follow,
    leading::{Led, lead},
    probe::LinkProbe,
};
use super::Partition;
use crate::{
    model::{LeaderEpoch, PartitionId},
    proto::{fault::Fault, status::Status, v1},
};

impl fmt::Display for Ended {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stopped => f.write_str("this broker ended it"),
            Self::Closed => f.write_str("the other broker ended it"),
            Self::Broken(status) => f.write_str(status.message()),
            Self::Bad(fault) => write!(f, "what came cannot be: {fault}"),
        }
    }
}

/// Finds a partition of this broker, whatever its role.
pub type Find = Arc<dyn Fn(PartitionId) -> Option<Arc<Partition>> + Send + Sync>;

/// The leader epoch of a partition by the metadata store; `None` where that cannot be said now.
pub type StoredEpoch = Arc<dyn Fn(PartitionId) -> BoxFuture<'static, Option<LeaderEpoch>> + Send + Sync>;

/// Where the leader's side puts its messages: what carries them sends one after the other, and ends with the first error.
pub type Outgoing = mpsc::Sender<Result<v1::ToFollower, Status>>;

/// How a side of a link ended.
#[derive(Debug)]
pub enum Ended {
    /// This broker ends it.
    Stopped,
    /// The other side ended it in good order, or does not take any more.
    Closed,
    /// It broke, or the other side refused to go on.
    Broken(Status),
    /// The other side sent what cannot be.
    Bad(Fault),
}
