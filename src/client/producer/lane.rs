//! A lane: what senders share with the producer's task for one partition. Senders append to the open batch; the task
//! takes sealed ones.

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tokio::time::Instant;

use super::{
    super::{error::SendError, lock::lock},
    NewRecord,
    completion::{Completion, Delivery},
};
use crate::{
    model::Compression,
    record::{Batch, BatchBuilder, ProducerStamp, Unbuildable},
    task::clock,
};

/// What a batch is made of until it is first sent.
#[derive(Debug)]
pub(super) enum Body {
    /// Records that need no compression: the task finishes it with its sequence, so that the CRC is computed once.
    Built(BatchBuilder),
    /// A whole batch: compressed by a sender's thread, or handed over by the user.
    Whole(Batch),
}

impl Body {
    pub(super) fn stamped(self, stamp: Option<ProducerStamp>) -> Result<Batch, Unbuildable> {
        match self {
            Self::Built(builder) => builder.finish(stamp),
            Self::Whole(mut batch) => {
                if stamp != batch.producer() {
                    batch.set_producer(stamp);
                }
                Ok(batch)
            }
        }
    }
}

/// A batch that takes no more records.
#[derive(Debug)]
pub(super) struct Sealed {
    pub(super) body: Body,
    pub(super) count: u32,
    pub(super) completion: Arc<Completion>,
    /// Bytes of the producer's memory that it holds.
    pub(super) permits: u32,
    /// When its delivery timeout is over.
    pub(super) deadline: Instant,
}

#[derive(Debug)]
struct Open {
    builder: BatchBuilder,
    completion: Arc<Completion>,
    permits: u32,
    since: Instant,
}

#[derive(Debug, Default)]
struct Intake {
    open: Option<Open>,
    sealed: VecDeque<Sealed>,
    /// Bytes of the last batch: the next one starts with so much room, so that small batches stay small in memory.
    hint: usize,
    /// Why nothing more is taken.
    closed: Option<SendError>,
}

/// How batches are filled.
#[derive(Clone, Copy, Debug)]
pub(super) struct Filling {
    /// A batch is sealed when it would pass so many bytes.
    pub(super) batch_bytes: usize,
    pub(super) linger: Duration,
    pub(super) compression: Compression,
    pub(super) delivery_timeout: Duration,
}

/// What became of a record.
pub(super) struct Appended {
    pub(super) delivery: Delivery,
    /// The task must look at the lane.
    pub(super) wake: bool,
    /// A batch was sealed: a sticky partitioner goes on to another partition.
    pub(super) sealed: bool,
}

#[derive(Debug)]
pub(super) struct Lane {
    pub(super) topic: Arc<str>,
    pub(super) partition: u32,
    /// Its place in the task's list.
    pub(super) index: usize,
    filling: Filling,
    intake: Mutex<Intake>,
    /// Whether the task has been told to look.
    queued: AtomicBool,
}

impl Lane {
    pub(super) fn new(topic: Arc<str>, partition: u32, index: usize, filling: Filling) -> Self {
        Self { topic, partition, index, filling, intake: Mutex::default(), queued: AtomicBool::new(false) }
    }

    /// Whether the caller is the one who must tell the task.
    pub(super) fn mark_queued(&self) -> bool {
        !self.queued.swap(true, Ordering::AcqRel)
    }

    pub(super) fn clear_queued(&self) {
        self.queued.store(false, Ordering::Release);
    }

    /// Adds a record, which holds `permits` bytes of memory and takes at most `bytes` in a batch.
    pub(super) fn append(&self, record: &NewRecord<'_>, bytes: usize, permits: u32) -> Result<Appended, SendError> {
        let timestamp_ms = record.timestamp_ms.unwrap_or_else(clock::wall_ms);
        let mut intake = lock(&self.intake);
        if let Some(error) = &intake.closed {
            return Err(error.clone());
        }
        let mut sealed = false;
        if intake.open.as_ref().is_some_and(|open| open.builder.encoded_len() + bytes > self.filling.batch_bytes) {
            self.seal(&mut intake)?;
            sealed = true;
        }
        let opened = intake.open.is_none();
        if opened {
            intake.open = Some(Open {
                builder: BatchBuilder::with_capacity(self.filling.compression, intake.hint),
                completion: Arc::default(),
                permits: 0,
                since: clock::monotonic(),
            });
        }
        let open = intake.open.as_mut().expect("opened above");
        let index = open.builder.count();
        if let Err(error) = open.builder.push(timestamp_ms, record.key, record.value, record.headers) {
            if opened {
                intake.open = None;
            }
            return Err(error.into());
        }
        open.permits += permits;
        let delivery = Delivery::new(open.completion.clone(), index);
        if open.builder.encoded_len() >= self.filling.batch_bytes {
            self.seal(&mut intake)?;
            sealed = true;
        }
        Ok(Appended { delivery, wake: opened || sealed, sealed })
    }

