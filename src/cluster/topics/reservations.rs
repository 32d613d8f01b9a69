//! Replicas that this broker is placing and that the metadata cache does not show yet: concurrent creations respect the
//! replica limits together.
//!
//! Concurrent creations on several brokers are not coordinated: they may exceed a limit by the replicas that one of
//! them places.

use std::{collections::BTreeMap, sync::Arc};

use parking_lot::Mutex;
use tokio::sync::Semaphore;

use crate::{
    cluster::{
        metadata::{MetadataCache, MetadataSnapshot},
        placement::{Placement, ReplicaBound},
        store::Revision,
    },
    model::BrokerId,
    task,
};

/// Replicas that are being placed. Cheap to clone.
#[derive(Clone, Debug)]
pub(super) struct ReplicaReservations {
    /// Held only briefly: async tasks lock it.
    state: Arc<Mutex<State>>,
    /// Permit to place: each placement counts the reservations before it.
    turn: Arc<Semaphore>,
}

impl Default for ReplicaReservations {
    fn default() -> Self {
        Self { state: Arc::default(), turn: Arc::new(Semaphore::new(1)) }
    }
}

#[derive(Debug, Default)]
struct State {
    next: u64,
    reserved: BTreeMap<u64, ReservedReplicas>,
}

#[derive(Debug)]
struct ReservedReplicas {
    replicas: BTreeMap<BrokerId, usize>,
    /// Revision since which the metadata contains the replicas; `None` before the write. A snapshot of that revision
    /// shows them.
    written_at: Option<Revision>,
}

/// A reservation of replicas that are being placed. Released when dropped, unless
/// [`ReplicaReservation::mark_written`] was called.
#[derive(Debug)]
pub(super) struct ReplicaReservation {
    number: u64,
    reservations: ReplicaReservations,
}

impl ReplicaReservations {
    /// Places replicas within the limits, counting the replicas in the metadata cache and those being placed. One
    /// placement runs at a time, on a blocking thread: 100,000 partitions take from 15 ms to seconds.
    pub(super) async fn place<T, F>(
        &self,
        metadata: &MetadataCache,
        place: F,
    ) -> Result<(T, ReplicaReservation), Option<ReplicaBound>>
    where
        F: Fn(&MetadataSnapshot, &mut Placement) -> Option<T> + Send + 'static,
        T: Send + 'static,
    {
        let turn = Arc::clone(&self.turn).acquire_owned().await.expect("the semaphore is never closed");
        let (reservations, metadata) = (self.clone(), metadata.clone());
        // The permit moves along: a placement also ends if its caller was dropped.
        task::run_blocking(move || (reservations.place_now(&metadata.state(), place), turn).0).await
    }

    fn place_now<T>(
        &self,
        snapshot: &MetadataSnapshot,
        place: impl Fn(&MetadataSnapshot, &mut Placement) -> Option<T>,
    ) -> Result<(T, ReplicaReservation), Option<ReplicaBound>> {
        let mut placement = Placement::of(snapshot);
        {
            let mut state = self.state.lock();
            state
                .reserved
                .retain(|_, reserved| reserved.written_at.is_none_or(|written_at| snapshot.revision() < written_at));
            for (id, replicas) in state.reserved.values().flat_map(|reserved| &reserved.replicas) {
                placement.add_loads(*id, *replicas);
            }
        }
        let before = placement.loads();
        let placed = placement.within_bounds(|placement| place(snapshot, placement))?;
        let added = placement.loads().into_iter().map(|(id, load)| (id, load.replicas - before[&id].replicas));
        let replicas = added.collect();
        let mut state = self.state.lock();
        let number = state.next;
        state.next += 1;
        state.reserved.insert(number, ReservedReplicas { replicas, written_at: None });
        Ok((placed, ReplicaReservation { number, reservations: self.clone() }))
    }
}

impl ReplicaReservation {
    /// Marks the replicas as written at this revision.
    pub(super) fn mark_written(self, at: Revision) {
        if let Some(reserved) = self.reservations.state.lock().reserved.get_mut(&self.number) {
            reserved.written_at = Some(at);
        }
    }
}

impl Drop for ReplicaReservation {
    fn drop(&mut self) {
        let mut state = self.reservations.state.lock();
        if state.reserved.get(&self.number).is_some_and(|reserved| reserved.written_at.is_none()) {
            state.reserved.remove(&self.number);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{sync::mpsc, time::Duration};

    use futures::FutureExt;

    use super::*;
    use crate::{
        cluster::{EmbeddedStore, Keys},
        task::Tasks,
    };

    fn metadata(tasks: &Tasks) -> MetadataCache {
        MetadataCache::start(Arc::new(EmbeddedStore::in_memory()), Keys::new("test").unwrap(), tasks)
    }

    /// Returns a placement that runs until the test ends it, and returns true if the test did.
    fn until(ended: mpsc::Receiver<()>) -> impl Fn(&MetadataSnapshot, &mut Placement) -> Option<bool> + Send + 'static {
        let ended = Mutex::new(ended);
        move |_, _| Some(ended.lock().recv_timeout(Duration::from_secs(10)).is_ok())
    }

    /// Regression: a placement of 100,000 partitions held the lock, and reservations that ended waited for it on async
    /// threads.
    #[tokio::test]
    async fn reservation_ends_during_another_placement() {
        let (tasks, reservations) = (Tasks::new(), ReplicaReservations::default());
        let (metadata, (end, ended)) = (metadata(&tasks), mpsc::sync_channel(1));
        let ((), reservation) = reservations.place(&metadata, |_, _| Some(())).await.unwrap();
        let (placed, ()) = tokio::join!(reservations.place(&metadata, until(ended)), async {
            drop(reservation);
            end.send(()).unwrap();
        });
        assert!(placed.unwrap().0, "the reservation ended first");
        tasks.stop().await;
    }

    #[tokio::test]
    async fn placement_of_dropped_caller_frees_permit_and_thread() {
        let (tasks, reservations) = (Tasks::new(), ReplicaReservations::default());
        let (metadata, (end, ended)) = (metadata(&tasks), mpsc::sync_channel(1));
        assert!(reservations.place(&metadata, until(ended)).now_or_never().is_none(), "it runs on another thread");
        end.send(()).unwrap();
        let ((), _reservation) = reservations.place(&metadata, |_, _| Some(())).await.unwrap();
        tasks.stop().await;
    }
}
