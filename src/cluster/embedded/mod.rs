//! The metadata store of a standalone broker: one `redb` file, `{data_dir}/metadata.redb`.
//!
//! # Overview
//!
//! The file has two tables: `entries` (path → create revision, mod revision, lease, value) and `store` (format,
//! revision). Reads are read transactions of redb and never wait for writes. Transactions queue; the caller that gets
//! the permit applies all queued ones in one commit, and their callers share one sync. Watches read recent changes from
//! one bounded history in memory, each at its own position, without buffers of their own.
//!
//! # Invariants
//!
//! - A `Done` result follows the sync of the commit that contains the transaction.
//! - The history is appended after the commit, in commit order, under the writer lock: watches return only durable
//!   changes.
//! - A failed commit is final: the content of the file is then unknown. Every later call returns `Unavailable` until
//!   the store is reopened.
//!
//! # Crash
//!
//! The file holds the last commit. Leases exist in memory only: their keys are deleted when the file is opened, since
//! their holder ended with the process. The history is lost too: a watch of older changes returns `Compacted`.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    fmt, io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
    time::Duration,
};

use redb::{Database, DatabaseError, StorageError, backends::FileBackend};
use rustix::fs::OFlags;
use tokio::{
    sync::{Semaphore, oneshot, watch},
    time::Instant,
};

use self::{
    history::{Cursor, History},
    table::{entry, find},
};
use super::store::{Answer, LeaseId, Listing, MetaStore, Outcome, Reading, Revision, StoreError, Transaction, Watch};
use crate::{
    log::PrivateDir,
    task::{self, Tasks, clock},
};

mod history;
mod table;

/// Name of the file in the data directory.
pub const FILE: &str = crate::log::METADATA;

/// Size of redb's page cache in bytes. Metadata is small, and the metadata cache holds a copy.
const CACHE_BYTES: usize = 16 << 20;

/// Minimum free disk space in bytes for a commit: more than one commit writes.
const COMMIT_BYTES: u64 = 4 << 20;

/// Interval of checks for expired leases.
const LEASE_TICK: Duration = Duration::from_millis(500);

/// Error of opening the store.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Another process has the file open.
    #[error("{} is in use by another process: stop that broker, or use another data directory", path.display())]
    InUse {
        /// Path of the file.
        path: PathBuf,
    },
    /// A newer version of this program wrote the file.
    #[error(
        "{} was written by a newer version (format {found}; this version reads up to {known}): run that version",
        path.display()
    )]
    Newer {
        /// Path of the file.
        path: PathBuf,
        /// Format of the file.
        found: u64,
        /// Newest format that this version reads.
        known: u64,
    },
    /// The file is corrupt or no metadata file.
    #[error("{} is damaged or no metadata file ({why}): restore it, or use another data directory", path.display())]
    Damaged {
        /// Path of the file.
        path: PathBuf,
        /// Description of the problem.
        why: String,
    },
    /// The file cannot be read or written.
    #[error("{} cannot be opened: {source}", path.display())]
    Io {
        /// Path of the file.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
}

/// The embedded store. Clones share it.
#[derive(Clone)]
pub struct EmbeddedStore {
    shared: Arc<Shared>,
}

struct Shared {
    database: Database,
    /// Directory of the file; `None` for an in-memory store. Calls that may reach a disk run on blocking threads.
    folder: Option<PathBuf>,
    /// Permit to commit. Taken before the queue is emptied, so that further transactions can queue meanwhile.
    turn: Arc<Semaphore>,
    queue: Mutex<VecDeque<Queued>>,
    /// Newest revision in the file. Locked during a whole commit: never lock it on an async thread.
    writer: Mutex<Revision>,
    /// Reason why writes are no longer possible.
    failed: OnceLock<String>,
    leases: Mutex<Leases>,
    history: Mutex<History>,
    /// Newest revision in the history; watches wait for its changes.
    reached: watch::Sender<Revision>,
}

