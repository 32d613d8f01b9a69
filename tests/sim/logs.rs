//! Content of the brokers' segment files, batch by batch, read from the disks without the brokers.
//!
//! The checker reads the page cache: the content that the next process finds if signal 9 ends the broker. Checks are
//! frequent and changes are small, so the content of a file is cached until the file is rewritten.

use std::{
    cell::RefCell,
    collections::BTreeMap,
    ffi::OsStr,
    hash::{DefaultHasher, Hasher as _},
    path::{Path, PathBuf},
    rc::Rc,
};

use bytes::Bytes;
use strandline::{
    log::{Disk as _, OpenMode, SimDisk, SyncStamp},
    model::{LeaderEpoch, Offset, PartitionId},
    record::Batch,
};

/// One batch on the disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct StoredBatch {
    pub(crate) base: Offset,
    pub(crate) end: Offset,
    epoch: LeaderEpoch,
    /// Hash of all bytes of the batch.
    digest: u64,
    /// Payloads of the records.
    pub(crate) payloads: Vec<u64>,
}

impl StoredBatch {
    fn of(batch: &Batch) -> Self {
        let mut digest = DefaultHasher::new();
        digest.write(&batch.to_bytes());
        Self {
            base: batch.base_offset(),
            end: batch.end_offset(),
            epoch: batch.leader_epoch().unwrap(),
            digest: digest.finish(),
            payloads: batch.records().unwrap().map(|record| payload(&record.unwrap().1.value.unwrap())).collect(),
        }
    }
}

/// Returns the payload of a record: the first eight bytes of its value, which identify the record.
pub(crate) fn payload(value: &[u8]) -> u64 {
    u64::from_be_bytes(value[..8].try_into().unwrap())
}

/// Log of one replica, as its segment files contain it.
#[derive(Debug, Default)]
pub(crate) struct DiskReplica {
    segments: Vec<Rc<Segment>>,
    /// Log end.
    pub(crate) end: Offset,
}

impl DiskReplica {
    /// Returns all batches in order.
    pub(crate) fn batches(&self) -> impl DoubleEndedIterator<Item = &StoredBatch> {
        self.segments.iter().flat_map(|segment| &segment.batches)
    }

    /// Returns the end of the segments that are certainly sealed: the base of the last segment with records. That
    /// segment may be sealed too, if an empty one follows it.
    pub(crate) fn sealed_end(&self) -> Offset {
        self.segments.last().map_or(self.end, |last| last.base)
    }

    /// Returns the batches from `from` on. `from` is the base of a batch or lies below all batches.
    fn batches_from(&self, from: Offset) -> impl Iterator<Item = &StoredBatch> {
        let first = self.segments.partition_point(|segment| segment.end <= from);
        let batches = self.segments[first..].iter().flat_map(|segment| &segment.batches);
        batches.skip_while(move |held| held.base < from)
    }
}

/// Parsed content of one segment file.
#[derive(Clone, Debug)]
struct Segment {
    base: Offset,
    end: Offset,
    batches: Vec<StoredBatch>,
    stamp: SyncStamp,
}

/// Logs on one disk.
pub(crate) struct DiskLogs {
    disk: SimDisk,
    segments: RefCell<BTreeMap<PathBuf, Rc<Segment>>>,
}

impl DiskLogs {
    pub(crate) fn of(disk: &SimDisk) -> Self {
        Self { disk: disk.clone(), segments: RefCell::default() }
    }

    /// Reads the log of a partition's replica. Panics if a file is corrupt, or if the files contradict each other.
    pub(crate) fn replica(&self, id: PartitionId) -> DiskReplica {
        let dir = folder(id);
        let (mut replica, mut begins, mut has_log) = (DiskReplica::default(), Offset::ZERO, false);
        for entry in self.disk.list(&dir).unwrap_or_default() {
            let file = dir.join(entry.name);
            match file.extension().and_then(OsStr::to_str) {
                Some("log") => has_log = true,
                // If a start replayed the reset of a log, the log has only a snapshot file until its first append.
                Some("snapshot") => {
                    begins = base_of(&file);
                    continue;
                }
                _ => continue,
            }
            let segment = self.segment(&file);
            let Segment { base, end, .. } = *segment;
            // A roll on a full disk may leave an empty segment, which counts only if it is the first. Segments before a
            // gap are evicted ones that could not be removed. These do not count either: the next start removes them.
            if replica.segments.is_empty() || base < end {
                assert!(base >= replica.end, "{}: the previous segment ends at {}", file.display(), replica.end);
                if base > replica.end {
                    replica = DiskReplica { end: base, ..DiskReplica::default() };
                }
            }
            if let (Some(last), Some(first)) = (replica.batches().next_back(), segment.batches.first()) {
                assert!(first.epoch >= last.epoch, "{}: the epochs decrease", file.display());
            }
            if base < end {
                replica.end = end;
                replica.segments.push(segment);
            }
        }
        if !has_log {
            replica.end = begins;
        }
        replica
    }

