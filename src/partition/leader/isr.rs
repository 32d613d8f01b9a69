//! In-sync replicas of a partition, the high watermark that follows from them, and the next ISR change. Pure.
//!
//! # Overview
//!
//! One [`IsrTracker`] is one leader in one epoch. The actor reports the progress of its own log, and subscriptions,
//! acknowledgements and disconnects of followers. The actor also reports statuses of brokers in the metadata cache,
//! ticks, and outcomes of proposals. [`IsrTracker`] computes the high watermark, accepts or rejects subscriptions, and
//! returns the ISR change to propose.
//!
//! ```text
//!   own log, acknowledgements ──▶ minimum end over the maximal ISR ──▶ high watermark
//!   acknowledgements, statuses, disconnects, ticks ──▶ proposal ──▶ compare-and-set ──▶ outcome ──▶ committed value
//! ```
//!
//! # Rules
//!
//! - An acknowledgement counts only in this leader epoch and for the broker epoch of the link on which that replica
//!   subscribed. It has the log end and the persisted end. The topic's durability decides which of them counts, in this
//!   module and nowhere else.
//! - The *maximal* ISR is the committed ISR and every ISR that was proposed since and may still be committed. The high
//!   watermark is the minimum acknowledged end over the maximal ISR. So whichever of these ISRs is current, all its
//!   members hold the records below the high watermark.
//! - The high watermark moves only while the *committed* ISR has the minimum size and the committed ELR is empty. A
//!   proposed larger ISR does not count: if the store refuses it, an eligible replica for which no commit waited may be
//!   elected. In any case, the high watermark also moves to an offset that the metadata shows as committed.
//! - A proposal with an unknown outcome may be committed until the key has another revision. The old value, read back,
//!   does not show that the proposal failed. So the proposed members stay in the maximal ISR until this broker reads
//!   another revision.
//! - A replica is admitted when it has acknowledged, in this epoch, all committed records and all records below the
//!   epoch start. Until the high watermark reaches the epoch start, records between the two may be committed. The
//!   admission does not wait for the high watermark to reach the epoch start. Below the min ISR, the high watermark
//!   moves only after an admission.
//! - A replica that is being added reports the `PartitionValue::removal_count` that its broker applied. Outside the
//!   ISR, it may subscribe only with the count of this leader's value, and its acknowledgements count only while that
//!   count stays. A removed replica deletes its log. If it is added again, it counts as another replica, although its
//!   link is the same.
//!
//! Other brokers change the value as well: a broker that fails its startup verification removes itself, and the
//! controller completes reassignments. These changes only remove members, or change the leader and with it the epoch.
//! So the ISR that this leader has may be too large, and is never too small.

use std::collections::{BTreeMap, BTreeSet};

use super::{
    divergence::{self, LocalLogBounds, LogPosition, SubscribeError, SubscribeOutcome},
    member::{AckError, BrokerStatus, DisconnectCause, MemberState, PeerId, ReplicaProgress},
};
use crate::{
    cluster::{PartitionValue, Revision},
    log::EpochHistory,
    model::{BrokerId, Durability, LeaderEpoch, Offset},
};

/// Requirements of the topic and the broker on a leader.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct IsrRules {
    /// Durability of the topic: selects the end of an acknowledgement that counts.
    pub durability: Durability,
    /// `min.insync.replicas`.
    pub min_insync: usize,
    /// Maximum time, in milliseconds, in which a member must reach the log end that was current when the time started.
    pub lag_ms: u64,
}

/// Input of a new leader.
#[derive(Clone, Debug)]
pub struct LeaderStart {
    /// This broker, which the value names as the leader.
    pub me: BrokerId,
    pub value: PartitionValue,
    /// Revision of `value`.
    pub revision: Revision,
    /// Progress of this broker's log.
    pub progress: ReplicaProgress,
    /// High watermark at the start. This is the high watermark of this broker's last role, or an offset below which all
    /// records are in the object store or deleted.
    pub committed_end: Offset,
    pub rules: IsrRules,
}

