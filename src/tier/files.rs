//! The tier's own use of the file system: the chunk cache's folder, and the files of a folder as object store. All of it blocks;
//! callers come from `task::run_blocking`. Segments are read through the log. Large files go to the disk in small pieces with pauses
//! ([`PieceWriter`]): acknowledgements wait for the same device.

use std::{
    ffi::OsString,
    fs,
    io::{self, Read as _},
    num::NonZeroU64,
    ops::Range,
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use rustix::fs::{Advice, OFlags, fadvise};

use crate::log::{PrivateDir, disk::PIECE_BYTES, give_back, write_out};

/// How long the appends go first after each piece.
const PIECE_PAUSE: Duration = Duration::from_millis(1);

/// Ending of a file of the cache, and of one that is being written.
pub(super) const CHUNK: &str = ".chunk";
const UNFINISHED: &str = ".part";

/// Makes a folder and those above it.
pub(super) fn create_folder(path: &Path) -> io::Result<()> {
    fs::create_dir_all(path)
}

/// Writes files in pieces, one piece at a time over all files that share it, and waits until the disk has each.
#[derive(Debug, Default)]
pub(super) struct PieceWriter {
    turn: Mutex<()>,
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
            let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
            let (start, mut left) = (at, PIECE_BYTES);
            while left > 0 {
                if part.is_empty() {
                    match parts.next() {
                        Some(next) => part = next,
                        None => break,
                    }
                }
                let (now, later) = part.split_at(part.len().min(left));
                file.write_all_at(now, at)?;
                (part, left, at) = (later, left - now.len(), at + now.len() as u64);
            }
            if at == start {
                return Ok(());
            }
            write_out(file, start..at, PIECE_BYTES)?;
            std::thread::sleep(PIECE_PAUSE);
        }
    }
}

/// A file that is written beside its place, under a name that a folder as object store does not list, and moved there when it is whole.
/// Dropped before that it is removed.
#[derive(Debug)]
pub(super) struct StagedFile {
    file: fs::File,
    path: PathBuf,
    target: PathBuf,
    published: AtomicBool,
}

impl StagedFile {
    /// Makes the file, and the folders above it, which are durable then.
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

    /// Moves the file to its place, where it replaces what is there. Content and name are durable when this returns.
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
            tracing::debug!(path = %self.path.display(), %error, "an unfinished object was not removed");
        }
    }
}

/// Reads a range of a file and drops its pages from the page cache, where they are on the disk already.
pub(super) fn read_and_drop_pages(file: &fs::File, range: Range<u64>) -> io::Result<Bytes> {
    let len = range.end.saturating_sub(range.start);
    let mut bytes = vec![0; usize::try_from(len).map_err(io::Error::other)?];
    file.read_exact_at(&mut bytes, range.start)?;
    if let Err(error) = fadvise(file, range.start, NonZeroU64::new(len), Advice::DontNeed) {
        tracing::debug!(%error, "an object that was read back stays in the page cache");
    }
    Ok(Bytes::from(bytes))
}

/// A file that is about to be removed.
#[derive(Debug)]
pub(super) struct LeavingFile(fs::File);

impl LeavingFile {
    /// `None` where there is none, or none that this process may write to.
    pub(super) fn open(path: &Path) -> Option<Self> {
        fs::OpenOptions::new().write(true).open(path).ok().map(Self)
    }

    /// Gives back its room in steps, once its name is gone.
    pub(super) fn give_back(self) {
        if let Err(error) = give_back(&self.0) {
            tracing::debug!(%error, "the room of an object is given back at once");
        }
    }
}

fn folder_of(path: &Path) -> &Path {
    path.parent().unwrap_or(Path::new("/"))
}

fn sync_folder(folder: &Path) -> io::Result<()> {
    fs::File::open(folder)?.sync_all()
}

/// Makes a folder and those above it, each durable in the one above.
fn make_durable_folder(folder: &Path) -> io::Result<()> {
    match fs::create_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound && folder.parent().is_some() => {
            make_durable_folder(folder_of(folder))?;
            return make_durable_folder(folder);
        }
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        // Whoever made it may not have synced it yet.
        _ => {}
    }
    sync_folder(folder_of(folder))
}

