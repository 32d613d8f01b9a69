//! One partition's log on this disk, as its single writer uses it.

use std::{
    io::{self, IoSlice},
    ops::Deref,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use super::{LogState, ReplicaInner, file_cache::OpenFile, reader::LogReader, sync_queue::SyncJob};
use crate::{
    log::{
        disk::OpenMode,
        error::{LogAppendError, PersistError, is_full},
        format::{EntryKind, EpochHistory, Index, ProducerTable, Segment, SegmentFile, SegmentInfo, Snapshot},
        journal::{JournalEntry, PersistCallback},
    },
    model::{LeaderEpoch, Offset, PartitionId},
    record::Batch,
    task::{clock, lock::MutexGuard},
};

/// Maximum payload in bytes of a journal entry that combines several appends. The batches of one append are never
/// split.
const MAX_ENTRY_BYTES: usize = 1 << 20;

/// Maximum size of a segment in bytes: positions in it are 32 bits wide.
const MAX_SEGMENT_BYTES: u64 = i32::MAX as u64;

/// One partition's log on this disk. The holder of this value is the only writer. A method waits for a sync only if its
/// comment states that.
pub struct ReplicaLog {
    pub(super) inner: Arc<ReplicaInner>,
    /// Batches that were appended and not submitted to the journal.
    pending: UnpersistedBatches,
    /// Serial of the segment file whose length was verified; `None` if the next append must verify it.
    verified_file: Option<u64>,
    /// True if appended batches are kept until a persist call submits them to the journal.
    journaled: bool,
}

/// Batches that were appended since the last persist call.
#[derive(Default)]
struct UnpersistedBatches {
    payloads: Vec<EntryPayload>,
    /// Bytes of all payloads.
    bytes: usize,
    /// True if the bytes exceed the journal's limit, or if batches from before this writer may not be durable. The
    /// batches are then dropped, and the next persist call syncs the segments instead.
    exceeds_journal: bool,
}

/// Consecutive batches of one segment that form one journal entry.
struct EntryPayload {
    /// Base offset of the segment.
    segment: Offset,
    /// Position of the first batch in the file.
    position: u64,
    /// Encoded length of the batches.
    bytes: usize,
    batches: Vec<Batch>,
}

/// Reference to a part of a replica's state. It holds the lock of the state, so readers and syncs wait until it is
/// dropped.
pub struct StateRef<'a, T> {
    state: MutexGuard<'a, LogState>,
    pick: fn(&LogState) -> &T,
}

impl<T> Deref for StateRef<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        (self.pick)(&self.state)
    }
}

impl ReplicaLog {
    /// Returns the writer of a replica; `None` if the replica already has one.
    pub(in crate::log) fn open(inner: Arc<ReplicaInner>) -> Option<Self> {
        if inner.writer_open.swap(true, Ordering::AcqRel) {
            return None;
        }
        // Batches that were found in the files, or appended by an earlier writer, may not be durable.
        let exceeds_journal = {
            let state = inner.state();
            state.persisted_end < state.log_end()
        };
        Some(Self {
            inner,
            pending: UnpersistedBatches { exceeds_journal, ..UnpersistedBatches::default() },
            verified_file: None,
            journaled: true,
        })
    }

    #[cfg(test)]
    pub(in crate::log) fn inner(&self) -> &ReplicaInner {
        &self.inner
    }

    /// Returns the partition of the log.
    pub fn id(&self) -> PartitionId {
        self.inner.id
    }

    /// Returns a handle for reading.
    pub fn reader(&self) -> LogReader {
        LogReader::new(self.inner.clone())
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

    /// Returns the reason why nothing can be made durable from now on, if any. The reason is a failed write or sync, or
    /// the deletion of the replica. The failure may be one of a background sync, whose error no call returns.
    pub fn write_error(&self) -> Option<String> {
        let inner = &self.inner;
        inner.failed.get().cloned().or_else(|| inner.ctx.journal.failed().map(str::to_owned))
    }

    /// Returns the first offset that may not be on stable storage.
    pub fn persisted_end(&self) -> Offset {
        self.inner.state().persisted_end
    }

    /// Returns the bytes of the segments.
    pub fn bytes(&self) -> u64 {
        self.inner.state().bytes()
    }

    /// Returns the reason why the replica accepts no writes, if any.
    pub fn failed(&self) -> Option<String> {
        self.inner.refusal()
    }

    /// Returns the start offset of each leader epoch.
    pub fn epochs(&self) -> StateRef<'_, EpochHistory> {
        StateRef { state: self.inner.state(), pick: |state| &state.epochs }
    }

