//! Reference model of every partition, built from the events of the brokers and checked at each event.
//!
//! [`ReferenceModel`] is the observer of a run (`task::sim_event`). The model records the partition values and tier
//! states of the metadata store, the log end and epochs of each replica, and the committed batches. Each event is
//! checked against the model. A violation is therefore found at the step that causes it, even if its effect does not
//! last until the next check of `checker`. Only the leader of an epoch creates batches in it. So logs with equal epochs
//! at all offsets are the same if each batch has the checksum that its leader's batch had. `checker` compares the bytes
//! on the disks.
//!
//! | event | rule |
//! | --- | --- |
//! | a replica becomes leader | No other process led in that epoch, and the store names this leader; in the current epoch, its log has all committed records |
//! | a broker applies a partition value | The value is not older than the last one that this process applied |
//! | a replica is opened | All durable records are there, and no truncated ones |
//! | an append | It continues the log; a leader appends in its own epoch; no other batch has this epoch and offset |
//! | a truncation | No committed record is removed, except outside ISR and ELR by the leader of an older epoch |
//! | a reset | A bootstrap starts no higher than the tiered end or the log start, with the producer state before it |
//! | a leader raises the committed end | The min ISR is met, and the ELR is empty |
//! | | Every member of the maximal ISR has acknowledged in this epoch, since it subscribed |
//! | | No batch is split; no producer sequence is repeated or skipped |
//! | any other high watermark | It is not above the committed end; unless an election was unclean, it does not decrease |
//! | an acknowledgement counts | It was sent, in the epoch of the counting leader, by the broker epoch that subscribed last |
//! | a write is acknowledged | The leader's log has it with the topic's durability; if the whole ISR acknowledged, it is committed |
//! | an ISR proposal, its outcome | An added replica has acknowledged all up to the epoch start and the high watermark in this epoch |
//! | | The proposed ISR replaces the value that it was made for |
//! | another partition value | Within an epoch only the leader removes a running replica from the ISR |
//! | | A replica that leaves the ISR below the min ISR stays eligible |
//! | an election | The epoch grows by one, and only a member of ISR or ELR is elected |
//! | an event after which a log may lack committed records | Every running member of ISR ∪ ELR holds all committed records |
//! | a tier commit | It is made in the current leader epoch, never goes back, and has all committed batches of its range, unchanged |
//! | an object is deleted, or overwritten with other bytes | No current manifest references it |
//! | a journal file is freed | All its entries are durable in the segments |
//! | segments are evicted | They are in the object store, or below the log start |
//! | a follower applies a leader's message | The message is from the leader of the epoch that the follower follows |
//! | a read, a latest offset | Only committed batches are returned; a newer leader returns no older end |

mod acks;
mod content;
mod journal;
mod partition;
mod replica;
mod stored_objects;

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
    content::Entry,
    journal::{Disk, Journals},
    partition::Partition,
    replica::Ends,
    stored_objects::StoredObjects,
};
use crate::{panics, trace::Trace, world::Simulation};

/// Description of a rule violation.
type RuleViolation = String;

/// A broker and its process.
#[derive(Clone, Copy, PartialEq, Eq)]
struct ProcessId {
    broker: BrokerId,
    /// Number of the process; no other process of the run has it.
    process: u32,
}

/// Observer of the events of a run, until it is dropped.
pub(crate) struct ReferenceModel(Rc<RefCell<ReferenceState>>);

struct ReferenceState {
    keys: Keys,
    /// True for a standalone broker, which after a restart leads again in the same epoch.
    standalone: bool,
    machines: Machines,
    journals: Journals,
    stored_objects: StoredObjects,
    /// Broker epochs of the registered brokers.
    brokers: Brokers,
    /// Configuration of each topic.
    topics: BTreeMap<TopicId, TopicConfig>,
    partitions: BTreeMap<PartitionId, Partition>,
    trace: Trace,
}

/// Broker epoch of each registered broker.
type Brokers = BTreeMap<BrokerId, u64>;

/// Machines of the brokers.
type Machines = BTreeMap<BrokerId, Host>;

struct Host {
    /// Number of the broker's process while the broker runs; 0 while it is down, starts or stops.
    process: Arc<AtomicU32>,
    disk: SimDisk,
    /// Number of earlier disks of this machine, which is also the number of the current disk.
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

impl ReferenceModel {
    /// Creates the model of a simulation, and observes its events from now on.
    pub(crate) fn watch(world: &Simulation) -> Self {
        let machines: Machines = world
            .machines
            .iter()
            .map(|of| {
                let (process, disks) = (Arc::clone(&of.process), Arc::clone(&of.disks));
                (of.id, Host { process, disk: of.disk.clone(), disks })
            })
            .collect();
        let state = Rc::new(RefCell::new(ReferenceState {
            keys: Keys::new("strandline").unwrap(),
            standalone: machines.len() == 1,
            machines,
            journals: Journals::default(),
            stored_objects: StoredObjects::new(world.shared.objects.clone()),
            brokers: BTreeMap::new(),
            topics: BTreeMap::new(),
            partitions: BTreeMap::new(),
            trace: world.shared.trace.clone(),
        }));
        let observed = Rc::clone(&state);
        sim_event::set_observer(Some(Box::new(move |process, event| observed.borrow_mut().on_event(process, event))));
        Self(state)
    }

