//! Growing the journal's ring in the background, ahead of need. One thread.
//!
//! A file is filled with zeros before its first use, so that no append waits for an allocation. Appends wait for the
//! same device, so the zeros are written in small pieces with pauses. There is no pause while the active file fills
//! faster than the next one, or while the journal waits for the next one.

use std::{io, path::Path, time::Duration};

use parking_lot::Mutex;

use crate::log::{data_dir::DataDirInner, journal::ring};

/// Maximum pause in favour of appends after each piece.
const YIELD_INTERVAL: Duration = Duration::from_millis(20);

/// Time until a failed growth is retried.
const RETRY_INTERVAL: Duration = Duration::from_secs(1);

/// Held while a file is being created: one at a time.
pub(in crate::log) type Growing = Mutex<()>;

impl DataDirInner {
    /// Creates a file now, because the journal has no free one. Returns false if the ring may not grow.
    pub(in crate::log) fn preallocate_now(&self) -> io::Result<bool> {
        let journal = &self.ctx.journal;
        journal.set_writer_waiting(true);
        let grown = self.grow(&mut |_| Ok(()));
        journal.set_writer_waiting(false);
        grown
    }

    /// Creates a file at a pace that lets appends go first.
    fn preallocate_ahead(&self) -> io::Result<bool> {
        let journal = &self.ctx.journal;
        self.grow(&mut |done| {
            journal.yield_to_appends(done, YIELD_INTERVAL);
            if journal.is_prealloc_cancelled() { Err(io::ErrorKind::Interrupted.into()) } else { Ok(()) }
        })
    }

    /// Creates the next file of the ring, if none is free and the ring may grow. Returns true if a file is free
    /// afterwards.
    fn grow(&self, rest: &mut dyn FnMut(u64) -> io::Result<()>) -> io::Result<bool> {
        let _one_at_a_time = self.growing.lock();
        let (next_slot, bytes) = {
            let ring = self.ring();
            if ring.has_free() {
                return Ok(true);
            }
            (ring.next_slot(), ring.file_bytes)
        };
        let Some((path, slot)) = next_slot else { return Ok(false) };
        let dir = path.parent().unwrap_or(Path::new("."));
        let check_space = |bytes: u64| {
            let is_full = self.ring().unallocated_bytes() == 0 && !self.ctx.budget.has_journal_space(dir, bytes);
            if is_full { Err(io::Error::from(io::ErrorKind::StorageFull)) } else { Ok(()) }
        };
        check_space(bytes)?;
        ring::prepare(&*self.ctx.disk, &path, bytes, &mut |done| check_space(bytes - done).and_then(|()| rest(done)))?;
        self.ring().add(slot);
        self.ctx.journal.released.notify_all();
        Ok(true)
    }
}

/// Runs the growth thread: creates the next file when the last one is entered.
pub(in crate::log) fn run(inner: &DataDirInner) {
    let journal = &inner.ctx.journal;
    let mut logged = false;
    while journal.wait_until_file_wanted() {
        match inner.preallocate_ahead() {
            Ok(_) => logged = false,
            Err(_) if journal.is_prealloc_cancelled() => return,
            Err(error) => {
                if !std::mem::replace(&mut logged, true) {
                    tracing::warn!(%error, "cannot create a journal file: existing files are reused sooner");
                }
                journal.wait_for_file(RETRY_INTERVAL);
            }
        }
    }
}
