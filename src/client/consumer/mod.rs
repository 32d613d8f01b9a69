//! The consumer: reads partitions from any offset and follows them as they grow.
//!
//! # Overview
//!
//! One task per consumer holds one Fetch stream per broker, each carrying all partitions that are read there. It checks
//! the CRC of every batch, knows each partition's position, and puts batches into a short queue; the [`Consumer`] takes
//! them out and decodes records as they are asked for. When the queue is full the task reads nothing, and HTTP/2's
//! windows stop the brokers.
//!
//! # Racks
//!
//! A partition is read at its leader or, when the consumer names its [rack](ConsumerOptions::rack), at an in-sync replica there if there is
//! one (`client/nearest`). Nobody knows more than the leader, so a follower that refuses, breaks off, or is silent while the log goes on
//! sends the partition to its leader, at once or after about five seconds (`nearness`). Metadata says later where it may be read again:
//! after a first stay of five seconds, and every [`metadata_age`](super::Options::metadata_age). Only a leader's word that a position is
//! out of range is taken. Each request says the newest leader epoch that is known, from metadata or from an answer: a broker that was replaced
//! without having heard of it refuses, and never tells a position that was reached elsewhere that it lies above the log's end.
//!
//! # Invariants
//!
//! - A partition's records come in offset order, none twice and none left out: a stream that breaks is opened again at
//!   the position behind the last batch that went into the queue.
//! - Nothing that was fetched before a seek comes out after it: batches carry the generation of their assignment.
//! - At most `queue` responses of about `max_bytes` wait here, and a stream window per broker.
//!
//! # Shutdown
//!
//! The task ends when the consumer is dropped; [`Consumer::close`] also joins it. It owns nothing worth saving.

mod driver;
mod nearness;
mod partition;
mod position;
mod stream;
mod streams;

use std::{collections::BTreeMap, ops::Range, sync::Arc, time::Duration};

use tokio::sync::mpsc;

use self::driver::{Command, Driver};
use super::{Client, admin::OffsetAt, error::ConsumeError};
use crate::{
    model::Offset,
    record::{Batch, Malformed, Record, Records},
    task::Tasks,
};

/// What a consumer does when its position is not in the log any more, or not yet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnOutOfRange {
    /// Stops there and says so, with the log's start and end.
    #[default]
    Fail,
    /// Goes on at the first offset there is.
    Earliest,
    /// Goes on at the end.
    Latest,
}

/// What a consumer does at records that are stored and that nobody can decode.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnUndecodable {
    /// Stops there, with an error that says where reading can go on.
    #[default]
    Fail,
    /// Reports each such batch once as [`ConsumeError::Undecodable`], with `skipped` set, and goes on behind it with the next call.
    Skip,
}

/// What a consumer may be told.
#[derive(Clone, Debug)]
pub struct ConsumerOptions {
    /// Brokers hold back less than so many bytes for up to `max_wait`. 1.
    pub min_bytes: u32,
    /// About how many bytes one response carries. 1 MiB.
    pub max_bytes: u32,
    /// How long a broker may hold back less than `min_bytes`. 500 ms.
    pub max_wait: Duration,
    /// How many responses wait to be consumed. 4.
    pub queue: usize,
    /// What to do at a position that is not in the log. Fail.
    pub on_out_of_range: OnOutOfRange,
    /// What to do at records that cannot be decoded. Fail.
    pub on_undecodable: OnUndecodable,
    /// The rack in which it runs, as brokers call theirs (`broker.rack`): it is served by in-sync replicas there where it can be,
    /// which costs no traffic between racks. Records come a moment later than from the leader: when its follower has heard that
    /// they are committed. None: leaders alone serve it.
    pub rack: Option<String>,
}

impl ConsumerOptions {
    /// Names the rack; an empty name is none.
    #[must_use]
    pub fn rack(self, rack: impl Into<String>) -> Self {
        Self { rack: Some(rack.into()).filter(|rack| !rack.is_empty()), ..self }
    }
}

impl Default for ConsumerOptions {
    fn default() -> Self {
        Self {
            min_bytes: 1,
            max_bytes: 1 << 20,
            max_wait: Duration::from_millis(500),
            queue: 4,
            on_out_of_range: OnOutOfRange::Fail,
            on_undecodable: OnUndecodable::Fail,
            rack: None,
        }
    }
}

