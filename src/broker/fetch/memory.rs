//! Memory of a reader's responses: taken before anything is read for one, and given back when it has been sent.

use futures::stream::FuturesUnordered;

use super::{Gathered, READS, Session, plain};
use crate::{
    broker::budget::{Grant, ResponseGrant},
    partition::{Fetched, ReadError},
};

/// Least bytes of a read beside others of the same response, where the response has room for so many.
pub(super) const MIN_READ_BYTES: usize = 1 << 20;

/// Most bytes of batches in a response for which there is little memory.
pub(super) const SMALL_RESPONSE_BYTES: usize = 64 << 10;

/// Most bytes that the response's own message takes for each partition, beside its batches.
const PARTITION_BYTES: usize = 512;

/// Memory that was taken for a response.
pub(super) struct Granted {
    grant: ResponseGrant,
    /// For batches, and for the message that is made of them.
    bytes: usize,
    /// For plain records, and for the message that is made of them.
    pub(super) records: usize,
    /// Most bytes of batches in it.
    pub(super) max_bytes: usize,
    /// Most bytes of a batch that one read may bring.
    pub(super) batch_bytes: usize,
    /// There is little memory: one read at a time.
    is_small: bool,
    /// `bytes` and `records` as they were before the response was held back.
    released: Option<(usize, usize)>,
    /// The memory that was given back is used up: nothing more is read.
    is_used_up: bool,
}

impl Granted {
    /// Takes the memory of one read out, which holds it until it has ended: it may go on when the response is made, or its call has gone.
    pub(super) fn begin_read(&mut self) -> Grant {
        self.grant.split(self.batch_bytes)
    }

    /// Puts it back. A read that began for an earlier response has taken it out of that one's.
    pub(super) fn end_read(&mut self, charge: Grant) {
        self.grant.merge(charge);
        self.grant.shrink(self.bytes + self.records);
    }

    /// All of it, for work that may go on when its call has gone.
    pub(super) fn split(&mut self) -> Grant {
        self.grant.split(self.bytes + self.records)
    }
}

impl Session {
    /// Whether something is to be read, or was read, for which there is no memory yet.
    pub(super) fn needs_memory(&self) -> bool {
        self.grant.is_none() && (self.held.is_some() || !self.reading.is_empty() || self.ready.is_marked())
    }

    /// Takes memory for a response before anything is read for it: for what is read, and for the message that is made of it. Records take
    /// as much again. A response is small where others hold too much: what one batch needs is known when there was not enough for it.
    pub(super) async fn reserve(&mut self, plain: bool) {
        let max_bytes = self.terms.max_bytes;
        let reads = self.places.len().clamp(1, READS);
        let record_bytes = self.record_bytes;
        let records = |room: usize| if plain { 2 * (room + record_bytes) } else { 0 };
        let batch_bytes = self.expected_batch_bytes.max(self.max_batch_bytes);
        let bytes = max_bytes + reads * self.read_bytes(max_bytes).max(batch_bytes);
        let (bytes, small) = (bytes.max(2 * self.max_batch_bytes), 2 * (SMALL_RESPONSE_BYTES + self.max_batch_bytes));
        let wanted = bytes + records(plain::PLAIN_BYTES);
        let least = small + records(plain::SMALL_PLAIN_BYTES);
        let (grant, granted) = match self.memory.try_response(wanted, least) {
            Some(granted) => granted,
            None => {
                // Reads that have ended, and wait here, would keep the memory that this waits for.
                self.drop_reads();
                self.memory.response(wanted, least).await
            }
        };
        let (released, is_used_up, is_small) = (None, false, granted != wanted);
        self.grant = Some(if is_small {
            let (records, max_bytes) = (records(plain::SMALL_PLAIN_BYTES), max_bytes.min(SMALL_RESPONSE_BYTES));
            let batch_bytes = SMALL_RESPONSE_BYTES.max(self.max_batch_bytes);
            Granted { grant, bytes: small, records, max_bytes, batch_bytes, is_small, released, is_used_up }
        } else {
            let (records, batch_bytes) = (records(plain::PLAIN_BYTES), self.read_bytes(max_bytes).max(batch_bytes));
            Granted { grant, bytes, records, max_bytes, batch_bytes, is_small, released, is_used_up }
        });
    }

    /// True if one more read may begin.
    pub(super) fn may_begin_read(&self) -> bool {
        let Some(Granted { is_small, released: None, .. }) = self.grant else { return false };
        self.reading.len() < if is_small { 1 } else { READS }
    }

    /// True if partitions that become ready are looked at before the reads that are under way have ended.
    pub(super) fn awaits_marks(&self) -> bool {
        match self.grant {
            Some(Granted { is_used_up: true, .. }) => false,
            Some(Granted { is_small: true, .. }) => self.reading.is_empty(),
            _ => self.reading.len() < READS,
        }
    }

    /// The response is held back: gives back what neither its batches nor the reads under way need.
    pub(super) fn release_unused(&mut self, gathered: &Gathered) {
        let Some(granted) = &self.grant else { return };
        if self.ready.is_marked() {
            return;
        }
        let bytes = granted.bytes.min(2 * (gathered.bytes + self.reading.len() * granted.batch_bytes));
        let records = granted.records.min(2 * (plain::SMALL_PLAIN_BYTES + self.record_bytes));
        let before = (granted.bytes, granted.records);
        if before != (bytes, records)
            && let Some(granted) = &mut self.grant
        {
            granted.released.get_or_insert(before);
            (granted.bytes, granted.records) = (bytes, records);
            granted.grant.shrink((bytes + records).saturating_sub(self.reading.len() * granted.batch_bytes));
        }
    }

