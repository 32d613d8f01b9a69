//! Contract of every [`MetaStore`]: one suite, run on the embedded store and on etcd.
//!
//! The suite may run on a store with earlier content. The keys of the suite have a prefix of their own, and the suite
//! compares revisions only with each other.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use futures::future::{BoxFuture, join_all};

use super::store::{Compare, LeaseId, MetaStore, MetaStoreError, Revision, Transaction, TxnOutcome, Watch, WatchEvent};
use crate::limits;

/// A store under test, with control over the time of its leases.
pub(super) struct StoreUnderTest {
    pub(super) store: Arc<dyn MetaStore>,
    /// Lets at least this much time pass for the leases of the store; real time for a real etcd.
    pub(super) pass_time: Box<dyn Fn(Duration) -> BoxFuture<'static, ()> + Send + Sync>,
    /// Prefix that is unique to this run.
    pub(super) prefix: String,
}

/// Runs all tests of the suite.
pub(super) async fn run_all(subject: &StoreUnderTest) {
    put_is_read_back_with_its_revisions(subject).await;
    every_compare_is_evaluated(subject).await;
    failed_transaction_changes_nothing_and_reads(subject).await;
    transaction_without_effect_has_no_revision(subject).await;
    list_is_ordered_at_one_revision(subject).await;
    one_of_concurrent_compare_and_sets_wins(subject).await;
    watch_returns_all_changes_in_order_from_start(subject).await;
    watch_never_splits_a_transaction(subject).await;
    expired_lease_deletes_its_keys(subject).await;
    revoked_lease_deletes_keys_and_can_be_revoked_again(subject).await;
    put_without_lease_detaches_the_key(subject).await;
    put_under_ended_lease_fails(subject).await;
    too_large_transaction_is_rejected(subject).await;
}

impl StoreUnderTest {
    fn key(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }

    /// Applies a transaction whose compares must hold.
    async fn commit(&self, transaction: Transaction) -> Revision {
        match self.store.transact(transaction).await.expect("the store responds") {
            TxnOutcome::Committed { revision } => revision,
            TxnOutcome::CompareFailed { .. } => panic!("the compare failed"),
        }
    }

    async fn put(&self, name: &str, value: &str) -> Revision {
        self.commit(Transaction::new().put(self.key(name), value.to_owned())).await
    }

    async fn value(&self, name: &str) -> Option<Bytes> {
        self.store.get(&self.key(name)).await.expect("the store responds").entry.map(|entry| entry.value)
    }

    async fn watch(&self, name: &str, from: Revision) -> Watch {
        self.store.watch(&self.key(name), from).await.expect("watchable")
    }

    /// Grants a lease of five seconds.
    async fn grant_lease(&self) -> LeaseId {
        self.store.grant(Duration::from_secs(5)).await.expect("the store responds")
    }
}

/// Returns the next events of a watch, at least `count`.
async fn events(watch: &mut Watch, count: usize) -> Vec<WatchEvent> {
    let mut received = Vec::new();
    while received.len() < count {
        let next = tokio::time::timeout(Duration::from_secs(20), watch.next()).await;
        received.extend(next.expect("the watch continues").expect("the store is open").expect("no error").events);
    }
    received
}

async fn put_is_read_back_with_its_revisions(subject: &StoreUnderTest) {
    let first = subject.put("rw/a", "1").await;
    let second = subject.put("rw/a", "2").await;
    assert!(second > first);
    let reading = subject.store.get(&subject.key("rw/a")).await.expect("the store responds");
    let entry = reading.entry.expect("the key exists");
    assert_eq!((entry.create_revision, entry.mod_revision, &entry.value[..]), (first, second, &b"2"[..]));
    assert!(reading.revision >= second);
    subject.commit(Transaction::new().delete(subject.key("rw/a"))).await;
    assert_eq!(subject.value("rw/a").await, None);
    let again = subject.put("rw/a", "").await;
    let entry =
        subject.store.get(&subject.key("rw/a")).await.expect("the store responds").entry.expect("the key exists");
    assert_eq!((entry.create_revision, entry.value.len()), (again, 0), "a recreated key has a new create revision");
}

