//! Memory that requests under way may take: permits in bytes, given back when the request is answered.

use std::{fmt, sync::Arc};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Bytes that one permit of the semaphore stands for, so that gibibytes fit its counter.
const UNIT: usize = 1 << 10;

/// Memory of a caller that work on another thread holds until it has ended: it goes on where its caller has gone.
pub type Charge = Arc<dyn fmt::Debug + Send + Sync>;

/// A bound in bytes. Who asks for more than is free waits its turn.
#[derive(Clone, Debug)]
pub struct Memory {
    semaphore: Arc<Semaphore>,
    units: u32,
}

impl Memory {
    /// At most `bytes`.
    pub fn new(bytes: u64) -> Self {
        let units = u32::try_from(bytes.div_ceil(UNIT as u64)).unwrap_or(u32::MAX >> 4).clamp(1, u32::MAX >> 4);
        Self { semaphore: Arc::new(Semaphore::new(units as usize)), units }
    }

    /// Waits for room for `bytes`. A request larger than the whole bound takes all of it: it comes alone, and comes through.
    pub async fn take(&self, bytes: usize) -> OwnedSemaphorePermit {
        let units = u32::try_from(bytes.div_ceil(UNIT)).unwrap_or(u32::MAX).clamp(1, self.units);
        let permit = Arc::clone(&self.semaphore).acquire_many_owned(units).await;
        permit.expect("the semaphore is never closed")
    }

    /// Takes room for `bytes` where there is some and nobody waits for it.
    pub fn try_take(&self, bytes: usize) -> Option<OwnedSemaphorePermit> {
        Arc::clone(&self.semaphore).try_acquire_many_owned(u32::try_from(Self::units(bytes)).ok()?.min(self.units)).ok()
    }

    /// Takes what a permit of this bound lacks for `bytes`, where there is as much and nobody waits; whether it has them now.
    pub fn try_grow(&self, permit: &mut OwnedSemaphorePermit, bytes: usize) -> bool {
        let lacking = Self::units(bytes).min(self.units as usize).saturating_sub(permit.num_permits());
        let Ok(lacking) = u32::try_from(lacking) else { return false };
        let more = Arc::clone(&self.semaphore).try_acquire_many_owned(lacking);
        more.map(|more| permit.merge(more)).is_ok()
    }

    /// Gives back what a permit has above `bytes`.
    pub fn shrink(permit: &mut OwnedSemaphorePermit, bytes: usize) {
        let surplus = permit.num_permits().saturating_sub(Self::units(bytes));
        drop(permit.split(surplus));
    }

    /// Takes `bytes` out of a permit, or as many as it has.
    pub fn split(permit: &mut OwnedSemaphorePermit, bytes: usize) -> OwnedSemaphorePermit {
        let units = Self::units(bytes).min(permit.num_permits());
        permit.split(units).expect("it has as many")
    }

    /// Puts into a permit what was taken of the same bound. What was taken of another one is given back.
    pub fn merge(permit: &mut OwnedSemaphorePermit, other: OwnedSemaphorePermit) {
        if Arc::ptr_eq(permit.semaphore(), other.semaphore()) {
            permit.merge(other);
        }
    }

    /// How many permits stand for `bytes`.
    pub fn units(bytes: usize) -> usize {
        bytes.div_ceil(UNIT).max(1)
    }

    /// Bytes that a permit stands for.
    pub fn bytes_of(permit: &OwnedSemaphorePermit) -> usize {
        permit.num_permits() * UNIT
    }

    /// The bound.
    pub fn bytes(&self) -> usize {
        self.units as usize * UNIT
    }

    /// Bytes that are taken.
    pub fn taken(&self) -> usize {
        (self.units as usize).saturating_sub(self.semaphore.available_permits()) * UNIT
    }
}
