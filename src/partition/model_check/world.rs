//! One state of the model: three brokers, the metadata store, and the messages between them.

use crate::{
    cluster::{PartitionValue, ReplicaIntegrity, Revision},
    log::EpochHistory,
    model::{BrokerId, Durability, LeaderEpoch, Offset},
    partition::{
        follower::{BatchHeader, Follower},
        leader::{
            divergence::{LogPosition, SubscribeOutcome},
            isr::{IsrProposal, IsrRules, IsrTracker, LeaderStart},
            member::{BrokerStatus, PeerId, ReplicaProgress},
        },
        metadata::{AppliedMetadata, Transition},
    },
};

/// Number of brokers, each with a replica of the one partition.
pub(super) const BROKERS: usize = 3;

/// Number of times that each event may still happen. At the first state: the bounds of the search.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Budget {
    /// Batches that leaders append.
    pub(super) appends: u8,
    /// Leader epochs that begin, with or without a leader.
    pub(super) epochs: u8,
    /// Processes that exit and leave their page cache.
    pub(super) kills: u8,
    /// Machines that lose their power, with any number of the last unsynced records. In a `replicated` topic every
    /// record may be unsynced.
    pub(super) losses: u8,
    /// Disks that are replaced by empty ones.
    pub(super) wipes: u8,
    /// Leases that expire although the process runs.
    pub(super) expiries: u8,
    /// Elections while the leader runs and is registered.
    pub(super) transfers: u8,
    /// Proposals whose outcome the leader does not receive.
    pub(super) unknowns: u8,
    /// Messages and transactions that do not arrive at once.
    pub(super) late: u8,
    /// Links that break.
    pub(super) breaks: u8,
    /// Times that a leader finds its followers lagging.
    pub(super) lags: u8,
    /// Times that `min.insync.replicas` is lowered by one.
    pub(super) lowerings: u8,
}

impl Budget {
    /// None of these events.
    pub(super) const NOTHING: Self = Self {
        appends: 0,
        epochs: 0,
        kills: 0,
        losses: 0,
        wipes: 0,
        expiries: 0,
        transfers: 0,
        unknowns: 0,
        late: 0,
        breaks: 0,
        lags: 0,
        lowerings: 0,
    };
}

/// Input of a search.
#[derive(Clone, Copy, Debug)]
pub(super) struct Setup {
    pub(super) durability: Durability,
    pub(super) min_insync: usize,
    /// Number of brokers in the first ISR. The remaining brokers follow outside the ISR.
    pub(super) in_sync: usize,
    pub(super) budget: Budget,
}

/// Role of a broker's replica.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Role {
    /// The process has exited; the integrity that its next start will find.
    Exited(ReplicaIntegrity),
    /// Neither leads nor follows.
    Idle,
    Leading(Box<IsrTracker>),
    Following(Follower),
}

/// One broker and its replica.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct ModelBroker {
    pub(super) role: Role,
    /// Broker epoch of its last registration.
    pub(super) epoch: Revision,
    /// Metadata that the broker has applied.
    pub(super) metadata: AppliedMetadata,
    /// Epochs of its batches, one record each. Only the leader of an epoch appends records of that epoch, so epoch and
    /// offset identify a record.
    pub(super) log: Vec<LeaderEpoch>,
    /// Number of records on stable storage; always all in a `replicated` topic, and if no power loss is in the budget.
    pub(super) persisted: usize,
    /// True if the broker may have lost acknowledged records.
    pub(super) has_lost: bool,
    /// High watermark at the end of the last role.
    pub(super) high_watermark: Offset,
}

/// A message to a leader. Messages may arrive late and in any order.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct ToLeader {
    pub(super) from: PeerId,
    pub(super) epoch: LeaderEpoch,
    pub(super) content: FollowerSends,
}

/// Content of a message to a leader.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum FollowerSends {
    /// Subscription.
    Position(LogPosition),
    /// Acknowledgement.
    Progress(ReplicaProgress),
}

/// A message to a follower.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct ToFollower {
    pub(super) epoch: LeaderEpoch,
    pub(super) high_watermark: Offset,
    pub(super) content: LeaderSends,
}

/// Content of a message to a follower.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum LeaderSends {
    /// Response to a subscription.
    Response(SubscribeOutcome),
    /// The next batch; empty if the message carries a high watermark alone.
    Batches(Vec<BatchHeader>),
}

/// A transaction of a leader that the store has not received yet.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct StoreCall {
    pub(super) proposal: IsrProposal,
    pub(super) owner: BrokerId,
    /// Leader epoch in which the owner waits for the outcome; `None` if no leader waits.
    pub(super) awaited: Option<LeaderEpoch>,
}

/// Messages between a leader and a follower that did not arrive at once: those to the leader, and those to the
/// follower.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct LinkQueue {
    pub(super) replicate_request: Vec<ToLeader>,
    pub(super) replicate_response: Vec<ToFollower>,
}

