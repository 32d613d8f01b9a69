//! Batches that the replicas of a partition appended, and the producers of the committed ones.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Range,
};

use strandline::{
    log::EpochHistory,
    model::{LeaderEpoch, Offset},
};

use super::RuleViolation;

/// Producer id, producer epoch, and sequence of the first record.
type Stamp = (i64, i16, i32);

/// One batch without its base offset and epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) end: Offset,
    /// Checksum of the part of the batch that no replica changes.
    pub(super) crc: u32,
    pub(super) producer: Option<Stamp>,
}

/// Batches by base offset and epoch, and the producers of the committed ones. Only the leader of an epoch creates
/// batches in it, so this key identifies a batch.
#[derive(Default)]
pub(super) struct Content {
    batches: BTreeMap<(Offset, LeaderEpoch), Entry>,
    /// Producers with committed batches.
    producers: BTreeMap<i64, Producer>,
}

#[derive(Clone, Copy, Debug)]
struct Producer {
    /// Base offset of the producer's first committed batch.
    first: Offset,
    epoch: i16,
    /// Sequence that the producer's next batch must have.
    next: i32,
}

impl Content {
    /// Returns a producer that has a committed batch below an offset and is not in `known`, and the base offset of its
    /// first committed batch.
    pub(super) fn missing_producer(&self, below: Offset, known: &BTreeSet<i64>) -> Option<(i64, Offset)> {
        let wrote = self.producers.iter().map(|(id, producer)| (*id, producer.first));
        wrote.filter(|(_, first)| *first < below).find(|(id, _)| !known.contains(id))
    }

    /// Records an appended batch. The batch must equal the one with this epoch and offset that another replica
    /// appended.
    pub(super) fn record_batch(&mut self, base: Offset, epoch: LeaderEpoch, batch: Entry) -> Result<(), RuleViolation> {
        let known = *self.batches.entry((base, epoch)).or_insert(batch);
        if known == batch {
            return Ok(());
        }
        Err(format!("appended {batch:?} at {base} in epoch {epoch}, but this epoch has {known:?} there"))
    }

    /// Removes the batches from `end` on, which the only replica of a standalone broker has lost. The replica may
    /// append other batches at these offsets in the same epoch.
    pub(super) fn remove_from(&mut self, end: Offset) {
        drop(self.batches.split_off(&(end, LeaderEpoch(0))));
    }

    /// Returns the batch with this base offset that was written in an epoch; `None` if there is none.
    pub(super) fn at(&self, base: Offset, epoch: LeaderEpoch) -> Option<Entry> {
        self.batches.get(&(base, epoch)).copied()
    }

    /// Checks a newly committed range, written in these epochs, and records its producers. The range must consist of
    /// entire batches, and each batch of a producer must have the next sequence of that producer.
    pub(super) fn commit(&mut self, epochs: &EpochHistory, range: Range<Offset>) -> Result<(), RuleViolation> {
        let mut next = range.start;
        while next < range.end {
            let batch = epochs.at(next).and_then(|epoch| self.at(next, epoch)).filter(|batch| batch.end <= range.end);
            let Some(batch) = batch else {
                return Err(format!(
                    "commits {range:?} in epochs {epochs:?}, but no batch of these epochs is at {next}"
                ));
            };
            if let Some((id, epoch, sequence)) = batch.producer {
                let count = i32::try_from(batch.end.as_i64() - next.as_i64()).unwrap();
                // After the largest sequence, sequences start again at 0. No run has that number of records.
                let known = self.producers.get(&id).copied();
                let expected = known.filter(|known| known.epoch == epoch).map_or(0, |known| known.next);
                if sequence != expected || known.is_some_and(|known| known.epoch > epoch) {
                    return Err(format!(
                        "commits sequence {sequence} of producer {id} in producer epoch {epoch} at {next}, but {expected} is next after {known:?}"
                    ));
                }
                let first = known.map_or(next, |known| known.first);
                self.producers.insert(id, Producer { first, epoch, next: sequence + count });
            }
            next = batch.end;
        }
        Ok(())
    }
}
