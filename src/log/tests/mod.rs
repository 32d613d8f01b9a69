//! Behaviour of a complete data directory, on both disks.

mod corruption;
mod crashes;
mod deletion;
mod directory;
mod failures;
mod formats;
mod incarnations;
mod lost;
mod producers;
mod reading;
mod start;
mod write_out;

use std::{
    path::Path,
    sync::{
        Arc,
        mpsc::{Receiver, sync_channel},
    },
    time::Duration,
};

use bytes::Bytes;

use super::*;
use crate::{
    model::{BrokerId, LeaderEpoch, Offset, PartitionId, TopicId},
    record::Batch,
    task::lock::Mutex,
    telemetry::Metrics,
};

fn at(offset: u64) -> Offset {
    Offset::new(offset).unwrap()
}

fn partition(number: u32) -> PartitionId {
    PartitionId::new(TopicId::from_bytes([7; 16]), number)
}

fn identity() -> DataDirIdentity {
    DataDirIdentity { cluster: "test".to_owned(), broker: BrokerId(1) }
}

/// Returns options without threads and with small limits: a short test writes many frames and files.
fn small() -> LogOptions {
    LogOptions {
        journal_bytes: 1 << 20,
        journal_dir: None,
        accept_journal_loss: false,
        max_frame_bytes: 16 << 10,
        max_journaled_bytes: 24 << 10,
        tail_bytes: 64 << 10,
        producer_bytes: 1 << 20,
        sync_bytes: 1 << 20,
        sync_after: Duration::from_secs(1),
        reserve_bytes: 0,
        metrics: Metrics::new(),
        step_mode: true,
        sim_hook: None,
    }
}

fn open(disk: &SimDisk) -> DataDir {
    DataDir::open(Arc::new(disk.clone()), Path::new("/data"), &identity(), small()).unwrap()
}

/// Creates a batch as a leader has stamped it: `count` records of random bytes. The batch has `bytes` bytes, at least
/// 61.
fn batch(base: u64, count: u32, epoch: u32, timestamp: i64, bytes: usize) -> Batch {
    produced(base, count, epoch, timestamp, bytes, (-1, -1, -1))
}

/// Creates a batch as [`batch`] does, of a producer with this id, epoch and base sequence.
fn produced(base: u64, count: u32, epoch: u32, timestamp: i64, bytes: usize, producer: (i64, i16, i32)) -> Batch {
    // The fields of a RecordBatch of version 2, at their offsets.
    let mut raw = vec![0; 61.max(bytes)];
    let length = i32::try_from(raw.len() - 12).unwrap();
    raw[8..12].copy_from_slice(&length.to_be_bytes());
    raw[16] = 2;
    raw[23..27].copy_from_slice(&(count - 1).to_be_bytes());
    raw[27..35].copy_from_slice(&timestamp.to_be_bytes());
    raw[35..43].copy_from_slice(&timestamp.to_be_bytes());
    raw[43..51].copy_from_slice(&producer.0.to_be_bytes());
    raw[51..53].copy_from_slice(&producer.1.to_be_bytes());
    raw[53..57].copy_from_slice(&producer.2.to_be_bytes());
    raw[57..61].copy_from_slice(&count.to_be_bytes());
    let mut state = base.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ u64::from(epoch);
    for byte in &mut raw[61..] {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        *byte = state.to_be_bytes()[0];
    }
    let crc = crc32c::crc32c(&raw[21..]);
    raw[17..21].copy_from_slice(&crc.to_be_bytes());
    let mut batch = Batch::parse(Bytes::from(raw)).unwrap();
    batch.set_offset_and_epoch(at(base), LeaderEpoch(epoch));
    batch
}

/// Channel that receives the result of a persist call.
type PersistReceiver = Receiver<Result<Offset, PersistError>>;

/// Starts a persist call.
fn persist(replica: &mut ReplicaLog) -> PersistReceiver {
    let (sender, receiver) = sync_channel(1);
    replica.persist(Box::new(move |result| drop(sender.send(result))));
    receiver
}

/// Appends batches and does the work of the threads until the batches are durable. Returns the persisted end.
fn write(log: &DataDir, replica: &mut ReplicaLog, batches: &[Batch]) -> Offset {
    replica.append(batches).unwrap();
    let result = persist(replica);
    settle(log);
    result.try_recv().unwrap().unwrap()
}

/// Does the work of the threads until all pending persist calls are complete.
fn settle(log: &DataDir) {
    log.sync_step();
    while log.journal_step() {}
}

/// Returns the bytes of a read, after checking their number.
fn join(read: &ReadBatches) -> Vec<u8> {
    let bytes = read.chunks.concat();
    assert_eq!(bytes.len(), read.bytes);
    bytes
}

/// Reads all batches from `from` to the log end, from files.
fn read_all(reader: &LogReader, from: Offset) -> Result<Vec<Batch>, LogReadError> {
    let (mut batches, mut next) = (Vec::new(), from);
    while next < reader.log_end() {
        let read = reader.read_disk(next, reader.log_end(), 10_000)?;
        let mut bytes = Bytes::from(join(&read));
        assert!(!bytes.is_empty(), "a read below the bound returns a batch");
        while !bytes.is_empty() {
            batches.push(Batch::split_from(&mut bytes).unwrap());
        }
        next = read.next;
    }
    Ok(batches)
}

/// Collected results of persist calls, from any thread.
#[derive(Clone, Default)]
struct PersistResults(Arc<Mutex<Vec<Result<Offset, PersistError>>>>);

impl PersistResults {
    /// Returns a callback that adds its result.
    fn done(&self) -> PersistCallback {
        let results = self.0.clone();
        Box::new(move |result| results.lock().push(result))
    }

    fn take(&self) -> Vec<Result<Offset, PersistError>> {
        std::mem::take(&mut *self.0.lock())
    }
}
