//! `strandline segment dump`: what a segment file holds, batch by batch.

use std::{
    fs::File,
    io::{self, BufReader, BufWriter, Read, Write},
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context as _, anyhow};
use bytes::Bytes;
use clap::{Args, Subcommand};
use serde_json::json;

use super::{Common, format, output::Output};
use crate::{
    model::{LeaderEpoch, Offset, TimestampType},
    record::{Batch, HEADER_BYTES, Malformed, Record},
};

#[derive(Debug, Subcommand)]
pub(super) enum Segment {
    /// Print one line per batch, and check every batch; exits 1 where the file is damaged
    Dump(Dump),
}

#[derive(Debug, Args)]
pub(super) struct Dump {
    /// A segment file (.log)
    file: PathBuf,
    /// Print one line per record as well
    #[arg(long)]
    records: bool,
}

pub(super) fn run(common: &Common, command: Segment) -> anyhow::Result<ExitCode> {
    let Segment::Dump(dump) = command;
    let file = File::open(&dump.file).with_context(|| format!("cannot read {}", dump.file.display()))?;
    let mut out = BufWriter::new(io::stdout().lock());
    let result = dump_all(BufReader::with_capacity(1 << 20, file), &dump, common.output, &mut out);
    out.flush()?;
    result?;
    Ok(ExitCode::SUCCESS)
}

fn dump_all(input: impl Read, dump: &Dump, output: Output, out: &mut impl Write) -> anyhow::Result<()> {
    let mut batches = Batches { input, position: 0, end: None, epoch: None };
    while let Some((position, batch)) = batches.next().map_err(|damage| damage.into_error(&dump.file))? {
        print_batch(position, &batch, output, out)?;
        if dump.records {
            for record in batch.records().map_err(|error| damaged(&dump.file, position, &error))? {
                let (offset, record) = record.map_err(|error| damaged(&dump.file, position, &error))?;
                print_record(offset, &record, output, out)?;
            }
        } else {
            batch.verify_records().map_err(|error| damaged(&dump.file, position, &error))?;
        }
    }
    Ok(())
}

fn damaged(file: &Path, position: u64, problem: &dyn std::fmt::Display) -> anyhow::Error {
    anyhow!("{} is damaged at byte {position}: {problem}", file.display())
}

/// Why a file cannot be read on.
#[derive(Debug)]
enum Damage {
    Read(io::Error),
    At { position: u64, problem: String },
}

impl Damage {
    fn into_error(self, file: &Path) -> anyhow::Error {
        match self {
            Self::Read(error) => anyhow::Error::new(error).context(format!("cannot read {}", file.display())),
            Self::At { position, problem } => damaged(file, position, &problem),
        }
    }
}

/// The batches of a file, one in memory at a time.
struct Batches<R> {
    input: R,
    position: u64,
    /// Offset at which the next batch must begin.
    end: Option<Offset>,
    epoch: Option<LeaderEpoch>,
}

impl<R: Read> Batches<R> {
    fn next(&mut self) -> Result<Option<(u64, Batch)>, Damage> {
        let position = self.position;
        let damage = |problem: &Malformed| Damage::At { position, problem: problem.to_string() };
        let mut head = [0; HEADER_BYTES];
        let got = read_full(&mut self.input, &mut head).map_err(Damage::Read)?;
        if got == 0 {
            return Ok(None);
        }
        if got < HEADER_BYTES {
            return Err(damage(&Malformed::Truncated { needed: HEADER_BYTES, available: got }));
        }
        // Bounded by the largest batch, whatever the bytes say.
        let size = Batch::framed_len(&head).map_err(|problem| damage(&problem))?;
        let mut records = Vec::new();
        let wanted = u64::try_from(size - HEADER_BYTES).expect("64 bits");
        self.input.by_ref().take(wanted).read_to_end(&mut records).map_err(Damage::Read)?;
        let batch = Batch::from_halves(head, Bytes::from(records)).map_err(|problem| damage(&problem))?;
        self.check_order(position, &batch)?;
        self.position += u64::try_from(size).expect("64 bits");
        Ok(Some((position, batch)))
    }

    /// What the CRC does not cover: offsets without gaps, epochs that never fall.
    fn check_order(&mut self, position: u64, batch: &Batch) -> Result<(), Damage> {
        if let Some(end) = self.end.filter(|end| *end != batch.base_offset()) {
            let problem = format!("the batch begins at offset {} where {end} is due", batch.base_offset());
            return Err(Damage::At { position, problem });
        }
        let epoch = batch.leader_epoch();
        if let (Some(old), Some(new)) = (self.epoch, epoch)
            && new < old
        {
            return Err(Damage::At { position, problem: format!("leader epoch {new} follows {old}") });
        }
        self.end = Some(batch.end_offset());
        self.epoch = epoch.or(self.epoch);
        Ok(())
    }
}

