//! The four compression codecs, in the framings that Kafka clients write and read.
//!
//! | codec | framing |
//! | --- | --- |
//! | gzip | RFC 1952 |
//! | snappy | stream of snappy-java ("xerial") with blocks of 32 KiB; a raw snappy block is read too |
//! | lz4 | LZ4 frame: independent blocks of 64 KiB, no dictionary, no content checksum; linked blocks are read too |
//! | zstd | RFC 8878 |
//!
//! Compressed bytes come from clients, so their declared length is not trusted. The output never has more bytes than
//! the caller's maximum. In [`decompress`] the buffer is also bounded by a multiple of the compressed length or of the
//! bytes decoded so far.

use std::io::{Read, Write};

use bytes::Bytes;

use super::{
    error::{DecompressError, MalformedBatch},
    lz4, snappy,
};
use crate::model::Compression;

/// First bytes of a gzip member.
const GZIP_MAGIC: &[u8] = b"\x1f\x8b";

/// Maximum ratio of uncompressed to compressed length in DEFLATE (zlib technical details), rounded up.
const MAX_GZIP_RATIO: usize = 1033;

/// First bytes of a snappy-java stream. Two big-endian `i32` follow: its version and the oldest version that can read
/// the stream.
const XERIAL_MAGIC: &[u8; 8] = b"\x82SNAPPY\0";
const XERIAL_HEADER_BYTES: usize = 16;
const XERIAL_VERSION: i32 = 1;

/// Uncompressed length of one snappy block, as snappy-java uses it.
const XERIAL_BLOCK_BYTES: usize = 32 << 10;

/// Maximum ratio of uncompressed to compressed length in snappy, rounded up: a copy of 64 bytes takes three bytes.
const MAX_SNAPPY_RATIO: usize = 22;

/// Compression level of zstd, the default of Kafka.
const ZSTD_LEVEL: i32 = 3;

/// `ZSTD_error_dstSize_tooSmall`, stable since zstd 1.3.1.
const ZSTD_OUTPUT_TOO_SMALL: usize = 70;

/// Maximum uncompressed length of one zstd block, and minimum length of the first output buffer unless the caller's
/// maximum or the declared length is lower.
const ZSTD_BLOCK_BYTES: usize = 128 << 10;

/// Magic number of a zstd frame that is not skippable, stored in little-endian order.
const ZSTD_MAGIC: u32 = 0xfd2f_b528;

/// Compresses `uncompressed` with `codec`.
pub(super) fn compress(codec: Compression, uncompressed: &[u8]) -> Bytes {
    const MEMORY: &str = "writing to memory does not fail";
    match codec {
        Compression::None => Bytes::copy_from_slice(uncompressed),
        Compression::Gzip => {
            let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
            encoder.write_all(uncompressed).expect(MEMORY);
            encoder.finish().expect(MEMORY).into()
        }
        Compression::Snappy => compress_snappy(uncompressed).into(),
        Compression::Lz4 => {
            let frame = lz4_flex::frame::FrameInfo::new()
                .block_mode(lz4_flex::frame::BlockMode::Independent)
                .block_size(lz4_flex::frame::BlockSize::Max64KB);
            let mut encoder = lz4_flex::frame::FrameEncoder::with_frame_info(frame, Vec::new());
            encoder.write_all(uncompressed).expect(MEMORY);
            encoder.finish().expect(MEMORY).into()
        }
        Compression::Zstd => {
            let mut bytes =
                zstd::bulk::compress(uncompressed, ZSTD_LEVEL).expect("zstd fails only if there is no memory");
            // zstd allocates for the worst case.
            bytes.shrink_to_fit();
            bytes.into()
        }
    }
}

/// Writes a snappy-java stream.
fn compress_snappy(uncompressed: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(XERIAL_HEADER_BYTES + uncompressed.len() / 2);
    out.extend_from_slice(XERIAL_MAGIC);
    out.extend_from_slice(&XERIAL_VERSION.to_be_bytes());
    out.extend_from_slice(&XERIAL_VERSION.to_be_bytes());
    let mut encoder = snap::raw::Encoder::new();
    for block in uncompressed.chunks(XERIAL_BLOCK_BYTES) {
        let start = out.len() + 4;
        out.resize(start + snap::raw::max_compress_len(block.len()), 0);
        let len = encoder.compress(block, &mut out[start..]).expect("the output has the length that snappy requires");
        let block_len = u32::try_from(len).expect("a compressed block of 32 KiB fits in 32 bits");
        out[start - 4..start].copy_from_slice(&block_len.to_be_bytes());
        out.truncate(start + len);
    }
    out
}

