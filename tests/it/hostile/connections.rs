//! Attackers that hold connections: idle ones, and ones with an open stream each. Attackers with streams are on machines of their own
//! (network namespaces), because each address has a share.

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

use super::{serves, target::PREFACE};
use crate::{
    broker::{Home, http_get},
    cluster::network::{Network, inside, within},
    test_timeout::{TEST_TIMEOUT, eventually},
    wire,
};

/// Maximum number of open files of the attacked broker: 32 connections for gRPC, 8 for HTTP.
const OPEN_FILES: u32 = 256;
const GRPC_PLACES: usize = 32;

pub(super) fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime")
}

/// Opens a connection with one fetch stream, which stays open.
pub(super) async fn hold(address: SocketAddr) -> Result<(LogClient<Channel>, impl Sized), ApiError> {
    let endpoint = Endpoint::from_shared(format!("http://{address}")).expect("an address is a URI");
    let mut client = LogClient::new(endpoint.connect().await.expect("the port is open"));
    let (requests, stream) = tokio::sync::mpsc::channel::<FetchRequest>(1);
    let requests_of = tokio_stream::wrappers::ReceiverStream::new(stream);
    let answers = client.fetch(requests_of).await.map_err(|status| ApiError::from(&status))?;
    Ok((client, (requests, answers)))
}

/// An attacker on a machine of its own. It holds as many connections as it gets, with a stream on each, until the value is dropped.
pub(super) struct Attacker {
    pub(super) refusals: Vec<ApiError>,
    pub(super) held: usize,
    end: Option<mpsc::SyncSender<()>>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Attacker {
    pub(super) fn begin(machine: &str, address: SocketAddr, tries: usize) -> Self {
        let (end, ended) = mpsc::sync_channel(1);
        let (tell, told) = mpsc::sync_channel(1);
        let machine = machine.to_owned();
        let thread = task::spawn_thread("attacker", move || {
            within(&machine, move || {
                runtime().block_on(async {
                    let (mut held, mut refusals) = (Vec::new(), Vec::new());
                    for _ in 0..tries {
                        match hold(address).await {
                            Ok(one) => held.push(one),
                            Err(refusal) => refusals.push(refusal),
                        }
                    }
                    tell.send((held.len(), refusals)).expect("somebody asks");
                    // The runtime continues during this wait, so that pings get responses.
                    task::run_blocking(move || ended.recv().is_err()).await;
                    drop(held);
                });
            });
        });
        let (held, refusals) = told.recv_timeout(TEST_TIMEOUT).expect("the attack is begun");
        Self { refusals, held, end: Some(end), thread: Some(thread) }
    }
}

impl Drop for Attacker {
    fn drop(&mut self) {
        drop(self.end.take());
        let ended = self.thread.take().map(thread::JoinHandle::join);
        assert!(thread::panicking() || ended.is_none_or(|ended| ended.is_ok()), "the attacker failed");
    }
}

/// Regression: one host held every connection of a broker. No other client, probe or broker was served until that host closed them.
#[test]
fn connections_with_open_streams_leave_places_for_other_addresses_probes_and_loopback() {
    let test =
        "hostile::connections::connections_with_open_streams_leave_places_for_other_addresses_probes_and_loopback";
    if !inside(test) {
        return;
    }
    let network = Network::make();
    let ip = network.add("b1", 1);
    for (machine, number) in [("a1", 11), ("a2", 12)] {
        network.add(machine, number);
    }
    // Clients whose machine has failed do not close their connections.
    let mut home =
        Home::new().in_namespace("b1", ip).open_files(OPEN_FILES).setting("broker.shutdown_timeout", "\"2s\"");
    let broker = home.start();
    let address = home.grpc();
    let runtime = runtime();
    runtime.block_on(wire::create_topic(address, "calm", 1, &[]));

    // One address gets half of the connections. All other addresses are served.
    let first = Attacker::begin("a1", address, GRPC_PLACES);
    assert_eq!(first.held, GRPC_PLACES / 2, "{:?}", first.refusals);
    for refusal in &first.refusals {
        assert_eq!(refusal.code, ErrorCode::Overloaded);
        assert!(refusal.message.contains("raise limits.connections_per_address"), "{refusal}");
    }
    runtime.block_on(serves(address, "calm"));

    // Two addresses get all connections. A new client is now refused with a named error.
    let second = Attacker::begin("a2", address, GRPC_PLACES);
    assert_eq!(second.held, GRPC_PLACES / 2, "{:?}", second.refusals);
    let refused = runtime.block_on(async {
        wire::append(&mut wire::log(address), wire::append_plain("calm", 0, vec![Bytes::from_static(b"x")])).await
    });
    let refused = refused.expect_err("there is no place");
    assert_eq!(refused.code, ErrorCode::Overloaded);
    assert!(refused.message.contains("raise the limit of open files (ulimit -n, LimitNOFILE)"), "{refused}");
    // Probes get responses nevertheless, also by gRPC, and so do clients on the broker's machine.
    let healthy = runtime.block_on(async {
        let endpoint = Endpoint::from_shared(format!("http://{address}")).expect("a URI");
        let mut health = HealthClient::new(endpoint.connect().await.expect("the port is open"));
        health.check(HealthCheckRequest::default()).await.expect("a probe is answered").into_inner().status
    });
    assert_eq!(healthy, 1);
    assert_eq!(http_get(home.http(), "/readyz").expect("a probe is answered").0, 200);
    within("b1", move || self::runtime().block_on(serves(address, "calm")));
    let log = home.log();
    for said in [
        "raised_by=\"limits.connections_per_address\"",
        "raised_by=\"the limit of open files (ulimit -n, LimitNOFILE)\"",
    ] {
        assert!(log.contains(said), "{said}: {log}");
    }
    assert!(home.metric("strandline_connections_refused_total") >= GRPC_PLACES as f64);

    // Connections whose streams have ended hold nothing that other clients need.
    drop(second);
    eventually("a newcomer is served", || {
        let served = runtime.block_on(async {
            wire::append(&mut wire::log(address), wire::append_plain("calm", 0, vec![Bytes::from_static(b"y")])).await
        });
        served.ok()
    });
    drop(first);
    assert!(broker.terminate().success());
}

/// Regression: no idle connection was closed for a new one. New connections were closed until the idle ones had sent nothing for ten
/// seconds.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_connection_that_was_idle_longest_makes_room_and_one_with_a_stream_never() {
    let mut home = Home::new().open_files(OPEN_FILES).setting("limits.connections_per_address", GRPC_PLACES);
    let mut broker = tokio::task::block_in_place(|| home.start());
    wire::create_topic(home.grpc(), "calm", 1, &[]).await;
    let (mut held, (_requests, mut answers)) = {
        let endpoint = Endpoint::from_shared(format!("http://{}", home.grpc())).expect("a URI");
        let mut client = LogClient::new(endpoint.connect().await.expect("the port is open"));
        let (requests, stream) = tokio::sync::mpsc::channel::<FetchRequest>(1);
        let answers = client.fetch(tokio_stream::wrappers::ReceiverStream::new(stream)).await.expect("a stream");
        (client, (requests, answers.into_inner()))
    };
    // Some connections send nothing, some only the preface. Both kinds are idle.
    let silent: Vec<TcpStream> = (0..4 * GRPC_PLACES)
        .map(|number| {
            let mut stream = TcpStream::connect(home.grpc()).expect("the port is open");
            if number % 2 == 0 {
                stream.write_all(PREFACE).expect("it is sent");
            }
            stream
        })
        .collect();
    // Every new client is served at the first attempt.
    for _ in 0..4 {
        serves(home.grpc(), "calm").await;
    }
    let waited = tokio::time::timeout(Duration::from_millis(100), answers.message()).await;
    assert!(waited.is_err(), "the stream is open still: {waited:?}");
    wire::append(&mut held, wire::append_plain("calm", 0, vec![Bytes::from_static(b"x")])).await.expect("served there");
    tokio::task::block_in_place(|| {
        assert!(home.metric("strandline_connections_evicted_total") >= 3.0 * GRPC_PLACES as f64);
        assert_eq!(home.metric("strandline_connections_refused_total"), 0.0);
        let few = || home.metric("strandline_connections") <= GRPC_PLACES as f64;
        eventually("those that made room are gone", || few().then_some(()));
    });
    assert!(home.log().contains("the connections that were idle longest are closed for new ones"), "{}", home.log());
    assert!(broker.is_running());
    drop(silent);
}

