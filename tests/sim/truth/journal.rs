//! What each broker's journal holds, and how far its logs are durable without it.

use std::collections::BTreeMap;

use strandline::model::{BrokerId, Offset, PartitionId};

use super::{Who, Wrong};

/// The journals, each of the process that writes it now: what an earlier one left is in the segments before another writes.
#[derive(Default)]
pub(super) struct Journals(BTreeMap<BrokerId, Journal>);

#[derive(Default)]
struct Journal {
    process: u32,
    /// By the number of a file's use: how far it holds each log.
    files: BTreeMap<u64, BTreeMap<PartitionId, Offset>>,
    synced: BTreeMap<PartitionId, Offset>,
}

impl Journals {
    fn of(&mut self, who: Who) -> &mut Journal {
        let journal = self.0.entry(who.broker).or_default();
        if journal.process != who.process {
            *journal = Journal { process: who.process, ..Journal::default() };
        }
        journal
    }

    pub(super) fn journaled(&mut self, who: Who, partition: PartitionId, file: u64, end: Offset) {
        let held = self.of(who).files.entry(file).or_default().entry(partition).or_default();
        *held = end.max(*held);
    }

    pub(super) fn synced(&mut self, who: Who, partition: PartitionId, end: Offset) {
        let synced = self.of(who).synced.entry(partition).or_default();
        *synced = end.max(*synced);
    }

    /// A log is cut, or begins anew: nothing beyond is asked of it any more.
    pub(super) fn changing(&mut self, who: Who, partition: PartitionId, to: Offset, emptied: bool) {
        let journal = self.of(who);
        for file in journal.files.values_mut() {
            if emptied {
                file.remove(&partition);
            } else if let Some(held) = file.get_mut(&partition) {
                *held = to.min(*held);
            }
        }
        let synced = journal.synced.entry(partition).or_default();
        *synced = if emptied { to } else { to.min(*synced) };
    }

    /// All that a file holds must be durable in its segments before it is used again.
    pub(super) fn freed(&mut self, who: Who, file: u64) -> Result<(), Wrong> {
        let journal = self.of(who);
        let held = journal.files.remove(&file).unwrap_or_default();
        let synced = |partition: &PartitionId| journal.synced.get(partition).copied().unwrap_or_default();
        match held.iter().find(|(partition, end)| synced(partition) < **end) {
            Some((partition, end)) => Err(format!(
                "broker {}: a file of the journal that holds {partition} up to {end} may be used again, and it is synced up to {}",
                who.broker,
                synced(partition)
            )),
            None => Ok(()),
        }
    }
}
