//! In-sync replicas of a partition, the high watermark that follows from them, and the next ISR change. Pure.
//!
//! # Overview
//!
//! One [`InSync`] is one leader in one epoch. The actor reports the progress of its own log, acknowledgements of followers, statuses of
//! brokers in the metadata cache, and outcomes of proposals. [`InSync`] computes the high watermark, accepts or rejects subscriptions,
//! and returns the ISR change to propose.
//!
//! ```text
//!   own log, acknowledgements ──▶ minimum end over the maximal ISR ──▶ high watermark
//!   subscriptions, statuses, disconnects ──▶ proposal ──▶ compare-and-set ──▶ outcome ──▶ the committed value
//! ```
//!
//! # Rules
//!
//! - An acknowledgement counts only in this leader epoch and for the broker epoch of the link on which that replica subscribed. It has
//!   both ends; the topic's durability decides here, and only here, which end counts.
//! - The *maximal* ISR is the committed ISR and every ISR that was proposed since and may still come true. The high watermark is the
//!   minimum acknowledged end over the maximal ISR: whichever of these sets is the current one, all its members hold the records below.
//! - The high watermark moves only while the *committed* ISR has the minimum size and the committed ELR is empty. A larger ISR that is
//!   only proposed may never come true; then an eligible replica, for which no commit waits, may be elected.
//! - A proposal with an unknown outcome may come true until the key's revision has moved on: reading the old value back proves nothing.
//!   So its members stay in the maximal ISR until another revision is seen.
//! - A replica is admitted when it has acknowledged, in this epoch, all committed records and all records below the epoch start. Before
//!   the high watermark reaches the epoch start, records above it may be committed. The admission does not wait for the high watermark to
//!   get there: below the min ISR, it moves only after an admission.
//! - A replica that is being added subscribes with the addition of this leader's value (`PartitionValue::removals`), and its
//!   acknowledgements count only for that addition. A removed replica deletes its log. Added again it is another replica, although its
//!   link is the same.
//!
//! Other brokers change the value as well: a broker that fails its startup verification removes itself, and the controller completes
//! reassignments. These changes only remove members, or change the leader and with it the epoch. So the ISR that is known here may be too
//! large, and is never too small.

mod member;
mod proposal;

use std::collections::{BTreeMap, BTreeSet};

use self::member::Member;
pub use self::{
    member::{Departure, Ends, Peer, Registration, Stale},
    proposal::{Agreed, Observed, Proposal},
};
use super::join::{self, Claim, Join, JoinRefused, Local};
use crate::{
    cluster::{PartitionValue, Revision},
    log::EpochHistory,
    model::{BrokerId, Durability, LeaderEpoch, Offset},
};

/// Requirements of the topic and the broker on a leader.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Rule {
    /// Durability that a replica's acknowledgement stands for.
    pub durability: Durability,
    /// `min.insync.replicas`.
    pub min_insync: usize,
    /// Maximum time, in milliseconds, in which a member must reach the log end that was current when the time started.
    pub lag_ms: u64,
}

/// Input of a new leader.
#[derive(Clone, Debug)]
pub struct Start {
    /// This broker, which the value names as the leader.
    pub me: BrokerId,
    pub value: PartitionValue,
    /// Revision of `value`.
    pub revision: Revision,
    /// Progress of its own log.
    pub own: Ends,
    /// All records below are known as committed: by this broker as a follower, or because they are in the object store or deleted.
    pub committed_end: Offset,
    pub rule: Rule,
}

impl Start {
    /// Returns the input of the leader `me` of epoch `epoch` without other replicas. Such a leader commits all records of its log: no
    /// other replica could have committed different ones.
    pub fn alone(me: BrokerId, epoch: LeaderEpoch, rule: Rule, own: Ends, committed_end: Offset) -> Self {
        let value = PartitionValue::new(vec![me], epoch);
        Self { me, value, revision: Revision::ZERO, own, committed_end, rule }
    }
}

