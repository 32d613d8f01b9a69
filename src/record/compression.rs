//! The four codecs, in the framings that Kafka's clients write and read.
//!
//! | codec | framing |
//! | --- | --- |
//! | gzip | RFC 1952 |
//! | snappy | snappy-java's stream ("xerial") of 32 KiB blocks; bare snappy is read too |
//! | lz4 | LZ4 frame: independent blocks of 64 KiB, no dictionary, no content checksum; linked blocks are read too |
//! | zstd | RFC 8878 |
//!
//! Compressed bytes are a stranger's. What they claim to grow to is never believed: an output buffer grows only as far
//! as bytes really came out, or as far as the input could make them at its codec's best ratio, and never beyond the
//! caller's bound.

use std::io::{Read, Write};

use bytes::Bytes;

use super::{batch::Malformed, lz4, snappy};
use crate::model::Compression;

/// Starts a gzip member.
const GZIP_MAGIC: &[u8] = b"\x1f\x8b";

/// The most that DEFLATE gets from one byte (zlib's technical details), rounded up.
const GZIP_BEST_RATIO: usize = 1033;

/// Starts a snappy-java stream; two big-endian `i32` follow, its version and the oldest version that can read it.
const XERIAL_MAGIC: &[u8; 8] = b"\x82SNAPPY\0";
const XERIAL_HEADER_BYTES: usize = 16;
const XERIAL_VERSION: i32 = 1;

/// Plain bytes of one snappy block: what snappy-java uses.
const XERIAL_BLOCK_BYTES: usize = 32 << 10;

/// The most that snappy gets from one byte: a copy of 64 bytes takes three.
const SNAPPY_BEST_RATIO: usize = 22;

/// Kafka's own default.
const ZSTD_LEVEL: i32 = 3;

/// `ZSTD_error_dstSize_tooSmall`, stable since zstd 1.3.1.
const ZSTD_OUTPUT_TOO_SMALL: usize = 70;

/// The most that one block of zstd holds, and its first output buffer at least.
const ZSTD_BLOCK_BYTES: usize = 128 << 10;

/// Starts a frame of zstd that is not one of those that decoders skip; little-endian.
const ZSTD_MAGIC: u32 = 0xfd2f_b528;

/// Compresses `plain`.
pub(super) fn compress(codec: Compression, plain: &[u8]) -> Bytes {
    const MEMORY: &str = "writing to memory does not fail";
    match codec {
        Compression::None => Bytes::copy_from_slice(plain),
        Compression::Gzip => {
            let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
            encoder.write_all(plain).expect(MEMORY);
            encoder.finish().expect(MEMORY).into()
        }
        Compression::Snappy => compress_snappy(plain).into(),
        Compression::Lz4 => {
            let frame = lz4_flex::frame::FrameInfo::new()
                .block_mode(lz4_flex::frame::BlockMode::Independent)
                .block_size(lz4_flex::frame::BlockSize::Max64KB);
            let mut encoder = lz4_flex::frame::FrameEncoder::with_frame_info(frame, Vec::new());
            encoder.write_all(plain).expect(MEMORY);
            encoder.finish().expect(MEMORY).into()
        }
        Compression::Zstd => {
            let mut bytes = zstd::bulk::compress(plain, ZSTD_LEVEL).expect("zstd fails only without memory");
            // It asked for room for the worst case.
            bytes.shrink_to_fit();
            bytes.into()
        }
    }
}

fn compress_snappy(plain: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(XERIAL_HEADER_BYTES + plain.len() / 2);
    out.extend_from_slice(XERIAL_MAGIC);
    out.extend_from_slice(&XERIAL_VERSION.to_be_bytes());
    out.extend_from_slice(&XERIAL_VERSION.to_be_bytes());
    let mut encoder = snap::raw::Encoder::new();
    for block in plain.chunks(XERIAL_BLOCK_BYTES) {
        let start = out.len() + 4;
        out.resize(start + snap::raw::max_compress_len(block.len()), 0);
        let len = encoder.compress(block, &mut out[start..]).expect("the output has the room that snappy asks for");
        let framed = u32::try_from(len).expect("a block of 32 KiB stays small");
        out[start - 4..start].copy_from_slice(&framed.to_be_bytes());
        out.truncate(start + len);
    }
    out
}

