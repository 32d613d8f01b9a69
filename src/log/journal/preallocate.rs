//! Creation of the ring's files in the background, ahead of need. One thread.
//!
//! A file is filled with zeros before its first use, so that no append waits for an allocation. Appends wait for the
//! same device, so the zeros are written in small pieces with pauses. There is no pause while the active file fills
//! faster than the next one, or while the journal waits for the next one.

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
    /// Creates the next file when the last free one is entered, until the journal is closed or fails.
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

    /// Creates a file now, because the journal has no free one. Returns false if the ring may not grow.
    pub(in crate::log) fn preallocate_now(&self) -> io::Result<bool> {
        self.set_writer_waiting(true);
        let grown = self.grow(&mut |_| Ok(()));
        self.set_writer_waiting(false);
        grown
    }

    /// Creates a file at a pace that lets appends go first.
    fn preallocate_ahead(&self) -> io::Result<bool> {
        self.grow(&mut |done| {
            self.yield_to_appends(done);
            if self.is_prealloc_cancelled() { Err(io::ErrorKind::Interrupted.into()) } else { Ok(()) }
        })
    }

    /// Creates the next file of the ring, if none is free and the ring may grow. Returns true if a file is free
    /// afterwards.
    fn grow(&self, rest: &mut dyn FnMut(u64) -> io::Result<()>) -> io::Result<bool> {
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
        let check_space = |bytes: u64| {
            let is_full = self.unallocated_bytes() == 0 && !self.budget.has_journal_space(dir, bytes);
            if is_full { Err(io::Error::from(io::ErrorKind::StorageFull)) } else { Ok(()) }
        };
        check_space(bytes)?;
        ring::prepare(&*disk, &path, bytes, &mut |done| check_space(bytes - done).and_then(|()| rest(done)))?;
        self.ring.lock().add(slot);
        self.released.notify_all();
        Ok(true)
    }

    /// Waits until the ring needs another file. Returns false if the journal is closed or has failed.
    fn wait_until_file_wanted(&self) -> bool {
        let idle = |ring: &mut Ring| !ring.wants_file() && !self.has_ended();
        self.entered.wait_while(&mut self.ring.lock(), idle);
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

    /// Lets appends go first while the next file is created; `done` is the number of bytes created so far. Returns at
    /// once if the writer waits for the file, or if the active file fills faster than the next one is created.
    fn yield_to_appends(&self, done: u64) {
        let is_urgent = |_: &mut Ring| self.has_ended() || self.writer_waiting.load(Ordering::Acquire);
        if done < 2 * self.position.load(Ordering::Relaxed) {
            return;
        }
        self.entered.wait_while_for(&mut self.ring.lock(), |ring| !is_urgent(ring), YIELD_INTERVAL);
    }
}
