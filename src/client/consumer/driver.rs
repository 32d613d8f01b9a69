//! The consumer's task. It owns all positions and all streams.

mod doubt;
mod near;

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::Arc,
    time::Duration,
};

use tokio::{sync::mpsc, time::Instant};

use self::near::Ending;
use super::{
    super::{
        Client,
        connection::Address,
        error::{CallError, ConsumeError},
        options::Pauses,
        routing,
        trouble::Party,
    },
    ConsumerOptions, Item, OnOutOfRange, What,
    nearness::ASK_AFTER,
    partition::{Partition, SETTLED, Trouble},
    position::{self, Untaken},
    stream::{Heard, Responses, responses},
    streams::Streams,
};
use crate::{
    limits,
    model::{Offset, TopicId},
    proto::{
        error::{ApiError, ErrorCode},
        v1,
    },
    task::{Tasks, clock},
};

/// Number of attempts to read corrupt bytes before the consumer gets an error. Corruption in transport may not recur;
/// corruption on disk stays.
const DAMAGE_TRIES: u32 = 3;

/// Command of the handle to the task.
#[derive(Debug)]
pub(super) enum Command {
    Assign { topic: Arc<str>, topic_id: TopicId, partition: u32, generation: u64, position: Offset },
    Unassign { topic: Arc<str>, partition: u32 },
}

struct Source {
    address: Address,
    /// True if the broker reports an expired lease: other brokers may lead its partitions.
    doubts: bool,
    /// Sender that keeps the request half of the stream open.
    _requests: mpsc::Sender<v1::FetchRequest>,
}

pub(super) struct Driver {
    client: Client,
    troubles: Party,
    options: ConsumerOptions,
    tasks: Tasks,
    output: mpsc::Sender<Item>,
    /// Events for the consumer's queue; the streams are not read before it is empty.
    outbox: VecDeque<Item>,
    topics: BTreeMap<Arc<str>, BTreeMap<u32, Partition>>,
    sources: BTreeMap<u64, Source>,
    streams: Streams<Responses>,
    next_stream: u64,
    routed: mpsc::Receiver<Result<(), CallError>>,
    route_done: mpsc::Sender<Result<(), CallError>>,
    routing: bool,
    route_pauses: Option<Pauses>,
    /// Time of the last metadata refresh.
    refreshed: Instant,
    /// Time of the last metadata refresh because of an expired lease.
    asked_around: Option<Instant>,
    /// Time at which partitions are next assigned to streams.
    arrange_at: Option<Instant>,
    /// True while leaders are being queried for log ends.
    asking: bool,
    ends: mpsc::Receiver<Vec<Ending>>,
    ends_done: mpsc::Sender<Vec<Ending>>,
    /// Time since which batches wait for the consumer.
    held_since: Option<Instant>,
}

impl Driver {
    pub(super) fn new(client: Client, options: ConsumerOptions, tasks: Tasks, output: mpsc::Sender<Item>) -> Self {
        let (route_done, routed) = mpsc::channel(1);
        let (ends_done, ends) = mpsc::channel(1);
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
            refreshed: clock::monotonic(),
            asked_around: None,
            arrange_at: None,
            asking: false,
            ends,
            ends_done,
            held_since: None,
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
                Some(endings) = self.ends.recv() => self.on_ends(endings),
                () = arrange => self.arrange(),
                permit = output.reserve(), if !self.outbox.is_empty() => match (permit, self.outbox.pop_front()) {
                    (Ok(permit), Some(item)) => {
                        permit.send(item);
                        self.let_go();
                    }
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
            Command::Assign { topic, topic_id, partition, generation, position } => {
                let now = clock::monotonic();
                let before = self.drop_partition(&topic, partition);
                let fresh = Partition::new(generation, topic_id, position, now, before.as_ref());
                self.topics.entry(topic).or_default().insert(partition, fresh);
                self.arrange_soon(now);
            }
            Command::Unassign { topic, partition } => {
                self.drop_partition(&topic, partition);
            }
        }
    }

