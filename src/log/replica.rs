//! One partition's log on this disk, in the hands of its single writer.

use std::{
    io::{self, IoSlice},
    ops::Deref,
    sync::{Arc, MutexGuard, atomic::Ordering},
    time::Duration,
};

use super::{
    core::SyncJob,
    disk::Mode,
    epochs::EpochHistory,
    error::{AppendError, PersistError, is_full},
    files::OpenFile,
    index::Index,
    journal::{Done, Item, entry::Kind},
    producers::ProducerTable,
    reader::Reader,
    segment::{Segment, SegmentFile, SegmentInfo},
    shared::{Shared, State},
    snapshot::Snapshot,
};
use crate::{
    model::{LeaderEpoch, Offset, PartitionId},
    record::Batch,
    task::clock,
};

/// Maximum size of a segment in bytes: positions in it are 32 bits wide.
const MAX_SEGMENT_BYTES: u64 = i32::MAX as u64;

/// One partition's log on this disk. The holder of this value is the only writer. A method waits for a sync only if its
/// comment states that.
pub struct Replica {
    pub(super) shared: Arc<Shared>,
    /// Batches that were appended and not submitted to the journal.
    pending: Pending,
    /// Serial of the segment file whose length was verified.
    checked: Option<u64>,
    /// True if appended batches will be submitted to the journal.
    journaled: bool,
}

#[derive(Default)]
struct Pending {
    pieces: Vec<Piece>,
    bytes: usize,
    /// True if the bytes exceed the journal's limit. The next persist call then syncs the segments instead.
    too_much: bool,
}

/// Consecutive batches of one segment that form one journal entry.
struct Piece {
    segment: Offset,
    position: u64,
    bytes: usize,
    batches: Vec<Batch>,
}

/// Reference to a table of a replica. Readers wait while it is held.
pub struct Held<'a, T> {
    state: MutexGuard<'a, State>,
    pick: fn(&State) -> &T,
}

impl<T> Deref for Held<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        (self.pick)(&self.state)
    }
}

