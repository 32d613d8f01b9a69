//! Position of one partition, and its advance by a response. Pure.

use bytes::Bytes;

use crate::{
    model::Offset,
    record::{Batch, ChunkedBatches, MalformedBatch},
};

/// Error of a response.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum InvalidResponse {
    /// The bytes are no complete batches.
    Malformed(MalformedBatch),
    /// Records are missing before this offset.
    Gap(Offset),
}

/// Verifies the chunks of a response. Returns the batches with records at or above `position`, each with the position
/// at which its records start. Also returns the new position, and the error if the scan ended early.
pub(super) fn advance(
    mut position: Offset,
    chunks: Vec<Bytes>,
) -> (Vec<(Offset, Batch)>, Offset, Result<(), InvalidResponse>) {
    let mut accepted = Vec::new();
    for batch in ChunkedBatches::new(chunks) {
        match batch {
            Err(malformed) => return (accepted, position, Err(InvalidResponse::Malformed(malformed))),
            Ok(batch) if batch.end_offset() <= position => {}
            Ok(batch) if batch.base_offset() > position => {
                return (accepted, position, Err(InvalidResponse::Gap(batch.base_offset())));
            }
            Ok(batch) => {
                let end = batch.end_offset();
                accepted.push((position, batch));
                position = end;
            }
        }
    }
    (accepted, position, Ok(()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        model::{Compression, LeaderEpoch},
        record::BatchBuilder,
    };

    fn batch(base: u64, count: u64) -> Batch {
        let mut builder = BatchBuilder::new(Compression::None);
        for n in 0..count {
            builder.push(0, None, Some(format!("record {}", base + n).as_bytes()), &[]).expect("fits");
        }
        let mut batch = builder.finish(None).expect("not empty");
        batch.set_offset_and_epoch(Offset::new(base).expect("small"), LeaderEpoch(0));
        batch
    }

    fn at(offset: u64) -> Offset {
        Offset::new(offset).expect("small")
    }

    #[test]
    fn batches_are_complete_for_any_chunk_boundaries() {
        let all: Vec<u8> = [batch(0, 3), batch(3, 1), batch(4, 2)].iter().flat_map(|b| b.to_bytes()).collect();
        for cut in 0..=all.len() {
            for second in (cut..=all.len()).step_by(7) {
                let chunks = [&all[..cut], &all[cut..second], &all[second..]];
                let chunks = chunks.into_iter().map(Bytes::copy_from_slice).collect();
                let (accepted, position, result) = advance(Offset::ZERO, chunks);
                assert_eq!((accepted.len(), position, result), (3, at(6), Ok(())), "cut at {cut} and {second}");
            }
        }
    }

    #[test]
    fn batches_below_position_are_skipped_and_one_around_it_kept() {
        let chunks = vec![batch(0, 3).to_bytes(), batch(3, 3).to_bytes()];
        let (accepted, position, result) = advance(at(4), chunks);
        assert_eq!(result, Ok(()));
        assert_eq!(position, at(6));
        assert_eq!(accepted.len(), 1);
        assert_eq!((accepted[0].0, accepted[0].1.base_offset()), (at(4), at(3)));
    }

    #[test]
    fn gap_is_reported_and_batches_before_it_are_kept() {
        let (accepted, position, result) = advance(at(0), vec![batch(0, 2).to_bytes(), batch(3, 1).to_bytes()]);
        assert_eq!((accepted.len(), position, result), (1, at(2), Err(InvalidResponse::Gap(at(3)))));
    }

    #[test]
    fn flipped_bit_or_truncated_end_is_rejected() {
        let good = batch(0, 2).to_bytes();
        for bit in 0..good.len() * 8 {
            let mut bad = good.to_vec();
            bad[bit / 8] ^= 1 << (bit % 8);
            let (accepted, ..) = advance(Offset::ZERO, vec![bad.into()]);
            // The broker sets bytes 0..8 and 12..16; the CRC does not cover them.
            let unchecked = bit / 8 < 8 || (12..16).contains(&(bit / 8));
            assert!(unchecked || accepted.is_empty(), "bit {bit}");
        }
        let (accepted, _, result) = advance(Offset::ZERO, vec![good.slice(..good.len() - 1)]);
        assert!(
            accepted.is_empty() && matches!(result, Err(InvalidResponse::Malformed(MalformedBatch::Truncated { .. })))
        );
    }
}
