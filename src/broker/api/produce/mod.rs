//! Producing: the unary `Append` call and the pipelined `Produce` stream.
//!
//! The handler finds the partition of a batch, checks the batch, takes memory for it, and queues it at the partition.
//! The partition's actor completes the append when the condition of the requested `acks` holds.

mod incoming;

use std::{sync::Arc, time::Duration};

use futures::{
    FutureExt as _, Stream, StreamExt as _, TryStreamExt as _,
    future::BoxFuture,
    stream::{self, FuturesUnordered},
};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, oneshot},
    time::Instant,
};
use tokio_util::task::AbortOnDropHandle;
use tonic::Status;

use self::incoming::IncomingBatch;
use super::{errors, service::Requests};
use crate::{
    broker::{
        CallMemory, ProducerIdQuota,
        background::producer_ids::ProducerIds,
        budget::Pools,
        node_context::NodeContext,
        partitions::{lookup::ReplicaLookup, maintenance_failures::MaintenanceFailures},
    },
    limits,
    model::{Acks, PartitionId},
    partition::{
        AckDurability, AdmitError, AppendError, AppendResult, BatchOrigin, Decompressor, Partition, Stored, WriteAck,
    },
    proto::{
        error::{ApiError, ErrorCode},
        v1::{self, produce_response},
    },
    task::{Tasks, clock},
    tier::Outage,
};

/// Maximum number of requests of one stream without a response. Further requests wait in the HTTP/2 window.
const MAX_STREAM_REQUESTS: usize = 4096;

/// Number of responses of one stream after which its task yields. Without a yield, HTTP/2 would collect as many
/// responses as the client's window permits before it sends the first one.
const RESPONSES_PER_YIELD: usize = 16;

/// Timeout of an append if the request sets none.
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(30);

/// A write that was queued at its partition, and whose outcome is pending.
struct QueuedAppend {
    partition: PartitionId,
    /// Acknowledgement to wait for; `None` with `acks=none`.
    ack: Option<PendingAck>,
    /// Maximum time from `began` to the acknowledgement.
    timeout: Duration,
    /// Time at which the handler received the request.
    began: Instant,
    bytes: u64,
    records: u64,
    /// State of an append with `acks=tiered`; `None` with any other `acks`.
    tiered: Option<TieredAck>,
}

/// State of an append with `acks=tiered`, which waits for the object store.
struct TieredAck {
    /// Offsets of the append, once the append has the topic's durability on this broker.
    stored: Stored,
    /// Permits for appends with `acks=tiered`: one of the connection, and one of the broker.
    _permits: [OwnedSemaphorePermit; 2],
}

/// Pending acknowledgement of a write. This value may be dropped before the result, because of a timeout or because the
/// client is gone. The partition is then notified, so that it can free the memory of the write.
struct PendingAck {
    /// Channel for the result; `None` once the result was received.
    result: Option<oneshot::Receiver<AppendResult>>,
    partition: Arc<Partition>,
}

impl PendingAck {
    /// Waits for the result of the write. The outer error means that the partition was closed.
    async fn await_result(mut self) -> Result<AppendResult, oneshot::error::RecvError> {
        let outcome = self.result.as_mut().expect("a new value has the receiver").await;
        self.result = None;
        outcome
    }
}

impl Drop for PendingAck {
    fn drop(&mut self) {
        if let Some(result) = self.result.take() {
            drop(result);
            self.partition.on_waiter_dropped();
        }
    }
}

/// Handler of appends.
pub(in crate::broker) struct Produce {
    pub(super) ctx: NodeContext,
    pub(super) lookup: ReplicaLookup,
    /// Memory of batches that are not acknowledged yet.
    pub(super) memory: Pools,
    /// Permits of the broker for appends with `acks=tiered`.
    pub(super) tiered_appends: Arc<Semaphore>,
    pub(super) decompressor: Decompressor,
    pub(super) producer_ids: Arc<ProducerIds>,
    pub(super) failures: Arc<MaintenanceFailures>,
    /// Cancelled when the streams of clients must end.
    pub(super) stop: Tasks,
}

