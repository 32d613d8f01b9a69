//! Replicas that this broker is placing and that its metadata cache does not show yet. They count towards the replica
//! limits, so that concurrent creations on this broker respect the limits together.
//!
//! Concurrent creations on several brokers are not coordinated. Together they may exceed a limit by the replicas of all
//! creations but one.

use std::{collections::BTreeMap, sync::Arc};

use tokio::sync::Semaphore;

use crate::{
    cluster::{
        metadata::{MetadataCache, MetadataSnapshot},
        placement::{Placement, PlacementError},
        store::Revision,
    },
    model::BrokerId,
    task,
    task::lock::Mutex,
};

/// The reservations of this broker. Cheap to clone.
#[derive(Clone, Debug)]
pub(super) struct ReplicaReservations {
    /// The lock is never held during a placement, because async tasks wait for the lock.
    state: Arc<Mutex<State>>,
    /// The only permit, which each placement holds. So placements run one at a time, and each counts the reservations
    /// of all earlier ones.
    permit: Arc<Semaphore>,
}

impl Default for ReplicaReservations {
    fn default() -> Self {
        Self { state: Arc::default(), permit: Arc::new(Semaphore::new(1)) }
    }
}

#[derive(Debug, Default)]
struct State {
    /// Number of the next reservation.
    next_number: u64,
    /// Reserved replicas, by the number of the reservation.
    reserved: BTreeMap<u64, ReservedReplicas>,
}

#[derive(Debug)]
struct ReservedReplicas {
    /// Number of reserved replicas of each broker.
    replicas: BTreeMap<BrokerId, usize>,
    /// Revision that wrote the replicas; `None` before the write. Metadata snapshots from that revision on contain the
    /// replicas, so the reservation then ends.
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
    /// Runs `place_replicas` on a placement that contains the replicas in the metadata cache and the reserved ones.
    /// Reserves the replicas that `place_replicas` adds, and returns its result with the reservation. `place_replicas`
    /// returns `None` if it cannot place all replicas; it then runs a second time, without replica limits, to find the
    /// error.
    ///
    /// One placement runs at a time, on a blocking thread: 100,000 partitions take from 15 ms to seconds.
    pub(super) async fn reserve<T, F>(
        &self,
        metadata: &MetadataCache,
        place_replicas: F,
    ) -> Result<(T, ReplicaReservation), PlacementError>
    where
        F: Fn(&MetadataSnapshot, &mut Placement) -> Option<T> + Send + 'static,
        T: Send + 'static,
    {
        let permit = Arc::clone(&self.permit).acquire_owned().await.expect("the semaphore is never closed");
        let (reservations, metadata) = (self.clone(), metadata.clone());
        // The closure owns the permit: if the caller is dropped, the placement still runs to its end with the permit.
        task::run_blocking(move || {
            let result = reservations.reserve_now(&metadata.state(), place_replicas);
            drop(permit);
            result
        })
        .await
    }

    /// Implements [`Self::reserve`] for one metadata snapshot. The caller holds the permit.
    fn reserve_now<T>(
        &self,
        snapshot: &MetadataSnapshot,
        place_replicas: impl Fn(&MetadataSnapshot, &mut Placement) -> Option<T>,
    ) -> Result<(T, ReplicaReservation), PlacementError> {
        let mut placement = Placement::of(snapshot);
        {
            let mut state = self.state.lock();
            // The snapshot contains the replicas that were written up to its revision, so their reservations end.
            state
                .reserved
                .retain(|_, reserved| reserved.written_at.is_none_or(|written_at| snapshot.revision() < written_at));
            for (id, replicas) in state.reserved.values().flat_map(|reserved| &reserved.replicas) {
                placement.add_replica_count(*id, *replicas);
            }
        }
        let before = placement.loads();
        let placed = placement.place_within_limits(|placement| place_replicas(snapshot, placement))?;
        let added = placement.loads().into_iter().map(|(id, load)| (id, load.replicas - before[&id].replicas));
        let replicas = added.collect();
        let mut state = self.state.lock();
        let number = state.next_number;
        state.next_number += 1;
        state.reserved.insert(number, ReservedReplicas { replicas, written_at: None });
        Ok((placed, ReplicaReservation { number, reservations: self.clone() }))
    }
}

impl ReplicaReservation {
    /// Stores that revision `at` wrote the replicas. They stay reserved until the metadata cache contains that
    /// revision.
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

    /// Returns a `place_replicas` that blocks until the channel receives a value. Its result is false if none arrives
    /// within 10 s.
    fn place_until(
        ended: mpsc::Receiver<()>,
    ) -> impl Fn(&MetadataSnapshot, &mut Placement) -> Option<bool> + Send + 'static {
        let ended = Mutex::new(ended);
        move |_, _| Some(ended.lock().recv_timeout(Duration::from_secs(10)).is_ok())
    }

    /// Regression: a placement of 100,000 partitions held the lock, so dropping another reservation blocked an async
    /// thread.
    #[tokio::test]
    async fn reservation_ends_during_another_placement() {
        let (tasks, reservations) = (Tasks::new(), ReplicaReservations::default());
        let (metadata, (end, ended)) = (metadata(&tasks), mpsc::sync_channel(1));
        let ((), reservation) = reservations.reserve(&metadata, |_, _| Some(())).await.unwrap();
        let (placed, ()) = tokio::join!(reservations.reserve(&metadata, place_until(ended)), async {
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
        assert!(
            reservations.reserve(&metadata, place_until(ended)).now_or_never().is_none(),
            "it runs on another thread"
        );
        end.send(()).unwrap();
        let ((), _reservation) = reservations.reserve(&metadata, |_, _| Some(())).await.unwrap();
        tasks.stop().await;
    }
}
