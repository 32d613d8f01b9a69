//! Reads a sealed segment for its upload, from its start, and checks every batch. The segment is read through the
//! handle that the log exported, so the upload continues even if the file is removed.

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
    record::{Batch, MalformedBatch},
    task,
};

/// Size of one read from the file.
const PIECE_BYTES: usize = 1 << 20;

/// A sealed segment of complete batches, all below the high watermark. Clones share it.
#[derive(Clone)]
pub struct SegmentSource {
    segment: Arc<SegmentExport>,
}

impl SegmentSource {
    /// Creates the source for a segment that the log exported.
    pub fn new(segment: SegmentExport) -> Self {
        Self { segment: Arc::new(segment) }
    }

    /// Returns the first offset of the segment.
    pub fn base(&self) -> Offset {
        self.segment.info.base
    }

    /// Returns the offset after the last record of the segment.
    pub fn end(&self) -> Offset {
        self.segment.info.end
    }

    /// Returns the length of the segment in bytes, according to the log.
    pub fn bytes(&self) -> u64 {
        self.segment.info.bytes
    }

    /// Returns the time when the last batch was written, in milliseconds since 1970.
    pub(super) fn written_ms(&self) -> i64 {
        self.segment.info.written_ms
    }

    /// Returns the path of the file, for messages.
    pub fn path(&self) -> &Path {
        &self.segment.path
    }

    /// Returns the epoch and the start offset of each leader up to the end, ascending. The first starts at or below the
    /// base.
    fn epochs(&self) -> Vec<(LeaderEpoch, Offset)> {
        self.segment.epochs.iter().collect()
    }

    /// Returns the producer state at the end. This module does not interpret it; the footer stores it.
    pub(super) fn producers(&self) -> Bytes {
        self.segment.producers.to_bytes()
    }
}

/// Error for a segment file that cannot be uploaded.
#[derive(Debug, thiserror::Error)]
pub enum SegmentSourceError {
    #[error("segment {} cannot be read: {error}", path.display())]
    Io {
        path: PathBuf,
        /// Error of the operating system.
        error: io::Error,
    },
    /// The content of the file is corrupt. The segment is not uploaded.
    #[error(
        "segment {} is corrupt at byte {position}, so it and later segments are not uploaded: {reason}; check the \
         disk, and see \"A broker's disk fails\" in docs/operations.md",
        path.display()
    )]
    Corrupt {
        path: PathBuf,
        /// Position of the corrupt batch in the file.
        position: u64,
        /// Check that failed.
        reason: String,
    },
    /// The segment does not continue the history in the object store.
    #[error(
        "records {base} up to, but not including, {end} do not continue this partition's records in the object store, \
         which end before offset {expected}: they stay on this disk; if etcd was restored from a backup, see \
         \"Restoring etcd\" in docs/operations.md, otherwise report this as a bug, with the broker's log"
    )]
    NotContiguous {
        expected: Offset,
        /// Base offset of the segment, or of the first batch to upload.
        base: Offset,
        /// End offset of the segment.
        end: Offset,
    },
}

/// Reader of the part of a segment file that is not in the object store yet. Returns checked bytes.
pub(super) struct SegmentBatches {
    source: SegmentSource,
    epochs: Vec<(LeaderEpoch, Offset)>,
    /// True after a read has reached the end of the file.
    at_file_end: bool,
    /// Bytes that were read from the file and not yet split into batches.
    unchecked: Bytes,
    /// Position of `unchecked` in the file.
    position: u64,
    /// Expected base offset of the next batch.
    next: Offset,
    /// Leader epoch of the last batch.
    epoch: LeaderEpoch,
    /// Builder of the footer; `None` before the first kept batch.
    builder: Option<FooterBuilder>,
    skipped: SkippedPrefix,
}