/// A record as it was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConsumedRecord {
    /// Its topic.
    pub topic: Arc<str>,
    /// Its partition.
    pub partition: u32,
    /// Its offset.
    pub offset: Offset,
    /// What was written.
    pub record: Record,
}

/// A whole batch as it was read, checked and not decoded.
#[derive(Clone, Debug)]
pub struct ConsumedBatch {
    /// Its topic.
    pub topic: Arc<str>,
    /// Its partition.
    pub partition: u32,
    /// The batch. Its first records may lie below `from`.
    pub batch: Batch,
    /// The position: records below it were not asked for.
    pub from: Offset,
    /// The partition's high watermark when the batch was sent.
    pub high_watermark: Offset,
}

impl ConsumedBatch {
    /// Its records from the position on.
    ///
    /// # Errors
    /// When it cannot be decompressed; the iterator's errors say which record is malformed.
    pub fn records(&self) -> Result<impl Iterator<Item = Result<(Offset, Record), Malformed>> + use<>, Malformed> {
        let from = self.from;
        Ok(self.batch.records()?.filter(move |record| record.as_ref().map_or(true, |(offset, _)| *offset >= from)))
    }
}

/// What comes out of the task's queue.
struct Item {
    topic: Arc<str>,
    partition: u32,
    /// That of the assignment that it was fetched for.
    generation: u64,
    what: What,
}

enum What {
    Batch {
        batch: Batch,
        from: Offset,
        high_watermark: Offset,
    },
    /// The position was out of range and has moved, as the options say.
    Moved(Offset),
    Failed(ConsumeError),
}

#[derive(Debug)]
struct Assigned {
    generation: u64,
    position: Offset,
}

/// The batch whose records are being handed out.
#[derive(Debug)]
struct Current {
    topic: Arc<str>,
    partition: u32,
    records: Records,
    position: Offset,
    /// The batch's offsets.
    base: Offset,
    end: Offset,
}

/// Reads partitions.
///
/// ```no_run
/// # async fn example(client: strandline::client::Client) -> Result<(), Box<dyn std::error::Error>> {
/// use strandline::client::{ConsumerOptions, OffsetAt};
///
/// let mut consumer = client.consumer(ConsumerOptions::default());
/// consumer.assign("orders", 0, OffsetAt::Earliest).await?;
/// loop {
///     // Waits for new records at the end of the log.
///     let next = consumer.next().await?;
///     println!("{}: {:?}", next.offset, next.record.value);
/// }
/// # }
/// ```
#[derive(Debug)]
pub struct Consumer {
    client: Client,
    commands: mpsc::Sender<Command>,
    items: mpsc::Receiver<Item>,
    assigned: BTreeMap<(Arc<str>, u32), Assigned>,
    current: Option<Current>,
    on_undecodable: OnUndecodable,
    skipped_records: u64,
    next_generation: u64,
    tasks: Tasks,
}

impl Consumer {
    pub(super) fn start(client: Client, options: ConsumerOptions) -> Self {
        let (commands, received) = mpsc::channel(16);
        let (output, items) = mpsc::channel(options.queue.max(1));
        let tasks = Tasks::new();
        let on_undecodable = options.on_undecodable;
        let driver = Driver::new(client.clone(), options, tasks.clone(), output);
        tasks.spawn("consumer", driver.run(received));
        Self {
            client,
            commands,
            items,
            assigned: BTreeMap::new(),
            current: None,
            on_undecodable,
            skipped_records: 0,
            next_generation: 0,
            tasks,
        }
    }

    /// Adds a partition, read from `start` on. One that is assigned already moves there.
    ///
    /// # Errors
    /// When the topic or the partition does not exist, or its leader cannot say where `start` is.
    pub async fn assign(&mut self, topic: &str, partition: u32, start: OffsetAt) -> Result<(), ConsumeError> {
        let position = self.client.admin().offset(topic, partition, start).await?;
        self.assign_at(topic, partition, position).await
    }

