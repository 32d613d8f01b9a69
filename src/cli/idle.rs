//! Returns freed memory to the system while the process is idle.
//!
//! The allocator collects freed memory during allocations. An idle broker allocates little, so the allocator would keep
//! the memory of a burst. Threads therefore collect before they park. Memory that another thread freed is returned only
//! after its owning thread wakes and parks again.

use std::{cell::Cell, time::Duration};

use tokio::time::Instant;

use crate::task::clock;

/// Minimum interval between two collections by one thread.
const COLLECT_INTERVAL: Duration = Duration::from_millis(100);

thread_local! {
    /// Time of this thread's last collection; `None` before the first one.
    static COLLECTED: Cell<Option<Instant>> = const { Cell::new(None) };
}

/// Returns the free memory of this thread's allocator heap to the operating system, at most once per
/// `COLLECT_INTERVAL`. Blocks of this heap that other threads freed are included. Called before a thread parks.
pub(super) fn release_free_memory() {
    let now = clock::monotonic();
    if COLLECTED.get().is_none_or(|last| now.duration_since(last) >= COLLECT_INTERVAL) {
        COLLECTED.set(Some(now));
        collect();
    }
}

#[allow(unsafe_code)]
fn collect() {
    // SAFETY: `mi_collect` takes no pointer, and any thread may call it at any time.
    unsafe { libmimalloc_sys::mi_collect(false) }
}
