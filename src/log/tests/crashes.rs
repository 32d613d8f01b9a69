//! Random histories on a disk that loses unsynced data, compared with a reference model. One seed gives one history.

use std::{
    collections::{BTreeMap, BTreeSet},
    panic,
};

use super::*;
use crate::{log::disk::SimRng, record::ProducerSequence};

/// `producer.id.expiration.ms` of every replica in these tests.
const EXPIRATION_TIMEOUT: Duration = Duration::from_millis(40);

/// Expected content of one replica.
#[derive(Default)]
struct Model {
    /// Batches that were appended and not truncated, evicted ones included.
    batches: Vec<Batch>,
    start: u64,
    /// Offset after the last batch that was acknowledged as persisted.
    acked: u64,
    local_start: u64,
    log_start: u64,
    /// Results of the persist calls since the last call of `collect_results`.
    persist_results: PersistResults,
    /// New log end of a truncation that started and did not complete; `None` if there is none.
    truncation_target: Option<u64>,
    /// Batches above the target of an incomplete truncation. A power failure may restore them until the next write.
    undone: Vec<Batch>,
    /// True if a deletion started and did not complete: the replica may exist or not.
    maybe_deleted: bool,
    /// Offset of a reset that started and did not complete; `None` if there is none.
    reset_target: Option<u64>,
    /// True if the existence of the replica was acknowledged. Either some of its data was persisted, a reset was
    /// completed, or the replica existed after a restart.
    acknowledged: bool,
}

impl Model {
    fn end(&self) -> u64 {
        self.batches.last().map_or(self.start, |batch| batch.end_offset().get())
    }

    fn truncate(&mut self, to: u64) {
        self.batches.retain(|batch| batch.end_offset().get() <= to);
        self.acked = self.acked.min(self.end());
    }

    fn collect_results(&mut self) {
        for end in self.persist_results.take().into_iter().flatten() {
            self.acked = self.acked.max(end.get().min(self.end()));
            self.acknowledged = true;
        }
    }

    /// Compares a replica that was opened again with this model, and sets the model to the replica's content.
    /// `lossless` is true if no power failure preceded.
    fn check(&mut self, replica: &ReplicaLog, lossless: bool, seed: u64) {
        let (start, end) = (replica.local_start().get(), replica.log_end().get());
        if std::env::var("STRANDLINE_SEED").is_ok() {
            eprintln!("reopened {} lossless {lossless}: {start}..{end} {:?}", replica.id(), replica.sealed());
        }
        if let Some(reset) = self.reset_target.take()
            && start == reset
            && end == reset
        {
            *self = Self { start: reset, acked: reset, local_start: reset, log_start: reset, ..Self::default() };
            return;
        }
        if end > self.end() && !lossless {
            self.batches.append(&mut self.undone);
        }
        let (truncated, lossless) = (self.truncation_target.is_some(), lossless && self.truncation_target.is_none());
        let min_end = self.truncation_target.take().map_or(self.acked, |to| self.acked.min(to));
        assert!(end >= min_end, "seed {seed}: {min_end} was acknowledged, the log ends at {end}");
        assert!(end <= self.end(), "seed {seed}: the log ended at {}, now at {end}", self.end());
        assert!(!lossless || end == self.end(), "seed {seed}: a killed process lost {}..{end}", self.end());
        assert!(start >= self.local_start, "seed {seed}: evicted segments reappeared");
        let expected: Vec<&Batch> = {
            let inside = |batch: &&Batch| batch.base_offset().get() >= start && batch.end_offset().get() <= end;
            self.batches.iter().filter(inside).collect()
        };
        let found = read_all(&replica.reader(), at(start)).unwrap();
        assert_eq!(found.len(), expected.len(), "seed {seed}: {start}..{end}");
        for (found, expected) in found.iter().zip(expected) {
            assert!(found.to_bytes() == expected.to_bytes(), "seed {seed}: other bytes at {found:?}");
        }
        if truncated {
            self.undone = self.batches.iter().filter(|batch| batch.end_offset().get() > end).cloned().collect();
        }
        self.truncate(end);
        (self.acked, self.local_start, self.acknowledged) = (replica.persisted_end().get().max(min_end), start, true);
        self.log_start = self.log_start.max(replica.log_start().get());
        assert_eq!(*replica.producers(), self.producers(), "seed {seed}: producers at {end}");
        for batch in self.batches.iter().filter(|batch| batch.base_offset().get() >= start.max(self.log_start)) {
            assert_eq!(replica.epochs().at(batch.base_offset()), batch.leader_epoch(), "seed {seed}: epochs");
        }
    }

