//! The machine's file system.

use std::{
    fs,
    io::{self, IoSlice, Write as _},
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::Path,
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

use super::{Disk, Entry, File, Mode};

/// The machine's file system.
#[derive(Clone, Copy, Debug, Default)]
pub struct RealDisk;

impl Disk for RealDisk {
    fn create_dir_all(&self, dir: &Path) -> io::Result<()> {
        fs::create_dir_all(dir)
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        fs::File::open(dir)?.sync_all()
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<Entry>> {
        let mut entries = Vec::new();
        for entry in fs::read_dir(dir)? {
            let entry = entry?;
            let Ok(name) = entry.file_name().into_string() else { continue };
            // A file may vanish between the two calls: then it is not there.
            let Ok(metadata) = entry.metadata() else { continue };
            entries.push(Entry { name, is_dir: metadata.is_dir(), len: metadata.len() });
        }
        entries.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(entries)
    }

    fn open(&self, path: &Path, mode: Mode) -> io::Result<Arc<dyn File>> {
        let mut options = fs::OpenOptions::new();
        options.read(true);
        if mode != Mode::Read {
            options.write(true).create(true).truncate(false);
        }
        if mode == Mode::Direct {
            let flags = OFlags::DIRECT.bits().cast_signed();
            match options.custom_flags(flags).open(path) {
                Ok(file) => return Ok(Arc::new(RealFile { file, dsync: AtomicBool::new(true) })),
                // The file system (tmpfs, some overlays) knows no direct I/O: through the page cache, then.
                Err(error) if error.raw_os_error() == Some(Errno::INVAL.raw_os_error()) => {
                    options.custom_flags(0);
                }
                Err(error) => return Err(error),
            }
        }
        Ok(Arc::new(RealFile { file: options.open(path)?, dsync: AtomicBool::new(false) }))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        fs::remove_file(path)
    }

    fn remove_dir(&self, dir: &Path) -> io::Result<()> {
        fs::remove_dir(dir)
    }

    fn lock(&self, path: &Path) -> io::Result<Box<dyn Send + Sync>> {
        let mut file = fs::OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)?;
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
        // What is kept for the superuser is neither used nor free, as `df` sees it.
        let blocks = stat.f_blocks.saturating_sub(stat.f_bfree).saturating_add(stat.f_bavail);
        Ok(blocks.saturating_mul(stat.f_frsize))
    }

    fn open_files(&self) -> usize {
        let soft = getrlimit(Resource::Nofile).current.unwrap_or(1 << 20);
        usize::try_from(soft / 2).unwrap_or(usize::MAX).clamp(64, 8192)
    }
}

struct RealFile {
    file: fs::File,
    /// Whether a durable write is one call (`RWF_DSYNC`); cleared for good where the file system refuses that.
    dsync: AtomicBool,
}

impl File for RealFile {
    fn size(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.len())
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
        // The kernel takes at most 1,024 slices at once.
        let mut at = at;
        for part in slices.chunks(1024) {
            let mut part = part.to_vec();
            let mut rest = part.as_mut_slice();
            IoSlice::advance_slices(&mut rest, 0);
            while !rest.is_empty() {
                match rustix::io::pwritev(&self.file, rest, at) {
                    Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                    Ok(written) => {
                        at += written as u64;
                        IoSlice::advance_slices(&mut rest, written);
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
                // A part was written: the whole is written again below, which does no harm.
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

    fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }
}
