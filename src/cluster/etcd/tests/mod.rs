//! The store on real etcd clusters: the conformance suite, failing and frozen members, compaction, users, TLS.

use std::{sync::Arc, time::Duration};

use etcd_client::{Client, ConnectOptions};
use futures::FutureExt as _;
use tokio::time::timeout;

use self::process::Etcd;
use super::{EtcdIdentity, EtcdLogin, EtcdOptions, EtcdStore, EtcdTls, MemberStatus};
use crate::{
    cluster::{
        conformance::{self, StoreUnderTest},
        keys::{BrokerValue, Keys, Value as _},
        metadata::MetadataCache,
        store::{Compare, LeaseId, MetaStore, MetaStoreError, Revision, Transaction, TxnOutcome, Watch, WatchEvent},
    },
    model::BrokerId,
    task::{Tasks, clock},
};

mod late;
mod process;
mod scripted;
mod secure;

/// Timeout of each wait, far above the time that a wait takes when a test succeeds.
const TEST_TIMEOUT: Duration = Duration::from_secs(30);

async fn put(store: &EtcdStore, key: &str, value: &str) -> Result<Revision, MetaStoreError> {
    match store.transact(Transaction::new().put(key, value.to_owned())).await? {
        TxnOutcome::Committed { revision } => Ok(revision),
        TxnOutcome::CompareFailed { .. } => panic!("no compare"),
    }
}

async fn value(store: &EtcdStore, key: &str) -> Option<String> {
    let entry = store.get(key).await.expect("etcd responds").entry;
    entry.map(|entry| String::from_utf8(entry.value.to_vec()).expect("text"))
}

/// Repeats a put until it succeeds. For keys of which only the last value matters, because a failed put may have been
/// applied.
async fn put_with_retries(store: &EtcdStore, key: &str, value: &str) -> Revision {
    let end = clock::monotonic() + TEST_TIMEOUT;
    loop {
        match put(store, key, value).await {
            Ok(revision) => return revision,
            Err(error) => assert!(error.retryable() && clock::monotonic() < end, "{error}"),
        }
    }
}

/// Returns the next changes of a watch.
async fn next(watch: &mut Watch) -> Result<Vec<WatchEvent>, MetaStoreError> {
    let changes = timeout(TEST_TIMEOUT, watch.next()).await.expect("the watch continues").expect("the watch is open");
    changes.map(|changes| changes.events)
}

/// Returns a store, the revision of its only key `n`, and a watch that has returned that revision.
async fn start_watch(etcd: &Etcd) -> (EtcdStore, Revision, Watch) {
    let store = etcd.store().await;
    let start = put(&store, "n", "start").await.expect("etcd responds");
    let mut watch = store.watch("n", start).await.expect("the watch starts");
    assert_eq!(values_up_to(&mut watch, "start").await, ["start"]);
    (store, start, watch)
}

/// Waits for the error that ends a watch, after any number of progress responses.
async fn wait_for_error(watch: &mut Watch) -> MetaStoreError {
    loop {
        match next(watch).await {
            Ok(events) => assert_eq!(events, [], "nothing was changed"),
            Err(error) => return error,
        }
    }
}

/// Returns every value of one key that a watch returns, up to and including `last`.
async fn values_up_to(watch: &mut Watch, last: &str) -> Vec<String> {
    let mut values: Vec<String> = Vec::new();
    while values.last().is_none_or(|value| value != last) {
        for event in next(watch).await.expect("no error") {
            let WatchEvent::Put(entry) = event else { panic!("nothing was deleted") };
            values.push(String::from_utf8(entry.value.to_vec()).expect("text"));
        }
    }
    values
}

/// Returns a separate client, for requests that the store never sends.
async fn client(endpoint: String, options: ConnectOptions) -> Client {
    Client::connect([endpoint], Some(options)).await.expect("etcd responds")
}

#[tokio::test]
async fn three_members_conform() {
    let etcd = Etcd::start(3).await;
    let subject = StoreUnderTest {
        store: Arc::new(etcd.store().await),
        pass_time: Box::new(|time| tokio::time::sleep(time).boxed()),
        prefix: "/conformance/".to_owned(),
    };
    conformance::run_all(&subject).await;
}

