//! The consumer's task. It owns all positions and all streams.

mod expired_lease;
mod read_replica;

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::Arc,
    time::Duration,
};

use tokio::{sync::mpsc, time::Instant};

use super::{
    super::{
        Client,
        connection::BrokerAddress,
        error::{CallError, ConsumeError},
        metadata,
        retry_status::RetryReporter,
    },
    ConsumerEvent, ConsumerOptions, OffsetResetPolicy, QueuedEvent,
    fetch_state::{FetchProblem, PartitionFetchState, STABLE_AFTER},
    position::{self, InvalidResponse},
    stream::{ResponseStream, StreamEvent, responses},
    streams::FairStreams,
};
use crate::{
    limits,
    model::{Offset, TopicId},
    proto::{
        error::{ApiError, ErrorCode},
        v1,
    },
    task::{Backoff, Tasks, clock},
};

/// Number of attempts to read corrupt bytes before the consumer gets an error. Corruption in transport may not recur;
/// corruption on disk stays.
const MAX_CORRUPT_READS: u32 = 3;

/// Command of the handle to the task.
#[derive(Debug)]
pub(super) enum ConsumerCommand {
    Assign { topic: Arc<str>, topic_id: TopicId, partition: u32, generation: u64, position: Offset },
    Unassign { topic: Arc<str>, partition: u32 },
}

struct FetchStream {
    address: BrokerAddress,
    /// True if the broker reports an expired lease: other brokers may lead its partitions.
    doubts: bool,
    /// Sender that keeps the request half of the stream open.
    _requests: mpsc::Sender<v1::FetchRequest>,
}

pub(super) struct ConsumerDriver {
    client: Client,
    retries: RetryReporter,
    options: ConsumerOptions,
    tasks: Tasks,
    output: mpsc::Sender<QueuedEvent>,
    /// Events for the consumer's queue; the streams are not read before it is empty.
    outbox: VecDeque<QueuedEvent>,
    topics: BTreeMap<Arc<str>, BTreeMap<u32, PartitionFetchState>>,
    sources: BTreeMap<u64, FetchStream>,
    streams: FairStreams<ResponseStream>,
    next_stream: u64,
    routed: mpsc::Receiver<Result<(), CallError>>,
    route_done: mpsc::Sender<Result<(), CallError>>,
    routing: bool,
    metadata_backoff: Option<Backoff>,
    /// Time of the last metadata refresh.
    refreshed: Instant,
    /// Time of the last metadata refresh because of an expired lease.
    last_lease_refresh: Option<Instant>,
    /// Time at which partitions are next assigned to streams.
    arrange_at: Option<Instant>,
}

impl ConsumerDriver {
    pub(super) fn new(
        client: Client,
        options: ConsumerOptions,
        tasks: Tasks,
        output: mpsc::Sender<QueuedEvent>,
    ) -> Self {
        let (route_done, routed) = mpsc::channel(1);
        Self {
            retries: client.party(),
            client,
            options,
            tasks,
            output,
            outbox: VecDeque::new(),
            topics: BTreeMap::new(),
            sources: BTreeMap::new(),
            streams: FairStreams::new(),
            next_stream: 0,
            routed,
            route_done,
            routing: false,
            metadata_backoff: None,
            refreshed: clock::monotonic(),
            last_lease_refresh: None,
            arrange_at: None,
        }
    }

