//! What the partitions of one link ask of it. They call from their own tasks and never wait; the link's task looks when it can.
//!
//! Requests of one partition that were not looked at yet are replaced by later ones, so this holds one entry for each partition
//! that follows, however often they change their mind.

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

/// Which join it is, of all that were asked on a link.
pub(super) type Ticket = u64;

/// What the partitions of one link ask of it.
#[derive(Debug, Default)]
pub struct Asked {
    state: Mutex<State>,
    changed: Notify,
    followed: Notify,
}

#[derive(Debug, Default)]
struct State {
    entries: BTreeMap<PartitionId, Entry>,
    /// Partitions of which something is to be done, each once.
    order: VecDeque<PartitionId>,
    tickets: Ticket,
}

#[derive(Debug, Default)]
struct Entry {
    /// It follows on this link.
    follows: bool,
    /// The join that holds: whatever is under way for another one counts no more.
    joined: Option<Ticket>,
    todo: Todo,
    queued: bool,
}

/// What is to be done for a partition, in this order.
#[derive(Debug, Default)]
pub(super) struct Todo {
    /// End its place.
    pub(super) leave: Option<Leave>,
    /// Say that the link stands.
    pub(super) up: bool,
    /// Say it a little later.
    pub(super) again: bool,
    /// Send this claim.
    pub(super) join: Option<(Ticket, JoinFrame)>,
}

/// How a partition leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Leave {
    /// The newest epoch that it knows.
    pub(super) known: LeaderEpoch,
    /// It will not be back soon.
    pub(super) stopping: bool,
}

impl Asked {
    /// The partition follows on this link from now on, and what it joined before counts no more: the leader may be the same and its
    /// epoch another.
    pub fn follow(&self, partition: PartitionId) {
        self.change(partition, |entry, _| {
            (entry.follows, entry.joined, entry.todo.join) = (true, None, None);
            entry.todo.up = true;
        });
        self.followed.notify_one();
    }

    /// Sends a claim. Nothing that was joined before is acknowledged, or handed to the partition, once this has returned.
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

    /// Says that the link stands, a little later.
    pub fn again(&self, partition: PartitionId) {
        self.change(partition, |entry, _| entry.todo.again = entry.follows);
    }

    /// The partition does not follow on this link any more. Nothing is acknowledged, or handed to it, once this has returned.
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

    /// Waits until something was asked.
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

    /// A link begins: every partition that follows is to hear of it, and nothing is joined.
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

    /// The link has ended: nothing is joined any more. Gives the partitions that follow.
    pub(super) fn end(&self) -> Vec<PartitionId> {
        let mut state = self.state();
        state.order.clear();
        state.entries.retain(|_, entry| entry.follows);
        for entry in state.entries.values_mut() {
            *entry = Entry { follows: true, ..Entry::default() };
        }
        state.entries.keys().copied().collect()
    }

    /// What is to be done for the partition that asked first.
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

    /// Whether the partition follows here.
    pub(super) fn follows(&self, partition: PartitionId) -> bool {
        self.state().entries.get(&partition).is_some_and(|entry| entry.follows)
    }

    /// Does something with a partition while that join holds, and not otherwise. It must not wait, nor ask anything of this link.
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

    /// That join holds no more: its place has ended.
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
    fn what_was_not_looked_at_is_replaced_by_what_is_asked_later() {
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
        // A link begins with everybody who follows, and with nothing else.
        asked.begin();
        let todo = asked.take().expect("it is to hear of the link").1;
        assert!(todo.up && todo.join.is_none() && todo.leave.is_none());
        asked.leave(id, LeaderEpoch(3), true);
        assert_eq!(asked.end(), []);
        asked.begin();
        assert!(asked.take().is_none());
    }
}