    /// Reports a violation if a running member of ISR ∪ ELR lacks committed records in the current state.
    pub(crate) fn check_isr_and_elr(&self) {
        let mut state = self.0.borrow_mut();
        let state = &mut *state;
        let violation = state.partitions.values().find_map(|partition| partition.check_members(&state.machines).err());
        state.report(violation);
    }

    /// Returns true if the broker's current process has opened its replica of this partition. Until then, the files on
    /// the disk are still those of the previous process, perhaps after a power loss.
    pub(crate) fn has_opened(&self, id: PartitionId, broker: BrokerId) -> bool {
        let state = self.0.borrow();
        let process = state.machines[&broker].process();
        state.partitions.get(&id).is_some_and(|partition| partition.has_opened(ProcessId { broker, process }))
    }
}

impl Drop for ReferenceModel {
    fn drop(&mut self) {
        sim_event::set_observer(None);
    }
}

impl ReferenceState {
    /// Applies and checks an event of a process, and reports a violation. The thousands of a process number are the id
    /// of its broker.
    fn on_event(&mut self, process: u32, event: SimEvent<'_>) {
        let who = ProcessId { broker: BrokerId(process / 1000), process };
        let violation = match event {
            SimEvent::Stored { key, value, revision } => self.on_stored(key, value, revision),
            other => self.on_process_event(who, other),
        };
        self.report(violation.err());
    }

    fn report(&self, violation: Option<RuleViolation>) {
        if let Some(violation) = violation {
            self.trace.record(format_args!("VIOLATION: {violation}"));
            panics::report(violation);
        }
    }

