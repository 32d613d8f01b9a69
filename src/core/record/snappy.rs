//! Decodes the first bytes of a snappy block (google/snappy, format_description.txt). The `snap` crate decodes only
//! complete blocks.
//!
//! ```text
//! length varint u32 │ elements …
//! tag: low two bits 0 literal, 1 copy with a distance of 11 bits, 2 of 16 bits, 3 of 32 bits
//! ```

use super::lz4::copy_match;

/// Decodes elements until the output has `max` bytes or the length that the block declares.
pub(super) fn block_prefix(block: &[u8], max: usize) -> Result<Vec<u8>, &'static str> {
    let declared = snap::raw::decompress_len(block).map_err(|_| "the length of a block is not a varint")?;
    let length_bytes = 1 + block.iter().take_while(|byte| **byte >= 0x80).count();
    let max = max.min(declared);
    let mut input = &block[length_bytes..];
    let mut uncompressed = Vec::with_capacity(max);
    while uncompressed.len() < max {
        decode_element(&mut input, &mut uncompressed, max)?;
    }
    Ok(uncompressed)
}

/// Decodes one literal or copy and appends its bytes to `uncompressed`, up to `max` bytes.
fn decode_element(input: &mut &[u8], uncompressed: &mut Vec<u8>, max: usize) -> Result<(), &'static str> {
    let tag = read_number(input, 1)?;
    let (length, distance) = match tag & 0b11 {
        0 => {
            let length = match tag >> 2 {
                short @ ..60 => short,
                long => read_number(input, long - 59)?,
            };
            let (literal, rest) = input.split_at_checked(length + 1).ok_or("a literal ends after its block")?;
            *input = rest;
            uncompressed.extend_from_slice(&literal[..literal.len().min(max - uncompressed.len())]);
            return Ok(());
        }
        1 => (4 + (tag >> 2 & 0b111), (tag >> 5) << 8 | read_number(input, 1)?),
        2 => (1 + (tag >> 2), read_number(input, 2)?),
        _ => (1 + (tag >> 2), read_number(input, 4)?),
    };
    copy_match(uncompressed, distance, length, max)
}

/// Reads the next `bytes` bytes, at most four, as a little-endian number.
fn read_number(input: &mut &[u8], bytes: usize) -> Result<usize, &'static str> {
    let (number, rest) = input.split_at_checked(bytes).ok_or("the block ends inside an element")?;
    *input = rest;
    Ok(number.iter().rev().fold(0, |number, byte| number << 8 | usize::from(*byte)))
}
