//! Lookups of the producer's task: metadata and new producer ids.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use super::{
    super::{super::error::CallError, identity, in_flight::ProducerIdAndEpoch},
    DriverEvent, ProducerDriver,
};
use crate::{
    proto::error::{ApiError, ErrorCode},
    task::{Backoff, clock},
};

impl ProducerDriver {
    /// Starts a metadata refresh unless one is running.
    pub(super) fn route(&mut self) {
        if self.routing {
            return;
        }
        self.routing = true;
        let client = self.inner.client.clone();
        let inner = self.inner.clone();
        let events = self.events.clone();
        let tasks = self.tasks.clone();
        let seen = client.routing().generation();
        let pause = self.metadata_backoff.as_mut().map_or(Duration::ZERO, Backoff::next_pause);
        let wanted: BTreeSet<Arc<str>> =
            self.unrouted.iter().map(|index| self.queues[*index].queue.topic.clone()).collect();
        let unresponsive = self.silent(clock::monotonic());
        self.tasks.spawn("producer metadata", async move {
            let refresh = inner.refreshed(seen, &wanted, &unresponsive, pause);
            if let Some(result) = tasks.run_until_cancelled(refresh).await {
                let _ = events.send(DriverEvent::Routed(result)).await;
            }
        });
    }

    pub(super) fn on_routed(&mut self, result: Result<(), CallError>) {
        self.routing = false;
        if let Err(error) = &result {
            tracing::debug!(%error, "metadata refresh failed");
        }
        let now = clock::monotonic();
        for index in 0..self.queues.len() {
            self.move_to_new_leader(index, now);
        }
        self.requeue_moved();
        let mut missing = false;
        for index in std::mem::take(&mut self.unrouted) {
            let state = &mut self.queues[index];
            let status = if let Err(error) = &result {
                error.to_string()
            } else if let Some(Err(error)) = self.inner.client.routing().topic(&state.queue.topic) {
                // The topic was deleted: none of its waiting batches can be sent.
                self.fail_all(index, &error);
                continue;
            } else if self.inner.client.routing().leader(&state.queue.topic, state.queue.partition).is_some() {
                self.send_ready(index);
                continue;
            } else {
                let topic = &state.queue.topic;
                format!("the partition has no leader: `strandline topic describe {topic}` names the awaited brokers")
            };
            self.status(index, status);
            missing = true;
            self.unrouted.insert(index);
            self.set_next_timer(index);
        }
        if missing {
            let options = self.inner.client.options();
            self.metadata_backoff.get_or_insert_with(|| options.backoff());
            self.route();
        } else {
            self.metadata_backoff = None;
        }
    }

    pub(super) fn identify(&mut self, index: usize) {
        let state = &mut self.queues[index];
        if std::mem::replace(&mut state.identifying, true) {
            return;
        }
        let client = self.inner.client.clone();
        let events = self.events.clone();
        let tasks = self.tasks.clone();
        self.tasks.spawn("producer id", async move {
            if let Some(identity) = tasks.run_until_cancelled(identity(&client)).await {
                let _ = events.send(DriverEvent::Identified { queue: index, identity }).await;
            }
        });
    }

    pub(super) fn on_identified(&mut self, index: usize, identity: Result<ProducerIdAndEpoch, CallError>) {
        let state = &mut self.queues[index];
        state.identifying = false;
        match identity {
            Ok(identity) => {
                tracing::debug!(topic = &*state.queue.topic, partition = state.queue.partition, "new producer id");
                let failed = state.flight.identify(identity);
                self.fail_batches(index, failed);
            }
            Err(error) => {
                let error = ApiError::new(ErrorCode::NotReady, error.to_string());
                self.pause(index, &error);
            }
        }
        self.send_ready(index);
    }
}
