//! Decompression of batches from untrusted clients. The uncompressed size of such a batch is known only after its
//! decompression. A large batch without compression that is only read takes the same permits, but no memory.
//!
//! # Overview
//!
//! Memory is taken from a common budget before a batch is decompressed. If each batch took memory for the worst case,
//! only one batch at a time could be decompressed. So a batch first takes memory for the size that it declares, or for
//! an estimate. If the records are larger, the batch releases that memory and takes four times as much. Most batches
//! are decompressed once. A decompression bomb costs less than 2.4 times the work of one decompression up to its limit.
//! It costs nothing if it declares a size above the limit.
//!
//! ```text
//! estimate ─ take ─► decompress within it ─► done
//!                             └ too small ─► release ─ take × 4 ─► … up to the limit: rejected
//! ```

use std::{collections::VecDeque, num::NonZero, sync::Arc, thread};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::memory_budget::{Charge, MemoryBudget};
use crate::{
    limits,
    model::{Compression, Offset, PartitionId},
    record::{Batch, MalformedBatch},
    task,
    task::lock::Mutex,
};

/// Maximum uncompressed size, in bytes, of records that the caller's thread decodes or compresses itself, because a
/// switch to another thread would take longer.
pub const INLINE_BYTES: usize = 64 << 10;

/// Maximum uncompressed size of a small batch. Small batches have their own memory and thread permits, so they do not
/// wait for larger batches.
const SMALL_BYTES: usize = 1 << 20;

/// Divisor that gives the share of small batches in the memory budget.
const SMALL_SHARE: u64 = 8;

/// Maximum number of batches in the list of undecodable batches. If the list is full, the oldest entry is dropped.
const MAX_UNDECODABLE_BATCHES: usize = 256;

/// Name of the setting that limits the memory, for error messages.
const SETTING: &str = "limits.decompression_memory_bytes";

/// Purpose of an opened batch, which determines its memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DecompressPurpose {
    /// The records are read and dropped. Each byte may need two bytes of memory, because a buffer that grows copies its
    /// old content to a larger one.
    Read,
    /// The records are written in another codec. Each byte may need a third byte of memory, because the result may be
    /// as large as the records.
    Rewrite,
}

impl DecompressPurpose {
    /// Returns the maximum memory for each uncompressed byte, in bytes.
    const fn cost(self) -> usize {
        match self {
            Self::Read => 2,
            Self::Rewrite => 3,
        }
    }
}

/// Resources for batches of one size class, small or large.
#[derive(Clone, Debug)]
struct SizeClass {
    memory: MemoryBudget,
    /// Permits to open a batch on another thread, one per batch: one less than the number of processors, but at least
    /// one.
    thread_permits: Arc<Semaphore>,
}

impl SizeClass {
    fn new(memory_bytes: u64) -> Self {
        let processors = thread::available_parallelism().map_or(1, NonZero::get);
        let thread_permits = Arc::new(Semaphore::new(processors.saturating_sub(1).max(1)));
        Self { memory: MemoryBudget::new(memory_bytes), thread_permits }
    }
}

/// Opens batches within a memory budget. Clones share it.
#[derive(Clone, Debug)]
pub struct Decompressor {
    small: SizeClass,
    large: SizeClass,
    /// Permits of the caller, one per opened batch. `None` if the number of the caller's batches is not limited, or if
    /// this decompressor holds a permit already.
    caller_permits: Option<Arc<Semaphore>>,
    /// Permit of the caller, which is released when the last clone is dropped.
    _caller_permit: Option<Arc<OwnedSemaphorePermit>>,
    /// Memory that the caller has taken for its batches.
    _charge: Option<Charge>,
    undecodable: Arc<UndecodableBatches>,
}

impl Decompressor {
    /// Creates a decompressor with a budget of `bytes`.
    pub fn new(bytes: u64) -> Self {
        let small_bytes = bytes / SMALL_SHARE;
        Self {
            small: SizeClass::new(small_bytes),
            large: SizeClass::new(bytes - small_bytes),
            caller_permits: None,
            _caller_permit: None,
            _charge: None,
            undecodable: Arc::default(),
        }
    }

