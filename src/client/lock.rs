//! Locks that are held for a few lines and never across an await.

use std::sync::{Mutex, MutexGuard};

/// Locks. A panic elsewhere does not make what the lock guards useless: every critical section here leaves it whole.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}