/// What the frames say that they grow to, where they do. More than that, or nothing at all, comes out of a right one:
/// a claim above a bound needs no decompression to be refused.
pub(super) fn claimed(codec: Compression, stored: &[u8]) -> Option<usize> {
    match codec {
        Compression::None => Some(stored.len()),
        // The last member's length, modulo 2^32. Without the magic the last bytes are no length.
        Compression::Gzip => {
            if !stored.starts_with(GZIP_MAGIC) {
                return None;
            }
            let length = u32::from_le_bytes(*stored.last_chunk::<4>()?);
            usize::try_from(length).ok()
        }
        Compression::Snappy => snappy_claim(stored),
        Compression::Lz4 => lz4::claimed(stored),
        Compression::Zstd => {
            let claimed = zstd::zstd_safe::get_frame_content_size(stored).ok()??;
            Some(usize::try_from(claimed).unwrap_or(usize::MAX))
        }
    }
}

fn snappy_claim(stored: &[u8]) -> Option<usize> {
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
    Some(total)
}

/// Why bytes were not decompressed.
pub(super) enum Refused {
    /// They grow beyond the bound.
    Grows,
    /// The codec says that they are wrong.
    Codec(String),
}

impl Refused {
    fn of(self, codec: Compression, most: usize) -> Malformed {
        match self {
            Self::Grows => Malformed::Grows { codec, most },
            Self::Codec(reason) => Malformed::Compression { codec, reason },
        }
    }
}

impl<T: Into<String>> From<T> for Refused {
    fn from(reason: T) -> Self {
        Self::Codec(reason.into())
    }
}

/// Decompresses `stored`, which is all of one batch's records, to at most `most` bytes.
///
/// # Errors
/// [`Malformed::Grows`] when the output would pass `most`, [`Malformed::Compression`] when the codec refuses the bytes or
/// when bytes are left over.
pub fn decompress(codec: Compression, stored: &[u8], most: usize) -> Result<Bytes, Malformed> {
    let plain = match codec {
        _ if claimed(codec, stored).is_some_and(|claimed| claimed > most) => Err(Refused::Grows),
        Compression::None => Ok(stored.to_vec()),
        Compression::Gzip => {
            read_bounded(flate2::bufread::MultiGzDecoder::new(stored), stored.len().saturating_mul(2), most)
        }
        Compression::Snappy => decompress_snappy(stored, most),
        Compression::Lz4 => lz4::decompress(stored, most),
        Compression::Zstd => decompress_zstd(stored, most),
    };
    let mut plain = plain.map_err(|refused| refused.of(codec, most))?;
    // Records are slices of this and may live long: do not let them hold much more than themselves.
    if plain.capacity() / 2 > plain.len() {
        plain.shrink_to_fit();
    }
    Ok(Bytes::from(plain))
}

/// The first plain bytes of compressed records.
pub(super) struct Prefix {
    pub(super) bytes: Vec<u8>,
    /// Nothing follows: the codec took all of the stored bytes.
    pub(super) is_whole: bool,
}

/// Decompresses the first `most` bytes of `stored`, or fewer, at a cost that `most` bounds. Blocks that a codec only decodes as a whole
/// are left out where they are larger.
///
/// # Errors
/// When the codec refuses what it had to read for that.
pub(super) fn prefix(codec: Compression, stored: &[u8], most: usize) -> Result<Prefix, Malformed> {
    let claimed = claimed(codec, stored).filter(|_| codec != Compression::Gzip);
    // Few compressed bytes may be few plain ones, which are decoded at once.
    if codec != Compression::Gzip && stored.len() <= most && claimed.is_none_or(|claimed| claimed <= most) {
        match decompress(codec, stored, most) {
            Ok(plain) => return Ok(Prefix { bytes: plain.into(), is_whole: true }),
            // It claims nothing, or another frame follows the one that does.
            Err(Malformed::Grows { .. }) => {}
            Err(error) => return Err(error),
        }
    }
    let prefix = match codec {
        Compression::None => Ok(stored[..stored.len().min(most)].to_vec()),
        Compression::Gzip => return gzip_prefix(stored, most).map_err(|refused| refused.of(codec, most)),
        Compression::Snappy => snappy_prefix(stored, most),
        Compression::Lz4 => lz4::prefix(stored, most),
        Compression::Zstd => largest_zstd(stored).map(|_| Vec::new()),
    };
    prefix.map(|bytes| Prefix { bytes, is_whole: false }).map_err(|refused| refused.of(codec, most))
}

