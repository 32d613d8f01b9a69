//! A flight: the batches of one partition that the task has taken, from first sending to last answer. Pure: it decides
//! what is sent again, in what order and under which sequence; the task carries it out.
//!
//! # The rules
//!
//! 1. At most `window` batches are taken, counted from the oldest that is not settled: those behind it that are acknowledged already
//!    count as well. A broker remembers the last `window` that it appended (`limits::MAX_BATCHES_PER_PRODUCER`; 16 where its memory
//!    for producers is used up), so that it knows a repeated one whichever it is.
//! 2. When one fails and may be repeated, nothing more is sent until every batch under way has its answer or has lost
//!    it. Then all that were not appended go out again, in their first order and with their first sequences. Those
//!    behind a failed batch are refused by the broker as out of order, or for the reason of the failed one: that is expected.
//! 3. A batch that is given up leaves a gap in the sequence. If it was surely not appended, and no try of those behind
//!    it can still be on its way, they move up. Otherwise they go on under a new producer id; those of them that may
//!    have been appended, or may still be, are given up too, because no broker could recognise their repetition.
//! 4. A broker that does not know the producer any more, or that misses something before the first batch under way,
//!    has lost state: the same as in 3.
//! 5. Without idempotence one batch is under way at a time, so that order holds; a lost answer is repeated and may
//!    double a batch. With `acks=0` nothing that may have been sent is ever repeated.

use std::{collections::VecDeque, sync::Arc};

use tokio::time::Instant;

use super::{
    completion::Completion,
    lane::{Body, Sealed},
};
use crate::{
    proto::fault::{Fault, Reason},
    record::{Batch, ProducerStamp},
};

/// Who writes: the id that a broker gave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Identity {
    pub(super) id: i64,
    pub(super) epoch: i16,
}

/// How much a lost answer may be repaired.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Guarantee {
    /// Once, in order.
    Idempotent,
    /// In order, perhaps twice.
    AtLeastOnce,
    /// At most once.
    AtMostOnce,
}

#[derive(Debug)]
struct Entry {
    /// Not there while the batch was never sent.
    batch: Option<Batch>,
    body: Option<Body>,
    /// How many were taken before it.
    place: u64,
    sequence: i32,
    count: u32,
    completion: Arc<Completion>,
    permits: u32,
    deadline: Instant,
    /// The try that is under way.
    sent: Option<Sent>,
    /// An answer was lost: the broker may have appended it.
    maybe_appended: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Sent {
    stream: u64,
    correlation: u64,
    /// The sequence that it went out under; the entry's may have changed since.
    sequence: i32,
}

/// A batch that needs no more work.
#[derive(Debug)]
pub(super) struct Done {
    pub(super) completion: Arc<Completion>,
    pub(super) permits: u32,
    pub(super) count: u32,
}

/// A batch given up, and why.
#[derive(Debug)]
pub(super) struct GivenUp {
    pub(super) done: Done,
    pub(super) why: Why,
}

/// Why a batch was given up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Why {
    Refused(Fault),
    Expired { maybe_appended: bool },
    Unknown,
    Unbuildable(crate::record::Unbuildable),
}

/// What an answer means.
#[derive(Debug)]
pub(super) enum Verdict {
    /// Acknowledged.
    Done(Done),
    /// Will be sent again; the leader may be elsewhere.
    Again,
    /// These are given up.
    GivenUp(Vec<GivenUp>),
    /// An answer to a try that is not waited for any more.
    Stale,
}

/// What the task should do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// Send this entry.
    Send(usize),
    /// Everything taken is under way and there is room: take another batch.
    Take,
    /// Nothing before an answer.
    Wait,
    /// Nothing before [`Flight::resume`], which the task calls when the pause is over.
    Resume,
    /// Ask a broker for a new id, then call [`Flight::identify`].
    Identify,
}

#[derive(Debug)]
pub(super) struct Flight {
    guarantee: Guarantee,
    window: usize,
    identity: Option<Identity>,
    next_sequence: i32,
    /// Batches taken so far.
    taken: u64,
    entries: VecDeque<Entry>,
    /// Something failed: nothing is sent until all answers are in.
    draining: bool,
    /// The sequence has a gap that only a new id can pass.
    reidentify: bool,
}

