//! The producer's task. It owns all in-flight batches and all streams. Its loop waits for a command, an event, a
//! notification or a timer, and calls one method for each.

mod lookups;
mod trouble;

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::Arc,
};

use tokio::{
    sync::{mpsc, oneshot},
    time::Instant,
};

use super::{
    super::{
        connection::Address,
        error::{CallError, SendError},
        lock::lock,
        options::Pauses,
        trouble::Party,
    },
    Shared,
    completion::{Ack, Completion, Held},
    flight::{Done, Flight, GivenUp, Identity, Next, Verdict, Why},
    lane::{Lane, Taken},
    stream,
};
use crate::{
    model::{Acks, LeaderEpoch, Offset},
    proto::{
        error::{ApiError, ErrorCode},
        produce_request::ProduceRequestParts,
        v1,
    },
    task::{Tasks, clock},
};

/// Maximum number of in-flight batches on one stream. More batches wait in their queues, where later records still join
/// them.
const STREAM_WINDOW: usize = 256;

/// Command of a handle to the task.
pub(super) enum Command {
    /// Seal all batches, and return the completions that are outstanding.
    Flush(oneshot::Sender<Vec<Arc<Completion>>>),
    /// Seal all lingering batches: a sender waits for memory.
    Relieve,
}

/// Event from a child task to the task.
pub(super) enum Event {
    /// A broker responded.
    Answer { stream: u64, answer: v1::ProduceResponse },
    /// A stream ended. `delivered`: the broker may have received the batches.
    Ended { stream: u64, delivered: bool, fault: ApiError },
    /// A metadata refresh ended.
    Routed(Result<(), CallError>),
    /// A request for a new producer id, made for one queue, ended.
    Identified { lane: usize, identity: Result<Identity, CallError> },
}

struct Stream {
    address: Address,
    requests: mpsc::Sender<ProduceRequestParts>,
    under_way: usize,
    /// Queues that wait for room in the stream, each once, the longest wait first.
    waiting: VecDeque<usize>,
    /// Time of the last response, or of the first send after the stream was empty.
    heard: Instant,
    /// The call and its requests; cancelled when the stream ends.
    call: Tasks,
}

impl Stream {
    fn is_full(&self) -> bool {
        self.under_way >= STREAM_WINDOW
    }
}

/// State of one queue that only the task accesses.
struct LaneState {
    lane: Arc<Lane>,
    flight: Flight,
    /// Stream of the in-flight batches.
    stream: Option<u64>,
    /// Stream in which the queue waits for room.
    waiting: Option<u64>,
    /// Backoff; present while sends fail.
    pauses: Option<Pauses>,
    /// Time before which nothing is sent.
    not_before: Option<Instant>,
    /// Time of the queue's entry in `timers`.
    timer: Option<Instant>,
    identifying: bool,
    /// Time of the leader's last response, or of the first send after nothing was in flight.
    heard: Instant,
    /// Time of the last metadata refresh because the leader did not respond.
    doubted: Instant,
    /// Last problem, for the error of an expired record.
    trouble: String,
    /// True while the client's retry status holds this problem.
    in_trouble: bool,
    /// The broker's reason for a late acknowledgement.
    notice: Option<String>,
    /// Id of the topic that the batches belong to; `None` before the first batch.
    topic_id: Option<Arc<str>>,
    /// True once a batch was acknowledged under this id.
    proven: bool,
    /// True once a broker rejected this id. The broker's metadata may be older than the client's, so the batch is sent
    /// once more.
    mismatched: bool,
}

pub(super) struct Driver {
    shared: Arc<Shared>,
    troubles: Party,
    tasks: Tasks,
    identity: Option<Identity>,
    lanes: Vec<LaneState>,
    streams: BTreeMap<u64, Stream>,
    by_address: BTreeMap<Address, u64>,
    next_stream: u64,
    next_correlation: u64,
    /// Timers of the queues, by time; at most one per queue.
    timers: BTreeSet<(Instant, usize)>,
    /// Queues whose open batch may linger.
    lingering: BTreeSet<usize>,
    events: mpsc::Sender<Event>,
    received: mpsc::Receiver<Event>,
    routing: bool,
    /// Queues that wait for metadata.
    unrouted: BTreeSet<usize>,
    route_pauses: Option<Pauses>,
    refresh_at: Instant,
}