    /// Applies and checks a change of a key in the metadata store. `value` is the new value with the create revision of
    /// the key, or `None` if the key was deleted.
    fn on_stored(&mut self, key: &str, value: Option<(&[u8], u64)>, revision: u64) -> Result<(), RuleViolation> {
        let at = |id: PartitionId| move |violation| format!("{id}: {violation}");
        match (self.keys.parse(key), value) {
            (Some(Key::Partition(id)), Some((value, _))) => {
                let Ok(value) = PartitionValue::decode(key, value) else { return Ok(()) };
                let partition = self.partitions.entry(id).or_default();
                if let Some(config) = self.topics.get(&id.topic) {
                    partition.on_config_stored(config);
                }
                partition.on_value_stored(value, Revision(revision), &self.brokers, &self.machines).map_err(at(id))?;
                partition.check_members(&self.machines).map_err(at(id))
            }
            (Some(Key::Partition(id)), None) => {
                self.partitions.remove(&id);
                self.stored_objects.remove_references(id);
                Ok(())
            }
            (Some(Key::Topic(_)), Some((value, _))) => {
                let Ok(TopicValue { id, config, .. }) = TopicValue::decode(key, value) else { return Ok(()) };
                let config = TopicConfig::resolve(&ConfigMap::new(), &config).map_err(|error| error.to_string())?;
                let of_topic = self.partitions.iter_mut().filter(|(partition, _)| partition.topic == id);
                of_topic.for_each(|(_, partition)| partition.on_config_stored(&config));
                self.topics.insert(id, config);
                Ok(())
            }
            (Some(Key::Tier(id)), Some((value, _))) => {
                let Ok(state) = TierState::decode(key, value) else { return Ok(()) };
                let partition = self.partitions.entry(id).or_default();
                let result = partition.on_tier_state_stored(state.clone());
                result.and_then(|()| self.stored_objects.check_tier_commit(id, &state, partition)).map_err(at(id))
            }
            (Some(Key::Tier(id)), None) => {
                self.stored_objects.remove_references(id);
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

    /// Applies an event to the model of the journals. Fails if the segments do not durably hold the entries of a
    /// journal file at one of two events. Either the file is freed, or a new process may reuse the files of the
    /// previous one.
    fn check_journals(&mut self, who: ProcessId, event: &SimEvent<'_>) -> Result<(), RuleViolation> {
        let Some(host) = self.machines.get(&who.broker) else { return Ok(()) };
        let disk = Disk { number: host.disk_number(), content: &host.disk };
        if let SimEvent::EntryJournaled { .. } | SimEvent::LogChangeStarted { .. } | SimEvent::JournalFileFreed { .. } =
            event
        {
            self.journals.check_new_process(who, &disk)?;
        }
        match *event {
            SimEvent::EntryJournaled { partition, file, end } => self.journals.record_entry(who, partition, file, end),
            SimEvent::LogChangeStarted { partition, to, emptied } => {
                self.journals.lower_ends(who, partition, to, emptied)
            }
            SimEvent::JournalFileFreed { file } => return self.journals.free_file(who, file, &disk),
            _ => {}
        }
        Ok(())
    }

    /// Applies and checks an event of a broker's process.
    fn on_process_event(&mut self, who: ProcessId, event: SimEvent<'_>) -> Result<(), RuleViolation> {
        self.check_journals(who, &event)?;
        let Some(id) = partition_of(&event) else { return Ok(()) };
        // Events of a partition that is not in the metadata store are ignored: it is being deleted.
        let Some(partition) = self.partitions.get_mut(&id) else { return Ok(()) };
        let by = |violation| format!("{id}: broker {}: {violation}", who.broker);
        let moved = match event {
            SimEvent::Stored { .. } | SimEvent::EntryJournaled { .. } | SimEvent::JournalFileFreed { .. } => false,
            SimEvent::ReplicaOpened { epochs, end, .. } => {
                let disk = self.machines.get(&who.broker).map_or(0, Host::disk_number);
                partition.on_replica_opened(who, (epochs, end), disk, self.standalone).map_err(by)?
            }
            SimEvent::MetadataApplied { revision, .. } => {
                partition.on_metadata_applied(who, Revision(revision)).map_err(by)?
            }
            SimEvent::LeadershipStarted { epoch, start, .. } => {
                partition.on_leadership_started(who, epoch, start, self.standalone).map_err(by)?
            }
            SimEvent::Appended { base, end, epoch, leads, crc, producer, .. } => {
                partition.on_appended(who, base..end, (epoch, leads), Entry { end, crc, producer }).map_err(by)?
            }
            SimEvent::LogChangeStarted { to, emptied, .. } => partition.on_log_change_started(who.broker, to, emptied),
            SimEvent::LogChangeCompleted { .. } => partition.on_log_change_completed(who.broker),
            SimEvent::Truncated { epoch, to, .. } => partition.on_truncated(who.broker, epoch, to).map_err(by)?,
            SimEvent::LogReset { at, epochs, producers, .. } => {
                let producers: BTreeSet<i64> = producers.iter().copied().collect();
                partition.on_log_reset(who.broker, at, epochs, &producers).map_err(by)?
            }
            SimEvent::LogPositionSent { epoch, persisted, .. } => {
                partition.on_log_position_sent(who.broker, epoch, persisted)
            }
            SimEvent::WatermarksPublished { watermarks, role, .. } => {
                partition.on_watermarks_published(who.broker, watermarks, role, &self.brokers).map_err(by)?
            }
            SimEvent::FollowerSubscribed { epoch, follower, registered, .. } => {
                partition.on_follower_subscribed(epoch, follower, registered).map_err(by)?
            }
            SimEvent::AckCounted { epoch, follower, registered, acknowledged, written, persisted, .. } => {
                let ends = Ends { written, persisted };
                partition.on_ack_counted(epoch, &Ack { follower, registered, epoch: acknowledged, ends }).map_err(by)?
            }
            SimEvent::IsrProposed { epoch, expect, isr, added, .. } => partition
                .on_isr_proposed(who.broker, epoch, (Revision(expect), isr, added), &self.brokers)
                .map_err(by)?,
            SimEvent::WriteAcked { end, by_all, .. } => {
                partition.on_write_acked(who.broker, end, by_all).map_err(by)?
            }
            SimEvent::LeaderMessageApplied { epoch, .. } => {
                partition.on_leader_message_applied(who, epoch).map_err(by)?
            }
            SimEvent::BatchServed { base, end, epoch, crc, .. } => {
                partition.on_batch_served(base, epoch, (end, crc)).map_err(by)?
            }
            SimEvent::ReadableEndMoved { end, .. } => partition.on_readable_end_moved(end).map_err(by)?,
            SimEvent::LatestReturned { epoch, offset, .. } => {
                partition.on_latest_returned(epoch, offset).map_err(by)?
            }
            SimEvent::Evicted { start, .. } => partition.on_evicted(start).map_err(by)?,
        };
        // A member can lack committed records only after such an event.
        if moved {
            partition.check_members(&self.machines).map_err(|violation| format!("{id}: {violation}"))
        } else {
            Ok(())
        }
    }
}

/// Returns the partition whose model applies this event; `None` for an event of the metadata store or of a journal.
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
