//! The only integration test binary: real processes, real files, real HTTP.
//!
//! There is only one binary because linking takes most of the build time. Most modules test one subject. The others
//! serve the tests. For example, `broker` starts and kills processes, `test_timeout` waits for conditions, `wire` sends
//! raw gRPC, and `history` checks what clients observed.

mod architecture;
mod broker;
mod cluster;
mod connection_limits;
mod corruption;
mod crash;
mod crash_client;
mod deletion;
mod docs;
mod edge;
mod end_to_end;
#[path = "../common/etcd.rs"]
mod etcd;
mod format;
mod full_disk;
mod fuzz;
#[path = "../common/history.rs"]
mod history;
mod hostile;
mod journal_loss;
mod kafka_reader;
mod manifest;
mod metrics;
mod names;
mod operations;
mod outage;
#[path = "../common/ports.rs"]
mod ports;
mod private;
mod producers;
mod protoc;
mod proxy;
mod python;
mod retention;
mod running;
mod test_timeout;
// The attribute is for clippy, which permits `unwrap` in code that is compiled only for tests.
#[cfg(test)]
mod s3;
mod skipped;
mod source;
mod stop;
mod streams;
mod terminal;
mod undecodable;
mod waiting;
mod wire;
