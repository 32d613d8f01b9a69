//! Reading LZ4 frames (lz4_Frame_format.md 1.6.x) straight into one buffer.
//!
//! ```text
//! magic 0x184D2204 LE │ FLG │ BD │ content size u64, if FLG says so │ HC │ blocks … │ 0 u32 │ content checksum, if …
//! block: length u32 LE, the high bit set when it is not compressed │ bytes │ block checksum u32, if …
//! ```
//! The codec's crate has a frame reader too. It takes a frame that was cut between two blocks for a whole one, stops at an
//! empty block without a word, and copies everything twice; here a frame is whole or refused, and is decoded in place.

use lz4_flex::block::{DecompressError, decompress_into, decompress_into_with_dict};
use twox_hash::XxHash32;

use super::compression::Refused;

const MAGIC: u32 = 0x184d_2204;
const VERSION_MASK: u8 = 0b1100_0000;
const VERSION: u8 = 0b0100_0000;
const INDEPENDENT_BLOCKS: u8 = 0b0010_0000;
const BLOCK_CHECKSUMS: u8 = 0b0001_0000;
const CONTENT_SIZE: u8 = 0b0000_1000;
const CONTENT_CHECKSUM: u8 = 0b0000_0100;
const RESERVED: u8 = 0b0000_0010;
const DICTIONARY: u8 = 0b0000_0001;

/// Set in a block's length when its bytes are plain.
const PLAIN_BLOCK: u32 = 1 << 31;

/// How far back a linked block may refer.
const WINDOW_BYTES: usize = 64 << 10;

/// The most that LZ4 gets from one byte of a block.
pub(super) const BEST_RATIO: usize = 255;

/// A match is at least so long.
const LEAST_MATCH: usize = 4;

type Checked<T> = Result<T, Refused>;

/// How long the content is by the frame's header, where that says.
pub(super) fn claimed(mut stored: &[u8]) -> Option<usize> {
    let size = Frame::read(&mut stored).ok()?.content_size?;
    Some(usize::try_from(size).unwrap_or(usize::MAX))
}

/// Decodes one frame, which must be all of `stored`, to at most `most` bytes.
pub(super) fn decompress(stored: &[u8], most: usize) -> Checked<Vec<u8>> {
    let mut input = stored;
    let frame = Frame::read(&mut input)?;
    let mut plain = Vec::new();
    loop {
        let length = u32::from_le_bytes(take(&mut input, "the frame has no end mark")?);
        if length == 0 {
            break;
        }
        frame.block(length, &mut input, &mut plain, most)?;
    }
    if frame.flags & CONTENT_CHECKSUM != 0 {
        check(&plain, take(&mut input, "the content's checksum is cut")?, "the content's checksum")?;
    }
    if frame.content_size.is_some_and(|size| size != plain.len() as u64) {
        return Err("the content is not as long as the frame says".into());
    }
    if input.is_empty() {
        Ok(plain)
    } else {
        Err(format!("the frame is followed by {} B that are no part of it", input.len()).into())
    }
}

/// The first `most` plain bytes of the first block, or fewer where it has fewer.
pub(super) fn prefix(mut stored: &[u8], most: usize) -> Checked<Vec<u8>> {
    let frame = Frame::read(&mut stored)?;
    let length = u32::from_le_bytes(take(&mut stored, "the frame has no end mark")?);
    let bytes = frame.block_length(length)?;
    let block = stored.get(..bytes).ok_or("a block passes the end")?;
    if length & PLAIN_BLOCK != 0 {
        return Ok(block[..block.len().min(most)].to_vec());
    }
    Ok(block_prefix(block, most)?)
}

/// Decodes sequences (lz4_Block_format.md) until there are `most` bytes.
fn block_prefix(mut block: &[u8], most: usize) -> Result<Vec<u8>, &'static str> {
    const CUT: &str = "a block's sequence is cut";
    let mut plain = Vec::with_capacity(most);
    loop {
        let (&token, rest) = block.split_first().ok_or(CUT)?;
        block = rest;
        let literals = sequence_length(token >> 4, &mut block).ok_or(CUT)?;
        let (literals, rest) = block.split_at_checked(literals).ok_or(CUT)?;
        block = rest;
        plain.extend_from_slice(&literals[..literals.len().min(most - plain.len())]);
        // The last sequence has no match.
        if plain.len() == most || block.is_empty() {
            return Ok(plain);
        }
        let (distance, rest) = block.split_first_chunk::<2>().ok_or(CUT)?;
        block = rest;
        let length = sequence_length(token & 0xf, &mut block).ok_or(CUT)?.saturating_add(LEAST_MATCH);
        copy_match(&mut plain, u16::from_le_bytes(*distance).into(), length, most)?;
        if plain.len() == most {
            return Ok(plain);
        }
    }
}