/// Regression: 100,000 streams on a hundred connections took 700 MB.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn open_calls_are_bounded_by_memory_and_every_connection_has_its_share() {
    let mut home = Home::new().setting("limits.memory_bytes", "\"64MiB\"");
    let _broker = tokio::task::block_in_place(|| home.start());
    wire::create_topic(home.grpc(), "calm", 1, &[]).await;
    let connect = async || {
        let endpoint = Endpoint::from_shared(format!("http://{}", home.grpc())).expect("a URI");
        LogClient::new(endpoint.connect().await.expect("the port is open"))
    };
    // 64 MiB are enough for 2,048 calls. When these are open, each of ten connections may have 204.
    let (mut streams, mut clients) = (Vec::new(), Vec::new());
    for _ in 0..9 {
        let mut client = connect().await;
        for _ in 0..217 {
            streams.push(client.fetch(futures::stream::pending::<FetchRequest>()).await.expect("there is memory"));
        }
        clients.push(client);
    }
    let mut honest = connect().await;
    for _ in 0..150 {
        streams.push(honest.fetch(futures::stream::pending::<FetchRequest>()).await.expect("its share"));
    }
    let refused = clients[0].fetch(futures::stream::pending::<FetchRequest>()).await.expect_err("it has its share");
    let refused = ApiError::from(&refused);
    assert_eq!((refused.code, refused.retryable), (ErrorCode::Overloaded, true), "{refused}");
    assert!(refused.message.contains("2048") && refused.message.contains("limits.memory_bytes"), "{refused}");
    wire::append(&mut honest, wire::append_plain("calm", 0, vec![Bytes::from_static(b"x")])).await.expect("served");
    assert!(home.log().contains("as many calls and streams are open as there is memory for"), "{}", home.log());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_announces_how_many_streams_it_takes() {
    let mut home = Home::new();
    let _broker = tokio::task::block_in_place(|| home.start());
    let mut stream = TcpStream::connect(home.grpc()).expect("the port is open");
    stream.set_read_timeout(Some(Duration::from_secs(10))).expect("a timeout can be set");
    stream.write_all(PREFACE).expect("it is sent");
    let mut head = [0; 9];
    stream.read_exact(&mut head).expect("a frame");
    assert_eq!(head[3], 4, "the first frame holds the settings");
    let mut settings = vec![0; usize::from(u16::from_be_bytes([head[1], head[2]]))];
    stream.read_exact(&mut settings).expect("its payload");
    let streams = settings.chunks(6).find(|pair| pair[..2] == [0, 3]).expect("a bound of streams");
    let bound = u32::from_be_bytes([streams[2], streams[3], streams[4], streams[5]]);
    assert_eq!(bound, limits::MAX_STREAMS_PER_CONNECTION);
}