    /// Returns the producer state at the log end.
    pub fn producers(&self) -> StateRef<'_, ProducerTable> {
        StateRef { state: self.inner.state(), pick: |state| &state.producers }
    }

    /// Returns the sealed segments, oldest first.
    pub fn sealed(&self) -> Vec<SegmentInfo> {
        let state = self.inner.state();
        state.segments[..state.segments.len() - 1].iter().map(|segment| segment.info).collect()
    }

    /// Sets write times after `now_ms` to `now_ms`. A segment that was written while the clock was ahead has such a
    /// time. Its age counts from now on.
    pub fn correct_written_times(&self, now_ms: i64) {
        for segment in &mut self.inner.state().segments {
            segment.info.written_ms = segment.info.written_ms.min(now_ms);
        }
    }

    /// Returns the active segment.
    pub fn active_segment(&self) -> SegmentInfo {
        self.inner.state().active_segment().info
    }

    /// Appends batches with offsets and leader epochs, with one write to the page cache. Rolls first if the batches
    /// would exceed the maximum size of a segment. The batches can be read at once, and are durable when
    /// [`Self::persist`] reports it. After an error none of them is in the log.
    ///
    /// # Panics
    /// The batches do not start at the log end, are not contiguous, have no leader epoch, or their epoch decreases.
    pub fn append(&mut self, batches: &[Batch]) -> Result<(), LogAppendError> {
        let Some(first) = batches.first() else { return Ok(()) };
        if let Some(reason) = self.inner.refusal() {
            return Err(LogAppendError::Failed { reason });
        }
        let bytes: usize = batches.iter().map(Batch::encoded_len).sum();
        self.assert_contiguous(batches);
        if !self.inner.ctx.reserve_append(bytes as u64) {
            return Err(self.disk_is_full());
        }
        if self.active_segment().bytes + bytes as u64 > MAX_SEGMENT_BYTES {
            self.roll()?;
        }
        let (info, file) = {
            let state = self.inner.state();
            (state.active_segment().info, state.active_segment().file.clone())
        };
        self.write(&info, &file, batches)?;
        let end = self.publish(batches);
        let cached = self.inner.ctx.tail.push(&self.inner.tail, batches);
        let max_bytes = if self.journaled { self.inner.ctx.options.max_journaled_bytes } else { 0 };
        self.pending.push(&info, cached, bytes, max_bytes);
        self.inner.mark_dirty(bytes as u64);
        debug_assert_eq!(end.since(first.base_offset()), batches.iter().map(|b| u64::from(b.count())).sum::<u64>());
        Ok(())
    }

    /// Panics if the batches do not continue the log. See [`Self::append`].
    fn assert_contiguous(&self, batches: &[Batch]) {
        let state = self.inner.state();
        let (mut end, mut epoch) = (state.log_end(), state.epochs.last().map(|(epoch, _)| epoch));
        drop(state);
        for batch in batches {
            assert_eq!(batch.base_offset(), end, "batches are contiguous from the log end");
            let stamped = batch.leader_epoch().expect("batches are stamped before they are appended");
            assert!(epoch.is_none_or(|epoch| epoch <= stamped), "leader epochs never decrease");
            (end, epoch) = (batch.end_offset(), Some(stamped));
        }
    }

    /// Writes batches at the end of the active segment. After an error the file is truncated to its previous length. A
    /// full disk does not fail the replica, unless the segment has content and that truncation fails. Any other error
    /// fails the replica.
    fn write(&mut self, info: &SegmentInfo, file: &SegmentFile, batches: &[Batch]) -> Result<(), LogAppendError> {
        let written = self.open_for_append(info, file).and_then(|open| {
            let mut slices = Vec::with_capacity(batches.len() * 2);
            for batch in batches {
                slices.push(IoSlice::new(batch.header()));
                slices.push(IoSlice::new(batch.records_bytes()));
            }
            let written = open.file.write_at(&slices, info.bytes).inspect_err(|_| self.verified_file = None);
            // The flag is set after the write and before `publish`. So a sync that includes the batches also finds the
            // flag.
            file.dirty.store(true, Ordering::Release);
            written
        });
        let Err(error) = written else {
            self.inner.ctx.budget.on_append();
            return Ok(());
        };
        let truncate_back = || -> io::Result<()> {
            let open = self.inner.ctx.files.get(file.serial, &file.path, OpenMode::Write)?;
            if open.file.size()? > info.bytes { open.file.truncate(info.bytes) } else { Ok(()) }
        };
        if is_full(&error) && (truncate_back().is_ok() || info.bytes == 0) {
            return Err(self.disk_is_full());
        }
        let reason = format!("cannot write {}: {error}", file.path.display());
        drop(truncate_back());
        self.inner.fail(reason.clone());
        Err(LogAppendError::Failed { reason })
    }

    /// Marks the disk as full, and returns the error of the append.
    fn disk_is_full(&self) -> LogAppendError {
        self.inner.ctx.budget.on_full();
        LogAppendError::DiskFull
    }

    /// Opens the file of the active segment for an append. This function does more on the first use, and after a failed
    /// write, a truncation or a reset. The function then also truncates surplus bytes, fails if bytes are missing, and
    /// loads a missing index.
    fn open_for_append(&mut self, info: &SegmentInfo, file: &SegmentFile) -> io::Result<Arc<OpenFile>> {
        if info.bytes == 0 && self.verified_file != Some(file.serial) {
            // The open below may create the file.
            self.inner.state().names_changed = true;
        }
        let open = self.inner.ctx.files.get(file.serial, &file.path, OpenMode::Write)?;
        if self.verified_file == Some(file.serial) {
            return Ok(open);
        }
        let len = open.file.size()?;
        if len > info.bytes {
            open.file.truncate(info.bytes)?;
        } else if len < info.bytes {
            let reason = format!("the file has {len} bytes and {} were written", info.bytes);
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, reason));
        }
        if self.inner.state().index.is_none() {
            let index = if info.bytes == 0 { Index::default() } else { self.reader().active_index(info, file)? };
            self.inner.state().index = Some(index);
        }
        self.verified_file = Some(file.serial);
        Ok(open)
    }

    /// Adds written batches to the state of the log, so that readers see them. Returns the new log end.
    fn publish(&self, batches: &[Batch]) -> Offset {
        let mut state = self.inner.state();
        let LogState { segments, epochs, producers, index, .. } = &mut *state;
        let info = &mut segments.last_mut().expect("a log has an active segment").info;
        info.record_write(clock::wall_ms());
        for batch in batches {
            if let Some(index) = index {
                index.add_batch(batch.base_offset(), info.bytes, info.max_timestamp);
            }
            info.extend(batch);
            let epoch = batch.leader_epoch().unwrap_or(LeaderEpoch(0));
            if epochs.last().is_none_or(|(last, _)| last < epoch) {
                assert!(Arc::make_mut(epochs).record(epoch, batch.base_offset()), "leader epochs never decrease");
            }
            if producers.is_changed_by(batch) {
                Arc::make_mut(producers).record_batch(batch);
            }
        }
        let end = info.end;
        state.remove_expired_producers();
        end
    }

    /// Makes all batches appended so far durable, and then calls `done` with the persisted end on the journal's thread.
    /// The callbacks are called in the order of the persist calls. After an error, `done` may be called on another
    /// thread and out of order.
    pub fn persist(&mut self, done: PersistCallback) {
        let pending = std::mem::take(&mut self.pending);
        if let Some(reason) = self.inner.refusal() {
            return done(Err(PersistError::Failed { reason }));
        }
        let ctx = &self.inner.ctx;
        let max_frame_bytes = ctx.options.max_frame_bytes;
        let mut state = self.inner.state();
        let (generation, end) = (state.generation, state.log_end());
        let marker = self.inner.entry_header(EntryKind::Synced, generation, end, end);
        let needs_sync =
            pending.exceeds_journal || pending.payloads.iter().any(|payload| payload.bytes > max_frame_bytes);
        // A persist call behind one that waits for a sync waits for a sync too, so that both complete in order.
        if needs_sync || state.queued_sync_jobs > 0 {
            state.queued_sync_jobs += 1;
            drop(state);
            ctx.sync_queue.push_job(SyncJob { replica: self.inner.clone(), header: marker, done });
            return;
        }
        drop(state);
        let mut done = Some(done);
        let last = pending.payloads.len().saturating_sub(1);
        for (i, payload) in pending.payloads.into_iter().enumerate() {
            let mut header = self.inner.entry_header(EntryKind::Append, generation, payload.base(), payload.end());
            (header.segment, header.position) = (payload.segment, payload.position);
            header.epoch = payload.batches.last().and_then(Batch::leader_epoch);
            // The last entry reports the result of the persist call, because the journal completes entries in order.
            let entry_done = if i == last { done.take() } else { None };
            let EntryPayload { bytes, batches, .. } = payload;
            ctx.journal.submit(JournalEntry { header, batches, bytes, client: self.inner.clone(), done: entry_done });
        }
        // Without payloads, an entry without data is submitted. Its completion shows that all earlier entries are
        // durable.
        if let Some(done) = done {
            let client = self.inner.clone();
            ctx.journal.submit(JournalEntry {
                header: marker,
                batches: Vec::new(),
                bytes: 0,
                client,
                done: Some(done),
            });
        }
    }

    /// Returns true if `next_bytes` more would extend the active segment beyond `segment_bytes` or the maximum size of
    /// a segment. The segment should then be sealed first. An empty segment is never full.
    pub fn is_full(&self, segment_bytes: u64, next_bytes: usize) -> bool {
        let bytes = self.active_segment().bytes;
        bytes > 0 && bytes + next_bytes as u64 > segment_bytes.min(MAX_SEGMENT_BYTES)
    }

    /// Seals the active segment, so that the next append starts a new one. An empty segment stays active.
    pub fn roll(&mut self) -> Result<(), LogAppendError> {
        if let Some(reason) = self.inner.refusal() {
            return Err(LogAppendError::Failed { reason });
        }
        let info = self.active_segment();
        if info.bytes == 0 {
            return Ok(());
        }
        self.inner.write_caches();
        let file = SegmentFile::new(self.inner.ctx.files.new_serial(), &self.inner.dir, info.end);
        let mut state = self.inner.state();
        let segment = Segment { info: SegmentInfo::empty(info.end, clock::wall_ms()), file: Arc::new(file) };
        state.segments.push(segment);
        state.index = Some(Index::default());
        Ok(())
    }

    /// Sets whether appended batches are kept until [`Self::persist`] submits them to the journal; initially true.
    /// False suits a topic with `replicated` durability. A later persist call then syncs the segments instead.
    pub fn set_journaled(&mut self, journaled: bool) {
        self.journaled = journaled;
    }

    /// Sets `producer.id.expiration.ms`, and removes the producers that have expired. `None` is the initial value, and
    /// that of a topic that limits producers by number alone.
    pub fn set_producer_expiration(&mut self, expiration: Option<Duration>) {
        let mut state = self.inner.state();
        state.producer_expiration_ms =
            expiration.map(|expiration| i64::try_from(expiration.as_millis()).unwrap_or(i64::MAX));
        state.remove_expired_producers();
    }

    /// Drops the batches that were not submitted to the journal, before a truncation or reset. The next append verifies
    /// the length of its file.
    pub(super) fn clear_unpersisted(&mut self) {
        self.pending = UnpersistedBatches::default();
        self.verified_file = None;
    }
}

