//! One data directory: opening it, its registry of replicas, and closing it.

mod delete;
mod identity;
mod incarnations;
mod producer_block;
mod recovery;
mod stall;
mod startup;
mod status;
mod strays;
mod sync;

use std::{
    collections::BTreeMap,
    io,
    path::{Path, PathBuf},
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    thread::JoinHandle,
};

use parking_lot::{Mutex, MutexGuard};
use tokio::sync::Semaphore;
use uuid::Uuid;

pub use self::identity::{DataDirIdentity, FORMAT, METADATA, NAME as IDENTITY};
use self::{
    recovery::{UnopenedReplica, quarantine_segments, recover},
    strays::StrayReplicas,
};
use crate::{
    log::{
        disk::{Disk, OpenMode, PIECE_BYTES, budget::DiskBudget},
        error::{DataDirError, PersistError, ReplicaError, io_error},
        format::{
            ProducerMemory,
            checkpoint::{CheckpointKind, ReplicaCheckpoint},
            entry::EntryKind,
            segment::replica_dir,
        },
        journal::{
            Journal, JournalHost, StepDriver,
            ring::{self, Ring},
        },
        options::LogOptions,
        replica::{
            context::{LogContext, MAX_DISK_READS, SyncQueue},
            file_cache::FileCache,
            removed::RemovedFiles,
            state::{RecoveryPoint, ReplicaInner},
            tail_cache::TailCache,
            writer::{ReplicaLog, write_caches},
        },
    },
    model::{Offset, PartitionId, TopicId},
    task::{self, clock},
};
pub use status::{DataDirStatus, DiskSpace};

/// One data directory. Clones share it. Dropping the last clone stops it without a clean shutdown.
#[derive(Clone)]
pub struct DataDir {
    pub(in crate::log) inner: Arc<DataDirInner>,
    threads: Arc<LogThreads>,
}

pub(in crate::log) struct DataDirInner {
    pub(in crate::log) ctx: Arc<LogContext>,
    pub(in crate::log) directory_id: Uuid,
    registry: Mutex<ReplicaRegistry>,
    /// Replicas on the disk that are not registered.
    pub(in crate::log) strays: StrayReplicas,
    was_clean_shutdown: bool,
    _lock: Box<dyn Send + Sync>,
}

#[derive(Default)]
pub(in crate::log) struct ReplicaRegistry {
    pub(in crate::log) open: BTreeMap<PartitionId, Arc<ReplicaInner>>,
    pub(in crate::log) unopened: BTreeMap<PartitionId, UnopenedReplica>,
}

struct LogThreads {
    inner: Arc<DataDirInner>,
    handles: Mutex<Vec<JoinHandle<()>>>,
}

