//! Replicas that this broker is placing and that the view does not show yet, so that creations side by side keep the brokers' bounds
//! together. Creations of several brokers at the same time do not see each other: together they may exceed a bound by what one of them
//! places.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use crate::{
    cluster::{
        placement::{Placement, ReplicaBound},
        store::Revision,
        view::View,
    },
    model::BrokerId,
};

/// What is being placed. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub(super) struct Claims(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    next: u64,
    claimed: BTreeMap<u64, Claimed>,
}

#[derive(Debug)]
struct Claimed {
    replicas: BTreeMap<BrokerId, usize>,
    /// The transaction since which they count; `None` before it is made. Once the view is there, it shows them.
    made: Option<Revision>,
}

/// Replicas that are being placed. Given back when it is dropped, unless they were made.
#[derive(Debug)]
pub(super) struct Claim {
    number: u64,
    claims: Claims,
}

impl Claims {
    /// Places replicas within the bounds, over what the view shows and what is being placed already.
    pub(super) fn place<T>(
        &self,
        view: &View,
        place: impl Fn(&mut Placement) -> Option<T>,
    ) -> Result<(T, Claim), Option<ReplicaBound>> {
        let mut state = self.lock();
        let shown = view.state();
        state.claimed.retain(|_, claimed| claimed.made.is_none_or(|made| shown.revision() < made));
        let mut placement = Placement::of(&shown);
        for (id, replicas) in state.claimed.values().flat_map(|claimed| &claimed.replicas) {
            placement.carry_many(*id, *replicas);
        }
        let before = placement.loads();
        let placed = placement.within_bounds(place)?;
        let more = placement.loads().into_iter().map(|(id, load)| (id, load.replicas - before[&id].replicas));
        let (number, replicas) = (state.next, more.collect());
        state.next += 1;
        state.claimed.insert(number, Claimed { replicas, made: None });
        Ok((placed, Claim { number, claims: self.clone() }))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Claim {
    /// The replicas count since this transaction.
    pub(super) fn made(self, at: Revision) {
        if let Some(claimed) = self.claims.lock().claimed.get_mut(&self.number) {
            claimed.made = Some(at);
        }
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        let mut state = self.claims.lock();
        if state.claimed.get(&self.number).is_some_and(|claimed| claimed.made.is_none()) {
            state.claimed.remove(&self.number);
        }
    }
}
