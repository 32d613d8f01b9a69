//! A disk in memory that loses unsynced data. Deterministic: the same calls and the same seeds give the same bytes.
//!
//! # Crash
//!
//! [`SimDisk::crash`] cuts the power. Unsynced content of a file becomes durable or not, at random: by 512-byte
//! sectors, by pages, or all together. The unsynced name changes of a directory become durable in order, up to a random
//! one. Handles from before a crash fail. A failed sync loses data, as in an operating system that marks the pages
//! clean after the failure. Some of the data becomes durable, and the rest reads as the previous content. Faults are
//! set by [`SimDisk::fail_writes_after`], [`SimDisk::set_capacity`], [`SimDisk::fail_syncs`] and [`SimDisk::flip`].

use std::{
    collections::{BTreeMap, BTreeSet},
    io::{self, IoSlice},
    ops::{Bound, Range},
    path::{Path, PathBuf},
    sync::Arc,
};

use super::{DirEntry, Disk, File, OpenMode};
use crate::task::{clock, lock::Mutex};

const SECTOR: usize = 512;
const PAGE: usize = 4096;

/// A disk in memory that loses unsynced data in a crash. Clones share the disk.
#[derive(Clone, Default)]
pub struct SimDisk(Arc<Mutex<SimDiskState>>);

#[derive(Default)]
struct SimDiskState {
    /// Files by id, with or without a name.
    files: BTreeMap<u64, SimFileContent>,
    /// Names of the files, each with the file's id, as a running process sees them.
    names: BTreeMap<PathBuf, u64>,
    dirs: BTreeSet<PathBuf>,
    /// Names that certainly survive a crash.
    durable_names: BTreeMap<PathBuf, u64>,
    durable_dirs: BTreeSet<PathBuf>,
    /// Changes of names that are not durable yet, in order.
    changes: Vec<UnsyncedChange>,
    locks: BTreeSet<PathBuf>,
    /// Id of the next file.
    next_file: u64,
    /// Number of the simulated process that uses the disk. It grows with each crash and kill, which end the process.
    process: u64,
    /// Bytes of files at which the disk is full; `None` is unlimited.
    capacity: Option<u64>,
    /// Number of operations that still succeed before all later ones fail; `None` if none fails. An operation is a
    /// write, a truncation, a sync, or a change of a name.
    operations_left: Option<u64>,
    /// Text that selects files: the sync of a file whose path contains the text fails. `None` if no sync fails.
    failing_syncs: Option<String>,
    /// Number of operations so far, failed ones included.
    operations: u64,
}

/// Content of a file. The durable content follows from `bytes`, `durable_len` and `undo`. A second copy of it would
/// have to be updated by every sync.
#[derive(Default)]
struct SimFileContent {
    bytes: Vec<u8>,
    durable_len: usize,
    /// Durable bytes that were overwritten or truncated since the last sync, with their positions, in order.
    undo: Vec<(usize, Vec<u8>)>,
    /// Number that grows with each change of existing bytes.
    rewrites: u64,
    /// Ranges that were written out, for tests.
    write_outs: Vec<Range<u64>>,
    modified_ms: i64,
}

/// A change of a name that is not durable until its directory is synced.
struct UnsyncedChange {
    dir: PathBuf,
    name_change: NameChange,
}

enum NameChange {
    /// A new name of the file with this id.
    Link(PathBuf, u64),
    Unlink(PathBuf),
    /// The old name, the new name, and the id of the file.
    Rename(PathBuf, PathBuf, u64),
    MakeDir(PathBuf),
    RemoveDir(PathBuf),
}

/// Identity and state of a file at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SyncStamp {
    /// Id of the file.
    file: u64,
    /// Number of changes of existing bytes.
    rewrites: u64,
    /// Length in bytes.
    pub len: u64,
}

impl SyncStamp {
    /// Returns the stamp of the same file without content.
    pub fn of_nothing(self) -> Self {
        Self { len: 0, ..self }
    }

