//! Reading: the stream that goes on and on, and the single read.
//!
//! A [`Session`] holds the partitions of one reader with its position in each. Which of them has something new comes
//! from [`Ready`], so a reader of ten thousand quiet partitions costs nothing. Reads of several partitions run side by
//! side: one that waits for the bucket does not hold up those whose records are in memory.
//!
//! A reader that takes any replica is also served where this broker follows and is in sync, below the high watermark that it knows. What
//! a partition is here is looked at after each read: who is struck out while it serves sends its readers to the leader. Only a leader says
//! that an offset is above the log; one that lies below the committed log start is out of range everywhere.
//!
//! `max_wait_ms` bounds the wait for records that do not exist yet. A single read waits for those that exist, which a disk or the object
//! store has, within a bound of its own.

mod memory;
mod plain;
mod stream;
#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, BTreeSet},
    pin::Pin,
    sync::Arc,
    time::Duration,
};

use futures::{FutureExt as _, Stream, StreamExt as _, stream::FuturesUnordered};
use tokio::time::Instant;
use tonic::Status;

use self::{
    memory::{Granted, MIN_READ_BYTES},
    plain::RecordTooLarge,
    stream::Follow,
};
use super::{Broker, CallMemory, Grant, Requests, faults};
use crate::{
    limits,
    log::ReadLimits,
    model::{Offset, PartitionId},
    partition::{Fetched, Partition, ReadError, Reader, Ready, Source},
    proto::{
        fault::{Fault, Reason},
        v1,
    },
    task::clock,
};

/// Reads of one session that may be under way.
const READS: usize = 8;

/// How long an answer that has enough waits for reads that are under way: they end with the call, and what is in memory would keep what is on
/// a disk out for ever.
const OTHER_READS_WAIT: Duration = Duration::from_millis(100);

/// Bytes of one answer where the request does not say.
const DEFAULT_BYTES: usize = 1 << 20;

/// Most partitions of a fetch or read that are not charged.
const FEW_PARTITIONS: usize = 16;

/// Bytes that a partition of a fetch or read takes, with its entry in an answer, beside the name of its topic.
const PLACE_BYTES: usize = 512;

type ReadOutcome = (usize, Result<Option<Fetched>, ReadError>);

/// With the memory that its read took out of the response's.
type EndedRead = (ReadOutcome, Option<Grant>);

/// One partition of a session.
struct Place {
    served: Arc<Partition>,
    topic: String,
    partition: i32,
    /// `None` once it failed: it is left out from then on.
    reader: Option<Reader>,
    /// Where it was asked for.
    from: Offset,
    position: Offset,
    /// A read from `position` is under way: a second one would give the same records again.
    reading: bool,
    /// Something new came during that read.
    again: bool,
}

impl Place {
    /// True if this broker knows of committed records at its position.
    fn has_more(&self) -> bool {
        self.reader.as_ref().is_some_and(|reader| self.position < reader.marks().high_watermark)
    }
}

/// How much one answer holds, and how long it may be held back.
#[derive(Clone, Copy)]
struct Terms {
    min_bytes: usize,
    max_bytes: usize,
    max_wait: Duration,
    /// Most bytes that several reads fill together: what one message takes.
    message_bytes: usize,
}

impl Terms {
    fn new(min_bytes: u32, max_bytes: u32, max_wait_ms: u32) -> Self {
        let max_bytes = if max_bytes == 0 { DEFAULT_BYTES } else { max_bytes as usize };
        let max_bytes = max_bytes.min(limits::MAX_FETCH_BYTES);
        Self {
            min_bytes: (min_bytes as usize).clamp(1, max_bytes),
            max_bytes,
            max_wait: Duration::from_millis(max_wait_ms.min(limits::MAX_FETCH_WAIT_MS).into()),
            message_bytes: limits::MAX_BATCH_BYTES,
        }
    }
}

/// What an answer is being made of.
#[derive(Default)]
struct Gathered {
    partitions: Vec<v1::FetchedPartition>,
    /// Which place each of `partitions` is of; failures have none.
    places: Vec<Option<usize>>,
    /// Index in `partitions` of each place.
    entries: BTreeMap<usize, usize>,
    bytes: usize,
    failed: bool,
    /// What comes next does not fit.
    full: bool,
}

