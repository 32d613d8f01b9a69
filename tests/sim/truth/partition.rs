//! Model of one partition: its replicas, its values in the metadata store, and its committed records.

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
    Brokers, Machines, Who, Wrong,
    acks::{Ack, Acks},
    content::{Content, Entry},
    replica::Replica,
};

/// Maximum number of retained values and of retained proposals. Leaders receive the newest value late.
const REMEMBERED: usize = 256;

#[derive(Default)]
pub(super) struct Partition {
    /// Partition values by revision. The last one is the current value.
    values: BTreeMap<Revision, PartitionValue>,
    tier: TierState,
    proposals: Vec<Proposal>,
    /// Leader of each epoch, and the epoch start.
    leaders: BTreeMap<LeaderEpoch, (Who, Offset)>,
    replicas: BTreeMap<BrokerId, Replica>,
    acks: Acks,
    /// Newest revision that each process has applied, by process number.
    placed: BTreeMap<u32, Revision>,
    content: Content,
    /// Durability of the topic.
    durability: Durability,
    /// Every `min.insync.replicas` that the topic ever had: a leader applies a new one late.
    minima: BTreeSet<usize>,
    /// Epoch history of the committed records, and their end.
    committed: (EpochHistory, Offset),
    /// Highest high watermark of each epoch's leader.
    reached: BTreeMap<LeaderEpoch, Offset>,
}

/// True if the event moved something that a member must hold.
type Moved = Result<bool, Wrong>;

/// Returns the offset below which no disk must hold records.
fn free(tier: &TierState) -> Offset {
    tier.bucket_end().max(tier.log_start)
}

impl Partition {
    fn value(&self) -> Option<(&PartitionValue, Revision)> {
        self.values.last_key_value().map(|(revision, value)| (value, *revision))
    }

    fn replica(&mut self, broker: BrokerId) -> &mut Replica {
        self.replicas.entry(broker).or_default()
    }

    /// Checks that every active member of ISR ∪ ELR holds all committed records.
    pub(super) fn members_hold(&self, machines: &Machines) -> Result<(), Wrong> {
        let Some((value, _)) = self.value() else { return Ok(()) };
        for member in value.isr.iter().chain(&value.elr) {
            let Some(machine) = machines.get(member).filter(|machine| machine.is_running()) else { continue };
            let nothing = Replica::default();
            let replica = self.replicas.get(member).filter(|replica| replica.is_on(machine.disk_number()));
            let lacks = |why| format!("broker {member} may lead and lacks what is committed: {why}");
            self.holds(replica.unwrap_or(&nothing)).map_err(lacks)?;
        }
        Ok(())
    }

    fn holds(&self, replica: &Replica) -> Result<(), Wrong> {
        let (epochs, end) = &self.committed;
        let has = replica.holds(self.durability);
        if has < *end {
            return Err(format!("it reaches {has} ({:?}) and {end} is committed", self.durability));
        }
        replica.parts_from(epochs, *end).map_or(Ok(()), Err)
    }

    // Events of the metadata store.

    /// Applies the configuration of the topic.
    pub(super) fn configured(&mut self, config: &TopicConfig) {
        self.durability = config.durability;
        self.minima.insert(config.min_insync_replicas);
    }

    pub(super) fn stored(
        &mut self,
        new: PartitionValue,
        at: Revision,
        brokers: &Brokers,
        machines: &Machines,
    ) -> Result<(), Wrong> {
        let judged = self.follows(&new, brokers, machines);
        self.values.insert(at, new);
        while self.values.len() > REMEMBERED {
            self.values.pop_first();
        }
        judged
    }