impl DataDir {
    /// Opens a data directory, or creates it. Reads the journal after a crash, and never the segments. Blocks.
    pub fn open(
        disk: Arc<dyn Disk>,
        dir: &Path,
        identity: &DataDirIdentity,
        options: LogOptions,
    ) -> Result<Self, DataDirError> {
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
        let budget = Arc::new(DiskBudget::new(disk.clone(), dir, options.reserve_bytes));
        budget.check_journal_space(&journal_dir, options.journal_bytes)?;
        let directory_id = identity::check(&*disk, dir, identity)?;
        budget.release_reserve_for_start();
        let loaded = startup::load(&disk, dir, directory_id, &options)?;
        let strays = StrayReplicas::find(&*disk, dir, &loaded.replicas);
        let (file_bytes, max_files) = ring::ring_layout(options.journal_bytes);
        // Several frames must fit into one file.
        let frame_bytes = options.max_frame_bytes.min(usize::try_from(file_bytes / 3).unwrap_or(usize::MAX));
        let options = LogOptions { max_frame_bytes: frame_bytes, ..options };
        let ring = Ring::open(disk.clone(), &journal_dir, file_bytes, max_files)
            .map_err(io_error(&journal_dir, "open the journal"))?;
        let ctx = Arc::new(LogContext {
            files: FileCache::new(disk.clone()),
            removed: RemovedFiles::new(if options.step_mode { 0 } else { disk.open_files() }),
            disk,
            dir: dir.to_owned(),
            tail: TailCache::new(options.tail_bytes),
            producer_memory: ProducerMemory::new(options.producer_bytes),
            journal: Journal::new(directory_id, ring, loaded.first_frame, budget.clone(), &options),
            generation: AtomicU64::new(loaded.generation),
            closed: AtomicBool::new(false),
            budget,
            recycling: Mutex::default(),
            checkpoint_error: Mutex::default(),
            piece_bytes: AtomicUsize::new(PIECE_BYTES),
            disk_reads: Arc::new(Semaphore::new(MAX_DISK_READS)),
            work: Mutex::new(SyncQueue::default()),
            wake: parking_lot::Condvar::new(),
            step_driver: std::sync::OnceLock::new(),
            options,
        });
        let registry = ReplicaRegistry { open: BTreeMap::new(), unopened: loaded.replicas };
        let inner = Arc::new(DataDirInner {
            ctx,
            directory_id,
            registry: Mutex::new(registry),
            strays,
            was_clean_shutdown: loaded.clean,
            _lock: lock,
        });
        if inner.ctx.options.step_mode {
            let driver: Weak<dyn StepDriver> = Arc::<DataDirInner>::downgrade(&inner);
            drop(inner.ctx.step_driver.set(driver));
        }
        inner.ctx.journal.preallocate_now().map_err(io_error(&journal_dir, "create the journal"))?;
        inner.write_first_frame(loaded.first_frame).map_err(io_error(dir, "write the first frame of the journal"))?;
        inner.ctx.budget.create_reserve();
        let handles = if inner.ctx.options.step_mode { Vec::new() } else { inner.start() };
        let threads = Arc::new(LogThreads { inner: inner.clone(), handles: Mutex::new(handles) });
        Ok(Self { inner, threads })
    }

    /// Returns the random id that the directory received at its creation. A directory without that id is another one.
    pub fn directory_id(&self) -> Uuid {
        self.inner.directory_id
    }

    /// Returns true if the directory was closed cleanly before: all written data is present, also that of `replicated`
    /// topics.
    pub fn was_clean_shutdown(&self) -> bool {
        self.inner.was_clean_shutdown
    }

    /// Returns the incarnations of this broker that the metadata may name if this directory took part in them, oldest
    /// first. The list is empty in a new directory, and in one whose incarnations file is missing or corrupt. Blocks.
    pub fn incarnations(&self) -> Result<Vec<Uuid>, DataDirError> {
        incarnations::read(&*self.inner.ctx.disk, &self.inner.ctx.dir)
    }

    /// Records an incarnation durably. The id is added to the recorded ones before the metadata receives it. Once the
    /// metadata holds it (`confirmed`), the id replaces them. Blocks.
    pub fn record_incarnation(&self, now: Uuid, confirmed: bool) -> Result<(), DataDirError> {
        incarnations::record(&*self.inner.ctx.disk, &self.inner.ctx.dir, now, confirmed)
    }

    /// Returns the end of the newest block of producer ids that this broker received; 0 in a directory that records
    /// none. Blocks.
    pub fn producer_ids_end(&self) -> io::Result<i64> {
        producer_block::read(&*self.inner.ctx.disk, &self.inner.ctx.dir)
    }

    /// Records the end of a block of producer ids durably, before a client receives the first id of the block. Blocks.
    pub fn record_producer_ids_end(&self, end: i64) -> io::Result<()> {
        producer_block::write_end(&*self.inner.ctx.disk, &self.inner.ctx.dir, end)
    }

    /// Returns the highest cluster generation in which this directory took part; 0 before the first. Blocks.
    pub fn generation(&self) -> Result<u64, DataDirError> {
        identity::generation(&*self.inner.ctx.disk, &self.inner.ctx.dir)
    }

