//! The reserve: room that is really taken, to be given back when a disk has none.
//!
//! Appends leave [`Options::reserve_bytes`](super::Options::reserve_bytes) free, so that a log never fills its own disk. That
//! does not keep others from filling it, and then a broker could not even start: the checkpoint, and the commit in the metadata
//! store after which segments may go, need room. So some of it is a file, made when there is plenty. A start that finds less than
//! that free removes the file first, so does a checkpoint that finds no room, and it is made again when there is plenty again.

use std::{
    io::{self, IoSlice},
    path::Path,
};

use super::disk::{Disk, Mode, PIECE_BYTES};

/// The file's name in the data directory.
pub(super) const NAME: &str = "reserve";

/// Bytes of the file: a checkpoint of a large broker, and what a commit in the metadata store wants to see free, twice.
pub(super) const BYTES: u64 = 8 << 20;

/// Bytes of zeros written at once.
const ZEROS: usize = 1 << 20;

/// Gives the room back where the disk has less than that. True when there was something to give.
pub(super) fn release(disk: &dyn Disk, dir: &Path) -> bool {
    let short = disk.free_bytes(dir).is_ok_and(|free| free < BYTES);
    short && disk.remove(&dir.join(NAME)).is_ok()
}

/// Takes the room, if the disk has that much beyond `keep`. True when it is taken.
pub(super) fn take(disk: &dyn Disk, dir: &Path, keep: u64) -> io::Result<bool> {
    let path = dir.join(NAME);
    let held = match disk.open(&path, Mode::Read) {
        Ok(file) => file.size()?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => 0,
        Err(error) => return Err(error),
    };
    if held >= BYTES {
        return Ok(true);
    }
    if disk.free_bytes(dir)? < keep + BYTES {
        return Ok(false);
    }
    let file = disk.open(&path, Mode::Write)?;
    let zeros = vec![0; ZEROS];
    for at in (held..BYTES).step_by(ZEROS) {
        file.write_at(&[IoSlice::new(&zeros)], at)?;
    }
    disk.write_out(&path, held..BYTES, PIECE_BYTES)?;
    // Without this the room may be promised and not taken.
    file.sync()?;
    Ok(true)
}
