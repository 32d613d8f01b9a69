//! The producer: sends records in order and once, and returns their acknowledgements.
//!
//! # Overview
//!
//! ```text
//! send ─► partitioner ─► partition queue: open batch ─► sealed batches        (sender's thread, one short lock)
//!                                                            │ wake
//!             task: in-flight batches (bounded per partition) ─► stream to the leader ─► broker
//!                                         ▲ responses, lost streams, new leaders, ended pauses
//! ```
//!
//! Senders copy a record into the open batch of its partition and get a [`Delivery`]. One task per producer takes
//! sealed batches, numbers them, sends them on one stream per leader and receives the responses. `flight` decides which
//! batches may be in flight and which are repeated; it is pure.
//!
//! With `linger` 0 a batch is sent as soon as its partition is below the in-flight limit, and later records form the
//! next batch. Batches grow with load, and a single record does not wait.
//!
//! # Invariants
//!
//! - Records of one partition are appended in the order in which `send` accepted them.
//! - A record is appended once: the broker detects a repeated batch by producer id and sequence. If it can no longer do
//!   so after a lost response, the send fails as [`SendError::Unknown`] and is never silently repeated.
//! - Queued and in-flight records take at most `memory_bytes`, or one record if that is larger. Above the limit `send`
//!   waits.
//!
//! # Shutdown
//!
//! [`Producer::close`] seals and delivers all batches and joins the task. When the last handle is dropped, the task
//! ends and unacknowledged records fail as [`SendError::Closed`].

mod completion;
mod driver;
mod flight;
mod lane;
mod partitioner;
mod stream;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Arc, Mutex, RwLock,
        atomic::{AtomicU32, AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::sync::{Notify, Semaphore, mpsc, oneshot};

use self::{
    completion::Completion,
    driver::{Command, Driver},
    flight::{Guarantee, Identity},
    lane::{Filling, Lane},
};
pub use self::{
    completion::{Ack, Delivery, Held},
    partitioner::{Choice, KeyHash, Partitioner, Spread, murmur2},
};
use super::{
    Client, TopicRoute,
    connection::{Address, log_client},
    error::{CallError, SendError},
    lock::lock,
};
use crate::{
    limits,
    model::{Acks, Compression},
    proto::v1,
    record::{Batch, BatchBuilder, HEADER_BYTES, Header},
    task::{Tasks, random},
};

/// Settings of a producer.
#[derive(Clone, Debug)]
pub struct ProducerOptions {
    /// Size before compression, in bytes, at which a batch is sent. Default: 64 KiB.
    pub batch_bytes: usize,
    /// Time for which a batch that is not full waits for more records. 0 sends it as soon as the in-flight limit
    /// allows.
    pub linger: Duration,
    /// Maximum number of in-flight batches per partition: 1 to `limits::MAX_BATCHES_PER_PRODUCER` if idempotent.
    /// Default: 16.
    pub in_flight: usize,
    /// Acknowledgement that completes a send. Default: `All`.
    pub acks: Acks,
    /// Compression of batches. Default: none.
    pub compression: Compression,
    /// Partitioner for records that name no partition. Default: [`KeyHash`].
    pub partitioner: Arc<dyn Partitioner>,
    /// Maximum bytes of queued and in-flight records; above it `send` waits. A record that is larger than the maximum
    /// is sent when no other record is in flight. Default: 32 MiB.
    pub memory_bytes: usize,
    /// Time limit for the acknowledgement of a record, retries included; the record fails after it. Default: 2 minutes.
    pub delivery_timeout: Duration,
    /// True if the broker must detect repeated batches, so that no record is duplicated. Default: true; ignored with
    /// `acks=0`.
    pub idempotent: bool,
}

impl Default for ProducerOptions {
    fn default() -> Self {
        Self {
            batch_bytes: 64 << 10,
            linger: Duration::ZERO,
            in_flight: 16,
            acks: Acks::All,
            compression: Compression::None,
            partitioner: Arc::new(KeyHash),
            memory_bytes: 32 << 20,
            delivery_timeout: Duration::from_secs(120),
            idempotent: true,
        }
    }
}

impl ProducerOptions {
    fn guarantee(&self) -> Guarantee {
        match (self.acks, self.idempotent) {
            (Acks::None, _) => Guarantee::AtMostOnce,
            (_, true) => Guarantee::Idempotent,
            (_, false) => Guarantee::AtLeastOnce,
        }
    }

    fn window(&self) -> usize {
        let most =
            if self.guarantee() == Guarantee::Idempotent { limits::MAX_BATCHES_PER_PRODUCER } else { usize::MAX };
        self.in_flight.clamp(1, most)
    }

    /// Returns the memory bound as semaphore permits. At least one batch fits.
    fn memory(&self) -> u32 {
        u32::try_from(self.memory_bytes.max(self.batch_bytes).clamp(1 << 10, 1 << 31)).expect("below 2^32")
    }
}

/// Record to send. It borrows its bytes; sending copies them once, into a batch.
#[derive(Clone, Copy, Debug, Default)]
pub struct NewRecord<'a> {
    partition: Option<u32>,
    timestamp_ms: Option<i64>,
    key: Option<&'a [u8]>,
    value: Option<&'a [u8]>,
    headers: &'a [Header],
}

