//! The metadata store: the trait that etcd and the embedded store implement, and the types of its interface.
//!
//! This module never interprets a value: keys are paths, values are bytes. `keys` defines their meaning.

use std::{
    fmt,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use futures::{Stream, StreamExt as _, future::BoxFuture, stream::BoxStream};

use crate::limits;

/// Future of a store request.
pub type StoreFuture<'a, T> = BoxFuture<'a, Result<T, MetaStoreError>>;

/// Version of the whole store: grows by one with every transaction that changed something.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Revision(pub u64);

impl Revision {
    /// Less than the revision of every store, key and transaction. An empty store has revision 1.
    pub const ZERO: Self = Self(0);

    /// Returns the next revision. A watch that follows a list starts at the revision after the list's.
    #[must_use]
    pub const fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

impl fmt::Display for Revision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A lease: keys written under it are deleted when the lease ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LeaseId(pub i64);

impl fmt::Display for LeaseId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

/// Current state of one key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyValue {
    /// Path of the key.
    pub key: String,
    /// Stored bytes.
    pub value: Bytes,
    /// Revision of the transaction that created the key. A key that is deleted and created again gets a new one.
    pub create_revision: Revision,
    /// Revision of the last write.
    pub mod_revision: Revision,
    /// Lease whose end deletes the key; `None` if the key has no lease.
    pub lease: Option<LeaseId>,
}

/// A key, or its absence, at a revision.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GetResult {
    /// Revision of the store at the read.
    pub revision: Revision,
    /// The key's state; `None` if the key does not exist.
    pub entry: Option<KeyValue>,
}

/// All keys under a prefix at one revision.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListResult {
    /// Revision of the store at the read.
    pub revision: Revision,
    /// The keys, in byte order.
    pub entries: Vec<KeyValue>,
}

/// A condition on one key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Compare {
    /// The key exists and its last write has this revision.
    ModRevision(String, Revision),
    /// The key exists and its create revision is this one.
    CreateRevision(String, Revision),
    /// The key exists and has this value.
    Value(String, Bytes),
    /// The key exists under this lease.
    Lease(String, LeaseId),
    Exists(String),
    Absent(String),
}

impl Compare {
    /// Returns the condition that the key is unchanged since it was read as `entry`.
    pub fn unchanged(key: &str, entry: Option<&KeyValue>) -> Self {
        match entry {
            Some(entry) => Self::ModRevision(key.to_owned(), entry.mod_revision),
            None => Self::Absent(key.to_owned()),
        }
    }

    /// Returns the key of the condition.
    pub fn key(&self) -> &str {
        match self {
            Self::ModRevision(key, _)
            | Self::CreateRevision(key, _)
            | Self::Value(key, _)
            | Self::Lease(key, _)
            | Self::Exists(key)
            | Self::Absent(key) => key,
        }
    }

    /// Returns true if the condition holds for this state of the key.
    pub fn holds(&self, entry: Option<&KeyValue>) -> bool {
        match (self, entry) {
            (Self::Absent(_), entry) => entry.is_none(),
            (_, None) => false,
            (Self::ModRevision(_, revision), Some(entry)) => entry.mod_revision == *revision,
            (Self::CreateRevision(_, revision), Some(entry)) => entry.create_revision == *revision,
            (Self::Value(_, value), Some(entry)) => entry.value == *value,
            (Self::Lease(_, lease), Some(entry)) => entry.lease == Some(*lease),
            (Self::Exists(_), Some(_)) => true,
        }
    }
}

/// One change of one key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TxnOp {
    /// Writes the key. `lease: None` detaches the key from any lease.
    Put {
        /// Path of the key.
        key: String,
        /// New value.
        value: Bytes,
        /// Lease to attach.
        lease: Option<LeaseId>,
    },
    /// Deletes the key; does nothing if the key does not exist.
    Delete {
        /// Path of the key.
        key: String,
    },
}

impl TxnOp {
    /// Returns the key that the operation changes.
    pub fn key(&self) -> &str {
        match self {
            Self::Put { key, .. } | Self::Delete { key } => key,
        }
    }
}

/// An atomic change: if every compare holds, all operations are applied at one revision; else nothing changes.
///
/// Two operations on one key are not allowed (etcd rejects them).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Transaction {
    /// Conditions that must hold.
    pub compares: Vec<Compare>,
    /// Operations to apply if all conditions hold.
    pub ops: Vec<TxnOp>,
    /// Keys to read if a condition does not hold.
    pub else_get: Vec<String>,
}

