//! Metadata refreshes of the producer's task, and its requests for new producer ids.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use super::{
    super::{super::error::CallError, driver_event::DriverEvent, in_flight::ProducerIdAndEpoch, request_producer_id},
    ProducerDriver,
};
use crate::{
    proto::error::{ApiError, ErrorCode},
    task::{Backoff, clock},
};

impl ProducerDriver {
    /// Starts a metadata refresh unless one is running: after the backoff's pause, it requests the topics of the queues
    /// without a leader. The task receives the result as `DriverEvent::MetadataRefreshed`.
    pub(super) fn refresh_metadata(&mut self) {
        if self.refreshing {
            return;
        }
        self.refreshing = true;
        let client = self.inner.client.clone();
        let inner = self.inner.clone();
        let events = self.events.clone();
        let tasks = self.tasks.clone();
        let used_generation = client.routing().generation();
        let pause = self.metadata_backoff.as_mut().map_or(Duration::ZERO, Backoff::next_pause);
        let wanted: BTreeSet<Arc<str>> =
            self.without_leader.iter().map(|index| self.queues[*index].queue.topic.clone()).collect();
        let unresponsive = self.unresponsive_leaders(clock::monotonic());
        self.tasks.spawn("producer-metadata", async move {
            let refresh = inner.refresh_metadata(used_generation, &wanted, &unresponsive, pause);
            if let Some(result) = tasks.run_until_cancelled(refresh).await {
                let _ = events.send(DriverEvent::MetadataRefreshed(result)).await;
            }
        });
    }

    /// Handles the end of a metadata refresh. Moves queues away from leaders that do not respond, and sends the batches
    /// of queues that waited for a leader. Fails the batches of a waiting queue if the metadata has an error for its
    /// topic. Refreshes again while a queue has no leader.
    pub(super) fn on_metadata(&mut self, result: Result<(), CallError>) {
        self.refreshing = false;
        if let Err(error) = &result {
            tracing::debug!(%error, "metadata refresh failed");
        }
        let now = clock::monotonic();
        for index in 0..self.queues.len() {
            self.move_to_new_leader(index, now);
        }
        self.requeue_moved();
        let mut has_waiting = false;
        for index in std::mem::take(&mut self.without_leader) {
            let state = &mut self.queues[index];
            let problem = if let Err(error) = &result {
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
                format!("the partition has no leader: `strandline topic describe {topic}` shows how it gets one")
            };
            self.report_problem(index, problem);
            has_waiting = true;
            self.without_leader.insert(index);
            self.set_next_timer(index);
        }
        if has_waiting {
            let options = self.inner.client.options();
            self.metadata_backoff.get_or_insert_with(|| options.backoff());
            self.refresh_metadata();
        } else {
            self.metadata_backoff = None;
        }
    }

    /// Requests a new producer id for a queue, unless a request is running.
    pub(super) fn request_producer_id(&mut self, index: usize) {
        let state = &mut self.queues[index];
        if std::mem::replace(&mut state.requesting_id, true) {
            return;
        }
        let client = self.inner.client.clone();
        let events = self.events.clone();
        let tasks = self.tasks.clone();
        self.tasks.spawn("producer-id", async move {
            if let Some(result) = tasks.run_until_cancelled(request_producer_id(&client)).await {
                let _ = events.send(DriverEvent::ProducerIdReceived { queue: index, result }).await;
            }
        });
    }

    /// Continues a queue under its new producer id, and fails the batches that may have been appended under the old id.
    /// After an error, pauses before the next request.
    pub(super) fn on_producer_id(&mut self, index: usize, result: Result<ProducerIdAndEpoch, CallError>) {
        let state = &mut self.queues[index];
        state.requesting_id = false;
        match result {
            Ok(identity) => {
                tracing::debug!(topic = &*state.queue.topic, partition = state.queue.partition, "new producer id");
                let failed = state.in_flight.set_producer_id(identity);
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