struct Queued {
    transaction: Transaction,
    answer: oneshot::Sender<Result<Outcome, StoreError>>,
}

#[derive(Default)]
struct Leases {
    by_id: BTreeMap<LeaseId, Lease>,
    last: i64,
}

struct Lease {
    time: Duration,
    deadline: Instant,
}

impl fmt::Debug for EmbeddedStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EmbeddedStore").field("revision", &*self.shared.reached.borrow()).finish_non_exhaustive()
    }
}

impl EmbeddedStore {
    /// Opens `metadata.redb` in an existing data directory; creates the file if it is missing.
    pub async fn open(data_dir: &Path) -> Result<Self, OpenError> {
        let path = data_dir.join(FILE);
        task::run_blocking(move || {
            let folder = path.parent().unwrap_or(Path::new(".")).to_owned();
            let file = PrivateDir::open(&folder)
                .and_then(|folder| folder.open_file(Path::new(FILE), OFlags::RDWR | OFlags::CREATE))
                .map_err(|source| OpenError::Io { path: path.clone(), source })?;
            let mut builder = Database::builder();
            builder.set_cache_size(CACHE_BYTES).set_check_integrity_on_open(true);
            let database = FileBackend::new(file)
                .and_then(|file| builder.create_with_backend(file))
                .map_err(|error| open_error(&path, error))?;
            Self::load(database, Some(folder), &path)
        })
        .await
    }

    /// Returns an in-memory store that ends with its last clone. Its calls run on the caller's thread.
    pub fn in_memory() -> Self {
        let backend = redb::backends::InMemoryBackend::new();
        let database = Database::builder().create_with_backend(backend).expect("memory holds an empty database");
        Self::load(database, None, Path::new("memory")).expect("an empty database can be set up")
    }

    fn load(database: Database, folder: Option<PathBuf>, path: &Path) -> Result<Self, OpenError> {
        let damaged = |error: redb::Error| match error {
            redb::Error::Io(source) => OpenError::Io { path: path.to_owned(), source },
            other => OpenError::Damaged { path: path.to_owned(), why: other.to_string() },
        };
        if let Some(found) = table::format(&database).map_err(damaged)?.filter(|found| *found > table::FORMAT) {
            return Err(OpenError::Newer { path: path.to_owned(), found, known: table::FORMAT });
        }
        let revision = table::begin(&database).map_err(damaged)?;
        Ok(Self {
            shared: Arc::new(Shared {
                database,
                folder,
                turn: Arc::new(Semaphore::new(1)),
                queue: Mutex::default(),
                writer: Mutex::new(revision),
                failed: OnceLock::new(),
                leases: Mutex::default(),
                history: Mutex::new(History::after(revision)),
                reached: watch::Sender::new(revision),
            }),
        })
    }

    /// Ends every lease that has expired at `now`, and deletes the keys of these leases in one transaction.
    pub async fn tick(&self, now: Instant) -> Result<(), StoreError> {
        let over: Vec<LeaseId> = {
            let leases = lock(&self.shared.leases);
            leases.by_id.iter().filter(|(_, lease)| lease.deadline <= now).map(|(id, _)| *id).collect()
        };
        if over.is_empty() { Ok(()) } else { self.end_leases(over, Some(now)).await }
    }

    /// Ends expired leases by the monotonic clock until the tasks are stopped.
    pub fn keep_time(&self, tasks: &Tasks) {
        let (store, stop) = (self.clone(), tasks.clone());
        tasks.spawn("metadata leases", async move {
            loop {
                tokio::select! {
                    biased;
                    () = stop.cancelled() => return,
                    () = tokio::time::sleep(LEASE_TICK) => {
                        if let Err(error) = store.tick(clock::monotonic()).await {
                            tracing::error!(%error, "leases could not be ended");
                        }
                    }
                }
            }
        });
    }

