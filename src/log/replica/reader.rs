//! Reading a replica: from memory, or from its files with a check of every batch.

use std::{io, path::PathBuf, sync::Arc};

use bytes::Bytes;

use tokio::sync::OwnedSemaphorePermit;

use super::{ReadBatches, ReplicaInner, file_cache::OpenFile};
use crate::{
    limits,
    log::{
        disk::{File, OpenMode},
        error::LogReadError,
        format::{EpochHistory, Index, IndexEntry, SegmentFile, SegmentInfo, index, segment},
    },
    model::{LeaderEpoch, Offset, PartitionId},
    record::{Batch, HEADER_BYTES},
};

/// Maximum number of times that a read is repeated because the log was truncated or a file was removed meanwhile.
const MAX_RETRIES: usize = 8;

/// Limits of one read, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReadLimits {
    /// Approximate maximum size of the result, unless its first batch is larger.
    pub max_bytes: usize,
    /// Maximum size of a first batch above `max_bytes`. The caller has no memory for a larger one.
    pub max_batch_bytes: usize,
}

impl From<usize> for ReadLimits {
    /// Returns limits of `max_bytes` bytes, with a first batch of any size.
    fn from(max_bytes: usize) -> Self {
        Self { max_bytes, max_batch_bytes: usize::MAX }
    }
}

/// Reader of one replica, concurrent with its writer. The caller of each read gives a bound, which must not exceed the
/// log end. Batches that end above the bound are not returned.
#[derive(Clone)]
pub struct LogReader {
    inner: Arc<ReplicaInner>,
}

/// A segment as it is at the start of a read.
struct SegmentView {
    info: SegmentInfo,
    file: Arc<SegmentFile>,
    sealed: bool,
    /// Generation of the replica.
    generation: u64,
    /// Source of the epoch that each batch must have: no checksum covers that field.
    epochs: Arc<EpochHistory>,
}

impl LogReader {
    pub(super) fn new(inner: Arc<ReplicaInner>) -> Self {
        Self { inner }
    }

    /// Waits for one of the permits that bound concurrent reads from the disk; dropping the permit returns it. Internal
    /// reads, such as those of recovery, need no permit.
    pub async fn acquire_disk_permit(&self) -> OwnedSemaphorePermit {
        let permit = Arc::clone(&self.inner.ctx.disk_reads).acquire_owned().await;
        permit.expect("the semaphore is never closed")
    }

    /// Returns the partition of the replica.
    pub fn id(&self) -> PartitionId {
        self.inner.id
    }

    /// Returns the first offset that can be read from any tier.
    pub fn log_start(&self) -> Offset {
        self.inner.state().log_start
    }

    /// Returns the first offset on this disk.
    pub fn local_start(&self) -> Offset {
        self.inner.state().local_start()
    }

    /// Returns the first offset that is not written yet.
    pub fn log_end(&self) -> Offset {
        self.inner.state().log_end()
    }

    /// Returns the last epoch; `None` if nothing was written and the history before the log is unknown.
    pub fn last_epoch(&self) -> Option<LeaderEpoch> {
        self.inner.state().epochs.last().map(|(epoch, _)| epoch)
    }

    /// Returns the cached batches of `from..bound`: up to `max_bytes` bytes, and at least one batch. The result is
    /// empty if the range is empty or the first batch ends above `bound`. Returns `None` if the first batch is not
    /// cached. Accesses no file.
    pub fn read_memory(&self, from: Offset, bound: Offset, max_bytes: usize) -> Option<ReadBatches> {
        if from >= bound {
            return Some(ReadBatches::empty(from));
        }
        self.inner.tail.read(from, bound, max_bytes)
    }

    /// Returns the batches of `from..bound` in the segment of `from`: as many as the limits allow, and at least one.
    /// The result is empty if the range is empty or the first batch ends above `bound`. Blocks. A batch with a wrong
    /// checksum, offset or epoch is never returned. Fails with `OutOfRange` if no segment contains `from`. Fails with
    /// `BatchTooLarge` if the first batch is larger than `max_batch_bytes` and than one read of about `max_bytes`.
    pub fn read_disk(
        &self,
        from: Offset,
        bound: Offset,
        limits: impl Into<ReadLimits>,
    ) -> Result<ReadBatches, LogReadError> {
        let limits = limits.into();
        self.retry_if_truncated(|| {
            if from >= bound {
                return Ok(ReadBatches::empty(from));
            }
            let view = self.segment_view(from)?;
            let start = self.start_entry(&view, |index| index.at(from))?;
            self.read_from(&view, start, from, bound, limits)
        })
    }

