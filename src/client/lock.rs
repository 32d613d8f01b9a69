//! Locks of short critical sections, never held across an await.

use std::sync::{Mutex, MutexGuard};

/// Locks the mutex, also if it is poisoned: every critical section here leaves the guarded value consistent.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}
