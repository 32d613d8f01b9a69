//! `strandline produce`: sends one record per line.

use std::{
    collections::{BTreeMap, VecDeque},
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use anyhow::{Context as _, anyhow, bail};
use clap::Args;
use futures::FutureExt;
use indicatif::ProgressBar;
use serde_json::{Value, json};
use tokio::io::AsyncRead;

use super::{
    CommonArgs,
    connect::{connect, explain, explain_send},
    format_error,
    line_reader::LineReader,
    output::{self, OutputFormat},
    retry_output::RetryMonitor,
    separator::Separator,
    serve::stop_signal,
};
use crate::{
    client::{Ack, Client, Delivery, NewRecord, Producer, ProducerOptions, SendError},
    limits,
    model::{Acks, Compression, UnknownName},
};

/// Maximum number of unfinished deliveries. Above it, the command waits for the oldest one before it sends more.
const MAX_OUTSTANDING: usize = 100_000;

/// Maximum time that the command waits at its end for records in flight, as after a stop signal.
const LAST_ACKS_TIMEOUT: Duration = Duration::from_secs(5);

/// Maximum number of offset ranges that are printed for one partition.
const MAX_RANGES: usize = 8;

/// Send the lines of files or of standard input as records
///
/// Bytes are unchanged: a carriage return is kept, an empty line is an empty value, and the last line needs no line
/// end. Exits with code 0 only if every record was acknowledged. A problem that delays acknowledgements is printed on
/// standard error while the command retries. Partitions that are added to the topic are used within 5 seconds. Ctrl-C
/// and SIGTERM stop the command after its summary, with exit code 1.
#[derive(Debug, Args)]
pub(super) struct ProduceArgs {
    /// The topic
    topic: String,
    /// Files to read; standard input if none, or for `-`
    files: Vec<PathBuf>,
    /// Separator after the key, the first one in a line; a line without it has no key. Escapes: \t, \n, \r, \\, \xNN
    #[arg(long, value_name = "S")]
    key_separator: Option<Separator>,
    /// Partition; default: by the key's hash, or spread over all for records without a key
    #[arg(long, value_name = "N")]
    partition: Option<u32>,
    /// Acknowledge after: nothing, the leader, all in-sync replicas, or also the object store
    #[arg(long, value_name = "0|1|all|tiered", default_value = "all", value_parser = acks)]
    acks: Acks,
    /// Codec: none, gzip, snappy, lz4 or zstd
    #[arg(long, value_name = "CODEC", default_value = "none", value_parser = compression)]
    compression: Compression,
    /// Seconds until an unacknowledged record fails, retries included; default: 60, or 120 with --acks tiered
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=86_400))]
    timeout: Option<u64>,
}

pub(super) fn acks(text: &str) -> Result<Acks, String> {
    text.parse().map_err(|error: UnknownName| error.to_string())
}

pub(super) fn compression(text: &str) -> Result<Compression, String> {
    text.parse().map_err(|error: UnknownName| error.to_string())
}

/// Results of the records so far.
#[derive(Debug, Default)]
struct ProduceSummary {
    sent: u64,
    /// Acknowledged records; with `acks=0`, accepted records.
    acknowledged: u64,
    failed: u64,
    /// Number of lines that contain the separator, and so have a key.
    keyed: u64,
    first_failure: Option<SendError>,
    partitions: BTreeMap<u32, PartitionAcks>,
    /// Number of acknowledgements by meaning, such as `persisted on 1 replica`. There are several meanings if the ISR
    /// changed during the run.
    meanings: BTreeMap<String, u64>,
}

/// Acknowledged records of one partition and their offsets.
#[derive(Debug, Default)]
struct PartitionAcks {
    records: u64,
    /// Offset ranges in the order of sending, ends excluded. Consecutive offsets share a range.
    ranges: Vec<(u64, u64)>,
}

impl ProduceSummary {
    /// Counts the result of a delivery.
    fn count(&mut self, result: Result<Ack, SendError>) {
        let ack = match result {
            Ok(ack) => ack,
            Err(error) => {
                self.failed += 1;
                self.first_failure.get_or_insert(error);
                return;
            }
        };
        self.acknowledged += 1;
        *self.meanings.entry(ack.meaning()).or_default() += 1;
        let partition_acks = self.partitions.entry(ack.partition).or_default();
        partition_acks.records += 1;
        if let Some(offset) = ack.offset {
            partition_acks.add(offset.get());
        }
    }

