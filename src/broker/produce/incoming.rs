//! The batch of a write before it is queued: checked, in its topic's codec, and with the memory that it takes.

use prost::Message as _;
use tokio::{sync::OwnedSemaphorePermit, time::Instant};

use crate::{
    broker::{Broker, CallMemory, ProducerIdQuota, faults},
    limits,
    model::{Compression, TopicConfig},
    partition::{AppendError, INLINE_BYTES, Memory, Opener, Partition, Refused, Use},
    proto::{
        fault::{Fault, Reason},
        v1::{self, append_request::Payload},
    },
    record::{Batch, BatchBuilder, Fingerprint, HEADER_BYTES, Header, Malformed, TimestampRange, Unbuildable},
    task::clock,
};

/// Most bytes of a message beside its batch with which the batch is kept as it came: it shares the memory of the message.
const MAX_SURPLUS_BYTES: usize = 4 << 10;

/// The batch of a write, checked, and what is known of it.
pub(super) struct Incoming {
    pub(super) batch: Batch,
    /// Of the batch that the client sent; `None` where it sent records.
    pub(super) fingerprint: Option<Fingerprint>,
    /// Those that the client set.
    pub(super) timestamps: TimestampRange,
    /// Why the topic does not take it.
    pub(super) refusal: Option<Refused>,
    /// Produce memory, where some had to be taken before the batch was made.
    permit: Option<OwnedSemaphorePermit>,
}

impl Broker {
    /// Checks the payload of a message of `message_bytes`.
    pub(super) async fn read_payload(
        &self,
        payload: Option<Payload>,
        message_bytes: usize,
        partition: &Partition,
        config: &TopicConfig,
        quota: &ProducerIdQuota,
    ) -> Result<Incoming, Fault> {
        let (batch, fingerprint, timestamps) = match payload {
            Some(Payload::Batch(bytes)) => {
                let (mut batch, timestamps) = received(bytes)?;
                if message_bytes > batch.encoded_len() + MAX_SURPLUS_BYTES {
                    // It would keep all of its message in memory.
                    batch.detach();
                }
                if let Some(stamp) = batch.producer() {
                    self.check_producer_id(stamp.id, quota).await?;
                }
                let fingerprint = batch.fingerprint();
                (batch, Some(fingerprint), timestamps)
            }
            Some(Payload::Records(records)) => {
                // More than a few are compressed in the connection's turn, as a batch is.
                let codec = config.compression.filter(|_| records.encoded_len() <= INLINE_BYTES);
                let (batch, timestamps) = plain(&records, codec.unwrap_or_default())?;
                (batch, None, timestamps)
            }
            None => return Err(faults::invalid("the request holds neither a batch nor records")),
        };
        let bytes = batch.encoded_len();
        // Plain records may become small enough yet.
        let counts = fingerprint.is_some() || config.compression.is_none_or(|codec| codec == batch.compression());
        let refusal = (counts && bytes > config.max_message_bytes).then(|| too_large(partition, config, bytes));
        Ok(Incoming { batch, fingerprint, timestamps, refusal, permit: None })
    }

    /// Writes the batch in its topic's own codec, where it has another.
    pub(super) async fn recompress(
        &self,
        incoming: &mut Incoming,
        partition: &Partition,
        config: &TopicConfig,
        memory: &CallMemory,
        deadline: Instant,
    ) -> Result<(), Fault> {
        let codec = match config.compression {
            Some(codec) if codec != incoming.batch.compression() && incoming.refusal.is_none() => codec,
            _ => return Ok(()),
        };
        // The connection's turn first: what waits for that holds no memory that others need.
        let turn = tokio::time::timeout_at(deadline, memory.rewriter(&self.opener).in_turn()).await;
        let opener = turn.map_err(|_| out_of_time())?;
        // Its size is known when it is made: memory for the largest is taken before.
        let most = config.max_message_bytes;
        let mut permit = self.produce_permit(partition, most, deadline).await?;
        match recompressed(&opener, &incoming.batch, codec, partition, most).await? {
            Ok((made, timestamps)) if made.encoded_len() <= most => {
                incoming.batch = made;
                if incoming.fingerprint.is_some() {
                    incoming.timestamps = timestamps;
                }
            }
            Ok((made, _)) => incoming.refusal = Some(too_large(partition, config, made.encoded_len())),
            Err(grows) => incoming.refusal = Some(grows),
        }
        Memory::shrink(&mut permit, incoming.batch.encoded_len());
        incoming.permit = Some(permit);
        Ok(())
    }

