//! Creation of the ring's files: on a background thread, ahead of need, or at once when the journal needs a file.
//!
//! A file is filled with zeros before its first use, so that no append waits for an allocation. Appends wait for the
//! same device, so the zeros are written in small pieces with pauses. There is no pause while the active file fills
//! faster than the new file is written, or while the journal waits for the new file.

use std::{io, path::Path, sync::atomic::Ordering, time::Duration};

use super::{
    Journal,
    ring::{self, Ring},
};
use crate::{task::clock, telemetry::LogThrottle};

/// Maximum pause in favour of appends after each piece.
const YIELD_INTERVAL: Duration = Duration::from_millis(20);

/// Time until a failed preallocation is retried.
const RETRY_INTERVAL: Duration = Duration::from_secs(1);

impl Journal {
    /// Creates another file whenever the ring may grow and no file is free, until the journal is closed or fails. Runs
    /// on a thread of its own.
    pub(in crate::log) fn run_preallocation(&self) {
        let mut throttle = LogThrottle::default();
        while self.wait_until_file_wanted() {
            match self.preallocate_ahead() {
                Ok(_) => _ = throttle.recover(),
                Err(_) if self.is_prealloc_cancelled() => return,
                Err(error) => {
                    if throttle.occur(clock::monotonic()).is_some() {
                        tracing::warn!(%error, "cannot create a journal file: existing files are reused sooner");
                    }
                    self.wait_for_file(RETRY_INTERVAL);
                }
            }
        }
    }

    /// Creates a file without pauses, unless one is free. Called when the journal needs a file at once. Returns false
    /// if no file is free and the ring may not grow. Fails with `StorageFull` if the disk lacks space.
    pub(in crate::log) fn preallocate_now(&self) -> io::Result<bool> {
        self.set_writer_waiting(true);
        let result = self.grow(&mut |_| Ok(()));
        self.set_writer_waiting(false);
        result
    }

    /// Creates a file as [`Self::preallocate_now`] does, at a pace that lets appends go first. Fails with `Interrupted`
    /// if the file is no longer needed.
    fn preallocate_ahead(&self) -> io::Result<bool> {
        self.grow(&mut |written| {
            self.yield_to_appends(written);
            if self.is_prealloc_cancelled() { Err(io::ErrorKind::Interrupted.into()) } else { Ok(()) }
        })
    }

    /// Creates the next file of the ring, if none is free and the ring may grow. Returns true if a file is free
    /// afterwards. Fails with `StorageFull` if the disk lacks space. `after_piece` is called after each piece with the
    /// number of bytes written; its error ends the work.
    fn grow(&self, after_piece: &mut dyn FnMut(u64) -> io::Result<()>) -> io::Result<bool> {
        let _one_at_a_time = self.preallocating.lock();
        let (disk, next_slot, bytes) = {
            let ring = self.ring.lock();
            if ring.has_free() {
                return Ok(true);
            }
            (ring.disk(), ring.next_slot(), ring.file_bytes)
        };
        let Some((path, slot)) = next_slot else { return Ok(false) };
        let dir = path.parent().unwrap_or(Path::new("."));
        // The minimum number of files is created even if that uses space that appends leave free.
        let check_space = |bytes: u64| {
            let is_full = self.unallocated_bytes() == 0 && !self.budget.has_journal_space(dir, bytes);
            if is_full { Err(io::Error::from(io::ErrorKind::StorageFull)) } else { Ok(()) }
        };
        check_space(bytes)?;
        let mut check_piece = |written: u64| check_space(bytes - written).and_then(|()| after_piece(written));
        ring::create_zeroed(&*disk, &path, bytes, &mut check_piece)?;
        self.ring.lock().add(slot);
        self.released.notify_all();
        Ok(true)
    }

    /// Waits until the ring needs another file. Returns false if the journal is closed or has failed.
    fn wait_until_file_wanted(&self) -> bool {
        let idle = |ring: &mut Ring| !ring.wants_file() && !self.has_ended();
        drop(self.entered.wait_while(self.ring.lock(), idle));
        !self.has_ended()
    }

    /// Returns true if a file that is being created is not needed any longer.
    fn is_prealloc_cancelled(&self) -> bool {
        self.has_ended() && !self.writer_waiting.load(Ordering::Acquire)
    }

    /// Sets whether the writer waits for the file that is being created.
    fn set_writer_waiting(&self, waiting: bool) {
        self.writer_waiting.store(waiting, Ordering::Release);
        drop(self.ring.lock());
        self.entered.notify_all();
    }

    /// Lets appends go first while the next file is created, of which `written` bytes exist. Returns at once if the
    /// writer waits for the file, or if the active file fills faster than the next one is created.
    fn yield_to_appends(&self, written: u64) {
        // The next file should be complete when the active one is half full.
        if written < 2 * self.position.load(Ordering::Relaxed) {
            return;
        }
        let may_pause = |_: &mut Ring| !self.has_ended() && !self.writer_waiting.load(Ordering::Acquire);
        drop(self.entered.wait_while_for(self.ring.lock(), may_pause, YIELD_INTERVAL));
    }
}
