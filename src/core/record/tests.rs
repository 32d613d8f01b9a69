//! Tests of the public functions of batches: round trips, golden files, each flipped bit, each truncation, invalid
//! field values, decompression bombs.

mod first_records;

use bytes::{Bytes, BytesMut};
use proptest::prelude::*;

use super::{layout, *};
use crate::{
    limits,
    model::{Compression, LeaderEpoch, Offset, TimestampType},
};

const CODECS: [Compression; 5] =
    [Compression::None, Compression::Gzip, Compression::Snappy, Compression::Lz4, Compression::Zstd];

/// Golden batches of this builder, then of the Kafka client (`golden/Golden.java`). They never change, and every
/// version must read them.
const GOLDEN: [(Compression, &[u8]); 10] = [
    (Compression::None, include_bytes!("golden/none.batch")),
    (Compression::Gzip, include_bytes!("golden/gzip.batch")),
    (Compression::Snappy, include_bytes!("golden/snappy.batch")),
    (Compression::Lz4, include_bytes!("golden/lz4.batch")),
    (Compression::Zstd, include_bytes!("golden/zstd.batch")),
    (Compression::None, include_bytes!("golden/kafka/none.batch")),
    (Compression::Gzip, include_bytes!("golden/kafka/gzip.batch")),
    (Compression::Snappy, include_bytes!("golden/kafka/snappy.batch")),
    (Compression::Lz4, include_bytes!("golden/kafka/lz4.batch")),
    (Compression::Zstd, include_bytes!("golden/kafka/zstd.batch")),
];

const PRODUCER: ProducerSequence = ProducerSequence { id: 4_000_000_001, epoch: 7, base_sequence: 99 };

fn header(key: &str, value: Option<&'static [u8]>) -> Header {
    Header { key: key.to_owned(), value: value.map(Bytes::from_static) }
}

/// Records of each golden batch.
fn golden_records() -> Vec<Record> {
    let mut records = vec![
        Record {
            timestamp_ms: 1_700_000_000_000,
            key: Some(Bytes::from_static(b"key")),
            value: Some(Bytes::from_static(b"value")),
            headers: vec![header("trace", Some(b"\x00\xff")), header("trace", None), header("", Some(b""))],
        },
        Record { timestamp_ms: 1_699_999_999_000, ..Record::default() },
        Record {
            timestamp_ms: 1_700_000_000_500,
            key: Some(Bytes::new()),
            value: Some(Bytes::new()),
            headers: Vec::new(),
        },
    ];
    let line = b"The strandline is where the high water mark stood. ";
    records.extend((0..24_u8).map(|number| Record {
        timestamp_ms: 1_700_000_000_000 + i64::from(number),
        key: Some(Bytes::copy_from_slice(&[number])),
        value: Some(Bytes::copy_from_slice(&line.repeat(usize::from(number) / 4))),
        headers: Vec::new(),
    }));
    records
}

fn build(codec: Compression, records: &[Record], producer: Option<ProducerSequence>) -> Batch {
    let mut builder = BatchBuilder::new(codec);
    for record in records {
        let before = builder.encoded_len();
        let (key, value) = (record.key.as_deref(), record.value.as_deref());
        builder.push(record.timestamp_ms, key, value, &record.headers).unwrap();
        assert!(builder.encoded_len() - before <= BatchBuilder::record_len(key, value, &record.headers));
    }
    builder.finish(producer).unwrap()
}

fn decode(batch: &Batch) -> Result<Vec<(Offset, Record)>, MalformedBatch> {
    batch.records()?.collect()
}

/// Returns a batch with a correct header and `records` as its records, as a faulty or hostile producer sends it.
fn forge(codec: Compression, count: i32, records: &[u8]) -> Batch {
    let mut bytes = build(Compression::None, &[Record::default()], None).header().to_vec();
    bytes[layout::BATCH_LENGTH..][..4].copy_from_slice(&i32::try_from(49 + records.len()).unwrap().to_be_bytes());
    bytes[layout::ATTRIBUTES + 1] = codec as u8;
    bytes[layout::LAST_OFFSET_DELTA..][..4].copy_from_slice(&(count - 1).to_be_bytes());
    bytes[layout::RECORDS_COUNT..][..4].copy_from_slice(&count.to_be_bytes());
    bytes.extend_from_slice(records);
    Batch::parse(with_correct_crc(bytes)).unwrap()
}