impl Produce {
    #[cfg(test)]
    pub(in crate::broker) fn memory(&self) -> &Pools {
        &self.memory
    }

    #[cfg(test)]
    pub(in crate::broker) fn decompressor(&self) -> &Decompressor {
        &self.decompressor
    }

    /// Assigns the id of a new idempotent producer, which counts against the quota of its connection.
    pub(super) async fn init_producer_id(
        &self,
        quota: &ProducerIdQuota,
    ) -> Result<v1::InitProducerIdResponse, ApiError> {
        Ok(v1::InitProducerIdResponse { producer_id: self.producer_ids.assign(quota).await?, producer_epoch: 0 })
    }

    /// Appends a batch and waits for the acknowledgement, at most for the timeout of the request. With `acks=none`,
    /// returns once the write is queued.
    pub(in crate::broker) async fn append(
        &self,
        request: v1::AppendRequest,
        quota: &ProducerIdQuota,
        memory: &CallMemory,
    ) -> Result<v1::AppendResponse, ApiError> {
        let queued = self
            .queue(request, quota, memory)
            .await
            .inspect_err(|error| self.ctx.metrics.produce_errors.count(error.code.as_str()))?;
        self.await_outcome(queued).await
    }

    /// Serves a stream of writes. Requests are queued in the order of their arrival, and their responses are sent in
    /// the order in which they complete.
    pub(super) fn produce(
        self: &Arc<Self>,
        requests: Requests<v1::ProduceRequest>,
        quota: ProducerIdQuota,
        memory: CallMemory,
    ) -> impl Stream<Item = Result<v1::ProduceResponse, Status>> + Send + use<> {
        let pending = FuturesUnordered::new();
        let state = ProducePipeline {
            produce: Arc::clone(self),
            requests,
            quota,
            memory,
            queueing: None,
            pending,
            ended: None,
        };
        stream::unfold((state, 0_usize), |(mut pipeline, responses)| async move {
            if responses > 0 && responses.is_multiple_of(RESPONSES_PER_YIELD) {
                tokio::task::yield_now().await;
            }
            Some((pipeline.next().await?, (pipeline, responses + 1)))
        })
    }

    /// Checks a write and queues it at its partition. Waits for a topic that this broker does not host yet, and for the
    /// cluster's producer id key. Waits also for a permit to recompress the batch, and for memory.
    async fn queue(
        &self,
        request: v1::AppendRequest,
        quota: &ProducerIdQuota,
        memory: &CallMemory,
    ) -> Result<QueuedAppend, ApiError> {
        // The memory of the request is freed when this function returns. The batch has produce memory by then.
        let received = memory.take_request();
        let began = clock::monotonic();
        self.ctx.metrics.produce_requests.inc();
        let acks = parse_acks(request.acks)?;
        let timeout = parse_timeout(request.timeout_ms)?;
        let id = errors::parse_topic_id(&request.topic_id)?;
        self.lookup.wait_for_topics([(request.topic.as_str(), request.topic_id.as_str())].into_iter()).await;
        let partition = self.lookup.partition_of(&request.topic, id, request.partition)?;
        let config = partition.config();
        if acks == Acks::Tiered && !(config.tiered && self.ctx.tier.is_some()) {
            return Err(errors::invalid_request(format!(
                "acks=tiered needs the object store, and topic {} does not use one: set remote.storage.enable=true on \
                 the topic and an object store on the broker",
                partition.topic()
            )));
        }
        let tiered = if acks == Acks::Tiered { Some(self.admit_tiered(memory)?) } else { None };
        let deadline = began + timeout;
        let mut incoming = self.read_payload(request.payload, received.bytes, &partition, &config, quota).await?;
        incoming.refusal = incoming.refusal.or_else(|| self.refuse_without_store(tiered.as_ref()));
        self.recompress(&mut incoming, &partition, &config, memory, deadline).await?;
        // A refused batch of an idempotent producer still goes to the partition, which acknowledges it if it is a retry
        // of a stored batch. The batch may have been stored before the topic's configuration changed, or before the
        // outage of the object store.
        if let Some(refused) = incoming.refusal.take_if(|_| incoming.batch.producer().is_none() || acks == Acks::None) {
            return Err(AppendError::Refused(refused).into());
        }
        let permit = self.produce_memory_of(&mut incoming, &partition, deadline).await?;
        let IncomingBatch { batch, fingerprint, timestamps, refusal, .. } = incoming;
        let (bytes, records) = (batch.encoded_len() as u64, u64::from(batch.count()));
        let stored = tiered.as_ref().map(|tiered| Arc::clone(&tiered.stored));
        // The object store may have become unavailable while the append waited for memory.
        let refusal = refusal.or_else(|| self.refuse_without_store(tiered.as_ref()));
        let origin = BatchOrigin { fingerprint, timestamps, refusal };
        let result = Some(partition.append_tracked(batch, origin, acks, permit, stored).await);
        let id = partition.id();
        let ack = (acks != Acks::None).then(|| PendingAck { result, partition });
        Ok(QueuedAppend { partition: id, ack, timeout, began, bytes, records, tiered })
    }