    /// Joins the meanings of the acknowledgements. Several meanings read `A; some B`.
    fn meaning(&self) -> String {
        self.meanings.keys().cloned().collect::<Vec<_>>().join("; some ")
    }
}

impl PartitionAcks {
    /// Adds the offset of an acknowledged record.
    fn add(&mut self, offset: u64) {
        match self.ranges.last_mut() {
            Some((_, end)) if *end == offset => *end += 1,
            // After a gap, a new range starts: a retried batch may be acknowledged behind later batches.
            _ => self.ranges.push((offset, offset + 1)),
        }
    }

    /// Formats the offset ranges. With `acks=0` no offset is known.
    fn describe(&self) -> String {
        let shown: Vec<String> =
            self.ranges.iter().take(MAX_RANGES).map(|(start, end)| format!("{start}..{end}")).collect();
        let omitted = self.ranges.len().saturating_sub(MAX_RANGES);
        let tail = if omitted > 0 { format!(" and {omitted} more") } else { String::new() };
        if shown.is_empty() { "unknown with acks=0".to_owned() } else { shown.join(", ") + &tail }
    }
}

/// Unfinished deliveries in the order of sending, and the results of the finished ones.
#[derive(Default)]
struct Outstanding {
    deliveries: VecDeque<Delivery>,
    summary: ProduceSummary,
}

impl Outstanding {
    /// Adds a delivery. Counts finished deliveries, and waits while more than `MAX_OUTSTANDING` are unfinished.
    async fn push(&mut self, delivery: Delivery) {
        self.summary.sent += 1;
        self.deliveries.push_back(delivery);
        // Polling a delivery has a small cost, so it happens once per 64 records.
        if self.summary.sent.is_multiple_of(64) {
            while let Some(result) = self.deliveries.front_mut().and_then(FutureExt::now_or_never) {
                self.deliveries.pop_front();
                self.summary.count(result);
            }
        }
        while self.deliveries.len() > MAX_OUTSTANDING
            && let Some(delivery) = self.deliveries.front_mut()
        {
            let result = delivery.await;
            self.deliveries.pop_front();
            self.summary.count(result);
        }
    }

    /// Waits for every delivery and counts its result. Dropping the future loses no result.
    async fn finish(&mut self) {
        while let Some(delivery) = self.deliveries.front_mut() {
            let result = delivery.await;
            self.deliveries.pop_front();
            self.summary.count(result);
        }
    }

    /// Counts all unfinished deliveries as failed and drops them.
    fn count_abandoned(&mut self) {
        self.summary.failed += self.deliveries.len() as u64;
        self.deliveries.clear();
    }
}

/// Sends the records and prints the summary, also after a failure. Returns the error of the failure afterwards.
pub(super) async fn run(common: &CommonArgs, command: ProduceArgs) -> anyhow::Result<ExitCode> {
    let mut outstanding = Outstanding::default();
    let failure = produce(common, &command, &mut outstanding).await.err();
    let reported = report(&command, &outstanding.summary, failure.as_ref(), common.output);
    if let Some(hint) = missing_separator_hint(&command, &outstanding.summary) {
        eprintln!("{hint}");
    }
    // A closed standard output must not hide a failure.
    failure.map_or(reported, Err).map(|()| ExitCode::SUCCESS)
}

/// Sends all lines and waits for the results, which `outstanding` then holds. Records without a result count as failed.
///
/// # Errors
/// - An input cannot be read.
/// - No broker responds.
/// - The topic or partition does not exist.
/// - A record failed (the first one is named).
/// - A stop signal arrived.
async fn produce(common: &CommonArgs, command: &ProduceArgs, outstanding: &mut Outstanding) -> anyhow::Result<()> {
    // An unreadable file is reported before any record is sent.
    for file in command.files.iter().filter(|file| !is_stdin(file)) {
        std::fs::File::open(file).with_context(|| format!("cannot read {}", file.display()))?;
    }
    let mut stop = std::pin::pin!(stop_signal()?);
    let client = connect(common).await?;
    let mut monitor = RetryMonitor::new(&client);
    let bar = output::progress(None, "{spinner} {human_pos} records sent, {per_sec}");
    monitor.set_bar(&bar);
    let producer = tokio::select! {
        biased;
        () = &mut stop => bail!("interrupted by a signal"),
        started = monitor.run_with_retry_output(None, start(&client, command)) => started?,
    };
    let sent = tokio::select! {
        biased;
        () = &mut stop => Err(anyhow!("interrupted by a signal")),
        sent = monitor.run_with_retry_output(None, send_all(command, &producer, outstanding, &bar)) => {
            tokio::select! {
                biased;
                () = &mut stop => sent.and(Err(anyhow!("interrupted by a signal"))),
                finished = monitor.run_with_retry_output(None, finish(&producer, outstanding)) => sent.and(finished),
            }
        }
    };
    // After a stop signal, most records in flight are acknowledged within a moment, so the summary waits briefly.
    let _timed_out = tokio::time::timeout(LAST_ACKS_TIMEOUT, finish(&producer, outstanding)).await;
    outstanding.count_abandoned();
    bar.finish_and_clear();
    let admin = client.admin();
    let topic = command.topic.as_str();
    match (sent, outstanding.summary.first_failure.take()) {
        (Err(error), _) => match error.downcast_ref() {
            Some(SendError::Lookup(lookup)) => Err(explain(&admin, topic, lookup.clone()).await),
            _ => Err(error),
        },
        (Ok(()), Some(error)) => Err(explain_send(&admin, topic, error).await),
        (Ok(()), None) => Ok(()),
    }
}