fn with_correct_crc(mut bytes: Vec<u8>) -> Bytes {
    let crc = crc32c::crc32c(&bytes[layout::CRC_START..]);
    bytes[layout::CRC..][..4].copy_from_slice(&crc.to_be_bytes());
    bytes.into()
}

#[test]
fn golden_batches_of_each_codec_are_readable() {
    for (codec, bytes) in GOLDEN {
        let batch = Batch::parse(Bytes::from_static(bytes)).unwrap();
        assert_eq!(batch.compression(), codec);
        assert_eq!(batch.base_offset(), Offset::new(1 << 40).unwrap());
        assert_eq!(batch.leader_epoch(), Some(LeaderEpoch(3)));
        assert_eq!(batch.producer(), Some(PRODUCER));
        assert_eq!(batch.base_timestamp(), 1_700_000_000_000);
        assert_eq!(batch.max_timestamp(), 1_700_000_000_500);
        batch.verify_records().unwrap();
        let (offsets, records): (Vec<_>, Vec<_>) = decode(&batch).unwrap().into_iter().unzip();
        assert_eq!(records, golden_records(), "{codec}");
        assert!(offsets.iter().zip(0..).all(|(offset, at)| *offset == batch.base_offset().plus(at)));
        assert_eq!(batch.end_offset().since(batch.base_offset()), records.len() as u64);
    }
}

#[test]
fn builder_writes_the_golden_bytes() {
    let mut batch = build(Compression::None, &golden_records(), Some(PRODUCER));
    batch.set_offset_and_epoch(Offset::new(1 << 40).unwrap(), LeaderEpoch(3));
    assert_eq!(batch.to_bytes(), GOLDEN[0].1);
    assert_eq!(GOLDEN[0].1, GOLDEN[5].1, "and so does Kafka");
}

/// Writes missing files to `golden/` and never changes existing files. Run this when a codec is added.
#[test]
#[ignore = "writes into the source tree: make golden"]
fn write_missing_golden_files() {
    for codec in CODECS {
        let path = format!("{}/record/golden/{codec}.batch", env!("CARGO_MANIFEST_DIR"));
        let mut batch = build(codec, &golden_records(), Some(PRODUCER));
        batch.set_offset_and_epoch(Offset::new(1 << 40).unwrap(), LeaderEpoch(3));
        if std::fs::metadata(&path).is_ok_and(|file| file.len() > 0) {
            continue;
        }
        std::fs::write(path, batch.to_bytes()).unwrap();
    }
}

#[test]
fn flipped_bit_is_detected_outside_offset_and_epoch() {
    for (codec, golden) in GOLDEN {
        for bit in 0..golden.len() * 8 {
            let mut bytes = golden.to_vec();
            bytes[bit / 8] ^= 1 << (bit % 8);
            let byte = bit / 8;
            let is_set_by_leader = (layout::BASE_OFFSET..layout::BATCH_LENGTH).contains(&byte)
                || (layout::LEADER_EPOCH..layout::MAGIC_AT).contains(&byte);
            match Batch::parse(bytes.into()) {
                Err(_) => {}
                Ok(batch) => {
                    assert!(is_set_by_leader, "{codec}: bit {bit} was not detected");
                    assert_eq!(&batch.to_bytes()[layout::CRC_START..], &golden[layout::CRC_START..]);
                }
            }
        }
    }
}

#[test]
fn batch_prefix_of_any_length_is_rejected() {
    for (codec, golden) in GOLDEN {
        for len in 0..golden.len() {
            let mut prefix = Bytes::from_static(&golden[..len]);
            let error = Batch::split_from(&mut prefix).unwrap_err();
            assert!(matches!(error, MalformedBatch::Truncated { .. }), "{codec} truncated at {len}: {error}");
            assert_eq!(prefix.len(), len, "an error consumes no bytes");
        }
    }
}

