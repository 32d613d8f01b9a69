//! Start of a follower: its log is compared with the leader's by epoch history and nothing else (KIP-101, KIP-279). Pure.
//!
//! # Overview
//!
//! ```text
//!   leader    epochs 1 1 1 3 3 5 5 5          a follower reports (last epoch, end)
//!   follower  epochs 1 1 1 3 3 3 4            reports (4, 7): the leader's newest epoch not above 4 is 3, which ends at 5
//!                             ╰─ truncate     so it truncates at 5 and reports (3, 5): that is in the leader's log, it continues at 5
//! ```
//!
//! A follower whose log is a prefix of the leader's continues at its end. Otherwise the leader responds with the newest of its epochs
//! that the follower may share, and with the end of that epoch. The follower truncates there and subscribes again. Each exchange removes
//! at least the follower's last batch, and never a batch that both logs have; both have all committed batches. A high watermark would be
//! no place to truncate at: the follower's own lags behind, so committed records would be removed.

use crate::{
    log::EpochHistory,
    model::{LeaderEpoch, Offset},
};

/// Log position of a follower when it subscribes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Claim {
    /// Epoch of the last batch; `None` if the log has none.
    pub last: Option<LeaderEpoch>,
    /// Log end.
    pub end: Offset,
    /// Addition of the replica while it is being added ([`PartitionValue::added_after`]), by the value that its broker applied.
    ///
    /// [`PartitionValue::added_after`]: crate::cluster::PartitionValue::added_after
    pub added: Option<u64>,
}

/// Bounds of a leader's log on its own disk and in the object store.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Local {
    /// First offset on its disk.
    pub local_start: Offset,
    /// First offset not committed to the object store; `None` if nothing is committed there.
    pub tiered_end: Option<Offset>,
}

impl Local {
    /// Returns the start of an empty or useless replica: the latest offset before which all records are committed, and are in the object
    /// store or deleted.
    pub fn begin(&self) -> Offset {
        self.tiered_end.map_or(self.local_start, |end| end.max(self.local_start))
    }
}

/// Leader's decision about a subscription.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Join {
    /// The follower's log is a prefix of the leader's: continue at its end.
    At(Offset),
    /// The follower's log is no prefix. The newest of the leader's epochs that is not above the follower's last one, and the end of that
    /// epoch: truncate there and subscribe again.
    Diverged {
        epoch: LeaderEpoch,
        /// First offset after the records of that epoch.
        end: Offset,
    },
    /// The follower's log is useless: reset it to this offset, with the tables of the object store or the leader, and subscribe again.
    BeginAt(Offset),
    /// The follower may not subscribe.
    Refused(JoinRefused),
}

/// Reason why a follower may not subscribe.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum JoinRefused {
    /// This broker does not lead in that epoch: one side has not received the newer epoch yet.
    #[error("this broker leads in epoch {leads}, not in {asked}: wait for the newer of both")]
    OtherEpoch {
        /// Epoch that the follower named.
        asked: LeaderEpoch,
        /// Epoch in which this broker leads.
        leads: LeaderEpoch,
    },
    /// The broker is no replica by this leader's metadata.
    #[error("this broker is no replica of the partition, as far as its leader knows")]
    NoReplica,
    /// One side has received an addition of this replica, and the other side has not. The replica may have deleted the records that it
    /// held before.
    #[error(
        "the replica comes by {}, its leader knows of {}: wait for the newer of both",
        addition(*.claimed), addition(*.known)
    )]
    OtherAddition {
        /// Addition that the follower named: the number of removals before it.
        claimed: Option<u64>,
        /// Addition in the leader's metadata.
        known: Option<u64>,
    },
    /// A newer incarnation of the same broker is known.
    #[error("a newer uptime of this broker is known: connect again with the broker epoch that it registered")]
    OlderBroker,
    /// The follower's log has batches of a newer epoch than the leader's.
    #[error(
        "the follower's log is of epoch {claimed}, newer than the leader's {leads}: was the metadata put back to an older state?"
    )]
    NewerLog {
        /// Epoch of the follower's last batch.
        claimed: LeaderEpoch,
        /// Epoch in which this broker leads.
        leads: LeaderEpoch,
    },
}

/// Formats an addition.
fn addition(after: Option<u64>) -> String {
    after.map_or_else(|| "no addition".to_owned(), |after| format!("an addition after {after} removals"))
}

/// Compares a log position with the leader's log, which has the epochs `history` and ends at `log_end`.
pub fn place(claim: Claim, history: &EpochHistory, log_end: Offset, local: Local) -> Join {
    let begin = local.begin();
    let Some(last) = claim.last else {
        // An empty log has no epochs: it continues only at the bootstrap offset, for which it has the tables.
        return if claim.end == begin { Join::At(begin) } else { Join::BeginAt(begin) };
    };
    match history.end_of(last, log_end) {
        // Every record of the follower's log is older than the leader's first epoch.
        None => Join::BeginAt(begin),
        // After a truncation the follower's log would end below the start of this disk.
        Some((_, end)) if claim.end.min(end) < local.local_start => Join::BeginAt(begin),
        Some((epoch, end)) if epoch == last && claim.end <= end => Join::At(claim.end),
        Some((epoch, end)) => Join::Diverged { epoch, end },
    }
}

#[cfg(test)]
mod tests;
