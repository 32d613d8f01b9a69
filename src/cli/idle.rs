//! Freed memory goes back to the system while the process has little to do.
//!
//! The allocator looks for memory to give back when it is asked for some. An idle broker asks for little, so the allocator would keep what a
//! burst took. Threads that are about to wait make it look. What others free of the memory of a thread comes back when that thread wakes.

use std::{cell::Cell, time::Duration};

use tokio::time::Instant;

use crate::task::clock;

/// How often a thread gives memory back.
const COLLECT_INTERVAL: Duration = Duration::from_millis(100);

thread_local! {
    static COLLECTED: Cell<Option<Instant>> = const { Cell::new(None) };
}

/// Gives back what this thread has freed, and what others freed of its memory, once in a while. Called by a thread that is about to wait.
pub(super) fn give_memory_back() {
    let now = clock::monotonic();
    if COLLECTED.get().is_none_or(|last| now.duration_since(last) >= COLLECT_INTERVAL) {
        COLLECTED.set(Some(now));
        collect();
    }
}

#[allow(unsafe_code)]
fn collect() {
    // SAFETY: any thread may call it at any time; it takes no pointer.
    unsafe { libmimalloc_sys::mi_collect(false) }
}
