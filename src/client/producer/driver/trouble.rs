//! Delays of a producer's batches and their retry status: pauses after failures, and leaders that do not respond.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use tokio::time::Instant;

use super::{
    super::super::{Client, connection::Address},
    Driver, LaneState,
};
use crate::{
    model::Acks,
    proto::error::{ApiError, ErrorCode},
    task::clock,
};

/// Time without a response to any batch of a partition after which the retry status reports the broker.
pub(super) const SLOW: Duration = Duration::from_secs(5);

/// Time without a response to any batch of a partition after which another broker may lead it.
pub(super) const QUIET: Duration = Duration::from_secs(1);

/// Interval of metadata refreshes while a leader does not respond.
pub(super) const DOUBT_AGAIN: Duration = Duration::from_millis(250);

impl Driver {
    /// Delays the sends of a queue by the next backoff pause.
    pub(super) fn pause(&mut self, index: usize, fault: &ApiError) {
        // An out-of-order sequence is the effect of an earlier batch's failure: that batch's problem stays reported.
        if fault.code != ErrorCode::OutOfOrderSequence || !self.lanes[index].in_trouble {
            self.trouble(index, fault.message.clone());
        }
        let options = self.shared.client.options();
        let state = &mut self.lanes[index];
        let pause = state.pauses.get_or_insert_with(|| options.backoff()).next();
        let at = clock::monotonic() + pause;
        state.not_before = Some(state.not_before.map_or(at, |old| old.max(at)));
    }

    /// Reports a problem that blocks a queue.
    pub(super) fn trouble(&mut self, index: usize, problem: String) {
        let state = &mut self.lanes[index];
        let until = state.flight.deadline().map(|(at, _)| at).or_else(|| state.lane.deadline());
        let said = format!("{}/{}: {problem}", state.lane.topic, state.lane.partition);
        state.trouble = problem;
        state.in_trouble = true;
        self.troubles.enter(work(index), said, until);
    }

    /// Handles a broker's notice that an acknowledgement takes longer.
    pub(super) fn on_notice(&mut self, stream: u64, index: usize, why: String) {
        let now = clock::monotonic();
        if let Some(stream) = self.streams.get_mut(&stream) {
            stream.heard = now;
        }
        let state = &mut self.lanes[index];
        if state.stream != Some(stream) || state.flight.under_way() == 0 {
            return;
        }
        state.heard = now;
        state.notice = Some(why.clone());
        self.trouble(index, why);
        self.set_next_timer(index);
    }

    /// Returns the reason for which a queue got no response on this stream within the delivery timeout.
    pub(super) fn silence(&self, index: usize, stream: u64) -> String {
        let who = || self.streams.get(&stream).map_or("the leader", |stream| stream.address.as_str());
        let notice = self.lanes[index].notice.clone();
        notice.unwrap_or_else(|| format!("{} has not answered in the delivery timeout", who()))
    }

    /// Clears the problem of a queue.
    pub(super) fn over(&mut self, index: usize) {
        let state = &mut self.lanes[index];
        (state.notice, state.mismatched) = (None, false);
        if std::mem::take(&mut self.lanes[index].in_trouble) {
            self.troubles.leave(work(index));
        }
    }

    /// Refreshes the metadata at intervals while the leader of a queue does not respond, and moves to the new leader. A
    /// host that disappears sends no error.
    pub(super) fn doubt_silence(&mut self, index: usize, now: Instant) {
        let state = &self.lanes[index];
        let is_silent = state.is_silent(now) || self.queued_since(state).is_some_and(|heard| heard + QUIET <= now);
        if !is_silent || state.doubted + DOUBT_AGAIN > now {
            return;
        }
        self.lanes[index].doubted = now;
        self.leave_silent(index, now);
        self.route();
    }

    /// Returns the leaders that do not respond. Their metadata is used last: in a network partition a client may reach
    /// brokers on both sides, and only one side has current metadata.
    pub(super) fn silent(&self, now: Instant) -> BTreeSet<Address> {
        let silent = self.lanes.iter().filter(|state| state.is_silent(now));
        silent.filter_map(|state| Some(self.streams.get(&state.stream?)?.address.clone())).collect()
    }

