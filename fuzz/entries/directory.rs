//! Fuzz entry of a data directory with hostile files: opened, read, appended to, closed and opened again.
//!
//! The input is a sequence of files: one byte selects the file, two bytes are its length, then follows the content. No
//! input causes a panic. Reads return complete batches only, readable records stay readable, and an accepted append is
//! there after the next start.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use strandline::{
    log::{DataDir, DataDirIdentity, Disk, LogOptions, LogReader, ReplicaLog, SimDisk},
    model::{BrokerId, Compression, LeaderEpoch, Offset, TopicId},
    record::{Batch, BatchBuilder},
    telemetry::Metrics,
};

/// Directory id in `strandline.json`. Frames and checkpoints of the input are changed to carry it.
const DIRECTORY: [u8; 16] = [0xd1; 16];
const IDENTITY: &str =
    r#"{"format":1,"cluster":"test","broker":1,"directory_id":"d1d1d1d1-d1d1-d1d1-d1d1-d1d1d1d1d1d1"}"#;
const TOPIC: [u8; 16] = [7; 16];
const DATA: &str = "/data";
/// Base offsets of the segments.
const BASES: [u64; 4] = [0, 6, 12, 18];
const EXTENSIONS: [&str; 4] = ["log", "index", "timeindex", "snapshot"];
const BLOCK: usize = 4096;

/// Opens the files of the input as a directory. Returns true if a replica accepted an append.
pub(crate) fn data_directory(input: &[u8]) -> bool {
    let disk = SimDisk::new();
    // With a bounded capacity, a write at a huge position fills the disk instead of the fuzzer's memory.
    disk.set_capacity(Some(8 << 20));
    lay_out(&disk, input);
    let Ok(log) = open(&disk) else { return false };
    let mut kept = Vec::new();
    for id in log.partitions() {
        let Ok(mut replica) = log.open_replica(id, Offset::ZERO) else { continue };
        let before = read_all(&replica.reader());
        if append(&log, &mut replica) {
            kept.push((id, replica.log_end(), before));
        }
    }
    let closed = log.close();
    drop(log);
    disk.kill();
    if closed.is_err() {
        return !kept.is_empty();
    }
    let log = open(&disk).unwrap_or_else(|error| panic!("the closed directory is refused: {error}"));
    let any = !kept.is_empty();
    for (id, end, before) in kept {
        let replica = log.open_replica(id, Offset::ZERO);
        let replica = replica.unwrap_or_else(|error| panic!("the closed replica is refused: {error}"));
        assert_eq!(replica.log_end(), end, "the log end differs after a clean stop");
        let after = read_all(&replica.reader());
        assert!(after.starts_with(&before), "readable records are missing or differ after a restart");
    }
    any
}

fn open(disk: &SimDisk) -> Result<DataDir, strandline::log::DataDirError> {
    let options = LogOptions {
        journal_bytes: 1 << 20,
        journal_dir: None,
        // Most inputs have no journal. Their directories must be opened as well.
        accept_journal_loss: true,
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
    };
    let identity = DataDirIdentity { cluster: "test".to_owned(), broker: BrokerId(1) };
    DataDir::open(Arc::new(disk.clone()), Path::new(DATA), &identity, options)
}

/// Returns all readable bytes in order, up to the first corruption. Lookups of times must not panic either.
fn read_all(reader: &LogReader) -> Vec<u8> {
    let (mut next, end) = (reader.local_start(), reader.log_end());
    for time in [i64::MIN, 0, i64::MAX] {
        if let Ok(Some(batch)) = reader.batch_for_time(time, reader.log_start(), end, usize::MAX) {
            assert!(batch.base_offset() < end && batch.max_timestamp() >= time);
        }
    }
    let mut all = Vec::new();
    while next < end {
        let Ok(read) = reader.read_disk(next, end, 10_000) else { break };
        let mut bytes = Bytes::from(read.chunks.concat());
        assert!(bytes.len() == read.bytes && !bytes.is_empty(), "a read below the limit returns a batch");
        all.extend_from_slice(&bytes);
        while !bytes.is_empty() {
            let batch = Batch::split_from(&mut bytes).expect("a read returns complete batches");
            assert_eq!(batch.base_offset(), next, "batches are contiguous");
            next = batch.end_offset();
        }
        assert_eq!(next, read.next);
    }
    all
}

