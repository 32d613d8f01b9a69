//! Truncating a replica at either end, and resetting it.
//!
//! # Crash
//!
//! Eviction removes complete segments at the front: data that is in the object store or below the log start. A journal
//! entry records the new local start before a file is removed. After a crash, the next open removes the remaining files
//! below that start.
//!
//! A truncation writes one journal entry before it changes a file, and a completion entry after the files are truncated
//! and synced. After a crash between the two entries, only the persisted end is lowered: truncated batches may still be
//! in the log. After the second entry, replay restores no batches from earlier entries of the replica. So data that a
//! completed truncation removed does not reappear. A reset writes two entries as well, and replay repeats a reset that
//! has only the first one. The snapshot with which the new log starts is durable before the first entry.

use std::{
    io,
    sync::{Arc, atomic::Ordering},
};

use super::{
    segment_files::{
        remove_indexes_and_snapshots_above, remove_indexes_and_snapshots_below, remove_segment, snapshot_at,
    },
    writer::ReplicaLog,
};
use crate::{
    log::{
        disk::OpenMode,
        error::{ChangeError, is_full},
        format::{EntryKind, EpochHistory, ProducerTable, Segment, SegmentFile, SegmentInfo, Snapshot, snapshot},
    },
    model::Offset,
    task::clock,
};

/// Disk space that a reset may need in addition to the content of the snapshot. The space is one block for the new
/// names, and one for the unused end of the file's last block.
const NAMES_BYTES: u64 = 8192;

impl ReplicaLog {
    /// Truncates the log at `to`, or at the base of the batch that contains `to`, and returns the new log end. A `to`
    /// at or above the log end changes nothing. A `to` below the local start resets the log at `to`. Waits for two
    /// frames of the journal, and is durable on return. Persist calls that have not completed fail with
    /// [`PersistError::Truncated`](crate::log::PersistError::Truncated), unless nothing changes.
    pub fn truncate(&mut self, to: Offset) -> Result<Offset, ChangeError> {
        self.check_writable()?;
        let (segments, end) = {
            let state = self.inner.state();
            (state.segments.iter().map(|segment| segment.info).collect::<Vec<_>>(), state.log_end())
        };
        if to >= end {
            return Ok(end);
        }
        if to < segments[0].base {
            return self.reset(to).map(|()| to);
        }
        self.inner.ctx.check_change_space(0)?;
        let state_at_end = snapshot_at(&*self.inner.ctx.disk, &self.inner.dir, &segments, to);
        let (last, snapshot, corruption) = state_at_end.map_err(|error| self.fail_replica(&error))?;
        if let Some(reason) = corruption {
            return Err(self.fail_replica(&io::Error::other(reason)));
        }
        self.clear_unpersisted();
        let inner = self.inner.clone();
        sim_event!(LogChangeStarted { partition: inner.id, to: last.end, emptied: false });
        let generation = inner.ctx.next_generation();
        let removed = {
            let mut state = inner.state();
            let kept_count = segments.iter().filter(|info| info.base <= last.base).count();
            let removed = state.segments.split_off(kept_count);
            state.generation = generation;
            state.active_mut().info = last;
            state.epochs = Arc::new(snapshot.epochs);
            state.producers = Arc::new(snapshot.producers.charged(&inner.ctx.producer_memory));
            state.remove_expired_producers();
            state.index = None;
            state.persisted_end = state.persisted_end.min(last.end);
            if state.recovery.segment.end > last.end {
                state.recovery = state.recovery_point();
            }
            // Truncated batches are never synced. So their journal files must not wait for a sync above the new end.
            for (_, end) in &mut state.journal_pins {
                *end = (*end).min(last.end);
            }
            removed
        };
        // The truncation's own entry may wait for a journal file that only a sync of this replica releases.
        inner.mark_dirty(0);
        inner.ctx.tail.truncate(&inner.tail, last.end);
        if !mutant!(TruncateUnjournaled) {
            inner.ctx.commit(&inner, inner.entry_header(EntryKind::Truncate, generation, last.end, last.end))?;
        }
        self.truncate_files(&last, &removed).map_err(|error| self.fail_replica(&error))?;
        if !mutant!(TruncateUnjournaled) {
            inner.ctx.commit(&inner, inner.entry_header(EntryKind::Completed, generation, last.end, last.end))?;
        }
        sim_event!(LogChangeCompleted { partition: inner.id });
        Ok(last.end)
    }

