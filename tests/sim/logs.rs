//! What the brokers' disks hold, read past the brokers: the segment files, batch by batch.
//!
//! This is the judge's own eye: it sees what the page cache shows, which is what a process would find after signal 9.

use std::{collections::BTreeMap, path::Path};

use bytes::Bytes;
use strandline::{
    log::{Disk as _, SimDisk},
    model::{LeaderEpoch, Offset, PartitionId},
    record::Batch,
};

/// One batch as it lies there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Held {
    pub(crate) end: Offset,
    epoch: LeaderEpoch,
    bytes: Bytes,
}

impl Held {
    /// The payloads of its records.
    pub(crate) fn payloads(&self) -> Vec<u64> {
        let batch = Batch::parse(self.bytes.clone()).unwrap();
        let records = batch.records().unwrap().map(|record| payload(&record.unwrap().1.value.unwrap()));
        records.collect()
    }
}

/// What a record's value begins with: who it is.
pub(crate) fn payload(value: &[u8]) -> u64 {
    u64::from_be_bytes(value[..8].try_into().unwrap())
}

/// One replica's log.
#[derive(Clone, Debug, Default)]
pub(crate) struct Replica {
    /// By base offsets.
    pub(crate) batches: BTreeMap<Offset, Held>,
    /// Where the next one goes.
    pub(crate) end: Offset,
}

/// What a disk holds of a partition. What it says of itself must fit together.
pub(crate) fn replica(disk: &SimDisk, id: PartitionId) -> Replica {
    let dir = Path::new("/data").join(id.topic.to_string()).join(id.number.to_string());
    let mut files: Vec<_> = disk.files().into_iter().map(|(path, _)| path).collect();
    files.retain(|path| path.parent() == Some(&dir) && path.extension().is_some_and(|is| is == "log"));
    files.sort();
    let mut replica = Replica::default();
    for file in files {
        let base: u64 = file.file_stem().unwrap().to_str().unwrap().parse().unwrap();
        let base = Offset::new(base).unwrap();
        let mut left = Bytes::from(disk.read(&file).unwrap());
        // A segment that was begun when the disk was full may be left over, with nothing in it; and what was evicted and could not be
        // removed counts for nothing, until the next start removes it.
        if replica.batches.is_empty() || !left.is_empty() {
            assert!(base >= replica.end, "{}: the one before ends at {}", file.display(), replica.end);
            if base > replica.end {
                replica = Replica { end: base, ..Replica::default() };
            }
        }
        while !left.is_empty() {
            let batch = Batch::split_from(&mut left).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
            let one = Held { end: batch.end_offset(), epoch: batch.leader_epoch().unwrap(), bytes: batch.to_bytes() };
            assert_eq!(batch.base_offset(), replica.end, "{}: offsets follow each other", file.display());
            let last = replica.batches.last_key_value();
            assert!(last.is_none_or(|(_, last)| one.epoch >= last.epoch), "{}: epochs never fall", file.display());
            replica.end = one.end;
            replica.batches.insert(batch.base_offset(), one);
        }
    }
    replica
}

/// Where two logs contradict each other: a batch that both got from one leader and that differs, or anything below such a batch.
pub(crate) fn contradiction(one: &Replica, other: &Replica) -> Option<String> {
    let (one, other) = (&one.batches, &other.batches);
    let shared = |base: &Offset| other.get(base).filter(|held| held.epoch == one[base].epoch);
    let last = one.keys().rev().find(|base| shared(base).is_some())?;
    let from = one.keys().next()?.max(other.keys().next()?);
    let (mine, theirs) = (one.range(from..=last), other.range(from..=last));
    for ((base, mine), (at, theirs)) in mine.zip(theirs) {
        if base != at {
            return Some(format!("one has a batch at {base}, the other at {at}"));
        }
        if mine != theirs {
            return Some(format!("epochs {} and {} wrote different batches at {base}", mine.epoch, theirs.epoch));
        }
    }
    None
}
