//! The metadata store of several brokers: an etcd cluster.
//!
//! # Overview
//!
//! [`EtcdStore`] speaks to one member at a time, each through a client of its own that connects when it is first used.
//! `etcd_client`'s balancer over several members would pick one by itself, fail at once while one of them is down, and
//! hide whether a request left this process; here the choice is ours. `members` holds the clients and who is asked first,
//! `call` makes one call of as many attempts as are safe, `watch` is a watch that outlives its member, `text` translates.
//!
//! # Retries
//!
//! An attempt ends after `call_timeout`. What it says of a request that failed is decided by the pure `call::classify`:
//! *not done* (no connection, no leader), *refused* (no member would do it), or *unknown*. Reads, keep-alives,
//! revocations and grants go on to the next member after anything but a refusal, until `call::PATIENCE` is over; a grant
//! that was made and not heard of ends by itself. Transactions go on only after *not done*. An unknown outcome is never
//! repeated here, the caller reads back: a compare would refuse the repetition of what was done.
//!
//! # Silence
//!
//! A member whose host vanished does not close its connections. A call that times out on a connection which said nothing
//! meanwhile replaces the connection; a watch asks for a sign of life every two seconds and moves on after four without
//! one. It asks at once, and waits for one second, where its connection may stand still: a call on it was given up, or an
//! answer elsewhere named a newer revision a quarter of a second ago. What others write to the same etcd is such news too, so
//! a watch may ask four times a second.
//!
//! HTTP/2 pings are not used: etcd allows one in five seconds, and none while nothing is under way, and hangs up on who
//! sends more. Seen with one every two seconds: each connection ended after eight, its watches and calls with it.
//!
//! # Invariants
//!
//! - Everything is read linearizably. A transaction that only reads says so to etcd with a read of a key: without one
//!   a member that lags behind would answer from what it has.
//! - All members that answer belong to the etcd cluster that answered first; another one's revisions mean something else.
//! - Nothing that etcd may answer panics: of `etcd_client` only what cannot is used (see `text`).
//!
//! # What a crash leaves
//!
//! Leases end by themselves and take their keys along; watches end with their connections.

use std::{fmt, num::NonZeroI64, sync::Arc, time::Duration};

use self::{
    call::{Failed, Repeat},
    members::{Line, Members},
    watch::Resuming,
};
use super::store::{Answer, Entry, LeaseId, Listing, MetaStore, Outcome, Reading, Revision, Transaction, Watch};

mod call;
mod members;
mod options;
mod text;
mod watch;

#[cfg(test)]
mod tests;

pub use options::{EtcdIdentity, EtcdLogin, EtcdOptions, EtcdOptionsError, EtcdTls};

/// Most keys in one answer to a listing, at first: fewer when one answer would be too large.
const PAGE: i64 = 2000;

/// How often a listing begins anew because its revision was compacted meanwhile.
const LISTINGS: usize = 3;

/// Shortest lease that etcd keeps to, in seconds: an election's time.
const SHORTEST_LEASE: i64 = 2;

/// An etcd cluster as the metadata store. Clones share the connections.
#[derive(Clone)]
pub struct EtcdStore {
    members: Arc<Members>,
}

/// What one member says about itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemberStatus {
    /// Its version, such as `3.5.16`.
    pub version: String,
    /// Whether it is etcd's leader now.
    pub leader: bool,
    /// Bytes of its database.
    pub database_bytes: u64,
}

impl fmt::Debug for EtcdStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EtcdStore").field("endpoints", &self.members.endpoints()).finish()
    }
}

impl EtcdStore {
    /// Checks the options and connects to nothing yet: that happens with the first call.
    pub async fn open(options: EtcdOptions) -> Result<Self, EtcdOptionsError> {
        Ok(Self { members: Arc::new(Members::new(options).await?) })
    }

    /// Asks every member, in the order of the options: its endpoint, and what it says or why it says nothing.
    pub async fn status(&self) -> Vec<(String, Result<MemberStatus, String>)> {
        let asked = self.members.each().map(|member| async move {
            let answer = member.status().await;
            (member.endpoint().to_owned(), answer)
        });
        futures::future::join_all(asked).await
    }

    async fn read(&self, key: &str, at: Option<Revision>) -> Result<Reading, Failed> {
        self.members
            .call(Repeat::Always, |line: Line| async move {
                let mut response = line.kv().get(key, Some(text::one(at))).await?;
                let revision = line.revision(response.header())?;
                let entry = response.take_kvs().pop().and_then(text::entry);
                Ok(Reading { revision, entry })
            })
            .await
    }