    /// Records durably that this directory takes part in a cluster generation. A lower generation changes nothing.
    /// Blocks.
    pub fn record_generation(&self, generation: u64) -> Result<(), DataDirError> {
        identity::record_generation(&*self.inner.ctx.disk, &self.inner.ctx.dir, generation)
    }

    /// Returns the replicas of this directory, in order.
    pub fn partitions(&self) -> Vec<PartitionId> {
        let registry = self.inner.registry();
        let mut ids: Vec<_> = registry.open.keys().chain(registry.unopened.keys()).copied().collect();
        ids.sort_unstable();
        ids
    }

    /// Returns the replicas of a topic, in order.
    pub fn partitions_of(&self, topic: TopicId) -> Vec<PartitionId> {
        let (registry, all) = (self.inner.registry(), PartitionId::new(topic, 0)..=PartitionId::new(topic, u32::MAX));
        let open = registry.open.range(all.clone()).map(|(id, _)| *id);
        let mut ids: Vec<_> = open.chain(registry.unopened.range(all).map(|(id, _)| *id)).collect();
        ids.sort_unstable();
        ids
    }

    /// Returns true if this directory has the replica.
    pub fn holds(&self, id: PartitionId) -> bool {
        let registry = self.inner.registry();
        registry.open.contains_key(&id) || registry.unopened.contains_key(&id)
    }

    /// Returns the stray replicas, in order: replicas that have segments on the disk and are not registered. A failed
    /// or interrupted deletion leaves them.
    pub fn stray_partitions(&self) -> Vec<PartitionId> {
        self.inner.strays.ids()
    }

    /// Opens a replica, or creates it, empty, at `start`. Blocks. After a crash it scans the unsynced part of the
    /// segments.
    pub fn open_replica(&self, id: PartitionId, start: Offset) -> Result<ReplicaLog, ReplicaError> {
        let inner = &self.inner;
        if let Some(reason) = inner.ctx.refusal() {
            return Err(ReplicaError::Failed { reason });
        }
        let (replica, unopened) = {
            let registry = inner.registry();
            (registry.open.get(&id).cloned(), registry.unopened.get(&id).cloned())
        };
        let replica = match (replica, unopened) {
            (Some(replica), _) => replica,
            (None, Some(unopened)) => {
                let dir = replica_dir(&inner.ctx.dir, id);
                let clean = unopened.clean;
                let io = |source| ReplicaError::Io { id, path: dir.clone(), source };
                // The journal may record a creation that preceded a power failure, while the file system lost the
                // directory.
                let is_empty = unopened.record.segments.iter().all(|segment| segment.bytes == 0);
                let is_created = is_empty && inner.ensure_dir(&dir).map_err(io)?;
                let record = recover(&*inner.ctx.disk, &dir, unopened)?;
                let replica = inner.register_recovered(id, dir, record, clean);
                replica.state().names_changed |= is_created;
                replica
            }
            (None, None) => inner.create(id, start)?,
        };
        if replica.writer_open.swap(true, Ordering::AcqRel) {
            return Err(ReplicaError::Open { id });
        }
        Ok(ReplicaLog::new(replica))
    }

    /// Announces that the log will be closed when its writers have stopped. Writers wait for the journal, which waits
    /// for a free file of its ring. From now on that wait ends after some seconds, and then the journal fails. Entries
    /// that are not written by then were never acknowledged.
    pub fn begin_shutdown(&self) {
        self.inner.ctx.journal.begin_shutdown();
    }

    /// Syncs everything, writes the last checkpoint and stops the threads. Appends are refused from now on. After an
    /// error, the next start scans for unsynced data.
    pub fn close(&self) -> Result<(), PersistError> {
        if self.inner.ctx.closed.swap(true, Ordering::AcqRel) {
            return Ok(());
        }
        let closed = self.close_replicas();
        // This step is the last one: a process that is ended during it has stopped cleanly.
        self.inner.ctx.removed.close();
        closed
    }

