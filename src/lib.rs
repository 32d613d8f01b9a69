//! Strandline: a log service whose history lives in object storage.
//!
//! With default features this is the whole system; with `default-features = false` it is the Rust client alone. The
//! modules are listed in the order in which they may import: each knows only those above it.

/// Whether a test has broken this rule on purpose (`task::mutation`); `false` outside of tests and the simulator.
#[cfg(all(feature = "server", any(test, feature = "sim")))]
macro_rules! mutant {
    ($rule:ident) => {
        crate::task::mutation::is_on(crate::task::mutation::Mutation::$rule)
    };
}
#[cfg(all(feature = "server", not(any(test, feature = "sim"))))]
macro_rules! mutant {
    ($rule:ident) => {
        false
    };
}

/// Tells the simulator's judge what happens here (`task::witness`); nothing in what is released.
#[cfg(feature = "sim")]
macro_rules! saw {
    ($($event:tt)*) => {
        if crate::task::witness::is_set() {
            crate::task::witness::saw(crate::task::witness::Event::$($event)*);
        }
    };
}
#[cfg(all(feature = "server", not(feature = "sim")))]
macro_rules! saw {
    ($($event:tt)*) => {};
}

pub mod model;

pub mod limits;

pub mod task;

#[cfg(feature = "server")]
pub mod telemetry;

pub mod record;

#[cfg(feature = "server")]
pub mod log;

#[cfg(feature = "server")]
pub mod tier;

pub mod proto;

pub mod client;

#[cfg(feature = "server")]
pub mod cluster;

#[cfg(feature = "server")]
pub mod partition;

#[cfg(feature = "server")]
pub mod broker;

#[cfg(feature = "server")]
pub mod config;

#[cfg(feature = "server")]
pub mod server;

#[cfg(feature = "server")]
pub mod cli;
