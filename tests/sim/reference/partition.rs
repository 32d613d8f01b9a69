//! Model of one partition: its replicas, its values and its tier state in the metadata store, and its committed
//! records.

mod value;

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::{Bound, Range},
};

use strandline::{
    cluster::{PartitionValue, Revision},
    log::EpochHistory,
    model::{BrokerId, Durability, LeaderEpoch, Offset, TopicConfig, Watermarks},
    task::sim_event::SimRole,
    tier::TierState,
};

use self::value::Proposal;
use super::{
    Brokers, Machines, ProcessId, RuleViolation,
    acks::{Ack, Acks},
    content::{Content, Entry},
    replica::Replica,
};

/// Maximum number of retained partition values and of retained proposals. Old ones are needed, because leaders may
/// still use an old value.
const MAX_REMEMBERED: usize = 256;

#[derive(Default)]
pub(super) struct Partition {
    /// Partition values by revision. The last one is the current value.
    values: BTreeMap<Revision, PartitionValue>,
    tier: TierState,
    proposals: Vec<Proposal>,
    /// Leader of each epoch, and its log end when its leadership began.
    leaders: BTreeMap<LeaderEpoch, (ProcessId, Offset)>,
    replicas: BTreeMap<BrokerId, Replica>,
    acks: Acks,
    /// Revision of the partition value that each process has applied last, by process number.
    metadata_applied: BTreeMap<u32, Revision>,
    content: Content,
    /// Durability of the topic.
    durability: Durability,
    /// Every `min.insync.replicas` that the topic ever had. All are allowed, because a leader may apply a new one late.
    minima: BTreeSet<usize>,
    /// Epoch history of the committed records, and their end.
    committed: (EpochHistory, Offset),
    /// Highest high watermark that the leader of each epoch published.
    reached: BTreeMap<LeaderEpoch, Offset>,
}

/// Result of an event: true if a member of ISR or ELR may lack committed records after the event. The members must then
/// be checked again.
type Moved = Result<bool, RuleViolation>;

/// Returns the offset below which records need not be on any disk: they are in the object store, or deleted.
fn reclaimable_end(tier: &TierState) -> Offset {
    tier.tiered_end().max(tier.log_start)
}

impl Partition {
    fn value(&self) -> Option<(&PartitionValue, Revision)> {
        self.values.last_key_value().map(|(revision, value)| (value, *revision))
    }

    fn replica(&mut self, broker: BrokerId) -> &mut Replica {
        self.replicas.entry(broker).or_default()
    }

    /// Checks that every member of ISR ∪ ELR whose broker runs holds all committed records.
    pub(super) fn check_members(&self, machines: &Machines) -> Result<(), RuleViolation> {
        let Some((value, _)) = self.value() else { return Ok(()) };
        for member in value.isr.iter().chain(&value.elr) {
            let Some(machine) = machines.get(member).filter(|machine| machine.is_running()) else { continue };
            let empty = Replica::default();
            let replica = self.replicas.get(member).filter(|replica| replica.is_on(machine.disk_number()));
            let lacks = |reason| format!("broker {member} may lead but lacks committed records: {reason}");
            self.check_committed(replica.unwrap_or(&empty)).map_err(lacks)?;
        }
        Ok(())
    }

    /// Checks that the log of a replica holds all committed records.
    fn check_committed(&self, replica: &Replica) -> Result<(), RuleViolation> {
        let (epochs, end) = &self.committed;
        let has = replica.held_end(self.durability);
        if has < *end {
            return Err(format!("the log ends at {has} ({:?}), but the committed end is {end}", self.durability));
        }
        replica.difference_from(epochs, *end).map_or(Ok(()), Err)
    }

    // Events of the metadata store.

    /// Applies the configuration of the topic.
    pub(super) fn on_config_stored(&mut self, config: &TopicConfig) {
        self.durability = config.durability;
        self.minima.insert(config.min_insync_replicas);
    }

    /// Checks a new partition value against the current one, and records the new one.
    pub(super) fn on_value_stored(
        &mut self,
        new: PartitionValue,
        at: Revision,
        brokers: &Brokers,
        machines: &Machines,
    ) -> Result<(), RuleViolation> {
        let result = self.check_replacement(&new, brokers, machines);
        self.values.insert(at, new);
        while self.values.len() > MAX_REMEMBERED {
            self.values.pop_first();
        }
        result
    }

