//! Fuzz entries of the single files of a data directory.

use bytes::Bytes;
use strandline::{
    log::{ProducerTable, SequenceCheck, fuzzing},
    record::{Batch, HEADER_BYTES, ProducerSequence},
};

use super::{check_recoding, sealed};

const FRAME_HEAD: usize = 44;
const ENTRY_HEAD: usize = 80;

/// Decodes a journal frame.
pub(crate) fn journal(input: &[u8]) -> bool {
    let frame = |bytes: &[u8]| fuzzing::frame(&Bytes::copy_from_slice(bytes));
    let as_is = check_recoding(input, frame);
    let mut corrected = input.to_vec();
    renew_frame(&mut corrected);
    check_recoding(&corrected, frame) || as_is
}

/// Decodes a checkpoint.
pub(crate) fn checkpoint(input: &[u8]) -> bool {
    let as_is = check_recoding(input, fuzzing::checkpoint);
    check_recoding(&sealed(input), fuzzing::checkpoint) || as_is
}

/// Decodes an offset index and a time index. The first two bytes are the length of the offset index.
pub(crate) fn index(input: &[u8]) -> bool {
    let Some((&[high, low], files)) = input.split_first_chunk::<2>() else { return false };
    let length = usize::from(u16::from_be_bytes([high, low])).min(files.len());
    let (offsets, times) = files.split_at(length);
    let recode = |(offsets, times): (&[u8], &[u8])| {
        let Some(encoded) = fuzzing::index(offsets, times) else { return false };
        assert_eq!((encoded.0.as_slice(), encoded.1.as_slice()), (offsets, times), "an index has one encoding");
        true
    };
    let as_is = recode((offsets, times));
    recode((&sealed(offsets), &sealed(times))) || as_is
}

/// Decodes a snapshot, and the same bytes as a producer table. A footer contains a producer table without a snapshot.
pub(crate) fn snapshot(input: &[u8]) -> bool {
    let as_is = check_recoding(input, fuzzing::snapshot);
    let table = producers(input);
    check_recoding(&sealed(input), fuzzing::snapshot) || as_is || table
}

fn producers(input: &[u8]) -> bool {
    let Some(table) = ProducerTable::from_bytes(input) else { return false };
    assert_eq!(table.to_bytes(), input, "a producer table has one encoding");
    let mut rest = &input[12..];
    let mut producers = 0;
    // Every stored batch is a duplicate, and an older epoch of its producer is fenced.
    while let Some((head, after)) = rest.split_first_chunk::<19>() {
        let (id, epoch) = (number(&head[..8]), i16::from_be_bytes([head[8], head[9]]));
        let (batches, after) = after.split_at(usize::from(head[18]) * 21);
        for batch in batches.chunks(21) {
            let base_sequence = i32::from_be_bytes(batch[..4].try_into().expect("four bytes"));
            let count = u32::from_be_bytes(batch[4..8].try_into().expect("four bytes"));
            let stamp = ProducerSequence { id, epoch, base_sequence };
            assert!(matches!(table.check(stamp, count, None), SequenceCheck::Duplicate { .. }));
            assert_eq!(
                table.check(ProducerSequence { epoch: epoch.saturating_sub(1), ..stamp }, count, None),
                if epoch == i16::MIN {
                    table.check(stamp, count, None)
                } else {
                    SequenceCheck::Fenced { current: epoch }
                },
            );
        }
        (rest, producers) = (after, producers + 1);
    }
    assert_eq!(table.len(), producers);
    true
}

fn number(bytes: &[u8]) -> i64 {
    i64::from_be_bytes(bytes.try_into().expect("eight bytes"))
}

/// Corrects all checksums of a frame: of the batches, of their headers in each entry, and of the frame header with its
/// entries.
pub(super) fn renew_frame(frame: &mut [u8]) {
    let Some(count) = frame.get(36..40).map(|count| u32::from_be_bytes(count.try_into().expect("four bytes"))) else {
        return;
    };
    let end = (count as usize).saturating_mul(ENTRY_HEAD).saturating_add(FRAME_HEAD);
    if end > frame.len() {
        return;
    }
    let (front, payloads) = frame.split_at_mut(end);
    let mut rest = payloads;
    for entry in front[FRAME_HEAD..].chunks_exact_mut(ENTRY_HEAD) {
        let bytes = u32::from_be_bytes(entry[64..68].try_into().expect("four bytes")) as usize;
        let Some((mut payload, after)) = rest.split_at_mut_checked(bytes) else { break };
        let mut crc = 0;
        while let Some(length) = Batch::framed_len(payload).ok().filter(|length| *length <= payload.len()) {
            let (batch, next) = payload.split_at_mut(length);
            super::record::renew_crc(batch);
            crc = crc32c::crc32c_append(crc, &batch[..HEADER_BYTES]);
            payload = next;
        }
        entry[68..72].copy_from_slice(&crc.to_be_bytes());
        rest = after;
    }
    let crc = crc32c::crc32c(&front[12..]);
    front[8..12].copy_from_slice(&crc.to_be_bytes());
}
