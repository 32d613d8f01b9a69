//! `strandline consume`: print records.

use std::{
    collections::BTreeMap,
    io::{self, BufWriter, Write as _},
    process::ExitCode,
};

use anyhow::bail;
use clap::Args;

use super::{
    Common,
    cluster::{connect, explain, explain_read},
    format::Format,
    place::Place,
};
use crate::{
    client::{Admin, Client, ConsumedRecord, Consumer, ConsumerOptions, OffsetAt},
    model::Offset,
};

/// Bytes that are held back while more records are there.
const BUFFER_BYTES: usize = 64 << 10;

/// Prints records, and waits for more unless told where to end.
#[derive(Debug, Args)]
pub(super) struct Consume {
    /// The topic
    topic: String,
    /// A partition; may be given several times; all if left out
    #[arg(long = "partition", value_name = "N")]
    partitions: Vec<u32>,
    /// Where to begin: earliest, latest, an offset, or @ with a time in milliseconds or RFC 3339
    #[arg(long, value_name = "WHERE", default_value = "earliest")]
    from: Place,
    /// End where the log ends now, instead of waiting for more
    #[arg(long)]
    until_end: bool,
    /// End after so many records
    #[arg(long, value_name = "N")]
    max: Option<u64>,
    /// How a record is printed
    #[arg(long, value_enum, default_value_t = Format::Value)]
    format: Format,
}

pub(super) async fn run(common: &Common, command: Consume) -> anyhow::Result<ExitCode> {
    let client = connect(common).await?;
    let admin = client.admin();
    let mut bounds = Bounds::default();
    let mut consumer = client.consumer(ConsumerOptions::default());
    for partition in partitions(&client, &command).await? {
        let end = match command.until_end {
            true => Some(offset(&admin, &command.topic, partition, OffsetAt::Latest).await?),
            false => None,
        };
        let start = match command.from {
            Place::At(at) => offset(&admin, &command.topic, partition, at).await?,
            Place::Offset(offset) => offset,
        };
        // An offset beyond the end is asked for all the same: the broker's answer says what is wrong.
        if end == Some(start) {
            continue;
        }
        if let Some(end) = end {
            bounds.ends.insert(partition, end);
        }
        if let Err(error) = consumer.assign_at(&command.topic, partition, start).await {
            return Err(explain_read(&admin, &command.topic, error).await);
        }
    }
    if command.max == Some(0) || command.until_end && bounds.ends.is_empty() {
        return Ok(ExitCode::SUCCESS);
    }
    let mut out = BufWriter::with_capacity(BUFFER_BYTES, io::stdout().lock());
    tokio::select! {
        biased;
        signal = tokio::signal::ctrl_c() => signal?,
        printed = print(&command, &admin, &mut consumer, bounds, &mut out) => printed?,
    }
    out.flush()?;
    Ok(ExitCode::SUCCESS)
}

async fn partitions(client: &Client, command: &Consume) -> anyhow::Result<Vec<u32>> {
    let route = match client.topic(&command.topic).await {
        Ok(route) => route,
        Err(error) => return Err(explain(&client.admin(), &command.topic, error).await),
    };
    let count = u32::try_from(route.partitions.len())?;
    if let Some(wrong) = command.partitions.iter().find(|partition| **partition >= count) {
        bail!("topic {:?} has no partition {wrong}: it has {count}, numbered from 0", command.topic);
    }
    let mut wanted = command.partitions.clone();
    wanted.sort_unstable();
    wanted.dedup();
    Ok(if wanted.is_empty() { (0..count).collect() } else { wanted })
}

async fn offset(admin: &Admin, topic: &str, partition: u32, at: OffsetAt) -> anyhow::Result<Offset> {
    match admin.offset(topic, partition, at).await {
        Ok(offset) => Ok(offset),
        Err(error) => Err(explain(admin, topic, error).await),
    }
}

/// Where the partitions end that have not ended yet; none at all when reading goes on for ever.
#[derive(Debug, Default)]
struct Bounds {
    ends: BTreeMap<u32, Offset>,
}

impl Bounds {
    /// Whether a record is to be printed, and whether it was the last of all.
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
}

async fn print(
    command: &Consume,
    admin: &Admin,
    consumer: &mut Consumer,
    mut bounds: Bounds,
    out: &mut BufWriter<io::StdoutLock<'_>>,
) -> anyhow::Result<()> {
    let mut left = command.max.unwrap_or(u64::MAX);
    loop {
        // With records at hand nothing else would let Ctrl-C be seen.
        tokio::task::consume_budget().await;
        let record = match next(consumer, out).await? {
            Ok(record) => record,
            Err(error) => {
                out.flush()?;
                return Err(explain_read(admin, &command.topic, error).await);
            }
        };
        let (wanted, last) = bounds.admit(record.partition, record.offset, command.until_end);
        if wanted {
            command.format.write(&record, out)?;
            left -= 1;
        }
        if last || left == 0 {
            return Ok(());
        }
    }
}

/// The next record. What was printed goes out before waiting for it.
async fn next(
    consumer: &mut Consumer,
    out: &mut BufWriter<io::StdoutLock<'_>>,
) -> io::Result<Result<ConsumedRecord, crate::client::ConsumeError>> {
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
    fn reading_ends_where_the_log_ended_and_prints_nothing_younger() {
        let at = |n| Offset::new(n).expect("small");
        let mut bounds = Bounds { ends: BTreeMap::from([(0, at(2)), (1, at(1))]) };
        assert_eq!(bounds.admit(0, at(0), true), (true, false));
        assert_eq!(bounds.admit(0, at(1), true), (true, false));
        assert_eq!(bounds.admit(0, at(2), true), (false, false), "written after the start");
        assert_eq!(bounds.admit(1, at(0), true), (true, true));
    }
}
