//! The value of `partitions/{topic-id}/{n}`: who holds a partition, who leads it, and who is in sync. Pure.
//!
//! # Overview
//!
//! The functions here are the only ones that compute an ISR or an ELR. Leaders, the controller, brokers that start and operators
//! all make their new values with them and write those by compare-and-set, so whichever wins is right.
//!
//! | function | who | leader | ISR | ELR |
//! | --- | --- | --- | --- | --- |
//! | [`shrink`] | leader | stays | loses members | takes them, when the ISR falls below the minimum |
//! | [`expand`] | leader | stays | gains members | empty once the ISR has the minimum |
//! | [`elect`] | controller | new | its live members, or the elected alone | takes the others, when the ISR falls below the minimum |
//! | [`elect_unclean`] | operator | new | the elected alone | empty |
//! | [`leaderless`] | controller, broker that starts, leader that gave up | none | stays | stays |
//! | [`resign`] | leader whose disk failed | none | loses it, unless it is the last | as `shrink` |
//! | [`strike`] | broker without proof, leader | none, if it led | loses it | loses it |
//! | [`order_move`] | operator | stays | stays | stays |
//! | [`begin_move`], [`begin_ordered`], [`end_move`], [`cancel_move`] | controller | stays | only loses replicas that go | only loses them |
//!
//! # Invariants
//!
//! - The leader is a member of the ISR, ISR and ELR are disjoint, and all members are replicas.
//! - The epoch grows by one exactly when the leader changes, also to none: so an epoch has one leader for life, and whoever
//!   compares the epoch knows that the leader is the same.
//! - Each change that lets replicas go counts one removal, and who becomes a replica is being added until it was in sync. So a replica
//!   that is being added is the same in two values only where both count the same removals; and one that is not was in sync since.
//! - Every member of ISR ∪ ELR holds all that is committed, if it holds what it acknowledged. Leaders keep that by committing
//!   only what the whole ISR has, only with the minimum in sync, and only while the ELR is empty.
//! - Only [`shrink`], [`resign`] and the elections make an ELR grow. A strike or a move never adds anybody: what is taken out
//!   there holds nothing that counts, or is not asked to keep it.
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
    /// Who holds it; the first is the preferred leader.
    pub replicas: Vec<BrokerId>,
    /// Who orders its writes; `None` while nobody may.
    pub leader: Option<BrokerId>,
    /// Grows by one at each change of leader, also to none.
    pub leader_epoch: LeaderEpoch,
    /// In-sync replicas: those that every commit waits for.
    pub isr: Vec<BrokerId>,
    /// Eligible leaders: those that may still lead cleanly though they left the ISR. While there are any, nothing is committed.
    #[serde(default)]
    pub elr: Vec<BrokerId>,
    /// Replicas that are being added.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub adding: Vec<BrokerId>,
    /// Replicas that are being taken away.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub removing: Vec<BrokerId>,
    /// How often replicas were let go. Who is let go deletes what it has: by this number a replica that is being added is told from the
    /// one that the same broker had before. Never falls.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub removals: u64,
    /// The last epoch before which committed records may have been lost, because whoever led then might not have had them. Replicas
    /// whose log is older than it may cut below what they knew as committed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unclean: Option<LeaderEpoch>,
    /// That epoch's leader is to delete its log if it cannot be used: an operator was told so. Else it must not.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub discard: bool,
    /// Where an operator wants it, the preferred leader first, while that move waits for its turn; else empty.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ordered: Vec<BrokerId>,
}

/// Nothing was let go yet: the value need not say so.
#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde hands over a reference")]
const fn is_zero(count: &u64) -> bool {
    *count == 0
}

/// What a broker that starts can prove of a replica.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Holds {
    /// It holds all that it ever acknowledged.
    All,
    /// Only the mark of a clean shutdown is missing, on a topic whose acknowledgements ask for no more than the page cache.
    Unmarked,
    /// Nothing is proven: another directory, an older copy of it, damage, or no replica at all.
    Nothing,
}

impl PartitionValue {
    /// Replicas that are all in sync, of which the first leads, in this epoch.
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

    /// The leader drops members of the ISR that do not keep up or are gone.
    ///
    /// With at least `min_insync` left nothing was committed without those left, nor will be, so the dropped are needed no
    /// more. With fewer, the dropped hold all that is committed and will go on doing so, because a leader commits nothing now: they
    /// become eligible. The leader is never dropped; who is no member is passed over.
    #[must_use]
    pub fn shrink(&self, out: &BTreeSet<BrokerId>, min_insync: usize) -> Self {
        let (dropped, isr): (Vec<_>, Vec<_>) =
            self.isr.iter().partition(|id| out.contains(id) && self.leader != Some(**id));
        self.with_sets(isr, dropped, min_insync)
    }