/// The partitions of one reader.
struct Session {
    broker: Arc<Broker>,
    places: Vec<Place>,
    ready: Arc<Ready>,
    reading: FuturesUnordered<Pin<Box<dyn Future<Output = EndedRead> + Send>>>,
    /// What was read and did not fit into the last answer: the first of the next one, so that nothing small can keep it out for ever.
    held: Option<ReadOutcome>,
    terms: Terms,
    memory: CallMemory,
    /// Memory for the partitions, where they are many.
    named: Option<Grant>,
    /// Memory for the response that is being made.
    grant: Option<Granted>,
    /// The largest batch that is expected.
    expected_batch_bytes: usize,
    /// The largest batch that was found, where there was not enough memory for it.
    max_batch_bytes: usize,
    /// A first plain record for which memory is taken beside that for others.
    record_bytes: usize,
    /// Followers in sync may serve it.
    any_replica: bool,
    /// Failures that are told with the next answer.
    refused: Vec<v1::FetchedPartition>,
}

impl Session {
    fn new(broker: Arc<Broker>, terms: Terms, memory: CallMemory) -> Self {
        let (ready, reading) = (Arc::default(), FuturesUnordered::new());
        Self {
            broker,
            places: Vec::new(),
            ready,
            reading,
            held: None,
            terms,
            memory,
            named: None,
            grant: None,
            expected_batch_bytes: 0,
            max_batch_bytes: 0,
            record_bytes: 0,
            any_replica: false,
            refused: Vec::new(),
        }
    }

    /// Reads these partitions from now on, and no others. One that was being read goes on where it is, unless `restart`.
    fn assign(&mut self, wanted: Vec<v1::FetchPartition>, restart: bool, any_replica: bool) -> Result<(), Fault> {
        self.any_replica = any_replica;
        if wanted.len() > limits::MAX_FETCH_PARTITIONS {
            return Err(faults::invalid(format!(
                "{} partitions in one fetch; at most {} are allowed",
                wanted.len(),
                limits::MAX_FETCH_PARTITIONS
            )));
        }
        let mut named = BTreeSet::new();
        if let Some(twice) = wanted.iter().find(|want| !named.insert((want.topic.as_str(), want.partition))) {
            let shown: String = twice.topic.chars().take(100).collect();
            return Err(faults::invalid(format!(
                "topic {shown:?}, partition {} is named twice in one fetch: name each partition once",
                twice.partition
            )));
        }
        self.named = None;
        if wanted.len() > FEW_PARTITIONS {
            let names = wanted.iter().map(|want| want.topic.len()).sum::<usize>();
            self.named = Some(self.memory.session(wanted.len() * PLACE_BYTES + 4 * names)?);
        }
        self.drop_reads();
        let before = std::mem::take(&mut self.places);
        (self.ready, self.held) = (Arc::default(), None);
        let goes_on = before.iter().filter(|place| !restart && place.reader.is_some());
        let positions: BTreeMap<PartitionId, Offset> =
            goes_on.map(|place| (place.served.id(), place.position)).collect();
        (self.expected_batch_bytes, self.max_batch_bytes) = (0, 0);
        for want in wanted {
            match self.broker.readable(&want, any_replica) {
                Ok(partition) => {
                    // Not by name: a topic that was made again is another one.
                    let from = match positions.get(&partition.id()) {
                        Some(position) => *position,
                        None => faults::offset(want.offset)?,
                    };
                    let max_batch_bytes = partition.config().max_message_bytes.min(MIN_READ_BYTES);
                    self.expected_batch_bytes = self.expected_batch_bytes.max(max_batch_bytes);
                    let reader = partition.reader().clone();
                    reader.follow(&self.ready, self.places.len());
                    self.places.push(Place {
                        served: partition,
                        topic: want.topic,
                        partition: want.partition,
                        reader: Some(reader),
                        from,
                        position: from,
                        reading: false,
                        again: false,
                    });
                }
                Err(fault) => {
                    self.broker.metrics.fetch_errors.count(fault.reason.as_str());
                    self.refused.push(self.broker.refused_partition(want, fault));
                }
            }
        }
        Ok(())
    }