/// A length of four bits, which goes on in bytes where all four are set.
fn sequence_length(bits: u8, block: &mut &[u8]) -> Option<usize> {
    let mut length = usize::from(bits);
    while length >= 15 {
        let (&more, rest) = block.split_first()?;
        *block = rest;
        length = length.checked_add(more.into())?;
        if more < u8::MAX {
            break;
        }
    }
    Some(length)
}

/// Repeats what lies `distance` bytes back, up to `most` bytes in all.
pub(super) fn copy_match(plain: &mut Vec<u8>, distance: usize, length: usize, most: usize) -> Result<(), &'static str> {
    let start =
        plain.len().checked_sub(distance).filter(|_| distance > 0).ok_or("a match reaches before the beginning")?;
    for at in start..start + length.min(most - plain.len()) {
        plain.push(plain[at]);
    }
    Ok(())
}

struct Frame {
    flags: u8,
    content_size: Option<u64>,
    /// Most plain bytes of one block.
    block_bytes: usize,
}

impl Frame {
    fn read(input: &mut &[u8]) -> Checked<Self> {
        const CUT: &str = "the frame's header is cut";
        let magic = u32::from_le_bytes(take(input, CUT)?);
        if magic != MAGIC {
            return Err(format!("{magic:#010x} does not start an LZ4 frame").into());
        }
        let descriptor = *input;
        let [flags, sizes] = take(input, CUT)?;
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
        let content_size = if flags & CONTENT_SIZE != 0 { Some(u64::from_le_bytes(take(input, CUT)?)) } else { None };
        let hashed = &descriptor[..descriptor.len() - input.len()];
        let [stored] = take(input, CUT)?;
        if XxHash32::oneshot(0, hashed).to_le_bytes()[1] != stored {
            return Err("the header's checksum is wrong".into());
        }
        Ok(Self { flags, content_size, block_bytes })
    }

    /// The stored bytes of the block whose length field was `length`.
    fn block_length(&self, length: u32) -> Checked<usize> {
        let bytes = (length & !PLAIN_BLOCK) as usize;
        if bytes > self.block_bytes {
            return Err(format!("a block of {bytes} bytes is above the frame's {}", self.block_bytes).into());
        }
        Ok(bytes)
    }

    /// Decodes the block whose length field was `length` to the end of `plain`.
    fn block(&self, length: u32, input: &mut &[u8], plain: &mut Vec<u8>, most: usize) -> Checked<()> {
        let bytes = self.block_length(length)?;
        let (block, rest) = input.split_at_checked(bytes).ok_or("a block passes the end")?;
        *input = rest;
        if self.flags & BLOCK_CHECKSUMS != 0 {
            check(block, take(input, "a block's checksum is cut")?, "a block's checksum")?;
        }
        let start = plain.len();
        let left = most - start;
        if length & PLAIN_BLOCK != 0 {
            if bytes > left {
                return Err(Refused::Grows);
            }
            plain.extend_from_slice(block);
            return Ok(());
        }
        let room = self.block_bytes.min(bytes.saturating_mul(BEST_RATIO)).min(left);
        plain.resize(start + room, 0);
        let (before, out) = plain.split_at_mut(start);
        let decoded = if self.flags & INDEPENDENT_BLOCKS != 0 {
            decompress_into(block, out)
        } else {
            decompress_into_with_dict(block, out, &before[start.saturating_sub(WINDOW_BYTES)..])
        };
        let decoded = decoded.map_err(|error| match error {
            DecompressError::OutputTooSmall { .. } if room == left => Refused::Grows,
            error => Refused::Codec(error.to_string()),
        })?;
        plain.truncate(start + decoded);
        Ok(())
    }
}

fn take<const N: usize>(input: &mut &[u8], cut: &str) -> Checked<[u8; N]> {
    let (bytes, rest) = input.split_first_chunk::<N>().ok_or(cut)?;
    *input = rest;
    Ok(*bytes)
}

fn check(bytes: &[u8], stored: [u8; 4], what: &str) -> Checked<()> {
    let right = XxHash32::oneshot(0, bytes) == u32::from_le_bytes(stored);
    if right { Ok(()) } else { Err(format!("{what} is wrong").into()) }
}
