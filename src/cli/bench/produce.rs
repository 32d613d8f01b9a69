//! `strandline bench produce`: measures the throughput of writes and the latency of acknowledgements.

use std::{path::PathBuf, process::ExitCode, time::Duration};

use anyhow::{Context as _, bail};
use clap::Args;
use serde_json::{Value, json};
use tokio::{sync::mpsc, time::Instant};

use super::{
    super::{
        CommonArgs,
        connect::{connect, explain},
        output, produce,
        retry_output::RetryMonitor,
    },
    disk,
    pace::{OpenLoop, SendAt, StopAfter, wait_until},
    payload::PayloadPool,
    rate,
    report::{self, BenchStats},
};
use crate::{
    client::{Delivery, NewRecord, Producer, ProducerOptions, SendError},
    model::{Acks, Compression},
    task::{self, Tasks, clock},
};

/// `limits::MAX_BATCH_BYTES` in the type that the parser needs.
const MAX_BATCH_BYTES: i64 = crate::limits::MAX_BATCH_BYTES as i64;

/// Minimum and maximum of a producer's memory in bytes. Large batches raise the maximum to 16 batches.
const MIN_MEMORY_BYTES: usize = 64 << 10;
const MAX_MEMORY_BYTES: usize = 64 << 20;

/// Maximum size in bytes of a record without its value.
const RECORD_OVERHEAD: usize = 100;

/// Number of deliveries in one message from a sender to the task that awaits them.
const RECORDS_PER_CHANNEL_ITEM: usize = 64;

#[derive(Debug, Args)]
pub(in crate::cli) struct BenchProduceArgs {
    /// The topic; it must exist
    #[arg(long, value_name = "T")]
    topic: String,
    /// Stop after this many records
    #[arg(long, value_name = "N", conflicts_with = "seconds", value_parser = clap::value_parser!(u64).range(1..))]
    records: Option<u64>,
    /// Stop after this many seconds; default: 10 without --records. With --rate, results cover the whole time
    #[arg(long, value_name = "S", value_parser = clap::value_parser!(u64).range(1..))]
    seconds: Option<u64>,
    /// Size of a record's value in bytes
    #[arg(long, value_name = "B", default_value_t = 1024)]
    record_size: u32,
    /// Use the first N partitions; default: all
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    partitions_used: Option<u32>,
    /// Megabytes (10^6 bytes) per second of all producers, sent at fixed times; default: no limit
    #[arg(long, value_name = "MB_PER_S", value_parser = rate)]
    rate: Option<f64>,
    /// Acknowledge after: nothing, the leader, all in-sync replicas, or also the object store
    #[arg(long, value_name = "0|1|all|tiered", default_value = "all", value_parser = produce::acks)]
    acks: Acks,
    /// Codec: none, gzip, snappy, lz4 or zstd
    #[arg(long, value_name = "CODEC", default_value = "none", value_parser = produce::compression)]
    compression: Compression,
    /// Batch size in bytes, at most 67108864; a lower max.message.bytes of the topic applies instead
    #[arg(long, value_name = "B", default_value_t = 65536, value_parser = clap::value_parser!(u32).range(1..=MAX_BATCH_BYTES))]
    batch_size: u32,
    /// Milliseconds for which a batch waits for more records
    #[arg(long, value_name = "L", default_value_t = 0)]
    linger_ms: u64,
    /// Maximum number of batches in flight for each partition of a producer
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = clap::value_parser!(u8).range(1..=64))]
    in_flight: u8,
    /// Number of producers; each has its own connection and a share of the partitions
    #[arg(long, value_name = "P", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1000))]
    producers: u32,
    /// Also measure the disk alone, with synced writes of the batch size
    #[arg(long)]
    with_disk: bool,
    /// Directory for the disk measurement
    #[arg(long, value_name = "DIR", default_value = ".")]
    disk_dir: PathBuf,
}

