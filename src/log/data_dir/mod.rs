//! One data directory: opening it, its threads, and closing it.

mod delete;
mod identity;
mod incarnations;
mod producer_block;
mod recovery;
mod registry;
mod stall;
mod startup;
mod status;
mod strays;
mod sync;

use std::{
    io,
    path::Path,
    sync::{Arc, Weak},
    thread::JoinHandle,
};

use uuid::Uuid;

pub use self::{
    identity::{DataDirIdentity, FORMAT, METADATA, NAME as IDENTITY},
    status::{DataDirStatus, DiskSpace},
};
use self::{registry::ReplicaRegistry, strays::StrayReplicas, sync::CheckpointFailures};
use crate::{
    log::{
        disk::{Disk, budget::DiskBudget},
        error::{DataDirError, PersistError, io_error},
        format::CheckpointKind,
        journal::{
            Journal, JournalHost, StepDriver,
            ring::{self, Ring},
        },
        options::LogOptions,
        replica::context::LogContext,
    },
    model::PartitionId,
    task,
    task::lock::Mutex,
};

/// One data directory. Clones share it. Dropping the last clone without [`Self::close`] is no clean shutdown.
#[derive(Clone)]
pub struct DataDir {
    inner: Arc<DataDirInner>,
    threads: Arc<LogThreads>,
}

/// State of a data directory, shared with its threads.
struct DataDirInner {
    ctx: Arc<LogContext>,
    directory_id: Uuid,
    registry: Mutex<ReplicaRegistry>,
    /// Held while a checkpoint is written and the ring files that it makes unnecessary are released. It keeps an older
    /// checkpoint from replacing a newer one.
    recycling: Mutex<()>,
    checkpoint_failures: Mutex<CheckpointFailures>,
    /// Replicas on the disk that are not registered.
    strays: StrayReplicas,
    was_clean_shutdown: bool,
    /// Lock of the directory, which ends when the value is dropped.
    _lock: Box<dyn Send + Sync>,
}

/// The threads of a data directory, which are stopped when the value is dropped.
struct LogThreads {
    inner: Arc<DataDirInner>,
    /// Handles of the threads; none in step mode, or after a stop.
    handles: Mutex<Vec<JoinHandle<()>>>,
}

