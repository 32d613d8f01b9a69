//! Truncating a replica at either end, and resetting it.
//!
//! # Crash
//!
//! Eviction removes complete segments at the front: data that is in the object store or below the log start. A journal
//! entry records the new local start before a file is removed. After a crash, the next open removes the remaining files
//! below that start.
//!
//! A truncation writes one journal entry before it changes a file, and a completion entry after the files are truncated
//! and synced. Between the two entries, replay repeats the truncation. After the second, replay skips all earlier
//! entries of the replica. So truncated data does not reappear, and a replay never truncates later appends.

use std::{
    io,
    sync::{Arc, atomic::Ordering},
};

use super::{
    disk::Mode,
    epochs::EpochHistory,
    error::{ChangeError, is_full},
    journal::entry::Kind,
    producers::ProducerTable,
    recover::{remove_caches_above, remove_caches_below, remove_segment, tables_at},
    replica::Replica,
    segment::{Segment, SegmentFile, SegmentInfo},
    shared::State,
    snapshot::{self, Snapshot},
};
use crate::{model::Offset, task::clock};

/// Maximum disk bytes of new names and the end of a new file: two blocks.
const NAMES_BYTES: u64 = 8192;

impl Replica {
    /// Truncates the log at `to`, or at the base of the batch that contains `to`, and returns the new log end. Waits
    /// for two frames of the journal, and is durable on return. Persist calls for truncated batches fail with `Cut`.
    pub fn truncate(&mut self, to: Offset) -> Result<Offset, ChangeError> {
        self.writable()?;
        let (segments, end) = {
            let state = self.shared.state();
            (state.segments.iter().map(|segment| segment.info).collect::<Vec<_>>(), state.log_end())
        };
        if to >= end {
            return Ok(end);
        }
        if to < segments[0].base {
            return self.reset(to).map(|()| to);
        }
        self.shared.core.may_change(0)?;
        let found = tables_at(&self.shared.core, &self.shared.dir, &segments, to);
        let (last, tables, damage) = found.map_err(|error| self.failed_change(&error))?;
        if let Some(why) = damage {
            return Err(self.failed_change(&io::Error::other(why)));
        }
        self.forget_pending();
        let shared = self.shared.clone();
        sim_event!(LogChangeStarted { partition: shared.id, to: last.end, emptied: false });
        let generation = shared.core.next_generation();
        let removed = {
            let mut state = shared.state();
            let keep = segments.iter().filter(|info| info.base <= last.base).count();
            let removed = state.segments.split_off(keep);
            state.generation = generation;
            state.active_mut().info = last;
            state.epochs = Arc::new(tables.epochs);
            state.producers = Arc::new(tables.producers.charged(&shared.core.producer_memory));
            state.forget_expired_producers();
            state.index = None;
            state.persisted_end = state.persisted_end.min(last.end);
            if state.recovery.segment.end > last.end {
                state.recovery = state.point();
            }
            // Truncated batches are never synced, so the ring files that held them pin nothing above the new end.
            for (_, end) in &mut state.unsynced {
                *end = (*end).min(last.end);
            }
            removed
        };
        // The truncation itself may wait for one of these files.
        shared.touch(0);
        shared.core.tail.truncate(&shared.tail, last.end);
        if !mutant!(TruncateUnjournaled) {
            shared.core.commit(&shared, shared.head(Kind::Cut, generation, last.end, last.end))?;
        }
        self.cut_files(&last, &removed).map_err(|error| self.failed_change(&error))?;
        if !mutant!(TruncateUnjournaled) {
            shared.core.commit(&shared, shared.head(Kind::Settled, generation, last.end, last.end))?;
        }
        sim_event!(LogChangeCompleted { partition: shared.id });
        Ok(last.end)
    }

    /// Truncates the files. The last segments are removed first, so that a crash leaves a shorter log and no gap.
    fn cut_files(&self, last: &SegmentInfo, removed: &[Segment]) -> io::Result<()> {
        let core = &self.shared.core;
        for segment in removed.iter().rev() {
            self.remove(segment)?;
        }
        remove_caches_above(core, &self.shared.dir, last.end)?;
        let file = self.shared.state().active().file.clone();
        let open = core.files.get(file.serial, &file.path, Mode::Write)?;
        // The cached index describes the longer file.
        drop(open.index.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take());
        open.file.truncate(last.bytes)?;
        file.written_out.fetch_min(last.bytes, Ordering::AcqRel);
        file.dirty.store(true, Ordering::Release);
        self.shared.state().names_changed = true;
        self.shared.sync().map_err(io::Error::other)
    }

