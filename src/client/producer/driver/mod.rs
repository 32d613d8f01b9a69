//! The producer's task. It owns all in-flight batches and all streams. Its loop waits for a command, an event, a
//! notification or a timer, and calls one method for each.

mod leader_timeout;
mod metadata;
mod queue_state;

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::Arc,
};

use tokio::{
    sync::{mpsc, oneshot},
    time::Instant,
};

use self::queue_state::{LEADER_TIMEOUT, QueueState};
use super::{
    super::{address::BrokerAddress, error::SendError, retry_status::RetryReporter},
    ProducerInner,
    completion::{Ack, Completion, durability},
    driver_event::DriverEvent,
    in_flight::{CompletedBatch, FailedBatch, FailureReason, NextAction, ProducerIdAndEpoch, ResponseOutcome},
    partition_queue::DequeueResult,
    produce_request::ProduceRequestParts,
    stream,
};
use crate::{
    model::{Acks, LeaderEpoch, Offset},
    proto::{
        error::{ApiError, ErrorCode},
        v1,
    },
    task::{Backoff, Tasks, clock},
};

/// Maximum number of in-flight batches on one stream. Further batches stay in their partition queues, where later
/// records are added to the open batch.
const STREAM_WINDOW: usize = 256;

/// Maximum time, in milliseconds, that one attempt asks the broker to wait for the acknowledgement. A batch whose
/// attempt ends with `TIMEOUT` is sent again until its delivery timeout.
const MAX_ATTEMPT_TIMEOUT_MS: u32 = 30_000;

/// Command of a handle to the task.
pub(super) enum ProducerCommand {
    /// Seal all open batches, and return the completions of all batches without a result.
    Flush(oneshot::Sender<Vec<Arc<Completion>>>),
    /// Seal all lingering batches: a sender waits for memory.
    FlushLingering,
}

/// Stream to one leader.
struct ProduceStream {
    address: BrokerAddress,
    requests: mpsc::Sender<ProduceRequestParts>,
    /// Number of batches without a response.
    in_flight: usize,
    /// Indexes of the queues that wait for capacity in the stream, each once, the longest wait first.
    waiting: VecDeque<usize>,
    /// Time of the last response or notice, or of the first send after no batch was in flight on the stream.
    last_response: Instant,
    /// Cancellation of the stream's call, when the producer ends the stream.
    call: Tasks,
}

impl ProduceStream {
    fn is_full(&self) -> bool {
        self.in_flight >= STREAM_WINDOW
    }
}

/// State of the producer's task.
pub(super) struct ProducerDriver {
    inner: Arc<ProducerInner>,
    retries: RetryReporter,
    tasks: Tasks,
    identity: Option<ProducerIdAndEpoch>,
    queues: Vec<QueueState>,
    streams: BTreeMap<u64, ProduceStream>,
    /// Number of the stream to each broker.
    by_address: BTreeMap<BrokerAddress, u64>,
    next_stream: u64,
    next_correlation: u64,
    /// Timers of the queues, by time; at most one per queue.
    timers: BTreeSet<(Instant, usize)>,
    /// Indexes of the queues whose open batch may linger.
    lingering: BTreeSet<usize>,
    events: mpsc::Sender<DriverEvent>,
    received: mpsc::Receiver<DriverEvent>,
    /// True while a metadata refresh is running.
    refreshing: bool,
    /// Indexes of the queues whose partition has no leader in the metadata.
    without_leader: BTreeSet<usize>,
    /// Backoff of metadata refreshes; present while queues have no leader.
    metadata_backoff: Option<Backoff>,
    /// Time of the next periodic metadata refresh.
    refresh_at: Instant,
}

impl ProducerDriver {
    pub(super) fn new(inner: Arc<ProducerInner>, tasks: Tasks, identity: Option<ProducerIdAndEpoch>) -> Self {
        // The producer's task never waits for capacity in a channel, so the bound of this one cannot cause a deadlock.
        let (events, received) = mpsc::channel(STREAM_WINDOW);
        let refresh_at = clock::monotonic() + inner.client.options().metadata_age;
        Self {
            retries: inner.client.retry_reporter(),
            inner,
            tasks,
            identity,
            queues: Vec::new(),
            streams: BTreeMap::new(),
            by_address: BTreeMap::new(),
            next_stream: 0,
            next_correlation: 0,
            timers: BTreeSet::new(),
            lingering: BTreeSet::new(),
            events,
            received,
            refreshing: false,
            without_leader: BTreeSet::new(),
            metadata_backoff: None,
            refresh_at,
        }
    }

