//! Segment files: their names, their descriptions, and the scan that accepts only intact batches.

use std::{
    io,
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, AtomicU64},
};

use bytes::{Buf, BufMut, Bytes};

use crate::{
    log::disk::File,
    model::{LeaderEpoch, Offset, PartitionId},
    record::{Batch, HEADER_BYTES},
};

/// Description of a segment, available without reading the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SegmentInfo {
    /// First offset, which is also the name of the file.
    pub base: Offset,
    /// Offset after the last record.
    pub end: Offset,
    /// Length in bytes.
    pub bytes: u64,
    /// Largest timestamp of the records, in milliseconds; `i64::MIN` if the segment is empty.
    pub max_timestamp: i64,
    /// Epoch of the first batch; `None` if the segment is empty.
    pub first_epoch: Option<LeaderEpoch>,
    /// Epoch of the last batch; `None` if the segment is empty.
    pub last_epoch: Option<LeaderEpoch>,
    /// Time at which the first batch was written, in milliseconds since 1970 by this machine's clock; time of the
    /// creation while the segment is empty.
    pub created_ms: i64,
    /// Time at which the last batch was written, in the same unit. Timestamps of records do not affect it. A recovery
    /// sets the times of batches that it scans to the modification time of the file.
    pub written_ms: i64,
}

impl SegmentInfo {
    /// Returns the description of a new segment without batches.
    pub(in crate::log) fn empty(base: Offset, now_ms: i64) -> Self {
        let (created_ms, written_ms) = (now_ms, now_ms);
        Self {
            base,
            end: base,
            bytes: 0,
            max_timestamp: i64::MIN,
            first_epoch: None,
            last_epoch: None,
            created_ms,
            written_ms,
        }
    }

    /// Returns the description of the same segment without its batches. The two times stay.
    pub(in crate::log) fn emptied(&self) -> Self {
        Self { written_ms: self.written_ms, ..Self::empty(self.base, self.created_ms) }
    }

    /// Sets the times for a write at `now_ms`. Called before [`Self::extend`] adds the batches of the write.
    pub(in crate::log) fn record_write(&mut self, now_ms: i64) {
        if self.bytes == 0 {
            self.created_ms = now_ms;
        }
        // A clock that moved back makes no existing batch older.
        self.written_ms = if self.bytes == 0 { now_ms } else { self.written_ms.max(now_ms) };
    }

    /// Adds a batch at the end of the segment.
    pub(in crate::log) fn extend(&mut self, batch: &Batch) {
        self.end = batch.end_offset();
        self.bytes += batch.encoded_len() as u64;
        self.max_timestamp = self.max_timestamp.max(batch.max_timestamp());
        self.last_epoch = batch.leader_epoch();
        self.first_epoch = self.first_epoch.or(self.last_epoch);
    }

    pub(in crate::log) fn encode(&self, out: &mut impl BufMut) {
        let epoch = |epoch: Option<LeaderEpoch>| epoch.map_or(-1, LeaderEpoch::as_i32);
        out.put_u64(self.base.get());
        out.put_u64(self.end.get());
        out.put_u64(self.bytes);
        out.put_i64(self.max_timestamp);
        out.put_i32(epoch(self.first_epoch));
        out.put_i32(epoch(self.last_epoch));
        out.put_i64(self.created_ms);
        out.put_i64(self.written_ms);
    }

    /// Decodes the output of [`Self::encode`]; `None` if bytes are missing, or for a range or a length that no segment
    /// has.
    pub(in crate::log) fn decode(from: &mut impl Buf) -> Option<Self> {
        let info = Self {
            base: Offset::new(from.try_get_u64().ok()?)?,
            end: Offset::new(from.try_get_u64().ok()?)?,
            bytes: from.try_get_u64().ok()?,
            max_timestamp: from.try_get_i64().ok()?,
            first_epoch: LeaderEpoch::from_i32(from.try_get_i32().ok()?),
            last_epoch: LeaderEpoch::from_i32(from.try_get_i32().ok()?),
            created_ms: from.try_get_i64().ok()?,
            written_ms: from.try_get_i64().ok()?,
        };
        let empty = info.bytes == 0;
        // Positions are 32 bits wide.
        let possible = info.base <= info.end && empty == (info.base == info.end) && info.bytes <= u64::from(u32::MAX);
        possible.then_some(info)
    }
}

/// One segment of a replica: its description and its file.
#[derive(Debug)]
pub(in crate::log) struct Segment {
    pub(in crate::log) info: SegmentInfo,
    pub(in crate::log) file: std::sync::Arc<SegmentFile>,
}

/// The file of a segment.
#[derive(Debug)]
pub(in crate::log) struct SegmentFile {
    /// Key of the file in the cache of open files.
    pub(in crate::log) serial: u64,
    pub(in crate::log) path: PathBuf,
    /// True if the file may have been changed since its last sync.
    pub(in crate::log) dirty: AtomicBool,
    /// Number of bytes from the start that were written out, possibly unsynced. A write-out advances it; a truncation
    /// lowers it.
    pub(in crate::log) written_out: AtomicU64,
}