    /// Removes a partition. Its stream ends too, because data in flight there belongs to the old position. The other
    /// partitions of the stream continue on the next stream.
    fn drop_partition(&mut self, topic: &str, partition: u32) -> Option<Partition> {
        let gone = self.topics.get_mut(topic)?.remove(&partition)?;
        self.troubles.leave(gone.generation);
        if let Some(stream) = gone.stream {
            self.drop_stream(stream);
            self.arrange_soon(clock::monotonic());
        }
        self.outbox.retain(|item| &*item.topic != topic || item.partition != partition);
        Some(gone)
    }

    fn drop_stream(&mut self, number: u64) {
        self.streams.remove(number);
        self.sources.remove(&number);
        for state in self.topics.values_mut().flat_map(BTreeMap::values_mut) {
            if state.stream == Some(number) {
                state.uncarried();
            }
        }
    }

    fn arrange_soon(&mut self, at: Instant) {
        self.arrange_at = Some(self.arrange_at.map_or(at, |old| old.min(at)));
    }

    /// Gives every readable partition a stream to its broker. A broker's stream is reopened to add partitions.
    fn arrange(&mut self) {
        self.arrange_at = None;
        let now = clock::monotonic();
        let mut later = sooner(self.look_around(now), self.ask_around(now));
        for state in self.topics.values_mut().flat_map(BTreeMap::values_mut).filter(|state| !state.parked) {
            if state.stream.is_some() {
                later = sooner(later, state.settle(now, &self.troubles));
            }
        }
        let mut addresses = BTreeSet::new();
        let mut unknown = false;
        for (topic, partitions) in &self.topics {
            for (number, state) in partitions.iter().filter(|(_, state)| !state.parked && state.stream.is_none()) {
                if let Some(at) = state.not_before.filter(|at| *at > now) {
                    later = sooner(later, Some(at));
                    continue;
                }
                match self.source(topic, *number, state) {
                    Some(source) => {
                        addresses.insert(source.address);
                    }
                    None => unknown = true,
                }
            }
        }
        if !addresses.is_empty() && self.options.rack.is_some() {
            later = sooner(later, Some(now + ASK_AFTER));
        }
        for address in addresses {
            self.open(&address, now);
        }
        // Partitions of a reopened stream may have another broker by now.
        if self.is_one_left(now) {
            later = Some(now);
        }
        if unknown {
            self.route();
        }
        if let Some(at) = later {
            self.arrange_soon(at);
        }
    }

    /// Returns every readable partition without a stream, and its read target.
    fn unread(&self, now: Instant) -> impl Iterator<Item = (&Arc<str>, u32, routing::Source)> {
        let all = self
            .topics
            .iter()
            .flat_map(|(topic, partitions)| partitions.iter().map(move |(number, state)| (topic, *number, state)));
        all.filter(move |(.., state)| state.is_free(now))
            .filter_map(|(topic, number, state)| Some((topic, number, self.source(topic, number, state)?)))
    }

    fn is_one_left(&self, now: Instant) -> bool {
        self.unread(now).next().is_some()
    }

    /// Opens streams for all partitions that are or should be read from this broker, with at most
    /// `MAX_FETCH_PARTITIONS` on each.
    fn open(&mut self, address: &Address, now: Instant) {
        let old: Vec<u64> =
            self.sources.iter().filter(|(_, source)| source.address == *address).map(|(number, _)| *number).collect();
        for old in old {
            self.drop_stream(old);
        }
        let found = self.unread(now).filter(|(.., source)| source.address == *address);
        let found: Vec<_> = found.map(|(topic, partition, source)| (topic.clone(), partition, source)).collect();
        for some in found.chunks(limits::MAX_FETCH_PARTITIONS) {
            self.open_one(address, some, now);
        }
    }