    /// Deletes all content and restarts the empty log at `at`. Durable on return. On a full disk nothing changes.
    pub fn reset(&mut self, at: Offset) -> Result<(), ChangeError> {
        self.reset_with(at, EpochHistory::new(), ProducerTable::new())
    }

    /// Resets the log as [`Self::reset`] does, with the epoch history and producer state of the offsets below `at`.
    /// Both are durable before the first journal entry. Their file has its own name, because the old log may have a
    /// snapshot at `at` too.
    pub fn reset_with(
        &mut self,
        at: Offset,
        epochs: EpochHistory,
        producers: ProducerTable,
    ) -> Result<(), ChangeError> {
        self.writable()?;
        let snapshot = Snapshot::encode(&epochs, &producers, at);
        self.shared.core.may_change(snapshot.len() as u64 + NAMES_BYTES)?;
        // The old log needs no journal entries after this sync. Checkpoints describe the old log until the reset is
        // complete.
        self.shared.sync().map_err(|error| ChangeError::Failed { reason: error.to_string() })?;
        self.keep_tables_beside(&snapshot, at)?;
        self.forget_pending();
        let shared = self.shared.clone();
        sim_event!(LogChangeStarted { partition: shared.id, to: at, emptied: true });
        let replaced = Box::new(shared.record());
        let generation = shared.core.next_generation();
        let info = SegmentInfo::empty(at, clock::wall_ms());
        let removed = {
            let mut state = shared.state();
            let file = Arc::new(SegmentFile::new(shared.core.files.serial(), &shared.dir, at));
            let removed = std::mem::replace(&mut state.segments, vec![Segment { info, file }]);
            state.replaced = Some(replaced);
            (state.generation, state.persisted_end, state.log_start) = (generation, at, at);
            (state.epochs, state.producers) =
                (Arc::new(epochs), Arc::new(producers.charged(&shared.core.producer_memory)));
            state.forget_expired_producers();
            state.index = None;
            state.recovery = state.point();
            removed
        };
        shared.core.tail.truncate(&shared.tail, Offset::ZERO);
        shared.core.commit(&shared, shared.head(Kind::Reset, generation, at, at))?;
        let emptied = || -> io::Result<()> {
            for segment in removed.iter().rev() {
                self.remove(segment)?;
            }
            remove_caches_above(&shared.core, &shared.dir, Offset::ZERO)?;
            shared.core.disk.open(&shared.path(at, "log"), Mode::Write)?.sync()?;
            shared.core.disk.rename(&shared.path(at, snapshot::OF_RESET), &shared.path(at, "snapshot"))?;
            shared.sync_names()
        };
        emptied().map_err(|error| self.failed_change(&error))?;
        {
            let mut state = shared.state();
            state.unsynced.clear();
            state.replaced = None;
        }
        shared.core.commit(&shared, shared.head(Kind::Settled, generation, at, at))?;
        sim_event!(LogChangeCompleted { partition: shared.id });
        Ok(())
    }

    /// Writes the snapshot with which a reset log starts. On a full disk nothing changes.
    fn keep_tables_beside(&self, snapshot: &[u8], at: Offset) -> Result<(), ChangeError> {
        let shared = &self.shared;
        let path = shared.path(at, snapshot::OF_RESET);
        let kept = || -> io::Result<()> {
            shared.core.disk.write(&path, snapshot)?.sync()?;
            shared.sync_names()
        };
        match kept() {
            Err(error) if is_full(&error) => {
                // Without this removal, the next start would remove the partial file.
                let _left = shared.core.disk.remove(&path);
                shared.core.say_full();
                Err(ChangeError::DiskFull)
            }
            kept => kept.map_err(|error| self.failed_change(&error)),
        }
    }

    /// Advances the log start, at most to the log end. The log start never moves back. Offsets below it are no longer
    /// readable, and [`Self::evict`] removes their segments.
    pub fn advance_log_start(&mut self, to: Offset) {
        let shared = &self.shared;
        let generation = {
            let mut state = shared.state();
            let to = to.min(state.log_end());
            if to <= state.log_start {
                return;
            }
            state.log_start = to;
            state.forget_epochs();
            state.generation
        };
        shared.core.note(shared, shared.head(Kind::LogStart, generation, to, to));
    }