/// Sends records with all producers, and prints throughput and latencies. The exit code is 1 if any record failed or
/// none was acknowledged.
pub(super) async fn run(common: &CommonArgs, command: BenchProduceArgs) -> anyhow::Result<ExitCode> {
    let client = connect(common).await?;
    let partitions = match client.topic(&command.topic).await {
        Ok(route) => u32::try_from(route.partitions.len())?,
        Err(error) => return Err(explain(&client.admin(), &command.topic, error).await),
    };
    let used = command.partitions_used.unwrap_or(partitions);
    if used > partitions {
        bail!(
            "topic {:?} has {}, fewer than {used}; add some with `strandline topic add-partitions {} --partitions \
             {used}`",
            command.topic,
            output::count(partitions.into(), "partition"),
            command.topic
        );
    }
    let disk = if command.with_disk { Some(command.measure_disk().await?) } else { None };
    let tasks = Tasks::new();
    let mut monitor = RetryMonitor::new(&client);
    let mut producers = Vec::new();
    for number in 0..command.producers {
        // Each producer has its own client, and thus its own connection.
        let client = connect(common).await?;
        monitor.add_client(&client);
        let producer = client.producer(options(&command, command.share(number, used))).await?;
        // The pool is filled before the measurement starts, because this takes a moment.
        let payloads = PayloadPool::new(usize::try_from(command.record_size)?);
        producers.push((number, producer, payloads));
    }
    let start = clock::monotonic();
    let bar = output::progress(None, "{spinner} {elapsed} sending");
    bar.enable_steady_tick(Duration::from_millis(200));
    monitor.set_bar(&bar);
    let mut handles = Vec::new();
    for (number, producer, payloads) in producers {
        let (out, deliveries) = mpsc::channel(1024);
        let sender = BenchSender::new(&command, number, used, start, (producer, payloads), out);
        handles.push(tasks.spawn("bench-acks", collect(deliveries, u64::from(command.record_size))));
        let runtime = tokio::runtime::Handle::current();
        // Records with fixed due times need a thread that sleeps precisely. Other senders run on the runtime.
        if command.rate.is_some() {
            tasks.spawn_blocking(move || runtime.block_on(Box::pin(sender.run())));
        } else {
            tasks.spawn("bench-sender", sender.run());
        }
    }
    let mut stats = BenchStats::default();
    let mut last_ack = start;
    let wait_for_acks = async {
        for handle in handles {
            let (producer_stats, producer_last_ack) = handle.await?;
            stats.merge(producer_stats);
            last_ack = last_ack.max(producer_last_ack);
        }
        Ok(())
    };
    monitor.run_with_retry_output(None, wait_for_acks).await?;
    bar.finish_and_clear();
    tasks.stop().await;
    // With a rate and a duration, the run lasts at least that duration: early acknowledgements do not raise the
    // throughput.
    let min_elapsed = match (command.rate, command.records) {
        (Some(_), None) => command.period(),
        _ => Duration::ZERO,
    };
    print(&command, &stats, (last_ack - start).max(min_elapsed), disk, common)
}

impl BenchProduceArgs {
    /// Returns the duration of a run without a record count.
    fn period(&self) -> Duration {
        Duration::from_secs(self.seconds.unwrap_or(10))
    }

    /// Measures the disk alone, with synced writes of the batch size.
    async fn measure_disk(&self) -> anyhow::Result<Value> {
        let (folder, write_bytes) = (self.disk_dir.clone(), self.batch_bytes());
        let measured = task::run_blocking(move || disk::measure(&folder, write_bytes)).await;
        measured.with_context(|| format!("cannot measure the disk at {}", self.disk_dir.display()))
    }

    /// Returns `--batch-size` as a `usize`.
    fn batch_bytes(&self) -> usize {
        usize::try_from(self.batch_size).expect("a usize holds 32 bits")
    }

    /// Returns the number of used partitions that this producer writes to. With more producers than partitions, several
    /// producers write to one partition.
    fn share(&self, number: u32, used: u32) -> u32 {
        used.saturating_sub(number).div_ceil(self.producers).max(1)
    }

    /// Returns the memory of a producer in bytes. Without a rate, the memory holds the batches in flight and the same
    /// number of batches that are being filled. More memory would only lengthen the queue, whose delay would dominate
    /// the latencies. With a rate, the queue is part of the measurement.
    fn memory_bytes(&self, partitions: u32) -> usize {
        // A record that is larger than a batch forms its own batch.
        let record = usize::try_from(self.record_size).expect("a usize holds 32 bits") + RECORD_OVERHEAD;
        let batch = self.batch_bytes().max(record);
        let max_bytes = MAX_MEMORY_BYTES.max(16 * batch);
        if self.rate.is_some() {
            return max_bytes;
        }
        let partitions = usize::try_from(partitions).expect("a usize holds 32 bits");
        (2 * usize::from(self.in_flight) * partitions).saturating_mul(batch).clamp(MIN_MEMORY_BYTES, max_bytes)
    }
}