impl LeaderStart {
    /// Returns the input of the leader `me` of epoch `epoch` without other replicas. Such a leader commits all records
    /// of its log: no other replica could have committed different ones.
    #[cfg(test)]
    pub fn standalone(
        me: BrokerId,
        epoch: LeaderEpoch,
        rules: IsrRules,
        progress: ReplicaProgress,
        committed_end: Offset,
    ) -> Self {
        let value = PartitionValue::new(vec![me], epoch);
        Self { me, value, revision: Revision::ZERO, progress, committed_end, rules }
    }
}

/// A value to be written by compare-and-set, with another ISR and ELR or without a leader.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct IsrProposal {
    /// Revision that the partition's key must still have.
    pub expect: Revision,
    pub value: PartitionValue,
    /// New ISR members. The create revisions of their registrations must still be these broker epochs.
    pub added: Vec<PeerId>,
}

/// Outcome of a proposal or of a read of the key.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum ProposalOutcome {
    /// The proposed value was written at this revision.
    Committed(Revision),
    /// The store refused the proposal, or the key was read: the current value and its revision.
    CurrentValue(PartitionValue, Revision),
    /// The key does not exist, because the topic is being deleted, or its value is unreadable.
    Deleted,
    /// The outcome is unknown. The key has to be read back, and its value reported as
    /// [`ProposalOutcome::CurrentValue`].
    Unknown,
}

/// Effect of a partition's value on its leader.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ValueUpdate {
    /// No effect: there is no value, or it is not newer than the committed value that this leader has.
    Unchanged,
    /// The value is now the committed value.
    Adopted,
    /// Another epoch has begun: this leader is deposed.
    Deposed { epoch: LeaderEpoch },
    /// The partition is being deleted.
    Deleted,
}

/// Change of a replica's membership in the ISR.
enum MemberChange {
    /// The replica is removed from ISR and ELR, because it lost committed records.
    RemovedAsIncomplete,
    /// The replica is removed from the ISR; below the min ISR it becomes eligible.
    Removed,
    Admitted,
}

/// State of a partition's replicas at their leader, in one epoch.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct IsrTracker {
    me: BrokerId,
    rules: IsrRules,
    /// Log end when the epoch began.
    epoch_start: Offset,
    /// Newest committed value that this broker has received, and its revision.
    value: PartitionValue,
    revision: Revision,
    /// Proposal that has no outcome yet.
    in_flight: Option<IsrProposal>,
    /// Members of the ISRs that were proposed at this revision with an unknown outcome. Such a proposal may be
    /// committed until the key has another revision.
    maybe_committed: BTreeSet<BrokerId>,
    /// True if the outcome of the last proposal is unknown: the leader reads the key before the next proposal.
    needs_read_back: bool,
    /// True if the last outcome was a current value that is not newer than `value`. Either the store refused the
    /// proposal because of a registration, or a read returned the old value. The next proposal waits for a newer value,
    /// a broker status or a tick.
    awaits_metadata: bool,
    /// True if another epoch has begun, or the partition is deleted: the leader proposes nothing.
    epoch_ended: bool,
    /// Progress of this broker's log.
    progress: ReplicaProgress,
    members: BTreeMap<BrokerId, MemberState>,
    /// First uncommitted offset. Never falls. It never passes an end that a member of the maximal ISR has not
    /// acknowledged. The one exception is an offset that the metadata shows as committed.
    high_watermark: Offset,
}

impl IsrTracker {
    /// Creates the leader of the value's epoch; its followers have not subscribed yet. All records that this broker
    /// acknowledges are committed at once if the ISR is this broker alone. This also requires a min ISR of 1 and an
    /// empty ELR.
    pub fn new(start: LeaderStart) -> Self {
        let LeaderStart { me, value, revision, progress, committed_end, rules } = start;
        assert_eq!(value.leader, Some(me), "the value names this broker as leader");
        let mut tracker = Self {
            me,
            rules,
            epoch_start: progress.log_end,
            value,
            revision,
            in_flight: None,
            maybe_committed: BTreeSet::new(),
            needs_read_back: false,
            awaits_metadata: false,
            epoch_ended: false,
            progress,
            members: BTreeMap::new(),
            high_watermark: committed_end,
        };
        tracker.advance_high_watermark();
        tracker
    }

