//! One data directory: opening it, its registry of replicas, and closing it.

use std::{
    collections::BTreeMap,
    io,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

use tokio::sync::Semaphore;
use uuid::Uuid;

use super::{
    checkpoint::{ReplicaRecord, Standing},
    core::{Core, MAX_DISK_READS, Options, Work},
    disk::{Disk, Mode, PIECE_BYTES},
    error::{OpenError, PersistError, ReplicaError, is_full},
    files::Files,
    growth::{self, Growing},
    identity::{self, Identity, io_error},
    journal::{
        Journal, Room,
        entry::Kind,
        ring::{self, Ring},
    },
    producer_block,
    producer_memory::ProducerMemory,
    recover::{Dormant, recover, set_aside},
    removed::RemovedFiles,
    replica::{Replica, write_caches},
    reserve,
    shared::{Shared, replica_dir},
    startup, sync,
    tail::Tail,
    unclaimed::Unclaimed,
    uptime,
};
use crate::{
    limits,
    model::{Offset, PartitionId, TopicId},
    task::{self, clock},
};

/// One data directory. Clones share it. Dropping the last clone stops it without a clean shutdown.
#[derive(Clone)]
pub struct Log {
    pub(super) inner: Arc<Inner>,
    threads: Arc<Threads>,
}

pub(super) struct Inner {
    pub(super) core: Arc<Core>,
    pub(super) directory_id: Uuid,
    pub(super) growing: Growing,
    registry: Mutex<Registry>,
    /// Replicas on the disk that are not registered.
    pub(super) unclaimed: Unclaimed,
    opened_clean: bool,
    _lock: Box<dyn Send + Sync>,
}

#[derive(Default)]
pub(super) struct Registry {
    pub(super) open: BTreeMap<PartitionId, Arc<Shared>>,
    pub(super) dormant: BTreeMap<PartitionId, Dormant>,
}

struct Threads {
    inner: Arc<Inner>,
    handles: Mutex<Vec<JoinHandle<()>>>,
}

impl Log {
    /// Opens a data directory, or creates it. Reads the journal after a crash, and never the segments. Blocks.
    pub fn open(disk: Arc<dyn Disk>, dir: &Path, identity: &Identity, options: Options) -> Result<Self, OpenError> {
        let lock = identity::lock(&*disk, dir)?;
        let journal_dir = options.journal_in(dir);
        if options.journal_dir.is_some() {
            match disk.enter(&journal_dir) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(io_error(&journal_dir, "use the journal directory")(error));
                }
                _ => {}
            }
        }
        room_for_journal(&*disk, &journal_dir, options.journal_bytes)?;
        let directory_id = identity::check(&*disk, dir, identity)?;
        if options.reserve_bytes > 0 && reserve::release(&*disk, dir) {
            tracing::warn!(
                dir = %dir.display(),
                "the disk is full: the reserve was given up for this start; add space, or lower local.retention.* or retention.*"
            );
        }
        let found = startup::load(&disk, dir, directory_id, &options)?;
        let unclaimed = Unclaimed::find(&*disk, dir, &found.replicas);
        let (file_bytes, most) = ring::shape(options.journal_bytes);
        // Several frames must fit into one file.
        let round_bytes = options.round_bytes.min(usize::try_from(file_bytes / 3).unwrap_or(usize::MAX));
        let options = Options { round_bytes, ..options };
        let ring = Ring::open(disk.clone(), &journal_dir, file_bytes, most)
            .map_err(io_error(&journal_dir, "open the journal"))?;
        let core = Arc::new(Core {
            files: Files::new(disk.clone()),
            removed: RemovedFiles::new(if options.manual { 0 } else { disk.open_files() }),
            disk,
            dir: dir.to_owned(),
            tail: Tail::new(options.tail_bytes),
            producer_memory: ProducerMemory::new(options.producer_bytes),
            journal: Journal::new(directory_id, ring, found.first_round, &options),
            generation: AtomicU64::new(found.generation),
            closed: AtomicBool::new(false),
            disk_full: AtomicBool::new(false),
            recycling: Mutex::default(),
            checkpoint_error: Mutex::default(),
            reserved: AtomicBool::new(options.reserve_bytes == 0),
            granted: AtomicU64::new(0),
            piece_bytes: AtomicUsize::new(PIECE_BYTES),
            disk_reads: Arc::new(Semaphore::new(MAX_DISK_READS)),
            work: Mutex::new(Work::default()),
            wake: std::sync::Condvar::new(),
            owner: std::sync::OnceLock::new(),
            options,
        });
        let registry = Registry { open: BTreeMap::new(), dormant: found.replicas };
        let inner = Arc::new(Inner {
            core,
            directory_id,
            growing: Growing::default(),
            registry: Mutex::new(registry),
            unclaimed,
            opened_clean: found.clean,
            _lock: lock,
        });
        drop(inner.core.owner.set(Arc::downgrade(&inner)));
        inner.grow_now().map_err(io_error(&journal_dir, "make the journal"))?;
        inner.begin(found.first_round).map_err(io_error(dir, "begin the journal"))?;
        inner.take_reserve();
        let handles = if inner.core.options.manual { Vec::new() } else { inner.start() };
        let threads = Arc::new(Threads { inner: inner.clone(), handles: Mutex::new(handles) });
        Ok(Self { inner, threads })
    }

    /// Returns the random id that the directory received at its creation. A directory without that id is another one.
    pub fn directory_id(&self) -> Uuid {
        self.inner.directory_id
    }

    /// Returns true if the directory was closed cleanly before: all written data is present, also that of `replicated`
    /// topics.
    pub fn opened_clean(&self) -> bool {
        self.inner.opened_clean
    }

    /// Returns the incarnations of this broker that the metadata may name if this directory took part in them, oldest
    /// first. The list is empty in a new directory, and in one whose incarnations file is missing or corrupt. Blocks.
    pub fn uptimes(&self) -> Result<Vec<Uuid>, OpenError> {
        uptime::read(&*self.inner.core.disk, &self.inner.core.dir)
    }

    /// Records an incarnation durably. The id is added to the recorded ones before the metadata receives it. Once the
    /// metadata holds it (`confirmed`), the id replaces them. Blocks.
    pub fn note_uptime(&self, now: Uuid, confirmed: bool) -> Result<(), OpenError> {
        uptime::note(&*self.inner.core.disk, &self.inner.core.dir, now, confirmed)
    }

    /// Returns the end of the newest block of producer ids that this broker received; 0 in a directory that records
    /// none. Blocks.
    pub fn producer_ids_end(&self) -> io::Result<i64> {
        producer_block::read(&*self.inner.core.disk, &self.inner.core.dir)
    }

    /// Records the end of a block of producer ids durably, before a client receives the first id of the block. Blocks.
    pub fn note_producer_ids_end(&self, end: i64) -> io::Result<()> {
        producer_block::note(&*self.inner.core.disk, &self.inner.core.dir, end)
    }

    /// Returns the highest cluster generation in which this directory took part; 0 before the first. Blocks.
    pub fn generation(&self) -> Result<u64, OpenError> {
        identity::generation(&*self.inner.core.disk, &self.inner.core.dir)
    }

    /// Records durably that this directory takes part in a cluster generation. A lower generation changes nothing.
    /// Blocks.
    pub fn note_generation(&self, generation: u64) -> Result<(), OpenError> {
        identity::note_generation(&*self.inner.core.disk, &self.inner.core.dir, generation)
    }

    /// Returns the replicas of this directory, in order.
    pub fn partitions(&self) -> Vec<PartitionId> {
        let registry = self.inner.registry();
        let mut ids: Vec<_> = registry.open.keys().chain(registry.dormant.keys()).copied().collect();
        ids.sort_unstable();
        ids
    }

    /// Returns the replicas of a topic, in order.
    pub fn partitions_of(&self, topic: TopicId) -> Vec<PartitionId> {
        let (registry, all) = (self.inner.registry(), PartitionId::new(topic, 0)..=PartitionId::new(topic, u32::MAX));
        let open = registry.open.range(all.clone()).map(|(id, _)| *id);
        let mut ids: Vec<_> = open.chain(registry.dormant.range(all).map(|(id, _)| *id)).collect();
        ids.sort_unstable();
        ids
    }

    /// Returns true if this directory has the replica.
    pub fn holds(&self, id: PartitionId) -> bool {
        let registry = self.inner.registry();
        registry.open.contains_key(&id) || registry.dormant.contains_key(&id)
    }

    /// Returns the stray replicas, in order: replicas that have segments on the disk and are not registered. A failed
    /// or interrupted deletion leaves them.
    pub fn unclaimed(&self) -> Vec<PartitionId> {
        self.inner.unclaimed.ids()
    }

    /// Opens a replica, or creates it, empty, at `start`. Blocks. After a crash it scans the unsynced part of the
    /// segments.
    pub fn open_replica(&self, id: PartitionId, start: Offset) -> Result<Replica, ReplicaError> {
        let inner = &self.inner;
        if let Some(reason) = inner.core.refusal() {
            return Err(ReplicaError::Failed { reason });
        }
        let (shared, dormant) = {
            let registry = inner.registry();
            (registry.open.get(&id).cloned(), registry.dormant.get(&id).cloned())
        };
        let shared = match (shared, dormant) {
            (Some(shared), _) => shared,
            (None, Some(dormant)) => {
                let dir = replica_dir(&inner.core.dir, id);
                let clean = dormant.clean;
                let io = |source| ReplicaError::Io { id, path: dir.clone(), source };
                // The journal may record a creation that preceded a power failure, while the file system lost the
                // directory.
                let is_empty = dormant.record.segments.iter().all(|segment| segment.bytes == 0);
                let is_made = is_empty && inner.make_folder(&dir).map_err(io)?;
                let record = recover(&inner.core, &dir, dormant)?;
                let shared = inner.adopt(id, dir, record, clean);
                shared.state().names_changed |= is_made;
                shared
            }
            (None, None) => inner.create(id, start)?,
        };
        if shared.taken.swap(true, Ordering::AcqRel) {
            return Err(ReplicaError::Open { id });
        }
        Ok(Replica::new(shared))
    }

    /// Announces that the log will be closed when its writers have stopped. Writers wait for the journal, which waits
    /// for a free file of its ring. From now on that wait ends after some seconds, and then the journal fails. Entries
    /// that are not written by then were never acknowledged.
    pub fn expect_close(&self) {
        self.inner.core.journal.expect_close();
    }

    /// Syncs everything, writes the last checkpoint and stops the threads. Appends are refused from now on. After an
    /// error, the next start scans for unsynced data.
    pub fn close(&self) -> Result<(), PersistError> {
        if self.inner.core.closed.swap(true, Ordering::AcqRel) {
            return Ok(());
        }
        let closed = self.close_replicas();
        // This step is the last one: a process that is ended during it has stopped cleanly.
        self.inner.core.removed.close();
        closed
    }

    fn close_replicas(&self) -> Result<(), PersistError> {
        let inner = &self.inner;
        for replica in inner.open_replicas() {
            if replica.state().index.is_some() {
                write_caches(&replica);
            }
        }
        inner.sync_step();
        inner.core.journal.close();
        while inner.core.options.manual && inner.journal_step() {}
        self.threads.stop();
        inner.sync_step();
        let failed = |reason: String| Err(PersistError::Failed { reason });
        if let Some(reason) = inner.core.journal.failed() {
            return failed(reason.to_owned());
        }
        // The record of a replica that was not opened since a crash does not yet describe its files.
        let unopened = inner.registry().dormant.values().any(|dormant| !dormant.clean);
        let whole = inner.open_replicas().iter().all(|replica| {
            let state = replica.state();
            replica.failed.get().is_none() && state.recovery.segment.end == state.log_end()
        });
        if !whole {
            return inner.recycle().or_else(|error| failed(format!("the checkpoint could not be written: {error}")));
        }
        let standing = if unopened { Standing::Settled } else { Standing::Clean };
        let checkpoint = inner.checkpoint(inner.core.journal.next_round(), standing);
        let written = inner.write_checkpoint(&checkpoint);
        written.or_else(|error| failed(format!("the checkpoint could not be written: {error}")))
    }

    /// Writes one frame of the journal, with `manual`. Returns false if nothing is queued, or if the journal has no
    /// space.
    pub fn journal_step(&self) -> bool {
        self.inner.journal_step()
    }

    #[cfg(test)]
    pub(super) fn inner_recycle(&self) {
        self.inner.recycle().expect("the disk works");
    }

    #[cfg(test)]
    pub(super) fn inner_forget(&self, id: PartitionId) {
        self.inner.registry().open.remove(&id);
    }

    /// Syncs all unsynced data and releases the journal files that are not needed, with `manual`.
    pub fn sync_step(&self) {
        self.inner.sync_step();
    }
}

