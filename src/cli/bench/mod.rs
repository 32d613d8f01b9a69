//! `strandline bench`: measures a cluster from the client's side.
//!
//! Payloads are incompressible slices of one random pool. With a rate, records are due at fixed times, and latency
//! counts from a record's due time: a stall is charged to every record that it delayed (open loop). Without a rate,
//! records are sent as fast as the cluster accepts them, and latency counts from the send.

mod consume;
mod disk;
mod latency;
mod pace;
mod payload;
mod produce;
mod report;

use std::process::ExitCode;

use clap::Subcommand;

use super::Common;

#[derive(Debug, Subcommand)]
pub(super) enum Bench {
    /// Send records and measure throughput and the latency of acknowledgements
    Produce(produce::Produce),
    /// Read records and measure throughput; latency is the wait for each batch
    Consume(consume::Consume),
    /// Measure the time from a record's sending to its reading
    Latency(latency::Latency),
}

pub(super) async fn run(common: &Common, command: Bench) -> anyhow::Result<ExitCode> {
    match command {
        Bench::Produce(command) => produce::run(common, command).await,
        Bench::Consume(command) => consume::run(common, command).await,
        Bench::Latency(command) => latency::run(common, command).await,
    }
}

/// Parses a rate in megabytes per second.
fn rate(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(rate) if rate > 0.0 && rate < 1e6 => Ok(rate),
        _ => Err("write a number of megabytes (10^6 bytes) per second above 0".to_owned()),
    }
}
