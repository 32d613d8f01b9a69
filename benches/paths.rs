//! Benchmarks of the record, log and tier paths.

fn main() {}