    /// Runs until the tasks are cancelled, then fails all unacknowledged records.
    pub(super) async fn run(mut self, mut commands: mpsc::Receiver<ProducerCommand>) {
        let inner = self.inner.clone();
        let tasks = self.tasks.clone();
        loop {
            let timer = self.timers.first().map_or(self.refresh_at, |(at, _)| (*at).min(self.refresh_at));
            tokio::select! {
                biased;
                () = tasks.cancelled() => break,
                Some(command) = commands.recv() => self.on_command(command),
                Some(event) = self.received.recv() => self.on_event(event),
                () = inner.has_work.notified() => self.process_dirty_queues(),
                () = tokio::time::sleep_until(timer) => self.on_timer(),
            }
        }
        self.fail_unacknowledged();
    }

    /// Executes a command of a handle.
    fn on_command(&mut self, command: ProducerCommand) {
        // Adds the queues that senders created meanwhile: they may have open batches too.
        self.process_dirty_queues();
        match command {
            ProducerCommand::Flush(reply) => {
                self.seal(0..self.queues.len());
                let outstanding = self
                    .queues
                    .iter()
                    .flat_map(|state| state.in_flight.completions().cloned().chain(state.queue.completions()));
                // The caller may have stopped waiting; the reply is then dropped.
                let _ = reply.send(outstanding.collect());
            }
            // Each record that finds the memory full sends this command. Visiting all queues for each would cost more
            // than the sends.
            ProducerCommand::FlushLingering => {
                let lingering = std::mem::take(&mut self.lingering);
                self.seal(lingering);
            }
        }
    }

    /// Seals the open batches of these queues and sends what may be sent.
    fn seal(&mut self, queues: impl IntoIterator<Item = usize>) {
        for index in queues {
            self.queues[index].queue.seal_now();
            self.send_ready(index);
        }
    }

    /// Adds the queues that senders created, and sends the batches of all queues that senders marked as dirty.
    fn process_dirty_queues(&mut self) {
        self.add_new_queues();
        let dirty = std::mem::take(&mut *self.inner.dirty.lock());
        for index in dirty {
            self.queues[index].queue.clear_queued();
            self.send_ready(index);
        }
    }

    fn on_event(&mut self, event: DriverEvent) {
        match event {
            DriverEvent::Response { stream, response } => self.on_response(stream, response),
            DriverEvent::StreamEnded { stream, delivered, error } => self.on_stream_ended(stream, delivered, &error),
            DriverEvent::MetadataRefreshed(result) => self.on_metadata(result),
            DriverEvent::ProducerIdReceived { queue, result } => self.on_producer_id(queue, result),
        }
    }

    /// Handles the periodic metadata refresh and the timers of queues that are due.
    fn on_timer(&mut self) {
        let now = clock::monotonic();
        if self.refresh_at <= now {
            self.refresh_at = now + self.inner.client.options().metadata_age;
            self.refresh_metadata();
        }
        while let Some((at, index)) = self.timers.first().copied() {
            if at > now {
                break;
            }
            self.timers.pop_first();
            self.queues[index].timer = None;
            self.expire(index, now);
            self.check_leader_timeout(index, now);
            self.report_leader_timeout(index, now);
            self.send_ready(index);
        }
    }

    /// Adds state for the queues that senders created since the last call.
    fn add_new_queues(&mut self) {
        let queues = self.inner.queues.lock();
        for queue in queues.iter().skip(self.queues.len()) {
            self.queues.push(QueueState::new(queue.clone(), &self.inner.options, self.identity));
        }
    }

    /// Sends all batches of a queue that may be sent now, and sets the queue's timer for its next work.
    fn send_ready(&mut self, index: usize) {
        let now = clock::monotonic();
        loop {
            let state = &mut self.queues[index];
            // The queue waits for capacity in a stream. Until then later records are added to its open batch.
            if state.waiting.is_some() {
                break;
            }
            if state.not_before.is_some_and(|at| at > now) {
                break;
            }
            state.not_before = None;
            match state.in_flight.next() {
                NextAction::Wait => break,
                NextAction::Resume => state.in_flight.resume(),
                NextAction::RequestId => {
                    self.request_producer_id(index);
                    break;
                }
                NextAction::Send(entry) => {
                    if !self.send(index, entry) {
                        break;
                    }
                }
                NextAction::Take => match state.queue.take(now) {
                    DequeueResult::Batch(sealed) => state.in_flight.take(sealed),
                    DequeueResult::Later(at) => {
                        self.lingering.insert(index);
                        self.set_timer(index, at);
                        return;
                    }
                    DequeueResult::Empty => break,
                },
            }
        }
        self.set_next_timer(index);
    }

