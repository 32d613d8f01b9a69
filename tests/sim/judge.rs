//! Checker of the rules that hold at every moment (design.md §13). It reads the disks, the metadata store and the client history.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
};

use strandline::{
    cluster::{EmbeddedStore, Key, Keys, MetaStore as _, PartitionValue, TopicValue, Value as _},
    model::{BrokerId, PartitionId, TopicId},
};

use crate::{
    history::Log,
    load::{Ledger, TOPICS},
    logs::{self, Logs, Replica},
    trace::Trace,
    truth::Truth,
};

/// One machine as the checker reads it.
pub(crate) struct Seen {
    pub(crate) id: BrokerId,
    pub(crate) logs: Logs,
    /// Number of the broker's process while the broker is active, else 0.
    pub(crate) process: Arc<AtomicU32>,
    /// True if the content of the disk may differ from the broker's writes.
    pub(crate) spoilt: Arc<AtomicBool>,
}

impl Seen {
    /// Returns true if the broker is active and its disk holds what it wrote.
    fn counts(&self) -> bool {
        self.process.load(Ordering::Relaxed) != 0 && !self.spoilt.load(Ordering::Relaxed)
    }
}

/// The checker and its state.
pub(crate) struct Judge {
    pub(crate) machines: Vec<Seen>,
    pub(crate) store: EmbeddedStore,
    pub(crate) keys: Keys,
    pub(crate) ledger: Ledger,
    pub(crate) trace: Trace,
    /// Partition values of the last check.
    values: BTreeMap<PartitionId, PartitionValue>,
    truth: Truth,
}

impl Judge {
    pub(crate) fn new(machines: Vec<Seen>, store: EmbeddedStore, ledger: Ledger, trace: Trace, truth: Truth) -> Self {
        let keys = Keys::new("strandline").unwrap();
        Self { machines, store, keys, ledger, trace, values: BTreeMap::new(), truth }
    }

    /// Returns every partition of the metadata store, with its log in the history.
    pub(crate) async fn partitions(&self) -> Vec<(Log, PartitionId, PartitionValue)> {
        let entries = self.store.list(self.keys.prefix()).await.unwrap().entries;
        let mut topics: BTreeMap<TopicId, usize> = BTreeMap::new();
        let mut partitions = Vec::new();
        for entry in &entries {
            match self.keys.parse(&entry.key) {
                Some(Key::Topic(name)) => {
                    let value = TopicValue::decode(&entry.key, &entry.value).unwrap();
                    let place = TOPICS.iter().position(|topic| *topic == name.as_str());
                    topics.extend(place.map(|place| (value.id, place)));
                }
                Some(Key::Partition(id)) => {
                    partitions.push((id, PartitionValue::decode(&entry.key, &entry.value).unwrap()));
                }
                _ => {}
            }
        }
        let placed = partitions.into_iter().filter_map(|(id, value)| {
            let topic = *topics.get(&id.topic)?;
            Some(((topic, i32::try_from(id.number).unwrap()), id, value))
        });
        placed.collect()
    }

    /// Checks the current state. The state does not change during the check.
    pub(crate) async fn look(&mut self) {
        self.truth.look();
        for (log, id, value) in self.partitions().await {
            let before = self.values.insert(id, value.clone());
            if before.as_ref() != Some(&value) {
                let PartitionValue { leader, leader_epoch, isr, elr, .. } = &value;
                self.trace.note(format_args!("{log:?}: leader {leader:?} in {leader_epoch}, isr {isr:?}, elr {elr:?}"));
            }
            let fell = before.is_some_and(|before| before.leader_epoch > value.leader_epoch);
            assert!(!fell, "{log:?}: the leader epoch fell");
            let may_lead = |broker: &BrokerId| value.isr.contains(broker) || value.elr.contains(broker);
            // A replica that was reassigned while its broker was down stays on the disk until the broker removes it. It is not read before
            // it is opened.
            let is_read = |broker: &BrokerId| value.replicas.contains(broker) && self.truth.has_opened(id, *broker);
            let replicas: Vec<_> = self
                .machines
                .iter()
                .filter(|machine| machine.counts() && (may_lead(&machine.id) || is_read(&machine.id)))
                .map(|machine| (machine.id, machine.logs.replica(id)))
                .collect();
            self.agree(log, &replicas);
            let members = replicas.iter().filter(|(broker, _)| may_lead(broker));
            for (member, replica) in members {
                self.holds(log, *member, replica, &value);
            }
        }
    }

    /// Checks that two logs with an equal offset and epoch are the same up to there.
    fn agree(&self, log: Log, replicas: &[(BrokerId, Replica)]) {
        for (at, (one, mine)) in replicas.iter().enumerate() {
            for (other, theirs) in &replicas[at + 1..] {
                let differs = logs::contradiction(mine, theirs);
                assert_eq!(differs, None, "{log:?}: brokers {one} and {other} differ");
            }
        }
    }

    /// Checks that a member of ISR or ELR holds the acknowledged records.
    fn holds(&self, log: Log, member: BrokerId, replica: &Replica, value: &PartitionValue) {
        self.ledger.with_acked(log, |acked| {
            if let Some((offset, sent)) = acked.range(replica.end.as_i64()..).next() {
                panic!("{log:?}: broker {member} may lead and lacks {sent:x} at {offset}: {value:?}");
            }
            for held in replica.batches() {
                let base = held.base.as_i64();
                for (&offset, &sent) in acked.range(base..held.end.as_i64()) {
                    let found = held.payloads[usize::try_from(offset - base).unwrap()];
                    assert_eq!(found, sent, "{log:?}: broker {member} holds something else at {offset}: {value:?}");
                }
            }
        });
    }
}
