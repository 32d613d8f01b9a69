//! Batches that cannot be decoded, remembered so that nobody decompresses one again and again. One with a single record that cannot be
//! decoded counts as a whole.

use std::{
    collections::VecDeque,
    sync::{Mutex, MutexGuard, PoisonError},
};

use crate::{
    model::{Offset, PartitionId},
    record::{Batch, Malformed},
};

/// Most batches that are remembered. The oldest is forgotten first.
const REMEMBERED: usize = 256;

/// Offsets are unique in a partition, and the checksum tells what was cut from what took its place.
type BatchName = (PartitionId, Offset, u32);

/// The batches, with what is wrong with each.
#[derive(Debug, Default)]
pub(super) struct UndecodableBatches(Mutex<VecDeque<(BatchName, Malformed)>>);

impl UndecodableBatches {
    fn lock(&self) -> MutexGuard<'_, VecDeque<(BatchName, Malformed)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The error that was met in a batch, where one is remembered.
    pub(super) fn find(&self, id: PartitionId, batch: &Batch) -> Option<Malformed> {
        let name = name(id, batch);
        self.lock().iter().find(|(known, _)| *known == name).map(|(_, error)| error.clone())
    }

    pub(super) fn remember(&self, id: PartitionId, batch: &Batch, error: Malformed) {
        let mut batches = self.lock();
        if batches.len() >= REMEMBERED {
            batches.pop_front();
        }
        batches.push_back((name(id, batch), error));
    }
}

fn name(id: PartitionId, batch: &Batch) -> BatchName {
    (id, batch.base_offset(), batch.crc())
}
