//! The tier's own use of the file system: the chunk cache's folder, and a folder as object store. All of it blocks; callers come
//! from `task::blocking`. Segments are read through the log.

use std::{
    fs,
    io::{self, Read as _, Write as _},
    path::Path,
};

use bytes::Bytes;
use rustix::fs::OFlags;

use crate::log::PrivateDir;

/// Ending of a file of the cache, and of one that is being written.
pub(super) const CHUNK: &str = ".chunk";
const UNFINISHED: &str = ".part";

/// Makes a folder and those above it.
pub(super) fn create_folder(path: &Path) -> io::Result<()> {
    fs::create_dir_all(path)
}

/// The chunk cache's folder.
#[derive(Debug)]
pub(super) struct CacheFolder(PrivateDir);

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
        Ok(Self(folder))
    }

    /// Bytes that can still be written in its file system.
    pub(super) fn free_bytes(&self) -> io::Result<u64> {
        self.0.free_bytes()
    }

    /// Writes a file under a name that nobody reads yet, then gives it its name.
    pub(super) fn write_whole(&self, name: &str, parts: &[&[u8]]) -> io::Result<()> {
        let unfinished = format!("{name}{UNFINISHED}");
        let mut file = self.0.open_file(Path::new(&unfinished), OFlags::WRONLY | OFlags::CREATE)?;
        file.set_len(0)?;
        for part in parts {
            file.write_all(part)?;
        }
        drop(file);
        self.0.rename(Path::new(&unfinished), &self.0, Path::new(name))
    }

    /// A whole file.
    pub(super) fn read_whole(&self, name: &str) -> io::Result<Bytes> {
        let mut file = self.0.open_file(Path::new(name), OFlags::RDONLY)?;
        let mut bytes = Vec::with_capacity(usize::try_from(file.metadata()?.len()).unwrap_or(0));
        file.read_to_end(&mut bytes)?;
        Ok(Bytes::from(bytes))
    }

    /// Deletes a file, if it is there.
    pub(super) fn delete(&self, name: &str) -> io::Result<()> {
        match self.0.remove(Path::new(name)) {
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
