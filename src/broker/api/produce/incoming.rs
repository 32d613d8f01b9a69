//! Preparation of the batch of a write, before the partition queues it: checks, recompression with the codec of the
//! topic, and produce memory.

use prost::Message as _;
use tokio::{sync::OwnedSemaphorePermit, time::Instant};

use super::{super::errors, Produce};
use crate::{
    broker::{CallMemory, ProducerIdQuota},
    limits,
    model::{Compression, TopicConfig},
    partition::{AdmitError, AppendError, DecompressPurpose, Decompressor, INLINE_BYTES, MemoryBudget, Partition},
    proto::{
        error::{ApiError, ErrorCode},
        v1::{self, append_request::Payload},
    },
    record::{Batch, BatchBuilder, BuildError, Fingerprint, HEADER_BYTES, Header, MalformedBatch, TimestampRange},
    task::clock,
};

/// Maximum difference between the sizes of a message and its batch, in bytes, with which the batch shares the memory of
/// the message. With a larger difference, the batch is copied.
const MAX_SURPLUS_BYTES: usize = 4 << 10;

/// A checked batch of a write, and its properties.
pub(super) struct IncomingBatch {
    pub(super) batch: Batch,
    /// Fingerprint of the batch as the client sent it; `None` if the client sent records.
    pub(super) fingerprint: Option<Fingerprint>,
    /// Range of the timestamps that the client set, without those that this broker adds.
    pub(super) timestamps: TimestampRange,
    /// Reason why the batch must be rejected, if there is one.
    pub(super) refusal: Option<AdmitError>,
    /// Produce memory of the batch, if the recompression has taken it.
    permit: Option<OwnedSemaphorePermit>,
}

impl Produce {
    /// Checks the payload of a message of `message_bytes`, and builds the batch if the payload is a list of records. A
    /// batch whose final size is above the topic's maximum gets a refusal. A batch with an unassigned producer id
    /// counts against `quota`.
    pub(super) async fn read_payload(
        &self,
        payload: Option<Payload>,
        message_bytes: usize,
        partition: &Partition,
        config: &TopicConfig,
        quota: &ProducerIdQuota,
    ) -> Result<IncomingBatch, ApiError> {
        let (batch, fingerprint, timestamps) = match payload {
            Some(Payload::Batch(bytes)) => {
                let (mut batch, timestamps) = parse_batch(bytes).map_err(errors::malformed_batch_error)?;
                if message_bytes > batch.encoded_len() + MAX_SURPLUS_BYTES {
                    // Without the copy, the batch would keep its entire message in memory.
                    batch.detach();
                }
                if let Some(stamp) = batch.producer() {
                    self.producer_ids.check(stamp.id, quota).await?;
                }
                let fingerprint = batch.fingerprint();
                (batch, Some(fingerprint), timestamps)
            }
            Some(Payload::Records(records)) => {
                // A larger record list becomes an uncompressed batch here. `recompress` compresses it, one batch at a
                // time per connection.
                let codec = config.compression.filter(|_| records.encoded_len() <= INLINE_BYTES);
                let (batch, timestamps) = build_batch(&records, codec.unwrap_or_default())?;
                (batch, None, timestamps)
            }
            None => {
                return Err(errors::invalid_request("the request has neither a batch nor records: set one of them"));
            }
        };
        let bytes = batch.encoded_len();
        // A batch that the client sent is checked at the size that it was sent with. A batch of records that
        // `recompress` will compress may still become small enough.
        let is_final_size =
            fingerprint.is_some() || config.compression.is_none_or(|codec| codec == batch.compression());
        let refusal =
            (is_final_size && bytes > config.max_message_bytes).then(|| too_large_error(partition, config, bytes));
        Ok(IncomingBatch { batch, fingerprint, timestamps, refusal, permit: None })
    }

