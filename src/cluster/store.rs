//! The metadata store: the trait over etcd and the embedded store, and the words that both speak.
//!
//! It never interprets a value: keys are paths, values are bytes. What the keys mean is in `keys`.

use std::{
    fmt,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use futures::{Stream, StreamExt as _, future::BoxFuture, stream::BoxStream};

use crate::limits;

/// What the store's methods return.
pub type Answer<'a, T> = BoxFuture<'a, Result<T, StoreError>>;

/// A moment of the whole store: grows by one with every transaction that changed something.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Revision(pub u64);

impl Revision {
    /// Before the first change: no key has it, every transaction's is greater.
    pub const ZERO: Self = Self(0);

    /// The revision after this one: where a watch goes on from a listing.
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

/// A lease: keys put under it vanish when it ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LeaseId(pub i64);

impl fmt::Display for LeaseId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

/// One key as it stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The key.
    pub key: String,
    /// Its value.
    pub value: Bytes,
    /// The transaction that made the key. Deleted and made again, it gets a new one.
    pub create_revision: Revision,
    /// The transaction that last wrote it.
    pub mod_revision: Revision,
    /// The lease that it hangs on.
    pub lease: Option<LeaseId>,
}

/// A key, or its absence, at a revision.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reading {
    /// The store's revision when this was true.
    pub revision: Revision,
    /// The key; `None` when there is none.
    pub entry: Option<Entry>,
}

/// Every key under a prefix, all at the same revision.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listing {
    /// The store's revision when this was true.
    pub revision: Revision,
    /// The keys, in the order of their bytes.
    pub entries: Vec<Entry>,
}

/// A condition on one key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Compare {
    /// The key exists and was last written by this transaction.
    ModRevision(String, Revision),
    /// The key exists and was made by this transaction.
    CreateRevision(String, Revision),
    /// The key exists and has this value.
    Value(String, Bytes),
    /// The key exists and hangs on this lease.
    Lease(String, LeaseId),
    /// The key exists.
    Exists(String),
    /// The key does not exist.
    Absent(String),
}

impl Compare {
    /// The key is still what was read.
    pub fn unchanged(key: &str, entry: Option<&Entry>) -> Self {
        match entry {
            Some(entry) => Self::ModRevision(key.to_owned(), entry.mod_revision),
            None => Self::Absent(key.to_owned()),
        }
    }

    /// The key that it is about.
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

    /// Whether it holds for what the key is.
    pub fn holds(&self, entry: Option<&Entry>) -> bool {
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
pub enum Op {
    /// Writes the key. `lease: None` takes it off the lease that it may hang on.
    Put {
        /// The key.
        key: String,
        /// Its new value.
        value: Bytes,
        /// The lease to hang it on.
        lease: Option<LeaseId>,
    },
    /// Takes the key away; nothing when there is none.
    Delete {
        /// The key.
        key: String,
    },
}

impl Op {
    /// The key that it changes.
    pub fn key(&self) -> &str {
        match self {
            Self::Put { key, .. } | Self::Delete { key } => key,
        }
    }
}

/// All or nothing: when every compare holds, every operation is done, at one revision; else nothing changes.
///
/// No key may be named by two operations (etcd refuses that).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Transaction {
    /// What must hold.
    pub compares: Vec<Compare>,
    /// What is done when all of it holds.
    pub ops: Vec<Op>,
    /// Which keys to read when some of it does not.
    pub else_get: Vec<String>,
}

impl Transaction {
    /// An empty one: it changes nothing and succeeds.
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
        self.ops.push(Op::Put { key: key.into(), value: value.into(), lease: None });
        self
    }

    /// Adds a write under a lease.
    #[must_use]
    pub fn put_leased(mut self, key: impl Into<String>, value: impl Into<Bytes>, lease: LeaseId) -> Self {
        self.ops.push(Op::Put { key: key.into(), value: value.into(), lease: Some(lease) });
        self
    }

    /// Adds a deletion.
    #[must_use]
    pub fn delete(mut self, key: impl Into<String>) -> Self {
        self.ops.push(Op::Delete { key: key.into() });
        self
    }

    /// Adds a key to read when the conditions do not hold.
    #[must_use]
    pub fn else_get(mut self, key: impl Into<String>) -> Self {
        self.else_get.push(key.into());
        self
    }

