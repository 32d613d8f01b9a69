//! The consumer: reads partitions from any offset and follows them as they grow.
//!
//! # Overview
//!
//! One task per consumer holds a Fetch stream to each broker that serves its partitions; a stream has at most
//! `limits::MAX_FETCH_PARTITIONS` partitions. The task verifies the CRC of every batch, tracks each partition's
//! position, and puts batches into a short queue. The [`Consumer`] removes batches from the queue and decodes records
//! on demand. While the queue is full the task reads nothing, and HTTP/2's windows stop the brokers.
//!
//! # Racks
//!
//! A partition is read at its leader. If the consumer names its [rack](ConsumerOptions::rack), the partition is read at
//! an in-sync replica in that rack if there is one (`replica_selector`). The leader has the newest state. So an error,
//! an invalid response or a broken stream of a follower moves the partition to its leader (`read_replica`). The first
//! such stay at the leader lasts five seconds. After a stay, and every
//! [`metadata_age`](super::ClientOptions::metadata_age), new metadata decides where the partition is read.
//!
//! A follower serves reads only while it is in sync. It ends all reads of a partition when it loses the leader or
//! leaves the ISR. If the lease of a serving broker expires, the consumer refreshes metadata from other brokers.
//!
//! An out-of-range error is accepted only from a leader. Each request carries the newest leader epoch from metadata or
//! from a response. A deposed leader without this epoch refuses the request; otherwise it could report a position above
//! its own log end as out of range.
//!
//! # Invariants
//!
//! - A partition's records are returned in offset order, without duplicates and without gaps. A broken stream is
//!   reopened at the position after the last batch that the task accepted. The exceptions are a position that is reset
//!   ([`OffsetResetPolicy`]), and a batch that is skipped ([`OnUndecodable::Skip`]).
//! - A batch that was fetched before a seek is never returned after it: batches carry the generation of their
//!   assignment.
//! - The consumer holds at most:
//!   - one response of about `max_bytes`
//!   - `queue` further batches
//!   - the batch whose records it returns
//!   - the unread bytes of one stream window per stream
//!
//! # Shutdown
//!
//! The task ends when the consumer is dropped; [`Consumer::close`] also joins it. The task has no state to save.

mod driver;
mod fetch_state;
mod read_replica;
mod streams;

use std::{collections::BTreeMap, ops::Range, sync::Arc, time::Duration};

use tokio::sync::mpsc;

use self::driver::{ConsumerCommand, ConsumerDriver};
use super::{Client, admin::OffsetSpec, error::ConsumeError};
use crate::{
    model::Offset,
    record::{Batch, MalformedBatch, Record, Records},
    task::Tasks,
};

/// Policy for a position below the log start or above the high watermark.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OffsetResetPolicy {
    /// Stops the partition and returns an error with the log's start and end.
    #[default]
    Fail,
    /// Continues at the first readable offset.
    Earliest,
    /// Continues at the first uncommitted offset.
    Latest,
}

/// Policy for stored records that cannot be decoded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnUndecodable {
    /// Stops the partition and returns an error with the offset at which reading can continue.
    #[default]
    Fail,
    /// Returns [`ConsumeError::Undecodable`] with `skipped` set, once per such batch, and continues after the batch
    /// with the next call.
    Skip,
}

/// Settings of a consumer.
#[derive(Clone, Debug)]
pub struct ConsumerOptions {
    /// Minimum bytes of a response; brokers delay a smaller response by up to `max_wait`. Default: 1.
    pub min_bytes: u32,
    /// Approximate maximum bytes of a response. Default: 1 MiB.
    pub max_bytes: u32,
    /// Maximum delay of a response that is smaller than `min_bytes`. Default: 500 ms.
    pub max_wait: Duration,
    /// Maximum number of batches in the queue. Default: 4.
    pub queue: usize,
    /// Policy for a position that is not in the log. Default: fail.
    pub on_out_of_range: OffsetResetPolicy,
    /// Policy for records that cannot be decoded. Default: fail.
    pub on_undecodable: OnUndecodable,
    /// Rack of the consumer, named as in `broker.rack`. In-sync replicas in the rack serve the consumer where possible,
    /// which avoids traffic between racks. Records arrive slightly later than from the leader, because a follower
    /// serves a record once it has received a high watermark above the record. With `None` only leaders serve the
    /// consumer.
    pub rack: Option<String>,
}

