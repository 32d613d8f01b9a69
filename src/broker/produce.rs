//! Producing: unary append and the pipelined stream.
//!
//! The handler checks a batch before anything is stored, finds its partition, takes memory for the batch, and queues it. The partition's
//! actor completes the append when the acknowledgement that the request asks for holds.

mod incoming;

use std::{sync::Arc, time::Duration};

use futures::{
    FutureExt as _, Stream, StreamExt as _, TryStreamExt as _,
    future::BoxFuture,
    stream::{self, FuturesUnordered},
};
use tokio::{
    sync::{OwnedSemaphorePermit, oneshot},
    time::Instant,
};
use tokio_util::task::AbortOnDropHandle;
use tonic::Status;

use self::incoming::Incoming;
use super::{Broker, CallMemory, ProducerIdQuota, Requests, faults};
use crate::{
    limits,
    model::{Acks, PartitionId},
    partition::{Acked, AppendError, AppendResult, BatchOrigin, Held, Partition, Refused, Stored},
    proto::{
        error::{ApiError, ErrorCode},
        v1::{self, produce_response},
    },
    task::clock,
};

/// Maximum number of requests of one stream in progress. Further requests wait in the HTTP/2 window.
const STREAM_REQUESTS: usize = 4096;

/// Maximum number of responses that are collected before HTTP/2 gets them. HTTP/2 takes as many as a reading client has window for, and
/// then polls for more.
const ANSWERS_AT_ONCE: usize = 16;

/// Timeout of the acknowledgement if the request sets none.
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(30);

/// A write in the queue of its partition, whose outcome is pending.
struct Queued {
    partition: PartitionId,
    answer: Option<Awaited>,
    timeout: Duration,
    began: Instant,
    bytes: u64,
    records: u64,
    /// Set with `acks=tiered`.
    tiered: Option<Tiered>,
}

/// State of an append that waits for the object store.
struct Tiered {
    /// Offsets of the append, once it is stored here.
    stored: Stored,
    /// Permits for appends that wait for the object store: of the connection, and of the broker.
    _places: [OwnedSemaphorePermit; 2],
}

/// Pending acknowledgement of a write. The partition is notified if the wait ends early, because of a timeout or because the client is
/// gone.
struct Awaited {
    answer: Option<oneshot::Receiver<AppendResult>>,
    partition: Arc<Partition>,
}

impl Awaited {
    async fn get(mut self) -> Result<AppendResult, oneshot::error::RecvError> {
        let outcome = self.answer.as_mut().expect("only a drop takes it").await;
        self.answer = None;
        outcome
    }
}

impl Drop for Awaited {
    fn drop(&mut self) {
        if let Some(answer) = self.answer.take() {
            drop(answer);
            self.partition.given_up();
        }
    }
}

impl Broker {
    /// Appends a batch and waits for the acknowledgement.
    pub(super) async fn append(
        &self,
        request: v1::AppendRequest,
        quota: &ProducerIdQuota,
        memory: &CallMemory,
    ) -> Result<v1::AppendResponse, ApiError> {
        let queued = self
            .queue(request, quota, memory)
            .await
            .inspect_err(|fault| self.metrics.produce_errors.count(fault.code.as_str()))?;
        self.outcome(queued).await
    }

