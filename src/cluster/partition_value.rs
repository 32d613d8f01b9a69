//! The value of `partitions/{topic-id}/{n}`: the replicas of a partition, its leader and its in-sync replicas. Pure.
//!
//! # Overview
//!
//! Only the functions of this module compute an ISR or an ELR. Leaders, the controller, starting brokers and operators
//! all compute their new values here and write them by compare-and-set. So every order of these writes is correct.
//!
//! | function | caller | leader | ISR | ELR |
//! | --- | --- | --- | --- | --- |
//! | [`shrink`] | leader | unchanged | loses members | gains them below the min ISR, else empty |
//! | [`expand`] | leader | unchanged | gains members | empty once the ISR has the min ISR |
//! | [`elect`] | controller, operator | new | its live members, or the elected replica alone | below the min ISR, gains the members that are not live; else empty |
//! | [`elect_unclean`] | operator | new | the elected replica alone | empty |
//! | [`after_restart`] | starting broker | none if the broker led | may lose the broker | may lose the broker |
//! | [`leaderless`] | controller, leader that resigns | none | unchanged | unchanged |
//! | [`resign`] | leader whose disk failed | none | loses the leader unless it is the last member | as `shrink` |
//! | [`remove_from_sets`] | leader | none if the broker led | loses the broker | loses the broker |
//! | [`queue_reassignment`] | operator | unchanged | unchanged | unchanged |
//! | [`start_reassignment`], [`start_queued`] | controller, operator | unchanged | unchanged | unchanged |
//! | [`complete_reassignment`] | controller | unchanged | loses dropped replicas | loses dropped replicas |
//! | [`cancel_reassignment`] | operator | unchanged | loses dropped replicas | loses dropped replicas |
//!
//! # Invariants
//!
//! - The leader is a member of the ISR, ISR and ELR are disjoint, and all members are replicas.
//! - The epoch grows by one exactly when the leader changes, also to none, and at each unclean election. So an epoch
//!   has at most one leader, and a compare of the epoch also compares the leader.
//! - Every change that ends a reassignment or drops a replica increments `removal_count`. A new replica stays in
//!   `adding` until the reassignment completes, which requires that replica in the ISR. So a replica in `adding` is the
//!   same replica in two values only if both have the same `removal_count`. A replica outside `adding` was in the ISR
//!   at least once.
//! - Every member of ISR ∪ ELR that kept what it acknowledged holds all committed records. Leaders ensure this: they
//!   commit only what the whole ISR holds, only with the min ISR, and only while the ELR is empty.
//! - Only [`shrink`], [`resign`] and [`elect`] add members to the ELR. The replicas that [`remove_from_sets`] removes
//!   may lack committed records, and the data of those that reassignments remove is about to be deleted.
//!
//! [`shrink`]: PartitionValue::shrink
//! [`expand`]: PartitionValue::expand
//! [`elect`]: PartitionValue::elect
//! [`elect_unclean`]: PartitionValue::elect_unclean
//! [`after_restart`]: PartitionValue::after_restart
//! [`leaderless`]: PartitionValue::leaderless
//! [`resign`]: PartitionValue::resign
//! [`remove_from_sets`]: PartitionValue::remove_from_sets
//! [`queue_reassignment`]: PartitionValue::queue_reassignment
//! [`start_reassignment`]: PartitionValue::start_reassignment
//! [`start_queued`]: PartitionValue::start_queued
//! [`complete_reassignment`]: PartitionValue::complete_reassignment
//! [`cancel_reassignment`]: PartitionValue::cancel_reassignment

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use crate::model::{BrokerId, LeaderEpoch};

