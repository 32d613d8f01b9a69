//! Strandline: a log service that tiers its log to object storage.
//!
//! Default features build the complete system, and `default-features = false` only the Rust client. The modules are in
//! import order: each may import only the modules above it.

// The crate without `server` is the client, whose public items are documented.
#![cfg_attr(not(feature = "server"), warn(missing_docs))]

/// Returns true if a test breaks this rule on purpose (`task::mutation`). The value is always `false` outside tests and
/// the simulator.
#[cfg(all(feature = "server", any(test, feature = "sim")))]
macro_rules! mutant {
    ($rule:ident) => {
        crate::task::mutation::is_active(crate::task::mutation::Mutation::$rule)
    };
}
#[cfg(all(feature = "server", not(any(test, feature = "sim"))))]
macro_rules! mutant {
    ($rule:ident) => {
        false
    };
}

/// Reports an event to the simulator (`task::sim_event`). Expands to nothing without the feature `sim`.
#[cfg(feature = "sim")]
macro_rules! sim_event {
    ($($event:tt)*) => {
        if crate::task::sim_event::is_observed() {
            crate::task::sim_event::emit(crate::task::sim_event::SimEvent::$($event)*);
        }
    };
}
#[cfg(all(feature = "server", not(feature = "sim")))]
macro_rules! sim_event {
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
pub mod config;

#[cfg(feature = "server")]
pub mod partition;

#[cfg(feature = "server")]
pub mod broker;

#[cfg(feature = "server")]
pub mod server;

#[cfg(feature = "server")]
pub mod cli;
