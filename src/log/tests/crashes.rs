//! Random histories on a disk that forgets, against a model that does not. One seed, one history.

use std::{
    collections::{BTreeMap, BTreeSet},
    panic,
};

use super::*;
use crate::{log::disk::Dice, record::ProducerStamp};

/// `producer.id.expiration.ms` of every replica here.
const EXPIRATION: Duration = Duration::from_millis(40);

/// What one replica must hold.
#[derive(Default)]
struct Model {
    /// Everything appended and not cut, evicted or not.
    batches: Vec<Batch>,
    start: u64,
    /// Answered as persisted.
    acked: u64,
    local_start: u64,
    log_start: u64,
    answers: Answers,
    /// A cut to here was begun and did not return.
    cut_begun: Option<u64>,
    /// What a cut took that did not return: a loss of power may bring it back until something else is written.
    undone: Vec<Batch>,
    /// A deletion or a reset was begun and did not return.
    gone_maybe: bool,
    reset_begun: Option<u64>,
    /// It was acknowledged that it exists: something of it was persisted, or it was there after a crash.
    sure: bool,
}

impl Model {
    fn end(&self) -> u64 {
        self.batches.last().map_or(self.start, |batch| batch.end_offset().get())
    }

    fn truncate(&mut self, to: u64) {
        self.batches.retain(|batch| batch.end_offset().get() <= to);
        self.acked = self.acked.min(self.end());
    }

    fn hear(&mut self) {
        for end in self.answers.taken().into_iter().flatten() {
            self.acked = self.acked.max(end.get().min(self.end()));
            self.sure = true;
        }
    }

    /// Compares a replica that was opened again, and takes over what it has.
    fn check(&mut self, replica: &Replica, lossless: bool, seed: u64) {
        let (start, end) = (replica.local_start().get(), replica.log_end().get());
        if std::env::var("STRANDLINE_SEED").is_ok() {
            eprintln!("reopened {} lossless {lossless}: {start}..{end} {:?}", replica.id(), replica.sealed());
        }
        if let Some(reset) = self.reset_begun.take()
            && start == reset
            && end == reset
        {
            *self = Self { start: reset, acked: reset, local_start: reset, log_start: reset, ..Self::default() };
            return;
        }
        if end > self.end() && !lossless {
            self.batches.append(&mut self.undone);
        }
        let (cut, lossless) = (self.cut_begun.is_some(), lossless && self.cut_begun.is_none());
        let least = self.cut_begun.take().map_or(self.acked, |to| self.acked.min(to));
        assert!(end >= least, "seed {seed}: {least} was acknowledged, the log ends at {end}");
        assert!(end <= self.end(), "seed {seed}: the log ended at {}, now at {end}", self.end());
        assert!(!lossless || end == self.end(), "seed {seed}: a killed process lost {}..{end}", self.end());
        assert!(start >= self.local_start, "seed {seed}: evicted segments came back");
        let want: Vec<&Batch> = {
            let inside = |batch: &&Batch| batch.base_offset().get() >= start && batch.end_offset().get() <= end;
            self.batches.iter().filter(inside).collect()
        };
        let have = read_all(&replica.reader(), at(start)).unwrap();
        assert_eq!(have.len(), want.len(), "seed {seed}: {start}..{end}");
        for (have, want) in have.iter().zip(want) {
            assert!(have.to_bytes() == want.to_bytes(), "seed {seed}: other bytes at {have:?}");
        }
        if cut {
            self.undone = self.batches.iter().filter(|batch| batch.end_offset().get() > end).cloned().collect();
        }
        self.truncate(end);
        (self.acked, self.local_start, self.sure) = (replica.persisted_end().get().max(least), start, true);
        self.log_start = self.log_start.max(replica.log_start().get());
        assert_eq!(*replica.producers(), self.producers(), "seed {seed}: producers at {end}");
        for batch in self.batches.iter().filter(|batch| batch.base_offset().get() >= start.max(self.log_start)) {
            assert_eq!(replica.epochs().at(batch.base_offset()), batch.leader_epoch(), "seed {seed}: epochs");
        }
    }

    /// The table of everything appended, by the definition: no snapshot, no restart.
    fn producers(&self) -> ProducerTable {
        let mut producers = ProducerTable::new();
        for batch in &self.batches {
            note(&mut producers, batch);
        }
        producers
    }
}

fn note(producers: &mut ProducerTable, batch: &Batch) {
    producers.note(batch);
    producers.forget_expired(i64::try_from(EXPIRATION.as_millis()).ok());
}