impl ConsumerOptions {
    /// Sets the rack; an empty name means none.
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
            on_out_of_range: OffsetResetPolicy::Fail,
            on_undecodable: OnUndecodable::Fail,
            rack: None,
        }
    }
}

/// Record as read from a partition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConsumedRecord {
    /// Topic name.
    pub topic: Arc<str>,
    /// Partition number.
    pub partition: u32,
    /// Offset of the record.
    pub offset: Offset,
    /// Content of the record as it was written.
    pub record: Record,
}

/// Complete batch as read from a partition: verified, not decoded.
#[derive(Clone, Debug)]
pub struct ConsumedBatch {
    /// Topic name.
    pub topic: Arc<str>,
    /// Partition number.
    pub partition: u32,
    /// The batch. Its first records may lie below `from`.
    pub batch: Batch,
    /// Position of the consumer before this batch. Records of the batch below this position are not for the caller.
    pub from: Offset,
    /// High watermark at the replica that sent the batch, at that time.
    pub high_watermark: Offset,
}

impl ConsumedBatch {
    /// Returns the records of the batch from the offset `from` on.
    ///
    /// # Errors
    /// The batch cannot be decompressed. Errors of the iterator describe the malformed record.
    pub fn records(
        &self,
    ) -> Result<impl Iterator<Item = Result<(Offset, Record), MalformedBatch>> + use<>, MalformedBatch> {
        let from = self.from;
        Ok(self.batch.records()?.filter(move |record| record.as_ref().map_or(true, |(offset, _)| *offset >= from)))
    }
}

/// Event in the task's queue.
struct QueuedEvent {
    topic: Arc<str>,
    partition: u32,
    /// Generation of the assignment for which the event was fetched.
    generation: u64,
    event: ConsumerEvent,
}

enum ConsumerEvent {
    Batch {
        batch: Batch,
        from: Offset,
        high_watermark: Offset,
    },
    /// The position was out of range and was reset according to the options.
    PositionReset(Offset),
    Failed(ConsumeError),
}

/// Partition that is assigned to the consumer.
#[derive(Debug)]
struct AssignedPartition {
    /// Number of this assignment. Events of an earlier assignment of the partition are dropped.
    generation: u64,
    /// Offset of the next record. While the current batch is of this partition, [`CurrentBatch::position`] is that
    /// offset.
    position: Offset,
}

/// Batch whose records are being returned.
#[derive(Debug)]
struct CurrentBatch {
    topic: Arc<str>,
    partition: u32,
    records: Records,
    /// Offset of the next record to return.
    position: Offset,
    /// First offset of the batch; `end` is the offset after its last record.
    base: Offset,
    end: Offset,
}

/// Reads records from its assigned partitions.
///
/// ```no_run
/// # async fn example(client: strandline_client::Client) -> Result<(), Box<dyn std::error::Error>> {
/// use strandline_client::{ConsumerOptions, OffsetSpec};
///
/// let mut consumer = client.consumer(ConsumerOptions::default());
/// consumer.assign("orders", 0, OffsetSpec::Earliest).await?;
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
    commands: mpsc::Sender<ConsumerCommand>,
    events: mpsc::Receiver<QueuedEvent>,
    assigned: BTreeMap<(Arc<str>, u32), AssignedPartition>,
    current: Option<CurrentBatch>,
    on_undecodable: OnUndecodable,
    skipped_records: u64,
    next_generation: u64,
    tasks: Tasks,
}

impl Consumer {
    pub(super) fn start(client: Client, options: ConsumerOptions) -> Self {
        let (commands, command_queue) = mpsc::channel(16);
        let (output, events) = mpsc::channel(options.queue.max(1));
        let tasks = Tasks::new();
        let on_undecodable = options.on_undecodable;
        let driver = ConsumerDriver::new(client.clone(), options, tasks.clone(), output);
        tasks.spawn("consumer", driver.run(command_queue));
        Self {
            client,
            commands,
            events,
            assigned: BTreeMap::new(),
            current: None,
            on_undecodable,
            skipped_records: 0,
            next_generation: 0,
            tasks,
        }
    }

    /// Adds a partition that is read from `start` on. A partition that is assigned already moves to `start`.
    ///
    /// # Errors
    /// The topic or the partition does not exist, or its leader cannot look up `start`.
    pub async fn assign(&mut self, topic: &str, partition: u32, start: OffsetSpec) -> Result<(), ConsumeError> {
        let position = self.client.admin().offset(topic, partition, start).await?;
        self.assign_at(topic, partition, position).await
    }