    /// One attempt at a listing: its pages are all read at the revision of the first.
    async fn pages(&self, prefix: &str) -> Result<Listing, Failed> {
        let (mut at, mut entries, mut limit) = (None, Vec::new(), PAGE);
        let mut from = text::first(prefix);
        loop {
            let options = &text::page(prefix, limit, at);
            let page = self.members.call(Repeat::Always, |line: Line| {
                let from = from.clone();
                async move {
                    let mut response = line.kv().get(from, Some(options.clone())).await?;
                    let revision = line.revision(response.header())?;
                    let more = response.more();
                    Ok((revision, more, response.take_kvs()))
                }
            });
            match page.await {
                Ok((revision, more, kvs)) => {
                    let revision = *at.get_or_insert(revision);
                    match kvs.last().filter(|_| more) {
                        Some(last) => from = text::after(last.key()),
                        None => {
                            entries.extend(kvs.into_iter().filter_map(text::entry));
                            return Ok(Listing { revision, entries });
                        }
                    }
                    entries.extend(kvs.into_iter().filter_map(text::entry));
                }
                Err(Failed::TooLong(_)) if limit > 1 => limit = (limit / 8).max(1),
                Err(failed) => return Err(failed),
            }
        }
    }

    /// Reads what a refused transaction was to read, as it stood at that transaction's revision.
    ///
    /// Reads of their own, because `etcd_client` panics at a transaction's operation without an answer.
    async fn found(&self, keys: &[String], at: Revision) -> Result<Vec<Option<Entry>>, Failed> {
        let reads = keys.iter().map(|key| self.read(key, Some(at)));
        let readings = futures::future::try_join_all(reads).await?;
        Ok(readings.into_iter().map(|reading| reading.entry).collect())
    }
}

impl MetaStore for EtcdStore {
    fn get<'a>(&'a self, key: &'a str) -> Answer<'a, Reading> {
        Box::pin(async move { self.read(key, None).await.map_err(Failed::of_read) })
    }

    fn list<'a>(&'a self, prefix: &'a str) -> Answer<'a, Listing> {
        Box::pin(async move {
            let mut attempt = 1;
            loop {
                match self.pages(prefix).await {
                    Err(Failed::Compacted) if attempt < LISTINGS => attempt += 1,
                    other => return other.map_err(Failed::of_read),
                }
            }
        })
    }

    fn transact(&self, transaction: Transaction) -> Answer<'_, Outcome> {
        Box::pin(async move {
            transaction.check()?;
            let request = &text::transaction(&transaction);
            let done = self.members.call(Repeat::WhenNotDone, |line: Line| async move {
                let response = line.kv().txn(request.clone()).await?;
                Ok((response.succeeded(), line.revision(response.header())?))
            });
            match done.await {
                Ok((true, revision)) => Ok(Outcome::Done { revision }),
                Ok((false, revision)) => {
                    let found = self.found(&transaction.else_get, revision).await.map_err(Failed::of_read)?;
                    Ok(Outcome::Refused { revision, found })
                }
                Err(failed) => Err(failed.of_transaction(&transaction)),
            }
        })
    }

    fn watch<'a>(&'a self, prefix: &'a str, from: Revision) -> Answer<'a, Watch> {
        Box::pin(async move {
            let resuming = Resuming::begin(self.members.clone(), prefix, from).await?;
            Ok(Watch::new(futures::stream::unfold(Some(resuming), watch::step)))
        })
    }

    fn grant(&self, time: Duration) -> Answer<'_, LeaseId> {
        let whole = i64::try_from(time.as_secs()).unwrap_or(i64::MAX);
        let seconds = whole.saturating_add(i64::from(time.subsec_nanos() > 0)).max(SHORTEST_LEASE);
        Box::pin(async move {
            let granted = self.members.call(Repeat::Always, |line: Line| async move {
                let response = line.leases().grant(seconds, None).await?;
                line.revision(response.header())?;
                // Zero is etcd's word for no lease.
                NonZeroI64::new(response.id()).ok_or_else(|| text::not_an_answer("a lease without a number"))
            });
            granted.await.map(|id| LeaseId(id.get())).map_err(Failed::of_read)
        })
    }

    fn keep_alive(&self, lease: LeaseId) -> Answer<'_, ()> {
        Box::pin(async move {
            let kept = self.members.call(Repeat::Always, |line: Line| async move {
                // Asks once and waits for the answer. The stream ends here: one that stays open can fall silent.
                line.leases().keep_alive(lease.0).await.map(|_keeper| ())
            });
            kept.await.map_err(|failed| failed.of_lease(lease))
        })
    }

    fn revoke(&self, lease: LeaseId) -> Answer<'_, ()> {
        Box::pin(async move {
            let revoked = self
                .members
                .call(Repeat::Always, |line: Line| async move { line.leases().revoke(lease.0).await.map(|_| ()) });
            match revoked.await {
                Err(Failed::LeaseGone) => Ok(()),
                other => other.map_err(|failed| failed.of_lease(lease)),
            }
        })
    }
}
