//! The metadata store of a cluster with several brokers: an etcd cluster.
//!
//! # Overview
//!
//! [`EtcdStore`] sends each request to one member, through one client per member that connects on first use.
//! `etcd_client`'s balancer is not used: it chooses members by itself, fails at once while one is down, and hides
//! whether a request left this process. The modules:
//!
//! | module | content |
//! | --- | --- |
//! | `members` | the clients, and the member that is called first |
//! | `call` | one call, with as many attempts as are safe |
//! | `watch` | a watch that survives the failure of its member |
//! | `convert` | conversion between the store's types and etcd's |
//!
//! # Retries
//!
//! An attempt ends after `request_timeout`. The pure function `error::classify` decides the outcome of a failed
//! request: *not done* (no connection, no leader), *refused* (every member would reject it), or *unknown*. Reads,
//! keepalives, revocations and grants continue at the next member after anything but a refusal, until
//! `call::CALL_DEADLINE` is over. A grant whose response was lost expires by itself. Transactions continue only after
//! *not done*. An unknown outcome is never retried here; the caller reads back, since the retry of an applied
//! transaction would fail its compares.
//!
//! # Unresponsive members
//!
//! A member whose host disappears does not close its connections. A call that times out on a connection without any
//! response meanwhile replaces the connection. A watch requests progress after two seconds without a message, and moves
//! to another member after two more. After three members in a row without a response, the watch ends with an error, and
//! the metadata cache relists.
//!
//! HTTP/2 pings are not used: etcd permits one per five seconds, and none without active streams, and closes
//! connections of clients that send more. Observed with one ping every two seconds: each connection ended after eight,
//! with its watches and calls.
//!
//! # Invariants
//!
//! - All reads are linearizable. A transaction without writes includes the read of a key: without that read, a lagging
//!   member would respond from its local state.
//! - All members that respond belong to the etcd cluster that responded first; revisions of another cluster are
//!   unrelated.
//! - No response of etcd causes a panic: only functions of `etcd_client` that cannot panic are used (see `convert`).
//!
//! # Crash
//!
//! Leases expire and delete their keys; watches end with their connections.

use std::{fmt, num::NonZeroI64, sync::Arc, time::Duration};

use self::{
    call::RetryPolicy,
    error::EtcdCallError,
    members::{MemberChannel, Members},
    watch::ResumableWatch,
};
use super::store::{
    GetResult, KeyValue, LeaseId, ListResult, MetaStore, Revision, StoreFuture, Transaction, TxnOutcome, Watch,
};

mod call;
mod convert;
mod error;
mod members;
mod options;
mod watch;

#[cfg(test)]
mod tests;

pub use options::{EtcdIdentity, EtcdLogin, EtcdOptions, EtcdOptionsError, EtcdTls};

/// Maximum number of keys in one page of a list, at first: reduced if a page would be too large.
const PAGE_KEYS: i64 = 2000;

/// Maximum number of attempts of a list whose revision is compacted meanwhile.
const MAX_LIST_ATTEMPTS: usize = 3;

/// Shortest lease that etcd honours, in seconds: the time of an election.
const MIN_LEASE_S: i64 = 2;

/// An etcd cluster as the metadata store. Clones share the connections.
#[derive(Clone)]
pub struct EtcdStore {
    members: Arc<Members>,
}

/// Status of one member.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemberStatus {
    /// Version, such as `3.5.16`.
    pub version: String,
    /// True if the member is etcd's leader.
    pub leader: bool,
    /// Size of the database in bytes.
    pub database_bytes: u64,
}

impl fmt::Debug for EtcdStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EtcdStore").field("endpoints", &self.members.endpoints()).finish()
    }
}

impl EtcdStore {
    /// Checks the options. The first call connects.
    pub async fn open(options: EtcdOptions) -> Result<Self, EtcdOptionsError> {
        Ok(Self { members: Arc::new(Members::new(options).await?) })
    }

    /// Requests the status of every member, in the order of the options. Returns each endpoint with its status or
    /// error.
    pub async fn status(&self) -> Vec<(String, Result<MemberStatus, String>)> {
        let requests = self.members.each().map(|member| async move {
            let status = member.status().await;
            (member.endpoint().to_owned(), status)
        });
        futures::future::join_all(requests).await
    }

    async fn read(&self, key: &str, at: Option<Revision>) -> Result<GetResult, EtcdCallError> {
        self.members
            .call(RetryPolicy::Always, |channel: MemberChannel| async move {
                let mut response = channel.kv().get(key, Some(convert::one(at))).await?;
                let revision = channel.revision(response.header())?;
                let entry = response.take_kvs().pop().and_then(convert::entry);
                Ok(GetResult { revision, entry })
            })
            .await
    }