impl<'a> NewRecord<'a> {
    /// Creates a record with this value, no key, and the time of sending as its timestamp.
    pub fn value(value: &'a [u8]) -> Self {
        Self { value: Some(value), ..Self::default() }
    }

    /// Creates a record whose value is null, which is not the same as an empty value.
    pub fn null() -> Self {
        Self::default()
    }

    /// Sets the key.
    #[must_use]
    pub fn key(self, key: &'a [u8]) -> Self {
        Self { key: Some(key), ..self }
    }

    /// Sets the headers, in order; keys may repeat.
    #[must_use]
    pub fn headers(self, headers: &'a [Header]) -> Self {
        Self { headers, ..self }
    }

    /// Sets the timestamp, in milliseconds since 1970.
    #[must_use]
    pub fn timestamp_ms(self, timestamp_ms: i64) -> Self {
        Self { timestamp_ms: Some(timestamp_ms), ..self }
    }

    /// Sets the partition, instead of leaving the choice to the partitioner.
    #[must_use]
    pub fn partition(self, partition: u32) -> Self {
        Self { partition: Some(partition), ..self }
    }
}

/// State shared by the handles and the task.
#[derive(Debug)]
struct Shared {
    client: Client,
    options: ProducerOptions,
    topics: RwLock<BTreeMap<String, Arc<Lanes>>>,
    /// Serialises the callers that add queues.
    adding: tokio::sync::Mutex<()>,
    /// All partition queues by index.
    lanes: Mutex<Vec<Arc<Lane>>>,
    /// Indexes of the queues that the task must process.
    dirty: Mutex<Vec<usize>>,
    wake: Notify,
    memory: Semaphore,
}

/// Partition queues of one topic.
#[derive(Debug)]
struct Lanes {
    lanes: Vec<Arc<Lane>>,
    /// Partition that currently receives the records with [`Choice::Sticky`].
    sticky: AtomicU32,
    /// Bytes of records that this partition received since it was chosen.
    stuck_bytes: AtomicUsize,
    /// Maximum batch size of the topic in bytes.
    max_message_bytes: usize,
}

/// Sends records. Clones share memory, producer id and batches.
///
/// ```no_run
/// # async fn example(client: strandline::client::Client) -> Result<(), Box<dyn std::error::Error>> {
/// use strandline::client::{NewRecord, ProducerOptions};
///
/// let producer = client.producer(ProducerOptions::default()).await?;
/// for order in 0..1000_u32 {
///     // Waits only while the producer's memory is full.
///     let _delivery = producer.send("orders", NewRecord::value(&order.to_be_bytes()).key(b"customer-7")).await?;
/// }
/// // Returns when every record is acknowledged, or the first error.
/// producer.flush().await?;
/// producer.close().await?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Producer {
    shared: Arc<Shared>,
    commands: mpsc::Sender<Command>,
    /// Ends the task when the last handle is dropped.
    tasks: Arc<EndsTasks>,
}

