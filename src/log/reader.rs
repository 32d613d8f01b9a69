//! Reading a replica: from memory, or from its files with every batch checked before it is served.

use std::{
    io,
    path::PathBuf,
    sync::{Arc, PoisonError},
};

use bytes::Bytes;

use tokio::sync::OwnedSemaphorePermit;

use super::{
    disk::{File, Mode},
    epochs::EpochHistory,
    error::ReadError,
    index::{Index, IndexEntry},
    segment::{self, SegmentFile, SegmentInfo},
    shared::Shared,
};
use crate::{
    limits,
    model::{LeaderEpoch, Offset, PartitionId},
    record::{Batch, HEADER_BYTES},
};

/// How often a read begins again when the log was cut under it.
const RETRIES: usize = 8;

/// Whole batches. Concatenated, the chunks are their bytes; the first batch may begin before the offset that was asked
/// for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Read {
    /// The bytes.
    pub chunks: Vec<Bytes>,
    /// Offset after the last batch; the offset that was asked for when there is none.
    pub next: Offset,
    /// Bytes in all chunks.
    pub bytes: usize,
}

impl Read {
    pub(super) fn empty(from: Offset) -> Self {
        Self { chunks: Vec::new(), next: from, bytes: 0 }
    }
}

/// How much one read brings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReadLimits {
    /// About the most bytes of batches, where the first is not larger.
    pub max_bytes: usize,
    /// Most bytes of a first batch above `max_bytes`. There is no memory for a larger one.
    pub max_batch_bytes: usize,
}

impl From<usize> for ReadLimits {
    /// So many bytes, and a first batch of any size.
    fn from(max_bytes: usize) -> Self {
        Self { max_bytes, max_batch_bytes: usize::MAX }
    }
}

/// Reads one replica, beside its writer. What it reads ends at the bound that the caller gives, which is never above the
/// log end.
#[derive(Clone)]
pub struct Reader {
    shared: Arc<Shared>,
}

/// A segment as it was when a read began.
struct Place {
    info: SegmentInfo,
    file: Arc<SegmentFile>,
    sealed: bool,
    generation: u64,
    /// Which epoch each batch must have: no checksum covers that field.
    epochs: Arc<EpochHistory>,
}

