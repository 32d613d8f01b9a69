//! Batches that cannot be decoded, listed so that no batch is decompressed again and again. A batch with a single
//! record that cannot be decoded counts as undecodable.

use std::collections::VecDeque;

use parking_lot::Mutex;

use crate::{
    model::{Offset, PartitionId},
    record::{Batch, MalformedBatch},
};

/// Maximum number of batches in the list. The oldest is dropped first.
const MAX_REMEMBERED_BATCHES: usize = 256;

/// Identity of a batch. Offsets are unique in a partition, and the checksum tells a truncated batch from a later one at
/// its offset.
type BatchName = (PartitionId, Offset, u32);

/// The batches, with the error of each.
#[derive(Debug, Default)]
pub(super) struct UndecodableBatches(Mutex<VecDeque<(BatchName, MalformedBatch)>>);

impl UndecodableBatches {
    /// Returns the error of a batch that is in the list.
    pub(super) fn find(&self, id: PartitionId, batch: &Batch) -> Option<MalformedBatch> {
        let name = name(id, batch);
        self.0.lock().iter().find(|(known, _)| *known == name).map(|(_, error)| error.clone())
    }

    pub(super) fn remember(&self, id: PartitionId, batch: &Batch, error: MalformedBatch) {
        let mut batches = self.0.lock();
        if batches.len() >= MAX_REMEMBERED_BATCHES {
            batches.pop_front();
        }
        batches.push_back((name(id, batch), error));
    }
}

fn name(id: PartitionId, batch: &Batch) -> BatchName {
    (id, batch.base_offset(), batch.crc())
}