    pub(super) fn tiered(&mut self, new: TierState) -> Result<(), Wrong> {
        let (old, committed) = (&self.tier, self.committed.1);
        let leads = self.value().map(|(value, _)| value.leader_epoch);
        let wrong = if leads != Some(new.epoch) {
            format!("the leader of epoch {} committed to the bucket, and {leads:?} leads", new.epoch)
        } else if new.tiered_end < old.tiered_end || new.log_start < old.log_start {
            "the bucket's state went back".to_owned()
        } else if new.manifest != old.manifest && new.version() != old.version() + 1 {
            "the manifest is not the next one".to_owned()
        } else if free(&new) > committed {
            format!("the bucket holds, or retention deleted, what is not committed: {committed} is")
        } else {
            String::new()
        };
        let judged = if wrong.is_empty() { Ok(()) } else { Err(format!("{wrong}: {old:?} became {new:?}")) };
        self.tier = new;
        judged
    }

    /// Returns the committed batch with this base offset, and its epoch.
    pub(super) fn committed_at(&self, base: Offset) -> Option<(LeaderEpoch, Entry)> {
        let (epochs, end) = &self.committed;
        let epoch = epochs.at(base).filter(|_| base < *end)?;
        Some((epoch, self.content.at(base, epoch)?))
    }

    // Events of one replica.

    pub(super) fn opened(
        &mut self,
        who: Who,
        (epochs, end): (&[(LeaderEpoch, Offset)], Offset),
        disk: u32,
        alone: bool,
    ) -> Moved {
        if alone {
            self.content.lose(end);
        }
        self.placed.remove(&who.process);
        self.replica(who.broker).opened(who.process, (epochs, end), disk).map(|()| true)
    }

    pub(super) fn has_opened(&self, who: Who) -> bool {
        self.replicas.get(&who.broker).is_some_and(|replica| replica.is_open_in(who.process))
    }

    pub(super) fn changing(&mut self, broker: BrokerId, to: Offset, emptied: bool) -> bool {
        self.replica(broker).changing(to, emptied);
        false
    }

    pub(super) fn settled(&mut self, broker: BrokerId) -> bool {
        self.replica(broker).settled();
        false
    }

    /// Records that a process applied a value, which must not be older than its last one.
    pub(super) fn placed(&mut self, who: Who, revision: Revision) -> Moved {
        let known = self.placed.entry(who.process).or_insert(revision);
        if revision < *known {
            return Err(format!("goes by the value of revision {revision}, and knew that of {known}"));
        }
        *known = revision;
        Ok(false)
    }

    /// Checks that a follower applied a message of the epoch that it follows.
    pub(super) fn obeyed(&self, who: Who, epoch: LeaderEpoch) -> Moved {
        let known = self.placed.get(&who.process).and_then(|revision| self.values.get(revision));
        match known {
            Some(value) if value.leader_epoch != epoch => {
                Err(format!("does what the leader of epoch {epoch} says, and follows in epoch {}", value.leader_epoch))
            }
            _ => Ok(false),
        }
    }

    pub(super) fn led(&mut self, who: Who, epoch: LeaderEpoch, start: Offset, alone: bool) -> Moved {
        if let Some((before, _)) = self.leaders.insert(epoch, (who, start))
            && before != who
            && !alone
        {
            return Err(format!("process {} leads in epoch {epoch}, in which {} led", who.process, before.process));
        }
        let named = self.values.values().rev().find(|value| value.leader_epoch == epoch);
        if named.is_some_and(|value| value.leader != Some(who.broker)) {
            return Err(format!("leads in epoch {epoch}, and the store names another"));
        }
        if self.value().is_some_and(|(value, _)| value.leader_epoch > epoch) {
            // The process received its election late. A newer leader exists and may have committed more. No replica that counts follows
            // this leader.
            return Ok(false);
        }
        let replica = self.replica(who.broker).clone();
        let (epochs, end) = &self.committed;
        let lacks = (replica.ends.written < *end).then(|| format!("its log ends at {}", replica.ends.written));
        match lacks.or_else(|| replica.parts_from(epochs, *end)) {
            Some(why) => Err(format!("leads in epoch {epoch} without what is committed up to {end}: {why}")),
            None => Ok(true),
        }
    }