    /// Moves a queue from a leader that does not respond to the current leader. The in-flight batches may have been
    /// appended, and are sent again as after a lost response. The queue does not wait for the old leader, which cannot
    /// acknowledge any batch.
    pub(super) fn leave_silent(&mut self, index: usize, now: Instant) {
        let state = &self.lanes[index];
        let Some(number) = state.stream.filter(|_| state.is_silent(now)) else { return };
        let Some(leader) = self.shared.client.routing().leader(&state.lane.topic, state.lane.partition) else { return };
        let Some(old) = self.streams.get(&number).map(|stream| &stream.address).filter(|old| **old != leader) else {
            return;
        };
        let problem = format!("{} has gone silent; {} leads now", old.as_str(), leader.as_str());
        let state = &mut self.lanes[index];
        state.stream = None;
        if let Some(stream) = state.waiting.take().and_then(|number| self.streams.get_mut(&number)) {
            stream.waiting.retain(|lane| *lane != index);
        }
        let given_up = self.lanes[index].flight.lost(number, true);
        self.give_up(index, given_up);
        self.trouble(index, problem);
        self.pump(index);
    }

    /// Returns the time of the last response on the stream in which a queue waits for room.
    pub(super) fn queued_since(&self, state: &LaneState) -> Option<Instant> {
        Some(self.streams.get(&state.waiting?)?.heard)
    }

    /// Restarts the wait of queues in the stream of a broker that no longer leads their partition. A broker that does
    /// not respond never frees room.
    pub(super) fn leave_queues(&mut self) {
        let routing = self.shared.client.routing();
        let is_elsewhere = |index: &usize, address: &Address| {
            let lane = &self.lanes[*index].lane;
            routing.leader(&lane.topic, lane.partition).as_ref() != Some(address)
        };
        let left = self
            .streams
            .iter()
            .filter(|(_, stream)| stream.waiting.iter().any(|index| is_elsewhere(index, &stream.address)));
        for number in left.map(|(number, _)| *number).collect::<Vec<_>>() {
            let stream = self.streams.get_mut(&number).expect("it was found");
            let waiting = std::mem::take(&mut stream.waiting);
            for index in &waiting {
                self.lanes[*index].waiting = None;
            }
            // Queues that the broker still leads wait again, in the same order.
            for index in waiting {
                self.pump(index);
            }
        }
    }

    /// Reports a missing response, although nothing has failed.
    pub(super) fn notice_silence(&mut self, index: usize, now: Instant) {
        let state = &self.lanes[index];
        if state.in_trouble || state.flight.under_way() == 0 || state.heard + SLOW > now {
            return;
        }
        let address = state.stream.and_then(|number| self.streams.get(&number)).map(|stream| stream.address.clone());
        let who = address.as_ref().map_or("the leader", Address::as_str);
        let why = match self.shared.options.acks {
            Acks::Tiered => " (it answers when the record is in the bucket)",
            _ => "",
        };
        let problem = format!("{who} has not answered for {SLOW:?}{why}");
        self.trouble(index, problem);
    }
}

impl LaneState {
    /// Returns the id of the topic that had the name when this queue sent its first batch.
    pub(super) fn topic_id(&mut self, client: &Client) -> Arc<str> {
        if self.topic_id.is_none()
            && let Some(Ok(route)) = client.routing().topic(&self.lane.topic)
        {
            self.topic_id = Some(route.id.to_string().into());
        }
        self.topic_id.clone().unwrap_or_default()
    }

    /// Decides whether a broker's error is retryable. A topic id mismatch is retried once, after a metadata refresh.
    /// The second mismatch is final, and later batches go to the topic that then has the name.
    pub(super) fn judge(&mut self, fault: ApiError) -> ApiError {
        if fault.code != ErrorCode::TopicIdMismatch {
            return fault;
        }
        let again = !self.mismatched;
        // Before the first acknowledgement, the metadata behind the id may be older than the topic.
        if !again || !self.proven {
            (self.topic_id, self.proven) = (None, false);
        }
        self.mismatched = again;
        ApiError { retryable: again, ..fault }
    }

    /// Returns true if batches are in flight and the leader has not responded for `QUIET`.
    fn is_silent(&self, now: Instant) -> bool {
        self.flight.under_way() > 0 && self.heard + QUIET <= now
    }
}

/// Returns the key of a queue in the producer's retry status.
fn work(index: usize) -> u64 {
    u64::try_from(index).expect("64 bits")
}

#[cfg(test)]
mod tests {
    use super::{super::super::super::HEDGE_IN_DOUBT, *};

    /// Checks the sum in docs/replication.md, "How long a silent host is waited for", from the end of the lease on. In
    /// it, etcd checks for expired leases twice a second, an election takes 50 ms, and the first broker that is called
    /// may not respond either.
    #[test]
    fn new_leader_is_found_within_a_second_of_lease_end() {
        let elected = Duration::from_millis(500 + 50);
        assert!(elected + DOUBT_AGAIN + HEDGE_IN_DOUBT < Duration::from_secs(1));
    }
}