    /// Removes the segments above the new log end, truncates the file of the segment `last`, and syncs it. The last
    /// segments are removed first, so that a crash leaves a shorter log and no gap.
    fn truncate_files(&self, last: &SegmentInfo, removed: &[Segment]) -> io::Result<()> {
        let ctx = &self.inner.ctx;
        for segment in removed.iter().rev() {
            self.remove(segment)?;
        }
        remove_indexes_and_snapshots_above(&*ctx.disk, &self.inner.dir, last.end)?;
        let file = self.inner.state().active_segment().file.clone();
        let open = ctx.files.get(file.serial, &file.path, OpenMode::Write)?;
        // The cached index describes the longer file.
        drop(open.index.lock().take());
        open.file.truncate(last.bytes)?;
        file.written_out.fetch_min(last.bytes, Ordering::AcqRel);
        file.dirty.store(true, Ordering::Release);
        self.inner.state().names_changed = true;
        self.inner.sync().map_err(io::Error::other)
    }

    /// Deletes all content and restarts the empty log at `at`. Waits for a sync and for two frames of the journal, and
    /// is durable on return. On a full disk nothing changes.
    pub fn reset(&mut self, at: Offset) -> Result<(), ChangeError> {
        self.reset_with(at, EpochHistory::new(), ProducerTable::new())
    }

    /// Resets the log as [`Self::reset`] does, with the epoch history and producer state of the offsets below `at`.
    /// Their snapshot is durable before the first journal entry of the reset. The snapshot first has a temporary name,
    /// because the old log may have a snapshot at `at` too.
    pub fn reset_with(
        &mut self,
        at: Offset,
        epochs: EpochHistory,
        producers: ProducerTable,
    ) -> Result<(), ChangeError> {
        self.check_writable()?;
        let snapshot = Snapshot::encode(&epochs, &producers, at);
        self.inner.ctx.check_change_space(snapshot.len() as u64 + NAMES_BYTES)?;
        // After this sync the old log needs no journal entries. Checkpoints describe the old log until the reset is
        // complete.
        self.inner.sync().map_err(|error| ChangeError::Failed { reason: error.to_string() })?;
        self.write_reset_snapshot(&snapshot, at)?;
        self.clear_unpersisted();
        let inner = self.inner.clone();
        sim_event!(LogChangeStarted { partition: inner.id, to: at, emptied: true });
        let old_record = Box::new(inner.checkpoint_record());
        let generation = inner.ctx.next_generation();
        let info = SegmentInfo::empty(at, clock::wall_ms());
        let removed = {
            let mut state = inner.state();
            let file = Arc::new(SegmentFile::new(inner.ctx.files.new_serial(), &inner.dir, at));
            let removed = std::mem::replace(&mut state.segments, vec![Segment { info, file }]);
            state.pre_reset_record = Some(old_record);
            (state.generation, state.persisted_end, state.log_start) = (generation, at, at);
            (state.epochs, state.producers) =
                (Arc::new(epochs), Arc::new(producers.charged(&inner.ctx.producer_memory)));
            state.remove_expired_producers();
            state.index = None;
            state.recovery = state.recovery_point();
            removed
        };
        inner.ctx.tail.truncate(&inner.tail, Offset::ZERO);
        inner.ctx.commit(&inner, inner.entry_header(EntryKind::Reset, generation, at, at))?;
        let replace_files = || -> io::Result<()> {
            for segment in removed.iter().rev() {
                self.remove(segment)?;
            }
            remove_indexes_and_snapshots_above(&*inner.ctx.disk, &inner.dir, Offset::ZERO)?;
            inner.ctx.disk.open(&inner.path(at, "log"), OpenMode::Write)?.sync()?;
            inner.ctx.disk.rename(&inner.path(at, snapshot::RESET_EXTENSION), &inner.path(at, "snapshot"))?;
            inner.sync_names()
        };
        replace_files().map_err(|error| self.fail_replica(&error))?;
        {
            let mut state = inner.state();
            state.journal_pins.clear();
            state.pre_reset_record = None;
        }
        inner.ctx.commit(&inner, inner.entry_header(EntryKind::Completed, generation, at, at))?;
        sim_event!(LogChangeCompleted { partition: inner.id });
        Ok(())
    }