    pub fn epoch(&self) -> LeaderEpoch {
        self.value.leader_epoch
    }

    /// Returns the newest committed value that this broker has received.
    pub fn value(&self) -> &PartitionValue {
        &self.value
    }

    /// Returns the revision of [`Self::value`].
    pub fn revision(&self) -> Revision {
        self.revision
    }

    pub fn rules(&self) -> IsrRules {
        self.rules
    }

    /// Returns the first uncommitted offset.
    pub fn high_watermark(&self) -> Offset {
        self.high_watermark
    }

    /// Returns the offset up to which this broker's own log counts as acknowledged.
    pub fn local_acked(&self) -> Offset {
        self.progress.acked_for(self.rules.durability)
    }

    /// Returns true if all records that the log held when the epoch began are committed. Before that, earlier leaders
    /// may have committed records above this high watermark, so the leader serves no latest offset and uploads nothing.
    pub fn is_epoch_committed(&self) -> bool {
        self.high_watermark >= self.epoch_start
    }

    /// Returns the offset after the last committed record; `None` before the epoch is committed.
    #[cfg(test)]
    pub fn latest(&self) -> Option<Offset> {
        self.is_epoch_committed().then_some(self.high_watermark)
    }

    /// Checks that the committed ISR has `min.insync.replicas` members. The error is the size of that ISR.
    pub fn check_min_isr(&self) -> Result<(), usize> {
        let in_sync = self.value.isr.len();
        if in_sync >= self.rules.min_insync { Ok(()) } else { Err(in_sync) }
    }

    /// Returns true if [`Self::tick`] has work: an ISR member has not acknowledged all records, or the next proposal
    /// waits for metadata or a tick.
    pub fn wants_ticks(&self) -> bool {
        let mut followers = self.value.isr.iter().filter(|id| **id != self.me);
        let is_behind = |id: &BrokerId| self.members.get(id).is_none_or(|member| !self.has_caught_up(member));
        self.awaits_metadata || followers.any(is_behind)
    }

    /// Returns true if the key has to be read because the outcome of a proposal is unknown.
    pub fn needs_read_back(&self) -> bool {
        self.needs_read_back
    }

    /// Returns the broker epoch of the link on which this replica is subscribed; `None` while it is not.
    #[cfg(test)]
    pub fn follows(&self, broker: BrokerId) -> Option<Revision> {
        self.members.get(&broker)?.link
    }

    /// Returns the progress that this replica acknowledged since its last subscription; `None` if there is none.
    #[cfg(test)]
    pub fn acknowledged_by(&self, broker: BrokerId) -> Option<ReplicaProgress> {
        self.members.get(&broker)?.acked
    }

    /// Updates the progress of this broker's log after an append or a sync. Within an epoch the progress only grows.
    pub fn update_local(&mut self, progress: ReplicaProgress) {
        self.progress.log_end = self.progress.log_end.max(progress.log_end);
        self.progress.persisted_end = self.progress.persisted_end.max(progress.persisted_end);
        self.advance_high_watermark();
    }

    /// Raises the high watermark to `end`, at most to the log end. By the metadata, all records below `end` are in the
    /// object store or deleted. So this leader or an earlier one committed them.
    pub fn on_committed(&mut self, end: Offset) {
        self.high_watermark = self.high_watermark.max(end.min(self.progress.log_end));
    }

    /// Applies a changed configuration.
    pub fn configure(&mut self, rules: IsrRules) {
        self.rules = rules;
        self.advance_high_watermark();
    }