    /// Returns true if the file was unchanged, or only appended to, between this stamp and `later`.
    pub fn is_before(self, later: Self) -> bool {
        (self.file, self.rewrites) == (later.file, later.rewrites) && self.len <= later.len
    }
}

/// Generator of random numbers: SplitMix64 (Steele, Lea, Flood 2014), which is sufficient for choosing sectors.
pub(in crate::log) struct SimRng(pub(in crate::log) u64);

impl SimRng {
    /// Returns a number below `below`; 0 if `below` is 0.
    pub(in crate::log) fn roll(&mut self, below: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % below.max(1)
    }
}

impl SimDisk {
    /// Returns an empty disk.
    pub fn new() -> Self {
        Self::default()
    }

    /// Cuts the power and restores it. Synced data stays, and `seed` decides which unsynced data survives. Locks and
    /// handles end, faults are cleared, and the capacity stays.
    pub fn crash(&self, seed: u64) {
        let mut state = self.0.lock();
        let mut rng = SimRng(seed);
        state.process += 1;
        state.locks.clear();
        state.operations_left = None;
        state.failing_syncs = None;
        let mut survives_by_dir: BTreeMap<PathBuf, bool> = BTreeMap::new();
        for change in std::mem::take(&mut state.changes) {
            // The changes in a directory become durable in order. After a lost change, all later ones are lost.
            let survives = survives_by_dir.entry(change.dir.clone()).or_insert(true);
            *survives &= rng.roll(4) != 0;
            if *survives {
                change.name_change.apply(&mut state);
            }
        }
        state.names = state.durable_names.clone();
        state.dirs = state.durable_dirs.clone();
        let dirs = state.dirs.clone();
        state.names.retain(|path, _| path.parent().is_none_or(|dir| dirs.contains(dir)));
        state.durable_names = state.names.clone();
        let linked: BTreeSet<u64> = state.names.values().copied().collect();
        state.files.retain(|id, _| linked.contains(id));
        for content in state.files.values_mut() {
            content.tear(&mut rng);
        }
    }

    /// Ends every process that uses the disk, but not the machine: no data is lost (kill -9). Locks and handles end,
    /// and faults are cleared.
    pub fn kill(&self) {
        let mut state = self.0.lock();
        state.process += 1;
        state.locks.clear();
        state.operations_left = None;
        state.failing_syncs = None;
    }

    /// Makes every write, truncation, sync and change of a name fail with an I/O error after `operations` further ones;
    /// `None` clears the fault.
    pub fn fail_writes_after(&self, operations: Option<u64>) {
        self.0.lock().operations_left = operations;
    }

    /// Sets the number of bytes in files at which the disk is full; `None` removes the limit.
    pub fn set_capacity(&self, bytes: Option<u64>) {
        self.0.lock().capacity = bytes;
    }

    /// Makes syncs fail for files whose path contains `part`. A failed sync may lose unsynced data. `None` clears the
    /// fault.
    pub fn fail_syncs(&self, part: Option<&str>) {
        self.0.lock().failing_syncs = part.map(str::to_owned);
    }

    /// Flips one bit of a file, in memory and in the durable content. Returns false if the file has no such bit.
    pub fn flip(&self, path: &Path, bit: u64) -> bool {
        let mut state = self.0.lock();
        let Some(id) = state.names.get(path).copied() else { return false };
        let Some(content) = state.files.get_mut(&id) else { return false };
        let Ok(byte) = usize::try_from(bit / 8) else { return false };
        let mask = 1 << (bit % 8);
        let Some(target) = content.bytes.get_mut(byte) else { return false };
        *target ^= mask;
        content.rewrites += 1;
        // The durable byte at this position is in the first undo entry that covers the position, if any.
        let durable = content.undo.iter_mut().find_map(|(at, old)| old.get_mut(byte.checked_sub(*at)?));
        if let Some(durable) = durable {
            *durable ^= mask;
        }
        true
    }

    /// Returns the number of writes, syncs and changes of names so far. Tests use it to choose the operation at which
    /// all begin to fail.
    pub fn operations(&self) -> u64 {
        self.0.lock().operations
    }