impl Driver {
    pub(super) fn new(shared: Arc<Shared>, tasks: Tasks, identity: Option<Identity>) -> Self {
        // The task never waits for room in a channel, so this bound cannot cause a deadlock.
        let (events, received) = mpsc::channel(STREAM_WINDOW);
        let refresh_at = clock::monotonic() + shared.client.options().metadata_age;
        Self {
            troubles: shared.client.party(),
            shared,
            tasks,
            identity,
            lanes: Vec::new(),
            streams: BTreeMap::new(),
            by_address: BTreeMap::new(),
            next_stream: 0,
            next_correlation: 0,
            timers: BTreeSet::new(),
            lingering: BTreeSet::new(),
            events,
            received,
            routing: false,
            unrouted: BTreeSet::new(),
            route_pauses: None,
            refresh_at,
        }
    }

    pub(super) async fn run(mut self, mut commands: mpsc::Receiver<Command>) {
        let shared = self.shared.clone();
        let tasks = self.tasks.clone();
        loop {
            let timer = self.timers.first().map_or(self.refresh_at, |(at, _)| (*at).min(self.refresh_at));
            tokio::select! {
                biased;
                () = tasks.cancelled() => break,
                Some(command) = commands.recv() => self.on_command(command),
                Some(event) = self.received.recv() => self.on_event(event),
                () = shared.wake.notified() => self.on_wake(),
                () = tokio::time::sleep_until(timer) => self.on_timer(),
            }
        }
        self.end();
    }

    fn on_command(&mut self, command: Command) {
        // A queue that was not processed yet may have an open batch too.
        self.on_wake();
        match command {
            Command::Flush(reply) => {
                self.seal(0..self.lanes.len());
                let outstanding =
                    self.lanes.iter().flat_map(|state| state.flight.waiting().cloned().chain(state.lane.waiting()));
                // The caller may have stopped waiting; the reply is then dropped.
                let _ = reply.send(outstanding.collect());
            }
            // Each record that finds the memory full sends this command. Visiting all partitions would cost more than
            // sending.
            Command::Relieve => {
                let lingering = std::mem::take(&mut self.lingering);
                self.seal(lingering);
            }
        }
    }

    fn seal(&mut self, lanes: impl IntoIterator<Item = usize>) {
        for index in lanes {
            self.lanes[index].lane.seal_now();
            self.pump(index);
        }
    }

    fn on_wake(&mut self) {
        self.meet_new_lanes();
        let dirty = std::mem::take(&mut *lock(&self.shared.dirty));
        for index in dirty {
            self.lanes[index].lane.clear_queued();
            self.pump(index);
        }
    }

    fn on_event(&mut self, event: Event) {
        match event {
            Event::Answer { stream, answer } => self.on_answer(stream, answer),
            Event::Ended { stream, delivered, fault } => self.on_ended(stream, delivered, &fault),
            Event::Routed(result) => self.on_routed(result),
            Event::Identified { lane, identity } => self.on_identified(lane, identity),
        }
    }

    fn on_timer(&mut self) {
        let now = clock::monotonic();
        if self.refresh_at <= now {
            self.refresh_at = now + self.shared.client.options().metadata_age;
            self.route();
        }
        while let Some((at, index)) = self.timers.first().copied() {
            if at > now {
                break;
            }
            self.timers.pop_first();
            self.lanes[index].timer = None;
            self.expire(index, now);
            self.doubt_silence(index, now);
            self.notice_silence(index, now);
            self.pump(index);
        }
    }

    fn meet_new_lanes(&mut self) {
        let all = lock(&self.shared.lanes);
        let options = &self.shared.options;
        for lane in all.iter().skip(self.lanes.len()) {
            self.lanes.push(LaneState {
                lane: lane.clone(),
                flight: Flight::new(options.guarantee(), options.window(), self.identity),
                stream: None,
                waiting: None,
                pauses: None,
                not_before: None,
                timer: None,
                identifying: false,
                heard: clock::monotonic(),
                doubted: clock::monotonic(),
                trouble: "none".to_owned(),
                in_trouble: false,
                notice: None,
                topic_id: None,
                proven: false,
                mismatched: false,
            });
        }
    }

