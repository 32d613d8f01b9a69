//! Clients that produce and consume. They add their operations to a history.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
    time::Duration,
};

use strandline::{
    client::{Client, ConsumerOptions, Delivery, NewRecord, OffsetSpec, ProducerOptions},
    model::{Acks, Offset},
    task::{Tasks, lock::Mutex, random},
};

use crate::{
    history::{Attempt, History, Log, Outcome, ReadPass},
    logs::payload,
    trace::Trace,
};

/// Topics, by their index in the history.
pub(crate) const TOPICS: &[&str] = &["events", "orders"];

/// Maximum number of records that one idempotent producer has in flight.
const OUTSTANDING: u64 = 8;

/// Maximum pause of an idempotent producer between two records of a burst, in microseconds. The maximum of a producer
/// without idempotence is three times as long.
const PAUSE_US: u64 = 12_000;

/// Maximum number of records in a burst. Bursts with pauses keep runs short: a fault needs records in flight to reveal
/// an error, but no continuous stream of records.
const BURST: u32 = 40;
/// Maximum pause of a producer after a burst, in microseconds.
const REST_US: u64 = 600_000;

/// Retention profile of the topics of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RetentionProfile {
    All,
    /// Retention keeps the last few segments, so log starts move.
    Last,
}

impl RetentionProfile {
    /// Returns the profile of a seed, without a draw from its random numbers. One seed in five has
    /// [`RetentionProfile::Last`].
    pub(crate) fn of(seed: u64) -> Self {
        if seed % 5 == 3 { Self::Last } else { Self::All }
    }
}

/// Maximum time after the faults until every request has a response.
pub(crate) const RESPONSE_TIMEOUT: Duration = Duration::from_secs(300);

/// Timeout of one read pass.
pub(crate) const READ_TIMEOUT: Duration = Duration::from_secs(20);

/// Waits before a producer's next record: up to `short_us` within a burst, and up to [`REST_US`] after it. `burst`
/// counts the remaining records of the burst.
async fn pause(burst: &mut u32, short_us: u64) {
    let longest = if *burst == 0 { REST_US } else { short_us };
    *burst = burst.checked_sub(1).unwrap_or_else(|| random::in_range(1..BURST));
    tokio::time::sleep(Duration::from_micros(random::in_range(0..longest))).await;
}

/// History of the clients. Clones share the history.
#[derive(Clone, Default)]
pub(crate) struct ClientHistory(Arc<Mutex<ClientHistoryState>>);

#[derive(Default)]
struct ClientHistoryState {
    history: History,
    acked: BTreeMap<Log, BTreeMap<i64, u64>>,
    now: u64,
}

impl ClientHistory {
    /// Returns the next value of the logical clock.
    fn now(&self) -> u64 {
        let mut state = self.0.lock();
        state.now += 1;
        state.now
    }

    fn add_attempt(&self, attempt: Attempt) {
        let mut state = self.0.lock();
        if let Outcome::Acknowledged { offset } = attempt.outcome {
            state.acked.entry(attempt.log).or_default().insert(offset, attempt.payload);
        }
        state.history.attempts.push(attempt);
    }

    /// Calls `look` with the payloads of the records that were acknowledged with `acks=all` or `acks=tiered`, by
    /// offset. Makes no call if the log has none.
    pub(crate) fn with_acked(&self, log: Log, look: impl FnMut(&BTreeMap<i64, u64>)) {
        self.0.lock().acked.get(&log).into_iter().for_each(look);
    }

    pub(crate) fn history(&self) -> History {
        self.0.lock().history.clone()
    }
}

/// One client with its topics and its history.
#[derive(Clone)]
pub(crate) struct Load {
    pub(crate) client: Client,
    pub(crate) client_history: ClientHistory,
    pub(crate) trace: Trace,
    /// Cancelled to end the load.
    pub(crate) stop: Tasks,
    /// Number of partitions of each topic.
    pub(crate) partitions: Vec<u32>,
    /// Retention profile of the topics.
    pub(crate) keeps: RetentionProfile,
}