/// State of a partition's replicas at their leader, in one epoch.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct InSync {
    me: BrokerId,
    rule: Rule,
    /// Log end when the epoch began.
    epoch_start: Offset,
    /// Committed value that is known here, and its revision.
    value: PartitionValue,
    revision: Revision,
    /// Proposal at this revision that has no outcome yet.
    in_flight: Option<Proposal>,
    /// Members of ISRs that were proposed at this revision with an unknown outcome, and may come true until the revision moves on.
    unsure: BTreeSet<BrokerId>,
    /// True if the outcome of the last proposal is unknown: nothing is proposed before the key was read.
    must_read: bool,
    /// True if the last proposal was refused at this very revision. The metadata cache lags, so the next proposal waits for a newer value
    /// or a tick.
    held: bool,
    /// True if another epoch has begun, or the partition is deleted: the leader proposes nothing.
    over: bool,
    own: Ends,
    members: BTreeMap<BrokerId, Member>,
    /// First uncommitted offset. Never falls. It never passes an end that a member of the maximal ISR has not acknowledged. The one
    /// exception is an offset that the metadata shows as committed.
    high_watermark: Offset,
}

impl InSync {
    /// Creates the leader of the value's epoch; its followers have not subscribed yet. An ISR of one commits all records of its log at
    /// once.
    pub fn new(start: Start) -> Self {
        let Start { me, value, revision, own, committed_end, rule } = start;
        assert_eq!(value.leader, Some(me), "only the broker that the value names leads");
        let mut insync = Self {
            me,
            rule,
            epoch_start: own.written,
            value,
            revision,
            in_flight: None,
            unsure: BTreeSet::new(),
            must_read: false,
            held: false,
            over: false,
            own,
            members: BTreeMap::new(),
            high_watermark: committed_end,
        };
        insync.advance();
        insync
    }

    pub fn epoch(&self) -> LeaderEpoch {
        self.value.leader_epoch
    }

    /// Returns the committed value that is known here.
    pub fn value(&self) -> &PartitionValue {
        &self.value
    }

    /// Returns the revision of [`Self::value`].
    pub fn revision(&self) -> Revision {
        self.revision
    }

    pub fn rule(&self) -> Rule {
        self.rule
    }

    /// Returns the first uncommitted offset.
    pub fn high_watermark(&self) -> Offset {
        self.high_watermark
    }

    /// Returns the offset up to which this broker's own log counts as acknowledged.
    pub fn own_end(&self) -> Offset {
        self.own.by(self.rule.durability)
    }

    /// Returns true if all records that the log held when the epoch began are committed. Before, its predecessors may have committed
    /// records above the high watermark: it serves no latest offset and uploads nothing.
    pub fn is_settled(&self) -> bool {
        self.high_watermark >= self.epoch_start
    }

    /// Returns the offset after the last committed record; `None` before the epoch is committed.
    pub fn latest(&self) -> Option<Offset> {
        self.is_settled().then_some(self.high_watermark)
    }

    /// Checks that the committed ISR has the minimum size. The error is the size that it has.
    pub fn has_minimum(&self) -> Result<(), usize> {
        let in_sync = self.value.isr.len();
        if in_sync >= self.rule.min_insync { Ok(()) } else { Err(in_sync) }
    }

    /// Returns true if [`Self::tick`] has work: a member is behind, or a proposal waits.
    pub fn is_behind(&self) -> bool {
        let mut others = self.value.isr.iter().filter(|id| **id != self.me);
        self.held || others.any(|id| self.members.get(id).is_none_or(|member| !self.has_all(member)))
    }

    /// Returns true if the key has to be read because the outcome of a proposal is unknown.
    pub fn awaits_reading(&self) -> bool {
        self.must_read
    }

    /// Returns the broker epoch of the link on which this replica is subscribed; `None` while it is not.
    pub fn follows(&self, broker: BrokerId) -> Option<Revision> {
        self.members.get(&broker)?.link
    }

    /// Returns the progress that this replica acknowledged on its last link.
    pub fn acknowledged_by(&self, broker: BrokerId) -> Option<Ends> {
        self.members.get(&broker)?.acked
    }

