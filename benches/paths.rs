//! Benchmarks of the modules `record`, `log` and `tier`, with one group for each. `cargo bench --bench paths -- record`
//! runs one group.

use criterion::{criterion_group, criterion_main};

mod log;
mod record;
mod tier;

criterion_group!(paths, record::record, log::log, tier::tier);
criterion_main!(paths);