    /// Returns the producer state of all appended batches, computed without a snapshot or a restart.
    fn producers(&self) -> ProducerTable {
        let mut producers = ProducerTable::new();
        for batch in &self.batches {
            record_batch(&mut producers, batch);
        }
        producers
    }
}

/// Adds a batch as an append does: the expiration applies after each batch.
fn record_batch(producers: &mut ProducerTable, batch: &Batch) {
    producers.record_batch(batch);
    producers.remove_expired(i64::try_from(EXPIRATION_TIMEOUT.as_millis()).ok());
}

/// A disk, the random operations on it, and the expected content of its replicas.
struct RandomHistory {
    disk: SimDisk,
    rng: SimRng,
    seed: u64,
    models: BTreeMap<u32, Model>,
    epoch: u32,
    clock: i64,
    /// True if no power failure has occurred since the replicas were last compared with their models.
    lossless: bool,
    /// Replicas whose deletion failed in this incarnation. The next start decides whether they exist.
    undecided: BTreeSet<u32>,
}

impl RandomHistory {
    fn new(seed: u64) -> Self {
        let (disk, models) = (SimDisk::new(), BTreeMap::new());
        let undecided = BTreeSet::new();
        Self { disk, rng: SimRng(seed), seed, models, epoch: 0, clock: 0, lossless: true, undecided }
    }

    /// Runs one incarnation of the process, until a kill or a power failure. An incarnation that ends during its start
    /// may precede it.
    fn run_incarnation(&mut self) {
        if self.rng.roll(3) == 0 {
            // The process ends during its start if it needs more operations than this.
            self.disk.fail_writes_after(Some(self.rng.roll(40)));
            if let Ok(log) = DataDir::open(Arc::new(self.disk.clone()), Path::new("/data"), &identity(), small()) {
                log.partitions().iter().for_each(|id| drop(log.open_replica(*id, at(0))));
            }
            self.end_process();
        }
        let log = open(&self.disk);
        let mut replicas = self.reopen(&log);
        if self.rng.roll(3) == 0 {
            self.disk.fail_writes_after(Some(self.rng.roll(150)));
        }
        for _ in 0..self.rng.roll(80) {
            if log.status().failed.is_some() && self.rng.roll(5) == 0 {
                break;
            }
            self.step(&log, &mut replicas);
            self.models.values_mut().for_each(Model::collect_results);
        }
        if self.rng.roll(8) == 0 {
            drop(log.close());
            self.models.values_mut().for_each(Model::collect_results);
        }
        self.lossless = true;
        self.end_process();
    }

    /// Ends the process by a kill or by a power failure.
    fn end_process(&mut self) {
        if self.rng.roll(3) == 0 {
            self.disk.kill();
        } else {
            self.disk.crash(self.rng.roll(u64::MAX));
            self.lossless = false;
        }
    }

