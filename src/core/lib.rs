//! Plain types, limits, tasks and record batches that the client and the server of Strandline share.
//!
//! The modules are in import order: each may import only the modules above it.

pub mod model;

pub mod limits;

pub mod task;

pub mod record;
