//! Reads in the consumer's rack: when a partition moves there, and when it returns to its leader.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use futures::future;
use tokio::time::Instant;

use super::{
    super::{
        super::{
            Client, FIRST_RESPONSE_TIMEOUT, bounded, connection::BrokerAddress, connection::log_client,
            metadata::ReadTarget,
        },
        fetch_state::PartitionFetchState,
        follower_backoff::{FollowerStep, RESPONSE_GRACE_DELAY},
    },
    ConsumerDriver, sooner,
};
use crate::{
    limits,
    model::{LeaderEpoch, Offset},
    proto::v1,
    task::clock,
};

/// Time that batches wait for the consumer before a period without data counts as its own delay.
const HOLD_TIMEOUT: Duration = Duration::from_millis(500);

/// Query for the log end of one partition, sent to its leader.
pub(super) struct LatestQuery {
    topic: Arc<str>,
    partition: u32,
    generation: u64,
}

/// A query, and the log end and leader epoch that the leader returned; `None` without a usable response.
pub(super) type LatestResult = (LatestQuery, Option<(Offset, LeaderEpoch)>);

impl ConsumerDriver {
    /// Returns the broker that should serve a partition.
    pub(super) fn source(&self, topic: &str, partition: u32, state: &PartitionFetchState) -> Option<ReadTarget> {
        let rack = self.options.rack.as_deref().filter(|_| state.follower_backoff.away_until().is_none());
        self.client.routing().source(topic, partition, rack)
    }

    /// Checks the followers that serve this consumer, and moves partitions. Returns the time of the next check.
    pub(super) fn check_read_replicas(&mut self, now: Instant) -> Option<Instant> {
        self.options.rack.as_ref()?;
        let refresh_at = self.refreshed + self.client.options().metadata_age;
        let (mut outdated, mut later) = (refresh_at <= now, Some(refresh_at).filter(|at| *at > now));
        let mut queries = Vec::new();
        for (topic, partitions) in &mut self.topics {
            for (number, state) in partitions.iter_mut().filter(|(_, state)| !state.failed) {
                let back = state.follower_backoff.away_until();
                outdated |= back.is_some_and(|back| back <= now);
                later = sooner(later, back.filter(|back| *back > now));
                if state.stream.is_none() || !state.follows {
                    continue;
                }
                // While batches wait for the consumer, the streams are not read, so missing data has no meaning.
                let step = if self.outbox.is_empty() {
                    state.follower_backoff.step(now)
                } else {
                    FollowerStep::Wait(now + RESPONSE_GRACE_DELAY)
                };
                match step {
                    // Checks of many partitions are combined.
                    FollowerStep::Wait(at) => later = sooner(later, Some(at.max(now + RESPONSE_GRACE_DELAY / 2))),
                    FollowerStep::Pass => {}
                    FollowerStep::Ask if self.asking => later = sooner(later, Some(now + RESPONSE_GRACE_DELAY)),
                    FollowerStep::Ask => {
                        state.follower_backoff.on_query_sent();
                        let (topic, generation) = (topic.clone(), state.generation);
                        queries.push(LatestQuery { topic, partition: *number, generation });
                    }
                    FollowerStep::Leave => {
                        tracing::info!(topic = &**topic, partition = number, position = %state.position,
                            "the follower in the consumer's rack is behind; reading from the leader");
                        state.follower_backoff.leave_follower(now);
                        later = sooner(later, state.follower_backoff.away_until());
                    }
                }
            }
        }
        if outdated {
            self.route();
        }
        if !queries.is_empty() {
            self.query_leaders(queries);
        }
        self.move_partitions();
        later
    }

    /// Ends the streams of partitions that another broker should serve. All partitions of these streams get new
    /// streams.
    fn move_partitions(&mut self) {
        let mut moving = BTreeSet::new();
        for (topic, partitions) in &self.topics {
            for (number, state) in partitions.iter().filter(|(_, state)| !state.failed) {
                let Some(stream) = state.stream.filter(|stream| !moving.contains(stream)) else { continue };
                let current = self.sources.get(&stream).map(|source| &source.address);
                if self.source(topic, *number, state).is_some_and(|source| Some(&source.address) != current) {
                    moving.insert(stream);
                }
            }
        }
        for stream in moving {
            self.drop_stream(stream);
        }
    }