async fn every_compare_is_evaluated(subject: &StoreUnderTest) {
    let (present, absent) = (subject.key("cmp/there"), subject.key("cmp/gone"));
    let lease = subject.grant_lease().await;
    let created = subject.commit(Transaction::new().put_leased(present.clone(), "0", lease)).await;
    let modified = subject.commit(Transaction::new().put_leased(present.clone(), "1", lease)).await;
    let holding = [
        Compare::ModRevision(present.clone(), modified),
        Compare::CreateRevision(present.clone(), created),
        Compare::Value(present.clone(), "1".into()),
        Compare::Lease(present.clone(), lease),
        Compare::Exists(present.clone()),
        Compare::Absent(absent.clone()),
    ];
    let failing = [
        Compare::ModRevision(present.clone(), created),
        Compare::CreateRevision(present.clone(), modified),
        Compare::Value(present.clone(), "0".into()),
        Compare::Lease(present.clone(), LeaseId(lease.0 + 1)),
        Compare::Absent(present.clone()),
        Compare::Exists(absent.clone()),
        Compare::ModRevision(absent.clone(), modified),
        Compare::CreateRevision(absent.clone(), created),
        Compare::Value(absent.clone(), "".into()),
        Compare::Lease(absent, lease),
    ];
    for compare in &holding {
        subject.commit(Transaction::new().when(compare.clone())).await;
    }
    for compare in failing {
        // Paired with a compare that holds: one failed compare fails the transaction.
        let transaction = Transaction::new().when(holding[0].clone()).when(compare.clone()).put(present.clone(), "2");
        let outcome = subject.store.transact(transaction).await.expect("the store responds");
        assert!(matches!(outcome, TxnOutcome::CompareFailed { .. }), "{compare:?}");
    }
    assert_eq!(subject.value("cmp/there").await.as_deref(), Some(&b"1"[..]));
}

async fn failed_transaction_changes_nothing_and_reads(subject: &StoreUnderTest) {
    let revision = subject.put("else/a", "1").await;
    let (a, b) = (subject.key("else/a"), subject.key("else/b"));
    let transaction = Transaction::new()
        .when(Compare::Absent(a.clone()))
        .put(b.clone(), "x")
        .delete(a.clone())
        .else_get(b.clone())
        .else_get(a.clone());
    let TxnOutcome::CompareFailed { revision: now, found } =
        subject.store.transact(transaction).await.expect("the store responds")
    else {
        panic!("the compare does not hold");
    };
    assert!(now >= revision);
    assert_eq!(found.len(), 2);
    assert_eq!(found[0], None);
    assert_eq!(found[1].as_ref().map(|entry| entry.mod_revision), Some(revision));
    assert_eq!(subject.value("else/b").await, None);
}

async fn transaction_without_effect_has_no_revision(subject: &StoreUnderTest) {
    let before = subject.put("none/a", "1").await;
    let empty = subject.commit(Transaction::new()).await;
    let deleted = subject.commit(Transaction::new().delete(subject.key("none/never"))).await;
    let after = subject.put("none/a", "2").await;
    assert_eq!((empty, deleted, after), (before, before, before.next()));
}

async fn list_is_ordered_at_one_revision(subject: &StoreUnderTest) {
    for name in ["list/b", "list/a", "list/a/c", "listing"] {
        subject.put(name, name).await;
    }
    let last = subject.put("list/b", "again").await;
    let listing = subject.store.list(&subject.key("list/")).await.expect("the store responds");
    assert!(listing.revision >= last);
    let keys: Vec<_> = listing.entries.iter().map(|entry| entry.key.clone()).collect();
    assert_eq!(keys, ["list/a", "list/a/c", "list/b"].map(|name| subject.key(name)));
    assert_eq!(listing.entries[2].mod_revision, last);
    let nothing = subject.store.list(&subject.key("list/zzz")).await.expect("the store responds");
    assert!(nothing.entries.is_empty() && nothing.revision >= last);
}

async fn one_of_concurrent_compare_and_sets_wins(subject: &StoreUnderTest) {
    let revision = subject.put("race/a", "").await;
    let key = subject.key("race/a");
    let attempt = |n: usize| {
        let compare = Compare::ModRevision(key.clone(), revision);
        subject.store.transact(Transaction::new().when(compare).put(key.clone(), n.to_string()))
    };
    let outcomes = join_all((0..32).map(attempt)).await;
    let won: Vec<_> = (0..32).filter(|n| matches!(outcomes[*n], Ok(TxnOutcome::Committed { .. }))).collect();
    assert_eq!(won.len(), 1, "{outcomes:?}");
    assert_eq!(subject.value("race/a").await, Some(won[0].to_string().into()));
}

async fn watch_returns_all_changes_in_order_from_start(subject: &StoreUnderTest) {
    let first = subject.put("watch/a", "0").await;
    let past = subject.put("watch/a", "1").await;
    subject.put("other", "x").await;
    let mut from_past = subject.watch("watch/", past).await;
    let mut from_now = subject.watch("watch/", first).await;
    let seen = events(&mut from_past, 1).await;
    assert_eq!((seen.len(), seen[0].revision()), (1, past), "from is inclusive");
    for n in 2..200 {
        subject.put("watch/a", &n.to_string()).await;
    }
    let deleted = subject.commit(Transaction::new().delete(subject.key("watch/a"))).await;
    let all = events(&mut from_now, 201).await;
    assert_eq!(all.len(), 201);
    assert!(all.windows(2).all(|pair| pair[0].revision() < pair[1].revision()));
    assert_eq!(all[200], WatchEvent::Delete { key: subject.key("watch/a"), revision: deleted });
    let WatchEvent::Put(entry) = &all[199] else { panic!("the last value") };
    assert_eq!((&entry.value[..], entry.create_revision), (&b"199"[..], first));
    assert_eq!(events(&mut from_past, 199).await, all[2..]);
}