/// Each batch has a correct CRC, as from a producer whose compressor stopped early, so only the checks of the records
/// can detect the truncation.
#[test]
fn compressed_records_prefix_of_any_length_is_rejected() {
    for (codec, golden) in GOLDEN {
        let records = &golden[HEADER_BYTES..];
        for len in 0..records.len() {
            let batch = forge(codec, 27, &records[..len]);
            let error = decode(&batch).expect_err("a truncated batch has no 27 records");
            assert_eq!(batch.verify_records(), Err(error.clone()), "both functions agree");
            assert!(
                matches!(
                    error,
                    MalformedBatch::Record { .. } | MalformedBatch::Compression { .. } | MalformedBatch::Grows { .. }
                ),
                "{codec}: {error}"
            );
        }
    }
}

#[test]
fn bytes_after_compressed_records_are_rejected() {
    for (codec, golden) in GOLDEN {
        for tail in [&[0][..], &[0; 4], &[0xff; 9]] {
            let batch = forge(codec, 27, &[&golden[HEADER_BYTES..], tail].concat());
            assert!(batch.verify_records().is_err(), "{codec} with {} bytes more", tail.len());
        }
    }
}

#[test]
fn count_that_differs_from_the_records_is_rejected() {
    let golden = &GOLDEN[0].1[HEADER_BYTES..];
    let reason = |count| match decode(&forge(Compression::None, count, golden)).unwrap_err() {
        MalformedBatch::Record { index, reason } => (index, reason),
        other => panic!("{other}"),
    };
    assert_eq!(reason(26), (25, "bytes follow the last record"));
    assert_eq!(reason(28), (27, "the bytes end before it, and recordsCount is larger"));
    assert_eq!(reason(i32::try_from(limits::MAX_BATCH_RECORDS).unwrap()).0, 27);
}

#[test]
fn invalid_header_fields_are_rejected() {
    let golden = GOLDEN[0].1;
    let with = |at: usize, value: &[u8]| {
        let mut bytes = golden.to_vec();
        bytes[at..at + value.len()].copy_from_slice(value);
        Batch::parse(with_correct_crc(bytes)).unwrap_err()
    };
    for length in [i32::MIN, -1, 0, 48, i32::MAX] {
        assert!(matches!(with(layout::BATCH_LENGTH, &length.to_be_bytes()), MalformedBatch::Length { .. }), "{length}");
    }
    assert!(matches!(with(layout::BATCH_LENGTH, &(1_i32 << 20).to_be_bytes()), MalformedBatch::Truncated { .. }));
    assert!(matches!(with(layout::BATCH_LENGTH, &49_i32.to_be_bytes()), MalformedBatch::Crc { .. }));
    for (count, delta) in [(0, -1), (-1, -2), (i32::MIN, i32::MAX), (27, 25), (27, 27), (i32::MAX, i32::MAX - 1)] {
        let bytes = [delta.to_be_bytes().as_slice(), &golden[27..57], &count.to_be_bytes()].concat();
        let error = with(layout::LAST_OFFSET_DELTA, &bytes);
        assert_eq!(error, MalformedBatch::Counts { count, last_offset_delta: delta });
    }
    for magic in [0, 1, 3, 0xff] {
        assert_eq!(with(layout::MAGIC_AT, &[magic]), MalformedBatch::Magic { magic });
    }
    for codec in 5..8_u16 {
        assert!(matches!(with(layout::ATTRIBUTES, &codec.to_be_bytes()), MalformedBatch::Attributes { .. }));
    }
    for (offset, epoch) in [(-1, 0), (i64::MIN, 0), (i64::MAX, 0), (i64::MAX - 26, 0), (0, -2), (0, i32::MIN)] {
        let mut bytes = golden.to_vec();
        bytes[..8].copy_from_slice(&offset.to_be_bytes());
        bytes[12..16].copy_from_slice(&epoch.to_be_bytes());
        let error = Batch::parse(bytes.into()).unwrap_err();
        assert_eq!(error, MalformedBatch::OffsetOrEpoch { base_offset: offset, leader_epoch: epoch });
    }
}