    /// Processes a subscription: compares the follower's log with the leader's. After `SubscribeOutcome::Accepted`,
    /// acknowledgements on this link count. Any outcome but `Rejected` ends the follower's earlier subscription and
    /// drops its acknowledgements. Such an outcome also marks an ISR member whose log ends below the high watermark as
    /// incomplete.
    pub fn on_subscribe(
        &mut self,
        peer: PeerId,
        epoch: LeaderEpoch,
        position: LogPosition,
        local: LocalLogBounds,
        history: &EpochHistory,
    ) -> SubscribeOutcome {
        if let Err(error) = self.check_subscription(peer, epoch, position) {
            return SubscribeOutcome::Rejected(error);
        }
        let outcome = divergence::resolve_divergence(position, history, self.progress.log_end, local);
        // Log end of the follower after it has applied the outcome. For diverged logs, the log end before the
        // truncation.
        let remaining_end = match &outcome {
            SubscribeOutcome::Accepted(end) => *end,
            SubscribeOutcome::Bootstrap(tables) => tables.start.min(position.log_end),
            SubscribeOutcome::Diverged { .. } | SubscribeOutcome::Rejected(_) => position.log_end,
        };
        let has_lost = remaining_end < self.high_watermark && self.value.isr.contains(&peer.broker);
        let member = self.members.entry(peer.broker).or_default();
        // The earlier acknowledgement may be of another broker epoch.
        member.acked = None;
        member.link = matches!(outcome, SubscribeOutcome::Accepted(_)).then_some(peer.epoch);
        member.departed = false;
        member.lost_data |= has_lost;
        outcome
    }

    /// Checks that the follower may subscribe now. The follower must subscribe in this epoch, as a replica by the same
    /// addition, and in its newest broker epoch. The follower must have no batches of a newer leader epoch.
    fn check_subscription(
        &self,
        peer: PeerId,
        epoch: LeaderEpoch,
        position: LogPosition,
    ) -> Result<(), SubscribeError> {
        let leader_epoch = self.epoch();
        if epoch != leader_epoch {
            return Err(SubscribeError::OtherEpoch { requested: epoch, leader_epoch });
        }
        if peer.broker == self.me || !self.value.replicas.contains(&peer.broker) {
            return Err(SubscribeError::NoReplica);
        }
        let (reported, known) = (position.removal_count, self.value.added_after(peer.broker));
        // An ISR member is not rejected for an older count or none. The member has subscribed since it was added, and
        // may receive the end of the reassignment before its leader does.
        let follower_is_late = known.is_some() && reported != known && !self.value.isr.contains(&peer.broker);
        let leader_is_late = reported.is_some_and(|removals| removals > self.value.removal_count);
        if follower_is_late || leader_is_late {
            return Err(SubscribeError::OtherAddition { reported, known });
        }
        let newest_epoch = self.members.get(&peer.broker).and_then(|member| member.link.max(member.registered_epoch()));
        if newest_epoch.is_some_and(|newest| newest > peer.epoch) {
            return Err(SubscribeError::OlderBroker);
        }
        match position.last_epoch {
            Some(last_epoch) if last_epoch > leader_epoch => Err(SubscribeError::NewerLog { last_epoch, leader_epoch }),
            _ => Ok(()),
        }
    }

