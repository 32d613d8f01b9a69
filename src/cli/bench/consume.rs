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

/// Maximum time without a batch, after which a reader that has end offsets fails.
const BATCH_TIMEOUT: Duration = Duration::from_secs(60);

#[derive(Debug, Args)]
pub(in crate::cli) struct BenchConsumeArgs {
    /// The topic
    #[arg(long, value_name = "T")]
    topic: String,
    /// Start position: earliest, latest, an offset, or @ and a time
    #[arg(long, value_name = "W", default_value = "earliest")]
    from: StartPosition,
    /// Stop after this many records, and wait for them if needed; default: stop at the current end of the committed
    /// records
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

/// Reads with all consumers, and prints throughput and waits. The exit code is 1 if a read failed or no record was
/// read.
pub(super) async fn run(common: &CommonArgs, command: BenchConsumeArgs) -> anyhow::Result<ExitCode> {
    let shares = shares(common, &command).await?;
    let remaining = Arc::new(AtomicU64::new(command.records.unwrap_or(u64::MAX)));
    let tasks = Tasks::new();
    let mut handles = Vec::new();
    let bar = output::progress(None, "{spinner} {elapsed} reading");
    bar.enable_steady_tick(Duration::from_millis(200));
    let start = clock::monotonic();
    let mut monitor: Option<RetryMonitor> = None;
    for share in shares {
        let client = connect(common).await?;
        match &mut monitor {
            Some(monitor) => monitor.add_client(&client),
            None => monitor = Some(RetryMonitor::new(&client)),
        }
        let mut consumer = client.consumer(command.rack.options(&client).await);
        for (partition, (from, _)) in &share.partitions {
            consumer.assign_at(&command.topic, *partition, *from).await?;
        }
        let bounded = command.records.is_none();
        handles.push(tasks.spawn("bench-reader", read(consumer, share, bounded, remaining.clone())));
    }
    let mut stats = BenchStats::default();
    let mut last_read = start;
    let wait_for_readers = async {
        for handle in handles {
            let (reader_stats, reader_end) = handle.await?;
            stats.merge(reader_stats);
            last_read = last_read.max(reader_end);
        }
        Ok(())
    };
    let mut monitor = monitor.expect("there is at least one share");
    monitor.set_bar(&bar);
    monitor.run_with_retry_output(None, wait_for_readers).await?;
    bar.finish_and_clear();
    tasks.stop().await;
    let notes: Vec<String> = ["latency is the wait for each batch".to_owned()]
        .into_iter()
        .chain(stats.first_error.iter().map(|error| format!("first error: {error}")))
        .collect();
    let extra = json!({ "consumers": command.consumers, "first_error": stats.first_error });
    report::print(stats.result_json(last_read - start), extra, &notes, common.output)?;
    Ok(if stats.errors == 0 && stats.records > 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Divides the partitions among the consumers. Partitions without committed records from the start position on are left
/// out, unless `--records` waits for new ones. So are consumers without partitions.
async fn shares(common: &CommonArgs, command: &BenchConsumeArgs) -> anyhow::Result<Vec<ConsumerShare>> {
    let client = connect(common).await?;
    let admin = client.admin();
    let partitions = match client.topic(&command.topic).await {
        Ok(route) => u32::try_from(route.partitions.len())?,
        Err(error) => return Err(explain(&admin, &command.topic, error).await),
    };
    if command.consumers > partitions {
        bail!(
            "topic {:?} has {}, too few for {} consumers: use --consumers {partitions} or fewer",
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
        bail!(
            "no records in topic {:?} from the position of --from: choose an earlier one, or write records with \
             `strandline bench produce`",
            command.topic
        );
    }
    Ok(shares)
}

/// Reads a share until all readers together have read the `remaining` records. If `bounded`, also ends at the share's
/// end offsets. Returns the statistics and the time of the last read.
async fn read(
    mut consumer: Consumer,
    mut share: ConsumerShare,
    bounded: bool,
    remaining: Arc<AtomicU64>,
) -> (BenchStats, Instant) {
    let mut stats = BenchStats::default();
    let mut last_read = clock::monotonic();
    while remaining.load(Ordering::Relaxed) > 0 {
        // Each wait is short: another reader may read the last of the `remaining` records while this reader waits for
        // a batch that never arrives.
        let next_batch = tokio::time::timeout(Duration::from_millis(200), consumer.next_batch());
        let batch = match next_batch.await {
            Err(_) if bounded && last_read.elapsed() >= BATCH_TIMEOUT => {
                stats.add_error(&format!("no record arrived for {BATCH_TIMEOUT:?} before the log end"));
                break;
            }
            Err(_) => continue,
            Ok(Ok(batch)) => batch,
            Ok(Err(error)) => {
                stats.add_error(&error);
                break;
            }
        };
        let now = clock::monotonic();
        stats.add_latency(now - last_read);
        last_read = now;
        let records = batch.batch.end_offset().since(batch.from);
        // The last batch may hold more records than remain; only the remaining ones count.
        let before =
            remaining.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |count| Some(count.saturating_sub(records)));
        stats.records += records.min(before.unwrap_or(0));
        stats.bytes += u64::try_from(batch.batch.encoded_len()).expect("64 bits");
        if bounded && share.partitions.get(&batch.partition).is_some_and(|(_, end)| batch.batch.end_offset() >= *end) {
            share.partitions.remove(&batch.partition);
            if share.partitions.is_empty() {
                break;
            }
        }
    }
    consumer.close().await;
    (stats, last_read)
}
