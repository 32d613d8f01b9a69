//! Files with a valid checksum and impossible content: the log refuses them.

use bytes::{BufMut, BytesMut};
use uuid::Uuid;

use super::*;
use crate::log::format::{
    Checkpoint, CheckpointKind, EntryHeader, EntryKind, EpochHistory, Index, ProducerTable, ReplicaCheckpoint,
    SegmentInfo, Snapshot, entry,
};

const DIRECTORY: Uuid = Uuid::from_u128(7);

/// Decodes an epoch history of these epochs and start offsets.
fn epochs(entries: &[(u32, u64)]) -> Option<EpochHistory> {
    let mut out = BytesMut::new();
    out.put_u32(u32::try_from(entries.len()).unwrap());
    for (epoch, start) in entries {
        out.put_u32(*epoch);
        out.put_u64(*start);
    }
    EpochHistory::decode(&mut out.freeze())
}

#[test]
fn impossible_or_decreasing_epochs_are_refused() {
    assert!(epochs(&[(1, 0), (3, 10), (i32::MAX.unsigned_abs(), 11)]).is_some());
    for bad in [&[(1 << 31, 0)][..], &[(1, 0), (1, 5)], &[(2, 0), (1, 5)], &[(1, 5), (2, 5)], &[(1, 5), (2, 4)]] {
        assert_eq!(epochs(bad), None, "{bad:?}");
    }
}

/// Builds a table of producers with one batch each: id, count, base.
fn producers(entries: &[(i64, u32, u64)]) -> Option<ProducerTable> {
    let entries: Vec<_> = entries.iter().map(|(id, count, base)| (*id, 0, *count, *base, 0)).collect();
    timed_producers(0, &entries)
}

/// Builds a table at partition time `time_ms`. Each producer has its id, the partition time of its last batch, and the
/// count, base and attributes of that batch.
fn timed_producers(time_ms: i64, entries: &[(i64, i64, u32, u64, u8)]) -> Option<ProducerTable> {
    let mut out = BytesMut::new();
    out.put_i64(time_ms);
    out.put_u32(u32::try_from(entries.len()).unwrap());
    for (id, last_ms, count, base, attributes) in entries {
        out.put_i64(*id);
        out.put_i16(0);
        out.put_i64(*last_ms);
        out.put_u8(1);
        out.put_i32(0);
        out.put_u32(*count);
        out.put_u64(*base);
        out.put_u32(0);
        out.put_u8(*attributes);
    }
    ProducerTable::from_bytes(&out)
}

/// The offset after a stored batch must be valid, because the response to a retry contains it. Regression: a table from
/// the object store contained an end above 2^63, and the broker crashed.
#[test]
fn producers_with_impossible_batches_are_refused() {
    let last = Offset::MAX.get() - 3;
    assert!(producers(&[(0, 1, 0), (4, 3, last)]).is_some());
    for bad in [
        &[(0, 4, last)][..],
        &[(0, u32::MAX, last)],
        &[(0, 0, 7)],
        &[(-1, 1, 0)],
        &[(1, 1, 0), (1, 1, 0)],
        &[(2, 1, 0), (1, 1, 0)],
    ] {
        assert_eq!(producers(bad), None, "{bad:?}");
    }
    assert_eq!(producers(&[(1, 1, 5), (2, 1, 5)]), None, "two batches at one offset");
}

/// A table is refused if a producer's time is above the partition time, or if times decrease as offsets grow. A table
/// is also refused if a batch has unknown attributes. The times determine which producer a table removes next: with
/// wrong times, replicas would remove different producers, and would respond differently to the same retry.
#[test]
fn producers_with_bad_times_or_attributes_are_refused() {
    assert!(timed_producers(9, &[(1, 9, 1, 7, 0b1100), (2, 5, 1, 3, 0b0000)]).is_some());
    for bad in [
        [(1, 10, 1, 7, 0), (2, 5, 1, 3, 0)],
        [(1, 5, 1, 7, 0), (2, 9, 1, 3, 0)],
        [(1, 9, 1, 7, 0b0101), (2, 5, 1, 3, 0)],
        [(1, 9, 1, 7, 0b1_0000), (2, 5, 1, 3, 0)],
    ] {
        assert_eq!(timed_producers(9, &bad), None, "{bad:?}");
    }
}