/// The chunk cache's folder.
#[derive(Debug)]
pub(super) struct CacheFolder {
    dir: PrivateDir,
    writer: PieceWriter,
}

impl CacheFolder {
    /// Makes the folder, or deletes the chunks in it; other files stay. `data_dir` is the data directory, where the folder lies in it:
    /// the folder may then be no link.
    pub(super) fn open(path: &Path, data_dir: Option<&Path>) -> io::Result<Self> {
        let below = data_dir.and_then(|data_dir| Some((data_dir, path.strip_prefix(data_dir).ok()?)));
        let folder = match below {
            Some((data_dir, name)) => PrivateDir::make(data_dir)?.make_below(name)?,
            None => PrivateDir::make(path)?,
        };
        folder.warn_of_owner();
        let is_ours = |name: &str| name.ends_with(CHUNK) || name.ends_with(UNFINISHED);
        for entry in folder.list(Path::new(""))?.into_iter().filter(|entry| !entry.is_dir && is_ours(&entry.name)) {
            folder.remove(Path::new(&entry.name))?;
        }
        Ok(Self { dir: folder, writer: PieceWriter::default() })
    }

    /// Bytes that can still be written in its file system.
    pub(super) fn free_bytes(&self) -> io::Result<u64> {
        self.dir.free_bytes()
    }

    /// Writes a file under a name that nobody reads yet, then gives it its name.
    pub(super) fn write_whole(&self, name: &str, parts: &[&[u8]]) -> io::Result<()> {
        let unfinished = format!("{name}{UNFINISHED}");
        let file = self.dir.open_file(Path::new(&unfinished), OFlags::WRONLY | OFlags::CREATE)?;
        file.set_len(0)?;
        self.writer.write_at(&file, 0, parts.iter().copied())?;
        drop(file);
        self.dir.rename(Path::new(&unfinished), &self.dir, Path::new(name))
    }

    /// A whole file.
    pub(super) fn read_whole(&self, name: &str) -> io::Result<Bytes> {
        let mut file = self.dir.open_file(Path::new(name), OFlags::RDONLY)?;
        let mut bytes = Vec::with_capacity(usize::try_from(file.metadata()?.len()).unwrap_or(0));
        file.read_to_end(&mut bytes)?;
        Ok(Bytes::from(bytes))
    }

    /// Deletes a file, if it is there.
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

    /// Whatever lay in the configured folder was deleted once.
    #[test]
    fn a_cache_folder_loses_its_chunks_and_nothing_else() {
        let parent = tempfile::tempdir().unwrap();
        for name in ["1.chunk", "2.chunk.part", "photo.jpg"] {
            fs::write(parent.path().join(name), "content").unwrap();
        }
        let folder = CacheFolder::open(parent.path(), None).unwrap();
        let left: Vec<_> = fs::read_dir(parent.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(left, ["photo.jpg"]);
        folder.write_whole("3.chunk", &[b"a", b"b"]).unwrap();
        assert_eq!(folder.read_whole("3.chunk").unwrap().as_ref(), b"ab");
        folder.delete("3.chunk").unwrap();
        folder.delete("3.chunk").unwrap();
    }

    #[test]
    fn pieces_hold_the_parts_in_order_from_any_position() {
        let parent = tempfile::tempdir().unwrap();
        let target = parent.path().join("a/b/object");
        let staged = StagedFile::create(&target).unwrap();
        let other = StagedFile::create(&target).unwrap();
        let content: Vec<u8> = (0..3 * PIECE_BYTES + 77).map(|i| u8::try_from(i % 251).unwrap()).collect();
        let (first, rest) = content.split_at(PIECE_BYTES + 5);
        // The later one first, as parts of an upload may come; one part crosses pieces, another is empty.
        staged.write_at(&PieceWriter::default(), first.len() as u64, [&rest[..3], &[], &rest[3..]]).unwrap();
        staged.write_at(&PieceWriter::default(), 0, first.chunks(1000)).unwrap();
        assert!(!target.exists());
        staged.publish().unwrap();
        drop((staged, other));
        assert!(fs::read(&target).unwrap() == content);
        let left: Vec<_> = fs::read_dir(target.parent().unwrap()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(left, ["object"], "unfinished files are removed");
    }

    #[test]
    fn a_configured_cache_folder_may_be_a_link_and_one_in_the_data_directory_may_not() {
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