    /// Runs a database access: on a blocking thread if it may reach a disk.
    async fn run<T: Send + 'static>(&self, function: impl FnOnce(&Shared) -> T + Send + 'static) -> T {
        let shared = self.shared.clone();
        if shared.folder.is_some() { task::run_blocking(move || function(&shared)).await } else { function(&shared) }
    }

    async fn end_leases(&self, leases: Vec<LeaseId>, only_over_at: Option<Instant>) -> Result<(), StoreError> {
        self.run(move |shared| {
            let mut writer = lock(&shared.writer);
            let mut ended = BTreeSet::new();
            {
                let mut known = lock(&shared.leases);
                for id in leases {
                    // Keep a lease that was renewed since the check.
                    let ends = known.by_id.get(&id).is_some_and(|l| only_over_at.is_none_or(|now| l.deadline <= now));
                    if ends {
                        known.by_id.remove(&id);
                        ended.insert(id);
                    }
                }
            }
            shared.commit(&mut writer, |batch| batch.delete_leased(|lease| ended.contains(&lease)))
        })
        .await
    }
}

impl MetaStore for EmbeddedStore {
    fn get<'a>(&'a self, key: &'a str) -> Answer<'a, Reading> {
        let key = key.to_owned();
        Box::pin(self.run(move |shared| {
            shared.usable()?;
            shared.read(|revision, entries| Ok(Reading { revision, entry: find(entries, &key)? }))
        }))
    }

    fn list<'a>(&'a self, prefix: &'a str) -> Answer<'a, Listing> {
        let prefix = prefix.to_owned();
        Box::pin(self.run(move |shared| {
            shared.usable()?;
            shared.read(|revision, entries| {
                let mut listed = Vec::new();
                for row in entries.range(prefix.as_str()..)? {
                    let (key, value) = row?;
                    if !key.value().starts_with(&prefix) {
                        break;
                    }
                    listed.push(entry(key.value(), value.value()));
                }
                Ok(Listing { revision, entries: listed })
            })
        }))
    }

    fn transact(&self, transaction: Transaction) -> Answer<'_, Outcome> {
        Box::pin(async move {
            transaction.check()?;
            let (answer, mut answered) = oneshot::channel();
            lock(&self.shared.queue).push_back(Queued { transaction, answer });
            let turn = self.shared.turn.clone().acquire_owned().await.expect("the semaphore is never closed");
            // The previous holder of the permit may have applied this transaction.
            if let Ok(outcome) = answered.try_recv() {
                return outcome;
            }
            // The work owns the permit: if this caller is dropped, the next one still waits for the commit.
            self.run(move |shared| {
                shared.commit_queued();
                drop(turn);
            })
            .await;
            answered.await.unwrap_or_else(|_| Err(StoreError::unknown("the transaction was lost")))
        })
    }

    fn watch<'a>(&'a self, prefix: &'a str, from: Revision) -> Answer<'a, Watch> {
        Box::pin(async move {
            lock(&self.shared.history).check(from)?;
            let cursor = Cursor::new(&self.shared, prefix, from);
            Ok(Watch::new(futures::stream::unfold(Some(cursor), history::step)))
        })
    }

    fn grant(&self, time: Duration) -> Answer<'_, LeaseId> {
        Box::pin(async move {
            self.shared.usable()?;
            let mut leases = lock(&self.shared.leases);
            leases.last += 1;
            let id = LeaseId(leases.last);
            leases.by_id.insert(id, Lease { time, deadline: clock::monotonic() + time });
            Ok(id)
        })
    }

    fn keep_alive(&self, lease: LeaseId) -> Answer<'_, ()> {
        Box::pin(async move {
            self.shared.usable()?;
            let mut leases = lock(&self.shared.leases);
            let known = leases.by_id.get_mut(&lease).ok_or(StoreError::LeaseGone { lease })?;
            known.deadline = clock::monotonic() + known.time;
            Ok(())
        })
    }

    fn revoke(&self, lease: LeaseId) -> Answer<'_, ()> {
        Box::pin(self.end_leases(vec![lease], None))
    }
}

