//! Memory budgets: permits for bytes, which requests and decompressions hold while they use the memory.

use std::{fmt, sync::Arc};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Bytes of one permit of the semaphore. With this unit, budgets of many gibibytes fit the semaphore's counter.
const UNIT_BYTES: usize = 1 << 10;

/// Maximum size of a budget in permits. A semaphore allows more permits on every platform.
const MAX_UNITS: u32 = u32::MAX >> 4;

/// Memory that a caller has taken from a budget. Work on another thread holds it until the work has ended, even if the
/// caller was dropped.
pub type Charge = Arc<dyn fmt::Debug + Send + Sync>;

/// Budget in bytes. A request for more than is free waits; waiting requests are served in their order. Clones share the
/// budget.
#[derive(Clone, Debug)]
pub struct MemoryBudget {
    semaphore: Arc<Semaphore>,
    units: u32,
}

impl MemoryBudget {
    /// Creates a budget of `bytes`, rounded up to whole permits: at least one and at most `MAX_UNITS`.
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

    /// Takes `bytes` if they are free and no request waits; otherwise returns `None`. A request larger than the budget
    /// takes all of it.
    pub fn try_take(&self, bytes: usize) -> Option<OwnedSemaphorePermit> {
        Arc::clone(&self.semaphore).try_acquire_many_owned(u32::try_from(Self::units(bytes)).ok()?.min(self.units)).ok()
    }

    /// Extends a permit of this budget to `bytes`, or to the whole budget if `bytes` are more. Returns false, and
    /// changes nothing, if the missing bytes are not free or a request waits.
    pub fn try_grow(&self, permit: &mut OwnedSemaphorePermit, bytes: usize) -> bool {
        let missing_units = Self::units(bytes).min(self.units as usize).saturating_sub(permit.num_permits());
        let Ok(missing_units) = u32::try_from(missing_units) else { return false };
        let extension = Arc::clone(&self.semaphore).try_acquire_many_owned(missing_units);
        extension.map(|extension| permit.merge(extension)).is_ok()
    }

    /// Releases the part of a permit above `bytes`. At least one unit remains.
    pub fn shrink(permit: &mut OwnedSemaphorePermit, bytes: usize) {
        let surplus_units = permit.num_permits().saturating_sub(Self::units(bytes));
        drop(permit.split(surplus_units));
    }

    /// Splits `bytes` off a permit and returns them as a new permit. If the permit has fewer bytes, all of them are
    /// split off.
    pub fn split(permit: &mut OwnedSemaphorePermit, bytes: usize) -> OwnedSemaphorePermit {
        let units = Self::units(bytes).min(permit.num_permits());
        permit.split(units).expect("units is at most the number of permits")
    }

    /// Adds `additional` to `permit` if both belong to the same budget; otherwise releases `additional`.
    pub fn merge(permit: &mut OwnedSemaphorePermit, additional: OwnedSemaphorePermit) {
        if Arc::ptr_eq(permit.semaphore(), additional.semaphore()) {
            permit.merge(additional);
        }
    }

    /// Returns the number of semaphore permits for `bytes`, at least one.
    pub fn units(bytes: usize) -> usize {
        bytes.div_ceil(UNIT_BYTES).max(1)
    }

    /// Returns the number of bytes that a permit covers.
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
