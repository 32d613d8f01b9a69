//! Benchmarks of the record, log and tier paths. One function per room; `cargo bench --bench paths -- record` runs one.

use criterion::{criterion_group, criterion_main};

mod record;
mod tier;

criterion_group!(paths, record::record, tier::tier);
criterion_main!(paths);