    /// Returns the refusal of an append with `acks=tiered` during an outage of the object store. Returns `None` if
    /// there is no outage, or if the append has other `acks`.
    fn refuse_without_store(&self, tiered: Option<&TieredAck>) -> Option<AdmitError> {
        tiered
            .and_then(|_| self.store_outage())
            .map(|outage| AdmitError::StoreUnavailable { outage: outage.to_string() })
    }

    /// Takes the permits for an append with `acks=tiered`. Fails if the connection or the broker has no free permit:
    /// during an outage with `OBJECT_STORE_UNAVAILABLE`, else with `OVERLOADED`.
    fn admit_tiered(&self, memory: &CallMemory) -> Result<TieredAck, ApiError> {
        let overloaded = |scope: &str, max: usize| match self.store_outage() {
            // The permits are in use because of the outage, so the error names the outage and not the limit.
            Some(outage) => AppendError::Refused(AdmitError::StoreUnavailable { outage: outage.to_string() }).into(),
            None => {
                let message =
                    format!("the limit of {max} appends {scope}that wait for the object store is reached: retry later");
                ApiError::new(ErrorCode::Overloaded, message).with("max", max)
            }
        };
        let of_connection = memory.tiered_append();
        let of_connection = of_connection
            .ok_or_else(|| overloaded("of this connection ", limits::MAX_TIERED_APPENDS_PER_CONNECTION))?;
        let of_broker = Arc::clone(&self.tiered_appends).try_acquire_owned();
        let of_broker = of_broker.map_err(|_| overloaded("", limits::MAX_TIERED_APPENDS))?;
        Ok(TieredAck { stored: Stored::default(), _permits: [of_connection, of_broker] })
    }

    /// Converts the error of a write. If another broker leads the partition instead of this one, the error names that
    /// leader.
    fn convert_append_error(&self, id: PartitionId, error: AppendError) -> ApiError {
        let is_led_elsewhere =
            matches!(error, AppendError::NotLeader { .. } | AppendError::Deposed | AppendError::Closing);
        let error = ApiError::from(error);
        if is_led_elsewhere { self.lookup.with_leader_hint(id, error) } else { error }
    }

    /// Returns the confirmed outage of the object store, if there is one.
    fn store_outage(&self) -> Option<Outage> {
        self.ctx.tier.as_ref()?.store.confirmed_outage()
    }

    /// Waits until an outage of the object store is confirmed, and returns the outage. Never returns on a broker
    /// without an object store.
    async fn until_store_outage(&self) -> Outage {
        match &self.ctx.tier {
            Some(tier) => tier.store.wait_until_unavailable().await,
            None => std::future::pending().await,
        }
    }