    /// Checks a tier commit against the current tier state, and records the new state.
    pub(super) fn on_tier_state_stored(&mut self, new: TierState) -> Result<(), RuleViolation> {
        let (old, committed) = (&self.tier, self.committed.1);
        let leads = self.value().map(|(value, _)| value.leader_epoch);
        let wrong = if leads != Some(new.epoch) {
            format!("tier commit of the leader of epoch {}, but the current epoch is {leads:?}", new.epoch)
        } else if new.tiered_end < old.tiered_end || new.log_start < old.log_start {
            "the tier state regressed".to_owned()
        } else if new.manifest != old.manifest && new.version() != old.version() + 1 {
            "the manifest is not the next one".to_owned()
        } else if reclaimable_end(&new) > committed {
            format!(
                "the object store has uncommitted records, or retention deleted some: the committed end is {committed}"
            )
        } else {
            String::new()
        };
        let result = if wrong.is_empty() { Ok(()) } else { Err(format!("{wrong}: {old:?} became {new:?}")) };
        self.tier = new;
        result
    }

    /// Returns the committed batch with this base offset, and its epoch; `None` if no committed batch begins there.
    pub(super) fn committed_at(&self, base: Offset) -> Option<(LeaderEpoch, Entry)> {
        let (epochs, end) = &self.committed;
        let epoch = epochs.at(base).filter(|_| base < *end)?;
        Some((epoch, self.content.at(base, epoch)?))
    }

    // Events of one replica.

    /// Checks the log that a process found when it opened its replica, and records it. `alone` is true for a standalone
    /// broker, whose log may have lost its last batches.
    pub(super) fn on_replica_opened(
        &mut self,
        who: ProcessId,
        (epochs, end): (&[(LeaderEpoch, Offset)], Offset),
        disk: u32,
        alone: bool,
    ) -> Moved {
        if alone {
            self.content.remove_from(end);
        }
        self.metadata_applied.remove(&who.process);
        self.replica(who.broker).open(who.process, (epochs, end), disk).map(|()| true)
    }

    pub(super) fn has_opened(&self, who: ProcessId) -> bool {
        self.replicas.get(&who.broker).is_some_and(|replica| replica.is_open_in(who.process))
    }

    pub(super) fn on_log_change_started(&mut self, broker: BrokerId, to: Offset, emptied: bool) -> bool {
        self.replica(broker).start_change(to, emptied);
        false
    }

    pub(super) fn on_log_change_completed(&mut self, broker: BrokerId) -> bool {
        self.replica(broker).complete_change();
        false
    }

    /// Records that a process applied a partition value. The value must not be older than the one that the process
    /// applied before.
    pub(super) fn on_metadata_applied(&mut self, who: ProcessId, revision: Revision) -> Moved {
        let known = self.metadata_applied.entry(who.process).or_insert(revision);
        if revision < *known {
            return Err(format!("applied the value of revision {revision} after that of {known}"));
        }
        *known = revision;
        Ok(false)
    }

    /// Checks that a follower applied a message from the leader of the epoch in which it follows.
    pub(super) fn on_leader_message_applied(&self, who: ProcessId, epoch: LeaderEpoch) -> Moved {
        let known = self.metadata_applied.get(&who.process).and_then(|revision| self.values.get(revision));
        match known {
            Some(value) if value.leader_epoch != epoch => Err(format!(
                "applied a message of the leader of epoch {epoch}, but follows in epoch {}",
                value.leader_epoch
            )),
            _ => Ok(false),
        }
    }

    /// Checks that no other process led in this epoch, that the store names this leader, and that its log has all
    /// committed records. A standalone broker (`alone`) may lead again in its epoch. If the store has a newer epoch,
    /// the log is not checked.
    pub(super) fn on_leadership_started(
        &mut self,
        who: ProcessId,
        epoch: LeaderEpoch,
        start: Offset,
        alone: bool,
    ) -> Moved {
        if let Some((before, _)) = self.leaders.insert(epoch, (who, start))
            && before != who
            && !alone
        {
            return Err(format!(
                "process {} leads in epoch {epoch}, in which process {} led",
                who.process, before.process
            ));
        }
        let named = self.values.values().rev().find(|value| value.leader_epoch == epoch);
        if named.is_some_and(|value| value.leader != Some(who.broker)) {
            return Err(format!("leads in epoch {epoch}, but the store names another leader"));
        }
        if self.value().is_some_and(|(value, _)| value.leader_epoch > epoch) {
            // The process received its election late, and may lack records that the leader of a newer epoch has
            // committed. The rules for commits ensure that this leader commits nothing.
            return Ok(false);
        }
        let replica = self.replica(who.broker).clone();
        let (epochs, end) = &self.committed;
        let lacks = (replica.ends.written < *end).then(|| format!("the log ends at {}", replica.ends.written));
        match lacks.or_else(|| replica.difference_from(epochs, *end)) {
            Some(reason) => Err(format!("leads in epoch {epoch} but lacks committed records below {end}: {reason}")),
            None => Ok(true),
        }
    }