#[test]
fn invalid_record_fields_are_rejected() {
    let huge = [0xfe, 0xff, 0xff, 0xff, 0x0f]; // 2^31 - 1
    let min = [0xff, 0xff, 0xff, 0xff, 0x0f]; // -2^31
    for (records, reason) in [
        (vec![], "the bytes end before it, and recordsCount is larger"),
        (vec![0x80], "its length is not a varint"),
        (vec![0xff; 6], "its length is not a varint"),
        (min.to_vec(), "its length is negative"),
        (vec![0x01], "its length is negative"),
        (huge.to_vec(), "it ends after the batch"),
        (vec![0x0e, 0, 0, 0, 1, 1], "it ends after the batch"),
        (vec![0x00], "its length is too small for its fields"),
        (vec![0x02, 0], "its timestamp is not a varint"),
        ([&[0x18, 0][..], &[0xff; 11]].concat(), "its timestamp is not a varint"),
        (vec![0x04, 0, 0], "its offset is not a varint"),
        (vec![0x0c, 0, 0, 2, 1, 1, 0], "its offset is not the next one"),
        (vec![0x0c, 0, 0, 1, 1, 1, 0], "its offset is not the next one"),
        (vec![0x0c, 0, 0, 0, 3, 1, 0], "the length of its key is not possible"),
        (vec![0x0c, 0, 0, 0, 6, 1, 0], "the length of its key is not possible"),
        ([&[0x14, 0, 0, 0][..], &huge, &[1, 0]].concat(), "the length of its key is not possible"),
        (vec![0x0c, 0, 0, 0, 1, 4, 0], "the length of its value is not possible"),
        ([&[0x14, 0, 0, 0, 1][..], &huge, &[0]].concat(), "the length of its value is not possible"),
        (vec![0x0a, 0, 0, 0, 1, 1], "its header count is not a varint"),
        (vec![0x0c, 0, 0, 0, 1, 1, 1], "its header count is negative"),
        ([&[0x14, 0, 0, 0, 1, 1][..], &huge].concat(), "it has too many headers"),
        (vec![0x0e, 0, 0, 0, 1, 1, 0, 0], "bytes follow its headers"),
        (vec![0x10, 0, 0, 0, 1, 1, 2, 1, 1], "a header has no key"),
        (vec![0x10, 0, 0, 0, 1, 1, 2, 4, 1], "the length of a header key is not possible"),
        (vec![0x10, 0, 0, 0, 1, 1, 2, 0, 2], "the length of a header value is not possible"),
        (vec![0x0c, 0, 0, 0, 1, 1, 0, 9], "bytes follow the last record"),
    ] {
        let batch = forge(Compression::None, 1, &records);
        let error = MalformedBatch::Record { index: 0, reason };
        assert_eq!(decode(&batch), Err(error.clone()), "{records:02x?}");
        assert_eq!(batch.verify_records(), Err(error), "{records:02x?}");
    }
    assert_eq!(decode(&forge(Compression::None, 1, &[0x0c, 0, 0, 0, 1, 1, 0])).unwrap().len(), 1, "the valid record");
}

#[test]
fn iterator_ends_after_an_error() {
    let mut records = forge(Compression::None, 3, &[0x0c, 0, 0, 0, 1, 1, 0, 0x01]).records().unwrap();
    assert!(records.next().unwrap().is_ok());
    assert!(records.next().unwrap().is_err());
    assert_eq!(records.next(), None);
}

#[test]
fn header_name_with_invalid_utf8_is_replaced() {
    let batch = forge(Compression::None, 1, &[0x12, 0, 0, 0, 1, 1, 2, 2, 0xff, 0]);
    let records = decode(&batch).unwrap();
    assert_eq!(records[0].1.headers, [header("\u{fffd}", Some(b""))]);
}

#[test]
fn append_time_is_the_timestamp_of_all_records() {
    let mut batch = build(Compression::Lz4, &golden_records(), None);
    batch.set_append_time(42);
    let batch = Batch::parse(batch.to_bytes()).unwrap();
    assert_eq!(batch.timestamp_type(), TimestampType::LogAppendTime);
    assert!(decode(&batch).unwrap().iter().all(|(_, record)| record.timestamp_ms == 42));
}