impl Inner {
    pub(super) fn registry(&self) -> MutexGuard<'_, Registry> {
        self.registry.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn ring(&self) -> MutexGuard<'_, Ring> {
        self.core.journal.ring.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn open_replicas(&self) -> Vec<Arc<Shared>> {
        self.registry().open.values().cloned().collect()
    }

    /// Writes the frame at which replay would start, and then the checkpoint that names it.
    fn begin(&self, first_round: u64) -> io::Result<()> {
        match self.core.journal.make_room(&mut || self.grow_now())? {
            Room::NeedsFile => return Err(io::ErrorKind::StorageFull.into()),
            Room::Entered | Room::Ready => self.core.journal.begin()?,
        }
        self.write_checkpoint(&self.checkpoint(first_round, Standing::Running))
    }

    /// Registers a recovered replica as open.
    fn adopt(&self, id: PartitionId, dir: PathBuf, mut record: ReplicaRecord, clean: bool) -> Arc<Shared> {
        let mut registry = self.registry();
        if let Some(shared) = registry.open.get(&id) {
            return shared.clone();
        }
        let synced = registry.dormant.remove(&id).map(|dormant| dormant.record);
        if startup::unread(&record) {
            // The scan has read the replica, so from now on a record describes it.
            record.generation = self.core.next_generation();
        }
        let shared = Shared::new(&self.core, dir, record);
        registry.open.insert(id, shared.clone());
        drop(registry);
        if let Some(synced) = synced.filter(|_| !clean) {
            // Data that the scan found above the old recovery point may be unsynced.
            {
                let mut state = shared.state();
                let segment = *synced.segments.last().expect("a record has a segment");
                state.persisted_end = synced.persisted.max(segment.end);
                let producers = Arc::unwrap_or_clone(synced.producers).charged(&self.core.producer_memory);
                let (epochs, producers) = (Arc::new(synced.epochs), Arc::new(producers));
                state.recovery = super::shared::Recovery { segment, epochs, producers };
                state.names_changed = true;
                for held in &state.segments {
                    held.file.dirty.store(held.info.base >= segment.base && held.info.bytes > 0, Ordering::Release);
                }
            }
            shared.touch(0);
        }
        shared
    }

