//! The metadata store of a standalone broker: one `redb` file, `{data_dir}/metadata.redb`.
//!
//! # Overview
//!
//! The file has two tables: `entries` (path → create revision, mod revision, lease, value) and `store` (format,
//! revision). Reads are read transactions of redb and never wait for writes. Transactions queue; the caller that gets
//! the commit permit applies all queued transactions in one commit, with one sync. Recent changes are in one bounded
//! history in memory; each watch is a cursor in this history and has no buffer of its own.
//!
//! # Invariants
//!
//! - A `Committed` result follows the sync of the commit that contains the transaction.
//! - The history is appended after the commit, in commit order, under the writer lock: watches return only durable
//!   changes.
//! - A failed commit is final: the content of the file is then unknown. Every later request except `watch` returns
//!   `Unavailable` until the store is reopened.
//!
//! # Crash
//!
//! The file holds the last commit. Leases exist in memory only, and their holder exited with the process. So leased
//! keys are deleted when the file is opened. The history is lost too: a watch of older changes returns `Compacted`.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    fmt, io,
    path::{Path, PathBuf},
    sync::{Arc, OnceLock},
    time::Duration,
};

use redb::{Database, DatabaseError, StorageError, backends::FileBackend};
use rustix::fs::OFlags;
use tokio::{
    sync::{Semaphore, oneshot, watch},
    time::Instant,
};

use self::{
    history::{ChangeHistory, WatchCursor},
    table::{decode_row, find},
};
use super::store::{
    GetResult, LeaseId, ListResult, MetaStore, MetaStoreError, Revision, StoreFuture, Transaction, TxnOutcome, Watch,
};
use crate::{
    log::PrivateDir,
    task::{self, Tasks, clock, lock::Mutex},
};

mod history;
mod table;

/// Name of the file in the data directory.
pub const FILE_NAME: &str = crate::log::METADATA;

/// Size of redb's page cache in bytes. Metadata is small, and the metadata cache holds a copy.
const CACHE_BYTES: usize = 16 << 20;

/// Free disk space, in bytes, below which a commit is rejected. A usual commit writes less.
const MIN_FREE_COMMIT_BYTES: u64 = 4 << 20;

/// Interval between two checks for expired leases.
const LEASE_CHECK_INTERVAL: Duration = Duration::from_millis(500);

/// Error of opening the store.
#[derive(Debug, thiserror::Error)]
pub enum EmbeddedStoreError {
    /// Another process has the file open.
    #[error("{} is in use by another process: stop that broker, or use another data directory", path.display())]
    InUse { path: PathBuf },
    /// A newer version of this program wrote the file.
    #[error(
        "{} was written by a newer version (format {found}; this version reads up to {known}): run that version",
        path.display()
    )]
    Newer {
        path: PathBuf,
        /// Format of the file.
        found: u64,
        /// Newest format that this version reads.
        known: u64,
    },
    /// The file is corrupt or no metadata file.
    #[error("{} is corrupt or no metadata file ({reason}): restore it, or use another data directory", path.display())]
    Corrupt {
        path: PathBuf,
        /// Description of the problem.
        reason: String,
    },
    /// The file cannot be read or written.
    #[error("{} cannot be opened: {source}", path.display())]
    Io {
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
}

/// The embedded store. Clones share it.
#[derive(Clone)]
pub struct EmbeddedStore {
    inner: Arc<EmbeddedInner>,
}

/// State that all clones of an [`EmbeddedStore`] share.
struct EmbeddedInner {
    database: Database,
    /// Directory of the file; `None` for an in-memory store. Calls that may reach a disk run on blocking threads.
    folder: Option<PathBuf>,
    /// One permit. The caller that holds it commits all queued transactions; further ones queue during the commit.
    commit_permit: Arc<Semaphore>,
    queue: Mutex<VecDeque<PendingTransaction>>,
    /// Newest revision in the file. A commit holds this lock until its sync has ended, so a wait for the lock may block
    /// for long. It is taken only within `EmbeddedStore::access`, which runs on a blocking thread if the database is a
    /// file.
    writer: Mutex<Revision>,
    /// Reason of the first failed commit. Once it is set, every request except `watch` fails.
    failed: OnceLock<String>,
    leases: Mutex<LeaseTable>,
    history: Mutex<ChangeHistory>,
    /// Newest committed revision. It is sent after its changes are in the history, and wakes the watches.
    newest: watch::Sender<Revision>,
}

