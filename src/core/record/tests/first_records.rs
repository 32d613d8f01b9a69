//! Tests of the check of compressed records at an append. The check accepts all correct batches and rejects faulty
//! ones. The decoded prefix is the beginning of the uncompressed bytes.

use super::*;

/// Returns the encoded records of these values, without compression.
fn framed(values: &[Vec<u8>]) -> Bytes {
    let records: Vec<_> =
        values.iter().map(|value| Record { value: Some(value.clone().into()), ..Record::default() }).collect();
    build(Compression::None, &records, None).records_bytes().clone()
}

/// Returns the bytes compressed as librdkafka, snappy-java, zstd-jni and Java's gzip do, and in other forms that the
/// formats allow.
fn encode_in_all_forms(uncompressed: &[u8]) -> Vec<(Compression, Vec<u8>)> {
    use lz4_flex::frame::{BlockMode, BlockSize, FrameEncoder, FrameInfo};
    let mut streams: Vec<_> =
        CODECS.map(|codec| (codec, crate::record::compression::compress(codec, uncompressed).to_vec())).into();
    streams.push((Compression::Snappy, snap::raw::Encoder::new().compress_vec(uncompressed).unwrap()));
    let (first, second) = uncompressed.split_at(uncompressed.len() / 3);
    for codec in [Compression::Gzip, Compression::Zstd] {
        let members = [first, second].map(|part| crate::record::compression::compress(codec, part));
        streams.push((codec, members.concat()));
    }
    for (mode, size) in [(BlockMode::Linked, BlockSize::Max64KB), (BlockMode::Independent, BlockSize::Max4MB)] {
        let frame = FrameInfo::new().block_mode(mode).block_size(size).block_checksums(true).content_checksum(true);
        let mut encoder = FrameEncoder::with_frame_info(frame, Vec::new());
        std::io::Write::write_all(&mut encoder, uncompressed).unwrap();
        streams.push((Compression::Lz4, encoder.finish().unwrap()));
    }
    streams.push((Compression::Zstd, zstd::stream::encode_all(uncompressed, 3).unwrap()));
    let mut encoder = zstd::Encoder::new(Vec::new(), 1).unwrap();
    encoder.include_checksum(true).unwrap();
    std::io::Write::write_all(&mut encoder, uncompressed).unwrap();
    let skippable = [&0x184D_2A50_u32.to_le_bytes()[..], &3_u32.to_le_bytes(), b"pad"].concat();
    streams.push((Compression::Zstd, [skippable, encoder.finish().unwrap()].concat()));
    streams
}

#[test]
fn first_records_of_valid_batches_are_accepted() {
    for bytes in [0, 1, 60, 4_000, 4_096, 5_000, 70_000, 300_000] {
        let values = [
            vec![b"strandline ".repeat(bytes / 11 + 1)],
            vec![b"line".to_vec(); bytes / 11 + 1],
            // One repeated byte, which zstd stores as RLE blocks.
            vec![vec![b'x'; bytes]],
        ];
        for values in values {
            let uncompressed = framed(&values);
            for (codec, stored) in encode_in_all_forms(&uncompressed) {
                let batch = forge(codec, i32::try_from(values.len()).unwrap(), &stored);
                assert_eq!(batch.verify_records(), Ok(()), "{codec}, {bytes} bytes in {} records", values.len());
                assert_eq!(batch.check_first_records(), Ok(()), "{codec}, {bytes} bytes in {} records", values.len());
            }
        }
    }
}

#[test]
fn first_records_that_cannot_be_decoded_are_rejected() {
    let noise = vec![0xa5; 200];
    let large = framed(&vec![b"a line of a log".to_vec(); 20_000]);
    let mut misplaced = large.to_vec();
    // Position of the offset of the first record: after its length, attributes and timestamp.
    misplaced[3] = 2;
    for codec in CODECS.into_iter().filter(|codec| *codec != Compression::None) {
        let reject = |count, stored: &[u8], problem: &str| {
            let error = forge(codec, count, stored).check_first_records().expect_err(problem);
            assert!(forge(codec, count, stored).verify_records().is_err(), "{codec}, {problem}");
            error
        };
        let error = reject(1, &noise, "noise").to_string();
        assert!(error.contains("cannot be decompressed") && !error.contains("fewer records"), "{codec}: {error}");
        let one_record = crate::record::compression::compress(codec, &framed(&[b"one".to_vec()]));
        reject(1_000_000, &one_record, "a count of 10^6");
        reject(2, &one_record, "a count of 2");
        let above_prefix = crate::record::compression::compress(codec, &framed(&[vec![b'x'; 5_000]]));
        reject(1_000_000, &above_prefix, "a count of 10^6 beside a record of 5,000 bytes");
        let trailing =
            crate::record::compression::compress(codec, &[&framed(&[b"one".to_vec()])[..], b"more"].concat());
        assert!(matches!(reject(1, &trailing, "trailing bytes"), MalformedBatch::Record { index: 0, .. }), "{codec}");
        if codec != Compression::Zstd {
            let stored = crate::record::compression::compress(codec, &misplaced);
            assert!(
                matches!(reject(20_000, &stored, "a wrong offset"), MalformedBatch::Record { index: 0, .. }),
                "{codec}"
            );
        }
        let stored = crate::record::compression::compress(codec, &large);
        if matches!(codec, Compression::Zstd) {
            reject(20_000, &stored[..stored.len() - 1], "a truncated frame");
        }
    }
}

/// A streaming encoder declares no length, and a declared length can be wrong. The check therefore bounds the number of
/// records by the lengths of the blocks.
#[test]
fn count_above_the_zstd_block_lengths_is_rejected() {
    // Random bytes make a raw block, whose content has its stored length.
    let mut noise = vec![0; 5_000];
    crate::task::random::fill(&mut noise);
    let uncompressed = framed(&[noise]);
    let streamed = zstd::stream::encode_all(&uncompressed[..], 3).expect("written to memory");
    assert_eq!(forge(Compression::Zstd, 1, &streamed).check_first_records(), Ok(()));
    let mut declaring = zstd::bulk::compress(&uncompressed, 3).expect("written to memory");
    assert_eq!(forge(Compression::Zstd, 1, &declaring).check_first_records(), Ok(()));
    assert_eq!(declaring[4] >> 6, 1, "the content's size is in two bytes");
    declaring[5..7].copy_from_slice(&60_000_u16.to_le_bytes());
    for (stored, count, what) in
        [(&streamed, 1_000_000, "no declared length"), (&declaring, 5_000, "a wrong declared length")]
    {
        let batch = forge(Compression::Zstd, count, stored);
        assert!(batch.verify_records().is_err(), "{what}");
        let error = batch.check_first_records().expect_err(what).to_string();
        assert!(error.contains(&count.to_string()), "{what}: {error}");
    }
}

proptest! {
    #[test]
    fn prefix_equals_the_decompressed_bytes(
        words in proptest::collection::vec(proptest::sample::select(&["log", "line ", "\0\0\0", "0123456789abcdef", "é"][..]), 0..4_000),
        max in 1..5_000_usize,
    ) {
        let uncompressed = words.concat().into_bytes();
        for (codec, stored) in encode_in_all_forms(&uncompressed) {
            let prefix = crate::record::compression::prefix(codec, &stored, max).unwrap();
            prop_assert!(uncompressed.starts_with(&prefix.bytes), "{codec}");
            prop_assert!(prefix.bytes.len() <= max && (!prefix.is_complete || prefix.bytes == uncompressed), "{codec}");
        }
    }
}