    /// Recompresses the batch with the topic's codec, if the batch has another codec and no refusal. Takes produce
    /// memory for the largest allowed result first. A result above the topic's maximum size sets the refusal.
    pub(super) async fn recompress(
        &self,
        incoming: &mut IncomingBatch,
        partition: &Partition,
        config: &TopicConfig,
        memory: &CallMemory,
        deadline: Instant,
    ) -> Result<(), ApiError> {
        let codec = match config.compression {
            Some(codec) if codec != incoming.batch.compression() && incoming.refusal.is_none() => codec,
            _ => return Ok(()),
        };
        // A connection recompresses one batch at a time. An append waits for the permit before it takes produce memory,
        // which other connections need.
        let permitted =
            tokio::time::timeout_at(deadline, memory.rewriter(&self.decompressor).with_caller_permit()).await;
        let decompressor = permitted.map_err(|_| deadline_error())?;
        // The size of the result is not known before the recompression, so memory for the largest allowed batch is
        // taken.
        let max_bytes = config.max_message_bytes;
        let mut permit = self.produce_permit(partition, max_bytes, deadline).await?;
        match recompress_batch(&decompressor, &incoming.batch, codec, partition, max_bytes).await? {
            Ok((batch, timestamps)) if batch.encoded_len() <= max_bytes => {
                incoming.batch = batch;
                if incoming.fingerprint.is_some() {
                    incoming.timestamps = timestamps;
                }
            }
            Ok((batch, _)) => incoming.refusal = Some(too_large_error(partition, config, batch.encoded_len())),
            Err(refusal) => incoming.refusal = Some(refusal),
        }
        MemoryBudget::shrink(&mut permit, incoming.batch.encoded_len());
        incoming.permit = Some(permit);
        Ok(())
    }

    /// Returns the produce memory of the batch: the memory that the recompression took, or else new memory. Waits for
    /// new memory until the deadline, but not for a refused batch.
    pub(super) async fn produce_memory_of(
        &self,
        incoming: &mut IncomingBatch,
        partition: &Partition,
        deadline: Instant,
    ) -> Result<OwnedSemaphorePermit, ApiError> {
        if let Some(permit) = incoming.permit.take() {
            return Ok(permit);
        }
        let bytes = incoming.batch.encoded_len();
        if incoming.refusal.is_none() {
            return self.produce_permit(partition, bytes, deadline).await;
        }
        // The partition only checks the producer's sequence of a refused batch and then drops the batch, so the append
        // does not wait for memory.
        let memory = self.memory.of(bytes);
        memory.try_take(bytes).ok_or_else(|| match &incoming.refusal {
            Some(refused @ AdmitError::StoreUnavailable { .. }) => AppendError::Refused(refused.clone()).into(),
            _ => no_produce_memory_error(bytes, memory),
        })
    }

    /// Takes produce memory for a batch, and waits for it until the deadline. Fails if the deadline passes or the
    /// broker stops.
    async fn produce_permit(
        &self,
        partition: &Partition,
        bytes: usize,
        deadline: Instant,
    ) -> Result<OwnedSemaphorePermit, ApiError> {
        let memory = self.memory.of(bytes);
        let permit = tokio::select! {
            biased;
            () = self.stop.cancelled() => return Err(self.lookup.broker_stopping_error(partition)),
            permit = memory.take(bytes) => permit,
            () = tokio::time::sleep_until(deadline) => {
                return Err(no_produce_memory_error(bytes, memory));
            }
        };
        // After the deadline no client waits for the response. The client may send the batch again, and if this one
        // were appended too, its records would be stored twice.
        if clock::monotonic() >= deadline {
            return Err(deadline_error());
        }
        Ok(permit)
    }
}

fn too_large_error(partition: &Partition, config: &TopicConfig, bytes: usize) -> AdmitError {
    AdmitError::TooLarge { topic: partition.topic().clone(), bytes, max_bytes: config.max_message_bytes }
}

/// Returns the error for a batch that was not queued before the timeout of its request. The batch was not written.
fn deadline_error() -> ApiError {
    let message =
        "the timeout of the request passed before its batch could be appended: the batch was not written; retry";
    ApiError::new(ErrorCode::Overloaded, message)
}