    /// Sends all batches of a queue that may be sent now, and sets its timer.
    fn pump(&mut self, index: usize) {
        let now = clock::monotonic();
        loop {
            let state = &mut self.lanes[index];
            // The queue waits for room in the stream; until then later records join its open batch.
            if state.waiting.is_some() {
                break;
            }
            if state.not_before.is_some_and(|at| at > now) {
                break;
            }
            state.not_before = None;
            match state.flight.next() {
                Next::Wait => break,
                Next::Resume => state.flight.resume(),
                Next::Identify => {
                    self.identify(index);
                    break;
                }
                Next::Send(entry) => {
                    if !self.send(index, entry) {
                        break;
                    }
                }
                Next::Take => match state.lane.take(now) {
                    Taken::Batch(sealed) => state.flight.take(sealed),
                    Taken::Later(at) => {
                        self.lingering.insert(index);
                        self.set_timer(index, at);
                        return;
                    }
                    Taken::Nothing => break,
                },
            }
        }
        self.set_next_timer(index);
    }

    /// Sends one batch. Returns false if the batch must wait.
    fn send(&mut self, index: usize, entry: usize) -> bool {
        let state = &self.lanes[index];
        let Some(address) = self.shared.client.routing().leader(&state.lane.topic, state.lane.partition) else {
            self.unrouted.insert(index);
            self.route();
            return false;
        };
        let number = self.stream_to(&address);
        let state = &mut self.lanes[index];
        // The leader changed while batches are in flight to the old leader: wait for their responses.
        if state.stream.is_some_and(|old| old != number) && state.flight.under_way() > 0 {
            return false;
        }
        let stream = self.streams.get_mut(&number).expect("made above");
        if stream.is_full() {
            stream.waiting.push_back(index);
            state.waiting = Some(number);
            return false;
        }
        state.stream = Some(number);
        let topic_id = state.topic_id(&self.shared.client);
        if state.flight.under_way() == 0 {
            state.heard = clock::monotonic();
        }
        let correlation = u64::try_from(index).expect("64 bits") << 32 | self.next_correlation & 0xffff_ffff;
        self.next_correlation += 1;
        match state.flight.send(entry, number, correlation) {
            Ok(batch) => {
                let options = &self.shared.options;
                let frame = ProduceRequestParts {
                    correlation,
                    topic: state.lane.topic.clone(),
                    partition: i32::try_from(state.lane.partition).expect("partitions are few"),
                    acks: wire_acks(options.acks).into(),
                    timeout_ms: u32::try_from(options.delivery_timeout.as_millis()).unwrap_or(u32::MAX).min(30_000),
                    batch,
                    topic_id,
                };
                if stream.under_way == 0 {
                    stream.heard = clock::monotonic();
                }
                stream.under_way += 1;
                // The channel is never full, because it holds `STREAM_WINDOW` requests. If it is closed, the event of
                // its end follows.
                let _ = stream.requests.try_send(frame);
            }
            Err(given_up) => self.give_up(index, vec![given_up]),
        }
        true
    }

    fn stream_to(&mut self, address: &Address) -> u64 {
        if let Some(number) = self.by_address.get(address) {
            return *number;
        }
        let number = self.next_stream;
        self.next_stream += 1;
        let (requests, queue) = mpsc::channel(STREAM_WINDOW);
        let run = stream::run(self.shared.client.clone(), address.clone(), number, queue, self.events.clone());
        let call = self.tasks.child();
        let left = call.clone();
        self.tasks.spawn("producer stream", async move {
            tokio::select! {
                biased;
                () = left.cancelled() => {}
                () = run => {}
            }
        });
        let stream = Stream {
            address: address.clone(),
            requests,
            under_way: 0,
            waiting: VecDeque::new(),
            heard: clock::monotonic(),
            call,
        };
        self.streams.insert(number, stream);
        self.by_address.insert(address.clone(), number);
        number
    }

