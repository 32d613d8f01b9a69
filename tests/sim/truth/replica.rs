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
}

impl Replica {
    /// Another process has opened it.
    pub(super) fn opened(&mut self, epochs: &[(LeaderEpoch, Offset)], end: Offset) {
        let acked = std::mem::take(&mut self.acked);
        for (epoch, ends) in acked {
            let before = self.acked_before.entry(epoch).or_default();
            *before = most(*before, ends);
        }
        self.epochs = EpochHistory::from_starts(epochs.iter().copied()).unwrap();
        self.synced_before = self.synced_before.max(self.ends.persisted).min(end);
        self.ends = Ends { written: end, persisted: Offset::ZERO };
        self.high_watermark = Offset::ZERO;
    }

    /// It claims in this epoch: what it acknowledged before in it counts no more.
    pub(super) fn claims(&mut self, epoch: LeaderEpoch, persisted: Offset) {
        self.ends.persisted = persisted;
        self.acked.insert(epoch, self.ends);
    }

    /// Its leader of this epoch may hear how far it is.
    pub(super) fn acknowledges(&mut self, epoch: LeaderEpoch) {
        let acked = self.acked.entry(epoch).or_default();
        *acked = most(*acked, self.ends);
    }

    /// What this process acknowledged in this epoch.
    pub(super) fn acked(&self, epoch: LeaderEpoch) -> Option<Ends> {
        self.acked.get(&epoch).copied()
    }

    /// The same, with the processes before it: a leader may not have heard yet that they are gone.
    pub(super) fn ever_acked(&self, epoch: LeaderEpoch) -> Option<Ends> {
        let before = self.acked_before.get(&epoch).copied();
        self.acked(epoch).map(|acked| most(acked, before.unwrap_or_default())).or(before)
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
            Durability::Persisted => self.ends.persisted.max(self.synced_before),
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

fn most(one: Ends, other: Ends) -> Ends {
    Ends { written: one.written.max(other.written), persisted: one.persisted.max(other.persisted) }
}