impl Flight {
    pub(super) fn new(guarantee: Guarantee, window: usize, identity: Option<Identity>) -> Self {
        let window = if guarantee == Guarantee::AtLeastOnce { 1 } else { window };
        Self {
            guarantee,
            window,
            identity,
            next_sequence: 0,
            taken: 0,
            entries: VecDeque::new(),
            draining: false,
            reidentify: false,
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    pub(super) fn under_way(&self) -> usize {
        self.entries.iter().filter(|entry| entry.sent.is_some()).count()
    }

    pub(super) fn next(&self) -> Next {
        if self.draining {
            return match (self.under_way(), self.reidentify) {
                (0, true) => Next::Identify,
                (0, false) => Next::Resume,
                _ => Next::Wait,
            };
        }
        match self.entries.iter().position(|entry| entry.sent.is_none()) {
            Some(index) => Next::Send(index),
            None if self.has_room() => Next::Take,
            None => Next::Wait,
        }
    }

    /// Whether one more leaves the oldest that is not settled among the last `window`.
    fn has_room(&self) -> bool {
        self.entries.front().is_none_or(|oldest| self.taken - oldest.place < self.window as u64)
    }

    pub(super) fn take(&mut self, sealed: Sealed) {
        let sequence = self.next_sequence;
        self.next_sequence = after(sequence, sealed.count);
        self.entries.push_back(Entry {
            batch: None,
            body: Some(sealed.body),
            place: self.taken,
            sequence,
            count: sealed.count,
            completion: sealed.completion,
            permits: sealed.permits,
            deadline: sealed.deadline,
            sent: None,
            maybe_appended: false,
        });
        self.taken += 1;
    }

    /// The batch of an entry, which goes out now.
    pub(super) fn send(&mut self, index: usize, stream: u64, correlation: u64) -> Result<Batch, GivenUp> {
        let stamp = self.stamp(self.entries[index].sequence);
        let entry = &mut self.entries[index];
        if let Some(body) = entry.body.take() {
            match body.stamped(stamp) {
                Ok(batch) => entry.batch = Some(batch),
                Err(error) => {
                    let entry = self.remove(index);
                    self.close_gap(index, &entry);
                    return Err(entry.given_up(Why::Unbuildable(error)));
                }
            }
        }
        let batch = entry.batch.as_mut().expect("made above or before");
        if batch.producer() != stamp {
            batch.set_producer(stamp);
        }
        entry.sent = Some(Sent { stream, correlation, sequence: entry.sequence });
        Ok(batch.clone())
    }

    /// An answer came.
    pub(super) fn answered(&mut self, stream: u64, correlation: u64, answer: Result<(), Fault>) -> Verdict {
        let this = |sent: &Sent| sent.stream == stream && sent.correlation == correlation;
        let found = self.entries.iter().position(|entry| entry.sent.as_ref().is_some_and(this));
        let Some(index) = found else { return Verdict::Stale };
        let fault = match answer {
            Ok(()) => return Verdict::Done(self.remove(index).done()),
            Err(fault) => fault,
        };
        if self.repeatable(index, &fault) {
            self.reidentify |= self.entries[index].come_back(outcome_unknown(fault.reason));
            self.draining = true;
            return Verdict::Again;
        }
        if fault.reason == Reason::ProducerFenced && self.guarantee == Guarantee::Idempotent {
            return Verdict::GivenUp(
                self.entries.drain(..).map(|entry| entry.given_up(Why::Refused(fault.clone()))).collect(),
            );
        }
        let entry = self.remove(index);
        self.close_gap(index, &entry);
        Verdict::GivenUp(vec![entry.given_up(Why::Refused(fault))])
    }

    fn repeatable(&mut self, index: usize, fault: &Fault) -> bool {
        match fault.reason {
            Reason::OutOfOrderSequence | Reason::UnknownProducer if self.guarantee == Guarantee::Idempotent => {
                // Behind another one it is that one's failure, and while draining it may have gone out under a
                // sequence that has changed since: it is sent again. Else the broker has lost what came before.
                self.reidentify |= index == 0 && !self.draining;
                true
            }
            reason if self.guarantee == Guarantee::AtMostOnce => fault.retryable && !outcome_unknown(reason),
            _ => fault.retryable,
        }
    }

    /// A stream ended. `delivered`: the broker may have seen what was under way on it.
    pub(super) fn lost(&mut self, stream: u64, delivered: bool) -> Vec<GivenUp> {
        let mut given_up = Vec::new();
        let lost = |entry: &Entry| entry.sent.is_some_and(|sent| sent.stream == stream);
        if !self.entries.iter().any(lost) {
            return given_up;
        }
        self.draining = true;
        if delivered && self.guarantee == Guarantee::AtMostOnce {
            let (gone, kept) = self.entries.drain(..).partition::<VecDeque<_>, _>(lost);
            self.entries = kept;
            given_up.extend(gone.into_iter().map(|entry| entry.given_up(Why::Unknown)));
            return given_up;
        }
        for entry in self.entries.iter_mut().filter(|entry| lost(entry)) {
            self.reidentify |= entry.come_back(delivered);
        }
        given_up
    }

    /// Gives up what is past its delivery timeout. What is under way waits for its stream to be given up first.
    pub(super) fn expire(&mut self, now: Instant) -> Vec<GivenUp> {
        let mut given_up = Vec::new();
        while self.entries.front().is_some_and(|entry| entry.deadline <= now && entry.sent.is_none()) {
            let entry = self.remove(0);
            self.close_gap(0, &entry);
            let maybe_appended = entry.maybe_appended;
            given_up.push(entry.given_up(Why::Expired { maybe_appended }));
        }
        given_up
    }

    /// When the oldest batch expires, and the stream that it is under way on.
    pub(super) fn deadline(&self) -> Option<(Instant, Option<u64>)> {
        let entry = self.entries.front()?;
        Some((entry.deadline, entry.sent.map(|sent| sent.stream)))
    }

    /// The pause after a failure is over.
    pub(super) fn resume(&mut self) {
        debug_assert_eq!(self.next(), Next::Resume, "answers are out, or a new id is needed");
        self.draining = false;
    }

    /// A new id: what was surely not appended goes on under it, what may have been is given up.
    pub(super) fn identify(&mut self, identity: Identity) -> Vec<GivenUp> {
        debug_assert_eq!(self.under_way(), 0, "a new id while answers are out");
        self.identity = Some(identity);
        self.reidentify = false;
        let (unsure, kept) = self.entries.drain(..).partition::<VecDeque<_>, _>(|entry| entry.maybe_appended);
        self.entries = kept;
        self.number_from(0, 0);
        self.draining = false;
        unsure.into_iter().map(|entry| entry.given_up(Why::Unknown)).collect()
    }

    /// Everything there is, given up by a producer that ends.
    pub(super) fn abandon(&mut self) -> Vec<Done> {
        self.entries.drain(..).map(Entry::done).collect()
    }

    pub(super) fn waiting(&self) -> impl Iterator<Item = &Arc<Completion>> {
        self.entries.iter().map(|entry| &entry.completion)
    }

    fn stamp(&self, base_sequence: i32) -> Option<ProducerStamp> {
        let identity = self.identity.filter(|_| self.guarantee == Guarantee::Idempotent)?;
        Some(ProducerStamp { id: identity.id, epoch: identity.epoch, base_sequence })
    }

    fn remove(&mut self, index: usize) -> Entry {
        self.entries.remove(index).expect("the index is of an entry")
    }

    /// Rule 3: the batch that was at `index` was given up.
    fn close_gap(&mut self, index: usize, gone: &Entry) {
        if self.guarantee != Guarantee::Idempotent {
            return;
        }
        let on_the_way = self.entries.iter().skip(index).any(|entry| entry.maybe_appended);
        if gone.maybe_appended || on_the_way {
            // Even with nothing behind it: the next batch must not take the sequence of one that may be there.
            self.draining = true;
            self.reidentify = true;
        } else {
            // What is behind and under way will be refused as out of order, and comes back under its new sequence.
            self.draining |= self.under_way() > 0;
            self.number_from(index, gone.sequence);
        }
    }

    /// Gives the entries from `index` on dense sequences.
    fn number_from(&mut self, index: usize, mut sequence: i32) {
        for entry in self.entries.iter_mut().skip(index) {
            entry.sequence = sequence;
            sequence = after(sequence, entry.count);
        }
        self.next_sequence = sequence;
    }
}

impl Entry {
    /// The try under way is over without an acknowledgement. `unknown`: it may have been appended, or may still be.
    /// True when it went out under a sequence that is another batch's now: only a new id keeps the two apart.
    fn come_back(&mut self, unknown: bool) -> bool {
        let sent = self.sent.take();
        self.maybe_appended |= unknown;
        unknown && sent.is_some_and(|sent| sent.sequence != self.sequence)
    }

    fn done(self) -> Done {
        Done { completion: self.completion, permits: self.permits, count: self.count }
    }

    fn given_up(self, why: Why) -> GivenUp {
        GivenUp { done: self.done(), why }
    }
}

/// The sequence `count` records on: after 2^31 - 1 comes 0 (KIP-98).
fn after(sequence: i32, count: u32) -> i32 {
    let next = (u64::from(sequence.cast_unsigned()) + u64::from(count)) & 0x7fff_ffff;
    i32::try_from(next).expect("masked to 31 bits")
}

/// Whether a broker that answers so may have appended the batch, or may still do so.
fn outcome_unknown(reason: Reason) -> bool {
    !matches!(
        reason,
        Reason::NotLeader
            | Reason::OutOfOrderSequence
            | Reason::UnknownProducer
            | Reason::Overloaded
            | Reason::DiskFull
            | Reason::UnknownTopic
            | Reason::UnknownPartition
            | Reason::TopicIdMismatch
            | Reason::ObjectStoreUnavailable
    )
}

#[cfg(test)]
#[path = "flight_tests.rs"]
mod tests;