    /// Creates the directory of a replica if it is absent. Returns true if it was created.
    fn make_folder(&self, dir: &Path) -> io::Result<bool> {
        match self.core.disk.list(dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => self.core.disk.create_dir_all(dir).map(|()| true),
            listed => listed.map(|_| false),
        }
    }

    fn create(&self, id: PartitionId, start: Offset) -> Result<Arc<Shared>, ReplicaError> {
        let dir = replica_dir(&self.core.dir, id);
        let io = |source| ReplicaError::Io { id, path: dir.clone(), source };
        let disk = &self.core.disk;
        if !self.make_folder(&dir).map_err(io)? {
            set_aside(&self.core, &dir).map_err(io)?;
            self.unclaimed.forget(id);
        }
        let record = ReplicaRecord::empty(id, self.core.next_generation(), start, clock::wall_ms());
        let shared = Shared::new(&self.core, dir.clone(), record);
        let file = shared.state().active().file.clone();
        disk.open(&file.path, Mode::Write).map_err(io)?;
        file.dirty.store(true, Ordering::Release);
        let generation = {
            let mut state = shared.state();
            state.names_changed = true;
            state.generation
        };
        self.registry().open.insert(id, shared.clone());
        self.core.note(&shared, shared.head(Kind::Create, generation, start, start));
        shared.touch(0);
        Ok(shared)
    }

