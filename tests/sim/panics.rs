//! Panics of simulated tasks. A broken invariant would abort a broker; here it ends the run.
//!
//! Only the location and the message of a panic are printed, because the trace shows the events before it. A task's
//! panic reaches only the task that joins it. So the hook stores the first panic of the thread, which runs one
//! simulation.

use std::{cell::RefCell, panic, sync::Once};

use strandline::task::mutation;

thread_local! {
    static FIRST: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// Clears the stored panic of this thread, and stores its first panic from now on. Panics are not printed while a
/// mutation is active in any thread.
pub(crate) fn start_recording() {
    static ONCE: Once = Once::new();
    FIRST.set(None);
    ONCE.call_once(|| {
        panic::set_hook(Box::new(move |info| {
            let location = info.location().map_or_else(String::new, |at| format!("{}:{}", at.file(), at.line()));
            FIRST.with_borrow_mut(|first| {
                first.get_or_insert_with(|| format!("{}: {location}", panic_text(info.payload())));
            });
            if !mutation::is_any_active() {
                println!("{location}: {}", panic_text(info.payload()));
            }
        }));
    });
}

/// Stores a rule violation as if it were a panic, unless one is stored already.
pub(crate) fn report(violation: String) {
    FIRST.with_borrow_mut(|first| {
        first.get_or_insert(violation);
    });
}

/// Returns the first panic or rule violation of this run; `None` if there is none.
pub(crate) fn first() -> Option<String> {
    FIRST.with_borrow(Clone::clone)
}

/// Panics if a task of this run has panicked or a rule violation was reported.
pub(crate) fn check() {
    if let Some(panicked) = first() {
        panic!("a task panicked: {panicked}");
    }
}

fn panic_text(panicked: &dyn std::any::Any) -> &str {
    let text = panicked.downcast_ref::<String>().map(String::as_str).or(panicked.downcast_ref::<&str>().copied());
    text.unwrap_or("panic without a text")
}