    /// Returns the stamp of a file; `None` if there is no file of that name.
    pub fn stamp(&self, path: &Path) -> Option<SyncStamp> {
        let state = self.0.lock();
        let id = *state.names.get(path)?;
        let content = &state.files[&id];
        Some(SyncStamp { file: id, rewrites: content.rewrites, len: content.bytes.len() as u64 })
    }

    /// Returns the files in a directory that certainly survive a power failure, each with its durable content.
    pub fn durable(&self, dir: &Path) -> Vec<(PathBuf, Vec<u8>)> {
        let state = self.0.lock();
        let names = state.durable_names.iter().filter(|(path, _)| path.parent() == Some(dir));
        names.filter_map(|(path, id)| Some((path.clone(), state.files.get(id)?.durable()))).collect()
    }

    /// Returns the ranges of a file that were written out.
    #[cfg(test)]
    pub(in crate::log) fn write_outs(&self, path: &Path) -> Vec<Range<u64>> {
        let state = self.0.lock();
        state.names.get(path).map(|id| state.files[id].write_outs.clone()).unwrap_or_default()
    }

    /// Returns every file that has a name, with its length.
    pub fn files(&self) -> Vec<(PathBuf, u64)> {
        let state = self.0.lock();
        state.names.iter().map(|(path, id)| (path.clone(), state.files[id].bytes.len() as u64)).collect()
    }
}

impl SimFileContent {
    /// Saves the current bytes of a range that is about to change, as far as it lies below the durable length. The
    /// first saved bytes of a position are its durable ones. Counts a change of existing bytes.
    fn save_undo(&mut self, range: Range<usize>) {
        if range.start < self.bytes.len() {
            self.rewrites += 1;
        }
        let end = range.end.min(self.durable_len).min(self.bytes.len());
        if range.start < end {
            self.undo.push((range.start, self.bytes[range.start..end].to_vec()));
        }
    }

    /// Makes the current content durable.
    fn sync(&mut self) {
        self.durable_len = self.bytes.len();
        self.undo.clear();
    }

    /// Simulates a failed sync. Each page that is not durable stays, or reads as its previous durable content
    /// (zeros above the durable length), at random. The result counts as durable. The length stays, because the file
    /// system tracks it.
    fn lose_pages(&mut self, rng: &mut SimRng) {
        let len = self.bytes.len();
        let mut durable = self.durable();
        durable.resize(len, 0);
        for at in (0..len).step_by(PAGE) {
            let page = at..len.min(at + PAGE);
            if rng.roll(2) == 0 && self.bytes[page.clone()] != durable[page.clone()] {
                self.bytes[page.clone()].copy_from_slice(&durable[page]);
                self.rewrites += 1;
            }
        }
        self.sync();
    }

    /// Returns the durable content.
    fn durable(&self) -> Vec<u8> {
        let mut durable = self.bytes.clone();
        durable.resize(self.durable_len, 0);
        for (at, old) in self.undo.iter().rev() {
            durable[*at..at + old.len()].copy_from_slice(old);
        }
        durable
    }

    /// Simulates a power failure. Each unit of the content (a sector, a page, or the whole file) has its current or its
    /// durable bytes, at random. The length is random between the current and the durable one.
    fn tear(&mut self, rng: &mut SimRng) {
        if self.undo.is_empty() && self.bytes.len() == self.durable_len {
            return;
        }
        let durable = self.durable();
        let (short, long) = (durable.len().min(self.bytes.len()), durable.len().max(self.bytes.len()));
        let mut len = short + usize::try_from(rng.roll((long - short) as u64 + 1)).unwrap_or(0);
        if rng.roll(2) == 0 {
            len = if rng.roll(2) == 0 { durable.len() } else { self.bytes.len() };
        }
        let mut torn = vec![0; len];
        // The unit of this file in this crash: a sector, a page, or the whole file.
        let unit = [SECTOR, PAGE, usize::MAX][usize::try_from(rng.roll(3)).unwrap_or(0)];
        let mut at = 0;
        while at < len {
            let end = at.saturating_add(unit).min(len);
            let is_written = rng.roll(2) == 0;
            // A unit that was not written keeps the durable content if there was any, else it is zeros.
            for source in [&durable, &self.bytes].into_iter().take(1 + usize::from(is_written)) {
                let source_end = source.len().min(end);
                if at < source_end {
                    torn[at..source_end].copy_from_slice(&source[at..source_end]);
                }
            }
            at = end;
        }
        self.bytes = torn;
        self.rewrites += 1;
        self.sync();
    }
}