    /// Writes one frame of the journal after making space for it. Runs the sync itself, because no thread does.
    pub(super) fn journal_step(&self) -> bool {
        let journal = &self.core.journal;
        if !journal.pending() {
            return false;
        }
        for _ in 0..3 {
            match self.make_room() {
                Some(Room::Ready | Room::Entered) => {
                    journal.step();
                    return true;
                }
                Some(Room::NeedsFile) => {
                    self.sync_step();
                    self.fail_if_stuck();
                }
                None => return true,
            }
        }
        false
    }

    /// Writes the queued entries and makes space for the two frames of a change, with `manual`. Returns false if there
    /// is no space.
    pub(super) fn steps_ahead(&self) -> bool {
        let journal = &self.core.journal;
        while journal.pending() {
            if !self.journal_step() {
                return false;
            }
        }
        for _ in 0..3 {
            if journal.has_room_for_two() || matches!(self.grow_now(), Ok(true)) {
                return true;
            }
            self.sync_step();
        }
        false
    }

    /// Makes space for the next frame. Returns `None` if the journal has failed.
    fn make_room(&self) -> Option<Room> {
        match self.core.journal.make_room(&mut || self.grow_now()) {
            Ok(room) => Some(room),
            Err(error) if is_full(&error) => Some(Room::NeedsFile),
            Err(error) => {
                self.core.journal.fail(&error);
                None
            }
        }
    }

