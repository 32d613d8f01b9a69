//! One sealed segment on its way to becoming an object: read once from its start, every batch checked. It is read through what the log
//! handed out, so it goes on whatever leaves the disk meanwhile.

use std::{
    collections::VecDeque,
    io,
    path::{Path, PathBuf},
    sync::Arc,
};

use bytes::{Bytes, BytesMut};

use super::footer::{FooterBuilder, epoch_of};
use crate::{
    limits,
    log::SegmentExport,
    model::{LeaderEpoch, Offset, PartitionId},
    record::{Batch, Malformed},
    task,
};

/// Bytes read from the file at once.
const PIECE_BYTES: usize = 1 << 20;

/// A segment of whole batches, all below the high watermark, that changes no more. Clones share it.
#[derive(Clone)]
pub struct SegmentSource {
    segment: Arc<SegmentExport>,
}

impl SegmentSource {
    /// A segment that the log handed out.
    pub fn new(segment: SegmentExport) -> Self {
        Self { segment: Arc::new(segment) }
    }

    /// First offset.
    pub fn base(&self) -> Offset {
        self.segment.info.base
    }

    /// Offset after the last.
    pub fn end(&self) -> Offset {
        self.segment.info.end
    }

    /// Its length as the log knows it.
    pub fn bytes(&self) -> u64 {
        self.segment.info.bytes
    }

    /// When its last batch was written, in milliseconds.
    pub(super) fn written_ms(&self) -> i64 {
        self.segment.info.written_ms
    }

    /// Where it lies, for messages.
    pub fn path(&self) -> &Path {
        &self.segment.path
    }

    /// Epoch and first offset of each leader up to the end, ascending; the first at or below the base.
    fn epochs(&self) -> Vec<(LeaderEpoch, Offset)> {
        self.segment.epochs.iter().collect()
    }

    /// Producer state at the end: opaque here, kept in the footer.
    pub(super) fn producers(&self) -> Bytes {
        self.segment.producers.to_bytes()
    }
}

/// Why a segment file cannot become an object.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// The file cannot be read.
    #[error("segment {} cannot be read: {error}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        error: io::Error,
    },
    /// Its bytes are not what they should be. It is not uploaded.
    #[error("segment {} is damaged at byte {position}: {reason}; it is not uploaded", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Where the batch starts that is wrong.
        position: u64,
        /// What is wrong with it.
        reason: String,
    },
    /// It does not continue what is in the bucket.
    #[error("segment {base}..{end} does not continue the bucket, which ends at {expected}")]
    NotContiguous {
        /// The tiered end.
        expected: Offset,
        /// The source's base.
        base: Offset,
        /// The source's end.
        end: Offset,
    },
}

/// The part of a segment file that is not in the bucket yet, as checked bytes.
pub(super) struct Batches {
    source: SegmentSource,
    epochs: Vec<(LeaderEpoch, Offset)>,
    /// The file's end was met.
    read_whole: bool,
    /// Read from the file and not yet split into batches.
    unchecked: Bytes,
    /// Position in the file of `unchecked`.
    position: u64,
    next: Offset,
    epoch: LeaderEpoch,
    builder: Option<FooterBuilder>,
    from: From,
}

/// What to leave out at the front.
#[derive(Clone, Copy, Debug)]
pub(super) struct From {
    /// Batches that end at or below it are in the bucket, or below the log start.
    pub(super) offset: Offset,
    /// Whether the first batch may begin below `offset`: in an empty manifest.
    pub(super) inside: bool,
    pub(super) partition: PartitionId,
    pub(super) writer_epoch: LeaderEpoch,
}

impl Batches {
    pub(super) fn of(source: &SegmentSource, from: From) -> Result<Self, SourceError> {
        let (expected, base, end) = (from.offset, source.base(), source.end());
        if base > expected || end <= expected {
            return Err(SourceError::NotContiguous { expected, base, end });
        }
        Ok(Self {
            source: source.clone(),
            epochs: source.epochs(),
            read_whole: false,
            unchecked: Bytes::new(),
            position: 0,
            next: base,
            epoch: LeaderEpoch(0),
            builder: None,
            from,
        })
    }

    /// The next checked bytes, whole batches, at most some MiB; `None` at the end, which is then known to be right.
    pub(super) async fn next(&mut self) -> Result<Option<VecDeque<Bytes>>, SourceError> {
        loop {
            let before = self.unchecked.clone();
            let kept = self.take_batches()?;
            if !kept.is_empty() {
                return Ok(Some(kept));
            }
            if before.len() == self.unchecked.len() && !self.read().await? {
                return self.finish().map(|()| None);
            }
        }
    }

    /// The footer's gatherer, once [`Batches::next`] has answered `None`.
    pub(super) fn into_footer(self) -> FooterBuilder {
        self.builder.expect("a segment that ends above the tiered end holds a batch above it")
    }

