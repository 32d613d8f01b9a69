//! Benchmarks of a data directory on the real disk (below `target/`): append, read, open after a crash, find a
//! timestamp. Batches are 64 KiB with one record unless the name of a benchmark gives another size.

use std::{
    fs,
    hint::black_box,
    path::Path,
    sync::{
        Arc,
        mpsc::{Receiver, sync_channel},
    },
    time::Duration,
};

use criterion::{BatchSize, BenchmarkGroup, Criterion, Throughput, measurement::WallTime};
use rand::{Rng, SeedableRng, rngs::StdRng};
use strandline::{
    log::{DataDir, DataDirIdentity, LogOptions, RealDisk, ReplicaLog},
    model::{BrokerId, Compression, LeaderEpoch, Offset, PartitionId, TopicId},
    record::{Batch, BatchBuilder},
    task::clock,
};

const BATCH_BYTES: usize = 64 << 10;
/// Size in bytes at which a segment is sealed and evicted, so that a long run does not need more disk space.
const SEGMENT_BYTES: u64 = 64 << 20;
const EPOCH: LeaderEpoch = LeaderEpoch(1);

/// Creates a directory, which is removed when the value is dropped.
fn folder() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("target/ is writable")
}

/// Opens a log with the threads and the journal of a broker. Segments are synced in the background once `sync_bytes` of
/// them are unsynced.
fn open(dir: &Path, sync_bytes: u64) -> DataDir {
    let identity = DataDirIdentity { cluster: "bench".to_owned(), broker: BrokerId(1) };
    let sync_after = Duration::from_secs(3600);
    let options = LogOptions { journal_bytes: 256 << 20, sync_bytes, sync_after, ..LogOptions::default() };
    DataDir::open(Arc::new(RealDisk::default()), dir, &identity, options).expect("the directory opens")
}

fn partition(number: u32) -> PartitionId {
    PartitionId::new(TopicId::from_bytes([1; 16]), number)
}

fn replicas(log: &DataDir, count: u32) -> Vec<ReplicaLog> {
    let open = |number| log.open_replica(partition(number), Offset::ZERO).expect("the replica opens");
    (0..count).map(open).collect()
}

/// Returns a batch of at most `bytes` bytes with one incompressible record.
fn batch(bytes: usize) -> Batch {
    let mut value = vec![0; bytes - 100];
    StdRng::seed_from_u64(1).fill_bytes(&mut value);
    let mut builder = BatchBuilder::new(Compression::None);
    builder.push(0, None, Some(&value), &[]).expect("the record is below the maximum size");
    builder.finish(None).expect("the batch has a record")
}

/// Appends one batch, with its offset and epoch set as by a leader.
fn append(replica: &mut ReplicaLog, batch: &Batch) {
    let mut batch = batch.clone();
    batch.set_offset_and_epoch(replica.log_end(), EPOCH);
    replica.append(&[batch]).expect("the disk is not full");
}

/// Submits the appends of a replica to the journal. The receiver gets the persisted end once they are durable.
fn persist(replica: &mut ReplicaLog) -> Receiver<Offset> {
    let (sender, receiver) = sync_channel(1);
    replica.persist(Box::new(move |result| {
        sender.send(result.expect("the journal write succeeds")).expect("the receiver exists");
    }));
    receiver
}

/// Submits the appends of all replicas to the journal, then waits for all.
fn persist_all(replicas: &mut [ReplicaLog]) {
    let results: Vec<_> = replicas.iter_mut().map(persist).collect();
    for result in results {
        result.recv().expect("the journal sends a result");
    }
}

/// Seals and evicts the active segment if it has reached its size.
fn roll_and_evict(replica: &mut ReplicaLog) {
    if replica.active_segment().bytes >= SEGMENT_BYTES {
        replica.roll().expect("the disk is not full");
        replica.evict(replica.log_end()).expect("the segment files are removable");
    }
}

/// Times `operation` on the replicas of a new directory. Evictions between its calls are not timed.
fn time_operation(
    group: &mut BenchmarkGroup<'_, WallTime>,
    name: &str,
    count: u32,
    mut operation: impl FnMut(&mut [ReplicaLog]),
) {
    let folder = folder();
    let log = open(folder.path(), 64 << 20);
    let mut replicas = replicas(&log, count);
    group.throughput(Throughput::Bytes(u64::from(count) * BATCH_BYTES as u64));
    group.bench_function(name, |b| {
        b.iter_custom(|iterations| {
            let mut spent = Duration::ZERO;
            for _ in 0..iterations {
                let began = clock::monotonic();
                operation(&mut replicas);
                spent += began.elapsed();
                replicas.iter_mut().for_each(roll_and_evict);
            }
            spent
        });
    });
}