    fn start(self: &Arc<Self>) -> Vec<JoinHandle<()>> {
        let (writer, syncer, grower, giver) = (self.clone(), self.clone(), self.clone(), self.clone());
        vec![
            task::spawn_thread("journal", move || writer.write_journal()),
            task::spawn_thread("segment-sync", move || sync::run(&syncer)),
            task::spawn_thread("journal-growth", move || growth::run(&grower)),
            task::spawn_thread("removed-files", move || giver.core.removed.run()),
        ]
    }

    /// Runs the journal thread.
    fn write_journal(&self) {
        const PATIENCE: Duration = Duration::from_millis(100);
        let journal = &self.core.journal;
        while journal.wait() {
            let Some(room) = self.make_room() else { continue };
            if !matches!(room, Room::NeedsFile) {
                journal.step();
                let (short, wants) = {
                    let ring = self.ring();
                    (ring.short(), ring.wants_file())
                };
                if matches!(room, Room::Entered) && (short || wants) {
                    self.core.hurry();
                }
            } else if self.core.work().stopping || journal.is_closed() {
                if !self.sync_step() || !self.ring().has_free() {
                    journal.fail(&io::Error::other("the log stops, and the journal has no free file"));
                }
            } else {
                self.core.hurry();
                journal.wait_for_file(PATIENCE);
                self.fail_if_stuck();
            }
        }
    }
}

/// Checks, before anything is written, that the disk has space for the configured journal. A ring grows on demand and
/// works with fewer files on a full disk. A large ring that was never created is checked here, so that the failure does
/// not appear under load.
fn room_for_journal(disk: &dyn Disk, journal_dir: &Path, bytes: u64) -> Result<(), OpenError> {
    let made = disk.list(journal_dir).is_ok_and(|entries| entries.iter().any(|entry| entry.name.ends_with(".journal")));
    // The directory may not exist yet. The nearest existing parent then reports the free space.
    let free = journal_dir.ancestors().find_map(|dir| disk.free_bytes(dir).ok());
    match free {
        Some(free) if bytes > limits::JOURNAL_SPACE_CHECK_BYTES && !made && free < bytes => {
            Err(OpenError::JournalTooLarge { journal_dir: journal_dir.to_owned(), bytes, free })
        }
        _ => Ok(()),
    }
}

impl Threads {
    /// Stops the threads. Entries that are queued for the journal are still written.
    fn stop(&self) {
        self.inner.core.journal.close();
        self.inner.core.removed.stop();
        let handles = std::mem::take(&mut *self.handles.lock().unwrap_or_else(PoisonError::into_inner));
        {
            self.inner.core.work().stopping = true;
            self.inner.core.wake.notify_all();
        }
        for handle in handles {
            if handle.join().is_err() {
                tracing::error!("a thread of the log has panicked");
            }
        }
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.inner.core.closed.store(true, Ordering::Release);
        self.stop();
        self.inner.core.removed.close();
        // Replicas and readers may outlive the log. They hold the core, so the core must not hold them.
        drop(std::mem::take(&mut *self.inner.core.work()));
        self.inner.core.journal.abandon();
    }
}