fn gzip_prefix(stored: &[u8], most: usize) -> Result<Prefix, Refused> {
    if !stored.starts_with(GZIP_MAGIC) {
        return Err("the bytes do not start with gzip's magic 1f 8b".into());
    }
    let mut bytes = Vec::with_capacity(most);
    let bound = u64::try_from(most).unwrap_or(u64::MAX).saturating_add(1);
    let decoder = flate2::bufread::MultiGzDecoder::new(stored);
    decoder.take(bound).read_to_end(&mut bytes).map_err(|error| error.to_string())?;
    let is_whole = bytes.len() <= most;
    bytes.truncate(most);
    Ok(Prefix { bytes, is_whole })
}

/// The most plain bytes that the frames can hold. Walks their blocks without decoding them.
fn largest_zstd(mut stored: &[u8]) -> Result<usize, Refused> {
    use zstd::zstd_safe::{find_frame_compressed_size, get_error_name, get_frame_content_size};
    let mut most = 0_usize;
    while !stored.is_empty() {
        let length = find_frame_compressed_size(stored).map_err(get_error_name)?;
        let (frame, rest) = stored.split_at_checked(length).ok_or("a frame passes the end")?;
        let claimed = get_frame_content_size(frame).map_err(|error| error.to_string())?;
        // A frame that holds more or less than it claims is refused by every decoder.
        let claimed = claimed.map_or(usize::MAX, |claimed| usize::try_from(claimed).unwrap_or(usize::MAX));
        let plain = largest_zstd_frame(frame).ok_or("a block of a frame passes its end")?.min(claimed);
        (most, stored) = (most.saturating_add(plain), rest);
    }
    Ok(most)
}

/// The most plain bytes that the blocks of one frame can hold, by their headers (RFC 8878, 3.1.1). `None` if a header is cut or of
/// no kind.
fn largest_zstd_frame(frame: &[u8]) -> Option<usize> {
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
    let mut most = 0_usize;
    loop {
        let (header, content) = blocks.split_first_chunk::<3>()?;
        let header = u32::from_le_bytes([header[0], header[1], header[2], 0]);
        let size = usize::try_from(header >> 3).ok()?;
        let (stored, plain) = match header >> 1 & 3 {
            // Raw, one repeated byte, compressed.
            0 => (size, size),
            1 => (1, size),
            2 => (size, ZSTD_BLOCK_BYTES),
            _ => return None,
        };
        most = most.saturating_add(plain.min(ZSTD_BLOCK_BYTES));
        if header & 1 == 1 {
            return Some(most);
        }
        blocks = content.get(stored..)?;
    }
}

/// The first bytes of the first block.
fn snappy_prefix(stored: &[u8], most: usize) -> Result<Vec<u8>, Refused> {
    let block = match stored.strip_prefix(XERIAL_MAGIC) {
        None => stored,
        Some(rest) => {
            let rest = rest.get(XERIAL_HEADER_BYTES - XERIAL_MAGIC.len()..).ok_or("the stream's header is cut")?;
            let (length, after) = rest.split_first_chunk::<4>().ok_or("a block's length is cut")?;
            let length = usize::try_from(i32::from_be_bytes(*length)).map_err(|_| "a block's length is negative")?;
            after.get(..length).ok_or("a block passes the end")?
        }
    };
    Ok(snappy::block_prefix(block, most)?)
}