    /// Takes again what was given back, where more is to be read. Where there is not as much, the response has all that it will have.
    pub(super) fn restore(&mut self, gathered: &mut Gathered) {
        if self.ready.is_marked() && !self.restore_now() {
            gathered.full |= gathered.bytes > 0;
        }
    }

    /// Takes again what was given back; whether the response has it.
    pub(super) fn restore_now(&mut self) -> bool {
        let Some(granted) = &mut self.grant else { return true };
        let Some((bytes, records)) = granted.released else { return true };
        let under_way = self.reading.len() * granted.batch_bytes;
        granted.is_used_up = !self.memory.grow(&mut granted.grant, (bytes + records).saturating_sub(under_way));
        if !granted.is_used_up {
            (granted.bytes, granted.records, granted.released) = (bytes, records, None);
        }
        !granted.is_used_up
    }

    /// Reads again from where the request began, with memory for a first record of `record_bytes`.
    pub(super) fn read_again(&mut self, record_bytes: usize, gathered: Gathered) {
        self.record_bytes = record_bytes;
        (self.grant, self.held, self.reading) = (None, None, FuturesUnordered::new());
        let refused = gathered.partitions.into_iter().zip(gathered.places).filter(|(_, place)| place.is_none());
        self.refused.extend(refused.map(|(refused, _)| refused));
        for (index, place) in self.places.iter_mut().enumerate() {
            place.reader = Some(place.served.reader().clone());
            (place.position, place.reading, place.again) = (place.from, false, false);
            self.ready.mark(index);
        }
    }

    /// Bytes of the batches that a read found, or would have found, where there is no memory for them.
    pub(super) fn lacks_memory_for(
        &self,
        outcome: &Result<Option<Fetched>, ReadError>,
        gathered: &Gathered,
    ) -> Option<usize> {
        match outcome {
            Ok(Some(fetched)) if !self.has_memory_for(fetched.bytes, gathered) => Some(fetched.bytes),
            Err(ReadError::BatchTooLarge { bytes }) => Some(*bytes),
            _ => None,
        }
    }

    /// Reads a partition again when there is memory for a batch of `batch_bytes`. Where the response has nothing yet, it gives back what it
    /// took, and the reads under way begin again with it.
    pub(super) fn read_later(&mut self, index: usize, batch_bytes: usize, gathered: &mut Gathered) {
        // Larger than needed: batches that grow byte by byte would begin the reads again and again.
        self.max_batch_bytes = self.max_batch_bytes.max(batch_bytes.next_power_of_two());
        self.places[index].reading = false;
        self.ready.mark(index);
        gathered.full = gathered.bytes > 0;
        if gathered.full {
            return;
        }
        self.grant = None;
        self.drop_reads();
    }

    /// Drops the reads that are under way, which take their memory with them, and reads these partitions again.
    pub(super) fn drop_reads(&mut self) {
        if let Some(granted) = &mut self.grant
            && !self.reading.is_empty()
        {
            granted.released.get_or_insert((granted.bytes, granted.records));
            granted.bytes = granted.bytes.saturating_sub(self.reading.len() * granted.batch_bytes);
        }
        self.reading = FuturesUnordered::new();
        let held = self.held.as_ref().map(|(index, _)| *index);
        for (index, place) in self.places.iter_mut().enumerate() {
            if place.reading && held != Some(index) {
                place.reading = false;
                // Others that have something new again and again would keep it waiting.
                self.ready.put_back(index);
            }
        }
    }

    /// Whether there is memory for what was read. A batch may be larger than all that was expected.
    fn has_memory_for(&self, batch_bytes: usize, gathered: &Gathered) -> bool {
        let Some(Granted { bytes, .. }) = self.grant else { return true };
        let needed = 2 * (gathered.bytes + batch_bytes);
        needed <= bytes || self.memory.reserve_more((needed - bytes).min(2 * batch_bytes)).is_ok()
    }

    /// Most bytes of one read where a response has room for `left`.
    pub(super) fn read_bytes(&self, left: usize) -> usize {
        (left / self.places.len().clamp(1, READS)).max(left.min(MIN_READ_BYTES))
    }

    /// The response is made: its memory is given back when it has been sent. Reads that are under way have their own, and what is held for
    /// the next response has some of this one.
    pub(super) fn on_made(&mut self, batch_bytes: usize, partitions: usize) {
        if let Some(granted) = self.grant.take() {
            let held = match &self.held {
                Some((_, Ok(Some(fetched)))) => fetched.bytes,
                _ => 0,
            };
            self.memory.made(granted.grant, 2 * batch_bytes + held + partitions * PARTITION_BYTES);
        }
    }

    /// Bytes from which on the response is not held back for more: all that it may hold are enough.
    pub(super) fn min_bytes(&self) -> usize {
        self.grant.as_ref().map_or(self.terms.min_bytes, |granted| self.terms.min_bytes.min(granted.max_bytes))
    }
}