    /// Begins reads of what is ready.
    fn begin_reads(&mut self, max_bytes: usize) {
        while self.may_begin_read()
            && let Some(granted) = &mut self.grant
            && let Some(index) = self.ready.take()
        {
            let place = &mut self.places[index];
            if place.reading {
                place.again = true;
                continue;
            }
            let Some(reader) = &place.reader else { continue };
            place.reading = true;
            let (position, limits) = (place.position, ReadLimits { max_bytes, max_batch_bytes: granted.batch_bytes });
            let charge = Arc::new(granted.begin_read());
            let reader = reader.charged(Arc::<Grant>::clone(&charge));
            self.reading.push(Box::pin(async move {
                let outcome = reader.read(position, limits).await;
                drop(reader);
                ((index, outcome), Arc::into_inner(charge))
            }));
        }
    }

    /// Takes the outcome of one read into the answer, and its memory into the answer's.
    fn absorb_ended(&mut self, (outcome, charge): EndedRead, gathered: &mut Gathered) {
        if let (Some(granted), Some(charge)) = (&mut self.grant, charge) {
            granted.end_read(charge);
        }
        self.absorb(outcome, gathered);
    }

    /// Takes the outcome of one read into the answer.
    fn absorb(&mut self, (index, outcome): ReadOutcome, gathered: &mut Gathered) {
        if let Ok(Some(fetched)) = &outcome
            && gathered.bytes > 0
            && gathered.bytes + fetched.bytes > self.terms.message_bytes
        {
            // No message takes both.
            gathered.full = true;
            self.held = Some((index, outcome));
            return;
        }
        if let Some(bytes) = self.lacks_memory_for(&outcome, gathered) {
            return self.read_later(index, bytes, gathered);
        }
        let place = &mut self.places[index];
        let standing = place.served.standing();
        let elsewhere = match &outcome {
            // What was read is committed all the same, and is read again where it is served.
            Ok(_) => !standing.role.serves(self.any_replica),
            Err(ReadError::OutOfRange { offset, .. }) => {
                !standing.role.leads() && *offset >= place.served.committed_log_start()
            }
            Err(_) => false,
        };
        if (elsewhere || outcome.is_err()) && gathered.has_records(index) {
            // The records before the error are an answer of their own.
            gathered.full = true;
            self.held = Some((index, outcome));
            return;
        }
        place.reading = false;
        let again = std::mem::take(&mut place.again);
        let Some(reader) = &place.reader else { return };
        if elsewhere {
            place.reader = None;
            gathered.failed = true;
            let fault = self.broker.not_leader(&place.topic, place.partition, place.served.id());
            self.broker.metrics.fetch_errors.count(fault.reason.as_str());
            return gathered.entry(index, place).error = Some(fault.into());
        }
        match outcome {
            Ok(None) if again => self.ready.mark(index),
            Ok(None) => {}
            Ok(Some(fetched)) => {
                let high_watermark = reader.marks().high_watermark;
                place.position = fetched.next;
                let by_source = &self.broker.metrics.fetch_bytes;
                let counter = match fetched.source {
                    Source::Memory => &by_source.memory,
                    Source::Disk => &by_source.disk,
                    Source::Bucket => &by_source.bucket,
                };
                counter.inc_by(fetched.bytes as u64);
                let by_role = &self.broker.metrics.fetch_role_bytes;
                let counter = if standing.role.leads() { &by_role.leader } else { &by_role.follower };
                counter.inc_by(fetched.bytes as u64);
                let next = fetched.next;
                gathered.add(index, place, fetched);
                if next < high_watermark {
                    self.ready.mark(index);
                }
            }
            Err(error) => {
                place.reader = None;
                gathered.failed = true;
                let fault = self.broker.read_refused(place.served.id(), error);
                self.broker.metrics.fetch_errors.count(fault.reason.as_str());
                gathered.entry(index, place).error = Some(fault.into());
            }
        }
    }

