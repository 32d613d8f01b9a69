//! Start of a follower: the leader compares the follower's log with its own by epochs and log ends alone (KIP-101,
//! KIP-279). Pure.
//!
//! # Overview
//!
//! ```text
//!   leader    epochs 1 1 1 3 3 5 5 5          a follower reports (last epoch, end)
//!   follower  epochs 1 1 1 3 3 3 4            reports (4, 7): the leader's newest epoch not above 4 is 3, which ends at 5
//!                             ╰─ truncate     the follower truncates at 5 and reports (3, 5): the leader accepts it at 5
//! ```
//!
//! A follower whose log is a prefix of the leader's continues at its end. Otherwise the leader responds with the newest
//! of its epochs that the follower may share, and with the end of that epoch. The follower truncates there or below,
//! and subscribes again. Each truncation removes at least the follower's last batch, and never a batch that both logs
//! have. A cleanly elected leader has all committed batches, so none of them is removed. A truncation at the follower's
//! high watermark could remove committed records, because that high watermark lags behind the leader's. The follower
//! bootstraps if no truncation helps, or if its log is empty and does not end at the bootstrap offset.

use bytes::Bytes;

use crate::{
    log::EpochHistory,
    model::{LeaderEpoch, Offset},
};

/// Log position of a follower when it subscribes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LogPosition {
    /// Newest epoch in the log's epoch history; `None` if the history is empty.
    pub last_epoch: Option<LeaderEpoch>,
    pub log_end: Offset,
    /// Addition of this replica, identified by the `removal_count` of the value that its broker applied
    /// ([`PartitionValue::added_after`]). `None` if that value is not adding the replica.
    ///
    /// [`PartitionValue::added_after`]: crate::cluster::PartitionValue::added_after
    pub removal_count: Option<u64>,
}

/// Bounds of a leader's log on its own disk and in the object store.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LocalLogBounds {
    /// First offset on the leader's disk.
    pub local_start: Offset,
    /// First offset not committed to the object store; `None` if the object store has no segment of the log.
    pub tiered_end: Option<Offset>,
}

impl LocalLogBounds {
    /// Returns the offset at which a bootstrapped replica starts: the later of the tiered end and the local start. All
    /// records below it are in the object store or deleted.
    pub fn bootstrap_start(&self) -> Offset {
        self.tiered_end.map_or(self.local_start, |end| end.max(self.local_start))
    }
}

/// Outcome of a subscription: the decision of the leader, and the content of its response.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum SubscribeOutcome {
    /// The follower's log is a prefix of the leader's: continue at its end.
    Accepted(Offset),
    /// The follower's log is no prefix of the leader's. `epoch` is the newest of the leader's epochs that is not above
    /// the follower's last one. The follower truncates at `end` or below, where its own log leaves that epoch, and
    /// subscribes again.
    Diverged {
        epoch: LeaderEpoch,
        /// First offset after the records of that epoch.
        end: Offset,
    },
    /// The follower's log is empty, or no truncation makes it a prefix of the leader's local log. The follower resets
    /// the log to the start of these tables, and subscribes again. [`resolve_divergence`] sets the start only; the
    /// actor adds the tables that are not in the object store.
    Bootstrap(Box<BootstrapTables>),
    /// The follower may not subscribe now. It subscribes again after a pause.
    Rejected(SubscribeError),
}

impl SubscribeOutcome {
    /// Returns a bootstrap at [`LocalLogBounds::bootstrap_start`], without tables.
    fn bootstrap(local: LocalLogBounds) -> Self {
        let start = local.bootstrap_start();
        let from_object_store = local.tiered_end == Some(start);
        Self::Bootstrap(Box::new(BootstrapTables { start, from_object_store, ..BootstrapTables::default() }))
    }
}

