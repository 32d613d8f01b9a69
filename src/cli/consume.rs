//! `strandline consume`: prints records.

use std::{
    cell::Cell,
    collections::BTreeMap,
    io::{self, BufWriter, IsTerminal as _, Write as _},
    pin::pin,
    process::ExitCode,
    time::Duration,
};

use anyhow::bail;
use clap::Args;

use super::{
    CommonArgs,
    connect::{METADATA_REFRESH_INTERVAL, connect, explain, explain_read},
    format::{Printer, RecordFormat},
    output::{self, OutputFormat},
    rack::RackArgs,
    retry_output::{ExpectedWork, RetryMonitor},
    serve::stop_signal,
    start_position::StartPosition,
};
use crate::{
    client::{Admin, Client, ConsumeError, ConsumedRecord, Consumer, ConsumerOptions, OffsetSpec, OnUndecodable},
    model::Offset,
};

/// Size of the output buffer in bytes. The buffer is flushed before a wait for records.
const BUFFER_BYTES: usize = 64 << 10;

/// Print records
///
/// Waits for new records; --until-end and --max-records end the command, and so do Ctrl-C and SIGTERM, with exit code
/// 0. Without --partition and --until-end, partitions that are added to the topic are read from their start, within 5
/// seconds. A problem that delays reading is printed on standard error while the command retries. On a terminal,
/// control characters of records, except tab and line end, are printed as escapes such as \x1b. So are characters that
/// change the direction of text.
#[derive(Debug, Args)]
pub(super) struct ConsumeArgs {
    /// The topic
    topic: String,
    /// Partition to read; repeatable; default: all
    #[arg(long = "partition", value_name = "N")]
    partitions: Vec<u32>,
    /// Start position: earliest, latest, an offset, or @ and a time in milliseconds or RFC 3339
    #[arg(long, value_name = "POSITION", default_value = "earliest")]
    from: StartPosition,
    /// Stop at the current end of the committed records instead of waiting for new ones
    #[arg(long)]
    until_end: bool,
    /// With --until-end: exit with code 1 after this many seconds without a record
    #[arg(long, value_name = "SECONDS", default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    timeout: u64,
    /// Stop after this many records
    #[arg(long, value_name = "N")]
    max_records: Option<u64>,
    /// Skip records that cannot be decoded instead of failing; report each such batch on standard error
    #[arg(long)]
    skip_corrupt: bool,
    #[command(flatten)]
    rack: RackArgs,
    /// Record format; default: value, or json with --output json
    #[arg(long, value_enum)]
    format: Option<RecordFormat>,
}

/// Consumer, end offsets and output format of a run.
struct ConsumePlan {
    consumer: Consumer,
    bounds: EndOffsets,
    /// Number of partitions of the topic that this run has found so far.
    partitions: u32,
    printer: Printer,
}

/// Prints records until the end offsets, the maximum number of records, or a stop signal, which is a success.
pub(super) async fn run(common: &CommonArgs, command: ConsumeArgs) -> anyhow::Result<ExitCode> {
    let client = connect(common).await?;
    let monitor = RetryMonitor::new(&client);
    let mut stop = pin!(stop_signal()?);
    let pieces = Cell::new(0);
    let timeout = Duration::from_secs(command.timeout);
    let expected = || command.until_end.then_some(ExpectedWork { pieces: &pieces, piece: "record", timeout });
    let mut plan = tokio::select! {
        biased;
        () = &mut stop => return Ok(ExitCode::SUCCESS),
        plan = monitor.run_with_retry_output(expected(), plan(common, &command, &client, &pieces)) => plan?,
    };
    if command.max_records == Some(0) || command.until_end && plan.bounds.ends.is_empty() {
        return Ok(ExitCode::SUCCESS);
    }
    let mut out = BufWriter::with_capacity(BUFFER_BYTES, io::stdout().lock());
    let printed = tokio::select! {
        biased;
        () = &mut stop => Ok(()),
        printed = monitor.run_with_retry_output(
            expected(),
            print(&command, &client, &mut plan, &pieces, &mut out),
        ) => printed,
    };
    let flushed = out.flush();
    let skipped = plan.consumer.skipped_records();
    if skipped > 0 {
        eprintln!("skipped {} that cannot be decoded", output::count(skipped, "record"));
    }
    printed?;
    flushed?;
    Ok(ExitCode::SUCCESS)
}

