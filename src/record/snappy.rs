//! The first bytes of a snappy block (google/snappy, format_description.txt): the codec's crate only decodes whole ones.
//!
//! ```text
//! length varint u32 │ elements …
//! tag: low two bits 0 literal, 1 copy with a distance of 11 bits, 2 of 16 bits, 3 of 32 bits
//! ```

use super::lz4::copy_match;

/// Decodes elements until there are `most` bytes, or as many as the block says.
pub(super) fn block_prefix(block: &[u8], most: usize) -> Result<Vec<u8>, &'static str> {
    let claimed = snap::raw::decompress_len(block).map_err(|_| "a block's length is no varint")?;
    let length_bytes = 1 + block.iter().take_while(|byte| **byte >= 0x80).count();
    let most = most.min(claimed);
    let mut input = &block[length_bytes..];
    let mut plain = Vec::with_capacity(most);
    while plain.len() < most {
        element(&mut input, &mut plain, most)?;
    }
    Ok(plain)
}

fn element(input: &mut &[u8], plain: &mut Vec<u8>, most: usize) -> Result<(), &'static str> {
    let tag = number(input, 1)?;
    let (length, distance) = match tag & 0b11 {
        0 => {
            let length = match tag >> 2 {
                short @ ..60 => short,
                long => number(input, long - 59)?,
            };
            let (literal, rest) = input.split_at_checked(length + 1).ok_or("a literal passes the block's end")?;
            *input = rest;
            plain.extend_from_slice(&literal[..literal.len().min(most - plain.len())]);
            return Ok(());
        }
        1 => (4 + (tag >> 2 & 0b111), (tag >> 5) << 8 | number(input, 1)?),
        2 => (1 + (tag >> 2), number(input, 2)?),
        _ => (1 + (tag >> 2), number(input, 4)?),
    };
    copy_match(plain, distance, length, most)
}

/// The next `bytes` bytes, at most four, as a little-endian number.
fn number(input: &mut &[u8], bytes: usize) -> Result<usize, &'static str> {
    let (number, rest) = input.split_at_checked(bytes).ok_or("the block ends inside an element")?;
    *input = rest;
    Ok(number.iter().rev().fold(0, |number, byte| number << 8 | usize::from(*byte)))
}
