//! The checkpoint: a description of every replica of a data directory, in one file that is replaced atomically. With it
//! a start need not read the segments.

use std::{io, path::Path, sync::Arc};

use bytes::{Buf, BufMut, BytesMut};
use uuid::Uuid;

use super::{epochs::EpochHistory, producers::ProducerTable, segment::SegmentInfo};
use crate::{
    log::{disk::Disk, format::entry::MAX_NUMBER},
    model::{Offset, PartitionId, TopicId},
};

const MAGIC: &[u8; 8] = b"STRLCKP3";
pub(in crate::log) const NAME: &str = "checkpoint";

/// State of a data directory at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(in crate::log) struct Checkpoint {
    /// Sequence of the frame at which replay starts.
    pub(in crate::log) first_frame: u64,
    /// Largest generation assigned so far.
    pub(in crate::log) generation: u64,
    /// Work that a start must do before `replicas` describes the files.
    pub(in crate::log) kind: CheckpointKind,
    pub(in crate::log) replicas: Vec<ReplicaCheckpoint>,
}

/// Work that a start must do before the replicas of a checkpoint describe the files.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(in crate::log) enum CheckpointKind {
    /// Replay starts at `first_frame`, which was written before the checkpoint. A journal without that frame belongs to
    /// another directory, or was lost.
    #[default]
    Running = 0,
    /// Written at the end of a clean shutdown: no work remains, and the journal may be removed.
    CleanShutdown = 1,
    /// All journal entries are synced in the segments, so the journal may be removed. The segments must be read from
    /// their recovery points on.
    Replayed = 2,
}

impl CheckpointKind {
    fn from_byte(byte: u8) -> Option<Self> {
        [Self::Running, Self::CleanShutdown, Self::Replayed].into_iter().find(|kind| *kind as u8 == byte)
    }
}

/// Description of one replica, as of its recovery point.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::log) struct ReplicaCheckpoint {
    pub(in crate::log) id: PartitionId,
    /// Number that grows with each creation, truncation, reset and deletion. 0 if the record was made from the names of
    /// files, without a checkpoint, and the replica was not scanned since.
    pub(in crate::log) generation: u64,
    pub(in crate::log) log_start: Offset,
    /// Persisted end: all earlier data was durable, in a segment or in the journal.
    pub(in crate::log) persisted: Offset,
    /// Segments, at least one; the last ends at the recovery point.
    pub(in crate::log) segments: Vec<SegmentInfo>,
    /// Epoch history at the recovery point.
    pub(in crate::log) epochs: EpochHistory,
    /// Producer state at the recovery point.
    pub(in crate::log) producers: Arc<ProducerTable>,
    /// Reason why the replica is not served: a start found that durable data, or the snapshot at the local start, is
    /// missing or corrupt. Kept until the replica is deleted.
    pub(in crate::log) refusal: Option<String>,
}

impl ReplicaCheckpoint {
    /// Returns the description of an empty replica that starts at `start`.
    pub(in crate::log) fn empty(id: PartitionId, generation: u64, start: Offset, now_ms: i64) -> Self {
        Self {
            id,
            generation,
            log_start: start,
            persisted: start,
            segments: vec![SegmentInfo::empty(start, now_ms)],
            epochs: EpochHistory::new(),
            producers: Arc::default(),
            refusal: None,
        }
    }

    /// Returns true if the record was made without a checkpoint and the replica was not scanned since. The persisted
    /// end is then unknown, so a torn tail cannot be distinguished from a loss.
    pub(in crate::log) fn needs_full_scan(&self) -> bool {
        self.generation == 0
    }

    fn encode(&self, out: &mut BytesMut) {
        out.put_slice(self.id.topic.as_bytes());
        out.put_u32(self.id.number);
        out.put_u64(self.generation);
        out.put_u64(self.log_start.get());
        out.put_u64(self.persisted.get());
        out.put_u32(u32::try_from(self.segments.len()).unwrap_or(u32::MAX));
        for segment in &self.segments {
            segment.encode(out);
        }
        self.epochs.encode(out);
        self.producers.encode(out);
        let refusal = self.refusal.as_deref().unwrap_or_default();
        out.put_u32(u32::try_from(refusal.len()).unwrap_or(u32::MAX));
        out.put_slice(refusal.as_bytes());
    }