    /// Opens all replicas that exist after a restart, and compares each with its model.
    fn reopen(&mut self, log: &DataDir) -> BTreeMap<u32, ReplicaLog> {
        let partitions = log.partitions();
        let mut replicas = BTreeMap::new();
        self.models.retain(|number, model| {
            let id = partition(*number);
            if !partitions.contains(&id) {
                assert!(!model.acknowledged || model.maybe_deleted, "seed {}: {id} has disappeared", self.seed);
                return false;
            }
            let mut replica = match log.open_replica(id, at(0)) {
                Ok(replica) => replica,
                Err(error) => panic!("seed {}: {error}", self.seed),
            };
            model.maybe_deleted = false;
            replica.set_producer_expiration(Some(EXPIRATION_TIMEOUT));
            model.check(&replica, self.lossless, self.seed);
            // In some incarnations the replica runs without the expiration. Then it keeps expired producers, and a
            // later incarnation removes them.
            if self.rng.roll(4) == 0 {
                replica.set_producer_expiration(None);
            }
            replica.set_journaled(number % 3 != 2);
            replicas.insert(*number, replica);
            true
        });
        for id in partitions {
            assert!(self.models.contains_key(&id.number), "seed {}: {id} was deleted and reappeared", self.seed);
        }
        self.undecided.clear();
        self.epoch += 1;
        replicas
    }

    /// Runs one random operation on one of three replicas.
    fn step(&mut self, log: &DataDir, replicas: &mut BTreeMap<u32, ReplicaLog>) {
        let number = u32::try_from(self.rng.roll(3)).unwrap();
        if self.undecided.contains(&number) {
            return;
        }
        let Some(replica) = replicas.get_mut(&number) else {
            let start = self.rng.roll(3) * 100;
            if let Ok(mut replica) = log.open_replica(partition(number), at(start)) {
                replica.set_journaled(number % 3 != 2);
                replica.set_producer_expiration(Some(EXPIRATION_TIMEOUT));
                replicas.insert(number, replica);
                let model = Model { start, acked: start, local_start: start, log_start: start, ..Model::default() };
                self.models.insert(number, model);
            }
            return;
        };
        let model = self.models.get_mut(&number).unwrap();
        let operation = self.rng.roll(100);
        if std::env::var("STRANDLINE_SEED").is_ok() {
            let (active, failed) = (replica.active_segment(), replica.failed());
            eprintln!("{number}: {operation} at {:?}, {active:?} failed {failed:?}", model.end());
        }
        if replica.failed().is_some() && (86..97).contains(&operation) {
            return;
        }
        match operation {
            0..40 => {
                let batches = random_batches(&mut self.rng, model, self.epoch, &mut self.clock);
                if replica.append(&batches).is_ok() {
                    model.batches.extend(batches);
                    model.undone.clear();
                }
            }
            40..58 => replica.persist(model.persist_results.done()),
            58..76 => drop(log.journal_step()),
            76..80 => log.sync_step(),
            80..86 => drop(replica.roll()),
            86..90 => {
                let low = model.start.max(model.local_start);
                let to = low + self.rng.roll(model.end() - low + 1);
                // The batch that contains `to` is truncated as well.
                let ends = model.batches.iter().map(|batch| batch.end_offset().get());
                let new_end = ends.filter(|end| *end <= to).max().unwrap_or(model.start);
                model.truncation_target = Some(new_end);
                if let Ok(end) = replica.truncate(at(to)) {
                    assert!(end.get() <= to, "seed {}", self.seed);
                    model.truncation_target = None;
                    model.undone.clear();
                    model.collect_results();
                    model.truncate(end.get());
                } else {
                    // The replica no longer accepts writes. Its content is unchanged or truncated.
                    assert!(replica.failed().is_some(), "seed {}", self.seed);
                }
            }
            90..94 => {
                let to = replica.local_start().get() + self.rng.roll(200);
                replica.advance_log_start(at(to));
                model.log_start = replica.log_start().get();
                if replica.evict(at(model.log_start)).is_ok() {
                    model.local_start = replica.local_start().get();
                }
            }
            94..96 => {
                self.epoch += 1;
            }
            96 => {
                let to = model.end() + self.rng.roll(50);
                model.reset_target = Some(to);
                if replica.reset(at(to)).is_ok() {
                    *model = Model { start: to, acked: to, local_start: to, log_start: to, ..Model::default() };
                    model.acknowledged = true;
                }
            }
            97 => {
                replicas.remove(&number);
                model.maybe_deleted = true;
                if log.delete_replica(partition(number)).is_ok() {
                    self.models.remove(&number);
                } else {
                    // The next start decides whether the replica exists.
                    self.undecided.insert(number);
                }
            }
            _ => {
                if let Some(replica) = replicas.remove(&number) {
                    drop(replica);
                    if let Ok(replica) = log.open_replica(partition(number), at(0)) {
                        replicas.insert(number, replica);
                    }
                }
            }
        }
    }
}