/// A queued transaction, and the sender of its result to the caller.
struct PendingTransaction {
    transaction: Transaction,
    response: oneshot::Sender<Result<TxnOutcome, MetaStoreError>>,
}

/// The live leases.
#[derive(Default)]
struct LeaseTable {
    by_id: BTreeMap<LeaseId, LeaseState>,
    /// Id of the newest lease; 0 before the first one.
    last_id: i64,
}

struct LeaseState {
    /// Time from the grant or a renewal to the deadline.
    duration: Duration,
    deadline: Instant,
}

impl fmt::Debug for EmbeddedStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EmbeddedStore").field("revision", &*self.inner.newest.borrow()).finish_non_exhaustive()
    }
}

impl EmbeddedStore {
    /// Opens `metadata.redb` in an existing data directory; creates the file if it is missing. Deletes the leased keys
    /// of the previous process.
    pub async fn open(data_dir: &Path) -> Result<Self, EmbeddedStoreError> {
        let path = data_dir.join(FILE_NAME);
        task::run_blocking(move || {
            let folder = path.parent().unwrap_or(Path::new(".")).to_owned();
            let file = PrivateDir::open(&folder)
                .and_then(|folder| folder.open_file(Path::new(FILE_NAME), OFlags::RDWR | OFlags::CREATE))
                .map_err(|source| EmbeddedStoreError::Io { path: path.clone(), source })?;
            let mut builder = Database::builder();
            builder.set_cache_size(CACHE_BYTES).set_check_integrity_on_open(true);
            let database = FileBackend::new(file)
                .and_then(|file| builder.create_with_backend(file))
                .map_err(|error| open_error(&path, error))?;
            Self::load(database, Some(folder), &path)
        })
        .await
    }

    /// Returns an empty store in memory, which is dropped with its last clone. Its requests run on the caller's thread.
    pub fn in_memory() -> Self {
        let backend = redb::backends::InMemoryBackend::new();
        let database = Database::builder().create_with_backend(backend).expect("an in-memory database can be created");
        Self::load(database, None, Path::new("memory")).expect("an empty database can be loaded")
    }

    /// Checks the format of an open database, deletes the leased keys of the previous process, and returns the store.
    /// `folder` is `None` for an in-memory store; `path` appears in errors.
    fn load(database: Database, folder: Option<PathBuf>, path: &Path) -> Result<Self, EmbeddedStoreError> {
        let load_error = |error: redb::Error| match error {
            redb::Error::Io(source) => EmbeddedStoreError::Io { path: path.to_owned(), source },
            other => EmbeddedStoreError::Corrupt { path: path.to_owned(), reason: other.to_string() },
        };
        let format = table::read_format(&database).map_err(load_error)?;
        if let Some(found) = format.filter(|format| *format > table::FORMAT) {
            return Err(EmbeddedStoreError::Newer { path: path.to_owned(), found, known: table::FORMAT });
        }
        let revision = table::initialize(&database).map_err(load_error)?;
        Ok(Self {
            inner: Arc::new(EmbeddedInner {
                database,
                folder,
                commit_permit: Arc::new(Semaphore::new(1)),
                queue: Mutex::default(),
                writer: Mutex::new(revision),
                failed: OnceLock::new(),
                leases: Mutex::default(),
                history: Mutex::new(ChangeHistory::after(revision)),
                newest: watch::Sender::new(revision),
            }),
        })
    }

    /// Ends every lease that has expired at `now`, and deletes the keys of these leases in one transaction.
    pub async fn expire_leases(&self, now: Instant) -> Result<(), MetaStoreError> {
        let expired: Vec<LeaseId> = {
            let leases = self.inner.leases.lock();
            leases.by_id.iter().filter(|(_, lease)| lease.deadline <= now).map(|(id, _)| *id).collect()
        };
        if expired.is_empty() { Ok(()) } else { self.end_leases(expired, Some(now)).await }
    }

    /// Starts a task that ends expired leases, by the monotonic clock, until `tasks` are stopped. Without this task, no
    /// lease expires.
    pub fn spawn_lease_expiry(&self, tasks: &Tasks) {
        let (store, stop) = (self.clone(), tasks.clone());
        tasks.spawn("metadata-leases", async move {
            while stop.sleep_until_cancelled(LEASE_CHECK_INTERVAL).await.is_some() {
                if let Err(error) = store.expire_leases(clock::monotonic()).await {
                    tracing::error!(%error, "expired leases could not be ended");
                }
            }
        });
    }

