//! `strandline bench`: measures a cluster from the client's side.
//!
//! Payloads are incompressible slices of one random pool. With a rate, records are due at fixed times, and latency
//! counts from a record's due time. So a stall is charged to every record that it delayed (open loop). Without a rate,
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

use super::CommonArgs;

#[derive(Debug, Subcommand)]
pub(super) enum BenchCommand {
    /// Send records and measure throughput and the latency of acknowledgements
    Produce(produce::BenchProduceArgs),
    /// Read records and measure throughput; latency is the wait for each batch
    Consume(consume::BenchConsumeArgs),
    /// Measure the time from a record's due time, at the given rate, to its reading
    Latency(latency::BenchLatencyArgs),
}

pub(super) async fn run(common: &CommonArgs, command: BenchCommand) -> anyhow::Result<ExitCode> {
    match command {
        BenchCommand::Produce(command) => produce::run(common, command).await,
        BenchCommand::Consume(command) => consume::run(common, command).await,
        BenchCommand::Latency(command) => latency::run(common, command).await,
    }
}

/// Parses a rate in megabytes per second.
fn rate(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(rate) if rate > 0.0 && rate < 1e6 => Ok(rate),
        _ => Err("not a rate: write megabytes (10^6 bytes) per second, above 0".to_owned()),
    }
}
