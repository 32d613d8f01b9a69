//! Position of one partition, and its advance by a response. Pure.

use bytes::Bytes;

use crate::{
    model::Offset,
    record::{Batch, ChunkedBatches, MalformedBatch},
};

/// Error of a response.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Untaken {
    /// The bytes are no complete batches.
    Malformed(MalformedBatch),
    /// Records are missing before this offset.
    Gap(Offset),
}

/// Verifies the chunks of a response. Returns the batches with records at or above `position`, each with the position
/// at which its records start. Also returns the new position, and the error if the scan ended early.
pub(super) fn advance(mut position: Offset, chunks: Vec<Bytes>) -> (Vec<(Offset, Batch)>, Offset, Result<(), Untaken>) {
    let mut taken = Vec::new();
    for batch in ChunkedBatches::new(chunks) {
        match batch {
            Err(malformed) => return (taken, position, Err(Untaken::Malformed(malformed))),
            Ok(batch) if batch.end_offset() <= position => {}
            Ok(batch) if batch.base_offset() > position => {
                return (taken, position, Err(Untaken::Gap(batch.base_offset())));
            }
            Ok(batch) => {
                let end = batch.end_offset();
                taken.push((position, batch));
                position = end;
            }
        }
    }
    (taken, position, Ok(()))
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
        let whole: Vec<u8> = [batch(0, 3), batch(3, 1), batch(4, 2)].iter().flat_map(|b| b.to_bytes()).collect();
        for cut in 0..=whole.len() {
            for second in (cut..=whole.len()).step_by(7) {
                let chunks = [&whole[..cut], &whole[cut..second], &whole[second..]];
                let chunks = chunks.into_iter().map(Bytes::copy_from_slice).collect();
                let (taken, position, result) = advance(Offset::ZERO, chunks);
                assert_eq!((taken.len(), position, result), (3, at(6), Ok(())), "cut at {cut} and {second}");
            }
        }
    }

    #[test]
    fn batches_below_position_are_skipped_and_one_around_it_kept() {
        let chunks = vec![batch(0, 3).to_bytes(), batch(3, 3).to_bytes()];
        let (taken, position, result) = advance(at(4), chunks);
        assert_eq!(result, Ok(()));
        assert_eq!(position, at(6));
        assert_eq!(taken.len(), 1);
        assert_eq!((taken[0].0, taken[0].1.base_offset()), (at(4), at(3)));
    }

    #[test]
    fn gap_is_reported_and_batches_before_it_are_kept() {
        let (taken, position, result) = advance(at(0), vec![batch(0, 2).to_bytes(), batch(3, 1).to_bytes()]);
        assert_eq!((taken.len(), position, result), (1, at(2), Err(Untaken::Gap(at(3)))));
    }

    #[test]
    fn flipped_bit_or_truncated_end_is_rejected() {
        let good = batch(0, 2).to_bytes();
        for bit in 0..good.len() * 8 {
            let mut bad = good.to_vec();
            bad[bit / 8] ^= 1 << (bit % 8);
            let (taken, ..) = advance(Offset::ZERO, vec![bad.into()]);
            // The broker sets bytes 0..8 and 12..16; the CRC does not cover them.
            let stamp = bit / 8 < 8 || (12..16).contains(&(bit / 8));
            assert!(stamp || taken.is_empty(), "bit {bit}");
        }
        let (taken, _, result) = advance(Offset::ZERO, vec![good.slice(..good.len() - 1)]);
        assert!(taken.is_empty() && matches!(result, Err(Untaken::Malformed(MalformedBatch::Truncated { .. }))));
    }
}
