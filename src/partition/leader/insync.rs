//! Who is in sync, what is therefore committed, and who is to be in sync next. Pure.
//!
//! # Overview
//!
//! One [`InSync`] is one leader in one epoch. The actor tells it what its log has, what followers acknowledge, what the view says of
//! brokers, and how its proposals to the metadata store ended. It says where the high watermark is, who may join, and which
//! change of the ISR to propose.
//!
//! ```text
//!   own, acknowledged ──▶ least end over the maximal ISR ──▶ high watermark
//!   joined, seen, left ──▶ proposal ──▶ compare-and-set ──▶ agreed ──▶ the committed value
//! ```
//!
//! # Rules
//!
//! - An acknowledgement counts only in this leader epoch and for the broker epoch of the link on which that replica joined. It names both
//!   ends; the topic's durability says here, and only here, which of them counts.
//! - The *maximal* ISR is the committed one and every one that was proposed since and may still come true. The high watermark is the
//!   least acknowledged end over it: whichever of these sets is the true one, all its members hold what is below.
//! - The high watermark moves only while the *committed* ISR has the minimum and the committed ELR is empty. A larger ISR that is only
//!   proposed may never come true, and then an eligible replica, which waits for nothing, may be elected.
//! - A proposal whose outcome is not known may come true until the key's revision has moved on: reading the old value back proves
//!   nothing. So its members stay in the maximal ISR until another revision is seen.
//! - A replica is admitted when it has acknowledged, in this epoch, all that is committed and all that the log held when the epoch
//!   began: before the high watermark has reached that, records may be committed of which this leader does not know that they are. It
//!   need not wait for the high watermark to get there: below the minimum that moves only after somebody was admitted.
//! - A replica that is being added joins by the addition that this leader knows of (`PartitionValue::removals`), and what it acknowledged
//!   counts while that is the one. A broker that is let go deletes what it has; added again it is another replica, though its link stands.
//!
//! Others change the value as well: brokers without proof strike themselves, the controller ends moves. They only take members out, or
//! change the leader and with it the epoch; so the ISR that is known here may be too large and never too small.

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

/// What the topic and the broker ask of a leader.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Rule {
    /// What a replica's acknowledgement means.
    pub durability: Durability,
    /// `min.insync.replicas`
    pub min_insync: usize,
    /// How long, in milliseconds, a member may take to reach what the log end was.
    pub lag_ms: u64,
}

/// What a leader begins with.
#[derive(Clone, Debug)]
pub struct Start {
    /// This broker, whom the value names as the leader.
    pub me: BrokerId,
    /// The partition's value.
    pub value: PartitionValue,
    /// The revision of that value.
    pub revision: Revision,
    /// How far its own log reaches.
    pub own: Ends,
    /// All below it is known as committed: by this broker as a follower, or because it is in the bucket or deleted.
    pub committed_end: Offset,
    /// What is asked of it.
    pub rule: Rule,
}

impl Start {
    /// What the leader `me` of epoch `epoch` begins with where there is no other replica. What it finds in its log it
    /// commits: there is nobody else who could have committed something different.
    pub fn alone(me: BrokerId, epoch: LeaderEpoch, rule: Rule, own: Ends, committed_end: Offset) -> Self {
        let value = PartitionValue::new(vec![me], epoch);
        Self { me, value, revision: Revision::ZERO, own, committed_end, rule }
    }
}

/// The replicas of one partition, as its leader sees them in one epoch.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct InSync {
    me: BrokerId,
    rule: Rule,
    /// The log end when the epoch began.
    epoch_start: Offset,
    /// The committed value as it is known here, and its revision.
    value: PartitionValue,
    revision: Revision,
    /// What was proposed at this revision and has no outcome yet.
    in_flight: Option<Proposal>,
    /// The ISRs of what was proposed at this revision and may come true at any time until the revision moves on.
    unsure: BTreeSet<BrokerId>,
    /// The outcome of the last proposal is not known: nothing is proposed before the key was read.
    must_read: bool,
    /// The last proposal was refused at this very revision: the view lags, and the next one waits for its word or for a tick.
    held: bool,
    /// Another epoch has begun, or the partition is gone: nothing is proposed any more.
    over: bool,
    own: Ends,
    members: BTreeMap<BrokerId, Member>,
    /// First uncommitted offset. Never falls. It moves to no end that a member of the maximal ISR has not acknowledged; or to where the
    /// metadata shows that a leader before had come.
    high_watermark: Offset,
}

impl InSync {
    /// The leader of the value's epoch, whose followers have yet to join. An ISR of one commits what it finds in its log at once.
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

    /// The leader epoch.
    pub fn epoch(&self) -> LeaderEpoch {
        self.value.leader_epoch
    }