impl NameChange {
    /// Makes the change durable.
    fn apply(self, state: &mut SimDiskState) {
        match self {
            Self::Link(path, id) => drop(state.durable_names.insert(path, id)),
            Self::Unlink(path) => drop(state.durable_names.remove(&path)),
            Self::Rename(from, to, id) => {
                state.durable_names.remove(&from);
                state.durable_names.insert(to, id);
            }
            Self::MakeDir(dir) => drop(state.durable_dirs.insert(dir)),
            Self::RemoveDir(dir) => {
                // The removal of a directory removes its content.
                state.durable_names.retain(|path, _| path.parent() != Some(dir.as_path()));
                state.durable_dirs.remove(&dir);
            }
        }
    }
}

impl SimDiskState {
    /// Counts a write, sync or change of a name that is about to happen. Fails if [`SimDisk::fail_writes_after`]
    /// permits no further one.
    fn begin_change(&mut self) -> io::Result<()> {
        self.operations += 1;
        match &mut self.operations_left {
            Some(0) => Err(io::Error::other("simulated I/O error")),
            Some(remaining) => {
                *remaining -= 1;
                Ok(())
            }
            None => Ok(()),
        }
    }

    /// Adds a change of a name, which becomes durable with the next sync of the directory.
    fn record_change(&mut self, path: &Path, name_change: NameChange) {
        self.changes.push(UnsyncedChange { dir: path.parent().unwrap_or(Path::new("")).to_owned(), name_change });
    }

    /// Returns the bytes of all files with a name. A removed file uses no space, though a crash may restore it.
    fn used(&self) -> u64 {
        self.names.values().map(|id| self.files[id].bytes.len() as u64).sum()
    }

    /// Returns the content of a file for a handle of the process number `process`. Fails if that process has ended.
    fn content(&mut self, id: u64, process: u64) -> io::Result<&mut SimFileContent> {
        if process != self.process {
            return Err(io::Error::other("the simulated process has ended"));
        }
        self.files.get_mut(&id).ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    /// Extends a file with zeros to at least `end` bytes. Fails if that exceeds the capacity of the disk.
    fn grow(&mut self, id: u64, process: u64, end: usize) -> io::Result<()> {
        let len = self.content(id, process)?.bytes.len();
        let added = end.saturating_sub(len) as u64;
        if added > 0 && self.capacity.is_some_and(|capacity| self.used() + added > capacity) {
            return Err(io::ErrorKind::StorageFull.into());
        }
        let content = self.content(id, process)?;
        if end > len {
            content.bytes.resize(end, 0);
        }
        Ok(())
    }
}

impl Disk for SimDisk {
    fn register_root(&self, _dir: &Path) -> io::Result<()> {
        Ok(())
    }