/// The most plain bytes that a right codec can make of `stored`, where anything bounds them.
pub(super) fn largest_plain(codec: Compression, stored: &[u8]) -> Option<usize> {
    match codec {
        Compression::None => Some(stored.len()),
        Compression::Gzip => Some(stored.len().saturating_mul(GZIP_BEST_RATIO)),
        Compression::Lz4 => claimed(codec, stored).or(Some(stored.len().saturating_mul(lz4::BEST_RATIO))),
        Compression::Snappy => claimed(codec, stored),
        Compression::Zstd => largest_zstd(stored).ok(),
    }
}

/// Reads all of `decoder`; the buffer starts at `hint` bytes and grows with what comes out.
fn read_bounded(decoder: impl Read, hint: usize, most: usize) -> Result<Vec<u8>, Refused> {
    let mut plain = Vec::with_capacity(hint.min(most));
    let bound = u64::try_from(most).unwrap_or(u64::MAX).saturating_add(1);
    decoder.take(bound).read_to_end(&mut plain).map_err(|error| error.to_string())?;
    if plain.len() > most { Err(Refused::Grows) } else { Ok(plain) }
}

fn decompress_snappy(stored: &[u8], most: usize) -> Result<Vec<u8>, Refused> {
    let mut plain = Vec::new();
    let mut decoder = snap::raw::Decoder::new();
    if !stored.starts_with(XERIAL_MAGIC) {
        snappy_block(&mut decoder, stored, &mut plain, most)?;
        return Ok(plain);
    }
    let mut rest = stored.get(XERIAL_HEADER_BYTES..).ok_or("the stream's header is cut")?;
    while !rest.is_empty() {
        let (length, after) = rest.split_first_chunk::<4>().ok_or("a block's length is cut")?;
        let length = usize::try_from(i32::from_be_bytes(*length)).map_err(|_| "a block's length is negative")?;
        let block = after.get(..length).ok_or("a block passes the end")?;
        snappy_block(&mut decoder, block, &mut plain, most)?;
        rest = &after[length..];
    }
    Ok(plain)
}

fn snappy_block(
    decoder: &mut snap::raw::Decoder,
    block: &[u8],
    plain: &mut Vec<u8>,
    most: usize,
) -> Result<(), Refused> {
    let claimed = snap::raw::decompress_len(block).map_err(|error| error.to_string())?;
    if claimed > block.len().saturating_mul(SNAPPY_BEST_RATIO) {
        let bytes = block.len();
        return Err(Refused::Codec(format!("a block of {bytes} bytes cannot grow to the {claimed} that it claims")));
    }
    let start = plain.len();
    if claimed > most - start {
        return Err(Refused::Grows);
    }
    plain.resize(start + claimed, 0);
    decoder.decompress(block, &mut plain[start..]).map_err(|error| error.to_string())?;
    Ok(())
}

/// Into one buffer, without zstd's streaming window: a frame may claim a window of 128 MiB that zstd would allocate.
/// The price is to start again with a larger buffer when the first was too small, which costs a third more at worst.
fn decompress_zstd(stored: &[u8], most: usize) -> Result<Vec<u8>, Refused> {
    use zstd::zstd_safe::{DCtx, get_error_name, get_frame_content_size};
    let mut room = stored.len().saturating_mul(4).max(ZSTD_BLOCK_BYTES).min(most);
    // Believed only where it makes the buffer smaller.
    if let Ok(Some(claimed)) = get_frame_content_size(stored) {
        room = room.min(usize::try_from(claimed).unwrap_or(room));
    }
    let mut context = DCtx::create();
    loop {
        let mut plain = Vec::with_capacity(room);
        match context.decompress(&mut plain, stored) {
            Ok(_) if plain.len() <= most => return Ok(plain),
            Ok(_) => return Err(Refused::Grows),
            Err(code) if code.wrapping_neg() != ZSTD_OUTPUT_TOO_SMALL => return Err(get_error_name(code).into()),
            Err(_) if room == most => return Err(Refused::Grows),
            Err(_) => room = room.max(ZSTD_BLOCK_BYTES).saturating_mul(4).min(most),
        }
    }
}
