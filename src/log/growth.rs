//! Growing the journal's ring in the background, ahead of need. One thread.
//!
//! A file is filled with zeros before its first use, so that no append waits for an allocation. Appends wait for the
//! same device, so the zeros are written in small pieces with pauses. There is no pause while the active file fills
//! faster than the next one, or while the journal waits for the next one.

use std::{
    io,
    path::Path,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use super::{directory::Inner, journal::ring};

/// Maximum pause in favour of appends after each piece.
const PAUSE: Duration = Duration::from_millis(20);

/// Time until a failed growth is retried.
const RETRY: Duration = Duration::from_secs(1);

/// Held while a file is being created: one at a time.
pub(super) type Growing = Mutex<()>;

impl Inner {
    /// Creates a file now, because the journal has no free one. Returns false if the ring may not grow.
    pub(super) fn grow_now(&self) -> io::Result<bool> {
        let journal = &self.core.journal;
        journal.await_file(true);
        let grown = self.grow(&mut |_| Ok(()));
        journal.await_file(false);
        grown
    }

    /// Creates a file at a pace that lets appends go first.
    fn grow_ahead(&self) -> io::Result<bool> {
        let journal = &self.core.journal;
        self.grow(&mut |done| {
            journal.give_way(done, PAUSE);
            if journal.wants_no_file() { Err(io::ErrorKind::Interrupted.into()) } else { Ok(()) }
        })
    }

    /// Creates the next file of the ring, if none is free and the ring may grow. Returns true if a file is free
    /// afterwards.
    fn grow(&self, rest: &mut dyn FnMut(u64) -> io::Result<()>) -> io::Result<bool> {
        let _one_at_a_time = self.growing.lock().unwrap_or_else(PoisonError::into_inner);
        let (vacancy, bytes) = {
            let ring = self.ring();
            if ring.has_free() {
                return Ok(true);
            }
            (ring.vacancy(), ring.file_bytes)
        };
        let Some((path, slot)) = vacancy else { return Ok(false) };
        let dir = path.parent().unwrap_or(Path::new("."));
        // A disk that is full, if only for a moment, would fail all its writers, including this broker.
        let room_for = |bytes: u64| {
            let short = |free: u64| free < bytes + self.core.options.reserve_bytes;
            let full = self.ring().owed() == 0 && self.core.disk.free_bytes(dir).is_ok_and(short);
            if full { Err(io::Error::from(io::ErrorKind::StorageFull)) } else { Ok(()) }
        };
        room_for(bytes)?;
        ring::prepare(&*self.core.disk, &path, bytes, &mut |done| room_for(bytes - done).and_then(|()| rest(done)))?;
        self.ring().add(slot);
        self.core.journal.released.notify_all();
        Ok(true)
    }
}

/// Runs the growth thread: creates the next file when the last one is entered.
pub(super) fn run(inner: &Inner) {
    let journal = &inner.core.journal;
    let mut said = false;
    while journal.wait_until_file_wanted() {
        match inner.grow_ahead() {
            Ok(_) => said = false,
            Err(_) if journal.wants_no_file() => return,
            Err(error) => {
                if !std::mem::replace(&mut said, true) {
                    tracing::warn!(%error, "the journal could not grow; its files are used again sooner");
                }
                journal.wait_for_file(RETRY);
            }
        }
    }
}
