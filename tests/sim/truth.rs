//! What is true of every partition, told by the brokers' own steps and judged at each of them (design.md §13).
//!
//! A [`Truth`] is the run's witness (`task::sim_event`). It remembers what the store holds, how far each replica's log reaches and which
//! epochs wrote it, and what was ever committed; every step of a broker is held against that. So a broken rule shows where it is
//! broken, and not only when the harm is still there at the next look. One epoch has one appender, so logs that agree on the epochs of their
//! offsets are the same where each batch has the checksum that its epoch gave it; `judge` compares the bytes on the disks.
//!
//! | when | what must hold |
//! | --- | --- |
//! | somebody leads | nobody else ever led in that epoch, the store names it, and it has all that is committed |
//! | a broker goes by a value | by none that is older than the last |
//! | a log is opened | all that was durable is there, and nothing that was cut |
//! | an append | it continues the log; a leader's is of its own epoch; no other batch is of this epoch and offset |
//! | a cut, a beginning | no committed record goes; who begins behind others' records does so where the bucket ends, or before, and knows their producers |
//! | the high watermark moves | the minimum is in sync, nobody else is eligible, and every member of the ISR, and of each that may come true, acknowledged in this epoch since it joined; no batch is cut in two, no producer's number comes twice or is left out |
//! | an acknowledgement counts | it was made, in the epoch of the leader that counts it and in the uptime that joined last |
//! | an answer | what it promises is so |
//! | a proposal, and its outcome | who is admitted acknowledged in this epoch all up to its start; it replaces the value that it was made for |
//! | another value | within an epoch only its leader takes out who runs; who leaves below the minimum stays eligible |
//! | an election | epochs grow by one, and only a member is elected |
//! | any of these | every live member of ISR ∪ ELR holds what is committed |
//! | a commit to the bucket | by the epoch that leads; only what is committed, all of it and as it is; it never goes back |
//! | an object is deleted or written anew | no manifest names it |
//! | a file of a journal is free | all in it is durable in the segments |
//! | segments leave a disk | they are in the bucket, or below the log start |
//! | a follower does what it is told | by the leader of the epoch in which it follows |
//! | readers, and who asks for the end | the committed batches and nothing else; no older end from a newer leader |

mod acks;
mod bucket;
mod content;
mod journal;
mod partition;
mod replica;

use std::{
    cell::RefCell,
    collections::{BTreeMap, BTreeSet},
    rc::Rc,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
};

use strandline::{
    cluster::{Key, Keys, PartitionValue, Revision, TopicValue, Value as _},
    log::SimDisk,
    model::{BrokerId, ConfigMap, PartitionId, TopicConfig, TopicId},
    task::sim_event::{self, SimEvent},
    tier::TierState,
};

use self::{
    acks::Ack,
    bucket::Bucket,
    content::Entry,
    journal::{Disk, Journals},
    partition::Partition,
    replica::Ends,
};
use crate::{panics, trace::Trace, world::World};

/// Something that must not be, in words.
type Wrong = String;

/// Who does something.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Who {
    broker: BrokerId,
    /// The number of the process.
    process: u32,
}

/// The witness of a run, until it is dropped.
pub(crate) struct Truth(Rc<RefCell<Known>>);

struct Known {
    keys: Keys,
    /// One broker alone goes on in the epoch in which it led.
    alone: bool,
    machines: Machines,
    journals: Journals,
    bucket: Bucket,
    /// The registrations, each by the revision that made it.
    brokers: Brokers,
    /// What each topic asks for.
    topics: BTreeMap<TopicId, TopicConfig>,
    partitions: BTreeMap<PartitionId, Partition>,
    trace: Trace,
}

/// Which uptime of each broker is registered.
type Brokers = BTreeMap<BrokerId, u64>;

/// The brokers' machines.
type Machines = BTreeMap<BrokerId, Host>;

struct Host {
    /// The number of its broker's process while that takes part, else 0.
    process: Arc<AtomicU32>,
    disk: SimDisk,
    /// How many disks it had before this one.
    disks: Arc<AtomicU32>,
}

impl Host {
    fn is_running(&self) -> bool {
        self.process() != 0
    }

    fn process(&self) -> u32 {
        self.process.load(Ordering::Relaxed)
    }

    fn disk_number(&self) -> u32 {
        self.disks.load(Ordering::Relaxed)
    }
}

impl Truth {
    /// Watches a world from now on.
    pub(crate) fn watch(world: &World) -> Self {
        let machines: Machines = world
            .machines
            .iter()
            .map(|of| {
                let (process, disks) = (Arc::clone(&of.process), Arc::clone(&of.disks));
                (of.id, Host { process, disk: of.disk.clone(), disks })
            })
            .collect();
        let known = Rc::new(RefCell::new(Known {
            keys: Keys::new("strandline").unwrap(),
            alone: machines.len() == 1,
            machines,
            journals: Journals::default(),
            bucket: Bucket::new(world.shared.objects.clone()),
            brokers: BTreeMap::new(),
            topics: BTreeMap::new(),
            partitions: BTreeMap::new(),
            trace: world.shared.trace.clone(),
        }));
        let watched = Rc::clone(&known);
        sim_event::set_observer(Some(Box::new(move |process, event| watched.borrow_mut().saw(process, event))));
        Self(known)
    }

