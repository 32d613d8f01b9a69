//! What keeps a producer's batches back, and saying so: pauses after failures, and silence.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use tokio::time::Instant;

use super::{
    super::super::{Client, connection::Address},
    Driver, LaneState,
};
use crate::{
    model::Acks,
    proto::fault::{Fault, Reason},
    task::clock,
};

/// A broker that has left all batches of a partition unanswered for so long is worth a word to whoever waits.
pub(super) const SLOW: Duration = Duration::from_secs(5);

/// A leader that has left all batches of a partition unanswered for so long may not be the leader any more.
pub(super) const QUIET: Duration = Duration::from_secs(1);

/// How often it is asked who leads while a leader stays silent.
pub(super) const DOUBT_AGAIN: Duration = Duration::from_millis(250);

impl Driver {
    /// Nothing of this lane is sent for a while.
    pub(super) fn pause(&mut self, index: usize, fault: &Fault) {
        // A gap is what the first batch's trouble does to those behind it: the person waits for the first.
        if fault.reason != Reason::OutOfOrderSequence || !self.lanes[index].in_trouble {
            self.trouble(index, fault.message.clone());
        }
        let options = self.shared.client.options();
        let state = &mut self.lanes[index];
        let pause = state.pauses.get_or_insert_with(|| options.backoff()).next();
        let at = clock::monotonic() + pause;
        state.not_before = Some(state.not_before.map_or(at, |old| old.max(at)));
    }

    /// Something stands in the lane's way.
    pub(super) fn trouble(&mut self, index: usize, problem: String) {
        let state = &mut self.lanes[index];
        let until = state.flight.deadline().map(|(at, _)| at).or_else(|| state.lane.deadline());
        let said = format!("{}/{}: {problem}", state.lane.topic, state.lane.partition);
        state.trouble = problem;
        state.in_trouble = true;
        self.troubles.enter(work(index), said, until);
    }

    /// A broker says why an acknowledgement takes longer.
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

    /// Why a lane's batches have had no answer on this stream for the whole delivery timeout.
    pub(super) fn silence(&self, index: usize, stream: u64) -> String {
        let who = || self.streams.get(&stream).map_or("the leader", |stream| stream.address.as_str());
        let notice = self.lanes[index].notice.clone();
        notice.unwrap_or_else(|| format!("{} has not answered in the delivery timeout", who()))
    }

    /// Nothing stands in the lane's way any more.
    pub(super) fn over(&mut self, index: usize) {
        let state = &mut self.lanes[index];
        (state.notice, state.mismatched) = (None, false);
        if std::mem::take(&mut self.lanes[index].in_trouble) {
            self.troubles.leave(work(index));
        }
    }

    /// Nothing says that a machine is gone silently. So who waits asks the others who leads now, again and again, and goes there.
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

    /// The leaders that are silent. What they say of who leads counts least: of two halves of a cluster that is cut in two, clients may
    /// reach both, and only one of them knows.
    pub(super) fn silent(&self, now: Instant) -> BTreeSet<Address> {
        let silent = self.lanes.iter().filter(|state| state.is_silent(now));
        silent.filter_map(|state| Some(self.streams.get(&state.stream?)?.address.clone())).collect()
    }

    /// Leaves a silent leader for the one that is known to lead now. What is under way there may have been appended, and is sent again
    /// as after a lost answer. It never waits for a broker that cannot acknowledge any more.
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

    /// When the stream last answered in which a lane waits for room.
    pub(super) fn queued_since(&self, state: &LaneState) -> Option<Instant> {
        Some(self.streams.get(&state.waiting?)?.heard)
    }

    /// Has those look again who wait for room in the stream of a broker that does not lead them any more: where it is silent, there is never
    /// any.
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
            // Who is led there still queues up again, in the same order.
            for index in waiting {
                self.pump(index);
            }
        }
    }

    /// No answer is a trouble too, though nothing has failed.
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
    /// The id of the topic that this lane writes to: the one that had the name when its first batch was sent.
    pub(super) fn topic_id(&mut self, client: &Client) -> Arc<str> {
        if self.topic_id.is_none()
            && let Some(Ok(route)) = client.routing().topic(&self.lane.topic)
        {
            self.topic_id = Some(route.id.to_string().into());
        }
        self.topic_id.clone().unwrap_or_default()
    }

    /// A refusal as this lane takes it: of a topic id it is final the second time, when the metadata was refreshed. What is sent after
    /// that goes to the topic that has the name then.
    pub(super) fn judge(&mut self, fault: Fault) -> Fault {
        if fault.reason != Reason::TopicIdMismatch {
            return fault;
        }
        let again = !self.mismatched;
        // Before anything was acknowledged the id comes from metadata that may be older than the topic.
        if !again || !self.proven {
            (self.topic_id, self.proven) = (None, false);
        }
        self.mismatched = again;
        Fault { retryable: again, ..fault }
    }

    /// Whether its leader owes it answers, and has given none for long.
    fn is_silent(&self, now: Instant) -> bool {
        self.flight.under_way() > 0 && self.heard + QUIET <= now
    }
}

/// A lane's name among the producer's troubles.
fn work(index: usize) -> u64 {
    u64::try_from(index).expect("64 bits")
}

#[cfg(test)]
mod tests {
    use super::{super::super::super::HEDGE_IN_DOUBT, *};

    /// The sum of docs/replication.md, "How long a silent host is waited for", behind the lease: etcd looks twice a second for leases that
    /// ended, an election takes 50 ms, and the first broker that is asked may be silent as well.
    #[test]
    fn who_leads_instead_of_a_silent_host_is_known_within_a_second_of_its_leases_end() {
        let elected = Duration::from_millis(500 + 50);
        assert!(elected + DOUBT_AGAIN + HEDGE_IN_DOUBT < Duration::from_secs(1));
    }
}