    /// Adds a partition that is read from the offset `position` on. A partition that is assigned already moves to
    /// `position`.
    ///
    /// # Errors
    /// The topic cannot be looked up, or the partition does not exist. An offset outside the log is reported by the
    /// first read.
    pub async fn assign_at(&mut self, topic: &str, partition: u32, position: Offset) -> Result<(), ConsumeError> {
        let route = self.client.topic(topic).await?;
        let partitions = u32::try_from(route.partitions.len()).unwrap_or(u32::MAX);
        if partition >= partitions {
            return Err(ConsumeError::UnknownPartition { topic: topic.to_owned(), partition, partitions });
        }
        let generation = self.next_generation;
        self.next_generation += 1;
        let topic: Arc<str> = topic.into();
        self.drop_current(&topic, partition);
        self.assigned.insert((topic.clone(), partition), AssignedPartition { generation, position });
        let command = ConsumerCommand::Assign { topic, topic_id: route.id, partition, generation, position };
        self.commands.send(command).await.map_err(|_| ConsumeError::Closed)
    }

    /// Removes a partition.
    ///
    /// # Errors
    /// The partition is not assigned.
    pub async fn unassign(&mut self, topic: &str, partition: u32) -> Result<(), ConsumeError> {
        let key = (Arc::from(topic), partition);
        if self.assigned.remove(&key).is_none() {
            return Err(not_assigned(topic, partition));
        }
        self.drop_current(topic, partition);
        let command = ConsumerCommand::Unassign { topic: key.0, partition };
        self.commands.send(command).await.map_err(|_| ConsumeError::Closed)
    }

    /// Moves the position of a partition to an offset.
    ///
    /// # Errors
    /// The partition is not assigned. See also [`Consumer::assign_at`].
    pub async fn seek(&mut self, topic: &str, partition: u32, position: Offset) -> Result<(), ConsumeError> {
        self.position(topic, partition)?;
        self.assign_at(topic, partition, position).await
    }

    /// Moves the position of a partition to its start, its end, or a time.
    ///
    /// # Errors
    /// The partition is not assigned, or its leader cannot look up the offset.
    pub async fn seek_to(&mut self, topic: &str, partition: u32, to: OffsetSpec) -> Result<(), ConsumeError> {
        self.position(topic, partition)?;
        self.assign(topic, partition, to).await
    }

    /// Returns the offset of a partition's next record.
    ///
    /// # Errors
    /// The partition is not assigned.
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

    /// Returns the next record of any assigned partition; waits until there is one. Dropping the future loses no
    /// record.
    ///
    /// # Errors
    /// A partition cannot be read further. It keeps its position until it is assigned or sought again, and the next
    /// call continues with the other partitions. With [`OnUndecodable::Skip`], a batch that cannot be decoded is an
    /// error as well, but its partition continues after the batch.
    pub async fn next(&mut self) -> Result<ConsumedRecord, ConsumeError> {
        loop {
            if let Some(record) = self.next_in_batch()? {
                return Ok(record);
            }
            let batch = self.receive_batch().await?;
            self.start_batch(batch)?;
        }
    }

    /// Returns the next record if it was already fetched, without waiting for the network; `None` if it was not.
    ///
    /// # Errors
    /// See [`Consumer::next`].
    pub fn try_next(&mut self) -> Result<Option<ConsumedRecord>, ConsumeError> {
        loop {
            if let Some(record) = self.next_in_batch()? {
                return Ok(Some(record));
            }
            let Ok(event) = self.events.try_recv() else { return Ok(None) };
            let Some(batch) = self.accept(event)? else { continue };
            self.start_batch(batch)?;
        }
    }

    /// Returns the next complete batch, for callers that decode batches themselves. Skips the rest of a batch that
    /// [`Consumer::next`] has started to return.
    ///
    /// # Errors
    /// See [`Consumer::next`].
    pub async fn next_batch(&mut self) -> Result<ConsumedBatch, ConsumeError> {
        self.end_current();
        let batch = self.receive_batch().await?;
        self.set_position(&batch.topic, batch.partition, batch.batch.end_offset());
        Ok(batch)
    }

    /// Returns the number of records skipped because they cannot be decoded ([`OnUndecodable::Skip`]).
    pub fn skipped_records(&self) -> u64 {
        self.skipped_records
    }

    /// Ends and joins the consumer's task.
    pub async fn close(self) {
        self.tasks.stop().await;
    }

