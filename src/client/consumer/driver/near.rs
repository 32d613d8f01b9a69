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
        super::{ANY_ANSWER, Client, bounded, connection::Address, connection::log_client, routing::Source},
        nearness::{GRACE, Step},
        partition::Partition,
    },
    Driver, sooner,
};
use crate::{
    limits,
    model::{LeaderEpoch, Offset},
    proto::v1,
    task::clock,
};

/// Time that batches wait for the consumer before a period without data counts as its own delay.
const HELD: Duration = Duration::from_millis(500);

/// Query for the log end of one partition, sent to its leader.
pub(super) struct Question {
    topic: Arc<str>,
    partition: u32,
    generation: u64,
}

/// A query, and the log end and leader epoch that the leader returned; `None` without a usable response.
pub(super) type Ending = (Question, Option<(Offset, LeaderEpoch)>);

impl Driver {
    /// Returns the broker that should serve a partition.
    pub(super) fn source(&self, topic: &str, partition: u32, state: &Partition) -> Option<Source> {
        let rack = self.options.rack.as_deref().filter(|_| state.near.away_until().is_none());
        self.client.routing().source(topic, partition, rack)
    }

    /// Checks the followers that serve this consumer, and moves partitions. Returns the time of the next check.
    pub(super) fn look_around(&mut self, now: Instant) -> Option<Instant> {
        self.options.rack.as_ref()?;
        let old = self.refreshed + self.client.options().metadata_age;
        let (mut outdated, mut later) = (old <= now, Some(old).filter(|old| *old > now));
        let mut questions = Vec::new();
        for (topic, partitions) in &mut self.topics {
            for (number, state) in partitions.iter_mut().filter(|(_, state)| !state.parked) {
                let back = state.near.away_until();
                outdated |= back.is_some_and(|back| back <= now);
                later = sooner(later, back.filter(|back| *back > now));
                if state.stream.is_none() || !state.follows {
                    continue;
                }
                // While batches wait for the consumer, the streams are not read, so missing data has no meaning.
                let step = if self.outbox.is_empty() { state.near.step(now) } else { Step::Wait(now + GRACE) };
                match step {
                    // Checks of many partitions are combined.
                    Step::Wait(at) => later = sooner(later, Some(at.max(now + GRACE / 2))),
                    Step::Pass => {}
                    Step::Ask if self.asking => later = sooner(later, Some(now + GRACE)),
                    Step::Ask => {
                        state.near.asked();
                        let (topic, generation) = (topic.clone(), state.generation);
                        questions.push(Question { topic, partition: *number, generation });
                    }
                    Step::Leave => {
                        tracing::info!(topic = &**topic, partition = number, position = %state.position,
                            "the follower in the consumer's rack is behind; reading from the leader");
                        state.near.leave(now);
                        later = sooner(later, state.near.away_until());
                    }
                }
            }
        }
        if outdated {
            self.route();
        }
        if !questions.is_empty() {
            self.ask_leaders(questions);
        }
        self.move_over();
        later
    }

    /// Ends the streams of partitions that another broker should serve. All partitions of these streams get new
    /// streams.
    fn move_over(&mut self) {
        let mut moving = BTreeSet::new();
        for (topic, partitions) in &self.topics {
            for (number, state) in partitions.iter().filter(|(_, state)| !state.parked) {
                let Some(stream) = state.stream.filter(|stream| !moving.contains(stream)) else { continue };
                let there = self.sources.get(&stream).map(|source| &source.address);
                if self.source(topic, *number, state).is_some_and(|source| Some(&source.address) != there) {
                    moving.insert(stream);
                }
            }
        }
        for stream in moving {
            self.drop_stream(stream);
        }
    }

    /// Queries leaders for these log ends.
    fn ask_leaders(&mut self, questions: Vec<Question>) {
        self.asking = true;
        let mut by_leader: BTreeMap<Option<Address>, Vec<Question>> = BTreeMap::new();
        for question in questions {
            let leader = self.client.routing().leader(&question.topic, question.partition);
            by_leader.entry(leader).or_default().push(question);
        }
        let (client, done, tasks) = (self.client.clone(), self.ends_done.clone(), self.tasks.clone());
        self.tasks.spawn("consumer ends", async move {
            let calls = by_leader.into_iter().map(|(leader, questions)| ask(&client, leader, questions));
            tokio::select! {
                biased;
                () = tasks.cancelled() => {}
                endings = future::join_all(calls) => {
                    let _ = done.send(endings.into_iter().flatten().collect()).await;
                }
            }
        });
    }

    pub(super) fn on_ends(&mut self, endings: Vec<Ending>) {
        self.asking = false;
        let now = clock::monotonic();
        let mut outdated = false;
        for (question, end) in endings {
            let Some(state) = self.state(&question.topic, question.partition) else { continue };
            if state.generation != question.generation {
                continue;
            }
            // A deposed leader that does not have the new epoch yet would return an older log end.
            let end = end.filter(|(_, epoch)| *epoch >= state.epoch());
            outdated |= end.is_none();
            state.near.answered(now, end.is_none_or(|(end, _)| end == state.position));
        }
        if outdated {
            self.route();
        }
        self.arrange_soon(now);
    }

    /// Records the time since which batches wait for the consumer, if there are any.
    pub(super) fn hold(&mut self) {
        if !self.outbox.is_empty() {
            self.held_since.get_or_insert_with(clock::monotonic);
        }
    }

    /// Processes a batch taken by the consumer. If batches waited for `HELD`, the period without data restarts for all
    /// partitions, because the consumer caused the delay.
    pub(super) fn let_go(&mut self) {
        if !self.outbox.is_empty() {
            return;
        }
        let now = clock::monotonic();
        if self.held_since.take().is_some_and(|since| now.duration_since(since) >= HELD) {
            for state in self.topics.values_mut().flat_map(BTreeMap::values_mut) {
                state.near.heard(now);
            }
        }
    }
}

/// Queries one leader. Returns every query, with or without a response.
async fn ask(client: &Client, leader: Option<Address>, questions: Vec<Question>) -> Vec<Ending> {
    let Some(leader) = leader else { return questions.into_iter().map(|question| (question, None)).collect() };
    let mut endings = Vec::with_capacity(questions.len());
    let mut questions = questions.into_iter().peekable();
    while questions.peek().is_some() {
        let some: Vec<Question> = questions.by_ref().take(limits::MAX_FETCH_PARTITIONS).collect();
        let mut answers = latest(client, &leader, &some).await.unwrap_or_default().into_iter();
        endings.extend(some.into_iter().map(|question| (question, answers.next().and_then(end))));
    }
    endings
}

async fn latest(client: &Client, leader: &Address, questions: &[Question]) -> Option<Vec<v1::OffsetAnswer>> {
    let queries = questions.iter().map(|question| v1::OffsetQuery {
        topic: question.topic.to_string(),
        partition: i32::try_from(question.partition).unwrap_or(i32::MAX),
        at: Some(v1::offset_query::At::Latest(true)),
    });
    let request = v1::ListOffsetsRequest { queries: queries.collect() };
    let wire = client.wire(leader).await.ok()?;
    let wait = client.options().request_timeout.min(ANY_ANSWER);
    bounded(wait, log_client(wire).list_offsets(request)).await.ok().map(|answer| answer.answers)
}

fn end(answer: v1::OffsetAnswer) -> Option<(Offset, LeaderEpoch)> {
    let known = answer.error.is_none();
    known.then_some(())?;
    Some((Offset::from_i64(answer.offset)?, LeaderEpoch::from_i32(answer.leader_epoch)?))
}