    fn close_replicas(&self) -> Result<(), PersistError> {
        let inner = &self.inner;
        for replica in inner.open_replicas() {
            if replica.state().index.is_some() {
                write_caches(&replica);
            }
        }
        inner.sync_pass();
        inner.ctx.journal.close();
        while inner.ctx.options.step_mode && inner.write_frame() {}
        self.threads.stop();
        inner.sync_pass();
        let failed = |reason: String| Err(PersistError::Failed { reason });
        if let Some(reason) = inner.ctx.journal.failed() {
            return failed(reason.to_owned());
        }
        // The record of a replica that was not opened since a crash does not yet describe its files.
        let is_unscanned = inner.registry().unopened.values().any(|unopened| !unopened.clean);
        let is_synced = inner.open_replicas().iter().all(|replica| {
            let state = replica.state();
            replica.failed.get().is_none() && state.recovery.segment.end == state.log_end()
        });
        if !is_synced {
            return inner.recycle().or_else(|error| failed(format!("cannot write the checkpoint: {error}")));
        }
        let kind = if is_unscanned { CheckpointKind::Replayed } else { CheckpointKind::CleanShutdown };
        let checkpoint = inner.checkpoint(inner.ctx.journal.next_frame(), kind);
        let written = inner.write_checkpoint(&checkpoint);
        written.or_else(|error| failed(format!("cannot write the checkpoint: {error}")))
    }

    /// Writes one frame of the journal, with `step_mode`. Returns false if nothing is queued, or if the journal has no
    /// space.
    pub fn journal_step(&self) -> bool {
        self.inner.write_frame()
    }

    #[cfg(test)]
    pub(in crate::log) fn recycle_now(&self) {
        self.inner.recycle().expect("the disk works");
    }

    #[cfg(test)]
    pub(in crate::log) fn unregister(&self, id: PartitionId) {
        self.inner.registry().open.remove(&id);
    }

    /// Syncs all unsynced data and releases the journal files that are not needed, with `step_mode`.
    pub fn sync_step(&self) {
        self.inner.sync_pass();
    }
}