impl Transaction {
    /// Returns an empty transaction, which changes nothing and succeeds.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a condition.
    #[must_use]
    pub fn when(mut self, compare: Compare) -> Self {
        self.compares.push(compare);
        self
    }

    /// Adds a write.
    #[must_use]
    pub fn put(mut self, key: impl Into<String>, value: impl Into<Bytes>) -> Self {
        self.ops.push(TxnOp::Put { key: key.into(), value: value.into(), lease: None });
        self
    }

    /// Adds a write under a lease.
    #[must_use]
    pub fn put_leased(mut self, key: impl Into<String>, value: impl Into<Bytes>, lease: LeaseId) -> Self {
        self.ops.push(TxnOp::Put { key: key.into(), value: value.into(), lease: Some(lease) });
        self
    }

    /// Adds a deletion.
    #[must_use]
    pub fn delete(mut self, key: impl Into<String>) -> Self {
        self.ops.push(TxnOp::Delete { key: key.into() });
        self
    }

    /// Adds a key to read if a condition does not hold.
    #[must_use]
    pub fn else_get(mut self, key: impl Into<String>) -> Self {
        self.else_get.push(key.into());
        self
    }

    /// Rejects a transaction that is too large for etcd. The etcd store and the embedded store call this check first.
    ///
    /// # Errors
    /// `TooLarge`: one of the three lists is longer than `MAX_TRANSACTION_OPS`, or the keys and values of operations
    /// and compares together exceed `MAX_TRANSACTION_BYTES`.
    ///
    /// # Panics
    /// Two operations name the same key: a bug in the caller.
    pub fn check(&self) -> Result<(), MetaStoreError> {
        // The limit holds for each list alone: operations, compares and `else_get` keys.
        let ops = self.ops.len().max(self.compares.len()).max(self.else_get.len());
        let op_bytes = |op: &TxnOp| match op {
            TxnOp::Put { key, value, .. } => key.len() + value.len(),
            TxnOp::Delete { key } => key.len(),
        };
        let compare_bytes = |compare: &Compare| match compare {
            Compare::Value(key, value) => key.len() + value.len(),
            compare => compare.key().len(),
        };
        let bytes =
            self.ops.iter().map(op_bytes).sum::<usize>() + self.compares.iter().map(compare_bytes).sum::<usize>();
        if ops > limits::MAX_TRANSACTION_OPS || bytes > limits::MAX_TRANSACTION_BYTES {
            return Err(MetaStoreError::TooLarge { ops, bytes });
        }
        let mut keys: Vec<&str> = self.ops.iter().map(TxnOp::key).collect();
        keys.sort_unstable();
        let duplicate = keys.windows(2).find(|pair| pair[0] == pair[1]);
        assert!(duplicate.is_none(), "two operations of one transaction name {:?}", duplicate.map(|pair| pair[0]));
        Ok(())
    }
}

/// Result of a transaction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TxnOutcome {
    /// Every compare held and every operation was applied.
    Committed {
        /// Revision of the changes; the store's revision if nothing changed.
        revision: Revision,
    },
    /// A compare did not hold; nothing changed.
    CompareFailed {
        /// Revision of the store at which the compares were evaluated and the keys were read.
        revision: Revision,
        /// The keys of `else_get`, in their order; `None` for a key that does not exist.
        found: Vec<Option<KeyValue>>,
    },
}

/// One change that a watch received.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WatchEvent {
    /// The key was written.
    Put(KeyValue),
    /// The key was deleted, by an operation or with its lease.
    Delete {
        /// Path of the key.
        key: String,
        /// Revision of the deletion.
        revision: Revision,
    },
}

impl WatchEvent {
    /// Returns the key that changed.
    pub fn key(&self) -> &str {
        match self {
            Self::Put(entry) => &entry.key,
            Self::Delete { key, .. } => key,
        }
    }

    /// Returns the revision of the change.
    pub const fn revision(&self) -> Revision {
        match self {
            Self::Put(entry) => entry.mod_revision,
            Self::Delete { revision, .. } => *revision,
        }
    }
}

