//! Metadata of a partition that its task has applied, and the role that it gives this broker. Pure.
//!
//! Values of the partition reach the task from the metadata cache, from outcomes of proposals, and from reads of the
//! store. [`AppliedMetadata::apply`] decides about each of them; the task carries out the [`Transition`]. The model
//! check drives the same decisions.

use std::{collections::BTreeMap, sync::Arc};

use super::leader::member::BrokerStatus;
use crate::{
    cluster::{PartitionValue, Revision},
    model::{BrokerId, LeaderEpoch},
};

/// Maximum time, in milliseconds, that a task whose leadership ended waits for newer metadata.
const METADATA_WAIT_MS: u64 = 1000;

/// Effect of a value on the task.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transition {
    /// The value is older than the applied one: nothing changed.
    Stale,
    /// The value was applied already. The statuses of brokers may be new.
    Same,
    /// The value is new, and the role stays in its epoch. The replicas, ISR or ELR may have changed.
    SetsChanged,
    /// This broker leads in the value's epoch, in which it has not led yet.
    Lead,
    /// This broker copies from the leader, from another leader than before or with another subscription.
    Follow(BrokerId),
    /// This broker neither leads nor copies.
    Idle,
    /// The value names this broker as leader of an epoch whose leadership ended here. The task is idle and waits; a
    /// read of the store then ends the epoch ([`AppliedMetadata::check_read_back`]).
    EndedEpoch,
}

/// Effect of a value that was read from the store because the metadata is late.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReadBack {
    /// The value changes nothing: it is old, or the metadata cache will deliver it.
    Ignored,
    /// The value is to be applied.
    Confirmed,
    /// The value is to be applied. The store does not have this epoch, which was reported here.
    Disproved(LeaderEpoch),
}

/// Role that the last applied value gave. A role that ended for another reason is idle.
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
    /// Revision of `value`. Never falls.
    revision: Revision,
    /// Statuses of the replicas' brokers; a missing broker is not registered.
    broker_status: BTreeMap<BrokerId, BrokerStatus>,
    role: AssignedRole,
    /// Newest epoch that a follower reported, or in which a tier state was committed. A value of an older epoch gives
    /// no role. It falls only if the store does not have that epoch.
    newest_seen_epoch: LeaderEpoch,
    /// Newest epoch in which this task led. It never leads twice in one epoch, because it has no state of its earlier
    /// proposals.
    last_led_epoch: Option<LeaderEpoch>,
    /// Time, by the clock of ticks, since which the metadata is [late](Self::is_late).
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

    /// Returns the addition of that broker's replica while it is being added.
    pub fn added_after(&self, broker: BrokerId) -> Option<u64> {
        self.value.as_ref().and_then(|value| value.added_after(broker))
    }

    pub fn has_in_sync(&self, broker: BrokerId) -> bool {
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

    /// Applies a value of the partition to the broker `me`.
    pub fn apply(&mut self, value: Arc<PartitionValue>, revision: Revision, me: BrokerId) -> Transition {
        if self.is_stale(revision) {
            return Transition::Stale;
        }
        let (epoch, leader, addition) = (value.leader_epoch, value.leader, value.added_after(me));
        let role = match leader {
            // Another broker leads by now.
            _ if epoch < self.newest_seen_epoch || !value.replicas.contains(&me) => AssignedRole::Idle,
            None => AssignedRole::Idle,
            Some(leader) if leader == me => AssignedRole::Leader,
            Some(_) => AssignedRole::Follower,
        };
        // The replica was removed and added again meanwhile: its subscription no longer counts.
        let is_new_addition = addition.is_some() && addition != self.added_after(me);
        let restarts = role == AssignedRole::Follower && is_new_addition;
        let stays = role == self.role && epoch == self.epoch() && !restarts;
        let is_applied = self.value.is_some() && revision == self.revision;
        (self.value, self.revision, self.role) = (Some(value), revision, role);
        match (role, leader) {
            _ if stays && is_applied => Transition::Same,
            _ if stays => Transition::SetsChanged,
            (AssignedRole::Leader, _) if self.last_led_epoch.is_some_and(|led| led >= epoch) => {
                self.role = AssignedRole::Idle;
                Transition::EndedEpoch
            }
            (AssignedRole::Leader, _) => Transition::Lead,
            (AssignedRole::Follower, Some(leader)) => Transition::Follow(leader),
            _ => Transition::Idle,
        }
    }

    /// Records that the task leads in the epoch of the applied value. After [`Transition::Lead`] the task may first
    /// have to read the object store.
    pub fn start_leading(&mut self) {
        self.last_led_epoch = Some(self.epoch());
    }

    /// Records that the task refuses to lead in the epoch of the applied value. That epoch then counts as one in which
    /// the task led: it ends, and an election in a newer epoch follows.
    pub fn refuse_leadership(&mut self) {
        self.last_led_epoch = Some(self.epoch());
        self.end_role();
    }

    /// Records that the role ended for another reason than a value.
    pub fn end_role(&mut self) {
        self.role = AssignedRole::Idle;
    }

    /// Records that a newer epoch was reported.
    pub fn on_reported_epoch(&mut self, epoch: LeaderEpoch) {
        self.newest_seen_epoch = self.newest_seen_epoch.max(epoch);
    }

    /// Returns true if the metadata is late: the value names this broker as leader of an epoch that ended here, or
    /// lacks an epoch that was reported here.
    pub fn is_late(&self, me: BrokerId) -> bool {
        let epoch = self.epoch();
        let is_ended = self.role == AssignedRole::Idle
            && self.leader() == Some(me)
            && self.last_led_epoch.is_some_and(|led| led >= epoch);
        self.value.is_some() && (self.newest_seen_epoch > epoch || is_ended)
    }

    /// Returns true if the task has waited so long for late metadata that the store is to be read. `waits` is false
    /// while the task does not wait; the time then starts again.
    pub fn is_read_due(&mut self, waits: bool, now_ms: u64) -> bool {
        if !waits {
            self.waiting_since_ms = None;
            return false;
        }
        let since_ms = *self.waiting_since_ms.get_or_insert(now_ms);
        now_ms.saturating_sub(since_ms) >= METADATA_WAIT_MS
    }

    /// Records that the metadata is not late.
    pub fn stop_waiting(&mut self) {
        self.waiting_since_ms = None;
    }

    /// Decides about a value that was read from the store because the metadata is late.
    pub fn check_read_back(&mut self, value: &PartitionValue, revision: Revision, me: BrokerId) -> ReadBack {
        // Only the metadata cache starts a leadership: it shows whether this broker id still belongs to this process.
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