    /// Decodes the output of [`Self::encode`]; `None` if bytes are missing, or if no replica can have this description.
    fn decode(from: &mut impl Buf) -> Option<Self> {
        let mut topic = [0; 16];
        from.try_copy_to_slice(&mut topic).ok()?;
        let id = PartitionId::new(TopicId::from_bytes(topic), from.try_get_u32().ok()?);
        let generation = from.try_get_u64().ok()?;
        let log_start = Offset::new(from.try_get_u64().ok()?)?;
        let persisted = Offset::new(from.try_get_u64().ok()?)?;
        let mut segments = Vec::new();
        for _ in 0..from.try_get_u32().ok()? {
            segments.push(SegmentInfo::decode(from)?);
        }
        let is_contiguous = segments.windows(2).all(|pair| pair[0].end == pair[1].base);
        let epochs = EpochHistory::decode(from)?;
        let producers = Arc::new(ProducerTable::decode(from)?);
        let refusal_len = usize::try_from(from.try_get_u32().ok()?).ok()?;
        if from.remaining() < refusal_len {
            return None;
        }
        let refusal = String::from_utf8(from.copy_to_bytes(refusal_len).to_vec()).ok()?;
        let refusal = (!refusal.is_empty()).then_some(refusal);
        let end = segments.last()?.end;
        // The epoch history is that at the end of the last segment, so no epoch may start above that end.
        let is_epoch_valid = epochs.last().is_none_or(|(_, start)| start <= end);
        let is_valid = is_contiguous && is_epoch_valid && generation <= MAX_NUMBER;
        is_valid.then_some(Self { id, generation, log_start, persisted, segments, epochs, producers, refusal })
    }
}

impl Checkpoint {
    pub(in crate::log) fn encode(&self, directory: Uuid) -> BytesMut {
        let mut out = BytesMut::with_capacity(64 + self.replicas.len() * 192);
        out.put_slice(MAGIC);
        out.put_slice(directory.as_bytes());
        out.put_u64(self.first_frame);
        out.put_u64(self.generation);
        out.put_u8(self.kind as u8);
        out.put_u32(u32::try_from(self.replicas.len()).unwrap_or(u32::MAX));
        for replica in &self.replicas {
            replica.encode(&mut out);
        }
        let crc = crc32c::crc32c(&out);
        out.put_u32(crc);
        out
    }

    /// Decodes the checkpoint file of the data directory `directory`; `None` if the file is corrupt or belongs to
    /// another directory.
    pub(in crate::log) fn decode(file: &[u8], directory: Uuid) -> Option<Self> {
        let (mut content, crc) = file.split_at_checked(file.len().checked_sub(4)?)?;
        if crc32c::crc32c(content).to_be_bytes() != crc || content.get(..8)? != MAGIC {
            return None;
        }
        content.advance(8);
        if content.get(..16)? != directory.as_bytes() {
            return None;
        }
        content.advance(16);
        let first_frame = content.try_get_u64().ok()?;
        let generation = content.try_get_u64().ok()?;
        if first_frame > MAX_NUMBER || generation > MAX_NUMBER {
            return None;
        }
        let kind = CheckpointKind::from_byte(content.try_get_u8().ok()?)?;
        let mut replicas = Vec::new();
        for _ in 0..content.try_get_u32().ok()? {
            replicas.push(ReplicaCheckpoint::decode(&mut content)?);
        }
        content.is_empty().then_some(Self { first_frame, generation, kind, replicas })
    }

    /// Returns the data directory id in the checkpoint file of `dir`; `None` if the file is missing, unreadable or
    /// corrupt.
    pub(in crate::log) fn owner(disk: &dyn Disk, dir: &Path) -> Option<Uuid> {
        let file = disk.read(&dir.join(NAME)).ok()?;
        let id = Uuid::from_slice(file.get(8..24)?).ok()?;
        Self::decode(&file, id).map(|_| id)
    }

    /// Reads the checkpoint of the data directory `directory`; `None` if it is missing, corrupt, or that of another
    /// directory.
    pub(in crate::log) fn read(disk: &dyn Disk, dir: &Path, directory: Uuid) -> io::Result<Option<Self>> {
        match disk.read(&dir.join(NAME)) {
            Ok(file) => Ok(Self::decode(&file, directory)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Replaces the checkpoint, durably.
    pub(in crate::log) fn write(&self, disk: &dyn Disk, dir: &Path, directory: Uuid) -> io::Result<()> {
        disk.replace(&dir.join(NAME), &self.encode(directory))
    }
}
