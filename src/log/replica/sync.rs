//! Syncing the segments of one replica, and writing them out before that.
//!
//! Appended data is written out in pieces and without a flush. The sync then finds little to write, and the journal's
//! next write does not wait behind many megabytes.

use std::{io, sync::atomic::Ordering};

use super::ReplicaInner;
use crate::log::{
    disk::{BLOCK, OpenMode},
    error::PersistError,
};

impl ReplicaInner {
    /// Syncs a replica that was taken out of the sync queue. The result is not returned: an error is logged and fails
    /// the replica.
    pub(in crate::log) fn sync_queued(&self) {
        self.dirty.store(false, Ordering::Release);
        drop(self.sync());
    }

    /// Syncs all data appended so far and moves the recovery point to its end. A failed sync is final for this replica.
    /// Fails with `Truncated` if the log was truncated, reset or deleted meanwhile.
    pub(in crate::log) fn sync(&self) -> Result<(), PersistError> {
        // The write-out takes time, so it precedes the lock below.
        self.write_out();
        if let Some(reason) = self.failed.get() {
            return Err(PersistError::Failed { reason: reason.clone() });
        }
        // Without this lock, a concurrent sync would find the files clean and report their data as synced before this
        // sync has ended.
        let _one_at_a_time = self.syncing.lock();
        let (point, generation, names_changed, files) = {
            let mut state = self.state();
            // All data before the recovery point is synced.
            let first = state.segments.partition_point(|segment| segment.info.base < state.recovery.segment.base);
            let files: Vec<_> = state.segments[first..].iter().map(|segment| segment.file.clone()).collect();
            (state.recovery_point(), state.generation, std::mem::take(&mut state.names_changed), files)
        };
        let sync_files = || -> io::Result<()> {
            for file in files {
                if file.dirty.swap(false, Ordering::AcqRel) {
                    match self.ctx.files.get(file.serial, &file.path, OpenMode::Read) {
                        Ok(open) => open.file.sync()?,
                        // The segment was evicted or truncated during this sync.
                        Err(error)
                            if error.kind() == io::ErrorKind::NotFound && !self.has_segment_file(file.serial) => {}
                        Err(error) => return Err(error),
                    }
                }
            }
            if names_changed {
                self.sync_names()?;
            }
            Ok(())
        };
        if let Err(error) = sync_files() {
            let reason = format!("cannot sync a segment: {error}");
            self.fail(reason.clone());
            return Err(PersistError::Failed { reason });
        }
        let mut state = self.state();
        // A truncation or reset during the sync has moved the log end, and with it the recovery point.
        if state.generation != generation {
            return Err(PersistError::Truncated);
        }
        let end = point.segment.end;
        state.recovery = point;
        state.persisted_end = state.persisted_end.max(end);
        while state.journal_pins.front().is_some_and(|(_, last)| *last <= end) {
            state.journal_pins.pop_front();
        }
        Ok(())
    }

    /// Writes out the data appended since the last call, except the page that the next append writes to. Waits for the
    /// device. An error is final for this replica.
    pub(in crate::log) fn write_out(&self) {
        self.unwritten_bytes.store(0, Ordering::Release);
        let mut ranges = Vec::new();
        {
            let state = self.state();
            let active = state.segments.len() - 1;
            for (number, segment) in state.segments.iter().enumerate().rev() {
                let bytes = segment.info.bytes;
                let end = if number == active { bytes - bytes % BLOCK as u64 } else { bytes };
                let start = segment.file.written_out.load(Ordering::Acquire);
                if start < end {
                    ranges.push((segment.file.clone(), start..end));
                } else if number < active {
                    // This sealed segment is written out completely, and so are all earlier ones.
                    break;
                }
            }
        }
        for (file, range) in ranges.into_iter().rev() {
            file.written_out.store(range.end, Ordering::Release);
            let piece_bytes = self.ctx.sync_queue.piece_bytes();
            if let Err(error) = self.ctx.disk.write_out(&file.path, range, piece_bytes) {
                self.fail(format!("cannot write out a segment: {error}"));
            }
        }
    }

    /// Returns true if the log still contains the segment file with this serial.
    fn has_segment_file(&self, serial: u64) -> bool {
        self.state().segments.iter().any(|segment| segment.file.serial == serial)
    }

    /// Makes the names of this replica's files and directories durable.
    pub(super) fn sync_names(&self) -> io::Result<()> {
        // The directory of the replica, that of its topic, and the data directory.
        for dir in self.dir.ancestors().take(3) {
            self.ctx.disk.sync_dir(dir)?;
        }
        Ok(())
    }
}
