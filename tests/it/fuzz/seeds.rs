//! Valid inputs of every fuzz target, made by the broker's own writers. `fuzz/seeds` keeps them, so that a fuzzer needs
//! nothing else, and so that files of earlier versions stay readable.

use std::{path::Path, sync::Arc, time::Duration};

use bytes::{BufMut, Bytes, BytesMut};
use prost::Message;
use strandline::{
    log::{DataDir, DataDirIdentity, Disk, LogOptions, ProducerTable, SimDisk},
    model::{BrokerId, Compression, LeaderEpoch, Offset, PartitionId, TopicId},
    proto::v1::{self, append_request::Payload},
    record::{Batch, BatchBuilder, ProducerSequence},
    telemetry::Metrics,
    tier::{SegmentEntry, footer::FooterBuilder, manifest::ManifestRoot, name::ObjectId},
};

/// A seed: its target, its name, its bytes.
pub(super) type Seed = (&'static str, String, Vec<u8>);

pub(super) fn all() -> Vec<Seed> {
    let mut seeds = Vec::new();
    add_record_seeds(&mut seeds);
    add_log_seeds(&mut seeds);
    add_tier_seeds(&mut seeds);
    add_json_seeds(&mut seeds);
    add_config_seeds(&mut seeds);
    add_produce_seeds(&mut seeds);
    seeds
}

fn at(offset: u64) -> Offset {
    Offset::new(offset).unwrap()
}

fn partition() -> PartitionId {
    PartitionId::new(TopicId::from_bytes([7; 16]), 0)
}

/// Returns batch `number` of producer 5, with three records.
fn batch(number: u32, epoch: u32) -> Batch {
    let mut builder = BatchBuilder::new(Compression::None);
    for record in 0..3 {
        let timestamp = i64::from(number * 100 + record);
        builder.push(timestamp, Some(b"key"), Some(&[b'v'; 40]), &[]).unwrap();
    }
    let base_sequence = i32::try_from(number * 3).unwrap();
    let mut batch = builder.finish(Some(ProducerSequence { id: 5, epoch: 0, base_sequence })).unwrap();
    batch.set_offset_and_epoch(at(u64::from(number) * 3), LeaderEpoch(epoch));
    batch
}

fn add_record_seeds(seeds: &mut Vec<Seed>) {
    for folder in ["src/core/record/golden", "src/core/record/golden/kafka"] {
        for (name, batch) in super::files(folder).into_iter().filter(|(name, _)| name.ends_with(".batch")) {
            let name = format!("{}-{name}", if folder.ends_with("kafka") { "kafka" } else { "ours" });
            let (codec, count) = (batch[22], &batch[59..61]);
            seeds.push(("records", name.clone(), [&[codec], count, &batch[61..]].concat()));
            seeds.push(("decompress", name.clone(), [&[codec], &batch[61..]].concat()));
            seeds.push(("batch_parse", name, batch));
        }
    }
}

/// Returns the disk of a log with three segments of two batches each, in two epochs. The log was closed if `close`,
/// else its process was killed.
fn directory(close: bool) -> SimDisk {
    let disk = SimDisk::new();
    let options = LogOptions {
        journal_bytes: 1 << 20,
        max_frame_bytes: 16 << 10,
        reserve_bytes: 0,
        sync_after: Duration::from_secs(1),
        metrics: Metrics::new(),
        step_mode: true,
        ..LogOptions::default()
    };
    let identity = DataDirIdentity { cluster: "test".to_owned(), broker: BrokerId(1) };
    let log = DataDir::open(Arc::new(disk.clone()), Path::new("/data"), &identity, options).unwrap();
    let mut replica = log.open_replica(partition(), at(0)).unwrap();
    for number in 0..6 {
        if number % 2 == 0 && number > 0 {
            replica.roll().unwrap();
        }
        replica.append(&[batch(number, 1 + number / 3)]).unwrap();
        replica.persist(Box::new(|result| assert!(result.is_ok())));
        if number == 3 {
            log.sync_step();
        }
        while log.journal_step() {}
    }
    if close {
        log.close().unwrap();
    }
    disk.kill();
    disk
}

/// Returns the files of a directory in the input format of the target: one byte for the kind, two for the length, the
/// content.
fn packed(disk: &SimDisk, wanted: impl Fn(&str) -> bool) -> Vec<u8> {
    let mut packed = Vec::new();
    for (path, _) in disk.files() {
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        let kind = match name.split_once('.') {
            None if name == "checkpoint" => 1,
            Some((slot, "journal")) => 2 + slot.parse::<u8>().unwrap(),
            Some((base, extension)) if base.len() == 20 => {
                let base = [0, 6, 12, 18].iter().position(|known| *known == base.parse::<u64>().unwrap()).unwrap();
                let extension = ["log", "index", "timeindex", "snapshot"].iter().position(|known| *known == extension);
                4 + u8::try_from(base * 4 + extension.unwrap()).unwrap()
            }
            _ => continue,
        };
        if wanted(&name) {
            let mut content = disk.read(&path).unwrap();
            if name.ends_with(".journal") {
                content.truncate(frames(&content).iter().map(Vec::len).sum());
            }
            packed.push(kind);
            packed.put_u16(u16::try_from(content.len()).unwrap());
            packed.extend(content);
        }
    }
    packed
}

/// Returns the frames at the front of a journal file.
fn frames(file: &[u8]) -> Vec<Vec<u8>> {
    let (mut frames, mut at) = (Vec::new(), 0);
    while file[at..].starts_with(b"STRLJRN1") {
        let length = u32::from_be_bytes(file[at + 40..at + 44].try_into().unwrap()) as usize;
        frames.push(file[at..at + length].to_vec());
        at += length;
    }
    frames
}

fn add_log_seeds(seeds: &mut Vec<Seed>) {
    let (killed, closed) = (directory(false), directory(true));
    seeds.push(("data_directory", "killed".to_owned(), packed(&killed, |_| true)));
    seeds.push((
        "data_directory",
        "killed-without-segments".to_owned(),
        packed(&killed, |name| !name.ends_with(".log")),
    ));
    seeds.push((
        "data_directory",
        "killed-without-checkpoint".to_owned(),
        packed(&killed, |name| name != "checkpoint"),
    ));
    seeds.push(("data_directory", "closed".to_owned(), packed(&closed, |name| !name.ends_with(".journal"))));
    let read = |part: &str| {
        let (path, _) = closed.files().into_iter().find(|(path, _)| path.to_string_lossy().ends_with(part)).unwrap();
        closed.read(&path).unwrap()
    };
    for (number, frame) in frames(&read("00000.journal")).into_iter().enumerate() {
        seeds.push(("journal", format!("frame-{number}"), frame));
    }
    seeds.push(("checkpoint", "closed".to_owned(), read("checkpoint")));
    let base = format!("{:020}", 6);
    let (offsets, times) = (read(&format!("{base}.index")), read(&format!("{base}.timeindex")));
    let length = u16::try_from(offsets.len()).unwrap().to_be_bytes();
    seeds.push(("index", "sealed".to_owned(), [&length[..], &offsets, &times].concat()));
    seeds.push(("snapshot", "second-segment".to_owned(), read(&format!("{base}.snapshot"))));
    seeds.push(("snapshot", "producers-of-a-footer".to_owned(), producers().to_vec()));
}

fn producers() -> Bytes {
    let mut table = ProducerTable::new();
    (0..4).for_each(|number| table.record_batch(&batch(number, 1)));
    table.to_bytes()
}

fn segment_entry(base: u64, end: u64) -> SegmentEntry {
    let attempt = uuid::Uuid::from_u128(u128::from(base) << 64 | u128::from(end));
    let stamp = ObjectId { base: at(base), end: at(end), epoch: LeaderEpoch(1), attempt };
    SegmentEntry {
        stamp,
        data_bytes: 6000,
        footer_bytes: 300,
        crc: 0xdead_beef,
        max_timestamp_ms: i64::try_from(end).unwrap(),
        created_ms: 0,
    }
}

fn add_tier_seeds(seeds: &mut Vec<Seed>) {
    let epochs = vec![(LeaderEpoch(0), at(0)), (LeaderEpoch(1), at(3))];
    let mut builder = FooterBuilder::new(partition(), at(0), 1000, LeaderEpoch(2), epochs);
    (0..4).for_each(|number| builder.push(&batch(number, 1)));
    seeds.push(("footer", "four-batches".to_owned(), builder.finish(producers()).encode().to_vec()));

    let mut root = ManifestRoot::empty(partition(), at(0));
    seeds.push(("manifest", "root-of-nothing".to_owned(), root.encode().to_vec()));
    for base in [0, 10, 20] {
        root = root.extend(segment_entry(base, base + 10), LeaderEpoch(1), uuid::Uuid::nil()).0;
    }
    let root = root.trim(at(5), None, LeaderEpoch(2)).encode();
    // Pages start at 512 segments. A small page is assembled from entries, whose form is the same in a root and in a
    // page.
    let (head, lines) = root[..root.len() - 4].split_at(root.len() - 4 - 3 * 72);
    let mut page = BytesMut::from(&b"STMP\x00\x01"[..]);
    page.put_slice(&head[6..26]);
    page.put_u32(3);
    page.put_slice(lines);
    let mut paged = BytesMut::from(&head[..head.len() - 8]);
    paged.put_u32(1);
    paged.put_slice(&lines[..72]);
    paged.put_u32(2);
    paged.put_slice(&lines[72..]);
    for (name, mut content) in [("page", page), ("root-with-a-page", paged)] {
        let crc = crc32c::crc32c(&content);
        content.put_u32(crc);
        seeds.push(("manifest", name.to_owned(), content.to_vec()));
    }
    seeds.push(("manifest", "root".to_owned(), root.to_vec()));
}

fn add_json_seeds(seeds: &mut Vec<Seed>) {
    const ID: &str = "07070707-0707-0707-0707-070707070707";
    let texts = [
        ("owner", r#"{"format":1,"cluster":"test"}"#.to_owned()),
        ("topic-record", format!(r#"{{"name":"t","id":"{ID}","partitions":3,"config":{{"retention.ms":"-1"}}}}"#)),
        (
            "tier-state",
            format!(
                r#"{{"manifest":"manifest-00000000000000000003-0000000002-{ID}","tiered_end":30,"log_start":5,"epoch":2,"bytes":18000}}"#
            ),
        ),
        ("topic", format!(r#"{{"id":"{ID}","partitions":3,"replication_factor":1,"config":{{}}}}"#)),
        (
            "partition",
            r#"{"replicas":[1,2],"leader":1,"leader_epoch":4,"isr":[1],"elr":[2],"adding":[2],"removing":[1],"removal_count":2}"#
                .to_owned(),
        ),
        (
            "broker",
            concat!(
                r#"{"listeners":{"client":{"protocol":"grpc","address":"a:9460"},"peer":{"protocol":"grpc","address":"a:9470"}},"#,
                r#""rack":"z","directory_id":"d","version":"0.1.0"}"#
            )
            .to_owned(),
        ),
        ("controller", r#"{"broker":1}"#.to_owned()),
        ("tombstone", r#"{"name":"t"}"#.to_owned()),
        ("producer-ids", r#"{"next":1000}"#.to_owned()),
        ("path", format!("partitions/{ID}/7")),
        ("segment-name", format!("00000000000000000000-00000000000000000010-0000000001-{ID}.segment")),
        ("cluster-name", "strandline".to_owned()),
    ];
    for (kind, (name, text)) in (0_u8..).zip(texts) {
        seeds.push(("json", name.to_owned(), [&[kind], text.as_bytes()].concat()));
    }
}

fn add_config_seeds(seeds: &mut Vec<Seed>) {
    let file = "cluster = \"blue\"\n[broker]\nid = 7\nrack = \"zone-a\"\n[grpc]\nlisten = \"0.0.0.0:1000\"\n\
                advertise = \"b7.example:1000\"\n[object_store]\nurl = \"s3://bucket/prefix\"\npath_style = true\n\
                [topic_defaults]\n\"segment.bytes\" = 1048576\nretention.ms = \"-1\"\n[log]\njournal_bytes = \"1GiB\"\n\
                [tier]\ngarbage_grace = \"90m\"\n";
    let environment = "STRANDLINE_BROKER_ID=9\nSTRANDLINE_TOPIC_DEFAULTS=segment.bytes=20000,retention.ms=5\n\
                       STRANDLINE_TELEMETRY_LEVEL=info,strandline::tier=debug\n";
    seeds.push(("config", "file".to_owned(), file.as_bytes().to_vec()));
    seeds.push(("config", "environment".to_owned(), format!("\0{environment}").into_bytes()));
    seeds.push(("config", "both".to_owned(), format!("{file}\0{environment}").into_bytes()));
}

fn add_produce_seeds(seeds: &mut Vec<Seed>) {
    let request = v1::ProduceRequest {
        correlation_id: 7,
        append: Some(v1::AppendRequest {
            topic: "a.topic".to_owned(),
            partition: 3,
            acks: v1::Acks::All.into(),
            timeout_ms: 30_000,
            payload: Some(Payload::Batch(batch(0, 1).to_bytes())),
            topic_id: "0b5d3c1e-4f0a-4c39-9d53-6f1f3c8f2a11".to_owned(),
        }),
    };
    seeds.push(("produce", "batch".to_owned(), request.encode_to_vec()));
}
