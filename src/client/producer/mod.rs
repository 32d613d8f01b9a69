//! The producer: sends records in order and, with default options, once, and returns their acknowledgements.
//!
//! # Overview
//!
//! ```text
//! send ─► partitioner ─► partition queue: open batch ─► sealed batches        (sender's thread, one short lock)
//!                                                            │ notification
//!             task: in-flight batches (bounded per partition) ─► stream to the leader ─► broker
//!                                         ▲ responses, lost streams, new leaders, ended pauses
//! ```
//!
//! Senders copy a record into the open batch of its partition and get a [`Delivery`]. One task per producer takes
//! sealed batches, numbers them, sends them on one stream per leader and receives the responses. `in_flight` decides
//! which batches may be in flight and which are repeated; it is pure.
//!
//! With `linger` 0 a batch is sent as soon as its partition is below the in-flight limit, and later records form the
//! next batch. Batches grow with load, and a single record does not wait.
//!
//! # Invariants
//!
//! - With acknowledgements, records of one partition are appended in the order in which `send` accepted them.
//! - With acknowledgements and `idempotent`, no record is appended twice: the broker detects a repeated batch by
//!   producer id and sequence. If the broker can no longer detect this after a lost response, the send fails as
//!   [`SendError::Unknown`], and the batch is not repeated.
//! - Queued and in-flight records take at most `memory_bytes`, or the size of one batch or record if that is larger.
//!   Above the limit `send` waits.
//!
//! # Shutdown
//!
//! [`Producer::close`] seals all batches, waits until each is acknowledged or has failed, and joins the task. When the
//! last handle is dropped, the task ends and unacknowledged records fail as [`SendError::Closed`].

mod completion;
mod driver;
mod driver_event;
mod in_flight;
mod partition_queue;
mod partitioner;
#[doc(hidden)]
pub mod produce_request;
mod stream;
mod topic_queues;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use tokio::sync::{Notify, Semaphore, mpsc, oneshot};

use self::{
    completion::Completion,
    driver::{ProducerCommand, ProducerDriver},
    in_flight::{DeliveryGuarantee, ProducerIdAndEpoch},
    partition_queue::{BatchLimits, PartitionQueue},
    topic_queues::TopicQueues,
};
pub use self::{
    completion::{Ack, Delivery},
    partitioner::{HashPartitioner, PartitionChoice, Partitioner, StickyPartitioner, murmur2},
};
use super::{
    Client, TopicRoute,
    address::BrokerAddress,
    connection::log_client,
    error::{CallError, SendError},
};
use crate::{
    limits,
    model::{Acks, Compression},
    proto::v1,
    record::{Batch, BatchBuilder, HEADER_BYTES, Header},
    task::{
        Tasks,
        lock::{Mutex, RwLock},
    },
};

/// Settings of a producer.
#[derive(Clone, Debug)]
pub struct ProducerOptions {
    /// Size before compression, in bytes, at which a batch is sent. Default: 64 KiB.
    pub batch_bytes: usize,
    /// Time for which a batch that is not full waits for more records. With 0 (default) a batch is sent as soon as the
    /// in-flight limit allows.
    pub linger: Duration,
    /// Maximum number of in-flight batches per partition, at least 1. At most `limits::MAX_BATCHES_PER_PRODUCER` if
    /// idempotent; always 1 if not idempotent, except with `acks=0`. Default: 16.
    pub in_flight: usize,
    /// Acknowledgement that completes a send. Default: `All`.
    pub acks: Acks,
    /// Compression of batches. Default: none.
    pub compression: Compression,
    /// Partitioner for records that name no partition. Default: [`HashPartitioner`].
    pub partitioner: Arc<dyn Partitioner>,
    /// Maximum bytes of queued and in-flight records; above it `send` waits. A record that is larger than the maximum
    /// waits until the memory of all other records is released. Default: 32 MiB.
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
            partitioner: Arc::new(HashPartitioner),
            memory_bytes: 32 << 20,
            delivery_timeout: Duration::from_secs(120),
            idempotent: true,
        }
    }
}

