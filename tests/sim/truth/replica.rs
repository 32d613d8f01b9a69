//! One replica as its broker's steps show it.

use std::collections::BTreeMap;

use strandline::{
    log::EpochHistory,
    model::{Durability, LeaderEpoch, Offset},
};

/// How far a log reaches.
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

    /// The larger of both.
    pub(super) fn most(self, other: Self) -> Self {
        Self { written: self.written.max(other.written), persisted: self.persisted.max(other.persisted) }
    }
}

/// A log, and what its broker told leaders of it.
#[derive(Clone, Debug, Default)]
pub(super) struct Replica {
    pub(super) epochs: EpochHistory,
    pub(super) ends: Ends,
    pub(super) high_watermark: Offset,
    /// What processes before this one knew to be durable, and is there: this one may know of less, where segments were synced and neither
    /// journal nor checkpoint could say so.
    synced_before: Offset,
    /// What it acknowledged in each epoch, in this process and in those before.
    acked: BTreeMap<LeaderEpoch, Ends>,
    acked_before: BTreeMap<LeaderEpoch, Ends>,
    /// Which of its machine's disks it was found on; `None` while there is nothing of it.
    disk: Option<u32>,
    /// The process that opened it last.
    process: u32,
    changing: Option<Box<Change>>,
}

/// A log that is being cut or thrown away: until that is done a crash may leave it as it was or as it is to be.
#[derive(Clone, Debug)]
struct Change {
    before: Replica,
    to: Offset,
    emptied: bool,
}

impl Replica {
    /// Another process has opened it. All that its log ever held for durable, and was not cut, must be there, and nothing that was.
    pub(super) fn opened(
        &mut self,
        process: u32,
        (epochs, end): (&[(LeaderEpoch, Offset)], Offset),
        disk: u32,
    ) -> Result<(), String> {
        let epochs = EpochHistory::from_starts(epochs.iter().copied()).unwrap();
        let came_back = if self.disk == Some(disk) { self.comes_back(&epochs, end) } else { Ok(()) };
        if self.disk != Some(disk) {
            (self.ends, self.synced_before) = (Ends::default(), Offset::ZERO);
        }
        (self.process, self.disk, self.changing) = (process, Some(disk), None);
        let acked = std::mem::take(&mut self.acked);
        for (epoch, ends) in acked {
            let before = self.acked_before.entry(epoch).or_default();
            *before = before.most(ends);
        }
        self.epochs = epochs;
        self.synced_before = self.durable().min(end);
        self.ends = Ends { written: end, persisted: Offset::ZERO };
        self.high_watermark = Offset::ZERO;
        came_back
    }

    /// Whether it was found on this one of its machine's disks.
    pub(super) fn is_on(&self, disk: u32) -> bool {
        self.disk == Some(disk)
    }

    /// Whether this process has opened it.
    pub(super) fn is_open_in(&self, process: u32) -> bool {
        self.process == process
    }

    /// How far it ever was durable, as it is now.
    fn durable(&self) -> Offset {
        self.ends.persisted.max(self.synced_before)
    }

    /// Whether a log with these epochs and this end is what a crash may have left.
    fn comes_back(&self, epochs: &EpochHistory, end: Offset) -> Result<(), String> {
        let found = self.left(epochs, end);
        let Some(Change { before, to, emptied }) = self.changing.as_deref().filter(|_| found.is_err()) else {
            return found;
        };
        if *emptied && end == *to || before.left(epochs, end).is_ok() {
            return Ok(());
        }
        let mut cut = before.clone();
        cut.cut(*to);
        if *emptied { found } else { cut.left(epochs, end) }
    }

    fn left(&self, epochs: &EpochHistory, end: Offset) -> Result<(), String> {
        let (durable, written) = (self.durable(), self.ends.written);
        if self.epochs.last().is_none() {
            // It never held a record, or all of them were deleted: it may begin somewhere else, empty.
            let found = epochs.last().map(|last| format!("its log is back, and ends with {last:?} at {end}"));
            return found.map_or(Ok(()), Err);
        }
        if !(durable..=written).contains(&end) {
            return Err(format!("its log ends at {end}; it was durable up to {durable}, and ended at {written}"));
        }
        self.parts_from(epochs, end).map_or(Ok(()), |why| Err(format!("its log is another one: {why}")))
    }

    /// Its log is about to be cut, or thrown away.
    pub(super) fn changing(&mut self, to: Offset, emptied: bool) {
        // One that was not done yet may still leave what was there before it.
        let before = self.changing.take().map_or_else(|| self.clone(), |change| change.before);
        self.changing = Some(Box::new(Change { before, to, emptied }));
    }

    /// That is done.
    pub(super) fn settled(&mut self) {
        if let Some(change) = self.changing.take().filter(|change| change.emptied) {
            self.begin(change.to, EpochHistory::new());
        }
    }

    /// It claims in this epoch: what it acknowledged before in it counts no more.
    pub(super) fn claims(&mut self, epoch: LeaderEpoch, persisted: Offset) {
        self.ends.persisted = persisted;
        self.acked.insert(epoch, self.ends);
    }

    /// Its leader of this epoch may hear how far it is.
    pub(super) fn acknowledges(&mut self, epoch: LeaderEpoch) {
        let acked = self.acked.entry(epoch).or_default();
        *acked = acked.most(self.ends);
    }

    /// What this process acknowledged in this epoch.
    pub(super) fn acked(&self, epoch: LeaderEpoch) -> Option<Ends> {
        self.acked.get(&epoch).copied()
    }

    /// The same, with the processes before it: a leader may not have heard yet that they are gone.
    pub(super) fn ever_acked(&self, epoch: LeaderEpoch) -> Option<Ends> {
        let before = self.acked_before.get(&epoch).copied();
        self.acked(epoch).map(|acked| acked.most(before.unwrap_or_default())).or(before)
    }

    pub(super) fn cut(&mut self, to: Offset) {
        self.epochs.truncate(to);
        self.ends = Ends { written: to, persisted: to };
        self.synced_before = self.synced_before.min(to);
    }

    /// It begins anew behind what others wrote.
    pub(super) fn begin(&mut self, at: Offset, epochs: EpochHistory) {
        self.epochs = epochs;
        self.ends = Ends { written: at, persisted: at };
        self.synced_before = Offset::ZERO;
    }

    /// How far it holds its log, by this rule.
    pub(super) fn holds(&self, durability: Durability) -> Offset {
        match durability {
            Durability::Persisted => self.durable(),
            Durability::Replicated => self.ends.written,
        }
    }

    /// Where it parts from what `epochs` wrote below `end`; `None` where it holds the same.
    pub(super) fn parts_from(&self, epochs: &EpochHistory, end: Offset) -> Option<String> {
        let first = |history: &EpochHistory| history.iter().next().map(|(_, start)| start);
        let from = first(&self.epochs)?.max(first(epochs)?);
        if from >= end {
            return None;
        }
        let (mine, theirs) = (self.epochs.between(from, end), epochs.between(from, end));
        (mine != theirs).then(|| format!("its epochs are {mine:?}, the committed ones {theirs:?}"))
    }
}