    /// Writes the snapshot with which a reset log starts. On a full disk nothing changes. Any other error fails the
    /// replica.
    fn write_reset_snapshot(&self, snapshot: &[u8], at: Offset) -> Result<(), ChangeError> {
        let inner = &self.inner;
        let path = inner.path(at, snapshot::RESET_EXTENSION);
        let write = || -> io::Result<()> {
            inner.ctx.disk.write(&path, snapshot)?.sync()?;
            inner.sync_names()
        };
        match write() {
            Err(error) if is_full(&error) => {
                // If this removal fails, the next start removes the partial file.
                drop(inner.ctx.disk.remove(&path));
                inner.ctx.budget.on_full();
                Err(ChangeError::DiskFull)
            }
            written => written.map_err(|error| self.fail_replica(&error)),
        }
    }

    /// Advances the log start, at most to the log end. The log start never moves back. Offsets below it are no longer
    /// readable, and [`Self::evict`] removes their segments.
    pub fn advance_log_start(&mut self, to: Offset) {
        let inner = &self.inner;
        let generation = {
            let mut state = inner.state();
            let to = to.min(state.log_end());
            if to <= state.log_start {
                return;
            }
            state.log_start = to;
            state.remove_epochs();
            state.generation
        };
        inner.ctx.submit_unacked(inner, inner.entry_header(EntryKind::LogStart, generation, to, to));
    }

    /// Removes the sealed segments that end at or below `below`, and returns their bytes. Waits for one frame of the
    /// journal, and possibly for a sync. Current readers of a removed segment continue. On a full disk the call fails,
    /// or removes only some of these segments, which makes space for the next call. The disk space of large files is
    /// freed a little later, in steps.
    pub fn evict(&mut self, below: Offset) -> Result<u64, ChangeError> {
        self.check_writable()?;
        let inner = self.inner.clone();
        let has_unsynced_segments = {
            let state = inner.state();
            let sealed = &state.segments[..state.segments.len() - 1];
            let count = sealed.partition_point(|segment| segment.info.end <= below);
            if count == 0 {
                return Ok(0);
            }
            state.recovery.segment.base < state.segments[count].info.base
        };
        // The sync moves the recovery point into the remaining segments.
        if has_unsynced_segments && let Err(error) = inner.sync() {
            return Err(ChangeError::Failed { reason: error.to_string() });
        }
        let new_start =
            self.write_start_snapshot(below).map_err(|error| ChangeError::Failed { reason: error.to_string() })?;
        let (removed, generation, start) = {
            let mut state = inner.state();
            let count = state.segments.partition_point(|segment| segment.info.base < new_start);
            let removed: Vec<Segment> = state.segments.drain(..count).collect();
            let start = state.local_start();
            (removed, state.generation, start)
        };
        inner.ctx.tail.evict_below(&inner.tail, start);
        if let Err(error) =
            inner.ctx.commit(&inner, inner.entry_header(EntryKind::LocalStart, generation, start, start))
        {
            // The files still exist, and the next eviction removes them.
            inner.state().segments.splice(0..0, removed);
            return Err(error);
        }
        let mut bytes = 0;
        for segment in &removed {
            bytes += segment.info.bytes;
            if let Err(error) = self.remove(segment) {
                // The next start after a crash removes the files below the local start.
                tracing::warn!(partition = %inner.id, base = %segment.info.base, %error, "cannot remove a segment");
            }
        }
        if let Err(error) = remove_indexes_and_snapshots_below(&*inner.ctx.disk, &inner.dir, start) {
            tracing::debug!(partition = %inner.id, %error, "cannot remove indexes and snapshots below the log");
        }
        {
            let mut state = inner.state();
            state.remove_epochs();
            state.names_changed = true;
        }
        inner.mark_dirty(0);
        Ok(bytes)
    }