#[test]
fn recompression_changes_only_the_codec() {
    for (_, golden) in GOLDEN {
        let from = Batch::parse(Bytes::from_static(golden)).unwrap();
        for codec in CODECS {
            let to = from.recompress(codec).unwrap();
            let to = Batch::parse(to.to_bytes()).unwrap();
            assert_eq!(to.compression(), codec);
            assert_eq!(decode(&to), decode(&from));
            assert_eq!(to.header()[..8], from.header()[..8], "offset");
            assert_eq!(to.header()[12..17], from.header()[12..17], "leader epoch and magic");
            assert_eq!(to.header()[23..], from.header()[23..], "deltas, timestamps, producer, count");
        }
    }
    let mut batch = build(Compression::None, &golden_records(), None);
    batch.set_append_time(42);
    assert_eq!(batch.recompress(Compression::Zstd).unwrap().timestamp_type(), TimestampType::LogAppendTime);
}

#[test]
fn producer_fields_must_be_complete_or_absent() {
    let check = |id: i64, epoch: i16, base_sequence: i32| {
        let mut batch = build(Compression::None, &golden_records(), None);
        batch.set_producer(Some(ProducerSequence { id, epoch, base_sequence }));
        Batch::parse(batch.to_bytes()).unwrap().check_client()
    };
    for epoch in [i16::MIN, -2, -1, 0, 1, i16::MAX] {
        for base_sequence in [i32::MIN, -2, -1, 0, 1, i32::MAX] {
            for id in [0, 7, i64::MAX] {
                let is_complete = epoch >= 0 && base_sequence >= 0;
                assert_eq!(check(id, epoch, base_sequence).is_ok(), is_complete, "{id} {epoch} {base_sequence}");
            }
            let is_absent = matches!(epoch, -1 | 0) && matches!(base_sequence, -1 | 0);
            assert_eq!(check(-1, epoch, base_sequence).is_ok(), is_absent, "-1 {epoch} {base_sequence}");
            for id in [i64::MIN, -2] {
                let refused = Err(MalformedBatch::Producer { id, epoch, base_sequence });
                assert_eq!(check(id, epoch, base_sequence), refused);
            }
        }
    }
}

/// Regression: a `maxTimestamp` of 1970 deleted the records, and one of the far future matched every search by time.
#[test]
fn max_timestamp_is_corrected_from_the_records() {
    let records = [5, 9, 7].map(|timestamp_ms| Record { timestamp_ms, ..Record::default() });
    for codec in CODECS {
        let correct = build(codec, &records, None);
        assert_eq!(correct.max_timestamp(), 9);
        for stated in [i64::MIN, 0, 9, 1 << 62] {
            let mut bytes = BytesMut::from(&correct.to_bytes()[..]);
            bytes[35..43].copy_from_slice(&stated.to_be_bytes());
            let crc = crc32c::crc32c(&bytes[21..]);
            bytes[17..21].copy_from_slice(&crc.to_be_bytes());
            let mut batch = Batch::parse(bytes.freeze()).unwrap();
            for other in CODECS.into_iter().filter(|other| *other != codec) {
                assert_eq!(batch.recompress(other).unwrap().max_timestamp(), 9, "{codec} to {other}, {stated}");
            }
            let range = batch.correct_max_timestamp().unwrap();
            assert_eq!(range, batch.timestamp_range(), "{codec}, {stated}");
            let batch = Batch::parse(batch.to_bytes()).unwrap();
            match codec {
                Compression::None => assert_eq!(batch, correct),
                // Of compressed records only the first timestamp, 5, is known: a lower value is raised to it.
                _ => assert_eq!(batch.max_timestamp(), stated.max(5), "{codec}"),
            }
        }
    }
}

