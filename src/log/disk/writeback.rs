//! Work on the device in pieces: write-out of the page cache without a flush, and freeing the disk space of removed
//! files.
//!
//! # Overview
//!
//! A sync of many megabytes delays the journal's next write until the device has written all of them. Bytes that were
//! written out earlier, in pieces, leave little work to the sync. Nothing is durable before that sync.

use std::{
    fs, io,
    ops::Range,
    os::{fd::AsRawFd as _, unix::fs::MetadataExt as _},
    time::Duration,
};

use crate::task::clock;

/// Writes out a range of a file, piece by piece. Each piece starts when the device has accepted the previous one,
/// possibly into its cache. Does nothing if the file system does not support the call.
///
/// # Errors
/// The device could not write bytes of the file. A later sync through the same handle may not report that error again.
pub fn write_out(file: &fs::File, range: Range<u64>, piece_bytes: usize) -> io::Result<()> {
    for start in range.clone().step_by(piece_bytes) {
        let piece = start..range.end.min(start.saturating_add(piece_bytes as u64));
        // Start and wait are two calls. In one call the system would treat the write as urgently as the journal's
        // write.
        for flags in [libc::SYNC_FILE_RANGE_WRITE, libc::SYNC_FILE_RANGE_WAIT_BEFORE] {
            match sync_file_range(file, &piece, flags) {
                Ok(()) => {}
                Err(error) if is_unsupported(&error) => return Ok(()),
                Err(error) => return Err(error),
            }
        }
    }
    Ok(())
}

/// Maximum number of bytes of a removed file that one step frees. A file of at most this length needs no step: closing
/// it frees its space. Some file systems report freed bytes to the device (`discard`). That takes 2 to 4 ms per MiB,
/// and the journal's write waits meanwhile.
pub const STEP_BYTES: u64 = 1 << 20;

/// Maximum number of bytes that one step frees when space is needed soon.
const URGENT_STEP_BYTES: u64 = 4 << 20;

/// Pause after a step, as a multiple of the duration of the step: other I/O has two thirds of the device's time.
const STEP_DELAY_FACTOR: u32 = 2;

/// Minimum pause after a step: at most 800 MiB per second are freed.
const MIN_STEP_DELAY: Duration = Duration::from_micros(1250);

/// Maximum pause after a step, because a stop of the log waits for a pause that has begun.
const MAX_STEP_DELAY: Duration = Duration::from_millis(100);

/// Pause after a step when space is needed soon.
const URGENT_STEP_DELAY: Duration = Duration::from_millis(5);

/// Divisor of a file system's size: space is needed soon if less than a fifth of the file system is free.
const FREE_SHARE: u64 = 5;

/// Frees the disk space of a removed file without readers, in steps, until at most [`STEP_BYTES`] remain, which closing
/// the file frees. Freeing all space at once would delay the journal's write. A file that still has a name, such as the
/// hard link of a backup, stays unchanged.
pub fn free_in_steps(file: &fs::File) -> io::Result<()> {
    while free_step(file, false)? {}
    Ok(())
}

/// Runs one step of [`free_in_steps`], and the pause after it. The step is larger if space is needed soon or if
/// `urgent` is set. Returns false if no step is needed: the file has a name, or its remaining space may be freed at
/// once.
pub(super) fn free_step(file: &fs::File, urgent: bool) -> io::Result<bool> {
    let metadata = file.metadata()?;
    if metadata.nlink() > 0 || metadata.len() <= STEP_BYTES {
        return Ok(false);
    }
    let urgent = urgent || is_low_on_space(file);
    let began = clock::monotonic();
    file.set_len(len_after_step(metadata.len(), urgent))?;
    std::thread::sleep(pause_after_step(began.elapsed(), urgent));
    Ok(true)
}

/// Returns the length of a file of `len` bytes after a step: the next lower multiple of the step. A length inside a
/// block would make the file system read and rewrite that block.
fn len_after_step(len: u64, urgent: bool) -> u64 {
    let step = if urgent { URGENT_STEP_BYTES } else { STEP_BYTES };
    len.saturating_sub(1) / step * step
}

/// Returns the pause after a step that lasted `took`.
fn pause_after_step(took: Duration, urgent: bool) -> Duration {
    if urgent { URGENT_STEP_DELAY } else { (took * STEP_DELAY_FACTOR).clamp(MIN_STEP_DELAY, MAX_STEP_DELAY) }
}

