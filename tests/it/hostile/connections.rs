//! Attackers that hold connections: idle ones, and ones with an open stream each. Attackers with streams are on
//! machines of their own (network namespaces), because each address has a share.

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    sync::mpsc,
    thread,
    time::Duration,
};

use bytes::Bytes;
use strandline::{
    limits,
    proto::{
        error::{ApiError, ErrorCode},
        v1::{FetchRequest, log_client::LogClient},
    },
    task,
};
use tonic::transport::{Channel, Endpoint};
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};

use super::{check_serves, target::PREFACE};
use crate::{
    broker::{BrokerInstance, http_get},
    cluster::network::{Network, run_inside, within},
    test_timeout::{TEST_TIMEOUT, eventually},
    wire,
};

/// Maximum number of open files of the attacked broker: 32 connections for gRPC, 8 for HTTP.
const OPEN_FILES: u32 = 256;
const MAX_GRPC_CONNECTIONS: usize = 32;

pub(super) fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime")
}

/// Opens a connection with one fetch stream, which stays open.
pub(super) async fn hold(address: SocketAddr) -> Result<(LogClient<Channel>, impl Sized), ApiError> {
    let endpoint = Endpoint::from_shared(format!("http://{address}")).expect("an address is a URI");
    let mut client = LogClient::new(endpoint.connect().await.expect("the port is open"));
    let (requests, stream) = tokio::sync::mpsc::channel::<FetchRequest>(1);
    let requests_of = tokio_stream::wrappers::ReceiverStream::new(stream);
    let responses = client.fetch(requests_of).await.map_err(|status| ApiError::from(&status))?;
    Ok((client, (requests, responses)))
}