    /// The produce memory of the batch.
    pub(super) async fn produce_memory_of(
        &self,
        incoming: &mut Incoming,
        partition: &Partition,
        deadline: Instant,
    ) -> Result<OwnedSemaphorePermit, Fault> {
        if let Some(permit) = incoming.permit.take() {
            return Ok(permit);
        }
        let bytes = incoming.batch.encoded_len();
        if incoming.refusal.is_none() {
            return self.produce_permit(partition, bytes, deadline).await;
        }
        // It is dropped when the partition has looked at it: nobody is to wait for that.
        let memory = self.produce_memory.of(bytes);
        memory.try_take(bytes).ok_or_else(|| match &incoming.refusal {
            Some(away @ Refused::StoreAway { .. }) => AppendError::Refused(away.clone()).into(),
            _ => no_produce_memory(bytes, memory),
        })
    }

    /// Takes memory for a batch until its deadline.
    async fn produce_permit(
        &self,
        partition: &Partition,
        bytes: usize,
        deadline: Instant,
    ) -> Result<OwnedSemaphorePermit, Fault> {
        let memory = self.produce_memory.of(bytes);
        // After that nobody waits for the answer: the client sends again, and would find the batch written twice.
        let over = || clock::monotonic() >= deadline;
        let permit = tokio::select! {
            biased;
            () = self.stopping() => return Err(self.stopping_refusal(partition)),
            permit = memory.take(bytes) => permit,
            () = tokio::time::sleep_until(deadline) => {
                return Err(no_produce_memory(bytes, memory));
            }
        };
        if over() {
            return Err(out_of_time());
        }
        Ok(permit)
    }
}

fn too_large(partition: &Partition, config: &TopicConfig, bytes: usize) -> Refused {
    Refused::TooLarge { topic: partition.topic().clone(), bytes, most: config.max_message_bytes }
}

fn out_of_time() -> Fault {
    let message =
        "the time that the request has was over before its batch could be appended: it was not written; try again";
    Fault::new(Reason::Overloaded, message)
}

fn no_produce_memory(bytes: usize, memory: &Memory) -> Fault {
    let most = memory.bytes();
    let message = format!(
        "no memory for the batch of up to {bytes} bytes came free in the time that the request has: other writes wait for their \
         acknowledgements and hold it, and batches of its size may take {most} together (a half of limits.produce_memory_bytes)"
    );
    Fault::new(Reason::Overloaded, message).with("bytes", bytes).with("max", most)
}

/// A batch as a client made it. Plain records are walked too: a consumer of somebody else would stumble over their framing,
/// and retention and search by time over a header that says another time than they do. Of what is compressed only the beginning is
/// decoded: the rest is its reader's to open.
fn received(bytes: bytes::Bytes) -> Result<(Batch, TimestampRange), Fault> {
    let mut batch = Batch::parse(bytes)?;
    batch.check_client()?;
    batch.check_first_records()?;
    let timestamps = batch.correct_max_timestamp()?;
    Ok((batch, timestamps))
}

/// The batch in its topic's own codec. It is opened within the memory that there is for that, and refused as soon as it
/// is seen to be larger than the topic takes.
async fn recompressed(
    opener: &Opener,
    batch: &Batch,
    codec: Compression,
    partition: &Partition,
    most: usize,
) -> Result<Result<(Batch, TimestampRange), Refused>, Fault> {
    // Without a codec the stored batch is as large as its records are.
    let plain = most.saturating_sub(HEADER_BYTES);
    let bound = limits::MAX_RECOMPRESSED_BYTES.min(if codec == Compression::None { plain } else { usize::MAX });
    let work = move |batch: &Batch, most: usize| batch.recompress_within(codec, most);
    match opener.open(batch, bound, Use::Rewrite, work).await {
        Err(Malformed::Grows { .. }) if bound == plain => {
            Ok(Err(Refused::Grows { topic: partition.topic().clone(), most }))
        }
        outcome => Ok(Ok(outcome?)),
    }
}

/// A batch of records that came plain.
fn plain(records: &v1::PlainRecords, codec: Compression) -> Result<(Batch, TimestampRange), Fault> {
    if records.records.is_empty() {
        return Err(faults::invalid("the request holds no record"));
    }
    let now_ms = clock::wall_ms();
    let (mut builder, mut timestamps) = (BatchBuilder::new(codec), TimestampRange::EMPTY);
    for record in &records.records {
        let headers: Vec<Header> = record
            .headers
            .iter()
            .map(|header| Header { key: header.key.clone(), value: header.value.clone() })
            .collect();
        // The broker's own clock is in no need of a check.
        record.timestamp_ms.into_iter().for_each(|timestamp_ms| timestamps.note(timestamp_ms));
        let timestamp_ms = record.timestamp_ms.unwrap_or(now_ms);
        builder.push(timestamp_ms, record.key.as_deref(), record.value.as_deref(), &headers).map_err(unbuildable)?;
    }
    Ok((builder.finish(None).map_err(unbuildable)?, timestamps))
}

fn unbuildable(error: Unbuildable) -> Fault {
    faults::invalid(format!("the records make no batch: {error}"))
}