    /// Waits for the acknowledgement of a queued append, for the rest of its timeout. Counts the outcome in the
    /// metrics. An append with `acks=none` returns at once and is not counted.
    async fn await_outcome(&self, queued: QueuedAppend) -> Result<v1::AppendResponse, ApiError> {
        let Some(ack) = queued.ack else { return Ok(unacknowledged_response()) };
        // The append may have waited for memory before, within the same timeout.
        let remaining = queued.timeout.saturating_sub(queued.began.elapsed());
        let outcome = match tokio::time::timeout(remaining, ack.await_result()).await {
            Ok(Ok(Ok(acked))) => Ok(response(&acked)),
            Ok(Ok(Err(error))) => Err(self.convert_append_error(queued.partition, error)),
            Ok(Err(_dropped)) => Err(self.convert_append_error(queued.partition, AppendError::Closing)),
            Err(_elapsed) => Err(self.timeout_error(queued.partition, queued.timeout, queued.tiered.as_ref())),
        };
        match &outcome {
            Ok(_) => {
                self.ctx.metrics.produce_records.inc_by(queued.records);
                self.ctx.metrics.produce_bytes.inc_by(queued.bytes);
                self.ctx.metrics.produce_ack_seconds.observe(queued.began.elapsed().as_secs_f64());
            }
            Err(error) => self.ctx.metrics.produce_errors.count(error.code.as_str()),
        }
        outcome
    }

    /// Returns the error for an acknowledgement that did not arrive in time. An append with `acks=tiered` may be stored
    /// on this broker. The error then contains the offsets, so that the client does not write the records twice, and
    /// the reason why the records are not in the object store.
    fn timeout_error(&self, id: PartitionId, timeout: Duration, tiered: Option<&TieredAck>) -> ApiError {
        let ms = timeout.as_millis();
        let Some(stored) = tiered.and_then(|tiered| tiered.stored.get()) else {
            return ApiError::new(
                ErrorCode::Timeout,
                format!(
                    "no acknowledgement within {ms} ms: the batch may still be appended; retry with an idempotent \
                     producer"
                ),
            );
        };
        let cause = match self.store_outage() {
            Some(outage) => format!("the object store has been unavailable {outage}"),
            None => self
                .failures
                .why_not_uploaded(id)
                .unwrap_or_else(|| "the upload is not complete, or followers do not have the records yet".to_owned()),
        };
        let (base, end) = (stored.start, stored.end);
        let message = format!(
            "no acknowledgement within {ms} ms: the leader stored the records at offsets {base}..{end} (the end \
             excluded), but they are not in the object store yet: {cause}"
        );
        ApiError::new(ErrorCode::Timeout, message)
            .with("cause", cause)
            .with("base_offset", base)
            .with("end_offset", end)
    }

    /// Waits for the outcome of a queued append of a stream. An append that is stored on this broker may wait for the
    /// object store. If the store is unavailable or uploads of the partition fail, such an append first returns a
    /// notice.
    async fn next_step(self: Arc<Self>, correlation_id: u64, queued: QueuedAppend) -> Step {
        let (stored, partition) = (queued.tiered.as_ref().map(|tiered| Arc::clone(&tiered.stored)), queued.partition);
        let produce = Arc::clone(&self);
        let response =
            async move { Step::Response(append_response(correlation_id, produce.await_outcome(queued).await)) };
        let Some(stored) = stored else { return response.await };
        let mut response = Box::pin(response);
        let cause = async {
            // An append that is not stored yet may still be rejected or wait for other brokers, so it gets no notice.
            stored.wait().await;
            tokio::select! {
                biased;
                outage = self.until_store_outage() => {
                    format!("the append waits for the object store, which has been unavailable {outage}")
                }
                reason = self.failures.until_not_uploaded(partition) => {
                    format!("the append is not in the object store yet: {reason}")
                }
            }
        };
        let message = tokio::select! {
            biased;
            step = &mut response => return step,
            message = cause => message,
        };
        let waiting = ApiError::new(ErrorCode::ObjectStoreUnavailable, message).into();
        let result = Some(produce_response::Result::Waiting(waiting));
        Step::Notice(v1::ProduceResponse { correlation_id, result }, response)
    }
}