/// Creates one to four batches at the end of the log. Producer 0 stands for batches without a producer.
fn random_batches(rng: &mut SimRng, model: &Model, epoch: u32, clock: &mut i64) -> Vec<Batch> {
    let mut base = model.end();
    let (mut batches, mut table) = (Vec::new(), model.producers());
    for _ in 0..=rng.roll(4) {
        let count = u32::try_from(1 + rng.roll(5)).unwrap();
        let bytes = if rng.roll(40) == 0 { 30_000 } else { 61 + usize::try_from(rng.roll(3000)).unwrap() };
        let producer = i64::try_from(rng.roll(4)).unwrap();
        *clock += if rng.roll(12) == 0 { i64::try_from(rng.roll(90)).unwrap() } else { 1 };
        // Some batches are older than the batches before them.
        let timestamp = *clock - i64::try_from(rng.roll(3) * rng.roll(30)).unwrap();
        let stamp = if producer == 0 {
            (-1, -1, -1)
        } else {
            // A leader expects the next sequence number of a producer in the table, and 0 of a removed producer. The
            // check of an impossible number returns the expected number.
            let impossible = ProducerSequence { id: producer, epoch: 1, base_sequence: -1 };
            match table.check(impossible, count, None) {
                SequenceCheck::OutOfOrder { expected } => (producer, 1, expected),
                _ => (producer, 1, 0),
            }
        };
        let batch = produced(base, count, epoch, timestamp, bytes, stamp);
        record_batch(&mut table, &batch);
        batches.push(batch);
        base += u64::from(count);
    }
    batches
}

/// Runs the history of one seed: six incarnations, and a last comparison.
fn run(seed: u64) {
    let mut history = RandomHistory::new(seed);
    for _ in 0..6 {
        history.run_incarnation();
    }
    let log = open(&history.disk);
    history.reopen(&log);
}

/// After random operations, kills and power failures, each replica has all acknowledged batches, and none whose
/// truncation, eviction or deletion has completed. `STRANDLINE_SEEDS=N` runs that many seeds, `STRANDLINE_SEED=N` runs
/// one seed.
#[test]
fn acknowledged_data_survives_and_truncated_data_does_not() {
    let number = |name| std::env::var(name).ok().and_then(|value| value.parse().ok());
    if let Some(seed) = number("STRANDLINE_SEED") {
        return run(seed);
    }
    for seed in 0..number("STRANDLINE_SEEDS").unwrap_or(150) {
        let result = panic::catch_unwind(|| run(seed));
        assert!(result.is_ok(), "seed {seed} fails");
    }
}

/// The opening of a replica creates its lost directory again. Regression: the creation of a replica was in the journal
/// just before a power failure, which removed the replica's directory. The replica then accepted no writes, even after
/// restarts of the broker.
#[test]
fn replica_that_lost_its_directory_accepts_writes() {
    let mut lost = 0;
    for seed in 0..20 {
        let disk = SimDisk::new();
        let log = open(&disk);
        drop(log.open_replica(partition(0), at(0)).unwrap());
        assert!(log.journal_step(), "the creation is written to the journal");
        disk.crash(seed);
        drop(log);
        lost += u32::from(!disk.files().iter().any(|(path, _)| path.extension().is_some_and(|name| name == "log")));
        let log = open(&disk);
        let mut replica = log.open_replica(partition(0), at(0)).unwrap();
        assert_eq!(write(&log, &mut replica, &[batch(0, 1, 0, 1, 100)]), at(1));
        drop((replica, log));
        disk.crash(seed);
        assert_eq!(open(&disk).open_replica(partition(0), at(0)).unwrap().log_end(), at(1));
    }
    assert!(lost > 0, "some crashes remove the directory");
}
