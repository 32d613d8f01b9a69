//! Zigzag varints, as Protocol Buffers' `sint32` and `sint64` and Kafka's `ByteUtils` write them: seven bits per byte,
//! the lowest first. The high bit is set on every byte but the last.

/// Maximum length of an encoded `i32`.
pub(super) const MAX_I32_BYTES: usize = 5;

/// Maximum length of an encoded `i64`.
pub(super) const MAX_I64_BYTES: usize = 10;

/// Maps small numbers of either sign to small numbers: 0, -1, 1, -2 → 0, 1, 2, 3.
const fn zigzag(value: i64) -> u64 {
    ((value << 1) ^ (value >> 63)).cast_unsigned()
}

/// Reverses [`zigzag`].
const fn unzigzag(value: u64) -> i64 {
    (value >> 1).cast_signed() ^ -(value & 1).cast_signed()
}

/// Returns the length of the encoded `value`. An `i32` has the same length as an `i64` of the same value.
pub(super) const fn len(value: i64) -> usize {
    let bits = u64::BITS - (zigzag(value) | 1).leading_zeros();
    bits.div_ceil(7) as usize
}

/// Writes `value` to the start of `out` and returns its encoded length.
///
/// # Panics
/// `out` is shorter than [`len`] of `value`.
#[expect(clippy::cast_possible_truncation, reason = "each byte takes the seven low bits that the mask leaves")]
pub(super) fn write(value: i64, out: &mut [u8]) -> usize {
    let mut rest = zigzag(value);
    let mut at = 0;
    while rest >= 0x80 {
        out[at] = (rest & 0x7f) as u8 | 0x80;
        rest >>= 7;
        at += 1;
    }
    out[at] = rest as u8;
    at + 1
}

/// Reads an `i64` from the start of `input`. Returns `None` if the bytes end first, or if the number does not fit.
pub(super) fn read_i64(input: &mut &[u8]) -> Option<i64> {
    read(input, MAX_I64_BYTES, u64::MAX).map(unzigzag)
}

/// Reads an `i32` from the start of `input`. Returns `None` if the bytes end first, or if the number does not fit.
pub(super) fn read_i32(input: &mut &[u8]) -> Option<i32> {
    let raw = read(input, MAX_I32_BYTES, u64::from(u32::MAX))?;
    Some(i32::try_from(unzigzag(raw)).expect("32 bits before zigzag are 32 bits after it"))
}

/// Reads an unsigned number. Returns `None` if the bytes end first, or if the number has more than `max_bytes` bytes or
/// exceeds `max_value`; `input` is not usable then.
fn read(input: &mut &[u8], max_bytes: usize, max_value: u64) -> Option<u64> {
    // Most numbers of a record have one byte.
    if let Some((&byte, rest)) = input.split_first()
        && byte < 0x80
    {
        *input = rest;
        return Some(u64::from(byte));
    }
    let mut value = 0_u64;
    for (at, &byte) in input.iter().take(max_bytes).enumerate() {
        let bits = u64::from(byte & 0x7f);
        let shifted = bits << (7 * at);
        // The tenth byte of an i64 has room for one bit.
        if shifted >> (7 * at) != bits {
            return None;
        }
        value |= shifted;
        if byte & 0x80 == 0 {
            *input = &input[at + 1..];
            return (value <= max_value).then_some(value);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn encoded(value: i64) -> Vec<u8> {
        let mut out = [0; MAX_I64_BYTES];
        let len = write(value, &mut out);
        out[..len].to_vec()
    }

    #[test]
    fn known_values_have_the_bytes_of_the_specification() {
        // Pairs from Kafka's ByteUtilsTest.
        for (value, bytes) in [
            (0, &[0x00][..]),
            (-1, &[0x01]),
            (1, &[0x02]),
            (63, &[0x7e]),
            (-64, &[0x7f]),
            (64, &[0x80, 0x01]),
            (-65, &[0x81, 0x01]),
            (8191, &[0xfe, 0x7f]),
            (i64::from(i32::MAX), &[0xfe, 0xff, 0xff, 0xff, 0x0f]),
            (i64::from(i32::MIN), &[0xff, 0xff, 0xff, 0xff, 0x0f]),
            (i64::MAX, &[0xfe, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01]),
            (i64::MIN, &[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01]),
        ] {
            assert_eq!(encoded(value), bytes, "{value}");
            assert_eq!(read_i64(&mut &bytes[..]), Some(value));
        }
    }

    #[test]
    fn values_that_do_not_fit_are_rejected() {
        assert_eq!(read_i32(&mut &[0xff, 0xff, 0xff, 0xff, 0x1f][..]), None, "33 bits");
        assert_eq!(read_i32(&mut &[0x80, 0x80, 0x80, 0x80, 0x80, 0x00][..]), None, "six bytes");
        assert_eq!(read_i64(&mut &[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x02][..]), None, "65 bits");
        assert_eq!(read_i64(&mut &[0x80; 11][..]), None, "no end");
        assert_eq!(read_i64(&mut &[0x80][..]), None, "truncated");
        assert_eq!(read_i64(&mut &[][..]), None, "empty");
    }

    proptest! {
        #[test]
        fn any_value_round_trips(value: i64, rest: Vec<u8>) {
            let mut bytes = encoded(value);
            prop_assert_eq!(bytes.len(), len(value));
            bytes.extend(&rest);
            let mut input = &bytes[..];
            prop_assert_eq!(read_i64(&mut input), Some(value));
            prop_assert_eq!(input, &rest[..]);
        }

        #[test]
        fn any_i32_round_trips(value: i32) {
            prop_assert_eq!(read_i32(&mut &encoded(value.into())[..]), Some(value));
        }
    }
}
