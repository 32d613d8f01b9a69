//! Producer state: the retries that are recognised, and the removal of producers.

use proptest::prelude::*;

use super::*;
use crate::{
    limits,
    model::{Compression, TimestampType},
    record::{BatchBuilder, Fingerprint, ProducerSequence},
};

fn stamp(id: i64, base_sequence: i32) -> ProducerSequence {
    ProducerSequence { id, epoch: 0, base_sequence }
}

/// Creates the first batch of a producer, with one record, at this offset and time.
fn first(id: i64, base: u64, timestamp: i64) -> Batch {
    produced(base, 1, 1, timestamp, 61, (id, 0, 0))
}

fn is_known(table: &ProducerTable, id: i64) -> bool {
    matches!(table.check(stamp(id, 0), 1, None), SequenceCheck::Duplicate { .. })
}

#[test]
fn other_batch_with_the_sequence_is_no_duplicate() {
    let batch_of = |value: &[u8]| {
        let mut builder = BatchBuilder::new(Compression::None);
        builder.push(7, None, Some(value), &[]).unwrap();
        builder.finish(Some(stamp(9, 0))).unwrap()
    };
    let (original, other) = (batch_of(b"original"), batch_of(b"other"));
    let stored_as = |change: &dyn Fn(&Batch) -> Batch| {
        let (mut table, mut stored) = (ProducerTable::new(), change(&original));
        // The leader sets offset and epoch after the client has sent the batch. The comparison ignores both.
        stored.set_offset_and_epoch(at(3), LeaderEpoch(8));
        table.record_batch(&stored);
        let read = ProducerTable::from_bytes(&table.to_bytes()).unwrap();
        assert_eq!(read, table);
        read
    };
    let duplicate = SequenceCheck::Duplicate { base: at(3), end: at(4) };
    let check = |table: &ProducerTable, sent: Option<Fingerprint>| table.check(stamp(9, 0), 1, sent);

    let as_sent = stored_as(&Batch::clone);
    assert_eq!(check(&as_sent, Some(original.fingerprint())), duplicate);
    assert_eq!(check(&as_sent, Some(other.fingerprint())), SequenceCheck::Conflict { base: at(3) });
    assert_eq!(check(&as_sent, None), duplicate, "records that were decoded have no CRC");

    // A batch that the broker recompressed, or to which it gave the append time, is compared by sequence and count.
    let recompressed = stored_as(&|batch| batch.recompress(Compression::Zstd).unwrap());
    let timed = stored_as(&|batch| {
        let mut batch = batch.clone();
        batch.set_append_time(99);
        assert_eq!(batch.timestamp_type(), TimestampType::LogAppendTime);
        batch
    });
    for table in [&recompressed, &timed] {
        for sent in [Some(original.fingerprint()), Some(other.fingerprint()), None] {
            assert_eq!(check(table, sent), duplicate);
        }
    }
    let zstd = other.recompress(Compression::Zstd).unwrap();
    assert_eq!(check(&recompressed, Some(zstd.fingerprint())), SequenceCheck::Conflict { base: at(3) });
}

#[test]
fn producer_is_removed_by_partition_time() {
    let disk = SimDisk::new();
    let log = open(&disk);
    let mut replica = log.open_replica(partition(0), at(0)).unwrap();
    replica.set_producer_expiration(Some(Duration::from_millis(100)));
    write(&log, &mut replica, &[first(1, 0, 1000)]);
    // For producer 2, which writes an old timestamp, the expiration counts from the partition time of its batch.
    write(&log, &mut replica, &[first(2, 1, 5), batch(2, 1, 1, 1100, 61)]);
    assert!(is_known(&replica.producers(), 1) && is_known(&replica.producers(), 2));
    // Batches without a producer advance the partition time as well.
    write(&log, &mut replica, &[batch(3, 1, 1, 1101, 61)]);
    assert!(replica.producers().is_empty());
    assert_eq!(replica.producers().check(stamp(1, 1), 1, None), SequenceCheck::Unknown);
    assert_eq!(replica.producers().check(stamp(1, 0), 1, None), SequenceCheck::New);

    // A truncation moves the partition time back, and restores the producers.
    replica.truncate(at(3)).unwrap();
    assert!(is_known(&replica.producers(), 1) && is_known(&replica.producers(), 2));
    // A shorter expiration applies at once; `None` removes no producer.
    replica.set_producer_expiration(Some(Duration::from_millis(99)));
    assert!(replica.producers().is_empty());
    replica.set_producer_expiration(None);
    write(&log, &mut replica, &[first(3, 3, 1100), batch(4, 1, 1, i64::MAX, 61)]);
    assert!(is_known(&replica.producers(), 3));
}

