//! `strandline bench latency`: measures the time between the due time of a record and its read.

use std::{process::ExitCode, time::Duration};

use clap::Args;
use serde_json::json;
use tokio::{sync::watch, time::Instant};

use super::{
    super::{
        CommonArgs,
        connect::{connect, explain},
        output, produce,
        retry_output::RetryMonitor,
    },
    pace::{OpenLoop, SendAt, StopAfter, wait_until},
    payload::PayloadPool,
    rate,
    report::{self, BenchStats},
};
use crate::{
    client::{Consumer, ConsumerOptions, NewRecord, OffsetSpec, Producer, ProducerOptions},
    model::Acks,
    task::{Tasks, clock, random},
};

/// Size in bytes of the stamp that starts a payload. The stamp is an id of the run (8 bytes), and the nanoseconds from
/// the run's start to the record's due time.
const STAMP_BYTES: usize = 16;

/// Maximum time until the sent records are read, after the last one was sent.
const DELIVERY_TIMEOUT: Duration = Duration::from_secs(10);

#[derive(Debug, Args)]
pub(in crate::cli) struct BenchLatencyArgs {
    /// The topic; it must exist
    #[arg(long, value_name = "T")]
    topic: String,
    /// Megabytes (10^6 bytes) per second
    #[arg(long, value_name = "MB_PER_S", default_value = "1", value_parser = rate)]
    rate: f64,
    /// Seconds for which records are sent
    #[arg(long, value_name = "S", default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..))]
    seconds: u64,
    /// Size of a record's value in bytes
    #[arg(long, value_name = "B", default_value_t = 1024, value_parser = clap::value_parser!(u32).range(16..))]
    record_size: u32,
}

