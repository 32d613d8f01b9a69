//! The free space of a data directory's disk. Only this file grants or refuses disk space to the files of the log. The
//! pace at which removed files are freed is decided in `writeback`.
//!
//! # Overview
//!
//! Appends leave [`LogOptions::reserve_bytes`](crate::log::LogOptions::reserve_bytes) free, so a log never fills its
//! own disk. Other programs can still fill the disk. A broker could then not even start: the checkpoint needs space,
//! and so does the metadata commit that precedes the deletion of segments. Part of the space is therefore a file, the
//! reserve. In this table, "kept" stands for `reserve_bytes`, and "size" for the bytes that the operation writes.
//!
//! | operation | free bytes that it needs |
//! | --- | --- |
//! | append | size + kept + bytes of the journal files that are required and do not exist yet |
//! | new journal file | size + kept; not checked for the minimum number of files |
//! | truncation, reset | size |
//! | checkpoint | size; the reserve is removed if the disk is full |
//! | start | the size of the reserve, which is removed if less is free |
//! | creation of the reserve | size + kept |

use std::{
    io::{self, IoSlice},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use super::{Disk, OpenMode, PIECE_BYTES};
use crate::{limits, log::error::DataDirError};

/// Name of the reserve in the data directory.
const RESERVE_NAME: &str = "reserve";

/// Size of the reserve. The checkpoint of a large broker fits into it. It is twice the free space that a commit of the
/// embedded metadata store requires.
const RESERVE_BYTES: u64 = 8 << 20;

/// Bytes of zeros per write to the reserve.
const ZERO_FILL_BYTES: usize = 1 << 20;

/// Maximum number of bytes that may be appended between two queries of the file system's free space.
const APPEND_ALLOWANCE_BYTES: u64 = 4 << 20;

/// Budget of disk space for a data directory, and the reserve on its disk.
pub(in crate::log) struct DiskBudget {
    disk: Arc<dyn Disk>,
    dir: PathBuf,
    /// Bytes that appends and journal files leave free. With 0 there is no reserve, and appends are not limited.
    kept_bytes: u64,
    /// True after an append, truncation or reset found the disk full, until the next successful append.
    is_full: AtomicBool,
    /// True after `create_reserve` has found or created the complete reserve, until a release, or if none is
    /// configured. While false, each call of `create_reserve` tries again.
    has_reserve: AtomicBool,
    /// Bytes that may be appended without a query of the free space.
    append_allowance: AtomicU64,
}

impl DiskBudget {
    pub(in crate::log) fn new(disk: Arc<dyn Disk>, dir: &Path, kept_bytes: u64) -> Self {
        Self {
            disk,
            dir: dir.to_owned(),
            kept_bytes,
            is_full: AtomicBool::new(false),
            has_reserve: AtomicBool::new(kept_bytes == 0),
            append_allowance: AtomicU64::new(0),
        }
    }

    /// Checks at a start that the disk has space for a new journal of `bytes`. So a lack of space does not first appear
    /// under load. A journal of at most `limits::JOURNAL_SPACE_CHECK_BYTES` is not checked, and neither is one that has
    /// a file: an existing ring works with fewer files.
    ///
    /// # Errors
    /// `JournalTooLarge`: the free space of the disk is less than `bytes`.
    pub(in crate::log) fn check_journal_space(&self, journal_dir: &Path, bytes: u64) -> Result<(), DataDirError> {
        let entries = self.disk.list(journal_dir);
        let has_files = entries.is_ok_and(|entries| entries.iter().any(|entry| entry.name.ends_with(".journal")));
        // The directory may not exist yet. The nearest existing parent then reports the free space.
        let free = journal_dir.ancestors().find_map(|dir| self.disk.free_bytes(dir).ok());
        match free {
            Some(free) if bytes > limits::JOURNAL_SPACE_CHECK_BYTES && !has_files && free < bytes => {
                Err(DataDirError::JournalTooLarge { journal_dir: journal_dir.to_owned(), bytes, free })
            }
            _ => Ok(()),
        }
    }

    /// Removes the reserve before a start, and logs a warning, if the disk has less free space than the size of the
    /// reserve.
    pub(in crate::log) fn release_reserve_for_start(&self) {
        if self.kept_bytes > 0 && self.release_reserve() {
            tracing::warn!(
                dir = %self.dir.display(),
                free_bytes = self.disk.free_bytes(&self.dir).ok(),
                "the disk is almost full, so the broker freed its reserved space for this start: add space, or lower \
                 local.retention.* or retention.*"
            );
        }
    }

    /// Removes the reserve if the disk has less free space than the size of the reserve. Returns true if a file was
    /// removed.
    pub(in crate::log) fn release_reserve(&self) -> bool {
        let is_low = self.disk.free_bytes(&self.dir).is_ok_and(|free| free < RESERVE_BYTES);
        let released = is_low && self.disk.remove(&self.dir.join(RESERVE_NAME)).is_ok();
        if released {
            self.has_reserve.store(self.kept_bytes == 0, Ordering::Release);
        }
        released
    }

    /// Creates the reserve if it does not exist, and if the disk has space for it beyond the kept bytes. A failure is
    /// only logged, and the next call tries again.
    pub(in crate::log) fn create_reserve(&self) {
        if self.has_reserve.load(Ordering::Acquire) {
            return;
        }
        match self.write_reserve() {
            Ok(complete) => self.has_reserve.store(complete, Ordering::Release),
            // Without the reserve, only starts and checkpoints on a full disk fail.
            Err(error) => tracing::debug!(%error, "cannot create the reserve, retrying later"),
        }
    }

    /// Writes the missing part of the reserve. Returns true if the file is complete, and false if the disk has less
    /// free space than the kept bytes and the reserve together.
    fn write_reserve(&self) -> io::Result<bool> {
        let (disk, path) = (&self.disk, self.dir.join(RESERVE_NAME));
        let existing = match disk.open(&path, OpenMode::Read) {
            Ok(file) => file.size()?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => 0,
            Err(error) => return Err(error),
        };
        if existing >= RESERVE_BYTES {
            return Ok(true);
        }
        if disk.free_bytes(&self.dir)? < self.kept_bytes + RESERVE_BYTES {
            return Ok(false);
        }
        let file = disk.open(&path, OpenMode::Write)?;
        let zeros = vec![0; ZERO_FILL_BYTES];
        for at in (existing..RESERVE_BYTES).step_by(ZERO_FILL_BYTES) {
            file.write_at(&[IoSlice::new(&zeros)], at)?;
        }
        disk.write_out(&path, existing..RESERVE_BYTES, PIECE_BYTES)?;
        // Without the sync the file system may not have allocated the space yet.
        file.sync()?;
        Ok(true)
    }

    /// Returns true if `bytes` may be appended, and deducts them from the append allowance. The free space is queried
    /// only when the allowance is less than `bytes`. `unallocated` returns the bytes of the required journal files that
    /// do not exist yet. A log that filled its disk could not recover: the metadata commit that precedes the deletion
    /// of segments needs space itself.
    pub(in crate::log) fn reserve_append(&self, bytes: u64, unallocated: impl FnOnce() -> u64) -> bool {
        let deduct = |allowance: u64| allowance.checked_sub(bytes);
        if self.kept_bytes == 0
            || self.append_allowance.fetch_update(Ordering::AcqRel, Ordering::Acquire, deduct).is_ok()
        {
            return true;
        }
        // A file system that does not report its free space is used until a write fails.
        let Ok(free) = self.disk.free_bytes(&self.dir) else { return true };
        let Some(remaining) = free.checked_sub(self.kept_bytes + unallocated() + bytes) else { return false };
        self.append_allowance.store(remaining.min(APPEND_ALLOWANCE_BYTES), Ordering::Release);
        true
    }

    /// Returns true if a truncation or a reset may write `bytes`. Unlike an append, it may use the kept bytes.
    pub(in crate::log) fn has_change_space(&self, bytes: u64) -> bool {
        // A file system that does not report its free space is used until a write fails.
        self.disk.free_bytes(&self.dir).map_or(true, |free| free >= bytes)
    }

    /// Returns true if `dir`, which may be on another device, has space for `bytes` of a new journal file beyond the
    /// kept bytes. Returns true also if the file system does not report its free space. A journal file that filled the
    /// disk would make the writes of all programs fail, also those of this broker.
    pub(in crate::log) fn has_journal_space(&self, dir: &Path, bytes: u64) -> bool {
        self.disk.free_bytes(dir).map_or(true, |free| free >= bytes + self.kept_bytes)
    }

    /// Returns true if an append, truncation or reset found the disk full, and no append has succeeded since.
    pub(in crate::log) fn is_full(&self) -> bool {
        self.is_full.load(Ordering::Relaxed)
    }

    /// Marks the disk as full: an append, truncation or reset has found no space. Logs the error if the disk was not
    /// yet marked.
    pub(in crate::log) fn on_full(&self) {
        if !self.is_full.swap(true, Ordering::Relaxed) {
            tracing::error!(
                path = %self.dir.display(),
                free_bytes = self.disk.free_bytes(&self.dir).ok(),
                "the disk is full, appends are refused until it has space: add space, or lower local.retention.* or \
                 retention.*"
            );
        }
    }

    /// Removes the mark after a successful append, and logs then that the disk has space again.
    pub(in crate::log) fn on_append(&self) {
        if self.is_full() && self.is_full.swap(false, Ordering::Relaxed) {
            tracing::info!(path = %self.dir.display(), "the disk has space for appends again");
        }
    }
}
