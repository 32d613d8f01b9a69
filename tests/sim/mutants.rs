//! Rules of the broker that are broken on purpose, one at a time: each must be found within so many seeds.
//!
//! This is what the other tests here are worth. A rule that nobody misses is a check that is not there.

use std::{
    panic::{self, AssertUnwindSafe},
    sync::Once,
};

use strandline::task::mutation::{self, Mutation};

use crate::run;

/// The broken rules, and the seeds, from 1 on, one of which must find each.
const MUTANTS: &[(Mutation, u64)] = &[(Mutation::AcknowledgeBeforeSync, 10), (Mutation::EvictBeforeCommit, 20)];

#[test]
fn every_broken_rule_is_found() {
    quiet();
    for &(mutation, seeds) in MUTANTS {
        let found = (1..=seeds).find_map(|seed| {
            let why = mutation::with(Some(mutation), || panic::catch_unwind(AssertUnwindSafe(|| run::run(seed))));
            why.err().map(|why| (seed, first_line(&*why)))
        });
        let (seed, why) = found.unwrap_or_else(|| panic!("{mutation:?} was not found in {seeds} seeds"));
        println!("{mutation:?}: seed {seed}: {why}");
    }
}

/// A run that finds a broken rule panics with all that happened. Here that is what is hoped for, and one line of it is enough.
fn quiet() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let loud = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            if std::env::var_os("LOUD").is_some() || !MUTANTS.iter().any(|&(mutation, _)| mutation::is_on(mutation)) {
                loud(info);
            }
        }));
    });
}

fn first_line(panicked: &dyn std::any::Any) -> String {
    let text = panicked.downcast_ref::<String>().map(String::as_str).or(panicked.downcast_ref::<&str>().copied());
    text.and_then(|text| text.lines().next()).unwrap_or("no words").to_owned()
}