/// Looks up the start of each partition and, with `--until-end`, its end. Assigns the partitions to a consumer; with
/// `--until-end`, only those with records. All partitions are checked before any record is printed. Each partition
/// counts as one of the `pieces` that `--timeout` expects.
async fn plan(
    common: &CommonArgs,
    command: &ConsumeArgs,
    client: &Client,
    pieces: &Cell<u64>,
) -> anyhow::Result<ConsumePlan> {
    let admin = client.admin();
    let mut bounds = EndOffsets::default();
    let on_undecodable = if command.skip_corrupt { OnUndecodable::Skip } else { OnUndecodable::Fail };
    let mut consumer = client.consumer(ConsumerOptions { on_undecodable, ..command.rack.options(client).await });
    let (selected, partitions) = partitions(client, command).await?;
    let mut starts = Vec::new();
    for partition in selected {
        pieces.set(pieces.get() + 1);
        let lookup = |at| offset(&admin, &command.topic, partition, at);
        let start = match command.from {
            StartPosition::At(at) => lookup(at).await?,
            StartPosition::Offset(offset) => {
                let (start, end) = (lookup(OffsetSpec::Earliest).await?, lookup(OffsetSpec::Latest).await?);
                if offset < start || offset > end {
                    let topic = command.topic.clone();
                    let error = ConsumeError::OutOfRange { topic, partition, offset, start, end };
                    return Err(explain_read(&admin, &command.topic, error).await);
                }
                offset
            }
        };
        if command.until_end {
            let end = lookup(OffsetSpec::Latest).await?;
            if end <= start {
                continue;
            }
            bounds.ends.insert(partition, end);
        }
        starts.push((partition, start));
    }
    for (partition, start) in starts {
        if let Err(error) = consumer.assign_at(&command.topic, partition, start).await {
            return Err(explain_read(&admin, &command.topic, error).await);
        }
    }
    let format = command.format.unwrap_or(match common.output {
        OutputFormat::Json => RecordFormat::Json,
        OutputFormat::Text => RecordFormat::Value,
    });
    let printer = Printer { format, escapes: io::stdout().is_terminal() };
    Ok(ConsumePlan { consumer, bounds, partitions, printer })
}

/// Returns the partitions to read, and the number of partitions of the topic.
async fn partitions(client: &Client, command: &ConsumeArgs) -> anyhow::Result<(Vec<u32>, u32)> {
    let route = match client.topic(&command.topic).await {
        Ok(route) => route,
        Err(error) => return Err(explain(&client.admin(), &command.topic, error).await),
    };
    let count = u32::try_from(route.partitions.len())?;
    if let Some(wrong) = command.partitions.iter().find(|partition| **partition >= count) {
        bail!("topic {:?} has no partition {wrong}: it has {count}, numbered from 0", command.topic);
    }
    let mut selected = command.partitions.clone();
    selected.sort_unstable();
    selected.dedup();
    Ok((if selected.is_empty() { (0..count).collect() } else { selected }, count))
}

/// Looks up an offset of a partition. An error names similar topics if the topic is unknown.
async fn offset(admin: &Admin, topic: &str, partition: u32, at: OffsetSpec) -> anyhow::Result<Offset> {
    match admin.offset(topic, partition, at).await {
        Ok(offset) => Ok(offset),
        Err(error) => Err(explain(admin, topic, error).await),
    }
}

/// Waits until the topic has more than `known` partitions, and returns the new partitions with their first offsets. New
/// partitions after one whose offset lookup fails are returned by a later call.
async fn wait_for_partitions(client: &Client, topic: &str, known: u32) -> Vec<(u32, Offset)> {
    loop {
        tokio::time::sleep(METADATA_REFRESH_INTERVAL).await;
        // The next iteration repeats a failed request. The consumer reports the problem.
        let Ok(route) = client.topic_now(topic).await else { continue };
        let mut new_partitions = Vec::new();
        for partition in known..u32::try_from(route.partitions.len()).unwrap_or(known) {
            let Ok(start) = client.admin().offset(topic, partition, OffsetSpec::Earliest).await else { break };
            new_partitions.push((partition, start));
        }
        if !new_partitions.is_empty() {
            return new_partitions;
        }
    }
}

/// End offsets of the partitions that still have records to print. Without `--until-end` reading has no end, and there
/// are no offsets; the parameter `bounded` of the methods is then false.
#[derive(Debug, Default)]
struct EndOffsets {
    ends: BTreeMap<u32, Offset>,
}

