//! What is true of every partition, told by the brokers' own steps and judged at each of them (design.md §13).
//!
//! A [`Truth`] is the run's witness (`task::witness`). It remembers what the store holds, how far each replica's log reaches and which
//! epochs wrote it, and what was ever committed; every step of a broker is held against that. So a broken rule shows where it is
//! broken, and not only when the harm is still there at the next look. Content is not compared here: one epoch has one appender, so logs
//! that agree on the epochs of their offsets are the same, and `judge` compares the bytes.
//!
//! | when | what must hold |
//! | --- | --- |
//! | somebody leads | nobody else ever led in that epoch, the store names it, and it has all that is committed |
//! | an append | it continues the log; a leader's is of its own epoch |
//! | a cut, a beginning | no committed record goes; who begins behind others' records knows their producers |
//! | the high watermark moves | the minimum is in sync, nobody else is eligible, and every member of the ISR, and of each that may come true, acknowledged in this epoch |
//! | an acknowledgement counts | it was made in the epoch of the leader that counts it |
//! | an answer | what it promises is so |
//! | a proposal, and its outcome | who is admitted acknowledged in this epoch all up to its start; it replaces the value that it was made for |
//! | an election | epochs grow by one, and only a member is elected |
//! | any of these | every live member of ISR ∪ ELR holds what is committed |
//! | a commit to the bucket | by the epoch that leads; only what is committed; it never goes back |
//! | segments leave a disk | they are in the bucket, or below the log start |
//! | readers, and who asks for the end | nothing that is not committed; no older end from a newer leader |

mod partition;
mod replica;

use std::{
    cell::RefCell,
    collections::{BTreeMap, BTreeSet},
    rc::Rc,
    sync::{Arc, atomic::AtomicBool},
};

use strandline::{
    cluster::{Key, Keys, PartitionValue, Revision, Value as _},
    model::{BrokerId, PartitionId},
    task::witness::{self, Event},
    tier::TierState,
};

use self::partition::Partition;
use crate::{panics, trace::Trace};

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
    running: Running,
    /// The registrations, each by the revision that made it.
    brokers: Brokers,
    partitions: BTreeMap<PartitionId, Partition>,
    trace: Trace,
}

/// Which uptime of each broker is registered.
type Brokers = BTreeMap<BrokerId, u64>;

/// Which brokers take part.
pub(crate) type Running = BTreeMap<BrokerId, Arc<AtomicBool>>;

impl Truth {
    /// Watches from now on.
    pub(crate) fn watch(running: Running, trace: Trace) -> Self {
        let keys = Keys::new("strandline").unwrap();
        let alone = running.len() == 1;
        let known = Rc::new(RefCell::new(Known {
            keys,
            alone,
            running,
            brokers: BTreeMap::new(),
            partitions: BTreeMap::new(),
            trace,
        }));
        let watched = Rc::clone(&known);
        witness::set(Some(Box::new(move |process, event| watched.borrow_mut().saw(process, event))));
        Self(known)
    }

    /// Judges this moment: who takes part again must hold what it is believed to hold.
    pub(crate) fn look(&self) {
        let mut known = self.0.borrow_mut();
        let known = &mut *known;
        let wrong = known.partitions.values().find_map(|partition| partition.members_hold(&known.running).err());
        known.found(wrong);
    }
}

impl Drop for Truth {
    fn drop(&mut self) {
        witness::set(None);
    }
}

impl Known {
    fn saw(&mut self, process: u32, event: Event<'_>) {
        let who = Who { broker: BrokerId(process / 1000), process };
        let wrong = match event {
            Event::Stored { key, value, revision } => self.stored(key, value, revision),
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
                partition.stored(value, Revision(revision), &self.brokers).map_err(at(id))?;
                partition.members_hold(&self.running).map_err(at(id))
            }
            (Some(Key::Partition(id)), None) => {
                self.partitions.remove(&id);
                Ok(())
            }
            (Some(Key::Tier(id)), Some((value, _))) => {
                let Ok(state) = TierState::decode(key, value) else { return Ok(()) };
                self.partitions.entry(id).or_default().tiered(state).map_err(at(id))
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

    fn done(&mut self, who: Who, event: Event<'_>) -> Result<(), Wrong> {
        let Some(id) = partition_of(&event) else { return Ok(()) };
        // One that is being deleted.
        let Some(partition) = self.partitions.get_mut(&id) else { return Ok(()) };
        let by = |wrong| format!("{id}: broker {}: {wrong}", who.broker);
        let moved = match event {
            Event::Stored { .. } => false,
            Event::Opened { epochs, end, .. } => partition.opened(who, epochs, end),
            Event::Led { epoch, start, .. } => partition.led(who, epoch, start, self.alone).map_err(by)?,
            Event::Appended { base, end, epoch, leads, producer, .. } => {
                partition.appended(who, base..end, epoch, leads, producer).map_err(by)?
            }
            Event::Cut { epoch, to, .. } => partition.cut(who.broker, epoch, to).map_err(by)?,
            Event::Begun { at, epochs, producers, .. } => {
                let producers: BTreeSet<i64> = producers.iter().copied().collect();
                partition.begun(who.broker, at, epochs, &producers).map_err(by)?
            }
            Event::Claimed { epoch, persisted, .. } => partition.claimed(who.broker, epoch, persisted),
            Event::Marks { marks, part, .. } => partition.marked(who.broker, marks, part, &self.brokers).map_err(by)?,
            Event::Counted { epoch, follower, acknowledged, .. } => {
                partition::counted(epoch, follower, acknowledged).map_err(by)?
            }
            Event::Proposed { epoch, expect, isr, added, .. } => {
                partition.proposed(who.broker, epoch, (Revision(expect), isr, added), &self.brokers).map_err(by)?
            }
            Event::Answered { end, by_all, .. } => partition.answered(who.broker, end, by_all).map_err(by)?,
            Event::Readable { end, .. } => partition.readable(end).map_err(by)?,
            Event::Latest { epoch, offset, .. } => partition.told_latest(epoch, offset).map_err(by)?,
            Event::Evicted { start, .. } => partition.evicted(start).map_err(by)?,
        };
        // Only what moves a log or what is committed can take from a member what it must hold.
        if moved { partition.members_hold(&self.running).map_err(|wrong| format!("{id}: {wrong}")) } else { Ok(()) }
    }
}

fn partition_of(event: &Event<'_>) -> Option<PartitionId> {
    match event {
        Event::Stored { .. } => None,
        Event::Opened { partition, .. }
        | Event::Led { partition, .. }
        | Event::Appended { partition, .. }
        | Event::Cut { partition, .. }
        | Event::Begun { partition, .. }
        | Event::Claimed { partition, .. }
        | Event::Marks { partition, .. }
        | Event::Counted { partition, .. }
        | Event::Proposed { partition, .. }
        | Event::Answered { partition, .. }
        | Event::Readable { partition, .. }
        | Event::Latest { partition, .. }
        | Event::Evicted { partition, .. } => Some(*partition),
    }
}