    /// Adds a partition, read from an offset on.
    ///
    /// # Errors
    /// When the topic or the partition does not exist. Whether the log holds the offset comes out of reading.
    pub async fn assign_at(&mut self, topic: &str, partition: u32, position: Offset) -> Result<(), ConsumeError> {
        let route = self.client.topic(topic).await?;
        let partitions = u32::try_from(route.partitions.len()).unwrap_or(u32::MAX);
        if partition >= partitions {
            return Err(ConsumeError::UnknownPartition { topic: topic.to_owned(), partition, partitions });
        }
        let generation = self.next_generation;
        self.next_generation += 1;
        let topic: Arc<str> = topic.into();
        self.forget_current(&topic, partition);
        self.assigned.insert((topic.clone(), partition), Assigned { generation, position });
        let command = Command::Assign { topic, topic_id: route.id, partition, generation, position };
        self.commands.send(command).await.map_err(|_| ConsumeError::Closed)
    }

    /// Reads a partition no more.
    ///
    /// # Errors
    /// When it is not assigned.
    pub async fn unassign(&mut self, topic: &str, partition: u32) -> Result<(), ConsumeError> {
        let key = (Arc::from(topic), partition);
        if self.assigned.remove(&key).is_none() {
            return Err(not_assigned(topic, partition));
        }
        self.forget_current(topic, partition);
        let command = Command::Unassign { topic: key.0, partition };
        self.commands.send(command).await.map_err(|_| ConsumeError::Closed)
    }

    /// Goes on reading a partition elsewhere.
    ///
    /// # Errors
    /// When it is not assigned.
    pub async fn seek(&mut self, topic: &str, partition: u32, position: Offset) -> Result<(), ConsumeError> {
        self.position(topic, partition)?;
        self.assign_at(topic, partition, position).await
    }

    /// Goes on reading a partition at its start, its end, or a time.
    ///
    /// # Errors
    /// When it is not assigned, or its leader cannot be asked.
    pub async fn seek_to(&mut self, topic: &str, partition: u32, to: OffsetAt) -> Result<(), ConsumeError> {
        self.position(topic, partition)?;
        self.assign(topic, partition, to).await
    }

    /// The offset of the next record that comes from a partition.
    ///
    /// # Errors
    /// When it is not assigned.
    pub fn position(&self, topic: &str, partition: u32) -> Result<Offset, ConsumeError> {
        if let Some(current) = &self.current
            && &*current.topic == topic
            && current.partition == partition
        {
            return Ok(current.position);
        }
        let assigned = self.assigned.get(&(Arc::from(topic), partition));
        assigned.map(|assigned| assigned.position).ok_or_else(|| not_assigned(topic, partition))
    }

    /// The next record of any assigned partition; waits until there is one. Dropping the future loses nothing.
    ///
    /// # Errors
    /// When a partition cannot be read on. It is left at its position until it is assigned or sought anew; the others
    /// go on with the next call. With [`OnUndecodable::Skip`] a batch that cannot be decoded is such an error too, and the partition
    /// goes on behind it.
    pub async fn next(&mut self) -> Result<ConsumedRecord, ConsumeError> {
        loop {
            if let Some(record) = self.next_of_current()? {
                return Ok(record);
            }
            let batch = self.fetch().await?;
            self.begin(batch)?;
        }
    }

    /// A record that is there without waiting for the network.
    ///
    /// # Errors
    /// As [`Consumer::next`].
    pub fn try_next(&mut self) -> Result<Option<ConsumedRecord>, ConsumeError> {
        loop {
            if let Some(record) = self.next_of_current()? {
                return Ok(Some(record));
            }
            let Ok(item) = self.items.try_recv() else { return Ok(None) };
            let Some(batch) = self.accept(item)? else { continue };
            self.begin(batch)?;
        }
    }

    /// The next whole batch, for callers that decode by themselves. What is left of a batch that [`Consumer::next`] has
    /// begun is skipped.
    ///
    /// # Errors
    /// As [`Consumer::next`].
    pub async fn next_batch(&mut self) -> Result<ConsumedBatch, ConsumeError> {
        self.end_current();
        let batch = self.fetch().await?;
        self.set_position(&batch.topic, batch.partition, batch.batch.end_offset());
        Ok(batch)
    }

    /// How many records were skipped because nobody can decode them ([`OnUndecodable::Skip`]).
    pub fn skipped_records(&self) -> u64 {
        self.skipped_records
    }

    /// Ends the consumer's task.
    pub async fn close(self) {
        self.tasks.stop().await;
    }