impl EndOffsets {
    /// Returns two flags: the record is to be printed, and no partition has further records to print. A record behind
    /// its partition's end offset is not printed.
    fn admit(&mut self, partition: u32, offset: Offset, bounded: bool) -> (bool, bool) {
        if !bounded {
            return (true, false);
        }
        let Some(end) = self.ends.get(&partition).copied() else { return (false, false) };
        if offset.plus(1) >= end {
            self.ends.remove(&partition);
        }
        (offset < end, self.ends.is_empty())
    }

    /// Handles skipped records of a partition, all below `next`: the partition has no further records if its end offset
    /// is not above `next`. Returns true if `bounded` and no partition has further records to print.
    fn skip(&mut self, partition: u32, next: Offset, bounded: bool) -> bool {
        self.ends.retain(|number, end| *number != partition || *end > next);
        bounded && self.ends.is_empty()
    }
}

/// Prints records until the end offsets or the maximum number of records. Skipped batches are reported on standard
/// error.
async fn print(
    command: &ConsumeArgs,
    client: &Client,
    plan: &mut ConsumePlan,
    pieces: &Cell<u64>,
    out: &mut BufWriter<io::StdoutLock<'_>>,
) -> anyhow::Result<()> {
    let reads_new_partitions = !command.until_end && command.partitions.is_empty();
    let mut remaining = command.max_records.unwrap_or(u64::MAX);
    let mut added_partitions = Box::pin(wait_for_partitions(client, &command.topic, plan.partitions));
    loop {
        // While records are buffered, no other await yields, so the command would not react to a signal.
        tokio::task::consume_budget().await;
        let next = tokio::select! {
            biased;
            new_partitions = &mut added_partitions, if reads_new_partitions => {
                for (partition, start) in new_partitions {
                    plan.consumer.assign_at(&command.topic, partition, start).await?;
                    plan.partitions = partition + 1;
                }
                added_partitions.set(wait_for_partitions(client, &command.topic, plan.partitions));
                continue;
            }
            next = next(&mut plan.consumer, out) => next?,
        };
        let record = match next {
            Ok(record) => record,
            Err(error @ ConsumeError::Undecodable { partition, next, skipped: true, .. }) => {
                out.flush()?;
                eprintln!("{error}");
                pieces.set(pieces.get() + 1);
                if plan.bounds.skip(partition, next, command.until_end) {
                    return Ok(());
                }
                continue;
            }
            Err(error) => {
                out.flush()?;
                return Err(explain_read(&client.admin(), &command.topic, error).await);
            }
        };
        pieces.set(pieces.get() + 1);
        let (is_wanted, is_last) = plan.bounds.admit(record.partition, record.offset, command.until_end);
        if is_wanted {
            plan.printer.write(&record, out)?;
            remaining -= 1;
        }
        if is_last || remaining == 0 {
            return Ok(());
        }
    }
}

/// Returns the next record. If the call has to wait for it, flushes the printed records first. The outer error is one
/// of the output, the inner one an error of the consumer.
async fn next(
    consumer: &mut Consumer,
    out: &mut BufWriter<io::StdoutLock<'_>>,
) -> io::Result<Result<ConsumedRecord, ConsumeError>> {
    match consumer.try_next() {
        Ok(Some(record)) => Ok(Ok(record)),
        Ok(None) => {
            out.flush()?;
            Ok(consumer.next().await)
        }
        Err(error) => Ok(Err(error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn until_end_prints_no_record_behind_the_first_log_end() {
        let at = |n| Offset::new(n).expect("small");
        let mut bounds = EndOffsets { ends: BTreeMap::from([(0, at(2)), (1, at(1))]) };
        assert_eq!(bounds.admit(0, at(0), true), (true, false));
        assert_eq!(bounds.admit(0, at(1), true), (true, false));
        assert_eq!(bounds.admit(0, at(2), true), (false, false), "written after the start");
        assert_eq!(bounds.admit(1, at(0), true), (true, true));
    }

    #[test]
    fn until_end_finishes_when_the_last_batch_is_skipped() {
        let at = |n| Offset::new(n).expect("small");
        let mut bounds = EndOffsets { ends: BTreeMap::from([(0, at(4)), (1, at(1))]) };
        assert!(!bounds.skip(0, at(3), true));
        assert!(!bounds.skip(0, at(5), true), "partition 1 has a record left");
        assert!(bounds.skip(1, at(1), true));
        assert!(!EndOffsets::default().skip(0, at(5), false), "a read without an end never finishes");
    }
}
