//! Admission and acknowledgement of writes: single cases and a property test.

use proptest::prelude::*;

use super::*;
use crate::{
    model::{BrokerId, Compression},
    record::{BatchBuilder, ProducerSequence},
};

fn at(offset: u64) -> Offset {
    Offset::new(offset).unwrap()
}

fn batch(records: u32, producer: Option<ProducerSequence>) -> Batch {
    batch_of(b"value", records, producer)
}

fn batch_of(value: &[u8], records: u32, producer: Option<ProducerSequence>) -> Batch {
    let mut builder = BatchBuilder::new(Compression::None);
    for index in 0..records {
        builder.push(i64::from(index), None, Some(value), &[]).unwrap();
    }
    builder.finish(producer).unwrap()
}

/// Returns the leader of epoch 3 of an empty log without other replicas.
fn leader(durability: Durability, min_insync: usize) -> Leader<u32> {
    let rules = IsrRules { durability, min_insync, lag_ms: 0 };
    Leader::new(LeaderStart::standalone(BrokerId(1), LeaderEpoch(3), rules, ReplicaProgress::default(), at(0)), at(0))
}

/// Leader and the actor's part of the work: sets offsets on admitted batches, and applies the batches to the producer
/// table.
struct Log {
    leader: Leader<u32>,
    table: ProducerTable,
    group: Vec<Batch>,
}

impl Log {
    fn new(durability: Durability) -> Self {
        Self { leader: leader(durability, 1), table: ProducerTable::default(), group: Vec::new() }
    }

    /// Admits a batch as the actor does, and lets the writer wait for its acks rule.
    fn admit(&mut self, mut batch: Batch, acks: Acks, writer: u32) -> Result<Admission, AdmitError> {
        if self.leader.must_flush_before(&batch) {
            self.flush();
        }
        let admission = self.leader.admit(&batch, Some(batch.fingerprint()), acks, &self.table, None)?;
        let (base, end) = match admission {
            Admission::Append(base) => {
                batch.set_offset_and_epoch(base, self.leader.epoch());
                let end = batch.end_offset();
                self.group.push(batch);
                (base, end)
            }
            Admission::Duplicate(base, end) => (base, end),
        };
        let acked = WriteAck {
            base,
            end,
            epoch: LeaderEpoch(3),
            append_time_ms: None,
            durability: AckDurability::Memory,
            duplicate: false,
        };
        self.leader.add_waiter(acks, acked, writer);
        Ok(admission)
    }

    /// Appends the admitted group.
    fn flush(&mut self) {
        for batch in self.group.drain(..) {
            self.table.record_batch(&batch);
        }
        self.leader.on_appended();
    }

    /// Takes the writers whose result is due, each with the durability of its write.
    fn due(&mut self) -> Vec<(u32, AckDurability)> {
        let mut due = Vec::new();
        self.leader.take_due(|writer, acked| due.push((writer, acked.durability)));
        due
    }
}

/// Returns a sequence of producer 7.
fn sequence(base_sequence: i32) -> ProducerSequence {
    ProducerSequence { id: 7, epoch: 0, base_sequence }
}

#[test]
fn persisted_write_is_acknowledged_after_the_sync() {
    let mut log = Log::new(Durability::Persisted);
    log.admit(batch(2, None), Acks::All, 1).unwrap();
    log.flush();
    assert!(log.due().is_empty());
    assert_eq!(log.leader.high_watermark(), at(0));
    log.leader.on_persisted(at(2));
    assert_eq!(log.due(), [(1, AckDurability::Persisted(1))]);
    assert_eq!(log.leader.high_watermark(), at(2));
}

#[test]
fn replicated_write_is_acknowledged_from_the_page_cache() {
    let mut log = Log::new(Durability::Replicated);
    log.admit(batch(1, None), Acks::Leader, 1).unwrap();
    assert!(log.due().is_empty(), "the write is only queued");
    log.flush();
    assert_eq!(log.due(), [(1, AckDurability::PageCache(1))]);
}

/// The leader keeps a writer with `acks=tiered` until the upload, which may never happen. If the client has
/// disconnected, the leader drops the writer once the write is durable on this broker.
#[test]
fn dropped_writer_is_released_once_its_write_is_durable() {
    let mut log = Log::new(Durability::Persisted);
    for (acks, writer) in [(Acks::Tiered, 1), (Acks::Tiered, 2), (Acks::Leader, 3), (Acks::Tiered, 4)] {
        log.admit(batch(1, None), acks, writer).unwrap();
    }
    log.flush();
    log.leader.on_persisted(at(3));
    let is_dropped = |writer: &u32| *writer != 2;
    assert_eq!(log.due(), [(3, AckDurability::Persisted(1))]);
    assert!(log.leader.release_dropped(is_dropped), "the fourth write is not durable yet");
    log.leader.on_persisted(at(4));
    assert!(!log.leader.release_dropped(is_dropped));
    log.leader.on_tiered(at(4));
    assert_eq!(log.due(), [(2, AckDurability::Tiered(1))]);
}

