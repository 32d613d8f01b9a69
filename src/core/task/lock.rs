//! Locks without poisoning, over those of the standard library.
//!
//! Release builds abort on panic, so only a test can take a lock whose owner panicked. The lock is then taken as if
//! there had been no panic. A waiting thread sleeps in the kernel after a short spin and never calls `sched_yield`.
//! Beside other busy threads, that call costs a time slice of some milliseconds
//! (docs/adr/0021-locks-that-do-not-yield.md).

#![expect(clippy::disallowed_types, reason = "the one place that wraps them")]

use std::{
    sync::{LockResult, PoisonError, RwLockReadGuard, RwLockWriteGuard},
    time::Duration,
};

/// Guard of a [`Mutex`].
pub use std::sync::MutexGuard;

/// A lock that one thread at a time holds.
#[derive(Debug, Default)]
pub struct Mutex<T>(std::sync::Mutex<T>);

impl<T> Mutex<T> {
    /// Creates an unlocked mutex around a value.
    pub const fn new(value: T) -> Self {
        Self(std::sync::Mutex::new(value))
    }

    /// Waits for the lock and takes it.
    pub fn lock(&self) -> MutexGuard<'_, T> {
        ignore_poison(self.0.lock())
    }

    /// Returns the value.
    pub fn into_inner(self) -> T {
        ignore_poison(self.0.into_inner())
    }
}

/// A lock that many readers or one writer hold.
#[derive(Debug, Default)]
pub struct RwLock<T>(std::sync::RwLock<T>);

impl<T> RwLock<T> {
    /// Waits until no thread writes, and takes the lock beside other readers.
    pub fn read(&self) -> RwLockReadGuard<'_, T> {
        ignore_poison(self.0.read())
    }

    /// Waits until no other thread holds the lock, and takes it.
    pub fn write(&self) -> RwLockWriteGuard<'_, T> {
        ignore_poison(self.0.write())
    }
}

/// A condition that threads wait for. The [`Mutex`] of the passed guard is unlocked during the wait.
#[derive(Debug, Default)]
pub struct Condvar(std::sync::Condvar);

impl Condvar {
    /// Creates a condition without waiting threads.
    pub const fn new() -> Self {
        Self(std::sync::Condvar::new())
    }

    /// Wakes one waiting thread.
    pub fn notify_one(&self) {
        self.0.notify_one();
    }

    /// Wakes all waiting threads.
    pub fn notify_all(&self) {
        self.0.notify_all();
    }

    /// Waits until this thread is woken, which may also happen without a call.
    pub fn wait<'a, T>(&self, guard: MutexGuard<'a, T>) -> MutexGuard<'a, T> {
        ignore_poison(self.0.wait(guard))
    }

    /// Waits as [`Self::wait`] does, for at most `timeout`.
    pub fn wait_for<'a, T>(&self, guard: MutexGuard<'a, T>, timeout: Duration) -> MutexGuard<'a, T> {
        ignore_poison(self.0.wait_timeout(guard, timeout)).0
    }

    /// Waits while `condition` holds.
    pub fn wait_while<'a, T>(
        &self,
        guard: MutexGuard<'a, T>,
        condition: impl FnMut(&mut T) -> bool,
    ) -> MutexGuard<'a, T> {
        ignore_poison(self.0.wait_while(guard, condition))
    }

    /// Waits while `condition` holds, for at most `timeout`.
    pub fn wait_while_for<'a, T>(
        &self,
        guard: MutexGuard<'a, T>,
        condition: impl FnMut(&mut T) -> bool,
        timeout: Duration,
    ) -> MutexGuard<'a, T> {
        ignore_poison(self.0.wait_timeout_while(guard, timeout, condition)).0
    }
}

/// Takes a lock also after a panic of its owner.
fn ignore_poison<G>(result: LockResult<G>) -> G {
    result.unwrap_or_else(PoisonError::into_inner)
}