    /// Serves a stream of writes. Requests are queued in the order of their arrival.
    pub(super) fn produce(
        self: Arc<Self>,
        requests: Requests<v1::ProduceRequest>,
        quota: ProducerIdQuota,
        memory: CallMemory,
    ) -> impl Stream<Item = Result<v1::ProduceResponse, Status>> + Send + 'static {
        let answers = FuturesUnordered::new();
        let state = Pipeline { broker: self, requests, quota, memory, beginning: None, answers, ended: None };
        stream::unfold((state, 0_usize), |(mut pipeline, answered)| async move {
            if answered > 0 && answered.is_multiple_of(ANSWERS_AT_ONCE) {
                tokio::task::yield_now().await;
            }
            Some((pipeline.next().await?, (pipeline, answered + 1)))
        })
    }

    /// Checks a write and puts it into the queue of its partition.
    async fn queue(
        &self,
        request: v1::AppendRequest,
        quota: &ProducerIdQuota,
        memory: &CallMemory,
    ) -> Result<Queued, ApiError> {
        // Freed when the batch has produce memory.
        let held = memory.take_request();
        let began = clock::monotonic();
        self.metrics.produce_requests.inc();
        let acks = acks(request.acks)?;
        let timeout = timeout(request.timeout_ms)?;
        let id = faults::topic_id(&request.topic_id)?;
        self.acquaint([(request.topic.as_str(), request.topic_id.as_str())].into_iter()).await;
        let partition = self.partition_of(&request.topic, id, request.partition)?;
        let config = partition.config();
        if acks == Acks::Tiered && !(config.tiered && self.has_object_store()) {
            return Err(faults::invalid(format!(
                "acks=tiered needs the object store, and topic {} does not use one: set remote.storage.enable=true on the \
                 topic and an object store on the broker",
                partition.topic()
            )));
        }
        let tiered = if acks == Acks::Tiered { Some(self.admit_tiered(memory)?) } else { None };
        let deadline = began + timeout;
        let mut incoming = self.read_payload(request.payload, held.bytes, &partition, &config, quota).await?;
        incoming.refusal = incoming.refusal.or_else(|| self.refuse_without_store(tiered.as_ref()));
        self.recompress(&mut incoming, &partition, &config, memory, deadline).await?;
        // A rejected batch of an idempotent producer still goes to the partition, which recognises retries. The batch may have been stored
        // before the topic's configuration changed, or before the outage of the object store.
        if let Some(refused) = incoming.refusal.take_if(|_| incoming.batch.producer().is_none() || acks == Acks::None) {
            return Err(AppendError::Refused(refused).into());
        }
        let permit = self.produce_memory_of(&mut incoming, &partition, deadline).await?;
        let Incoming { batch, fingerprint, timestamps, refusal, .. } = incoming;
        let (bytes, records) = (batch.encoded_len() as u64, u64::from(batch.count()));
        let stored = tiered.as_ref().map(|tiered| Arc::clone(&tiered.stored));
        // The object store may have become unavailable while the append waited for memory.
        let refusal = refusal.or_else(|| self.refuse_without_store(tiered.as_ref()));
        let origin = BatchOrigin { fingerprint, timestamps, refusal };
        let answer = Some(partition.append_tracked(batch, origin, acks, permit, stored).await);
        let id = partition.id();
        let answer = (acks != Acks::None).then(|| Awaited { answer, partition });
        Ok(Queued { partition: id, answer, timeout, began, bytes, records, tiered })
    }

    /// Returns the rejection of an append with `acks=tiered` that could only wait, because the object store is unavailable.
    fn refuse_without_store(&self, tiered: Option<&Tiered>) -> Option<Refused> {
        tiered.and_then(|_| self.store_away()).map(|outage| Refused::StoreAway { outage: outage.to_string() })
    }

    /// Takes permits for an append with `acks=tiered`. Rejects the append if too many appends wait for the object store.
    fn admit_tiered(&self, memory: &CallMemory) -> Result<Tiered, ApiError> {
        let overloaded = |whose: &str, most: usize| match self.store_away() {
            // Those appends wait because of the outage, so their number is not the cause.
            Some(outage) => AppendError::Refused(Refused::StoreAway { outage: outage.to_string() }).into(),
            None => {
                let message = format!(
                    "{most} appends {whose}wait for the object store already, and no more may: try again later"
                );
                ApiError::new(ErrorCode::Overloaded, message).with("max", most)
            }
        };
        let own = memory.tiered_append();
        let own = own.ok_or_else(|| overloaded("of this connection ", limits::MAX_TIERED_APPENDS_PER_CONNECTION))?;
        let all = Arc::clone(&self.tiered_appends).try_acquire_owned();
        let all = all.map_err(|_| overloaded("", limits::MAX_TIERED_APPENDS))?;
        Ok(Tiered { stored: Stored::default(), _places: [own, all] })
    }

    async fn outcome(&self, queued: Queued) -> Result<v1::AppendResponse, ApiError> {
        let Some(answer) = queued.answer else { return Ok(unacknowledged()) };
        // A part of the time is used up: the append may have waited for memory.
        let left = queued.timeout.saturating_sub(queued.began.elapsed());
        let outcome = match tokio::time::timeout(left, answer.get()).await {
            Ok(Ok(Ok(acked))) => Ok(response(&acked)),
            Ok(Ok(Err(error))) => Err(self.append_refused(queued.partition, error)),
            Ok(Err(_dropped)) => Err(self.append_refused(queued.partition, AppendError::Closing)),
            Err(_elapsed) => Err(self.timed_out(queued.partition, queued.timeout, queued.tiered.as_ref())),
        };
        match &outcome {
            Ok(_) => {
                self.metrics.produce_records.inc_by(queued.records);
                self.metrics.produce_bytes.inc_by(queued.bytes);
                self.metrics.produce_ack_seconds.observe(queued.began.elapsed().as_secs_f64());
            }
            Err(fault) => self.metrics.produce_errors.count(fault.code.as_str()),
        }
        outcome
    }
}