    /// Removes the sealed segments that end at or below `below`, and returns their bytes. Waits for one frame of the
    /// journal. Current readers of a removed segment continue. On a full disk it may remove fewer segments, which makes
    /// space for the next call. The disk space of large files is freed a little later, in steps.
    pub fn evict(&mut self, below: Offset) -> Result<u64, ChangeError> {
        self.writable()?;
        let shared = self.shared.clone();
        let sealed_below = |state: &State| {
            let sealed = state.segments.len() - 1;
            state.segments[..sealed].partition_point(|segment| segment.info.end <= below)
        };
        let unsynced = {
            let state = shared.state();
            let count = sealed_below(&state);
            if count == 0 {
                return Ok(0);
            }
            state.recovery.segment.base < state.segments[count].info.base
        };
        if unsynced && let Err(error) = shared.sync() {
            // The recovery point must lie in the remaining segments.
            return Err(ChangeError::Failed { reason: error.to_string() });
        }
        let kept = self.keep_tables(below).map_err(|error| ChangeError::Failed { reason: error.to_string() })?;
        let (removed, generation, start) = {
            let mut state = shared.state();
            let count = state.segments.partition_point(|segment| segment.info.base < kept);
            let removed: Vec<Segment> = state.segments.drain(..count).collect();
            let start = state.local_start();
            (removed, state.generation, start)
        };
        shared.core.tail.forget_below(&shared.tail, start);
        if let Err(error) = shared.core.commit(&shared, shared.head(Kind::LocalStart, generation, start, start)) {
            // The files still exist, and the next eviction removes them.
            shared.state().segments.splice(0..0, removed);
            return Err(error);
        }
        let mut bytes = 0;
        for segment in &removed {
            bytes += segment.info.bytes;
            if let Err(error) = self.remove(segment) {
                // The next start that lists the files removes this one.
                tracing::warn!(partition = %shared.id, base = %segment.info.base, %error, "a segment was not removed");
            }
        }
        if let Err(error) = remove_caches_below(&shared.core, &shared.dir, start) {
            tracing::debug!(partition = %shared.id, %error, "indexes and snapshots below the log were not removed");
        }
        {
            let mut state = shared.state();
            state.forget_epochs();
            state.names_changed = true;
        }
        shared.touch(0);
        Ok(bytes)
    }

    /// Removes a segment and its caches.
    fn remove(&self, segment: &Segment) -> io::Result<()> {
        let (core, serial) = (&self.shared.core, segment.file.serial);
        // The file is opened through the table, so that readers share the handle. It is taken out of the table below,
        // when its name is gone and no reader can open it again.
        let opened = core.files.get(serial, &segment.file.path, Mode::Read).ok();
        let outcome = remove_segment(core, &self.shared.dir, segment.info.base);
        // The table may have closed the file meanwhile, in favour of another one.
        let file = core.files.take(serial).or(opened);
        outcome?;
        file.into_iter().for_each(|file| core.removed.keep(file));
        Ok(())
    }

    /// Makes the snapshot at the future local start durable and returns that offset. Nothing below it can be read
    /// again. On a disk without space for a snapshot, an earlier segment that has one becomes the start.
    fn keep_tables(&self, below: Offset) -> io::Result<Offset> {
        let segments: Vec<SegmentInfo> = self.shared.state().segments.iter().map(|segment| segment.info).collect();
        let removed = segments[..segments.len() - 1].partition_point(|info| info.end <= below);
        let mut start = removed;
        loop {
            match self.keep_tables_at(&segments, segments[start].base) {
                Err(error) if is_full(&error) && start > 1 => start -= 1,
                kept => return kept.map(|()| segments[start].base),
            }
        }
    }

    fn keep_tables_at(&self, segments: &[SegmentInfo], start: Offset) -> io::Result<()> {
        let shared = &self.shared;
        let path = shared.path(start, "snapshot");
        let disk = &shared.core.disk;
        if !Snapshot::read(&**disk, &shared.dir, start).is_ok_and(|found| found.is_some()) {
            let (_, tables, damage) = tables_at(&shared.core, &shared.dir, segments, start)?;
            if let Some(why) = damage {
                return Err(io::Error::new(io::ErrorKind::InvalidData, why));
            }
            disk.write(&path, &Snapshot::encode(&tables.epochs, &tables.producers, start))?;
        }
        disk.open(&path, Mode::Write)?.sync()?;
        disk.sync_dir(&shared.dir)
    }

    fn writable(&self) -> Result<(), ChangeError> {
        self.shared.refusal().map_or(Ok(()), |reason| Err(ChangeError::Failed { reason }))
    }

    /// Fails the replica, because its files are in an undefined state between two logs. Nothing more is written, and a
    /// restart recovers the files.
    fn failed_change(&self, error: &io::Error) -> ChangeError {
        let reason = format!("the log could not be cut: {error}");
        self.shared.fail(reason.clone());
        ChangeError::Failed { reason }
    }
}
