//! Batches out of pieces of memory: what a reader was sent, and what a follower was.

use bytes::{Buf as _, Bytes, BytesMut};

use super::{Batch, HEADER_BYTES, Malformed, layout};

/// The batches of chunks that may be cut anywhere. Cuts between batches, and between a header and its records, cost no copy;
/// a batch that is cut elsewhere is copied together once.
///
/// Ends with the first error.
#[derive(Debug)]
pub struct Chunks {
    chunks: std::vec::IntoIter<Bytes>,
    rest: Bytes,
}

impl Chunks {
    /// Whole batches, one after the other.
    pub fn new(chunks: Vec<Bytes>) -> Self {
        Self { chunks: chunks.into_iter(), rest: Bytes::new() }
    }

    fn batch(&mut self) -> Result<Option<Batch>, Malformed> {
        while self.rest.is_empty() {
            match self.chunks.next() {
                None => return Ok(None),
                Some(chunk) => self.rest = chunk,
            }
        }
        if self.rest.len() >= layout::LENGTH_OVERHEAD && Batch::framed_len(&self.rest)? <= self.rest.len() {
            return Batch::split_from(&mut self.rest).map(Some);
        }
        let Ok(head) = <[u8; HEADER_BYTES]>::try_from(&self.rest[..]) else { return self.joined().map(Some) };
        let records = Batch::framed_len(&head)? - HEADER_BYTES;
        let Some(mut next) = self.chunks.next() else {
            return Err(Malformed::Truncated { needed: HEADER_BYTES + records, available: HEADER_BYTES });
        };
        if next.len() < records {
            // Cut once more: the next chunk's bytes are looked at again.
            let mut both = BytesMut::with_capacity(HEADER_BYTES + next.len());
            both.extend_from_slice(&head);
            both.extend_from_slice(&next);
            self.rest = both.freeze();
            return self.joined().map(Some);
        }
        let batch = Batch::from_halves(head, next.split_to(records))?;
        self.rest = next;
        Ok(Some(batch))
    }

    /// Copies one batch together out of what is left of this chunk and of those after it. Room is made for bytes that are there.
    fn joined(&mut self) -> Result<Batch, Malformed> {
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
                    return Err(Malformed::Truncated { needed, available: batch.len() });
                };
                self.rest = chunk;
            }
            let taken = self.rest.len().min(needed - batch.len());
            batch.extend_from_slice(&self.rest[..taken]);
            self.rest.advance(taken);
        }
    }
}

impl Iterator for Chunks {
    type Item = Result<Batch, Malformed>;

    fn next(&mut self) -> Option<Self::Item> {
        let batch = self.batch();
        if batch.is_err() {
            (self.chunks, self.rest) = (Vec::new().into_iter(), Bytes::new());
        }
        batch.transpose()
    }
}