/// Next message to the client about one append of a stream.
enum Step {
    Response(v1::ProduceResponse),
    /// Notice with the reason why there is no response yet, and the future of the response.
    Notice(v1::ProduceResponse, BoxFuture<'static, Step>),
}

/// Correlation id of a request, and the outcome of queueing its append.
type QueueResult = (u64, Result<QueuedAppend, ApiError>);

/// One produce stream: requests are read, and responses are sent as they complete.
struct ProducePipeline {
    produce: Arc<Produce>,
    requests: Requests<v1::ProduceRequest>,
    quota: ProducerIdQuota,
    memory: CallMemory,
    /// Task of the last request, while it waits to be queued. The next request is read only after that.
    queueing: Option<AbortOnDropHandle<QueueResult>>,
    /// Queued or rejected requests whose responses have not been returned.
    pending: FuturesUnordered<BoxFuture<'static, Step>>,
    /// Set when no more requests arrive: the producer ended the stream, or its data cannot be read. The response stream
    /// ends with this result after the last response.
    ended: Option<Result<(), Status>>,
}

impl ProducePipeline {
    /// Returns the next response or notice; `None` ends the stream.
    async fn next(&mut self) -> Option<Result<v1::ProduceResponse, Status>> {
        loop {
            // The biased `select!` below returns completed responses before it reads further requests.
            let is_idle = self.pending.is_empty() && self.queueing.is_none();
            if is_idle && let Some(ended) = &mut self.ended {
                // An error is returned once. The next call ends the stream.
                return std::mem::replace(ended, Ok(())).err().map(Err);
            }
            tokio::select! {
                biased;
                Some(step) = self.pending.next(), if !self.pending.is_empty() => match step {
                    Step::Response(response) => return Some(Ok(response)),
                    Step::Notice(notice, next_step) => {
                        self.pending.push(next_step);
                        return Some(Ok(notice));
                    }
                },
                // The stream is idle, so every received write has its response, and the stream can end.
                () = self.produce.stop.cancelled(), if is_idle => return None,
                queued = until_queued(&mut self.queueing), if self.queueing.is_some() => self.add_pending(queued),
                request = self.requests.try_next(), if self.may_read_request() => {
                    match request {
                        Ok(Some(request)) => self.begin_queueing(request),
                        Ok(None) => self.ended = Some(Ok(())),
                        Err(status) => self.ended = Some(Err(errors::request_stream_error(status))),
                    }
                }
            }
        }
    }

    /// Returns true if the next request may be read: requests still arrive, none is being queued, and fewer than
    /// [`MAX_STREAM_REQUESTS`] are pending.
    fn may_read_request(&self) -> bool {
        self.ended.is_none() && self.queueing.is_none() && self.pending.len() < MAX_STREAM_REQUESTS
    }

    /// Queues the append of a request. If queueing must wait, for example for memory or for a topic, it continues in a
    /// task.
    fn begin_queueing(&mut self, request: v1::ProduceRequest) {
        let (produce, quota, memory) = (Arc::clone(&self.produce), self.quota.clone(), self.memory.clone());
        let mut queueing = Box::pin(async move {
            let queued = match request.append {
                Some(append) => produce.queue(append, &quota, &memory).await,
                None => {
                    produce.ctx.metrics.produce_requests.inc();
                    Err(errors::invalid_request("the request has no append: set it"))
                }
            };
            (request.correlation_id, queued)
        });
        match (&mut queueing).now_or_never() {
            Some(queued) => self.add_pending(queued),
            // Queueing continues in a task of its own, because the stream is not polled while its client reads no
            // responses.
            None => self.queueing = Some(AbortOnDropHandle::new(self.produce.ctx.tasks.spawn("append", queueing))),
        }
    }

