//! The cache of open segment files. The cache is bounded: if it is full, opening a file closes the file used longest
//! ago.

use std::{
    io,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use lru::LruCache;

use crate::{
    log::{
        disk::{Disk, File, OpenMode},
        format::Index,
    },
    task::lock::Mutex,
};

/// Divisor of the maximum number of open files: at most a quarter of them are removed files that are still open.
pub(super) const REMOVED_FILES_SHARE: usize = 4;

/// Open files, with the indexes that were read for them.
pub(super) struct FileCache {
    disk: Arc<dyn Disk>,
    /// Maximum number of files.
    capacity: usize,
    /// Open files by serial, in order of last use. A use and an eviction have a constant cost.
    open: Mutex<LruCache<u64, Arc<OpenFile>>>,
    next_serial: AtomicU64,
}

/// An open segment.
pub(super) struct OpenFile {
    pub(super) file: Arc<dyn File>,
    /// Index of a sealed segment, loaded at its first use.
    pub(super) index: Mutex<Option<Arc<Index>>>,
}

impl FileCache {
    pub(super) fn new(disk: Arc<dyn Disk>) -> Self {
        let capacity = disk.max_open_files() - disk.max_open_files() / REMOVED_FILES_SHARE;
        Self { disk, capacity, open: Mutex::new(LruCache::unbounded()), next_serial: AtomicU64::new(0) }
    }

    /// Assigns the serial of a file that exists or will be created. A file that is created again at the same path gets
    /// another serial.
    pub(super) fn new_serial(&self) -> u64 {
        self.next_serial.fetch_add(1, Ordering::Relaxed)
    }

    /// Returns the open file with this serial. A file that is not open is opened at `path`, and the file used longest
    /// ago is closed if the cache is full. With [`OpenMode::Read`] the file must exist.
    pub(super) fn get(&self, serial: u64, path: &Path, mode: OpenMode) -> io::Result<Arc<OpenFile>> {
        if let Some(file) = self.open.lock().get(&serial) {
            return Ok(file.clone());
        }
        // Every file is opened for writing, because its next user may write. The first open fails for a reader if the
        // file does not exist, so that a reader never creates a file.
        if mode == OpenMode::Read {
            self.disk.open(path, OpenMode::Read)?;
        }
        let opened = Arc::new(OpenFile { file: self.disk.open(path, OpenMode::Write)?, index: Mutex::new(None) });
        let mut open = self.open.lock();
        // Two threads may have opened the file concurrently. Both use the handle that was inserted first.
        let file = open.get_or_insert(serial, || opened).clone();
        let evicted = if open.len() > self.capacity { open.pop_lru() } else { None };
        drop(open);
        // Closing a file may take time, so it happens outside the lock.
        drop(evicted);
        Ok(file)
    }

    /// Removes a file from the cache. Its current users keep it open.
    pub(super) fn remove(&self, serial: u64) {
        drop(self.take(serial));
    }

    /// Removes a file from the cache and returns it; `None` if it is not in the cache. Its current users keep it open.
    pub(super) fn take(&self, serial: u64) -> Option<Arc<OpenFile>> {
        self.open.lock().pop(&serial)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::log::disk::SimDisk;

    fn path(serial: u64) -> std::path::PathBuf {
        format!("/d/{serial}").into()
    }

    #[test]
    fn file_used_longest_ago_is_closed_first() {
        let disk = SimDisk::new();
        disk.create_dir_all(Path::new("/d")).expect("the disk works");
        let files = FileCache::new(Arc::new(disk));
        let capacity = u64::try_from(files.capacity).expect("few");
        let serials: Vec<u64> = (0..=capacity).map(|_| files.new_serial()).collect();
        let get = |serial: u64| files.get(serial, &path(serial), OpenMode::Write).expect("the file opens");
        let first = get(serials[0]);
        for serial in &serials[1..serials.len() - 1] {
            get(*serial);
            assert!(Arc::ptr_eq(&get(serials[0]), &first), "the file used last stays open");
        }
        let second = get(serials[1]);
        get(serials[0]);
        get(*serials.last().expect("some"));
        assert_eq!(files.open.lock().len(), files.capacity);
        assert!(!files.open.lock().contains(&serials[2]), "the file used longest ago is closed");
        assert!(Arc::ptr_eq(&get(serials[1]), &second));
        files.remove(serials[0]);
        assert!(!Arc::ptr_eq(&get(serials[0]), &first), "a removed file is opened again");
        assert!(
            files.get(files.new_serial(), Path::new("/d/none"), OpenMode::Read).is_err(),
            "a reader creates no file"
        );
    }
}
