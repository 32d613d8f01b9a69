//! File system access of the tier: the chunk cache's folder, and the files of a folder as object store. All functions
//! block, so callers use `task::run_blocking`. Segments are read through the log. Large files are written in small
//! pieces with pauses ([`PieceWriter`]), because acknowledgements wait for the same device.

use std::{
    ffi::OsString,
    fs,
    io::{self, Read as _},
    num::NonZeroU64,
    ops::Range,
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use bytes::Bytes;
use rustix::fs::{Advice, OFlags, fadvise};

use crate::{
    log::{PrivateDir, disk::PIECE_BYTES, free_in_steps, write_out},
    task::lock::Mutex,
};

/// Pause after each piece, in which the device serves appends.
const PIECE_DELAY: Duration = Duration::from_millis(1);

/// Ending of the file name of a chunk in the cache folder.
pub(super) const CHUNK: &str = ".chunk";

/// Additional ending of a file in the cache folder while the file is being written.
const UNFINISHED: &str = ".part";

/// Creates a folder and the folders above it.
pub(super) fn create_folder(path: &Path) -> io::Result<()> {
    fs::create_dir_all(path)
}

/// Writes files in pieces, one piece at a time over all files that share the writer. Waits until the device has
/// received each piece; this makes nothing durable.
#[derive(Debug, Default)]
pub(super) struct PieceWriter {
    /// Held while one piece is written, and during the pause after it.
    piece_lock: Mutex<()>,
}

impl PieceWriter {
    /// Writes all parts one after the other from `at`. Nothing is durable before a sync.
    pub(super) fn write_at<'a>(
        &self,
        file: &fs::File,
        at: u64,
        parts: impl IntoIterator<Item = &'a [u8]>,
    ) -> io::Result<()> {
        let (mut parts, mut part, mut at) = (parts.into_iter(), [].as_slice(), at);
        loop {
            let _guard = self.piece_lock.lock();
            let (start, mut remaining) = (at, PIECE_BYTES);
            while remaining > 0 {
                if part.is_empty() {
                    match parts.next() {
                        Some(next) => part = next,
                        None => break,
                    }
                }
                let (now, later) = part.split_at(part.len().min(remaining));
                file.write_all_at(now, at)?;
                (part, remaining, at) = (later, remaining - now.len(), at + now.len() as u64);
            }
            if at == start {
                return Ok(());
            }
            write_out(file, start..at, PIECE_BYTES)?;
            std::thread::sleep(PIECE_DELAY);
        }
    }
}

/// A file that is written next to its target, and renamed to the target when it is complete. Until then, the object
/// store does not list the file. A file that is dropped before it is renamed is removed.
#[derive(Debug)]
pub(super) struct StagedFile {
    file: fs::File,
    path: PathBuf,
    target: PathBuf,
    published: AtomicBool,
}

impl StagedFile {
    /// Creates the file, and missing folders above it. New folders are durable when this returns. The name of an
    /// incomplete file ends in `#` and a number, and listings skip such names. The number differs from those of other
    /// writers' files and of files that killed processes left.
    pub(super) fn create(target: &Path) -> io::Result<Self> {
        let mut attempt = 1;
        loop {
            let mut path = OsString::from(target);
            path.push(format!("#{attempt}"));
            match fs::OpenOptions::new().write(true).create_new(true).open(&path) {
                Ok(file) => {
                    let published = AtomicBool::new(false);
                    return Ok(Self { file, path: path.into(), target: target.to_owned(), published });
                }
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => attempt += 1,
                Err(error) if error.kind() == io::ErrorKind::NotFound => make_durable_folder(folder_of(target))?,
                Err(error) => return Err(error),
            }
        }
    }

    /// Writes all parts one after the other from `at`.
    pub(super) fn write_at<'a>(
        &self,
        writer: &PieceWriter,
        at: u64,
        parts: impl IntoIterator<Item = &'a [u8]>,
    ) -> io::Result<()> {
        writer.write_at(&self.file, at, parts)
    }

    /// Renames the file to its target, and replaces an existing file of that name. Content and name are durable when
    /// this returns.
    pub(super) fn publish(&self) -> io::Result<()> {
        self.file.sync_all()?;
        fs::rename(&self.path, &self.target)?;
        self.published.store(true, Ordering::Release);
        sync_folder(folder_of(&self.target))
    }
}