/// The value of `partitions/{topic-id}/{n}`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct PartitionValue {
    /// Brokers with a replica of the partition; the first is the preferred leader.
    pub replicas: Vec<BrokerId>,
    /// Broker that orders the writes; `None` from the loss of a leader to the next election.
    pub leader: Option<BrokerId>,
    /// Leader epoch: grows by one at each change of the leader, also to none, and at each unclean election.
    pub leader_epoch: LeaderEpoch,
    /// In-sync replicas: every commit waits for all of them.
    pub isr: Vec<BrokerId>,
    /// Eligible leader replicas: they left the ISR and may still lead cleanly. While the ELR has members, nothing is
    /// committed.
    #[serde(default)]
    pub elr: Vec<BrokerId>,
    /// Replicas that the reassignment in progress adds; they are in `replicas` too.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub adding: Vec<BrokerId>,
    /// Replicas that the reassignment in progress removes; they are in `replicas` too.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub removing: Vec<BrokerId>,
    /// Number of changes that ended a reassignment or dropped a replica. A dropped replica's broker deletes its data,
    /// so this number distinguishes a replica that is being added from an earlier replica on the same broker. Never
    /// falls.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub removal_count: u64,
    /// Last leader epoch before which committed records may have been lost: by an unclean election, or because the only
    /// eligible replica had an unclean shutdown. A replica whose log is older than this epoch may truncate below its
    /// last high watermark.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unclean_epoch: Option<LeaderEpoch>,
    /// True if the leader of the epoch in `unclean_epoch` must delete its log when the log is unusable; the operator
    /// accepted this. Otherwise that leader must not delete its log.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub discard_local: bool,
    /// Replicas of the queued reassignment that an operator requested, the preferred leader first; empty if none is
    /// queued.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub queued_replicas: Vec<BrokerId>,
}

/// Returns true if `removal_count` is zero: the stored value then omits the field.
#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes a reference")]
const fn is_zero(count: &u64) -> bool {
    *count == 0
}

/// Integrity of a local replica, as verified by a starting broker.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ReplicaIntegrity {
    /// The replica holds everything that it ever acknowledged.
    Intact,
    /// The files are intact and the data directory is the registered one, but the marker of a clean shutdown is
    /// missing. The topic acknowledges records that are only in the page cache, or its durability is unknown. Such
    /// records may be lost.
    UncleanShutdown,
    /// The replica may lack acknowledged records: its data directory is another one or an older copy, its files are
    /// corrupt, or it does not exist.
    Unverified,
}

impl PartitionValue {
    /// Returns a value whose replicas are all in sync; the first replica leads in this epoch.
    pub fn new(replicas: Vec<BrokerId>, leader_epoch: LeaderEpoch) -> Self {
        Self {
            leader: replicas.first().copied(),
            leader_epoch,
            isr: replicas.clone(),
            replicas,
            elr: Vec::new(),
            adding: Vec::new(),
            removing: Vec::new(),
            removal_count: 0,
            unclean_epoch: None,
            discard_local: false,
            queued_replicas: Vec::new(),
        }
    }

    /// Removes the members `removed` from the ISR, except the leader; called by the leader for members that lag or are
    /// not live.
    ///
    /// If at least `min_insync` members remain, every commit so far and later includes the remaining members. So the
    /// removed members are not needed, and the ELR is emptied. With fewer, the removed members hold every committed
    /// record and will keep doing so, because the leader commits nothing below the min ISR. So they enter the ELR.
    /// Replicas outside the ISR are ignored.
    #[must_use]
    pub fn shrink(&self, removed: &BTreeSet<BrokerId>, min_insync: usize) -> Self {
        let (dropped, isr): (Vec<_>, Vec<_>) =
            self.isr.iter().partition(|id| removed.contains(id) && self.leader != Some(**id));
        self.with_sets(isr, dropped, min_insync)
    }

    /// Admits replicas to the ISR; called by the leader. The caller ensures that these replicas hold every committed
    /// record. Brokers without a replica are ignored. Once the ISR has the min ISR, the ELR is emptied: its members may
    /// lack the records that are committed from then on. After the min ISR was lowered, the leader calls this with an
    /// empty `added` to empty the ELR.
    #[must_use]
    pub fn expand(&self, added: &BTreeSet<BrokerId>, min_insync: usize) -> Self {
        let new = added.iter().copied().filter(|id| self.replicas.contains(id) && !self.isr.contains(id));
        let isr = self.isr.iter().copied().chain(new).collect();
        self.with_sets(isr, Vec::new(), min_insync)
    }

