//! The consumer's task. It owns every position and every stream.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    pin::Pin,
    sync::Arc,
    time::Duration,
};

use futures::{Stream, StreamExt as _, TryStreamExt as _};
use tokio::{sync::mpsc, time::Instant};

use super::{
    super::{
        Client,
        connection::{Address, log_client},
        error::{CallError, ConsumeError},
        options::Pauses,
        trouble::Party,
    },
    ConsumerOptions, Item, OnOutOfRange, What,
    position::{self, Untaken},
    streams::Streams,
};
use crate::{
    model::Offset,
    proto::{
        fault::{Fault, Reason},
        v1,
    },
    task::{Tasks, clock},
};

/// How often damaged bytes are asked for again before the reader is told: a transport may damage them, a disk stays so.
const DAMAGE_TRIES: u32 = 3;

/// How long a stream is open without a word until what went wrong before it counts as over: at the end of a log no record
/// comes to prove it.
const SETTLED: Duration = Duration::from_secs(2);

/// What the handle asks of the task.
#[derive(Debug)]
pub(super) enum Command {
    Assign { topic: Arc<str>, partition: u32, generation: u64, position: Offset },
    Unassign { topic: Arc<str>, partition: u32 },
}

/// What comes of a stream.
enum Heard {
    /// The leader has taken the request.
    Opened,
    Response(v1::FetchResponse),
}

type Responses = Pin<Box<dyn Stream<Item = Result<Heard, Fault>> + Send>>;

/// What stands in the way of a partition.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Trouble {
    /// Its leader cannot be reached, or does not lead it: over when a stream stays open.
    Leader,
    /// Its records cannot be read: over when some come.
    Records,
}

struct Partition {
    generation: u64,
    position: Offset,
    /// The stream that carries it.
    stream: Option<u64>,
    /// It failed for good, and waits to be sought.
    parked: bool,
    pauses: Option<Pauses>,
    not_before: Option<Instant>,
    damaged: u32,
    trouble: Option<Trouble>,
    /// Since when its stream is open.
    open_since: Option<Instant>,
}

struct Source {
    address: Address,
    /// Keeps the request half open.
    _requests: mpsc::Sender<v1::FetchRequest>,
}

pub(super) struct Driver {
    client: Client,
    troubles: Party,
    options: ConsumerOptions,
    tasks: Tasks,
    output: mpsc::Sender<Item>,
    /// Goes out before anything more is read.
    outbox: VecDeque<Item>,
    topics: BTreeMap<Arc<str>, BTreeMap<u32, Partition>>,
    sources: BTreeMap<u64, Source>,
    streams: Streams<Responses>,
    next_stream: u64,
    routed: mpsc::Receiver<Result<(), CallError>>,
    route_done: mpsc::Sender<Result<(), CallError>>,
    routing: bool,
    route_pauses: Option<Pauses>,
    /// When to look which partitions need a stream.
    arrange_at: Option<Instant>,
}

impl Driver {
    pub(super) fn new(client: Client, options: ConsumerOptions, tasks: Tasks, output: mpsc::Sender<Item>) -> Self {
        let (route_done, routed) = mpsc::channel(1);
        Self {
            troubles: client.party(),
            client,
            options,
            tasks,
            output,
            outbox: VecDeque::new(),
            topics: BTreeMap::new(),
            sources: BTreeMap::new(),
            streams: Streams::new(),
            next_stream: 0,
            routed,
            route_done,
            routing: false,
            route_pauses: None,
            arrange_at: None,
        }
    }