impl Drop for StagedFile {
    fn drop(&mut self) {
        if !self.published.load(Ordering::Acquire)
            && let Err(error) = fs::remove_file(&self.path)
        {
            tracing::debug!(path = %self.path.display(), %error, "cannot remove an incomplete object");
        }
    }
}

/// Reads a range of a file, and drops those pages of the range from the page cache that are already on the device.
pub(super) fn read_and_drop_pages(file: &fs::File, range: Range<u64>) -> io::Result<Bytes> {
    let len = range.end.saturating_sub(range.start);
    let mut bytes = vec![0; usize::try_from(len).map_err(io::Error::other)?];
    file.read_exact_at(&mut bytes, range.start)?;
    if let Err(error) = fadvise(file, range.start, NonZeroU64::new(len), Advice::DontNeed) {
        tracing::debug!(%error, "cannot drop an object from the page cache");
    }
    Ok(Bytes::from(bytes))
}

/// A file that is about to be removed.
#[derive(Debug)]
pub(super) struct RemovedFile(fs::File);

impl RemovedFile {
    /// Opens the file, so that its space stays allocated when its name is removed. Returns `None` if the file does not
    /// exist or cannot be opened for writing.
    pub(super) fn open(path: &Path) -> Option<Self> {
        fs::OpenOptions::new().write(true).open(path).ok().map(Self)
    }

    /// Frees the space of the file in steps, after its name was removed. A file that still has another name stays
    /// unchanged.
    pub(super) fn free_in_steps(self) {
        if let Err(error) = free_in_steps(&self.0) {
            tracing::debug!(%error, "cannot free the space of an object in steps: freeing it at once");
        }
    }
}

/// Returns the folder that contains a file.
fn folder_of(path: &Path) -> &Path {
    path.parent().unwrap_or(Path::new("/"))
}

/// Makes the names in a folder durable.
fn sync_folder(folder: &Path) -> io::Result<()> {
    fs::File::open(folder)?.sync_all()
}

/// Creates a folder and the missing folders above it. The name of each new folder is durable when this returns.
fn make_durable_folder(folder: &Path) -> io::Result<()> {
    match fs::create_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound && folder.parent().is_some() => {
            make_durable_folder(folder_of(folder))?;
            return make_durable_folder(folder);
        }
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        // Another thread or process may have created the folder, and may not have synced it yet.
        _ => {}
    }
    sync_folder(folder_of(folder))
}

/// Folder of the chunk cache.
#[derive(Debug)]
pub(super) struct CacheFolder {
    dir: PrivateDir,
    writer: PieceWriter,
}

impl CacheFolder {
    /// Creates the folder if it does not exist. Deletes the files in it whose names end like a chunk's or like an
    /// unfinished file's. Other files are kept. If the folder lies in `data_dir`, the data directory, the folder must
    /// not be a symbolic link.
    pub(super) fn open(path: &Path, data_dir: Option<&Path>) -> io::Result<Self> {
        let below = data_dir.and_then(|data_dir| Some((data_dir, path.strip_prefix(data_dir).ok()?)));
        let folder = match below {
            Some((data_dir, name)) => PrivateDir::make(data_dir)?.make_below(name)?,
            None => PrivateDir::make(path)?,
        };
        folder.warn_if_uncorrected();
        let is_ours = |name: &str| name.ends_with(CHUNK) || name.ends_with(UNFINISHED);
        for entry in folder.list(Path::new(""))?.into_iter().filter(|entry| !entry.is_dir && is_ours(&entry.name)) {
            folder.remove(Path::new(&entry.name))?;
        }
        Ok(Self { dir: folder, writer: PieceWriter::default() })
    }

    /// Returns the bytes that can still be written to the folder's file system.
    pub(super) fn free_bytes(&self) -> io::Result<u64> {
        self.dir.free_bytes()
    }

