//! `strandline segment dump`: prints and checks a segment file batch by batch.

use std::{
    io::{self, BufWriter, Read, Write},
    path::PathBuf,
    process::ExitCode,
};

use clap::{Args, Subcommand};
use serde_json::json;

use self::file::{FileBatches, FileEpochs, SegmentError};
use super::{CommonArgs, format, output::OutputFormat};
use crate::{
    model::{Offset, TimestampType},
    record::{Batch, MalformedBatch, Record},
    tier::Footer,
};

mod file;

#[derive(Debug, Subcommand)]
pub(super) enum SegmentCommand {
    /// Print one line per batch and check every batch; exit with code 1 if the file is corrupt
    Dump(DumpArgs),
}

#[derive(Debug, Args)]
pub(super) struct DumpArgs {
    /// A segment file (.log) of a data directory, or a segment object (.segment)
    file: PathBuf,
    /// Print one line per record as well
    #[arg(long)]
    records: bool,
}

pub(super) fn run(common: &CommonArgs, command: SegmentCommand) -> anyhow::Result<ExitCode> {
    let SegmentCommand::Dump(dump) = command;
    let (batches, footer) = file::open(&dump.file)?;
    let mut out = BufWriter::new(io::stdout().lock());
    let result = print_batches(batches, footer.as_ref(), &dump, common.output, &mut out);
    out.flush()?;
    result?;
    Ok(ExitCode::SUCCESS)
}

/// Checks and prints all batches, and compares them with the footer of a segment object. Each batch is printed after
/// the next one was read, because only the next batch can show that this batch's leader epoch is too high.
fn print_batches(
    mut batches: FileBatches<impl Read>,
    footer: Option<&Footer>,
    dump: &DumpArgs,
    output: OutputFormat,
    out: &mut impl Write,
) -> anyhow::Result<()> {
    let with_file = |error: SegmentError| error.into_error(&dump.file);
    let mut epochs = FileEpochs::default();
    let mut current = batches.next().map_err(with_file)?;
    while let Some((position, batch)) = current {
        let next = batches.next();
        // A corrupt next batch does not affect the check of this batch.
        let after = next.as_ref().ok().and_then(|next| next.as_ref()).map(|(_, next)| next);
        epochs.check(&batch, after, footer).map_err(|problem| file::corrupt_error(&dump.file, position, &problem))?;
        check_and_print(position, &batch, dump, output, out)?;
        current = next.map_err(with_file)?;
    }
    footer.map_or(Ok(()), |footer| batches.check(footer).map_err(with_file))
}

/// Checks a batch's records, and prints the batch and, with `--records`, its records. `position` is the batch's first
/// byte in the file.
fn check_and_print(
    position: u64,
    batch: &Batch,
    dump: &DumpArgs,
    output: OutputFormat,
    out: &mut impl Write,
) -> anyhow::Result<()> {
    let corrupt = |error: MalformedBatch| file::corrupt_error(&dump.file, position, &error);
    if !dump.records {
        batch.verify_records().map_err(corrupt)?;
        return Ok(print_batch(position, batch, output, out)?);
    }
    print_batch(position, batch, output, out)?;
    for record in batch.records().map_err(corrupt)? {
        let (offset, record) = record.map_err(corrupt)?;
        print_record(offset, &record, output, out)?;
    }
    Ok(())
}

/// Prints one line about a batch: position, offsets, epoch, size, timestamps, producer and CRC.
fn print_batch(position: u64, batch: &Batch, output: OutputFormat, out: &mut impl Write) -> io::Result<()> {
    let (start, end) = (batch.base_offset(), batch.end_offset());
    let timestamp_type = match batch.timestamp_type() {
        TimestampType::CreateTime => "CreateTime",
        TimestampType::LogAppendTime => "LogAppendTime",
    };
    if output == OutputFormat::Json {
        let producer = batch.producer();
        let producer = producer.map(
            |producer| json!({ "id": producer.id, "epoch": producer.epoch, "base_sequence": producer.base_sequence }),
        );
        let value = json!({
            "position": position,
            "base_offset": start,
            "end_offset": end,
            "leader_epoch": batch.leader_epoch(),
            "count": batch.count(),
            "bytes": batch.encoded_len(),
            "compression": batch.compression().as_str(),
            "timestamp_type": timestamp_type,
            "base_timestamp": batch.base_timestamp(),
            "max_timestamp": batch.max_timestamp(),
            "producer": producer,
            "crc": format!("{:#010x}", batch.crc()),
            "crc_ok": true,
        });
        return writeln!(out, "{value}");
    }
    let epoch = batch.leader_epoch().map_or_else(|| "none".to_owned(), |epoch| epoch.to_string());
    let producer = batch.producer().map_or_else(
        || "none".to_owned(),
        |producer| format!("{}/{} from sequence {}", producer.id, producer.epoch, producer.base_sequence),
    );
    writeln!(
        out,
        "at {position}: offsets {start}..{end} epoch {epoch} count {} bytes {} codec {} {timestamp_type} {}..={} \
         producer {producer} crc {:#010x} ok",
        batch.count(),
        batch.encoded_len(),
        batch.compression(),
        batch.base_timestamp(),
        batch.max_timestamp(),
        batch.crc(),
    )
}

fn print_record(offset: Offset, record: &Record, output: OutputFormat, out: &mut impl Write) -> io::Result<()> {
    let headers = record.headers.iter();
    let headers: Vec<_> = headers
        .map(|header| json!({ "key": header.key, "value": format::bytes_as_json(header.value.as_deref()) }))
        .collect();
    let (key, value) = (format::bytes_as_json(record.key.as_deref()), format::bytes_as_json(record.value.as_deref()));
    if output == OutputFormat::Json {
        let value = json!({
            "offset": offset, "timestamp_ms": record.timestamp_ms, "key": key, "value": value, "headers": headers,
        });
        return writeln!(out, "{}", format::json_for_terminal(&value));
    }
    let [key, value] = [key, value].map(|text| format::json_for_terminal(&text));
    let headers = if headers.is_empty() {
        String::new()
    } else {
        format!(" headers {}", format::json_for_terminal(&json!(headers)))
    };
    writeln!(out, "  offset {offset} timestamp {} key {key} value {value}{headers}", record.timestamp_ms)
}

#[cfg(test)]
mod tests;