#[derive(Debug)]
struct EndsTasks(Tasks);

impl Drop for EndsTasks {
    fn drop(&mut self) {
        self.0.cancel();
    }
}

impl Producer {
    pub(super) async fn start(client: Client, options: ProducerOptions) -> Result<Self, CallError> {
        let identity = match options.guarantee() {
            Guarantee::Idempotent => Some(identity(&client).await?),
            _ => None,
        };
        let memory = usize::try_from(options.memory()).expect("a usize holds 32 bits");
        let shared = Arc::new(Shared {
            client,
            options,
            topics: RwLock::default(),
            adding: tokio::sync::Mutex::default(),
            lanes: Mutex::default(),
            dirty: Mutex::default(),
            wake: Notify::new(),
            memory: Semaphore::new(memory),
        });
        let (commands, received) = mpsc::channel(16);
        let tasks = Tasks::new();
        let driver = Driver::new(shared.clone(), tasks.clone(), identity);
        tasks.spawn("producer", driver.run(received));
        Ok(Self { shared, commands, tasks: Arc::new(EndsTasks(tasks)) })
    }

    /// Queues a record and returns the future of its acknowledgement. Waits only while the producer's memory is full,
    /// or for the first lookup of the topic. Records that one caller sends to one partition keep their order.
    ///
    /// # Errors
    /// The topic or the partition does not exist, the record exceeds the topic's maximum size, or the producer is
    /// closed. The [`Delivery`] returns later errors.
    pub async fn send(&self, topic: &str, record: NewRecord<'_>) -> Result<Delivery, SendError> {
        let lanes = self.shared.lanes_of(topic, record.partition).await?;
        let bytes = BatchBuilder::record_len(record.key, record.value, record.headers);
        lanes.check_size(topic, bytes + HEADER_BYTES)?;
        let permits = self.reserve(bytes).await?;
        let (lane, sticky) = lanes.choose(&record, &*self.shared.options.partitioner);
        match lane.append(&record, bytes, permits) {
            Ok(appended) => {
                if appended.wake {
                    self.shared.poke(lane);
                }
                if sticky {
                    lanes.filled(lane.partition, bytes, appended.sealed, self.shared.options.batch_bytes);
                }
                Ok(appended.delivery)
            }
            Err(error) => {
                self.shared.release(permits);
                Err(error)
            }
        }
    }

    /// Queues a complete batch after the records already sent to its partition, for callers that build batches
    /// themselves. The delivery is that of the first record of the batch.
    ///
    /// # Errors
    /// See [`Producer::send`].
    pub async fn send_batch(&self, topic: &str, partition: u32, batch: Batch) -> Result<Delivery, SendError> {
        let lanes = self.shared.lanes_of(topic, Some(partition)).await?;
        let bytes = batch.encoded_len();
        lanes.check_size(topic, bytes)?;
        let permits = self.reserve(bytes).await?;
        let lane = lanes.lane(partition);
        match lane.append_batch(batch, permits) {
            Ok(delivery) => {
                self.shared.poke(lane);
                Ok(delivery)
            }
            Err(error) => {
                self.shared.release(permits);
                Err(error)
            }
        }
    }

    /// Sends all open batches and waits for the results of all records sent before.
    ///
    /// # Errors
    /// The first error among the outstanding records. Errors from before the call are not repeated.
    pub async fn flush(&self) -> Result<(), SendError> {
        let (reply, outstanding) = oneshot::channel();
        self.commands.send(Command::Flush(reply)).await.map_err(|_| SendError::Closed)?;
        let outstanding: Vec<Arc<Completion>> = outstanding.await.map_err(|_| SendError::Closed)?;
        let mut result = Ok(());
        for completion in outstanding {
            let answer = Delivery::new(completion, 0).await;
            result = result.and(answer.map(|_| ()));
        }
        result
    }