    /// Queues a whole batch behind what is open.
    pub(super) fn append_batch(&self, batch: Batch, permits: u32) -> Result<Delivery, SendError> {
        let mut intake = lock(&self.intake);
        if let Some(error) = &intake.closed {
            return Err(error.clone());
        }
        self.seal(&mut intake)?;
        let completion: Arc<Completion> = Arc::default();
        let delivery = Delivery::new(completion.clone(), 0);
        let deadline = clock::monotonic() + self.filling.delivery_timeout;
        let count = batch.count();
        intake.sealed.push_back(Sealed { body: Body::Whole(batch), count, completion, permits, deadline });
        Ok(delivery)
    }

    fn seal(&self, intake: &mut Intake) -> Result<(), SendError> {
        let Some(open) = intake.open.take() else { return Ok(()) };
        let count = open.builder.count();
        intake.hint = open.builder.encoded_len();
        // Compression is paid by the sender, so that several senders compress side by side.
        let body = match self.filling.compression {
            Compression::None => Body::Built(open.builder),
            _ => match open.builder.finish(None) {
                Ok(batch) => Body::Whole(batch),
                Err(error) => {
                    open.completion.complete(Err(error.clone().into()));
                    return Err(error.into());
                }
            },
        };
        let deadline = open.since + self.filling.delivery_timeout;
        intake.sealed.push_back(Sealed { body, count, completion: open.completion, permits: open.permits, deadline });
        Ok(())
    }

    /// Seals what is open, whatever its age.
    pub(super) fn seal_now(&self) {
        // An error was already given to the batch's records.
        let _ = self.seal(&mut lock(&self.intake));
    }

    /// The next batch to send: a sealed one, else the open one if it has lingered long enough. Else when to ask again.
    pub(super) fn take(&self, now: Instant) -> Taken {
        let mut intake = lock(&self.intake);
        if intake.sealed.is_empty() {
            match &intake.open {
                None => return Taken::Nothing,
                Some(open) if open.since + self.filling.linger > now => {
                    return Taken::Later(open.since + self.filling.linger);
                }
                Some(_) => {
                    let _ = self.seal(&mut intake);
                }
            }
        }
        intake.sealed.pop_front().map_or(Taken::Nothing, Taken::Batch)
    }

    /// The batches that waited here past their delivery timeout.
    pub(super) fn take_expired(&self, now: Instant) -> Vec<Sealed> {
        let mut intake = lock(&self.intake);
        let mut expired = Vec::new();
        while intake.sealed.front().is_some_and(|sealed| sealed.deadline <= now) {
            expired.extend(intake.sealed.pop_front());
        }
        expired
    }

    /// When the oldest batch that waits here expires.
    pub(super) fn deadline(&self) -> Option<Instant> {
        let intake = lock(&self.intake);
        let open = || intake.open.as_ref().map(|open| open.since + self.filling.delivery_timeout);
        intake.sealed.front().map(|sealed| sealed.deadline).or_else(open)
    }

    /// The completions of all batches that wait here.
    pub(super) fn waiting(&self) -> Vec<Arc<Completion>> {
        let intake = lock(&self.intake);
        let open = intake.open.iter().map(|open| open.completion.clone());
        intake.sealed.iter().map(|sealed| sealed.completion.clone()).chain(open).collect()
    }

    /// Takes no more, and hands out what waited here.
    pub(super) fn close(&self, error: &SendError) -> Vec<Sealed> {
        let mut intake = lock(&self.intake);
        intake.closed.get_or_insert_with(|| error.clone());
        let _ = self.seal(&mut intake);
        intake.sealed.drain(..).collect()
    }
}

/// What [`Lane::take`] found.
pub(super) enum Taken {
    Batch(Sealed),
    Later(Instant),
    Nothing,
}
