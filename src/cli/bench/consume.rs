//! `strandline bench consume`: measures the throughput of reads and the wait for each batch.

use std::{
    collections::BTreeMap,
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use anyhow::bail;
use clap::Args;
use serde_json::json;
use tokio::time::Instant;

use super::{
    super::{
        CommonArgs,
        connect::{connect, explain},
        output,
        rack::RackArgs,
        retry_output::RetryMonitor,
        start_position::StartPosition,
    },
    report::{self, BenchStats},
};
use crate::{
    client::{Consumer, OffsetSpec},
    model::Offset,
    task::{Tasks, clock},
};

/// Maximum time until the next record of a log that is not at its end.
const LATE_AFTER: Duration = Duration::from_secs(60);

#[derive(Debug, Args)]
pub(in crate::cli) struct BenchConsumeArgs {
    /// The topic
    #[arg(long, value_name = "T")]
    topic: String,
    /// Start position: earliest, latest, an offset, or @ and a time
    #[arg(long, value_name = "W", default_value = "earliest")]
    from: StartPosition,
    /// Stop after this many records, and wait for them if needed; default: stop at the current log end
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    records: Option<u64>,
    /// Number of consumers; each has its own connection and a share of the partitions
    #[arg(long, value_name = "C", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1000))]
    consumers: u32,
    #[command(flatten)]
    rack: RackArgs,
}

/// Partitions that one consumer reads.
#[derive(Debug, Default)]
struct ConsumerShare {
    /// Start and end offset of each partition.
    partitions: BTreeMap<u32, (Offset, Offset)>,
}

pub(super) async fn run(common: &CommonArgs, command: BenchConsumeArgs) -> anyhow::Result<ExitCode> {
    let shares = shares(common, &command).await?;
    let left = Arc::new(AtomicU64::new(command.records.unwrap_or(u64::MAX)));
    let tasks = Tasks::new();
    let mut handles = Vec::new();
    let bar = output::progress(None, "{spinner} {elapsed} reading");
    bar.enable_steady_tick(Duration::from_millis(200));
    let start = clock::monotonic();
    let mut retries: Option<RetryMonitor> = None;
    for share in shares {
        let client = connect(common).await?;
        match &mut retries {
            Some(retries) => retries.and(&client),
            None => retries = Some(RetryMonitor::new(&client)),
        }
        let mut consumer = client.consumer(command.rack.options(&client).await);
        for (partition, (from, _)) in &share.partitions {
            consumer.assign_at(&command.topic, *partition, *from).await?;
        }
        let bounded = command.records.is_none();
        handles.push(tasks.spawn("bench reader", read(consumer, share, bounded, left.clone())));
    }
    let mut seen = BenchStats::default();
    let mut last = start;
    let all = async {
        for handle in handles {
            let (one, at) = handle.await?;
            seen.merge(one);
            last = last.max(at);
        }
        Ok(())
    };
    let mut monitor = retries.expect("there is at least one share");
    monitor.beside(&bar);
    monitor.run_with_retry_output(None, all).await?;
    bar.finish_and_clear();
    tasks.stop().await;
    let words: Vec<String> = ["latency is the wait for each batch".to_owned()]
        .into_iter()
        .chain(seen.first_error.iter().map(|error| format!("first error: {error}")))
        .collect();
    let extra = json!({ "consumers": command.consumers, "first_error": seen.first_error });
    report::print(seen.figures(last - start), extra, &words, common.output)?;
    Ok(if seen.errors == 0 && seen.records > 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

async fn shares(common: &CommonArgs, command: &BenchConsumeArgs) -> anyhow::Result<Vec<ConsumerShare>> {
    let client = connect(common).await?;
    let admin = client.admin();
    let partitions = match client.topic(&command.topic).await {
        Ok(route) => u32::try_from(route.partitions.len())?,
        Err(error) => return Err(explain(&admin, &command.topic, error).await),
    };
    if command.consumers > partitions {
        bail!(
            "topic {:?} has {}, too few for {} consumers; use at most {partitions}",
            command.topic,
            output::count(partitions.into(), "partition"),
            command.consumers
        );
    }
    let mut shares: Vec<ConsumerShare> = (0..command.consumers).map(|_| ConsumerShare::default()).collect();
    for partition in 0..partitions {
        let end = admin.offset(&command.topic, partition, OffsetSpec::Latest).await?;
        let from = match command.from {
            StartPosition::At(at) => admin.offset(&command.topic, partition, at).await?,
            StartPosition::Offset(offset) => offset,
        };
        if from != end || command.records.is_some() {
            let share = usize::try_from(partition % command.consumers)?;
            shares[share].partitions.insert(partition, (from, end));
        }
    }
    shares.retain(|share| !share.partitions.is_empty());
    if shares.is_empty() {
        bail!("no records in topic {:?} from this position; write some with `strandline bench produce`", command.topic);
    }
    Ok(shares)
}

/// Reads a share to its end, or until all readers together have read the `left` records.
async fn read(
    mut consumer: Consumer,
    mut share: ConsumerShare,
    bounded: bool,
    left: Arc<AtomicU64>,
) -> (BenchStats, Instant) {
    let mut seen = BenchStats::default();
    let mut last = clock::monotonic();
    while left.load(Ordering::Relaxed) > 0 {
        // Each wait is short: another reader may take the last record while this one waits for a batch that never
        // arrives.
        let next = tokio::time::timeout(Duration::from_millis(200), consumer.next_batch());
        let batch = match next.await {
            Err(_) if bounded && last.elapsed() >= LATE_AFTER => {
                seen.error(&format!("no record arrived for {LATE_AFTER:?} before the log end"));
                break;
            }
            Err(_) => continue,
            Ok(Ok(batch)) => batch,
            Ok(Err(error)) => {
                seen.error(&error);
                break;
            }
        };
        let now = clock::monotonic();
        seen.latency(now - last);
        last = now;
        let records = batch.batch.end_offset().since(batch.from);
        let before = left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| Some(left.saturating_sub(records)));
        seen.records += records.min(before.unwrap_or(0));
        seen.bytes += u64::try_from(batch.batch.encoded_len()).expect("64 bits");
        if bounded && share.partitions.get(&batch.partition).is_some_and(|(_, end)| batch.batch.end_offset() >= *end) {
            share.partitions.remove(&batch.partition);
            if share.partitions.is_empty() {
                break;
            }
        }
    }
    consumer.close().await;
    (seen, last)
}