/// Returns an uncompressed length that `stored` declares, if it declares one. The length is that of the last member for
/// gzip (modulo 2^32), of the first frame for lz4 and zstd, of all blocks for snappy. Correct bytes decompress to this
/// length or more, so bytes that declare more than the maximum are rejected without decompression.
pub(super) fn declared_len(codec: Compression, stored: &[u8]) -> Option<usize> {
    match codec {
        Compression::None => Some(stored.len()),
        // The last four bytes of a gzip member are its uncompressed length modulo 2^32.
        Compression::Gzip => {
            if !stored.starts_with(GZIP_MAGIC) {
                return None;
            }
            let length = u32::from_le_bytes(*stored.last_chunk::<4>()?);
            usize::try_from(length).ok()
        }
        Compression::Snappy => snappy_declared_len(stored),
        Compression::Lz4 => lz4::declared_len(stored),
        Compression::Zstd => {
            let declared = zstd::zstd_safe::get_frame_content_size(stored).ok()??;
            Some(usize::try_from(declared).unwrap_or(usize::MAX))
        }
    }
}

/// Returns the uncompressed length that raw snappy bytes declare, or the sum of the lengths that the blocks of a
/// snappy-java stream declare. Returns `None` if a header or a block is truncated, or if a length is invalid.
fn snappy_declared_len(stored: &[u8]) -> Option<usize> {
    if !stored.starts_with(XERIAL_MAGIC) {
        return snap::raw::decompress_len(stored).ok();
    }
    let (mut rest, mut total) = (stored.get(XERIAL_HEADER_BYTES..)?, 0_usize);
    while let Some((length, after)) = rest.split_first_chunk::<4>() {
        let length = usize::try_from(i32::from_be_bytes(*length)).ok()?;
        let (block, following) = after.split_at_checked(length)?;
        total = total.saturating_add(snap::raw::decompress_len(block).ok()?);
        rest = following;
    }
    rest.is_empty().then_some(total)
}

/// Decompresses `stored`, the records of one batch, to at most `max` bytes.
///
/// # Errors
/// [`MalformedBatch::Grows`] if the output would exceed `max`. [`MalformedBatch::Compression`] if the codec rejects the
/// bytes, or if further bytes follow the compressed records.
pub fn decompress(codec: Compression, stored: &[u8], max: usize) -> Result<Bytes, MalformedBatch> {
    let uncompressed = match codec {
        _ if declared_len(codec, stored).is_some_and(|declared| declared > max) => Err(DecompressError::Grows),
        Compression::None => Ok(stored.to_vec()),
        Compression::Gzip => {
            read_bounded(flate2::bufread::MultiGzDecoder::new(stored), stored.len().saturating_mul(2), max)
        }
        Compression::Snappy => decompress_snappy(stored, max),
        Compression::Lz4 => lz4::decompress(stored, max),
        Compression::Zstd => decompress_zstd(stored, max),
    };
    let mut uncompressed = uncompressed.map_err(|error| error.into_malformed(codec, max))?;
    // Records are slices of this buffer, and an application can keep them. So the buffer must not be much larger than
    // its content.
    if uncompressed.capacity() / 2 > uncompressed.len() {
        uncompressed.shrink_to_fit();
    }
    Ok(Bytes::from(uncompressed))
}

/// The first decompressed bytes of compressed records.
pub(super) struct Prefix {
    pub(super) bytes: Vec<u8>,
    /// True if `bytes` are all decompressed bytes.
    pub(super) is_complete: bool,
}

/// Returns at most the first `max` decompressed bytes of `stored`. The cost of decompression depends on `max` and not
/// on the length of `stored`. Zstd decodes only complete blocks. So of zstd bytes that may decompress to more than
/// `max` only the block headers are checked, and the result is empty.
///
/// # Errors
/// The codec rejects the bytes that were read.
pub(super) fn prefix(codec: Compression, stored: &[u8], max: usize) -> Result<Prefix, MalformedBatch> {
    let declared = declared_len(codec, stored).filter(|_| codec != Compression::Gzip);
    // A short input that declares a short output, or no length, is decoded completely.
    if codec != Compression::Gzip && stored.len() <= max && declared.is_none_or(|declared| declared <= max) {
        match decompress(codec, stored, max) {
            Ok(uncompressed) => return Ok(Prefix { bytes: uncompressed.into(), is_complete: true }),
            // The input declares no length, or that of its first frame only, and is longer than `max`: a prefix of it
            // is decoded below.
            Err(MalformedBatch::Grows { .. }) => {}
            Err(error) => return Err(error),
        }
    }
    let prefix = match codec {
        Compression::None => Ok(stored[..stored.len().min(max)].to_vec()),
        Compression::Gzip => return gzip_prefix(stored, max).map_err(|error| error.into_malformed(codec, max)),
        Compression::Snappy => snappy_prefix(stored, max),
        Compression::Lz4 => lz4::prefix(stored, max),
        Compression::Zstd => max_zstd_len(stored).map(|_| Vec::new()),
    };
    prefix.map(|bytes| Prefix { bytes, is_complete: false }).map_err(|error| error.into_malformed(codec, max))
}