    /// Checks and records an append of one batch. `leads` is the epoch in which the process leads, or `None` for a
    /// follower.
    pub(super) fn on_appended(
        &mut self,
        who: ProcessId,
        range: Range<Offset>,
        (epoch, leads): (LeaderEpoch, Option<LeaderEpoch>),
        batch: Entry,
    ) -> Moved {
        let leader = self.leaders.get(&epoch).map(|(leader, _)| *leader);
        let replica = self.replica(who.broker);
        if range.start != replica.ends.written {
            return Err(format!("appended {range:?} to a log that ends at {}", replica.ends.written));
        }
        if !replica.epochs.record(epoch, range.start) {
            return Err(format!("appended a batch of epoch {epoch} after {:?}", replica.epochs.last()));
        }
        replica.ends.written = range.end;
        if leads.is_some_and(|leads| leads != epoch || leader != Some(who)) {
            return Err(format!("appended in epoch {epoch}, but leads in epoch {leads:?}"));
        }
        self.content.record_batch(range.start, epoch, batch).map(|()| false)
    }

    /// Records a truncation, which must not remove committed records. Exception: a replica outside ISR and ELR may
    /// still follow the leader of an older epoch. This leader may lack committed records, and its follower then
    /// truncates them.
    pub(super) fn on_truncated(&mut self, broker: BrokerId, epoch: LeaderEpoch, to: Offset) -> Moved {
        let (epochs, end) = self.committed.clone();
        let is_checked = self.value().is_none_or(|(value, _)| {
            value.leader_epoch <= epoch || value.isr.contains(&broker) || value.elr.contains(&broker)
        });
        let replica = self.replica(broker);
        let had = replica.ends.written;
        let committed = to < end.min(had) && replica.epochs.at(to) == epochs.at(to);
        replica.truncate(to);
        if committed && is_checked {
            return Err(format!("truncated the log from {had} to {to}, but the committed end is {end}"));
        }
        Ok(true)
    }

    /// Records a reset of a log to start at `at`, and checks that a bootstrap may start there with these producers.
    pub(super) fn on_log_reset(
        &mut self,
        broker: BrokerId,
        at: Offset,
        epochs: &[(LeaderEpoch, Offset)],
        producers: &BTreeSet<i64>,
    ) -> Moved {
        self.replica(broker).reset(at, EpochHistory::from_starts(epochs.iter().copied()).unwrap());
        let free = reclaimable_end(&self.tier);
        if at > free {
            return Err(format!("bootstrap at {at}, above the tiered end and the log start ({free})"));
        }
        match self.content.missing_producer(at, producers) {
            Some((id, first)) => Err(format!("bootstrap at {at} without producer {id}, which has a record at {first}")),
            None => Ok(true),
        }
    }

    pub(super) fn on_log_position_sent(&mut self, broker: BrokerId, epoch: LeaderEpoch, persisted: Offset) -> bool {
        self.replica(broker).record_log_position(epoch, persisted);
        false
    }

    /// Records and checks the watermarks that a broker publishes. Only a leader may raise the committed end.
    pub(super) fn on_watermarks_published(
        &mut self,
        broker: BrokerId,
        watermarks: Watermarks,
        role: SimRole,
        brokers: &Brokers,
    ) -> Moved {
        let result = self.check_watermarks(broker, watermarks, role, brokers);
        if let SimRole::Leading { epoch, .. } = role {
            self.acks.drop_earlier_progress(epoch);
        }
        result
    }