    /// Returns the first batch below `bound` whose largest timestamp reaches `timestamp_ms`, among those that end above
    /// `from`. The caller searches the batch for the record. If the batch has no such record, because its header is
    /// wrong, the caller repeats the search from the end of the batch. Fails with `BatchTooLarge` at a batch that is
    /// larger than both `max_batch_bytes` and one read of the search. Blocks.
    pub fn batch_for_time(
        &self,
        timestamp_ms: i64,
        from: Offset,
        bound: Offset,
        max_batch_bytes: usize,
    ) -> Result<Option<Batch>, LogReadError> {
        let limits = ReadLimits { max_bytes: limits::SEARCH_BYTES, max_batch_bytes };
        self.retry_if_truncated(|| {
            let bases: Vec<Offset> = {
                let state = self.inner.state();
                let may_match = |info: &SegmentInfo| info.max_timestamp >= timestamp_ms && info.end > from;
                state.segments.iter().map(|segment| segment.info).filter(may_match).map(|info| info.base).collect()
            };
            for base in bases {
                let view = self.segment_view(base)?;
                let start = self.start_entry(&view, |index| {
                    let entries = [index.before_time(timestamp_ms), index.at(from)];
                    entries.into_iter().flatten().max_by_key(|entry| entry.position)
                })?;
                let mut next = start.offset;
                let mut entry = start;
                while next < view.info.end.min(bound) {
                    let read = self.read_from(&view, entry, next, view.info.end.min(bound), limits)?;
                    let mut bytes = read.chunks.into_iter().next().unwrap_or_default();
                    if bytes.is_empty() {
                        break;
                    }
                    entry.position += u32::try_from(bytes.len()).unwrap_or(u32::MAX);
                    (entry.offset, next) = (read.next, read.next);
                    while let Ok(batch) = Batch::split_from(&mut bytes) {
                        if batch.max_timestamp() >= timestamp_ms && batch.end_offset() > from {
                            return Ok(Some(batch));
                        }
                    }
                }
            }
            Ok(None)
        })
    }

    /// Runs a read, and repeats it if the log was truncated or reset, or a file was removed, during the read. An error
    /// of such a read does not prove corruption. After `MAX_RETRIES` the result of the last read is returned.
    fn retry_if_truncated<T>(&self, mut read: impl FnMut() -> Result<T, LogReadError>) -> Result<T, LogReadError> {
        for _ in 0..MAX_RETRIES {
            let generation = self.inner.state().generation;
            let result = read();
            let state = self.inner.state();
            let is_missing = match &result {
                Err(LogReadError::Io { source, .. }) => source.kind() == io::ErrorKind::NotFound,
                _ => false,
            };
            if state.generation == generation && !is_missing {
                return result;
            }
        }
        read()
    }

    /// Returns the segment that contains `offset`. An empty active segment contains the log end. Fails with
    /// `OutOfRange` if no segment does.
    fn segment_view(&self, offset: Offset) -> Result<SegmentView, LogReadError> {
        let state = self.inner.state();
        let after = state.segments.partition_point(|segment| segment.info.base <= offset);
        let out_of_range = || LogReadError::OutOfRange { offset, start: state.local_start(), end: state.log_end() };
        let i = after.checked_sub(1).ok_or_else(out_of_range)?;
        let segment = &state.segments[i];
        if offset >= segment.info.end && segment.info.bytes > 0 {
            return Err(out_of_range());
        }
        let sealed = i + 1 < state.segments.len();
        let (file, epochs, generation) = (segment.file.clone(), state.epochs.clone(), state.generation);
        Ok(SegmentView { info: segment.info, file, sealed, generation, epochs })
    }

