//! The file system of the machine.

use std::{
    fs,
    io::{self, IoSlice, Write as _},
    ops::Range,
    os::unix::fs::{FileExt, MetadataExt},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use rustix::{
    fs::{FlockOperation, OFlags},
    io::{Errno, ReadWriteFlags},
    process::{Resource, getrlimit},
};

use super::{DirEntry, Disk, File, OpenMode, PrivateDir, writeback};
use crate::task::lock::RwLock;

/// The file system of the machine.
///
/// Files are opened only below a configured directory ([`PrivateDir`]). [`Disk::register_root`] registers one.
/// For a path outside of all configured directories, the created or listed directory becomes a configured one. So does
/// the parent directory of a file that is accessed.
#[derive(Debug, Default)]
pub struct RealDisk {
    roots: RwLock<Vec<Arc<PrivateDir>>>,
}

impl RealDisk {
    /// Adds a configured directory, or replaces the handle of one with the same path. Corrects the modes of its
    /// entries. Warns if a new one keeps its own mode.
    fn add_root(&self, root: PrivateDir) -> io::Result<Arc<PrivateDir>> {
        root.correct_entries()?;
        let root = Arc::new(root);
        let mut roots = self.roots.write();
        match roots.iter_mut().find(|existing| existing.path() == root.path()) {
            Some(existing) => *existing = Arc::clone(&root),
            None => {
                root.warn_if_uncorrected();
                roots.push(Arc::clone(&root));
            }
        }
        Ok(root)
    }

    /// Returns the innermost configured directory that contains a path, and the path below it.
    fn root_of(&self, path: &Path) -> Option<(Arc<PrivateDir>, PathBuf)> {
        let roots = self.roots.read();
        let below = |root: &Arc<PrivateDir>| Some((Arc::clone(root), path.strip_prefix(root.path()).ok()?.to_owned()));
        roots.iter().filter_map(below).min_by_key(|(_, name)| name.as_os_str().len())
    }

    /// Returns the configured directory of `path` as [`RealDisk::root_of`] does. If there is none, `dir`, which
    /// contains `path`, becomes one.
    fn root_in(&self, path: &Path, dir: &Path) -> io::Result<(Arc<PrivateDir>, PathBuf)> {
        match self.root_of(path) {
            Some(found) => Ok(found),
            None => {
                let root = self.add_root(PrivateDir::open(dir)?)?;
                Ok((root, path.strip_prefix(dir).unwrap_or(Path::new("")).to_owned()))
            }
        }
    }

    /// Returns the configured directory of a file, and the path below it. If there is none, the file's parent directory
    /// becomes one.
    fn root_of_file(&self, path: &Path) -> io::Result<(Arc<PrivateDir>, PathBuf)> {
        self.root_in(path, path.parent().unwrap_or(Path::new(".")))
    }
}

impl Disk for RealDisk {
    fn register_root(&self, dir: &Path) -> io::Result<()> {
        self.add_root(PrivateDir::open(dir)?).map(drop)
    }

    fn create_dir_all(&self, dir: &Path) -> io::Result<()> {
        match self.root_of(dir) {
            Some((root, name)) if !name.as_os_str().is_empty() => root.make_dir(&name),
            _ => self.add_root(PrivateDir::make(dir)?).map(drop),
        }
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        match self.root_of(dir) {
            Some((root, name)) => root.sync(&name),
            // `dir` is the parent of a configured directory, whose name becomes durable.
            None => fs::File::open(dir)?.sync_all(),
        }
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<DirEntry>> {
        let (root, name) = self.root_in(dir, dir)?;
        root.list(&name)
    }

    fn open(&self, path: &Path, mode: OpenMode) -> io::Result<Arc<dyn File>> {
        let (root, name) = self.root_of_file(path)?;
        let flags = match mode {
            OpenMode::Read => OFlags::RDONLY,
            OpenMode::Write | OpenMode::Direct => OFlags::RDWR | OFlags::CREATE,
        };
        if mode == OpenMode::Direct {
            match root.open_file(&name, flags | OFlags::DIRECT) {
                Ok(file) => return Ok(Arc::new(RealFile { file, dsync: AtomicBool::new(true) })),
                // The file system (tmpfs, some overlays) does not support direct I/O, so the page cache is used.
                Err(error) if error.raw_os_error() == Some(Errno::INVAL.raw_os_error()) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(Arc::new(RealFile { file: root.open_file(&name, flags)?, dsync: AtomicBool::new(false) }))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let ((from_root, from), (to_root, to)) = (self.root_of_file(from)?, self.root_of_file(to)?);
        from_root.rename(&from, &to_root, &to)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        let (root, name) = self.root_of_file(path)?;
        root.remove(&name)
    }

    fn remove_dir(&self, dir: &Path) -> io::Result<()> {
        let (root, name) = self.root_of_file(dir)?;
        root.remove_dir(&name)
    }

    fn lock(&self, path: &Path) -> io::Result<Box<dyn Send + Sync>> {
        let (root, name) = self.root_of_file(path)?;
        let mut file = root.open_file(&name, OFlags::RDWR | OFlags::CREATE)?;
        rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive)?;
        file.set_len(0)?;
        writeln!(file, "{}", std::process::id())?;
        Ok(Box::new(file))
    }

    fn free_bytes(&self, dir: &Path) -> io::Result<u64> {
        let stat = rustix::fs::statvfs(dir)?;
        Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
    }

    fn total_bytes(&self, dir: &Path) -> io::Result<u64> {
        let stat = rustix::fs::statvfs(dir)?;
        // Blocks that are reserved for the superuser count as neither used nor free, as in `df`.
        let blocks = stat.f_blocks.saturating_sub(stat.f_bfree).saturating_add(stat.f_bavail);
        Ok(blocks.saturating_mul(stat.f_frsize))
    }

    fn write_out(&self, path: &Path, range: Range<u64>, piece_bytes: usize) -> io::Result<()> {
        let (root, name) = self.root_of_file(path)?;
        // The write-out uses a handle of its own. The kernel reports a write error once per handle, and the later sync
        // must report the error as well.
        match root.open_file(&name, OFlags::RDONLY) {
            Ok(file) => writeback::write_out(&file, range, piece_bytes),
            Err(error) => {
                tracing::debug!(path = %path.display(), %error, "cannot write out a file: the sync does all the work");
                Ok(())
            }
        }
    }

    fn max_open_files(&self) -> usize {
        // Half of the process's limit is for the log. The rest is for connections and all other files.
        let soft_limit = getrlimit(Resource::Nofile).current.unwrap_or(1 << 20);
        usize::try_from(soft_limit / 2).unwrap_or(usize::MAX).clamp(64, 8192)
    }
}

/// An open file of the machine.
struct RealFile {
    file: fs::File,
    /// True if [`File::write_durable`] is one call with `RWF_DSYNC`. False without direct I/O, and permanently after
    /// the file system has refused the flag.
    dsync: AtomicBool,
}

impl File for RealFile {
    fn size(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.len())
    }

    fn modified_ms(&self) -> io::Result<i64> {
        let metadata = self.file.metadata()?;
        Ok(metadata.mtime().saturating_mul(1000).saturating_add(metadata.mtime_nsec() / 1_000_000))
    }

    fn read_at(&self, buffer: &mut [u8], at: u64) -> io::Result<usize> {
        let mut filled = 0;
        while filled < buffer.len() {
            match self.file.read_at(&mut buffer[filled..], at + filled as u64) {
                Ok(0) => break,
                Ok(read) => filled += read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(filled)
    }

    fn write_at(&self, slices: &[IoSlice<'_>], at: u64) -> io::Result<()> {
        // The kernel accepts at most 1,024 slices per call.
        let mut at = at;
        for group in slices.chunks(1024) {
            let mut group = group.to_vec();
            let mut remaining = group.as_mut_slice();
            // Removes empty slices at the front: the kernel writes nothing for them, and 0 written bytes count as an
            // error below.
            IoSlice::advance_slices(&mut remaining, 0);
            while !remaining.is_empty() {
                match rustix::io::pwritev(&self.file, remaining, at) {
                    Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                    Ok(written) => {
                        at += written as u64;
                        IoSlice::advance_slices(&mut remaining, written);
                    }
                    Err(Errno::INTR) => {}
                    Err(error) => return Err(error.into()),
                }
            }
        }
        Ok(())
    }

    fn write_durable(&self, bytes: &[u8], at: u64) -> io::Result<()> {
        if self.dsync.load(Ordering::Relaxed) {
            match rustix::io::pwritev2(&self.file, &[IoSlice::new(bytes)], at, ReadWriteFlags::DSYNC) {
                Ok(written) if written == bytes.len() => return Ok(()),
                // Only a part was written, or nothing. All bytes are written again below, which is harmless.
                Ok(_) | Err(Errno::INTR) => {}
                Err(Errno::OPNOTSUPP | Errno::INVAL | Errno::NOSYS) => self.dsync.store(false, Ordering::Relaxed),
                Err(error) => return Err(error.into()),
            }
        }
        self.write_at(&[IoSlice::new(bytes)], at)?;
        self.file.sync_data()
    }

    fn truncate(&self, len: u64) -> io::Result<()> {
        self.file.set_len(len)
    }

    fn free_step(&self, urgent: bool) -> io::Result<bool> {
        writeback::free_step(&self.file, urgent)
    }

    fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }
}
