//! Growing the journal's ring, ahead of need and slowly. One thread.
//!
//! A file is written full of zeros before it is used, so that no append waits until the file system has found it room. But the
//! zeros go to the device that the appends wait for. So they go in small pieces, and a pause follows each, as long as the file in
//! use fills slower than the next one is made; there is none when the journal itself waits for it.

use std::{
    io,
    path::Path,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use super::{directory::Inner, journal::ring};

/// How long the appends go first after each piece.
const PAUSE: Duration = Duration::from_millis(20);

/// How long growing that failed waits before it is tried again.
const RETRY: Duration = Duration::from_secs(1);

/// Held while a file is being made: one at a time.
pub(super) type Growing = Mutex<()>;

impl Inner {
    /// Makes a file now, because the journal has none to go on with. False when the ring may not grow.
    pub(super) fn grow_now(&self) -> io::Result<bool> {
        let journal = &self.core.journal;
        journal.await_file(true);
        let grown = self.grow(&mut |_| Ok(()));
        journal.await_file(false);
        grown
    }

    /// Makes a file at the appends' pace.
    fn grow_ahead(&self) -> io::Result<bool> {
        let journal = &self.core.journal;
        self.grow(&mut |done| {
            journal.give_way(done, PAUSE);
            if journal.wants_no_file() { Err(io::ErrorKind::Interrupted.into()) } else { Ok(()) }
        })
    }

    /// Makes the next file of the ring, if there is none and there may be one more. True when there is one afterwards.
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
        // Filling the disk to its last byte, if only for a moment, would fail others who write here, ourselves among them.
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

/// The growing thread: makes the next file when the last one is entered.
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
