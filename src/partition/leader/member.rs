//! A leader's state of another replica: its identity, acknowledgements, link and registration. Decides nothing.

use crate::{
    cluster::Revision,
    model::{BrokerId, Durability, LeaderEpoch, Offset},
};

/// Another broker in one broker epoch: the other end of a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PeerId {
    pub broker: BrokerId,
    /// Broker epoch: the create revision of the registration.
    pub epoch: Revision,
}

/// Progress of a replica's log.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct ReplicaProgress {
    /// Offset after the last record in the log.
    pub log_end: Offset,
    /// First offset not known to be on stable storage; never above `log_end`.
    pub persisted_end: Offset,
}

impl ReplicaProgress {
    /// Returns the end that counts as acknowledged in a topic with this durability.
    pub(super) fn acked_for(self, durability: Durability) -> Offset {
        match durability {
            Durability::Persisted => self.persisted_end,
            Durability::Replicated => self.log_end,
        }
    }
}

/// Reason why a follower is disconnected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DisconnectCause {
    /// The link or the subscription ended. The follower may subscribe again soon; its time to catch up keeps running.
    LinkLost,
    /// The process has exited.
    ProcessGone,
    /// The broker shuts down, or can no longer write.
    ShuttingDown,
}

/// Status of a broker in the metadata cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum BrokerStatus {
    /// Registered, with this broker epoch.
    Registered(Revision),
    /// Registered and shutting down: the broker is not admitted to the ISR.
    ShuttingDown,
    /// Not registered.
    Unregistered,
}

/// Error of an acknowledgement that does not count.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum AckError {
    /// The acknowledgement is of another leader epoch.
    #[error("the acknowledgement has epoch {acknowledged_epoch}, and this broker leads in epoch {leader_epoch}")]
    OtherEpoch {
        /// Leader epoch of the acknowledgement.
        acknowledged_epoch: LeaderEpoch,
        /// Leader epoch of this leader.
        leader_epoch: LeaderEpoch,
    },
    /// The replica has no accepted subscription on that link in this epoch. Either the subscription has ended, the link
    /// has another broker epoch, or the broker is no replica.
    #[error("broker {broker} has no subscription on a link with broker epoch {epoch}")]
    NotSubscribed {
        /// Sender of the acknowledgement.
        broker: BrokerId,
        /// Broker epoch of its link.
        epoch: Revision,
    },
    /// The acknowledged ends are impossible.
    #[error(
        "the acknowledged log end {acked_log_end} and persisted end {acked_persisted_end} are impossible: the leader's log ends at \
         {log_end}"
    )]
    Impossible {
        /// Acknowledged log end.
        acked_log_end: Offset,
        /// Acknowledged persisted end.
        acked_persisted_end: Offset,
        /// The leader's log end.
        log_end: Offset,
    },
}

/// State of one other replica, from the metadata cache and from its link. A leader ignores the state of a broker that
/// is no replica by the partition's value.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct MemberState {
    /// Broker epoch of the link on which the replica is subscribed; `None` while it is not.
    pub(super) link: Option<Revision>,
    /// Progress acknowledged since the last subscription; `None` before the first acknowledgement. Stays after a
    /// disconnect.
    pub(super) acked: Option<ReplicaProgress>,
    /// Last status in the metadata cache; `None` before the first.
    pub(super) registration: Option<BrokerStatus>,
    /// True if an exit or a shutdown was reported, and the replica has not subscribed since.
    pub(super) departed: bool,
    /// True if the replica, as an ISR member, reported a log end below the high watermark: it lost records that it had
    /// acknowledged.
    pub(super) lost_data: bool,
    /// Log end that the replica has to reach, and the time in milliseconds at which the target was set. `None` if the
    /// replica had acknowledged all records at the last tick, before the first tick, and outside the ISR.
    pub(super) target: Option<(Offset, u64)>,
    /// True if the replica did not reach the target in time, and has neither caught up nor left the ISR since.
    pub(super) is_lagging: bool,
}

impl MemberState {
    /// Returns the broker epoch with which the replica may be admitted; `None` if its broker is not registered, or
    /// shuts down.
    pub(super) fn registered_epoch(&self) -> Option<Revision> {
        match self.registration {
            Some(BrokerStatus::Registered(epoch)) => Some(epoch),
            _ => None,
        }
    }

    /// Returns true if the replica must leave the ISR with the next proposal. The process of the replica has then
    /// exited or shuts down, or its broker is not registered.
    pub(super) fn is_leaving(&self) -> bool {
        self.departed || matches!(self.registration, Some(BrokerStatus::ShuttingDown | BrokerStatus::Unregistered))
    }
}