/// Changes of one or more whole transactions, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WatchBatch {
    /// The watch has received every change up to and including this revision.
    pub revision: Revision,
    /// The changes; empty if only the revision advanced.
    pub events: Vec<WatchEvent>,
}

/// A stream of changes. The stream ends after its first error; to continue, open a new watch.
pub struct Watch(BoxStream<'static, Result<WatchBatch, MetaStoreError>>);

impl Watch {
    /// Returns a watch that reads from this stream.
    pub fn new(stream: impl Stream<Item = Result<WatchBatch, MetaStoreError>> + Send + 'static) -> Self {
        Self(stream.boxed())
    }

    /// Returns the next changes; `None` after an error, or if the store was closed. Cancel safe: dropping the future
    /// loses no changes.
    pub async fn next(&mut self) -> Option<Result<WatchBatch, MetaStoreError>> {
        self.0.next().await
    }
}

impl Stream for Watch {
    type Item = Result<WatchBatch, MetaStoreError>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.0.poll_next_unpin(context)
    }
}

impl fmt::Debug for Watch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Watch")
    }
}

/// Error of a store request.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MetaStoreError {
    /// No usable result. For example, the store did not respond in time, the response was invalid, or the embedded
    /// store cannot write its file. Or a stored value that the caller needs cannot be read.
    #[error(
        "a request to the metadata store failed: {reason}{}",
        if *outcome_unknown { "; the change that it requested may have been made" } else { "" }
    )]
    Unavailable {
        /// Cause.
        reason: String,
        /// True if the request may have been applied. After a transaction, the caller must then read back before a
        /// retry, unless a second application is harmless.
        outcome_unknown: bool,
    },
    /// Every member would reject the request: authentication or authorization failed, or the server does not support or
    /// accept the request. A refused transaction was not applied.
    #[error("the metadata store rejected the request: {reason}")]
    Refused {
        /// The store's error text.
        reason: String,
    },
    /// The store's database is at its quota: reads work, writes fail until an operator frees space. The failed
    /// transaction was not applied.
    #[error(
        "the metadata store has no space left for writes ({reason}): compact its history, defragment each member, then \
         disarm the alarm (etcdctl compact, defrag, alarm disarm); waiting operations then continue automatically"
    )]
    NoSpace {
        /// The store's error text.
        reason: String,
    },
    /// The store returned to an older state, or is another store. Final for this process. A transaction may have been
    /// applied to that other state.
    #[error("{0}")]
    Regressed(Regression),
    /// The start revision of the watch is compacted: list again.
    #[error("changes from revision {from} on are compacted: the oldest available revision is {oldest}")]
    Compacted {
        /// Requested start revision of the watch.
        from: Revision,
        /// Oldest revision at which a watch can start; only a lower bound if etcd did not report that revision.
        oldest: Revision,
    },
    /// The transaction exceeds the size limits.
    #[error(
        "a transaction of {ops} operations and {bytes} bytes is too large: at most {} and {}",
        limits::MAX_TRANSACTION_OPS,
        limits::MAX_TRANSACTION_BYTES
    )]
    TooLarge {
        /// Number of operations, compares or reads: the largest of the three.
        ops: usize,
        /// Bytes of the keys and values in the operations and compares.
        bytes: usize,
    },
    /// The lease has ended or never existed.
    #[error("lease {lease} has ended")]
    LeaseGone {
        /// Id of the lease.
        lease: LeaseId,
    },
}

/// Reason to conclude that the store is another store, or an older copy of the one that this process read before.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Regression {
    /// The revision fell, or did not rise with a write.
    #[error(
        "the metadata store returned to an older state (revision {returned} after revision {newest}): if etcd was \
         restored from a backup, follow \"Restoring etcd\" in docs/operations.md, and restart this broker"
    )]
    Revision {
        /// Newest revision in any response or watch event before the call started.
        newest: Revision,
        /// Revision of the response: older than `newest`, or equal to it after a write.
        returned: Revision,
    },
    /// A response came from another etcd cluster than the first response.
    #[error(
        "the metadata store responded as etcd cluster {returned:x} after cluster {known:x}: set metadata.etcd to \
         members of one cluster; if etcd was recreated from a backup, follow \"Restoring etcd\" in docs/operations.md, \
         and restart this broker"
    )]
    Cluster {
        /// Cluster id of the first response.
        known: u64,
        /// Cluster id of the deviating response.
        returned: u64,
    },
}