    pub(super) fn appended(
        &mut self,
        who: Who,
        range: Range<Offset>,
        (epoch, leads): (LeaderEpoch, Option<LeaderEpoch>),
        batch: Entry,
    ) -> Moved {
        let leader = self.leaders.get(&epoch).map(|(leader, _)| *leader);
        let replica = self.replica(who.broker);
        if range.start != replica.ends.written {
            return Err(format!("appended {range:?} to a log that ends at {}", replica.ends.written));
        }
        if !replica.epochs.note(epoch, range.start) {
            return Err(format!("appended a batch of epoch {epoch} after {:?}", replica.epochs.last()));
        }
        replica.ends.written = range.end;
        if leads.is_some_and(|leads| leads != epoch || leader != Some(who)) {
            return Err(format!("appended in epoch {epoch} and leads in {leads:?}"));
        }
        self.content.appended(range.start, epoch, batch).map(|()| false)
    }

    /// Records a truncation, which must not remove committed records. Exception: a replica outside ISR and ELR may still follow the leader
    /// of an older epoch, which received its election late. Such a follower truncates records that this leader lacks.
    pub(super) fn cut(&mut self, broker: BrokerId, epoch: LeaderEpoch, to: Offset) -> Moved {
        let (epochs, end) = self.committed.clone();
        let counts = self.value().is_none_or(|(value, _)| {
            value.leader_epoch <= epoch || value.isr.contains(&broker) || value.elr.contains(&broker)
        });
        let replica = self.replica(broker);
        let had = replica.ends.written;
        let committed = to < end.min(had) && replica.epochs.at(to) == epochs.at(to);
        replica.cut(to);
        if committed && counts {
            return Err(format!("cut its log from {had} to {to}, and {end} is committed"));
        }
        Ok(true)
    }

    pub(super) fn begun(
        &mut self,
        broker: BrokerId,
        at: Offset,
        epochs: &[(LeaderEpoch, Offset)],
        producers: &BTreeSet<i64>,
    ) -> Moved {
        self.replica(broker).begin(at, EpochHistory::from_starts(epochs.iter().copied()).unwrap());
        let free = free(&self.tier);
        if at > free {
            return Err(format!("began at {at}, and the bucket ends at {free}"));
        }
        match self.content.unknown(at, producers) {
            Some((id, first)) => Err(format!("began at {at} without producer {id}, which wrote at {first}")),
            None => Ok(true),
        }
    }

    pub(super) fn claimed(&mut self, broker: BrokerId, epoch: LeaderEpoch, persisted: Offset) -> bool {
        self.replica(broker).claims(epoch, persisted);
        false
    }

    /// Checks the watermarks that a broker publishes: its log end, persisted end and high watermark.
    pub(super) fn marked(&mut self, broker: BrokerId, marks: Watermarks, role: SimRole, brokers: &Brokers) -> Moved {
        let judged = self.judge_marks(broker, marks, role, brokers);
        if let SimRole::Leading { epoch, .. } = role {
            self.acks.published(epoch);
        }
        judged
    }

    fn judge_marks(&mut self, broker: BrokerId, marks: Watermarks, role: SimRole, brokers: &Brokers) -> Moved {
        let replica = self.replica(broker);
        replica.ends.persisted = marks.persisted_end;
        if let SimRole::Following(epoch) = role {
            replica.acknowledges(epoch);
        }
        let before = std::mem::replace(&mut replica.high_watermark, marks.high_watermark);
        if let SimRole::Leading { epoch, .. } = role {
            let reached = self.reached.entry(epoch).or_default();
            *reached = marks.high_watermark.max(*reached);
        }
        if marks.high_watermark <= self.committed.1 {
            let unclean = self.value().is_some_and(|(value, _)| value.unclean.is_some());
            let replica = &self.replicas[&broker];
            return if unclean {
                Ok(false)
            } else if marks.high_watermark < before {
                Err(format!("its high watermark fell from {before}: {marks:?}"))
            } else if let Some(why) = replica.parts_from(&self.committed.0, marks.high_watermark) {
                Err(format!("takes {} as committed, and holds something else there: {why}", marks.high_watermark))
            } else {
                Ok(false)
            };
        }
        let SimRole::Leading { epoch, revision, min_insync } = role else {
            return Err(format!("takes {} as committed, and {} is", marks.high_watermark, self.committed.1));
        };
        let known = (epoch, Revision(revision), min_insync);
        let may = self.may_commit(broker, known, marks.high_watermark, brokers);
        let whole = self.commit(broker, marks.high_watermark);
        may.and(whole).map(|()| true)
    }