/// Returns true if the file's file system has little free space; false if it does not report its space.
fn is_low_on_space(file: &fs::File) -> bool {
    rustix::fs::fstatvfs(file).is_ok_and(|stat| {
        // Blocks that are reserved for the superuser count as neither used nor free, as in `df`.
        let blocks = stat.f_blocks.saturating_sub(stat.f_bfree).saturating_add(stat.f_bavail);
        stat.f_bavail < blocks / FREE_SHARE
    })
}

/// Returns true if the file system does not support the call. The sync then does all the work.
fn is_unsupported(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOSYS | libc::EINVAL | libc::EOPNOTSUPP | libc::ESPIPE))
}

/// Calls `sync_file_range(2)`, which no crate in use wraps.
#[allow(unsafe_code)]
fn sync_file_range(file: &fs::File, range: &Range<u64>, flags: libc::c_uint) -> io::Result<()> {
    let offset = |bytes: u64| libc::off64_t::try_from(bytes).map_err(|_| io::ErrorKind::FileTooLarge);
    let (at, len) = (offset(range.start)?, offset(range.end.saturating_sub(range.start))?);
    // SAFETY: the descriptor is open while `file` is borrowed, and all other arguments are numbers.
    match unsafe { libc::sync_file_range(file.as_raw_fd(), at, len, flags) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;
    use crate::log::{Disk as _, RealDisk, disk::PIECE_BYTES};

    #[test]
    fn write_out_of_any_range_keeps_content() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[7; 100_000]).unwrap();
        for range in [0..100_000, 4096..8192, 5..6, 0..0, 1 << 30..(1 << 30) + 1] {
            write_out(&file, range, PIECE_BYTES).unwrap();
        }
        assert_eq!(file.metadata().unwrap().len(), 100_000);
        assert!(write_out(&file, u64::MAX - 1..u64::MAX, PIECE_BYTES).is_err());
    }

    #[test]
    fn space_of_a_file_is_freed_after_its_last_name() {
        let folder = tempfile::tempdir().unwrap();
        let (name, link) = (folder.path().join("name"), folder.path().join("link"));
        let file = fs::File::create_new(&name).unwrap();
        file.set_len(2 * STEP_BYTES + 1).unwrap();
        fs::hard_link(&name, &link).unwrap();
        fs::remove_file(&name).unwrap();
        free_in_steps(&file).unwrap();
        assert_eq!(fs::metadata(&link).unwrap().len(), 2 * STEP_BYTES + 1, "a backup keeps its content");
        fs::remove_file(&link).unwrap();
        free_in_steps(&file).unwrap();
        assert!(file.metadata().unwrap().len() <= STEP_BYTES);
    }

    #[test]
    fn steps_are_complete_and_pauses_follow_their_duration() {
        const MIB: u64 = 1 << 20;
        for (len, urgent, after) in [
            (64 * MIB + 7, false, 64 * MIB),
            (64 * MIB, false, 63 * MIB),
            (MIB + 1, false, MIB),
            (64 * MIB + 7, true, 64 * MIB),
            (64 * MIB, true, 60 * MIB),
            (3 * MIB, true, 0),
        ] {
            assert_eq!(len_after_step(len, urgent), after, "{len} {urgent}");
        }
        let ms = Duration::from_millis;
        for (took, urgent, pause) in [
            (ms(0), false, MIN_STEP_DELAY),
            (ms(4), false, ms(8)),
            (ms(4), true, ms(5)),
            (ms(9_000), false, MAX_STEP_DELAY),
        ] {
            assert_eq!(pause_after_step(took, urgent), pause, "{took:?} {urgent}");
        }
    }

    #[test]
    fn write_out_of_an_absent_file_is_left_to_the_sync() {
        let folder = tempfile::tempdir().unwrap();
        let disk = RealDisk::default();
        disk.create_dir_all(folder.path()).unwrap();
        disk.write_out(&folder.path().join("absent"), 0..4096, PIECE_BYTES).unwrap();
    }

    #[test]
    fn write_out_of_a_pipe_is_left_to_the_sync() {
        let (reader, _writer) = std::io::pipe().unwrap();
        let pipe = fs::File::from(std::os::fd::OwnedFd::from(reader));
        write_out(&pipe, 0..4096, PIECE_BYTES).unwrap();
    }
}
