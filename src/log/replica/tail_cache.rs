//! The tail cache: the newest batches of every partition in memory, within one budget of bytes. Batches are evicted in
//! the order of their appends, regardless of the partition. Followers, and consumers at the log end, read from here
//! without a disk access.

use std::{
    collections::VecDeque,
    sync::{
        Arc, Weak,
        atomic::{AtomicUsize, Ordering},
    },
};

use bytes::Bytes;

use super::ReadBatches;
use crate::{
    model::Offset,
    record::{Batch, HEADER_BYTES},
    task::lock::Mutex,
};

/// Size in bytes below which a batch is copied, so that the cached batch does not keep its larger receive buffer in
/// memory. The header and the records share one allocation: small allocations that outlive adjacent ones keep the
/// allocator from freeing its pages.
const COPY_BELOW_BYTES: usize = 16 << 10;

/// Memory of one batch besides its bytes and its queue entry: the shared headers of its two buffers, and its entry in
/// the eviction order.
const BATCH_OVERHEAD_BYTES: usize = 2 * 48 + 2 * size_of::<(Weak<ReplicaTail>, u64)>();

/// Minimum number of groups in the eviction order at which removed groups are purged.
const MIN_PURGE_GROUPS: usize = 1024;

/// Memory budget and eviction order of the cached batches of all partitions.
pub(in crate::log) struct TailCache {
    budget: usize,
    used: AtomicUsize,
    order: Mutex<EvictionQueue>,
}

/// Groups of batches in the order of their appends. The batches of one append form a group. After its partition has
/// removed a group, the group stays here until it is the oldest or until the next purge.
#[derive(Default)]
struct EvictionQueue {
    /// Partition and number of each group.
    groups: VecDeque<(Weak<ReplicaTail>, u64)>,
    /// Number of groups after the last purge.
    purged_len: usize,
}

impl EvictionQueue {
    /// Adds a group. Purges the removed groups when their number may have reached half of all.
    fn push(&mut self, partition: &Arc<ReplicaTail>, group: u64) {
        self.groups.push_back((Arc::downgrade(partition), group));
        if self.groups.len() >= MIN_PURGE_GROUPS.max(self.purged_len * 2) {
            let is_cached =
                |tail: &ReplicaTail, group| tail.0.lock().batches.front().is_some_and(|oldest| oldest.group <= group);
            self.groups.retain(|(partition, group)| partition.upgrade().is_some_and(|tail| is_cached(&tail, *group)));
            self.purged_len = self.groups.len();
        }
    }
}

/// Batches of one partition: contiguous, the last one ending at the log end.
#[derive(Default)]
pub(super) struct ReplicaTail(Mutex<TailBatches>);

#[derive(Default)]
struct TailBatches {
    /// Batches, oldest first.
    batches: VecDeque<CachedBatch>,
    /// Number of the next group.
    next_group: u64,
}

struct CachedBatch {
    /// Number of the append in its partition.
    group: u64,
    base: Offset,
    end: Offset,
    header: Bytes,
    records: Bytes,
}

impl CachedBatch {
    /// Returns the memory of the batch, without its queue entry.
    fn cost(&self) -> usize {
        self.header.len() + self.records.len() + BATCH_OVERHEAD_BYTES
    }
}

/// Returns the header bytes of a batch, and the batch to cache. A small batch is copied, so that it keeps no receive
/// buffer in memory.
fn detach_from_buffer(batch: &Batch) -> (Bytes, Batch) {
    let mut batch = batch.clone();
    let header = if batch.encoded_len() < COPY_BELOW_BYTES {
        batch.detach().slice(..HEADER_BYTES)
    } else {
        Bytes::copy_from_slice(batch.header())
    };
    (header, batch)
}

impl TailBatches {
    /// Returns the memory of the entries in the deque of batches, used or not.
    fn entry_bytes(&self) -> usize {
        self.batches.capacity() * size_of::<CachedBatch>()
    }

    /// Frees most of the unused entries of the deque, if more than three quarters of all entries are unused.
    fn shrink(&mut self) {
        if self.batches.len() < self.batches.capacity() / 4 {
            self.batches.shrink_to(self.batches.len() * 2);
        }
    }
}

impl ReplicaTail {
    /// Returns the batches of `from..bound`: up to `max_bytes` bytes, and at least one batch. The result is empty if
    /// the first batch ends above `bound`. Returns `None` if the first batch is not cached.
    pub(super) fn read(&self, from: Offset, bound: Offset, max_bytes: usize) -> Option<ReadBatches> {
        let tail = self.0.lock();
        let first = tail.batches.partition_point(|cached| cached.end <= from);
        if tail.batches.get(first)?.base > from {
            return None;
        }
        let mut read = ReadBatches::empty(from);
        for cached in tail.batches.range(first..) {
            let bytes = HEADER_BYTES + cached.records.len();
            if cached.end > bound || (read.bytes > 0 && read.bytes + bytes > max_bytes) {
                break;
            }
            read.chunks.push(cached.header.clone());
            read.chunks.push(cached.records.clone());
            read.bytes += bytes;
            read.next = cached.end;
        }
        Some(read)
    }
}

impl TailCache {
    pub(super) fn new(budget: usize) -> Self {
        Self { budget, used: AtomicUsize::new(0), order: Mutex::default() }
    }

    /// Returns the cached bytes, with the memory that caching them costs.
    pub(super) fn used(&self) -> usize {
        self.used.load(Ordering::Relaxed)
    }