fn appending(group: &mut BenchmarkGroup<'_, WallTime>) {
    let batch = batch(BATCH_BYTES);
    time_operation(group, "append to the page cache", 1, |replicas| append(&mut replicas[0], &batch));
    for count in [1, 16] {
        let name = format!("append and persist, {count} {}", if count == 1 { "replica" } else { "replicas" });
        time_operation(group, &name, count, |replicas| {
            replicas.iter_mut().for_each(|replica| append(replica, &batch));
            persist_all(replicas);
        });
    }
}

fn reading(group: &mut BenchmarkGroup<'_, WallTime>) {
    const READ: usize = 1 << 20;
    let folder = folder();
    let log = open(folder.path(), u64::MAX);
    let mut replica = replicas(&log, 1).remove(0);
    let batch = batch(BATCH_BYTES);
    (0..SEGMENT_BYTES / BATCH_BYTES as u64).for_each(|_| append(&mut replica, &batch));
    let (reader, end) = (replica.reader(), replica.log_end());
    group.throughput(Throughput::Bytes(READ as u64));
    let mut offset = Offset::ZERO;
    group.bench_function("read 1 MiB from memory", |b| {
        b.iter(|| {
            let read = reader.read_memory(offset, end, READ).expect("the tail cache contains the segment");
            offset = if read.next < end { read.next } else { Offset::ZERO };
            black_box(read)
        });
    });
    group.bench_function("read 1 MiB from a file", |b| {
        b.iter(|| {
            let read = reader.read_disk(offset, end, READ).expect("the file is intact");
            offset = if read.next < end { read.next } else { Offset::ZERO };
            black_box(read)
        });
    });
}

/// Leaves a directory as kill -9 does: 16 replicas, each with 2 MiB that is journaled and not synced in a segment.
/// Returns the bytes of all replicas.
fn leave_killed_directory(dir: &Path) -> u64 {
    let log = open(dir, u64::MAX);
    let mut replicas = replicas(&log, 16);
    let batch = batch(BATCH_BYTES);
    for _ in 0..32 {
        replicas.iter_mut().for_each(|replica| append(replica, &batch));
        persist_all(&mut replicas);
    }
    // Nothing is closed: dropping the log leaves the same files as killing the process.
    replicas.iter().map(ReplicaLog::bytes).sum()
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).expect("the directory is created");
    for entry in fs::read_dir(from).expect("the directory is readable") {
        let entry = entry.expect("the directory is readable");
        let target = to.join(entry.file_name());
        if entry.file_type().expect("the entry has a type").is_dir() {
            copy(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), target).expect("the disk is not full");
        }
    }
}

fn recovering(group: &mut BenchmarkGroup<'_, WallTime>) {
    let (kept, copies) = (folder(), folder());
    let bytes = leave_killed_directory(kept.path());
    let dir = copies.path().join("copy");
    group.throughput(Throughput::Bytes(bytes));
    group.sample_size(10);
    group.bench_function("open after kill -9, 32 MiB journaled", |b| {
        b.iter_batched(
            || {
                if dir.exists() {
                    fs::remove_dir_all(&dir).expect("the copy is removable");
                }
                copy(kept.path(), &dir);
            },
            |()| {
                let log = open(&dir, u64::MAX);
                let replicas = replicas(&log, 16);
                assert_eq!(replicas.iter().map(ReplicaLog::bytes).sum::<u64>(), bytes);
            },
            BatchSize::PerIteration,
        );
    });
    group.sample_size(100);
}

fn finding(group: &mut BenchmarkGroup<'_, WallTime>) {
    let folder = folder();
    let log = open(folder.path(), u64::MAX);
    let mut replica = replicas(&log, 1).remove(0);
    let mut small = batch(4 << 10);
    let batches = SEGMENT_BYTES / small.encoded_len() as u64;
    for time in 0..batches {
        small.set_append_time(time.cast_signed());
        append(&mut replica, &small);
    }
    replica.roll().expect("the disk is not full");
    let (reader, start, end) = (replica.reader(), replica.log_start(), replica.log_end());
    let mut times = StdRng::seed_from_u64(3);
    group.throughput(Throughput::Elements(1));
    group.bench_function("find a timestamp in 64 MiB of 4 KiB batches", |b| {
        b.iter(|| {
            let time = (times.next_u64() % batches).cast_signed();
            let found = reader.batch_for_time(time, start, end, usize::MAX).expect("the file is intact");
            assert_eq!(found.expect("every timestamp exists").max_timestamp(), time);
        });
    });
}

/// Benchmarks the operations of a replica on the write path and on the read path.
pub(crate) fn log(c: &mut Criterion) {
    let mut group = c.benchmark_group("log");
    appending(&mut group);
    reading(&mut group);
    finding(&mut group);
    recovering(&mut group);
    group.finish();
}