    /// Returns a decompressor with the same budget, for one caller. `permits` limits how many batches this caller
    /// decompresses at once, in addition to the limits of the budget.
    pub fn for_caller(&self, permits: Arc<Semaphore>) -> Self {
        Self { caller_permits: Some(permits), ..self.clone() }
    }

    /// Returns a decompressor for a caller that has taken memory for its batches. Work on other threads holds `charge`
    /// until the work has ended, even if the caller was dropped.
    pub fn charged(&self, charge: Charge) -> Self {
        Self { _charge: Some(charge), ..self.clone() }
    }

    /// Waits for a permit of the caller. The returned decompressor and its clones hold the permit until all of them are
    /// dropped, and take no further permit. Returns a clone at once if the caller has no limit, or if this decompressor
    /// holds a permit already.
    pub async fn with_caller_permit(&self) -> Self {
        let Some(permits) = &self.caller_permits else { return self.clone() };
        let permit = Arc::clone(permits).acquire_owned().await.expect("the semaphore is never closed");
        Self { caller_permits: None, _caller_permit: Some(Arc::new(permit)), ..self.clone() }
    }

    /// Runs `work` with a stored batch, to read it, as [`Self::open`] does. If the call fails, its error is stored.
    /// Later calls with this batch return that error without running `work`, until later errors displace it.
    ///
    /// # Errors
    /// The errors of [`Self::open`], of this call or of an earlier one with the batch.
    pub async fn open_stored<T, F>(&self, id: PartitionId, batch: &Batch, work: F) -> Result<T, MalformedBatch>
    where
        F: Fn(&Batch, usize) -> Result<T, MalformedBatch> + Clone + Send + 'static,
        T: Send + 'static,
    {
        if let Some(error) = self.undecodable.find(id, batch) {
            return Err(error);
        }
        let opened = self.open(batch, limits::MAX_DECOMPRESSED_BYTES, DecompressPurpose::Read, work).await;
        opened.inspect_err(|error| self.undecodable.add(id, batch, error.clone()))
    }

    /// Runs `work` with a batch, while this function holds memory for the uncompressed records and the permits. `work`
    /// receives a maximum uncompressed size in bytes, and returns [`MalformedBatch::Grows`] if the records are larger.
    /// `work` then runs again with a larger maximum, up to `max_bytes`. The caller accounts for the memory of the
    /// result, which must not hold the decompressed records. A small batch without compression that is only read needs
    /// neither memory nor permits.
    ///
    /// # Errors
    /// - The error of `work`.
    /// - [`MalformedBatch::Grows`] if the records exceed `max_bytes`.
    /// - [`MalformedBatch::NoMemory`] if compressed records exceed the memory for large batches, and that memory is the
    ///   lower limit.
    pub async fn open<T, F>(
        &self,
        batch: &Batch,
        max_bytes: usize,
        purpose: DecompressPurpose,
        work: F,
    ) -> Result<T, MalformedBatch>
    where
        F: Fn(&Batch, usize) -> Result<T, MalformedBatch> + Clone + Send + 'static,
        T: Send + 'static,
    {
        let codec = batch.compression();
        let is_readable = codec == Compression::None && purpose == DecompressPurpose::Read;
        if is_readable && batch.records_bytes().len() <= INLINE_BYTES {
            return work(batch, max_bytes);
        }
        let permitted = self.with_caller_permit().await;
        // A batch without compression is in memory already, so it is not rejected: if it exceeds the budget, it takes
        // the whole budget.
        let budget_bytes = match codec {
            Compression::None => usize::MAX,
            _ => self.large.memory.bytes() / purpose.cost(),
        };
        let limit_bytes = max_bytes.min(budget_bytes);
        let too_large = move || {
            if budget_bytes < max_bytes {
                MalformedBatch::NoMemory { codec, max: limit_bytes, setting: SETTING }
            } else {
                MalformedBatch::Grows { codec, max: limit_bytes }
            }
        };
        let estimated_bytes = batch.estimated_len();
        if estimated_bytes > limit_bytes {
            return Err(too_large());
        }
        let mut attempt_bytes = estimated_bytes.max(INLINE_BYTES).min(limit_bytes);
        loop {
            let memory_bytes = attempt_bytes * purpose.cost();
            let is_small = attempt_bytes <= SMALL_BYTES && memory_bytes <= self.small.memory.bytes();
            let class = if is_small { &self.small } else { &self.large };
            // Reading a batch without compression takes no memory.
            let memory = if is_readable { None } else { Some(class.memory.take(memory_bytes).await) };
            let result = if attempt_bytes <= INLINE_BYTES {
                work(batch, attempt_bytes)
            } else {
                let (batch, work, permitted) = (batch.clone(), work.clone(), permitted.clone());
                let permits = Arc::clone(&class.thread_permits);
                let thread_permit = permits.acquire_owned().await.expect("the semaphore is never closed");
                // The memory, the permits and the charge move to the other thread: the caller may stop waiting while
                // the work continues.
                task::run_blocking(move || (work(&batch, attempt_bytes), memory, thread_permit, permitted).0).await
            };
            match result {
                Err(MalformedBatch::Grows { .. }) if attempt_bytes < limit_bytes => {
                    attempt_bytes = attempt_bytes.saturating_mul(4).min(limit_bytes)
                }
                Err(MalformedBatch::Grows { .. }) => return Err(too_large()),
                result => return result,
            }
        }
    }
}

