//! Lookups of the producer's task: metadata and new producer ids.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use super::{
    super::{
        super::{error::CallError, options::Pauses},
        flight::Identity,
        identity,
    },
    Driver, Event,
};
use crate::{
    proto::error::{ApiError, ErrorCode},
    task::clock,
};

impl Driver {
    /// Starts a metadata refresh unless one is running.
    pub(super) fn route(&mut self) {
        if self.routing {
            return;
        }
        self.routing = true;
        let client = self.shared.client.clone();
        let shared = self.shared.clone();
        let events = self.events.clone();
        let tasks = self.tasks.clone();
        let seen = client.routing().generation();
        let pause = self.route_pauses.as_mut().map_or(Duration::ZERO, Pauses::next);
        let wanted: BTreeSet<Arc<str>> =
            self.unrouted.iter().map(|index| self.lanes[*index].lane.topic.clone()).collect();
        let silent = self.silent(clock::monotonic());
        self.tasks.spawn("producer metadata", async move {
            tokio::select! {
                biased;
                () = tasks.cancelled() => {}
                result = shared.refreshed(seen, &wanted, &silent, pause) => {
                    let _ = events.send(Event::Routed(result)).await;
                }
            }
        });
    }

    pub(super) fn on_routed(&mut self, result: Result<(), CallError>) {
        self.routing = false;
        if let Err(error) = &result {
            tracing::debug!(%error, "metadata could not be refreshed");
        }
        let now = clock::monotonic();
        for index in 0..self.lanes.len() {
            self.leave_silent(index, now);
        }
        self.leave_queues();
        let mut missing = false;
        for index in std::mem::take(&mut self.unrouted) {
            let state = &mut self.lanes[index];
            let trouble = if let Err(error) = &result {
                error.to_string()
            } else if let Some(Err(fault)) = self.shared.client.routing().topic(&state.lane.topic) {
                // The topic was deleted: none of its waiting batches can be sent.
                self.refuse_all(index, &fault);
                continue;
            } else if self.shared.client.routing().leader(&state.lane.topic, state.lane.partition).is_some() {
                self.pump(index);
                continue;
            } else {
                let topic = &state.lane.topic;
                format!("the partition has no leader; `strandline topic describe {topic}` says who is waited for")
            };
            self.trouble(index, trouble);
            missing = true;
            self.unrouted.insert(index);
            self.set_next_timer(index);
        }
        if missing {
            let options = self.shared.client.options();
            self.route_pauses.get_or_insert_with(|| options.backoff());
            self.route();
        } else {
            self.route_pauses = None;
        }
    }

    pub(super) fn identify(&mut self, index: usize) {
        let state = &mut self.lanes[index];
        if std::mem::replace(&mut state.identifying, true) {
            return;
        }
        let client = self.shared.client.clone();
        let events = self.events.clone();
        let tasks = self.tasks.clone();
        self.tasks.spawn("producer id", async move {
            tokio::select! {
                biased;
                () = tasks.cancelled() => {}
                identity = identity(&client) => {
                    let _ = events.send(Event::Identified { lane: index, identity }).await;
                }
            }
        });
    }

    pub(super) fn on_identified(&mut self, index: usize, identity: Result<Identity, CallError>) {
        let state = &mut self.lanes[index];
        state.identifying = false;
        match identity {
            Ok(identity) => {
                tracing::debug!(topic = &*state.lane.topic, partition = state.lane.partition, "new producer id");
                let given_up = state.flight.identify(identity);
                self.give_up(index, given_up);
            }
            Err(error) => {
                let fault = ApiError::new(ErrorCode::NotReady, error.to_string());
                self.pause(index, &fault);
            }
        }
        self.pump(index);
    }
}
