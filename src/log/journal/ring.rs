//! The journal's files: a ring of preallocated files that grows on demand. A file is reused when nothing in it is
//! needed.

use std::{
    collections::VecDeque,
    io::{self, IoSlice},
    path::{Path, PathBuf},
    sync::Arc,
};

use crate::log::disk::{BLOCK, Disk, File, OpenMode};

/// Bytes of zeros per write to a new file. A concurrent append waits for one such write at most, if the file system
/// supports direct I/O.
const ZERO_FILL_BYTES: usize = 256 << 10;

/// Minimum number of files of a ring. A single file could never be reused, because it stays active.
const MIN_FILES: usize = 2;

/// Number of files into which a ring is divided. A ring above 1 GiB has more files, so that no file exceeds
/// [`MAX_FILE_BYTES`].
const RING_FILES: u64 = 16;

/// Maximum size of a file: it is filled with zeros before its first use, which must not take long.
const MAX_FILE_BYTES: u64 = 64 << 20;

/// Minimum size of a file.
const MIN_FILE_BYTES: u64 = 64 << 10;

/// Returns the size of a file in bytes, and the maximum number of files, for a ring of `bytes`.
pub(in crate::log) fn ring_layout(bytes: u64) -> (u64, usize) {
    let file_bytes = (bytes / RING_FILES).next_multiple_of(4096).clamp(MIN_FILE_BYTES, MAX_FILE_BYTES);
    let files = bytes.div_ceil(file_bytes).max(RING_FILES);
    (file_bytes, usize::try_from(files).unwrap_or(usize::MAX))
}

/// The files of the journal and the use of each.
pub(in crate::log) struct Ring {
    disk: Arc<dyn Disk>,
    dir: PathBuf,
    pub(super) file_bytes: u64,
    max_files: usize,
    /// Slots of the files that may be written from their start. The last one is used next.
    free: Vec<usize>,
    /// Files in use, oldest first; the last one is active.
    used: VecDeque<RingFile>,
    /// Number of files that exist, free or in use.
    file_count: usize,
    /// Serial of the file that became active last.
    last_serial: u64,
}

/// A file in use.
struct RingFile {
    /// Number in the file's name.
    slot: usize,
    /// Number of this use of the file. The next use of the same file has a larger one.
    serial: u64,
    /// Sequence of the first frame in the file.
    first_frame: u64,
}

/// The file that receives the next frame.
pub(super) struct ActiveFile {
    pub(super) file: Arc<dyn File>,
    pub(super) serial: u64,
    /// Position of the next frame.
    pub(super) position: u64,
}

impl Ring {
    /// Opens the ring in `dir`. Called after replay, when the content of the files is not needed. Journal files of this
    /// ring's size and slots become free, all other journal files are removed.
    pub(in crate::log) fn open(disk: Arc<dyn Disk>, dir: &Path, file_bytes: u64, max_files: usize) -> io::Result<Self> {
        disk.create_dir_all(dir)?;
        // The content of a directory is durable only if the directory's own name is.
        disk.sync_dir(dir.parent().filter(|above| !above.as_os_str().is_empty()).unwrap_or(Path::new(".")))?;
        disk.sync_dir(dir)?;
        let mut ring = Self {
            disk,
            dir: dir.to_owned(),
            file_bytes,
            max_files: max_files.max(MIN_FILES),
            free: Vec::new(),
            used: VecDeque::new(),
            file_count: 0,
            last_serial: 0,
        };
        for entry in ring.disk.list(dir)? {
            let Some(slot) = slot_of(&entry.name) else { continue };
            if entry.len == file_bytes && slot < ring.max_files {
                ring.free.push(slot);
            } else {
                ring.disk.remove(&dir.join(&entry.name))?;
            }
        }
        ring.file_count = ring.free.len();
        ring.free.sort_unstable_by(|a, b| b.cmp(a));
        Ok(ring)
    }

    pub(super) fn disk(&self) -> Arc<dyn Disk> {
        self.disk.clone()
    }

    /// Returns the folder of the files.
    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    fn path(&self, slot: usize) -> PathBuf {
        self.dir.join(format!("{slot:05}.journal"))
    }

    /// Returns the path and number of a slot without a file, if the ring may still grow.
    pub(super) fn next_slot(&self) -> Option<(PathBuf, usize)> {
        if self.file_count >= self.max_files {
            return None;
        }
        let exists = |slot: &usize| self.free.contains(slot) || self.used.iter().any(|used| used.slot == *slot);
        (0..self.max_files).find(|slot| !exists(slot)).map(|slot| (self.path(slot), slot))
    }

    /// Adds a file that [`create_zeroed`] created, as a free one.
    pub(super) fn add(&mut self, slot: usize) {
        self.file_count += 1;
        self.free.push(slot);
    }

    /// Makes the next free file the active one. `sequence` is that of the next frame, the first in the file. Returns
    /// `None` if no file is free.
    pub(super) fn advance(&mut self, sequence: u64) -> io::Result<Option<ActiveFile>> {
        let Some(slot) = self.free.pop() else { return Ok(None) };
        let file = match self.disk.open(&self.path(slot), OpenMode::Direct) {
            Ok(file) => file,
            Err(error) => {
                self.free.push(slot);
                return Err(error);
            }
        };
        self.last_serial += 1;
        self.used.push_back(RingFile { slot, serial: self.last_serial, first_frame: sequence });
        Ok(Some(ActiveFile { file, serial: self.last_serial, position: 0 }))
    }