    /// Returns the index entry at which a read starts: the one that `pick` chooses, or else the entry of the first
    /// batch. Loads the index if it is not in memory. The state of the log keeps the index of the active segment, and
    /// the file cache keeps those of sealed segments.
    fn start_entry(
        &self,
        view: &SegmentView,
        pick: impl Fn(&Index) -> Option<IndexEntry>,
    ) -> Result<IndexEntry, LogReadError> {
        let first = IndexEntry { offset: view.info.base, position: 0, max_before: i64::MIN };
        if !view.sealed {
            let mut state = self.inner.state();
            if state.index.is_none() && state.generation == view.generation {
                drop(state);
                let index = self.active_index(&view.info, &view.file).map_err(|error| io_error(view, error))?;
                state = self.inner.state();
                // While the lock was released, the writer may have loaded an index itself, or appended batches that
                // this index lacks.
                let is_current =
                    state.active_segment().info.bytes == view.info.bytes && state.generation == view.generation;
                if state.index.is_none() && is_current {
                    state.index = Some(index);
                }
            }
            // Otherwise the segment has been sealed or replaced since `view` was created.
            if state.active_segment().info.base == view.info.base {
                return Ok(state.index.as_ref().and_then(&pick).unwrap_or(first));
            }
        }
        let open = self.open(view)?;
        let mut cached = open.index.lock();
        let index = match &*cached {
            Some(index) => index.clone(),
            None => {
                let index = self.load_index(&view.info, &*open.file).map_err(|error| io_error(view, error))?;
                cached.insert(Arc::new(index)).clone()
            }
        };
        Ok(pick(&index).unwrap_or(first))
    }

    /// Returns the open file of a segment.
    fn open(&self, view: &SegmentView) -> Result<Arc<OpenFile>, LogReadError> {
        let files = &self.inner.ctx.files;
        files.get(view.file.serial, &view.file.path, OpenMode::Read).map_err(|error| io_error(view, error))
    }

    /// Returns the index of the active segment at the length in `info`.
    pub(super) fn active_index(&self, info: &SegmentInfo, file: &SegmentFile) -> io::Result<Index> {
        let open = self.inner.ctx.files.get(file.serial, &file.path, OpenMode::Read)?;
        self.load_index(info, &*open.file)
    }

    /// Returns the index of a segment from its index files. If these are missing or invalid, rebuilds the index from
    /// the segment and writes the files; a failed write is ignored.
    pub(super) fn load_index(&self, info: &SegmentInfo, file: &dyn File) -> io::Result<Index> {
        let disk = &self.inner.ctx.disk;
        let read = |extension| disk.read(&self.inner.path(info.base, extension));
        if let (Ok(offsets), Ok(times)) = (read("index"), read("timeindex"))
            && let Some(index) = Index::decode(&offsets, &times, info.base, info.bytes)
        {
            return Ok(index);
        }
        let mut index = Index::default();
        let mut max_before = i64::MIN;
        let end = segment::scan(file, info.bytes, 0, info.base, None, |position, batch| {
            index.add_batch(batch.base_offset(), position, max_before);
            max_before = max_before.max(batch.max_timestamp());
        })?;
        // The index of a corrupt segment ends at the corruption. A read there returns the error.
        if end.corruption.is_none() {
            let (offsets, times) = index.encode(info.base, info.bytes);
            let written = disk.write(&self.inner.path(info.base, "index"), &offsets);
            drop(written.and_then(|_| disk.write(&self.inner.path(info.base, "timeindex"), &times)));
        }
        Ok(index)
    }

