//! Partition queues of one topic, and the choice of the queue for a record.

use std::sync::{
    Arc,
    atomic::{AtomicU32, AtomicUsize, Ordering},
};

use super::{
    super::error::SendError,
    NewRecord, index,
    partition_queue::PartitionQueue,
    partitioner::{PartitionChoice, Partitioner},
};
use crate::{limits, task::random};

/// Partition queues of one topic.
#[derive(Debug)]
pub(super) struct TopicQueues {
    pub(super) queues: Vec<Arc<PartitionQueue>>,
    /// Partition that currently receives the records with [`PartitionChoice::Sticky`].
    sticky: AtomicU32,
    /// Bytes of records that the sticky partition received since it was chosen.
    sticky_bytes: AtomicUsize,
    /// Maximum batch size of the topic in bytes.
    pub(super) max_message_bytes: usize,
}

impl TopicQueues {
    pub(super) fn new(queues: Vec<Arc<PartitionQueue>>, max_message_bytes: usize) -> Self {
        let sticky = random::in_range(0..u32::try_from(queues.len().max(1)).expect("partitions are few"));
        Self { queues, sticky: AtomicU32::new(sticky), sticky_bytes: AtomicUsize::new(0), max_message_bytes }
    }

    /// Rejects a batch or record of this size if it exceeds the maximum batch size.
    pub(super) fn check_size(&self, topic: &str, bytes: usize) -> Result<(), SendError> {
        let limit = self.max_message_bytes.min(limits::MAX_BATCH_BYTES);
        if bytes > limit {
            return Err(SendError::TooLarge { topic: topic.to_owned(), bytes, limit });
        }
        Ok(())
    }

    pub(super) fn queue(&self, partition: u32) -> &Arc<PartitionQueue> {
        &self.queues[index(partition)]
    }

    /// Returns the queue for a record, and true if it is that of the sticky partition.
    pub(super) fn choose(&self, record: &NewRecord<'_>, partitioner: &dyn Partitioner) -> (&Arc<PartitionQueue>, bool) {
        if let Some(partition) = record.partition {
            return (self.queue(partition), false);
        }
        let partitions = u32::try_from(self.queues.len()).expect("partitions are few");
        match partitioner.choose(record.key, record.value, partitions) {
            PartitionChoice::Partition(partition) => (self.queue(partition % partitions), false),
            PartitionChoice::Sticky => (self.queue(self.sticky.load(Ordering::Relaxed)), true),
        }
    }

    /// Counts a record that was appended to the sticky partition. Selects another partition if the append `sealed` a
    /// batch, or after `batch_bytes` of records: without a linger, a batch may never be full (KIP-794).
    pub(super) fn count_sticky(&self, partition: u32, bytes: usize, sealed: bool, batch_bytes: usize) {
        let sticky_bytes = self.sticky_bytes.fetch_add(bytes, Ordering::Relaxed).saturating_add(bytes);
        if sealed || sticky_bytes >= batch_bytes {
            self.sticky_bytes.store(0, Ordering::Relaxed);
            self.change_sticky(partition);
        }
    }

    /// Selects another sticky partition at random, if `from` still is the sticky partition.
    fn change_sticky(&self, from: u32) {
        let partitions = u32::try_from(self.queues.len()).expect("partitions are few");
        if partitions > 1 {
            let next = (from + random::in_range(1..partitions)) % partitions;
            // If several senders counted up to the limit, only the first one changes the partition.
            let _ = self.sticky.compare_exchange(from, next, Ordering::Relaxed, Ordering::Relaxed);
        }
    }
}