    /// Reads all pages of a list at the revision of the first page.
    async fn pages(&self, prefix: &str) -> Result<ListResult, EtcdCallError> {
        let (mut at, mut entries, mut limit) = (None, Vec::new(), PAGE_KEYS);
        let mut from = convert::first(prefix);
        loop {
            let options = &convert::page(prefix, limit, at);
            let page = self.members.call(RetryPolicy::Always, |channel: MemberChannel| {
                let from = from.clone();
                async move {
                    let mut response = channel.kv().get(from, Some(options.clone())).await?;
                    let revision = channel.revision(response.header())?;
                    let more = response.more();
                    Ok((revision, more, response.take_kvs()))
                }
            });
            match page.await {
                Ok((revision, more, kvs)) => {
                    let revision = *at.get_or_insert(revision);
                    match kvs.last().filter(|_| more) {
                        Some(last) => from = convert::after(last.key()),
                        None => {
                            entries.extend(kvs.into_iter().filter_map(convert::entry));
                            return Ok(ListResult { revision, entries });
                        }
                    }
                    entries.extend(kvs.into_iter().filter_map(convert::entry));
                }
                Err(EtcdCallError::TooLong(_)) if limit > 1 => limit = (limit / 8).max(1),
                Err(error) => return Err(error),
            }
        }
    }

    /// Reads the `else_get` keys of a failed transaction at that transaction's revision.
    ///
    /// The reads are separate requests, because `etcd_client` panics on a transaction operation without a response.
    async fn read_all_at(&self, keys: &[String], at: Revision) -> Result<Vec<Option<KeyValue>>, EtcdCallError> {
        let reads = keys.iter().map(|key| self.read(key, Some(at)));
        let readings = futures::future::try_join_all(reads).await?;
        Ok(readings.into_iter().map(|reading| reading.entry).collect())
    }
}

impl MetaStore for EtcdStore {
    fn get<'a>(&'a self, key: &'a str) -> StoreFuture<'a, GetResult> {
        Box::pin(async move { self.read(key, None).await.map_err(EtcdCallError::of_read) })
    }

    fn list<'a>(&'a self, prefix: &'a str) -> StoreFuture<'a, ListResult> {
        Box::pin(async move {
            let mut attempt = 1;
            loop {
                match self.pages(prefix).await {
                    Err(EtcdCallError::Compacted) if attempt < MAX_LIST_ATTEMPTS => attempt += 1,
                    other => return other.map_err(EtcdCallError::of_read),
                }
            }
        })
    }

    fn transact(&self, transaction: Transaction) -> StoreFuture<'_, TxnOutcome> {
        Box::pin(async move {
            transaction.check()?;
            let request = &convert::transaction(&transaction);
            let done = self.members.call(RetryPolicy::WhenNotDone, |channel: MemberChannel| async move {
                let response = channel.kv().txn(request.clone()).await?;
                Ok((response.succeeded(), channel.revision(response.header())?))
            });
            match done.await {
                Ok((true, revision)) => Ok(TxnOutcome::Committed { revision }),
                Ok((false, revision)) => {
                    let found =
                        self.read_all_at(&transaction.else_get, revision).await.map_err(EtcdCallError::of_read)?;
                    Ok(TxnOutcome::CompareFailed { revision, found })
                }
                Err(error) => Err(error.of_transaction(&transaction)),
            }
        })
    }

    fn watch<'a>(&'a self, prefix: &'a str, from: Revision) -> StoreFuture<'a, Watch> {
        Box::pin(async move {
            let resuming = ResumableWatch::start(self.members.clone(), prefix, from).await?;
            Ok(Watch::new(futures::stream::unfold(Some(resuming), watch::step)))
        })
    }

    fn grant(&self, time: Duration) -> StoreFuture<'_, LeaseId> {
        let whole_seconds = i64::try_from(time.as_secs()).unwrap_or(i64::MAX);
        let seconds = whole_seconds.saturating_add(i64::from(time.subsec_nanos() > 0)).max(MIN_LEASE_S);
        Box::pin(async move {
            let granted = self.members.call(RetryPolicy::Always, |channel: MemberChannel| async move {
                let response = channel.leases().grant(seconds, None).await?;
                channel.revision(response.header())?;
                // Zero means no lease in etcd.
                NonZeroI64::new(response.id()).ok_or_else(|| convert::invalid_response("a lease without an id"))
            });
            granted.await.map(|id| LeaseId(id.get())).map_err(EtcdCallError::of_read)
        })
    }

    fn keep_alive(&self, lease: LeaseId) -> StoreFuture<'_, ()> {
        Box::pin(async move {
            let kept = self.members.call(RetryPolicy::Always, |channel: MemberChannel| async move {
                // Sends one request and waits for its response. The stream ends here: a stream that stays open can
                // stall.
                channel.leases().keep_alive(lease.0).await.map(|_keeper| ())
            });
            kept.await.map_err(|error| error.of_lease(lease))
        })
    }

    fn revoke(&self, lease: LeaseId) -> StoreFuture<'_, ()> {
        Box::pin(async move {
            let revoked = self.members.call(RetryPolicy::Always, |channel: MemberChannel| async move {
                channel.leases().revoke(lease.0).await.map(|_| ())
            });
            match revoked.await {
                Err(EtcdCallError::LeaseGone) => Ok(()),
                other => other.map_err(|error| error.of_lease(lease)),
            }
        })
    }
}
