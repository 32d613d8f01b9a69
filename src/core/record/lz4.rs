//! Decodes LZ4 frames (lz4_Frame_format.md 1.6.x) into one buffer.
//!
//! ```text
//! frame: magic 0x184D2204 LE │ flags u8 │ block size code u8 │ [content size u64] │ header checksum u8
//!        │ blocks … │ 0 u32 │ [content checksum u32]
//! block: length u32 LE, the high bit set if the block is not compressed │ bytes │ [block checksum u32]
//! ```
//! A field in brackets exists only if its bit in the flags is set.
//!
//! The frame decoder of `lz4_flex` accepts a frame that is truncated between two blocks. The frame decoder also ends at
//! an empty block without an error, and copies all bytes twice. This decoder rejects incomplete frames and decodes in
//! place.

use lz4_flex::block::{DecompressError as BlockError, decompress_into, decompress_into_with_dict};
use twox_hash::XxHash32;

use super::error::DecompressError;

const MAGIC: u32 = 0x184d_2204;
const VERSION_MASK: u8 = 0b1100_0000;
const VERSION: u8 = 0b0100_0000;
const INDEPENDENT_BLOCKS: u8 = 0b0010_0000;
const BLOCK_CHECKSUMS: u8 = 0b0001_0000;
const CONTENT_SIZE: u8 = 0b0000_1000;
const CONTENT_CHECKSUM: u8 = 0b0000_0100;
const RESERVED: u8 = 0b0000_0010;
const DICTIONARY: u8 = 0b0000_0001;

/// Bit of a block's length field that marks an uncompressed block.
const UNCOMPRESSED_BLOCK: u32 = 1 << 31;

/// Maximum distance of a match in a linked block.
const WINDOW_BYTES: usize = 64 << 10;

/// Maximum ratio of uncompressed to compressed length in LZ4.
pub(super) const MAX_RATIO: usize = 255;

/// Minimum length of a match.
const MIN_MATCH_BYTES: usize = 4;

type DecodeResult<T> = Result<T, DecompressError>;

/// Returns the content size that the header of the frame declares, if it declares one.
pub(super) fn declared_len(mut stored: &[u8]) -> Option<usize> {
    let size = Lz4Frame::read(&mut stored).ok()?.content_size?;
    Some(usize::try_from(size).unwrap_or(usize::MAX))
}

/// Decodes one frame, which must be all of `stored`, to at most `max` bytes.
pub(super) fn decompress(stored: &[u8], max: usize) -> DecodeResult<Vec<u8>> {
    let mut input = stored;
    let frame = Lz4Frame::read(&mut input)?;
    let mut uncompressed = Vec::new();
    loop {
        let length = u32::from_le_bytes(take(&mut input, "the frame has no end mark")?);
        if length == 0 {
            break;
        }
        frame.decompress_block(length, &mut input, &mut uncompressed, max)?;
    }
    if frame.flags & CONTENT_CHECKSUM != 0 {
        check(&uncompressed, take(&mut input, "the content checksum is truncated")?, "the content checksum")?;
    }
    if frame.content_size.is_some_and(|size| size != uncompressed.len() as u64) {
        return Err("the content does not have the length that the frame declares".into());
    }
    if input.is_empty() { Ok(uncompressed) } else { Err(format!("{} bytes follow the frame", input.len()).into()) }
}

/// Decodes at most the first `max` bytes of the first block.
pub(super) fn prefix(mut stored: &[u8], max: usize) -> DecodeResult<Vec<u8>> {
    let frame = Lz4Frame::read(&mut stored)?;
    let length = u32::from_le_bytes(take(&mut stored, "the frame has no end mark")?);
    let bytes = frame.block_length(length)?;
    let block = stored.get(..bytes).ok_or("a block ends after the input")?;
    if length & UNCOMPRESSED_BLOCK != 0 {
        return Ok(block[..block.len().min(max)].to_vec());
    }
    Ok(block_prefix(block, max)?)
}

/// Decodes the sequences of a block (lz4_Block_format.md) until the output has `max` bytes or the block ends.
fn block_prefix(mut block: &[u8], max: usize) -> Result<Vec<u8>, &'static str> {
    const TRUNCATED: &str = "a sequence of a block is truncated";
    let mut uncompressed = Vec::with_capacity(max);
    loop {
        let (&token, rest) = block.split_first().ok_or(TRUNCATED)?;
        block = rest;
        let literals = sequence_length(token >> 4, &mut block).ok_or(TRUNCATED)?;
        let (literals, rest) = block.split_at_checked(literals).ok_or(TRUNCATED)?;
        block = rest;
        uncompressed.extend_from_slice(&literals[..literals.len().min(max - uncompressed.len())]);
        // The last sequence has no match.
        if uncompressed.len() == max || block.is_empty() {
            return Ok(uncompressed);
        }
        let (distance, rest) = block.split_first_chunk::<2>().ok_or(TRUNCATED)?;
        block = rest;
        let length = sequence_length(token & 0xf, &mut block).ok_or(TRUNCATED)?.saturating_add(MIN_MATCH_BYTES);
        copy_match(&mut uncompressed, u16::from_le_bytes(*distance).into(), length, max)?;
        if uncompressed.len() == max {
            return Ok(uncompressed);
        }
    }
}