/// Returns the error for a batch of up to `bytes` for which `memory` had not enough within the timeout.
fn no_produce_memory_error(bytes: usize, memory: &MemoryBudget) -> ApiError {
    let max = memory.bytes();
    let message = format!(
        "no memory for a batch of up to {bytes} bytes became free within the timeout of the request: batches of its \
         size share {max} bytes (half of limits.produce_memory_bytes), which writes without acknowledgement hold; \
         retry later"
    );
    ApiError::new(ErrorCode::Overloaded, message).with("bytes", bytes).with("max", max)
}

/// Parses and checks a batch that a client built. Uncompressed records are checked too. Records with an invalid
/// structure would break consumers of other clients, and wrong timestamps in the header would break retention and
/// search by time. Of compressed records, only the first ones are decoded; readers decode the rest.
fn parse_batch(bytes: bytes::Bytes) -> Result<(Batch, TimestampRange), MalformedBatch> {
    let mut batch = Batch::parse(bytes)?;
    batch.check_client()?;
    batch.check_first_records()?;
    let timestamps = batch.correct_max_timestamp()?;
    Ok((batch, timestamps))
}

/// Recompresses a batch with `codec`, within the memory for decompression.
///
/// # Errors
/// The inner error is a refusal: the codec of the topic is `none`, and the batch decompresses to more than `max_bytes`.
/// The outer error means that the batch cannot be decompressed, or has too many bytes of records.
async fn recompress_batch(
    decompressor: &Decompressor,
    batch: &Batch,
    codec: Compression,
    partition: &Partition,
    max_bytes: usize,
) -> Result<Result<(Batch, TimestampRange), AdmitError>, ApiError> {
    // With the codec `none`, the stored batch has the size of its header and its records, so decompression may stop at
    // that size.
    let uncompressed = max_bytes.saturating_sub(HEADER_BYTES);
    let bound = limits::MAX_RECOMPRESSED_BYTES.min(if codec == Compression::None { uncompressed } else { usize::MAX });
    let work = move |batch: &Batch, limit: usize| batch.recompress_within(codec, limit);
    match decompressor.open(batch, bound, DecompressPurpose::Rewrite, work).await {
        Err(MalformedBatch::Grows { .. }) if bound == uncompressed => {
            Ok(Err(AdmitError::Grows { topic: partition.topic().clone(), max_bytes }))
        }
        outcome => Ok(Ok(outcome.map_err(errors::malformed_batch_error)?)),
    }
}

/// Builds a batch from the records of a request. Records without a timestamp get the current time. Returns the batch,
/// and the range of the timestamps that the client set.
fn build_batch(records: &v1::RecordList, codec: Compression) -> Result<(Batch, TimestampRange), ApiError> {
    if records.records.is_empty() {
        return Err(errors::invalid_request("the request has no records: send at least one"));
    }
    let now_ms = clock::wall_ms();
    let (mut builder, mut timestamps) = (BatchBuilder::new(codec), TimestampRange::EMPTY);
    for record in &records.records {
        let headers: Vec<Header> = record
            .headers
            .iter()
            .map(|header| Header { key: header.key.clone(), value: header.value.clone() })
            .collect();
        // Only timestamps that the client set are checked against the limits of the topic.
        record.timestamp_ms.into_iter().for_each(|timestamp_ms| timestamps.extend(timestamp_ms));
        let timestamp_ms = record.timestamp_ms.unwrap_or(now_ms);
        builder
            .push(timestamp_ms, record.key.as_deref(), record.value.as_deref(), &headers)
            .map_err(convert_build_error)?;
    }
    Ok((builder.finish(None).map_err(convert_build_error)?, timestamps))
}

fn convert_build_error(error: BuildError) -> ApiError {
    errors::invalid_request(format!("the records cannot be encoded as a batch: {error}"))
}