    /// The leader admits replicas that hold all that is committed. With the minimum in sync the ELR ends: from here on records are
    /// committed that its members need not have. With nobody to admit it only does that, after the minimum was lowered.
    #[must_use]
    pub fn expand(&self, add: &BTreeSet<BrokerId>, min_insync: usize) -> Self {
        let new = add.iter().copied().filter(|id| self.replicas.contains(id) && !self.isr.contains(id));
        let isr = self.isr.iter().copied().chain(new).collect();
        self.with_sets(isr, Vec::new(), min_insync)
    }

    /// Whether `to` may lead without loss: a member of the ISR, or an eligible one when no member of the ISR is alive. The
    /// ISR comes first, because only what its members keep may have been acknowledged with `acks=1`.
    pub fn may_elect(&self, to: BrokerId, live: impl Fn(BrokerId) -> bool) -> bool {
        live(to)
            && (mutant!(ElectAnyReplica)
                || self.isr.contains(&to)
                || self.elr.contains(&to) && !self.isr.iter().any(|id| live(*id)))
    }

    /// A clean election of `to`; `None` when it may not lead ([`Self::may_elect`]) or leads already.
    ///
    /// Elected from the ISR, it keeps the members that are alive. Elected from the ELR, it is alone in sync: the members of the ISR
    /// are dead, and may have records that it has not. Below the minimum the others become eligible: they were in every
    /// set that a commit waited for, and the new leader commits nothing until it has the minimum and the ELR is empty.
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

    /// An election that may lose committed records, ordered by an operator; `None` when `to` is no replica. The epoch is
    /// noted, so that replicas with more than the new leader may cut it. With `discard` the elected one's log cannot be used, and goes.
    #[must_use]
    pub fn elect_unclean(&self, to: BrokerId, discard: bool) -> Option<Self> {
        if !self.replicas.contains(&to) {
            return None;
        }
        // An own epoch even where it leads already: it is another log from here on.
        let mut value = Self { leader: None, ..self.clone() }.led_by(Some(to));
        value.isr = vec![to];
        value.elr = Vec::new();
        (value.unclean, value.discard) = (Some(value.leader_epoch), discard);
        Some(value)
    }

    /// Nobody leads: whoever did is gone, or is a process that began after the epoch did. ISR and ELR stay, so that
    /// whichever member comes back with proof may lead.
    #[must_use]
    pub fn leaderless(&self) -> Self {
        self.clone().led_by(None)
    }

    /// The leader `me` gives up, because its disk takes no more writes. It leaves the ISR while another member stays, so that it is not
    /// elected again at once; what it holds below the persisted end is still good, so below the minimum it stays eligible.
    #[must_use]
    pub fn resign(&self, me: BrokerId, min_insync: usize) -> Self {
        if self.leader != Some(me) {
            return self.clone();
        }
        let free = self.leaderless();
        if free.isr.iter().all(|id| *id == me) { free } else { free.shrink(&BTreeSet::from([me]), min_insync) }
    }

    /// Takes a replica that holds nothing that counts out of ISR and ELR, and out of the leadership. Nobody is added: who left
    /// earlier, with more in sync than the minimum, may lack what was committed since.
    #[must_use]
    pub fn strike(&self, who: BrokerId) -> Self {
        let mut value = if self.leader == Some(who) { self.leaderless() } else { self.clone() };
        value.isr.retain(|id| *id != who);
        value.elr.retain(|id| *id != who);
        value
    }

    /// What a broker that starts writes before it takes part again; `None` when nothing is to be changed.
    ///
    /// It gives up a leadership that the store still names it for: that epoch began before this process did, and another
    /// process may have appended in it what this one does not know. Without proof it is struck. Only the mark of a clean shutdown
    /// missing, and nobody else could lead: it stays, since what is here is all that there is (Kafka's last known leader). That may
    /// be less than was acknowledged, so it is noted as unclean.
    #[must_use]
    pub fn struck(&self, me: BrokerId, holds: Holds) -> Option<Self> {
        let resigns = self.leader == Some(me) && !mutant!(KeepOldLeadership);
        let free = if resigns { self.leaderless() } else { self.clone() };
        let is_last =
            self.isr.iter().chain(&self.elr).all(|id| *id == me) && !(self.isr.is_empty() && self.elr.is_empty());
        let value = match holds {
            Holds::All => free,
            // Every log's epochs are older than one that began without a leader.
            Holds::Unmarked if is_last => Self { unclean: Some(free.leader_epoch), discard: false, ..free },
            Holds::Unmarked | Holds::Nothing => free.strike(me),
        };
        (value != *self).then_some(value)
    }