    /// Flushes, then ends the producer. Other handles return errors afterwards.
    ///
    /// # Errors
    /// See [`Producer::flush`].
    pub async fn close(self) -> Result<(), SendError> {
        let flushed = self.flush().await;
        self.tasks.0.stop().await;
        flushed
    }

    /// Acquires memory. If the memory is full, all open batches are sent, so that a long linger does not hold the
    /// memory.
    async fn reserve(&self, bytes: usize) -> Result<u32, SendError> {
        // A record larger than the memory acquires all of it.
        let permits = u32::try_from(bytes).unwrap_or(u32::MAX).min(self.shared.options.memory());
        let permit = match self.shared.memory.try_acquire_many(permits) {
            Ok(permit) => permit,
            Err(_) => {
                self.commands.send(Command::Relieve).await.map_err(|_| SendError::Closed)?;
                self.shared.memory.acquire_many(permits).await.map_err(|_| SendError::Closed)?
            }
        };
        permit.forget();
        Ok(permits)
    }
}

impl Shared {
    /// Returns the queues of a topic. Looks the topic up if its queues are missing or do not include `partition`.
    async fn lanes_of(&self, topic: &str, partition: Option<u32>) -> Result<Arc<Lanes>, SendError> {
        let known = self.known(topic);
        let holds = |lanes: &Lanes| partition.is_none_or(|partition| index(partition) < lanes.lanes.len());
        if let Some(lanes) = &known
            && holds(lanes)
        {
            return Ok(lanes.clone());
        }
        let client = &self.client;
        let route = if known.is_some() { client.topic_now(topic).await? } else { client.topic(topic).await? };
        let lanes = self.add_lanes(topic, &route).await;
        match partition.or_else(|| lanes.lanes.is_empty().then_some(0)) {
            Some(partition) if index(partition) >= lanes.lanes.len() => Err(SendError::UnknownPartition {
                topic: topic.to_owned(),
                partition,
                partitions: u32::try_from(lanes.lanes.len()).unwrap_or(u32::MAX),
            }),
            _ => Ok(lanes),
        }
    }

    fn known(&self, topic: &str) -> Option<Arc<Lanes>> {
        self.topics.read().unwrap_or_else(std::sync::PoisonError::into_inner).get(topic).cloned()
    }

    /// Creates queues for partitions that have none.
    async fn add_lanes(&self, topic: &str, route: &TopicRoute) -> Arc<Lanes> {
        let _one_at_a_time = self.adding.lock().await;
        let known = self.known(topic);
        let mut lanes = known.as_ref().map(|known| known.lanes.clone()).unwrap_or_default();
        if let Some(known) = known
            && known.lanes.len() >= route.partitions.len()
            && known.max_message_bytes == route.max_message_bytes
        {
            return known;
        }
        let name: Arc<str> = topic.into();
        let filling = Filling {
            batch_bytes: self
                .options
                .batch_bytes
                .clamp(HEADER_BYTES + 1, route.max_message_bytes.max(HEADER_BYTES + 1)),
            linger: self.options.linger,
            compression: self.options.compression,
            delivery_timeout: self.options.delivery_timeout,
        };
        {
            let mut all = lock(&self.lanes);
            for partition in lanes.len()..route.partitions.len() {
                let partition = u32::try_from(partition).expect("partitions are few");
                let lane = Arc::new(Lane::new(name.clone(), partition, all.len(), filling));
                all.push(lane.clone());
                lanes.push(lane);
            }
        }
        let sticky = random::in_range(0..u32::try_from(lanes.len().max(1)).expect("partitions are few"));
        let lanes = Arc::new(Lanes {
            lanes,
            sticky: AtomicU32::new(sticky),
            stuck_bytes: AtomicUsize::new(0),
            max_message_bytes: route.max_message_bytes,
        });
        let mut topics = self.topics.write().unwrap_or_else(std::sync::PoisonError::into_inner);
        topics.insert(topic.to_owned(), lanes.clone());
        lanes
    }