    /// Runs `function` on a blocking thread if the database is a file, and on the caller's thread if it is in memory.
    async fn access<T: Send + 'static>(&self, function: impl FnOnce(&EmbeddedInner) -> T + Send + 'static) -> T {
        let inner = self.inner.clone();
        if inner.folder.is_some() { task::run_blocking(move || function(&inner)).await } else { function(&inner) }
    }

    /// Ends these leases and deletes their keys in one transaction. With `expired_at`, leases with a later deadline
    /// continue, because they were renewed after the caller had selected them.
    async fn end_leases(&self, ids: Vec<LeaseId>, expired_at: Option<Instant>) -> Result<(), MetaStoreError> {
        self.access(move |inner| {
            let mut writer = inner.writer.lock();
            let mut ended = BTreeSet::new();
            {
                let mut leases = inner.leases.lock();
                let has_expired = |lease: &LeaseState| expired_at.is_none_or(|now| lease.deadline <= now);
                for id in ids {
                    if leases.by_id.get(&id).is_some_and(has_expired) {
                        leases.by_id.remove(&id);
                        ended.insert(id);
                    }
                }
            }
            inner.commit(&mut writer, |batch| batch.delete_leased(|lease| ended.contains(&lease)))
        })
        .await
    }
}

impl MetaStore for EmbeddedStore {
    fn get<'a>(&'a self, key: &'a str) -> StoreFuture<'a, GetResult> {
        let key = key.to_owned();
        Box::pin(self.access(move |inner| {
            inner.check_usable()?;
            inner.read(|revision, entries| Ok(GetResult { revision, entry: find(entries, &key)? }))
        }))
    }

    fn list<'a>(&'a self, prefix: &'a str) -> StoreFuture<'a, ListResult> {
        let prefix = prefix.to_owned();
        Box::pin(self.access(move |inner| {
            inner.check_usable()?;
            inner.read(|revision, entries| {
                let mut listed = Vec::new();
                for row in entries.range(prefix.as_str()..)? {
                    let (key, value) = row?;
                    if !key.value().starts_with(&prefix) {
                        break;
                    }
                    listed.push(decode_row(key.value(), value.value()));
                }
                Ok(ListResult { revision, entries: listed })
            })
        }))
    }

    fn transact(&self, transaction: Transaction) -> StoreFuture<'_, TxnOutcome> {
        Box::pin(async move {
            transaction.check()?;
            let (sender, mut receiver) = oneshot::channel();
            self.inner.queue.lock().push_back(PendingTransaction { transaction, response: sender });
            let permit = self.inner.commit_permit.clone().acquire_owned().await.expect("the semaphore is never closed");
            // The previous holder of the permit may have applied this transaction.
            if let Ok(outcome) = receiver.try_recv() {
                return outcome;
            }
            // The closure owns the permit. If this future is dropped, the permit is still held until the commit ends.
            self.access(move |inner| {
                inner.commit_queued();
                drop(permit);
            })
            .await;
            receiver.await.unwrap_or_else(|_| Err(MetaStoreError::unknown("the transaction was lost")))
        })
    }

    fn watch<'a>(&'a self, prefix: &'a str, from: Revision) -> StoreFuture<'a, Watch> {
        Box::pin(async move {
            self.inner.history.lock().check(from)?;
            let cursor = WatchCursor::new(&self.inner, prefix, from);
            Ok(Watch::new(futures::stream::unfold(Some(cursor), history::step)))
        })
    }

    fn grant(&self, time: Duration) -> StoreFuture<'_, LeaseId> {
        Box::pin(async move {
            self.inner.check_usable()?;
            let mut leases = self.inner.leases.lock();
            leases.last_id += 1;
            let id = LeaseId(leases.last_id);
            leases.by_id.insert(id, LeaseState { duration: time, deadline: clock::monotonic() + time });
            Ok(id)
        })
    }

    fn keep_alive(&self, lease: LeaseId) -> StoreFuture<'_, ()> {
        Box::pin(async move {
            self.inner.check_usable()?;
            let mut leases = self.inner.leases.lock();
            let state = leases.by_id.get_mut(&lease).ok_or(MetaStoreError::LeaseGone { lease })?;
            state.deadline = clock::monotonic() + state.duration;
            Ok(())
        })
    }

    fn revoke(&self, lease: LeaseId) -> StoreFuture<'_, ()> {
        Box::pin(self.end_leases(vec![lease], None))
    }
}

impl EmbeddedInner {
    /// Returns an error if a commit has failed.
    fn check_usable(&self) -> Result<(), MetaStoreError> {
        match self.failed.get() {
            Some(reason) => Err(MetaStoreError::unavailable(reason)),
            None => Ok(()),
        }
    }

