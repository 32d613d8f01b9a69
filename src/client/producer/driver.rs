//! The producer's task. It owns every flight and every stream; its loop waits for one of a few things and calls one
//! plain method for each.

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
        fault::{Fault, Reason},
        frame::ProduceFrame,
        v1,
    },
    task::{Tasks, clock},
};

/// Batches under way on one stream. More wait in their lanes, where later records still join them.
const STREAM_WINDOW: usize = 256;

/// What handles ask of the task.
pub(super) enum Command {
    /// Seal all, and say what is outstanding.
    Flush(oneshot::Sender<Vec<Arc<Completion>>>),
    /// Seal all: somebody waits for memory.
    Relieve,
}

/// What the task's own helpers tell it.
pub(super) enum Event {
    /// A broker answered.
    Answer { stream: u64, answer: v1::ProduceResponse },
    /// A stream ended. `delivered`: the broker may have seen what was sent.
    Ended { stream: u64, delivered: bool, fault: Fault },
    /// Metadata was asked for.
    Routed(Result<(), CallError>),
    /// A new id was asked for on behalf of a lane.
    Identified { lane: usize, identity: Result<Identity, CallError> },
}

struct Stream {
    address: Address,
    requests: mpsc::Sender<ProduceFrame>,
    under_way: usize,
    /// Lanes that found the stream full, each once, the longest wait first.
    waiting: VecDeque<usize>,
    /// When an answer came last.
    heard: Instant,
    /// The call itself, and what is on its way there: over when the stream is left.
    call: Tasks,
}

impl Stream {
    fn is_full(&self) -> bool {
        self.under_way >= STREAM_WINDOW
    }
}

/// One lane's side that only the task sees.
struct LaneState {
    lane: Arc<Lane>,
    flight: Flight,
    /// Where the flight's batches are under way.
    stream: Option<u64>,
    /// The stream in which it waits for room.
    waiting: Option<u64>,
    /// The next pause; there while something fails.
    pauses: Option<Pauses>,
    /// Nothing is sent before.
    not_before: Option<Instant>,
    /// The timer that is set for it.
    timer: Option<Instant>,
    identifying: bool,
    /// When its leader was last heard, or last given something to answer.
    heard: Instant,
    /// When metadata was last asked for because of its leader's silence.
    doubted: Instant,
    /// What stood in the way last, for the message of an expiry.
    trouble: String,
    /// Whether that is what the client shows.
    in_trouble: bool,
    /// Why acknowledgements take longer, by the broker's word.
    notice: Option<String>,
    /// The id of the topic that is written to; `None` before the first batch.
    topic_id: Option<Arc<str>>,
    /// A batch was acknowledged under that id.
    proven: bool,
    /// A broker refused that id. It may know less than this client, so it is asked twice.
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
    /// Lanes that want to be looked at, by time; at most one entry for each.
    timers: BTreeSet<(Instant, usize)>,
    /// Lanes whose open batch may be lingering.
    lingering: BTreeSet<usize>,
    events: mpsc::Sender<Event>,
    received: mpsc::Receiver<Event>,
    routing: bool,
    /// Lanes that wait for metadata.
    unrouted: BTreeSet<usize>,
    route_pauses: Option<Pauses>,
    refresh_at: Instant,
}

impl Driver {
    pub(super) fn new(shared: Arc<Shared>, tasks: Tasks, identity: Option<Identity>) -> Self {
        // The task never waits to put anything anywhere but here, so that this bound cannot lock it up.
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
        // What has not been looked at yet may linger too.
        self.on_wake();
        match command {
            Command::Flush(reply) => {
                self.seal(0..self.lanes.len());
                let outstanding =
                    self.lanes.iter().flat_map(|state| state.flight.waiting().cloned().chain(state.lane.waiting()));
                // Nobody waits any more: nothing to tell.
                let _ = reply.send(outstanding.collect());
            }
            // It comes with every record that finds the memory full: a look at all partitions would cost more than sending.
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

    /// Sends what may be sent of a lane, and sets its timer.
    fn pump(&mut self, index: usize) {
        let now = clock::monotonic();
        loop {
            let state = &mut self.lanes[index];
            // It has its turn; until then later records join its open batch.
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

    /// Sends one batch; false when it must wait.
    fn send(&mut self, index: usize, entry: usize) -> bool {
        let state = &self.lanes[index];
        let Some(address) = self.shared.client.routing().leader(&state.lane.topic, state.lane.partition) else {
            self.unrouted.insert(index);
            self.route();
            return false;
        };
        let number = self.stream_to(&address);
        let state = &mut self.lanes[index];
        // The leader moved while batches are under way at the old one: their answers come first.
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
                let frame = ProduceFrame {
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
                // Full it cannot be; closed it is while its end is on the way here as an event.
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
            _ => (None, Err(Fault::new(Reason::Internal, "the broker sent an empty answer"))),
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
                    if moved(fault.reason) {
                        self.route();
                    }
                }
            }
            Verdict::GivenUp(given_up) => self.give_up(index, given_up),
            Verdict::Stale => {}
        }
        // Those that wait come first: else a busy partition would keep the stream to itself.
        self.admit_waiting(number);
        self.pump(index);
    }

    /// Gives the stream's room to the lanes that wait for it.
    fn admit_waiting(&mut self, number: u64) {
        while let Some(stream) = self.streams.get_mut(&number)
            && !stream.is_full()
            && let Some(index) = stream.waiting.pop_front()
        {
            self.lanes[index].waiting = None;
            self.pump(index);
        }
    }

    fn on_ended(&mut self, number: u64, delivered: bool, fault: &Fault) {
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
            // A broker that has not answered for so long will not: its stream ends here, for all that use it.
            let fault = Fault::new(Reason::Timeout, self.silence(index, stream));
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

    fn refuse_all(&mut self, index: usize, fault: &Fault) {
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
                Why::Unbuildable(error) => SendError::Unbuildable(error),
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
            // An early timer costs one look; a later one would be missed.
            Some(set) if set <= at => return,
            Some(set) => {
                self.timers.remove(&(set, index));
            }
            None => {}
        }
        state.timer = Some(at);
        self.timers.insert((at, index));
    }

    /// Fails what was not acknowledged.
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

/// Whether the partition may be led elsewhere now.
fn moved(reason: Reason) -> bool {
    matches!(reason, Reason::NotLeader | Reason::NotReady | Reason::StorageFailed | Reason::TopicIdMismatch)
}

fn wire_acks(acks: Acks) -> v1::Acks {
    match acks {
        Acks::None => v1::Acks::None,
        Acks::Leader => v1::Acks::Leader,
        Acks::All => v1::Acks::All,
        Acks::Tiered => v1::Acks::Tiered,
    }
}
