//! Memory of a reader's responses: taken before anything is read for one, and given back when it has been sent.

use super::{Gathered, READS, Session, plain};
use crate::{
    broker::budget::ResponseGrant,
    proto::fault::{Fault, Reason},
};

/// Least bytes of a read beside others of the same response, where the response has room for so many.
pub(super) const MIN_READ_BYTES: usize = 1 << 20;

/// Most bytes of batches in a response for which there is little memory.
pub(super) const SMALL_RESPONSE_BYTES: usize = 64 << 10;

/// What the response's own message takes for each partition, at most, beside its batches.
const PARTITION_BYTES: usize = 512;

/// Memory that was taken for a response.
pub(super) struct Granted {
    pub(super) grant: ResponseGrant,
    pub(super) bytes: usize,
    /// Most bytes of batches in it.
    pub(super) max_bytes: usize,
}

impl Session {
    /// Whether something is to be read, or was read, for which there is no memory yet.
    pub(super) fn needs_memory(&self) -> bool {
        self.grant.is_none() && (self.held.is_some() || !self.reading.is_empty() || self.ready.is_marked())
    }

    /// Takes memory for a response before anything is read for it: for what is read, and for the message that is made of it. Records take
    /// as much again. A response is small where others hold too much.
    pub(super) async fn reserve(&mut self, plain: bool) {
        let max_bytes = self.terms.max_bytes;
        let reads = self.places.len().clamp(1, READS);
        let records = if plain { 2 * plain::PLAIN_BYTES } else { 0 };
        let wanted = max_bytes + reads * self.read_bytes(max_bytes).max(self.max_batch_bytes) + records;
        let small = 2 * SMALL_RESPONSE_BYTES.max(self.max_batch_bytes) + records / 16;
        let (grant, bytes) = self.memory.response(wanted, small).await;
        let max_bytes = if bytes == wanted { max_bytes } else { max_bytes.min(SMALL_RESPONSE_BYTES) };
        self.grant = Some(Granted { grant, bytes, max_bytes });
    }

    /// Whether there is memory for what was read. A batch may be larger than all that was expected.
    pub(super) fn has_memory_for(&self, batch_bytes: usize, gathered: &Gathered) -> bool {
        let Some(Granted { bytes, .. }) = self.grant else { return true };
        let needed = 2 * (gathered.bytes + batch_bytes);
        needed <= bytes || self.memory.reserve_more((needed - bytes).min(2 * batch_bytes)).is_ok()
    }

    /// Most bytes of one read where a response has room for `left`.
    pub(super) fn read_bytes(&self, left: usize) -> usize {
        (left / self.places.len().clamp(1, READS)).max(left.min(MIN_READ_BYTES))
    }

    /// The response is made: its memory is given back when it has been sent.
    pub(super) fn on_made(&mut self, batch_bytes: usize, partitions: usize) {
        if let Some(Granted { grant, max_bytes, .. }) = self.grant.take() {
            let under_way = self.reading.len() * self.read_bytes(max_bytes);
            self.memory.made(grant, 2 * batch_bytes + under_way + partitions * PARTITION_BYTES);
        }
    }

    /// Bytes from which on the response is not held back for more: all that it may hold are enough.
    pub(super) fn min_bytes(&self) -> usize {
        self.grant.as_ref().map_or(self.terms.min_bytes, |granted| self.terms.min_bytes.min(granted.max_bytes))
    }
}

pub(super) fn no_response_memory() -> Fault {
    let message = "no memory for the response came free in time: others that were not read yet hold it (limits.response_memory_bytes)";
    Fault::new(Reason::Overloaded, message)
}