impl DataDir {
    /// Opens a data directory, or creates it. After a crash, replays the journal: completes interrupted deletions and
    /// resets, and writes the batches that the segments lack. Apart from that, no segment is read; a replica is scanned
    /// when it is opened. Blocks.
    pub fn open(
        disk: Arc<dyn Disk>,
        dir: &Path,
        identity: &DataDirIdentity,
        options: LogOptions,
    ) -> Result<Self, DataDirError> {
        let lock = identity::lock(&*disk, dir)?;
        let journal_dir = options.journal_in(dir);
        if options.journal_dir.is_some() {
            match disk.register_root(&journal_dir) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(io_error(&journal_dir, "use the journal directory")(error));
                }
                // A missing directory is created with the ring.
                _ => {}
            }
        }
        let budget = Arc::new(DiskBudget::new(disk.clone(), dir, options.reserve_bytes));
        // Before anything but the lock file is written: the disk has space for the journal.
        budget.check_journal_space(&journal_dir, options.journal_bytes)?;
        let directory_id = identity::check_or_create(&*disk, dir, identity)?;
        // On a full disk, the reserve gives the space that the replay needs.
        budget.release_reserve_for_start();
        let loaded = startup::load(&disk, dir, directory_id, &options)?;
        let strays = StrayReplicas::find(&*disk, dir, &loaded.replicas);
        let (file_bytes, max_files) = ring::ring_layout(options.journal_bytes);
        // At least three frames of the maximum size must fit into one file.
        let frame_bytes = options.max_frame_bytes.min(usize::try_from(file_bytes / 3).unwrap_or(usize::MAX));
        let options = LogOptions { max_frame_bytes: frame_bytes, ..options };
        let ring = Ring::open(disk.clone(), &journal_dir, file_bytes, max_files)
            .map_err(io_error(&journal_dir, "open the journal"))?;
        let journal = Journal::new(directory_id, ring, loaded.first_frame, budget.clone(), &options);
        let inner = Arc::new(DataDirInner {
            ctx: Arc::new(LogContext::new(disk, dir, options, journal, budget, loaded.generation)),
            directory_id,
            registry: Mutex::new(ReplicaRegistry::new(loaded.replicas)),
            recycling: Mutex::default(),
            checkpoint_failures: Mutex::default(),
            strays,
            was_clean_shutdown: loaded.clean,
            _lock: lock,
        });
        if inner.ctx.options.step_mode {
            let driver: Weak<dyn StepDriver> = Arc::<DataDirInner>::downgrade(&inner);
            inner.ctx.set_step_driver(driver);
        }
        inner.ctx.journal.preallocate_now().map_err(io_error(&journal_dir, "create the journal"))?;
        // The next replay starts at this frame, which the new checkpoint names.
        inner.write_first_frame(loaded.first_frame).map_err(io_error(dir, "write the first frame of the journal"))?;
        inner.ctx.budget.create_reserve();
        let handles = if inner.ctx.options.step_mode { Vec::new() } else { inner.spawn_threads() };
        let threads = Arc::new(LogThreads { inner: inner.clone(), handles: Mutex::new(handles) });
        Ok(Self { inner, threads })
    }

    /// Returns the random id that the directory received at its creation. It distinguishes the directory from a later
    /// one at the same path.
    pub fn directory_id(&self) -> Uuid {
        self.inner.directory_id
    }

    /// Returns true if the last process closed the directory cleanly. All written data is then present, also that of
    /// `replicated` topics.
    pub fn was_clean_shutdown(&self) -> bool {
        self.inner.was_clean_shutdown
    }

    /// Returns the incarnations of this broker that the metadata may name, and in which this directory took part,
    /// oldest first. The list is empty for a new directory, and if the incarnations file is missing or corrupt. Blocks.
    pub fn incarnations(&self) -> Result<Vec<Uuid>, DataDirError> {
        incarnations::read(&*self.inner.ctx.disk, &self.inner.ctx.dir)
    }

    /// Writes an incarnation to the incarnations file, durably. The broker first calls this with `confirmed` false,
    /// which adds the id, and then registers. Once the metadata holds the id, the broker calls this with `confirmed`
    /// true: the id then replaces all ids in the file. Blocks.
    pub fn record_incarnation(&self, incarnation: Uuid, confirmed: bool) -> Result<(), DataDirError> {
        incarnations::record(&*self.inner.ctx.disk, &self.inner.ctx.dir, incarnation, confirmed)
    }

    /// Returns the end of the newest block of producer ids that this broker received; 0 if the file with the end is
    /// missing or corrupt. Blocks.
    pub fn producer_ids_end(&self) -> io::Result<i64> {
        producer_block::read(&*self.inner.ctx.disk, &self.inner.ctx.dir)
    }

    /// Writes the end of a block of producer ids durably, before a client receives the first id of the block. Blocks.
    pub fn record_producer_ids_end(&self, end: i64) -> io::Result<()> {
        producer_block::write_end(&*self.inner.ctx.disk, &self.inner.ctx.dir, end)
    }

    /// Returns the highest cluster generation in which this directory took part; 0 before the first. Blocks.
    pub fn generation(&self) -> Result<u64, DataDirError> {
        identity::generation(&*self.inner.ctx.disk, &self.inner.ctx.dir)
    }

    /// Stores the cluster generation durably in the identity file, if it is higher than the stored one. An operator
    /// raises the generation after etcd was restored from a backup. A later start fails if etcd then has a lower
    /// generation than this directory, because etcd is from an older backup. Blocks.
    pub fn record_generation(&self, generation: u64) -> Result<(), DataDirError> {
        identity::record_generation(&*self.inner.ctx.disk, &self.inner.ctx.dir, generation)
    }

    /// Returns the partitions of the stray replicas, in order. The disk has segments of such a replica, and the
    /// registry of this data directory does not contain it. Its deletion failed or was interrupted, or its creation
    /// never became durable.
    pub fn stray_partitions(&self) -> Vec<PartitionId> {
        self.inner.strays.ids()
    }

    /// Announces that the log will be closed when its writers have stopped. A writer may wait for the journal, which
    /// may wait for a free file of its ring. From now on that wait ends after some seconds, and then the journal fails.
    /// The entries that the journal then drops were never acknowledged.
    pub fn begin_shutdown(&self) {
        self.inner.ctx.journal.begin_shutdown();
    }

    /// Syncs everything, stops the threads and writes the last checkpoint. Appends are refused from now on. The next
    /// start scans nothing, unless the call fails, or a replica has failed or was not opened since a crash. A second
    /// call does nothing.
    pub fn close(&self) -> Result<(), PersistError> {
        if !self.inner.ctx.close() {
            return Ok(());
        }
        let closed = self.close_replicas();
        // This step comes last, because it may take long. A process that is killed during it has stopped cleanly.
        self.inner.ctx.removed.close();
        closed
    }

    /// Writes the caches of active segments, makes all data durable, stops the threads and writes the last checkpoint.
    /// This checkpoint is that of a clean shutdown only if it describes the files of every replica exactly.
    fn close_replicas(&self) -> Result<(), PersistError> {
        let inner = &self.inner;
        let replicas = inner.registry.lock().open_replicas();
        replicas.iter().for_each(|replica| replica.write_caches_for_close());
        inner.sync_pass();
        inner.ctx.journal.close();
        while inner.ctx.options.step_mode && inner.write_frame() {}
        self.threads.stop();
        inner.sync_pass();
        let failed = |reason: String| Err(PersistError::Failed { reason });
        if let Some(reason) = inner.ctx.journal.failed() {
            return failed(reason.to_owned());
        }
        // The record of a replica that was not opened since a crash may not describe its files.
        let is_unscanned = inner.registry.lock().has_unscanned();
        let is_synced = inner.registry.lock().open_replicas().iter().all(|replica| replica.is_synced());
        if !is_synced {
            return inner.recycle().or_else(|error| failed(format!("cannot write the checkpoint: {error}")));
        }
        let kind = if is_unscanned { CheckpointKind::Replayed } else { CheckpointKind::CleanShutdown };
        let checkpoint = inner.checkpoint(inner.ctx.journal.next_frame(), kind);
        let written = inner.write_checkpoint(&checkpoint);
        written.or_else(|error| failed(format!("cannot write the checkpoint: {error}")))
    }

    /// In step mode: writes one frame of the journal. Returns false if nothing is queued, or if the journal has no
    /// space. Returns true as well if an I/O error fails the journal.
    pub fn journal_step(&self) -> bool {
        self.inner.write_frame()
    }

    #[cfg(test)]
    pub(super) fn recycle_now(&self) {
        self.inner.recycle().expect("the disk works");
    }

    #[cfg(test)]
    pub(super) fn write_out_pieces(&self) {
        self.inner.write_out_pieces();
    }

    #[cfg(test)]
    pub(super) fn unregister(&self, id: PartitionId) {
        self.inner.registry.lock().remove(id);
    }

    /// In step mode: runs one sync pass, which syncs all unsynced data, and releases journal files if few are free.
    pub fn sync_step(&self) {
        self.inner.sync_pass();
    }
}

