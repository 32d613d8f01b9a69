//! A response that is being built from the outcomes of reads.

use std::collections::BTreeMap;

use super::FetchPartitionState;
use crate::{partition::FetchedBatches, proto::v1};

/// A response being built.
#[derive(Default)]
pub(super) struct FetchResponseBuilder {
    pub(super) partitions: Vec<v1::FetchedPartition>,
    /// Index in the session of each of `partitions`; `None` for rejected partitions.
    pub(super) session_indexes: Vec<Option<usize>>,
    /// Index in `partitions` of each entry that belongs to the session, by index in the session.
    pub(super) entries: BTreeMap<usize, usize>,
    /// Bytes of the batches in `partitions`.
    pub(super) bytes: usize,
    /// True if an entry contains the error of a rejected partition or of a failed read.
    pub(super) failed: bool,
    /// True if the response takes no more records. Either the next read outcome does not fit or is an error for the
    /// next response, or there is no memory for more.
    pub(super) full: bool,
}

impl FetchResponseBuilder {
    /// Adds the records of a read to the entry of a partition.
    pub(super) fn add(&mut self, index: usize, state: &FetchPartitionState, fetched: FetchedBatches) {
        self.bytes += fetched.bytes;
        self.entry(index, state).chunks.extend(fetched.chunks);
    }

    /// Returns the entry of a partition in the response, and adds it if there is none. Updates the watermarks, next
    /// offset, role and leader epoch of the entry.
    pub(super) fn entry(&mut self, index: usize, state: &FetchPartitionState) -> &mut v1::FetchedPartition {
        let entry_index = *self.entries.entry(index).or_insert_with(|| {
            let (topic, partition) = (state.topic.clone(), state.partition);
            self.partitions.push(v1::FetchedPartition { topic, partition, ..Default::default() });
            self.session_indexes.push(Some(index));
            self.partitions.len() - 1
        });
        let (status, watermarks) = (state.replica.status(), state.replica.watermarks());
        let entry = &mut self.partitions[entry_index];
        entry.log_start = watermarks.log_start.as_i64();
        entry.high_watermark = watermarks.high_watermark.as_i64();
        entry.next_offset = state.position.as_i64();
        entry.from_follower = !status.role.leads();
        entry.leader_epoch = status.epoch.as_i32();
        entry
    }

    /// Returns true if the response has records of the partition with this index in the session.
    pub(super) fn has_records(&self, index: usize) -> bool {
        self.entries.get(&index).is_some_and(|entry_index| !self.partitions[*entry_index].chunks.is_empty())
    }

    /// Adds the entry of a rejected partition, which is not in the session.
    pub(super) fn add_refused(&mut self, refused: v1::FetchedPartition) {
        self.partitions.push(refused);
        self.session_indexes.push(None);
    }

    /// Returns true if the response must not wait for more records: it has `min_bytes` or an error, or is full.
    pub(super) fn is_enough(&self, min_bytes: usize) -> bool {
        self.failed || self.full || self.bytes >= min_bytes
    }
}
