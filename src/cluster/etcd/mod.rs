//! The metadata store of a cluster with several brokers: an etcd cluster.
//!
//! # Overview
//!
//! [`EtcdStore`] sends each request to one member, through one client per member that connects on first use. The
//! balancer of `etcd_client` is not used. The balancer chooses members by itself, fails at once while one member is
//! down, and hides whether a request left this process. The modules:
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
//! An attempt waits at most `request_timeout` for its response. The pure function `error::classify` decides the class
//! of a failed request. The main classes are *not done* (no connection, no leader), *refused* (every member would
//! reject it), and *unknown*. After *not done* or *unknown*, reads, starts of watches, keepalives, revocations and
//! grants continue at the next member, until `call::CALL_DEADLINE` has passed. If the response to a grant is lost, its
//! lease expires unused. Transactions continue only after *not done*. After *unknown*, the caller reads back, since the
//! retry of an applied transaction would fail its compares.
//!
//! # Unresponsive members
//!
//! A member whose host disappears does not close its connections. If a call times out and its connection received no
//! response meanwhile, the connection is replaced. A connection with a login is replaced after every call that times
//! out, because a restored etcd can delay all requests with the token of the login (see `Member::attempt`). A watch
//! requests progress after two seconds without a message, and moves to another member after two more. After three
//! streams in a row without a response, the watch ends with an error, and the metadata cache relists.
//!
//! HTTP/2 pings are not used. etcd permits one ping per five seconds, and none without active streams, and closes the
//! connections of clients that send more. With one ping every two seconds, etcd closed each connection after eight
//! seconds, which ended its watches and calls.
//!
//! # Invariants
//!
//! - All reads are linearizable. A transaction without writes includes the read of a key: without that read, a lagging
//!   member would respond from its local state.
//! - Every accepted response comes from the etcd cluster that responded first, because revisions of another cluster are
//!   unrelated. Only the responses to keepalives and revocations, whose revisions are not used, are not checked.
//! - No response of etcd causes a panic: only functions of `etcd_client` that cannot panic are used (see `convert`).
//!
//! # Crash
//!
//! When this process exits, its connections close, which ends its watches in etcd. Its leases expire, which deletes
//! their keys.

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

/// Maximum number of keys in one page of a list. After a page that exceeds the size limit of a response, the pages of
/// that list have fewer keys.
const PAGE_KEYS: i64 = 2000;

/// Maximum number of attempts of a list whose revision etcd compacts between two pages.
const MAX_LIST_ATTEMPTS: usize = 3;

/// Shortest lease that etcd grants with its default election timeout, in seconds. etcd extends shorter leases to it.
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

    /// Requests the status of every member. Returns each endpoint with its status or error, in the order of the
    /// options.
    pub async fn status(&self) -> Vec<(String, Result<MemberStatus, String>)> {
        let requests = self.members.iter().map(|member| async move {
            let status = member.status().await;
            (member.endpoint().to_owned(), status)
        });
        futures::future::join_all(requests).await
    }

    /// Reads one key, at revision `at` or, if that is `None`, at the newest revision.
    async fn read(&self, key: &str, at: Option<Revision>) -> Result<GetResult, EtcdCallError> {
        self.members
            .call(RetryPolicy::Always, |channel: MemberChannel| async move {
                let mut response = channel.kv().get(key, Some(convert::get_options(at))).await?;
                let revision = channel.revision(response.header())?;
                let entry = response.take_kvs().pop().and_then(convert::entry);
                Ok(GetResult { revision, entry })
            })
            .await
    }

    /// Reads all pages of a list at the revision of the first page. A page that exceeds the size limit of a response is
    /// read again with fewer keys.
    async fn read_pages(&self, prefix: &str) -> Result<ListResult, EtcdCallError> {
        let (mut list_revision, mut entries, mut limit) = (None, Vec::new(), PAGE_KEYS);
        let mut start_key = convert::first_key(prefix);
        loop {
            let options = &convert::page_options(prefix, limit, list_revision);
            let page = self.members.call(RetryPolicy::Always, |channel: MemberChannel| {
                let start_key = start_key.clone();
                async move {
                    let mut response = channel.kv().get(start_key, Some(options.clone())).await?;
                    let revision = channel.revision(response.header())?;
                    let more = response.more();
                    Ok((revision, more, response.take_kvs()))
                }
            });
            match page.await {
                Ok((revision, more, kvs)) => {
                    let revision = *list_revision.get_or_insert(revision);
                    let next_start = kvs.last().filter(|_| more).map(|last| convert::key_after(last.key()));
                    entries.extend(kvs.into_iter().filter_map(convert::entry));
                    match next_start {
                        Some(key) => start_key = key,
                        None => return Ok(ListResult { revision, entries }),
                    }
                }
                Err(EtcdCallError::TooLong(_)) if limit > 1 => limit = (limit / 8).max(1),
                Err(error) => return Err(error),
            }
        }
    }

    /// Reads the `else_get` keys of a transaction whose compares failed, at the revision of its response.
    ///
    /// The reads are separate requests, because `etcd_client` panics on a transaction operation without a response.
    async fn read_all_at(&self, keys: &[String], at: Revision) -> Result<Vec<Option<KeyValue>>, EtcdCallError> {
        let reads = keys.iter().map(|key| self.read(key, Some(at)));
        let results = futures::future::try_join_all(reads).await?;
        Ok(results.into_iter().map(|result| result.entry).collect())
    }
}

