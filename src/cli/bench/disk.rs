//! Measurement of the disk without a broker: sequential writes, each one synced.

use std::{
    fs::{File, OpenOptions},
    io,
    os::unix::fs::{FileExt as _, OpenOptionsExt as _},
    path::Path,
    time::Duration,
};

use rustix::fs::OFlags;
use serde_json::{Value, json};

use super::report::{BenchStats, round};
use crate::task::{clock, random};

/// Size of the test file in bytes. At its end, the writes continue at its start.
const FILE_BYTES: usize = 256 << 20;

/// Duration of the timed writes.
const MEASURE_TIME: Duration = Duration::from_secs(3);

/// Alignment in bytes that direct I/O needs for memory and sizes.
const ALIGNMENT: usize = 4096;

/// Writes a file in `folder` in pieces of `piece` bytes for `MEASURE_TIME`, with a sync after each piece. The writes
/// overwrite blocks that exist. Blocks the thread, and removes the file at the end.
pub(super) fn measure(folder: &Path, piece: usize) -> io::Result<Value> {
    let piece = piece.max(1).next_multiple_of(ALIGNMENT).min(FILE_BYTES);
    let path = folder.join(format!(".strandline-bench-{}", std::process::id()));
    let result = prepare(&path).and_then(|()| write(&path, piece));
    let removed = std::fs::remove_file(&path);
    let (direct, seen, elapsed) = result?;
    removed?;
    let figures = seen.figures(elapsed);
    Ok(json!({
        "directory": folder,
        "write_bytes": piece,
        "direct": direct,
        "mb_per_s": figures["mb_per_s"],
        "p50_ms": figures["p50_ms"],
        "p99_ms": figures["p99_ms"],
        "seconds": round(elapsed.as_secs_f64()),
    }))
}

/// Fills the file, so that the timed writes overwrite blocks that exist.
fn prepare(path: &Path) -> io::Result<()> {
    let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    let zeros = vec![0; 1 << 20];
    for step in 0..FILE_BYTES / zeros.len() {
        file.write_all_at(&zeros, place(step * zeros.len()))?;
    }
    file.sync_all()
}

fn write(path: &Path, piece: usize) -> io::Result<(bool, BenchStats, Duration)> {
    let (file, direct) = open(path)?;
    let mut memory = vec![0; piece + ALIGNMENT];
    random::fill(&mut memory);
    let start = memory.as_ptr().align_offset(ALIGNMENT);
    let bytes = &memory[start..start + piece];
    let mut seen = BenchStats::default();
    let begun = clock::monotonic();
    let mut at = 0;
    while begun.elapsed() < MEASURE_TIME {
        let before = clock::monotonic();
        file.write_all_at(bytes, place(at))?;
        file.sync_data()?;
        seen.latency(before.elapsed());
        seen.records += 1;
        seen.bytes += place(piece);
        at = if at + 2 * piece > FILE_BYTES { 0 } else { at + piece };
    }
    Ok((direct, seen, begun.elapsed()))
}

/// Opens the file for direct I/O, or without direct I/O if the file system does not support it (tmpfs).
fn open(path: &Path) -> io::Result<(File, bool)> {
    let open = |flags: OFlags| {
        let flags = i32::try_from((flags | OFlags::NOFOLLOW).bits()).expect("flags of open(2)");
        OpenOptions::new().write(true).custom_flags(flags).open(path)
    };
    match open(OFlags::DIRECT) {
        Ok(file) => Ok((file, true)),
        Err(_) => Ok((open(OFlags::empty())?, false)),
    }
}

fn place(bytes: usize) -> u64 {
    u64::try_from(bytes).expect("64 bits")
}

/// Formats the result of the measurement as text.
pub(super) fn describe(disk: &Value) -> String {
    let how = if disk["direct"] == true { "direct" } else { "through the page cache" };
    format!(
        "the disk at {}: {} MB/s in writes of {} bytes ({how}, each synced), p50 {} ms, p99 {} ms",
        disk["directory"], disk["mb_per_s"], disk["write_bytes"], disk["p50_ms"], disk["p99_ms"]
    )
}