    /// Takes what can be had without waiting.
    fn gather_now(&mut self, gathered: &mut Gathered) {
        gathered.failed |= !self.refused.is_empty();
        self.refused.drain(..).for_each(|refused| gathered.refuse(refused));
        if let Some(held) = self.held.take() {
            self.absorb(held, gathered);
        }
        self.restore(gathered);
        let Some(max_bytes) = self.grant.as_ref().map(|granted| granted.max_bytes) else { return };
        while gathered.bytes < max_bytes && !gathered.full && self.grant.is_some() {
            self.begin_reads(self.read_bytes(max_bytes - gathered.bytes));
            match self.reading.next().now_or_never() {
                Some(Some(ended)) => self.absorb_ended(ended, gathered),
                Some(None) | None => break,
            }
        }
        if gathered.bytes == 0 && self.reading.is_empty() {
            // There was nothing: what waits for records holds no memory.
            self.grant = None;
        }
    }

    /// Says of everything that is still being read why the answer has nothing of it.
    fn give_up_reads(&self, gathered: &mut Gathered) {
        let reading = self.places.iter().enumerate().filter(|(_, place)| place.reading && place.reader.is_some());
        for (index, place) in reading {
            let (offset, bound) = (place.position, self.broker.settings.fetch_max_wait);
            let (reason, owner) = if offset < place.served.marks().local_start {
                (Reason::ObjectStoreUnavailable, "the object store")
            } else {
                (Reason::Timeout, "this broker's disk")
            };
            let message = format!(
                "{owner} has not served offset {offset} within {bound:?} (tier.fetch_max_wait); the read goes on: ask again for it"
            );
            self.broker.metrics.fetch_errors.count(reason.as_str());
            gathered.entry(index, place).error = Some(Fault::new(reason, message).with("offset", offset).into());
        }
    }

    /// Marks everything that has records which the answer does not have, though nothing is wrong with it; whether there is any.
    fn mark_unread(&self, gathered: &Gathered) -> bool {
        if gathered.bytes > 0 || gathered.failed {
            return false;
        }
        let unread = self.places.iter().enumerate().filter(|(_, place)| place.has_more());
        unread.map(|(index, _)| self.ready.mark(index)).count() > 0
    }

    /// Adds the marks of every partition that the answer has nothing else of.
    fn complete(&self, gathered: &mut Gathered) {
        for (index, place) in self.places.iter().enumerate() {
            if !gathered.entries.contains_key(&index) {
                gathered.entry(index, place);
            }
        }
    }

    /// Gathers what one read answers.
    async fn gather(&mut self, plain: bool, deadline: Instant) -> Result<Gathered, Fault> {
        let patience = self.broker.settings.fetch_max_wait;
        let mut gathered = Gathered::default();
        let (mut reading_since, mut enough_since, mut looked_again) = (None, None, false);
        loop {
            if self.needs_memory() {
                let reserved = tokio::time::timeout(patience, self.reserve(plain)).await;
                reserved.map_err(|_| self.memory.no_response_memory())?;
                // The time until then was not the disk's.
                reading_since = None;
            }
            self.gather_now(&mut gathered);
            if gathered.is_enough(self.min_bytes()) {
                let until = *enough_since.get_or_insert_with(clock::monotonic) + OTHER_READS_WAIT;
                let has_room = !gathered.failed && !gathered.full && gathered.bytes < self.terms.max_bytes;
                if !has_room || tokio::time::timeout_at(until, self.next_read(&mut gathered)).await != Ok(true) {
                    break;
                }
                continue;
            }
            // Records that are being read exist: only a bound of its own ends the wait for them.
            let awaits_records = gathered.bytes == 0 && !self.reading.is_empty();
            let until = if awaits_records {
                *reading_since.get_or_insert_with(clock::monotonic) + patience
            } else {
                reading_since = None;
                deadline
            };
            if tokio::time::timeout_at(until, self.wait(&mut gathered)).await.is_ok() {
                continue;
            }
            if awaits_records {
                self.give_up_reads(&mut gathered);
            }
            // Records that came since the last look are not left out.
            if awaits_records || std::mem::replace(&mut looked_again, true) || !self.mark_unread(&gathered) {
                break;
            }
        }
        self.complete(&mut gathered);
        Ok(gathered)
    }