impl Replica {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        // Batches that were found in the files, or appended by an earlier writer, may not be durable.
        let too_much = {
            let state = shared.state();
            state.persisted_end < state.log_end()
        };
        Self { shared, pending: Pending { too_much, ..Pending::default() }, checked: None, journaled: true }
    }

    /// Returns the partition of the log.
    pub fn id(&self) -> PartitionId {
        self.shared.id
    }

    /// Returns a handle for reading.
    pub fn reader(&self) -> Reader {
        Reader::new(self.shared.clone())
    }

    /// Returns the first offset that can be read from any tier.
    pub fn log_start(&self) -> Offset {
        self.shared.state().log_start
    }

    /// Returns the first offset on this disk.
    pub fn local_start(&self) -> Offset {
        self.shared.state().local_start()
    }

    /// Returns the first offset that is not written yet.
    pub fn log_end(&self) -> Offset {
        self.shared.state().log_end()
    }

    /// Returns the reason why nothing can be made durable any longer, if any. The reason is a failed write or sync,
    /// possibly one without a waiting caller.
    pub fn failure(&self) -> Option<String> {
        let shared = &self.shared;
        shared.failed.get().cloned().or_else(|| shared.core.journal.failed().map(str::to_owned))
    }

    /// Returns the first offset that may not be on stable storage.
    pub fn persisted_end(&self) -> Offset {
        self.shared.state().persisted_end
    }

    /// Returns the bytes of the segments.
    pub fn bytes(&self) -> u64 {
        self.shared.state().bytes()
    }

    /// Returns the reason why the replica accepts no writes, if any.
    pub fn failed(&self) -> Option<String> {
        self.shared.refusal()
    }

    /// Returns the start offset of each leader epoch.
    pub fn epochs(&self) -> Held<'_, EpochHistory> {
        Held { state: self.shared.state(), pick: |state| &state.epochs }
    }

    /// Returns the producer state at the log end.
    pub fn producers(&self) -> Held<'_, ProducerTable> {
        Held { state: self.shared.state(), pick: |state| &state.producers }
    }

    /// Returns the sealed segments, oldest first.
    pub fn sealed(&self) -> Vec<SegmentInfo> {
        let state = self.shared.state();
        state.segments[..state.segments.len() - 1].iter().map(|segment| segment.info).collect()
    }

    /// Sets write times that lie after `now_ms` to `now_ms`. The clock was ahead when such a segment was written, and
    /// its age counts from now.
    pub fn correct_written_times(&self, now_ms: i64) {
        for segment in &mut self.shared.state().segments {
            segment.info.written_ms = segment.info.written_ms.min(now_ms);
        }
    }

    /// Returns the active segment.
    pub fn active(&self) -> SegmentInfo {
        self.shared.state().active().info
    }

    /// Appends stamped batches with one write to the page cache. They can be read at once, and are durable when
    /// [`Self::persist`] reports it. After an error none of them is in the log.
    ///
    /// # Panics
    /// The batches do not start at the log end, are not contiguous, or their epoch decreases.
    pub fn append(&mut self, batches: &[Batch]) -> Result<(), AppendError> {
        let Some(first) = batches.first() else { return Ok(()) };
        if let Some(reason) = self.shared.refusal() {
            return Err(AppendError::Failed { reason });
        }
        let bytes: usize = batches.iter().map(Batch::encoded_len).sum();
        self.assert_placed(batches);
        if !self.shared.core.has_room(bytes as u64) {
            return Err(self.disk_is_full());
        }
        if self.active().bytes + bytes as u64 > MAX_SEGMENT_BYTES {
            self.roll()?;
        }
        let (info, file) = {
            let state = self.shared.state();
            (state.active().info, state.active().file.clone())
        };
        self.write(&info, &file, batches)?;
        let end = self.publish(batches);
        let kept = self.shared.core.tail.push(&self.shared.tail, batches);
        let most = if self.journaled { self.shared.core.options.journal_most } else { 0 };
        self.pending.push(&info, kept, bytes, most);
        self.shared.touch(bytes as u64);
        debug_assert_eq!(end.since(first.base_offset()), batches.iter().map(|b| u64::from(b.count())).sum::<u64>());
        Ok(())
    }

    fn assert_placed(&self, batches: &[Batch]) {
        let state = self.shared.state();
        let (mut end, mut epoch) = (state.log_end(), state.epochs.last().map(|(epoch, _)| epoch));
        drop(state);
        for batch in batches {
            assert_eq!(batch.base_offset(), end, "batches are contiguous from the log end");
            let stamped = batch.leader_epoch().expect("batches are stamped before they are appended");
            assert!(epoch.is_none_or(|epoch| epoch <= stamped), "leader epochs never fall");
            (end, epoch) = (batch.end_offset(), Some(stamped));
        }
    }

    fn write(&mut self, info: &SegmentInfo, file: &SegmentFile, batches: &[Batch]) -> Result<(), AppendError> {
        let written = self.prepare(info, file).and_then(|open| {
            let mut slices = Vec::with_capacity(batches.len() * 2);
            for batch in batches {
                slices.push(IoSlice::new(batch.header()));
                slices.push(IoSlice::new(batch.records_bytes()));
            }
            let written = open.file.write_at(&slices, info.bytes).inspect_err(|_| self.checked = None);
            // The flag is set after the write and before its publication, so a sync that sees the batches also sees the
            // flag.
            file.dirty.store(true, Ordering::Release);
            written
        });
        let Err(error) = written else {
            let full = &self.shared.core.disk_full;
            if full.load(Ordering::Relaxed) && full.swap(false, Ordering::Relaxed) {
                tracing::info!(path = %self.shared.core.dir.display(), "appends find room on the disk again");
            }
            return Ok(());
        };
        let cut_back = || -> io::Result<()> {
            let open = self.shared.core.files.get(file.serial, &file.path, Mode::Write)?;
            if open.file.size()? > info.bytes { open.file.truncate(info.bytes) } else { Ok(()) }
        };
        if is_full(&error) && (cut_back().is_ok() || info.bytes == 0) {
            return Err(self.disk_is_full());
        }
        let reason = format!("{} could not be written: {error}", file.path.display());
        drop(cut_back());
        self.shared.fail(reason.clone());
        Err(AppendError::Failed { reason })
    }

    fn disk_is_full(&self) -> AppendError {
        self.shared.core.say_full();
        AppendError::DiskFull
    }

    /// Opens the active segment. On first use it truncates surplus bytes, fails if bytes are missing, and loads the
    /// index.
    fn prepare(&mut self, info: &SegmentInfo, file: &SegmentFile) -> io::Result<Arc<OpenFile>> {
        if info.bytes == 0 && self.checked != Some(file.serial) {
            self.shared.state().names_changed = true;
        }
        let open = self.shared.core.files.get(file.serial, &file.path, Mode::Write)?;
        if self.checked == Some(file.serial) {
            return Ok(open);
        }
        let len = open.file.size()?;
        if len > info.bytes {
            open.file.truncate(info.bytes)?;
        } else if len < info.bytes {
            let why = format!("it has {len} bytes and {} were written", info.bytes);
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, why));
        }
        if self.shared.state().index.is_none() {
            let index = if info.bytes == 0 { Index::default() } else { self.reader().active_index(info, file)? };
            self.shared.state().index = Some(index);
        }
        self.checked = Some(file.serial);
        Ok(open)
    }

    /// Adds written batches to the state of the log, and returns the new log end.
    fn publish(&self, batches: &[Batch]) -> Offset {
        let mut state = self.shared.state();
        let State { segments, epochs, producers, index, .. } = &mut *state;
        let info = &mut segments.last_mut().expect("a log has an active segment").info;
        info.note_write(clock::wall_ms());
        for batch in batches {
            if let Some(index) = index {
                index.note(batch.base_offset(), info.bytes, info.max_timestamp);
            }
            info.note(batch);
            let epoch = batch.leader_epoch().unwrap_or(LeaderEpoch(0));
            if epochs.last().is_none_or(|(last, _)| last < epoch) {
                assert!(Arc::make_mut(epochs).note(epoch, batch.base_offset()), "leader epochs never fall");
            }
            if producers.takes(batch) {
                Arc::make_mut(producers).note(batch);
            }
        }
        let end = info.end;
        state.forget_expired_producers();
        state.unsynced_bytes += batches.iter().map(|batch| batch.encoded_len() as u64).sum::<u64>();
        end
    }

    /// Makes all batches appended so far durable, and then calls `done` with the persisted end on the journal's thread.
    /// These calls have the order of the persist calls. After an error, `done` may be called on another thread and out
    /// of order.
    pub fn persist(&mut self, done: Done) {
        let pending = std::mem::take(&mut self.pending);
        if let Some(reason) = self.shared.refusal() {
            return done(Err(PersistError::Failed { reason }));
        }
        let core = &self.shared.core;
        let round = core.options.round_bytes;
        let mut state = self.shared.state();
        let (generation, end) = (state.generation, state.log_end());
        let marker = self.shared.head(Kind::Synced, generation, end, end);
        let large = pending.too_much || pending.pieces.iter().any(|piece| piece.bytes > round);
        if large || state.syncing > 0 {
            state.syncing += 1;
            drop(state);
            core.work().jobs.push_back(SyncJob { replica: self.shared.clone(), head: marker, done });
            core.wake_syncer();
            return;
        }
        drop(state);
        let mut done = Some(done);
        let last = pending.pieces.len().saturating_sub(1);
        for (i, piece) in pending.pieces.into_iter().enumerate() {
            let mut head = self.shared.head(Kind::Append, generation, piece.base(), piece.end());
            (head.segment, head.position) = (piece.segment, piece.position);
            head.epoch = piece.batches.last().and_then(Batch::leader_epoch);
            let done = if i == last { done.take() } else { None };
            let Piece { bytes, batches, .. } = piece;
            core.journal.submit(Item { head, batches, bytes, replica: self.shared.clone(), done });
        }
        if let Some(done) = done {
            let replica = self.shared.clone();
            core.journal.submit(Item { head: marker, batches: Vec::new(), bytes: 0, replica, done: Some(done) });
        }
    }

    /// Returns true if `next_bytes` more would extend the active segment beyond `segment_bytes`, so that it should be
    /// sealed first. An empty segment is never full.
    pub fn is_full(&self, segment_bytes: u64, next_bytes: usize) -> bool {
        let bytes = self.active().bytes;
        bytes > 0 && bytes + next_bytes as u64 > segment_bytes.min(MAX_SEGMENT_BYTES)
    }

    /// Seals the active segment, so that the next append starts a new one. An empty segment stays active.
    pub fn roll(&mut self) -> Result<(), AppendError> {
        if let Some(reason) = self.shared.refusal() {
            return Err(AppendError::Failed { reason });
        }
        let info = self.active();
        if info.bytes == 0 {
            return Ok(());
        }
        self.write_caches();
        let file = SegmentFile::new(self.shared.core.files.serial(), &self.shared.dir, info.end);
        let mut state = self.shared.state();
        let segment = Segment { info: SegmentInfo::empty(info.end, clock::wall_ms()), file: Arc::new(file) };
        state.segments.push(segment);
        state.index = Some(Index::default());
        Ok(())
    }

    /// Writes the index files of the active segment and the snapshot at its end. They are caches: a failure is ignored,
    /// and missing files are rebuilt when needed.
    pub(super) fn write_caches(&self) {
        write_caches(&self.shared);
    }

    /// Sets whether appended batches are kept until [`Self::persist`] submits them to the journal; initially true.
    /// False suits a topic that does not persist: a later persist call then syncs the segments.
    pub fn set_journaled(&mut self, journaled: bool) {
        self.journaled = journaled;
    }

    /// Sets `producer.id.expiration.ms`. `None` is the initial value, and that of a topic that limits producers by
    /// number alone.
    pub fn set_producer_expiration(&mut self, expiration: Option<Duration>) {
        let mut state = self.shared.state();
        state.producer_expiration_ms =
            expiration.map(|expiration| i64::try_from(expiration.as_millis()).unwrap_or(i64::MAX));
        state.forget_expired_producers();
    }

    /// Drops the batches that were not submitted to the journal.
    pub(super) fn forget_pending(&mut self) {
        self.pending = Pending::default();
        self.checked = None;
    }
}