impl Shared {
    /// Rejects every call after a failed commit.
    fn usable(&self) -> Result<(), StoreError> {
        match self.failed.get() {
            Some(why) => Err(StoreError::unavailable(why)),
            None => Ok(()),
        }
    }

    /// Reads at one revision.
    fn read<T>(
        &self,
        function: impl FnOnce(Revision, &table::ReadEntries) -> Result<T, redb::Error>,
    ) -> Result<T, StoreError> {
        table::read(&self.database, function).map_err(StoreError::unavailable)
    }

    /// Applies all queued transactions in one commit and sends their results.
    fn commit_queued(&self) {
        let mut writer = lock(&self.writer);
        let queued = std::mem::take(&mut *lock(&self.queue));
        // A transaction whose caller was dropped in the queue is not applied.
        let waiting: Vec<_> = queued.into_iter().filter(|queued| !queued.answer.is_closed()).collect();
        let lives = |id| lock(&self.leases).by_id.contains_key(&id);
        let outcomes = self.commit(&mut writer, |batch| {
            waiting.iter().map(|queued| batch.transact(&queued.transaction, lives)).collect()
        });
        drop(writer);
        match outcomes {
            Ok(outcomes) => {
                let outcomes: Vec<_> = outcomes;
                for (queued, outcome) in waiting.into_iter().zip(outcomes) {
                    // An error means that the caller was dropped.
                    let _gone = queued.answer.send(outcome);
                }
            }
            Err(error) => {
                for queued in waiting {
                    let _gone = queued.answer.send(Err(error.clone()));
                }
            }
        }
    }

    /// Rejects a commit that may not fit on the disk. A commit that fails half-way is final; one that was not started
    /// can be retried when there is space.
    fn room(&self) -> Result<(), StoreError> {
        let free =
            |folder: &PathBuf| rustix::fs::statvfs(folder).map(|stat| stat.f_bavail.saturating_mul(stat.f_frsize));
        match self.folder.as_ref().map(free) {
            Some(Ok(free)) if free < COMMIT_BYTES => Err(StoreError::unavailable(format!(
                "the disk of {FILE} is full ({free} bytes are free): make room; it goes on by itself"
            ))),
            _ => Ok(()),
        }
    }

    /// Changes the tables in one commit, publishes the changes, and returns the result of `function`.
    fn commit<T>(
        &self,
        writer: &mut Revision,
        function: impl FnOnce(&mut table::Batch<'_>) -> Result<T, redb::Error>,
    ) -> Result<T, StoreError> {
        self.usable()?;
        self.room()?;
        match table::write(&self.database, *writer, function) {
            Ok((output, changes)) => {
                if let Some(last) = changes.last() {
                    #[cfg(feature = "sim")]
                    changes.iter().for_each(|changes| table::tell(changes));
                    *writer = last.revision;
                    lock(&self.history).append(changes);
                    self.reached.send_replace(*writer);
                }
                Ok(output)
            }
            Err(error) => {
                let why = format!("a write to {FILE} failed ({error}); restart the broker when its disk is well");
                tracing::error!(%error, "the metadata store takes no more writes until it is opened again");
                Err(StoreError::unknown(self.failed.get_or_init(|| why)))
            }
        }
    }
}

/// Locks a mutex for a few statements. A panic in between leaves no partial state: values are set last.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn open_error(path: &Path, error: DatabaseError) -> OpenError {
    let path = path.to_owned();
    match error {
        DatabaseError::DatabaseAlreadyOpen | DatabaseError::LockProtocolMismatch => OpenError::InUse { path },
        DatabaseError::Storage(StorageError::Io(source)) if source.kind() == io::ErrorKind::InvalidData => {
            OpenError::Damaged { path, why: source.to_string() }
        }
        DatabaseError::Storage(StorageError::Io(source)) => OpenError::Io { path, source },
        other => OpenError::Damaged { path, why: other.to_string() },
    }
}

#[cfg(test)]
mod tests;