async fn watch_never_splits_a_transaction(subject: &StoreUnderTest) {
    let start = subject.put("whole/start", "").await;
    let mut watch = subject.watch("whole/", start.next()).await;
    let count = 40;
    for n in 0..count {
        let put =
            |transaction: Transaction, i: usize| transaction.put(subject.key(&format!("whole/{i}")), n.to_string());
        subject.commit((0..10).fold(Transaction::new(), put)).await;
    }
    let mut seen = 0;
    while seen < count * 10 {
        let changes = watch.next().await.expect("the store is open").expect("no error");
        assert_eq!(changes.events.len() % 10, 0, "half a transaction");
        assert!(changes.events.iter().all(|event| event.revision() <= changes.revision));
        seen += changes.events.len();
    }
}

async fn expired_lease_deletes_its_keys(subject: &StoreUnderTest) {
    let lease = subject.grant_lease().await;
    let start = subject.put("lease/plain", "").await;
    let mut watch = subject.watch("lease/", start.next()).await;
    let (a, b) = (subject.key("lease/a"), subject.key("lease/b"));
    subject.commit(Transaction::new().put_leased(a, "", lease).put_leased(b, "", lease)).await;
    (subject.pass_time)(Duration::from_secs(3)).await;
    subject.store.keep_alive(lease).await.expect("the lease is live");
    (subject.pass_time)(Duration::from_secs(3)).await;
    assert!(subject.value("lease/a").await.is_some(), "a lease never ends early");
    (subject.pass_time)(Duration::from_secs(10)).await;
    let seen = events(&mut watch, 4).await;
    assert!(matches!((&seen[2], &seen[3]), (WatchEvent::Delete { .. }, WatchEvent::Delete { .. })), "{seen:?}");
    assert_eq!(seen[2].revision(), seen[3].revision(), "one transaction");
    assert_eq!((subject.value("lease/a").await, subject.value("lease/b").await), (None, None));
    assert!(subject.value("lease/plain").await.is_some());
    assert_eq!(subject.store.keep_alive(lease).await, Err(MetaStoreError::LeaseGone { lease }));
}

async fn revoked_lease_deletes_keys_and_can_be_revoked_again(subject: &StoreUnderTest) {
    let lease = subject.grant_lease().await;
    subject.commit(Transaction::new().put_leased(subject.key("revoke/a"), "", lease)).await;
    subject.store.revoke(lease).await.expect("the store responds");
    assert_eq!(subject.value("revoke/a").await, None);
    subject.store.revoke(lease).await.expect("revoking an ended lease succeeds");
}

async fn put_without_lease_detaches_the_key(subject: &StoreUnderTest) {
    let lease = subject.grant_lease().await;
    subject.commit(Transaction::new().put_leased(subject.key("off/a"), "", lease)).await;
    subject.put("off/a", "stays").await;
    subject.store.revoke(lease).await.expect("the store responds");
    assert!(subject.value("off/a").await.is_some());
}

async fn put_under_ended_lease_fails(subject: &StoreUnderTest) {
    let lease = subject.grant_lease().await;
    subject.store.revoke(lease).await.expect("the store responds");
    let (a, b) = (subject.key("ended/a"), subject.key("ended/b"));
    let transaction = Transaction::new().put(a, "").put_leased(b, "", lease);
    assert_eq!(subject.store.transact(transaction).await, Err(MetaStoreError::LeaseGone { lease }));
    assert_eq!(subject.value("ended/a").await, None, "no part of the transaction was applied");
}

async fn too_large_transaction_is_rejected(subject: &StoreUnderTest) {
    let key = |n: usize| subject.key(&format!("large/{n}"));
    let puts = |count: usize| (0..count).fold(Transaction::new(), |transaction, n| transaction.put(key(n), ""));
    subject.commit(puts(limits::MAX_TRANSACTION_OPS)).await;
    let many = subject.store.transact(puts(limits::MAX_TRANSACTION_OPS + 1)).await;
    assert!(matches!(many, Err(MetaStoreError::TooLarge { .. })), "{many:?}");
    let big = Transaction::new().put(key(0), vec![0; limits::MAX_TRANSACTION_BYTES]);
    let big = subject.store.transact(big).await;
    assert!(matches!(big, Err(MetaStoreError::TooLarge { .. })), "{big:?}");
    let fits = vec![1; limits::MAX_TRANSACTION_BYTES - 1000];
    subject.commit(Transaction::new().put(key(0), fits.clone())).await;
    assert_eq!(subject.value("large/0").await, Some(fits.into()));
}
