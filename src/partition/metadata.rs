//! Metadata of a partition that its task has applied, and the role that it gives this broker. Pure.
//!
//! Partition values reach the task from the metadata cache, from outcomes of proposals, and from reads of the metadata
//! store. [`AppliedMetadata::apply`] maps each value to a [`Transition`], which the task carries out. The model check
//! drives the same decisions.

use std::{collections::BTreeMap, sync::Arc};

use super::leader::member::BrokerStatus;
use crate::{
    cluster::{PartitionValue, Revision},
    model::{BrokerId, LeaderEpoch},
};

/// Time, in milliseconds, that an idle task waits for [late](AppliedMetadata::is_late) metadata before it reads the
/// metadata store.
const METADATA_WAIT_MS: u64 = 1000;

/// Effect of a partition value on the task.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transition {
    /// The value is older than the applied one: nothing changed.
    Stale,
    /// The value was applied already, and the role stays. The statuses of brokers may be new.
    Unchanged,
    /// The value is new; the role and the leader epoch stay. The replicas, ISR or ELR may have changed.
    SetsChanged,
    /// This broker leads in the value's epoch. That epoch is newer than the last one in which it led or refused to
    /// lead.
    Lead,
    /// This broker copies from this leader. Its role or the epoch is new, or its replica was removed and added again
    /// and has to subscribe again.
    Follow(BrokerId),
    /// This broker neither leads nor copies.
    Idle,
    /// The value names this broker as leader, but in no newer epoch than the last one in which it led or refused to
    /// lead. The task is idle and waits for metadata. If none arrives, the task reads the store. If the store has the
    /// same epoch, the task ends the epoch by a proposal without a leader.
    EndedEpoch,
}

/// Result of [`AppliedMetadata::check_read_back`] for a value that was read from the store because the metadata is
/// late.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReadBack {
    /// The value must not be applied. Either it is older than the applied one, or it starts a leadership, which only a
    /// value from the metadata cache may do.
    Ignored,
    /// The value is to be applied.
    Confirmed,
    /// The value is to be applied. An earlier report of this newer epoch was wrong: the store does not have that epoch.
    Disproved(LeaderEpoch),
}

/// Role that the last applied value gave this broker. `Idle` also after that role ended for another reason
/// ([`AppliedMetadata::end_role`]).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
enum AssignedRole {
    #[default]
    Idle,
    Leader,
    Follower,
}

/// Metadata of one partition that its task has applied.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct AppliedMetadata {
    value: Option<Arc<PartitionValue>>,
    /// Revision of `value`; never falls. 0 before the first value.
    revision: Revision,
    /// Statuses of the replicas' brokers; a missing broker is not registered.
    broker_status: BTreeMap<BrokerId, BrokerStatus>,
    /// Role by the last applied value, or idle after [`Self::end_role`].
    role: AssignedRole,
    /// Newest epoch that a follower reported, or in which a tier state was committed. An epoch in which the outcome of
    /// a proposal names this broker as leader counts too. A value of an older epoch gives no role. This epoch falls
    /// only if a read of the store shows that the store does not have it.
    newest_seen_epoch: LeaderEpoch,
    /// Newest epoch in which this task led or refused to lead. The task never leads twice in one epoch, because it has
    /// no state of its earlier proposals.
    last_led_epoch: Option<LeaderEpoch>,
    /// Time, by the clock of ticks, since which the task waits for [late](Self::is_late) metadata; `None` while it does
    /// not wait.
    waiting_since_ms: Option<u64>,
}

impl AppliedMetadata {
    /// Returns the epoch of the applied value; 0 before the first value.
    pub fn epoch(&self) -> LeaderEpoch {
        self.value.as_ref().map_or(LeaderEpoch(0), |value| value.leader_epoch)
    }

    /// Returns the leader that the applied value names.
    pub fn leader(&self) -> Option<BrokerId> {
        self.value.as_ref().and_then(|value| value.leader)
    }

    /// Returns the applied value.
    pub fn value(&self) -> Option<&Arc<PartitionValue>> {
        self.value.as_ref()
    }

    /// Returns the revision of the applied value.
    pub fn revision(&self) -> Revision {
        self.revision
    }

    /// Returns the `removal_count` of the applied value if the value is adding `broker`'s replica; otherwise `None`.
    /// The count distinguishes this addition from earlier ones.
    pub fn added_after(&self, broker: BrokerId) -> Option<u64> {
        self.value.as_ref().and_then(|value| value.added_after(broker))
    }

    /// Returns true if the ISR of the applied value contains `broker`.
    pub fn isr_contains(&self, broker: BrokerId) -> bool {
        self.value.as_ref().is_some_and(|value| value.isr.contains(&broker))
    }

    pub fn broker_status(&self, broker: BrokerId) -> BrokerStatus {
        self.broker_status.get(&broker).copied().unwrap_or(BrokerStatus::Unregistered)
    }

    pub fn set_broker_status(&mut self, broker: BrokerId, status: BrokerStatus) {
        self.broker_status.insert(broker, status);
    }

    pub fn set_broker_statuses(&mut self, statuses: BTreeMap<BrokerId, BrokerStatus>) {
        self.broker_status = statuses;
    }

    /// Returns true if a value of this revision is older than the applied one.
    pub fn is_stale(&self, revision: Revision) -> bool {
        revision < self.revision && !mutant!(ApplyOlderMetadata)
    }