    /// Removes a segment and its caches. Its open file, if it can be opened, is kept until its disk space is freed in
    /// steps.
    fn remove(&self, segment: &Segment) -> io::Result<()> {
        let (ctx, serial) = (&self.inner.ctx, segment.file.serial);
        // The file is opened through the cache, so that readers share the handle. It is removed from the cache below,
        // when it has no name and no reader can open it again.
        let opened = ctx.files.get(serial, &segment.file.path, OpenMode::Read).ok();
        let result = remove_segment(&*ctx.disk, &self.inner.dir, segment.info.base);
        // The cache may have closed the file since it was opened above.
        let file = ctx.files.take(serial).or(opened);
        result?;
        file.into_iter().for_each(|file| ctx.removed.keep(file));
        Ok(())
    }

    /// Chooses the new local start for an eviction of the segments below `below`, makes the snapshot at this offset
    /// durable, and returns the offset. After the eviction only this snapshot holds the state before the local start.
    /// On a disk without space for a snapshot, the start of an earlier segment that has a snapshot is chosen. Fails if
    /// that would evict nothing.
    fn write_start_snapshot(&self, below: Offset) -> io::Result<Offset> {
        let segments: Vec<SegmentInfo> = self.inner.state().segments.iter().map(|segment| segment.info).collect();
        let removed = segments[..segments.len() - 1].partition_point(|info| info.end <= below);
        let mut start = removed;
        loop {
            match self.ensure_durable_snapshot(&segments, segments[start].base) {
                Err(error) if is_full(&error) && start > 1 => start -= 1,
                result => return result.map(|()| segments[start].base),
            }
        }
    }

    /// Makes the snapshot at `start` durable. An intact file is synced, because it may not have been synced before.
    /// Otherwise the snapshot is computed from the segments.
    fn ensure_durable_snapshot(&self, segments: &[SegmentInfo], start: Offset) -> io::Result<()> {
        let inner = &self.inner;
        let path = inner.path(start, "snapshot");
        let disk = &inner.ctx.disk;
        let exists = Snapshot::read(&**disk, &inner.dir, start).is_ok_and(|snapshot| snapshot.is_some());
        if !exists {
            let (_, snapshot, corruption) = snapshot_at(&*inner.ctx.disk, &inner.dir, segments, start)?;
            if let Some(reason) = corruption {
                return Err(io::Error::new(io::ErrorKind::InvalidData, reason));
            }
            disk.write(&path, &Snapshot::encode(&snapshot.epochs, &snapshot.producers, start))?;
        }
        disk.open(&path, OpenMode::Write)?.sync()?;
        disk.sync_dir(&inner.dir)
    }

    /// Fails if the replica accepts no writes.
    fn check_writable(&self) -> Result<(), ChangeError> {
        self.inner.refusal().map_or(Ok(()), |reason| Err(ChangeError::Failed { reason }))
    }

    /// Fails the replica after an error during a change, and returns the error of the change. The files may be in a
    /// state between the old and the new log, and nothing more is written. A restart repeats a reset whose first entry
    /// is in the journal.
    fn fail_replica(&self, error: &io::Error) -> ChangeError {
        let reason = format!("cannot truncate or reset the log: {error}");
        self.inner.fail(reason.clone());
        ChangeError::Failed { reason }
    }
}
