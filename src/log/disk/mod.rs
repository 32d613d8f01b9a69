//! The one door to the file system. Everything in `log` reaches files through [`Disk`], so that the simulator can take
//! the power away at any moment. Calls block.
//!
//! What a crash may do, and both implementations agree on: bytes that were not synced may be there, missing, or there in
//! part, by sectors; a name that was made, removed or renamed may be as before until its directory is synced.

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
pub(super) use sim::Dice;
pub use sim::{SimDisk, Stamp};
pub use writeback::{STEP_BYTES, give_back, write_out};

/// Size and alignment of everything that is written to the journal, in bytes.
pub const BLOCK: usize = 4096;

/// Bytes that go to the device at once where nobody waits for them: the journal's next write waits for no more.
pub const PIECE_BYTES: usize = 256 << 10;

/// The same while nothing is written to the journal: fewer calls, for as many bytes.
pub const LARGE_PIECE_BYTES: usize = 2 << 20;

/// A file system.
pub trait Disk: Send + Sync + 'static {
    /// Takes a configured directory, which exists: its path may hold links, what is below it may not.
    fn enter(&self, dir: &Path) -> io::Result<()>;

    /// Makes a directory and those above it; nothing happens where it is.
    fn create_dir_all(&self, dir: &Path) -> io::Result<()>;

    /// Makes the names in a directory durable.
    fn sync_dir(&self, dir: &Path) -> io::Result<()>;

    /// What a directory holds, sorted by name.
    fn list(&self, dir: &Path) -> io::Result<Vec<Entry>>;

    /// Opens a file.
    fn open(&self, path: &Path, mode: Mode) -> io::Result<Arc<dyn File>>;

    /// Gives a file another name, replacing what has it.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;

    /// Removes a file. Whoever has it open can still read it.
    fn remove(&self, path: &Path) -> io::Result<()>;

    /// Removes an empty directory.
    fn remove_dir(&self, dir: &Path) -> io::Result<()>;

    /// Takes an exclusive lock on a file, which is made if absent, and writes this process's id into it. `WouldBlock`
    /// when another process has it. The lock ends when the returned value is dropped or the process ends.
    fn lock(&self, path: &Path) -> io::Result<Box<dyn Send + Sync>>;

    /// Bytes that can still be written in the file system of `dir`.
    fn free_bytes(&self, dir: &Path) -> io::Result<u64>;

    /// Bytes that the file system of `dir` has for this process: what is used and what is free.
    fn total_bytes(&self, dir: &Path) -> io::Result<u64>;

    /// Writes out what was written there to a file, in pieces, so that a later sync finds less to do. Nothing is durable before that
    /// sync. An error is final, as that of a sync is; a file that cannot be opened is left to the sync.
    fn write_out(&self, path: &Path, range: Range<u64>, piece_bytes: usize) -> io::Result<()>;

    /// How many files may be held open at once by the log.
    fn open_files(&self) -> usize;

    /// Reads a whole file.
    fn read(&self, path: &Path) -> io::Result<Vec<u8>> {
        let file = self.open(path, Mode::Read)?;
        let len = file.size()?;
        let mut bytes = vec![0; usize::try_from(len).map_err(|_| io::ErrorKind::FileTooLarge)?];
        let got = file.read_at(&mut bytes, 0)?;
        bytes.truncate(got);
        Ok(bytes)
    }

    /// Writes a whole file, unsynced.
    fn write(&self, path: &Path, bytes: &[u8]) -> io::Result<Arc<dyn File>> {
        let file = self.open(path, Mode::Write)?;
        file.truncate(0)?;
        file.write_at(&[IoSlice::new(bytes)], 0)?;
        Ok(file)
    }

    /// Replaces a file at once and durably: a crash leaves the old or the new content. A large one is written out in pieces before the sync. An
    /// error names the file that was refused.
    fn replace(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        let temporary = path.with_extension("tmp");
        let parent = path.parent().unwrap_or(Path::new("."));
        let written = self.write(&temporary, bytes).and_then(|file| {
            if bytes.len() > PIECE_BYTES {
                self.write_out(&temporary, 0..bytes.len() as u64, PIECE_BYTES)?;
            }
            file.sync()
        });
        written.map_err(|error| naming(&temporary, &error))?;
        self.rename(&temporary, path).map_err(|error| naming(path, &error))?;
        self.sync_dir(parent).map_err(|error| naming(parent, &error))
    }
}

/// An error of the same kind that says where.
fn naming(path: &Path, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}

/// How a file is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// For reading; must exist.
    Read,
    /// For reading and writing; made when absent.
    Write,
    /// For whole blocks, past the page cache where the file system can do that; made when absent. Every write has to be aligned as
    /// [`File::write_durable`] says.
    Direct,
}

/// A name in a directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The name, without the directory.
    pub name: String,
    /// Whether it is a directory.
    pub is_dir: bool,
    /// Bytes, for a file.
    pub len: u64,
}

/// An open file. Handles are shared between threads; every call says where it reads or writes.
pub trait File: Send + Sync {
    /// Its length in bytes.
    fn size(&self) -> io::Result<u64>;

    /// When its bytes were last changed, in milliseconds since 1970 by the machine's clock.
    fn modified_ms(&self) -> io::Result<i64>;

    /// Fills `buffer` from `at`; fewer bytes only at the end of the file.
    fn read_at(&self, buffer: &mut [u8], at: u64) -> io::Result<usize>;

    /// Writes all slices one after the other from `at`.
    fn write_at(&self, slices: &[IoSlice<'_>], at: u64) -> io::Result<()>;

    /// Writes whole blocks and returns when they are on stable storage. `bytes` begins at a multiple of [`BLOCK`] in
    /// memory, `at` and the length are multiples of it.
    fn write_durable(&self, bytes: &[u8], at: u64) -> io::Result<()>;

    /// Cuts or extends (with zeros) the file.
    fn truncate(&self, len: u64) -> io::Result<()>;

    /// Gives back some of the room of a file that was removed and that nobody reads, and waits a moment; more of it where room is needed
    /// soon. False when what is left may be given back at once. Blocks.
    fn give_back_step(&self, hurry: bool) -> io::Result<bool>;

    /// Makes content and length durable.
    fn sync(&self) -> io::Result<()>;
}

#[cfg(test)]
mod tests;