    /// The replicas are to become `target`, in that order. The new ones copy first: all hold the partition until
    /// [`Self::end_move`]. A move that is under way is replaced: who was on its way in, is not wanted any more and was never in sync is
    /// let go at once. `None` when `target` is empty or names a broker twice.
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

    /// The replicas are to become `target` when it is this partition's turn. An order that waits already is replaced.
    #[must_use]
    pub fn order_move(&self, target: &[BrokerId]) -> Self {
        Self { ordered: target.to_vec(), ..self.clone() }
    }

    /// Begins the move that was ordered; `None` when none was.
    #[must_use]
    pub fn begin_ordered(&self) -> Option<Self> {
        Some(self.begin_move(&self.ordered)?.without_order())
    }

    /// Nothing is ordered any more.
    #[must_use]
    pub fn without_order(self) -> Self {
        Self { ordered: Vec::new(), ..self }
    }

    /// Whether a move was ordered that has not begun.
    pub const fn is_ordered(&self) -> bool {
        !self.ordered.is_empty()
    }

    /// Which addition it is that this replica comes by, while it is being added: the number of removals before it.
    pub fn added_after(&self, who: BrokerId) -> Option<u64> {
        self.adding.contains(&who).then_some(self.removals)
    }

    /// Whether its replicas are being moved.
    pub const fn is_moving(&self) -> bool {
        !(self.adding.is_empty() && self.removing.is_empty())
    }

    /// Returns true if the move under way cannot end while only these brokers are live: a new replica cannot enter the ISR, or the removed
    /// replicas are in the ISR and too few of the other replicas can enter it.
    pub fn move_is_blocked(&self, min_insync: usize, is_live: impl Fn(BrokerId) -> bool) -> bool {
        let can_be_in_sync = |id: &BrokerId| self.isr.contains(id) || is_live(*id);
        let copied = self.adding.iter().all(can_be_in_sync);
        self.is_moving() && (!copied || self.needs_leavers(min_insync, can_be_in_sync))
    }

    /// Returns true if the ISR needs the removed replicas to satisfy the min ISR: a replica that is not removed may still be catching up.
    pub fn leavers_are_needed(&self, min_insync: usize) -> bool {
        self.needs_leavers(min_insync, |id| self.isr.contains(id))
    }

    /// The rule of [`Self::leavers_are_needed`] for any set of in-sync replicas.
    fn needs_leavers(&self, min_insync: usize, is_in_sync: impl Fn(&BrokerId) -> bool) -> bool {
        let leaves = |id: &BrokerId| self.removing.contains(id);
        let promised = min_insync.min(self.replicas.len().saturating_sub(self.removing.len()));
        let staying = self.replicas.iter().filter(|id| !leaves(id) && is_in_sync(id)).count();
        self.isr.iter().any(leaves) && staying < promised
    }

    /// The move is over and the replicas that go are let go. `None` while it may not end: none is under way, a new replica is not in sync
    /// yet, one that goes still leads, or nobody in sync would be left. Who goes leaves the ELR as well: it is about to be deleted.
    #[must_use]
    pub fn end_move(&self) -> Option<Self> {
        let copied = self.adding.iter().all(|id| self.isr.contains(id));
        if copied { self.without(&self.removing) } else { None }
    }

    /// Goes back to the replicas of before the move. `None` where that is not possible: none is under way, or only new
    /// replicas are in sync, or one of them leads; elect another first.
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

    /// The sets with `isr` in sync. Below the minimum whoever just left it, `dropped`, is eligible beside those that were.
    fn with_sets(&self, isr: Vec<BrokerId>, dropped: Vec<BrokerId>, min_insync: usize) -> Self {
        let elr = if isr.len() >= min_insync || mutant!(DropElr) {
            Vec::new()
        } else {
            self.elr.iter().copied().chain(dropped).filter(|id| !isr.contains(id)).collect()
        };
        Self { isr, elr, ..self.clone() }
    }

    /// The same sets with another leader; a change of leader, and only that, begins an epoch.
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
