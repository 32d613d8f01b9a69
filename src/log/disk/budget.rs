//! The reserve: allocated disk space that is released when the disk has none.
//!
//! # Overview
//!
//! Appends leave [`LogOptions::reserve_bytes`](super::LogOptions::reserve_bytes) free, so a log never fills its own
//! disk. Other programs can still fill it. A broker could then not even start: the checkpoint needs space, and so does
//! the metadata commit that precedes the deletion of segments. Part of the space is therefore a file, created when the
//! disk has plenty of space. A start with less free space than the size of the file removes the file first, and so does
//! a checkpoint that finds no space. The file is created again when the disk has plenty of space.

use std::{
    io::{self, IoSlice},
    path::Path,
};

use crate::log::disk::{Disk, OpenMode, PIECE_BYTES};

/// Name of the file in the data directory.
pub(in crate::log) const NAME: &str = "reserve";

/// Size of the file in bytes. A checkpoint of a large broker fits into it, and so does twice the free space that a
/// metadata commit requires.
pub(in crate::log) const BYTES: u64 = 8 << 20;

/// Bytes of zeros per write.
const ZEROS: usize = 1 << 20;

/// Removes the file if the disk has less free space than its size. Returns true if a file was removed.
pub(in crate::log) fn release(disk: &dyn Disk, dir: &Path) -> bool {
    let is_low = disk.free_bytes(dir).is_ok_and(|free| free < BYTES);
    is_low && disk.remove(&dir.join(NAME)).is_ok()
}

/// Creates the file if its size is free beyond `keep`. Returns true if the file is complete.
pub(in crate::log) fn take(disk: &dyn Disk, dir: &Path, keep: u64) -> io::Result<bool> {
    let path = dir.join(NAME);
    let existing = match disk.open(&path, OpenMode::Read) {
        Ok(file) => file.size()?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => 0,
        Err(error) => return Err(error),
    };
    if existing >= BYTES {
        return Ok(true);
    }
    if disk.free_bytes(dir)? < keep + BYTES {
        return Ok(false);
    }
    let file = disk.open(&path, OpenMode::Write)?;
    let zeros = vec![0; ZEROS];
    for at in (existing..BYTES).step_by(ZEROS) {
        file.write_at(&[IoSlice::new(&zeros)], at)?;
    }
    disk.write_out(&path, existing..BYTES, PIECE_BYTES)?;
    // Without the sync the file system may only have promised the space.
    file.sync()?;
    Ok(true)
}