    /// Sends the batch at position `entry` of the batches that queue `index` has taken and that have no final result.
    /// Returns false if the batch must wait: for a leader in the metadata, for responses of the old leader, or for
    /// capacity in the stream. Returns true if the batch was sent, or failed because it cannot be built.
    fn send(&mut self, index: usize, entry: usize) -> bool {
        let state = &self.queues[index];
        let Some(address) = self.inner.client.routing().leader(&state.queue.topic, state.queue.partition) else {
            self.without_leader.insert(index);
            self.refresh_metadata();
            return false;
        };
        let number = self.stream_to(&address);
        let state = &mut self.queues[index];
        // The leader has changed, and batches are in flight to the old leader: their responses come first.
        if state.stream.is_some_and(|current| current != number) && state.in_flight.in_flight_count() > 0 {
            return false;
        }
        let stream = self.streams.get_mut(&number).expect("stream_to returned its number");
        if stream.is_full() {
            stream.waiting.push_back(index);
            state.waiting = Some(number);
            return false;
        }
        state.stream = Some(number);
        let topic_id = state.topic_id(&self.inner.client);
        if state.in_flight.in_flight_count() == 0 {
            state.last_response = clock::monotonic();
        }
        let high_bits = u64::try_from(index).expect("a usize fits in 64 bits") << 32;
        let correlation_id = high_bits | self.next_correlation & 0xffff_ffff;
        self.next_correlation += 1;
        match state.in_flight.send(entry, number, correlation_id) {
            Ok(batch) => {
                let options = &self.inner.options;
                let request = ProduceRequestParts {
                    correlation_id,
                    topic: state.queue.topic.clone(),
                    partition: i32::try_from(state.queue.partition).expect("partitions are few"),
                    acks: acks_to_proto(options.acks).into(),
                    timeout_ms: u32::try_from(options.delivery_timeout.as_millis())
                        .unwrap_or(u32::MAX)
                        .min(MAX_ATTEMPT_TIMEOUT_MS),
                    batch,
                    topic_id,
                };
                if stream.in_flight == 0 {
                    stream.last_response = clock::monotonic();
                }
                stream.in_flight += 1;
                // The channel is never full, because it holds `STREAM_WINDOW` requests. If it is closed, the event of
                // the stream's end follows.
                let _ = stream.requests.try_send(request);
            }
            Err(failed) => self.fail_batches(index, vec![failed]),
        }
        true
    }

    /// Returns the number of the stream to a broker. Opens the stream if there is none.
    fn stream_to(&mut self, address: &BrokerAddress) -> u64 {
        if let Some(number) = self.by_address.get(address) {
            return *number;
        }
        let number = self.next_stream;
        self.next_stream += 1;
        let (requests, queue) = mpsc::channel(STREAM_WINDOW);
        let stream_call = stream::run(self.inner.client.clone(), address.clone(), number, queue, self.events.clone());
        let call = self.tasks.child();
        let call_tasks = call.clone();
        self.tasks.spawn("producer-stream", async move { call_tasks.run_until_cancelled(stream_call).await });
        let stream = ProduceStream {
            address: address.clone(),
            requests,
            in_flight: 0,
            waiting: VecDeque::new(),
            last_response: clock::monotonic(),
            call,
        };
        self.streams.insert(number, stream);
        self.by_address.insert(address.clone(), number);
        number
    }