impl ProducerOptions {
    /// Returns the delivery guarantee that these options request.
    fn guarantee(&self) -> DeliveryGuarantee {
        match (self.acks, self.idempotent) {
            (Acks::None, _) => DeliveryGuarantee::AtMostOnce,
            (_, true) => DeliveryGuarantee::Idempotent,
            (_, false) => DeliveryGuarantee::AtLeastOnce,
        }
    }

    /// Returns the option `in_flight`, at least 1 and, for an idempotent producer, at most the number of batches among
    /// which brokers detect duplicates.
    fn window(&self) -> usize {
        let max = if self.guarantee() == DeliveryGuarantee::Idempotent {
            limits::MAX_BATCHES_PER_PRODUCER
        } else {
            usize::MAX
        };
        self.in_flight.clamp(1, max)
    }

    /// Returns the memory bound as semaphore permits, one per byte. The bound is `memory_bytes`, but at least
    /// `batch_bytes`, so that one batch fits, and between 1 KiB and 2 GiB.
    fn memory_permits(&self) -> u32 {
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
struct ProducerInner {
    client: Client,
    options: ProducerOptions,
    topics: RwLock<BTreeMap<String, Arc<TopicQueues>>>,
    /// Held by the caller that adds queues, so that no queue is created twice.
    adding: tokio::sync::Mutex<()>,
    /// All partition queues by index.
    queues: Mutex<Vec<Arc<PartitionQueue>>>,
    /// Indexes of the queues with new work for the task.
    dirty: Mutex<Vec<usize>>,
    /// Notified when `dirty` has an entry.
    has_work: Notify,
    /// Free memory, one permit per byte. Closed when the producer ends.
    memory: Semaphore,
}

/// Sends records. Clones share memory, producer id and batches.
///
/// ```no_run
/// # async fn example(client: strandline_client::Client) -> Result<(), Box<dyn std::error::Error>> {
/// use strandline_client::{NewRecord, ProducerOptions};
///
/// let producer = client.producer(ProducerOptions::default()).await?;
/// for order in 0..1000_u32 {
///     // Waits only while the producer's memory is full.
///     let _delivery = producer.send("orders", NewRecord::value(&order.to_be_bytes()).key(b"customer-7")).await?;
/// }
/// // Waits until every record is acknowledged or has failed; returns the first error.
/// producer.flush().await?;
/// producer.close().await?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Producer {
    inner: Arc<ProducerInner>,
    commands: mpsc::Sender<ProducerCommand>,
    /// Ends the task when the last handle is dropped.
    tasks: Arc<StopTasksOnDrop>,
}

/// Cancels the tasks when the last handle is dropped.
#[derive(Debug)]
struct StopTasksOnDrop(Tasks);

impl Drop for StopTasksOnDrop {
    fn drop(&mut self) {
        self.0.cancel();
    }
}

impl Producer {
    /// Requests a producer id if the options need one, and spawns the task.
    pub(super) async fn start(client: Client, options: ProducerOptions) -> Result<Self, CallError> {
        let identity = match options.guarantee() {
            DeliveryGuarantee::Idempotent => Some(request_producer_id(&client).await?),
            _ => None,
        };
        let memory = usize::try_from(options.memory_permits()).expect("a usize holds 32 bits");
        let inner = Arc::new(ProducerInner {
            client,
            options,
            topics: RwLock::default(),
            adding: tokio::sync::Mutex::default(),
            queues: Mutex::default(),
            dirty: Mutex::default(),
            has_work: Notify::new(),
            memory: Semaphore::new(memory),
        });
        let (commands, command_queue) = mpsc::channel(16);
        let tasks = Tasks::new();
        let driver = ProducerDriver::new(inner.clone(), tasks.clone(), identity);
        tasks.spawn("producer", driver.run(command_queue));
        Ok(Self { inner, commands, tasks: Arc::new(StopTasksOnDrop(tasks)) })
    }