/// Start of a replica that bootstraps, with the tables of the leader's log before that start.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct BootstrapTables {
    /// First offset of the replica.
    pub start: Offset,
    /// True if the object store holds all records before `start`, and the footer of its last segment holds the tables.
    pub from_object_store: bool,
    /// Epochs before `start` with their first offsets, both ascending; empty if `from_object_store`.
    pub epochs: Vec<(LeaderEpoch, Offset)>,
    /// Producer state before `start`, as [`ProducerTable::to_bytes`](crate::log::ProducerTable::to_bytes) writes it;
    /// empty if `from_object_store`.
    pub producers: Bytes,
}

/// Reason why a follower may not subscribe.
#[derive(Clone, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum SubscribeError {
    /// This broker leads in another epoch: one side has not received the newer epoch yet.
    #[error("this broker leads in epoch {leader_epoch}, not in {requested}: wait for the newer of both epochs")]
    OtherEpoch {
        /// Epoch of the follower's subscription.
        requested: LeaderEpoch,
        /// Epoch in which this broker leads.
        leader_epoch: LeaderEpoch,
    },
    /// The follower's broker is no replica by this leader's metadata.
    #[error("this broker is no replica of the partition by its leader's metadata")]
    NoReplica,
    /// Either the replica or its leader has not received the last addition of the replica. The replica may have deleted
    /// the records that it held before that addition.
    #[error(
        "the replica has {}, and its leader's metadata has {}: wait for the newer of both",
        format_addition(*.reported), format_addition(*.known)
    )]
    OtherAddition {
        /// Addition of the replica that the follower reported, identified by the `removal_count` of its value; `None`
        /// if that value is not adding the replica.
        reported: Option<u64>,
        /// The same by the leader's metadata.
        known: Option<u64>,
    },
    /// The leader has received a newer broker epoch of the follower's broker.
    #[error("a newer broker epoch of this broker is known: connect again with that epoch")]
    OlderBroker,
    /// The follower's log has batches of a newer epoch than the leader's.
    #[error(
        "the follower's log has epoch {last_epoch}, newer than the leader's {leader_epoch}: check whether the metadata was \
         restored from a backup"
    )]
    NewerLog {
        /// Epoch of the follower's last batch.
        last_epoch: LeaderEpoch,
        /// Epoch in which this broker leads.
        leader_epoch: LeaderEpoch,
    },
    /// This broker cannot serve the follower now, or does not lead. On the follower's side every reason has this
    /// variant, because the protocol carries only the text.
    #[error("{reason}")]
    Unavailable { reason: String },
}

/// Formats the addition of a replica by the number of removals before it; `None` if the replica is not being added.
fn format_addition(removal_count: Option<u64>) -> String {
    removal_count.map_or_else(|| "no addition".to_owned(), |count| format!("an addition after {count} removals"))
}

/// Compares a follower's log position with the leader's log, which has the epochs `history` and ends at `log_end`.
/// Never returns [`SubscribeOutcome::Rejected`].
pub fn resolve_divergence(
    position: LogPosition,
    history: &EpochHistory,
    log_end: Offset,
    local: LocalLogBounds,
) -> SubscribeOutcome {
    let Some(last_epoch) = position.last_epoch else {
        // A log without epochs has no records to compare. It continues only at the bootstrap offset, to which a
        // bootstrap would reset it.
        return if position.log_end == local.bootstrap_start() {
            SubscribeOutcome::Accepted(position.log_end)
        } else {
            SubscribeOutcome::bootstrap(local)
        };
    };
    match history.end_of(last_epoch, log_end) {
        // Every record of the follower's log is older than the leader's first epoch.
        None => SubscribeOutcome::bootstrap(local),
        // The follower's log ends below the first offset on the leader's disk, or would after a truncation.
        Some((_, end)) if position.log_end.min(end) < local.local_start => SubscribeOutcome::bootstrap(local),
        Some((epoch, end)) if epoch == last_epoch && position.log_end <= end => {
            SubscribeOutcome::Accepted(position.log_end)
        }
        Some((epoch, end)) => SubscribeOutcome::Diverged { epoch, end },
    }
}

#[cfg(test)]
mod tests;