    /// Queries leaders for these log ends.
    fn query_leaders(&mut self, queries: Vec<LatestQuery>) {
        self.asking = true;
        let mut by_leader: BTreeMap<Option<BrokerAddress>, Vec<LatestQuery>> = BTreeMap::new();
        for query in queries {
            let leader = self.client.routing().leader(&query.topic, query.partition);
            by_leader.entry(leader).or_default().push(query);
        }
        let (client, done, tasks) = (self.client.clone(), self.ends_done.clone(), self.tasks.clone());
        self.tasks.spawn("consumer ends", async move {
            let calls = by_leader.into_iter().map(|(leader, queries)| query_leader(&client, leader, queries));
            if let Some(results) = tasks.run_until_cancelled(future::join_all(calls)).await {
                let _ = done.send(results.into_iter().flatten().collect()).await;
            }
        });
    }

    pub(super) fn on_latest_results(&mut self, results: Vec<LatestResult>) {
        self.asking = false;
        let now = clock::monotonic();
        let mut outdated = false;
        for (query, end) in results {
            let Some(state) = self.state(&query.topic, query.partition) else { continue };
            if state.generation != query.generation {
                continue;
            }
            // A deposed leader that does not have the new epoch yet would return an older log end.
            let end = end.filter(|(_, epoch)| *epoch >= state.epoch());
            outdated |= end.is_none();
            state.follower_backoff.on_latest(now, end.is_none_or(|(end, _)| end == state.position));
        }
        if outdated {
            self.route();
        }
        self.arrange_soon(now);
    }

    /// Records the time since which batches wait for the consumer, if there are any.
    pub(super) fn hold(&mut self) {
        if !self.outbox.is_empty() {
            self.queue_full_since.get_or_insert_with(clock::monotonic);
        }
    }

    /// Processes a batch taken by the consumer. If batches waited for `HOLD_TIMEOUT`, the period without data restarts
    /// for all partitions, because the consumer caused the delay.
    pub(super) fn on_batch_taken(&mut self) {
        if !self.outbox.is_empty() {
            return;
        }
        let now = clock::monotonic();
        if self.queue_full_since.take().is_some_and(|since| now.duration_since(since) >= HOLD_TIMEOUT) {
            for state in self.topics.values_mut().flat_map(BTreeMap::values_mut) {
                state.follower_backoff.on_data(now);
            }
        }
    }
}

/// Queries one leader. Returns every query, with or without a response.
async fn query_leader(client: &Client, leader: Option<BrokerAddress>, queries: Vec<LatestQuery>) -> Vec<LatestResult> {
    let Some(leader) = leader else { return queries.into_iter().map(|query| (query, None)).collect() };
    let mut ends = Vec::with_capacity(queries.len());
    let mut queries = queries.into_iter().peekable();
    while queries.peek().is_some() {
        let chunk: Vec<LatestQuery> = queries.by_ref().take(limits::MAX_FETCH_PARTITIONS).collect();
        let mut results = latest(client, &leader, &chunk).await.unwrap_or_default().into_iter();
        ends.extend(chunk.into_iter().map(|query| (query, results.next().and_then(end))));
    }
    ends
}

async fn latest(client: &Client, leader: &BrokerAddress, queries: &[LatestQuery]) -> Option<Vec<v1::OffsetResult>> {
    let queries = queries.iter().map(|query| v1::OffsetQuery {
        topic: query.topic.to_string(),
        partition: i32::try_from(query.partition).unwrap_or(i32::MAX),
        at: Some(v1::offset_query::At::Latest(true)),
    });
    let request = v1::ListOffsetsRequest { queries: queries.collect() };
    let channel = client.wire(leader).await.ok()?;
    let timeout = client.options().request_timeout.min(FIRST_RESPONSE_TIMEOUT);
    bounded(timeout, log_client(channel).list_offsets(request)).await.ok().map(|response| response.results)
}

fn end(result: v1::OffsetResult) -> Option<(Offset, LeaderEpoch)> {
    let is_found = result.error.is_none();
    is_found.then_some(())?;
    Some((Offset::from_i64(result.offset)?, LeaderEpoch::from_i32(result.leader_epoch)?))
}
