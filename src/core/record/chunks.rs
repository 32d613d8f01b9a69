//! Batches from the chunks of bytes that a consumer or a follower received.

use bytes::{Buf as _, Bytes, BytesMut};

use super::{Batch, HEADER_BYTES, MalformedBatch, layout};

/// Iterator over the batches of consecutive chunks. A chunk can end at any byte. An end between two batches, or between
/// a header and its records, costs no copy. A batch that is split at another byte is copied.
///
/// The iterator ends after the first error.
#[derive(Debug)]
pub struct ChunkedBatches {
    chunks: std::vec::IntoIter<Bytes>,
    /// Remaining bytes of the current chunk.
    rest: Bytes,
}

impl ChunkedBatches {
    /// Iterates over the batches of `chunks`.
    pub fn new(chunks: Vec<Bytes>) -> Self {
        Self { chunks: chunks.into_iter(), rest: Bytes::new() }
    }

    /// Returns the next batch; `None` after the last chunk.
    fn next_batch(&mut self) -> Result<Option<Batch>, MalformedBatch> {
        while self.rest.is_empty() {
            match self.chunks.next() {
                None => return Ok(None),
                Some(chunk) => self.rest = chunk,
            }
        }
        if self.rest.len() >= layout::LENGTH_OVERHEAD && Batch::framed_len(&self.rest)? <= self.rest.len() {
            return Batch::split_from(&mut self.rest).map(Some);
        }
        let Ok(header) = <[u8; HEADER_BYTES]>::try_from(&self.rest[..]) else {
            return self.next_split_batch().map(Some);
        };
        let records = Batch::framed_len(&header)? - HEADER_BYTES;
        let Some(mut next) = self.chunks.next() else {
            return Err(MalformedBatch::Truncated { needed: HEADER_BYTES + records, available: HEADER_BYTES });
        };
        if next.len() < records {
            // The records are split too. Header and next chunk are joined, and `next_split_batch` starts from them.
            let mut joined = BytesMut::with_capacity(HEADER_BYTES + next.len());
            joined.extend_from_slice(&header);
            joined.extend_from_slice(&next);
            self.rest = joined.freeze();
            return self.next_split_batch().map(Some);
        }
        let batch = Batch::from_parts(header, next.split_to(records))?;
        self.rest = next;
        Ok(Some(batch))
    }

    /// Copies one batch from the rest of this chunk and from the chunks after it. The buffer grows only by bytes that
    /// were received.
    fn next_split_batch(&mut self) -> Result<Batch, MalformedBatch> {
        let mut batch = BytesMut::from(&self.rest[..]);
        self.rest = Bytes::new();
        loop {
            let has_length = batch.len() >= layout::LENGTH_OVERHEAD;
            let needed = if has_length { Batch::framed_len(&batch)? } else { layout::LENGTH_OVERHEAD };
            if has_length && needed <= batch.len() {
                return Batch::split_from(&mut batch.freeze());
            }
            if self.rest.is_empty() {
                let Some(chunk) = self.chunks.next() else {
                    let needed = if has_length { needed } else { HEADER_BYTES };
                    return Err(MalformedBatch::Truncated { needed, available: batch.len() });
                };
                self.rest = chunk;
            }
            let copied = self.rest.len().min(needed - batch.len());
            batch.extend_from_slice(&self.rest[..copied]);
            self.rest.advance(copied);
        }
    }
}

impl Iterator for ChunkedBatches {
    type Item = Result<Batch, MalformedBatch>;

    fn next(&mut self) -> Option<Self::Item> {
        let batch = self.next_batch();
        if batch.is_err() {
            (self.chunks, self.rest) = (Vec::new().into_iter(), Bytes::new());
        }
        batch.transpose()
    }
}