    /// Adds a queued or rejected request to `pending`. A rejected request is counted and gets its error as the
    /// response.
    fn add_pending(&mut self, (correlation_id, queued): QueueResult) {
        let produce = Arc::clone(&self.produce);
        self.pending.push(Box::pin(async move {
            match queued {
                Ok(queued) => produce.next_step(correlation_id, queued).await,
                Err(error) => {
                    produce.ctx.metrics.produce_errors.count(error.code.as_str());
                    Step::Response(append_response(correlation_id, Err(error)))
                }
            }
        }));
    }
}

fn append_response(correlation_id: u64, outcome: Result<v1::AppendResponse, ApiError>) -> v1::ProduceResponse {
    let result = match outcome {
        Ok(appended) => produce_response::Result::Appended(appended),
        Err(error) => produce_response::Result::Error(error.into()),
    };
    v1::ProduceResponse { correlation_id, result: Some(result) }
}

/// Waits until the request in `queueing` is queued or rejected, and clears `queueing`, which must contain a request.
async fn until_queued(queueing: &mut Option<AbortOnDropHandle<QueueResult>>) -> QueueResult {
    let queued = queueing.as_mut().expect("a request is being queued").await;
    *queueing = None;
    queued.expect("the task is not aborted while it is awaited")
}

/// Parses the timeout of an append; the default if the request sets none. Fails above
/// [`limits::MAX_APPEND_TIMEOUT_MS`].
fn parse_timeout(ms: u32) -> Result<Duration, ApiError> {
    if ms > limits::MAX_APPEND_TIMEOUT_MS {
        let max = limits::MAX_APPEND_TIMEOUT_MS;
        return Err(errors::invalid_request(format!(
            "timeout_ms {ms} is above the maximum of {max}: use a lower value"
        )));
    }
    Ok(if ms == 0 { DEFAULT_TIMEOUT } else { Duration::from_millis(ms.into()) })
}

/// Parses the `acks` of a request; `all` if the request sets none.
fn parse_acks(value: i32) -> Result<Acks, ApiError> {
    match v1::Acks::try_from(value) {
        Ok(v1::Acks::Unspecified | v1::Acks::All) => Ok(Acks::All),
        Ok(v1::Acks::None) => Ok(Acks::None),
        Ok(v1::Acks::Leader) => Ok(Acks::Leader),
        Ok(v1::Acks::Tiered) => Ok(Acks::Tiered),
        Err(_) => Err(errors::invalid_request(format!("acks {value} is unknown: use a value of the Acks enum"))),
    }
}

/// Returns the response to an append with `acks=none`, whose offsets are unknown when the response is sent.
fn unacknowledged_response() -> v1::AppendResponse {
    v1::AppendResponse {
        base_offset: -1,
        end_offset: -1,
        leader_epoch: -1,
        append_time_ms: -1,
        durability: v1::AckDurability::Memory.into(),
        replicas: 1,
        duplicate: false,
    }
}

fn response(acked: &WriteAck) -> v1::AppendResponse {
    let (durability, replicas) = match acked.durability {
        AckDurability::Memory => (v1::AckDurability::Memory, 1),
        AckDurability::PageCache(replicas) => (v1::AckDurability::PageCache, replicas),
        AckDurability::Persisted(replicas) => (v1::AckDurability::Persisted, replicas),
        AckDurability::Tiered(replicas) => (v1::AckDurability::Tiered, replicas),
    };
    v1::AppendResponse {
        base_offset: acked.base.as_i64(),
        end_offset: acked.end.as_i64(),
        leader_epoch: acked.epoch.as_i32(),
        append_time_ms: acked.append_time_ms.unwrap_or(-1),
        durability: durability.into(),
        replicas,
        duplicate: acked.duplicate,
    }
}