    /// Returns true if `to` may lead without loss: it is a live ISR member, or a live ELR member while no ISR member is
    /// live. ISR members come first, because records acknowledged with `acks=1` may exist only on them.
    pub fn may_elect(&self, to: BrokerId, is_live: impl Fn(BrokerId) -> bool) -> bool {
        is_live(to)
            && (mutant!(ElectAnyReplica)
                || self.isr.contains(&to)
                || self.elr.contains(&to) && !self.isr.iter().any(|id| is_live(*id)))
    }

    /// Elects `to` cleanly; returns `None` if `to` may not lead ([`Self::may_elect`]) or leads already.
    ///
    /// If `to` is in the ISR, the live ISR members stay. If `to` is in the ELR, it becomes the only ISR member. The
    /// earlier ISR members are offline and may have records that this leader lacks. Below the min ISR, the ISR
    /// members that are not live enter the ELR. Every commit waited for them, and the new leader commits nothing until
    /// it has the min ISR and the ELR is empty.
    #[must_use]
    pub fn elect(&self, to: BrokerId, is_live: impl Fn(BrokerId) -> bool, min_insync: usize) -> Option<Self> {
        if self.leader == Some(to) || !self.may_elect(to, &is_live) {
            return None;
        }
        let (mut isr, dropped): (Vec<_>, Vec<_>) = self.isr.iter().partition(|id| is_live(**id));
        if isr.is_empty() || mutant!(ElectAnyReplica) && !isr.contains(&to) {
            isr = vec![to];
        }
        Some(self.with_sets(isr, dropped, min_insync).led_by(Some(to)))
    }

    /// Elects `to` on an operator's request; committed records may be lost. Returns `None` if `to` is no replica. The
    /// epoch is stored as `unclean_epoch`, so that replicas with more records than the new leader may truncate. With
    /// `discard`, the elected replica's log is deleted if it is unusable.
    #[must_use]
    pub fn elect_unclean(&self, to: BrokerId, discard: bool) -> Option<Self> {
        if !self.replicas.contains(&to) {
            return None;
        }
        // Clears the leader first, so that the epoch grows even if `to` leads already: its log differs from here on.
        let mut value = Self { leader: None, ..self.clone() }.led_by(Some(to));
        value.isr = vec![to];
        value.elr = Vec::new();
        (value.unclean_epoch, value.discard_local) = (Some(value.leader_epoch), discard);
        Some(value)
    }

    /// Clears the leader, because its broker is not live, its process started after the epoch began, or it resigns. ISR
    /// and ELR stay, so that any verified member that returns may lead. Without a leader, the value stays the same.
    #[must_use]
    pub fn leaderless(&self) -> Self {
        self.clone().led_by(None)
    }

    /// Clears the leader `me`, whose disk accepts no more writes. `me` also leaves the ISR unless it is the last
    /// member, so that it is not elected again immediately. Its records below the persisted end remain readable, so it
    /// enters the ELR if the ISR is then below the min ISR. If `me` does not lead, the value stays the same.
    #[must_use]
    pub fn resign(&self, me: BrokerId, min_insync: usize) -> Self {
        if self.leader != Some(me) {
            return self.clone();
        }
        let resigned = self.leaderless();
        if resigned.isr.iter().all(|id| *id == me) {
            resigned
        } else {
            resigned.shrink(&BTreeSet::from([me]), min_insync)
        }
    }

    /// Removes a replica from the ISR and the ELR, because its log may lack committed records. Clears the leader if
    /// that replica leads. No replica is added instead: a replica that left the ISR earlier, while the min ISR was
    /// satisfied, may lack records that were committed since.
    #[must_use]
    pub fn remove_from_sets(&self, broker: BrokerId) -> Self {
        let mut value = if self.leader == Some(broker) { self.leaderless() } else { self.clone() };
        value.isr.retain(|id| *id != broker);
        value.elr.retain(|id| *id != broker);
        value
    }