/// Sends and reads records at the same time, and prints the latencies. The exit code is 1 if any record is missing, if
/// a send or read failed, or if no record was read.
pub(super) async fn run(common: &CommonArgs, command: BenchLatencyArgs) -> anyhow::Result<ExitCode> {
    let client = connect(common).await?;
    let topic = command.topic.clone();
    let partitions = match client.topic(&topic).await {
        Ok(route) => u32::try_from(route.partitions.len())?,
        Err(error) => return Err(explain(&client.admin(), &topic, error).await),
    };
    // The reader has its own connection, so that reads do not queue behind writes.
    let reader_client = connect(common).await?;
    let mut consumer = reader_client.consumer(ConsumerOptions::default());
    for partition in 0..partitions {
        consumer.assign(&topic, partition, OffsetSpec::Latest).await?;
    }
    let options = ProducerOptions {
        delivery_timeout: produce::default_delivery_timeout(Acks::All),
        ..ProducerOptions::default()
    };
    let producer = client.producer(options).await?;
    let size = usize::try_from(command.record_size)?;
    // The pool is filled before the measurement starts, because this takes a moment.
    let payloads = PayloadPool::new(size);
    let tasks = Tasks::new();
    let start = clock::monotonic();
    let run_id = random::bits();
    let bar = output::progress(None, "{spinner} {elapsed} sending and reading");
    bar.enable_steady_tick(Duration::from_millis(200));
    let (total_sender, total) = watch::channel(None);
    let reader = tasks.spawn("bench-reader", read(consumer, run_id, start, total));
    let pace = OpenLoop::new(
        start,
        Some(command.rate * 1e6),
        command.record_size,
        StopAfter::After(Duration::from_secs(command.seconds)),
    );
    let load = LatencyLoad { topic, pace, payloads, size, run_id, start, partitions };
    let runtime = tokio::runtime::Handle::current();
    // The sender has its own thread, because it sleeps between records.
    let sender = tasks.spawn_blocking(move || runtime.block_on(Box::pin(load.send(producer))));
    let mut monitor = RetryMonitor::new(&client);
    monitor.add_client(&reader_client);
    monitor.set_bar(&bar);
    let (sent, error, elapsed, mut stats) = monitor
        .run_with_retry_output(None, async {
            let (sent, error) = sender.await?;
            let elapsed = start.elapsed();
            total_sender.send_replace(Some(sent));
            Ok((sent, error, elapsed, reader.await?))
        })
        .await?;
    bar.finish_and_clear();
    tasks.stop().await;
    if let Some(error) = error {
        stats.add_error(&error);
    }
    let missing = sent.saturating_sub(stats.records);
    if missing > 0 {
        stats.add_error(&format!("{missing} of {sent} records were not read back within {DELIVERY_TIMEOUT:?}"));
    }
    let notes: Vec<String> = stats.first_error.iter().map(|error| format!("first error: {error}")).collect();
    let extra = json!({ "sent": sent, "first_error": stats.first_error });
    report::print(stats.result_json(elapsed), extra, &notes, common.output)?;
    Ok(if stats.errors == 0 && stats.records > 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Reads this run's records until all sent records have arrived, or for `DELIVERY_TIMEOUT` after the last send. `total`
/// is the number of sent records, `None` until the last record is sent.
async fn read(
    mut consumer: Consumer,
    run_id: u64,
    start: Instant,
    mut total: watch::Receiver<Option<u64>>,
) -> BenchStats {
    let mut stats = BenchStats::default();
    let mut deadline = None;
    while total.borrow().is_none_or(|total| stats.records < total) {
        let timed_out = async {
            match deadline {
                Some(at) => tokio::time::sleep_until(at).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            next = consumer.next() => match next {
                Ok(record) => {
                    let now = clock::monotonic();
                    let value = record.record.value.unwrap_or_default();
                    if let Some(due) = parse_stamp(&value, run_id) {
                        stats.records += 1;
                        stats.bytes += u64::try_from(value.len()).expect("64 bits");
                        stats.add_latency(now.saturating_duration_since(start + due));
                    }
                }
                Err(error) => {
                    stats.add_error(&error);
                    break;
                }
            },
            _ = total.changed(), if deadline.is_none() => deadline = Some(clock::monotonic() + DELIVERY_TIMEOUT),
            () = timed_out => break,
        }
    }
    consumer.close().await;
    stats
}

/// Writes the run id and the record's due time into the first `STAMP_BYTES` of a payload.
fn write_stamp(payload: &mut [u8], run_id: u64, due: Duration) {
    payload[..8].copy_from_slice(&run_id.to_be_bytes());
    payload[8..STAMP_BYTES].copy_from_slice(&u64::try_from(due.as_nanos()).unwrap_or(u64::MAX).to_be_bytes());
}

/// Returns the due time in a payload's stamp, measured from the run's start; `None` for a record of another run.
fn parse_stamp(payload: &[u8], run_id: u64) -> Option<Duration> {
    let (id, rest) = payload.split_first_chunk::<8>()?;
    let (due, _) = rest.split_first_chunk::<8>()?;
    (*id == run_id.to_be_bytes()).then(|| Duration::from_nanos(u64::from_be_bytes(*due)))
}

/// Records to send: their pace and content, and the stamp's run id and start.
struct LatencyLoad {
    topic: String,
    pace: OpenLoop,
    payloads: PayloadPool,
    size: usize,
    run_id: u64,
    start: Instant,
    partitions: u32,
}

impl LatencyLoad {
    /// Sends until the pace ends or a send fails. Returns the number of sent records, and the error of the failed send
    /// or of the producer's close.
    async fn send(mut self, producer: Producer) -> (u64, Option<String>) {
        let mut payload = vec![0; self.size];
        let mut sent = 0;
        while let Some(due) = self.pace.due(sent) {
            // The pace has a rate, so every record has a due time.
            let SendAt::At(at) = due else { break };
            wait_until(at);
            payload.copy_from_slice(self.payloads.next());
            write_stamp(&mut payload, self.run_id, at - self.start);
            let partition = u32::try_from(sent % u64::from(self.partitions)).expect("below a u32");
            if let Err(error) = producer.send(&self.topic, NewRecord::value(&payload).partition(partition)).await {
                return (sent, Some(error.to_string()));
            }
            sent += 1;
        }
        (sent, producer.close().await.err().map(|error| error.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn record_of_another_run_is_not_counted() {
        let mut payload = [0; 40];
        write_stamp(&mut payload, 7, Duration::from_millis(3));
        assert_eq!(parse_stamp(&payload, 7), Some(Duration::from_millis(3)));
        assert_eq!(parse_stamp(&payload, 8), None);
        assert_eq!(parse_stamp(&payload[..15], 7), None);
    }
}
