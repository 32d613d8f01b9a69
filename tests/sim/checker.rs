//! Checker of the rules that hold at every moment. It reads the disks, the metadata store and the client history.

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
    load::{ClientHistory, TOPICS},
    logs::{self, DiskLogs, DiskReplica},
    reference::ReferenceModel,
    trace::Trace,
};

/// One machine as the checker reads it.
pub(crate) struct MachineView {
    pub(crate) id: BrokerId,
    pub(crate) logs: DiskLogs,
    /// Number of the broker's process while the broker runs; 0 while it is down, starts or stops.
    pub(crate) process: Arc<AtomicU32>,
    /// True if the content of the disk may differ from the broker's writes, because a sync failed.
    pub(crate) disk_altered: Arc<AtomicBool>,
}

impl MachineView {
    /// Returns true if the broker runs and its disk certainly holds its writes.
    fn is_checked(&self) -> bool {
        self.process.load(Ordering::Relaxed) != 0 && !self.disk_altered.load(Ordering::Relaxed)
    }
}

/// The checker and its state.
pub(crate) struct StateChecker {
    pub(crate) machines: Vec<MachineView>,
    pub(crate) store: EmbeddedStore,
    pub(crate) keys: Keys,
    pub(crate) client_history: ClientHistory,
    pub(crate) trace: Trace,
    /// Partition values of the last check.
    values: BTreeMap<PartitionId, PartitionValue>,
    model: ReferenceModel,
}

impl StateChecker {
    pub(crate) fn new(
        machines: Vec<MachineView>,
        store: EmbeddedStore,
        client_history: ClientHistory,
        trace: Trace,
        model: ReferenceModel,
    ) -> Self {
        let keys = Keys::new("strandline").unwrap();
        Self { machines, store, keys, client_history, trace, values: BTreeMap::new(), model }
    }

    /// Returns every partition of the topics in [`TOPICS`] from the metadata store, with its log in the history.
    pub(crate) async fn partitions(&self) -> Vec<(Log, PartitionId, PartitionValue)> {
        let entries = self.store.list(self.keys.prefix()).await.unwrap().entries;
        let mut topics: BTreeMap<TopicId, usize> = BTreeMap::new();
        let mut partitions = Vec::new();
        for entry in &entries {
            match self.keys.parse(&entry.key) {
                Some(Key::Topic(name)) => {
                    let value = TopicValue::decode(&entry.key, &entry.value).unwrap();
                    let index = TOPICS.iter().position(|topic| *topic == name.as_str());
                    topics.extend(index.map(|index| (value.id, index)));
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

    /// Checks the logs on the disks of the running brokers against each other, and those of ISR and ELR members against
    /// the acknowledged records. Also checks that no leader epoch decreased, and adds changed partition values to the
    /// trace. The state does not change during the check.
    pub(crate) async fn check_machines(&mut self) {
        self.model.check_isr_and_elr();
        for (log, id, value) in self.partitions().await {
            let before = self.values.insert(id, value.clone());
            if before.as_ref() != Some(&value) {
                let PartitionValue { leader, leader_epoch, isr, elr, .. } = &value;
                self.trace
                    .record(format_args!("{log:?}: leader {leader:?} in {leader_epoch}, isr {isr:?}, elr {elr:?}"));
            }
            let decreased = before.is_some_and(|before| before.leader_epoch > value.leader_epoch);
            assert!(!decreased, "{log:?}: the leader epoch decreased");
            let may_lead = |broker: &BrokerId| value.isr.contains(broker) || value.elr.contains(broker);
            // A replica that was reassigned while its broker was down stays on the disk until the broker removes it.
            // Such a replica is not read before the broker opens it.
            let is_read = |broker: &BrokerId| value.replicas.contains(broker) && self.model.has_opened(id, *broker);
            let replicas: Vec<_> = self
                .machines
                .iter()
                .filter(|machine| machine.is_checked() && (may_lead(&machine.id) || is_read(&machine.id)))
                .map(|machine| (machine.id, machine.logs.replica(id)))
                .collect();
            self.check_agreement(log, &replicas);
            let members = replicas.iter().filter(|(broker, _)| may_lead(broker));
            for (member, replica) in members {
                self.check_member(log, *member, replica, &value);
            }
        }
    }

    /// Checks each pair of logs from the offset at which both begin, up to the last batch with the same offset and
    /// epoch in both. In this range the logs must be the same.
    fn check_agreement(&self, log: Log, replicas: &[(BrokerId, DiskReplica)]) {
        for (at, (one, mine)) in replicas.iter().enumerate() {
            for (other, theirs) in &replicas[at + 1..] {
                let differs = logs::contradiction(mine, theirs);
                assert_eq!(differs, None, "{log:?}: brokers {one} and {other} differ");
            }
        }
    }

    /// Checks that no record was acknowledged at or above the log end of a member of ISR or ELR. The log of the member
    /// must hold the acknowledged records of its range at their offsets. Records below the local start are not checked.
    fn check_member(&self, log: Log, member: BrokerId, replica: &DiskReplica, value: &PartitionValue) {
        self.client_history.with_acked(log, |acked| {
            if let Some((offset, sent)) = acked.range(replica.end.as_i64()..).next() {
                panic!("{log:?}: broker {member} may lead but lacks {sent:x} at {offset}: {value:?}");
            }
            for held in replica.batches() {
                let base = held.base.as_i64();
                for (&offset, &sent) in acked.range(base..held.end.as_i64()) {
                    let found = held.payloads[usize::try_from(offset - base).unwrap()];
                    assert_eq!(found, sent, "{log:?}: broker {member} has another record at {offset}: {value:?}");
                }
            }
        });
    }
}