    fn create_dir_all(&self, dir: &Path) -> io::Result<()> {
        let mut state = self.0.lock();
        let mut missing: Vec<_> = dir.ancestors().take_while(|dir| !state.dirs.contains(*dir)).collect();
        if missing.is_empty() {
            return Ok(());
        }
        state.begin_change()?;
        while let Some(dir) = missing.pop() {
            state.dirs.insert(dir.to_owned());
            if dir.parent().is_none_or(|parent| parent.as_os_str().is_empty()) {
                // The root of the disk always exists.
                state.durable_dirs.insert(dir.to_owned());
            } else {
                state.record_change(dir, NameChange::MakeDir(dir.to_owned()));
            }
        }
        Ok(())
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        let mut state = self.0.lock();
        state.begin_change()?;
        let changes = std::mem::take(&mut state.changes);
        for change in changes {
            if change.dir == dir { change.name_change.apply(&mut state) } else { state.changes.push(change) }
        }
        Ok(())
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<DirEntry>> {
        let state = self.0.lock();
        if !state.dirs.contains(dir) {
            return Err(io::ErrorKind::NotFound.into());
        }
        let name = |path: &Path| path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let inside = |path: &Path| path.parent() == Some(dir);
        // Paths are sorted by component, so the content of a directory follows the directory.
        let below = |path: &Path| path.starts_with(dir);
        let from = (Bound::Included(dir), Bound::Unbounded);
        let dirs = state.dirs.range::<Path, _>(from).take_while(|path| below(path));
        let files = state.names.range::<Path, _>(from).take_while(|(path, _)| below(path));
        let mut entries: Vec<DirEntry> =
            dirs.filter(|path| inside(path)).map(|path| DirEntry { name: name(path), is_dir: true, len: 0 }).collect();
        entries.extend(files.filter(|(path, _)| inside(path)).map(|(path, id)| DirEntry {
            name: name(path),
            is_dir: false,
            len: state.files[id].bytes.len() as u64,
        }));
        entries.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(entries)
    }

    fn open(&self, path: &Path, mode: OpenMode) -> io::Result<Arc<dyn File>> {
        let mut state = self.0.lock();
        let id = match state.names.get(path) {
            Some(id) => *id,
            None if mode == OpenMode::Read => return Err(io::ErrorKind::NotFound.into()),
            None => {
                if !path.parent().is_some_and(|dir| state.dirs.contains(dir)) {
                    return Err(io::ErrorKind::NotFound.into());
                }
                state.begin_change()?;
                let id = state.next_file;
                state.next_file += 1;
                state.files.insert(id, SimFileContent::default());
                state.names.insert(path.to_owned(), id);
                state.record_change(path, NameChange::Link(path.to_owned(), id));
                id
            }
        };
        let process = state.process;
        Ok(Arc::new(SimFile { disk: self.clone(), id, process, path: path.to_owned() }))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let mut state = self.0.lock();
        state.begin_change()?;
        let id = state.names.remove(from).ok_or(io::ErrorKind::NotFound)?;
        state.names.insert(to.to_owned(), id);
        state.record_change(to, NameChange::Rename(from.to_owned(), to.to_owned(), id));
        Ok(())
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        let mut state = self.0.lock();
        state.begin_change()?;
        state.names.remove(path).ok_or(io::ErrorKind::NotFound)?;
        state.record_change(path, NameChange::Unlink(path.to_owned()));
        Ok(())
    }

    fn remove_dir(&self, dir: &Path) -> io::Result<()> {
        let mut state = self.0.lock();
        state.begin_change()?;
        if state.names.keys().chain(&state.dirs).any(|path| path.parent() == Some(dir)) {
            return Err(io::ErrorKind::DirectoryNotEmpty.into());
        }
        if !state.dirs.remove(dir) {
            return Err(io::ErrorKind::NotFound.into());
        }
        // A later directory of the same name must not receive the pending changes of this directory.
        state.changes.retain(|change| change.dir != dir);
        state.record_change(dir, NameChange::RemoveDir(dir.to_owned()));
        Ok(())
    }

    fn lock(&self, path: &Path) -> io::Result<Box<dyn Send + Sync>> {
        self.open(path, OpenMode::Write)?;
        let mut state = self.0.lock();
        if !state.locks.insert(path.to_owned()) {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        Ok(Box::new(SimLock { disk: self.clone(), path: path.to_owned(), process: state.process }))
    }

    fn free_bytes(&self, _dir: &Path) -> io::Result<u64> {
        let state = self.0.lock();
        Ok(state.capacity.map_or(u64::MAX, |capacity| capacity.saturating_sub(state.used())))
    }

    fn total_bytes(&self, _dir: &Path) -> io::Result<u64> {
        Ok(self.0.lock().capacity.unwrap_or(u64::MAX))
    }

    fn write_out(&self, path: &Path, range: Range<u64>, _piece_bytes: usize) -> io::Result<()> {
        // Unsynced data may survive a crash or not, with or without a write-out. So a write-out needs no simulation.
        let mut state = self.0.lock();
        // Unit tests read the written-out ranges.
        let id = state.names.get(path).copied().filter(|_| cfg!(test));
        if let Some(content) = id.and_then(|id| state.files.get_mut(&id)) {
            content.write_outs.push(range);
        }
        Ok(())
    }

    fn max_open_files(&self) -> usize {
        // A small number, so that tests close and open files again.
        4
    }
}

/// A held lock of a file, which is released when the value is dropped.
struct SimLock {
    disk: SimDisk,
    path: PathBuf,
    /// Number of the process that took the lock.
    process: u64,
}

impl Drop for SimLock {
    fn drop(&mut self) {
        let mut state = self.disk.0.lock();
        // After a crash or a kill, a lock of this path belongs to a later process.
        if state.process == self.process {
            state.locks.remove(&self.path);
        }
    }
}

/// A handle of a file on the simulated disk.
struct SimFile {
    disk: SimDisk,
    id: u64,
    /// Number of the process that opened the file. The handle fails once that process has ended.
    process: u64,
    /// Path under which the file was opened; `fail_syncs` selects files by it.
    path: PathBuf,
}

impl File for SimFile {
    fn size(&self) -> io::Result<u64> {
        Ok(self.disk.0.lock().content(self.id, self.process)?.bytes.len() as u64)
    }

    fn modified_ms(&self) -> io::Result<i64> {
        Ok(self.disk.0.lock().content(self.id, self.process)?.modified_ms)
    }

    fn read_at(&self, buffer: &mut [u8], at: u64) -> io::Result<usize> {
        let mut state = self.disk.0.lock();
        let bytes = &state.content(self.id, self.process)?.bytes;
        let start = usize::try_from(at).unwrap_or(usize::MAX).min(bytes.len());
        let len = buffer.len().min(bytes.len() - start);
        buffer[..len].copy_from_slice(&bytes[start..start + len]);
        Ok(len)
    }

    fn write_at(&self, slices: &[IoSlice<'_>], at: u64) -> io::Result<()> {
        let mut state = self.disk.0.lock();
        state.begin_change()?;
        state.content(self.id, self.process)?.modified_ms = clock::wall_ms();
        let mut at = usize::try_from(at).map_err(|_| io::ErrorKind::FileTooLarge)?;
        for slice in slices {
            // The bytes that fitted before the disk was full stay, as on a real disk.
            let end = at + slice.len();
            state.content(self.id, self.process)?.save_undo(at..end);
            state.grow(self.id, self.process, end)?;
            state.content(self.id, self.process)?.bytes[at..end].copy_from_slice(slice);
            at = end;
        }
        Ok(())
    }

    fn write_durable(&self, bytes: &[u8], at: u64) -> io::Result<()> {
        self.write_at(&[IoSlice::new(bytes)], at)?;
        self.sync()
    }

    fn truncate(&self, len: u64) -> io::Result<()> {
        let mut state = self.disk.0.lock();
        state.begin_change()?;
        let len = usize::try_from(len).map_err(|_| io::ErrorKind::FileTooLarge)?;
        state.grow(self.id, self.process, len)?;
        let content = state.content(self.id, self.process)?;
        content.save_undo(len..content.bytes.len());
        content.bytes.truncate(len);
        content.modified_ms = clock::wall_ms();
        Ok(())
    }

    fn free_step(&self, _urgent: bool) -> io::Result<bool> {
        // A file without a name uses no space on this disk.
        Ok(false)
    }

    fn sync(&self) -> io::Result<()> {
        let mut state = self.disk.0.lock();
        state.begin_change()?;
        if state.failing_syncs.as_ref().is_some_and(|part| self.path.to_string_lossy().contains(part.as_str())) {
            let mut rng = SimRng(state.operations);
            state.content(self.id, self.process)?.lose_pages(&mut rng);
            return Err(io::Error::other("simulated sync failure"));
        }
        state.content(self.id, self.process)?.sync();
        Ok(())
    }
}