impl MetaStore for EtcdStore {
    fn get<'a>(&'a self, key: &'a str) -> StoreFuture<'a, GetResult> {
        Box::pin(async move { self.read(key, None).await.map_err(EtcdCallError::into_read_error) })
    }

    fn list<'a>(&'a self, prefix: &'a str) -> StoreFuture<'a, ListResult> {
        Box::pin(async move {
            let mut attempt = 1;
            loop {
                match self.read_pages(prefix).await {
                    Err(EtcdCallError::Compacted) if attempt < MAX_LIST_ATTEMPTS => attempt += 1,
                    result => return result.map_err(EtcdCallError::into_read_error),
                }
            }
        })
    }

    fn transact(&self, transaction: Transaction) -> StoreFuture<'_, TxnOutcome> {
        Box::pin(async move {
            transaction.check()?;
            let request = &convert::transaction(&transaction);
            let call = self.members.call(RetryPolicy::WhenNotDone, |channel: MemberChannel| async move {
                let response = channel.kv().txn(request.clone()).await?;
                Ok((response.succeeded(), channel.revision(response.header())?))
            });
            match call.await {
                Ok((true, revision)) => Ok(TxnOutcome::Committed { revision }),
                Ok((false, revision)) => {
                    let found = self
                        .read_all_at(&transaction.else_get, revision)
                        .await
                        .map_err(EtcdCallError::into_read_error)?;
                    Ok(TxnOutcome::CompareFailed { revision, found })
                }
                Err(error) => Err(error.into_transaction_error(&transaction)),
            }
        })
    }

    fn watch<'a>(&'a self, prefix: &'a str, from: Revision) -> StoreFuture<'a, Watch> {
        Box::pin(async move {
            let watch = ResumableWatch::start(self.members.clone(), prefix, from).await?;
            Ok(Watch::new(futures::stream::unfold(Some(watch), watch::step)))
        })
    }

    fn grant(&self, time: Duration) -> StoreFuture<'_, LeaseId> {
        let whole_seconds = i64::try_from(time.as_secs()).unwrap_or(i64::MAX);
        let seconds = whole_seconds.saturating_add(i64::from(time.subsec_nanos() > 0)).max(MIN_LEASE_S);
        Box::pin(async move {
            let call = self.members.call(RetryPolicy::Always, |channel: MemberChannel| async move {
                let response = channel.leases().grant(seconds, None).await?;
                channel.revision(response.header())?;
                // Zero means no lease in etcd.
                NonZeroI64::new(response.id()).ok_or_else(|| convert::invalid_response_error("a lease without an id"))
            });
            call.await.map(|id| LeaseId(id.get())).map_err(EtcdCallError::into_read_error)
        })
    }

    fn keep_alive(&self, lease: LeaseId) -> StoreFuture<'_, ()> {
        Box::pin(async move {
            let call = self.members.call(RetryPolicy::Always, |channel: MemberChannel| async move {
                // Sends one request, waits for its response and closes the stream: a stream that stays open can stall.
                channel.leases().keep_alive(lease.0).await.map(|_keeper| ())
            });
            call.await.map_err(|error| error.into_lease_error(lease))
        })
    }

    fn revoke(&self, lease: LeaseId) -> StoreFuture<'_, ()> {
        Box::pin(async move {
            let call = self.members.call(RetryPolicy::Always, |channel: MemberChannel| async move {
                channel.leases().revoke(lease.0).await.map(|_| ())
            });
            match call.await {
                Err(EtcdCallError::LeaseGone) => Ok(()),
                result => result.map_err(|error| error.into_lease_error(lease)),
            }
        })
    }
}