/// Identity of a batch: partition, base offset and checksum. The checksum distinguishes a batch that was truncated from
/// a later batch at the same offset.
type BatchIdentity = (PartitionId, Offset, u32);

/// Batches that could not be opened, with the error of each, so that no read decompresses them again.
#[derive(Debug, Default)]
struct UndecodableBatches(Mutex<VecDeque<(BatchIdentity, MalformedBatch)>>);

impl UndecodableBatches {
    /// Returns the error of a batch that is in the list.
    fn find(&self, id: PartitionId, batch: &Batch) -> Option<MalformedBatch> {
        let identity = identity(id, batch);
        self.0.lock().iter().find(|(listed, _)| *listed == identity).map(|(_, error)| error.clone())
    }

    /// Adds a batch with its error. Drops the oldest entry if the list is full.
    fn add(&self, id: PartitionId, batch: &Batch, error: MalformedBatch) {
        let mut batches = self.0.lock();
        if batches.len() >= MAX_UNDECODABLE_BATCHES {
            batches.pop_front();
        }
        batches.push_back((identity(id, batch), error));
    }
}

fn identity(id: PartitionId, batch: &Batch) -> BatchIdentity {
    (id, batch.base_offset(), batch.crc())
}

#[cfg(test)]
mod tests {
    use std::sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    };

    use futures::{FutureExt as _, future};

    use super::*;
    use crate::{model::TopicId, record::BatchBuilder};

    /// Returns a batch of zeros, and the uncompressed bytes of its records.
    fn zeros(codec: Compression, bytes: usize) -> (Batch, usize) {
        let mut builder = BatchBuilder::new(Compression::None);
        builder.push(0, None, Some(&vec![0; bytes]), &[]).expect("fits");
        let uncompressed = builder.finish(None).expect("one record");
        (
            uncompressed.recompress(codec).expect("uncompressed batches are compressed"),
            uncompressed.records_bytes().len(),
        )
    }

    const CODECS: [Compression; 4] = [Compression::Gzip, Compression::Snappy, Compression::Lz4, Compression::Zstd];

    #[tokio::test]
    async fn batches_open_up_to_the_limit_and_not_above_it() {
        let decompressor = Decompressor::new(64 << 20);
        for codec in CODECS {
            let (batch, uncompressed) = zeros(codec, 5 << 20);
            let count = |batch: &Batch, max_bytes: usize| Ok(batch.records_within(max_bytes)?.count());
            assert_eq!(decompressor.open(&batch, uncompressed, DecompressPurpose::Read, count).await, Ok(1), "{codec}");
            let result = decompressor.open(&batch, uncompressed - 1, DecompressPurpose::Read, count).await;
            assert_eq!(result, Err(MalformedBatch::Grows { codec, max: uncompressed - 1 }), "{codec}");
        }
    }

    /// Regression: six compressed batches of 250 kB, each with 250 MiB of records, together took 2.7 GB of memory.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn memory_never_exceeds_the_budget() {
        const BOUND: usize = 8 << 20;
        let decompressor = Decompressor::new(BOUND as u64);
        let (now, peak) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let (batch, _) = zeros(Compression::Lz4, 2 << 20);
        let work = {
            let (now, peak, memory) = (Arc::clone(&now), Arc::clone(&peak), decompressor.large.memory.clone());
            move |batch: &Batch, max_bytes: usize| {
                let cost = max_bytes * DecompressPurpose::Rewrite.cost();
                let in_use = now.fetch_add(cost, Ordering::SeqCst) + cost;
                peak.fetch_max(in_use.max(memory.taken()), Ordering::SeqCst);
                let outcome = batch.recompress_within(Compression::Zstd, max_bytes).map(drop);
                now.fetch_sub(cost, Ordering::SeqCst);
                outcome
            }
        };
        let calls = (0..24).map(|_| decompressor.open(&batch, usize::MAX, DecompressPurpose::Rewrite, work.clone()));
        assert!(future::join_all(calls).await.iter().all(Result::is_ok));
        let peak = peak.load(Ordering::SeqCst);
        assert!(peak <= BOUND && peak > BOUND / 2, "{peak} of {BOUND}");
        assert_eq!(decompressor.large.memory.taken(), 0, "all memory is released");
        // A batch that exceeds the whole budget is rejected without waiting for memory.
        let (large, _) = zeros(Compression::Lz4, 3 << 20);
        let error = decompressor.open(&large, usize::MAX, DecompressPurpose::Rewrite, work).await;
        let error = error.expect_err("three times 3 MiB exceed 8 MiB");
        let max = decompressor.large.memory.bytes() / DecompressPurpose::Rewrite.cost();
        assert_eq!(error, MalformedBatch::NoMemory { codec: Compression::Lz4, max, setting: SETTING });
        assert!(error.to_string().contains(SETTING) && error.to_string().contains(&max.to_string()), "{error}");
    }

    #[tokio::test]
    async fn bomb_with_declared_size_is_never_decompressed() {
        let decompressor = Decompressor::new(64 << 20);
        let calls = Arc::new(AtomicUsize::new(0));
        for codec in [Compression::Gzip, Compression::Snappy, Compression::Zstd] {
            let counted = Arc::clone(&calls);
            let work = move |batch: &Batch, max_bytes: usize| {
                counted.fetch_add(1, Ordering::SeqCst);
                batch.records_within(max_bytes).map(drop)
            };
            let (batch, _) = zeros(codec, 20 << 20);
            let result = decompressor.open(&batch, 4 << 20, DecompressPurpose::Read, work).await;
            assert_eq!(result, Err(MalformedBatch::Grows { codec, max: 4 << 20 }));
        }
        assert_eq!(calls.load(Ordering::SeqCst), 0);
    }

    /// Regression: readers of small batches waited while other readers decompressed large ones.
    #[tokio::test]
    async fn small_batches_do_not_wait_for_large_ones() {
        let decompressor = Decompressor::new(64 << 20);
        let large = &decompressor.large;
        let memory = large.memory.take(large.memory.bytes()).await;
        let available = u32::try_from(large.thread_permits.available_permits()).unwrap();
        let permits = large.thread_permits.acquire_many(available).await.unwrap();
        let (small, uncompressed) = zeros(Compression::Gzip, 300_000);
        let count = |batch: &Batch, max_bytes: usize| Ok(batch.records_within(max_bytes)?.count());
        assert_eq!(decompressor.open(&small, uncompressed, DecompressPurpose::Read, count).await, Ok(1));
        drop((memory, permits));
    }

    #[tokio::test]
    async fn caller_opens_one_batch_at_a_time_beside_other_callers() {
        let decompressor = Decompressor::new(64 << 20);
        let [caller, other_caller] = [1, 1].map(|permits| decompressor.for_caller(Arc::new(Semaphore::new(permits))));
        let (batch, uncompressed) = zeros(Compression::Lz4, 1000);
        let count = |batch: &Batch, max_bytes: usize| Ok(batch.records_within(max_bytes)?.count());
        let permitted = caller.with_caller_permit().await;
        let mut waiting = std::pin::pin!(caller.open(&batch, uncompressed, DecompressPurpose::Read, count));
        assert!(future::poll_fn(|cx| std::task::Poll::Ready(waiting.as_mut().poll(cx))).await.is_pending());
        assert_eq!(other_caller.open(&batch, uncompressed, DecompressPurpose::Read, count).await, Ok(1));
        assert_eq!(
            permitted.open(&batch, uncompressed, DecompressPurpose::Read, count).await,
            Ok(1),
            "the holder of a permit waits for no other permit"
        );
        drop(permitted);
        assert_eq!(waiting.await, Ok(1));
    }

    /// Regression: a call that the client cancelled released its permit at once, although its batch was still being
    /// opened. So one connection could have as many batches opened at a time as there were processors.
    #[tokio::test]
    async fn caller_permit_is_held_until_the_work_has_ended() {
        let (decompressor, permits) = (Decompressor::new(64 << 20), Arc::new(Semaphore::new(1)));
        let (batch, uncompressed) = zeros(Compression::Zstd, INLINE_BYTES + 1);
        let (end, ended) = std::sync::mpsc::sync_channel(1);
        let ended = Arc::new(crate::task::lock::Mutex::new(ended));
        let work = move |_: &Batch, _: usize| Ok(ended.lock().recv().is_ok());
        for has_permit in [false, true] {
            let caller = decompressor.for_caller(Arc::clone(&permits));
            let caller = if has_permit { caller.with_caller_permit().await } else { caller };
            let call = caller.open(&batch, uncompressed, DecompressPurpose::Read, work.clone());
            assert!(call.now_or_never().is_none());
            drop(caller);
            assert_eq!(permits.available_permits(), 0, "the work holds the permit after its caller was dropped");
            end.send(()).unwrap();
            drop(permits.acquire().await.unwrap());
        }
    }

    /// Regression: a read of the last of 1,000,000 records in a batch without compression decoded all of them on the
    /// caller's thread.
    #[tokio::test]
    async fn large_batch_without_compression_is_read_on_another_thread() {
        let decompressor = Decompressor::new(64 << 20);
        let memory = decompressor.large.memory.take(decompressor.large.memory.bytes()).await;
        let test_thread = thread::current().id();
        let is_test_thread = move |_: &Batch, _: usize| Ok(thread::current().id() == test_thread);
        for (bytes, expected) in [(INLINE_BYTES / 2, true), (4 << 20, false)] {
            let (batch, uncompressed) = zeros(Compression::None, bytes);
            assert_eq!(
                decompressor.open(&batch, uncompressed, DecompressPurpose::Read, is_test_thread).await,
                Ok(expected),
                "{bytes} bytes"
            );
        }
        drop(memory);
    }

    /// A batch without compression that exceeds the whole budget can still be rewritten in a codec.
    #[tokio::test]
    async fn uncompressed_batch_of_any_size_is_rewritten() {
        let decompressor = Decompressor::new(1 << 20);
        let (batch, uncompressed) = zeros(Compression::None, 2 << 20);
        let work = |batch: &Batch, max_bytes: usize| batch.recompress_within(Compression::Zstd, max_bytes).map(drop);
        assert_eq!(decompressor.open(&batch, uncompressed, DecompressPurpose::Rewrite, work).await, Ok(()));
        assert_eq!(decompressor.large.memory.taken(), 0);
    }

    /// Regression: each read of a batch that could not be decoded decompressed it again.
    #[tokio::test]
    async fn batch_that_cannot_be_opened_is_not_opened_again() {
        let decompressor = Decompressor::new(64 << 20);
        let calls = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&calls);
        let work = move |_: &Batch, _: usize| {
            counted.fetch_add(1, Ordering::SeqCst);
            Err::<(), _>(MalformedBatch::Record { index: 0, reason: "truncated" })
        };
        let (batch, _) = zeros(Compression::Zstd, 1000);
        let id = |index| PartitionId::new(TopicId::from_bytes([7; 16]), index);
        for caller in [decompressor.clone(), decompressor.for_caller(Arc::new(Semaphore::new(1))), decompressor.clone()]
        {
            assert!(matches!(
                caller.open_stored(id(0), &batch, work.clone()).await,
                Err(MalformedBatch::Record { .. })
            ));
        }
        assert_eq!(calls.load(Ordering::SeqCst), 1);
        // Another batch of the partition, and the same batch in another partition, are opened.
        let (later, _) = zeros(Compression::Zstd, 1001);
        drop((
            decompressor.open_stored(id(0), &later, work.clone()).await,
            decompressor.open_stored(id(1), &batch, work).await,
        ));
        assert_eq!(calls.load(Ordering::SeqCst), 3);
    }
}