    /// Parses one segment file. Reads only the bytes that were appended since the last call, unless the file was
    /// rewritten.
    fn segment(&self, file: &Path) -> Rc<Segment> {
        let stamp = self.disk.stamp(file).unwrap();
        let mut segments = self.segments.borrow_mut();
        let mut parsed = segments.remove(file).filter(|parsed| parsed.stamp.is_before(stamp)).unwrap_or_else(|| {
            let base = base_of(file);
            Rc::new(Segment { base, end: base, batches: Vec::new(), stamp: stamp.of_nothing() })
        });
        if parsed.stamp != stamp {
            let segment = Rc::make_mut(&mut parsed);
            let mut appended = vec![0; usize::try_from(stamp.len - segment.stamp.len).unwrap()];
            self.disk.open(file, OpenMode::Read).unwrap().read_at(&mut appended, segment.stamp.len).unwrap();
            segment.add_batches(Bytes::from(appended), file);
            segment.stamp = stamp;
        }
        segments.insert(file.to_owned(), Rc::clone(&parsed));
        parsed
    }
}

impl Segment {
    /// Parses appended batches and adds them. Panics if they are corrupt or do not continue the segment.
    fn add_batches(&mut self, mut appended: Bytes, file: &Path) {
        while !appended.is_empty() {
            let batch = Batch::split_from(&mut appended).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
            let held = StoredBatch::of(&batch);
            assert_eq!(held.base, self.end, "{}: the offsets are not contiguous", file.display());
            let last = self.batches.last();
            assert!(last.is_none_or(|last| held.epoch >= last.epoch), "{}: the epochs decrease", file.display());
            self.end = held.end;
            self.batches.push(held);
        }
    }
}

/// Returns the end of the records in a log's segments that certainly survive a power loss.
pub(crate) fn durable_end(disk: &SimDisk, id: PartitionId) -> Offset {
    let mut end = Offset::ZERO;
    for (file, bytes) in disk.durable(&folder(id)) {
        if file.extension().is_none_or(|extension| extension != "log") {
            continue;
        }
        end = base_of(&file);
        let mut bytes = Bytes::from(bytes);
        // The checksum of a batch does not cover its offset. A failed sync may have left an offset of zero, if it lost
        // only the page with the first bytes of the batch.
        while let Ok(batch) = Batch::split_from(&mut bytes)
            && batch.base_offset() == end
        {
            end = batch.end_offset();
        }
    }
    end
}

fn folder(id: PartitionId) -> PathBuf {
    Path::new("/data").join(id.topic.to_string()).join(id.number.to_string())
}

fn base_of(file: &Path) -> Offset {
    let base: u64 = file.file_stem().unwrap().to_str().unwrap().parse().unwrap();
    Offset::new(base).unwrap()
}

/// Returns a description of a contradiction between two logs; `None` if there is none. Up to the last batch that both
/// logs have with the same offset and epoch, all their batches must be equal.
pub(crate) fn contradiction(one: &DiskReplica, other: &DiskReplica) -> Option<String> {
    let first = |replica: &DiskReplica| replica.batches().next().map(|held| held.base);
    let from = first(one)?.max(first(other)?);
    let theirs: BTreeMap<_, _> = other.batches_from(from).map(|held| (held.base, held)).collect();
    let shared = |held: &StoredBatch| theirs.get(&held.base).is_some_and(|other| other.epoch == held.epoch);
    let last = one.batches().rev().take_while(|held| held.base >= from).find(|held| shared(held))?.base;
    for (mine, theirs) in one.batches_from(from).take_while(|held| held.base <= last).zip(theirs.values()) {
        if mine.base != theirs.base {
            return Some(format!("one log has a batch at {}, the other log at {}", mine.base, theirs.base));
        }
        if mine != *theirs {
            return Some(format!(
                "epochs {} and {} wrote different batches at {}",
                mine.epoch, theirs.epoch, mine.base
            ));
        }
    }
    None
}