    /// Queues a record and returns the future of its acknowledgement. Waits only while the producer's memory is full,
    /// or for a lookup of the topic. The lookup is needed if the producer has no metadata of the topic or the
    /// partition. Records that one caller sends to one partition keep their order.
    ///
    /// # Errors
    /// - The topic cannot be looked up.
    /// - The partition does not exist.
    /// - The record exceeds the topic's maximum size.
    /// - A batch cannot be built.
    /// - The producer is closed.
    ///
    /// The [`Delivery`] returns later errors.
    pub async fn send(&self, topic: &str, record: NewRecord<'_>) -> Result<Delivery, SendError> {
        let queues = self.inner.queues_of(topic, record.partition).await?;
        let bytes = BatchBuilder::record_len(record.key, record.value, record.headers);
        queues.check_size(topic, bytes + HEADER_BYTES)?;
        let permits = self.reserve(bytes).await?;
        let (queue, is_sticky) = queues.choose(&record, &*self.inner.options.partitioner);
        match queue.append(&record, bytes, permits) {
            Ok(appended) => {
                if appended.notify_task {
                    self.inner.notify_driver(queue);
                }
                if is_sticky {
                    queues.count_sticky(queue.partition, bytes, appended.sealed, self.inner.options.batch_bytes);
                }
                Ok(appended.delivery)
            }
            Err(error) => {
                self.inner.release(permits);
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
        let queues = self.inner.queues_of(topic, Some(partition)).await?;
        let bytes = batch.encoded_len();
        queues.check_size(topic, bytes)?;
        let permits = self.reserve(bytes).await?;
        let queue = queues.queue(partition);
        match queue.append_batch(batch, permits) {
            Ok(delivery) => {
                self.inner.notify_driver(queue);
                Ok(delivery)
            }
            Err(error) => {
                self.inner.release(permits);
                Err(error)
            }
        }
    }

    /// Sends all open batches and waits for the results of all records sent before.
    ///
    /// # Errors
    /// An error of a record that had no result at the call, or [`SendError::Closed`] if the producer's task has ended.
    /// Records that had already failed are not included.
    pub async fn flush(&self) -> Result<(), SendError> {
        let (reply, outstanding) = oneshot::channel();
        self.commands.send(ProducerCommand::Flush(reply)).await.map_err(|_| SendError::Closed)?;
        let outstanding: Vec<Arc<Completion>> = outstanding.await.map_err(|_| SendError::Closed)?;
        let mut result = Ok(());
        for completion in outstanding {
            let acknowledged = Delivery::new(completion, 0).await;
            result = result.and(acknowledged.map(|_| ()));
        }
        result
    }

    /// Flushes, then ends the producer's task, also if the flush failed. Other handles return [`SendError::Closed`]
    /// afterwards.
    ///
    /// # Errors
    /// See [`Producer::flush`].
    pub async fn close(self) -> Result<(), SendError> {
        let result = self.flush().await;
        self.tasks.0.stop().await;
        result
    }

    /// Acquires memory for `bytes`, and returns the number of permits to release later. If the memory is full, waits
    /// for it, and has all lingering batches sent, so that a long linger does not hold the memory.
    async fn reserve(&self, bytes: usize) -> Result<u32, SendError> {
        // A record larger than the memory acquires all of it.
        let permits = u32::try_from(bytes).unwrap_or(u32::MAX).min(self.inner.options.memory_permits());
        let permit = match self.inner.memory.try_acquire_many(permits) {
            Ok(permit) => permit,
            Err(_) => {
                self.commands.send(ProducerCommand::FlushLingering).await.map_err(|_| SendError::Closed)?;
                self.inner.memory.acquire_many(permits).await.map_err(|_| SendError::Closed)?
            }
        };
        permit.forget();
        Ok(permits)
    }
}

impl ProducerInner {
    /// Returns the queues of a topic. Looks the topic up and adds queues if it has none yet, or none for `partition`.
    /// Fails if the topic then has no such partition.
    async fn queues_of(&self, topic: &str, partition: Option<u32>) -> Result<Arc<TopicQueues>, SendError> {
        let current = self.topic_queues(topic);
        let is_included =
            |queues: &TopicQueues| partition.is_none_or(|partition| index(partition) < queues.queues.len());
        if let Some(queues) = &current
            && is_included(queues)
        {
            return Ok(queues.clone());
        }
        let client = &self.client;
        let route = if current.is_some() { client.topic_now(topic).await? } else { client.topic(topic).await? };
        let queues = self.add_queues(topic, &route).await;
        match partition.or_else(|| queues.queues.is_empty().then_some(0)) {
            Some(partition) if index(partition) >= queues.queues.len() => Err(SendError::UnknownPartition {
                topic: topic.to_owned(),
                partition,
                partitions: u32::try_from(queues.queues.len()).unwrap_or(u32::MAX),
            }),
            _ => Ok(queues),
        }
    }

    /// Returns the queues of a topic; `None` before its first lookup.
    fn topic_queues(&self, topic: &str) -> Option<Arc<TopicQueues>> {
        self.topics.read().get(topic).cloned()
    }

    /// Creates queues for partitions that have none, and adopts a changed maximum batch size. Returns all queues of the
    /// topic.
    async fn add_queues(&self, topic: &str, route: &TopicRoute) -> Arc<TopicQueues> {
        let _one_at_a_time = self.adding.lock().await;
        let current = self.topic_queues(topic);
        let mut queues = current.as_ref().map(|current| current.queues.clone()).unwrap_or_default();
        if let Some(current) = current
            && current.queues.len() >= route.partitions.len()
            && current.max_message_bytes == route.max_message_bytes
        {
            return current;
        }
        let name: Arc<str> = topic.into();
        let batch_limits = BatchLimits {
            batch_bytes: self
                .options
                .batch_bytes
                .clamp(HEADER_BYTES + 1, route.max_message_bytes.max(HEADER_BYTES + 1)),
            linger: self.options.linger,
            compression: self.options.compression,
            delivery_timeout: self.options.delivery_timeout,
        };
        {
            let mut all_queues = self.queues.lock();
            for partition in queues.len()..route.partitions.len() {
                let partition = u32::try_from(partition).expect("partitions are few");
                let queue = Arc::new(PartitionQueue::new(name.clone(), partition, all_queues.len(), batch_limits));
                all_queues.push(queue.clone());
                queues.push(queue);
            }
        }
        let queues = Arc::new(TopicQueues::new(queues, route.max_message_bytes));
        let mut topics = self.topics.write();
        topics.insert(topic.to_owned(), queues.clone());
        queues
    }

    /// Waits for `pause`, and refreshes the metadata if its generation is not above `used_generation` or a `wanted`
    /// topic is missing. Creates queues for new partitions of all topics that have queues. The brokers in `deferred`
    /// are called after all other brokers.
    async fn refresh_metadata(
        &self,
        used_generation: u64,
        wanted: &BTreeSet<Arc<str>>,
        deferred: &BTreeSet<BrokerAddress>,
        pause: Duration,
    ) -> Result<(), CallError> {
        tokio::time::sleep(pause).await;
        let wanted: Vec<&str> = wanted.iter().map(|name| &**name).collect();
        self.client.refresh_deferring(deferred, used_generation, &wanted).await?;
        let topics: Vec<String> = self.topics.read().keys().cloned().collect();
        for topic in topics {
            if let Some(Ok(route)) = self.client.routing().topic(&topic) {
                self.add_queues(&topic, &route).await;
            }
        }
        Ok(())
    }

    /// Notifies the task that a queue has work, unless the task was notified and has not processed the queue yet.
    fn notify_driver(&self, queue: &PartitionQueue) {
        if queue.mark_queued() {
            self.dirty.lock().push(queue.index);
            self.has_work.notify_one();
        }
    }

    /// Releases the memory permits of a batch, or of a record that was not queued.
    fn release(&self, permits: u32) {
        self.memory.add_permits(index(permits));
    }
}

/// Requests a new producer id from any broker.
async fn request_producer_id(client: &Client) -> Result<ProducerIdAndEpoch, CallError> {
    let call = |channel| async move { log_client(channel).init_producer_id(v1::InitProducerIdRequest {}).await };
    let response = client.retried(|| client.call_any(call)).await?;
    let epoch = i16::try_from(response.producer_epoch).unwrap_or(0);
    Ok(ProducerIdAndEpoch { id: response.producer_id, epoch })
}

fn index(number: u32) -> usize {
    usize::try_from(number).expect("a usize holds 32 bits")
}
