//! Counts allocated bytes, so that an unchecked length is found before it takes gigabytes.

use std::{
    alloc::{GlobalAlloc, Layout, System},
    sync::atomic::{AtomicUsize, Ordering},
};

/// The system's allocator with a counter. C code (zstd) bypasses the counter; libFuzzer limits that code.
struct Counted;

static ALLOCATED: AtomicUsize = AtomicUsize::new(0);
static MAX_ALLOCATED: AtomicUsize = AtomicUsize::new(0);

fn grow(bytes: usize) {
    let allocated = ALLOCATED.fetch_add(bytes, Ordering::Relaxed) + bytes;
    MAX_ALLOCATED.fetch_max(allocated, Ordering::Relaxed);
}

// SAFETY: every call is forwarded unchanged to `System`, and the counters do not access the memory.
unsafe impl GlobalAlloc for Counted {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        grow(layout.size());
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        grow(layout.size());
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        grow(size);
        ALLOCATED.fetch_sub(layout.size(), Ordering::Relaxed);
        unsafe { System.realloc(memory, layout, size) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        ALLOCATED.fetch_sub(layout.size(), Ordering::Relaxed);
        unsafe { System.dealloc(memory, layout) }
    }
}

#[global_allocator]
static COUNTED: Counted = Counted;

/// Runs a function. Returns the maximum of the allocated bytes during the run, minus the bytes allocated before.
pub(crate) fn max_allocated(run: impl FnOnce()) -> usize {
    let before = ALLOCATED.load(Ordering::Relaxed);
    MAX_ALLOCATED.store(before, Ordering::Relaxed);
    run();
    MAX_ALLOCATED.load(Ordering::Relaxed).saturating_sub(before)
}