/// An attacker on a machine of its own. It holds as many connections as it gets, with a stream on each, until the value
/// is dropped.
pub(super) struct Attacker {
    pub(super) refusals: Vec<ApiError>,
    pub(super) held: usize,
    end: Option<mpsc::SyncSender<()>>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Attacker {
    pub(super) fn begin(machine: &str, address: SocketAddr, tries: usize) -> Self {
        let (end, ended) = mpsc::sync_channel(1);
        let (report, reports) = mpsc::sync_channel(1);
        let machine = machine.to_owned();
        let thread = task::spawn_thread("attacker", move || {
            within(&machine, move || {
                runtime().block_on(async {
                    let (mut held, mut refusals) = (Vec::new(), Vec::new());
                    for _ in 0..tries {
                        match hold(address).await {
                            Ok(stream) => held.push(stream),
                            Err(refusal) => refusals.push(refusal),
                        }
                    }
                    report.send((held.len(), refusals)).expect("the test waits for the report");
                    // The runtime continues during this wait, so that pings get responses.
                    task::run_blocking(move || ended.recv().is_err()).await;
                    drop(held);
                });
            });
        });
        let (held, refusals) = reports.recv_timeout(TEST_TIMEOUT).expect("the attack has started");
        Self { refusals, held, end: Some(end), thread: Some(thread) }
    }
}

impl Drop for Attacker {
    fn drop(&mut self) {
        drop(self.end.take());
        let ended = self.thread.take().map(thread::JoinHandle::join);
        assert!(thread::panicking() || ended.is_none_or(|ended| ended.is_ok()), "the attacker panicked");
    }
}

/// Regression: one host held every connection of a broker. No other client, probe or broker was served until that host
/// closed them.
#[test]
fn open_streams_leave_connections_for_others_and_probes() {
    let test = "hostile::connections::open_streams_leave_connections_for_others_and_probes";
    if !run_inside(test) {
        return;
    }
    let network = Network::make();
    let ip = network.add("b1", 1);
    for (machine, number) in [("a1", 11), ("a2", 12)] {
        network.add(machine, number);
    }
    // Clients whose machine has failed do not close their connections.
    let mut instance = BrokerInstance::new()
        .in_namespace("b1", ip)
        .open_files(OPEN_FILES)
        .setting("broker.shutdown_timeout", "\"2s\"");
    let broker = instance.start();
    let address = instance.grpc();
    let runtime = runtime();
    runtime.block_on(wire::create_topic(address, "calm", 1, &[]));

    // One address gets half of the connections. All other addresses are served.
    let first = Attacker::begin("a1", address, MAX_GRPC_CONNECTIONS);
    assert_eq!(first.held, MAX_GRPC_CONNECTIONS / 2, "{:?}", first.refusals);
    for refusal in &first.refusals {
        assert_eq!(refusal.code, ErrorCode::Overloaded);
        assert!(refusal.message.contains("raise limits.connections_per_address"), "{refusal}");
    }
    runtime.block_on(check_serves(address, "calm"));

    // Two addresses get all connections. A new client is now refused with a named error.
    let second = Attacker::begin("a2", address, MAX_GRPC_CONNECTIONS);
    assert_eq!(second.held, MAX_GRPC_CONNECTIONS / 2, "{:?}", second.refusals);
    let refused = runtime.block_on(async {
        wire::append(&mut wire::log(address), wire::append_plain("calm", 0, vec![Bytes::from_static(b"x")])).await
    });
    let refused = refused.expect_err("every connection slot is in use");
    assert_eq!(refused.code, ErrorCode::Overloaded);
    assert!(refused.message.contains("raise the limit of open files (ulimit -n, LimitNOFILE)"), "{refused}");
    // Probes get responses nevertheless, also by gRPC, and so do clients on the broker's machine.
    let healthy = runtime.block_on(async {
        let endpoint = Endpoint::from_shared(format!("http://{address}")).expect("a URI");
        let mut health = HealthClient::new(endpoint.connect().await.expect("the port is open"));
        health.check(HealthCheckRequest::default()).await.expect("a probe has a response").into_inner().status
    });
    assert_eq!(healthy, 1);
    assert_eq!(http_get(instance.http(), "/readyz").expect("a probe has a response").0, 200);
    within("b1", move || self::runtime().block_on(check_serves(address, "calm")));
    let log = instance.log();
    for expected in [
        "raised_by=\"limits.connections_per_address\"",
        "raised_by=\"the limit of open files (ulimit -n, LimitNOFILE)\"",
    ] {
        assert!(log.contains(expected), "{expected}: {log}");
    }
    assert!(instance.metric("strandline_connections_refused_total") >= MAX_GRPC_CONNECTIONS as f64);

    // The dropped attacker closes its connections, and new clients get the free places.
    drop(second);
    eventually("a new client is served", || {
        let served = runtime.block_on(async {
            wire::append(&mut wire::log(address), wire::append_plain("calm", 0, vec![Bytes::from_static(b"y")])).await
        });
        served.ok()
    });
    drop(first);
    assert!(broker.terminate().success());
}

/// Regression: no idle connection was closed for a new one. New connections were closed until the idle ones had sent
/// nothing for ten seconds.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn longest_idle_connection_is_closed_first() {
    let mut instance =
        BrokerInstance::new().open_files(OPEN_FILES).setting("limits.connections_per_address", MAX_GRPC_CONNECTIONS);
    let mut broker = tokio::task::block_in_place(|| instance.start());
    wire::create_topic(instance.grpc(), "calm", 1, &[]).await;
    let (mut held, (_requests, mut responses)) = {
        let endpoint = Endpoint::from_shared(format!("http://{}", instance.grpc())).expect("a URI");
        let mut client = LogClient::new(endpoint.connect().await.expect("the port is open"));
        let (requests, stream) = tokio::sync::mpsc::channel::<FetchRequest>(1);
        let responses = client.fetch(tokio_stream::wrappers::ReceiverStream::new(stream)).await.expect("a stream");
        (client, (requests, responses.into_inner()))
    };
    // Some connections send nothing, some only the preface. Both kinds are idle.
    let silent: Vec<TcpStream> = (0..4 * MAX_GRPC_CONNECTIONS)
        .map(|number| {
            let mut stream = TcpStream::connect(instance.grpc()).expect("the port is open");
            if number % 2 == 0 {
                stream.write_all(PREFACE).expect("the request is sent");
            }
            stream
        })
        .collect();
    // Every new client is served at the first attempt.
    for _ in 0..4 {
        check_serves(instance.grpc(), "calm").await;
    }
    let waited = tokio::time::timeout(Duration::from_millis(100), responses.message()).await;
    assert!(waited.is_err(), "the stream is still open: {waited:?}");
    wire::append(&mut held, wire::append_plain("calm", 0, vec![Bytes::from_static(b"x")]))
        .await
        .expect("the broker accepts records");
    tokio::task::block_in_place(|| {
        assert!(instance.metric("strandline_connections_evicted_total") >= 3.0 * MAX_GRPC_CONNECTIONS as f64);
        assert_eq!(instance.metric("strandline_connections_refused_total"), 0.0);
        let few = || instance.metric("strandline_connections") <= MAX_GRPC_CONNECTIONS as f64;
        eventually("the idle connections are closed", || few().then_some(()));
    });
    assert!(instance.log().contains("closing the longest idle connections for new ones"), "{}", instance.log());
    assert!(broker.is_running());
    drop(silent);
}