    /// Adds the batches of one append, and evicts the oldest groups above the budget. Returns the batches as they are
    /// cached: their records share the memory of the tail cache.
    pub(super) fn push(&self, partition: &Arc<ReplicaTail>, batches: &[Batch]) -> Vec<Batch> {
        let detached: Vec<(Bytes, Batch)> = batches.iter().map(detach_from_buffer).collect();
        let mut added = 0;
        let group = {
            let mut tail = partition.0.lock();
            let (group, entry_bytes) = (tail.next_group, tail.entry_bytes());
            tail.next_group += 1;
            for (header, batch) in &detached {
                let cached = CachedBatch {
                    group,
                    base: batch.base_offset(),
                    end: batch.end_offset(),
                    header: header.clone(),
                    records: batch.records_bytes().clone(),
                };
                added += cached.cost();
                tail.batches.push_back(cached);
            }
            added += tail.entry_bytes() - entry_bytes;
            group
        };
        self.order.lock().push(partition, group);
        self.used.fetch_add(added, Ordering::Relaxed);
        self.shrink();
        detached.into_iter().map(|(_, batch)| batch).collect()
    }

    /// Evicts the oldest groups of all partitions until the cache is within its budget.
    fn shrink(&self) {
        while self.used() > self.budget {
            let oldest = self.order.lock().groups.pop_front();
            let Some((partition, group)) = oldest else { return };
            let Some(partition) = partition.upgrade() else { continue };
            self.drop_while(&partition, |batches| match batches.front() {
                Some(cached) if cached.group <= group => batches.pop_front(),
                _ => None,
            });
        }
    }

    /// Removes the batches that end above `to`.
    pub(super) fn truncate(&self, partition: &ReplicaTail, to: Offset) {
        self.drop_while(partition, |batches| match batches.back() {
            Some(cached) if cached.end > to => batches.pop_back(),
            _ => None,
        });
    }

    /// Removes the batches that end at or below `below`.
    pub(super) fn evict_below(&self, partition: &ReplicaTail, below: Offset) {
        self.drop_while(partition, |batches| match batches.front() {
            Some(cached) if cached.end <= below => batches.pop_front(),
            _ => None,
        });
    }

    /// Drops the batches that `take` removes from the queue of a partition, until it returns `None`. Updates the memory
    /// in use.
    fn drop_while(
        &self,
        partition: &ReplicaTail,
        mut take: impl FnMut(&mut VecDeque<CachedBatch>) -> Option<CachedBatch>,
    ) {
        let mut tail = partition.0.lock();
        let (entry_bytes, mut freed) = (tail.entry_bytes(), 0);
        while let Some(cached) = take(&mut tail.batches) {
            freed += cached.cost();
        }
        tail.shrink();
        freed += entry_bytes - tail.entry_bytes();
        self.used.fetch_sub(freed, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::BatchBuilder;

    fn batch(offset: u64) -> Batch {
        let mut builder = BatchBuilder::new(crate::model::Compression::None);
        builder.push(0, None, Some(b"x"), &[]).unwrap();
        let mut batch = builder.finish(None).unwrap();
        batch.set_offset_and_epoch(Offset::new(offset).unwrap(), crate::model::LeaderEpoch(0));
        batch
    }

    /// Regression, found by review: 16 bytes per append were never freed if segments were evicted before the budget was
    /// reached.
    #[test]
    fn removed_batches_leave_the_eviction_order() {
        let tail = TailCache::new(1 << 20);
        let (idle, busy) = (Arc::<ReplicaTail>::default(), Arc::<ReplicaTail>::default());
        // This partition has one batch. It is the oldest of the cache and is never evicted.
        tail.push(&idle, &[batch(0)]);
        for offset in 0..20_000 {
            tail.push(&busy, &[batch(offset)]);
            tail.evict_below(&busy, Offset::new(offset).unwrap());
        }
        assert!(tail.order.lock().groups.len() <= MIN_PURGE_GROUPS, "{} groups", tail.order.lock().groups.len());
        assert!(idle.read(Offset::ZERO, Offset::new(1).unwrap(), 1 << 20).is_some());
        drop(busy);
        for offset in 1..=2000 {
            tail.push(&idle, &[batch(offset)]);
        }
        assert!(
            tail.used() <= 1 << 20 && tail.order.lock().groups.len() <= 2 * 2001,
            "{} groups",
            tail.order.lock().groups.len()
        );
    }

    /// Regression: a partition that had many cached batches kept their deque
    /// entries after the eviction, outside of the budget.
    #[test]
    fn queue_entries_are_counted_and_freed() {
        let tail = TailCache::new(1 << 20);
        let partitions: Vec<Arc<ReplicaTail>> = (0..20).map(|_| Arc::default()).collect();
        let entry_bytes = || partitions.iter().map(|partition| partition.0.lock().entry_bytes()).sum::<usize>();
        for busy in 0..partitions.len() {
            // Each idle partition keeps some batches, so that none is ever empty.
            for offset in 0..5_000 {
                tail.push(&partitions[busy], &[batch(offset)]);
                if offset % 50 == 0 {
                    let idle = partitions.iter().enumerate().filter(|(number, _)| *number != busy);
                    for (_, partition) in idle {
                        tail.push(partition, &[batch(10_000 + offset)]);
                    }
                }
            }
            assert!(tail.used() <= 1 << 20 && entry_bytes() < tail.used(), "{} of {}", entry_bytes(), tail.used());
        }
        partitions.iter().for_each(|partition| tail.truncate(partition, Offset::ZERO));
        assert_eq!((tail.used(), entry_bytes()), (0, 0));
    }
}