impl Reader {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self { shared }
    }

    /// A turn to read from the disk, until it is dropped. Reads that do not wait for anybody, as recovery's, need none.
    pub async fn disk_turn(&self) -> OwnedSemaphorePermit {
        let turn = Arc::clone(&self.shared.core.disk_reads).acquire_owned().await;
        turn.expect("the semaphore is never closed")
    }

    /// Which partition it reads.
    pub fn id(&self) -> PartitionId {
        self.shared.id
    }

    /// First offset that can be read at all.
    pub fn log_start(&self) -> Offset {
        self.shared.state().log_start
    }

    /// First offset that is on this disk.
    pub fn local_start(&self) -> Offset {
        self.shared.state().local_start()
    }

    /// First unwritten offset.
    pub fn log_end(&self) -> Offset {
        self.shared.state().log_end()
    }

    /// The epoch that wrote last; `None` where nothing was written and nothing is known of what lies before.
    pub fn last_epoch(&self) -> Option<LeaderEpoch> {
        self.shared.state().epochs.last().map(|(epoch, _)| epoch)
    }

    /// The batches of `from..bound` that are in memory, about `max_bytes` of them and at least one; `None` when the first is not
    /// there. Never blocks.
    pub fn read_memory(&self, from: Offset, bound: Offset, max_bytes: usize) -> Option<Read> {
        if from >= bound {
            return Some(Read::empty(from));
        }
        self.shared.tail.read(from, bound, max_bytes)
    }

    /// The batches of `from..bound` that are in the segment of `from`, as many as the limits allow and at least one. Blocks.
    /// Nothing is served whose checksum, place or epoch is wrong.
    pub fn read_disk(&self, from: Offset, bound: Offset, limits: impl Into<ReadLimits>) -> Result<Read, ReadError> {
        let limits = limits.into();
        self.consistently(|| {
            if from >= bound {
                return Ok(Read::empty(from));
            }
            let place = self.place(from)?;
            let start = self.entry(&place, |index| index.at(from))?;
            self.read_from(&place, start, from, bound, limits)
        })
    }

    /// The first batch below `bound` with a timestamp at or above `timestamp_ms` that does not lie wholly below the log start:
    /// base offset, its largest timestamp, leader epoch. Blocks. The record itself is in that batch or, by the producer's word,
    /// in none.
    pub fn offset_for_time(
        &self,
        timestamp_ms: i64,
        bound: Offset,
    ) -> Result<Option<(Offset, i64, LeaderEpoch)>, ReadError> {
        let found = self.batch_for_time(timestamp_ms, self.log_start(), bound, usize::MAX)?;
        Ok(found.map(|batch| (batch.base_offset(), batch.max_timestamp(), batch.leader_epoch().unwrap_or_default())))
    }

    /// As [`Self::offset_for_time`], of the batches that reach above `from`, and the whole batch, in which the caller finds
    /// the record. Where that batch's header lied, the caller asks again from its end. No batch above `max_batch_bytes` is read. Blocks.
    pub fn batch_for_time(
        &self,
        timestamp_ms: i64,
        from: Offset,
        bound: Offset,
        max_batch_bytes: usize,
    ) -> Result<Option<Batch>, ReadError> {
        let limits = ReadLimits { max_bytes: limits::SEARCH_BYTES, max_batch_bytes };
        self.consistently(|| {
            let bases: Vec<Offset> = {
                let state = self.shared.state();
                let later = |info: &SegmentInfo| info.max_timestamp >= timestamp_ms && info.end > from;
                state.segments.iter().map(|segment| segment.info).filter(later).map(|info| info.base).collect()
            };
            for base in bases {
                let place = self.place(base)?;
                let start = self.entry(&place, |index| {
                    let entries = [index.before_time(timestamp_ms), index.at(from)];
                    entries.into_iter().flatten().max_by_key(|entry| entry.position)
                })?;
                let mut at = start.offset;
                let mut entry = start;
                while at < place.info.end.min(bound) {
                    let read = self.read_from(&place, entry, at, place.info.end.min(bound), limits)?;
                    let mut bytes = read.chunks.into_iter().next().unwrap_or_default();
                    if bytes.is_empty() {
                        break;
                    }
                    entry.position += u32::try_from(bytes.len()).unwrap_or(u32::MAX);
                    (entry.offset, at) = (read.next, read.next);
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

    /// Does a read, and does it again when the log was cut meanwhile: what failed may not have been damage.
    fn consistently<T>(&self, mut read: impl FnMut() -> Result<T, ReadError>) -> Result<T, ReadError> {
        for _ in 0..RETRIES {
            let generation = self.shared.state().generation;
            let result = read();
            let state = self.shared.state();
            let gone = match &result {
                Err(ReadError::Io { source, .. }) => source.kind() == io::ErrorKind::NotFound,
                _ => false,
            };
            if state.generation == generation && !gone {
                return result;
            }
        }
        read()
    }

    fn place(&self, offset: Offset) -> Result<Place, ReadError> {
        let state = self.shared.state();
        let after = state.segments.partition_point(|segment| segment.info.base <= offset);
        let out = || ReadError::OutOfRange { offset, start: state.local_start(), end: state.log_end() };
        let i = after.checked_sub(1).ok_or_else(out)?;
        let segment = &state.segments[i];
        if offset >= segment.info.end && segment.info.bytes > 0 {
            return Err(out());
        }
        let sealed = i + 1 < state.segments.len();
        let (file, epochs, generation) = (segment.file.clone(), state.epochs.clone(), state.generation);
        Ok(Place { info: segment.info, file, sealed, generation, epochs })
    }

    /// The index entry to start at.
    fn entry(&self, place: &Place, pick: impl Fn(&Index) -> Option<IndexEntry>) -> Result<IndexEntry, ReadError> {
        let first = IndexEntry { offset: place.info.base, position: 0, max_before: i64::MIN };
        if !place.sealed {
            let mut state = self.shared.state();
            if state.index.is_none() && state.generation == place.generation {
                drop(state);
                let index = self.active_index(&place.info, &place.file).map_err(|error| io_error(place, error))?;
                state = self.shared.state();
                // The writer may have come first, or gone on: its index is the better one.
                let same = state.active().info.bytes == place.info.bytes && state.generation == place.generation;
                if state.index.is_none() && same {
                    state.index = Some(index);
                }
            }
            if state.active().info.base == place.info.base {
                return Ok(state.index.as_ref().and_then(&pick).unwrap_or(first));
            }
        }
        let open = self.open(place)?;
        let mut cached = open.index.lock().unwrap_or_else(PoisonError::into_inner);
        let index = match &*cached {
            Some(index) => index.clone(),
            None => {
                let index = self.load_index(&place.info, &*open.file).map_err(|error| io_error(place, error))?;
                cached.insert(Arc::new(index)).clone()
            }
        };
        Ok(pick(&index).unwrap_or(first))
    }

    fn open(&self, place: &Place) -> Result<Arc<super::files::OpenFile>, ReadError> {
        let files = &self.shared.core.files;
        files.get(place.file.serial, &place.file.path, Mode::Read).map_err(|error| io_error(place, error))
    }

    /// The index of the active segment as it is in `info`.
    pub(super) fn active_index(&self, info: &SegmentInfo, file: &SegmentFile) -> io::Result<Index> {
        let open = self.shared.core.files.get(file.serial, &file.path, Mode::Read)?;
        self.load_index(info, &*open.file)
    }

    /// A segment's index from its files, or made again from the segment.
    pub(super) fn load_index(&self, info: &SegmentInfo, file: &dyn File) -> io::Result<Index> {
        let disk = &self.shared.core.disk;
        let read = |extension| disk.read(&self.shared.path(info.base, extension));
        if let (Ok(offsets), Ok(times)) = (read("index"), read("timeindex"))
            && let Some(index) = Index::decode(&offsets, &times, info.base, info.bytes)
        {
            return Ok(index);
        }
        let mut index = Index::default();
        let mut max_before = i64::MIN;
        let end = segment::scan(file, info.bytes, 0, info.base, None, |position, batch| {
            index.note(batch.base_offset(), position, max_before);
            max_before = max_before.max(batch.max_timestamp());
        })?;
        // Of a damaged segment the index reaches to the damage; a read there will say what is wrong.
        if end.damage.is_none() {
            let (offsets, times) = index.encode(info.base, info.bytes);
            let written = disk.write(&self.shared.path(info.base, "index"), &offsets);
            drop(written.and_then(|_| disk.write(&self.shared.path(info.base, "timeindex"), &times)));
        }
        Ok(index)
    }

    fn read_from(
        &self,
        place: &Place,
        start: IndexEntry,
        from: Offset,
        bound: Offset,
        ReadLimits { max_bytes, max_batch_bytes }: ReadLimits,
    ) -> Result<Read, ReadError> {
        let open = self.open(place)?;
        let mut position = u64::from(start.position);
        let gap = usize::try_from(super::index::INTERVAL).unwrap_or(4096);
        let mut want = max_bytes.clamp(HEADER_BYTES, limits::MAX_FETCH_BYTES) + gap;
        let (mut expected, mut epoch) = (start.offset, None);
        loop {
            let left = usize::try_from(place.info.bytes.saturating_sub(position)).unwrap_or(usize::MAX);
            let mut buffer = vec![0; want.min(left)];
            let read = open.file.read_at(&mut buffer, position).map_err(|error| io_error(place, error))?;
            buffer.truncate(read);
            let whole = Bytes::from(buffer);
            let mut rest = whole.clone();
            let (mut first, mut end, mut next) = (None, 0, from);
            while !rest.is_empty() && expected < bound {
                let at = whole.len() - rest.len();
                let needed = match needed_at(&rest) {
                    // The buffer ends before the batch does, the file does not.
                    Ok(needed) if needed > rest.len() && needed <= left - at && read == want.min(left) => break,
                    Ok(needed) if first.is_some_and(|first| at + needed - first > max_bytes) => break,
                    other => other,
                };
                let batch = match needed.and_then(|needed| checked(place, &mut rest, needed, expected, epoch)) {
                    Ok(batch) => batch,
                    // What lies before the damage is served; who reads on from there is told.
                    Err(_) if first.is_some() => break,
                    Err(why) => return Err(damage(place, expected, position + at as u64, why)),
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
                return Ok(Read { chunks: vec![whole.slice(first..end)], next, bytes: end - first });
            }
            if whole.len() >= left && rest.is_empty() && expected <= from {
                let why = format!("the segment ends at offset {expected}");
                return Err(damage(place, from, place.info.bytes, why));
            }
            if expected >= bound {
                return Ok(Read::empty(from));
            }
            // A batch longer than the buffer: its length was just read and is possible.
            position += (whole.len() - rest.len()) as u64;
            let bytes = if rest.len() >= HEADER_BYTES { Batch::framed_len(&rest).unwrap_or(0) } else { 0 };
            if bytes > max_batch_bytes {
                return Err(ReadError::BatchTooLarge { bytes });
            }
            want = want.max(bytes);
        }
    }
}

/// Bytes of the batch at the front of `rest`, as far as can be told there.
fn needed_at(rest: &Bytes) -> Result<usize, String> {
    if rest.len() < HEADER_BYTES {
        Ok(HEADER_BYTES)
    } else {
        Batch::framed_len(rest).map_err(|error| error.to_string())
    }
}

/// The batch of `needed` bytes at the front of `rest`, if it is the one that was written there.
fn checked(
    place: &Place,
    rest: &mut Bytes,
    needed: usize,
    expected: Offset,
    epoch: Option<LeaderEpoch>,
) -> Result<Batch, String> {
    if needed > rest.len() {
        return Err(format!("{needed} bytes are needed and {} are there", rest.len()));
    }
    let batch = segment::next(rest, expected, epoch)?;
    match (place.epochs.at(expected), batch.leader_epoch()) {
        (Some(known), Some(epoch)) if known != epoch => Err(format!("its leader epoch is {epoch}, not {known}")),
        _ => Ok(batch),
    }
}

fn io_error(place: &Place, source: io::Error) -> ReadError {
    ReadError::Io { file: place.file.path.clone(), source }
}

fn damage(place: &Place, offset: Offset, position: u64, why: String) -> ReadError {
    let file: PathBuf = place.file.path.clone();
    ReadError::Damaged { offset, file, position, why }
}
