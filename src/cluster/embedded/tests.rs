//! The embedded store: the conformance suite, and its own properties: the file, restarts, leases, history.

use bytes::Bytes;

use super::*;
use crate::cluster::{
    conformance::{self, StoreUnderTest},
    store::{Compare, WatchEvent},
};

/// Returns the store as the subject of the conformance suite.
fn subject(store: &EmbeddedStore) -> StoreUnderTest {
    let shared = store.clone();
    StoreUnderTest {
        store: Arc::new(store.clone()),
        // Ends the leases whose deadline is at most `time` from now. The clock itself does not advance.
        pass_time: Box::new(move |time| {
            let store = shared.clone();
            Box::pin(async move { store.expire_leases(clock::monotonic() + time).await.expect("the store responds") })
        }),
        prefix: "/conformance/".to_owned(),
    }
}

async fn put(store: &EmbeddedStore, key: &str, value: &str) -> Revision {
    match store.transact(Transaction::new().put(key, value.to_owned())).await.expect("the store responds") {
        TxnOutcome::Committed { revision } => revision,
        TxnOutcome::CompareFailed { .. } => panic!("the compare failed"),
    }
}

async fn value(store: &EmbeddedStore, key: &str) -> Option<Bytes> {
    store.get(key).await.expect("the store responds").entry.map(|entry| entry.value)
}

#[tokio::test]
async fn in_memory_store_conforms() {
    conformance::run_all(&subject(&EmbeddedStore::in_memory())).await;
}

#[tokio::test]
async fn file_store_conforms() {
    let dir = tempfile::tempdir().expect("a directory");
    conformance::run_all(&subject(&EmbeddedStore::open(dir.path()).await.expect("opens"))).await;
}

#[tokio::test]
async fn committed_changes_and_revisions_survive_restart() {
    let dir = tempfile::tempdir().expect("a directory");
    let store = EmbeddedStore::open(dir.path()).await.expect("opens");
    put(&store, "a", "1").await;
    let last = put(&store, "a", "2").await;
    drop(store);
    let store = EmbeddedStore::open(dir.path()).await.expect("reopens");
    let reading = store.get("a").await.expect("the store responds");
    assert_eq!(reading.revision, last);
    assert_eq!(reading.entry.map(|entry| (entry.create_revision, entry.mod_revision)), Some((Revision(2), last)));
    assert_eq!(put(&store, "b", "").await, last.next());
}

#[tokio::test]
async fn leased_keys_are_deleted_by_restart() {
    let dir = tempfile::tempdir().expect("a directory");
    let store = EmbeddedStore::open(dir.path()).await.expect("opens");
    let lease = store.grant(Duration::from_secs(3600)).await.expect("the store responds");
    store
        .transact(Transaction::new().put_leased("leased", "", lease).put("plain", ""))
        .await
        .expect("the store responds");
    let before = store.get("leased").await.expect("the store responds").revision;
    drop(store);
    let store = EmbeddedStore::open(dir.path()).await.expect("reopens");
    let reading = store.get("leased").await.expect("the store responds");
    assert_eq!((reading.entry, reading.revision), (None, before.next()), "the deletion of leased keys has a revision");
    assert!(value(&store, "plain").await.is_some());
    assert_eq!(store.keep_alive(lease).await, Err(MetaStoreError::LeaseGone { lease }));
}

#[tokio::test]
async fn file_in_use_is_an_error() {
    let dir = tempfile::tempdir().expect("a directory");
    let _open = EmbeddedStore::open(dir.path()).await.expect("opens");
    let error = EmbeddedStore::open(dir.path()).await.expect_err("in use");
    assert!(matches!(error, EmbeddedStoreError::InUse { .. }), "{error:?}");
    assert!(error.to_string().contains("metadata.redb is in use by another process"), "{error}");
}

#[tokio::test]
async fn file_of_newer_version_is_not_changed() {
    let dir = tempfile::tempdir().expect("a directory");
    put(&EmbeddedStore::open(dir.path()).await.expect("opens"), "a", "kept").await;
    let path = dir.path().join(FILE_NAME);
    let set_format = |format: u64| {
        let database = Database::create(&path).expect("opens");
        table::set_format(&database, format).expect("writes");
    };
    set_format(table::FORMAT + 1);
    let error = EmbeddedStore::open(dir.path()).await.expect_err("newer");
    assert!(matches!(error, EmbeddedStoreError::Newer { found, .. } if found == table::FORMAT + 1), "{error:?}");
    set_format(table::FORMAT);
    assert_eq!(value(&EmbeddedStore::open(dir.path()).await.expect("opens"), "a").await.as_deref(), Some(&b"kept"[..]));
}