    /// Processes an acknowledgement: the progress of a follower's log.
    ///
    /// # Errors
    /// The acknowledgement changes nothing: it is of another leader epoch, of no current subscription, or impossible.
    pub fn on_acknowledged(
        &mut self,
        peer: PeerId,
        epoch: LeaderEpoch,
        progress: ReplicaProgress,
    ) -> Result<(), AckError> {
        let (leader_epoch, log_end) = (self.epoch(), self.progress.log_end);
        let is_current = epoch == leader_epoch || mutant!(AcceptOlderLeaderEpochAck);
        if !is_current && !mutant!(CountOlderEpochAcks) {
            return Err(AckError::OtherEpoch { acknowledged_epoch: epoch, leader_epoch });
        }
        let is_subscribed = |member: &&mut MemberState| {
            member.link == Some(peer.epoch)
                || mutant!(AcceptOlderBrokerEpochAck) && member.link.is_some()
                || mutant!(CountOlderEpochAcks) && epoch < leader_epoch
        };
        let Some(member) = self.members.get_mut(&peer.broker).filter(is_subscribed) else {
            return Err(AckError::NotSubscribed { broker: peer.broker, epoch: peer.epoch });
        };
        let ReplicaProgress { log_end: acked_log_end, persisted_end: acked_persisted_end } = progress;
        if acked_persisted_end > acked_log_end || acked_log_end > log_end {
            return Err(AckError::Impossible { acked_log_end, acked_persisted_end, log_end });
        }
        let acked = member.acked.get_or_insert_default();
        acked.log_end = acked.log_end.max(acked_log_end);
        acked.persisted_end = acked.persisted_end.max(acked_persisted_end);
        let has_caught_up = acked.acked_for(self.rules.durability) >= self.progress.log_end;
        member.is_lagging &= !has_caught_up;
        self.advance_high_watermark();
        Ok(())
    }

    /// Ends the subscription of a follower's broker in this broker epoch. A follower that exited or shuts down leaves
    /// the ISR with the next proposal. A report about an older broker epoch than that of the subscribed link is
    /// ignored.
    pub fn on_disconnected(&mut self, peer: PeerId, cause: DisconnectCause) {
        if peer.broker == self.me || !self.value.replicas.contains(&peer.broker) {
            return;
        }
        let member = self.members.entry(peer.broker).or_default();
        if member.link.is_some_and(|link| link > peer.epoch) {
            return;
        }
        member.link = None;
        member.departed |= cause != DisconnectCause::LinkLost;
    }

    /// Applies a broker's status in the metadata cache. The broker's acknowledgements stay valid while it is in the
    /// ISR. A broker that restarts without those records removes itself from the ISR before it registers. A
    /// registration with a newer broker epoch ends a subscription on an older link. The next proposal no longer waits
    /// for metadata.
    pub fn on_broker_status(&mut self, broker: BrokerId, status: BrokerStatus) {
        if broker == self.me || !self.value.replicas.contains(&broker) {
            return;
        }
        let member = self.members.entry(broker).or_default();
        self.awaits_metadata = false;
        member.registration = Some(status);
        if let BrokerStatus::Registered(epoch) = status
            && member.link.is_some_and(|link| link < epoch)
        {
            member.link = None;
        }
    }

    /// Checks which members lag; called at intervals while [`Self::wants_ticks`]. `now_ms` is of a monotonic clock. The
    /// target of a member is the log end of an earlier tick. A member lags if it has not reached its target `lag_ms`
    /// after that tick. A constant distance to the log end is no lag. The next proposal no longer waits for metadata.
    pub fn tick(&mut self, now_ms: u64) {
        self.awaits_metadata = false;
        let (log_end, lag_ms, durability) = (self.progress.log_end, self.rules.lag_ms, self.rules.durability);
        for id in self.value.isr.iter().filter(|id| **id != self.me) {
            let member = self.members.entry(*id).or_default();
            let acked_end = member.acked.map_or(Offset::ZERO, |progress| progress.acked_for(durability));
            let has_acked = member.acked.is_some();
            member.target = match member.target {
                // The member has all records: no target.
                _ if has_acked && acked_end >= log_end => None,
                // The member has not reached its target.
                Some((target, since_ms)) if !has_acked || acked_end < target => {
                    member.is_lagging |= now_ms.saturating_sub(since_ms) >= lag_ms;
                    Some((target, since_ms))
                }
                // The member has reached its target, or had none: the current log end is the next one.
                _ => Some((log_end, now_ms)),
            };
        }
    }