impl Broker {
    /// Returns the error for an acknowledgement that did not arrive in time. An append that is already stored here must not look as if it
    /// were not, because the client would write it twice.
    fn timed_out(&self, id: PartitionId, timeout: Duration, tiered: Option<&Tiered>) -> ApiError {
        let ms = timeout.as_millis();
        let Some(stored) = tiered.and_then(|tiered| tiered.stored.get()) else {
            return ApiError::new(
                ErrorCode::Timeout,
                format!("no acknowledgement within {ms} ms; the write may still happen"),
            );
        };
        let cause = match self.store_away() {
            Some(outage) => format!("the object store has served nothing {outage}"),
            None => self
                .upkeep_failures
                .why_not_uploaded(id)
                .unwrap_or_else(|| "the upload has not finished, or followers do not have them yet".to_owned()),
        };
        let (base, end) = (stored.start, stored.end);
        let message = format!(
            "no acknowledgement within {ms} ms: the leader has the records at offsets {base} up to, but not including, {end}, \
             and not in the object store yet: {cause}"
        );
        ApiError::new(ErrorCode::Timeout, message)
            .with("cause", cause)
            .with("base_offset", base)
            .with("end_offset", end)
    }

    /// Waits for the outcome of an append of a stream. An append that waits only for the object store returns a notice first, once the
    /// store is unavailable or does not accept uploads of the partition.
    async fn next_step(self: Arc<Self>, correlation: u64, queued: Queued) -> Step {
        let (stored, partition) = (queued.tiered.as_ref().map(|tiered| Arc::clone(&tiered.stored)), queued.partition);
        let broker = Arc::clone(&self);
        let answer = async move { Step::Answer(answered(correlation, broker.outcome(queued).await)) };
        let Some(stored) = stored else { return answer.await };
        let mut answer = Box::pin(answer);
        let cause = async {
            // Before that, the append may still be rejected, or waits for other brokers.
            stored.wait().await;
            tokio::select! {
                biased;
                outage = self.until_store_away() => {
                    format!("the append waits for the object store, which has served nothing {outage}")
                }
                why = self.upkeep_failures.until_not_uploaded(partition) => format!("the append is not in the object store yet: {why}"),
            }
        };
        let message = tokio::select! {
            biased;
            step = &mut answer => return step,
            message = cause => message,
        };
        let waiting = ApiError::new(ErrorCode::ObjectStoreUnavailable, message).into();
        let result = Some(produce_response::Result::Waiting(waiting));
        Step::Notice(v1::ProduceResponse { correlation, result }, answer)
    }
}

/// Event of an append of a stream.
enum Step {
    Answer(v1::ProduceResponse),
    /// Reason why there is no response yet, and the future of the next event.
    Notice(v1::ProduceResponse, BoxFuture<'static, Step>),
}

/// Correlation id of a request, and the result of queueing that request.
type Begun = (u64, Result<Queued, ApiError>);

/// One produce stream: requests are read, and responses are sent as they complete.
struct Pipeline {
    broker: Arc<Broker>,
    requests: Requests<v1::ProduceRequest>,
    quota: ProducerIdQuota,
    memory: CallMemory,
    /// The last request, while it waits for memory. The next request is read after this one is queued.
    beginning: Option<AbortOnDropHandle<Begun>>,
    answers: FuturesUnordered<BoxFuture<'static, Step>>,
    /// Set when no more requests arrive: the producer ended the stream, or its data cannot be read. The stream ends with this result.
    ended: Option<Result<(), Status>>,
}

impl Pipeline {
    async fn next(&mut self) -> Option<Result<v1::ProduceResponse, Status>> {
        loop {
            // Queued requests are completed before anything that arrived later.
            let is_idle = self.answers.is_empty() && self.beginning.is_none();
            if is_idle && let Some(ended) = &mut self.ended {
                return std::mem::replace(ended, Ok(())).err().map(Err);
            }
            tokio::select! {
                biased;
                Some(step) = self.answers.next(), if !self.answers.is_empty() => match step {
                    Step::Answer(answer) => return Some(Ok(answer)),
                    Step::Notice(notice, rest) => {
                        self.answers.push(rest);
                        return Some(Ok(notice));
                    }
                },
                // Every received write has its response, so a stop need not wait for an idle producer.
                () = self.broker.stopping(), if is_idle => return None,
                begun = begun(&mut self.beginning), if self.beginning.is_some() => self.await_answer(begun),
                request = self.requests.try_next(), if self.takes_more() => {
                    match request {
                        Ok(Some(request)) => self.begin(request),
                        Ok(None) => self.ended = Some(Ok(())),
                        Err(status) => self.ended = Some(Err(faults::unreadable(status))),
                    }
                }
            }
        }
    }

