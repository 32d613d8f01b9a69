//! The consumer's task. The task owns all fetch positions and all streams. Its loop waits for a command, the end of a
//! metadata refresh, a timer, capacity in the consumer's queue or an event of a stream. The loop calls one method for
//! each. The task decodes no records.

use std::{
    collections::{BTreeSet, VecDeque},
    sync::Arc,
    time::Duration,
};

use tokio::{sync::mpsc, time::Instant};

use super::{
    super::{
        Client,
        address::BrokerAddress,
        error::{CallError, ConsumeError},
        metadata::ReadTarget,
        retry_status::RetryReporter,
    },
    ConsumerEvent, ConsumerOptions, OffsetResetPolicy, QueuedEvent,
    fetch_state::{self, FetchProblem, FetchStates, InvalidResponse, PartitionFetchState, STREAM_STABLE_DELAY},
    streams::{FetchStreams, StreamEvent},
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

/// Interval of metadata refreshes while a broker that serves this consumer reports an expired lease.
const LEASE_REFRESH_INTERVAL: Duration = Duration::from_secs(2);

/// Number of invalid responses in a row from the leader after which the consumer gets an error. Corruption in transport
/// may not recur; corruption on disk stays.
const MAX_CORRUPT_READS: u32 = 3;

/// Command of the handle to the task.
#[derive(Debug)]
pub(super) enum ConsumerCommand {
    Assign { topic: Arc<str>, topic_id: TopicId, partition: u32, generation: u64, position: Offset },
    Unassign { topic: Arc<str>, partition: u32 },
}

/// State of the consumer's task.
pub(super) struct ConsumerDriver {
    client: Client,
    retries: RetryReporter,
    options: ConsumerOptions,
    tasks: Tasks,
    output: mpsc::Sender<QueuedEvent>,
    /// Events that wait for capacity in the consumer's queue. The streams are read only while the outbox is empty,
    /// which bounds the consumer's memory.
    outbox: VecDeque<QueuedEvent>,
    partitions: FetchStates,
    streams: FetchStreams,
    /// Time at which partitions are next assigned to streams; `None` if no assignment is due.
    assign_at: Option<Instant>,
    /// True while a metadata refresh is running.
    refreshing: bool,
    refreshed: mpsc::Receiver<Result<(), CallError>>,
    refresh_done: mpsc::Sender<Result<(), CallError>>,
    /// Backoff of metadata refreshes; present while they fail or do not name all leaders.
    metadata_backoff: Option<Backoff>,
    /// Time of the last successful metadata refresh.
    refreshed_at: Instant,
    /// Time of the last metadata refresh because of an expired lease.
    last_lease_refresh: Option<Instant>,
}

impl ConsumerDriver {
    pub(super) fn new(
        client: Client,
        options: ConsumerOptions,
        tasks: Tasks,
        output: mpsc::Sender<QueuedEvent>,
    ) -> Self {
        let (refresh_done, refreshed) = mpsc::channel(1);
        Self {
            retries: client.retry_reporter(),
            client,
            options,
            tasks,
            output,
            outbox: VecDeque::new(),
            partitions: FetchStates::default(),
            streams: FetchStreams::new(),
            assign_at: None,
            refreshing: false,
            refreshed,
            refresh_done,
            metadata_backoff: None,
            refreshed_at: clock::monotonic(),
            last_lease_refresh: None,
        }
    }

    /// Runs until the set of tasks is cancelled, as when the consumer is dropped or closed.
    pub(super) async fn run(mut self, mut commands: mpsc::Receiver<ConsumerCommand>) {
        let tasks = self.tasks.clone();
        let output = self.output.clone();
        loop {
            let assign_at = self.assign_at;
            let assignment_due = async move {
                match assign_at {
                    Some(at) => tokio::time::sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                () = tasks.cancelled() => break,
                Some(command) = commands.recv() => self.on_command(command),
                Some(result) = self.refreshed.recv() => self.on_metadata(result),
                () = assignment_due => self.assign_streams(),
                permit = output.reserve(), if !self.outbox.is_empty() => match (permit, self.outbox.pop_front()) {
                    (Ok(permit), Some(event)) => permit.send(event),
                    _ => break,
                },
                Some((stream, event)) = self.streams.next(), if self.outbox.is_empty() => {
                    self.on_stream_event(stream, event);
                }
            }
        }
    }

    /// Executes a command of the handle. A new assignment of the same partition replaces the earlier one.
    fn on_command(&mut self, command: ConsumerCommand) {
        match command {
            ConsumerCommand::Assign { topic, topic_id, partition, generation, position } => {
                let now = clock::monotonic();
                let earlier = self.drop_partition(&topic, partition);
                let state = PartitionFetchState::new(generation, topic_id, position, now, earlier);
                self.partitions.insert(topic, partition, state);
                self.schedule_assignment(now);
            }
            ConsumerCommand::Unassign { topic, partition } => {
                self.drop_partition(&topic, partition);
            }
        }
    }

    /// Removes a partition, its queued events in the outbox, and its problem in the retry status. Also closes the
    /// partition's stream, if there is one, because data in flight there belongs to the old position. The other
    /// partitions of that stream get a new stream at the next assignment.
    fn drop_partition(&mut self, topic: &str, partition: u32) -> Option<PartitionFetchState> {
        let removed = self.partitions.remove(topic, partition)?;
        self.retries.clear(removed.generation);
        if let Some(stream) = removed.stream {
            self.drop_stream(stream);
            self.schedule_assignment(clock::monotonic());
        }
        self.outbox.retain(|event| &*event.topic != topic || event.partition != partition);
        Some(removed)
    }

    /// Closes a stream. Its partitions then have no stream.
    fn drop_stream(&mut self, number: u64) {
        self.streams.close(number);
        self.partitions.iter_mut().filter(|state| state.stream == Some(number)).for_each(PartitionFetchState::detach);
    }

    /// Schedules [`Self::assign_streams`] at this time or earlier.
    fn schedule_assignment(&mut self, at: Instant) {
        self.assign_at = Some(self.assign_at.map_or(at, |scheduled| scheduled.min(at)));
    }

    /// Gives every free partition ([`PartitionFetchState::is_free`]) a stream to its read target. A stream has one
    /// request, so all streams to a broker are reopened to add a partition. Refreshes the metadata if a read target is
    /// unknown. Also checks read replicas, expired leases, and problems that can be cleared.
    fn assign_streams(&mut self) {
        self.assign_at = None;
        let now = clock::monotonic();
        let checks =
            [self.check_read_replicas(now), self.refresh_if_lease_expired(now), self.clear_stable_problems(now)];
        checks.into_iter().flatten().for_each(|at| self.schedule_assignment(at));
        let mut addresses = BTreeSet::new();
        let mut has_unknown_target = false;
        for (topic, number, state) in self.partitions.iter().filter(|(.., state)| state.is_free(now)) {
            match self.read_target(topic, number, state) {
                Some(target) => {
                    addresses.insert(target.address);
                }
                None => has_unknown_target = true,
            }
        }
        let paused = self.partitions.iter().filter(|(.., state)| !state.failed && state.stream.is_none());
        if let Some(at) = paused.filter_map(|(.., state)| state.not_before).filter(|at| *at > now).min() {
            self.schedule_assignment(at);
        }
        for address in addresses {
            self.reopen_streams(&address, now);
        }
        // The partitions of a reopened stream may have another read target now.
        if self.without_stream(now).next().is_some() {
            self.schedule_assignment(now);
        }
        if has_unknown_target {
            self.refresh_metadata();
        }
    }

    /// Returns the broker that should serve a partition; `None` if none is known.
    fn read_target(&self, topic: &str, partition: u32, state: &PartitionFetchState) -> Option<ReadTarget> {
        state.follower_backoff.read_target(self.client.routing(), self.options.rack.as_deref(), topic, partition)
    }

    /// Returns every free partition whose read target is known, with the read target.
    fn without_stream(&self, now: Instant) -> impl Iterator<Item = (&Arc<str>, u32, ReadTarget)> {
        let free = self.partitions.iter().filter(move |(.., state)| state.is_free(now));
        free.filter_map(|(topic, number, state)| Some((topic, number, self.read_target(topic, number, state)?)))
    }

    /// Replaces the streams to this broker by as few as possible. The new streams cover all free partitions whose read
    /// target is this broker, with at most `MAX_FETCH_PARTITIONS` on each.
    fn reopen_streams(&mut self, address: &BrokerAddress, now: Instant) {
        for number in self.streams.numbers_to(address) {
            self.drop_stream(number);
        }
        let partitions = self.without_stream(now).filter(|(.., target)| target.address == *address);
        let partitions: Vec<_> =
            partitions.map(|(topic, partition, target)| (topic.clone(), partition, target)).collect();
        for chunk in partitions.chunks(limits::MAX_FETCH_PARTITIONS) {
            self.open_stream(address, chunk);
        }
    }

    /// Opens one stream that reads these partitions from their positions.
    fn open_stream(&mut self, address: &BrokerAddress, partitions: &[(Arc<str>, u32, ReadTarget)]) {
        let stream = self.streams.next_number();
        let partitions = partitions.iter().map(|(topic, partition, target)| {
            let state = self.partitions.get_mut(topic, *partition).expect("the partition was found above");
            let (offset, leader_epoch) = state.attach(stream, target);
            let partition = i32::try_from(*partition).expect("partitions are few");
            let (topic, topic_id) = (topic.to_string(), state.topic.to_string());
            v1::FetchPartition { topic, partition, offset, leader_epoch, topic_id }
        });
        let request = v1::FetchRequest {
            partitions: partitions.collect(),
            restart: false,
            min_bytes: self.options.min_bytes,
            max_bytes: self.options.max_bytes,
            max_wait_ms: u32::try_from(self.options.max_wait.as_millis()).unwrap_or(u32::MAX),
            any_replica: self.options.rack.is_some(),
        };
        self.streams.open(self.client.clone(), address.clone(), request);
    }

    /// Handles an event of a stream: its acceptance, a response, or its end.
    fn on_stream_event(&mut self, number: u64, event: Result<StreamEvent, ApiError>) {
        match event {
            Ok(StreamEvent::Opened) => self.on_opened(number),
            Ok(StreamEvent::Response(response)) => {
                if self.streams.set_lease_expired(number, response.lease_expired) {
                    let address = self.streams.address(number).map(BrokerAddress::as_str);
                    tracing::debug!(address, "broker reports an expired lease, refreshing metadata from other brokers");
                    self.schedule_assignment(clock::monotonic());
                }
                for fetched in response.partitions {
                    self.on_fetched(number, fetched);
                }
            }
            Err(error) => self.on_ended(number, &error),
        }
    }

    /// Handles the broker's acceptance of a stream. If a partition of the stream has a problem, schedules the check
    /// after `STREAM_STABLE_DELAY`. This check clears problems with the leader if the stream is then still open.
    fn on_opened(&mut self, number: u64) {
        let now = clock::monotonic();
        let mut has_problem = false;
        for state in self.partitions.iter_mut().filter(|state| state.stream == Some(number)) {
            state.open_since = Some(now);
            has_problem |= state.problem.is_some();
        }
        if has_problem {
            self.schedule_assignment(now + STREAM_STABLE_DELAY);
        }
    }

    /// Handles the end of a stream, and refreshes the metadata. Partitions that a follower served continue at their
    /// leaders at once; partitions of a leader pause first.
    fn on_ended(&mut self, number: u64, error: &ApiError) {
        tracing::debug!(%error, "fetch stream ended");
        let now = clock::monotonic();
        for state in self.partitions.iter_mut().filter(|state| state.stream == Some(number) && state.is_follower) {
            state.follower_backoff.leave_follower(now);
        }
        let from_leader =
            self.partitions.iter().filter(|(.., state)| state.stream == Some(number) && !state.is_follower);
        let from_leader: Vec<_> = from_leader.map(|(topic, partition, _)| (topic.clone(), partition)).collect();
        self.drop_stream(number);
        self.schedule_assignment(now);
        for (topic, partition) in from_leader {
            self.report_problem(&topic, partition, FetchProblem::Leader, &error.message);
            self.pause(&topic, partition);
        }
        self.refresh_metadata();
    }

    /// Handles one partition of a response. A response for a partition that left the stream is ignored.
    fn on_fetched(&mut self, number: u64, fetched: v1::FetchedPartition) {
        let Ok(partition) = u32::try_from(fetched.partition) else { return };
        let Some(topic) = self.partitions.topic(&fetched.topic) else { return };
        let Some(state) = self.partitions.get_mut(&topic, partition) else { return };
        if state.stream != Some(number) {
            return;
        }
        if let Some(error) = fetched.error {
            // The broker has already removed the partition from the stream.
            state.detach();
            return self.on_partition_error(&topic, partition, error.into());
        }
        let is_newer_epoch = state.on_response(&fetched);
        let (batches, position, result) = fetch_state::accept_batches(state.position, fetched.chunks);
        let generation = state.generation;
        let high_watermark = Offset::from_i64(fetched.high_watermark).unwrap_or_default();
        if !batches.is_empty() {
            state.backoff = None;
            (state.corrupt_reads, state.mismatched) = (0, false);
            clear_problem(state, &self.retries);
        }
        state.position = position;
        for (from, batch) in batches {
            let event = ConsumerEvent::Batch { batch, from, high_watermark };
            self.outbox.push_back(QueuedEvent { topic: topic.clone(), partition, generation, event });
        }
        if is_newer_epoch {
            self.refresh_metadata();
        }
        if let Err(invalid) = result {
            self.on_invalid_response(number, &topic, partition, invalid);
        }
    }

    /// Handles a response with bytes that are no valid batch, or with a gap before a batch. Closes the stream; after a
    /// pause, the partition is read again from its position, and at the leader if a follower sent the response. After
    /// `MAX_CORRUPT_READS` such responses of the leader in a row, the partition fails.
    fn on_invalid_response(&mut self, stream: u64, topic: &Arc<str>, partition: u32, invalid: InvalidResponse) {
        self.drop_stream(stream);
        let now = clock::monotonic();
        self.schedule_assignment(now);
        let Some(state) = self.partitions.get_mut(topic, partition) else { return };
        if state.is_follower {
            // The leader has another copy, so the response of a follower does not count.
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
            InvalidResponse::Malformed(source) => ConsumeError::Corrupt { topic: name, partition, offset, source },
            InvalidResponse::Gap(found) => ConsumeError::Gap { topic: name, partition, expected: offset, found },
        };
        self.fail(topic, partition, error);
    }

    /// Handles a broker's error for one partition. After any error of a follower, the partition is read at the leader.
    /// After an error of the leader, the read is retried, the position is reset, or the partition fails.
    fn on_partition_error(&mut self, topic: &Arc<str>, partition: u32, error: ApiError) {
        let Some(state) = self.partitions.get_mut(topic, partition) else { return };
        if state.is_follower {
            let now = clock::monotonic();
            let position = state.position;
            tracing::debug!(topic = &**topic, partition, %error, %position, "follower error, reading at the leader");
            state.follower_backoff.leave_follower(now);
            self.client.routing().apply_leader_hint(topic, partition, &error);
            self.schedule_assignment(now);
            return self.refresh_metadata();
        }
        if error.code == ErrorCode::OffsetOutOfRange {
            return self.on_out_of_range(topic, partition, &error);
        }
        if error.retryable || error.code == ErrorCode::TopicIdMismatch && state.record_mismatch() {
            let position = state.position;
            tracing::debug!(topic = &**topic, partition, %error, %position, "read failed, retrying");
            let problem = match error.code {
                ErrorCode::NotLeader | ErrorCode::NotReady => FetchProblem::Leader,
                _ => FetchProblem::Records,
            };
            self.report_problem(topic, partition, problem, &error.message);
            if self.client.routing().apply_leader_hint(topic, partition, &error) {
                return self.schedule_assignment(clock::monotonic());
            }
            self.pause(topic, partition);
            return self.refresh_metadata();
        }
        let error = ConsumeError::Refused { topic: topic.to_string(), partition, error };
        self.fail(topic, partition, error);
    }

    /// Handles a position outside the log by the reset policy. An error without the bounds of the log fails the
    /// partition.
    fn on_out_of_range(&mut self, topic: &Arc<str>, partition: u32, error: &ApiError) {
        let bound = |name| error.number(name).and_then(Offset::from_i64);
        let policy = self.options.on_out_of_range;
        let Some(state) = self.partitions.get_mut(topic, partition) else { return };
        let (Some(start), Some(end)) = (bound("start"), bound("end")) else {
            let error = ConsumeError::Refused { topic: topic.to_string(), partition, error: error.clone() };
            return self.fail(topic, partition, error);
        };
        let position = match policy {
            OffsetResetPolicy::Earliest => start,
            OffsetResetPolicy::Latest => end,
            OffsetResetPolicy::Fail => {
                let offset = state.position;
                let error = ConsumeError::OutOfRange { topic: topic.to_string(), partition, offset, start, end };
                return self.fail(topic, partition, error);
            }
        };
        let from = state.position;
        tracing::warn!(topic = &**topic, partition, %from, to = %position, "position was out of range and is reset");
        state.position = position;
        let generation = state.generation;
        let event = ConsumerEvent::PositionReset(position);
        self.outbox.push_back(QueuedEvent { topic: topic.clone(), partition, generation, event });
        self.pause(topic, partition);
    }

    /// Shows a partition's problem in the retry status.
    fn report_problem(&mut self, topic: &str, partition: u32, problem: FetchProblem, message: &str) {
        let Some(state) = self.partitions.get_mut(topic, partition) else { return };
        // A problem with reading records stays, because a reachable leader does not solve it.
        if state.problem != Some(FetchProblem::Records) {
            state.problem = Some(problem);
        }
        self.retries.report(state.generation, format!("{topic}/{partition}: {message}"), None);
    }

    /// Delays the next read of the partition by a backoff pause.
    fn pause(&mut self, topic: &str, partition: u32) {
        let backoff = || self.client.options().backoff();
        let Some(state) = self.partitions.get_mut(topic, partition) else { return };
        let at = clock::monotonic() + state.backoff.get_or_insert_with(backoff).next_pause();
        state.not_before = Some(at);
        self.schedule_assignment(at);
    }

    /// Stops the partition at its position and sends the error to the consumer.
    fn fail(&mut self, topic: &Arc<str>, partition: u32, error: ConsumeError) {
        let Some(state) = self.partitions.get_mut(topic, partition) else { return };
        state.failed = true;
        let generation = state.generation;
        self.retries.clear(generation);
        let event = ConsumerEvent::Failed(error);
        self.outbox.push_back(QueuedEvent { topic: topic.clone(), partition, generation, event });
    }

    /// Returns true if no broker is known that could serve the partition.
    fn has_no_target(&self, topic: &str, partition: u32) -> bool {
        let state = self.partitions.get(topic, partition);
        state.is_some_and(|state| self.read_target(topic, partition, state).is_none())
    }

    /// Starts a metadata refresh unless one is running. The refresh waits for the backoff pause, if there is one, and
    /// calls brokers with an expired lease last.
    fn refresh_metadata(&mut self) {
        if std::mem::replace(&mut self.refreshing, true) {
            return;
        }
        let client = self.client.clone();
        let done = self.refresh_done.clone();
        let tasks = self.tasks.clone();
        let used_generation = client.routing().generation();
        let pause = self.metadata_backoff.as_mut().map_or(Duration::ZERO, Backoff::next_pause);
        let topics: Vec<Arc<str>> = self.partitions.topics().cloned().collect();
        let expired = self.streams.expired_brokers();
        self.tasks.spawn("consumer-metadata", async move {
            let names: Vec<&str> = topics.iter().map(|name| &**name).collect();
            let refresh = async {
                tokio::time::sleep(pause).await;
                client.refresh_deferring(&expired, used_generation, &names).await
            };
            if let Some(result) = tasks.run_until_cancelled(refresh).await {
                let _ = done.send(result).await;
            }
        });
    }

    /// Handles the end of a metadata refresh. Leaves leaders with an expired lease that have a successor. Fails
    /// partitions without a stream if the metadata has an error for their topic. Refreshes again if the refresh failed,
    /// or if the metadata names no broker for a partition without a stream.
    fn on_metadata(&mut self, result: Result<(), CallError>) {
        self.refreshing = false;
        match &result {
            Ok(()) => {
                self.refreshed_at = clock::monotonic();
                let received = self.refreshed_at;
                self.partitions.iter_mut().for_each(|state| state.follower_backoff.on_metadata(received));
                self.leave_expired_leaders();
            }
            Err(error) => tracing::debug!(%error, "metadata refresh failed"),
        }
        let without_stream = self.partitions.iter().filter(|(.., state)| !state.failed && state.stream.is_none());
        let without_stream: Vec<_> = without_stream.map(|(topic, partition, _)| (topic.clone(), partition)).collect();
        let mut has_leaderless = false;
        for (topic, partition) in without_stream {
            if let Some(Err(error)) = self.client.routing().topic(&topic) {
                let error = ConsumeError::Refused { topic: topic.to_string(), partition, error };
                self.fail(&topic, partition, error);
            } else if let Err(error) = &result {
                // The partition's own problem is more specific.
                if self.partitions.get(&topic, partition).is_some_and(|state| state.problem.is_none()) {
                    self.report_problem(&topic, partition, FetchProblem::Leader, &error.to_string());
                }
            } else if self.has_no_target(&topic, partition) {
                has_leaderless = true;
                let message =
                    format!("the partition has no leader: `strandline topic describe {topic}` shows how it gets one");
                self.report_problem(&topic, partition, FetchProblem::Leader, &message);
            }
        }
        if has_leaderless || result.is_err() {
            let backoff = || self.client.options().backoff();
            self.metadata_backoff.get_or_insert_with(backoff);
            self.refresh_metadata();
        } else {
            self.metadata_backoff = None;
        }
        self.schedule_assignment(clock::monotonic());
    }

    /// Refreshes metadata at intervals while a broker reports an expired lease. Returns the time of the next refresh.
    ///
    /// A leader that is partitioned from its cluster, but not from its consumers, sends no more records and resembles
    /// the leader of an idle log. Only its report of an expired lease distinguishes the two. Thanks to this report,
    /// consumers of idle logs need not request metadata at intervals.
    fn refresh_if_lease_expired(&mut self, now: Instant) -> Option<Instant> {
        if self.streams.expired_brokers().is_empty() {
            return None;
        }
        let due = self.last_lease_refresh.map_or(now, |last| last + LEASE_REFRESH_INTERVAL);
        if due > now {
            return Some(due);
        }
        self.last_lease_refresh = Some(now);
        self.refresh_metadata();
        Some(now + LEASE_REFRESH_INTERVAL)
    }

    /// Ends the streams of brokers with an expired lease if new metadata names another broker in a newer epoch for one
    /// of their partitions.
    fn leave_expired_leaders(&mut self) {
        self.move_partitions(|driver, stream, state, target| {
            driver.streams.is_lease_expired(stream) && target.epoch > state.epoch()
        });
    }

    /// Moves the partitions of a consumer with a rack to the replicas that should serve them. Also refreshes metadata
    /// that is older than `metadata_age` or precedes the end of a partition's stay at its leader. Returns the time of
    /// the next check. Does nothing and returns `None` without a rack.
    fn check_read_replicas(&mut self, now: Instant) -> Option<Instant> {
        self.options.rack.as_ref()?;
        let stay_ends = self.partitions.iter().filter(|(.., state)| !state.failed);
        let stay_ends = stay_ends.filter_map(|(.., state)| state.follower_backoff.leader_until());
        let refresh_at = self.refreshed_at + self.client.options().metadata_age;
        let (due, later): (Vec<Instant>, Vec<Instant>) = stay_ends.chain([refresh_at]).partition(|at| *at <= now);
        if !due.is_empty() {
            self.refresh_metadata();
        }
        self.move_partitions(|_, _, _, _| true);
        later.into_iter().min()
    }

    /// Ends each stream that has an outdated partition. The read target of such a partition is another broker, and
    /// `is_outdated` returns true for its stream, state and read target. The caller schedules the assignment of new
    /// streams.
    fn move_partitions(&mut self, is_outdated: impl Fn(&Self, u64, &PartitionFetchState, &ReadTarget) -> bool) {
        let mut outdated = BTreeSet::new();
        for (topic, partition, state) in self.partitions.iter().filter(|(.., state)| !state.failed) {
            let Some(stream) = state.stream.filter(|stream| !outdated.contains(stream)) else { continue };
            let Some(target) = self.read_target(topic, partition, state) else { continue };
            if self.streams.address(stream) != Some(&target.address) && is_outdated(self, stream, state, &target) {
                outdated.insert(stream);
            }
        }
        outdated.into_iter().for_each(|stream| self.drop_stream(stream));
    }

    /// Clears problems with leaders whose streams have been open for `STREAM_STABLE_DELAY`. Returns the time at which
    /// the next problem can be cleared.
    fn clear_stable_problems(&mut self, now: Instant) -> Option<Instant> {
        let mut next_check = None;
        for state in self.partitions.iter_mut().filter(|state| !state.failed && state.stream.is_some()) {
            match state.stable_at() {
                Some(at) if at > now => next_check = next_check.into_iter().chain([at]).min(),
                Some(_) => clear_problem(state, &self.retries),
                None => {}
            }
        }
        next_check
    }
}

/// Clears a partition's problem, also in the retry status.
fn clear_problem(state: &mut PartitionFetchState, retries: &RetryReporter) {
    if state.problem.take().is_some() {
        retries.clear(state.generation);
    }
}