    /// Returns the value that a starting broker writes before it becomes active again; `None` if no change is needed.
    ///
    /// The broker resigns a leadership that the store still assigns to it. That epoch began before this process, and
    /// another process may have appended records in the epoch that this process lacks. An unverified replica is removed
    /// from ISR and ELR, and so is one after an unclean shutdown if the ISR or ELR has another member. Without another
    /// member, the replica stays after an unclean shutdown, since no other replica has more (Kafka's last known
    /// leader). It may lack acknowledged records, so `unclean_epoch` is set.
    #[must_use]
    pub fn after_restart(&self, me: BrokerId, integrity: ReplicaIntegrity) -> Option<Self> {
        let resigns = self.leader == Some(me) && !mutant!(KeepOldLeadership);
        let without_leadership = if resigns { self.leaderless() } else { self.clone() };
        let is_only_member =
            self.isr.iter().chain(&self.elr).all(|id| *id == me) && !(self.isr.is_empty() && self.elr.is_empty());
        let value = match integrity {
            ReplicaIntegrity::Intact => without_leadership,
            // No leader wrote in the current epoch, so every log ends in an older epoch and may truncate.
            ReplicaIntegrity::UncleanShutdown if is_only_member => {
                let unclean_epoch = Some(without_leadership.leader_epoch);
                Self { unclean_epoch, discard_local: false, ..without_leadership }
            }
            ReplicaIntegrity::UncleanShutdown | ReplicaIntegrity::Unverified => without_leadership.remove_from_sets(me),
        };
        (value != *self).then_some(value)
    }

    /// Starts a reassignment to `target`, the preferred leader first. The new replicas copy the log first: old and new
    /// replicas hold the partition until [`Self::complete_reassignment`]. A reassignment in progress is replaced. A
    /// replica that the replaced reassignment was adding is dropped immediately if it is not in `target` and in neither
    /// ISR nor ELR. Returns `None` if `target` is empty or contains a broker twice.
    #[must_use]
    pub fn start_reassignment(&self, target: &[BrokerId]) -> Option<Self> {
        let members: BTreeSet<_> = target.iter().copied().collect();
        if target.is_empty() || members.len() != target.len() {
            return None;
        }
        let is_eligible = |id: &BrokerId| self.isr.contains(id) || self.elr.contains(id);
        let removed = self.replicas.iter().copied().filter(|id| !members.contains(id));
        let (dropped, removing): (Vec<_>, Vec<_>) =
            removed.partition(|id| self.adding.contains(id) && !is_eligible(id));
        let is_new = |id: &BrokerId| !self.replicas.contains(id) || self.adding.contains(id);
        Some(Self {
            replicas: target.iter().chain(&removing).copied().collect(),
            adding: target.iter().copied().filter(is_new).collect(),
            removing,
            removal_count: self.removal_count.saturating_add(u64::from(!dropped.is_empty())),
            ..self.clone()
        })
    }

    /// Queues a reassignment to `target`, in place of a queued one.
    #[must_use]
    pub fn queue_reassignment(&self, target: &[BrokerId]) -> Self {
        Self { queued_replicas: target.to_vec(), ..self.clone() }
    }

    /// Starts the queued reassignment; returns `None` if none is queued.
    #[must_use]
    pub fn start_queued(&self) -> Option<Self> {
        Some(self.start_reassignment(&self.queued_replicas)?.clear_queued())
    }

    /// Clears the queued reassignment.
    #[must_use]
    pub fn clear_queued(self) -> Self {
        Self { queued_replicas: Vec::new(), ..self }
    }

    /// Returns true if a reassignment is queued and has not started.
    pub const fn has_queued(&self) -> bool {
        !self.queued_replicas.is_empty()
    }

    /// Returns the `removal_count` of a replica that is being added, which distinguishes it from earlier replicas on
    /// the same broker. Returns `None` if the replica is not being added.
    pub fn added_after(&self, broker: BrokerId) -> Option<u64> {
        self.adding.contains(&broker).then_some(self.removal_count)
    }

    /// Returns true if a reassignment is in progress.
    pub const fn is_reassigning(&self) -> bool {
        !(self.adding.is_empty() && self.removing.is_empty())
    }