    /// Returns the next ISR change to propose, and marks it as pending. The proposal is pending until
    /// [`Self::on_outcome`]. Returns `None` if no change is due, a proposal is pending, or the key has to be read back.
    /// Returns `None` also if the next proposal waits for metadata, or the epoch has ended. The actor calls this in
    /// every turn, so nothing is allocated while no replica's membership changes.
    pub fn start_proposal(&mut self) -> Option<IsrProposal> {
        if self.in_flight.is_some() || self.needs_read_back || self.awaits_metadata || self.epoch_ended {
            return None;
        }
        let may_empty_elr = !self.value.elr.is_empty() && self.check_min_isr().is_ok();
        if !may_empty_elr && !self.members.iter().any(|(id, member)| self.membership_change(*id, member).is_some()) {
            return None;
        }
        let value = self.target_value();
        if value == self.value {
            return None;
        }
        let new_members = value.isr.iter().filter(|id| !self.value.isr.contains(id));
        let peer_id = |id: &BrokerId| Some(PeerId { broker: *id, epoch: self.members.get(id)?.link? });
        let added = new_members.filter_map(peer_id).collect();
        let proposal = IsrProposal { expect: self.revision, value, added };
        self.in_flight = Some(proposal.clone());
        Some(proposal)
    }

    /// Returns the value with the ISR and ELR that follow from the current state.
    fn target_value(&self) -> PartitionValue {
        let (mut incomplete, mut removed, mut admitted) = (BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
        for (id, member) in &self.members {
            match self.membership_change(*id, member) {
                Some(MemberChange::RemovedAsIncomplete) => incomplete.insert(*id),
                Some(MemberChange::Removed) => removed.insert(*id),
                Some(MemberChange::Admitted) => admitted.insert(*id),
                None => continue,
            };
        }
        let value = incomplete.into_iter().fold(self.value.clone(), |value, id| value.remove_from_sets(id));
        // Without a member to add, `expand` still empties an ELR that a lowered min ISR no longer requires.
        value.shrink(&removed, self.rules.min_insync).expand(&admitted, self.rules.min_insync)
    }

    /// Returns the change of a replica's ISR membership that follows from its state; `None` if nothing changes.
    fn membership_change(&self, id: BrokerId, member: &MemberState) -> Option<MemberChange> {
        match self.value.isr.contains(&id) {
            _ if !self.value.replicas.contains(&id) => None,
            true if member.lost_data => Some(MemberChange::RemovedAsIncomplete),
            true => (member.is_leaving() || member.is_lagging).then_some(MemberChange::Removed),
            false => self.may_be_admitted(id, member).then_some(MemberChange::Admitted),
        }
    }

    /// Returns true if a replica outside the ISR may enter it. The replica must be subscribed on a link with the
    /// registered broker epoch, and must not have reported its exit or shutdown. No reassignment may be removing it. It
    /// must have acknowledged all records below the high watermark and below the epoch start.
    fn may_be_admitted(&self, id: BrokerId, member: &MemberState) -> bool {
        let is_connected = member.link.is_some() && member.link == member.registered_epoch() && !member.departed;
        let acked_end = member.acked.map(|progress| progress.acked_for(self.rules.durability));
        let required_end =
            if mutant!(AdmitBelowEpochStart) { self.high_watermark } else { self.high_watermark.max(self.epoch_start) };
        let epoch_committed = self.is_epoch_committed() || !mutant!(AdmitAfterEpochCommitted);
        epoch_committed
            && is_connected
            && !self.value.removing.contains(&id)
            && acked_end.is_some_and(|end| end >= required_end)
    }

    /// Applies the outcome of the last proposal, or a value that was read back.
    pub fn on_outcome(&mut self, outcome: ProposalOutcome) -> ValueUpdate {
        let proposal = self.in_flight.take();
        match outcome {
            ProposalOutcome::Committed(revision) => match proposal {
                Some(proposal) => self.on_value(&proposal.value, revision),
                None => ValueUpdate::Unchanged,
            },
            ProposalOutcome::CurrentValue(value, revision) => {
                self.needs_read_back = false;
                let update = self.on_value(&value, revision);
                self.awaits_metadata = update == ValueUpdate::Unchanged;
                update
            }
            ProposalOutcome::Deleted => {
                self.epoch_ended = true;
                ValueUpdate::Deleted
            }
            ProposalOutcome::Unknown => {
                if let Some(proposal) = proposal.filter(|proposal| proposal.expect == self.revision) {
                    if mutant!(TreatUnknownAsDone) {
                        self.value = proposal.value;
                        self.advance_high_watermark();
                        return ValueUpdate::Adopted;
                    }
                    self.maybe_committed.extend(&proposal.value.isr);
                    self.needs_read_back = true;
                }
                ValueUpdate::Unchanged
            }
        }
    }

    /// Applies a value of the partition from the metadata cache, a committed proposal or a read. A value that is not
    /// newer than the committed value of this leader changes nothing.
    pub fn on_value(&mut self, value: &PartitionValue, revision: Revision) -> ValueUpdate {
        if revision <= self.revision {
            return ValueUpdate::Unchanged;
        }
        if value.leader != Some(self.me) || value.leader_epoch != self.epoch() {
            self.epoch_ended = true;
            return ValueUpdate::Deposed { epoch: value.leader_epoch };
        }
        let old_value = std::mem::replace(&mut self.value, value.clone());
        self.revision = revision;
        // A proposal at an older revision can no longer be committed.
        self.maybe_committed.clear();
        (self.needs_read_back, self.awaits_metadata) = (false, false);
        for (id, member) in &mut self.members {
            // A removed replica deletes its log. A replica with a new addition was removed before, even if this leader
            // received no value without the replica. Its acknowledgements no longer count.
            let addition = self.value.added_after(*id);
            let is_new_addition = addition.is_some() && addition != old_value.added_after(*id);
            if is_new_addition || !self.value.replicas.contains(id) {
                (member.link, member.acked) = (None, None);
            }
            member.lost_data &= self.value.isr.contains(id);
            if !self.value.isr.contains(id) {
                (member.target, member.is_lagging) = (None, false);
            }
        }
        self.advance_high_watermark();
        ValueUpdate::Adopted
    }

    /// Returns true if the member has acknowledged all records of this log.
    fn has_caught_up(&self, member: &MemberState) -> bool {
        member.acked.is_some_and(|progress| progress.acked_for(self.rules.durability) >= self.progress.log_end)
    }

    /// Returns every member of the committed ISR and of proposed ISRs that may be committed; some more than once.
    fn maximal_isr(&self) -> impl Iterator<Item = BrokerId> + '_ {
        let proposed = self.in_flight.iter().flat_map(|proposal| &proposal.value.isr).chain(&self.maybe_committed);
        let proposed = proposed.filter(|_| !mutant!(HighWatermarkOverCommittedIsr));
        self.value.isr.iter().chain(proposed).copied()
    }

    /// Returns true if the high watermark may move: the committed ISR has the minimum size, and the committed ELR is
    /// empty.
    fn may_commit(&self) -> bool {
        if mutant!(MinIsrOverMaximalIsr) {
            return self.maximal_isr().collect::<BTreeSet<_>>().len() >= self.rules.min_insync;
        }
        self.check_min_isr().is_ok() && (self.value.elr.is_empty() || mutant!(IgnoreElr))
    }

    /// Raises the high watermark to the minimum acknowledged end over this leader and the maximal ISR, if commits are
    /// allowed.
    fn advance_high_watermark(&mut self) {
        if !self.may_commit() {
            return;
        }
        let acked_end = |id: BrokerId| {
            if id == self.me {
                return Some(self.local_acked());
            }
            self.members.get(&id)?.acked.map(|progress| progress.acked_for(self.rules.durability))
        };
        // A member without an acknowledgement holds the high watermark back.
        let min_acked =
            self.maximal_isr().map(acked_end).try_fold(self.local_acked(), |min_acked, end| Some(min_acked.min(end?)));
        if let Some(min_acked) = min_acked {
            self.high_watermark = self.high_watermark.max(min_acked);
        }
    }
}

#[cfg(test)]
mod tests;
