//! Delays of a producer's batches and their retry status: pauses after failures, and leaders that do not respond.

use std::{collections::BTreeSet, time::Duration};

use tokio::time::Instant;

use super::{
    super::super::address::BrokerAddress,
    ProducerDriver,
    queue_state::{LEADER_TIMEOUT, QueueState},
};
use crate::{
    model::Acks,
    proto::error::{ApiError, ErrorCode},
    task::clock,
};

/// Time without a response to the in-flight batches of a partition after which the retry status reports the leader.
pub(super) const REPORT_TIMEOUT: Duration = Duration::from_secs(5);

/// Interval of metadata refreshes while a leader does not respond.
pub(super) const METADATA_RETRY_INTERVAL: Duration = Duration::from_millis(250);

impl ProducerDriver {
    /// Delays the sends of a queue by the next backoff pause, and reports the error.
    pub(super) fn pause(&mut self, index: usize, error: &ApiError) {
        // An out-of-order sequence is the effect of an earlier batch's failure. If the problem of that batch is
        // reported, it stays.
        if error.code != ErrorCode::OutOfOrderSequence || !self.queues[index].has_problem {
            self.report_problem(index, error.message.clone());
        }
        let options = self.inner.client.options();
        let state = &mut self.queues[index];
        let pause = state.backoff.get_or_insert_with(|| options.backoff()).next_pause();
        let at = clock::monotonic() + pause;
        state.not_before = Some(state.not_before.map_or(at, |earlier| earlier.max(at)));
    }

    /// Shows a queue's problem in the retry status, and stores it for the error of an expired record.
    pub(super) fn report_problem(&mut self, index: usize, problem: String) {
        let state = &mut self.queues[index];
        let until = state.in_flight.deadline().map(|(at, _)| at).or_else(|| state.queue.deadline());
        let message = format!("{}/{}: {problem}", state.queue.topic, state.queue.partition);
        state.last_problem = problem;
        state.has_problem = true;
        self.retries.report(retry_key(index), message, until);
    }

    /// Handles a broker's notice that an acknowledgement takes longer, and shows its reason in the retry status. The
    /// notice counts as a response of the leader.
    pub(super) fn on_notice(&mut self, stream: u64, index: usize, reason: String) {
        let now = clock::monotonic();
        if let Some(stream) = self.streams.get_mut(&stream) {
            stream.last_response = now;
        }
        let state = &mut self.queues[index];
        if state.stream != Some(stream) || state.in_flight.in_flight_count() == 0 {
            return;
        }
        state.last_response = now;
        state.notice = Some(reason.clone());
        self.report_problem(index, reason);
        self.set_next_timer(index);
    }

    /// Returns the reason for which a queue got no response on this stream within the delivery timeout. This is the
    /// reason of the leader's last notice, if there is one.
    pub(super) fn no_response_reason(&self, index: usize, stream: u64) -> String {
        let leader = || self.streams.get(&stream).map_or("the leader", |stream| stream.address.as_str());
        let notice = self.queues[index].notice.clone();
        let timeout = self.inner.options.delivery_timeout;
        notice.unwrap_or_else(|| format!("{} has not responded within {timeout:?}", leader()))
    }

    /// Removes a queue's problem from the retry status, and clears the leader's notice and the topic id mismatch.
    pub(super) fn clear_problem(&mut self, index: usize) {
        let state = &mut self.queues[index];
        (state.notice, state.mismatched) = (None, false);
        if std::mem::take(&mut self.queues[index].has_problem) {
            self.retries.clear(retry_key(index));
        }
    }

    /// Handles a leader that does not respond: to the in-flight batches of the queue, or on the stream in which the
    /// queue waits for capacity. While that lasts, refreshes the metadata every `METADATA_RETRY_INTERVAL`. A queue with
    /// in-flight batches moves to another leader at once if the cached metadata names one. A host that disappears sends
    /// no error, so only the lack of responses shows it.
    pub(super) fn check_leader_timeout(&mut self, index: usize, now: Instant) {
        let state = &self.queues[index];
        let is_unresponsive = state.is_unresponsive(now)
            || self.stream_last_response(state).is_some_and(|since| since + LEADER_TIMEOUT <= now);
        if !is_unresponsive || state.last_leader_check + METADATA_RETRY_INTERVAL > now {
            return;
        }
        self.queues[index].last_leader_check = now;
        self.move_to_new_leader(index, now);
        self.refresh_metadata();
    }