/// Regression: each partition kept the memory of the longest writer queue that it ever had.
#[test]
fn writer_queues_release_memory() {
    let mut log = Log::new(Durability::Persisted);
    for writer in 0..5_000 {
        log.admit(batch(1, None), [Acks::All, Acks::Tiered][writer as usize % 2], writer).unwrap();
        log.flush();
    }
    log.leader.on_persisted(at(5_000));
    assert_eq!(log.due().len(), 2_500);
    assert!(!log.leader.release_dropped(|writer| *writer > 4_000));
    assert!(!log.leader.release_dropped(|writer| *writer > 3));
    let capacity = log.leader.queues().map(|queue| queue.capacity()).into_iter().sum::<usize>();
    assert!(capacity <= 4 * SPARE_WRITERS, "capacity for {capacity} writers");
    log.leader.on_tiered(at(5_000));
    assert_eq!(log.due().into_iter().map(|(writer, _)| writer).collect::<Vec<_>>(), [1, 3]);
}

#[test]
fn tiered_write_is_stored_locally_before_its_upload() {
    let mut log = Log::new(Durability::Persisted);
    for writer in 1..=3 {
        log.admit(batch(2, None), Acks::Tiered, writer).unwrap();
    }
    log.flush();
    let stored = |log: &mut Log| {
        let mut stored = Vec::new();
        log.leader.take_stored(|writer, acked| stored.push((*writer, acked.base, acked.end)));
        stored
    };
    assert_eq!(stored(&mut log), [], "nothing is durable yet");
    log.leader.on_persisted(at(4));
    assert_eq!(stored(&mut log), [(1, at(0), at(2)), (2, at(2), at(4))]);
    assert_eq!(stored(&mut log), [], "each write is reported once");
    log.leader.on_persisted(at(6));
    log.leader.on_tiered(at(6));
    assert_eq!(log.due().len(), 3, "a write is due without an earlier report");
    assert!(!log.leader.awaits_tier());
}

#[test]
fn tiered_write_waits_for_the_object_store() {
    let mut log = Log::new(Durability::Persisted);
    log.admit(batch(1, None), Acks::Tiered, 1).unwrap();
    log.flush();
    log.leader.on_persisted(at(1));
    assert!(log.due().is_empty() && log.leader.awaits_tier());
    log.leader.on_tiered(at(1));
    assert_eq!(log.due(), [(1, AckDurability::Tiered(1))]);
}

#[test]
fn small_isr_rejects_acks_all_but_not_acks_leader() {
    let mut leader = leader(Durability::Persisted, 2);
    let table = ProducerTable::default();
    let error = leader.admit(&batch(1, None), None, Acks::All, &table, None);
    assert_eq!(error, Err(AdmitError::NotEnoughReplicas { in_sync: 1, needed: 2 }));
    assert_eq!(leader.admit(&batch(1, None), None, Acks::Leader, &table, None), Ok(Admission::Append(at(0))));
}

#[test]
fn rejected_batch_takes_no_offset_and_its_retry_succeeds() {
    let mut log = Log::new(Durability::Persisted);
    log.admit(batch(1, Some(sequence(0))), Acks::All, 1).unwrap();
    log.flush();
    let error = AdmitError::StoreUnavailable { outage: "for 5 s".to_owned() };
    let mut admit =
        |batch: Batch| log.leader.admit(&batch, Some(batch.fingerprint()), Acks::All, &log.table, Some(error.clone()));
    assert_eq!(admit(batch(1, Some(sequence(1)))), Err(error.clone()));
    assert_eq!(admit(batch(1, Some(sequence(2)))), Err(error.clone()), "the refusal replaces the gap error");
    assert_eq!(admit(batch(1, None)), Err(error.clone()));
    let fenced = ProducerSequence { epoch: -1, ..sequence(1) };
    assert!(matches!(admit(batch(1, Some(fenced))), Err(AdmitError::Fenced { .. })), "a fenced producer must stop");
    assert_eq!(admit(batch(1, Some(sequence(0)))), Ok(Admission::Duplicate(at(0), at(1))));
    assert_eq!(log.admit(batch(1, Some(sequence(1))), Acks::All, 2), Ok(Admission::Append(at(1))));
}