    /// Returns true if a reassignment is in progress and cannot complete while only the brokers are live for which
    /// `is_live` returns true. Either a new replica cannot enter the ISR, or a removed replica in the ISR is still
    /// needed. A removed replica is needed if too few of the staying replicas are in the ISR or can enter it to satisfy
    /// the min ISR.
    pub fn is_reassignment_blocked(&self, min_insync: usize, is_live: impl Fn(BrokerId) -> bool) -> bool {
        let can_be_in_sync = |id: &BrokerId| self.isr.contains(id) || is_live(*id);
        let can_copy = self.adding.iter().all(can_be_in_sync);
        self.is_reassigning() && (!can_copy || self.needs_removed_replicas_if(min_insync, can_be_in_sync))
    }

    /// Returns true if the ISR contains a replica in `removing`, and too few of the staying replicas are in sync to
    /// satisfy the min ISR. A min ISR above the number of staying replicas counts as that number.
    pub fn needs_removed_replicas(&self, min_insync: usize) -> bool {
        self.needs_removed_replicas_if(min_insync, |id| self.isr.contains(id))
    }

    /// Implements [`Self::needs_removed_replicas`]. A staying replica counts as in sync if `is_in_sync` returns true.
    fn needs_removed_replicas_if(&self, min_insync: usize, is_in_sync: impl Fn(&BrokerId) -> bool) -> bool {
        let is_removed = |id: &BrokerId| self.removing.contains(id);
        let required = min_insync.min(self.replicas.len().saturating_sub(self.removing.len()));
        let staying = self.replicas.iter().filter(|id| !is_removed(id) && is_in_sync(id)).count();
        self.isr.iter().any(is_removed) && staying < required
    }

    /// Completes the reassignment and drops the removed replicas, also from the ELR, because their data is about to be
    /// deleted. Returns `None` if no reassignment is in progress or a new replica is not in sync yet. Returns `None`
    /// also if a removed replica still leads, or no in-sync replica would remain.
    #[must_use]
    pub fn complete_reassignment(&self) -> Option<Self> {
        let are_new_in_sync = self.adding.iter().all(|id| self.isr.contains(id));
        if are_new_in_sync { self.end_reassignment_without(&self.removing) } else { None }
    }

    /// Returns the value with the replicas from before the reassignment in progress. Returns `None` if none is in
    /// progress, no earlier replica is in the ISR, or a new replica leads. In the last case the caller must elect
    /// another leader first.
    #[must_use]
    pub fn cancel_reassignment(&self) -> Option<Self> {
        self.end_reassignment_without(&self.adding)
    }

    /// Ends the reassignment in progress and drops replicas from all sets. Returns `None` if no reassignment is in
    /// progress, a dropped replica leads, or no ISR member would remain.
    fn end_reassignment_without(&self, dropped: &[BrokerId]) -> Option<Self> {
        let remaining =
            |set: &[BrokerId]| -> Vec<BrokerId> { set.iter().copied().filter(|id| !dropped.contains(id)).collect() };
        let isr = remaining(&self.isr);
        let drops_leader = self.leader.is_some_and(|leader| dropped.contains(&leader));
        if !self.is_reassigning() || drops_leader || isr.is_empty() {
            return None;
        }
        let (replicas, elr) = (remaining(&self.replicas), remaining(&self.elr));
        let removal_count = self.removal_count.saturating_add(1);
        Some(Self { replicas, isr, elr, adding: Vec::new(), removing: Vec::new(), removal_count, ..self.clone() })
    }

    /// Returns the value with this ISR. If the ISR is below the min ISR, the members that left it (`dropped`) are added
    /// to the ELR. Otherwise the ELR is emptied.
    fn with_sets(&self, isr: Vec<BrokerId>, dropped: Vec<BrokerId>, min_insync: usize) -> Self {
        let elr = if isr.len() >= min_insync || mutant!(DropElr) {
            Vec::new()
        } else {
            self.elr.iter().copied().chain(dropped).filter(|id| !isr.contains(id)).collect()
        };
        Self { isr, elr, ..self.clone() }
    }

    /// Returns the value with this leader. If the leader changes, also to none, a new leader epoch starts.
    fn led_by(mut self, leader: Option<BrokerId>) -> Self {
        if self.leader != leader {
            self.leader = leader;
            self.leader_epoch = LeaderEpoch(self.leader_epoch.0 + 1);
        }
        self
    }
}

#[cfg(test)]
mod tests;