    /// Refuses what etcd would refuse for its size. Every implementation calls it first.
    ///
    /// # Panics
    /// When two operations name the same key: a bug in the caller.
    pub fn check(&self) -> Result<(), StoreError> {
        let ops = self.ops.len().max(self.compares.len()).max(self.else_get.len());
        let put = |op: &Op| match op {
            Op::Put { key, value, .. } => key.len() + value.len(),
            Op::Delete { key } => key.len(),
        };
        let compared = |compare: &Compare| match compare {
            Compare::Value(key, value) => key.len() + value.len(),
            other => other.key().len(),
        };
        let bytes = self.ops.iter().map(put).sum::<usize>() + self.compares.iter().map(compared).sum::<usize>();
        if ops > limits::MAX_TRANSACTION_OPS || bytes > limits::MAX_TRANSACTION_BYTES {
            return Err(StoreError::TooLarge { ops, bytes });
        }
        let mut keys: Vec<&str> = self.ops.iter().map(Op::key).collect();
        keys.sort_unstable();
        let twice = keys.windows(2).find(|pair| pair[0] == pair[1]);
        assert!(twice.is_none(), "two operations of one transaction name {:?}", twice.map(|pair| pair[0]));
        Ok(())
    }
}

/// What became of a transaction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Every compare held and every operation was done.
    Done {
        /// The revision of the changes; the store's own when nothing changed.
        revision: Revision,
    },
    /// Some compare did not hold; nothing changed.
    Refused {
        /// The store's revision when the keys were read.
        revision: Revision,
        /// The keys of `else_get`, in their order.
        found: Vec<Option<Entry>>,
    },
}

/// One change that a watch saw.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The key was written.
    Put(Entry),
    /// The key was deleted, by an operation or with its lease.
    Delete {
        /// The key.
        key: String,
        /// The transaction that deleted it.
        revision: Revision,
    },
}

impl Event {
    /// The key that changed.
    pub fn key(&self) -> &str {
        match self {
            Self::Put(entry) => &entry.key,
            Self::Delete { key, .. } => key,
        }
    }

    /// The transaction that changed it.
    pub const fn revision(&self) -> Revision {
        match self {
            Self::Put(entry) => entry.mod_revision,
            Self::Delete { revision, .. } => *revision,
        }
    }
}

/// Changes of one or more whole transactions, in their order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Changes {
    /// Everything up to and with this revision has been seen by this watch.
    pub revision: Revision,
    /// The changes; empty when only the revision went on.
    pub events: Vec<Event>,
}

/// A stream of changes. It ends after its first error; who wants to go on opens another.
pub struct Watch(BoxStream<'static, Result<Changes, StoreError>>);

impl Watch {
    /// A watch that reads from this stream.
    pub fn new(stream: impl Stream<Item = Result<Changes, StoreError>> + Send + 'static) -> Self {
        Self(stream.boxed())
    }

    /// The next changes; `None` when the store was closed. May be dropped at any moment without losing any.
    pub async fn next(&mut self) -> Option<Result<Changes, StoreError>> {
        self.0.next().await
    }
}

impl Stream for Watch {
    type Item = Result<Changes, StoreError>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.0.poll_next_unpin(context)
    }
}

impl fmt::Debug for Watch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Watch")
    }
}

/// Why the store did not do what it was asked.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// It did not answer as it should.
    #[error("the metadata store does not answer: {why}")]
    Unavailable {
        /// What happened.
        why: String,
        /// Whether a transaction may have been done all the same. Then read back before trying again.
        outcome_unknown: bool,
    },
    /// It answered, and would not do it: the login, or what this user may do. Nothing was changed.
    #[error("the metadata store refuses: {why}")]
    Refused {
        /// Its words.
        why: String,
    },
    /// Its database is at its quota: it reads, and writes nothing until a person makes room. Nothing was changed.
    #[error(
        "the metadata store has no space left for writes ({why}): compact its history, defragment each member, then disarm the alarm \
         (etcdctl compact, defrag, alarm disarm); what waits goes on by itself then"
    )]
    NoSpace {
        /// Its words.
        why: String,
    },
    /// It is not what it was: final for this process. A transaction may have been done, in a history that is not ours.
    #[error("{0}")]
    Regressed(Regression),
    /// The changes from this revision on are no longer kept: list again.
    #[error("changes from revision {from} on are no longer kept; the oldest is {oldest}")]
    Compacted {
        /// Where the watch wanted to begin.
        from: Revision,
        /// Where it could begin.
        oldest: Revision,
    },
    /// The transaction is larger than a store takes.
    #[error(
        "a transaction of {ops} operations and {bytes} bytes is too large: at most {} and {}",
        limits::MAX_TRANSACTION_OPS,
        limits::MAX_TRANSACTION_BYTES
    )]
    TooLarge {
        /// Operations, compares or reads: whichever are most.
        ops: usize,
        /// Bytes of keys and values.
        bytes: usize,
    },
    /// The lease has ended, or never was.
    #[error("lease {lease} has ended")]
    LeaseGone {
        /// The lease.
        lease: LeaseId,
    },
}

