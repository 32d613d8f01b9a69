//! Queue of one partition, shared by the senders and the producer's task. Senders append to the open batch; the task
//! takes sealed batches.

use std::{
    collections::VecDeque,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tokio::time::Instant;

use super::{
    super::error::SendError,
    NewRecord,
    completion::{Completion, Delivery},
};
use crate::{
    model::Compression,
    record::{Batch, BatchBuilder, BuildError, ProducerSequence},
    task::{clock, lock::Mutex},
};

/// Content of a batch until its first send.
#[derive(Debug)]
pub(super) enum BatchBody {
    /// Records without compression. The task builds the batch with its sequence, so that the CRC is computed once.
    Built(BatchBuilder),
    /// Complete batch, compressed on the thread that called `send`, or supplied by the user.
    Complete(Batch),
}

impl BatchBody {
    /// Returns the batch with this producer and sequence; `sequence` is `None` without idempotence.
    pub(super) fn into_batch(self, sequence: Option<ProducerSequence>) -> Result<Batch, BuildError> {
        match self {
            Self::Built(builder) => builder.finish(sequence),
            Self::Complete(mut batch) => {
                if sequence != batch.producer() {
                    batch.set_producer(sequence);
                }
                Ok(batch)
            }
        }
    }
}

/// Batch that accepts no more records.
#[derive(Debug)]
pub(super) struct SealedBatch {
    pub(super) body: BatchBody,
    pub(super) count: u32,
    pub(super) completion: Arc<Completion>,
    /// Bytes of the producer's memory that the batch holds.
    pub(super) permits: u32,
    /// End of the delivery timeout.
    pub(super) deadline: Instant,
}

/// Batch that accepts records.
#[derive(Debug)]
struct OpenBatch {
    builder: BatchBuilder,
    completion: Arc<Completion>,
    /// Bytes of the producer's memory that the batch holds.
    permits: u32,
    /// Time of the first record, from which linger and delivery timeout count.
    since: Instant,
}

/// Batches of a queue that the task has not taken yet.
#[derive(Debug, Default)]
struct QueueIntake {
    open: Option<OpenBatch>,
    sealed: VecDeque<SealedBatch>,
    /// Bytes of the last sealed batch, before compression. The next batch starts with this capacity, so that small
    /// batches stay small in memory.
    initial_capacity: usize,
    /// Error for new records; `None` until the queue is closed.
    closed: Option<SendError>,
}

/// Limits of a batch.
#[derive(Clone, Copy, Debug)]
pub(super) struct BatchLimits {
    /// Size in bytes at which a batch is sealed. A record that would exceed it starts the next batch.
    pub(super) batch_bytes: usize,
    pub(super) linger: Duration,
    pub(super) compression: Compression,
    pub(super) delivery_timeout: Duration,
}

/// Result of appending a record.
pub(super) struct EnqueueResult {
    pub(super) delivery: Delivery,
    /// True if the task must process the queue.
    pub(super) notify_task: bool,
    /// True if a batch was sealed: the sticky partition then changes.
    pub(super) sealed: bool,
}

/// Queue of one partition.
#[derive(Debug)]
pub(super) struct PartitionQueue {
    pub(super) topic: Arc<str>,
    pub(super) partition: u32,
    /// Index of the queue in the task's list.
    pub(super) index: usize,
    limits: BatchLimits,
    intake: Mutex<QueueIntake>,
    /// True from a notification of the task until the task processes the queue.
    queued: AtomicBool,
}

impl PartitionQueue {
    pub(super) fn new(topic: Arc<str>, partition: u32, index: usize, limits: BatchLimits) -> Self {
        Self { topic, partition, index, limits, intake: Mutex::default(), queued: AtomicBool::new(false) }
    }

    /// Marks the queue as queued for the task. Returns true if the caller must notify the task.
    pub(super) fn mark_queued(&self) -> bool {
        !self.queued.swap(true, Ordering::AcqRel)
    }

    /// Removes the mark of [`PartitionQueue::mark_queued`]. The task calls this before it processes the queue, so that
    /// an append meanwhile notifies the task again.
    pub(super) fn clear_queued(&self) {
        self.queued.store(false, Ordering::Release);
    }

    /// Appends a record to the open batch. The record holds `permits` bytes of the producer's memory and takes at most
    /// `bytes` bytes of a batch. If the batch would exceed `batch_bytes` with the record, it is sealed first and the
    /// record starts the next batch. A batch that reaches `batch_bytes` is sealed at once.
    pub(super) fn append(
        &self,
        record: &NewRecord<'_>,
        bytes: usize,
        permits: u32,
    ) -> Result<EnqueueResult, SendError> {
        let timestamp_ms = record.timestamp_ms.unwrap_or_else(clock::wall_ms);
        let mut intake = self.intake.lock();
        if let Some(error) = &intake.closed {
            return Err(error.clone());
        }
        let mut sealed = false;
        if intake.open.as_ref().is_some_and(|open| open.builder.encoded_len() + bytes > self.limits.batch_bytes) {
            self.seal(&mut intake)?;
            sealed = true;
        }
        let is_new_batch = intake.open.is_none();
        if is_new_batch {
            intake.open = Some(OpenBatch {
                builder: BatchBuilder::with_capacity(self.limits.compression, intake.initial_capacity),
                completion: Arc::default(),
                permits: 0,
                since: clock::monotonic(),
            });
        }
        let open = intake.open.as_mut().expect("opened above");
        let index = open.builder.count();
        if let Err(error) = open.builder.push(timestamp_ms, record.key, record.value, record.headers) {
            if is_new_batch {
                intake.open = None;
            }
            return Err(error.into());
        }
        open.permits += permits;
        let delivery = Delivery::new(open.completion.clone(), index);
        if open.builder.encoded_len() >= self.limits.batch_bytes {
            self.seal(&mut intake)?;
            sealed = true;
        }
        Ok(EnqueueResult { delivery, notify_task: is_new_batch || sealed, sealed })
    }

    /// Seals the open batch and queues a complete batch after it.
    pub(super) fn append_batch(&self, batch: Batch, permits: u32) -> Result<Delivery, SendError> {
        let mut intake = self.intake.lock();
        if let Some(error) = &intake.closed {
            return Err(error.clone());
        }
        self.seal(&mut intake)?;
        let completion: Arc<Completion> = Arc::default();
        let delivery = Delivery::new(completion.clone(), 0);
        let deadline = clock::monotonic() + self.limits.delivery_timeout;
        let count = batch.count();
        intake.sealed.push_back(SealedBatch { body: BatchBody::Complete(batch), count, completion, permits, deadline });
        Ok(delivery)
    }

    /// Moves the open batch to the sealed batches, compressed if the options require it. If that fails, the records of
    /// the batch fail, and the error is returned as well.
    fn seal(&self, intake: &mut QueueIntake) -> Result<(), SendError> {
        let Some(open) = intake.open.take() else { return Ok(()) };
        let count = open.builder.count();
        intake.initial_capacity = open.builder.encoded_len();
        // The sender's thread compresses, so that several senders compress in parallel.
        let body = match self.limits.compression {
            Compression::None => BatchBody::Built(open.builder),
            _ => match open.builder.finish(None) {
                Ok(batch) => BatchBody::Complete(batch),
                Err(error) => {
                    open.completion.complete(Err(error.clone().into()));
                    return Err(error.into());
                }
            },
        };
        let deadline = open.since + self.limits.delivery_timeout;
        intake.sealed.push_back(SealedBatch {
            body,
            count,
            completion: open.completion,
            permits: open.permits,
            deadline,
        });
        Ok(())
    }

    /// Seals the open batch regardless of its age. Does nothing without an open batch.
    pub(super) fn seal_now(&self) {
        // If sealing fails, the records of the batch have received the error.
        let _ = self.seal(&mut self.intake.lock());
    }

    /// Removes and returns the next batch to send: the oldest sealed batch, or the open batch, sealed, if its linger is
    /// over. Without such a batch, returns the end of the open batch's linger, or that the queue is empty.
    pub(super) fn take(&self, now: Instant) -> DequeueResult {
        let mut intake = self.intake.lock();
        if intake.sealed.is_empty() {
            match &intake.open {
                None => return DequeueResult::Empty,
                Some(open) if open.since + self.limits.linger > now => {
                    return DequeueResult::Later(open.since + self.limits.linger);
                }
                Some(_) => {
                    let _ = self.seal(&mut intake);
                }
            }
        }
        intake.sealed.pop_front().map_or(DequeueResult::Empty, DequeueResult::Batch)
    }

    /// Removes and returns the sealed batches whose delivery timeout has passed.
    pub(super) fn take_expired(&self, now: Instant) -> Vec<SealedBatch> {
        let mut intake = self.intake.lock();
        let mut expired = Vec::new();
        while intake.sealed.front().is_some_and(|sealed| sealed.deadline <= now) {
            expired.extend(intake.sealed.pop_front());
        }
        expired
    }

    /// Returns the time at which the oldest batch in the queue expires.
    pub(super) fn deadline(&self) -> Option<Instant> {
        let intake = self.intake.lock();
        let open = || intake.open.as_ref().map(|open| open.since + self.limits.delivery_timeout);
        intake.sealed.front().map(|sealed| sealed.deadline).or_else(open)
    }

    /// Returns the completions of all batches in the queue.
    pub(super) fn completions(&self) -> Vec<Arc<Completion>> {
        let intake = self.intake.lock();
        let open = intake.open.iter().map(|open| open.completion.clone());
        intake.sealed.iter().map(|sealed| sealed.completion.clone()).chain(open).collect()
    }

    /// Closes the queue for new records, which then fail with `error`. Removes and returns the batches in the queue.
    pub(super) fn close(&self, error: &SendError) -> Vec<SealedBatch> {
        let mut intake = self.intake.lock();
        intake.closed.get_or_insert_with(|| error.clone());
        let _ = self.seal(&mut intake);
        intake.sealed.drain(..).collect()
    }
}

/// Result of [`PartitionQueue::take`].
pub(super) enum DequeueResult {
    Batch(SealedBatch),
    /// The open batch lingers until this time.
    Later(Instant),
    /// No batch is ready and none is open.
    Empty,
}
