//! Tests of [`InFlightBatches`] with a model of a broker: lost responses, broken streams, and attempts of broken
//! streams that arrive late. No record is appended twice, every acknowledged record is in the log, and acknowledged
//! records keep their order.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use proptest::prelude::*;

use super::*;
use crate::{model::Compression, record::BatchBuilder, task::clock};

/// Model of a broker.
#[derive(Default)]
struct Broker {
    /// Numbers of the appended records, in order.
    log: Vec<u32>,
    /// By producer id: the next sequence, and the sequences of the last batches.
    producers: BTreeMap<i64, (i32, VecDeque<i32>)>,
    /// Producer ids whose state the broker has lost.
    forgotten: BTreeSet<i64>,
}

impl Broker {
    fn append(&mut self, batch: &Batch) -> Result<(), ApiError> {
        let sequence = batch.producer().expect("idempotent");
        let reject = |code| Err(ApiError::new(code, "model"));
        if self.forgotten.contains(&sequence.id) {
            return reject(ErrorCode::UnknownProducer);
        }
        let (next, last) = self.producers.entry(sequence.id).or_default();
        if last.contains(&sequence.base_sequence) {
            return Ok(());
        }
        if *next != sequence.base_sequence {
            return reject(ErrorCode::OutOfOrderSequence);
        }
        *next = after(*next, batch.count());
        last.push_back(sequence.base_sequence);
        if last.len() > crate::limits::MAX_BATCHES_PER_PRODUCER {
            last.pop_front();
        }
        self.log.extend(ids(batch));
        Ok(())
    }
}

fn ids(batch: &Batch) -> Vec<u32> {
    let value = |record: crate::record::Record| record.value.expect("set").as_ref().try_into().expect("four bytes");
    batch.records().expect("uncompressed").map(|record| u32::from_be_bytes(value(record.expect("valid").1))).collect()
}

/// A producer, its broker, and the requests and responses between them.
struct ProducerModel {
    in_flight: InFlightBatches,
    broker: Broker,
    stream: u64,
    correlation_id: u64,
    /// Requests on the current stream that the broker has not handled yet.
    requests: VecDeque<(u64, Batch)>,
    /// Responses that the client has not received yet.
    responses: VecDeque<(u64, Result<(), ApiError>)>,
    /// Batches sent on broken streams; they may still arrive.
    late: VecDeque<Batch>,
    next_record: u32,
    next_producer: i64,
    /// Each batch taken so far: its completion and the numbers of its records.
    batches: Vec<(Arc<Completion>, Vec<u32>)>,
    acknowledged: BTreeSet<u32>,
    failed: BTreeSet<u32>,
}

impl ProducerModel {
    fn new() -> Self {
        let identity = Some(ProducerIdAndEpoch { id: 0, epoch: 0 });
        Self {
            in_flight: InFlightBatches::new(DeliveryGuarantee::Idempotent, 5, identity),
            broker: Broker::default(),
            stream: 0,
            correlation_id: 0,
            requests: VecDeque::new(),
            responses: VecDeque::new(),
            late: VecDeque::new(),
            next_record: 0,
            next_producer: 1,
            batches: Vec::new(),
            acknowledged: BTreeSet::new(),
            failed: BTreeSet::new(),
        }
    }

    fn records(&self, completed: &CompletedBatch) -> Vec<u32> {
        let batch = self.batches.iter().find(|(completion, _)| Arc::ptr_eq(completion, &completed.completion));
        batch.expect("a batch of this test").1.clone()
    }

    fn fail_batches(&mut self, failed: Vec<FailedBatch>) {
        for FailedBatch { batch, .. } in failed {
            let records = self.records(&batch);
            self.failed.extend(records);
        }
    }

    /// Performs the task's next action. Returns false if the task waits for a response or, without `takes_new`, would
    /// take a new batch.
    fn perform_next(&mut self, takes_new: bool) -> bool {
        match self.in_flight.next() {
            NextAction::Wait => return false,
            NextAction::Take if !takes_new => return false,
            NextAction::Take => self.take(),
            NextAction::Resume => self.in_flight.resume(),
            NextAction::RequestId => {
                let identity = ProducerIdAndEpoch { id: self.next_producer, epoch: 0 };
                self.next_producer += 1;
                let failed = self.in_flight.set_producer_id(identity);
                self.fail_batches(failed);
            }
            NextAction::Send(index) => {
                self.correlation_id += 1;
                let batch = self.in_flight.send(index, self.stream, self.correlation_id).expect("valid batch");
                self.requests.push_back((self.correlation_id, batch));
            }
        }
        true
    }

    fn take(&mut self) {
        // Batches have only two sizes, so that after a renumbering one batch often gets the former sequence of another.
        let count = 1 + u32::from(self.next_record.is_multiple_of(5));
        let records: Vec<u32> = (self.next_record..self.next_record + count).collect();
        self.next_record += count;
        let mut builder = BatchBuilder::new(Compression::None);
        for record in &records {
            builder.push(0, None, Some(&record.to_be_bytes()), &[]).expect("fits");
        }
        let completion: Arc<Completion> = Arc::default();
        self.batches.push((completion.clone(), records));
        let deadline = clock::monotonic();
        self.in_flight.take(SealedBatch { body: BatchBody::Built(builder), count, completion, permits: 0, deadline });
    }

    /// Makes the broker handle the next request. `outcome` selects its result. 0 rejects it with a retryable error, 1
    /// appends it and responds with a timeout, 2 rejects it with a final error. Other values append it and respond with
    /// the outcome.
    fn handle(&mut self, outcome: u8) {
        let Some((correlation_id, batch)) = self.requests.pop_front() else { return };
        let reject = |code| Err(ApiError::new(code, "model"));
        let result = match outcome {
            0 => reject(ErrorCode::NotLeader),
            1 => self.broker.append(&batch).and_then(|()| reject(ErrorCode::Timeout)),
            2 => reject(ErrorCode::RecordTooLarge),
            _ => self.broker.append(&batch),
        };
        self.responses.push_back((correlation_id, result));
    }

