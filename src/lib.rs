//! Strandline: a log service that tiers its log to object storage.
//!
//! The modules are in import order: each may import only the modules above it. The first ones are packages of their own
//! and re-exported here.

/// Returns true if a test breaks this rule on purpose (`task::mutation`). The value is always `false` outside tests and
/// the simulator.
#[cfg(any(test, feature = "sim"))]
macro_rules! mutant {
    ($rule:ident) => {
        crate::task::mutation::is_active(crate::task::mutation::Mutation::$rule)
    };
}
#[cfg(not(any(test, feature = "sim")))]
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
#[cfg(not(feature = "sim"))]
macro_rules! sim_event {
    ($($event:tt)*) => {};
}

pub use strandline_client as client;
pub use strandline_core::{limits, model, record, task};
pub use strandline_proto as proto;

pub mod telemetry;

pub mod log;

pub mod tier;

pub mod cluster;

pub mod config;

pub mod partition;

pub mod broker;

pub mod server;

pub mod cli;