    /// Judges this moment: who takes part again must hold what it is believed to hold.
    pub(crate) fn look(&self) {
        let mut known = self.0.borrow_mut();
        let known = &mut *known;
        let wrong = known.partitions.values().find_map(|partition| partition.members_hold(&known.machines).err());
        known.found(wrong);
    }

    /// Whether the broker's process has opened its replica: until then its files are as the last one left them, or a loss of power.
    pub(crate) fn has_opened(&self, id: PartitionId, broker: BrokerId) -> bool {
        let known = self.0.borrow();
        let process = known.machines[&broker].process();
        known.partitions.get(&id).is_some_and(|partition| partition.has_opened(Who { broker, process }))
    }
}

impl Drop for Truth {
    fn drop(&mut self) {
        sim_event::set_observer(None);
    }
}

impl Known {
    fn saw(&mut self, process: u32, event: SimEvent<'_>) {
        let who = Who { broker: BrokerId(process / 1000), process };
        let wrong = match event {
            SimEvent::Stored { key, value, revision } => self.stored(key, value, revision),
            other => self.done(who, other),
        };
        self.found(wrong.err());
    }

    fn found(&self, wrong: Option<Wrong>) {
        if let Some(wrong) = wrong {
            self.trace.note(format_args!("WRONG: {wrong}"));
            panics::found(wrong);
        }
    }