    /// Applies a partition value on broker `me`, and returns the transition that the task must carry out. A value of
    /// the applied revision may be applied again; an older one changes nothing.
    pub fn apply(&mut self, value: Arc<PartitionValue>, revision: Revision, me: BrokerId) -> Transition {
        if self.is_stale(revision) {
            return Transition::Stale;
        }
        let (epoch, leader, addition) = (value.leader_epoch, value.leader, value.added_after(me));
        let role = match leader {
            // A newer epoch was reported, or this broker is no replica.
            _ if epoch < self.newest_seen_epoch || !value.replicas.contains(&me) => AssignedRole::Idle,
            None => AssignedRole::Idle,
            Some(leader) if leader == me => AssignedRole::Leader,
            Some(_) => AssignedRole::Follower,
        };
        // If this broker's replica was removed and added again, the replica must subscribe again: the leader ignores
        // acknowledgements on the old subscription.
        let is_new_addition = addition.is_some() && addition != self.added_after(me);
        let resubscribes = role == AssignedRole::Follower && is_new_addition;
        let is_same_role = role == self.role && epoch == self.epoch() && !resubscribes;
        let is_same_revision = self.value.is_some() && revision == self.revision;
        (self.value, self.revision, self.role) = (Some(value), revision, role);
        match (role, leader) {
            _ if is_same_role && is_same_revision => Transition::Unchanged,
            _ if is_same_role => Transition::SetsChanged,
            (AssignedRole::Leader, _) if self.last_led_epoch.is_some_and(|led| led >= epoch) => {
                self.role = AssignedRole::Idle;
                Transition::EndedEpoch
            }
            (AssignedRole::Leader, _) => Transition::Lead,
            (AssignedRole::Follower, Some(leader)) => Transition::Follow(leader),
            // A follower always has a leader.
            (AssignedRole::Idle, _) | (AssignedRole::Follower, None) => Transition::Idle,
        }
    }

    /// Stores that the task leads in the epoch of the applied value, so that it does not lead in that epoch again.
    /// Called when the task starts to lead: after [`Transition::Lead`], and after it has read the object store if it
    /// needs to.
    pub fn start_leading(&mut self) {
        self.last_led_epoch = Some(self.epoch());
    }

    /// Ends the role, and stores that the task does not lead in the epoch of the applied value, now or later. Called if
    /// the task cannot lead. The metadata then counts as [late](Self::is_late), so the task ends the epoch, and an
    /// election in a newer epoch follows.
    pub fn refuse_leadership(&mut self) {
        self.last_led_epoch = Some(self.epoch());
        self.end_role();
    }

    /// Sets the role to idle. Called if the role ended for another reason than a new value.
    pub fn end_role(&mut self) {
        self.role = AssignedRole::Idle;
    }

    /// Raises the newest seen epoch to `epoch`, which a follower, a tier state or the outcome of a proposal reported.
    /// Values of older epochs then give no role; the current role does not change.
    pub fn on_reported_epoch(&mut self, epoch: LeaderEpoch) {
        self.newest_seen_epoch = self.newest_seen_epoch.max(epoch);
    }

    /// Returns true if the metadata is late. The applied value is then older than a reported epoch. Or it names broker
    /// `me` as leader of an epoch in which its leadership ended or was refused.
    pub fn is_late(&self, me: BrokerId) -> bool {
        let epoch = self.epoch();
        let is_ended = self.role == AssignedRole::Idle
            && self.leader() == Some(me)
            && self.last_led_epoch.is_some_and(|led| led >= epoch);
        self.value.is_some() && (self.newest_seen_epoch > epoch || is_ended)
    }

    /// Called at each tick. Returns true if the task has waited for `METADATA_WAIT_MS`, so that it must read the store
    /// now. The first call with `is_waiting` starts the wait; a call without it resets the wait.
    pub fn is_read_due(&mut self, is_waiting: bool, now_ms: u64) -> bool {
        if !is_waiting {
            self.waiting_since_ms = None;
            return false;
        }
        let since_ms = *self.waiting_since_ms.get_or_insert(now_ms);
        now_ms.saturating_sub(since_ms) >= METADATA_WAIT_MS
    }

    /// Resets the wait, because the metadata is not late. The next wait counts from a later tick.
    pub fn stop_waiting(&mut self) {
        self.waiting_since_ms = None;
    }

    /// Decides whether a value is applied that was read from the store because the metadata is late. If such a value
    /// has an older epoch than the newest seen one, the store does not have the latter. The newest seen epoch then
    /// falls to the value's.
    pub fn check_read_back(&mut self, value: &PartitionValue, revision: Revision, me: BrokerId) -> ReadBack {
        // Only a value from the metadata cache starts a leadership: the cache shows whether this broker id still
        // belongs to this process.
        let starts_leadership = value.leader == Some(me) && value.leader_epoch > self.epoch();
        if revision < self.revision || starts_leadership {
            return ReadBack::Ignored;
        }
        if value.leader_epoch < self.newest_seen_epoch {
            return ReadBack::Disproved(std::mem::replace(&mut self.newest_seen_epoch, value.leader_epoch));
        }
        ReadBack::Confirmed
    }
}

#[cfg(test)]
mod tests;
