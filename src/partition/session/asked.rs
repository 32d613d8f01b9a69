//! Requests of partitions to one link. Partitions call from their own tasks and never wait; the link's task takes requests when it can.
//!
//! A later request of a partition replaces the requests that were not taken yet. So there is one entry for each partition that follows,
//! however often its requests change.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{Mutex, MutexGuard, PoisonError},
};

use tokio::sync::Notify;

use super::frames::JoinFrame;
use crate::{
    model::{LeaderEpoch, PartitionId},
    partition::{
        Partition,
        leader::{insync::Ends, join::Claim},
    },
};

/// Number of a subscription request, among all of one link.
pub(super) type Ticket = u64;

/// Pending requests of partitions to one link.
#[derive(Debug, Default)]
pub struct Asked {
    state: Mutex<State>,
    changed: Notify,
    followed: Notify,
}

#[derive(Debug, Default)]
struct State {
    entries: BTreeMap<PartitionId, Entry>,
    /// Partitions with pending work, each once.
    order: VecDeque<PartitionId>,
    tickets: Ticket,
}

#[derive(Debug, Default)]
struct Entry {
    /// True if the partition follows on this link.
    follows: bool,
    /// The subscription that holds: the results of any other one do not count.
    joined: Option<Ticket>,
    todo: Todo,
    queued: bool,
}

/// Pending work for a partition, in this order.
#[derive(Debug, Default)]
pub(super) struct Todo {
    /// End the partition's subscription.
    pub(super) leave: Option<Leave>,
    /// Notify the partition that the link is connected.
    pub(super) up: bool,
    /// Notify the partition of that after a pause.
    pub(super) again: bool,
    /// Send this subscription.
    pub(super) join: Option<(Ticket, JoinFrame)>,
}

/// Parameters of an unsubscription.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Leave {
    /// Newest epoch of the partition's metadata.
    pub(super) known: LeaderEpoch,
    /// True if the partition will not return soon.
    pub(super) stopping: bool,
}

impl Asked {
    /// Starts to follow on this link. Any earlier subscription ends: the leader may be the same and its epoch another.
    pub fn follow(&self, partition: PartitionId) {
        self.change(partition, |entry, _| {
            (entry.follows, entry.joined, entry.todo.join) = (true, None, None);
            entry.todo.up = true;
        });
        self.followed.notify_one();
    }

    /// Requests a subscription. Once this has returned, nothing of an earlier subscription is acknowledged, or delivered to the
    /// partition.
    pub fn join(&self, partition: PartitionId, epoch: LeaderEpoch, claim: Claim, ends: Ends) {
        self.change(partition, |entry, tickets| {
            if !entry.follows {
                return;
            }
            *tickets += 1;
            entry.joined = Some(*tickets);
            (entry.todo.up, entry.todo.again) = (false, false);
            entry.todo.join = Some((*tickets, JoinFrame { partition, epoch, claim, ends }));
        });
    }

    /// Requests a notification, after a pause, that the link is connected.
    pub fn again(&self, partition: PartitionId) {
        self.change(partition, |entry, _| entry.todo.again = entry.follows);
    }

    /// Ends following on this link. Once this has returned, nothing is acknowledged, or delivered to the partition.
    pub fn leave(&self, partition: PartitionId, known: LeaderEpoch, stopping: bool) {
        self.change(partition, |entry, _| {
            if entry.follows {
                (entry.follows, entry.joined) = (false, None);
                entry.todo = Todo { leave: Some(Leave { known, stopping }), ..Todo::default() };
            }
        });
    }

    /// Waits until some partition follows on this link.
    pub async fn followed(&self) {
        loop {
            let followed = self.followed.notified();
            if self.state().entries.values().any(|entry| entry.follows) {
                return;
            }
            followed.await;
        }
    }

    /// Waits until some request is pending.
    pub(super) async fn changed(&self) {
        loop {
            let changed = self.changed.notified();
            if !self.state().order.is_empty() {
                return;
            }
            changed.await;
        }
    }