impl MetaStoreError {
    /// Returns the error `Unavailable` of a request that changed nothing.
    pub fn unavailable(reason: impl fmt::Display) -> Self {
        Self::Unavailable { reason: reason.to_string(), outcome_unknown: false }
    }

    /// Returns the error `Unavailable` of a request that may have been applied.
    pub fn unknown(reason: impl fmt::Display) -> Self {
        Self::Unavailable { reason: reason.to_string(), outcome_unknown: true }
    }

    /// Returns true if the same call may succeed later. After `Refused` or `NoSpace`, an operator must first change the
    /// store's permissions or space.
    pub const fn retryable(&self) -> bool {
        matches!(self, Self::Unavailable { .. } | Self::Refused { .. } | Self::NoSpace { .. })
    }

    /// Returns true if a transaction that ended with this error may have been applied, and the caller must read back.
    /// Returns false for `Regressed`: the other state may contain the transaction, but no later read succeeds.
    pub const fn outcome_unknown(&self) -> bool {
        matches!(self, Self::Unavailable { outcome_unknown: true, .. })
    }
}

/// The metadata store: a map from paths to values with one history.
///
/// # Contract
///
/// The etcd store and the embedded store pass the tests of `conformance`. The terms are etcd's:
///
/// - **One history.** Transactions are applied one after another. A transaction that changes something gets the
///   previous revision plus one. A transaction that changes nothing (for example, deletes an absent key) gets no
///   revision of its own. Revisions never fall, also across restarts.
/// - **Linearizable.** `get`, `list` and `transact` observe every transaction that completed before they started. A
///   watch may lag.
/// - **Durable.** A transaction that returned `Committed` survives a power failure. The embedded store in memory is the
///   exception.
/// - **Unknown outcome.** After `Unavailable { outcome_unknown: true }`, or after the caller dropped the future, the
///   transaction was applied, was not applied, or will be applied later. The caller reads back, or makes the
///   transaction idempotent by its compares.
/// - **Watches** return every change to a key under the prefix from a revision on (inclusive), in the order of
///   revisions, or an error. A watch never splits a transaction. `Compacted`: the start revision is compacted. The
///   revision after the newest one is never compacted, so a watch from a list's `revision.next()` can start if it is
///   opened immediately.
/// - **Leases** end when they are revoked or not kept alive for their duration. Their keys are then deleted in one
///   transaction, which watches receive. A lease may end late. It ends early only when the embedded store is reopened,
///   after the process of its holder has exited. No code may depend on the delay.
pub trait MetaStore: Send + Sync + fmt::Debug {
    /// Reads one key.
    fn get<'a>(&'a self, key: &'a str) -> StoreFuture<'a, GetResult>;

    /// Reads every key under a prefix at one revision. The cost grows with the number and size of these keys.
    fn list<'a>(&'a self, prefix: &'a str) -> StoreFuture<'a, ListResult>;

    /// Applies a transaction.
    ///
    /// # Errors
    /// `TooLarge`, `LeaseGone`, `Refused` and `NoSpace` change nothing; `Unavailable` carries `outcome_unknown`. After
    /// `Regressed`, the transaction may have been applied.
    fn transact(&self, transaction: Transaction) -> StoreFuture<'_, TxnOutcome>;

    /// Watches the keys under a prefix from a revision on (inclusive). The revision after the newest one is allowed:
    /// the watch then waits for the next change. The error `Compacted` is returned by this call or by the watch.
    fn watch<'a>(&'a self, prefix: &'a str, from: Revision) -> StoreFuture<'a, Watch>;

    /// Creates a lease that lasts at least this long from now. A store may round the duration up.
    fn grant(&self, time: Duration) -> StoreFuture<'_, LeaseId>;

    /// Renews a lease for its duration from now. Fails with `LeaseGone` if the lease has ended.
    fn keep_alive(&self, lease: LeaseId) -> StoreFuture<'_, ()>;

    /// Ends a lease and deletes its keys. Succeeds if the lease has ended already.
    fn revoke(&self, lease: LeaseId) -> StoreFuture<'_, ()>;

    /// Returns the first regression that a `MonotonicStore` detected, after which it fails every request except
    /// `keep_alive` and `revoke`. Always `None` for a store without a `MonotonicStore`.
    fn regression(&self) -> Option<Regression> {
        None
    }
}
