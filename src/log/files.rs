//! The open files of all segments, bounded: an idle replica holds no handle.

use std::{
    collections::BTreeMap,
    io,
    path::Path,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use super::{
    disk::{Disk, File, Mode},
    index::Index,
};

/// The open files, and what was read of their indexes.
pub(super) struct Files {
    disk: Arc<dyn Disk>,
    capacity: usize,
    open: Mutex<Open>,
    serial: AtomicU64,
}

#[derive(Default)]
struct Open {
    files: BTreeMap<u64, (Arc<OpenFile>, u64)>,
    tick: u64,
}

/// One open segment.
pub(super) struct OpenFile {
    pub(super) file: Arc<dyn File>,
    /// A sealed segment's index, once it was asked for.
    pub(super) index: Mutex<Option<Arc<Index>>>,
}

impl Files {
    pub(super) fn new(disk: Arc<dyn Disk>) -> Self {
        let capacity = disk.open_files();
        Self { disk, capacity, open: Mutex::default(), serial: AtomicU64::new(0) }
    }

    /// A number for one file that is, or will be: a file made again at the same path has another.
    pub(super) fn serial(&self) -> u64 {
        self.serial.fetch_add(1, Ordering::Relaxed)
    }

    fn lock(&self) -> MutexGuard<'_, Open> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn get(&self, serial: u64, path: &Path, mode: Mode) -> io::Result<Arc<OpenFile>> {
        {
            let mut open = self.lock();
            open.tick += 1;
            let tick = open.tick;
            if let Some((file, used)) = open.files.get_mut(&serial) {
                *used = tick;
                return Ok(file.clone());
            }
        }
        // Always for writing where it exists, since the next user may write; never made by a reader.
        if mode == Mode::Read {
            self.disk.open(path, Mode::Read)?;
        }
        let file = Arc::new(OpenFile { file: self.disk.open(path, Mode::Write)?, index: Mutex::new(None) });
        let mut open = self.lock();
        if open.files.len() >= self.capacity {
            let oldest = open.files.iter().min_by_key(|(_, (_, used))| *used).map(|(serial, _)| *serial);
            oldest.and_then(|serial| open.files.remove(&serial));
        }
        let tick = open.tick;
        // Two threads may have opened it at once: they share the first.
        Ok(open.files.entry(serial).or_insert((file, tick)).0.clone())
    }

    pub(super) fn forget(&self, serial: u64) {
        self.take(serial);
    }

    /// Takes a file out of the table. Whoever uses it holds it as well.
    pub(super) fn take(&self, serial: u64) -> Option<Arc<OpenFile>> {
        self.lock().files.remove(&serial).map(|(file, _)| file)
    }
}