    /// Offset of the first batch that is kept, once there was one.
    pub(super) fn first(&self) -> Option<Offset> {
        self.builder.as_ref().map(FooterBuilder::base)
    }

    /// Reads on. `false` at the file's end.
    async fn read(&mut self) -> Result<bool, SourceError> {
        if self.read_whole {
            return Ok(false);
        }
        let needed = Batch::framed_len(&self.unchecked).unwrap_or(0);
        let rest = std::mem::take(&mut self.unchecked);
        let at = self.position + rest.len() as u64;
        // One byte more than there should be, to see a file that goes on. A wrong length in a batch allocates no more.
        let left = self.source.bytes().saturating_sub(at).saturating_add(1);
        let most = PIECE_BYTES.max(needed.saturating_sub(rest.len())).min(usize::try_from(left).unwrap_or(usize::MAX));
        let segment = Arc::clone(&self.source.segment);
        let (buffer, read) = task::run_blocking(move || {
            let mut buffer = BytesMut::with_capacity(rest.len() + most);
            buffer.extend_from_slice(&rest);
            buffer.resize(rest.len() + most, 0);
            let read = segment.read_at(&mut buffer[rest.len()..], at);
            buffer.truncate(rest.len() + *read.as_ref().unwrap_or(&0));
            (buffer, read)
        })
        .await;
        let read = read.map_err(|error| SourceError::Io { path: self.source.path().to_owned(), error })?;
        self.unchecked = buffer.freeze();
        self.read_whole = read == 0;
        Ok(read > 0)
    }

    /// Checks and takes the whole batches at the front; answers those to keep.
    fn take_batches(&mut self) -> Result<VecDeque<Bytes>, SourceError> {
        let mut kept = VecDeque::new();
        let (mut run, mut run_bytes) = (self.unchecked.clone(), 0);
        while self.unchecked.len() >= limits::BATCH_HEADER_BYTES {
            match Batch::framed_len(&self.unchecked) {
                Ok(needed) if needed > self.unchecked.len() => break,
                _ => {}
            }
            let batch = Batch::split_from(&mut self.unchecked).map_err(|error| self.malformed(&error))?;
            self.check(&batch)?;
            self.position += batch.encoded_len() as u64;
            if self.keep(&batch)? {
                run_bytes += batch.encoded_len();
            } else {
                run = self.unchecked.clone();
            }
        }
        if run_bytes > 0 {
            kept.push_back(run.split_to(run_bytes));
        }
        Ok(kept)
    }

    /// What the batch's own CRC does not cover: its place and its epoch.
    fn check(&mut self, batch: &Batch) -> Result<(), SourceError> {
        let base = batch.base_offset();
        if base != self.next {
            return Err(self.damaged(format!("the batch starts at offset {base}, {} was expected", self.next)));
        }
        let listed = epoch_of(&self.epochs, base);
        let Some(epoch) = batch.leader_epoch().filter(|epoch| Some(*epoch) == listed && *epoch >= self.epoch) else {
            let found = batch.leader_epoch().map_or("none".to_owned(), |epoch| epoch.to_string());
            let listed = listed.map_or("none".to_owned(), |epoch| epoch.to_string());
            return Err(self.damaged(format!("the batch at {base} has leader epoch {found}, listed is {listed}")));
        };
        self.epoch = epoch;
        self.next = batch.end_offset();
        Ok(())
    }

    fn keep(&mut self, batch: &Batch) -> Result<bool, SourceError> {
        if batch.end_offset() <= self.from.offset {
            return Ok(false);
        }
        if self.builder.is_none() {
            let base = batch.base_offset();
            if base != self.from.offset && !self.from.inside {
                let (expected, end) = (self.from.offset, self.source.end());
                return Err(SourceError::NotContiguous { expected, base, end });
            }
            let (from, bytes, epochs) = (&self.from, self.source.bytes(), self.epochs.clone());
            self.builder = Some(FooterBuilder::new(from.partition, base, bytes, from.writer_epoch, epochs));
        }
        self.builder.as_mut().expect("just made").push(batch);
        Ok(true)
    }

    fn finish(&self) -> Result<(), SourceError> {
        if !self.unchecked.is_empty() {
            let (needed, available) = (Batch::framed_len(&self.unchecked).unwrap_or(61), self.unchecked.len());
            return Err(self.malformed(&Malformed::Truncated { needed, available }));
        }
        let (end, bytes) = (self.source.end(), self.source.bytes());
        if self.next != end || self.position != bytes {
            let reason = format!("it ends at offset {}; it should at {end} with {bytes} bytes", self.next);
            return Err(self.damaged(reason));
        }
        Ok(())
    }

    fn malformed(&self, error: &Malformed) -> SourceError {
        self.damaged(error.to_string())
    }

    fn damaged(&self, reason: String) -> SourceError {
        SourceError::Damaged { path: self.source.path().to_owned(), position: self.position, reason }
    }
}