/// An index with decreasing times is refused, because the binary search of a lookup by time would skip records. An
/// index that does not begin with the first batch is refused too.
#[test]
fn index_with_decreasing_times_or_wrong_start_is_refused() {
    let decode = |entries: &[(u64, u64, i64)]| {
        let mut index = Index::default();
        entries.iter().for_each(|(offset, position, max_before)| index.add_batch(at(*offset), *position, *max_before));
        let (offsets, times) = index.encode(at(5), 100_000);
        Index::decode(&offsets, &times, at(5), 100_000)
    };
    assert!(decode(&[(5, 0, i64::MIN), (9, 5000, 7), (12, 10_000, 7)]).is_some());
    for bad in [&[(5, 0, i64::MIN), (9, 5000, 7), (12, 10_000, 6)][..], &[(6, 0, i64::MIN)], &[(5, 1, i64::MIN)]] {
        assert_eq!(decode(bad), None, "{bad:?}");
    }
}

/// Returns the header of an append.
fn header(generation: u64, position: u64) -> EntryHeader {
    EntryHeader {
        kind: EntryKind::Append,
        id: partition(0),
        generation,
        base: at(0),
        end: at(3),
        segment: at(0),
        position,
        epoch: Some(LeaderEpoch(1)),
    }
}

/// Frames with too large numbers are refused: the next frame, the next generation and the end of a write are sums,
/// which must not overflow.
#[test]
fn frame_with_overflowing_numbers_is_refused() {
    let batches = [batch(0, 3, 1, 5, 100)];
    let decode = |sequence: u64, header: EntryHeader| {
        let mut frame = vec![0; entry::frame_len(1, 100)];
        entry::encode(&mut frame, DIRECTORY, sequence, [(&header, &batches[..])].into_iter());
        entry::decode(&frame, DIRECTORY)
    };
    assert!(decode(1, header(1, u64::from(u32::MAX) - 100)).is_some());
    assert!(decode(u64::MAX, header(1, 0)).is_none(), "sequence");
    assert!(decode(1, header(u64::MAX, 0)).is_none(), "generation");
    for position in [u64::from(u32::MAX), 1 << 40, u64::MAX] {
        assert!(decode(1, header(1, position)).is_none(), "position {position}");
    }
}

#[test]
fn checkpoint_with_impossible_replicas_is_refused() {
    let decode = |change: &dyn Fn(&mut Checkpoint)| {
        let mut record = ReplicaCheckpoint::empty(partition(0), 3, at(5), 0);
        record.segments = vec![SegmentInfo { end: at(9), bytes: 300, ..SegmentInfo::empty(at(5), 0) }];
        record.epochs = epochs(&[(1, 5)]).unwrap();
        let mut checkpoint =
            Checkpoint { first_frame: 1, generation: 3, kind: CheckpointKind::CleanShutdown, replicas: vec![record] };
        change(&mut checkpoint);
        Checkpoint::decode(&checkpoint.encode(DIRECTORY), DIRECTORY)
    };
    assert!(decode(&|_| {}).is_some());
    assert_eq!(decode(&|checkpoint| checkpoint.first_frame = u64::MAX), None);
    assert_eq!(decode(&|checkpoint| checkpoint.generation = u64::MAX), None);
    assert_eq!(decode(&|checkpoint| checkpoint.replicas[0].generation = u64::MAX), None);
    assert_eq!(decode(&|checkpoint| checkpoint.replicas[0].segments[0].bytes = 1 << 32), None);
    assert_eq!(decode(&|checkpoint| checkpoint.replicas[0].segments[0].end = at(4)), None);
    assert_eq!(decode(&|checkpoint| checkpoint.replicas[0].epochs = epochs(&[(1, 10)]).unwrap()), None);
}

#[test]
fn snapshot_with_later_epochs_is_refused() {
    let snapshot = |start| Snapshot::encode(&epochs(&[(1, start)]).unwrap(), &ProducerTable::new(), at(9));
    assert!(Snapshot::decode(&snapshot(9), at(9)).is_some());
    assert_eq!(Snapshot::decode(&snapshot(10), at(9)), None);
}