impl Load {
    /// Produces records in order, several in flight, with an idempotent producer, until the load ends. Each record must
    /// be acknowledged.
    pub(crate) async fn produce(self, producer: u32) {
        let options = ProducerOptions { delivery_timeout: RESPONSE_TIMEOUT, ..ProducerOptions::default() };
        let sender = loop {
            match self.client.producer(options.clone()).await {
                Ok(sender) => break sender,
                Err(error) => self.trace.record(format_args!("{producer}: no producer: {error}")),
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        };
        let settle = async |(mut attempt, delivery): (Attempt, Delivery)| {
            let (log, number) = (attempt.log, attempt.payload & 0xffff_ffff);
            let ack = delivery.await.unwrap_or_else(|error| panic!("{producer} {number}: {error}"));
            let offset = ack.offset.expect("acknowledged by all").as_i64();
            self.trace.record(format_args!("{producer}: {number} is at {offset} of {log:?}"));
            (attempt.responded, attempt.outcome) = (self.client_history.now(), Outcome::Acknowledged { offset });
            self.client_history.add_attempt(attempt);
        };
        let mut outstanding = VecDeque::new();
        let (mut number, mut burst) = (0_u64, 0);
        while !self.stop.is_cancelled() {
            let (attempt, value) = self.draw(producer, number);
            let delivery = loop {
                let record = NewRecord::value(&value).partition(attempt.log.1.unsigned_abs());
                match sender.send(TOPICS[attempt.log.0], record).await {
                    Ok(delivery) => break delivery,
                    // The producer has no metadata of the topic yet and cannot fetch any. It has sent nothing.
                    Err(error) => self.trace.record(format_args!("{producer}: {number} waits: {error}")),
                }
                tokio::time::sleep(Duration::from_millis(100)).await;
            };
            outstanding.push_back((attempt, delivery));
            number += 1;
            if outstanding.len() as u64 > random::in_range(1..OUTSTANDING) {
                settle(outstanding.pop_front().unwrap()).await;
            }
            pause(&mut burst, PAUSE_US).await;
        }
        for one in outstanding {
            settle(one).await;
        }
        sender.close().await.unwrap();
    }

    /// Produces records one at a time without idempotence, so a missing response leaves the outcome unknown. The acks
    /// setting differs between runs. A record that only the leader acknowledged may be lost, so its outcome counts as
    /// unknown.
    pub(crate) async fn produce_without_idempotence(self, producer: u32) {
        let acks = [Acks::All, Acks::All, Acks::Leader, Acks::Tiered][random::in_range(0..4_usize)];
        let options = ProducerOptions {
            delivery_timeout: Duration::from_secs(if acks == Acks::Tiered { 10 } else { 3 }),
            idempotent: false,
            in_flight: 1,
            acks,
            ..ProducerOptions::default()
        };
        let sender = self.client.producer(options).await;
        let sender = sender.unwrap_or_else(|error| panic!("{producer}: {error}"));
        let (mut number, mut burst) = (0, 0);
        while !self.stop.is_cancelled() {
            let (mut attempt, value) = self.draw(producer, number);
            // A record that timed out may be written twice, or after later records. So each record counts as the only
            // one of a producer, and may be stored more than once.
            (attempt.producer, attempt.sequence) = (producer << 16 | u32::try_from(number).unwrap(), 0);
            attempt.once = false;
            let record = NewRecord::value(&value).partition(attempt.log.1.unsigned_abs());
            let delivered = match sender.send(TOPICS[attempt.log.0], record).await {
                Ok(delivery) => delivery.await,
                Err(error) => Err(error),
            };
            attempt.responded = self.client_history.now();
            match delivered {
                Ok(ack) => {
                    let offset = ack.offset.expect("the producer waits for acknowledgements").as_i64();
                    if acks != Acks::Leader {
                        attempt.outcome = Outcome::Acknowledged { offset };
                    }
                    self.trace.record(format_args!("{producer}: {number} is at {offset} of {:?}", attempt.log));
                }
                Err(error) => self.trace.record(format_args!("{producer}: {number} has an unknown outcome: {error}")),
            }
            self.client_history.add_attempt(attempt);
            number += 1;
            pause(&mut burst, 3 * PAUSE_US).await;
        }
        let _whatever = sender.close().await;
    }

    /// Draws a value and a partition for record `number` of a producer. Returns the attempt, whose outcome is still
    /// unknown, and the value.
    fn draw(&self, producer: u32, number: u64) -> (Attempt, Vec<u8>) {
        let topic = random::in_range(0..self.partitions.len());
        let partition = random::in_range(0..self.partitions[topic]);
        let payload = u64::from(producer) << 32 | number;
        let mut value = payload.to_be_bytes().to_vec();
        // Most values are small. The few large values fill the segments.
        let most = if random::in_range(0..8) == 0 { 6000 } else { 600 };
        value.resize(value.len() + random::in_range(0..most), b'x');
        let attempt = Attempt {
            log: (topic, i32::try_from(partition).unwrap()),
            payload,
            once: true,
            producer,
            sequence: number,
            sent: self.client_history.now(),
            responded: 0,
            outcome: Outcome::Unknown,
        };
        (attempt, value)
    }

    /// Reads whole logs or parts of them until the load ends. `alone` is true for a standalone broker, whose latest
    /// offset must be the newest. In a cluster, a deposed leader may return an older one.
    pub(crate) async fn read(self, alone: bool) {
        while !self.stop.is_cancelled() {
            tokio::time::sleep(Duration::from_micros(random::in_range(0..1_000_000))).await;
            let topic = random::in_range(0..self.partitions.len());
            let partition = random::in_range(0..self.partitions[topic]);
            let whole = random::in_range(0..3) == 0;
            let log = (topic, i32::try_from(partition).unwrap());
            if let Err(error) = self.read_log(log, whole, alone, Duration::from_secs(3)).await {
                self.trace.record(format_args!("a reader of {log:?} gave up: {error}"));
            }
        }
    }

    /// Reads a log from its start if `whole`, else from a random offset, up to the latest offset or until the timeout.
    /// Adds the pass to the history, also if the read fails, but not if the broker returns no start or latest offset.
    /// `current` is true if the latest offset must be the newest.
    pub(crate) async fn read_log(&self, log: Log, whole: bool, current: bool, time: Duration) -> Result<(), String> {
        let (topic, partition) = (TOPICS[log.0], log.1.unsigned_abs());
        let began = self.client_history.now();
        let ask = async |at: OffsetSpec| -> Result<i64, String> {
            let asked = tokio::time::timeout(time, self.client.admin().offset(topic, partition, at)).await;
            Ok(asked.map_err(|late| late.to_string())?.map_err(|error| error.to_string())?.as_i64())
        };
        let start = if self.keeps == RetentionProfile::All { 0 } else { ask(OffsetSpec::Earliest).await? };
        let end = ask(OffsetSpec::Latest).await?;
        let start = start.min(end);
        let from = if whole { start } else { random::in_range(start..=end) };
        let mut pass = ReadPass { log, began, from, end, to: from, current, records: Vec::new() };
        // Some passes name a rack, and then may read from a follower there. Some of these racks have no broker.
        let rack = random::in_range(0..6);
        let options = ConsumerOptions::default();
        let mut consumer = self.client.consumer(if rack < 4 { options.rack(format!("r{rack}")) } else { options });
        let reading = async {
            let from = Offset::from_i64(from).unwrap();
            consumer.assign_at(topic, partition, from).await.map_err(|error| error.to_string())?;
            while pass.to < end {
                let read = consumer.next().await.map_err(|error| error.to_string())?;
                pass.records.push((read.offset.as_i64(), payload(&read.record.value.unwrap())));
                pass.to = read.offset.as_i64() + 1;
            }
            Ok(())
        };
        let read = tokio::time::timeout(time, reading).await.unwrap_or_else(|late| Err(late.to_string()));
        consumer.close().await;
        self.client_history.0.lock().history.passes.push(pass);
        read
    }
}