impl Drop for ReplicaLog {
    fn drop(&mut self) {
        self.inner.writer_open.store(false, Ordering::Release);
    }
}

impl UnpersistedBatches {
    /// Adds the batches of one append to the segment `info`, as it was before the append. `bytes` is their encoded
    /// length. Above `max_bytes` in total, all batches are dropped, and the next persist call syncs the segments.
    fn push(&mut self, info: &SegmentInfo, batches: Vec<Batch>, bytes: usize, max_bytes: usize) {
        if self.exceeds_journal || self.bytes + bytes > max_bytes {
            // A replica that never calls persist (`replicated`) must not keep its batches in memory either.
            *self = Self { exceeds_journal: true, ..Self::default() };
            return;
        }
        self.bytes += bytes;
        match self.payloads.last_mut() {
            Some(payload) if payload.segment == info.base && payload.bytes + bytes <= MAX_ENTRY_BYTES => {
                payload.bytes += bytes;
                payload.batches.extend(batches);
            }
            _ => self.payloads.push(EntryPayload { segment: info.base, position: info.bytes, bytes, batches }),
        }
    }
}

impl EntryPayload {
    fn base(&self) -> Offset {
        self.batches.first().map_or(self.segment, Batch::base_offset)
    }

    fn end(&self) -> Offset {
        self.batches.last().map_or(self.segment, Batch::end_offset)
    }
}

