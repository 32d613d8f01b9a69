//! Model of one replica, built from the events of its broker.

use std::collections::BTreeMap;

use strandline::{
    log::EpochHistory,
    model::{Durability, LeaderEpoch, Offset},
};

/// Log end and persisted end of a log.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Ends {
    pub(super) written: Offset,
    pub(super) persisted: Offset,
}

impl Ends {
    pub(super) fn by(self, durability: Durability) -> Offset {
        match durability {
            Durability::Persisted => self.persisted,
            Durability::Replicated => self.written,
        }
    }

    /// Returns the larger value of each end.
    pub(super) fn max(self, other: Self) -> Self {
        Self { written: self.written.max(other.written), persisted: self.persisted.max(other.persisted) }
    }
}

/// The log of one replica, and the progress that its broker acknowledged to leaders.
#[derive(Clone, Debug, Default)]
pub(super) struct Replica {
    pub(super) epochs: EpochHistory,
    pub(super) ends: Ends,
    pub(super) high_watermark: Offset,
    /// Durable end that an earlier process reached, as far as the records were not truncated. The current process may
    /// publish a lower persisted end: neither journal nor checkpoint records every sync of a segment.
    synced_before: Offset,
    /// Progress that the current process acknowledged in each epoch, since it last sent its log position.
    acked: BTreeMap<LeaderEpoch, Ends>,
    /// Maximum progress that earlier processes acknowledged in each epoch.
    acked_before: BTreeMap<LeaderEpoch, Ends>,
    /// Number of the disk on which the replica was last opened; `None` before the first open.
    disk: Option<u32>,
    /// Number of the process that opened the replica last.
    process: u32,
    changing: Option<Box<Change>>,
}

/// Unfinished truncation, reset or deletion of a log. A crash may leave the log as it was before the change, or as it
/// is after the change.
#[derive(Clone, Debug)]
struct Change {
    before: Replica,
    to: Offset,
    emptied: bool,
}

impl Replica {
    /// Records that a process opened the replica. On the same disk, the log must hold all records that were durable and
    /// not truncated, and no truncated record.
    pub(super) fn open(
        &mut self,
        process: u32,
        (epochs, end): (&[(LeaderEpoch, Offset)], Offset),
        disk: u32,
    ) -> Result<(), String> {
        let epochs = EpochHistory::from_starts(epochs.iter().copied()).unwrap();
        let recovered = if self.disk == Some(disk) { self.check_recovered(&epochs, end) } else { Ok(()) };
        if self.disk != Some(disk) {
            (self.ends, self.synced_before) = (Ends::default(), Offset::ZERO);
        }
        (self.process, self.disk, self.changing) = (process, Some(disk), None);
        let acked = std::mem::take(&mut self.acked);
        for (epoch, ends) in acked {
            let before = self.acked_before.entry(epoch).or_default();
            *before = before.max(ends);
        }
        self.epochs = epochs;
        self.synced_before = self.durable().min(end);
        self.ends = Ends { written: end, persisted: Offset::ZERO };
        self.high_watermark = Offset::ZERO;
        recovered
    }

    /// Returns true if the replica was last opened on this disk of its machine.
    pub(super) fn is_on(&self, disk: u32) -> bool {
        self.disk == Some(disk)
    }

    /// Returns true if this process has opened the replica.
    pub(super) fn is_open_in(&self, process: u32) -> bool {
        self.process == process
    }

    /// Returns the highest end that any process made durable, limited by later truncations.
    fn durable(&self) -> Offset {
        self.ends.persisted.max(self.synced_before)
    }

    /// Checks that a crash may have left a log with these epochs and this end, considering an unfinished truncation or
    /// reset.
    fn check_recovered(&self, epochs: &EpochHistory, end: Offset) -> Result<(), String> {
        let found = self.check_found(epochs, end);
        let Some(Change { before, to, emptied }) = self.changing.as_deref().filter(|_| found.is_err()) else {
            return found;
        };
        if *emptied && end == *to || before.check_found(epochs, end).is_ok() {
            return Ok(());
        }
        let mut truncated = before.clone();
        truncated.truncate(*to);
        if *emptied { found } else { truncated.check_found(epochs, end) }
    }