#[test]
fn timestamp_range_covers_all_uncompressed_records() {
    let records = [5, -1, 9, 3].map(|timestamp_ms| Record { timestamp_ms, ..Record::default() });
    for codec in CODECS {
        let mut batch = build(codec, &records, None);
        let other = if codec == Compression::None { Compression::Zstd } else { Compression::None };
        let (_, range) = batch.recompress_within(other, usize::MAX).unwrap();
        assert_eq!(range, TimestampRange { min: 3, max: 9 }, "{codec}");
        let known = if codec == Compression::None { 3 } else { 5 };
        assert_eq!(batch.correct_max_timestamp().unwrap(), TimestampRange { min: known, max: 9 }, "{codec}");
    }
    let without = build(Compression::None, &[Record { timestamp_ms: -1, ..Record::default() }], None);
    assert_eq!(without.timestamp_range(), TimestampRange { min: i64::MAX, max: -1 });
}

#[test]
fn declared_length_of_a_bomb_is_read_without_decompression() {
    let zeros = vec![0; 8 << 20];
    for codec in [Compression::Gzip, Compression::Snappy, Compression::Zstd] {
        let stored = super::compression::compress(codec, &zeros);
        assert_eq!(super::compression::declared_len(codec, &stored), Some(zeros.len()), "{codec}");
    }
    let frame = lz4_flex::frame::FrameInfo::new().content_size(Some(zeros.len() as u64));
    let mut encoder = lz4_flex::frame::FrameEncoder::with_frame_info(frame, Vec::new());
    std::io::Write::write_all(&mut encoder, &zeros).unwrap();
    assert_eq!(super::compression::declared_len(Compression::Lz4, &encoder.finish().unwrap()), Some(zeros.len()));
    for codec in CODECS {
        assert_eq!(super::compression::declared_len(codec, &[]).unwrap_or(0), 0, "{codec} of nothing");
    }
}

#[test]
fn recompression_above_the_maximum_size_is_rejected() {
    let value = vec![0; limits::MAX_BATCH_BYTES - 40];
    let batch = build(Compression::Zstd, &[Record { value: Some(value.into()), ..Record::default() }], None);
    assert!(batch.encoded_len() < 1 << 20);
    assert!(matches!(batch.recompress(Compression::None), Err(MalformedBatch::Length { .. })));
}

#[test]
fn builder_enforces_its_limits() {
    assert_eq!(BatchBuilder::new(Compression::None).finish(None).unwrap_err(), BuildError::Empty);

    let mut builder = BatchBuilder::new(Compression::None);
    let large = vec![0; limits::MAX_BATCH_BYTES - 60];
    assert!(matches!(builder.push(0, None, Some(&large), &[]), Err(BuildError::TooLarge { .. })));
    let headers = vec![Header::default(); limits::MAX_RECORD_HEADERS + 1];
    assert!(matches!(builder.push(0, None, None, &headers), Err(BuildError::TooManyHeaders { .. })));
    builder.push(0, None, None, &headers[1..]).unwrap();
    assert_eq!(builder.count(), 1, "a rejected record leaves the batch unchanged");

    let mut builder = BatchBuilder::with_capacity(Compression::Zstd, 7 * limits::MAX_BATCH_RECORDS);
    assert!(builder.is_empty());
    for _ in 0..limits::MAX_BATCH_RECORDS {
        builder.push(0, None, None, &[]).unwrap();
    }
    assert!(matches!(builder.push(0, None, None, &[]), Err(BuildError::TooManyRecords { .. })));
    let batch = builder.finish(None).unwrap();
    assert_eq!(batch.count() as usize, limits::MAX_BATCH_RECORDS);
    batch.verify_records().unwrap();
}

#[test]
fn uncompressed_batch_reuses_the_builder_buffer() {
    let mut builder = BatchBuilder::with_capacity(Compression::None, 4096);
    builder.push(0, None, Some(&[1; 1024]), &[]).unwrap();
    let buffer = builder.records_ptr();
    let batch = builder.finish(None).unwrap();
    assert_eq!(batch.records_bytes().as_ptr(), buffer);
    let (_, record) = batch.records().unwrap().next().unwrap().unwrap();
    assert!(batch.records_bytes().as_ptr_range().contains(&record.value.unwrap().as_ptr()), "read in place too");
}