    /// Writes a file under an unfinished name, which is never read, and then renames it to `name`.
    pub(super) fn write_whole(&self, name: &str, parts: &[&[u8]]) -> io::Result<()> {
        let unfinished = format!("{name}{UNFINISHED}");
        let file = self.dir.open_file(Path::new(&unfinished), OFlags::WRONLY | OFlags::CREATE)?;
        file.set_len(0)?;
        self.writer.write_at(&file, 0, parts.iter().copied())?;
        drop(file);
        self.dir.rename(Path::new(&unfinished), &self.dir, Path::new(name))
    }

    /// Returns the content of a file.
    pub(super) fn read_whole(&self, name: &str) -> io::Result<Bytes> {
        let mut file = self.dir.open_file(Path::new(name), OFlags::RDONLY)?;
        let mut bytes = Vec::with_capacity(usize::try_from(file.metadata()?.len()).unwrap_or(0));
        file.read_to_end(&mut bytes)?;
        Ok(Bytes::from(bytes))
    }

    /// Deletes a file. A missing file is no error.
    pub(super) fn delete(&self, name: &str) -> io::Result<()> {
        match self.dir.remove(Path::new(name)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    /// Regression: opening the cache deleted every file in the configured folder.
    #[test]
    fn opening_cache_folder_deletes_only_chunks() {
        let parent = tempfile::tempdir().unwrap();
        for name in ["1.chunk", "2.chunk.part", "photo.jpg"] {
            fs::write(parent.path().join(name), "content").unwrap();
        }
        let folder = CacheFolder::open(parent.path(), None).unwrap();
        let remaining: Vec<_> = fs::read_dir(parent.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(remaining, ["photo.jpg"]);
        folder.write_whole("3.chunk", &[b"a", b"b"]).unwrap();
        assert_eq!(folder.read_whole("3.chunk").unwrap().as_ref(), b"ab");
        folder.delete("3.chunk").unwrap();
        folder.delete("3.chunk").unwrap();
    }

    #[test]
    fn piece_writer_keeps_order_of_parts_at_any_position() {
        let parent = tempfile::tempdir().unwrap();
        let target = parent.path().join("a/b/object");
        let staged = StagedFile::create(&target).unwrap();
        let other = StagedFile::create(&target).unwrap();
        let content: Vec<u8> = (0..3 * PIECE_BYTES + 77).map(|i| u8::try_from(i % 251).unwrap()).collect();
        let (first, rest) = content.split_at(PIECE_BYTES + 5);
        // The later part is written first, as the parts of an upload may arrive. One part crosses pieces, another one
        // is empty.
        staged.write_at(&PieceWriter::default(), first.len() as u64, [&rest[..3], &[], &rest[3..]]).unwrap();
        staged.write_at(&PieceWriter::default(), 0, first.chunks(1000)).unwrap();
        assert!(!target.exists());
        staged.publish().unwrap();
        drop((staged, other));
        assert!(fs::read(&target).unwrap() == content);
        let remaining: Vec<_> =
            fs::read_dir(target.parent().unwrap()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(remaining, ["object"], "unfinished files are removed");
    }

    #[test]
    fn cache_folder_in_data_directory_must_not_be_a_link() {
        let parent = tempfile::tempdir().unwrap();
        let (data, disk) = (parent.path().join("data"), parent.path().join("disk"));
        fs::create_dir(&data).unwrap();
        fs::create_dir(&disk).unwrap();
        fs::write(disk.join("1.chunk"), "theirs").unwrap();
        symlink(&disk, data.join("cache")).unwrap();
        let error = CacheFolder::open(&data.join("cache"), Some(&data)).unwrap_err();
        assert!(error.to_string().contains("symbolic link"), "{error}");
        assert!(disk.join("1.chunk").exists());
        let folder = CacheFolder::open(&data.join("cache"), None).unwrap();
        folder.write_whole("2.chunk", &[b"a"]).unwrap();
        assert!(disk.join("2.chunk").exists() && !disk.join("1.chunk").exists());
        symlink(parent.path().join("victim"), disk.join("3.chunk.part")).unwrap();
        assert!(folder.write_whole("3.chunk", &[b"a"]).is_err());
        assert!(!parent.path().join("victim").exists());
    }
}