/// Proof that the store is not the one that this process read before, or an older copy of it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Regression {
    /// Its revision fell.
    #[error(
        "the metadata store answered with revision {answered} after revision {seen} was known: was etcd restored from a backup? Follow \
         \"Restoring etcd\" in docs/operations.md, and restart this broker"
    )]
    Revision {
        /// The newest revision that was known when the call was made.
        seen: Revision,
        /// The revision of the answer; of a write, one that is not newer.
        answered: Revision,
    },
    /// It is another etcd cluster.
    #[error(
        "the metadata store answered as etcd cluster {answered:x}, and is {known:x} to this broker: name the members of one cluster in \
         metadata.etcd. If etcd was made anew from a backup, follow \"Restoring etcd\" in docs/operations.md, and restart this broker"
    )]
    Cluster {
        /// The id that answered first.
        known: u64,
        /// The other one.
        answered: u64,
    },
}

impl StoreError {
    /// An error that says that nothing was changed.
    pub fn unavailable(why: impl fmt::Display) -> Self {
        Self::Unavailable { why: why.to_string(), outcome_unknown: false }
    }

    /// An error after which a change may or may not have been made.
    pub fn unknown(why: impl fmt::Display) -> Self {
        Self::Unavailable { why: why.to_string(), outcome_unknown: true }
    }

    /// Whether the same call may succeed later. What is refused may be allowed later, when somebody sees to it.
    pub const fn retryable(&self) -> bool {
        matches!(self, Self::Unavailable { .. } | Self::Refused { .. } | Self::NoSpace { .. })
    }

    /// Whether a transaction that ended so may have been done.
    pub const fn outcome_unknown(&self) -> bool {
        matches!(self, Self::Unavailable { outcome_unknown: true, .. })
    }
}

/// The little that all brokers must agree on: a map from paths to values with one history.
///
/// # Contract
///
/// Every implementation passes `conformance`. The words are etcd's, so that etcd fits without a layer between:
///
/// - **One history.** Transactions take effect one after another. Each that changed something has the revision of the
///   one before plus one; a transaction that changes nothing (also: deletes what is not there) has none. Revisions
///   never fall, not over restarts either.
/// - **Linearizable.** `get`, `list` and `transact` see every transaction that was answered before they began. A watch
///   lags.
/// - **Done means kept.** A transaction answered with `Done` survives the loss of power.
/// - **Unknown outcome.** After `Unavailable { outcome_unknown: true }`, or when the caller drops the future, a
///   transaction was done, was not done, or will be done a little later. The caller reads back, or makes the
///   transaction one that may be done twice (compares see to that).
/// - **Watches** give every change to a key under the prefix from a revision on (inclusive), in the order of revisions,
///   never two halves of one transaction apart, or an error. `Compacted`: the beginning is not kept any more.
///   The present never is compacted: a watch from a listing's `revision.next()`, opened at once, can begin.
/// - **Leases** end when they are not kept alive for their time, or are revoked; their keys are deleted in one
///   transaction, which watches see. A lease may end late and never early. Nothing may depend on how late.
pub trait MetaStore: Send + Sync + fmt::Debug {
    /// Reads one key.
    fn get<'a>(&'a self, key: &'a str) -> Answer<'a, Reading>;

    /// Reads every key under a prefix at one revision. Costs what there is under it.
    fn list<'a>(&'a self, prefix: &'a str) -> Answer<'a, Listing>;

    /// Does a transaction. Errors: `TooLarge` and `LeaseGone` change nothing; `Unavailable` says itself.
    fn transact(&self, transaction: Transaction) -> Answer<'_, Outcome>;

    /// Watches the keys under a prefix from a revision on (inclusive; one not yet reached waits for it).
    fn watch<'a>(&'a self, prefix: &'a str, from: Revision) -> Answer<'a, Watch>;

    /// Makes a lease that lives at least this long from now. Stores may round up.
    fn grant(&self, time: Duration) -> Answer<'_, LeaseId>;

    /// Lets a lease live for its time again, from now. `LeaseGone` when it has ended.
    fn keep_alive(&self, lease: LeaseId) -> Answer<'_, ()>;

    /// Ends a lease and deletes its keys. No error when it has ended already.
    fn revoke(&self, lease: LeaseId) -> Answer<'_, ()>;

    /// Why the store is used no more, where it was found to have gone back.
    fn regression(&self) -> Option<Regression> {
        None
    }
}