/// A log may start with the producer table of another replica. Both then remove a producer at the same offset, although
/// the batches that set the partition time were evicted.
#[test]
fn partition_time_survives_the_eviction_of_its_batches() {
    let (disk, other_disk) = (SimDisk::new(), SimDisk::new());
    let (log, other_log) = (open(&disk), open(&other_disk));
    let mut replica = log.open_replica(partition(0), at(0)).unwrap();
    replica.set_producer_expiration(Some(Duration::from_millis(100)));
    write(&log, &mut replica, &[batch(0, 1, 1, 1000, 61), first(1, 1, 10)]);
    replica.roll().unwrap();
    write(&log, &mut replica, &[batch(2, 1, 1, 20, 61)]);
    replica.evict(at(2)).unwrap();
    let (start, epochs, producers) = replica.tables_at_start().unwrap();
    let mut other = other_log.open_replica(partition(0), at(0)).unwrap();
    other.reset_with(start, epochs, producers).unwrap();
    other.set_producer_expiration(Some(Duration::from_millis(100)));
    write(&other_log, &mut other, &[batch(2, 1, 1, 20, 61)]);
    assert_eq!(*replica.producers(), *other.producers());
    assert!(is_known(&other.producers(), 1));
    for (log, replica) in [(&log, &mut replica), (&other_log, &mut other)] {
        write(log, replica, &[batch(3, 1, 1, 1101, 61)]);
        assert!(replica.producers().is_empty());
    }
}

#[test]
fn oldest_producer_is_removed_above_the_limit() {
    let mut table = ProducerTable::new();
    let bound = i64::try_from(limits::MAX_PRODUCERS).unwrap();
    for id in 0..bound {
        table.record_batch(&first(id, u64::try_from(id).unwrap(), 1));
    }
    // Producer 0 writes again, so producer 1 is the oldest.
    table.record_batch(&produced(1 << 20, 1, 1, 1, 61, (0, 0, 1)));
    assert_eq!(table.len(), limits::MAX_PRODUCERS);
    table.record_batch(&first(bound, 1 << 21, 1));
    assert_eq!(table.len(), limits::MAX_PRODUCERS);
    assert!(is_known(&table, 0) && !is_known(&table, 1) && is_known(&table, 2) && is_known(&table, bound));
}

/// Opens a data directory. Once the producer state of all its replicas exceeds `producer_bytes`, large tables refuse
/// new producers.
fn bounded(producer_bytes: usize) -> DataDir {
    let options = LogOptions { producer_bytes, ..small() };
    DataDir::open(Arc::new(SimDisk::new()), Path::new("/data"), &identity(), options).unwrap()
}

/// Creates a batch of a producer, with one record and this sequence.
fn next(id: i64, base: u64, sequence: i32) -> Batch {
    produced(base, 1, 1, 1, 61, (id, 0, sequence))
}

/// A table with many producers refuses new ones while all tables exceed their memory. Regression: 1,700 producers on
/// each of 1,000 partitions used 460 MB.
#[test]
fn producers_of_all_partitions_are_bounded_together() {
    let log = bounded(20_000);
    let mut busy = log.open_replica(partition(0), at(0)).unwrap();
    let mut quiet = log.open_replica(partition(1), at(0)).unwrap();
    let (mut id, mut base) = (0, 0);
    let refused = loop {
        let check = busy.producers().check(stamp(id, 0), 1, None);
        if check != SequenceCheck::New {
            break check;
        }
        write(&log, &mut busy, &[first(id, base, 1)]);
        (id, base) = (id + 1, base + 1);
        assert!(id < 1000, "no limit was reached");
    };
    assert_eq!(refused, SequenceCheck::TooManyProducers { max_bytes: 20_000 });
    assert!(log.status().producer_bytes > 20_000 && id > 50, "{id} producers");
    // Producers in the table may continue to write, and a partition with few producers accepts new ones.
    assert_eq!(busy.producers().check(stamp(id - 1, 1), 1, None), SequenceCheck::New);
    assert_eq!(busy.producers().check(stamp(id, 1), 1, None), SequenceCheck::Unknown);
    assert_eq!(quiet.producers().check(stamp(id, 0), 1, None), SequenceCheck::New);
    write(&log, &mut quiet, &[first(id, 0, 1)]);
    // The producer table that replaces the table at a truncation is counted too.
    busy.truncate(at(base - 1)).unwrap();
    assert!(log.status().producer_bytes > 15_000, "{}", log.status().producer_bytes);
    // A reset frees the bytes of the table.
    busy.reset(at(7)).unwrap();
    assert!(log.status().producer_bytes < 1000, "{}", log.status().producer_bytes);
    assert_eq!(busy.producers().check(stamp(0, 0), 1, None), SequenceCheck::New);
}