    /// Reads complete batches of one segment: those of `from..bound`, as many as the limits allow, and at least one.
    /// The read starts at the index entry `start`. Batches between `start` and `from` are verified and not returned.
    /// The result is empty if the first batch ends above `bound`.
    fn read_from(
        &self,
        view: &SegmentView,
        start: IndexEntry,
        from: Offset,
        bound: Offset,
        ReadLimits { max_bytes, max_batch_bytes }: ReadLimits,
    ) -> Result<ReadBatches, LogReadError> {
        let open = self.open(view)?;
        let mut position = u64::from(start.position);
        let gap = usize::try_from(index::MIN_INTERVAL_BYTES).unwrap_or(4096);
        let mut read_bytes = max_bytes.clamp(HEADER_BYTES, limits::MAX_FETCH_BYTES) + gap;
        let (mut expected, mut epoch) = (start.offset, None);
        // Each iteration reads one buffer. The loop continues only if the buffer holds no batch to return.
        loop {
            let remaining = usize::try_from(view.info.bytes.saturating_sub(position)).unwrap_or(usize::MAX);
            let mut buffer = vec![0; read_bytes.min(remaining)];
            let read = open.file.read_at(&mut buffer, position).map_err(|error| io_error(view, error))?;
            buffer.truncate(read);
            let data = Bytes::from(buffer);
            let mut rest = data.clone();
            // Range of the returned batches in the buffer, and the offset after them.
            let (mut first, mut end, mut next) = (None, 0, from);
            while !rest.is_empty() && expected < bound {
                let at = data.len() - rest.len();
                let needed = match needed_at(&rest) {
                    // The batch extends beyond the buffer, but not beyond the file.
                    Ok(needed)
                        if needed > rest.len() && needed <= remaining - at && read == read_bytes.min(remaining) =>
                    {
                        break;
                    }
                    // The batch would exceed the limit of the result.
                    Ok(needed) if first.is_some_and(|first| at + needed - first > max_bytes) => break,
                    needed => needed,
                };
                let batch = match needed.and_then(|needed| split_checked(view, &mut rest, needed, expected, epoch)) {
                    Ok(batch) => batch,
                    // The batches before the corruption are returned. A read from the corruption on returns the error.
                    Err(_) if first.is_some() => break,
                    Err(reason) => return Err(corrupt(view, expected, position + at as u64, reason)),
                };
                let needed = batch.encoded_len();
                if batch.end_offset() > bound {
                    expected = bound;
                    break;
                }
                (expected, epoch) = (batch.end_offset(), batch.leader_epoch());
                if expected > from {
                    first.get_or_insert(at);
                    (end, next) = (at + needed, expected);
                }
            }
            if let Some(first) = first {
                return Ok(ReadBatches { chunks: vec![data.slice(first..end)], next, bytes: end - first });
            }
            if data.len() >= remaining && rest.is_empty() && expected <= from {
                let reason = format!("the segment ends at offset {expected}");
                return Err(corrupt(view, from, view.info.bytes, reason));
            }
            if expected >= bound {
                return Ok(ReadBatches::empty(from));
            }
            // The buffer ends inside a batch, or before the batch of `from`. The next buffer starts at the first
            // incomplete batch. It has space for that batch if the batch's header is in this buffer.
            position += (data.len() - rest.len()) as u64;
            read_bytes = read_bytes.max(incomplete_batch_bytes(&rest, max_batch_bytes)?);
        }
    }
}

/// Returns the bytes of the incomplete batch of which `rest` is the beginning, or 0 if the header in `rest` is
/// incomplete or invalid. Fails with `BatchTooLarge` if the batch is larger than `max_batch_bytes`.
fn incomplete_batch_bytes(rest: &Bytes, max_batch_bytes: usize) -> Result<usize, LogReadError> {
    let bytes = if rest.len() >= HEADER_BYTES { Batch::framed_len(rest).unwrap_or(0) } else { 0 };
    if bytes > max_batch_bytes {
        return Err(LogReadError::BatchTooLarge { bytes });
    }
    Ok(bytes)
}

/// Returns the bytes of the batch at the front of `rest`, or those of a header if `rest` has no complete header.
fn needed_at(rest: &Bytes) -> Result<usize, String> {
    if rest.len() < HEADER_BYTES {
        Ok(HEADER_BYTES)
    } else {
        Batch::framed_len(rest).map_err(|error| error.to_string())
    }
}

/// Splits the batch of `needed` bytes off `rest` after verifying it. The batch must start at the offset `expected`,
/// with an epoch not below `epoch` and equal to that of the epoch history. Otherwise the result is a description of the
/// error.
fn split_checked(
    view: &SegmentView,
    rest: &mut Bytes,
    needed: usize,
    expected: Offset,
    epoch: Option<LeaderEpoch>,
) -> Result<Batch, String> {
    if needed > rest.len() {
        return Err(format!("{needed} bytes are needed and {} are present", rest.len()));
    }
    let batch = segment::next(rest, expected, epoch)?;
    match (view.epochs.at(expected), batch.leader_epoch()) {
        (Some(recorded), Some(epoch)) if recorded != epoch => {
            Err(format!("its leader epoch is {epoch}, not {recorded}"))
        }
        _ => Ok(batch),
    }
}

fn io_error(view: &SegmentView, source: io::Error) -> LogReadError {
    LogReadError::Io { file: view.file.path.clone(), source }
}

fn corrupt(view: &SegmentView, offset: Offset, position: u64, reason: String) -> LogReadError {
    let file: PathBuf = view.file.path.clone();
    LogReadError::Corrupt { offset, file, position, reason }
}