/// Returns at most the first `max` decompressed bytes of gzip members.
fn gzip_prefix(stored: &[u8], max: usize) -> Result<Prefix, DecompressError> {
    if !stored.starts_with(GZIP_MAGIC) {
        return Err("the bytes do not start with 1f 8b, the magic of gzip".into());
    }
    let mut bytes = Vec::with_capacity(max);
    let bound = u64::try_from(max).unwrap_or(u64::MAX).saturating_add(1);
    let decoder = flate2::bufread::MultiGzDecoder::new(stored);
    decoder.take(bound).read_to_end(&mut bytes).map_err(|error| error.to_string())?;
    let is_complete = bytes.len() <= max;
    bytes.truncate(max);
    Ok(Prefix { bytes, is_complete })
}

/// Returns an upper bound of the total uncompressed length of all frames. The bound comes from the headers of their
/// blocks and from the lengths that the frames declare.
fn max_zstd_len(mut stored: &[u8]) -> Result<usize, DecompressError> {
    use zstd::zstd_safe::{find_frame_compressed_size, get_error_name, get_frame_content_size};
    let mut max = 0_usize;
    while !stored.is_empty() {
        let length = find_frame_compressed_size(stored).map_err(get_error_name)?;
        let (frame, rest) = stored.split_at_checked(length).ok_or("a frame ends after the input")?;
        let declared = get_frame_content_size(frame).map_err(|error| error.to_string())?;
        // Every decoder rejects a frame whose content has another length than the frame declares.
        let declared = declared.map_or(usize::MAX, |declared| usize::try_from(declared).unwrap_or(usize::MAX));
        let frame_max = max_zstd_frame_len(frame).ok_or("a block ends after its frame")?.min(declared);
        (max, stored) = (max.saturating_add(frame_max), rest);
    }
    Ok(max)
}

/// Returns an upper bound of the uncompressed length of one frame, from the headers of its blocks (RFC 8878, 3.1.1); 0
/// for a skippable frame. Returns `None` if a header or block is truncated, or if a block type is unknown.
fn max_zstd_frame_len(frame: &[u8]) -> Option<usize> {
    let (magic, header) = frame.split_first_chunk::<4>()?;
    if u32::from_le_bytes(*magic) != ZSTD_MAGIC {
        return Some(0);
    }
    let (descriptor, fields) = header.split_first()?;
    let is_single_segment = descriptor & 0x20 != 0;
    let window = usize::from(!is_single_segment);
    let dictionary = [0, 1, 2, 4][usize::from(descriptor & 3)];
    let content_size = match descriptor >> 6 {
        0 => usize::from(is_single_segment),
        flag => 1 << flag,
    };
    let mut blocks = fields.get(window + dictionary + content_size..)?;
    let mut max = 0_usize;
    loop {
        let (header, content) = blocks.split_first_chunk::<3>()?;
        let header = u32::from_le_bytes([header[0], header[1], header[2], 0]);
        let size = usize::try_from(header >> 3).ok()?;
        let (stored_len, uncompressed_len) = match header >> 1 & 3 {
            // Block types: 0 is raw, 1 is one repeated byte, 2 is compressed.
            0 => (size, size),
            1 => (1, size),
            2 => (size, ZSTD_BLOCK_BYTES),
            _ => return None,
        };
        max = max.saturating_add(uncompressed_len.min(ZSTD_BLOCK_BYTES));
        if header & 1 == 1 {
            return Some(max);
        }
        blocks = content.get(stored_len..)?;
    }
}

/// Returns at most the first `max` decompressed bytes of the first block, of a snappy-java stream or of a raw block.
fn snappy_prefix(stored: &[u8], max: usize) -> Result<Vec<u8>, DecompressError> {
    let block = match stored.strip_prefix(XERIAL_MAGIC) {
        None => stored,
        Some(rest) => {
            let rest =
                rest.get(XERIAL_HEADER_BYTES - XERIAL_MAGIC.len()..).ok_or("the header of the stream is truncated")?;
            let (length, after) = rest.split_first_chunk::<4>().ok_or("the length of a block is truncated")?;
            let length =
                usize::try_from(i32::from_be_bytes(*length)).map_err(|_| "the length of a block is negative")?;
            after.get(..length).ok_or("a block ends after the input")?
        }
    };
    Ok(snappy::block_prefix(block, max)?)
}

