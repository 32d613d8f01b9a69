//! A broker under attack: the calls of the attackers, and the measurements meanwhile.

use std::{
    fs,
    net::SocketAddr,
    path::Path,
    sync::{
        Arc, LazyLock,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use futures::{StreamExt as _, future, stream};
use http_body::Frame;
use http_body_util::{BodyExt as _, StreamBody};
use strandline::{
    proto::{error::ApiError, v1::FetchPartition},
    task::clock,
};
use tokio::{
    runtime::{Builder, Runtime},
    sync::oneshot,
    task::JoinSet,
};
use tonic::{
    body::Body,
    client::GrpcService as _,
    codegen::http,
    transport::{Channel, Endpoint},
};

use crate::{
    broker::{Broker, BrokerInstance},
    test_timeout::eventually,
    wire,
};

/// Value of `limits.memory_bytes`. [`MAX_RESIDENT_BYTES`] is the limit of the whole process with this value.
const MEMORY: &str = "\"512MiB\"";
const MAX_RESIDENT_BYTES: u64 = 700 << 20;

pub(super) const APPEND: &str = "/strandline.v1.Log/Append";
pub(super) const READ: &str = "/strandline.v1.Log/Read";

/// First bytes of an HTTP/2 client: the preface, and settings that change nothing.
pub(super) const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";

/// Number of partitions of the topic `t` that [`Target::fill`] writes to.
pub(super) const FILLED: i32 = 8;

/// Duration of each attack in seconds, and the numbers of streams and partitions.
pub(super) struct Scale {
    pub(super) is_full: bool,
    pub(super) seconds: u64,
    pub(super) streams: usize,
    pub(super) partitions: u32,
}

impl Scale {
    pub(super) fn of_environment() -> Self {
        if std::env::var_os("STRANDLINE_HOSTILE_FULL").is_some() {
            Self { is_full: true, seconds: 15, streams: 10_000, partitions: 1000 }
        } else {
            Self { is_full: false, seconds: 3, streams: 2000, partitions: 100 }
        }
    }
}

pub(super) fn endpoint(address: SocketAddr) -> Endpoint {
    Endpoint::from_shared(format!("http://{address}")).expect("an address is a URI")
}

/// Runtime of the attackers, which share the time of one core.
pub(super) static ATTACKERS: LazyLock<Runtime> =
    LazyLock::new(|| Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime"));

pub(super) async fn connect(address: SocketAddr) -> Channel {
    connect_to(endpoint(address)).await
}

/// Connects on the runtime of the attackers.
pub(super) async fn connect_to(endpoint: Endpoint) -> Channel {
    let connected = ATTACKERS.spawn(async move { endpoint.connect().await });
    connected.await.expect("no panic").expect("the port is open")
}

/// Sends a call with this body. Returns the response once its header has arrived; `None` if the call fails.
pub(super) async fn call(channel: Channel, path: &str, body: Body) -> Option<http::Response<Body>> {
    call_with(channel, path, "", body).await
}

/// Sends a call as [`call`] does, with a value in an additional header.
pub(super) async fn call_with(
    mut channel: Channel,
    path: &str,
    header: &str,
    body: Body,
) -> Option<http::Response<Body>> {
    future::poll_fn(|cx| channel.poll_ready(cx)).await.ok()?;
    let request = http::Request::post(format!("http://broker{path}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .header("x-value", header)
        .body(body)
        .expect("a request");
    channel.call(request).await.ok()
}

/// Returns the beginning of a message of `announced` bytes, of which `sent` are sent. The rest is never sent.
pub(super) fn withheld_body(announced: usize, sent: usize, closed: oneshot::Receiver<()>) -> Body {
    let prefix = [&[0][..], &u32::try_from(announced).expect("32 bits").to_be_bytes()].concat();
    let chunk = Bytes::from(vec![0; 1 << 18]);
    let mut pieces = vec![Bytes::from(prefix)];
    let mut left = sent;
    while left > 0 {
        let piece = chunk.slice(..left.min(chunk.len()));
        left -= piece.len();
        pieces.push(piece);
    }
    open_body(pieces, closed)
}

/// Returns a body of these bytes, which does not end before the attacker drops the sender of `closed`.
pub(super) fn open_body(pieces: Vec<Bytes>, closed: oneshot::Receiver<()>) -> Body {
    let end = stream::once(closed).filter_map(|_| future::ready(None));
    let frames = stream::iter(pieces).chain(end).map(|piece| Ok::<_, tonic::Status>(Frame::data(piece)));
    Body::new(StreamBody::new(frames))
}

/// Returns a gRPC message with its prefix of five bytes.
pub(super) fn framed(message: &[u8]) -> Bytes {
    let prefix = u32::try_from(message.len()).expect("32 bits").to_be_bytes();
    Bytes::from([&[0][..], &prefix, message].concat())
}

/// Returns a body of one complete message.
pub(super) fn complete_body(message: &[u8]) -> Body {
    Body::new(http_body_util::Full::new(framed(message)))
}

/// Makes a call with this message on a new connection. Returns the error of the call, which must fail.
pub(super) async fn error_of_call(address: SocketAddr, path: &str, message: &[u8]) -> ApiError {
    let response = call(connect(address).await, path, complete_body(message)).await.expect("a response");
    let mut headers = response.headers().clone();
    if !headers.contains_key("grpc-status") {
        let body = response.into_body().collect().await.expect("a body");
        headers = body.trailers().cloned().expect("trailers");
    }
    ApiError::from(&tonic::Status::from_header_map(&headers).expect("a status"))
}

pub(super) fn resident_bytes(pid: u32) -> u64 {
    let statm =
        fs::read_to_string(Path::new("/proc").join(pid.to_string()).join("statm")).expect("the process is running");
    let pages: u64 = statm.split(' ').nth(1).and_then(|pages| pages.parse().ok()).expect("a number");
    pages * 4096
}

/// A broker under attack, and the scale of the attacks.
pub(super) struct Target {
    pub(super) broker: Broker,
    pub(super) instance: BrokerInstance,
    pub(super) scale: Scale,
}

impl Target {
    pub(super) async fn start(scale: Scale) -> Self {
        Self::start_on(BrokerInstance::new(), scale).await
    }

    /// Starts a broker with [`MEMORY`] as its memory limit, and creates the topics of the tests.
    pub(super) async fn start_on(instance: BrokerInstance, scale: Scale) -> Self {
        let mut instance = instance.setting("limits.memory_bytes", MEMORY).topic_default("max.message.bytes", 1 << 26);
        let broker = tokio::task::block_in_place(|| instance.start());
        wire::create_topic(instance.grpc(), "honest", 1, &[]).await;
        wire::create_topic(instance.grpc(), "bombs", 1, &[("retention.ms", "-1")]).await;
        wire::create_topic(instance.grpc(), "empty", 1, &[]).await;
        // The batches of these tests have old timestamps.
        wire::create_topic(instance.grpc(), "t", scale.partitions, &[("retention.ms", "-1")]).await;
        Self { instance, broker, scale }
    }

    pub(super) fn address(&self) -> SocketAddr {
        self.instance.grpc()
    }

    /// Runs attacks for a while. Resident memory must stay below the limit, and the small appends of an honest client
    /// must always succeed, in the full form also fast. Does nothing if the name does not contain the value of
    /// `STRANDLINE_HOSTILE_ONLY`.
    pub(super) async fn attack_for_a_while<F: Future<Output = ()> + Send + 'static>(
        &self,
        name: &str,
        attacks: Vec<F>,
    ) {
        if !name.contains(&std::env::var("STRANDLINE_HOSTILE_ONLY").unwrap_or_default()) {
            return;
        }
        let pid = self.broker.pid();
        let peak = Arc::new(AtomicU64::new(0));
        let (mut watch, seen) = (JoinSet::new(), Arc::clone(&peak));
        watch.spawn(async move {
            loop {
                seen.fetch_max(resident_bytes(pid), Ordering::Relaxed);
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        });
        let mut attackers = JoinSet::new();
        attacks.into_iter().for_each(|attack| drop(attackers.spawn_on(attack, ATTACKERS.handle())));
        let (mut log, mut waits) = (wire::log(self.address()), Vec::new());
        let end = clock::monotonic() + Duration::from_secs(self.scale.seconds);
        while clock::monotonic() < end {
            let began = clock::monotonic();
            let append = wire::append_plain("honest", 0, vec![Bytes::from_static(b"small")]);
            let appended = wire::append(&mut log, append).await;
            assert!(appended.is_ok(), "{name}: an honest append: {appended:?}");
            waits.push(began.elapsed());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        attackers.shutdown().await;
        watch.shutdown().await;
        waits.sort();
        let (p99, max) = (waits[waits.len() * 99 / 100], waits[waits.len() - 1]);
        let peak = peak.load(Ordering::Relaxed);
        eprintln!(
            "{name}: {} MiB resident at most; {} honest appends, p99 {p99:?}, slowest {max:?}",
            peak >> 20,
            waits.len()
        );
        assert!(peak < MAX_RESIDENT_BYTES, "{name}: {} MiB resident", peak >> 20);
        assert!(!self.scale.is_full || p99 < Duration::from_millis(50), "{name}: p99 {p99:?}");
    }

    /// Writes records to disk that memory does not keep: 16 MiB to each of the first partitions.
    pub(super) async fn fill(&self) {
        let mut log = wire::log(self.address());
        for partition in 0..FILLED {
            for _ in 0..4 {
                let batch = wire::batch(&[&vec![7; 4 << 20]]);
                wire::append(&mut log, wire::append_batch("t", partition, batch))
                    .await
                    .expect("the broker accepts records");
            }
        }
    }

    /// Checks that memory held for clients is freed, and returned to the system too.
    pub(super) fn check_freed(&self, before: u64) {
        let (instance, pid) = (&self.instance, self.broker.pid());
        let max = before + before / 5;
        eprintln!("{} MiB before, {} MiB after", before >> 20, resident_bytes(pid) >> 20);
        let mut last_print = None;
        tokio::task::block_in_place(|| {
            // The limit is `TEST_TIMEOUT`, one minute.
            eventually("the memory of requests and responses is returned to the system", || {
                let held = instance.metrics(["strandline_request_memory_bytes", "strandline_response_memory_bytes"]);
                let resident = resident_bytes(pid);
                let now = clock::monotonic();
                if last_print.is_none_or(|last_print| now.duration_since(last_print) > Duration::from_secs(10)) {
                    last_print = Some(now);
                    eprintln!("{held:?} bytes of requests and responses, {} MiB", resident >> 20);
                }
                (held == [0.0, 0.0] && resident < max).then_some(())
            });
        });
        eprintln!("{} MiB at the end", resident_bytes(pid) >> 20);
    }

    /// Returns one attack for each of this number of connections.
    pub(super) fn on_connections<F, Fut>(
        &self,
        connections: usize,
        window: u32,
        attack: F,
    ) -> Vec<impl Future<Output = ()> + use<F, Fut>>
    where
        F: Fn(Channel) -> Fut + Clone,
        Fut: Future<Output = ()> + Send + 'static,
    {
        let endpoint = endpoint(self.address()).initial_stream_window_size(window);
        let attack = |_| {
            let (endpoint, attack) = (endpoint.clone(), attack.clone());
            async move {
                attack(endpoint.connect().await.expect("the port is open")).await;
            }
        };
        (0..connections).map(attack).collect()
    }

    /// Returns this number of attacks, each on its own stream, on as few connections as may have them.
    pub(super) async fn on_streams<F, Fut>(&self, streams: usize, attack: F) -> Vec<Fut>
    where
        F: Fn(Channel) -> Fut,
        Fut: Future<Output = ()> + Send + 'static,
    {
        let mut attacks = Vec::new();
        for _ in 0..streams.div_ceil(900) {
            let channel = connect(self.address()).await;
            attacks.extend((0..900.min(streams - attacks.len())).map(|_| attack(channel.clone())));
        }
        attacks
    }
}

/// Calls until a call succeeds. Then keeps that call open, and reads no more of its response than the header.
pub(super) async fn call_without_reading(channel: Channel, path: &str, body: impl Fn(oneshot::Receiver<()>) -> Body) {
    loop {
        let (alive, closed) = oneshot::channel();
        let response = call(channel.clone(), path, body(closed)).await;
        if response.as_ref().is_some_and(|response| !response.headers().contains_key("grpc-status")) {
            future::pending::<()>().await;
        }
        drop(alive);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Returns a partition of the topic `t`, from its start.
pub(super) fn fetch_partition(partition: i32) -> FetchPartition {
    FetchPartition { topic: "t".to_owned(), partition, ..Default::default() }
}

/// Returns the bytes `before`, and then `inner` nested in messages of these fields, the first field outermost.
pub(super) fn nested(before: &[u8], fields: &[u32], inner: &[u8]) -> Vec<u8> {
    let mut message = inner.to_vec();
    for field in fields.iter().rev() {
        let mut outer = Vec::with_capacity(message.len() + 16);
        prost::encoding::encode_key(*field, prost::encoding::WireType::LengthDelimited, &mut outer);
        prost::encoding::encode_varint(message.len() as u64, &mut outer);
        outer.extend_from_slice(&message);
        message = outer;
    }
    [before, &message].concat()
}