    fn on_answer(&mut self, number: u64, answer: v1::ProduceResponse) {
        let index = usize::try_from(answer.correlation >> 32).unwrap_or(usize::MAX);
        if index >= self.lanes.len() {
            return;
        }
        if let Some(v1::produce_response::Result::Waiting(why)) = answer.result {
            return self.on_notice(number, index, why.message);
        }
        if let Some(stream) = self.streams.get_mut(&number) {
            stream.under_way = stream.under_way.saturating_sub(1);
            stream.heard = clock::monotonic();
        }
        let (appended, result) = match answer.result {
            Some(v1::produce_response::Result::Appended(appended)) => (Some(appended), Ok(())),
            Some(v1::produce_response::Result::Error(error)) => (None, Err(self.lanes[index].judge(error.into()))),
            _ => (None, Err(ApiError::new(ErrorCode::Internal, "the broker sent an empty answer"))),
        };
        let fault = result.clone().err();
        let state = &mut self.lanes[index];
        state.heard = clock::monotonic();
        match state.flight.answered(number, answer.correlation, result) {
            Verdict::Done(done) => {
                (state.pauses, state.proven) = (None, true);
                let partition = state.lane.partition;
                self.acknowledge(partition, done, &appended.unwrap_or_default());
                self.over(index);
            }
            Verdict::Again => {
                let fault = fault.expect("only a failure is repeated");
                let lane = &self.lanes[index].lane;
                if self.shared.client.routing().told(&lane.topic, lane.partition, &fault) {
                    self.trouble(index, fault.message);
                } else {
                    self.pause(index, &fault);
                    if moved(fault.code) {
                        self.route();
                    }
                }
            }
            Verdict::GivenUp(given_up) => self.give_up(index, given_up),
            Verdict::Stale => {}
        }
        // Waiting queues get the room first; otherwise a busy partition would occupy the stream.
        self.admit_waiting(number);
        self.pump(index);
    }

    /// Gives free room in a stream to the queues that wait for it.
    fn admit_waiting(&mut self, number: u64) {
        while let Some(stream) = self.streams.get_mut(&number)
            && !stream.is_full()
            && let Some(index) = stream.waiting.pop_front()
        {
            self.lanes[index].waiting = None;
            self.pump(index);
        }
    }

    fn on_ended(&mut self, number: u64, delivered: bool, fault: &ApiError) {
        let Some(stream) = self.streams.remove(&number) else { return };
        tracing::debug!(address = stream.address.as_str(), %fault, "produce stream ended");
        stream.call.cancel();
        self.by_address.remove(&stream.address);
        for index in &stream.waiting {
            self.lanes[*index].waiting = None;
        }
        for index in 0..self.lanes.len() {
            let state = &mut self.lanes[index];
            if state.stream != Some(number) {
                continue;
            }
            state.stream = None;
            if state.flight.under_way() > 0 {
                let given_up = state.flight.lost(number, delivered);
                self.give_up(index, given_up);
                self.pause(index, fault);
            }
            self.pump(index);
        }
        for index in stream.waiting {
            self.pump(index);
        }
        self.route();
    }

    fn expire(&mut self, index: usize, now: Instant) {
        let state = &mut self.lanes[index];
        if let Some((deadline, Some(stream))) = state.flight.deadline()
            && deadline <= now
        {
            // A broker that did not respond within the delivery timeout will not respond: its stream ends for all
            // partitions.
            let fault = ApiError::new(ErrorCode::Timeout, self.silence(index, stream));
            self.on_ended(stream, true, &fault);
        }
        let state = &mut self.lanes[index];
        let mut given_up = state.flight.expire(now);
        if state.flight.is_empty() {
            given_up.extend(state.lane.take_expired(now).into_iter().map(|sealed| GivenUp {
                done: Done { completion: sealed.completion, permits: sealed.permits, count: sealed.count },
                why: Why::Expired { maybe_appended: false },
            }));
        }
        self.give_up(index, given_up);
    }

