//! Memory budget of requests in flight: permits in bytes, released with the response.

use std::{fmt, sync::Arc};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Bytes of one permit of the semaphore, so that gibibytes fit its counter.
const UNIT_BYTES: usize = 1 << 10;

/// Maximum size of a budget in permits. A semaphore allows more permits on every platform.
const MAX_UNITS: u32 = u32::MAX >> 4;

/// Memory of a caller that work on another thread holds until the work has ended, even if the caller was dropped.
pub type Charge = Arc<dyn fmt::Debug + Send + Sync>;

/// Budget in bytes. Requests for more than is free wait, and are served in their order.
#[derive(Clone, Debug)]
pub struct MemoryBudget {
    semaphore: Arc<Semaphore>,
    units: u32,
}

impl MemoryBudget {
    /// Creates a budget of `bytes`.
    pub fn new(bytes: u64) -> Self {
        let units = u32::try_from(bytes.div_ceil(UNIT_BYTES as u64)).unwrap_or(MAX_UNITS).clamp(1, MAX_UNITS);
        Self { semaphore: Arc::new(Semaphore::new(units as usize)), units }
    }

    /// Waits for `bytes`. A request larger than the budget takes all of it, so that it is served alone.
    pub async fn take(&self, bytes: usize) -> OwnedSemaphorePermit {
        let units = u32::try_from(bytes.div_ceil(UNIT_BYTES)).unwrap_or(u32::MAX).clamp(1, self.units);
        let permit = Arc::clone(&self.semaphore).acquire_many_owned(units).await;
        permit.expect("the semaphore is never closed")
    }

    /// Takes `bytes` if they are free and no request waits for them.
    pub fn try_take(&self, bytes: usize) -> Option<OwnedSemaphorePermit> {
        Arc::clone(&self.semaphore).try_acquire_many_owned(u32::try_from(Self::units(bytes)).ok()?.min(self.units)).ok()
    }

    /// Extends a permit of this budget to `bytes`, if as many are free and no request waits. Returns true if the permit
    /// covers `bytes` now.
    pub fn try_grow(&self, permit: &mut OwnedSemaphorePermit, bytes: usize) -> bool {
        let missing_units = Self::units(bytes).min(self.units as usize).saturating_sub(permit.num_permits());
        let Ok(missing_units) = u32::try_from(missing_units) else { return false };
        let extension = Arc::clone(&self.semaphore).try_acquire_many_owned(missing_units);
        extension.map(|extension| permit.merge(extension)).is_ok()
    }

    /// Releases the part of a permit above `bytes`.
    pub fn shrink(permit: &mut OwnedSemaphorePermit, bytes: usize) {
        let surplus_units = permit.num_permits().saturating_sub(Self::units(bytes));
        drop(permit.split(surplus_units));
    }

    /// Takes `bytes` out of a permit, or as many as it has.
    pub fn split(permit: &mut OwnedSemaphorePermit, bytes: usize) -> OwnedSemaphorePermit {
        let units = Self::units(bytes).min(permit.num_permits());
        permit.split(units).expect("units is at most the number of permits")
    }

    /// Adds `additional` to a permit of the same budget. If `additional` belongs to another budget, it is released.
    pub fn merge(permit: &mut OwnedSemaphorePermit, additional: OwnedSemaphorePermit) {
        if Arc::ptr_eq(permit.semaphore(), additional.semaphore()) {
            permit.merge(additional);
        }
    }

    /// Returns the number of semaphore permits for `bytes`, at least one.
    pub fn units(bytes: usize) -> usize {
        bytes.div_ceil(UNIT_BYTES).max(1)
    }

    /// Returns the bytes of a permit.
    pub fn bytes_of(permit: &OwnedSemaphorePermit) -> usize {
        permit.num_permits() * UNIT_BYTES
    }

    /// Returns the size of the budget in bytes.
    pub fn bytes(&self) -> usize {
        self.units as usize * UNIT_BYTES
    }

    /// Returns the bytes in use.
    pub fn taken(&self) -> usize {
        (self.units as usize).saturating_sub(self.semaphore.available_permits()) * UNIT_BYTES
    }
}