impl SegmentFile {
    pub(in crate::log) fn new(serial: u64, dir: &Path, base: Offset) -> Self {
        Self {
            serial,
            path: dir.join(name(base, "log")),
            dirty: AtomicBool::new(false),
            written_out: AtomicU64::new(0),
        }
    }
}

/// Part of a quarantined file's name, after the name that the file had before.
const QUARANTINED: &str = ".quarantined-";

/// Returns the name of the segment's file with this extension (`log`, `index`, `timeindex`, `snapshot`, `reset`).
pub(in crate::log) fn name(base: Offset, extension: &str) -> String {
    format!("{:020}.{extension}", base.get())
}

/// Returns the base offset in the name of a segment file; `None` for other names.
pub(in crate::log) fn base_of(name: &str) -> Option<Offset> {
    parse_base(name.strip_suffix(".log")?)
}

/// Returns the name of a quarantined segment file. Several files with the same base offset have different numbers.
pub(in crate::log) fn quarantined_name(file: &str, number: u32) -> String {
    format!("{file}{QUARANTINED}{number}")
}

/// Returns true if the name is that of a quarantined segment file.
pub(in crate::log) fn is_quarantined(name: &str) -> bool {
    name.contains(QUARANTINED)
}

/// Returns the base offset in the name of an index or a snapshot; `None` for other names.
pub(in crate::log) fn index_or_snapshot_base(name: &str) -> Option<Offset> {
    let (digits, extension) = name.split_once('.')?;
    if matches!(extension, "index" | "timeindex" | "snapshot") { parse_base(digits) } else { None }
}

/// Parses the 20 digits with which the names of segment files, indexes and snapshots start.
fn parse_base(digits: &str) -> Option<Offset> {
    (digits.len() == 20 && digits.bytes().all(|b| b.is_ascii_digit()))
        .then(|| digits.parse().ok().and_then(Offset::new))?
}

/// Returns the directory of a replica's files.
pub(in crate::log) fn replica_dir(data: &Path, id: PartitionId) -> PathBuf {
    data.join(id.topic.to_string()).join(id.number.to_string())
}

/// End of a scan: all batches before it are intact.
#[derive(Debug)]
pub(in crate::log) struct ScanEnd {
    /// Offset after the last intact batch.
    pub(in crate::log) end: Offset,
    /// Position in the file after that batch.
    pub(in crate::log) position: u64,
    /// Error in the bytes at that position; `None` if the scan has read all bytes.
    pub(in crate::log) corruption: Option<String>,
}

/// Reads the batches of a file from `position` to `len`, and calls `on_batch` with the position and content of each.
/// The first batch must start at the offset `from`, and each later one at the end of the previous one. Epochs must
/// never decrease, from `epoch` on. The scan stops at the first bytes that violate these rules or fail a checksum.
pub(in crate::log) fn scan(
    file: &dyn File,
    len: u64,
    position: u64,
    from: Offset,
    mut epoch: Option<LeaderEpoch>,
    mut on_batch: impl FnMut(u64, &Batch),
) -> io::Result<ScanEnd> {
    const WINDOW_BYTES: usize = 1 << 20;
    let mut scanned = ScanEnd { end: from, position, corruption: None };
    let mut window = Bytes::new();
    while scanned.position < len {
        let remaining = usize::try_from(len - scanned.position).unwrap_or(usize::MAX);
        let needed = match Batch::framed_len(&window) {
            Ok(needed) => needed,
            Err(_) if window.len() < HEADER_BYTES => HEADER_BYTES,
            Err(error) => {
                scanned.corruption = Some(error.to_string());
                break;
            }
        };
        if needed > remaining {
            scanned.corruption = Some(format!("{needed} bytes are needed and the file has {remaining}"));
            break;
        }
        if window.len() < needed {
            let mut buffer = vec![0; needed.max(WINDOW_BYTES).min(remaining)];
            let read = file.read_at(&mut buffer, scanned.position)?;
            buffer.truncate(read);
            if read < needed {
                scanned.corruption = Some("the file became shorter during the read".to_owned());
                break;
            }
            window = buffer.into();
            continue;
        }
        match next(&mut window, scanned.end, epoch) {
            Ok(batch) => {
                on_batch(scanned.position, &batch);
                scanned.position += batch.encoded_len() as u64;
                scanned.end = batch.end_offset();
                epoch = batch.leader_epoch();
            }
            Err(reason) => {
                scanned.corruption = Some(reason);
                break;
            }
        }
    }
    Ok(scanned)
}

/// Splits the next batch off `window`. The batch must be intact and start at the offset `expected`, with an epoch not
/// below `epoch`. Otherwise the result is a description of the error.
pub(in crate::log) fn next(window: &mut Bytes, expected: Offset, epoch: Option<LeaderEpoch>) -> Result<Batch, String> {
    let batch = Batch::split_from(window).map_err(|error| error.to_string())?;
    if batch.base_offset() != expected {
        return Err(format!("a batch starts at offset {}, not at {expected}", batch.base_offset()));
    }
    match (epoch, batch.leader_epoch()) {
        (_, None) => Err("a batch has no leader epoch".to_owned()),
        (Some(last), Some(next)) if next < last => Err(format!("the leader epoch decreases from {last} to {next}")),
        _ => Ok(batch),
    }
}