/// A list is complete if it has more keys than one page, and also if its values exceed the size limit of one response.
#[tokio::test]
async fn list_of_many_pages_has_one_revision() {
    let etcd = Etcd::start(1).await;
    let store = etcd.store().await;
    for hundred in 0..45 {
        let put = |transaction: Transaction, n: i32| transaction.put(format!("many/{hundred:03}/{n:03}"), "");
        store.transact((0..100).fold(Transaction::new(), put)).await.expect("etcd responds");
    }
    let listing = store.list("many/").await.expect("etcd responds");
    assert_eq!(listing.entries.len(), 4500);
    assert!(listing.entries.windows(2).all(|pair| pair[0].key < pair[1].key));
    // 72 MiB in 80 values: more than one response may contain.
    for n in 0..80 {
        let value = vec![0; 900 << 10];
        store.transact(Transaction::new().put(format!("large/{n:03}"), value)).await.expect("etcd responds");
    }
    let listing = store.list("large/").await.expect("pages that fit");
    assert_eq!(listing.entries.len(), 80);
    assert!(store.list("").await.expect("everything").entries.len() == 4580);
}

#[tokio::test]
async fn killed_leader_loses_no_changes_leases_or_watches() {
    let mut etcd = Etcd::start(3).await;
    let store = etcd.store().await;
    let start = put(&store, "n", "start").await.expect("etcd responds");
    let mut watch = store.watch("n", start).await.expect("the watch starts");
    let lease = store.grant(Duration::from_secs(30)).await.expect("etcd responds");
    store.transact(Transaction::new().put_leased("leased", "", lease)).await.expect("etcd responds");
    let mut known = start;
    for n in 0..60 {
        if n == 20 {
            let leader = etcd.leader(&store).await;
            etcd.kill(leader);
        }
        known = write_number(&store, n, known).await;
    }
    let expected: Vec<_> = ["start".to_owned()].into_iter().chain((0..60).map(|n| n.to_string())).collect();
    assert_eq!(values_up_to(&mut watch, "59").await, expected, "each once, in order");
    store.keep_alive(lease).await.expect("the lease survives the leader");
    assert!(value(&store, "leased").await.is_some());
}

/// Writes the number to the key `n`, whose last revision is `known`, and returns the revision of the write. Retries
/// after an unknown outcome, and recognises from the value that an earlier attempt was applied.
async fn write_number(store: &EtcdStore, n: i32, known: Revision) -> Revision {
    let end = clock::monotonic() + TEST_TIMEOUT;
    let transaction =
        Transaction::new().when(Compare::ModRevision("n".to_owned(), known)).put("n", n.to_string()).else_get("n");
    loop {
        match store.transact(transaction.clone()).await {
            Ok(TxnOutcome::Committed { revision }) => return revision,
            Ok(TxnOutcome::CompareFailed { found, .. }) => {
                let entry = found.into_iter().next().flatten().expect("the key is never deleted");
                assert_eq!(entry.value, n.to_string(), "the earlier attempt was applied");
                return entry.mod_revision;
            }
            Err(error) => assert!(error.retryable() && clock::monotonic() < end, "{error}"),
        }
    }
}

#[tokio::test]
async fn calls_and_watches_move_from_frozen_member() {
    let etcd = Etcd::start(3).await;
    let (store, start, mut watch) = start_watch(&etcd).await;
    let lease = store.grant(Duration::from_secs(30)).await.expect("etcd responds");
    // The first member in the options has served everything so far.
    etcd.freeze(0);
    let entry = store.get("n").await.expect("another member responds").entry.expect("the key exists");
    assert_eq!(entry.mod_revision, start);
    put_with_retries(&store, "n", "1").await;
    assert_eq!(values_up_to(&mut watch, "1").await, ["1"], "the watch moved to another member");
    store.keep_alive(lease).await.expect("etcd responds");
    etcd.thaw(0);
    etcd.wait_until_ready(&store).await;
    put_with_retries(&store, "n", "2").await;
    // The put of "1" may have been applied twice: it was repeated if its outcome was unknown.
    let mut values = values_up_to(&mut watch, "2").await;
    values.retain(|value| value != "1");
    assert_eq!(values, ["2"]);
}