#[test]
fn decompression_stops_at_the_maximum() {
    let max = 1 << 20;
    let zeros = vec![0; 8 << 20];
    for codec in CODECS {
        let stored = super::compression::compress(codec, &zeros);
        let error = decompress(codec, &stored, max).unwrap_err();
        if codec != Compression::None {
            assert!(stored.len() * 20 < zeros.len(), "{codec} makes a bomb");
        }
        assert!(error.to_string().contains("1048576"), "{codec}: {error}");
        assert_eq!(decompress(codec, &stored, zeros.len()).unwrap(), zeros, "{codec}: at the bound it is no bomb");
        assert!(decompress(codec, &stored, zeros.len() - 1).is_err(), "{codec}: one byte above the bound");
    }
}

#[test]
fn batch_with_a_bomb_is_rejected() {
    let zeros = std::io::Read::take(std::io::repeat(0), limits::MAX_DECOMPRESSED_BYTES as u64 + 1);
    let stored = zstd::stream::encode_all(zeros, 1).unwrap();
    let batch = forge(Compression::Zstd, 1, &stored);
    assert!(matches!(batch.records().unwrap_err(), MalformedBatch::Grows { .. }));
    assert!(matches!(batch.verify_records().unwrap_err(), MalformedBatch::Grows { .. }));
    assert!(matches!(batch.recompress(Compression::None).unwrap_err(), MalformedBatch::Grows { .. }));
}

/// A snappy block and two zstd frames of a few bytes declare a large content or window. These bytes are rejected, and
/// no such buffer is allocated.
#[test]
fn declared_length_is_not_allocated() {
    let snappy = [0xff, 0xff, 0xff, 0xff, 0x0f, 0x00, b'a'];
    let error = decompress(Compression::Snappy, &snappy, usize::MAX).unwrap_err().to_string();
    assert!(error.contains("cannot decompress to 4294967295 bytes"), "{error}");

    // A frame header with an 8-byte content size of 2^62, and one with the largest window; no blocks.
    let sized = [0x28, 0xb5, 0x2f, 0xfd, 0xc0, 0x00, 0, 0, 0, 0, 0, 0, 0, 0x40];
    let windowed = [0x28, 0xb5, 0x2f, 0xfd, 0x00, 0xf8];
    for zstd in [&sized[..], &windowed] {
        assert!(decompress(Compression::Zstd, zstd, 1 << 40).is_err());
    }
}

#[test]
fn streams_of_other_encoders_are_readable() {
    let uncompressed = b"strandline ".repeat(9_000);
    let bare = snap::raw::Encoder::new().compress_vec(&uncompressed).unwrap();
    assert_eq!(decompress(Compression::Snappy, &bare, uncompressed.len()).unwrap(), uncompressed, "bare snappy");

    let members = [&uncompressed[..1000], &uncompressed[1000..]]
        .map(|part| super::compression::compress(Compression::Gzip, part));
    assert_eq!(
        decompress(Compression::Gzip, &members.concat(), uncompressed.len()).unwrap(),
        uncompressed,
        "two gzip members"
    );

    use lz4_flex::frame::{BlockMode, BlockSize, FrameEncoder, FrameInfo};
    for mode in [BlockMode::Independent, BlockMode::Linked] {
        for size in [BlockSize::Max64KB, BlockSize::Max4MB] {
            let frame = FrameInfo::new()
                .block_mode(mode)
                .block_size(size)
                .block_checksums(true)
                .content_checksum(true)
                .content_size(Some(uncompressed.len() as u64));
            let mut encoder = FrameEncoder::with_frame_info(frame, Vec::new());
            std::io::Write::write_all(&mut encoder, &uncompressed).unwrap();
            let mut stored = encoder.finish().unwrap();
            assert_eq!(
                decompress(Compression::Lz4, &stored, uncompressed.len()).unwrap(),
                uncompressed,
                "{mode:?} {size:?}"
            );
            for byte in 0..stored.len() {
                stored[byte] ^= 1;
                assert!(decompress(Compression::Lz4, &stored, 1 << 20).is_err(), "{mode:?} {size:?}: byte {byte}");
                stored[byte] ^= 1;
            }
        }
    }

    let mut streamed = zstd::stream::Encoder::new(Vec::new(), 19).unwrap();
    std::io::Write::write_all(&mut streamed, &uncompressed).unwrap();
    let stored = streamed.finish().unwrap();
    assert_eq!(
        decompress(Compression::Zstd, &stored, uncompressed.len()).unwrap(),
        uncompressed,
        "zstd without a declared size"
    );
}