    /// Updates the progress of the own log after an append or a sync. It only grows within an epoch.
    pub fn own(&mut self, ends: Ends) {
        self.own.written = self.own.written.max(ends.written);
        self.own.persisted = self.own.persisted.max(ends.persisted);
        self.advance();
    }

    /// Records that by the metadata all records below `end` are in the object store or deleted. This leader or an earlier one committed
    /// them, so this log holds them.
    pub fn committed(&mut self, end: Offset) {
        self.high_watermark = self.high_watermark.max(end.min(self.own.written));
    }

    /// Applies a changed configuration.
    pub fn configure(&mut self, rule: Rule) {
        self.rule = rule;
        self.advance();
    }

    /// Processes a subscription: compares the follower's log with the leader's. After `Join::At`, acknowledgements on this link count.
    pub fn join(&mut self, peer: Peer, epoch: LeaderEpoch, claim: Claim, local: Local, history: &EpochHistory) -> Join {
        if let Err(refused) = self.may_join(peer, epoch, claim) {
            return Join::Refused(refused);
        }
        let answer = join::place(claim, history, self.own.written, local);
        let kept = match answer {
            Join::At(end) => end,
            Join::BeginAt(at) => at.min(claim.end),
            Join::Diverged { .. } | Join::Refused(_) => claim.end,
        };
        let has_lost = kept < self.high_watermark && self.value.isr.contains(&peer.broker);
        let member = self.members.entry(peer.broker).or_default();
        // The earlier acknowledgement may be of another incarnation.
        member.acked = None;
        member.link = matches!(answer, Join::At(_)).then_some(peer.epoch);
        member.departed = false;
        member.lost |= has_lost;
        answer
    }

    fn may_join(&self, peer: Peer, epoch: LeaderEpoch, claim: Claim) -> Result<(), JoinRefused> {
        let leads = self.epoch();
        if epoch != leads {
            return Err(JoinRefused::OtherEpoch { asked: epoch, leads });
        }
        if peer.broker == self.me || !self.value.replicas.contains(&peer.broker) {
            return Err(JoinRefused::NoReplica);
        }
        let (claimed, known) = (claim.added, self.value.added_after(peer.broker));
        // An ISR member has subscribed since it was added. It may receive the end of the reassignment before its leader does.
        let earlier = known.is_some() && claimed != known && !self.value.isr.contains(&peer.broker);
        let later = claimed.is_some_and(|claimed| claimed > self.value.removals);
        if earlier || later {
            return Err(JoinRefused::OtherAddition { claimed, known });
        }
        let known = self.members.get(&peer.broker).and_then(|member| member.link.max(member.registered()));
        if known.is_some_and(|known| known > peer.epoch) {
            return Err(JoinRefused::OlderBroker);
        }
        match claim.last {
            Some(claimed) if claimed > leads => Err(JoinRefused::NewerLog { claimed, leads }),
            _ => Ok(()),
        }
    }

    /// Processes an acknowledgement: the progress of a follower's log.
    ///
    /// # Errors
    /// The acknowledgement does not count and changes nothing. The sender has to subscribe again.
    pub fn acknowledged(&mut self, peer: Peer, epoch: LeaderEpoch, ends: Ends) -> Result<(), Stale> {
        let (leads, log_end) = (self.epoch(), self.own.written);
        let passes = epoch == leads || mutant!(AcceptOlderLeaderEpochAck);
        if !passes && !mutant!(CountOlderEpochAcks) {
            return Err(Stale::OtherEpoch { acknowledged: epoch, leads });
        }
        let joined = |member: &&mut Member| {
            member.link == Some(peer.epoch)
                || mutant!(AcceptOlderBrokerEpochAck) && member.link.is_some()
                || mutant!(CountOlderEpochAcks) && epoch < leads
        };
        let Some(member) = self.members.get_mut(&peer.broker).filter(joined) else {
            return Err(Stale::NotJoined { broker: peer.broker, epoch: peer.epoch });
        };
        let Ends { written, persisted } = ends;
        if persisted > written || written > log_end {
            return Err(Stale::Impossible { written, persisted, log_end });
        }
        let acked = member.acked.get_or_insert_default();
        acked.written = acked.written.max(written);
        acked.persisted = acked.persisted.max(persisted);
        let caught_up = acked.by(self.rule.durability) >= self.own.written;
        member.lags &= !caught_up;
        self.advance();
        Ok(())
    }