#[tokio::test]
async fn two_stopped_members_cause_only_unavailability() {
    let mut etcd = Etcd::start(3).await;
    let store = etcd.store().await;
    let start = put(&store, "n", "start").await.expect("etcd responds");
    let mut watch = store.watch("n", start.next()).await.expect("the watch starts");
    etcd.kill(0);
    etcd.kill(1);
    let (read, wrote) = tokio::join!(store.get("n"), put(&store, "other", "x"));
    let error = read.expect_err("one of three members serves no read");
    assert!(matches!(error, MetaStoreError::Unavailable { outcome_unknown: false, .. }), "{error}");
    assert!(error.to_string().contains(&etcd.endpoint(0)), "{error}");
    assert!(matches!(wrote, Err(MetaStoreError::Unavailable { .. })), "{wrote:?}");
    etcd.run(0);
    etcd.run(1);
    etcd.wait_until_ready(&store).await;
    put_with_retries(&store, "n", "again").await;
    assert_eq!(values_up_to(&mut watch, "again").await.last().map(String::as_str), Some("again"));
}

#[tokio::test]
async fn compacted_start_fails_and_present_can_be_watched() {
    let mut etcd = Etcd::start(3).await;
    let store = etcd.store().await;
    let first = put(&store, "a/n", "0").await.expect("etcd responds");
    let mut behind = store.watch("a/", first.next()).await.expect("the watch starts");
    let mut last = first;
    for n in 0..10 {
        last = put(&store, "b/n", &n.to_string()).await.expect("etcd responds");
    }
    let compact = i64::try_from(last.0).expect("small");
    client(etcd.endpoint(2), ConnectOptions::new()).await.compact(compact, None).await.expect("etcd responds");
    let mut from_past = store.watch("a/", first).await.expect("etcd reports the compaction later");
    assert_eq!(wait_for_error(&mut from_past).await, MetaStoreError::Compacted { from: first, oldest: last });
    assert!(
        timeout(TEST_TIMEOUT, from_past.next()).await.expect("ended").is_none(),
        "the watch ends after its first error"
    );
    // An open watch continues after the compaction of its start revision. It fails when it must resume there: no change
    // has advanced this watch.
    etcd.kill(0);
    assert_eq!(wait_for_error(&mut behind).await, MetaStoreError::Compacted { from: first.next(), oldest: last });
    let listing = store.list("a/").await.expect("two members suffice");
    let mut present = store.watch("a/", listing.revision.next()).await.expect("the present is never compacted");
    put_with_retries(&store, "a/n", "1").await;
    assert_eq!(values_up_to(&mut present, "1").await.last().map(String::as_str), Some("1"));
}

/// Regression: from 3.5.8 on, etcd sends no progress to a watch that starts after its newest revision. While nothing
/// was written, brokers took each member in turn for unresponsive, and their metadata caches for stale.
#[tokio::test]
async fn watch_of_present_gets_progress_from_idle_etcd() {
    let etcd = Etcd::start(3).await;
    let store = etcd.store().await;
    let newest = put(&store, "n", "old").await.expect("etcd responds");
    let mut watch = store.watch("n", newest.next()).await.expect("the watch starts");
    let first = store.members.in_call_order().next().expect("three members").endpoint().to_owned();
    for _ in 0..3 {
        let events = next(&mut watch).await.expect("progress");
        assert_eq!(events, [], "no change before the start revision");
    }
    let now = store.members.in_call_order().next().expect("three members").endpoint().to_owned();
    assert_eq!(now, first, "no member was replaced");
    put(&store, "n", "new").await.expect("etcd responds");
    assert_eq!(values_up_to(&mut watch, "new").await, ["new"]);
}

#[tokio::test]
async fn watch_can_start_at_compacted_revision() {
    let etcd = Etcd::start(1).await;
    let store = etcd.store().await;
    let mut last = Revision::ZERO;
    for n in 0..3 {
        last = put(&store, "n", &n.to_string()).await.expect("etcd responds");
    }
    let compact = i64::try_from(last.0).expect("small");
    client(etcd.endpoint(0), ConnectOptions::new()).await.compact(compact, None).await.expect("etcd responds");
    let mut watch = store.watch("n", last).await.expect("this revision is kept");
    assert_eq!(values_up_to(&mut watch, "2").await, ["2"], "the revision before is compacted");
}

