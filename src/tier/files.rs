//! The tier's own use of the file system: the chunk cache's folder, and a folder as object store. All of it blocks; callers come
//! from `task::blocking`. Segments are read through the log.

use std::{
    fs::{self, File},
    io::{self, Write},
    path::{Path, PathBuf},
};

use bytes::Bytes;

/// Bytes that can still be written in the file system of a folder.
pub(super) fn free_bytes(folder: &Path) -> io::Result<u64> {
    let stat = rustix::fs::statvfs(folder)?;
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}

/// Makes a folder and those above it.
pub(super) fn create_folder(path: &Path) -> io::Result<()> {
    fs::create_dir_all(path)
}

/// Sets a folder's old content aside, to be deleted later, and makes the folder anew. Answers where the old content is.
pub(super) fn set_aside(path: &Path) -> io::Result<PathBuf> {
    let aside = path.with_extension("old");
    match fs::rename(path, &aside) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        // An earlier start was stopped before it had deleted what it set aside.
        Err(_) => {
            fs::remove_dir_all(&aside)?;
            fs::rename(path, &aside)?;
        }
    }
    create_folder(path)?;
    Ok(aside)
}

/// Deletes a folder with all that it holds, if it is there.
pub(super) fn delete_folder(path: &Path) -> io::Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Writes a file under a name that nobody reads yet, then gives it its name.
pub(super) fn write_whole(path: &Path, parts: &[&[u8]]) -> io::Result<()> {
    let unfinished = path.with_extension("part");
    let mut file = File::create(&unfinished)?;
    for part in parts {
        file.write_all(part)?;
    }
    drop(file);
    fs::rename(&unfinished, path)
}

/// A whole file.
pub(super) fn read_whole(path: &Path) -> io::Result<Bytes> {
    fs::read(path).map(Bytes::from)
}

/// Deletes a file, if it is there.
pub(super) fn delete(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}