    /// Makes a batch the current one, whose records are returned next. If the batch cannot be decompressed, skips it or
    /// stops the partition, according to the options, and returns the error.
    fn start_batch(&mut self, batch: ConsumedBatch) -> Result<(), ConsumeError> {
        let ConsumedBatch { topic, partition, batch, from: position, .. } = batch;
        let (base, end) = (batch.base_offset(), batch.end_offset());
        let records = batch
            .records()
            .map_err(|source| self.on_undecodable_records(&topic, partition, base, position..end, source))?;
        self.current = Some(CurrentBatch { topic, partition, records, position, base, end });
        Ok(())
    }

    /// Skips the records in the range `lost`, which cannot be decoded, or stops the partition at the start of the
    /// range, according to the options. Returns the error in both cases. `batch` is the first offset of the batch.
    fn on_undecodable_records(
        &mut self,
        topic: &Arc<str>,
        partition: u32,
        batch: Offset,
        lost: Range<Offset>,
        source: MalformedBatch,
    ) -> ConsumeError {
        let skipped = self.on_undecodable == OnUndecodable::Skip;
        if skipped {
            self.skipped_records += lost.end.since(lost.start);
            self.set_position(topic, partition, lost.end);
        } else {
            self.stop_partition(topic, partition, lost.start);
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

    /// Stops a partition at this position until it is assigned or sought again.
    fn stop_partition(&mut self, topic: &Arc<str>, partition: u32, position: Offset) {
        if let Some(assigned) = self.assigned.get_mut(&(topic.clone(), partition)) {
            // The new generation invalidates the events in the queue.
            *assigned = AssignedPartition { generation: self.next_generation, position };
            self.next_generation += 1;
        }
        // If the channel is full, the task continues to read the partition, and `accept` drops its events.
        let _ = self.commands.try_send(ConsumerCommand::Unassign { topic: topic.clone(), partition });
    }

    /// Returns the next record of the current batch from the position on. Returns `None` without a current batch, and
    /// after the last record: the batch has then ended. A record that cannot be decoded also ends the batch, with an
    /// error.
    fn next_in_batch(&mut self) -> Result<Option<ConsumedRecord>, ConsumeError> {
        let Some(current) = &mut self.current else { return Ok(None) };
        for record in current.records.by_ref() {
            let (offset, record) = match record {
                Ok(record) => record,
                Err(source) => {
                    let (topic, partition, base) = (current.topic.clone(), current.partition, current.base);
                    let lost = current.position..current.end;
                    self.current = None;
                    return Err(self.on_undecodable_records(&topic, partition, base, lost, source));
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

    /// Waits for the next batch of an assigned partition.
    async fn receive_batch(&mut self) -> Result<ConsumedBatch, ConsumeError> {
        loop {
            let event = self.events.recv().await.ok_or(ConsumeError::Closed)?;
            if let Some(batch) = self.accept(event)? {
                return Ok(batch);
            }
        }
    }

    /// Processes an event. Returns the batch or the error of the event. Returns `None` for a reset position, which is
    /// stored, and for an event of an earlier assignment, which is dropped.
    fn accept(&mut self, queued: QueuedEvent) -> Result<Option<ConsumedBatch>, ConsumeError> {
        let (topic, partition) = (queued.topic, queued.partition);
        let key = (topic, partition);
        let Some(assigned) = self.assigned.get_mut(&key).filter(|assigned| assigned.generation == queued.generation)
        else {
            return Ok(None);
        };
        match queued.event {
            ConsumerEvent::Batch { batch, from, high_watermark } => {
                Ok(Some(ConsumedBatch { topic: key.0, partition, batch, from, high_watermark }))
            }
            ConsumerEvent::PositionReset(position) => {
                assigned.position = position;
                Ok(None)
            }
            ConsumerEvent::Failed(error) => Err(error),
        }
    }

    /// Skips the rest of the current batch, if there is one. The position moves behind the batch.
    fn end_current(&mut self) {
        if let Some(current) = self.current.take() {
            self.set_position(&current.topic, current.partition, current.end);
        }
    }

    /// Drops the current batch if it is of this partition. The position stays.
    fn drop_current(&mut self, topic: &str, partition: u32) {
        if self.current.as_ref().is_some_and(|current| &*current.topic == topic && current.partition == partition) {
            self.current = None;
        }
    }

    /// Sets the position of a partition if it is still assigned.
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