    /// Returns the leaders that do not respond to in-flight batches. A metadata refresh calls them last: in a network
    /// partition a client may reach brokers on both sides, and only one side has current metadata.
    pub(super) fn unresponsive_leaders(&self, now: Instant) -> BTreeSet<BrokerAddress> {
        let unresponsive = self.queues.iter().filter(|state| state.is_unresponsive(now));
        unresponsive.filter_map(|state| Some(self.streams.get(&state.stream?)?.address.clone())).collect()
    }

    /// Moves a queue from a leader that does not respond to the leader in the cached metadata, if that is another
    /// broker. The in-flight batches may have been appended, and are sent again as after a lost response. The queue
    /// does not wait for the old leader, because a deposed leader cannot acknowledge a batch.
    pub(super) fn move_to_new_leader(&mut self, index: usize, now: Instant) {
        let state = &self.queues[index];
        let Some(number) = state.stream.filter(|_| state.is_unresponsive(now)) else { return };
        let Some(leader) = self.inner.client.routing().leader(&state.queue.topic, state.queue.partition) else {
            return;
        };
        let Some(old_leader) =
            self.streams.get(&number).map(|stream| &stream.address).filter(|address| **address != leader)
        else {
            return;
        };
        let problem = format!("{} does not respond; the new leader is {}", old_leader.as_str(), leader.as_str());
        let state = &mut self.queues[index];
        state.stream = None;
        if let Some(stream) = state.waiting.take().and_then(|number| self.streams.get_mut(&number)) {
            stream.waiting.retain(|queue| *queue != index);
        }
        let failed = self.queues[index].in_flight.on_stream_lost(number, true);
        self.fail_batches(index, failed);
        self.report_problem(index, problem);
        self.send_ready(index);
    }

    /// Returns the time of the last response on the stream in which a queue waits for capacity; `None` if the queue
    /// waits in no stream.
    pub(super) fn stream_last_response(&self, state: &QueueState) -> Option<Instant> {
        Some(self.streams.get(&state.waiting?)?.last_response)
    }

    /// Finds the streams in which a queue waits although another broker now leads its partition. Empties the waiting
    /// list of each such stream, and sends what the queues of the list may send. Otherwise the queue could wait for
    /// ever, because a broker that does not respond frees no capacity.
    pub(super) fn requeue_moved(&mut self) {
        let routing = self.inner.client.routing();
        let has_other_leader = |index: &usize, address: &BrokerAddress| {
            let queue = &self.queues[*index].queue;
            routing.leader(&queue.topic, queue.partition).as_ref() != Some(address)
        };
        let outdated = self
            .streams
            .iter()
            .filter(|(_, stream)| stream.waiting.iter().any(|index| has_other_leader(index, &stream.address)));
        for number in outdated.map(|(number, _)| *number).collect::<Vec<_>>() {
            let stream = self.streams.get_mut(&number).expect("the stream was found above");
            let waiting = std::mem::take(&mut stream.waiting);
            for index in &waiting {
                self.queues[*index].waiting = None;
            }
            // Queues whose partition the broker still leads wait again, in the same order.
            for index in waiting {
                self.send_ready(index);
            }
        }
    }

    /// Reports a leader that has not responded for `REPORT_TIMEOUT`, unless another problem is reported.
    pub(super) fn report_leader_timeout(&mut self, index: usize, now: Instant) {
        let state = &self.queues[index];
        if state.has_problem || state.in_flight.in_flight_count() == 0 || state.last_response + REPORT_TIMEOUT > now {
            return;
        }
        let address = state.stream.and_then(|number| self.streams.get(&number)).map(|stream| stream.address.clone());
        let leader = address.as_ref().map_or("the leader", BrokerAddress::as_str);
        let reason = match self.inner.options.acks {
            Acks::Tiered => " (acks=tiered waits until the record is in the object store)",
            _ => "",
        };
        let problem = format!("{leader} has not responded for {REPORT_TIMEOUT:?}{reason}");
        self.report_problem(index, problem);
    }
}

/// Returns the key of a queue in the producer's retry status.
fn retry_key(index: usize) -> u64 {
    u64::try_from(index).expect("a usize fits in 64 bits")
}

#[cfg(test)]
mod tests {
    use super::{super::super::super::HEDGE_DELAY_LEASE_EXPIRED, *};

    /// Checks the client's part of the sum in docs/replication.md, "Failover time of an unresponsive host": the time
    /// from the end of the leader's lease on. The sum assumes that etcd checks for expired leases twice a second, and
    /// that an election takes 50 ms. The sum also assumes that the first broker that is called does not respond.
    #[test]
    fn new_leader_is_found_within_a_second_of_lease_end() {
        let elected = Duration::from_millis(500 + 50);
        assert!(elected + METADATA_RETRY_INTERVAL + HEDGE_DELAY_LEASE_EXPIRED < Duration::from_secs(1));
    }
}
