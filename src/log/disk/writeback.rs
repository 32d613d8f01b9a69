//! What is large goes to the device, and away from it, in pieces: writing out what lies in the page cache, without a flush, and giving
//! back the room of removed files.
//!
//! A sync of many megabytes stands in front of the journal's next write for as long as the device takes for all of them. Bytes that were
//! written out before, a little at a time, leave it little to do. Nothing is durable before the sync that follows.

use std::{
    fs, io,
    ops::Range,
    os::{fd::AsRawFd as _, unix::fs::MetadataExt as _},
    time::Duration,
};

use crate::task::clock;

/// Writes out a range of a file, one piece after the other, each when the device has the one before, perhaps in a cache of its own.
///
/// # Errors
/// When bytes of the file could not be written. A later sync through the same handle may not say so again.
pub fn write_out(file: &fs::File, range: Range<u64>, piece_bytes: usize) -> io::Result<()> {
    for start in range.clone().step_by(piece_bytes) {
        let piece = start..range.end.min(start.saturating_add(piece_bytes as u64));
        // Started and waited for in two calls: in one the system would take it for as urgent as the journal's write.
        for flags in [libc::SYNC_FILE_RANGE_WRITE, libc::SYNC_FILE_RANGE_WAIT_BEFORE] {
            match sync_file_range(file, &piece, flags) {
                Ok(()) => {}
                Err(error) if is_unknown(&error) => return Ok(()),
                Err(error) => return Err(error),
            }
        }
    }
    Ok(())
}

/// Bytes of a file without a name that are given back at once. Some file systems tell the device of each (`discard`): that takes it 2 to 4 ms
/// for a MiB, and the journal's write waits.
const STEP_BYTES: u64 = 1 << 20;

/// The least time for which others go first after each MiB: 800 MB/s at most.
const LEAST_PAUSE: Duration = Duration::from_micros(1250);

/// Others go first for so many times as long as the step took: at most a third of the device's time is taken from them. A stop waits for a
/// pause.
const PAUSE_FACTOR: u32 = 2;
const MOST_PAUSE: Duration = Duration::from_millis(100);

/// Where less of the file system than this part is free, its room is needed sooner: steps are so many times as large.
const SHORT_SHARE: u64 = 5;
const SHORT_STEPS: u32 = 4;

/// Gives back the room of a file that was removed and that nobody reads, in steps: at once the file system would keep the journal's write
/// waiting. A file that has another name, which some backups give it, is left as it is.
pub fn give_back(file: &fs::File) -> io::Result<()> {
    while give_back_step(file)? {}
    Ok(())
}

/// One step of [`give_back`], and the pause after it. False when what is left may be given back at once.
pub(super) fn give_back_step(file: &fs::File) -> io::Result<bool> {
    let metadata = file.metadata()?;
    if metadata.nlink() > 0 || metadata.len() <= STEP_BYTES {
        return Ok(false);
    }
    let began = clock::monotonic();
    let pause = if is_short(file)? {
        file.set_len(metadata.len().saturating_sub(STEP_BYTES * u64::from(SHORT_STEPS)))?;
        LEAST_PAUSE * SHORT_STEPS
    } else {
        file.set_len(metadata.len() - STEP_BYTES)?;
        (began.elapsed() * PAUSE_FACTOR).clamp(LEAST_PAUSE, MOST_PAUSE)
    };
    std::thread::sleep(pause);
    Ok(true)
}

/// Whether little room is left in the file system of a file.
fn is_short(file: &fs::File) -> io::Result<bool> {
    let stat = rustix::fs::fstatvfs(file)?;
    Ok(stat.f_bavail < stat.f_blocks / SHORT_SHARE)
}

/// Whether the file system has no such call: the sync does all of it.
fn is_unknown(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOSYS | libc::EINVAL | libc::EOPNOTSUPP | libc::ESPIPE))
}

/// No crate of ours wraps this call.
#[allow(unsafe_code)]
fn sync_file_range(file: &fs::File, range: &Range<u64>, flags: libc::c_uint) -> io::Result<()> {
    let offset = |bytes: u64| libc::off64_t::try_from(bytes).map_err(|_| io::ErrorKind::FileTooLarge);
    let (at, len) = (offset(range.start)?, offset(range.end.saturating_sub(range.start))?);
    // SAFETY: the descriptor is open for as long as `file` is borrowed, and the call takes nothing else but numbers.
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
    fn write_out_keeps_content_and_takes_empty_and_absent_ranges() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[7; 100_000]).unwrap();
        for range in [0..100_000, 4096..8192, 5..6, 0..0, 1 << 30..(1 << 30) + 1] {
            write_out(&file, range, PIECE_BYTES).unwrap();
        }
        assert_eq!(file.metadata().unwrap().len(), 100_000);
        assert!(write_out(&file, u64::MAX - 1..u64::MAX, PIECE_BYTES).is_err());
    }

    #[test]
    fn room_of_a_file_is_given_back_when_its_last_name_is_gone() {
        let folder = tempfile::tempdir().unwrap();
        let (name, link) = (folder.path().join("name"), folder.path().join("link"));
        let file = fs::File::create_new(&name).unwrap();
        file.set_len(2 * STEP_BYTES + 1).unwrap();
        fs::hard_link(&name, &link).unwrap();
        fs::remove_file(&name).unwrap();
        give_back(&file).unwrap();
        assert_eq!(fs::metadata(&link).unwrap().len(), 2 * STEP_BYTES + 1, "a backup keeps its content");
        fs::remove_file(&link).unwrap();
        give_back(&file).unwrap();
        assert!(file.metadata().unwrap().len() <= STEP_BYTES);
    }

    #[test]
    fn write_out_of_a_file_that_cannot_be_opened_is_left_to_the_sync() {
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