/// Checks that the topic and the partition exist, and returns a producer.
async fn start(client: &Client, command: &ProduceArgs) -> anyhow::Result<Producer> {
    let topic = command.topic.as_str();
    let route = match client.topic(topic).await {
        Ok(route) => route,
        Err(error) => return Err(explain(&client.admin(), topic, error).await),
    };
    let partitions = u32::try_from(route.partitions.len())?;
    if let Some(partition) = command.partition.filter(|partition| *partition >= partitions) {
        return Err(SendError::UnknownPartition { topic: topic.to_owned(), partition, partitions }.into());
    }
    let options = ProducerOptions {
        acks: command.acks,
        compression: command.compression,
        // The linger is long enough for the next read of a pipe, and too short for a user to notice.
        linger: Duration::from_millis(5),
        delivery_timeout: command.timeout.map_or_else(|| default_delivery_timeout(command.acks), Duration::from_secs),
        ..ProducerOptions::default()
    };
    Ok(client.producer(options).await?)
}

/// Returns the default delivery timeout of a record. A commit to the object store takes longer.
pub(super) fn default_delivery_timeout(acks: Acks) -> Duration {
    Duration::from_secs(if acks == Acks::Tiered { 120 } else { 60 })
}

/// Flushes the producer and waits for all deliveries.
async fn finish(producer: &Producer, outstanding: &mut Outstanding) -> anyhow::Result<()> {
    let _ = tokio::join!(producer.flush(), outstanding.finish());
    Ok(())
}

fn is_stdin(file: &Path) -> bool {
    file.as_os_str() == "-"
}

/// Sends the lines of all inputs. After the first failed delivery, sends only the first line of each further input, and
/// returns no error.
async fn send_all(
    command: &ProduceArgs,
    producer: &Producer,
    outstanding: &mut Outstanding,
    bar: &ProgressBar,
) -> anyhow::Result<()> {
    if command.files.is_empty() {
        return send_lines(command, "standard input", tokio::io::stdin(), producer, outstanding, bar).await;
    }
    for file in &command.files {
        if is_stdin(file) {
            send_lines(command, "standard input", tokio::io::stdin(), producer, outstanding, bar).await?;
        } else {
            let name = file.display().to_string();
            let input = tokio::fs::File::open(file).await.with_context(|| format!("cannot read {name}"))?;
            send_lines(command, &name, input, producer, outstanding, bar).await?;
        }
    }
    Ok(())
}

/// Sends the lines of one input; `name` names the input in errors. Returns early, without an error, after the first
/// failed delivery: the summary holds its error.
async fn send_lines(
    command: &ProduceArgs,
    name: &str,
    input: impl AsyncRead + Unpin,
    producer: &Producer,
    outstanding: &mut Outstanding,
    bar: &ProgressBar,
) -> anyhow::Result<()> {
    let mut lines = LineReader::new(input, limits::MAX_BATCH_BYTES);
    while let Some(line) = lines.next().await.with_context(|| format!("cannot read {name}"))? {
        let (record, is_keyed) = record(line, command);
        outstanding.summary.keyed += u64::from(is_keyed);
        let sent = producer.send(&command.topic, record).await;
        let number = lines.number;
        if sent.is_err() {
            outstanding.summary.sent += 1;
            outstanding.summary.failed += 1;
        }
        let delivery = sent.with_context(|| format!("{name}, line {number}"))?;
        outstanding.push(delivery).await;
        bar.inc(1);
        if outstanding.summary.first_failure.is_some() {
            // No further record of this input is sent after a known failure. The summary holds the error.
            return Ok(());
        }
    }
    Ok(())
}