/// While the producer tables exceed their memory, all but 16 producers of a table keep only 16 batches. All of them may
/// continue to write. A table outside a log (`free`) is not limited.
#[test]
fn windows_are_short_while_producer_memory_is_exceeded() {
    let log = bounded(0);
    let (mut replica, mut free) = (log.open_replica(partition(0), at(0)).unwrap(), ProducerTable::new());
    let window = i32::try_from(limits::MAX_BATCHES_PER_PRODUCER).unwrap();
    let written = (0..40).flat_map(|id| (0..window).map(move |sequence| (id, sequence)));
    for (base, (id, sequence)) in (0..).zip(written) {
        let batch = next(id, base, sequence);
        write(&log, &mut replica, std::slice::from_ref(&batch));
        free.record_batch(&batch);
    }
    let known = |table: &ProducerTable, id: i64, sequence: i32| {
        matches!(table.check(stamp(id, sequence), 1, None), SequenceCheck::Duplicate { .. })
    };
    let table = replica.producers();
    for id in 0..40 {
        let known_count = (0..window).filter(|sequence| known(&table, id, *sequence)).count();
        assert_eq!(known_count, if id < 24 { 16 } else { limits::MAX_BATCHES_PER_PRODUCER }, "producer {id}");
        assert!((0..window).all(|sequence| known(&free, id, sequence)));
        // A shortened window keeps the newest batches.
        assert!(known(&table, id, window - 1));
        assert_eq!(table.check(stamp(id, window), 1, None), SequenceCheck::New);
    }
    let read = ProducerTable::from_bytes(&table.to_bytes()).unwrap();
    assert_eq!(read, *table);
}

proptest! {
    /// A producer is known exactly while partition time is at most the expiration past the partition time of its last
    /// batch. It makes no difference whether the table is encoded and decoded meanwhile (`restarts`), or when the
    /// expiration is set (`late`).
    #[test]
    fn table_is_a_function_of_the_log(
        writes in prop::collection::vec((0i64..6, -40i64..60), 1..60),
        expiration in 1i64..120,
        restarts in prop::collection::vec(any::<bool>(), 60),
        known_from in 0usize..60,
    ) {
        let (mut table, mut late) = (ProducerTable::new(), ProducerTable::new());
        let (mut time, mut clock) = (i64::MIN, 0);
        let mut last = std::collections::BTreeMap::new();
        for (number, (id, step)) in writes.iter().enumerate() {
            clock += step;
            time = time.max(clock);
            let base = u64::try_from(number).unwrap();
            let batch = if *id == 0 { batch(base, 1, 1, clock, 61) } else { first(*id, base, clock) };
            table.record_batch(&batch);
            late.record_batch(&batch);
            if *id != 0 {
                last.insert(*id, time);
            }
            table.remove_expired(Some(expiration));
            if number >= known_from {
                late.remove_expired(Some(expiration));
            }
            if restarts[number] {
                table = ProducerTable::from_bytes(&table.to_bytes()).unwrap();
                late = ProducerTable::from_bytes(&late.to_bytes()).unwrap();
            }
            for id in 1..6 {
                let known = last.get(&id).is_some_and(|last| time - last <= expiration);
                prop_assert_eq!(is_known(&table, id), known, "producer {} at {}", id, number);
            }
        }
        late.remove_expired(Some(expiration));
        prop_assert_eq!(late, table);
    }
}
