//! What was appended to a partition, batch by batch, whoever holds it.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Range,
};

use strandline::{
    log::EpochHistory,
    model::{LeaderEpoch, Offset},
};

use super::Wrong;

/// A producer's id, its epoch, and the sequence number of the first record.
type Stamp = (i64, i16, i32);

/// One batch, without its place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) end: Offset,
    /// Of what no replica changes.
    pub(super) crc: u32,
    pub(super) producer: Option<Stamp>,
}

/// Every batch by its first offset and its epoch: one epoch has one appender, so these name one batch.
#[derive(Default)]
pub(super) struct Content {
    batches: BTreeMap<(Offset, LeaderEpoch), Entry>,
    /// Each producer of which something is committed.
    producers: BTreeMap<i64, Producer>,
}

#[derive(Clone, Copy, Debug)]
struct Producer {
    /// The offset of its first committed batch.
    first: Offset,
    epoch: i16,
    /// The sequence number to come.
    next: i32,
}

impl Content {
    /// A producer that wrote something committed below an offset and is none of these.
    pub(super) fn unknown(&self, below: Offset, known: &BTreeSet<i64>) -> Option<(i64, Offset)> {
        let wrote = self.producers.iter().map(|(id, producer)| (*id, producer.first));
        wrote.filter(|(_, first)| *first < below).find(|(id, _)| !known.contains(id))
    }

    /// A replica has it now: the same as every other that has a batch of this epoch there.
    pub(super) fn appended(&mut self, base: Offset, epoch: LeaderEpoch, batch: Entry) -> Result<(), Wrong> {
        let known = *self.batches.entry((base, epoch)).or_insert(batch);
        if known == batch {
            return Ok(());
        }
        Err(format!("appended {batch:?} at {base} in epoch {epoch}, and that epoch's is {known:?}"))
    }

    /// Forgets what the only replica has lost: it writes something else there, in the same epoch.
    pub(super) fn lose(&mut self, end: Offset) {
        drop(self.batches.split_off(&(end, LeaderEpoch(0))));
    }

    /// The batch that an epoch wrote at an offset.
    pub(super) fn at(&self, base: Offset, epoch: LeaderEpoch) -> Option<Entry> {
        self.batches.get(&(base, epoch)).copied()
    }

    /// Takes a range, written in these epochs, for committed. It must be whole batches, and each of a producer's must follow its last.
    pub(super) fn commit(&mut self, epochs: &EpochHistory, range: Range<Offset>) -> Result<(), Wrong> {
        let mut next = range.start;
        while next < range.end {
            let batch = epochs.at(next).and_then(|epoch| self.at(next, epoch)).filter(|batch| batch.end <= range.end);
            let Some(batch) = batch else {
                return Err(format!("commits {range:?} in epochs {epochs:?}, and no batch of these is at {next}"));
            };
            if let Some((id, epoch, sequence)) = batch.producer {
                let count = i32::try_from(batch.end.as_i64() - next.as_i64()).unwrap();
                // What follows the largest is 0, and this is far from it.
                let known = self.producers.get(&id).copied();
                let expected = known.filter(|known| known.epoch == epoch).map_or(0, |known| known.next);
                if sequence != expected || known.is_some_and(|known| known.epoch > epoch) {
                    return Err(format!(
                        "commits number {sequence} of producer {id} in its epoch {epoch} at {next}, and {expected} is next after {known:?}"
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