/// Regression: 100,000 streams on a hundred connections took 700 MB.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn open_calls_are_limited_by_memory_and_per_connection() {
    let mut instance = BrokerInstance::new().setting("limits.memory_bytes", "\"64MiB\"");
    let _broker = tokio::task::block_in_place(|| instance.start());
    wire::create_topic(instance.grpc(), "calm", 1, &[]).await;
    let connect = async || {
        let endpoint = Endpoint::from_shared(format!("http://{}", instance.grpc())).expect("a URI");
        LogClient::new(endpoint.connect().await.expect("the port is open"))
    };
    // 64 MiB are enough for 2,048 calls. When these are open, each of ten connections may have 204.
    let (mut streams, mut clients) = (Vec::new(), Vec::new());
    for _ in 0..9 {
        let mut client = connect().await;
        for _ in 0..217 {
            streams.push(client.fetch(futures::stream::pending::<FetchRequest>()).await.expect("the call is accepted"));
        }
        clients.push(client);
    }
    let mut honest = connect().await;
    for _ in 0..150 {
        streams.push(
            honest.fetch(futures::stream::pending::<FetchRequest>()).await.expect("the connection has its share"),
        );
    }
    let refused = clients[0]
        .fetch(futures::stream::pending::<FetchRequest>())
        .await
        .expect_err("the connection has used its share");
    let refused = ApiError::from(&refused);
    assert_eq!((refused.code, refused.retryable), (ErrorCode::Overloaded, true), "{refused}");
    assert!(refused.message.contains("2048") && refused.message.contains("limits.memory_bytes"), "{refused}");
    wire::append(&mut honest, wire::append_plain("calm", 0, vec![Bytes::from_static(b"x")])).await.expect("served");
    assert!(instance.log().contains("limit of open calls and streams reached"), "{}", instance.log());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connection_announces_its_stream_limit() {
    let mut instance = BrokerInstance::new();
    let _broker = tokio::task::block_in_place(|| instance.start());
    let mut stream = TcpStream::connect(instance.grpc()).expect("the port is open");
    stream.set_read_timeout(Some(Duration::from_secs(10))).expect("a timeout can be set");
    stream.write_all(PREFACE).expect("the request is sent");
    let mut head = [0; 9];
    stream.read_exact(&mut head).expect("a frame");
    assert_eq!(head[3], 4, "the first frame holds the settings");
    let mut settings = vec![0; usize::from(u16::from_be_bytes([head[1], head[2]]))];
    stream.read_exact(&mut settings).expect("the payload arrives");
    let streams = settings.chunks(6).find(|pair| pair[..2] == [0, 3]).expect("a limit of streams");
    let bound = u32::from_be_bytes([streams[2], streams[3], streams[4], streams[5]]);
    assert_eq!(bound, limits::MAX_STREAMS_PER_CONNECTION);
}
