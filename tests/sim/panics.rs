//! Panics of simulated tasks: a broken invariant would end a broker, and here it ends the run.
//!
//! They are printed in short, `STRANDLINE_TRACE=1` prints all that happened. A task that panics tells nobody but who joins it. The hook remembers the panic for the thread, which is one run.

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
        let loud = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            let place = info.location().map_or_else(String::new, |at| format!("{}:{}", at.file(), at.line()));
            FIRST.with_borrow_mut(|first| {
                first.get_or_insert_with(|| format!("{}: {place}", words(info.payload())));
            });
            if std::env::var_os("STRANDLINE_TRACE").is_some() {
                loud(info);
            } else if !mutation::is_any_on() {
                println!("{place}: {}", words(info.payload()));
            }
        }));
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

fn words(panicked: &dyn std::any::Any) -> String {
    let text = panicked.downcast_ref::<String>().map(String::as_str).or(panicked.downcast_ref::<&str>().copied());
    text.and_then(|text| text.lines().next()).unwrap_or("no words").to_owned()
}