struct World {
    disk: SimDisk,
    dice: Dice,
    seed: u64,
    models: BTreeMap<u32, Model>,
    epoch: u32,
    clock: i64,
    /// The last life ended without a loss of power.
    lossless: bool,
    /// Deletions that failed in this life.
    undecided: BTreeSet<u32>,
}

impl World {
    fn new(seed: u64) -> Self {
        let (disk, models) = (SimDisk::new(), BTreeMap::new());
        let undecided = BTreeSet::new();
        Self { disk, dice: Dice(seed), seed, models, epoch: 0, clock: 0, lossless: true, undecided }
    }

    /// One life of the process, until it crashes.
    fn live(&mut self) {
        if self.dice.roll(3) == 0 {
            // It dies while it starts.
            self.disk.fail_writes_after(Some(self.dice.roll(40)));
            if let Ok(log) = Log::open(Arc::new(self.disk.clone()), Path::new("/data"), &identity(), small()) {
                log.partitions().iter().for_each(|id| drop(log.open_replica(*id, at(0))));
            }
            self.end_process();
        }
        let log = open(&self.disk);
        let mut replicas = self.reopen(&log);
        if self.dice.roll(3) == 0 {
            self.disk.fail_writes_after(Some(self.dice.roll(150)));
        }
        for _ in 0..self.dice.roll(80) {
            if log.status().failed.is_some() && self.dice.roll(5) == 0 {
                break;
            }
            self.step(&log, &mut replicas);
            self.models.values_mut().for_each(Model::hear);
        }
        if self.dice.roll(8) == 0 {
            drop(log.close());
            self.models.values_mut().for_each(Model::hear);
        }
        self.lossless = true;
        self.end_process();
    }

    fn end_process(&mut self) {
        if self.dice.roll(3) == 0 {
            self.disk.kill();
        } else {
            self.disk.crash(self.dice.roll(u64::MAX));
            self.lossless = false;
        }
    }

    fn reopen(&mut self, log: &Log) -> BTreeMap<u32, Replica> {
        let there = log.partitions();
        let mut replicas = BTreeMap::new();
        self.models.retain(|number, model| {
            let id = partition(*number);
            if !there.contains(&id) {
                assert!(!model.sure || model.gone_maybe, "seed {}: {id} is gone", self.seed);
                return false;
            }
            let mut replica = match log.open_replica(id, at(0)) {
                Ok(replica) => replica,
                Err(error) => panic!("seed {}: {error}", self.seed),
            };
            model.gone_maybe = false;
            replica.set_producer_expiration(Some(EXPIRATION));
            model.check(&replica, self.lossless, self.seed);
            // Where the configuration comes late, the rule is applied to what was kept meanwhile.
            if self.dice.roll(4) == 0 {
                replica.set_producer_expiration(None);
            }
            replica.set_journaled(number % 3 != 2);
            replicas.insert(*number, replica);
            true
        });
        for id in there {
            assert!(self.models.contains_key(&id.number), "seed {}: {id} was deleted and came back", self.seed);
        }
        self.undecided.clear();
        self.epoch += 1;
        replicas
    }

