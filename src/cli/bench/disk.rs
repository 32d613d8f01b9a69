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
const MEASUREMENT_INTERVAL: Duration = Duration::from_secs(3);

/// Alignment in bytes that direct I/O needs for memory and sizes.
const ALIGNMENT: usize = 4096;

/// Measures writes of `write_bytes` bytes, rounded up to `ALIGNMENT` and at most `FILE_BYTES`, to a file in `folder`
/// for `MEASUREMENT_INTERVAL`, with a sync after each. Returns the figures as the JSON that the command prints. The
/// measured writes overwrite blocks that exist. Blocks the thread, and removes the file at the end.
pub(super) fn measure(folder: &Path, write_bytes: usize) -> io::Result<Value> {
    let write_bytes = write_bytes.max(1).next_multiple_of(ALIGNMENT).min(FILE_BYTES);
    let path = folder.join(format!(".strandline-bench-{}", std::process::id()));
    let result = create_file(&path).and_then(|()| write_synced(&path, write_bytes));
    let removed = std::fs::remove_file(&path);
    let (direct, stats, elapsed) = result?;
    removed?;
    let results = stats.result_json(elapsed);
    Ok(json!({
        "directory": folder,
        "write_bytes": write_bytes,
        "direct": direct,
        "mb_per_s": results["mb_per_s"],
        "p50_ms": results["p50_ms"],
        "p99_ms": results["p99_ms"],
        "seconds": round(elapsed.as_secs_f64()),
    }))
}

/// Creates the file and fills it with zeros, so that the timed writes overwrite blocks that exist.
fn create_file(path: &Path) -> io::Result<()> {
    let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    let zeros = vec![0; 1 << 20];
    for step in 0..FILE_BYTES / zeros.len() {
        file.write_all_at(&zeros, to_u64(step * zeros.len()))?;
    }
    file.sync_all()
}

/// Writes and syncs random bytes for `MEASUREMENT_INTERVAL`. Returns whether the writes used direct I/O, their
/// latencies, and the elapsed time.
fn write_synced(path: &Path, write_bytes: usize) -> io::Result<(bool, BenchStats, Duration)> {
    let (file, direct) = open(path)?;
    let mut memory = vec![0; write_bytes + ALIGNMENT];
    random::fill(&mut memory);
    let aligned_start = memory.as_ptr().align_offset(ALIGNMENT);
    let bytes = &memory[aligned_start..aligned_start + write_bytes];
    let mut stats = BenchStats::default();
    let start = clock::monotonic();
    let mut position = 0;
    while start.elapsed() < MEASUREMENT_INTERVAL {
        let before = clock::monotonic();
        file.write_all_at(bytes, to_u64(position))?;
        file.sync_data()?;
        stats.add_latency(before.elapsed());
        stats.records += 1;
        stats.bytes += to_u64(write_bytes);
        position = if position + 2 * write_bytes > FILE_BYTES { 0 } else { position + write_bytes };
    }
    Ok((direct, stats, start.elapsed()))
}

/// Opens the file for direct I/O, or without direct I/O if the file system does not support it (tmpfs). Returns true
/// for direct I/O.
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

fn to_u64(bytes: usize) -> u64 {
    u64::try_from(bytes).expect("64 bits")
}

/// Formats the result of the measurement as text.
pub(super) fn describe(disk: &Value) -> String {
    let io_mode = if disk["direct"] == true { "direct" } else { "through the page cache" };
    format!(
        "the disk at {}: {} MB/s in writes of {} bytes ({io_mode}, each synced), p50 {} ms, p99 {} ms",
        disk["directory"], disk["mb_per_s"], disk["write_bytes"], disk["p50_ms"], disk["p99_ms"]
    )
}