/// Returns an upper bound of the decompressed length of `stored`; `None` if the bytes give no bound. The check of an
/// append compares it with the number of records.
pub(super) fn max_decoded_len(codec: Compression, stored: &[u8]) -> Option<usize> {
    match codec {
        Compression::None => Some(stored.len()),
        Compression::Gzip => Some(stored.len().saturating_mul(MAX_GZIP_RATIO)),
        Compression::Lz4 => declared_len(codec, stored).or(Some(stored.len().saturating_mul(lz4::MAX_RATIO))),
        Compression::Snappy => declared_len(codec, stored),
        Compression::Zstd => max_zstd_len(stored).ok(),
    }
}

/// Reads all bytes of `decoder`; an error if there are more than `max`. The buffer starts with at most
/// `initial_capacity` bytes and grows with the output.
fn read_bounded(decoder: impl Read, initial_capacity: usize, max: usize) -> Result<Vec<u8>, DecompressError> {
    let mut uncompressed = Vec::with_capacity(initial_capacity.min(max));
    let bound = u64::try_from(max).unwrap_or(u64::MAX).saturating_add(1);
    decoder.take(bound).read_to_end(&mut uncompressed).map_err(|error| error.to_string())?;
    if uncompressed.len() > max { Err(DecompressError::Grows) } else { Ok(uncompressed) }
}

/// Decompresses a snappy-java stream or a raw snappy block.
fn decompress_snappy(stored: &[u8], max: usize) -> Result<Vec<u8>, DecompressError> {
    let mut uncompressed = Vec::new();
    let mut decoder = snap::raw::Decoder::new();
    if !stored.starts_with(XERIAL_MAGIC) {
        decompress_snappy_block(&mut decoder, stored, &mut uncompressed, max)?;
        return Ok(uncompressed);
    }
    let mut rest = stored.get(XERIAL_HEADER_BYTES..).ok_or("the header of the stream is truncated")?;
    while !rest.is_empty() {
        let (length, after) = rest.split_first_chunk::<4>().ok_or("the length of a block is truncated")?;
        let length = usize::try_from(i32::from_be_bytes(*length)).map_err(|_| "the length of a block is negative")?;
        let block = after.get(..length).ok_or("a block ends after the input")?;
        decompress_snappy_block(&mut decoder, block, &mut uncompressed, max)?;
        rest = &after[length..];
    }
    Ok(uncompressed)
}

/// Decompresses one snappy block and appends the bytes to `uncompressed`. Fails if `uncompressed` would exceed `max`
/// bytes, or if the block declares more bytes than its length allows.
fn decompress_snappy_block(
    decoder: &mut snap::raw::Decoder,
    block: &[u8],
    uncompressed: &mut Vec<u8>,
    max: usize,
) -> Result<(), DecompressError> {
    let declared = snap::raw::decompress_len(block).map_err(|error| error.to_string())?;
    if declared > block.len().saturating_mul(MAX_SNAPPY_RATIO) {
        let bytes = block.len();
        return Err(DecompressError::Codec(format!(
            "a block of {bytes} bytes cannot decompress to {declared} bytes, as it declares"
        )));
    }
    let start = uncompressed.len();
    if declared > max - start {
        return Err(DecompressError::Grows);
    }
    uncompressed.resize(start + declared, 0);
    decoder.decompress(block, &mut uncompressed[start..]).map_err(|error| error.to_string())?;
    Ok(())
}

/// Decompresses into one buffer, without the streaming window of zstd: a frame can declare a window of 128 MiB, which
/// zstd would allocate. If the buffer is too small, decompression starts again with a larger one. This costs at most a
/// third more time.
fn decompress_zstd(stored: &[u8], max: usize) -> Result<Vec<u8>, DecompressError> {
    use zstd::zstd_safe::{DCtx, get_error_name, get_frame_content_size};
    let mut capacity = stored.len().saturating_mul(4).max(ZSTD_BLOCK_BYTES).min(max);
    // The declared length only makes the buffer smaller.
    if let Ok(Some(declared)) = get_frame_content_size(stored) {
        capacity = capacity.min(usize::try_from(declared).unwrap_or(capacity));
    }
    let mut context = DCtx::create();
    loop {
        let mut uncompressed = Vec::with_capacity(capacity);
        match context.decompress(&mut uncompressed, stored) {
            Ok(_) if uncompressed.len() <= max => return Ok(uncompressed),
            Ok(_) => return Err(DecompressError::Grows),
            Err(code) if code.wrapping_neg() != ZSTD_OUTPUT_TOO_SMALL => return Err(get_error_name(code).into()),
            Err(_) if capacity == max => return Err(DecompressError::Grows),
            Err(_) => capacity = capacity.max(ZSTD_BLOCK_BYTES).saturating_mul(4).min(max),
        }
    }
}