/// Returns the record of a line, and true if the line contains the separator.
fn record<'a>(line: &'a [u8], command: &ProduceArgs) -> (NewRecord<'a>, bool) {
    let split = command.key_separator.as_ref().and_then(|separator| separator.split(line));
    let record = match split {
        Some((key, value)) => NewRecord::value(value).key(key),
        None => NewRecord::value(line),
    };
    let record = match command.partition {
        Some(partition) => record.partition(partition),
        None => record,
    };
    (record, split.is_some())
}

/// Returns a hint if the option set a separator and no line contains it.
fn missing_separator_hint(command: &ProduceArgs, summary: &ProduceSummary) -> Option<String> {
    let separator = command.key_separator.as_ref().filter(|_| summary.sent > 0 && summary.keyed == 0)?;
    let lines = if summary.sent == 1 { "the line".to_owned() } else { format!("any of the {} lines", summary.sent) };
    Some(format!(
        "hint: the separator \"{separator}\" was not in {lines}, so no record has a key: give the separator of the input to \
         --key-separator, or omit the option"
    ))
}

/// Prints the summary. A failure before the first record prints nothing: the error message suffices.
fn report(
    command: &ProduceArgs,
    summary: &ProduceSummary,
    failure: Option<&anyhow::Error>,
    output: OutputFormat,
) -> anyhow::Result<()> {
    if output == OutputFormat::Json {
        return Ok(output::json(&summary_json(command, summary, failure))?);
    }
    match (summary.sent, failure) {
        (0, Some(_)) => return Ok(()),
        (0, None) => return Ok(output::line(&format!("no records were sent to {}", command.topic))?),
        _ => {}
    }
    let meaning = if summary.acknowledged == 0 { String::new() } else { format!(": {}", summary.meaning()) };
    let records = if summary.sent == 1 { "record" } else { "records" };
    let verb = verb(command.acks);
    output::line(&format!(
        "{verb} {} of {} {records} in {}{meaning}",
        summary.acknowledged, summary.sent, command.topic
    ))?;
    for (partition, partition_acks) in &summary.partitions {
        let records = if partition_acks.records == 1 { "record" } else { "records" };
        output::line(&format!(
            "  partition {partition}: {} {records}, offsets {}",
            partition_acks.records,
            partition_acks.describe()
        ))?;
    }
    Ok(())
}

/// Returns the verb for records that were delivered. With `acks=0`, a record is only accepted.
fn verb(acks: Acks) -> &'static str {
    if acks == Acks::None { "accepted" } else { "acknowledged" }
}

/// Returns the summary as JSON.
fn summary_json(command: &ProduceArgs, summary: &ProduceSummary, failure: Option<&anyhow::Error>) -> Value {
    let partition = |(partition, partition_acks): (&u32, &PartitionAcks)| {
        let ranges: Vec<Value> = partition_acks.ranges.iter().map(|(start, end)| json!([start, end])).collect();
        json!({ "partition": partition, "records": partition_acks.records, "offsets": ranges })
    };
    json!({
        "topic": command.topic,
        "sent": summary.sent,
        (verb(command.acks)): summary.acknowledged,
        "failed": summary.failed,
        "acks": command.acks.as_str(),
        "meaning": summary.meaning(),
        "partitions": summary.partitions.iter().map(partition).collect::<Vec<_>>(),
        "error": failure.map(format_error),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{AckDurability, LeaderEpoch, Offset};

    fn ack(partition: u32, offset: u64) -> Result<Ack, SendError> {
        let offset = Offset::new(offset);
        Ok(Ack {
            partition,
            offset,
            base_offset: offset,
            count: 1,
            leader_epoch: LeaderEpoch(0),
            append_time_ms: None,
            durability: AckDurability::Persisted(1),
            duplicate: false,
            received: crate::task::clock::monotonic(),
        })
    }

    #[tokio::test]
    async fn summary_contains_counts_offsets_and_ack_meaning() {
        let mut summary = ProduceSummary::default();
        for (partition, offset) in [(0, 5), (0, 6), (1, 0), (0, 9)] {
            summary.count(ack(partition, offset));
        }
        summary.count(Err(SendError::Closed));
        assert_eq!((summary.acknowledged, summary.failed), (4, 1));
        assert_eq!(summary.partitions[&0].describe(), "5..7, 9..10");
        assert_eq!(summary.partitions[&1].describe(), "0..1");
        assert_eq!(summary.meaning(), "persisted on 1 replica");
    }
}