    /// Checks that a leader that applied the value of this revision may commit up to `end`.
    fn may_commit(
        &self,
        leader: BrokerId,
        (epoch, revision, min_insync): (LeaderEpoch, Revision, usize),
        end: Offset,
        brokers: &Brokers,
    ) -> Result<(), Wrong> {
        let durability = self.durability;
        let Some(value) = self.values.get(&revision) else {
            // A standalone broker applies no value. A value older than all retained ones cannot be checked.
            let forgotten = self.values.len() == REMEMBERED
                && self.values.first_key_value().is_some_and(|(first, _)| revision < *first);
            let known = revision == Revision::ZERO || forgotten;
            return if known {
                Ok(())
            } else {
                Err(format!("goes by a value of revision {revision}, which there is not"))
            };
        };
        let wrong = |why: String| Err(format!("commits up to {end} in epoch {epoch} {why}: {value:?}"));
        if value.leader_epoch != epoch || value.leader != Some(leader) {
            return wrong("by the value of another epoch or leader".to_owned());
        }
        if !self.minima.contains(&min_insync) {
            return wrong(format!(
                "with a minimum of {min_insync}, and the topic never asked for but {:?}",
                self.minima
            ));
        }
        if value.isr.len() < min_insync {
            return wrong(format!("with fewer than {min_insync} in sync"));
        }
        if !value.elr.is_empty() {
            return wrong("while others are eligible".to_owned());
        }
        let made_here = |proposal: &&Proposal| proposal.epoch == epoch && proposal.expect == revision;
        let open = self.proposals.iter().filter(made_here);
        let open = open.filter(|proposal| proposal.may_come(brokers) || self.has_come(proposal));
        let proposed = open.flat_map(|proposal| proposal.isr.keys());
        for member in value.isr.iter().chain(proposed) {
            let Some(replica) = self.replicas.get(member) else {
                return wrong(format!("without broker {member}, which has no replica"));
            };
            let acked = if *member == leader { Some(replica.ends) } else { self.acks.of_late(epoch, *member) };
            if acked.is_none_or(|acked| acked.by(durability) < end) {
                return wrong(format!("while broker {member} has acknowledged {acked:?} in it"));
            }
        }
        Ok(())
    }

    /// Returns true if the store has applied this proposal: the value after the expected one has the proposed ISR in the same epoch.
    fn has_come(&self, proposal: &Proposal) -> bool {
        let after = self.values.range((Bound::Excluded(proposal.expect), Bound::Unbounded)).next();
        after.is_some_and(|(_, value)| {
            let isr: BTreeSet<_> = value.isr.iter().collect();
            value.leader_epoch == proposal.epoch && proposal.isr.keys().eq(isr)
        })
    }

    /// Records that all offsets below `end` are committed, with the epochs of this leader's log.
    fn commit(&mut self, leader: BrokerId, end: Offset) -> Result<(), Wrong> {
        let log = self.replica(leader).epochs.clone();
        let from = self.committed.1;
        for (epoch, start) in log.between(from, end).iter() {
            // Offsets below `from` were committed before.
            let _known = self.committed.0.note(epoch, start.max(from));
        }
        self.committed.1 = end;
        self.content.commit(&self.committed.0, from..end)
    }