    /// Records that this incarnation of a follower is disconnected. A follower that exited or shuts down leaves the ISR with the next
    /// proposal. A late report about an incarnation before the current one is ignored.
    pub fn left(&mut self, peer: Peer, why: Departure) {
        if peer.broker == self.me || !self.value.replicas.contains(&peer.broker) {
            return;
        }
        let member = self.members.entry(peer.broker).or_default();
        if member.link.is_some_and(|link| link > peer.epoch) {
            return;
        }
        member.link = None;
        member.departed |= why != Departure::LinkLost;
    }

    /// Applies a broker's status in the metadata cache. The broker's acknowledgements stay valid while it is in the ISR: before it takes
    /// part again without those records, it removes itself from the ISR.
    pub fn seen(&mut self, broker: BrokerId, registration: Registration) {
        if broker == self.me || !self.value.replicas.contains(&broker) {
            return;
        }
        let member = self.members.entry(broker).or_default();
        self.held = false;
        member.registration = Some(registration);
        if let Registration::Running(epoch) = registration
            && member.link.is_some_and(|link| link < epoch)
        {
            member.link = None;
        }
    }

    /// Checks which members lag; called at intervals while [`Self::is_behind`]. `now_ms` is of a monotonic clock. A member lags if it
    /// takes longer than the rule allows to reach its target, the log end of an earlier tick. A constant distance is no lag.
    pub fn tick(&mut self, now_ms: u64) {
        self.held = false;
        let (log_end, lag_ms, durability) = (self.own.written, self.rule.lag_ms, self.rule.durability);
        for id in self.value.isr.iter().filter(|id| **id != self.me) {
            let member = self.members.entry(*id).or_default();
            let reached = member.acked.map_or(Offset::ZERO, |ends| ends.by(durability));
            let has_joined = member.acked.is_some();
            member.target = match member.target {
                _ if has_joined && reached >= log_end => None,
                Some((target, since)) if !has_joined || reached < target => {
                    member.lags |= now_ms.saturating_sub(since) >= lag_ms;
                    Some((target, since))
                }
                _ => Some((log_end, now_ms)),
            };
        }
    }

    /// Returns the next ISR change to propose. Only one proposal is pending: the next one comes after [`Self::agreed`].
    pub fn proposal(&mut self) -> Option<Proposal> {
        if self.in_flight.is_some() || self.must_read || self.held || self.over {
            return None;
        }
        let value = self.wanted();
        if value == self.value {
            return None;
        }
        let new = value.isr.iter().filter(|id| !self.value.isr.contains(id));
        let link = |id: &BrokerId| Some(Peer { broker: *id, epoch: self.members.get(id)?.link? });
        let added = new.filter_map(link).collect();
        let proposal = Proposal { expect: self.revision, value, added };
        self.in_flight = Some(proposal.clone());
        Some(proposal)
    }