    pub(super) async fn run(mut self, mut commands: mpsc::Receiver<Command>) {
        let tasks = self.tasks.clone();
        let output = self.output.clone();
        loop {
            let arrange_at = self.arrange_at;
            let arrange = async move {
                match arrange_at {
                    Some(at) => tokio::time::sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                () = tasks.cancelled() => break,
                Some(command) = commands.recv() => self.on_command(command),
                Some(result) = self.routed.recv() => self.on_routed(result),
                () = arrange => self.arrange(),
                permit = output.reserve(), if !self.outbox.is_empty() => match (permit, self.outbox.pop_front()) {
                    (Ok(permit), Some(item)) => permit.send(item),
                    _ => break,
                },
                Some((stream, response)) = self.streams.next(), if self.outbox.is_empty() => {
                    self.on_response(stream, response);
                }
            }
        }
    }

    fn on_command(&mut self, command: Command) {
        match command {
            Command::Assign { topic, partition, generation, position } => {
                self.drop_partition(&topic, partition);
                let fresh = Partition {
                    generation,
                    position,
                    stream: None,
                    parked: false,
                    pauses: None,
                    not_before: None,
                    damaged: 0,
                    trouble: None,
                    open_since: None,
                };
                self.topics.entry(topic).or_default().insert(partition, fresh);
                self.arrange_soon(clock::monotonic());
            }
            Command::Unassign { topic, partition } => self.drop_partition(&topic, partition),
        }
    }

    /// Forgets a partition. Its stream ends too, because what is on the way there belongs to the old position; the
    /// others that it carried are read on by the next one.
    fn drop_partition(&mut self, topic: &str, partition: u32) {
        let Some(partitions) = self.topics.get_mut(topic) else { return };
        let Some(gone) = partitions.remove(&partition) else { return };
        self.troubles.leave(gone.generation);
        if let Some(stream) = gone.stream {
            self.drop_stream(stream);
            self.arrange_soon(clock::monotonic());
        }
        self.outbox.retain(|item| &*item.topic != topic || item.partition != partition);
    }

    fn drop_stream(&mut self, number: u64) {
        self.streams.remove(number);
        self.sources.remove(&number);
        for state in self.topics.values_mut().flat_map(BTreeMap::values_mut) {
            if state.stream == Some(number) {
                state.stream = None;
                state.open_since = None;
            }
        }
    }

    fn arrange_soon(&mut self, at: Instant) {
        self.arrange_at = Some(self.arrange_at.map_or(at, |old| old.min(at)));
    }

    /// Gives every partition that may be read a stream to its leader. A leader's stream is opened anew when partitions
    /// join it.
    fn arrange(&mut self) {
        self.arrange_at = None;
        let now = clock::monotonic();
        let mut leaders = BTreeSet::new();
        let mut later = None;
        let mut unknown = false;
        for (topic, partitions) in &mut self.topics {
            for (number, state) in partitions.iter_mut().filter(|(_, state)| !state.parked) {
                if state.stream.is_some() {
                    later = sooner(later, state.settle(now, &self.troubles));
                    continue;
                }
                if let Some(at) = state.not_before.filter(|at| *at > now) {
                    later = sooner(later, Some(at));
                    continue;
                }
                match self.client.routing().leader(topic, *number) {
                    Some(address) => {
                        leaders.insert(address);
                    }
                    None => unknown = true,
                }
            }
        }
        for address in leaders {
            self.open(address, now);
        }
        if unknown {
            self.route();
        }
        if let Some(at) = later {
            self.arrange_soon(at);
        }
    }

    /// Opens a stream for all partitions that are read from this leader or should be.
    fn open(&mut self, address: Address, now: Instant) {
        let old = self.sources.iter().find(|(_, source)| source.address == address).map(|(number, _)| *number);
        if let Some(old) = old {
            self.drop_stream(old);
        }
        let number = self.next_stream;
        self.next_stream += 1;
        let mut wanted = Vec::new();
        for (topic, partitions) in &mut self.topics {
            for (partition, state) in partitions.iter_mut() {
                let free = !state.parked && state.stream.is_none() && state.not_before.is_none_or(|at| at <= now);
                if free && self.client.routing().leader(topic, *partition).as_ref() == Some(&address) {
                    state.stream = Some(number);
                    wanted.push(v1::FetchPartition {
                        topic: topic.to_string(),
                        partition: i32::try_from(*partition).expect("partitions are few"),
                        offset: state.position.as_i64(),
                    });
                }
            }
        }
        let request = v1::FetchRequest {
            partitions: wanted,
            restart: false,
            min_bytes: self.options.min_bytes,
            max_bytes: self.options.max_bytes,
            max_wait_ms: u32::try_from(self.options.max_wait.as_millis()).unwrap_or(u32::MAX),
        };
        let (requests, queue) = mpsc::channel(1);
        requests.try_send(request).expect("the queue is new");
        self.streams.insert(number, responses(self.client.clone(), address.clone(), queue));
        self.sources.insert(number, Source { address, _requests: requests });
    }

    fn on_response(&mut self, number: u64, heard: Result<Heard, Fault>) {
        match heard {
            Ok(Heard::Opened) => self.on_opened(number),
            Ok(Heard::Response(response)) => {
                for fetched in response.partitions {
                    self.on_fetched(number, fetched);
                }
            }
            Err(fault) => self.on_ended(number, &fault),
        }
    }

    fn on_opened(&mut self, number: u64) {
        let now = clock::monotonic();
        let mut troubled = false;
        for state in self.topics.values_mut().flat_map(BTreeMap::values_mut) {
            if state.stream == Some(number) {
                state.open_since = Some(now);
                troubled |= state.trouble.is_some();
            }
        }
        if troubled {
            self.arrange_soon(now + SETTLED);
        }
    }

    fn on_ended(&mut self, number: u64, fault: &Fault) {
        tracing::debug!(%fault, "fetch stream ended");
        let carried: Vec<(Arc<str>, u32)> = self
            .topics
            .iter()
            .flat_map(|(topic, partitions)| partitions.iter().map(move |(number, state)| (topic, number, state)))
            .filter(|(.., state)| state.stream == Some(number))
            .map(|(topic, partition, _)| (topic.clone(), *partition))
            .collect();
        self.drop_stream(number);
        for (topic, partition) in carried {
            self.trouble(&topic, partition, Trouble::Leader, &fault.message);
            self.pause(&topic, partition);
        }
        self.route();
    }

    fn on_fetched(&mut self, number: u64, fetched: v1::FetchedPartition) {
        let Ok(partition) = u32::try_from(fetched.partition) else { return };
        let known = self.topics.get_key_value(fetched.topic.as_str()).map(|(topic, _)| topic.clone());
        let Some(topic) = known else { return };
        let Some(state) = self.topics.get_mut(&topic).and_then(|partitions| partitions.get_mut(&partition)) else {
            return;
        };
        if state.stream != Some(number) {
            return;
        }
        if let Some(error) = fetched.error {
            // The stream has left it out already.
            state.stream = None;
            state.open_since = None;
            return self.on_fault(&topic, partition, error.into());
        }
        let (batches, position, result) = position::advance(state.position, fetched.chunks);
        let generation = state.generation;
        let high_watermark = Offset::from_i64(fetched.high_watermark).unwrap_or_default();
        if !batches.is_empty() {
            state.pauses = None;
            state.damaged = 0;
            state.over(&self.troubles);
        }
        state.position = position;
        for (from, batch) in batches {
            let what = What::Batch { batch, from, high_watermark };
            self.outbox.push_back(Item { topic: topic.clone(), partition, generation, what });
        }
        if let Err(untaken) = result {
            self.on_untaken(number, &topic, partition, untaken);
        }
    }

    /// A response that is no batches. The stream is opened anew at the position; if that does not help, the reader is
    /// told.
    fn on_untaken(&mut self, stream: u64, topic: &Arc<str>, partition: u32, untaken: Untaken) {
        self.drop_stream(stream);
        self.arrange_soon(clock::monotonic());
        let Some(state) = self.state(topic, partition) else { return };
        state.damaged += 1;
        let (name, offset) = (topic.to_string(), state.position);
        tracing::warn!(topic = name, partition, %offset, ?untaken, "a broker sent what cannot be read");
        if state.damaged < DAMAGE_TRIES {
            return self.pause(topic, partition);
        }
        let error = match untaken {
            Untaken::Malformed(source) => ConsumeError::Damaged { topic: name, partition, offset, source },
            Untaken::Gap(found) => ConsumeError::Gap { topic: name, partition, expected: offset, found },
        };
        self.park(topic, partition, error);
    }

    fn on_fault(&mut self, topic: &Arc<str>, partition: u32, fault: Fault) {
        let Some(state) = self.state(topic, partition) else { return };
        if fault.reason == Reason::OffsetOutOfRange {
            return self.on_out_of_range(topic, partition, &fault);
        }
        if fault.retryable {
            tracing::debug!(topic = &**topic, partition, %fault, position = %state.position, "partition will be read again");
            let trouble = match fault.reason {
                Reason::NotLeader | Reason::NotReady => Trouble::Leader,
                _ => Trouble::Records,
            };
            self.trouble(topic, partition, trouble, &fault.message);
            if self.client.routing().told(topic, partition, &fault) {
                return self.arrange_soon(clock::monotonic());
            }
            self.pause(topic, partition);
            return self.route();
        }
        let error = ConsumeError::Refused { topic: topic.to_string(), partition, fault };
        self.park(topic, partition, error);
    }

    fn on_out_of_range(&mut self, topic: &Arc<str>, partition: u32, fault: &Fault) {
        let mark = |name| fault.number(name).and_then(Offset::from_i64);
        let policy = self.options.on_out_of_range;
        let Some(state) = self.state(topic, partition) else { return };
        let (Some(start), Some(end)) = (mark("start"), mark("end")) else {
            let error = ConsumeError::Refused { topic: topic.to_string(), partition, fault: fault.clone() };
            return self.park(topic, partition, error);
        };
        let position = match policy {
            OnOutOfRange::Earliest => start,
            OnOutOfRange::Latest => end,
            OnOutOfRange::Fail => {
                let offset = state.position;
                let error = ConsumeError::OutOfRange { topic: topic.to_string(), partition, offset, start, end };
                return self.park(topic, partition, error);
            }
        };
        tracing::warn!(topic = &**topic, partition, from = %state.position, to = %position, "position was out of range");
        state.position = position;
        let generation = state.generation;
        self.outbox.push_back(Item { topic: topic.clone(), partition, generation, what: What::Moved(position) });
        self.pause(topic, partition);
    }

    /// Something stands in the partition's way.
    fn trouble(&mut self, topic: &str, partition: u32, trouble: Trouble, problem: &str) {
        let Some(state) = self.topics.get_mut(topic).and_then(|partitions| partitions.get_mut(&partition)) else {
            return;
        };
        // Where records cannot be read, a leader that is there proves nothing.
        if state.trouble != Some(Trouble::Records) {
            state.trouble = Some(trouble);
        }
        self.troubles.enter(state.generation, format!("{topic}/{partition}: {problem}"), None);
    }

    /// Reads the partition again after a while.
    fn pause(&mut self, topic: &str, partition: u32) {
        let backoff = || self.client.options().backoff();
        let Some(state) = self.topics.get_mut(topic).and_then(|partitions| partitions.get_mut(&partition)) else {
            return;
        };
        let at = clock::monotonic() + state.pauses.get_or_insert_with(backoff).next();
        state.not_before = Some(at);
        self.arrange_soon(at);
    }

    /// Leaves the partition where it is, and tells the reader why.
    fn park(&mut self, topic: &Arc<str>, partition: u32, error: ConsumeError) {
        let Some(state) = self.state(topic, partition) else { return };
        state.parked = true;
        let generation = state.generation;
        self.troubles.leave(generation);
        self.outbox.push_back(Item { topic: topic.clone(), partition, generation, what: What::Failed(error) });
    }

    fn state(&mut self, topic: &str, partition: u32) -> Option<&mut Partition> {
        self.topics.get_mut(topic)?.get_mut(&partition)
    }

    fn route(&mut self) {
        if std::mem::replace(&mut self.routing, true) {
            return;
        }
        let client = self.client.clone();
        let done = self.route_done.clone();
        let tasks = self.tasks.clone();
        let seen = client.routing().generation();
        let pause = self.route_pauses.as_mut().map_or(Duration::ZERO, Pauses::next);
        let topics: Vec<Arc<str>> = self.topics.keys().cloned().collect();
        self.tasks.spawn("consumer metadata", async move {
            let names: Vec<&str> = topics.iter().map(|name| &**name).collect();
            let refresh = async {
                tokio::time::sleep(pause).await;
                client.refresh(seen, &names).await
            };
            tokio::select! {
                biased;
                () = tasks.cancelled() => {}
                result = refresh => {
                    let _ = done.send(result).await;
                }
            }
        });
    }

    fn on_routed(&mut self, result: Result<(), CallError>) {
        self.routing = false;
        if let Err(error) = &result {
            tracing::debug!(%error, "metadata could not be refreshed");
        }
        let mut missing = Vec::new();
        for (topic, partitions) in &self.topics {
            let homeless = partitions.iter().filter(|(_, state)| !state.parked && state.stream.is_none());
            missing.extend(homeless.map(|(number, _)| (topic.clone(), *number)));
        }
        let mut unknown = false;
        for (topic, partition) in missing {
            if let Some(Err(fault)) = self.client.routing().topic(&topic) {
                let error = ConsumeError::Refused { topic: topic.to_string(), partition, fault };
                self.park(&topic, partition, error);
            } else if let Err(error) = &result {
                // What the partition itself met says more.
                if self.state(&topic, partition).is_some_and(|state| state.trouble.is_none()) {
                    self.trouble(&topic, partition, Trouble::Leader, &error.to_string());
                }
            } else if self.client.routing().leader(&topic, partition).is_none() {
                unknown = true;
                self.trouble(&topic, partition, Trouble::Leader, "the partition has no leader");
            }
        }
        if unknown || result.is_err() {
            let backoff = || self.client.options().backoff();
            self.route_pauses.get_or_insert_with(backoff);
            self.route();
        } else {
            self.route_pauses = None;
        }
        self.arrange_soon(clock::monotonic());
    }
}

impl Partition {
    /// A stream that stays open proves that its leader is there again; when to look next, if it is too early to tell.
    fn settle(&mut self, now: Instant, troubles: &Party) -> Option<Instant> {
        let settled = self.open_since? + SETTLED;
        if self.trouble != Some(Trouble::Leader) {
            return None;
        }
        if settled > now {
            return Some(settled);
        }
        self.over(troubles);
        None
    }