#[tokio::test]
async fn closed_endpoint_is_skipped_and_silent_one_times_out() {
    let etcd = Etcd::start(1).await;
    let closed = {
        let bound = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
        format!("http://{}", bound.local_addr().expect("bound"))
    };
    let store = EtcdStore::open(EtcdOptions::new([closed.clone(), etcd.endpoint(0)])).await.expect("valid options");
    put(&store, "n", "1").await.expect("an unsent request is sent to the next member");
    // This endpoint accepts connections and never responds.
    let silent = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
    let endpoint = format!("http://{}", silent.local_addr().expect("bound"));
    let store = EtcdStore::open(EtcdOptions::new([endpoint.clone(), etcd.endpoint(0)])).await.expect("valid options");
    let error = put(&store, "n", "2").await.expect_err("the outcome is unknown");
    assert!(error.outcome_unknown() && error.to_string().contains(&endpoint), "{error}");
    put(&store, "n", "2").await.expect("the next attempt uses another member");
    let store = EtcdStore::open(EtcdOptions::new([endpoint, etcd.endpoint(0)])).await.expect("valid options");
    assert_eq!(value(&store, "n").await.as_deref(), Some("2"), "a read is retried automatically");
    let unreachable = EtcdStore::open(EtcdOptions::new([closed.clone()])).await.expect("valid options");
    let error = put(&unreachable, "n", "3").await.expect_err("no member is reachable");
    assert!(!error.outcome_unknown() && error.to_string().contains(&closed), "{error}");
    assert!(error.to_string().contains("refused"), "{error}");
}

#[tokio::test]
async fn members_of_another_cluster_are_rejected() {
    let (ours, other) = tokio::join!(Etcd::start(1), Etcd::start(1));
    let endpoints = [ours.endpoint(0), other.endpoint(0)];
    let store = EtcdStore::open(EtcdOptions::new(endpoints)).await.expect("valid options");
    put(&store, "n", "ours").await.expect("etcd responds");
    let status = store.status().await;
    assert!(status[0].1.is_ok(), "{status:?}");
    let error_text = status[1].1.clone().expect_err("another cluster");
    assert!(error_text.contains("etcd cluster"), "{error_text}");
    drop(ours);
    let error = store.get("n").await.expect_err("the other cluster has another history");
    assert!(error.to_string().contains("members of one cluster"), "{error}");
}

#[tokio::test]
async fn cache_follows_etcd_past_stopped_member() {
    let mut etcd = Etcd::start(3).await;
    let (store, keys, tasks) = (etcd.store().await, Keys::new("test").expect("a name"), Tasks::new());
    let metadata = MetadataCache::start(Arc::new(store.clone()), keys.clone(), &tasks);
    timeout(TEST_TIMEOUT, metadata.wait_for_revision(Revision::ZERO)).await.expect("an empty prefix is listed too");
    let registration = BrokerValue::running_at("a:1".to_owned());
    for id in [1, 2] {
        if id == 2 {
            etcd.kill(0);
        }
        let key = keys.broker(BrokerId(id));
        let text = String::from_utf8(registration.encode().to_vec()).expect("JSON");
        let revision = put_with_retries(&store, &key, &text).await;
        timeout(TEST_TIMEOUT, metadata.wait_for_revision(revision)).await.expect("the cache has the revision");
        assert!(metadata.state().brokers().contains_key(&BrokerId(id)));
    }
    tasks.stop().await;
}

#[tokio::test]
async fn lease_duration_is_rounded_up_and_its_end_is_reported() {
    let etcd = Etcd::start(1).await;
    let store = etcd.store().await;
    let lease = store.grant(Duration::from_millis(2_500)).await.expect("etcd responds");
    let mut client = client(etcd.endpoint(0), ConnectOptions::new()).await;
    let granted = client.lease_time_to_live(lease.0, None).await.expect("etcd responds").granted_ttl();
    assert_eq!(granted, 3, "rounded up to whole seconds");
    let never = LeaseId(lease.0 ^ 1);
    assert_eq!(store.keep_alive(never).await, Err(MetaStoreError::LeaseGone { lease: never }));
    store.revoke(never).await.expect("revoking an absent lease succeeds");
    let put = Transaction::new().put_leased("n", "", never);
    assert_eq!(store.transact(put).await, Err(MetaStoreError::LeaseGone { lease: never }));
}