    fn stored(&mut self, key: &str, value: Option<(&[u8], u64)>, revision: u64) -> Result<(), Wrong> {
        let at = |id: PartitionId| move |wrong| format!("{id}: {wrong}");
        match (self.keys.parse(key), value) {
            (Some(Key::Partition(id)), Some((value, _))) => {
                let Ok(value) = PartitionValue::decode(key, value) else { return Ok(()) };
                let partition = self.partitions.entry(id).or_default();
                if let Some(config) = self.topics.get(&id.topic) {
                    partition.configured(config);
                }
                partition.stored(value, Revision(revision), &self.brokers, &self.machines).map_err(at(id))?;
                partition.members_hold(&self.machines).map_err(at(id))
            }
            (Some(Key::Partition(id)), None) => {
                self.partitions.remove(&id);
                self.bucket.deleted(id);
                Ok(())
            }
            (Some(Key::Topic(_)), Some((value, _))) => {
                let Ok(TopicValue { id, config, .. }) = TopicValue::decode(key, value) else { return Ok(()) };
                let config = TopicConfig::resolve(&ConfigMap::new(), &config).map_err(|error| error.to_string())?;
                let of_topic = self.partitions.iter_mut().filter(|(partition, _)| partition.topic == id);
                of_topic.for_each(|(_, partition)| partition.configured(&config));
                self.topics.insert(id, config);
                Ok(())
            }
            (Some(Key::Tier(id)), Some((value, _))) => {
                let Ok(state) = TierState::decode(key, value) else { return Ok(()) };
                let partition = self.partitions.entry(id).or_default();
                let judged = partition.tiered(state.clone());
                judged.and_then(|()| self.bucket.committed(id, &state, partition)).map_err(at(id))
            }
            (Some(Key::Tier(id)), None) => {
                self.bucket.deleted(id);
                Ok(())
            }
            (Some(Key::Broker(id)), Some((_, created))) => {
                self.brokers.insert(id, created);
                Ok(())
            }
            (Some(Key::Broker(id)), None) => {
                self.brokers.remove(&id);
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// What the journals make of it.
    fn journals(&mut self, who: Who, event: &SimEvent<'_>) -> Result<(), Wrong> {
        let Some(host) = self.machines.get(&who.broker) else { return Ok(()) };
        let disk = Disk { number: host.disk_number(), content: &host.disk };
        if let SimEvent::EntryJournaled { .. } | SimEvent::LogChangeStarted { .. } | SimEvent::JournalFileFreed { .. } =
            event
        {
            self.journals.begun(who, &disk)?;
        }
        match *event {
            SimEvent::EntryJournaled { partition, file, end } => self.journals.journaled(who, partition, file, end),
            SimEvent::LogChangeStarted { partition, to, emptied } => {
                self.journals.changing(who, partition, to, emptied)
            }
            SimEvent::JournalFileFreed { file } => return self.journals.freed(who, file, &disk),
            _ => {}
        }
        Ok(())
    }

    fn done(&mut self, who: Who, event: SimEvent<'_>) -> Result<(), Wrong> {
        self.journals(who, &event)?;
        let Some(id) = partition_of(&event) else { return Ok(()) };
        // One that is being deleted.
        let Some(partition) = self.partitions.get_mut(&id) else { return Ok(()) };
        let by = |wrong| format!("{id}: broker {}: {wrong}", who.broker);
        let moved = match event {
            SimEvent::Stored { .. } | SimEvent::EntryJournaled { .. } | SimEvent::JournalFileFreed { .. } => false,
            SimEvent::ReplicaOpened { epochs, end, .. } => {
                let disk = self.machines.get(&who.broker).map_or(0, Host::disk_number);
                partition.opened(who, (epochs, end), disk, self.alone).map_err(by)?
            }
            SimEvent::MetadataApplied { revision, .. } => partition.placed(who, Revision(revision)).map_err(by)?,
            SimEvent::LeadershipStarted { epoch, start, .. } => {
                partition.led(who, epoch, start, self.alone).map_err(by)?
            }
            SimEvent::Appended { base, end, epoch, leads, crc, producer, .. } => {
                partition.appended(who, base..end, (epoch, leads), Entry { end, crc, producer }).map_err(by)?
            }
            SimEvent::LogChangeStarted { to, emptied, .. } => partition.changing(who.broker, to, emptied),
            SimEvent::LogChangeCompleted { .. } => partition.settled(who.broker),
            SimEvent::Truncated { epoch, to, .. } => partition.cut(who.broker, epoch, to).map_err(by)?,
            SimEvent::LogReset { at, epochs, producers, .. } => {
                let producers: BTreeSet<i64> = producers.iter().copied().collect();
                partition.begun(who.broker, at, epochs, &producers).map_err(by)?
            }
            SimEvent::LogPositionSent { epoch, persisted, .. } => partition.claimed(who.broker, epoch, persisted),
            SimEvent::WatermarksPublished { marks, role, .. } => {
                partition.marked(who.broker, marks, role, &self.brokers).map_err(by)?
            }
            SimEvent::FollowerSubscribed { epoch, follower, registered, .. } => {
                partition.joined(epoch, follower, registered).map_err(by)?
            }
            SimEvent::AckCounted { epoch, follower, registered, acknowledged, written, persisted, .. } => {
                let ends = Ends { written, persisted };
                partition.counts(epoch, &Ack { follower, registered, epoch: acknowledged, ends }).map_err(by)?
            }
            SimEvent::IsrProposed { epoch, expect, isr, added, .. } => {
                partition.proposed(who.broker, epoch, (Revision(expect), isr, added), &self.brokers).map_err(by)?
            }
            SimEvent::WriteAcked { end, by_all, .. } => partition.answered(who.broker, end, by_all).map_err(by)?,
            SimEvent::LeaderMessageApplied { epoch, .. } => partition.obeyed(who, epoch).map_err(by)?,
            SimEvent::BatchServed { base, end, epoch, crc, .. } => {
                partition.served(base, epoch, (end, crc)).map_err(by)?
            }
            SimEvent::ReadableEndMoved { end, .. } => partition.readable(end).map_err(by)?,
            SimEvent::LatestReturned { epoch, offset, .. } => partition.told_latest(epoch, offset).map_err(by)?,
            SimEvent::Evicted { start, .. } => partition.evicted(start).map_err(by)?,
        };
        // Only what moves a log or what is committed can take from a member what it must hold.
        if moved { partition.members_hold(&self.machines).map_err(|wrong| format!("{id}: {wrong}")) } else { Ok(()) }
    }
}

fn partition_of(event: &SimEvent<'_>) -> Option<PartitionId> {
    match event {
        SimEvent::Stored { .. } | SimEvent::EntryJournaled { .. } | SimEvent::JournalFileFreed { .. } => None,
        SimEvent::ReplicaOpened { partition, .. }
        | SimEvent::MetadataApplied { partition, .. }
        | SimEvent::FollowerSubscribed { partition, .. }
        | SimEvent::LeaderMessageApplied { partition, .. }
        | SimEvent::BatchServed { partition, .. }
        | SimEvent::LogChangeStarted { partition, .. }
        | SimEvent::LogChangeCompleted { partition, .. }
        | SimEvent::LeadershipStarted { partition, .. }
        | SimEvent::Appended { partition, .. }
        | SimEvent::Truncated { partition, .. }
        | SimEvent::LogReset { partition, .. }
        | SimEvent::LogPositionSent { partition, .. }
        | SimEvent::WatermarksPublished { partition, .. }
        | SimEvent::AckCounted { partition, .. }
        | SimEvent::IsrProposed { partition, .. }
        | SimEvent::WriteAcked { partition, .. }
        | SimEvent::ReadableEndMoved { partition, .. }
        | SimEvent::LatestReturned { partition, .. }
        | SimEvent::Evicted { partition, .. } => Some(*partition),
    }
}