    fn over(&mut self, troubles: &Party) {
        if self.trouble.take().is_some() {
            troubles.leave(self.generation);
        }
    }
}

/// The sooner of two moments.
fn sooner(one: Option<Instant>, other: Option<Instant>) -> Option<Instant> {
    one.into_iter().chain(other).min()
}

/// The responses of one stream to one leader; its last item says why it ended.
fn responses(client: Client, address: Address, requests: mpsc::Receiver<v1::FetchRequest>) -> Responses {
    let name = address.clone();
    let open = async move {
        let wire = client.wire(&address).await.map_err(|error| Fault::new(Reason::NotReady, error.problem()))?;
        let requests = tokio_stream::wrappers::ReceiverStream::new(requests);
        let answer = log_client(wire).fetch(requests).await.map_err(|status| Fault::from(&status))?;
        let responses = answer.into_inner().map_ok(Heard::Response).map_err(|status| Fault::from(&status));
        Ok::<_, Fault>(futures::stream::once(async { Ok(Heard::Opened) }).chain(responses))
    };
    let ended = futures::stream::once(async { Err(Fault::new(Reason::NotReady, "the broker ended the stream")) });
    let stream = futures::stream::once(open).try_flatten().chain(ended);
    let named = move |fault: Fault| Fault { message: format!("{}: {}", name.as_str(), fault.message), ..fault };
    Box::pin(stream.map_err(named))
}