/// Writes the index files of a replica's active segment and the snapshot at its end.
pub(super) fn write_caches(shared: &Shared) {
    let (info, index, snapshot) = {
        let state = shared.state();
        let snapshot = Snapshot::encode(&state.epochs, &state.producers, state.log_end());
        (state.active().info, state.index.clone(), snapshot)
    };
    if info.bytes == 0 {
        // The snapshot at the base of an empty segment was written earlier. If nothing precedes that base on this disk,
        // the snapshot is no cache, and a write that may fail half-way must not touch it.
        return;
    }
    let disk = &shared.core.disk;
    let mut written = disk.write(&shared.path(info.end, "snapshot"), &snapshot).map(drop);
    if let Some(index) = index {
        let (offsets, times) = index.encode(info.base, info.bytes);
        written = written
            .and_then(|()| disk.write(&shared.path(info.base, "index"), &offsets).map(drop))
            .and_then(|()| disk.write(&shared.path(info.base, "timeindex"), &times).map(drop));
    }
    if let Err(error) = written {
        tracing::debug!(partition = %shared.id, %error, "an index was not written; it is made again when needed");
    }
}

impl Drop for Replica {
    fn drop(&mut self) {
        self.shared.taken.store(false, Ordering::Release);
    }
}

impl Pending {
    fn push(&mut self, info: &SegmentInfo, batches: Vec<Batch>, bytes: usize, most: usize) {
        if self.too_much || self.bytes + bytes > most {
            // A replica that never calls persist (`replicated`) must not keep its batches in memory either.
            *self = Self { too_much: true, ..Self::default() };
            return;
        }
        self.bytes += bytes;
        match self.pieces.last_mut() {
            Some(piece) if piece.segment == info.base && piece.bytes + bytes <= 1 << 20 => {
                piece.bytes += bytes;
                piece.batches.extend(batches);
            }
            _ => self.pieces.push(Piece { segment: info.base, position: info.bytes, bytes, batches }),
        }
    }
}

impl Piece {
    fn base(&self) -> Offset {
        self.batches.first().map_or(self.segment, Batch::base_offset)
    }

    fn end(&self) -> Offset {
        self.batches.last().map_or(self.segment, Batch::end_offset)
    }
}
