//! Compares the batch format with the independent `kafka-protocol` crate (its LZ4 is the C library), in both directions
//! and for every codec.
//!
//! The generated batches respect the limits of that crate. It stores headers in a map, so header names are unique. It
//! splits a batch at a gap in the sequences, so sequences are consecutive. It does not check timestamps for overflow,
//! so timestamps are within about 1,100 years of 1970.

#![allow(clippy::unwrap_used, reason = "in a test it is an assertion")]

use bytes::{Bytes, BytesMut};
use kafka_protocol::{
    protocol::StrBytes,
    records::{
        self as theirs, RecordBatchDecoder, RecordBatchEncoder, RecordEncodeOptions,
        TimestampType as TheirTimestampType,
    },
};
use proptest::prelude::*;
use strandline::{
    model::{Compression, LeaderEpoch, Offset},
    record::{Batch, BatchBuilder, Header, ProducerSequence, Record},
};

const CODECS: [(Compression, theirs::Compression); 5] = [
    (Compression::None, theirs::Compression::None),
    (Compression::Gzip, theirs::Compression::Gzip),
    (Compression::Snappy, theirs::Compression::Snappy),
    (Compression::Lz4, theirs::Compression::Lz4),
    (Compression::Zstd, theirs::Compression::Zstd),
];

/// Content of a batch that one implementation encodes and the other must decode.
#[derive(Clone, Debug)]
struct Written {
    base_offset: i64,
    epoch: i32,
    producer: ProducerSequence,
    records: Vec<Record>,
}

fn any_bytes(max_bytes: usize) -> impl Strategy<Value = Option<Bytes>> {
    // Random bytes and then one repeated byte, so that codecs can compress a part.
    let bytes = (proptest::collection::vec(any::<u8>(), 0..max_bytes), 0..max_bytes, any::<u8>())
        .prop_map(|(random, run, byte)| Bytes::from([random, vec![byte; run]].concat()));
    proptest::option::of(bytes)
}

fn any_record() -> impl Strategy<Value = Record> {
    let headers = proptest::collection::btree_map("\\PC{0,12}", any_bytes(20), 0..5)
        .prop_map(|headers| headers.into_iter().map(|(key, value)| Header { key, value }).collect());
    (-(1_i64 << 45)..1 << 45, any_bytes(40), any_bytes(3000), headers)
        .prop_map(|(timestamp_ms, key, value, headers)| Record { timestamp_ms, key, value, headers })
}

fn any_written() -> impl Strategy<Value = Written> {
    let records = proptest::collection::vec(any_record(), 1..60);
    (0..1_i64 << 60, 0..i32::MAX, 0..i64::MAX, 0..i16::MAX, 0..1 << 30, records).prop_map(
        |(base_offset, epoch, id, producer_epoch, base_sequence, records)| Written {
            base_offset,
            epoch,
            producer: ProducerSequence { id, epoch: producer_epoch, base_sequence },
            records,
        },
    )
}

impl Written {
    /// Encodes the batch with the library under test.
    fn encode_with_strandline(&self, codec: Compression) -> Batch {
        let mut builder = BatchBuilder::new(codec);
        for Record { timestamp_ms, key, value, headers } in &self.records {
            builder.push(*timestamp_ms, key.as_deref(), value.as_deref(), headers).unwrap();
        }
        let mut batch = builder.finish(Some(self.producer)).unwrap();
        batch.set_offset_and_epoch(
            Offset::from_i64(self.base_offset).unwrap(),
            LeaderEpoch::from_i32(self.epoch).unwrap(),
        );
        batch
    }

    /// Returns the records as types of the `kafka-protocol` crate.
    fn as_their_records(&self) -> Vec<theirs::Record> {
        let record = |(at, record): (i32, &Record)| theirs::Record {
            transactional: false,
            control: false,
            delete_horizon: false,
            partition_leader_epoch: self.epoch,
            producer_id: self.producer.id,
            producer_epoch: self.producer.epoch,
            timestamp_type: TheirTimestampType::Creation,
            offset: self.base_offset + i64::from(at),
            sequence: self.producer.base_sequence + at,
            timestamp: record.timestamp_ms,
            key: record.key.clone(),
            value: record.value.clone(),
            headers: record
                .headers
                .iter()
                .map(|header| (StrBytes::from_string(header.key.clone()), header.value.clone()))
                .collect(),
        };
        (0..).zip(&self.records).map(record).collect()
    }

    /// Encodes the batch with the `kafka-protocol` crate.
    fn encode_with_kafka_protocol(&self, codec: theirs::Compression) -> Bytes {
        let mut bytes = BytesMut::new();
        let options = RecordEncodeOptions { version: 2, compression: codec };
        RecordBatchEncoder::encode(&mut bytes, &self.as_their_records(), &options).unwrap();
        bytes.freeze()
    }
}

