//! The value of `partitions/{topic-id}/{n}`: the replicas of a partition, its leader and its in-sync replicas. Pure.
//!
//! # Overview
//!
//! Only the functions of this module compute an ISR or an ELR. Leaders, the controller, starting brokers and operators
//! all compute their new values here and write them by compare-and-set, so every order of these writes is correct.
//!
//! | function | caller | leader | ISR | ELR |
//! | --- | --- | --- | --- | --- |
//! | [`shrink`] | leader | unchanged | loses members | gains them below the min ISR |
//! | [`expand`] | leader | unchanged | gains members | empty once the ISR has the min ISR |
//! | [`elect`] | controller | new | its live members, or the elected replica alone | gains the other members below the min ISR |
//! | [`elect_unclean`] | operator | new | the elected replica alone | empty |
//! | [`leaderless`] | controller, starting broker, leader that resigns | none | unchanged | unchanged |
//! | [`resign`] | leader whose disk failed | none | loses the leader unless it is the last member | as `shrink` |
//! | [`strike`] | unverified broker, leader | none if the broker led | loses the broker | loses the broker |
//! | [`order_move`] | operator | unchanged | unchanged | unchanged |
//! | [`begin_move`], [`begin_ordered`] | controller | unchanged | unchanged | unchanged |
//! | [`end_move`], [`cancel_move`] | controller | unchanged | loses dropped replicas | loses dropped replicas |
//!
//! # Invariants
//!
//! - The leader is a member of the ISR, ISR and ELR are disjoint, and all members are replicas.
//! - The epoch grows by one exactly when the leader changes, also to none, and at each unclean election. So an epoch
//!   has at most one leader, and a compare of the epoch also compares the leader.
//! - Every change that drops replicas increments `removals`. A new replica stays in `adding` until the reassignment
//!   completes, which requires the replica in the ISR. So a replica in `adding` is the same replica in two values only
//!   if both have the same `removals`. A replica outside `adding` has been in sync since it was added.
//! - Every member of ISR ∪ ELR that kept what it acknowledged holds all committed records. Leaders ensure this: they
//!   commit only what the whole ISR holds, only with the min ISR, and only while the ELR is empty.
//! - Only [`shrink`], [`resign`] and [`elect`] make an ELR grow. [`strike`] and reassignments add no members: a replica
//!   that they remove holds nothing that counts, or need not keep it.
//!
//! [`shrink`]: PartitionValue::shrink
//! [`expand`]: PartitionValue::expand
//! [`elect`]: PartitionValue::elect
//! [`elect_unclean`]: PartitionValue::elect_unclean
//! [`leaderless`]: PartitionValue::leaderless
//! [`resign`]: PartitionValue::resign
//! [`strike`]: PartitionValue::strike
//! [`order_move`]: PartitionValue::order_move
//! [`begin_move`]: PartitionValue::begin_move
//! [`begin_ordered`]: PartitionValue::begin_ordered
//! [`end_move`]: PartitionValue::end_move
//! [`cancel_move`]: PartitionValue::cancel_move

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use crate::model::{BrokerId, LeaderEpoch};

/// The value of `partitions/{topic-id}/{n}`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct PartitionValue {
    /// Brokers that hold the partition; the first is the preferred leader.
    pub replicas: Vec<BrokerId>,
    /// Broker that orders the writes; `None` while no replica may.
    pub leader: Option<BrokerId>,
    /// Leader epoch: grows by one at each change of the leader, also to none, and at each unclean election.
    pub leader_epoch: LeaderEpoch,
    /// In-sync replicas: every commit waits for all of them.
    pub isr: Vec<BrokerId>,
    /// Eligible leader replicas: they left the ISR and may still lead cleanly. While the ELR has members, nothing is
    /// committed.
    #[serde(default)]
    pub elr: Vec<BrokerId>,
    /// Replicas that are being added.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub adding: Vec<BrokerId>,
    /// Replicas that are being removed.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub removing: Vec<BrokerId>,
    /// Number of changes that dropped replicas. A dropped replica's broker deletes its data, so this number
    /// distinguishes a replica that is being added from an earlier replica on the same broker. Never falls.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub removals: u64,
    /// Last leader epoch before which committed records may have been lost, because its first replica might have lacked
    /// some. A replica whose log is older than this epoch may truncate below the high watermark that it knew.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unclean: Option<LeaderEpoch>,
    /// True if the leader of the epoch in `unclean` must delete its log when the log is unusable; the operator accepted
    /// this. Otherwise that leader must not delete its log.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub discard: bool,
    /// Replicas that an operator requested, the preferred leader first, while that reassignment is queued; else empty.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ordered: Vec<BrokerId>,
}

