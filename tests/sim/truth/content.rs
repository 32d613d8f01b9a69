//! What was appended to a partition, batch by batch, whoever holds it.

use std::{collections::BTreeMap, ops::Range};

use strandline::{
    log::EpochHistory,
    model::{LeaderEpoch, Offset},
};

use super::Wrong;

/// A producer's id, its epoch, and the sequence number of the first record.
type Stamp = (i64, i16, i32);

/// One batch, without its place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Written {
    pub(super) end: Offset,
    /// Of what no replica changes.
    pub(super) crc: u32,
    pub(super) producer: Option<Stamp>,
}

/// Every batch by its first offset and its epoch: one epoch has one appender, so these name one batch.
#[derive(Default)]
pub(super) struct Content {
    batches: BTreeMap<(Offset, LeaderEpoch), Written>,
    /// Each producer with what is committed of it: its epoch, and the sequence number to come.
    producers: BTreeMap<i64, (i16, i32)>,
}

impl Content {
    /// A replica has it now: the same as every other that has a batch of this epoch there.
    pub(super) fn appended(&mut self, base: Offset, epoch: LeaderEpoch, batch: Written) -> Result<(), Wrong> {
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
    pub(super) fn at(&self, base: Offset, epoch: LeaderEpoch) -> Option<Written> {
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
                let known = self.producers.insert(id, (epoch, sequence + count));
                let expected = known.filter(|(before, _)| *before == epoch).map_or(0, |(_, next)| next);
                if sequence != expected || known.is_some_and(|(before, _)| before > epoch) {
                    return Err(format!(
                        "commits number {sequence} of producer {id} in its epoch {epoch} at {next}, and {expected} is next after {known:?}"
                    ));
                }
            }
            next = batch.end;
        }
        Ok(())
    }
}