    /// Checks that the found log has the epochs of this one. The found log ends at or above the durable end and at or
    /// below the written end. If this log has no epochs, the found log must have none either.
    fn check_found(&self, epochs: &EpochHistory, end: Offset) -> Result<(), String> {
        let (durable, written) = (self.durable(), self.ends.written);
        if self.epochs.last().is_none() {
            // The log never held a record, or all its records were deleted. The recovered log must be empty, and may
            // start at another offset.
            let found = epochs
                .last()
                .map(|last| format!("a deleted log was recovered, with last epoch {last:?} and end {end}"));
            return found.map_or(Ok(()), Err);
        }
        if !(durable..=written).contains(&end) {
            return Err(format!(
                "the recovered log ends at {end}, but {durable} was durable and {written} was written"
            ));
        }
        self.difference_from(epochs, end).map_or(Ok(()), |reason| Err(format!("the recovered log differs: {reason}")))
    }

    /// Records that the log is about to be truncated, reset or deleted.
    pub(super) fn start_change(&mut self, to: Offset, emptied: bool) {
        // After an unfinished earlier change, a crash may still leave the log as it was before that change.
        let before = self.changing.take().map_or_else(|| self.clone(), |change| change.before);
        self.changing = Some(Box::new(Change { before, to, emptied }));
    }

    /// Records that the truncation, reset or deletion is complete. A reset or deletion empties the log.
    pub(super) fn complete_change(&mut self) {
        if let Some(change) = self.changing.take().filter(|change| change.emptied) {
            self.reset(change.to, EpochHistory::new());
        }
    }

    /// Records a log position that the follower sent in this epoch to subscribe. The position replaces the earlier
    /// acknowledgements in this epoch.
    pub(super) fn record_log_position(&mut self, epoch: LeaderEpoch, persisted: Offset) {
        self.ends.persisted = persisted;
        self.acked.insert(epoch, self.ends);
    }

    /// Records that the current progress was published, so that the leader of this epoch may receive it as an
    /// acknowledgement.
    pub(super) fn record_published_progress(&mut self, epoch: LeaderEpoch) {
        let acked = self.acked.entry(epoch).or_default();
        *acked = acked.max(self.ends);
    }

    /// Returns the progress that the current process acknowledged in this epoch since its last subscription.
    pub(super) fn acked(&self, epoch: LeaderEpoch) -> Option<Ends> {
        self.acked.get(&epoch).copied()
    }

    /// Returns the maximum progress that the current or an earlier process acknowledged in this epoch. A leader may
    /// still count acknowledgements of an earlier process, if it has not detected that this process has exited.
    pub(super) fn ever_acked(&self, epoch: LeaderEpoch) -> Option<Ends> {
        let before = self.acked_before.get(&epoch).copied();
        self.acked(epoch).map(|acked| acked.max(before.unwrap_or_default())).or(before)
    }

    pub(super) fn truncate(&mut self, to: Offset) {
        self.epochs.truncate(to);
        self.ends = Ends { written: to, persisted: to };
        self.synced_before = self.synced_before.min(to);
    }

    /// Resets the log to start at `at`, with the epoch history before that offset.
    pub(super) fn reset(&mut self, at: Offset, epochs: EpochHistory) {
        self.epochs = epochs;
        self.ends = Ends { written: at, persisted: at };
        self.synced_before = Offset::ZERO;
    }

    /// Returns the end below which the replica holds all records with this durability.
    pub(super) fn held_end(&self, durability: Durability) -> Offset {
        match durability {
            Durability::Persisted => self.durable(),
            Durability::Replicated => self.ends.written,
        }
    }

    /// Returns a description of the difference between this log's epochs and `epochs`, below `end` and from the offset
    /// at which both begin. Returns `None` if there is no difference.
    pub(super) fn difference_from(&self, epochs: &EpochHistory, end: Offset) -> Option<String> {
        let first = |history: &EpochHistory| history.iter().next().map(|(_, start)| start);
        let from = first(&self.epochs)?.max(first(epochs)?);
        if from >= end {
            return None;
        }
        let (mine, theirs) = (self.epochs.between(from, end), epochs.between(from, end));
        (mine != theirs).then(|| format!("the epochs are {mine:?}, but the committed ones are {theirs:?}"))
    }
}