impl ReplicaInner {
    /// Writes the caches of the active segment before a clean shutdown, unless the index was never needed.
    pub(in crate::log) fn write_caches_for_close(&self) {
        if self.state().index.is_some() {
            self.write_caches();
        }
    }

    /// Writes the index files of the active segment and the snapshot at its end. They are caches: a failure is ignored,
    /// and missing files are rebuilt when needed.
    fn write_caches(&self) {
        let (info, index, snapshot) = {
            let state = self.state();
            let snapshot = Snapshot::encode(&state.epochs, &state.producers, state.log_end());
            (state.active_segment().info, state.index.clone(), snapshot)
        };
        if info.bytes == 0 {
            // The snapshot at the base of an empty segment was written earlier. If that base is the local start, the
            // snapshot is no cache, and a write that may fail half-way must not touch it.
            return;
        }
        let disk = &self.ctx.disk;
        let mut written = disk.write(&self.path(info.end, "snapshot"), &snapshot).map(drop);
        if let Some(index) = index {
            let (offsets, times) = index.encode(info.base, info.bytes);
            written = written
                .and_then(|()| disk.write(&self.path(info.base, "index"), &offsets).map(drop))
                .and_then(|()| disk.write(&self.path(info.base, "timeindex"), &times).map(drop));
        }
        if let Err(error) = written {
            tracing::debug!(partition = %self.id, %error, "cannot write an index or snapshot: rebuilt when needed");
        }
    }
}
