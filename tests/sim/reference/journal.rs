//! Content of each broker's journal, and the check that the segments durably hold the entries of a journal file before
//! the file is reused.

use std::collections::BTreeMap;

use strandline::{
    log::SimDisk,
    model::{BrokerId, Offset, PartitionId},
};

use super::{ProcessId, RuleViolation};
use crate::logs;

/// Disk of a broker.
pub(super) struct Disk<'a> {
    /// Number of earlier disks of the machine, which identifies this disk.
    pub(super) number: u32,
    pub(super) content: &'a SimDisk,
}

/// Journal of each broker, as the last process wrote it.
#[derive(Default)]
pub(super) struct Journals(BTreeMap<BrokerId, Journal>);

#[derive(Default)]
struct Journal {
    process: u32,
    /// Number of the disk that holds the journal.
    disk: u32,
    /// End of the entries of each partition in each journal file, by the serial number of the file.
    files: BTreeMap<u64, LogEnds>,
}

type LogEnds = BTreeMap<PartitionId, Offset>;

impl Journals {
    fn of(&mut self, who: ProcessId) -> &mut Journal {
        self.0.entry(who.broker).or_default()
    }

    /// Records that a process writes its journal. A new process may reuse all journal files, because replay has applied
    /// their entries. So at its first journal event the segments must durably hold these entries, unless the disk was
    /// replaced.
    pub(super) fn check_new_process(&mut self, who: ProcessId, disk: &Disk<'_>) -> Result<(), RuleViolation> {
        let journal = self.of(who);
        if journal.process == who.process {
            return Ok(());
        }
        let fresh = Journal { process: who.process, disk: disk.number, files: BTreeMap::new() };
        let before = std::mem::replace(journal, fresh);
        if before.disk != disk.number {
            return Ok(());
        }
        before.files.values().try_for_each(|held| check_durable(who, held, disk))
    }

    pub(super) fn record_entry(&mut self, who: ProcessId, partition: PartitionId, file: u64, end: Offset) {
        let held = self.of(who).files.entry(file).or_default().entry(partition).or_default();
        *held = end.max(*held);
    }

    /// Lowers the ends of a log that is truncated to `to`, or removes them if the log is emptied. The segments need not
    /// hold the removed records.
    pub(super) fn lower_ends(&mut self, who: ProcessId, partition: PartitionId, to: Offset, emptied: bool) {
        for file in self.of(who).files.values_mut() {
            if emptied {
                file.remove(&partition);
            } else if let Some(held) = file.get_mut(&partition) {
                *held = to.min(*held);
            }
        }
    }

    /// Removes a journal file that is about to be reused, and checks its entries.
    pub(super) fn free_file(&mut self, who: ProcessId, file: u64, disk: &Disk<'_>) -> Result<(), RuleViolation> {
        let held = self.of(who).files.remove(&file).unwrap_or_default();
        check_durable(who, &held, disk)
    }
}

/// Checks that the segments durably hold all these entries.
fn check_durable(who: ProcessId, held: &LogEnds, disk: &Disk<'_>) -> Result<(), RuleViolation> {
    let lacking = held.iter().find_map(|(partition, end)| {
        let durable = logs::durable_end(disk.content, *partition);
        (durable < *end).then_some((partition, end, durable))
    });
    lacking.map_or(Ok(()), |(partition, end, durable)| {
        Err(format!(
            "broker {}: a freed journal file has entries of {partition} up to {end}, but the segments are durable only up to {durable}",
            who.broker
        ))
    })
}