/// Reads until the buffer is full or the input ends.
fn read_full(input: &mut impl Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut got = 0;
    while got < buffer.len() {
        match input.read(&mut buffer[got..]) {
            Ok(0) => break,
            Ok(read) => got += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(got)
}

fn print_batch(position: u64, batch: &Batch, output: Output, out: &mut impl Write) -> io::Result<()> {
    let (start, end) = (batch.base_offset(), batch.end_offset());
    let by = match batch.timestamp_type() {
        TimestampType::CreateTime => "CreateTime",
        TimestampType::LogAppendTime => "LogAppendTime",
    };
    if output == Output::Json {
        let producer = batch.producer();
        let producer = producer.map(|by| json!({ "id": by.id, "epoch": by.epoch, "base_sequence": by.base_sequence }));
        let value = json!({
            "position": position,
            "base_offset": start,
            "end_offset": end,
            "leader_epoch": batch.leader_epoch(),
            "count": batch.count(),
            "bytes": batch.encoded_len(),
            "compression": batch.compression().word(),
            "timestamp_type": by,
            "base_timestamp": batch.base_timestamp(),
            "max_timestamp": batch.max_timestamp(),
            "producer": producer,
            "crc": format!("{:#010x}", batch.crc()),
            "crc_ok": true,
        });
        return writeln!(out, "{value}");
    }
    let epoch = batch.leader_epoch().map_or_else(|| "none".to_owned(), |epoch| epoch.to_string());
    let producer = batch
        .producer()
        .map_or_else(|| "none".to_owned(), |by| format!("{}/{} from sequence {}", by.id, by.epoch, by.base_sequence));
    writeln!(
        out,
        "at {position}: offsets {start}..{end} epoch {epoch} count {} bytes {} codec {} {by} {}..={} producer {producer} \
         crc {:#010x} ok",
        batch.count(),
        batch.encoded_len(),
        batch.compression(),
        batch.base_timestamp(),
        batch.max_timestamp(),
        batch.crc(),
    )
}

fn print_record(offset: Offset, record: &Record, output: Output, out: &mut impl Write) -> io::Result<()> {
    let headers = record.headers.iter();
    let headers: Vec<_> =
        headers.map(|header| json!({ "key": header.key, "value": format::text(header.value.as_deref()) })).collect();
    let (key, value) = (format::text(record.key.as_deref()), format::text(record.value.as_deref()));
    if output == Output::Json {
        let value = json!({
            "offset": offset, "timestamp": record.timestamp_ms, "key": key, "value": value, "headers": headers,
        });
        return writeln!(out, "{value}");
    }
    let headers = if headers.is_empty() { String::new() } else { format!(" headers {}", json!(headers)) };
    writeln!(out, "  offset {offset} timestamp {} key {key} value {value}{headers}", record.timestamp_ms)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{model::Compression, record::BatchBuilder};

    fn file() -> Vec<u8> {
        let mut bytes = Vec::new();
        for base in [0, 2] {
            let mut builder = BatchBuilder::new(Compression::None);
            for value in [b"one", b"two"] {
                builder.push(5, Some(b"k"), Some(value), &[]).expect("fits");
            }
            let mut batch = builder.finish(None).expect("not empty");
            batch.stamp(Offset::new(base).expect("small"), LeaderEpoch(3));
            bytes.extend_from_slice(&batch.to_bytes());
        }
        bytes
    }

    fn dumped(bytes: &[u8], records: bool, output: Output) -> (String, Result<(), String>) {
        let dump = Dump { file: "f.log".into(), records };
        let mut out = Vec::new();
        let result = dump_all(bytes, &dump, output, &mut out).map_err(|error| error.to_string());
        (String::from_utf8(out).expect("text"), result)
    }

    #[test]
    fn one_line_per_batch_and_one_per_record() {
        let (text, result) = dumped(&file(), false, Output::Text);
        assert_eq!(result, Ok(()));
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 2);
        assert!(lines[1].contains("offsets 2..4 epoch 3 count 2") && lines[1].ends_with("ok"), "{text}");
        let (text, _) = dumped(&file(), true, Output::Text);
        assert_eq!(text.lines().count(), 6);
        assert!(text.contains("offset 3 timestamp 5 key \"k\" value \"two\""), "{text}");
        let (text, _) = dumped(&file(), true, Output::Json);
        for line in text.lines() {
            serde_json::from_str::<serde_json::Value>(line).expect("one JSON value per line");
        }
    }

    #[test]
    fn damage_is_named_with_its_place() {
        let good = file();
        let second = good.len() / 2;
        let mut flipped = good.clone();
        flipped[second + 70] ^= 4;
        let (text, result) = dumped(&flipped, false, Output::Text);
        assert_eq!(text.lines().count(), 1, "what is whole is printed");
        let error = result.expect_err("damaged");
        assert!(error.contains(&format!("f.log is damaged at byte {second}")) && error.contains("CRC"), "{error}");
        let error = dumped(&good[..good.len() - 1], false, Output::Text).1.expect_err("cut");
        assert!(error.contains(&second.to_string()) && error.contains("truncated"), "{error}");
        let twice = [&good[..second], &good[..second]].concat();
        let error = dumped(&twice, false, Output::Text).1.expect_err("offsets go back");
        assert!(error.contains("offset 0 where 2 is due"), "{error}");
    }

    #[test]
    fn a_hostile_length_does_not_allocate() {
        let mut bytes = file();
        bytes.truncate(HEADER_BYTES);
        bytes[8..12].copy_from_slice(&(60_i32 << 20).to_be_bytes());
        let error = dumped(&bytes, false, Output::Text).1.expect_err("truncated");
        assert!(error.contains("truncated"), "{error}");
    }
}
