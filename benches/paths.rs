//! Benchmarks of the record, log and tier paths, with one function per module. `cargo bench --bench paths -- record`
//! runs one.

use criterion::{criterion_group, criterion_main};

mod log;
mod record;
mod tier;

criterion_group!(paths, record::record, log::log, tier::tier);
criterion_main!(paths);