    fn refuse_all(&mut self, index: usize, fault: &ApiError) {
        let state = &mut self.lanes[index];
        let mut done = state.flight.abandon();
        while let Taken::Batch(sealed) = {
            state.lane.seal_now();
            state.lane.take(clock::monotonic())
        } {
            done.push(Done { completion: sealed.completion, permits: sealed.permits, count: sealed.count });
        }
        let refused = done.into_iter().map(|done| GivenUp { done, why: Why::Refused(fault.clone()) });
        self.give_up(index, refused.collect());
    }

    fn acknowledge(&self, partition: u32, done: Done, appended: &v1::AppendResponse) {
        let base_offset = Offset::from_i64(appended.base_offset).filter(|_| self.shared.options.acks != Acks::None);
        done.completion.complete(Ok(Ack {
            partition,
            offset: base_offset,
            base_offset,
            count: done.count,
            leader_epoch: LeaderEpoch::from_i32(appended.leader_epoch).unwrap_or_default(),
            append_time_ms: (appended.append_time_ms >= 0).then_some(appended.append_time_ms),
            held: Held::from_wire(appended.durability),
            replicas: appended.replicas,
            duplicate: appended.duplicate,
            received: clock::monotonic(),
        }));
        self.shared.release(done.permits);
    }

    fn give_up(&mut self, index: usize, given_up: Vec<GivenUp>) {
        let state = &self.lanes[index];
        for GivenUp { done, why } in given_up {
            let (topic, partition) = (state.lane.topic.to_string(), state.lane.partition);
            let error = match why {
                Why::Refused(fault) => SendError::Refused { topic, partition, fault },
                Why::Expired { maybe_appended } => {
                    SendError::Expired { topic, partition, maybe_appended, trouble: state.trouble.clone() }
                }
                Why::Unknown => SendError::Unknown { topic, partition },
                Why::Build(error) => SendError::Build(error),
            };
            tracing::debug!(%error, records = done.count, "batch given up");
            done.completion.complete(Err(error));
            self.shared.release(done.permits);
        }
        if state.flight.is_empty() && state.lane.deadline().is_none() {
            self.over(index);
        }
    }

    fn set_next_timer(&mut self, index: usize) {
        let state = &self.lanes[index];
        let deadline = state.flight.deadline().map(|(at, _)| at).or_else(|| state.lane.deadline());
        let under_way = state.flight.under_way() > 0;
        let silent = (!state.in_trouble && under_way).then_some(state.heard + trouble::SLOW);
        let heard = under_way.then_some(state.heard).into_iter().chain(self.queued_since(state)).min();
        let doubtful = heard.map(|heard| (heard + trouble::QUIET).max(state.doubted + trouble::DOUBT_AGAIN));
        if let Some(at) = [state.not_before, deadline, silent, doubtful].into_iter().flatten().min() {
            self.set_timer(index, at);
        }
    }

    fn set_timer(&mut self, index: usize, at: Instant) {
        let state = &mut self.lanes[index];
        match state.timer {
            // An early timer costs one check; a late timer would miss the time.
            Some(set) if set <= at => return,
            Some(set) => {
                self.timers.remove(&(set, index));
            }
            None => {}
        }
        state.timer = Some(at);
        self.timers.insert((at, index));
    }

    /// Fails all unacknowledged records.
    fn end(mut self) {
        self.shared.memory.close();
        self.meet_new_lanes();
        for state in &mut self.lanes {
            let sealed = state.lane.close(&SendError::Closed);
            let done = state.flight.abandon().into_iter().map(|done| done.completion);
            for completion in done.chain(sealed.into_iter().map(|sealed| sealed.completion)) {
                completion.complete(Err(SendError::Closed));
            }
        }
    }
}

/// Returns true if another broker may lead the partition now.
fn moved(reason: ErrorCode) -> bool {
    matches!(reason, ErrorCode::NotLeader | ErrorCode::NotReady | ErrorCode::StorageFailed | ErrorCode::TopicIdMismatch)
}

fn wire_acks(acks: Acks) -> v1::Acks {
    match acks {
        Acks::None => v1::Acks::None,
        Acks::Leader => v1::Acks::Leader,
        Acks::All => v1::Acks::All,
        Acks::Tiered => v1::Acks::Tiered,
    }
}
