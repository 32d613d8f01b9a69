//! The journal's writer: makes space for each frame and writes the frame. It runs as a thread, or in steps that a
//! caller drives.

use std::{io, time::Duration};

use super::{Journal, JournalHost, ring::Ring};
use crate::{
    log::{error::is_full, format::entry},
    task::clock,
};

/// Interval between two checks of a writer that waits for a free file.
const FILE_WAIT_INTERVAL: Duration = Duration::from_millis(100);

/// Maximum number of attempts of a step to get journal space. Each attempt without space ends with a sync pass.
const MAX_SYNC_PASSES: usize = 3;

/// Space for the next frame.
pub(super) enum FrameSpace {
    /// No free file: segments must be synced first.
    NeedsFile,
    /// Space in a free file, which has become the active one.
    NewFile,
    /// Space in the active file.
    Available,
}

impl Journal {
    /// Writes the queued entries until the journal is closed and the queue is empty. A failure empties the queue, and
    /// then this function only waits for the close. Runs on the writer's thread.
    pub(in crate::log) fn run(&self, host: &dyn JournalHost) {
        while self.wait_for_entries() {
            let Some(space) = self.space_or_fail() else { continue };
            if !matches!(space, FrameSpace::NeedsFile) {
                self.write_frame();
                if matches!(space, FrameSpace::NewFile) && self.needs_sync() {
                    host.request_sync();
                }
            } else if self.is_closed() {
                if !host.run_sync_pass() || !self.has_free_file() {
                    self.fail(&io::Error::other("the log is closing, and the journal has no free file"));
                }
            } else {
                host.request_sync();
                self.wait_for_file(FILE_WAIT_INTERVAL);
                self.fail_if_stalled(host);
            }
        }
    }

    /// Writes one frame after making space for it, in step mode. Returns false if nothing is queued, or if the journal
    /// has no space. Without space, a stall may fail the journal. Returns true as well if an I/O error fails the
    /// journal, because the failure completes all queued entries.
    pub(in crate::log) fn write_next_frame(&self, host: &dyn JournalHost) -> bool {
        if !self.has_queued_entries() {
            return false;
        }
        for _ in 0..MAX_SYNC_PASSES {
            match self.space_or_fail() {
                Some(FrameSpace::Available | FrameSpace::NewFile) => {
                    self.write_frame();
                    return true;
                }
                Some(FrameSpace::NeedsFile) => {
                    host.run_sync_pass();
                    self.fail_if_stalled(host);
                }
                None => return true,
            }
        }
        false
    }

    /// Writes the queued entries and makes space for the two frames of a replica's truncation, reset or deletion, in
    /// step mode. Returns false if there is no space.
    pub(in crate::log) fn ensure_change_space(&self, host: &dyn JournalHost) -> bool {
        while self.has_queued_entries() {
            if !self.write_next_frame(host) {
                return false;
            }
        }
        for _ in 0..MAX_SYNC_PASSES {
            if self.has_space_for_two_frames() || matches!(self.preallocate_now(), Ok(true)) {
                return true;
            }
            host.run_sync_pass();
        }
        false
    }

    /// Makes space for the next frame: in the active file, in a free one, or in a new one. Called by the writer only:
    /// by its thread, in a step, or for the first frame of a start.
    pub(super) fn ensure_space(&self) -> io::Result<FrameSpace> {
        match self.enter_space()? {
            FrameSpace::NeedsFile if self.preallocate_now()? => self.enter_space(),
            space => Ok(space),
        }
    }

    /// Makes space for the next frame, or fails the journal and returns `None`. A full disk is no failure: a sync pass
    /// may release a file.
    fn space_or_fail(&self) -> Option<FrameSpace> {
        match self.ensure_space() {
            Ok(space) => Some(space),
            Err(error) if is_full(&error) => Some(FrameSpace::NeedsFile),
            Err(error) => {
                self.fail(&error);
                None
            }
        }
    }

    /// Makes space for the next frame in the files that exist: in the active one, or in a free one that becomes active.
    fn enter_space(&self) -> io::Result<FrameSpace> {
        let needed = self.max_next_frame_bytes() as u64;
        let mut writer = self.writer.lock();
        let file_bytes = self.ring.lock().file_bytes;
        if writer.current.as_ref().is_some_and(|current| current.position + needed <= file_bytes) {
            writer.no_space_since = None;
            return Ok(FrameSpace::Available);
        }
        if let Some(next) = self.ring.lock().advance(self.next_frame())? {
            (writer.current, writer.no_space_since) = (Some(next), None);
            self.entered.notify_all();
            return Ok(FrameSpace::NewFile);
        }
        writer.no_space_since.get_or_insert_with(clock::monotonic);
        Ok(FrameSpace::NeedsFile)
    }

    /// Returns true if the segments should be synced now, so that the ring has free files later. Called when the writer
    /// has made a file active.
    fn needs_sync(&self) -> bool {
        let ring = self.ring.lock();
        ring.is_low() || ring.wants_file()
    }

    /// Returns true if a frame of one entry and the next frame fit into the active file, or if a file is free.
    fn has_space_for_two_frames(&self) -> bool {
        let position = self.writer.lock().current.as_ref().map(|current| current.position);
        let needed = (entry::frame_len(1, 0) + self.max_next_frame_bytes()) as u64;
        let ring = self.ring.lock();
        ring.has_free() || position.is_some_and(|position| position + needed <= ring.file_bytes)
    }

    /// Waits until a file is free or the journal is closed, at most for `timeout`.
    pub(super) fn wait_for_file(&self, timeout: Duration) {
        let is_waiting = |ring: &mut Ring| !ring.has_free() && !self.is_closed();
        drop(self.released.wait_while_for(self.ring.lock(), is_waiting, timeout));
    }

    /// Fails the journal if no sync pass will release a file of its ring. Otherwise all writers would wait, and no
    /// other broker would take over. A restart replays the content of the journal.
    fn fail_if_stalled(&self, host: &dyn JournalHost) {
        if let Some(reason) = host.check_stall() {
            self.fail(&io::Error::other(reason));
        }
    }
}