    fn step(&mut self, log: &Log, replicas: &mut BTreeMap<u32, Replica>) {
        let number = u32::try_from(self.dice.roll(3)).unwrap();
        if self.undecided.contains(&number) {
            return;
        }
        let Some(replica) = replicas.get_mut(&number) else {
            let start = self.dice.roll(3) * 100;
            if let Ok(mut replica) = log.open_replica(partition(number), at(start)) {
                replica.set_journaled(number % 3 != 2);
                replica.set_producer_expiration(Some(EXPIRATION));
                replicas.insert(number, replica);
                let model = Model { start, acked: start, local_start: start, log_start: start, ..Model::default() };
                self.models.insert(number, model);
            }
            return;
        };
        let model = self.models.get_mut(&number).unwrap();
        let what = self.dice.roll(100);
        if std::env::var("STRANDLINE_SEED").is_ok() {
            eprintln!("{number}: {what} at {:?}, {:?} failed {:?}", model.end(), replica.active(), replica.failed());
        }
        if replica.failed().is_some() && (86..97).contains(&what) {
            return;
        }
        match what {
            0..40 => {
                let batches = some_batches(&mut self.dice, model, self.epoch, &mut self.clock);
                if replica.append(&batches).is_ok() {
                    model.batches.extend(batches);
                    model.undone.clear();
                }
            }
            40..58 => replica.persist(model.answers.done()),
            58..76 => drop(log.journal_step()),
            76..80 => log.sync_step(),
            80..86 => drop(replica.roll()),
            86..90 => {
                let low = model.start.max(model.local_start);
                let to = low + self.dice.roll(model.end() - low + 1);
                // The batch that holds `to` goes as well.
                let ends = model.batches.iter().map(|batch| batch.end_offset().get());
                let left = ends.filter(|end| *end <= to).max().unwrap_or(model.start);
                model.cut_begun = Some(left);
                if let Ok(end) = replica.truncate(at(to)) {
                    assert!(end.get() <= to, "seed {}", self.seed);
                    model.cut_begun = None;
                    model.undone.clear();
                    model.hear();
                    model.truncate(end.get());
                } else {
                    // It takes no writes any more; what it has is as it was, or cut.
                    assert!(replica.failed().is_some(), "seed {}", self.seed);
                }
            }
            90..94 => {
                let to = replica.local_start().get() + self.dice.roll(200);
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
                let to = model.end() + self.dice.roll(50);
                model.reset_begun = Some(to);
                if replica.reset(at(to)).is_ok() {
                    *model = Model { start: to, acked: to, local_start: to, log_start: to, ..Model::default() };
                    model.sure = true;
                }
            }
            97 => {
                replicas.remove(&number);
                model.gone_maybe = true;
                if log.delete_replica(partition(number)).is_ok() {
                    self.models.remove(&number);
                } else {
                    // Until the next start nobody knows.
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

fn some_batches(dice: &mut Dice, model: &Model, epoch: u32, clock: &mut i64) -> Vec<Batch> {
    let mut base = model.end();
    let (mut batches, mut table) = (Vec::new(), model.producers());
    for _ in 0..=dice.roll(4) {
        let count = u32::try_from(1 + dice.roll(5)).unwrap();
        let bytes = if dice.roll(40) == 0 { 30_000 } else { 61 + usize::try_from(dice.roll(3000)).unwrap() };
        let producer = i64::try_from(dice.roll(4)).unwrap();
        *clock += if dice.roll(12) == 0 { i64::try_from(dice.roll(90)).unwrap() } else { 1 };
        // Some batches are older than what lies before them.
        let timestamp = *clock - i64::try_from(dice.roll(3) * dice.roll(30)).unwrap();
        let stamp = if producer == 0 {
            (-1, -1, -1)
        } else {
            // The leader takes the next number of a producer that it knows, and 0 of one that it forgot.
            let none = ProducerStamp { id: producer, epoch: 1, base_sequence: -1 };
            match table.check(none, count, None) {
                Verdict::OutOfOrder { expected } => (producer, 1, expected),
                _ => (producer, 1, 0),
            }
        };
        let batch = produced(base, count, epoch, timestamp, bytes, stamp);
        note(&mut table, &batch);
        batches.push(batch);
        base += u64::from(count);
    }
    batches
}

fn run(seed: u64) {
    let mut world = World::new(seed);
    for _ in 0..6 {
        world.live();
    }
    let log = open(&world.disk);
    world.reopen(&log);
}

/// `STRANDLINE_SEEDS=N` runs more, `STRANDLINE_SEED=N` one.
#[test]
fn what_was_acknowledged_survives_any_crash_and_what_was_cut_does_not_come_back() {
    let number = |name| std::env::var(name).ok().and_then(|value| value.parse().ok());
    if let Some(seed) = number("STRANDLINE_SEED") {
        return run(seed);
    }
    for seed in 0..number("STRANDLINE_SEEDS").unwrap_or(150) {
        let result = panic::catch_unwind(|| run(seed));
        assert!(result.is_ok(), "seed {seed} fails");
    }
}

/// The journal knew of a replica that was made just before the power went; its folder was gone with the power, and it took no writes from then
/// on, however often the broker was restarted.
#[test]
fn a_replica_whose_folder_went_with_the_power_takes_writes() {
    let mut went = 0;
    for seed in 0..20 {
        let disk = SimDisk::new();
        let log = open(&disk);
        drop(log.open_replica(partition(0), at(0)).unwrap());
        assert!(log.journal_step(), "the journal says that it was made");
        disk.crash(seed);
        drop(log);
        went += u32::from(!disk.files().iter().any(|(path, _)| path.extension().is_some_and(|name| name == "log")));
        let log = open(&disk);
        let mut replica = log.open_replica(partition(0), at(0)).unwrap();
        assert_eq!(write(&log, &mut replica, &[batch(0, 1, 0, 1, 100)]), at(1));
        drop((replica, log));
        disk.crash(seed);
        assert_eq!(open(&disk).open_replica(partition(0), at(0)).unwrap().log_end(), at(1));
    }
    assert!(went > 0, "some crashes take it");
}