impl DataDirInner {
    pub(in crate::log) fn registry(&self) -> MutexGuard<'_, ReplicaRegistry> {
        self.registry.lock()
    }

    pub(in crate::log) fn open_replicas(&self) -> Vec<Arc<ReplicaInner>> {
        self.registry().open.values().cloned().collect()
    }

    /// Writes the frame at which replay would start, and then the checkpoint that names it.
    fn write_first_frame(&self, first_frame: u64) -> io::Result<()> {
        self.ctx.journal.begin()?;
        self.write_checkpoint(&self.checkpoint(first_frame, CheckpointKind::Running))
    }

    /// Registers a recovered replica as open.
    fn register_recovered(
        &self,
        id: PartitionId,
        dir: PathBuf,
        mut record: ReplicaCheckpoint,
        clean: bool,
    ) -> Arc<ReplicaInner> {
        let mut registry = self.registry();
        if let Some(replica) = registry.open.get(&id) {
            return replica.clone();
        }
        let synced = registry.unopened.remove(&id).map(|unopened| unopened.record);
        if startup::needs_full_scan(&record) {
            // The scan has read the replica, so from now on a record describes it.
            record.generation = self.ctx.next_generation();
        }
        let replica = ReplicaInner::new(&self.ctx, dir, record);
        registry.open.insert(id, replica.clone());
        drop(registry);
        if let Some(synced) = synced.filter(|_| !clean) {
            // Data that the scan found above the old recovery point may be unsynced.
            {
                let mut state = replica.state();
                let segment = *synced.segments.last().expect("a record has a segment");
                state.persisted_end = synced.persisted.max(segment.end);
                let producers = Arc::unwrap_or_clone(synced.producers).charged(&self.ctx.producer_memory);
                let (epochs, producers) = (Arc::new(synced.epochs), Arc::new(producers));
                state.recovery = RecoveryPoint { segment, epochs, producers };
                state.names_changed = true;
                for entry in &state.segments {
                    entry.file.dirty.store(entry.info.base >= segment.base && entry.info.bytes > 0, Ordering::Release);
                }
            }
            replica.mark_dirty(0);
        }
        replica
    }

    /// Creates the directory of a replica if it is absent. Returns true if it was created.
    fn ensure_dir(&self, dir: &Path) -> io::Result<bool> {
        match self.ctx.disk.list(dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => self.ctx.disk.create_dir_all(dir).map(|()| true),
            listed => listed.map(|_| false),
        }
    }

    fn create(&self, id: PartitionId, start: Offset) -> Result<Arc<ReplicaInner>, ReplicaError> {
        let dir = replica_dir(&self.ctx.dir, id);
        let io = |source| ReplicaError::Io { id, path: dir.clone(), source };
        let disk = &self.ctx.disk;
        if !self.ensure_dir(&dir).map_err(io)? {
            quarantine_segments(&*self.ctx.disk, &dir).map_err(io)?;
            self.strays.remove(id);
        }
        let record = ReplicaCheckpoint::empty(id, self.ctx.next_generation(), start, clock::wall_ms());
        let replica = ReplicaInner::new(&self.ctx, dir.clone(), record);
        let file = replica.state().active().file.clone();
        disk.open(&file.path, OpenMode::Write).map_err(io)?;
        file.dirty.store(true, Ordering::Release);
        let generation = {
            let mut state = replica.state();
            state.names_changed = true;
            state.generation
        };
        self.registry().open.insert(id, replica.clone());
        self.ctx.submit_unacked(&replica, replica.entry_header(EntryKind::Create, generation, start, start));
        replica.mark_dirty(0);
        Ok(replica)
    }

    fn start(self: &Arc<Self>) -> Vec<JoinHandle<()>> {
        let (writer, syncer, preallocator, remover) = (self.clone(), self.clone(), self.clone(), self.clone());
        vec![
            task::spawn_thread("journal", move || writer.ctx.journal.run(&*writer)),
            task::spawn_thread("segment-sync", move || sync::run(&syncer)),
            task::spawn_thread("journal-preallocate", move || preallocator.ctx.journal.run_preallocation()),
            task::spawn_thread("removed-files", move || remover.ctx.removed.run()),
        ]
    }
}

impl JournalHost for DataDirInner {
    fn request_sync(&self) {
        self.ctx.request_sync_now();
    }

    fn sync_pass(&self) -> bool {
        self.sync_pass()
    }

    fn stall_reason(&self) -> Option<String> {
        self.stall_reason()
    }
}

impl StepDriver for DataDirInner {
    fn write_frame(&self) -> bool {
        self.ctx.journal.step(self)
    }

    fn ensure_change_space(&self) -> bool {
        self.ctx.journal.ensure_change_space(self)
    }
}

impl LogThreads {
    /// Stops the threads. Entries that are queued for the journal are still written.
    fn stop(&self) {
        self.inner.ctx.journal.close();
        self.inner.ctx.removed.stop();
        let handles = std::mem::take(&mut *self.handles.lock());
        {
            self.inner.ctx.work().stopping = true;
            self.inner.ctx.wake.notify_all();
        }
        for handle in handles {
            if handle.join().is_err() {
                tracing::error!("a log thread panicked");
            }
        }
    }
}

impl Drop for LogThreads {
    fn drop(&mut self) {
        self.inner.ctx.closed.store(true, Ordering::Release);
        self.stop();
        self.inner.ctx.removed.close();
        // Replicas and readers may outlive the log. They hold the context, so the context must not hold them.
        drop(std::mem::take(&mut *self.inner.ctx.work()));
        self.inner.ctx.journal.fail_queued();
    }
}
