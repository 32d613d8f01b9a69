//! Creation of the ring's files: on a background thread, ahead of need, or at once when the journal needs a file.
//!
//! A file is filled with zeros before its first use, so that no append waits for an allocation. Appends wait for the
//! same device, so the zeros are written in small pieces.

use std::{io, path::Path, time::Duration};

use super::{
    Journal,
    ring::{self, Ring},
};
use crate::{task::clock, telemetry::LogThrottle};

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
                Err(_) if self.has_ended() => return,
                Err(error) => {
                    if throttle.occur(clock::monotonic()).is_some() {
                        tracing::warn!(%error, "cannot create a journal file: existing files are reused sooner");
                    }
                    self.wait_for_file(RETRY_INTERVAL);
                }
            }
        }
    }

    /// Creates a file, unless one is free. Called when the journal needs a file at once, also after a close. Returns
    /// false if no file is free and the ring may not grow. Fails with `StorageFull` if the disk lacks space.
    pub(in crate::log) fn preallocate_now(&self) -> io::Result<bool> {
        self.grow(|| false)
    }

    /// Creates a file as [`Self::preallocate_now`] does, but fails with `Interrupted` when the journal is closed or
    /// fails.
    fn preallocate_ahead(&self) -> io::Result<bool> {
        self.grow(|| self.has_ended())
    }

    /// Creates the next file of the ring, if none is free and the ring may grow. Returns true if a file is free
    /// afterwards. Fails with `StorageFull` if the disk lacks space, and with `Interrupted` if `is_cancelled` returns
    /// true, which is checked after each piece.
    fn grow(&self, is_cancelled: impl Fn() -> bool) -> io::Result<bool> {
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
        let mut after_piece = |written: u64| {
            if is_cancelled() { Err(io::ErrorKind::Interrupted.into()) } else { check_space(bytes - written) }
        };
        ring::create_zeroed(&*disk, &path, bytes, &mut after_piece)?;
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
}