    /// Calls `function` with the newest revision in the file and the entries at that revision.
    fn read<T>(
        &self,
        function: impl FnOnce(Revision, &table::ReadEntries) -> Result<T, redb::Error>,
    ) -> Result<T, MetaStoreError> {
        table::read(&self.database, function).map_err(MetaStoreError::unavailable)
    }

    /// Applies all queued transactions in one commit and sends their results to their callers. If the commit fails,
    /// every caller gets the error of the commit.
    fn commit_queued(&self) {
        let mut writer = self.writer.lock();
        let queued = std::mem::take(&mut *self.queue.lock());
        // A transaction whose caller was dropped in the queue is not applied.
        let pending: Vec<_> = queued.into_iter().filter(|queued| !queued.response.is_closed()).collect();
        let is_live = |id| self.leases.lock().by_id.contains_key(&id);
        let outcomes: Result<Vec<_>, MetaStoreError> = self.commit(&mut writer, |batch| {
            pending.iter().map(|queued| batch.transact(&queued.transaction, is_live)).collect()
        });
        drop(writer);
        match outcomes {
            Ok(outcomes) => {
                for (queued, outcome) in pending.into_iter().zip(outcomes) {
                    let _caller_dropped = queued.response.send(outcome);
                }
            }
            Err(error) => {
                for queued in pending {
                    let _caller_dropped = queued.response.send(Err(error.clone()));
                }
            }
        }
    }

    /// Returns an error if a commit may not fit on the disk. A started commit that fails makes the store unusable; a
    /// rejected commit can be retried when there is space. Accepts every commit if the free space cannot be read.
    fn check_disk_space(&self) -> Result<(), MetaStoreError> {
        let Some(folder) = &self.folder else { return Ok(()) };
        let Ok(stat) = rustix::fs::statvfs(folder) else { return Ok(()) };
        let free = stat.f_bavail.saturating_mul(stat.f_frsize);
        if free < MIN_FREE_COMMIT_BYTES {
            return Err(MetaStoreError::unavailable(format!(
                "the disk of {FILE_NAME} is full ({free} bytes are free): free space; writes then continue \
                 automatically"
            )));
        }
        Ok(())
    }

    /// Changes the tables in one commit, publishes the changes to watches, and returns the result of `function`.
    /// `writer` is the locked content of the field `writer`. An error of redb makes the store unusable.
    fn commit<T>(
        &self,
        writer: &mut Revision,
        function: impl FnOnce(&mut table::WriteBatch<'_>) -> Result<T, redb::Error>,
    ) -> Result<T, MetaStoreError> {
        self.check_usable()?;
        self.check_disk_space()?;
        match table::write(&self.database, *writer, function) {
            Ok((output, changes)) => {
                if let Some(last) = changes.last() {
                    #[cfg(feature = "sim")]
                    changes.iter().for_each(|changes| table::report_writes(changes));
                    *writer = last.revision;
                    self.history.lock().append(changes);
                    self.newest.send_replace(*writer);
                }
                Ok(output)
            }
            Err(error) => {
                let reason =
                    format!("a write to {FILE_NAME} failed ({error}): repair the disk, then restart the broker");
                let path = self.folder.as_ref().map(|folder| folder.join(FILE_NAME).display().to_string());
                tracing::error!(
                    path, %error,
                    "a write to the file of the metadata store failed: until a restart, topics cannot be changed and \
                     uploaded segments stay on disk; repair the disk, then restart the broker"
                );
                Err(MetaStoreError::unknown(self.failed.get_or_init(|| reason)))
            }
        }
    }
}

/// Converts an error of opening the file. redb reports a file that is no database as `InvalidData`.
fn open_error(path: &Path, error: DatabaseError) -> EmbeddedStoreError {
    let path = path.to_owned();
    match error {
        DatabaseError::DatabaseAlreadyOpen | DatabaseError::LockProtocolMismatch => EmbeddedStoreError::InUse { path },
        DatabaseError::Storage(StorageError::Io(source)) if source.kind() == io::ErrorKind::InvalidData => {
            EmbeddedStoreError::Corrupt { path, reason: source.to_string() }
        }
        DatabaseError::Storage(StorageError::Io(source)) => EmbeddedStoreError::Io { path, source },
        other => EmbeddedStoreError::Corrupt { path, reason: other.to_string() },
    }
}

#[cfg(test)]
mod tests;