    /// Waits for one more outcome; false where there is none to come.
    async fn next_read(&mut self, gathered: &mut Gathered) -> bool {
        let ended = self.reading.next().await;
        ended.map(|ended| self.absorb_ended(ended, gathered)).is_some()
    }

    /// Waits for one more outcome, or for something to become ready.
    async fn wait(&mut self, gathered: &mut Gathered) {
        self.release_unused(gathered);
        let (ready, more) = (Arc::clone(&self.ready), self.awaits_marks());
        let ended = tokio::select! {
            biased;
            Some(ended) = self.reading.next(), if !self.reading.is_empty() => Some(ended),
            () = ready.wait(), if more => None,
        };
        if let Some(ended) = ended {
            self.absorb_ended(ended, gathered);
        }
    }
}

impl Gathered {
    /// Adds what was read of a place to what the answer has of it.
    fn add(&mut self, index: usize, place: &Place, fetched: Fetched) {
        self.bytes += fetched.bytes;
        self.entry(index, place).chunks.extend(fetched.chunks);
    }

    /// What the answer has of a place, with the partition's marks as they are now.
    fn entry(&mut self, index: usize, place: &Place) -> &mut v1::FetchedPartition {
        let at = *self.entries.entry(index).or_insert_with(|| {
            let (topic, partition) = (place.topic.clone(), place.partition);
            self.partitions.push(v1::FetchedPartition { topic, partition, ..Default::default() });
            self.places.push(Some(index));
            self.partitions.len() - 1
        });
        let (standing, marks) = (place.served.standing(), place.served.marks());
        let entry = &mut self.partitions[at];
        entry.log_start = marks.log_start.as_i64();
        entry.high_watermark = marks.high_watermark.as_i64();
        entry.next_offset = place.position.as_i64();
        entry.from_follower = !standing.role.leads();
        entry.leader_epoch = standing.epoch.as_i32();
        entry
    }

    fn has_records(&self, index: usize) -> bool {
        self.entries.get(&index).is_some_and(|at| !self.partitions[*at].chunks.is_empty())
    }

    fn refuse(&mut self, refused: v1::FetchedPartition) {
        self.partitions.push(refused);
        self.places.push(None);
    }

    fn is_enough(&self, min_bytes: usize) -> bool {
        self.failed || self.full || self.bytes >= min_bytes
    }
}

impl Broker {
    /// Reads once.
    pub(super) async fn read(
        self: Arc<Self>,
        request: v1::ReadRequest,
        memory: CallMemory,
    ) -> Result<v1::ReadResponse, Fault> {
        let terms = Terms::new(request.min_bytes, request.max_bytes, request.max_wait_ms);
        self.acquaint(request.partitions.iter().map(|want| (want.topic.as_str(), want.topic_id.as_str()))).await;
        let mut session = Session::new(self, terms, memory);
        session.assign(request.partitions, true, request.any_replica)?;
        let deadline = clock::monotonic() + terms.max_wait;
        loop {
            let mut gathered = session.gather(request.plain, deadline).await?;
            let decoded = if request.plain { session.decode(&mut gathered).await } else { Ok(0) };
            match decoded {
                Ok(record_bytes) => {
                    session.on_made(gathered.bytes + record_bytes, gathered.partitions.len());
                    let in_doubt = session.broker.is_in_doubt();
                    return Ok(v1::ReadResponse { partitions: gathered.partitions, in_doubt });
                }
                Err(RecordTooLarge { bytes }) => session.read_again(bytes, gathered),
            }
        }
    }

    /// Reads on and on.
    pub(super) fn fetch(
        self: Arc<Self>,
        requests: Requests<v1::FetchRequest>,
        memory: CallMemory,
    ) -> impl Stream<Item = Result<v1::FetchResponse, Status>> + Send + 'static {
        let follow = Follow::new(self, requests, memory);
        futures::stream::unfold(follow, |mut follow| async move { Some((follow.next().await?, follow)) })
    }
}
