//! Panics of simulated tasks: a broken invariant would end a broker, and here it ends the run.
//!
//! They are printed in short: what led there is in the trace. A task that panics tells nobody but who joins it. The hook remembers the panic for the thread, which is one run.

use std::{cell::RefCell, panic, sync::Once};

use strandline::task::mutation;

thread_local! {
    static FIRST: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// Remembers panics from now on, and prints none of those that a rule broken on purpose brings.
pub(crate) fn remember() {
    static ONCE: Once = Once::new();
    FIRST.set(None);
    ONCE.call_once(|| {
        panic::set_hook(Box::new(move |info| {
            let place = info.location().map_or_else(String::new, |at| format!("{}:{}", at.file(), at.line()));
            FIRST.with_borrow_mut(|first| {
                first.get_or_insert_with(|| format!("{}: {place}", words(info.payload())));
            });
            if !mutation::is_any_active() {
                println!("{place}: {}", words(info.payload()));
            }
        }));
    });
}

/// Something that must not be was seen, and counts as a panic.
pub(crate) fn found(wrong: String) {
    FIRST.with_borrow_mut(|first| {
        first.get_or_insert(wrong);
    });
}

/// The first panic of this run.
pub(crate) fn first() -> Option<String> {
    FIRST.with_borrow(Clone::clone)
}

/// Panics when a task has.
pub(crate) fn check() {
    if let Some(panicked) = first() {
        panic!("a task panicked: {panicked}");
    }
}

fn words(panicked: &dyn std::any::Any) -> &str {
    let text = panicked.downcast_ref::<String>().map(String::as_str).or(panicked.downcast_ref::<&str>().copied());
    text.unwrap_or("no words")
}
