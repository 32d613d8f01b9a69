//! Where a follower begins: its log against the leader's, by epoch history and nothing else (KIP-101, KIP-279). Pure.
//!
//! ```text
//!   leader    epochs 1 1 1 3 3 5 5 5          a follower claims (last epoch, end)
//!   follower  epochs 1 1 1 3 3 3 4            claims (4, 7): the leader's newest not above 4 is 3, and that ends at 5
//!                             ╰─ cut here     so it cuts at 5 and claims (3, 5): that is in the leader's log, it goes on at 5
//! ```
//!
//! A claim that the leader's log holds as it is may go on at its end. Else the leader answers with the newest of its epochs that the
//! follower may have, and where that ends; the follower cuts and claims again. Each round takes at least the claim's last batch
//! off, and never one that both have: what was committed, both have. A high watermark would be no place to cut at: the
//! follower's own lags behind, and it would cut what is committed.

use crate::{
    log::EpochHistory,
    model::{LeaderEpoch, Offset},
};

/// What a follower says of its log when it joins.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Claim {
    /// The epoch of its last batch; `None` when it has none.
    pub last: Option<LeaderEpoch>,
    /// Its log end.
    pub end: Offset,
    /// Which addition it comes by, while it is being added ([`PartitionValue::added_after`]), by the value that its broker knows.
    ///
    /// [`PartitionValue::added_after`]: crate::cluster::PartitionValue::added_after
    pub added: Option<u64>,
}

/// What a leader's log holds on its own disk, and what is below that.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Local {
    /// First offset on its disk.
    pub local_start: Offset,
    /// First offset not committed to the bucket; `None` where nothing is.
    pub tiered_end: Option<Offset>,
}

impl Local {
    /// Where a replica begins that has nothing of use: as late as everything before is committed and to be had elsewhere.
    pub fn begin(&self) -> Offset {
        self.tiered_end.map_or(self.local_start, |end| end.max(self.local_start))
    }
}

/// What a leader answers a claim with.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Join {
    /// The claimed log is the beginning of the leader's: go on at its end.
    At(Offset),
    /// It is not. The newest of the leader's epochs that is not above the claimed one, and the end of what it wrote: cut there and
    /// claim again.
    Diverged {
        /// The epoch.
        epoch: LeaderEpoch,
        /// The first offset after what it wrote.
        end: Offset,
    },
    /// Nothing of it is of use: begin anew at this offset, with what the bucket or the leader has in tables, and claim again.
    BeginAt(Offset),
    /// The follower may not join.
    Refused(JoinRefused),
}

/// Why a follower may not join.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum JoinRefused {
    /// This broker does not lead in that epoch: one side has not heard of the newer one yet.
    #[error("this broker leads in epoch {leads}, not in {asked}: wait for the newer of both")]
    OtherEpoch {
        /// What the follower named.
        asked: LeaderEpoch,
        /// What this broker leads in.
        leads: LeaderEpoch,
    },
    /// It is no replica, as far as is known here.
    #[error("this broker is no replica of the partition, as far as its leader knows")]
    NoReplica,
    /// The one side knows of an addition of this replica that the other has not heard of. What it held before that it may have deleted.
    #[error(
        "the replica comes by {}, its leader knows of {}: wait for the newer of both",
        addition(*.claimed), addition(*.known)
    )]
    OtherAddition {
        /// By the follower: the number of removals before it.
        claimed: Option<u64>,
        /// By the leader.
        known: Option<u64>,
    },
    /// A newer uptime of the same broker is known.
    #[error("a newer uptime of this broker is known: connect again with the broker epoch that it registered")]
    OlderBroker,
    /// Its log has batches of an epoch that is newer than the leader's.
    #[error(
        "the follower's log is of epoch {claimed}, newer than the leader's {leads}: was the metadata put back to an older state?"
    )]
    NewerLog {
        /// The epoch of the follower's last batch.
        claimed: LeaderEpoch,
        /// What this broker leads in.
        leads: LeaderEpoch,
    },
}

/// An addition in words.
fn addition(after: Option<u64>) -> String {
    after.map_or_else(|| "no addition".to_owned(), |after| format!("an addition after {after} removals"))
}

/// Compares a claim with the leader's log, whose epochs are `history` and which ends at `log_end`.
pub fn place(claim: Claim, history: &EpochHistory, log_end: Offset, local: Local) -> Join {
    let begin = local.begin();
    let Some(last) = claim.last else {
        // An empty log knows no epochs: it goes on only from where whoever begins has their tables.
        return if claim.end == begin { Join::At(begin) } else { Join::BeginAt(begin) };
    };
    match history.end_of(last, log_end) {
        // All that it has is older than all that is here.
        None => Join::BeginAt(begin),
        // Cutting would leave it where this disk does not reach.
        Some((_, end)) if claim.end.min(end) < local.local_start => Join::BeginAt(begin),
        Some((epoch, end)) if epoch == last && claim.end <= end => Join::At(claim.end),
        Some((epoch, end)) => Join::Diverged { epoch, end },
    }
}

#[cfg(test)]
mod tests;