#[test]
fn offsets_of_a_failed_group_are_used_again() {
    let mut leader = leader(Durability::Persisted, 1);
    let table = ProducerTable::default();
    assert_eq!(leader.admit(&batch(3, None), None, Acks::All, &table, None), Ok(Admission::Append(at(0))));
    leader.on_append_failed();
    assert_eq!(leader.admit(&batch(3, None), None, Acks::All, &table, None), Ok(Admission::Append(at(0))));
}

#[test]
fn producer_sequences_continue_within_one_group() {
    let mut log = Log::new(Durability::Persisted);
    assert_eq!(log.admit(batch(2, Some(sequence(0))), Acks::All, 1), Ok(Admission::Append(at(0))));
    assert_eq!(log.admit(batch(2, Some(sequence(2))), Acks::All, 2), Ok(Admission::Append(at(2))));
    // The same batch again, in the same group: the group is appended first, so that the producer table contains the
    // batch.
    assert_eq!(log.admit(batch(2, Some(sequence(2))), Acks::All, 3), Ok(Admission::Duplicate(at(2), at(4))));
    let other = log.admit(batch_of(b"other", 2, Some(sequence(2))), Acks::All, 4);
    assert_eq!(other, Err(AdmitError::SequenceConflict { producer: 7, sent: 2, base: at(2) }));
    let gap = log.admit(batch(1, Some(sequence(9))), Acks::All, 5);
    assert_eq!(gap, Err(AdmitError::OutOfOrder { producer: 7, sent: 9, expected: 4 }));
}

#[test]
fn duplicate_is_acknowledged_when_the_first_is_safe() {
    let mut log = Log::new(Durability::Persisted);
    log.admit(batch(1, Some(sequence(0))), Acks::All, 1).unwrap();
    log.flush();
    log.admit(batch(1, Some(sequence(0))), Acks::All, 2).unwrap();
    assert!(log.due().is_empty());
    log.leader.on_persisted(at(1));
    assert_eq!(log.due().len(), 2);
}

#[test]
fn sequence_wraps_to_zero() {
    assert_eq!(next_sequence(i32::MAX, 1), 0);
    assert_eq!(next_sequence(i32::MAX - 1, 3), 1);
}

proptest! {
    /// For any order of events, each writer gets one result at most, none before its rule holds, and all in the end.
    /// The high watermark never falls.
    #[test]
    fn acknowledgements_follow_their_rules(
        durable in any::<bool>(),
        steps in prop::collection::vec((0u8..4, 0u8..4, 1u32..4), 1..60),
    ) {
        let mut log = Log::new(if durable { Durability::Persisted } else { Durability::Replicated });
        let mut waiting = std::collections::BTreeMap::new();
        let (mut end, mut appended, mut persisted, mut tiered, mut last_high_watermark) = (0u64, 0, 0, 0, at(0));
        let mut writer = 0;
        let check = |log: &mut Log, waiting: &mut std::collections::BTreeMap<u32, (Acks, u64)>, appended, persisted, tiered| {
            for (writer, _) in log.due() {
                let (acks, end) = waiting.remove(&writer).expect("each writer gets one result");
                let local_end = if durable { persisted } else { appended };
                let safe_end = if acks == Acks::Tiered { std::cmp::min(tiered, local_end) } else { local_end };
                assert!(end <= safe_end, "acks={acks} acknowledged at {end}, and only {safe_end} records are safe");
            }
        };
        for (step, acks, records) in steps {
            match step {
                0 => {
                    let acks = [Acks::None, Acks::Leader, Acks::All, Acks::Tiered][usize::from(acks)];
                    writer += 1;
                    log.admit(batch(records, None), acks, writer).unwrap();
                    end += u64::from(records);
                    waiting.insert(writer, (acks, end));
                }
                1 => { log.flush(); appended = end; }
                2 => { persisted = appended; log.leader.on_persisted(at(persisted)); }
                _ => { tiered = log.leader.high_watermark().get(); log.leader.on_tiered(at(tiered)); }
            }
            check(&mut log, &mut waiting, appended, persisted, tiered);
            prop_assert!(log.leader.high_watermark() >= last_high_watermark);
            last_high_watermark = log.leader.high_watermark();
        }
        log.flush();
        log.leader.on_persisted(at(end));
        log.leader.on_tiered(at(end));
        check(&mut log, &mut waiting, end, end, end);
        prop_assert!(waiting.is_empty(), "writers without a result: {waiting:?}");
    }
}