    /// Hands out the records of a batch from here on.
    fn begin(&mut self, batch: ConsumedBatch) -> Result<(), ConsumeError> {
        let ConsumedBatch { topic, partition, batch, from: position, .. } = batch;
        let (base, end) = (batch.base_offset(), batch.end_offset());
        let records =
            batch.records().map_err(|source| self.undecodable(&topic, partition, base, position..end, source))?;
        self.current = Some(Current { topic, partition, records, position, base, end });
        Ok(())
    }

    /// Skips what cannot be decoded, or stops the partition there.
    fn undecodable(
        &mut self,
        topic: &Arc<str>,
        partition: u32,
        batch: Offset,
        lost: Range<Offset>,
        source: Malformed,
    ) -> ConsumeError {
        let skipped = self.on_undecodable == OnUndecodable::Skip;
        if skipped {
            self.skipped_records += lost.end.since(lost.start);
            self.set_position(topic, partition, lost.end);
        } else {
            self.halt(topic, partition, lost.start);
        }
        ConsumeError::Undecodable {
            topic: topic.to_string(),
            partition,
            batch,
            offset: lost.start,
            next: lost.end,
            skipped,
            source,
        }
    }

    /// Reads a partition no further: it stands there until it is assigned or sought anew.
    fn halt(&mut self, topic: &Arc<str>, partition: u32, position: Offset) {
        if let Some(assigned) = self.assigned.get_mut(&(topic.clone(), partition)) {
            // What is on the way is of an assignment before.
            *assigned = Assigned { generation: self.next_generation, position };
            self.next_generation += 1;
        }
        // Where there is no room for it, what is read on is passed over.
        let _unread = self.commands.try_send(Command::Unassign { topic: topic.clone(), partition });
    }

    fn next_of_current(&mut self) -> Result<Option<ConsumedRecord>, ConsumeError> {
        let Some(current) = &mut self.current else { return Ok(None) };
        for record in current.records.by_ref() {
            let (offset, record) = match record {
                Ok(record) => record,
                Err(source) => {
                    let (topic, partition, base) = (current.topic.clone(), current.partition, current.base);
                    let lost = current.position..current.end;
                    self.current = None;
                    return Err(self.undecodable(&topic, partition, base, lost, source));
                }
            };
            if offset >= current.position {
                current.position = offset.plus(1);
                let (topic, partition) = (current.topic.clone(), current.partition);
                return Ok(Some(ConsumedRecord { topic, partition, offset, record }));
            }
        }
        self.end_current();
        Ok(None)
    }

    async fn fetch(&mut self) -> Result<ConsumedBatch, ConsumeError> {
        loop {
            let item = self.items.recv().await.ok_or(ConsumeError::Closed)?;
            if let Some(batch) = self.accept(item)? {
                return Ok(batch);
            }
        }
    }

    /// The item's batch, unless the item is of an earlier assignment.
    fn accept(&mut self, item: Item) -> Result<Option<ConsumedBatch>, ConsumeError> {
        let (topic, partition) = (item.topic, item.partition);
        let key = (topic, partition);
        let Some(assigned) = self.assigned.get_mut(&key).filter(|assigned| assigned.generation == item.generation)
        else {
            return Ok(None);
        };
        match item.what {
            What::Batch { batch, from, high_watermark } => {
                Ok(Some(ConsumedBatch { topic: key.0, partition, batch, from, high_watermark }))
            }
            What::Moved(position) => {
                assigned.position = position;
                Ok(None)
            }
            What::Failed(error) => Err(error),
        }
    }

    fn end_current(&mut self) {
        if let Some(current) = self.current.take() {
            self.set_position(&current.topic, current.partition, current.end);
        }
    }

    fn forget_current(&mut self, topic: &str, partition: u32) {
        if self.current.as_ref().is_some_and(|current| &*current.topic == topic && current.partition == partition) {
            self.current = None;
        }
    }

    fn set_position(&mut self, topic: &Arc<str>, partition: u32, position: Offset) {
        if let Some(assigned) = self.assigned.get_mut(&(topic.clone(), partition)) {
            assigned.position = position;
        }
    }
}

impl Drop for Consumer {
    fn drop(&mut self) {
        self.tasks.cancel();
    }
}

fn not_assigned(topic: &str, partition: u32) -> ConsumeError {
    ConsumeError::NotAssigned { topic: topic.to_owned(), partition }
}