    /// Returns the value with the ISR and ELR that follow from the current state.
    fn wanted(&self) -> PartitionValue {
        let (mut lost, mut out, mut add) = (BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
        for (id, member) in self.members.iter().filter(|(id, _)| self.value.replicas.contains(id)) {
            let in_sync = self.value.isr.contains(id);
            if in_sync && member.lost {
                lost.insert(*id);
            } else if in_sync && (member.is_leaving() || member.lags) {
                out.insert(*id);
            } else if !in_sync && self.may_be_admitted(*id, member) {
                add.insert(*id);
            }
        }
        let kept = lost.into_iter().fold(self.value.clone(), |value, id| value.strike(id));
        // Without a member to add, `expand` still empties an ELR that a lowered min ISR no longer requires.
        kept.shrink(&out, self.rule.min_insync).expand(&add, self.rule.min_insync)
    }

    fn may_be_admitted(&self, id: BrokerId, member: &Member) -> bool {
        let is_here = member.link.is_some() && member.link == member.registered() && !member.departed;
        let reached = member.acked.map(|ends| ends.by(self.rule.durability));
        let asked =
            if mutant!(AdmitBelowEpochStart) { self.high_watermark } else { self.high_watermark.max(self.epoch_start) };
        let settled = self.is_settled() || !mutant!(AdmitAfterEpochCommitted);
        settled && is_here && !self.value.removing.contains(&id) && reached.is_some_and(|end| end >= asked)
    }

    /// Applies the outcome of the last proposal, or a value that was read back.
    pub fn agreed(&mut self, outcome: Agreed) -> Observed {
        let proposal = self.in_flight.take();
        match outcome {
            Agreed::Done(revision) => match proposal {
                Some(proposal) => self.observed(&proposal.value, revision),
                None => Observed::Same,
            },
            Agreed::Found(value, revision) => {
                self.must_read = false;
                let observed = self.observed(&value, revision);
                self.held = observed == Observed::Same;
                observed
            }
            Agreed::Gone => {
                self.over = true;
                Observed::Gone
            }
            Agreed::Unknown => {
                if let Some(proposal) = proposal.filter(|proposal| proposal.expect == self.revision) {
                    if mutant!(TreatUnknownAsDone) {
                        self.value = proposal.value;
                        self.advance();
                        return Observed::Adopted;
                    }
                    self.unsure.extend(&proposal.value.isr);
                    self.must_read = true;
                }
                Observed::Same
            }
        }
    }

    /// Applies a value of the partition from the metadata cache or from a read. Values older than the known one are dropped.
    pub fn observed(&mut self, value: &PartitionValue, revision: Revision) -> Observed {
        if revision <= self.revision {
            return Observed::Same;
        }
        if value.leader != Some(self.me) || value.leader_epoch != self.epoch() {
            self.over = true;
            return Observed::Deposed { epoch: value.leader_epoch };
        }
        let before = std::mem::replace(&mut self.value, value.clone());
        self.revision = revision;
        // A proposal at an older revision can no longer come true.
        self.unsure.clear();
        (self.must_read, self.held) = (false, false);
        for (id, member) in &mut self.members {
            // A removed replica deletes its log. A replica with another addition was removed before it, even if no value here showed
            // that.
            let addition = self.value.added_after(*id);
            let is_anew = addition.is_some() && addition != before.added_after(*id);
            if is_anew || !self.value.replicas.contains(id) {
                (member.link, member.acked) = (None, None);
            }
            member.lost &= self.value.isr.contains(id);
            if !self.value.isr.contains(id) {
                (member.target, member.lags) = (None, false);
            }
        }
        self.advance();
        Observed::Adopted
    }

    fn has_all(&self, member: &Member) -> bool {
        member.acked.is_some_and(|ends| ends.by(self.rule.durability) >= self.own.written)
    }

    /// Returns every member of the committed ISR and of proposed ISRs that may come true; some more than once.
    fn maximal(&self) -> impl Iterator<Item = BrokerId> + '_ {
        let proposed = self.in_flight.iter().flat_map(|proposal| &proposal.value.isr).chain(&self.unsure);
        let proposed = proposed.filter(|_| !mutant!(HighWatermarkOverCommittedIsr));
        self.value.isr.iter().chain(proposed).copied()
    }

    fn may_commit(&self) -> bool {
        if mutant!(MinIsrOverMaximalIsr) {
            return self.maximal().collect::<BTreeSet<_>>().len() >= self.rule.min_insync;
        }
        self.has_minimum().is_ok() && (self.value.elr.is_empty() || mutant!(IgnoreElr))
    }

    fn advance(&mut self) {
        if !self.may_commit() {
            return;
        }
        let acknowledged = |id: BrokerId| {
            if id == self.me {
                return Some(self.own_end());
            }
            self.members.get(&id)?.acked.map(|ends| ends.by(self.rule.durability))
        };
        // A member without an acknowledgement holds the high watermark back.
        let least = self.maximal().map(acknowledged).try_fold(self.own_end(), |least, end| Some(least.min(end?)));
        if let Some(least) = least {
            self.high_watermark = self.high_watermark.max(least);
        }
    }
}

#[cfg(test)]
mod tests;