/// The first part of a segment, which an upload skips, and the identity of the uploaded rest.
#[derive(Clone, Copy, Debug)]
pub(super) struct SkippedPrefix {
    /// Batches that end at or below this offset are skipped: they are in the object store or below the log start.
    pub(super) offset: Offset,
    /// True if the first kept batch may begin below `offset`, which holds for an empty manifest.
    pub(super) inside: bool,
    pub(super) partition: PartitionId,
    pub(super) writer_epoch: LeaderEpoch,
}

impl SegmentBatches {
    /// Creates a reader. Fails if the segment does not contain the offset at which the history continues.
    pub(super) fn of(source: &SegmentSource, skipped: SkippedPrefix) -> Result<Self, SegmentSourceError> {
        let (expected, base, end) = (skipped.offset, source.base(), source.end());
        if base > expected || end <= expected {
            return Err(SegmentSourceError::NotContiguous { expected, base, end });
        }
        Ok(Self {
            source: source.clone(),
            epochs: source.epochs(),
            at_file_end: false,
            unchecked: Bytes::new(),
            position: 0,
            next: base,
            epoch: LeaderEpoch(0),
            builder: None,
            skipped,
        })
    }

    /// Returns the next checked bytes: the batches that are complete after a read of [`PIECE_BYTES`], or after a longer
    /// read for a larger batch. Returns `None` at the end, after the complete segment has passed the checks.
    pub(super) async fn next(&mut self) -> Result<Option<VecDeque<Bytes>>, SegmentSourceError> {
        loop {
            let unchecked_bytes = self.unchecked.len();
            let kept = self.take_batches()?;
            if !kept.is_empty() {
                return Ok(Some(kept));
            }
            if unchecked_bytes == self.unchecked.len() && !self.read().await? {
                return self.finish().map(|()| None);
            }
        }
    }

    /// Returns the builder of the footer, after [`SegmentBatches::next`] has returned `None`.
    pub(super) fn into_footer_builder(self) -> FooterBuilder {
        self.builder.expect("a segment that ends above the tiered end holds a batch above it")
    }

    /// Returns the offset of the first kept batch; `None` before `next` has returned a batch.
    pub(super) fn first(&self) -> Option<Offset> {
        self.builder.as_ref().map(FooterBuilder::base)
    }

    /// Reads the next piece of the file. Returns false at the end of the file.
    async fn read(&mut self) -> Result<bool, SegmentSourceError> {
        if self.at_file_end {
            return Ok(false);
        }
        let needed = Batch::framed_len(&self.unchecked).unwrap_or(0);
        let rest = std::mem::take(&mut self.unchecked);
        let position = self.position + rest.len() as u64;
        // Reads at most one byte more than the segment has according to the log, to detect a file that is too long. So
        // a corrupt batch length cannot cause a larger allocation.
        let remaining = self.source.bytes().saturating_sub(position).saturating_add(1);
        let remaining = usize::try_from(remaining).unwrap_or(usize::MAX);
        let max_bytes = PIECE_BYTES.max(needed.saturating_sub(rest.len())).min(remaining);
        let segment = Arc::clone(&self.source.segment);
        let (buffer, read) = task::run_blocking(move || {
            let mut buffer = BytesMut::with_capacity(rest.len() + max_bytes);
            buffer.extend_from_slice(&rest);
            buffer.resize(rest.len() + max_bytes, 0);
            let read = segment.read_at(&mut buffer[rest.len()..], position);
            buffer.truncate(rest.len() + *read.as_ref().unwrap_or(&0));
            (buffer, read)
        })
        .await;
        let read = read.map_err(|error| SegmentSourceError::Io { path: self.source.path().to_owned(), error })?;
        self.unchecked = buffer.freeze();
        self.at_file_end = read == 0;
        Ok(read > 0)
    }

