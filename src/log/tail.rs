//! The tail buffer: the last batches of every partition in memory, under one budget of bytes. What was appended first
//! goes first, whosever it is. Followers and tailing consumers read from here and never touch the disk.

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicUsize, Ordering},
    },
};

use bytes::{Bytes, BytesMut};

use super::reader::Read;
use crate::{
    model::Offset,
    record::{Batch, HEADER_BYTES},
};

/// A batch smaller than this is copied, so that it does not hold the larger buffer that it was received in.
const COPY_BELOW: usize = 16 << 10;

/// What one batch costs beside its bytes.
const OVERHEAD: usize = 160;

/// The budget, and the order in which batches go.
pub(super) struct Tail {
    budget: usize,
    used: AtomicUsize,
    order: Mutex<VecDeque<(Weak<PartitionTail>, u64)>>,
}

/// One partition's batches: contiguous, and its last ends at the log end.
#[derive(Default)]
pub(super) struct PartitionTail(Mutex<Batches>);

#[derive(Default)]
struct Batches {
    batches: VecDeque<Kept>,
    /// Number of the group to come: batches of one append share one.
    group: u64,
}

struct Kept {
    group: u64,
    base: Offset,
    end: Offset,
    head: Bytes,
    records: Bytes,
}

impl Kept {
    fn cost(&self) -> usize {
        self.head.len() + self.records.len() + OVERHEAD
    }
}

impl PartitionTail {
    fn lock(&self) -> MutexGuard<'_, Batches> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The batches of `from..bound`, or `None` when the first is not here.
    pub(super) fn read(&self, from: Offset, bound: Offset, max_bytes: usize) -> Option<Read> {
        let held = self.lock();
        let first = held.batches.partition_point(|kept| kept.end <= from);
        if held.batches.get(first)?.base > from {
            return None;
        }
        let mut read = Read::empty(from);
        for kept in held.batches.range(first..) {
            let bytes = HEADER_BYTES + kept.records.len();
            if kept.end > bound || (read.bytes > 0 && read.bytes + bytes > max_bytes) {
                break;
            }
            read.chunks.push(kept.head.clone());
            read.chunks.push(kept.records.clone());
            read.bytes += bytes;
            read.next = kept.end;
        }
        Some(read)
    }
}

impl Tail {
    pub(super) fn new(budget: usize) -> Self {
        Self { budget, used: AtomicUsize::new(0), order: Mutex::new(VecDeque::new()) }
    }

    /// Bytes held, with what holding them costs.
    pub(super) fn used(&self) -> usize {
        self.used.load(Ordering::Relaxed)
    }

    /// A batch as it should be kept: small ones in memory of their own.
    pub(super) fn own(batch: &Batch) -> Batch {
        let mut batch = batch.clone();
        if batch.encoded_len() < COPY_BELOW {
            batch.detach();
        }
        batch
    }

    pub(super) fn push(&self, partition: &Arc<PartitionTail>, batches: &[Batch]) {
        let mut heads = BytesMut::with_capacity(batches.len() * HEADER_BYTES);
        for batch in batches {
            heads.extend_from_slice(batch.head());
        }
        let mut heads = heads.freeze();
        let mut added = 0;
        let group = {
            let mut held = partition.lock();
            let group = held.group;
            held.group += 1;
            for batch in batches {
                let kept = Kept {
                    group,
                    base: batch.base_offset(),
                    end: batch.end_offset(),
                    head: heads.split_to(HEADER_BYTES),
                    records: batch.records_bytes().clone(),
                };
                added += kept.cost();
                held.batches.push_back(kept);
            }
            group
        };
        self.order.lock().unwrap_or_else(PoisonError::into_inner).push_back((Arc::downgrade(partition), group));
        self.used.fetch_add(added, Ordering::Relaxed);
        self.shrink();
    }

    fn shrink(&self) {
        while self.used() > self.budget {
            let oldest = self.order.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
            let Some((partition, group)) = oldest else { return };
            let Some(partition) = partition.upgrade() else { continue };
            self.drop_while(&partition, |batches| match batches.front() {
                Some(kept) if kept.group <= group => batches.pop_front(),
                _ => None,
            });
        }
    }

    /// Forgets what ends after `to`.
    pub(super) fn truncate(&self, partition: &PartitionTail, to: Offset) {
        self.drop_while(partition, |batches| match batches.back() {
            Some(kept) if kept.end > to => batches.pop_back(),
            _ => None,
        });
    }

    /// Forgets what ends at or below `below`.
    pub(super) fn forget_below(&self, partition: &PartitionTail, below: Offset) {
        self.drop_while(partition, |batches| match batches.front() {
            Some(kept) if kept.end <= below => batches.pop_front(),
            _ => None,
        });
    }

    fn drop_while(&self, partition: &PartitionTail, mut take: impl FnMut(&mut VecDeque<Kept>) -> Option<Kept>) {
        let mut held = partition.lock();
        let mut freed = 0;
        while let Some(kept) = take(&mut held.batches) {
            freed += kept.cost();
        }
        if held.batches.is_empty() {
            held.batches = VecDeque::new();
        }
        self.used.fetch_sub(freed, Ordering::Relaxed);
    }
}