#[tokio::test]
async fn foreign_file_is_rejected_and_not_changed() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join(FILE_NAME);
    for bytes in [&b"not a database at all"[..], &[0x55; 100_000]] {
        std::fs::write(&path, bytes).expect("writes");
        let error = EmbeddedStore::open(dir.path()).await.expect_err("no database");
        assert!(matches!(error, EmbeddedStoreError::Corrupt { .. }), "{error:?}");
        assert_eq!(std::fs::read(&path).expect("reads"), bytes);
    }
    let error = EmbeddedStore::open(&dir.path().join("missing")).await.expect_err("no directory");
    assert!(matches!(error, EmbeddedStoreError::Io { .. }), "{error:?}");
}

#[tokio::test]
async fn watch_that_lags_too_far_gets_compacted() {
    let store = EmbeddedStore::in_memory();
    let first = put(&store, "a", "").await;
    let mut slow = store.watch("", first).await.expect("the watch starts");
    for _ in 0..history::MAX_REVISIONS + 1 {
        put(&store, "a", "").await;
    }
    let oldest = Revision(first.0 + 2);
    assert_eq!(slow.next().await, Some(Err(MetaStoreError::Compacted { from: first, oldest })));
    assert_eq!(slow.next().await, None, "the watch ends after its first error");
    assert!(matches!(store.watch("", first).await, Err(MetaStoreError::Compacted { .. })));
    let mut from_oldest = store.watch("", oldest).await.expect("the oldest available revision");
    assert!(matches!(from_oldest.next().await, Some(Ok(changes)) if changes.events[0].revision() == oldest));
}

#[tokio::test]
async fn restart_compacts_history_but_not_the_present() {
    let dir = tempfile::tempdir().expect("a directory");
    let store = EmbeddedStore::open(dir.path()).await.expect("opens");
    let last = put(&store, "a", "").await;
    drop(store);
    let store = EmbeddedStore::open(dir.path()).await.expect("reopens");
    assert!(matches!(store.watch("", last).await, Err(MetaStoreError::Compacted { .. })));
    let mut watch = store.watch("", last.next()).await.expect("the present");
    put(&store, "a", "new").await;
    assert!(matches!(watch.next().await, Some(Ok(changes)) if matches!(changes.events[..], [WatchEvent::Put(_)])));
}

#[tokio::test]
async fn watch_ends_with_store_and_releases_file() {
    let dir = tempfile::tempdir().expect("a directory");
    let store = EmbeddedStore::open(dir.path()).await.expect("opens");
    let mut watch = store.watch("", Revision(2)).await.expect("the watch starts");
    drop(store);
    assert_eq!(watch.next().await, None);
    EmbeddedStore::open(dir.path()).await.expect("the file is free");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn concurrent_transactions_are_applied_once_each() {
    let dir = tempfile::tempdir().expect("a directory");
    let store = EmbeddedStore::open(dir.path()).await.expect("opens");
    let tasks = Tasks::new();
    let counting = (0..50).map(|n| {
        let store = store.clone();
        tasks.spawn("count", async move {
            let key = format!("n/{n}");
            store.transact(Transaction::new().when(Compare::Absent(key.clone())).put(key, "")).await
        })
    });
    let mut revisions = BTreeSet::new();
    for outcome in futures::future::join_all(counting.collect::<Vec<_>>()).await {
        match outcome.expect("no panic").expect("the store responds") {
            TxnOutcome::Committed { revision } => assert!(revisions.insert(revision), "a revision of its own"),
            TxnOutcome::CompareFailed { .. } => panic!("no other writer has the key"),
        }
    }
    assert_eq!(revisions, (2..=51).map(Revision).collect());
}

#[tokio::test]
async fn dropped_caller_does_not_stop_others() {
    let dir = tempfile::tempdir().expect("a directory");
    let store = EmbeddedStore::open(dir.path()).await.expect("opens");
    for n in 0..20 {
        let mut call = store.transact(Transaction::new().put(format!("dropped/{n}"), ""));
        // Polled once, so that the transaction is queued or in progress, and then dropped.
        assert!(futures::poll!(&mut call).is_pending());
        drop(call);
        put(&store, "kept", &n.to_string()).await;
    }
    assert_eq!(value(&store, "kept").await.as_deref(), Some(&b"19"[..]));
}

#[tokio::test(start_paused = true)]
async fn leases_expire_by_the_clock() {
    let store = EmbeddedStore::in_memory();
    let tasks = Tasks::new();
    store.spawn_lease_expiry(&tasks);
    let lease = store.grant(Duration::from_secs(10)).await.expect("the store responds");
    store.transact(Transaction::new().put_leased("a", "", lease)).await.expect("the store responds");
    tokio::time::sleep(Duration::from_millis(9_900)).await;
    assert!(value(&store, "a").await.is_some());
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(value(&store, "a").await, None);
    tasks.stop().await;
}