    fn takes_more(&self) -> bool {
        self.ended.is_none() && self.beginning.is_none() && self.answers.len() < STREAM_REQUESTS
    }

    fn begin(&mut self, request: v1::ProduceRequest) {
        let (broker, quota, memory) = (Arc::clone(&self.broker), self.quota.clone(), self.memory.clone());
        let mut beginning = Box::pin(async move {
            let queued = match request.append {
                Some(append) => broker.queue(append, &quota, &memory).await,
                None => {
                    broker.metrics.produce_requests.inc();
                    Err(faults::invalid("the request holds no append"))
                }
            };
            (request.correlation, queued)
        });
        match (&mut beginning).now_or_never() {
            Some(begun) => self.await_answer(begun),
            // The request waits for memory in a task of its own, because the stream is not polled while its client reads no responses.
            None => self.beginning = Some(AbortOnDropHandle::new(self.broker.tasks.spawn("append", beginning))),
        }
    }

    fn await_answer(&mut self, (correlation, queued): Begun) {
        let broker = Arc::clone(&self.broker);
        self.answers.push(Box::pin(async move {
            match queued {
                Ok(queued) => broker.next_step(correlation, queued).await,
                Err(fault) => {
                    broker.metrics.produce_errors.count(fault.code.as_str());
                    Step::Answer(answered(correlation, Err(fault)))
                }
            }
        }));
    }
}

fn answered(correlation: u64, outcome: Result<v1::AppendResponse, ApiError>) -> v1::ProduceResponse {
    let result = match outcome {
        Ok(appended) => produce_response::Result::Appended(appended),
        Err(fault) => produce_response::Result::Error(fault.into()),
    };
    v1::ProduceResponse { correlation, result: Some(result) }
}

/// Waits until the last request is queued or rejected.
async fn begun(beginning: &mut Option<AbortOnDropHandle<Begun>>) -> Begun {
    let begun = beginning.as_mut().expect("only asked while there is one").await;
    *beginning = None;
    begun.expect("the task is not aborted while it is awaited")
}

/// Returns the maximum time that an append waits for its acknowledgement.
fn timeout(ms: u32) -> Result<Duration, ApiError> {
    if ms > limits::MAX_APPEND_TIMEOUT_MS {
        let most = limits::MAX_APPEND_TIMEOUT_MS;
        return Err(faults::invalid(format!("timeout_ms {ms} is more than {most}, the most that an append waits")));
    }
    Ok(if ms == 0 { DEFAULT_TIMEOUT } else { Duration::from_millis(ms.into()) })
}

fn acks(value: i32) -> Result<Acks, ApiError> {
    match v1::Acks::try_from(value) {
        Ok(v1::Acks::Unspecified | v1::Acks::All) => Ok(Acks::All),
        Ok(v1::Acks::None) => Ok(Acks::None),
        Ok(v1::Acks::Leader) => Ok(Acks::Leader),
        Ok(v1::Acks::Tiered) => Ok(Acks::Tiered),
        Err(_) => Err(faults::invalid(format!("acks {value} does not exist"))),
    }
}

fn unacknowledged() -> v1::AppendResponse {
    v1::AppendResponse {
        base_offset: -1,
        end_offset: -1,
        leader_epoch: -1,
        append_time_ms: -1,
        durability: v1::Durability::Memory.into(),
        replicas: 1,
        duplicate: false,
    }
}

fn response(acked: &Acked) -> v1::AppendResponse {
    let (durability, replicas) = match acked.held {
        Held::Memory => (v1::Durability::Memory, 1),
        Held::PageCache(replicas) => (v1::Durability::PageCache, replicas),
        Held::Synced(replicas) => (v1::Durability::Synced, replicas),
        Held::Tiered(replicas) => (v1::Durability::Tiered, replicas),
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