    /// Handles a response on a stream. The high half of the response's correlation id is the index of the queue.
    fn on_response(&mut self, number: u64, response: v1::ProduceResponse) {
        let index = usize::try_from(response.correlation_id >> 32).unwrap_or(usize::MAX);
        if index >= self.queues.len() {
            return;
        }
        if let Some(v1::produce_response::Result::Waiting(reason)) = response.result {
            return self.on_notice(number, index, reason.message);
        }
        if let Some(stream) = self.streams.get_mut(&number) {
            stream.in_flight = stream.in_flight.saturating_sub(1);
            stream.last_response = clock::monotonic();
        }
        let (appended, result) = match response.result {
            Some(v1::produce_response::Result::Appended(appended)) => (Some(appended), Ok(())),
            Some(v1::produce_response::Result::Error(error)) => {
                (None, Err(self.queues[index].leader_error(error.into())))
            }
            _ => (None, Err(ApiError::new(ErrorCode::Internal, "the broker sent an empty response"))),
        };
        let error = result.clone().err();
        let state = &mut self.queues[index];
        state.last_response = clock::monotonic();
        match state.in_flight.on_response(number, response.correlation_id, result) {
            ResponseOutcome::Completed(batch) => {
                (state.backoff, state.topic_id_confirmed) = (None, true);
                let partition = state.queue.partition;
                self.acknowledge(partition, batch, &appended.unwrap_or_default());
                self.clear_problem(index);
            }
            ResponseOutcome::Retry => {
                let error = error.expect("only a failed attempt is repeated");
                let queue = &self.queues[index].queue;
                if self.inner.client.routing().apply_leader_hint(&queue.topic, queue.partition, &error) {
                    self.report_problem(index, error.message);
                } else {
                    self.pause(index, &error);
                    if may_have_moved(error.code) {
                        self.refresh_metadata();
                    }
                }
            }
            ResponseOutcome::Failed(failed) => self.fail_batches(index, failed),
            ResponseOutcome::Stale => {}
        }
        // Queues that wait for this stream get the free capacity first; otherwise a busy partition would occupy the
        // stream.
        self.admit_waiting(number);
        self.send_ready(index);
    }

    /// Gives free capacity in a stream to the queues that wait for it.
    fn admit_waiting(&mut self, number: u64) {
        while let Some(stream) = self.streams.get_mut(&number)
            && !stream.is_full()
            && let Some(index) = stream.waiting.pop_front()
        {
            self.queues[index].waiting = None;
            self.send_ready(index);
        }
    }

    /// Handles the end of a stream, and refreshes the metadata. `delivered` is true if the broker may have received the
    /// batches in flight on the stream. These batches are sent again after a pause, or, with `acks=0` and `delivered`,
    /// fail.
    fn on_stream_ended(&mut self, number: u64, delivered: bool, error: &ApiError) {
        let Some(stream) = self.streams.remove(&number) else { return };
        tracing::debug!(address = stream.address.as_str(), %error, "produce stream ended");
        stream.call.cancel();
        self.by_address.remove(&stream.address);
        for index in &stream.waiting {
            self.queues[*index].waiting = None;
        }
        for index in 0..self.queues.len() {
            let state = &mut self.queues[index];
            if state.stream != Some(number) {
                continue;
            }
            state.stream = None;
            if state.in_flight.in_flight_count() > 0 {
                let failed = state.in_flight.on_stream_lost(number, delivered);
                self.fail_batches(index, failed);
                self.pause(index, error);
            }
            self.send_ready(index);
        }
        for index in stream.waiting {
            self.send_ready(index);
        }
        self.refresh_metadata();
    }

    /// Fails the batches of a queue whose delivery timeout has passed. If the oldest one is in flight, its stream ends
    /// first.
    fn expire(&mut self, index: usize, now: Instant) {
        let state = &mut self.queues[index];
        if let Some((deadline, Some(stream))) = state.in_flight.deadline()
            && deadline <= now
        {
            // A broker that did not respond within the delivery timeout will not respond: its stream ends for all
            // partitions.
            let error = ApiError::new(ErrorCode::Timeout, self.no_response_reason(index, stream));
            self.on_stream_ended(stream, true, &error);
        }
        let state = &mut self.queues[index];
        let mut failed = state.in_flight.expire(now);
        if state.in_flight.is_empty() {
            let reason = FailureReason::Expired { maybe_appended: false };
            let expired = state.queue.take_expired(now).into_iter();
            failed.extend(expired.map(|sealed| FailedBatch { batch: sealed.into(), reason: reason.clone() }));
        }
        self.fail_batches(index, failed);
    }

    /// Fails all batches of a queue with a broker's error, including the open batch.
    fn fail_all(&mut self, index: usize, error: &ApiError) {
        let state = &mut self.queues[index];
        let mut batches = state.in_flight.abandon();
        while let DequeueResult::Batch(sealed) = {
            state.queue.seal_now();
            state.queue.take(clock::monotonic())
        } {
            batches.push(sealed.into());
        }
        let failed =
            batches.into_iter().map(|batch| FailedBatch { batch, reason: FailureReason::Refused(error.clone()) });
        self.fail_batches(index, failed.collect());
    }