    fn open_one(&mut self, address: &Address, partitions: &[(Arc<str>, u32, routing::Source)], now: Instant) {
        let number = self.next_stream;
        self.next_stream += 1;
        let wanted = partitions.iter().map(|(topic, partition, source)| {
            let state = self.state(topic, *partition).expect("it was found");
            let (offset, leader_epoch) = state.carried(number, source, now);
            let partition = i32::try_from(*partition).expect("partitions are few");
            let (topic, topic_id) = (topic.to_string(), state.topic.to_string());
            v1::FetchPartition { topic, partition, offset, leader_epoch, topic_id }
        });
        let wanted = wanted.collect();
        let request = v1::FetchRequest {
            partitions: wanted,
            restart: false,
            min_bytes: self.options.min_bytes,
            max_bytes: self.options.max_bytes,
            max_wait_ms: u32::try_from(self.options.max_wait.as_millis()).unwrap_or(u32::MAX),
            any_replica: self.options.rack.is_some(),
        };
        let (requests, queue) = mpsc::channel(1);
        requests.try_send(request).expect("the queue is new");
        self.streams.insert(number, responses(self.client.clone(), address.clone(), queue));
        self.sources.insert(number, Source { address: address.clone(), doubts: false, _requests: requests });
    }

    fn on_response(&mut self, number: u64, heard: Result<Heard, ApiError>) {
        match heard {
            Ok(Heard::Opened) => self.on_opened(number),
            Ok(Heard::Response(response)) => {
                self.note_doubt(number, response.in_doubt);
                for fetched in response.partitions {
                    self.on_fetched(number, fetched);
                }
                self.hold();
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

    fn on_ended(&mut self, number: u64, fault: &ApiError) {
        tracing::debug!(%fault, "fetch stream ended");
        let now = clock::monotonic();
        let mut from_leader = Vec::new();
        for (topic, partitions) in &mut self.topics {
            for (partition, state) in partitions.iter_mut().filter(|(_, state)| state.stream == Some(number)) {
                if state.follows {
                    state.near.leave(now);
                } else {
                    from_leader.push((topic.clone(), *partition));
                }
            }
        }
        self.drop_stream(number);
        // Partitions that a follower served move to their leader at once.
        self.arrange_soon(now);
        for (topic, partition) in from_leader {
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
            // The broker has already removed the partition from the stream.
            state.uncarried();
            return self.on_fault(&topic, partition, error.into());
        }
        let is_news = state.answered(&fetched);
        let (batches, position, result) = position::advance(state.position, fetched.chunks);
        let generation = state.generation;
        let high_watermark = Offset::from_i64(fetched.high_watermark).unwrap_or_default();
        if !batches.is_empty() {
            state.pauses = None;
            (state.damaged, state.mismatched) = (0, false);
            state.near.heard(clock::monotonic());
            state.over(&self.troubles);
        }
        state.position = position;
        for (from, batch) in batches {
            let what = What::Batch { batch, from, high_watermark };
            self.outbox.push_back(Item { topic: topic.clone(), partition, generation, what });
        }
        if is_news {
            self.route();
        }
        if let Err(untaken) = result {
            self.on_untaken(number, &topic, partition, untaken);
        }
    }

    /// Handles a response without valid batches. Reopens the stream at the position; after `DAMAGE_TRIES` attempts the
    /// consumer gets the error.
    fn on_untaken(&mut self, stream: u64, topic: &Arc<str>, partition: u32, untaken: Untaken) {
        self.drop_stream(stream);
        let now = clock::monotonic();
        self.arrange_soon(now);
        let Some(state) = self.state(topic, partition) else { return };
        if state.follows {
            // The leader has another copy.
            state.near.leave(now);
        } else {
            state.damaged += 1;
        }
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

    fn on_fault(&mut self, topic: &Arc<str>, partition: u32, fault: ApiError) {
        let Some(state) = self.state(topic, partition) else { return };
        if state.follows {
            // After any error of a follower the leader decides.
            let now = clock::monotonic();
            tracing::debug!(topic = &**topic, partition, %fault, position = %state.position, "will be read at the leader");
            state.near.leave(now);
            self.client.routing().told(topic, partition, &fault);
            self.arrange_soon(now);
            return self.route();
        }
        if fault.code == ErrorCode::OffsetOutOfRange {
            return self.on_out_of_range(topic, partition, &fault);
        }
        if fault.retryable || fault.code == ErrorCode::TopicIdMismatch && state.doubts_mismatch() {
            tracing::debug!(topic = &**topic, partition, %fault, position = %state.position, "partition will be read again");
            let trouble = match fault.code {
                ErrorCode::NotLeader | ErrorCode::NotReady => Trouble::Leader,
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

    fn on_out_of_range(&mut self, topic: &Arc<str>, partition: u32, fault: &ApiError) {
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

    /// Reports a problem that blocks a partition.
    fn trouble(&mut self, topic: &str, partition: u32, trouble: Trouble, problem: &str) {
        let Some(state) = self.topics.get_mut(topic).and_then(|partitions| partitions.get_mut(&partition)) else {
            return;
        };
        // If records cannot be read, a reachable leader does not clear the problem.
        if state.trouble != Some(Trouble::Records) {
            state.trouble = Some(trouble);
        }
        self.troubles.enter(state.generation, format!("{topic}/{partition}: {problem}"), None);
    }

    /// Delays the next read of the partition by a backoff pause.
    fn pause(&mut self, topic: &str, partition: u32) {
        let backoff = || self.client.options().backoff();
        let Some(state) = self.topics.get_mut(topic).and_then(|partitions| partitions.get_mut(&partition)) else {
            return;
        };
        let at = clock::monotonic() + state.pauses.get_or_insert_with(backoff).next();
        state.not_before = Some(at);
        self.arrange_soon(at);
    }

    /// Stops the partition at its position and sends the error to the consumer.
    fn park(&mut self, topic: &Arc<str>, partition: u32, error: ConsumeError) {
        let Some(state) = self.state(topic, partition) else { return };
        state.parked = true;
        let generation = state.generation;
        self.troubles.leave(generation);
        self.outbox.push_back(Item { topic: topic.clone(), partition, generation, what: What::Failed(error) });
    }

    /// Returns true if no broker is known that could serve the partition.
    fn is_homeless(&self, topic: &str, partition: u32) -> bool {
        let state = self.topics.get(topic).and_then(|partitions| partitions.get(&partition));
        state.is_some_and(|state| self.source(topic, partition, state).is_none())
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
        let doubted = self.doubted();
        self.tasks.spawn("consumer metadata", async move {
            let names: Vec<&str> = topics.iter().map(|name| &**name).collect();
            let refresh = async {
                tokio::time::sleep(pause).await;
                client.refresh_doubting(&doubted, seen, &names).await
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
        match &result {
            Ok(()) => {
                self.refreshed = clock::monotonic();
                let states = self.topics.values_mut().flat_map(BTreeMap::values_mut);
                states.for_each(|state| state.near.learned(self.refreshed));
                self.leave_doubted();
            }
            Err(error) => tracing::debug!(%error, "metadata could not be refreshed"),
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
                // The partition's own problem is more specific.
                if self.state(&topic, partition).is_some_and(|state| state.trouble.is_none()) {
                    self.trouble(&topic, partition, Trouble::Leader, &error.to_string());
                }
            } else if self.is_homeless(&topic, partition) {
                unknown = true;
                let problem =
                    format!("the partition has no leader; `strandline topic describe {topic}` says who is waited for");
                self.trouble(&topic, partition, Trouble::Leader, &problem);
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

/// Returns the earlier of two times.
fn sooner(one: Option<Instant>, other: Option<Instant>) -> Option<Instant> {
    one.into_iter().chain(other).min()
}