/// Completes a length of four `bits`. If all four bits are set, the length continues in the following bytes.
fn sequence_length(bits: u8, block: &mut &[u8]) -> Option<usize> {
    let mut length = usize::from(bits);
    while length >= 15 {
        let (&byte, rest) = block.split_first()?;
        *block = rest;
        length = length.checked_add(byte.into())?;
        if byte < u8::MAX {
            break;
        }
    }
    Some(length)
}

/// Appends the `length` bytes that start `distance` bytes before the end of `uncompressed`, until `uncompressed` has
/// `max` bytes. The copied bytes may include appended ones.
pub(super) fn copy_match(
    uncompressed: &mut Vec<u8>,
    distance: usize,
    length: usize,
    max: usize,
) -> Result<(), &'static str> {
    let start =
        uncompressed.len().checked_sub(distance).filter(|_| distance > 0).ok_or("a match starts before the content")?;
    for at in start..start + length.min(max - uncompressed.len()) {
        uncompressed.push(uncompressed[at]);
    }
    Ok(())
}

/// Header of a frame.
struct Lz4Frame {
    flags: u8,
    /// Uncompressed length of the content, if the header declares it.
    content_size: Option<u64>,
    /// Maximum uncompressed length of one block.
    block_bytes: usize,
}

impl Lz4Frame {
    /// Reads and checks the header at the start of `input`.
    fn read(input: &mut &[u8]) -> DecodeResult<Self> {
        const TRUNCATED: &str = "the header of the frame is truncated";
        let magic = u32::from_le_bytes(take(input, TRUNCATED)?);
        if magic != MAGIC {
            return Err(format!("{magic:#010x} does not start an LZ4 frame").into());
        }
        let descriptor = *input;
        let [flags, sizes] = take(input, TRUNCATED)?;
        if flags & VERSION_MASK != VERSION || flags & RESERVED != 0 {
            return Err(format!("frame flags {flags:#010b} are not supported").into());
        }
        if flags & DICTIONARY != 0 {
            return Err("the frame needs a dictionary".into());
        }
        let block_bytes = match sizes {
            0x40 => 64 << 10,
            0x50 => 256 << 10,
            0x60 => 1 << 20,
            0x70 => 4 << 20,
            _ => return Err(format!("block size code {sizes:#04x} is unknown").into()),
        };
        let content_size =
            if flags & CONTENT_SIZE != 0 { Some(u64::from_le_bytes(take(input, TRUNCATED)?)) } else { None };
        let hashed = &descriptor[..descriptor.len() - input.len()];
        let [stored] = take(input, TRUNCATED)?;
        if XxHash32::oneshot(0, hashed).to_le_bytes()[1] != stored {
            return Err("the header checksum is wrong".into());
        }
        Ok(Self { flags, content_size, block_bytes })
    }

    /// Returns the stored length of a block with the length field `length`.
    fn block_length(&self, length: u32) -> DecodeResult<usize> {
        let bytes = (length & !UNCOMPRESSED_BLOCK) as usize;
        if bytes > self.block_bytes {
            return Err(
                format!("a block has {bytes} bytes, and the maximum of the frame is {}", self.block_bytes).into()
            );
        }
        Ok(bytes)
    }

    /// Decodes the block at the start of `input` and appends the bytes to `uncompressed`. `length` is the length field
    /// of the block, which the caller has already read. Removes the block and its checksum from `input`. Fails if
    /// `uncompressed` would exceed `max` bytes.
    fn decompress_block(
        &self,
        length: u32,
        input: &mut &[u8],
        uncompressed: &mut Vec<u8>,
        max: usize,
    ) -> DecodeResult<()> {
        let bytes = self.block_length(length)?;
        let (block, rest) = input.split_at_checked(bytes).ok_or("a block ends after the input")?;
        *input = rest;
        if self.flags & BLOCK_CHECKSUMS != 0 {
            check(block, take(input, "the checksum of a block is truncated")?, "the checksum of a block")?;
        }
        let start = uncompressed.len();
        let remaining = max - start;
        if length & UNCOMPRESSED_BLOCK != 0 {
            if bytes > remaining {
                return Err(DecompressError::Grows);
            }
            uncompressed.extend_from_slice(block);
            return Ok(());
        }
        let output_len = self.block_bytes.min(bytes.saturating_mul(MAX_RATIO)).min(remaining);
        uncompressed.resize(start + output_len, 0);
        let (before, out) = uncompressed.split_at_mut(start);
        let decoded = if self.flags & INDEPENDENT_BLOCKS != 0 {
            decompress_into(block, out)
        } else {
            decompress_into_with_dict(block, out, &before[start.saturating_sub(WINDOW_BYTES)..])
        };
        let decoded = decoded.map_err(|error| match error {
            BlockError::OutputTooSmall { .. } if output_len == remaining => DecompressError::Grows,
            error => DecompressError::Codec(error.to_string()),
        })?;
        uncompressed.truncate(start + decoded);
        Ok(())
    }
}

/// Takes the next `N` bytes. `error` is the error if `input` has fewer bytes.
fn take<const N: usize>(input: &mut &[u8], error: &str) -> DecodeResult<[u8; N]> {
    let (bytes, rest) = input.split_first_chunk::<N>().ok_or(error)?;
    *input = rest;
    Ok(*bytes)
}

/// Compares the hash of `bytes` with a stored checksum. `name` names the checksum in the error.
fn check(bytes: &[u8], stored: [u8; 4], name: &str) -> DecodeResult<()> {
    let is_equal = XxHash32::oneshot(0, bytes) == u32::from_le_bytes(stored);
    if is_equal { Ok(()) } else { Err(format!("{name} is wrong").into()) }
}
