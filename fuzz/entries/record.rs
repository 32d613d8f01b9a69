//! Fuzz entries of batches, records and codecs.

use bytes::Bytes;
use strandline::{
    model::Compression,
    record::{Batch, BatchBuilder, ChunkedBatches, HEADER_BYTES, MalformedBatch, Record, decompress},
};

/// Maximum decompressed bytes: enough for interesting inputs, and few enough for speed.
const MOST: usize = 1 << 20;

/// Splits bytes of a socket or a file into batches until one is rejected. Repeats this with a corrected CRC of the
/// first batch: otherwise no fuzzer would reach the code behind that check.
pub(crate) fn batch_parse(input: &[u8]) -> bool {
    let as_is = split_all_batches(Bytes::copy_from_slice(input));
    let mut corrected = input.to_vec();
    let framed = Batch::framed_len(&corrected).unwrap_or(corrected.len()).min(corrected.len());
    renew_crc(&mut corrected[..framed]);
    let corrected = Bytes::from(corrected);
    check_chunks(&corrected);
    split_all_batches(corrected) || as_is
}

/// Checks that chunk boundaries do not change the batches. The content determines the boundaries.
fn check_chunks(bytes: &Bytes) {
    let mut batches = Vec::new();
    let mut rest = bytes.clone();
    while let Ok(batch) = Batch::split_from(&mut rest) {
        batches.push(batch);
    }
    let (mut chunks, mut left) = (Vec::new(), bytes.clone());
    for at in bytes.iter().rev().take(8) {
        chunks.push(left.split_to(usize::from(*at).min(left.len())));
    }
    chunks.push(left);
    let chunked: Vec<Batch> = ChunkedBatches::new(chunks).map_while(Result::ok).collect();
    assert_eq!(chunked, batches, "chunk boundaries change the batches");
}

/// Splits off and checks batches until one is rejected. Returns true if there was a batch.
fn split_all_batches(mut rest: Bytes) -> bool {
    let mut any = false;
    loop {
        let before = rest.clone();
        match Batch::split_from(&mut rest) {
            Err(_) => {
                assert_eq!(rest, before, "a refused batch takes nothing");
                return any;
            }
            Ok(batch) => {
                assert_eq!(batch.to_bytes(), before[..batch.encoded_len()], "a batch is the bytes it came from");
                assert_eq!(before.len() - rest.len(), batch.encoded_len());
                assert_eq!(Batch::framed_len(&before), Ok(batch.encoded_len()));
                assert_eq!(batch.end_offset().since(batch.base_offset()), u64::from(batch.count()));
                assert_eq!(Batch::parse(batch.to_bytes()).as_ref(), Ok(&batch));
                let _ = check_walks(&batch);
                any = true;
            }
        }
    }
}

/// Decodes a codec, a count and any bytes as the records of an otherwise valid batch.
pub(crate) fn records(input: &[u8]) -> bool {
    let Some((&[codec, high, low], records)) = input.split_first_chunk::<3>() else { return false };
    let count = u16::from_be_bytes([high, low]);
    let Ok(batch) = Batch::parse(forge(codec % 5, count.max(1), records)) else { return false };
    let Ok(decoded) = check_walks(&batch) else { return false };
    let mut builder = BatchBuilder::new(batch.compression());
    for Record { timestamp_ms, key, value, headers } in &decoded {
        builder.push(*timestamp_ms, key.as_deref(), value.as_deref(), headers).expect("the record was in a batch");
    }
    let rebuilt = builder.finish(batch.producer()).expect("the batch has records");
    assert_eq!(check_walks(&rebuilt).as_ref(), Ok(&decoded), "records differ after a rebuild of the batch");
    let plain = batch.recompress(Compression::None).expect("the records were decompressed before");
    assert_eq!(check_walks(&plain), Ok(decoded), "records survive another codec");
    true
}

/// Decompresses any bytes with the codec of the first byte.
pub(crate) fn decompress_any(input: &[u8]) -> bool {
    let Some((&codec, stored)) = input.split_first() else { return false };
    let Ok(plain) = decompress(codec_of(codec), stored, MOST) else { return false };
    assert!(plain.len() <= MOST);
    assert_eq!(decompress(codec_of(codec), stored, plain.len()), Ok(plain.clone()), "the bound is inclusive");
    if !plain.is_empty() {
        assert!(decompress(codec_of(codec), stored, plain.len() - 1).is_err(), "one byte less is too little");
    }
    true
}

fn check_walks(batch: &Batch) -> Result<Vec<Record>, MalformedBatch> {
    let decoded = batch.records().and_then(|records| records.map(|item| item.map(|(_, record)| record)).collect());
    assert_eq!(decoded.as_ref().map(|_: &Vec<Record>| ()).map_err(Clone::clone), batch.verify_records());
    decoded
}

fn codec_of(byte: u8) -> Compression {
    match byte % 5 {
        0 => Compression::None,
        1 => Compression::Gzip,
        2 => Compression::Snappy,
        3 => Compression::Lz4,
        _ => Compression::Zstd,
    }
}

/// Returns the bytes of a batch with these records and a valid length, count and CRC.
fn forge(codec: u8, count: u16, records: &[u8]) -> Bytes {
    let mut builder = BatchBuilder::new(Compression::None);
    builder.push(0, None, None, &[]).expect("an empty record is below the maximum size");
    let mut bytes = builder.finish(None).expect("the batch has a record").header().to_vec();
    bytes.extend_from_slice(records);
    let length = u32::try_from(HEADER_BYTES - 12 + records.len()).unwrap_or(u32::MAX);
    bytes[8..12].copy_from_slice(&length.to_be_bytes());
    bytes[22] = codec;
    bytes[23..27].copy_from_slice(&u32::from(count - 1).to_be_bytes());
    bytes[57..61].copy_from_slice(&u32::from(count).to_be_bytes());
    renew_crc(&mut bytes);
    bytes.into()
}

/// Corrects the CRC of a batch, if there are enough bytes for a header.
pub(super) fn renew_crc(bytes: &mut [u8]) {
    if bytes.len() >= HEADER_BYTES {
        let crc = crc32c::crc32c(&bytes[21..]);
        bytes[17..21].copy_from_slice(&crc.to_be_bytes());
    }
}