    pub(super) async fn run(mut self, mut commands: mpsc::Receiver<ConsumerCommand>) {
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
                () = arrange => self.assign_streams(),
                permit = output.reserve(), if !self.outbox.is_empty() => match (permit, self.outbox.pop_front()) {
                    (Ok(permit), Some(event)) => permit.send(event),
                    _ => break,
                },
                Some((stream, response)) = self.streams.next(), if self.outbox.is_empty() => {
                    self.on_response(stream, response);
                }
            }
        }
    }

    fn on_command(&mut self, command: ConsumerCommand) {
        match command {
            ConsumerCommand::Assign { topic, topic_id, partition, generation, position } => {
                let now = clock::monotonic();
                let earlier = self.drop_partition(&topic, partition);
                let state = PartitionFetchState::new(generation, topic_id, position, now, earlier);
                self.topics.entry(topic).or_default().insert(partition, state);
                self.arrange_soon(now);
            }
            ConsumerCommand::Unassign { topic, partition } => {
                self.drop_partition(&topic, partition);
            }
        }
    }

    /// Removes a partition. Its stream ends too, because data in flight there belongs to the old position. The other
    /// partitions of the stream continue on the next stream.
    fn drop_partition(&mut self, topic: &str, partition: u32) -> Option<PartitionFetchState> {
        let removed = self.topics.get_mut(topic)?.remove(&partition)?;
        self.retries.clear(removed.generation);
        if let Some(stream) = removed.stream {
            self.drop_stream(stream);
            self.arrange_soon(clock::monotonic());
        }
        self.outbox.retain(|event| &*event.topic != topic || event.partition != partition);
        Some(removed)
    }

    fn drop_stream(&mut self, number: u64) {
        self.streams.remove(number);
        self.sources.remove(&number);
        for state in self.topics.values_mut().flat_map(BTreeMap::values_mut) {
            if state.stream == Some(number) {
                state.detach();
            }
        }
    }

    fn arrange_soon(&mut self, at: Instant) {
        self.arrange_at = Some(self.arrange_at.map_or(at, |old| old.min(at)));
    }

    /// Gives every readable partition a stream to its broker. A broker's stream is reopened to add partitions.
    fn assign_streams(&mut self) {
        self.arrange_at = None;
        let now = clock::monotonic();
        let mut later = sooner(self.check_read_replicas(now), self.refresh_if_lease_expired(now));
        for state in self.topics.values_mut().flat_map(BTreeMap::values_mut).filter(|state| !state.failed) {
            if state.stream.is_some() {
                later = sooner(later, state.after_stable_stream(now, &self.retries));
            }
        }
        let mut addresses = BTreeSet::new();
        let mut unknown = false;
        for (topic, partitions) in &self.topics {
            for (number, state) in partitions.iter().filter(|(_, state)| !state.failed && state.stream.is_none()) {
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
        for address in addresses {
            self.open(&address, now);
        }
        // Partitions of a reopened stream may have another broker by now.
        if self.has_unassigned(now) {
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
    fn unread(&self, now: Instant) -> impl Iterator<Item = (&Arc<str>, u32, metadata::ReadTarget)> {
        let all = self
            .topics
            .iter()
            .flat_map(|(topic, partitions)| partitions.iter().map(move |(number, state)| (topic, *number, state)));
        all.filter(move |(.., state)| state.is_free(now))
            .filter_map(|(topic, number, state)| Some((topic, number, self.source(topic, number, state)?)))
    }

    fn has_unassigned(&self, now: Instant) -> bool {
        self.unread(now).next().is_some()
    }

    /// Opens streams for all partitions that are or should be read from this broker, with at most
    /// `MAX_FETCH_PARTITIONS` on each.
    fn open(&mut self, address: &BrokerAddress, now: Instant) {
        let old: Vec<u64> =
            self.sources.iter().filter(|(_, source)| source.address == *address).map(|(number, _)| *number).collect();
        for old in old {
            self.drop_stream(old);
        }
        let found = self.unread(now).filter(|(.., source)| source.address == *address);
        let found: Vec<_> = found.map(|(topic, partition, source)| (topic.clone(), partition, source)).collect();
        for partitions in found.chunks(limits::MAX_FETCH_PARTITIONS) {
            self.open_one(address, partitions);
        }
    }

    fn open_one(&mut self, address: &BrokerAddress, partitions: &[(Arc<str>, u32, metadata::ReadTarget)]) {
        let number = self.next_stream;
        self.next_stream += 1;
        let wanted = partitions.iter().map(|(topic, partition, source)| {
            let state = self.state(topic, *partition).expect("the partition was found above");
            let (offset, leader_epoch) = state.attach(number, source);
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
        self.sources.insert(number, FetchStream { address: address.clone(), doubts: false, _requests: requests });
    }

    fn on_response(&mut self, number: u64, event: Result<StreamEvent, ApiError>) {
        match event {
            Ok(StreamEvent::Opened) => self.on_opened(number),
            Ok(StreamEvent::Response(response)) => {
                self.set_lease_expired(number, response.lease_expired);
                for fetched in response.partitions {
                    self.on_fetched(number, fetched);
                }
            }
            Err(error) => self.on_ended(number, &error),
        }
    }

    fn on_opened(&mut self, number: u64) {
        let now = clock::monotonic();
        let mut has_problem = false;
        for state in self.topics.values_mut().flat_map(BTreeMap::values_mut) {
            if state.stream == Some(number) {
                state.open_since = Some(now);
                has_problem |= state.problem.is_some();
            }
        }
        if has_problem {
            self.arrange_soon(now + STABLE_AFTER);
        }
    }

    fn on_ended(&mut self, number: u64, error: &ApiError) {
        tracing::debug!(%error, "fetch stream ended");
        let now = clock::monotonic();
        let mut from_leader = Vec::new();
        for (topic, partitions) in &mut self.topics {
            for (partition, state) in partitions.iter_mut().filter(|(_, state)| state.stream == Some(number)) {
                if state.follows {
                    state.follower_backoff.leave_follower(now);
                } else {
                    from_leader.push((topic.clone(), *partition));
                }
            }
        }
        self.drop_stream(number);
        // Partitions that a follower served move to their leader at once.
        self.arrange_soon(now);
        for (topic, partition) in from_leader {
            self.status(&topic, partition, FetchProblem::Leader, &error.message);
            self.pause(&topic, partition);
        }
        self.route();
    }

    fn on_fetched(&mut self, number: u64, fetched: v1::FetchedPartition) {
        let Ok(partition) = u32::try_from(fetched.partition) else { return };
        let assigned = self.topics.get_key_value(fetched.topic.as_str()).map(|(topic, _)| topic.clone());
        let Some(topic) = assigned else { return };
        let Some(state) = self.topics.get_mut(&topic).and_then(|partitions| partitions.get_mut(&partition)) else {
            return;
        };
        if state.stream != Some(number) {
            return;
        }
        if let Some(error) = fetched.error {
            // The broker has already removed the partition from the stream.
            state.detach();
            return self.on_fault(&topic, partition, error.into());
        }
        let is_newer_epoch = state.on_response(&fetched);
        let (batches, position, result) = position::advance(state.position, fetched.chunks);
        let generation = state.generation;
        let high_watermark = Offset::from_i64(fetched.high_watermark).unwrap_or_default();
        if !batches.is_empty() {
            state.backoff = None;
            (state.corrupt_reads, state.mismatched) = (0, false);
            state.clear_problem(&self.retries);
        }
        state.position = position;
        for (from, batch) in batches {
            let event = ConsumerEvent::Batch { batch, from, high_watermark };
            self.outbox.push_back(QueuedEvent { topic: topic.clone(), partition, generation, event });
        }
        if is_newer_epoch {
            self.route();
        }
        if let Err(invalid) = result {
            self.on_invalid_response(number, &topic, partition, invalid);
        }
    }

    /// Handles a response without valid batches. Reopens the stream at the position; after `MAX_CORRUPT_READS`
    /// attempts the consumer gets the error.
    fn on_invalid_response(&mut self, stream: u64, topic: &Arc<str>, partition: u32, invalid: InvalidResponse) {
        self.drop_stream(stream);
        let now = clock::monotonic();
        self.arrange_soon(now);
        let Some(state) = self.state(topic, partition) else { return };
        if state.follows {
            // The leader has another copy.
            state.follower_backoff.leave_follower(now);
        } else {
            state.corrupt_reads += 1;
        }
        let (name, offset) = (topic.to_string(), state.position);
        tracing::warn!(topic = name, partition, %offset, ?invalid, "invalid response from a broker");
        if state.corrupt_reads < MAX_CORRUPT_READS {
            return self.pause(topic, partition);
        }
        let error = match invalid {
            InvalidResponse::Malformed(source) => ConsumeError::Damaged { topic: name, partition, offset, source },
            InvalidResponse::Gap(found) => ConsumeError::Gap { topic: name, partition, expected: offset, found },
        };
        self.park(topic, partition, error);
    }

    fn on_fault(&mut self, topic: &Arc<str>, partition: u32, error: ApiError) {
        let Some(state) = self.state(topic, partition) else { return };
        if state.follows {
            // After any error of a follower the leader decides.
            let now = clock::monotonic();
            let position = state.position;
            tracing::debug!(topic = &**topic, partition, %error, %position, "follower error, reading at the leader");
            state.follower_backoff.leave_follower(now);
            self.client.routing().apply_leader_hint(topic, partition, &error);
            self.arrange_soon(now);
            return self.route();
        }
        if error.code == ErrorCode::OffsetOutOfRange {
            return self.on_out_of_range(topic, partition, &error);
        }
        if error.retryable || error.code == ErrorCode::TopicIdMismatch && state.retries_mismatch() {
            let position = state.position;
            tracing::debug!(topic = &**topic, partition, %error, %position, "read failed, retrying");
            let status = match error.code {
                ErrorCode::NotLeader | ErrorCode::NotReady => FetchProblem::Leader,
                _ => FetchProblem::Records,
            };
            self.status(topic, partition, status, &error.message);
            if self.client.routing().apply_leader_hint(topic, partition, &error) {
                return self.arrange_soon(clock::monotonic());
            }
            self.pause(topic, partition);
            return self.route();
        }
        let error = ConsumeError::Refused { topic: topic.to_string(), partition, error };
        self.park(topic, partition, error);
    }

    fn on_out_of_range(&mut self, topic: &Arc<str>, partition: u32, error: &ApiError) {
        let bound = |name| error.number(name).and_then(Offset::from_i64);
        let policy = self.options.on_out_of_range;
        let Some(state) = self.state(topic, partition) else { return };
        let (Some(start), Some(end)) = (bound("start"), bound("end")) else {
            let error = ConsumeError::Refused { topic: topic.to_string(), partition, error: error.clone() };
            return self.park(topic, partition, error);
        };
        let position = match policy {
            OffsetResetPolicy::Earliest => start,
            OffsetResetPolicy::Latest => end,
            OffsetResetPolicy::Fail => {
                let offset = state.position;
                let error = ConsumeError::OutOfRange { topic: topic.to_string(), partition, offset, start, end };
                return self.park(topic, partition, error);
            }
        };
        let from = state.position;
        tracing::warn!(topic = &**topic, partition, %from, to = %position, "position was out of range and is reset");
        state.position = position;
        let generation = state.generation;
        self.outbox.push_back(QueuedEvent {
            topic: topic.clone(),
            partition,
            generation,
            event: ConsumerEvent::PositionReset(position),
        });
        self.pause(topic, partition);
    }

    /// Reports a problem that blocks a partition.
    fn status(&mut self, topic: &str, partition: u32, status: FetchProblem, problem: &str) {
        let Some(state) = self.topics.get_mut(topic).and_then(|partitions| partitions.get_mut(&partition)) else {
            return;
        };
        // If records cannot be read, a reachable leader does not clear the problem.
        if state.problem != Some(FetchProblem::Records) {
            state.problem = Some(status);
        }
        self.retries.report(state.generation, format!("{topic}/{partition}: {problem}"), None);
    }

    /// Delays the next read of the partition by a backoff pause.
    fn pause(&mut self, topic: &str, partition: u32) {
        let backoff = || self.client.options().backoff();
        let Some(state) = self.topics.get_mut(topic).and_then(|partitions| partitions.get_mut(&partition)) else {
            return;
        };
        let at = clock::monotonic() + state.backoff.get_or_insert_with(backoff).next_pause();
        state.not_before = Some(at);
        self.arrange_soon(at);
    }

    /// Stops the partition at its position and sends the error to the consumer.
    fn park(&mut self, topic: &Arc<str>, partition: u32, error: ConsumeError) {
        let Some(state) = self.state(topic, partition) else { return };
        state.failed = true;
        let generation = state.generation;
        self.retries.clear(generation);
        self.outbox.push_back(QueuedEvent {
            topic: topic.clone(),
            partition,
            generation,
            event: ConsumerEvent::Failed(error),
        });
    }

    /// Returns true if no broker is known that could serve the partition.
    fn has_no_target(&self, topic: &str, partition: u32) -> bool {
        let state = self.topics.get(topic).and_then(|partitions| partitions.get(&partition));
        state.is_some_and(|state| self.source(topic, partition, state).is_none())
    }

    fn state(&mut self, topic: &str, partition: u32) -> Option<&mut PartitionFetchState> {
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
        let pause = self.metadata_backoff.as_mut().map_or(Duration::ZERO, Backoff::next_pause);
        let topics: Vec<Arc<str>> = self.topics.keys().cloned().collect();
        let expired = self.expired_leaders();
        self.tasks.spawn("consumer metadata", async move {
            let names: Vec<&str> = topics.iter().map(|name| &**name).collect();
            let refresh = async {
                tokio::time::sleep(pause).await;
                client.refresh_excluding(&expired, seen, &names).await
            };
            if let Some(result) = tasks.run_until_cancelled(refresh).await {
                let _ = done.send(result).await;
            }
        });
    }

    fn on_routed(&mut self, result: Result<(), CallError>) {
        self.routing = false;
        match &result {
            Ok(()) => {
                self.refreshed = clock::monotonic();
                let states = self.topics.values_mut().flat_map(BTreeMap::values_mut);
                states.for_each(|state| state.follower_backoff.on_metadata(self.refreshed));
                self.leave_expired_leaders();
            }
            Err(error) => tracing::debug!(%error, "metadata refresh failed"),
        }
        let mut missing = Vec::new();
        for (topic, partitions) in &self.topics {
            let without_stream = partitions.iter().filter(|(_, state)| !state.failed && state.stream.is_none());
            missing.extend(without_stream.map(|(number, _)| (topic.clone(), *number)));
        }
        let mut unknown = false;
        for (topic, partition) in missing {
            if let Some(Err(error)) = self.client.routing().topic(&topic) {
                let error = ConsumeError::Refused { topic: topic.to_string(), partition, error };
                self.park(&topic, partition, error);
            } else if let Err(error) = &result {
                // The partition's own problem is more specific.
                if self.state(&topic, partition).is_some_and(|state| state.problem.is_none()) {
                    self.status(&topic, partition, FetchProblem::Leader, &error.to_string());
                }
            } else if self.has_no_target(&topic, partition) {
                unknown = true;
                let problem = format!(
                    "the partition has no leader: `strandline topic describe {topic}` names the awaited brokers"
                );
                self.status(&topic, partition, FetchProblem::Leader, &problem);
            }
        }
        if unknown || result.is_err() {
            let backoff = || self.client.options().backoff();
            self.metadata_backoff.get_or_insert_with(backoff);
            self.route();
        } else {
            self.metadata_backoff = None;
        }
        self.arrange_soon(clock::monotonic());
    }
}

/// Returns the earlier of two times.
fn sooner(one: Option<Instant>, other: Option<Instant>) -> Option<Instant> {
    one.into_iter().chain(other).min()
}