/// One state of the model. The state has the partition's value in the metadata store, the registrations, the brokers,
/// the messages and transactions in flight, and the remaining event budget.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct ModelState {
    pub(super) budget: Budget,
    pub(super) durability: Durability,
    pub(super) min_insync: usize,
    pub(super) value: PartitionValue,
    pub(super) revision: Revision,
    /// Broker epoch of each broker's registration; `None` if the broker is not registered.
    pub(super) registered: [Option<Revision>; BROKERS],
    pub(super) brokers: [ModelBroker; BROKERS],
    /// Messages between a leader and a follower: `links[leader][follower]`.
    pub(super) links: [[LinkQueue; BROKERS]; BROKERS],
    /// Transactions on their way to the store.
    pub(super) calls: Vec<StoreCall>,
    /// Epochs of all records that were ever committed, by offset. For the rules only.
    pub(super) committed: Vec<LeaderEpoch>,
    /// All leaders so far with their epochs and broker epochs, for the rules only.
    pub(super) leaders: Vec<(LeaderEpoch, BrokerId, Revision)>,
}

/// Returns the id of the broker with this index.
pub(super) fn id(index: usize) -> BrokerId {
    BrokerId(u32::try_from(index).expect("broker numbers are small") + 1)
}

/// Returns the index of a broker.
pub(super) fn index(id: BrokerId) -> usize {
    usize::try_from(id.0).expect("broker numbers are small") - 1
}

/// Returns the end offset of a log with this number of records.
pub(super) fn at(records: usize) -> Offset {
    Offset::ZERO.plus(u64::try_from(records).expect("logs are short"))
}

/// Returns the number of records below an offset.
pub(super) fn count(offset: Offset) -> usize {
    usize::try_from(offset.get()).expect("logs are short")
}

impl ModelBroker {
    pub(super) fn progress(&self) -> ReplicaProgress {
        ReplicaProgress { log_end: at(self.log.len()), persisted_end: at(self.persisted) }
    }

    /// Returns the epoch history of the log.
    pub(super) fn history(&self) -> EpochHistory {
        let mut history = EpochHistory::new();
        for (offset, epoch) in self.log.iter().enumerate() {
            assert!(history.record(*epoch, at(offset)), "the rules check the epochs after each step");
        }
        history
    }

    /// Returns true if the process has not exited.
    pub(super) fn is_running(&self) -> bool {
        !matches!(self.role, Role::Exited(_))
    }

    /// Returns the broker's high watermark; 0 if the process has exited.
    pub(super) fn committed_end(&self) -> Offset {
        match &self.role {
            Role::Exited(_) => Offset::ZERO,
            Role::Idle => self.high_watermark,
            Role::Leading(leader) => leader.high_watermark(),
            Role::Following(follower) => follower.high_watermark(),
        }
    }
}

impl ModelState {
    /// Returns the state in which the value names broker 1 as leader of epoch 1, no broker has applied it, and all logs
    /// are empty.
    pub(super) fn new(setup: Setup) -> Self {
        let brokers: Vec<BrokerId> = (0..BROKERS).map(id).collect();
        let isr = brokers[..setup.in_sync].to_vec();
        let value = PartitionValue { isr, ..PartitionValue::new(brokers, LeaderEpoch(1)) };
        let broker = || ModelBroker {
            role: Role::Idle,
            epoch: Revision(1),
            metadata: AppliedMetadata::default(),
            log: Vec::new(),
            persisted: 0,
            has_lost: false,
            high_watermark: Offset::ZERO,
        };
        Self {
            budget: setup.budget,
            durability: setup.durability,
            min_insync: setup.min_insync,
            value,
            revision: Revision(1),
            registered: [Some(Revision(1)); BROKERS],
            brokers: std::array::from_fn(|_| broker()),
            links: Default::default(),
            calls: Vec::new(),
            committed: Vec::new(),
            leaders: Vec::new(),
        }
    }

    pub(super) fn isr_rules(&self) -> IsrRules {
        IsrRules { durability: self.durability, min_insync: self.min_insync, lag_ms: 1 }
    }

    /// Returns the broker with the broker epoch of its last registration.
    pub(super) fn peer(&self, broker: usize) -> PeerId {
        PeerId { broker: id(broker), epoch: self.brokers[broker].epoch }
    }

    /// Returns true if the broker is registered.
    pub(super) fn is_registered(&self, broker: BrokerId) -> bool {
        self.registered[index(broker)].is_some()
    }

    /// Returns the broker's status as the metadata cache shows it.
    pub(super) fn broker_status(&self, broker: usize) -> BrokerStatus {
        self.registered[broker].map_or(BrokerStatus::Unregistered, BrokerStatus::Registered)
    }

    /// Returns the new role of a broker after this transition to the current value; `None` if it keeps its role.
    pub(super) fn role_after(&self, me: usize, transition: Transition) -> Option<Role> {
        let broker = &self.brokers[me];
        match transition {
            Transition::Stale | Transition::Unchanged | Transition::SetsChanged => None,
            Transition::Lead => {
                let start = LeaderStart {
                    me: id(me),
                    value: self.value.clone(),
                    revision: self.revision,
                    progress: broker.progress(),
                    committed_end: broker.committed_end(),
                    rules: self.isr_rules(),
                };
                Some(Role::Leading(Box::new(IsrTracker::new(start))))
            }
            Transition::Follow(leader) => {
                let (epoch, unclean) = (self.value.leader_epoch, self.value.unclean_epoch);
                Some(Role::Following(Follower::new(leader, epoch, broker.committed_end(), unclean)))
            }
            Transition::Idle | Transition::EndedEpoch => Some(Role::Idle),
        }
    }
}
