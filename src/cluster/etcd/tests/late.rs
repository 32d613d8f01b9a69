//! Slow members: a relay between the store and a real member delays the responses of the member.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering::Relaxed},
};

use bytes::Bytes;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{
        TcpListener, TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::mpsc,
    time::Instant,
};

use super::*;

/// A relay to one member, at an endpoint of its own. Ends with the test's runtime.
struct Relay {
    endpoint: String,
    delay_ms: Arc<AtomicU64>,
}

impl Relay {
    async fn before(member: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let endpoint = format!("http://{}", listener.local_addr().expect("bound"));
        let member = member.strip_prefix("http://").expect("plain HTTP").to_owned();
        let (delay_ms, tasks) = (Arc::new(AtomicU64::new(0)), Tasks::new());
        let (delay, connections) = (Arc::clone(&delay_ms), tasks.clone());
        tasks.spawn("relay", async move {
            loop {
                let (client, _) = listener.accept().await.expect("listening");
                let member = TcpStream::connect(&member).await.expect("the member listens");
                connections.spawn("relay-connection", relay_connection(client, member, Arc::clone(&delay)));
            }
        });
        Self { endpoint, delay_ms }
    }

    /// Delays the bytes that the member sends from now on.
    fn delay_by(&self, delay: Duration) {
        self.delay_ms.store(u64::try_from(delay.as_millis()).expect("a short delay"), Relaxed);
    }
}

/// Relays one connection until either side ends it.
async fn relay_connection(client: TcpStream, member: TcpStream, delay_ms: Arc<AtomicU64>) {
    let (mut from_client, to_client) = client.into_split();
    let (from_member, mut to_member) = member.into_split();
    let (sender, receiver) = mpsc::channel(1024);
    tokio::select! {
        _ = tokio::io::copy(&mut from_client, &mut to_member) => {}
        () = queue_bytes(from_member, sender, &delay_ms) => {}
        () = send_delayed(to_client, receiver) => {}
    }
}

/// Reads the member's bytes and queues them with the time at which to send them on.
async fn queue_bytes(mut member: OwnedReadHalf, sender: mpsc::Sender<(Instant, Bytes)>, delay_ms: &AtomicU64) {
    let mut bytes = vec![0; 64 << 10];
    while let Ok(read @ 1..) = member.read(&mut bytes).await {
        let due = clock::monotonic() + Duration::from_millis(delay_ms.load(Relaxed));
        let _receiver_dropped = sender.send((due, Bytes::copy_from_slice(&bytes[..read]))).await;
    }
}

/// Sends queued bytes to the client, each at its time.
async fn send_delayed(mut client: OwnedWriteHalf, mut receiver: mpsc::Receiver<(Instant, Bytes)>) {
    while let Some((due, bytes)) = receiver.recv().await {
        tokio::time::sleep_until(due).await;
        if client.write_all(&bytes).await.is_err() {
            return;
        }
    }
}

/// Returns a store whose first member is behind a relay.
async fn store_behind_relay(etcd: &Etcd) -> (EtcdStore, Relay) {
    let mut endpoints = etcd.endpoints();
    let relay = Relay::before(&endpoints[0]).await;
    endpoints[0].clone_from(&relay.endpoint);
    (EtcdStore::open(EtcdOptions::new(endpoints)).await.expect("valid options"), relay)
}

/// Delay that is longer than the time until a watch moves to another member.
const LONG_DELAY: Duration = Duration::from_secs(10);

fn first_member(store: &EtcdStore) -> &str {
    store.members.in_call_order().next().expect("a member").endpoint()
}

#[tokio::test]
async fn slow_member_within_timeout_is_kept() {
    let etcd = Etcd::start(3).await;
    let (store, relay) = store_behind_relay(&etcd).await;
    let start = put(&store, "n", "start").await.expect("etcd responds");
    let mut watch = store.watch("n", start).await.expect("the watch starts");
    relay.delay_by(Duration::from_millis(400));
    // The client of the writes does not use the relay, so each write returns before the watch receives its change.
    let other_client = etcd.store().await;
    for n in 0..8 {
        put(&other_client, "n", &n.to_string()).await.expect("etcd responds");
        let read = store.get("n").await.expect("within the timeout").entry.expect("the key exists");
        assert_eq!(read.value, n.to_string());
    }
    let expected: Vec<_> = ["start".to_owned()].into_iter().chain((0..8).map(|n| n.to_string())).collect();
    assert_eq!(values_up_to(&mut watch, "7").await, expected, "each once, in order");
    assert_eq!(first_member(&store), relay.endpoint);
}

#[tokio::test]
async fn calls_and_watches_move_from_too_slow_member() {
    let etcd = Etcd::start(3).await;
    let (store, relay) = store_behind_relay(&etcd).await;
    let start = put(&store, "n", "start").await.expect("etcd responds");
    let mut watch = store.watch("n", start).await.expect("the watch starts");
    assert_eq!(values_up_to(&mut watch, "start").await, ["start"]);
    let lease = store.grant(Duration::from_secs(30)).await.expect("etcd responds");
    relay.delay_by(LONG_DELAY);
    let mut known = start;
    let started = clock::monotonic();
    for n in 0..5 {
        known = write_number(&store, n, known).await;
    }
    let expected: Vec<_> = (0..5).map(|n| n.to_string()).collect();
    assert_eq!(values_up_to(&mut watch, "4").await, expected, "each once, in order");
    let took = started.elapsed();
    assert!(took < LONG_DELAY, "the watch moved to another member: {took:?}");
    store.keep_alive(lease).await.expect("etcd responds");
    assert_ne!(first_member(&store), relay.endpoint);
}

#[tokio::test]
async fn temporarily_slow_etcd_loses_nothing() {
    let etcd = Etcd::start(1).await;
    let (store, relay) = store_behind_relay(&etcd).await;
    let start = put(&store, "n", "start").await.expect("etcd responds");
    let mut watch = store.watch("n", start.next()).await.expect("the watch starts");
    let lease = store.grant(Duration::from_secs(30)).await.expect("etcd responds");
    relay.delay_by(Duration::from_millis(1500));
    let error = store.get("n").await.expect_err("the only member is too slow");
    assert!(error.retryable() && error.to_string().contains("no response within 1000 ms"), "{error}");
    put(&etcd.store().await, "n", "meanwhile").await.expect("etcd itself responds");
    relay.delay_by(Duration::ZERO);
    put_with_retries(&store, "n", "end").await;
    assert_eq!(values_up_to(&mut watch, "end").await, ["meanwhile", "end"]);
    store.keep_alive(lease).await.expect("etcd responds");
}