    fn change(&self, partition: PartitionId, change: impl FnOnce(&mut Entry, &mut Ticket)) {
        let mut state = self.state();
        let State { entries, order, tickets } = &mut *state;
        let entry = entries.entry(partition).or_default();
        change(entry, tickets);
        if !std::mem::replace(&mut entry.queued, true) {
            order.push_back(partition);
            drop(state);
            self.changed.notify_one();
        }
    }

    /// Begins a link: every partition that follows is to be notified, and none is subscribed.
    pub(super) fn begin(&self) {
        let mut state = self.state();
        state.order.clear();
        let State { entries, order, .. } = &mut *state;
        entries.retain(|_, entry| entry.follows);
        for (partition, entry) in entries.iter_mut() {
            *entry = Entry { follows: true, queued: true, todo: Todo { up: true, ..Todo::default() }, joined: None };
            order.push_back(*partition);
        }
    }

    /// Ends the link: no partition stays subscribed. Returns the partitions that follow.
    pub(super) fn end(&self) -> Vec<PartitionId> {
        let mut state = self.state();
        state.order.clear();
        state.entries.retain(|_, entry| entry.follows);
        for entry in state.entries.values_mut() {
            *entry = Entry { follows: true, ..Entry::default() };
        }
        state.entries.keys().copied().collect()
    }

    /// Takes the pending work of the partition whose request is the oldest.
    pub(super) fn take(&self) -> Option<(PartitionId, Todo)> {
        let mut state = self.state();
        let partition = state.order.pop_front()?;
        let entry = state.entries.get_mut(&partition)?;
        entry.queued = false;
        let todo = std::mem::take(&mut entry.todo);
        if !entry.follows {
            state.entries.remove(&partition);
        }
        Some((partition, todo))
    }

    /// Returns true if the partition follows on this link.
    pub(super) fn follows(&self, partition: PartitionId) -> bool {
        self.state().entries.get(&partition).is_some_and(|entry| entry.follows)
    }

    /// Runs `work` with a partition if that subscription holds. `work` must not wait, nor send a request to this link.
    pub(super) fn while_joined<T>(
        &self,
        partition: &Partition,
        ticket: Ticket,
        work: impl FnOnce(&Partition) -> T,
    ) -> Option<T> {
        let state = self.state();
        let holds = state.entries.get(&partition.id()).is_some_and(|entry| entry.joined == Some(ticket));
        holds.then(|| work(partition))
    }

    /// Ends that subscription, if it holds.
    pub(super) fn give_up(&self, partition: PartitionId, ticket: Ticket) {
        if let Some(entry) = self.state().entries.get_mut(&partition)
            && entry.joined == Some(ticket)
        {
            entry.joined = None;
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Offset, TopicId};

    #[test]
    fn pending_requests_are_replaced_by_later_ones() {
        let (asked, id) = (Asked::default(), PartitionId::new(TopicId::from_bytes([1; 16]), 0));
        let join = |asked: &Asked| {
            asked.join(id, LeaderEpoch(2), Claim { last: None, end: Offset::ZERO, added: None }, Ends::default())
        };
        join(&asked);
        let todo = asked.take().expect("something was asked").1;
        assert!(todo.join.is_none(), "who follows nobody joins nobody");
        for _ in 0..1000 {
            asked.follow(id);
            join(&asked);
            asked.leave(id, LeaderEpoch(3), false);
            asked.follow(id);
            asked.again(id);
        }
        join(&asked);
        asked.again(id);
        let (partition, todo) = asked.take().expect("something was asked");
        assert_eq!((partition, todo.leave), (id, Some(Leave { known: LeaderEpoch(3), stopping: false })));
        assert!(!todo.up && todo.again && todo.join.is_some());
        assert!(asked.take().is_none(), "one partition waits once");
        // A link begins with all partitions that follow, and with nothing else.
        asked.begin();
        let todo = asked.take().expect("it is to hear of the link").1;
        assert!(todo.up && todo.join.is_none() && todo.leave.is_none());
        asked.leave(id, LeaderEpoch(3), true);
        assert_eq!(asked.end(), []);
        asked.begin();
        assert!(asked.take().is_none());
    }
}
