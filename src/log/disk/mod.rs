//! Access to the file system. All code in `log` reaches files through [`Disk`] alone, so that the simulator can cut the
//! power at any moment. Calls block.
//!
//! # Crash
//!
//! The real and the simulated disk allow the same effects of a crash. Unsynced bytes may be present, missing, or partly
//! present, by sectors. A name that was created, removed or renamed may be as before until its directory is synced.

pub(super) mod budget;
mod private;
mod real;
mod sim;
mod writeback;

use std::{
    io::{self, IoSlice},
    ops::Range,
    path::Path,
    sync::Arc,
};

pub use private::PrivateDir;
pub use real::RealDisk;
#[cfg(test)]
pub(super) use sim::SimRng;
pub use sim::{SimDisk, SyncStamp};
pub use writeback::{STEP_BYTES, free_in_steps, write_out};

/// Block of a journal write in bytes: the position and the length of every write to the journal are multiples of it.
pub const BLOCK: usize = 4096;

/// Bytes per background write to the device. A write to the journal waits for at most one such piece.
pub const PIECE_BYTES: usize = 256 << 10;

/// Bytes per background write after some time without a write to the journal. The same number of bytes needs fewer
/// calls.
pub const LARGE_PIECE_BYTES: usize = 2 << 20;

/// A file system.
pub trait Disk: Send + Sync + 'static {
    /// Registers an existing directory, below which files may then be opened. Checks the owner of the directory, and
    /// corrects its mode and the modes of its entries. The path of the directory may contain symbolic links; the paths
    /// below it may not.
    fn register_root(&self, dir: &Path) -> io::Result<()>;

    /// Creates a directory and its parents. An existing directory is no error.
    fn create_dir_all(&self, dir: &Path) -> io::Result<()>;

    /// Makes the names in a directory durable.
    fn sync_dir(&self, dir: &Path) -> io::Result<()>;

    /// Returns the entries of a directory, sorted by name.
    fn list(&self, dir: &Path) -> io::Result<Vec<DirEntry>>;

    /// Opens a file.
    fn open(&self, path: &Path, mode: OpenMode) -> io::Result<Arc<dyn File>>;

    /// Renames a file, and replaces the file that has the new name.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;

    /// Removes a file. It can still be read through open handles.
    fn remove(&self, path: &Path) -> io::Result<()>;

    /// Removes an empty directory.
    fn remove_dir(&self, dir: &Path) -> io::Result<()>;

    /// Locks a file exclusively, and creates it if absent. The real disk also writes this process's id into the file.
    /// Fails with `WouldBlock` if the file is locked already. The lock ends when the returned value is dropped or the
    /// process exits.
    fn lock(&self, path: &Path) -> io::Result<Box<dyn Send + Sync>>;

    /// Returns the bytes that can still be written in the file system of `dir`.
    fn free_bytes(&self, dir: &Path) -> io::Result<u64>;

    /// Returns the sum of the used and the free bytes in the file system of `dir`. Blocks that are reserved for the
    /// superuser are not included.
    fn total_bytes(&self, dir: &Path) -> io::Result<u64>;

    /// Writes out a range of a file in pieces, so that a later sync has less to write. Nothing is durable before that
    /// sync. After a write error, as after a failed sync, data may be lost: no retry helps. If the file cannot be
    /// opened, nothing is written out, and the sync does all the work: this is no error.
    fn write_out(&self, path: &Path, range: Range<u64>, piece_bytes: usize) -> io::Result<()>;

    /// Returns the maximum number of files that the log may hold open.
    fn max_open_files(&self) -> usize;

    /// Reads a complete file.
    fn read(&self, path: &Path) -> io::Result<Vec<u8>> {
        let file = self.open(path, OpenMode::Read)?;
        let len = file.size()?;
        let mut bytes = vec![0; usize::try_from(len).map_err(|_| io::ErrorKind::FileTooLarge)?];
        let read = file.read_at(&mut bytes, 0)?;
        bytes.truncate(read);
        Ok(bytes)
    }

    /// Replaces the content of a file, which is created if absent, and returns the open file. Nothing is synced.
    fn write(&self, path: &Path, bytes: &[u8]) -> io::Result<Arc<dyn File>> {
        let file = self.open(path, OpenMode::Write)?;
        file.truncate(0)?;
        file.write_at(&[IoSlice::new(bytes)], 0)?;
        Ok(file)
    }

    /// Replaces a file atomically and durably: a crash leaves the old or the new content. A large file is written out
    /// in pieces before the sync. The message of an error starts with the path of the failed operation.
    fn replace(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        let temporary = path.with_extension("tmp");
        let parent = path.parent().unwrap_or(Path::new("."));
        let written = self.write(&temporary, bytes).and_then(|file| {
            if bytes.len() > PIECE_BYTES {
                self.write_out(&temporary, 0..bytes.len() as u64, PIECE_BYTES)?;
            }
            file.sync()
        });
        written.map_err(|error| with_path(&temporary, &error))?;
        self.rename(&temporary, path).map_err(|error| with_path(path, &error))?;
        self.sync_dir(parent).map_err(|error| with_path(parent, &error))
    }
}

/// Returns an error of the same kind whose message starts with the path.
fn with_path(path: &Path, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}

/// Mode in which a file is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OpenMode {
    /// Reading; the file must exist.
    Read,
    /// Reading and writing; the file is created if absent.
    Write,
    /// Access to complete blocks, past the page cache if the file system supports that; the file is created if absent.
    /// Every write must be aligned as [`File::write_durable`] requires.
    Direct,
}

/// An entry of a directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirEntry {
    /// Name without the directory.
    pub name: String,
    /// True for a directory.
    pub is_dir: bool,
    /// Size of a file in bytes.
    pub len: u64,
}

/// An open file. Threads share its handle, so every read and write states its position.
pub trait File: Send + Sync {
    /// Returns the length in bytes.
    fn size(&self) -> io::Result<u64>;

    /// Returns the time of the last change of the content, in milliseconds since 1970 by the machine's clock.
    fn modified_ms(&self) -> io::Result<i64>;

    /// Fills `buffer` from `at`; returns fewer bytes only at the end of the file.
    fn read_at(&self, buffer: &mut [u8], at: u64) -> io::Result<usize>;

    /// Writes all slices from `at`, in order.
    fn write_at(&self, slices: &[IoSlice<'_>], at: u64) -> io::Result<()>;

    /// Writes complete blocks, and returns when they are on stable storage. The address of `bytes`, its length and `at`
    /// must be multiples of [`BLOCK`].
    fn write_durable(&self, bytes: &[u8], at: u64) -> io::Result<()>;

    /// Sets the length of the file: removes the bytes above `len`, or extends the file with zeros.
    fn truncate(&self, len: u64) -> io::Result<()>;

    /// Frees part of the disk space of a removed file without readers, and pauses briefly. `urgent` frees a larger
    /// part, because space is needed soon. Returns false if no step is needed. The file then still has a name, or its
    /// remaining space may be freed at once by closing the file. Blocks.
    fn free_step(&self, urgent: bool) -> io::Result<bool>;

    /// Makes content and length durable.
    fn sync(&self) -> io::Result<()>;
}