    /// Returns the sequence of the frame at which replay would start if all files with a serial below `keep` were
    /// released. That frame must exist. So an active file without a frame is not considered.
    pub(super) fn start_after(&self, keep: u64, next_frame: u64) -> u64 {
        let with_frames = self.used.iter().take_while(|used| used.first_frame < next_frame);
        let last = with_frames.clone().last();
        let first_kept = with_frames.clone().find(|used| used.serial >= keep).or(last);
        first_kept.map_or(next_frame, |used| used.first_frame)
    }

    /// Releases the files that hold only frames below `first_frame`. The active file stays.
    pub(super) fn release(&mut self, first_frame: u64) {
        while self.used.len() > 1 && self.used[1].first_frame <= first_frame {
            let used = self.used.pop_front().expect("more than one file is in use");
            sim_event!(JournalFileFreed { file: used.serial });
            self.free.insert(0, used.slot);
        }
    }

    /// Returns true if fewer than half of the ring's files are free or not yet created: segments should be synced now.
    pub(super) fn is_low(&self) -> bool {
        self.free.len() + (self.max_files - self.file_count) < self.max_files.div_ceil(2)
    }

    /// Returns true if the next file should be created now, before it is needed.
    pub(super) fn wants_file(&self) -> bool {
        self.free.is_empty() && self.file_count < self.max_files
    }

    /// Returns the serial of the oldest file in use; `None` while a file is free.
    pub(super) fn oldest(&self) -> Option<u64> {
        self.used.front().map(|used| used.serial).filter(|_| self.free.is_empty())
    }

    pub(super) fn has_free(&self) -> bool {
        !self.free.is_empty()
    }

    /// Returns the bytes of the files that the ring requires and that do not exist yet. A ring of one file could never
    /// release that file, because it stays active.
    pub(super) fn unallocated_bytes(&self) -> u64 {
        (MIN_FILES.saturating_sub(self.file_count)) as u64 * self.file_bytes
    }

    /// Returns the bytes of all files.
    pub(super) fn bytes(&self) -> u64 {
        self.file_count as u64 * self.file_bytes
    }
}

/// Returns the slot in the name of a journal file; `None` for other names.
fn slot_of(name: &str) -> Option<usize> {
    name.strip_suffix(".journal")?.parse().ok()
}

/// Creates a file of zeros, durable with its name, so that later writes allocate nothing. `after_piece` is called after
/// each piece with the number of bytes written so far; its error ends the work. After an error the partial file is
/// removed.
pub(super) fn create_zeroed(
    disk: &dyn Disk,
    path: &Path,
    bytes: u64,
    after_piece: &mut dyn FnMut(u64) -> io::Result<()>,
) -> io::Result<()> {
    let mut create = || {
        let file = disk.open(path, OpenMode::Direct)?;
        let mut zeros = AlignedBuffer::default();
        let mut position = 0;
        while position < bytes {
            let len = usize::try_from(bytes - position).unwrap_or(ZERO_FILL_BYTES).min(ZERO_FILL_BYTES);
            let piece = zeros.slice(len);
            piece.fill(0);
            file.write_at(&[IoSlice::new(piece)], position)?;
            position += len as u64;
            after_piece(position)?;
        }
        file.sync()?;
        disk.sync_dir(path.parent().unwrap_or(Path::new(".")))
    };
    create().inspect_err(|_| drop(disk.remove(path)))
}

/// Memory for direct I/O, without unsafe code: it starts at a block boundary and grows on demand. The allocation is
/// slightly larger, and a slice of it starts at the boundary.
#[derive(Default)]
pub(super) struct AlignedBuffer {
    memory: Vec<u8>,
}

impl AlignedBuffer {
    /// Returns `len` bytes at a block boundary, with arbitrary content.
    pub(super) fn slice(&mut self, len: usize) -> &mut [u8] {
        if self.memory.len() < len + BLOCK {
            self.memory = vec![0; len.next_power_of_two() + BLOCK];
        }
        let start = self.memory.as_ptr().align_offset(BLOCK);
        // In theory `align_offset` may return `usize::MAX`. The slice then does not start at a block boundary.
        let start = if start < BLOCK { start } else { 0 };
        &mut self.memory[start..start + len]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::log::disk::SimDisk;

    #[test]
    fn file_is_created_in_pieces_and_removed_on_error() {
        let disk = SimDisk::new();
        let (dir, file) = (Path::new("/journal"), Path::new("/journal/00000.journal"));
        disk.create_dir_all(dir).unwrap();
        let bytes = 3 * ZERO_FILL_BYTES as u64 - 4096;
        let mut progress = Vec::new();
        let mut after_piece = |written| {
            progress.push(written);
            Ok(())
        };
        create_zeroed(&disk, file, bytes, &mut after_piece).unwrap();
        assert_eq!(progress, [ZERO_FILL_BYTES as u64, 2 * ZERO_FILL_BYTES as u64, bytes]);
        assert!(disk.read(file).unwrap() == vec![0; usize::try_from(bytes).unwrap()]);
        let cancelled = Path::new("/journal/00001.journal");
        let mut cancel =
            |written| if written > ZERO_FILL_BYTES as u64 { Err(io::ErrorKind::Interrupted.into()) } else { Ok(()) };
        create_zeroed(&disk, cancelled, bytes, &mut cancel).unwrap_err();
        let names: Vec<_> = disk.list(dir).unwrap().into_iter().map(|entry| entry.name).collect();
        assert_eq!(names, ["00000.journal"]);
    }
}
