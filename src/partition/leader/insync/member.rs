//! Another replica, as its leader knows it: who it is, what it acknowledged, and what links and the view say of it. Decides nothing.

use crate::{
    cluster::Revision,
    model::{BrokerId, Durability, LeaderEpoch, Offset},
};

/// One uptime of another broker: who is at the other end of a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Peer {
    /// The broker.
    pub broker: BrokerId,
    /// Its broker epoch: the create revision of its registration.
    pub epoch: Revision,
}

/// How far a replica's log reaches.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Ends {
    /// First unwritten offset.
    pub written: Offset,
    /// First offset not known to be on stable storage; never above `written`.
    pub persisted: Offset,
}

impl Ends {
    /// What counts as acknowledged by this rule.
    pub(super) fn by(self, durability: Durability) -> Offset {
        match durability {
            Durability::Persisted => self.persisted,
            Durability::Replicated => self.written,
        }
    }
}

/// Why a follower is not connected any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Departure {
    /// The link ended: it may be back soon, and its time to catch up runs on.
    LinkLost,
    /// Its process is gone.
    Gone,
    /// It stops, or cannot write any more.
    Stopping,
}

/// What the view says of a broker.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Registration {
    /// It is registered, under this broker epoch.
    Running(Revision),
    /// It is registered and stops: it is not admitted any more.
    Stopping,
    /// It is not registered.
    None,
}

/// An acknowledgement that does not count.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum Stale {
    /// It is of another leader epoch.
    #[error("the acknowledgement is of epoch {acknowledged}, this leader's is {leads}")]
    OtherEpoch {
        /// The epoch that it names.
        acknowledged: LeaderEpoch,
        /// This leader's.
        leads: LeaderEpoch,
    },
    /// It came over a link on which this replica has not joined in this epoch: an older uptime's, or a stranger's.
    #[error("broker {broker} has not joined over a link of broker epoch {epoch}")]
    NotJoined {
        /// Who sent it.
        broker: BrokerId,
        /// The broker epoch of its link.
        epoch: Revision,
    },
    /// It says more than can be.
    #[error(
        "the acknowledged ends {written} (written) and {persisted} (persisted) cannot be: the leader's log ends at {log_end}"
    )]
    Impossible {
        /// What it calls written.
        written: Offset,
        /// What it calls persisted.
        persisted: Offset,
        /// The leader's log end.
        log_end: Offset,
    },
}

/// What is known of one other replica. It is kept for brokers that the view or a link told of; the replicas of the value say who counts.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Member {
    /// The broker epoch of the link on which it follows; `None` while it does not.
    pub(super) link: Option<Revision>,
    /// What it acknowledged on its last link; `None` before its first word there.
    pub(super) acked: Option<Ends>,
    /// The view's last word on it; `None` before the first.
    pub(super) registration: Option<Registration>,
    /// Its link told that it is gone or stops, and it has not joined again since.
    pub(super) departed: bool,
    /// It claimed to end below the high watermark: it lost what it acknowledged.
    pub(super) lost: bool,
    /// The log end that it has to reach, and when that was set.
    pub(super) target: Option<(Offset, u64)>,
    /// It did not reach the target in time, and has not caught up since.
    pub(super) lags: bool,
}

impl Member {
    /// The broker epoch under which it may be admitted.
    pub(super) fn registered(&self) -> Option<Revision> {
        match self.registration {
            Some(Registration::Running(epoch)) => Some(epoch),
            _ => None,
        }
    }

    /// Whether it is to leave the ISR at once: nobody may elect it, or it is known to be gone.
    pub(super) fn is_leaving(&self) -> bool {
        self.departed || matches!(self.registration, Some(Registration::Stopping | Registration::None))
    }
}
