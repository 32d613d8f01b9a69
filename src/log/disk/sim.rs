//! A disk in memory that forgets. Deterministic: the same calls and the same seeds give the same bytes.
//!
//! [`SimDisk::crash`] takes the power away: of what was not synced, each 512-byte sector of a file may have reached the
//! platter or not; of the changes of names in each directory that was not synced, some first ones may have. Handles from before
//! a crash fail. Faults are set by [`SimDisk::fail_writes_after`], [`SimDisk::set_capacity`], [`SimDisk::fail_syncs`] and
//! [`SimDisk::flip`].

use std::{
    collections::{BTreeMap, BTreeSet},
    io::{self, IoSlice},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use super::{Disk, Entry, File, Mode};

const SECTOR: usize = 512;

/// A disk in memory that loses what was not synced when it crashes. Clones share it.
#[derive(Clone, Default)]
pub struct SimDisk(Arc<Mutex<Machine>>);

#[derive(Default)]
struct Machine {
    files: BTreeMap<u64, Content>,
    names: BTreeMap<PathBuf, u64>,
    dirs: BTreeSet<PathBuf>,
    durable_names: BTreeMap<PathBuf, u64>,
    durable_dirs: BTreeSet<PathBuf>,
    /// Changes of names not yet durable, in order.
    changes: Vec<Change>,
    locks: BTreeSet<PathBuf>,
    next_file: u64,
    boot: u64,
    capacity: Option<u64>,
    operations_left: Option<u64>,
    failing_syncs: Option<String>,
    operations: u64,
}

#[derive(Default)]
struct Content {
    bytes: Vec<u8>,
    durable: Vec<u8>,
}

struct Change {
    dir: PathBuf,
    what: What,
}

enum What {
    Link(PathBuf, u64),
    Unlink(PathBuf),
    Rename(PathBuf, PathBuf, u64),
    MakeDir(PathBuf),
    RemoveDir(PathBuf),
}

/// SplitMix64 (Steele, Lea, Flood 2014): enough to choose sectors by.
pub(in crate::log) struct Dice(pub(in crate::log) u64);

impl Dice {
    pub(in crate::log) fn roll(&mut self, below: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % below.max(1)
    }
}

impl SimDisk {
    /// An empty disk.
    pub fn new() -> Self {
        Self::default()
    }

    fn machine(&self) -> MutexGuard<'_, Machine> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the power away and gives it back. What was synced is there; of the rest, `seed` chooses. Locks and handles
    /// end, faults are cleared, the capacity stays.
    pub fn crash(&self, seed: u64) {
        let mut machine = self.machine();
        let mut dice = Dice(seed);
        machine.boot += 1;
        machine.locks.clear();
        machine.operations_left = None;
        machine.failing_syncs = None;
        let mut kept: BTreeMap<PathBuf, bool> = BTreeMap::new();
        for change in std::mem::take(&mut machine.changes) {
            // Per directory, changes reach the disk in order: once one is lost, so are those after it.
            let keep = kept.entry(change.dir.clone()).or_insert(true);
            *keep &= dice.roll(4) != 0;
            if *keep {
                change.what.apply(&mut machine);
            }
        }
        machine.names = machine.durable_names.clone();
        machine.dirs = machine.durable_dirs.clone();
        let dirs = machine.dirs.clone();
        machine.names.retain(|path, _| path.parent().is_none_or(|dir| dirs.contains(dir)));
        machine.durable_names = machine.names.clone();
        let linked: BTreeSet<u64> = machine.names.values().copied().collect();
        machine.files.retain(|id, _| linked.contains(id));
        for content in machine.files.values_mut() {
            content.tear(&mut dice);
        }
    }

    /// Ends every process that uses the disk, but not the machine: nothing is lost (kill -9).
    pub fn kill(&self) {
        let mut machine = self.machine();
        machine.boot += 1;
        machine.locks.clear();
        machine.operations_left = None;
        machine.failing_syncs = None;
    }

    /// Every change fails with an I/O error after `operations` more; `None` ends that.
    pub fn fail_writes_after(&self, operations: Option<u64>) {
        self.machine().operations_left = operations;
    }

    /// The disk is full when its files hold this many bytes.
    pub fn set_capacity(&self, bytes: Option<u64>) {
        self.machine().capacity = bytes;
    }

    /// Syncs of files whose path contains `part` fail; `None` ends that.
    pub fn fail_syncs(&self, part: Option<&str>) {
        self.machine().failing_syncs = part.map(str::to_owned);
    }

    /// Flips one bit of a file, in memory and on the platter. False where the file has no such bit.
    pub fn flip(&self, path: &Path, bit: u64) -> bool {
        let mut machine = self.machine();
        let Some(id) = machine.names.get(path).copied() else { return false };
        let Some(content) = machine.files.get_mut(&id) else { return false };
        let Ok(byte) = usize::try_from(bit / 8) else { return false };
        let mask = 1 << (bit % 8);
        let Some(target) = content.bytes.get_mut(byte) else { return false };
        *target ^= mask;
        if let Some(target) = content.durable.get_mut(byte) {
            *target ^= mask;
        }
        true
    }

    /// How many changes were made so far: a place to fail at.
    pub fn operations(&self) -> u64 {
        self.machine().operations
    }

    /// Every file and its length.
    pub fn files(&self) -> Vec<(PathBuf, u64)> {
        let machine = self.machine();
        machine.names.iter().map(|(path, id)| (path.clone(), machine.files[id].bytes.len() as u64)).collect()
    }
}

impl Content {
    /// Of each sector that differs from what is durable, keeps the new or the old; of the length likewise.
    fn tear(&mut self, dice: &mut Dice) {
        if self.bytes == self.durable {
            return;
        }
        let (short, long) = (self.durable.len().min(self.bytes.len()), self.durable.len().max(self.bytes.len()));
        let mut len = short + usize::try_from(dice.roll((long - short) as u64 + 1)).unwrap_or(0);
        if dice.roll(2) == 0 {
            len = if dice.roll(2) == 0 { self.durable.len() } else { self.bytes.len() };
        }
        let mut torn = vec![0; len];
        // Some crashes tear by sector, some by page, some lose or keep all.
        let unit = [SECTOR, 4096, usize::MAX][usize::try_from(dice.roll(3)).unwrap_or(0)];
        let mut at = 0;
        while at < len {
            let end = at.saturating_add(unit).min(len);
            let newer = dice.roll(2) == 0;
            // A sector that was never written is the old content where there was one, else zeros.
            for from in [&self.durable, &self.bytes].into_iter().take(1 + usize::from(newer)) {
                let have = from.len().min(end);
                if at < have {
                    torn[at..have].copy_from_slice(&from[at..have]);
                }
            }
            at = end;
        }
        self.bytes.clone_from(&torn);
        self.durable = torn;
    }
}

impl What {
    fn apply(self, machine: &mut Machine) {
        match self {
            Self::Link(path, id) => drop(machine.durable_names.insert(path, id)),
            Self::Unlink(path) => drop(machine.durable_names.remove(&path)),
            Self::Rename(from, to, id) => {
                machine.durable_names.remove(&from);
                machine.durable_names.insert(to, id);
            }
            Self::MakeDir(dir) => drop(machine.durable_dirs.insert(dir)),
            Self::RemoveDir(dir) => {
                // A directory that is gone is gone with what was in it.
                machine.durable_names.retain(|path, _| path.parent() != Some(dir.as_path()));
                machine.durable_dirs.remove(&dir);
            }
        }
    }
}

impl Machine {
    fn change(&mut self) -> io::Result<()> {
        self.operations += 1;
        match &mut self.operations_left {
            Some(0) => Err(io::Error::other("simulated I/O error")),
            Some(left) => {
                *left -= 1;
                Ok(())
            }
            None => Ok(()),
        }
    }

    fn note(&mut self, path: &Path, what: What) {
        self.changes.push(Change { dir: path.parent().unwrap_or(Path::new("")).to_owned(), what });
    }

    /// Bytes of the files that have a name: one that was removed takes no room, though a crash may bring it back.
    fn used(&self) -> u64 {
        self.names.values().map(|id| self.files[id].bytes.len() as u64).sum()
    }

    fn content(&mut self, id: u64, boot: u64) -> io::Result<&mut Content> {
        if boot != self.boot {
            return Err(io::Error::other("the simulated process has ended"));
        }
        self.files.get_mut(&id).ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    fn grow(&mut self, id: u64, boot: u64, end: usize) -> io::Result<()> {
        let have = self.content(id, boot)?.bytes.len();
        let more = end.saturating_sub(have) as u64;
        if more > 0 && self.capacity.is_some_and(|capacity| self.used() + more > capacity) {
            return Err(io::ErrorKind::StorageFull.into());
        }
        let content = self.content(id, boot)?;
        if end > have {
            content.bytes.resize(end, 0);
        }
        Ok(())
    }
}

impl Disk for SimDisk {
    fn create_dir_all(&self, dir: &Path) -> io::Result<()> {
        let mut machine = self.machine();
        let mut missing: Vec<_> = dir.ancestors().take_while(|dir| !machine.dirs.contains(*dir)).collect();
        if missing.is_empty() {
            return Ok(());
        }
        machine.change()?;
        while let Some(dir) = missing.pop() {
            machine.dirs.insert(dir.to_owned());
            if dir.parent().is_none_or(|above| above.as_os_str().is_empty()) {
                // The root of the disk is always there.
                machine.durable_dirs.insert(dir.to_owned());
            } else {
                machine.note(dir, What::MakeDir(dir.to_owned()));
            }
        }
        Ok(())
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        let mut machine = self.machine();
        machine.change()?;
        let changes = std::mem::take(&mut machine.changes);
        for change in changes {
            if change.dir == dir { change.what.apply(&mut machine) } else { machine.changes.push(change) }
        }
        Ok(())
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<Entry>> {
        let machine = self.machine();
        if !machine.dirs.contains(dir) {
            return Err(io::ErrorKind::NotFound.into());
        }
        let name = |path: &Path| path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let inside = |path: &&PathBuf| path.parent() == Some(dir);
        let mut entries: Vec<Entry> =
            machine.dirs.iter().filter(inside).map(|path| Entry { name: name(path), is_dir: true, len: 0 }).collect();
        entries.extend(machine.names.iter().filter(|(path, _)| inside(path)).map(|(path, id)| Entry {
            name: name(path),
            is_dir: false,
            len: machine.files[id].bytes.len() as u64,
        }));
        entries.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(entries)
    }

    fn open(&self, path: &Path, mode: Mode) -> io::Result<Arc<dyn File>> {
        let mut machine = self.machine();
        let id = match machine.names.get(path) {
            Some(id) => *id,
            None if mode == Mode::Read => return Err(io::ErrorKind::NotFound.into()),
            None => {
                if !path.parent().is_some_and(|dir| machine.dirs.contains(dir)) {
                    return Err(io::ErrorKind::NotFound.into());
                }
                machine.change()?;
                let id = machine.next_file;
                machine.next_file += 1;
                machine.files.insert(id, Content::default());
                machine.names.insert(path.to_owned(), id);
                machine.note(path, What::Link(path.to_owned(), id));
                id
            }
        };
        let boot = machine.boot;
        Ok(Arc::new(SimFile { disk: self.clone(), id, boot, path: path.to_owned() }))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let mut machine = self.machine();
        machine.change()?;
        let id = machine.names.remove(from).ok_or(io::ErrorKind::NotFound)?;
        machine.names.insert(to.to_owned(), id);
        machine.note(to, What::Rename(from.to_owned(), to.to_owned(), id));
        Ok(())
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        let mut machine = self.machine();
        machine.change()?;
        machine.names.remove(path).ok_or(io::ErrorKind::NotFound)?;
        machine.note(path, What::Unlink(path.to_owned()));
        Ok(())
    }

    fn remove_dir(&self, dir: &Path) -> io::Result<()> {
        let mut machine = self.machine();
        machine.change()?;
        if machine.names.keys().chain(&machine.dirs).any(|path| path.parent() == Some(dir)) {
            return Err(io::ErrorKind::DirectoryNotEmpty.into());
        }
        if !machine.dirs.remove(dir) {
            return Err(io::ErrorKind::NotFound.into());
        }
        // A directory made again under this name is another one: nothing pending in the old one reaches it.
        machine.changes.retain(|change| change.dir != dir);
        machine.note(dir, What::RemoveDir(dir.to_owned()));
        Ok(())
    }

    fn lock(&self, path: &Path) -> io::Result<Box<dyn Send + Sync>> {
        self.open(path, Mode::Write)?;
        let mut machine = self.machine();
        if !machine.locks.insert(path.to_owned()) {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        Ok(Box::new(SimLock { disk: self.clone(), path: path.to_owned(), boot: machine.boot }))
    }

    fn free_bytes(&self, _dir: &Path) -> io::Result<u64> {
        let machine = self.machine();
        Ok(machine.capacity.map_or(u64::MAX, |capacity| capacity.saturating_sub(machine.used())))
    }

    fn total_bytes(&self, _dir: &Path) -> io::Result<u64> {
        Ok(self.machine().capacity.unwrap_or(u64::MAX))
    }

    fn open_files(&self) -> usize {
        // Few, so that closing and opening again is exercised.
        4
    }
}

struct SimLock {
    disk: SimDisk,
    path: PathBuf,
    boot: u64,
}

impl Drop for SimLock {
    fn drop(&mut self) {
        let mut machine = self.disk.machine();
        if machine.boot == self.boot {
            machine.locks.remove(&self.path);
        }
    }
}

struct SimFile {
    disk: SimDisk,
    id: u64,
    boot: u64,
    path: PathBuf,
}

impl File for SimFile {
    fn size(&self) -> io::Result<u64> {
        Ok(self.disk.machine().content(self.id, self.boot)?.bytes.len() as u64)
    }

    fn read_at(&self, buffer: &mut [u8], at: u64) -> io::Result<usize> {
        let mut machine = self.disk.machine();
        let bytes = &machine.content(self.id, self.boot)?.bytes;
        let start = usize::try_from(at).unwrap_or(usize::MAX).min(bytes.len());
        let len = buffer.len().min(bytes.len() - start);
        buffer[..len].copy_from_slice(&bytes[start..start + len]);
        Ok(len)
    }

    fn write_at(&self, slices: &[IoSlice<'_>], at: u64) -> io::Result<()> {
        let mut machine = self.disk.machine();
        machine.change()?;
        let mut at = usize::try_from(at).map_err(|_| io::ErrorKind::FileTooLarge)?;
        for slice in slices {
            // What fitted before the disk was full stays, as it does on a real one.
            machine.grow(self.id, self.boot, at + slice.len())?;
            machine.content(self.id, self.boot)?.bytes[at..at + slice.len()].copy_from_slice(slice);
            at += slice.len();
        }
        Ok(())
    }

    fn write_durable(&self, bytes: &[u8], at: u64) -> io::Result<()> {
        self.write_at(&[IoSlice::new(bytes)], at)?;
        self.sync()
    }

    fn truncate(&self, len: u64) -> io::Result<()> {
        let mut machine = self.disk.machine();
        machine.change()?;
        let len = usize::try_from(len).map_err(|_| io::ErrorKind::FileTooLarge)?;
        machine.grow(self.id, self.boot, len)?;
        machine.content(self.id, self.boot)?.bytes.truncate(len);
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        let mut machine = self.disk.machine();
        machine.change()?;
        if machine.failing_syncs.as_ref().is_some_and(|part| self.path.to_string_lossy().contains(part.as_str())) {
            return Err(io::Error::other("simulated sync failure"));
        }
        let content = machine.content(self.id, self.boot)?;
        let Content { bytes, durable } = content;
        durable.clone_from(bytes);
        Ok(())
    }
}