    /// Waits for `pause`, refreshes the metadata if it is not newer than `seen`, and creates queues for new partitions.
    /// The brokers in `silent` are called last.
    async fn refreshed(
        &self,
        seen: u64,
        wanted: &BTreeSet<Arc<str>>,
        silent: &BTreeSet<Address>,
        pause: Duration,
    ) -> Result<(), CallError> {
        tokio::time::sleep(pause).await;
        let wanted: Vec<&str> = wanted.iter().map(|name| &**name).collect();
        self.client.refresh_doubting(silent, seen, &wanted).await?;
        let topics: Vec<String> =
            self.topics.read().unwrap_or_else(std::sync::PoisonError::into_inner).keys().cloned().collect();
        for topic in topics {
            if let Some(Ok(route)) = self.client.routing().topic(&topic) {
                self.add_lanes(&topic, &route).await;
            }
        }
        Ok(())
    }

    /// Notifies the task that a queue has work.
    fn poke(&self, lane: &Lane) {
        if lane.mark_queued() {
            lock(&self.dirty).push(lane.index);
            self.wake.notify_one();
        }
    }

    fn release(&self, permits: u32) {
        self.memory.add_permits(index(permits));
    }
}

impl Lanes {
    fn check_size(&self, topic: &str, bytes: usize) -> Result<(), SendError> {
        let limit = self.max_message_bytes.min(limits::MAX_BATCH_BYTES);
        if bytes > limit {
            return Err(SendError::TooLarge { topic: topic.to_owned(), bytes, limit });
        }
        Ok(())
    }

    fn lane(&self, partition: u32) -> &Arc<Lane> {
        &self.lanes[index(partition)]
    }

    /// Returns the queue for a record, and true if it is that of the sticky partition.
    fn choose(&self, record: &NewRecord<'_>, partitioner: &dyn Partitioner) -> (&Arc<Lane>, bool) {
        if let Some(partition) = record.partition {
            return (self.lane(partition), false);
        }
        let partitions = u32::try_from(self.lanes.len()).expect("partitions are few");
        match partitioner.choose(record.key, record.value, partitions) {
            Choice::Partition(partition) => (self.lane(partition % partitions), false),
            Choice::Sticky => (self.lane(self.sticky.load(Ordering::Relaxed)), true),
        }
    }

    /// Counts a record that was appended to the sticky partition. Selects another partition when the batch was sealed
    /// or after `batch_bytes`: a batch that is sent as soon as possible may never be full (KIP-794).
    fn filled(&self, partition: u32, bytes: usize, sealed: bool, batch_bytes: usize) {
        let stuck = self.stuck_bytes.fetch_add(bytes, Ordering::Relaxed).saturating_add(bytes);
        if sealed || stuck >= batch_bytes {
            self.stuck_bytes.store(0, Ordering::Relaxed);
            self.move_on(partition);
        }
    }

    fn move_on(&self, from: u32) {
        let partitions = u32::try_from(self.lanes.len()).expect("partitions are few");
        if partitions > 1 {
            let next = (from + random::in_range(1..partitions)) % partitions;
            // If several senders saw the full batch, one of them changes the partition.
            let _ = self.sticky.compare_exchange(from, next, Ordering::Relaxed, Ordering::Relaxed);
        }
    }
}

/// Requests a new producer id from any broker.
async fn identity(client: &Client) -> Result<Identity, CallError> {
    let call = |wire| async move { log_client(wire).init_producer(v1::InitProducerRequest {}).await };
    let answer = client.retried(|| client.ask_any(call)).await?;
    let epoch = i16::try_from(answer.producer_epoch).unwrap_or(0);
    Ok(Identity { id: answer.producer_id, epoch })
}

fn index(number: u32) -> usize {
    usize::try_from(number).expect("a usize holds 32 bits")
}