    fn check_watermarks(
        &mut self,
        broker: BrokerId,
        watermarks: Watermarks,
        role: SimRole,
        brokers: &Brokers,
    ) -> Moved {
        let replica = self.replica(broker);
        replica.ends.persisted = watermarks.persisted_end;
        if let SimRole::Following(epoch) = role {
            replica.record_published_progress(epoch);
        }
        let before = std::mem::replace(&mut replica.high_watermark, watermarks.high_watermark);
        if let SimRole::Leading { epoch, .. } = role {
            let reached = self.reached.entry(epoch).or_default();
            *reached = watermarks.high_watermark.max(*reached);
        }
        if watermarks.high_watermark <= self.committed.1 {
            let unclean = self.value().is_some_and(|(value, _)| value.unclean_epoch.is_some());
            let replica = &self.replicas[&broker];
            return if unclean {
                Ok(false)
            } else if watermarks.high_watermark < before {
                Err(format!("the high watermark decreased from {before}: {watermarks:?}"))
            } else if let Some(reason) = replica.difference_from(&self.committed.0, watermarks.high_watermark) {
                Err(format!(
                    "high watermark {}, but the log differs from the committed records: {reason}",
                    watermarks.high_watermark
                ))
            } else {
                Ok(false)
            };
        }
        let SimRole::Leading { epoch, revision, min_insync } = role else {
            return Err(format!(
                "high watermark {}, but the committed end is {}",
                watermarks.high_watermark, self.committed.1
            ));
        };
        let known = (epoch, Revision(revision), min_insync);
        let allowed = self.check_commit(broker, known, watermarks.high_watermark, brokers);
        let commit_result = self.commit(broker, watermarks.high_watermark);
        allowed.and(commit_result).map(|()| true)
    }

    /// Checks that a leader of `epoch` may commit up to `end`. `revision` is that of the partition value that the
    /// leader uses, and `min_insync` its min ISR.
    fn check_commit(
        &self,
        leader: BrokerId,
        (epoch, revision, min_insync): (LeaderEpoch, Revision, usize),
        end: Offset,
        brokers: &Brokers,
    ) -> Result<(), RuleViolation> {
        let durability = self.durability;
        let Some(value) = self.values.get(&revision) else {
            // A standalone broker uses revision 0 and no value. A value that is older than all retained ones cannot be
            // checked.
            let forgotten = self.values.len() == MAX_REMEMBERED
                && self.values.first_key_value().is_some_and(|(first, _)| revision < *first);
            let known = revision == Revision::ZERO || forgotten;
            return if known {
                Ok(())
            } else {
                Err(format!("uses a value of revision {revision}, which does not exist"))
            };
        };
        let wrong = |reason: String| Err(format!("commits up to {end} in epoch {epoch} {reason}: {value:?}"));
        if value.leader_epoch != epoch || value.leader != Some(leader) {
            return wrong("with the value of another epoch or leader".to_owned());
        }
        if !self.minima.contains(&min_insync) {
            return wrong(format!("with a min ISR of {min_insync}, but the topic only had {:?}", self.minima));
        }
        if value.isr.len() < min_insync {
            return wrong(format!("with fewer than {min_insync} in sync"));
        }
        if !value.elr.is_empty() {
            return wrong("although the ELR is not empty".to_owned());
        }
        let is_of_value = |proposal: &&Proposal| proposal.epoch == epoch && proposal.expect == revision;
        let open = self.proposals.iter().filter(is_of_value);
        let open = open.filter(|proposal| proposal.may_be_applied(brokers) || self.was_applied(proposal));
        let proposed = open.flat_map(|proposal| proposal.isr.keys());
        for member in value.isr.iter().chain(proposed) {
            let Some(replica) = self.replicas.get(member) else {
                return wrong(format!("without broker {member}, which has no replica"));
            };
            let acked = if *member == leader { Some(replica.ends) } else { self.acks.recent_progress(epoch, *member) };
            if acked.is_none_or(|acked| acked.by(durability) < end) {
                return wrong(format!("although broker {member} acknowledged {acked:?} in this epoch"));
            }
        }
        Ok(())
    }

    /// Returns true if the store has applied this proposal: the value that replaced the expected one has the proposed
    /// ISR, in the same epoch.
    fn was_applied(&self, proposal: &Proposal) -> bool {
        let after = self.values.range((Bound::Excluded(proposal.expect), Bound::Unbounded)).next();
        after.is_some_and(|(_, value)| {
            let isr: BTreeSet<_> = value.isr.iter().collect();
            value.leader_epoch == proposal.epoch && proposal.isr.keys().eq(isr)
        })
    }

    /// Records that all offsets below `end` are committed, with the epochs of this leader's log. The newly committed
    /// range must pass [`Content::commit`].
    fn commit(&mut self, leader: BrokerId, end: Offset) -> Result<(), RuleViolation> {
        let log = self.replica(leader).epochs.clone();
        let from = self.committed.1;
        for (epoch, start) in log.between(from, end).iter() {
            // `from` is the old committed end: offsets below it keep their epochs.
            let _known = self.committed.0.record(epoch, start.max(from));
        }
        self.committed.1 = end;
        self.content.commit(&self.committed.0, from..end)
    }