/// Returns the options of one producer that writes to this number of partitions.
fn options(command: &BenchProduceArgs, partitions: u32) -> ProducerOptions {
    ProducerOptions {
        batch_bytes: command.batch_bytes(),
        linger: Duration::from_millis(command.linger_ms),
        in_flight: usize::from(command.in_flight),
        acks: command.acks,
        compression: command.compression,
        memory_bytes: command.memory_bytes(partitions),
        delivery_timeout: produce::default_delivery_timeout(command.acks),
        ..ProducerOptions::default()
    }
}

/// Prints the results, and returns the exit code.
fn print(
    command: &BenchProduceArgs,
    stats: &BenchStats,
    elapsed: Duration,
    disk: Option<Value>,
    common: &CommonArgs,
) -> anyhow::Result<ExitCode> {
    let mut notes = Vec::new();
    if !stats.meanings.is_empty() {
        notes.push(format!("acks={}: each acknowledged record was {}", command.acks, stats.meaning()));
    }
    notes.extend(stats.first_error.iter().map(|error| format!("first error: {error}")));
    if stats.records == 0 {
        notes.push("no record was acknowledged: these results are meaningless".to_owned());
    }
    notes.extend(disk.as_ref().map(disk::describe));
    let mut extra =
        json!({ "acks": command.acks.as_str(), "meaning": stats.meaning(), "first_error": stats.first_error });
    if let Some(disk) = disk {
        extra["disk"] = disk;
    }
    report::print(stats.result_json(elapsed), extra, &notes, common.output)?;
    Ok(if stats.errors == 0 && stats.records > 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// A sent record: the time at which the record was due or sent, and its delivery.
type SentRecord = (Instant, Result<Delivery, SendError>);

/// One producer of the benchmark with its pace and its partitions.
struct BenchSender {
    topic: String,
    producer: Producer,
    pace: OpenLoop,
    payloads: PayloadPool,
    /// First of this producer's partitions. The numbers of the others follow at distances of `step`.
    first_partition: u32,
    step: u32,
    /// Number of this producer's partitions.
    partitions: u32,
    /// Number of consecutive records for one partition before the next one: those of one batch, or 1 with a rate.
    records_per_partition: u64,
    out: mpsc::Sender<Vec<SentRecord>>,
}

impl BenchSender {
    /// Creates the sender with this `number`, from 0. Rate and record count of the command are divided among all
    /// senders. `used` is the number of used partitions of the topic.
    fn new(
        command: &BenchProduceArgs,
        number: u32,
        used: u32,
        start: Instant,
        (producer, payloads): (Producer, PayloadPool),
        out: mpsc::Sender<Vec<SentRecord>>,
    ) -> Self {
        let until = match command.records {
            Some(records) => {
                let (share, rest) = (records / u64::from(command.producers), records % u64::from(command.producers));
                StopAfter::Records(share + u64::from(u64::from(number) < rest))
            }
            None => StopAfter::After(command.period()),
        };
        let rate = command.rate.map(|rate| rate * 1e6 / f64::from(command.producers));
        let size = usize::try_from(command.record_size).expect("a usize holds 32 bits");
        // With a rate, each record goes to the next partition, so that all partitions are always in use.
        let records_per_partition = if rate.is_some() { 1 } else { command.batch_bytes() / (size + 16).max(1) };
        Self {
            topic: command.topic.clone(),
            producer,
            pace: OpenLoop::new(start, rate, command.record_size.max(1), until),
            payloads,
            first_partition: number % used,
            step: command.producers,
            partitions: command.share(number, used),
            records_per_partition: u64::try_from(records_per_partition.max(1)).expect("64 bits"),
            out,
        }
    }

    /// Sends records until the pace ends or a send fails, and passes each delivery to [`collect`]. With a rate and a
    /// duration, returns only at the end of the duration.
    async fn run(mut self) {
        let mut sent = Vec::with_capacity(RECORDS_PER_CHANNEL_ITEM);
        let (mut n, mut is_failed) = (0, false);
        while let Some(due) = self.pace.due(n) {
            let at = match due {
                SendAt::At(at) => {
                    wait_until(at);
                    at
                }
                SendAt::Now => clock::monotonic(),
            };
            let index =
                u32::try_from(n / self.records_per_partition % u64::from(self.partitions)).expect("below a u32");
            let partition = self.first_partition + index * self.step;
            let record = NewRecord::value(self.payloads.next()).partition(partition);
            let delivery = self.producer.send(&self.topic, record).await;
            let send_failed = delivery.is_err();
            sent.push((at, delivery));
            n += 1;
            if sent.len() == RECORDS_PER_CHANNEL_ITEM || send_failed {
                let full = std::mem::replace(&mut sent, Vec::with_capacity(RECORDS_PER_CHANNEL_ITEM));
                if self.out.send(full).await.is_err() {
                    return;
                }
            }
            if send_failed {
                is_failed = true;
                // `send` itself returns an error only if the next send would fail as well.
                break;
            }
        }
        let _ = self.out.send(sent).await;
        if let Some(end) = self.pace.end_time().filter(|_| !is_failed) {
            wait_until(end);
        }
        // The close sends the records that still linger. `collect` receives all results.
        let _ = self.producer.close().await;
    }
}

/// Waits for all deliveries, and returns their statistics and the time of the last acknowledgement.
async fn collect(mut deliveries: mpsc::Receiver<Vec<SentRecord>>, record_bytes: u64) -> (BenchStats, Instant) {
    let mut stats = BenchStats::default();
    let mut last_ack = clock::monotonic();
    let mut meanings = Vec::new();
    while let Some(sent) = deliveries.recv().await {
        for (at, delivery) in sent {
            let result = match delivery {
                Ok(delivery) => delivery.await,
                Err(error) => Err(error),
            };
            match result {
                Ok(ack) => {
                    stats.records += 1;
                    stats.bytes += record_bytes;
                    // An acknowledgement contains its arrival time, so waiting in order costs no accuracy.
                    stats.add_latency(ack.received.saturating_duration_since(at));
                    last_ack = last_ack.max(ack.received);
                    // A run has one or two meanings; the text of each is formatted once.
                    if !meanings.contains(&ack.durability) {
                        meanings.push(ack.durability);
                        stats.meanings.insert(ack.meaning());
                    }
                }
                Err(error) => stats.add_error(&error),
            }
        }
    }
    (stats, last_ack)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(clap::Parser)]
    struct CommandLine {
        #[command(flatten)]
        produce: BenchProduceArgs,
    }

    fn parsed(arguments: &str) -> BenchProduceArgs {
        let command_line = ["bench", "--topic", "t"].into_iter().chain(arguments.split_whitespace());
        <CommandLine as clap::Parser>::try_parse_from(command_line).expect("valid").produce
    }

    #[test]
    fn every_used_partition_has_a_producer() {
        for (producers, used) in [(1, 1), (1, 1000), (3, 16), (16, 16), (16, 5), (5, 16)] {
            let command = parsed(&format!("--producers {producers}"));
            let partitions_of =
                |number: u32| (0..command.share(number, used)).map(move |index| number % used + index * producers);
            let mut written: Vec<u32> = (0..producers).flat_map(partitions_of).collect();
            written.sort_unstable();
            let each_once = used >= producers;
            assert_eq!(written.len(), if each_once { used as usize } else { producers as usize });
            written.dedup();
            assert!(written.into_iter().eq(0..used), "{producers} producers, {used} partitions");
        }
    }

    #[test]
    fn memory_is_twice_the_in_flight_bytes_without_a_rate() {
        let memory = |arguments, partitions| parsed(arguments).memory_bytes(partitions);
        assert_eq!(memory("--in-flight 1", 1), 128 << 10);
        assert_eq!(memory("--in-flight 4", 16), 8 << 20);
        assert_eq!(memory("", 1000), MAX_MEMORY_BYTES);
        assert_eq!(memory("--rate 10", 1), MAX_MEMORY_BYTES);
        let large = memory("--in-flight 16 --record-size 1048576", 1);
        assert!(large >= 32 << 20, "{large}: a large record is a batch of its own");
    }
}