    /// Completes a batch with the acknowledgement in a response, and releases its memory.
    fn acknowledge(&self, partition: u32, batch: CompletedBatch, appended: &v1::AppendResponse) {
        let base_offset = Offset::from_i64(appended.base_offset).filter(|_| self.inner.options.acks != Acks::None);
        batch.completion.complete(Ok(Ack {
            partition,
            offset: base_offset,
            base_offset,
            count: batch.count,
            leader_epoch: LeaderEpoch::from_i32(appended.leader_epoch).unwrap_or_default(),
            append_time_ms: (appended.append_time_ms >= 0).then_some(appended.append_time_ms),
            durability: durability(appended.durability, appended.replicas),
            duplicate: appended.duplicate,
            received: clock::monotonic(),
        }));
        self.inner.release(batch.permits);
    }

    /// Completes batches with their errors, and releases their memory. If the queue has no other batch, its problem is
    /// cleared.
    fn fail_batches(&mut self, index: usize, failed: Vec<FailedBatch>) {
        let state = &self.queues[index];
        for FailedBatch { batch, reason } in failed {
            let (topic, partition) = (state.queue.topic.to_string(), state.queue.partition);
            let error = match reason {
                FailureReason::Refused(error) => SendError::Refused { topic, partition, error },
                FailureReason::Expired { maybe_appended } => {
                    let (timeout, status) = (self.inner.options.delivery_timeout, state.last_problem.clone());
                    SendError::Expired { topic, partition, timeout, maybe_appended, status }
                }
                FailureReason::Unknown => SendError::Unknown { topic, partition },
                FailureReason::Build(error) => SendError::Build(error),
            };
            tracing::debug!(%error, records = batch.count, "batch failed");
            batch.completion.complete(Err(error));
            self.inner.release(batch.permits);
        }
        if state.in_flight.is_empty() && state.queue.deadline().is_none() {
            self.clear_problem(index);
        }
    }

    /// Sets the timer of a queue to the next time at which it may need work. This is the end of a pause, the delivery
    /// timeout, a report, or a check of the leader.
    fn set_next_timer(&mut self, index: usize) {
        let state = &self.queues[index];
        let deadline = state.in_flight.deadline().map(|(at, _)| at).or_else(|| state.queue.deadline());
        let has_in_flight = state.in_flight.in_flight_count() > 0;
        let report_at =
            (!state.has_problem && has_in_flight).then_some(state.last_response + leader_timeout::REPORT_TIMEOUT);
        let last_response =
            has_in_flight.then_some(state.last_response).into_iter().chain(self.stream_last_response(state)).min();
        let refresh_at = last_response.map(|last_response| {
            let timeout_at = last_response + LEADER_TIMEOUT;
            timeout_at.max(state.last_leader_check + leader_timeout::METADATA_RETRY_INTERVAL)
        });
        if let Some(at) = [state.not_before, deadline, report_at, refresh_at].into_iter().flatten().min() {
            self.set_timer(index, at);
        }
    }

    /// Sets the timer of a queue to this time, unless an earlier time is set.
    fn set_timer(&mut self, index: usize, at: Instant) {
        let state = &mut self.queues[index];
        match state.timer {
            // An early timer costs one check; a late timer would miss the time.
            Some(current) if current <= at => return,
            Some(current) => {
                self.timers.remove(&(current, index));
            }
            None => {}
        }
        state.timer = Some(at);
        self.timers.insert((at, index));
    }

    /// Closes all queues and fails all unacknowledged records.
    fn fail_unacknowledged(mut self) {
        self.inner.memory.close();
        self.add_new_queues();
        for state in &mut self.queues {
            let sealed = state.queue.close(&SendError::Closed);
            let in_flight = state.in_flight.abandon().into_iter().map(|batch| batch.completion);
            for completion in in_flight.chain(sealed.into_iter().map(|sealed| sealed.completion)) {
                completion.complete(Err(SendError::Closed));
            }
        }
    }
}

/// Returns true if this error may mean that the cached leader or topic id is outdated, so that the metadata must be
/// refreshed.
fn may_have_moved(code: ErrorCode) -> bool {
    matches!(code, ErrorCode::NotLeader | ErrorCode::NotReady | ErrorCode::StorageFailed | ErrorCode::TopicIdMismatch)
}

fn acks_to_proto(acks: Acks) -> v1::Acks {
    match acks {
        Acks::None => v1::Acks::None,
        Acks::Leader => v1::Acks::Leader,
        Acks::All => v1::Acks::All,
        Acks::Tiered => v1::Acks::Tiered,
    }
}