impl DataDirInner {
    /// Writes the first frame of this process to the journal, and then the checkpoint that starts replay at this frame.
    fn write_first_frame(&self, first_frame: u64) -> io::Result<()> {
        self.ctx.journal.begin()?;
        self.write_checkpoint(&self.checkpoint(first_frame, CheckpointKind::Running))
    }

    /// Starts the threads that write the journal, sync the segments, create journal files, and free removed files.
    fn spawn_threads(self: &Arc<Self>) -> Vec<JoinHandle<()>> {
        let (writer, syncer, preallocator, remover) = (self.clone(), self.clone(), self.clone(), self.clone());
        vec![
            task::spawn_thread("journal", move || writer.ctx.journal.run(&*writer)),
            task::spawn_thread("segment-sync", move || syncer.run_syncs()),
            task::spawn_thread("journal-preallocate", move || preallocator.ctx.journal.run_preallocation()),
            task::spawn_thread("removed-files", move || remover.ctx.removed.run()),
        ]
    }
}

impl JournalHost for DataDirInner {
    fn request_sync(&self) {
        self.ctx.sync_queue.request_pass();
    }

    fn run_sync_pass(&self) -> bool {
        self.sync_pass()
    }

    fn check_stall(&self) -> Option<String> {
        self.stall_reason()
    }
}

impl StepDriver for DataDirInner {
    fn write_frame(&self) -> bool {
        self.ctx.journal.write_next_frame(self)
    }

    fn ensure_change_space(&self) -> bool {
        self.ctx.journal.ensure_change_space(self)
    }
}

impl LogThreads {
    /// Closes the journal, and waits until all threads have ended. The writer completes all queued entries before it
    /// ends.
    fn stop(&self) {
        self.inner.ctx.journal.close();
        self.inner.ctx.removed.stop();
        let handles = std::mem::take(&mut *self.handles.lock());
        self.inner.ctx.sync_queue.stop();
        for handle in handles {
            if handle.join().is_err() {
                tracing::error!("a log thread panicked");
            }
        }
    }
}

impl Drop for LogThreads {
    fn drop(&mut self) {
        self.inner.ctx.close();
        self.stop();
        self.inner.ctx.removed.close();
        // Replicas and readers may outlive the log. They hold the context, whose queues must therefore hold no replica.
        self.inner.ctx.sync_queue.clear();
        self.inner.ctx.journal.fail_queued();
    }
}