/// The frame has a correct header checksum and no content checksum, so only the comparison with the declared content
/// size can detect the wrong size.
#[test]
fn lz4_frame_with_wrong_content_size_is_rejected() {
    let frame = |size: u64| {
        let descriptor = [&[0x68, 0x40][..], &size.to_le_bytes()].concat();
        let checksum = twox_hash::XxHash32::oneshot(0, &descriptor).to_le_bytes()[1];
        [b"\x04\x22\x4d\x18", &descriptor[..], &[checksum], b"\x03\0\0\x80abc", &[0; 4]].concat()
    };
    assert_eq!(decompress(Compression::Lz4, &frame(3), 10).unwrap(), "abc");
    for size in [0, 2, 4, u64::MAX] {
        let error = decompress(Compression::Lz4, &frame(size), usize::MAX).unwrap_err().to_string();
        assert!(error.contains("the length that the frame declares"), "{size}: {error}");
    }
}

/// Checks that `records` and `verify_records` agree whether a batch is well formed, that `check_first_records` accepts
/// every well-formed batch, and that none of the three panics.
fn check_consistency(bytes: Vec<u8>) {
    let Ok(batch) = Batch::parse(bytes.into()) else { return };
    assert_eq!(decode(&batch).map(|_| ()), batch.verify_records());
    if let Err(error) = batch.check_first_records() {
        assert!(batch.verify_records().is_err(), "rejected, but can be decoded: {error}");
    }
}

fn any_bytes() -> impl Strategy<Value = Option<Bytes>> {
    proptest::option::of(proptest::collection::vec(any::<u8>(), 0..200).prop_map(Bytes::from))
}

fn any_record() -> impl Strategy<Value = Record> {
    let header = ("\\PC{0,20}", any_bytes()).prop_map(|(key, value)| Header { key, value });
    (any::<i64>(), any_bytes(), any_bytes(), proptest::collection::vec(header, 0..4))
        .prop_map(|(timestamp_ms, key, value, headers)| Record { timestamp_ms, key, value, headers })
}

proptest! {
    #[test]
    fn any_records_survive_in_any_codec(
        records in proptest::collection::vec(any_record(), 1..20),
        codec in proptest::sample::select(&CODECS[..]),
        base in 0..=i64::MAX - 20,
        producer in proptest::option::of((0..i64::MAX, 0..i16::MAX, 0..i32::MAX)),
    ) {
        let producer = producer.map(|(id, epoch, base_sequence)| ProducerSequence { id, epoch, base_sequence });
        let mut batch = build(codec, &records, producer);
        batch.set_offset_and_epoch(Offset::from_i64(base).unwrap(), LeaderEpoch(1));
        let batch = Batch::parse(batch.to_bytes()).unwrap();
        prop_assert_eq!(batch.producer(), producer);
        prop_assert_eq!(batch.max_timestamp(), records.iter().map(|record| record.timestamp_ms).max().unwrap());
        prop_assert_eq!(batch.verify_records(), Ok(()));
        prop_assert_eq!(batch.check_first_records(), Ok(()));
        let expected: Vec<_> = (0..).map(|at| batch.base_offset().plus(at)).zip(records).collect();
        prop_assert_eq!(decode(&batch).unwrap(), expected);
    }

    #[test]
    fn any_bytes_are_refused_or_read_without_a_panic(bytes: Vec<u8>) {
        check_consistency(bytes);
    }

    #[test]
    fn any_compressed_bytes_are_refused_or_read_without_a_panic(
        golden in proptest::sample::select(&GOLDEN[..]),
        changes in proptest::collection::vec((any::<proptest::sample::Index>(), any::<u8>()), 1..6),
    ) {
        let mut records = golden.1[HEADER_BYTES..].to_vec();
        for (at, byte) in changes {
            let at = at.index(records.len());
            records[at] = byte;
        }
        check_consistency(forge(golden.0, 27, &records).to_bytes().to_vec());
    }
}
