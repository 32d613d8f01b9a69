//! State of one partition queue in the producer's task.

use std::{sync::Arc, time::Duration};

use tokio::time::Instant;

use super::super::{
    super::Client,
    ProducerOptions,
    in_flight::{InFlightBatches, ProducerIdAndEpoch},
    partition_queue::PartitionQueue,
};
use crate::{
    proto::error::{ApiError, ErrorCode},
    task::{Backoff, clock},
};

/// Time without a response to the in-flight batches of a partition after which the producer looks for another leader.
pub(super) const LEADER_TIMEOUT: Duration = Duration::from_secs(1);

/// State of one queue that only the task accesses.
pub(super) struct QueueState {
    pub(super) queue: Arc<PartitionQueue>,
    pub(super) in_flight: InFlightBatches,
    /// Stream of the in-flight batches, or of the last send. `None` before the first send, and after the stream ended
    /// or the queue left its leader.
    pub(super) stream: Option<u64>,
    /// Stream in which the queue waits for capacity; `None` if it does not wait.
    pub(super) waiting: Option<u64>,
    /// Backoff; present while sends fail.
    pub(super) backoff: Option<Backoff>,
    /// Time before which nothing is sent.
    pub(super) not_before: Option<Instant>,
    /// Time of the queue's entry in `ProducerDriver::timers`; `None` without an entry.
    pub(super) timer: Option<Instant>,
    /// True while a request for a new producer id is running.
    pub(super) requesting_id: bool,
    /// Time of the leader's last response or notice for this queue, or of the first send after nothing was in flight.
    pub(super) last_response: Instant,
    /// Time of the last metadata refresh because the leader did not respond; the creation if there was none.
    pub(super) last_leader_check: Instant,
    /// Last problem, for the error of an expired record.
    pub(super) last_problem: String,
    /// True while the client's retry status contains `last_problem`.
    pub(super) has_problem: bool,
    /// Reason in the leader's last notice of a late acknowledgement; `None` after an acknowledgement.
    pub(super) notice: Option<String>,
    /// Id of the topic to which the batches belong; `None` before the first batch, and after a mismatch until the next
    /// batch.
    pub(super) topic_id: Option<Arc<str>>,
    /// True once a batch was acknowledged under this id.
    pub(super) topic_id_confirmed: bool,
    /// True if a broker rejected the topic id and no batch was acknowledged since. The broker's metadata may be older
    /// than the client's, so the batch is sent once more.
    pub(super) mismatched: bool,
}

impl QueueState {
    pub(super) fn new(
        queue: Arc<PartitionQueue>,
        options: &ProducerOptions,
        identity: Option<ProducerIdAndEpoch>,
    ) -> Self {
        Self {
            queue,
            in_flight: InFlightBatches::new(options.guarantee(), options.window(), identity),
            stream: None,
            waiting: None,
            backoff: None,
            not_before: None,
            timer: None,
            requesting_id: false,
            last_response: clock::monotonic(),
            last_leader_check: clock::monotonic(),
            last_problem: "none was reported".to_owned(),
            has_problem: false,
            notice: None,
            topic_id: None,
            topic_id_confirmed: false,
            mismatched: false,
        }
    }

    /// Returns the topic id for the batches of this queue. This is the id of the name at the first batch, or at the
    /// first batch after a mismatch cleared the id. Empty if the topic is unknown.
    pub(super) fn topic_id(&mut self, client: &Client) -> Arc<str> {
        if self.topic_id.is_none()
            && let Some(Ok(route)) = client.routing().topic(&self.queue.topic)
        {
            self.topic_id = Some(route.id.to_string().into());
        }
        self.topic_id.clone().unwrap_or_default()
    }

    /// Returns a broker's error, with a topic id mismatch marked as retryable or not. The first mismatch is retried
    /// after a metadata refresh. The second one in a row is final: its batch fails, and later batches go to the topic
    /// that then has the name.
    pub(super) fn leader_error(&mut self, error: ApiError) -> ApiError {
        if error.code != ErrorCode::TopicIdMismatch {
            return error;
        }
        let is_first = !self.mismatched;
        // Before the first acknowledgement, the id itself may come from old metadata, so even the first mismatch clears
        // it.
        if !is_first || !self.topic_id_confirmed {
            (self.topic_id, self.topic_id_confirmed) = (None, false);
        }
        self.mismatched = is_first;
        ApiError { retryable: is_first, ..error }
    }

    /// Returns true if batches are in flight and the leader has not responded for `LEADER_TIMEOUT`.
    pub(super) fn is_unresponsive(&self, now: Instant) -> bool {
        self.in_flight.in_flight_count() > 0 && self.last_response + LEADER_TIMEOUT <= now
    }
}