    /// Checks and removes the complete batches at the front of `unchecked`. Returns the batches to keep.
    fn take_batches(&mut self) -> Result<VecDeque<Bytes>, SegmentSourceError> {
        let mut kept = VecDeque::new();
        // The kept batches are consecutive, because only the front of the segment is skipped.
        let (mut from_first_kept, mut kept_bytes) = (self.unchecked.clone(), 0);
        while self.unchecked.len() >= limits::BATCH_HEADER_BYTES {
            match Batch::framed_len(&self.unchecked) {
                Ok(needed) if needed > self.unchecked.len() => break,
                _ => {}
            }
            let batch = Batch::split_from(&mut self.unchecked).map_err(|error| self.malformed_error(&error))?;
            self.check(&batch)?;
            self.position += batch.encoded_len() as u64;
            if self.keep(&batch)? {
                kept_bytes += batch.encoded_len();
            } else {
                from_first_kept = self.unchecked.clone();
            }
        }
        if kept_bytes > 0 {
            kept.push_back(from_first_kept.split_to(kept_bytes));
        }
        Ok(kept)
    }

    /// Checks the fields that the batch's CRC does not cover: the base offset and the leader epoch. Then expects the
    /// next batch at the end of this one.
    fn check(&mut self, batch: &Batch) -> Result<(), SegmentSourceError> {
        let base = batch.base_offset();
        if base != self.next {
            return Err(self.corrupt_error(format!("the batch starts at offset {base}, not at {}", self.next)));
        }
        let listed = epoch_of(&self.epochs, base);
        let Some(epoch) = batch.leader_epoch().filter(|epoch| Some(*epoch) == listed && *epoch >= self.epoch) else {
            let found = batch.leader_epoch().map_or("none".to_owned(), |epoch| epoch.to_string());
            let listed = listed.map_or("none".to_owned(), |epoch| epoch.to_string());
            return Err(self.corrupt_error(format!("the batch at {base} has leader epoch {found}, not {listed}")));
        };
        self.epoch = epoch;
        self.next = batch.end_offset();
        Ok(())
    }

    /// Adds a batch to the footer and returns true. Returns false for a batch of the skipped prefix, which is not
    /// added. Fails if the first kept batch does not start at `SkippedPrefix::offset`, unless `SkippedPrefix::inside`
    /// is set.
    fn keep(&mut self, batch: &Batch) -> Result<bool, SegmentSourceError> {
        if batch.end_offset() <= self.skipped.offset {
            return Ok(false);
        }
        if self.builder.is_none() {
            let base = batch.base_offset();
            if base != self.skipped.offset && !self.skipped.inside {
                let (expected, end) = (self.skipped.offset, self.source.end());
                return Err(SegmentSourceError::NotContiguous { expected, base, end });
            }
            let (skipped, bytes, epochs) = (&self.skipped, self.source.bytes(), self.epochs.clone());
            self.builder = Some(FooterBuilder::new(skipped.partition, base, bytes, skipped.writer_epoch, epochs));
        }
        self.builder.as_mut().expect("the builder exists").push(batch);
        Ok(true)
    }

    /// Checks at the end of the file that no bytes remain, and that the end offset and the length are those of the log.
    fn finish(&self) -> Result<(), SegmentSourceError> {
        if !self.unchecked.is_empty() {
            let (needed, available) = (Batch::framed_len(&self.unchecked).unwrap_or(61), self.unchecked.len());
            return Err(self.malformed_error(&MalformedBatch::Truncated { needed, available }));
        }
        let (end, bytes) = (self.source.end(), self.source.bytes());
        if self.next != end || self.position != bytes {
            let reason = format!("the segment ends at offset {}, not at {end} with {bytes} bytes", self.next);
            return Err(self.corrupt_error(reason));
        }
        Ok(())
    }

    fn malformed_error(&self, error: &MalformedBatch) -> SegmentSourceError {
        self.corrupt_error(error.to_string())
    }

    fn corrupt_error(&self, reason: String) -> SegmentSourceError {
        SegmentSourceError::Corrupt { path: self.source.path().to_owned(), position: self.position, reason }
    }
}