fn decode(batch: &Batch) -> Vec<(Offset, Record)> {
    batch.records().unwrap().collect::<Result<_, _>>().unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn other_implementation_reads_our_batches(written in any_written()) {
        for (ours, their) in CODECS {
            let mut bytes = written.encode_with_strandline(ours).to_bytes();
            let set = RecordBatchDecoder::decode(&mut bytes).unwrap();
            prop_assert!(bytes.is_empty(), "nothing is left over");
            prop_assert_eq!(set.compression, their);
            prop_assert_eq!(set.records, written.as_their_records());
        }
    }

    #[test]
    fn batches_of_other_implementation_are_read(written in any_written()) {
        for (ours, their) in CODECS {
            let batch = Batch::parse(written.encode_with_kafka_protocol(their)).unwrap();
            prop_assert_eq!(batch.compression(), ours);
            prop_assert_eq!(batch.base_offset().as_i64(), written.base_offset);
            prop_assert_eq!(batch.leader_epoch().unwrap().as_i32(), written.epoch);
            prop_assert_eq!(batch.producer(), Some(written.producer));
            prop_assert_eq!(batch.check_client(), Ok(()));
            prop_assert_eq!(batch.verify_records(), Ok(()));
            let expected: Vec<_> = (0..).map(|at| batch.base_offset().plus(at)).zip(written.records.clone()).collect();
            prop_assert_eq!(decode(&batch), expected);
        }
    }

    #[test]
    fn other_implementation_reads_recompressed_batches(written in any_written()) {
        for (_, from) in CODECS {
            let batch = Batch::parse(written.encode_with_kafka_protocol(from)).unwrap();
            for (to, their) in CODECS {
                let mut bytes = batch.recompress(to).unwrap().to_bytes();
                let set = RecordBatchDecoder::decode(&mut bytes).unwrap();
                prop_assert_eq!(set.compression, their);
                prop_assert_eq!(set.records, written.as_their_records());
            }
        }
    }
}

#[test]
fn append_time_is_read_by_other_implementation() {
    let record = Record { timestamp_ms: 5, value: Some(Bytes::from_static(b"v")), ..Record::default() };
    let producer = ProducerSequence { id: 1, epoch: 0, base_sequence: 0 };
    let mut batch = Written { base_offset: 9, epoch: 2, producer, records: vec![record; 3] }
        .encode_with_strandline(Compression::Zstd);
    batch.set_append_time(1_700_000_000_000);
    let info = RecordBatchDecoder::decode_batch_info(&mut batch.to_bytes()).unwrap();
    assert_eq!(info[0].timestamp_type, TheirTimestampType::LogAppend);
    assert_eq!(info[0].record_count, 3);
    assert!(decode(&batch).iter().all(|(_, record)| record.timestamp_ms == 1_700_000_000_000));
}

/// Runs Kafka's DumpLogSegments on a segment with batches of every codec, as built and recompressed. `KAFKA_DUMP` is
/// the path of the script that runs DumpLogSegments.
#[test]
#[ignore = "needs a JDK and Kafka's jars: make kafka-reader KAFKA_DUMP=script"]
fn kafkas_own_reader_accepts_every_codec() {
    let dump = std::env::var("KAFKA_DUMP").expect("KAFKA_DUMP is the path of the script");
    let folder = tempfile::tempdir().unwrap();
    let records: Vec<_> = (0..1000_u32)
        .map(|at| Record {
            timestamp_ms: 1_700_000_000_000 + i64::from(at),
            key: (at % 3 != 0).then(|| Bytes::from(format!("key {at}"))),
            value: (at % 5 != 0).then(|| Bytes::from("value ".repeat(at as usize % 200))),
            headers: vec![Header { key: "h".to_owned(), value: None }; at as usize % 3],
        })
        .collect();
    let mut segment = Vec::new();
    let mut end = 0;
    for (codec, _) in CODECS {
        let producer = ProducerSequence { id: 7, epoch: 0, base_sequence: i32::try_from(end).unwrap() };
        let written = Written { base_offset: end, epoch: 4, producer, records: records.clone() };
        let batch = written.encode_with_strandline(codec);
        segment.extend_from_slice(&batch.to_bytes());
        end = batch.end_offset().as_i64();
        let mut stamped = batch.recompress(Compression::Lz4).unwrap();
        stamped.set_offset_and_epoch(Offset::from_i64(end).unwrap(), LeaderEpoch(5));
        stamped.set_append_time(1_800_000_000_000);
        segment.extend_from_slice(&stamped.to_bytes());
        end = stamped.end_offset().as_i64();
    }
    let path = folder.path().join("00000000000000000000.log");
    std::fs::write(&path, &segment).unwrap();
    let output = std::process::Command::new(dump).arg(&path).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}\n{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(text.lines().filter(|line| line.starts_with("| offset:")).count(), 10 * records.len());
    for codec in ["none", "gzip", "snappy", "lz4", "zstd"] {
        assert!(text.contains(&format!("compresscodec: {codec}")), "{codec}");
    }
    assert!(text.contains("payload: value value"), "{text}");
}