/// Appends one batch and waits for the journal. Returns false if the log rejects it, as a log with a missing file may.
fn append(log: &DataDir, replica: &mut ReplicaLog) -> bool {
    for info in replica.sealed() {
        if let Ok(export) = replica.export(info.base) {
            let (mut position, mut buffer) = (0, vec![0; 10_000]);
            while let Ok(bytes @ 1..) = export.read_at(&mut buffer, position) {
                position += bytes as u64;
            }
        }
    }
    let end = replica.log_end();
    if end.get() + 1 >= Offset::MAX.get() {
        return false;
    }
    let epoch = replica.epochs().last().map_or(LeaderEpoch(0), |(epoch, _)| epoch);
    let mut builder = BatchBuilder::new(Compression::None);
    builder.push(1, None, Some(b"value"), &[]).expect("the record is below the maximum size");
    let mut batch = builder.finish(None).expect("the batch has a record");
    batch.set_offset_and_epoch(end, epoch);
    if replica.append(&[batch]).is_err() {
        return false;
    }
    let (sender, receiver) = std::sync::mpsc::sync_channel(1);
    replica.persist(Box::new(move |result| drop(sender.send(result))));
    log.sync_step();
    while log.journal_step() {}
    let persisted = receiver.try_recv().expect("the journal sends a result");
    if let Ok(end) = persisted {
        assert_eq!(end, replica.log_end());
    }
    persisted.is_ok()
}

/// Returns the path of the file that a byte selects.
fn path(kind: u8) -> PathBuf {
    let data = Path::new(DATA);
    let replica = data.join(TopicId::from_bytes(TOPIC).to_string()).join("0");
    match kind % 20 {
        0 => data.join("strandline.json"),
        1 => data.join("checkpoint"),
        slot @ (2 | 3) => data.join("journal").join(format!("{:05}.journal", slot - 2)),
        file => {
            let base = BASES[usize::from((file - 4) / 4)];
            replica.join(format!("{base:020}.{}", EXTENSIONS[usize::from((file - 4) % 4)]))
        }
    }
}

fn lay_out(disk: &SimDisk, mut input: &[u8]) {
    let write = |kind: u8, content: &[u8]| {
        let path = path(kind);
        let created = disk.create_dir_all(path.parent().expect("every file has a parent folder"));
        created.and_then(|()| disk.write(&path, content).map(drop)).expect("the disk is not full");
    };
    write(0, IDENTITY.as_bytes());
    while let Some((&[kind, high, low], rest)) = input.split_first_chunk::<3>() {
        let (content, rest) = rest.split_at(usize::from(u16::from_be_bytes([high, low])).min(rest.len()));
        let mut content = content.to_vec();
        correct_checksums(kind, &mut content);
        write(kind, &content);
        input = rest;
    }
}

/// Corrects checksums and the directory id, so that the code behind them is reached. Kinds from 0x80 on stay as given.
fn correct_checksums(kind: u8, content: &mut Vec<u8>) {
    if kind >= 0x80 {
        return;
    }
    match kind % 20 {
        0 => {}
        1 => {
            if let Some(directory) = content.get_mut(8..24) {
                directory.copy_from_slice(&DIRECTORY);
            }
            *content = super::sealed(content);
        }
        2 | 3 => {
            for at in (0..content.len()).step_by(BLOCK) {
                if content[at..].starts_with(b"STRLJRN1")
                    && let Some(directory) = content.get_mut(at + 12..at + 28)
                {
                    directory.copy_from_slice(&DIRECTORY);
                    super::log::renew_frame(&mut content[at..]);
                }
            }
        }
        file if (file - 4) % 4 == 0 => {
            let mut rest = content.as_mut_slice();
            while let Some(length) = Batch::framed_len(rest).ok().filter(|length| *length <= rest.len()) {
                let (batch, after) = rest.split_at_mut(length);
                super::record::renew_crc(batch);
                rest = after;
            }
        }
        _ => *content = super::sealed(content),
    }
}