    /// Passes the next response to the producer.
    fn respond(&mut self) {
        let Some((correlation_id, result)) = self.responses.pop_front() else { return };
        match self.in_flight.on_response(self.stream, correlation_id, result) {
            ResponseOutcome::Completed(batch) => {
                let records = self.records(&batch);
                self.acknowledged.extend(records);
            }
            ResponseOutcome::Failed(failed) => self.fail_batches(failed),
            ResponseOutcome::Retry | ResponseOutcome::Stale => {}
        }
    }

    /// Breaks the stream: its responses are lost, and its requests may still arrive later (`late`).
    fn break_stream(&mut self) {
        self.responses.clear();
        self.late.extend(self.requests.drain(..).map(|(_, batch)| batch));
        let failed = self.in_flight.on_stream_lost(self.stream, true);
        self.fail_batches(failed);
        self.stream += 1;
    }

    /// Performs one step, selected by a random byte.
    fn step(&mut self, step: u8) {
        match step % 16 {
            0..=5 => {
                self.perform_next(true);
            }
            6..=8 => self.handle(9),
            9 => self.handle(step / 16 % 3),
            10 | 11 => self.respond(),
            12 => self.break_stream(),
            13 => {
                if let Some(batch) = self.late.pop_front() {
                    let _ = self.broker.append(&batch);
                }
            }
            14 if (step / 16).is_multiple_of(4) => {
                self.broker.forgotten.extend(self.broker.producers.keys());
            }
            15 if (step / 16).is_multiple_of(2) => {
                let failed = self.in_flight.expire(clock::monotonic());
                self.fail_batches(failed);
            }
            _ => {}
        }
    }

    /// Runs without faults until no batch remains.
    fn run_to_completion(&mut self) {
        for _ in 0..1000 {
            while self.perform_next(false) {}
            self.handle(9);
            self.respond();
            if self.in_flight.is_empty() {
                return;
            }
        }
        panic!("batches have no result: {:?}", self.in_flight);
    }

    /// Checks the log and the results. Called when all batches have a result.
    fn check(&self) {
        let mut seen = BTreeSet::new();
        for record in &self.broker.log {
            assert!(seen.insert(*record), "record {record} is in the log twice: {:?}", self.broker.log);
        }
        assert!(self.acknowledged.is_subset(&seen), "an acknowledged record is not in the log");
        let order: Vec<u32> =
            self.broker.log.iter().copied().filter(|record| self.acknowledged.contains(record)).collect();
        assert!(order.is_sorted(), "out of order: {order:?}");
        let completed = self.acknowledged.len() + self.failed.len();
        assert_eq!(completed, usize::try_from(self.next_record).expect("few"), "each record has one result");
        assert!(self.acknowledged.is_disjoint(&self.failed));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn faults_never_duplicate_lose_or_reorder_records(steps in proptest::collection::vec(any::<u8>(), 0..400)) {
        let mut model = ProducerModel::new();
        for step in steps {
            model.step(step);
        }
        model.run_to_completion();
        for batch in std::mem::take(&mut model.late) {
            let _ = model.broker.append(&batch);
        }
        model.check();
    }
}

/// Regression: a batch was refused, and the batch behind it moved up to its sequence. A late attempt of the second
/// batch then arrived under its old sequence, which was the next one for the broker. The batch was appended twice.
#[test]
fn late_attempt_under_old_sequence_is_not_duplicated() {
    let mut model = ProducerModel::new();
    model.next_record = 1;
    for _ in 0..4 {
        model.perform_next(true);
    }
    assert_eq!(model.requests.len(), 2, "two batches of one record are in flight");
    model.break_stream();
    while model.requests.is_empty() {
        model.perform_next(false);
    }
    model.handle(2);
    model.respond();
    model.run_to_completion();
    for batch in std::mem::take(&mut model.late) {
        let _ = model.broker.append(&batch);
    }
    let copies = model.broker.log.iter().filter(|record| **record == 2).count();
    assert!(copies <= 1, "{:?}", model.broker.log);
}

/// Regression: of five batches, the first were appended and lost their responses, and the last were acknowledged. For
/// each acknowledged batch a new one was sent, although the first batches still waited for repetition. After more lost
/// responses, the broker remembered only five newer batches and could not detect the repetition of the first ones.
#[test]
fn ack_behind_unacknowledged_batch_frees_no_capacity() {
    let mut model = ProducerModel::new();
    while model.perform_next(true) {}
    assert_eq!(model.requests.len(), 5);
    for outcome in [1, 1, 1, 3, 3] {
        model.handle(outcome);
        model.respond();
    }
    while model.perform_next(true) {}
    assert_eq!(model.requests.len(), 3, "the three batches again, and no later batch");
    while !model.requests.is_empty() {
        model.handle(3);
    }
    model.break_stream();
    model.run_to_completion();
    assert_eq!(model.failed, BTreeSet::new(), "the broker detected each repetition");
    assert_eq!(model.acknowledged.len(), model.broker.log.len());
    while model.perform_next(true) {}
    assert_eq!(model.requests.len(), 5, "the window has capacity again");
}

#[test]
fn sequences_wrap_as_in_kafka() {
    assert_eq!(after(i32::MAX, 1), 0);
    assert_eq!(after(i32::MAX - 1, 3), 1);
    assert_eq!(after(0, 5), 5);
}