    /// The committed value, as far as it is known here.
    pub fn value(&self) -> &PartitionValue {
        &self.value
    }

    /// The revision of [`Self::value`].
    pub fn revision(&self) -> Revision {
        self.revision
    }

    /// What is asked of it.
    pub fn rule(&self) -> Rule {
        self.rule
    }

    /// First uncommitted offset.
    pub fn high_watermark(&self) -> Offset {
        self.high_watermark
    }

    /// What this broker itself counts as acknowledged.
    pub fn own_end(&self) -> Offset {
        self.own.by(self.rule.durability)
    }

    /// Whether all that the log held when the epoch began is committed. Before, this leader does not know what its
    /// predecessors committed: it tells nobody a latest offset and uploads nothing.
    pub fn is_settled(&self) -> bool {
        self.high_watermark >= self.epoch_start
    }

    /// The offset after the last committed record; `None` before the leader is settled.
    pub fn latest(&self) -> Option<Offset> {
        self.is_settled().then_some(self.high_watermark)
    }

    /// Whether the committed ISR has the minimum; else how many it has.
    pub fn has_minimum(&self) -> Result<(), usize> {
        let in_sync = self.value.isr.len();
        if in_sync >= self.rule.min_insync { Ok(()) } else { Err(in_sync) }
    }

    /// Whether [`Self::tick`] has something to do: a member is behind, or a proposal waits.
    pub fn is_behind(&self) -> bool {
        let mut others = self.value.isr.iter().filter(|id| **id != self.me);
        self.held || others.any(|id| self.members.get(id).is_none_or(|member| !self.has_all(member)))
    }

    /// Whether the key is to be read because the outcome of a proposal is not known.
    pub fn awaits_reading(&self) -> bool {
        self.must_read
    }

    /// The broker epoch of the link on which this replica follows; `None` while it does not.
    pub fn follows(&self, broker: BrokerId) -> Option<Revision> {
        self.members.get(&broker)?.link
    }

    /// What this replica has acknowledged on its last link.
    pub fn acknowledged_by(&self, broker: BrokerId) -> Option<Ends> {
        self.members.get(&broker)?.acked
    }

    /// The own log reaches so far: after an append, after a sync. Ends only grow within an epoch.
    pub fn own(&mut self, ends: Ends) {
        self.own.written = self.own.written.max(ends.written);
        self.own.persisted = self.own.persisted.max(ends.persisted);
        self.advance();
    }

    /// All below `end` is in the bucket or deleted, by the metadata: this leader had committed it, or one before, and so it is in this log.
    pub fn committed(&mut self, end: Offset) {
        self.high_watermark = self.high_watermark.max(end.min(self.own.written));
    }

    /// Takes a changed configuration.
    pub fn configure(&mut self, rule: Rule) {
        self.rule = rule;
        self.advance();
    }

    /// A follower joins: compares its log with the leader's, and from `Join::At` on counts what it acknowledges on this link.
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
        // What it acknowledged before was another uptime's, perhaps.
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
        // Who is in the ISR by this value has joined since it was added, and may hear before its leader that the move is over.
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

    /// A follower says how far its log reaches.
    ///
    /// # Errors
    /// When it does not count. Nothing has changed then; the sender has to join anew.
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

    /// A follower is not connected any more, in this uptime of it. Who is gone or stops leaves the ISR with the next proposal. Late
    /// news of an uptime before the one that follows now is passed over.
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

    /// The view's word on a broker. What it acknowledged stays true while it is in the ISR: before it takes part again
    /// without it, it strikes itself from there.
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

    /// Looks who does not keep up; asked now and then while [`Self::is_behind`]. `now_ms` is of a clock that never goes back.
    ///
    /// A member is behind when it took longer than the rule allows to reach what the log end was: a constant distance is none.
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

    /// The next change of the ISR to propose. One at a time: the next comes after [`Self::agreed`].
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

    /// The value with the sets that are right by what is known.
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
        // With nobody to add, this still empties an ELR that the minimum, lowered since, does not ask for.
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

    /// How the last proposal ended, or what was read back.
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

    /// The view, or a reading, says that this is the partition's value. Values older than what is known are dropped.
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
        // What was proposed at an older revision can never be done any more.
        self.unsure.clear();
        (self.must_read, self.held) = (false, false);
        for (id, member) in &mut self.members {
            // Who is let go deletes what it has. Who comes by another addition was let go before it, whether that was seen here or not.
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

    /// Every member of the committed ISR, and of those that were proposed and may come true; some more than once.
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
        // One member that has said nothing yet holds all back.
        let least = self.maximal().map(acknowledged).try_fold(self.own_end(), |least, end| Some(least.min(end?)));
        if let Some(least) = least {
            self.high_watermark = self.high_watermark.max(least);
        }
    }
}

#[cfg(test)]
mod tests;