/// Returns true if nothing was removed yet: the field is then omitted.
#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde hands over a reference")]
const fn is_zero(count: &u64) -> bool {
    *count == 0
}

/// Integrity of a local replica that a starting broker can verify.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Holds {
    /// The replica holds everything that it ever acknowledged.
    All,
    /// Only the marker of a clean shutdown is missing, on a topic whose acknowledgements require no more than the page
    /// cache.
    Unmarked,
    /// Nothing is verified: another directory, an older copy of the directory, corruption, or no replica at all.
    Nothing,
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
            removals: 0,
            unclean: None,
            discard: false,
            ordered: Vec::new(),
        }
    }

    /// Removes ISR members that lag or whose brokers are gone; called by the leader.
    ///
    /// If at least `min_insync` members remain, every commit so far and later includes the remaining members, so the
    /// removed members are not needed. With fewer, the removed members hold every committed record and will keep doing
    /// so, because the leader commits nothing now: they enter the ELR. The leader itself is never removed; replicas
    /// outside the ISR are ignored.
    #[must_use]
    pub fn shrink(&self, out: &BTreeSet<BrokerId>, min_insync: usize) -> Self {
        let (dropped, isr): (Vec<_>, Vec<_>) =
            self.isr.iter().partition(|id| out.contains(id) && self.leader != Some(**id));
        self.with_sets(isr, dropped, min_insync)
    }

    /// Admits replicas that hold every committed record to the ISR; called by the leader. Once the ISR has the min ISR,
    /// the ELR is emptied: its members may lack the records that are committed from then on. With an empty `add`, only
    /// that happens, after the min ISR was lowered.
    #[must_use]
    pub fn expand(&self, add: &BTreeSet<BrokerId>, min_insync: usize) -> Self {
        let new = add.iter().copied().filter(|id| self.replicas.contains(id) && !self.isr.contains(id));
        let isr = self.isr.iter().copied().chain(new).collect();
        self.with_sets(isr, Vec::new(), min_insync)
    }

    /// Returns true if `to` may lead without loss: it is a live ISR member, or a live ELR member while no ISR member is
    /// live. ISR members come first, because records acknowledged with `acks=1` may exist only on them.
    pub fn may_elect(&self, to: BrokerId, live: impl Fn(BrokerId) -> bool) -> bool {
        live(to)
            && (mutant!(ElectAnyReplica)
                || self.isr.contains(&to)
                || self.elr.contains(&to) && !self.isr.iter().any(|id| live(*id)))
    }

    /// Elects `to` cleanly; returns `None` if `to` may not lead ([`Self::may_elect`]) or leads already.
    ///
    /// A leader from the ISR keeps the live members. A leader from the ELR is alone in the ISR: the ISR members are
    /// dead and may have records that it lacks. Below the min ISR, the other members enter the ELR. They were in every
    /// set that a commit waited for, and the new leader commits nothing until it has the min ISR and the ELR is empty.
    #[must_use]
    pub fn elect(&self, to: BrokerId, live: impl Fn(BrokerId) -> bool, min_insync: usize) -> Option<Self> {
        if self.leader == Some(to) || !self.may_elect(to, &live) {
            return None;
        }
        let (mut isr, dropped): (Vec<_>, Vec<_>) = self.isr.iter().partition(|id| live(**id));
        if isr.is_empty() || mutant!(ElectAnyReplica) && !isr.contains(&to) {
            isr = vec![to];
        }
        Some(self.with_sets(isr, dropped, min_insync).led_by(Some(to)))
    }

    /// Elects `to` on an operator's request; committed records may be lost. Returns `None` if `to` is no replica. The
    /// epoch becomes `unclean`, so that replicas with more records than the new leader may truncate. With `discard`,
    /// the elected replica's log is unusable and is deleted.
    #[must_use]
    pub fn elect_unclean(&self, to: BrokerId, discard: bool) -> Option<Self> {
        if !self.replicas.contains(&to) {
            return None;
        }
        // A new epoch even if `to` leads already: its log is a different one from here on.
        let mut value = Self { leader: None, ..self.clone() }.led_by(Some(to));
        value.isr = vec![to];
        value.elr = Vec::new();
        (value.unclean, value.discard) = (Some(value.leader_epoch), discard);
        Some(value)
    }

    /// Clears the leader: its broker is gone, or its process started after the epoch began. ISR and ELR stay, so that
    /// any verified member that returns may lead.
    #[must_use]
    pub fn leaderless(&self) -> Self {
        self.clone().led_by(None)
    }

    /// Resigns the leadership of `me`, whose disk accepts no more writes. `me` leaves the ISR while another member
    /// remains, so that it is not elected again immediately. Its records below the persisted end are still good, so
    /// below the min ISR it enters the ELR.
    #[must_use]
    pub fn resign(&self, me: BrokerId, min_insync: usize) -> Self {
        if self.leader != Some(me) {
            return self.clone();
        }
        let free = self.leaderless();
        if free.isr.iter().all(|id| *id == me) { free } else { free.shrink(&BTreeSet::from([me]), min_insync) }
    }

    /// Removes a replica that holds nothing that counts from the ISR, the ELR and the leadership. No member is added: a
    /// replica that left earlier, while the min ISR was satisfied, may lack records that were committed since.
    #[must_use]
    pub fn strike(&self, who: BrokerId) -> Self {
        let mut value = if self.leader == Some(who) { self.leaderless() } else { self.clone() };
        value.isr.retain(|id| *id != who);
        value.elr.retain(|id| *id != who);
        value
    }

    /// Returns the value that a starting broker writes before it takes part again; `None` if no change is needed.
    ///
    /// The broker resigns a leadership that the store still assigns to it. That epoch began before this process, and
    /// another process may have appended records in the epoch that this process lacks. An unverified replica is removed
    /// from ISR and ELR. If only the clean-shutdown marker is missing and no other member could lead, the replica
    /// stays, since it is all that is left (Kafka's last known leader). It may hold less than was acknowledged, so the
    /// epoch is recorded as unclean.
    #[must_use]
    pub fn struck(&self, me: BrokerId, holds: Holds) -> Option<Self> {
        let resigns = self.leader == Some(me) && !mutant!(KeepOldLeadership);
        let free = if resigns { self.leaderless() } else { self.clone() };
        let is_last =
            self.isr.iter().chain(&self.elr).all(|id| *id == me) && !(self.isr.is_empty() && self.elr.is_empty());
        let value = match holds {
            Holds::All => free,
            // The epochs of every log are older than an epoch that began without a leader.
            Holds::Unmarked if is_last => Self { unclean: Some(free.leader_epoch), discard: false, ..free },
            Holds::Unmarked | Holds::Nothing => free.strike(me),
        };
        (value != *self).then_some(value)
    }

    /// Starts a reassignment to `target`, in that order. The new replicas copy first: old and new replicas hold the
    /// partition until [`Self::end_move`]. A reassignment in progress is replaced: a replica that was being added, is
    /// not in `target` and is in neither ISR nor ELR is dropped immediately. Returns `None` if `target` is empty or
    /// names a broker twice.
    #[must_use]
    pub fn begin_move(&self, target: &[BrokerId]) -> Option<Self> {
        let wanted: BTreeSet<_> = target.iter().copied().collect();
        if target.is_empty() || wanted.len() != target.len() {
            return None;
        }
        let has_counted = |id: &BrokerId| self.isr.contains(id) || self.elr.contains(id);
        let unwanted = self.replicas.iter().copied().filter(|id| !wanted.contains(id));
        let (dropped, going): (Vec<_>, Vec<_>) = unwanted.partition(|id| self.adding.contains(id) && !has_counted(id));
        let is_new = |id: &BrokerId| !self.replicas.contains(id) || self.adding.contains(id);
        Some(Self {
            replicas: target.iter().chain(&going).copied().collect(),
            adding: target.iter().copied().filter(is_new).collect(),
            removing: going,
            removals: self.removals.saturating_add(u64::from(!dropped.is_empty())),
            ..self.clone()
        })
    }

    /// Queues a reassignment to `target`. A queued reassignment is replaced.
    #[must_use]
    pub fn order_move(&self, target: &[BrokerId]) -> Self {
        Self { ordered: target.to_vec(), ..self.clone() }
    }

    /// Starts the queued reassignment; returns `None` if none is queued.
    #[must_use]
    pub fn begin_ordered(&self) -> Option<Self> {
        Some(self.begin_move(&self.ordered)?.without_order())
    }

    /// Clears the queued reassignment.
    #[must_use]
    pub fn without_order(self) -> Self {
        Self { ordered: Vec::new(), ..self }
    }

    /// Returns true if a reassignment is queued and has not started.
    pub const fn is_ordered(&self) -> bool {
        !self.ordered.is_empty()
    }

    /// Returns the number of removals before the addition of this replica, which identifies that addition; `None` if
    /// the replica is not being added.
    pub fn added_after(&self, who: BrokerId) -> Option<u64> {
        self.adding.contains(&who).then_some(self.removals)
    }

    /// Returns true if a reassignment is in progress.
    pub const fn is_moving(&self) -> bool {
        !(self.adding.is_empty() && self.removing.is_empty())
    }

    /// Returns true if the reassignment in progress cannot complete while only these brokers are live. Either a new
    /// replica cannot enter the ISR, or the removed replicas are in the ISR and too few of the other replicas can enter
    /// it.
    pub fn move_is_blocked(&self, min_insync: usize, is_live: impl Fn(BrokerId) -> bool) -> bool {
        let can_be_in_sync = |id: &BrokerId| self.isr.contains(id) || is_live(*id);
        let copied = self.adding.iter().all(can_be_in_sync);
        self.is_moving() && (!copied || self.needs_leavers(min_insync, can_be_in_sync))
    }

    /// Returns true if the ISR needs the removed replicas to satisfy the min ISR: a replica that stays may be catching
    /// up.
    pub fn leavers_are_needed(&self, min_insync: usize) -> bool {
        self.needs_leavers(min_insync, |id| self.isr.contains(id))
    }

    /// Implements [`Self::leavers_are_needed`] for any set of in-sync replicas.
    fn needs_leavers(&self, min_insync: usize, is_in_sync: impl Fn(&BrokerId) -> bool) -> bool {
        let leaves = |id: &BrokerId| self.removing.contains(id);
        let promised = min_insync.min(self.replicas.len().saturating_sub(self.removing.len()));
        let staying = self.replicas.iter().filter(|id| !leaves(id) && is_in_sync(id)).count();
        self.isr.iter().any(leaves) && staying < promised
    }

    /// Completes the reassignment and drops the removed replicas, also from the ELR, because their data is about to be
    /// deleted. Returns `None` if no reassignment is in progress, a new replica is not in sync yet, a removed replica
    /// still leads, or no in-sync replica would remain.
    #[must_use]
    pub fn end_move(&self) -> Option<Self> {
        let copied = self.adding.iter().all(|id| self.isr.contains(id));
        if copied { self.without(&self.removing) } else { None }
    }

    /// Restores the replicas from before the reassignment. Returns `None` if no reassignment is in progress, only new
    /// replicas are in sync, or a new replica leads; elect another leader first.
    #[must_use]
    pub fn cancel_move(&self) -> Option<Self> {
        self.without(&self.adding)
    }

    fn without(&self, going: &[BrokerId]) -> Option<Self> {
        let stay =
            |set: &[BrokerId]| -> Vec<BrokerId> { set.iter().copied().filter(|id| !going.contains(id)).collect() };
        let (isr, under_way) = (stay(&self.isr), self.is_moving());
        let leads = self.leader.is_some_and(|leader| going.contains(&leader));
        if !under_way || leads || isr.is_empty() {
            return None;
        }
        let (replicas, elr) = (stay(&self.replicas), stay(&self.elr));
        let removals = self.removals.saturating_add(1);
        Some(Self { replicas, isr, elr, adding: Vec::new(), removing: Vec::new(), removals, ..self.clone() })
    }

    /// Returns the value with this ISR. Below the min ISR, the `dropped` members join the earlier members of the ELR.
    fn with_sets(&self, isr: Vec<BrokerId>, dropped: Vec<BrokerId>, min_insync: usize) -> Self {
        let elr = if isr.len() >= min_insync || mutant!(DropElr) {
            Vec::new()
        } else {
            self.elr.iter().copied().chain(dropped).filter(|id| !isr.contains(id)).collect()
        };
        Self { isr, elr, ..self.clone() }
    }

    /// Returns the value with another leader. A change of the leader, and only that, starts an epoch.
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
