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
    /// Time of the first batch, in milliseconds since 1970 by this machine's clock; time of the creation while the
    /// segment is empty.
    pub created_ms: i64,
    /// Time of the last batch, in the same unit. Only appends advance it, neither restarts nor timestamps of records.
    pub written_ms: i64,
}

impl SegmentInfo {
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

    /// Returns the description of the same segment before its first batch.
    pub(in crate::log) fn emptied(&self) -> Self {
        Self { written_ms: self.written_ms, ..Self::empty(self.base, self.created_ms) }
    }

    /// Records the time of a write, before its batches are recorded.
    pub(in crate::log) fn record_write(&mut self, now_ms: i64) {
        if self.bytes == 0 {
            self.created_ms = now_ms;
        }
        // A clock that moved back makes no existing batch older.
        self.written_ms = if self.bytes == 0 { now_ms } else { self.written_ms.max(now_ms) };
    }

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

    /// Decodes the output of [`Self::encode`]; `None` for a range or a length that no segment has.
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
    /// Key of the file in the table of open files.
    pub(in crate::log) serial: u64,
    pub(in crate::log) path: PathBuf,
    /// True if bytes were written since the last sync.
    pub(in crate::log) dirty: AtomicBool,
    /// Number of bytes from the start that were written out, possibly unsynced. Write-out advances it; a truncation
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

/// Returns the name of a file of the segment at `base`.
pub(in crate::log) fn name(base: Offset, extension: &str) -> String {
    format!("{:020}.{extension}", base.get())
}

/// Returns the base offset in the name of a segment file.
pub(in crate::log) fn base_of(name: &str) -> Option<Offset> {
    base_in(name.strip_suffix(".log")?)
}

/// Returns the base offset in the name of an index or a snapshot.
pub(in crate::log) fn cache_base_of(name: &str) -> Option<Offset> {
    let (digits, extension) = name.split_once('.')?;
    if matches!(extension, "index" | "timeindex" | "snapshot") { base_in(digits) } else { None }
}

fn base_in(digits: &str) -> Option<Offset> {
    (digits.len() == 20 && digits.bytes().all(|b| b.is_ascii_digit()))
        .then(|| digits.parse().ok().and_then(Offset::new))?
}

/// Returns the directory of a replica's files.
pub(in crate::log) fn replica_dir(data: &Path, id: PartitionId) -> PathBuf {
    data.join(id.topic.to_string()).join(id.number.to_string())
}

/// Result of a scan.
#[derive(Debug)]
pub(in crate::log) struct ScanEnd {
    /// Offset after the last intact batch.
    pub(in crate::log) end: Offset,
    /// Position in the file after that batch.
    pub(in crate::log) position: u64,
    /// Error in the bytes at that position; `None` at the end of the file.
    pub(in crate::log) damage: Option<String>,
}

/// Reads the batches of a file from `position` to `len`. The first batch must start at `from`, and each later one at
/// the end of the previous one, with epochs that never decrease. The scan stops at the first bytes that are no such
/// batch.
pub(in crate::log) fn scan(
    file: &dyn File,
    len: u64,
    position: u64,
    from: Offset,
    mut epoch: Option<LeaderEpoch>,
    mut each: impl FnMut(u64, &Batch),
) -> io::Result<ScanEnd> {
    const WINDOW: usize = 1 << 20;
    let mut end = ScanEnd { end: from, position, damage: None };
    let mut window = Bytes::new();
    while end.position < len {
        let left = usize::try_from(len - end.position).unwrap_or(usize::MAX);
        let needed = match Batch::framed_len(&window) {
            Ok(needed) => needed,
            Err(_) if window.len() < HEADER_BYTES => HEADER_BYTES,
            Err(error) => {
                end.damage = Some(error.to_string());
                break;
            }
        };
        if needed > left {
            end.damage = Some(format!("{needed} bytes are needed and the file has {left}"));
            break;
        }
        if window.len() < needed {
            let mut buffer = vec![0; needed.max(WINDOW).min(left)];
            let read = file.read_at(&mut buffer, end.position)?;
            buffer.truncate(read);
            if read < needed {
                end.damage = Some("the file became shorter during the read".to_owned());
                break;
            }
            window = buffer.into();
            continue;
        }
        match next(&mut window, end.end, epoch) {
            Ok(batch) => {
                each(end.position, &batch);
                end.position += batch.encoded_len() as u64;
                end.end = batch.end_offset();
                epoch = batch.leader_epoch();
            }
            Err(reason) => {
                end.damage = Some(reason);
                break;
            }
        }
    }
    Ok(end)
}

/// Returns the next batch of `window`, which must start at `expected` with an epoch not below `epoch`.
pub(in crate::log) fn next(window: &mut Bytes, expected: Offset, epoch: Option<LeaderEpoch>) -> Result<Batch, String> {
    let batch = Batch::split_from(window).map_err(|error| error.to_string())?;
    if batch.base_offset() != expected {
        return Err(format!("a batch starts at offset {}, not at {expected}", batch.base_offset()));
    }
    match (epoch, batch.leader_epoch()) {
        (_, None) => Err("a batch has no leader epoch".to_owned()),
        (Some(before), Some(now)) if now < before => Err(format!("the leader epoch decreases from {before} to {now}")),
        _ => Ok(batch),
    }
}