    pub(super) fn on_follower_subscribed(&mut self, epoch: LeaderEpoch, follower: BrokerId, registered: u64) -> Moved {
        self.acks.subscribe(epoch, follower, registered).map(|()| false)
    }

    pub(super) fn on_ack_counted(&mut self, leads: LeaderEpoch, ack: &Ack) -> Moved {
        let replica = self.replicas.get(&ack.follower);
        let ever = replica.and_then(|replica| replica.ever_acked(ack.epoch)).unwrap_or_default();
        self.acks.count(leads, ack, ever).map(|()| false)
    }

    /// Records an ISR proposal. Checks that each new member has acknowledged all records up to the epoch start and the
    /// high watermark in this epoch.
    pub(super) fn on_isr_proposed(
        &mut self,
        leader: BrokerId,
        epoch: LeaderEpoch,
        (expect, isr, added_brokers): (Revision, &[BrokerId], &[(BrokerId, u64)]),
        brokers: &Brokers,
    ) -> Moved {
        let start = self.leaders.get(&epoch).map_or(Offset::ZERO, |(_, start)| *start);
        let required = start.max(self.replica(leader).high_watermark);
        let known = self.values.get(&expect).map(|value| value.isr.clone()).unwrap_or_default();
        let added = isr.iter().filter(|id| !known.contains(id));
        let durability = self.durability;
        let lacking = added.map(|id| (*id, self.acks.progress(epoch, *id)));
        let lacking = lacking.rev().find(|(_, acked)| acked.is_none_or(|acked| acked.by(durability) < required));
        let incarnation = |id: &BrokerId| (*id, brokers.get(id).copied());
        let isr = isr.iter().map(incarnation).collect();
        self.proposals.push(Proposal { epoch, expect, isr, added: added_brokers.to_vec() });
        if self.proposals.len() > MAX_REMEMBERED {
            self.proposals.remove(0);
        }
        match lacking {
            Some((id, acked)) => Err(format!(
                "proposes broker {id} in epoch {epoch}, which started at {start}: broker {id} acknowledged {acked:?}, required is {required}"
            )),
            None => Ok(false),
        }
    }

    // Responses to clients.

    /// Checks an acknowledged write: its leader has it with the topic's durability, and it is committed if `by_all`.
    pub(super) fn on_write_acked(&mut self, broker: BrokerId, end: Offset, by_all: bool) -> Moved {
        let (durability, committed) = (self.durability, self.committed.1);
        let has = self.replica(broker).ends.by(durability);
        if by_all && end > committed {
            return Err(format!("acknowledged up to {end}, but the committed end is {committed}"));
        }
        if end > has {
            return Err(format!("acknowledged up to {end}, but its own log ends at {has} ({durability:?})"));
        }
        Ok(false)
    }

    /// Checks that readers cannot read above the committed end.
    pub(super) fn on_readable_end_moved(&self, end: Offset) -> Moved {
        let committed = self.committed.1;
        if end > committed {
            return Err(format!("readable end {end}, but the committed end is {committed}"));
        }
        Ok(false)
    }

    /// Checks that a batch which a reader received is the committed one at `base`.
    pub(super) fn on_batch_served(&self, base: Offset, epoch: LeaderEpoch, (end, crc): (Offset, u32)) -> Moved {
        let committed = self.committed_at(base);
        let is = committed.map(|(epoch, batch)| (epoch, batch.end, batch.crc));
        if is == Some((epoch, end, crc)) {
            return Ok(false);
        }
        Err(format!("serves {:?} at {base}, but the committed batch is {is:?}", (epoch, end, crc)))
    }

    /// Checks a latest offset that a leader returned. The offset is not above the committed end, and not below a high
    /// watermark that was published in this epoch or an earlier one.
    pub(super) fn on_latest_returned(&self, epoch: LeaderEpoch, offset: Offset) -> Moved {
        match self.reached.range(..=epoch).find(|(_, reached)| **reached > offset) {
            Some((before, reached)) => Err(format!(
                "returned {offset} as the latest offset in epoch {epoch}, after {reached} in epoch {before}"
            )),
            None => self.on_readable_end_moved(offset),
        }
    }

    /// Checks that the log evicted no records that are neither in the object store nor deleted.
    pub(super) fn on_evicted(&self, start: Offset) -> Moved {
        let free = reclaimable_end(&self.tier);
        if start > free {
            return Err(format!("evicted up to {start}, above the tiered end and the log start ({free})"));
        }
        Ok(false)
    }
}