    pub(super) fn joined(&mut self, epoch: LeaderEpoch, follower: BrokerId, registered: u64) -> Moved {
        self.acks.joined(epoch, follower, registered).map(|()| false)
    }

    pub(super) fn counts(&mut self, leads: LeaderEpoch, ack: &Ack) -> Moved {
        let replica = self.replicas.get(&ack.follower);
        let ever = replica.and_then(|replica| replica.ever_acked(ack.epoch)).unwrap_or_default();
        self.acks.counted(leads, ack, ever).map(|()| false)
    }

    pub(super) fn proposed(
        &mut self,
        leader: BrokerId,
        epoch: LeaderEpoch,
        (expect, isr, asked_for): (Revision, &[BrokerId], &[(BrokerId, u64)]),
        brokers: &Brokers,
    ) -> Moved {
        let start = self.leaders.get(&epoch).map_or(Offset::ZERO, |(_, start)| *start);
        let asked = start.max(self.replica(leader).high_watermark);
        let known = self.values.get(&expect).map(|value| value.isr.clone()).unwrap_or_default();
        let added = isr.iter().filter(|id| !known.contains(id));
        let durability = self.durability;
        let lacking = added.map(|id| (*id, self.acks.of(epoch, *id)));
        let lacking = lacking.rev().find(|(_, acked)| acked.is_none_or(|acked| acked.by(durability) < asked));
        let uptime = |id: &BrokerId| (*id, brokers.get(id).copied());
        let isr = isr.iter().map(uptime).collect();
        self.proposals.push(Proposal { epoch, expect, isr, added: asked_for.to_vec() });
        if self.proposals.len() > REMEMBERED {
            self.proposals.remove(0);
        }
        match lacking {
            Some((id, acked)) => Err(format!(
                "would admit broker {id} in epoch {epoch}, which began at {start}: it acknowledged {acked:?}, asked is {asked}"
            )),
            None => Ok(false),
        }
    }

    // Responses to clients.

    pub(super) fn answered(&mut self, broker: BrokerId, end: Offset, by_all: bool) -> Moved {
        let (durability, committed) = (self.durability, self.committed.1);
        let has = self.replica(broker).ends.by(durability);
        if by_all && end > committed {
            return Err(format!("answered for {end}, and {committed} is committed"));
        }
        if end > has {
            return Err(format!("answered for {end}, and has {has} itself ({durability:?})"));
        }
        Ok(false)
    }

    pub(super) fn readable(&self, end: Offset) -> Moved {
        let committed = self.committed.1;
        if end > committed {
            return Err(format!("serves up to {end}, and {committed} is committed"));
        }
        Ok(false)
    }

    /// Checks that a reader received the committed batch at `base`.
    pub(super) fn served(&self, base: Offset, epoch: LeaderEpoch, (end, crc): (Offset, u32)) -> Moved {
        let committed = self.committed_at(base);
        let is = committed.map(|(epoch, batch)| (epoch, batch.end, batch.crc));
        if is == Some((epoch, end, crc)) {
            return Ok(false);
        }
        Err(format!("serves {:?} at {base}, and committed is {is:?}", (epoch, end, crc)))
    }

    pub(super) fn told_latest(&self, epoch: LeaderEpoch, offset: Offset) -> Moved {
        match self.reached.range(..=epoch).find(|(_, reached)| **reached > offset) {
            Some((before, reached)) => {
                Err(format!("told {offset} as the latest in epoch {epoch}, and it was {reached} in epoch {before}"))
            }
            None => self.readable(offset),
        }
    }

    pub(super) fn evicted(&self, start: Offset) -> Moved {
        let free = free(&self.tier);
        if start > free {
            return Err(format!("its log begins at {start} now, and the bucket ends at {free}"));
        }
        Ok(false)
    }
}
