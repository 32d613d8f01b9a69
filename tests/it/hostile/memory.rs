//! Attackers of a broker's memory: what they announce and do not send, what they ask for and do not read, and small messages that become
//! large. Resident memory stays bounded meanwhile, and honest clients are served.
//!
//! The short form has fewer partitions and streams; `make hostile` runs the full one on an optimised broker, and measures what honest
//! appends wait. `make hostile ONLY=text` picks attacks on memory by their words.

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
use prost::Message as _;
use strandline::{
    limits,
    proto::{
        fault::{Fault, Reason},
        v1::{
            Acks, AppendRequest, FetchPartition, FetchRequest, GetMetadataRequest, PlainRecords, ProduceRequest,
            ReadRequest, Record, append_request::Payload,
        },
    },
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
    broker::{Broker, Home},
    patience::eventually,
    wire,
};

/// `limits.memory_bytes`, and what the whole process may be with it.
const MEMORY: &str = "\"512MiB\"";
const MAX_RESIDENT_BYTES: u64 = 700 << 20;

const APPEND: &str = "/strandline.v1.Log/Append";
const READ: &str = "/strandline.v1.Log/Read";

/// How long each attack lasts, and how many streams and partitions there are.
struct Scale {
    is_full: bool,
    seconds: u64,
    streams: usize,
    partitions: u32,
}

impl Scale {
    fn of_environment() -> Self {
        if std::env::var_os("STRANDLINE_HOSTILE_FULL").is_some() {
            Self { is_full: true, seconds: 15, streams: 10_000, partitions: 1000 }
        } else {
            Self { is_full: false, seconds: 3, streams: 2000, partitions: 100 }
        }
    }
}

fn endpoint(address: SocketAddr) -> Endpoint {
    Endpoint::from_shared(format!("http://{address}")).expect("an address is a URI")
}

/// The attackers have one core's time together.
static ATTACKERS: LazyLock<Runtime> =
    LazyLock::new(|| Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime"));

async fn connect(address: SocketAddr) -> Channel {
    connect_to(endpoint(address)).await
}

/// The connection runs among the attackers.
async fn connect_to(endpoint: Endpoint) -> Channel {
    let connected = ATTACKERS.spawn(async move { endpoint.connect().await });
    connected.await.expect("no panic").expect("the port is open")
}

/// Sends a call with these bytes as its body; the answer's head.
async fn call(mut channel: Channel, path: &str, body: Body) -> Option<http::Response<Body>> {
    future::poll_fn(|cx| channel.poll_ready(cx)).await.ok()?;
    let request = http::Request::post(format!("http://broker{path}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(body)
        .expect("a request");
    channel.call(request).await.ok()
}

/// The beginning of a message of so many bytes, of which so many are sent; the rest never comes.
fn withheld(announced: usize, sent: usize, gone: oneshot::Receiver<()>) -> Body {
    let prefix = [&[0][..], &u32::try_from(announced).expect("32 bits").to_be_bytes()].concat();
    let chunk = Bytes::from(vec![0; 1 << 18]);
    let mut pieces = vec![Bytes::from(prefix)];
    let mut left = sent;
    while left > 0 {
        let piece = chunk.slice(..left.min(chunk.len()));
        left -= piece.len();
        pieces.push(piece);
    }
    open(pieces, gone)
}

/// These bytes, and no end until the attacker is gone.
fn open(pieces: Vec<Bytes>, gone: oneshot::Receiver<()>) -> Body {
    let end = stream::once(gone).filter_map(|_| future::ready(None));
    let frames = stream::iter(pieces).chain(end).map(|piece| Ok::<_, tonic::Status>(Frame::data(piece)));
    Body::new(StreamBody::new(frames))
}

/// A message with its prefix.
fn framed(message: &[u8]) -> Bytes {
    let prefix = u32::try_from(message.len()).expect("32 bits").to_be_bytes();
    Bytes::from([&[0][..], &prefix, message].concat())
}

/// One whole message.
fn whole(message: &[u8]) -> Body {
    Body::new(http_body_util::Full::new(framed(message)))
}

/// What a call with this message is refused with.
async fn refusal(address: SocketAddr, path: &str, message: &[u8]) -> Fault {
    let response = call(connect(address).await, path, whole(message)).await.expect("an answer");
    let mut headers = response.headers().clone();
    if !headers.contains_key("grpc-status") {
        let body = response.into_body().collect().await.expect("a body");
        headers = body.trailers().cloned().expect("trailers");
    }
    Fault::from(&tonic::Status::from_header_map(&headers).expect("a status"))
}

fn resident_bytes(pid: u32) -> u64 {
    let statm = fs::read_to_string(Path::new("/proc").join(pid.to_string()).join("statm")).expect("it runs");
    let pages: u64 = statm.split(' ').nth(1).and_then(|pages| pages.parse().ok()).expect("a number");
    pages * 4096
}

/// A broker under attack, an honest client, and what the memory came to.
struct Target {
    broker: Broker,
    home: Home,
    scale: Scale,
}

impl Target {
    async fn start(scale: Scale) -> Self {
        let mut home = Home::new().setting("limits.memory_bytes", MEMORY).topic_default("max.message.bytes", 1 << 26);
        let broker = tokio::task::block_in_place(|| home.start());
        wire::create_topic(home.grpc(), "honest", 1, &[]).await;
        wire::create_topic(home.grpc(), "bombs", 1, &[("retention.ms", "-1")]).await;
        wire::create_topic(home.grpc(), "empty", 1, &[]).await;
        // The batches of these tests are old.
        wire::create_topic(home.grpc(), "t", scale.partitions, &[("retention.ms", "-1")]).await;
        Self { home, broker, scale }
    }

    fn address(&self) -> SocketAddr {
        self.home.grpc()
    }

    /// Attacks for a while. Resident memory stays below the bound, and an honest client's small appends are taken all the time.
    async fn withstands<F: Future<Output = ()> + Send + 'static>(&self, name: &str, attacks: Vec<F>) {
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
        let (p99, most) = (waits[waits.len() * 99 / 100], waits[waits.len() - 1]);
        let peak = peak.load(Ordering::Relaxed);
        eprintln!(
            "{name}: {} MiB resident at most; {} honest appends, p99 {p99:?}, slowest {most:?}",
            peak >> 20,
            waits.len()
        );
        assert!(peak < MAX_RESIDENT_BYTES, "{name}: {} MiB resident", peak >> 20);
        assert!(!self.scale.is_full || p99 < Duration::from_millis(50), "{name}: p99 {p99:?}");
    }

    /// So many streams on as few connections as may have them, each with an attack of its own.
    async fn on_streams<F, Fut>(&self, streams: usize, attack: F) -> Vec<Fut>
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

/// Calls again and again, and reads no more of an answer than its head.
async fn unread(channel: Channel, path: &str, body: impl Fn(oneshot::Receiver<()>) -> Body) {
    loop {
        let (alive, gone) = oneshot::channel();
        let answer = call(channel.clone(), path, body(gone)).await;
        if answer.as_ref().is_some_and(|answer| !answer.headers().contains_key("grpc-status")) {
            future::pending::<()>().await;
        }
        drop(alive);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn memory_stays_bounded_whatever_clients_announce_or_leave_unread() {
    let target = Target::start(Scale::of_environment()).await;
    let pid = target.broker.pid();
    let mut log = wire::log(target.address());
    for partition in 0..8 {
        for _ in 0..4 {
            let batch = wire::batch(&[&vec![7; 4 << 20]]);
            wire::append(&mut log, wire::append_batch("t", partition, batch)).await.expect("it takes records");
        }
    }
    let before = resident_bytes(pid);

    // 6 GB.
    let attack = |channel: Channel| async move {
        unread(channel.clone(), APPEND, |gone| withheld(60 << 20, (60 << 20) - 1, gone)).await
    };
    target.withstands("60 MiB but for the last byte, 100 streams", target.on_streams(100, attack).await).await;
    // 1.8 GB resident and 155 GB of address space.
    let attack =
        |channel: Channel| async move { unread(channel.clone(), APPEND, |gone| withheld(65 << 20, 0, gone)).await };
    let streams = target.scale.streams;
    target.withstands("65 MiB announced", target.on_streams(streams, attack).await).await;
    let attack =
        |channel: Channel| async move { unread(channel.clone(), APPEND, |gone| withheld(60_000, 59_999, gone)).await };
    target.withstands("60 KB but for the last byte", target.on_streams(streams, attack).await).await;

    // Requests of 20 bytes whose answers have 200, and whose stream holds what was sent ahead; files of the interface.
    let nameless = ProduceRequest { append: Some(AppendRequest::default()), ..Default::default() }.encode_to_vec();
    let ahead = Bytes::from(framed(&nameless).repeat(250_000 / (nameless.len() + 5)));
    let symbol = [&[0x22, 17][..], b"strandline.v1.Log"].concat();
    let reflected = Bytes::from(framed(&symbol).repeat(100));
    let produce = "/strandline.v1.Log/Produce";
    let reflection = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo";
    for (name, path, sent) in [
        ("acknowledgements that nobody reads", produce, ahead),
        ("reflection that nobody reads", reflection, reflected),
    ] {
        let attack = |channel: Channel| {
            let sent = sent.clone();
            async move { unread(channel, path, |gone| open(vec![sent.clone()], gone)).await }
        };
        target.withstands(name, target.on_streams(streams, attack).await).await;
    }

    // 4 GB with 100 streams.
    let places = |partition| vec![FetchPartition { topic: "t".to_owned(), partition, ..Default::default() }];
    let fetch = Bytes::from(
        FetchRequest { partitions: (0..8).flat_map(places).collect(), max_bytes: 16 << 20, ..Default::default() }
            .encode_to_vec(),
    );
    let attack = |channel: Channel| {
        let fetch = fetch.clone();
        async move { unread(channel, "/strandline.v1.Log/Fetch", |gone| open(vec![framed(&fetch)], gone)).await }
    };
    target.withstands("fetches that nobody reads, 100 streams", target.on_streams(100, attack).await).await;
    for plain in [false, true] {
        let request = ReadRequest {
            partitions: (0..8).flat_map(places).collect(),
            max_bytes: 16 << 20,
            plain,
            ..Default::default()
        };
        let request = Bytes::from(request.encode_to_vec());
        let attack = |channel: Channel| {
            let request = request.clone();
            async move { unread(channel, READ, |_| whole(&request)).await }
        };
        let name = if plain { "plain reads that nobody reads" } else { "reads that nobody reads" };
        target.withstands(name, target.on_streams(100, attack).await).await;
        // HTTP/2 took a whole response where the client took a byte of it.
        let by_bytes = endpoint(target.address()).initial_stream_window_size(1).initial_connection_window_size(1 << 30);
        let channel = connect_to(by_bytes).await;
        let attacks = (0..900).map(|_| attack(channel.clone())).collect();
        target.withstands(&format!("{name} but for a byte, 900 streams"), attacks).await;
    }

    // Batches of 100 KB whose records have 60 MiB: readers of an empty topic waited 1.6 s.
    let batch = wire::batch(&vec![&vec![0_u8; 1 << 20][..]; 60]);
    let bomb = wire::frame(&zstd::bulk::compress(&batch[61..], 1).expect("it compresses"), 60, 4);
    for _ in 0..4 {
        wire::append(&mut log, wire::append_batch("bombs", 0, bomb.clone())).await.expect("stored unread");
    }
    let place = |topic: &str| vec![FetchPartition { topic: topic.to_owned(), ..Default::default() }];
    let plain =
        |topic| ReadRequest { partitions: place(topic), max_bytes: 16 << 20, plain: true, ..Default::default() };
    let mut attacks = Vec::new();
    for _ in 0..8 {
        let channel = connect(target.address()).await;
        attacks.extend((0..4).map(|_| {
            let (channel, message) = (channel.clone(), plain("bombs").encode_to_vec());
            async move {
                while let Some(answer) = call(channel.clone(), READ, whole(&message)).await {
                    let _ = answer.into_body().collect().await;
                }
            }
        }));
    }
    let waits = Arc::new(std::sync::Mutex::new(Vec::new()));
    let (mut reader, seen, request) = (wire::log(target.address()), Arc::clone(&waits), plain("empty"));
    let mut reads = JoinSet::new();
    reads.spawn(async move {
        loop {
            let began = clock::monotonic();
            reader.read(request.clone()).await.expect("an answer");
            seen.lock().expect("no panic").push(began.elapsed());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    });
    target.withstands("readers of bombs", attacks).await;
    reads.shutdown().await;
    let mut waits = waits.lock().expect("no panic").clone();
    waits.sort();
    let p99 = waits.get(waits.len() * 99 / 100).copied().unwrap_or_default();
    eprintln!("plain reads of an empty topic meanwhile: {}, p99 {p99:?}", waits.len());
    assert!(!target.scale.is_full || p99 < Duration::from_millis(50), "plain reads of an empty topic: p99 {p99:?}");

    // 4.7, 3.6 and 2.3 GB from one message each.
    let records = |records: Vec<Record>| AppendRequest {
        topic: "t".to_owned(),
        acks: Acks::All.into(),
        payload: Some(Payload::Records(PlainRecords { records })),
        ..Default::default()
    };
    let empty_records =
        nested(&records(vec![Record::default(); 200]).encode_to_vec(), &[6], &[0x0a, 0].repeat(30 << 20));
    let empty_headers = nested(&records(Vec::new()).encode_to_vec(), &[6, 1], &[0x1a, 0].repeat(30 << 20));
    let empty_partitions = [0x0a, 0].repeat((2 << 20) - 10);
    let empty_names = GetMetadataRequest { topics: vec![String::new(); 1_000_000], all_topics: false }.encode_to_vec();
    for (what, path, message) in [
        ("empty records", APPEND, empty_records),
        ("empty headers", APPEND, empty_headers),
        ("empty partitions", READ, empty_partitions),
        ("empty names", "/strandline.v1.Admin/GetMetadata", empty_names),
    ] {
        let fault = refusal(target.address(), path, &message).await;
        assert_eq!(fault.reason, Reason::InvalidRequest, "{what}: {fault}");
        assert!(fault.message.contains(&limits::MAX_REQUEST_PARTS.to_string()), "{what}: {fault}");
        let address = target.address();
        let message = Bytes::from(message);
        let attack = move || {
            let message = message.clone();
            async move {
                loop {
                    refusal(address, path, &message).await;
                }
            }
        };
        target.withstands(what, vec![attack(), attack()]).await;
    }
    let fault = refusal(target.address(), READ, &vec![0; 5 << 20]).await;
    assert_eq!(fault.reason, Reason::MessageTooLarge, "{fault}");
    assert!(fault.message.contains(&limits::MAX_REQUEST_BYTES.to_string()), "{fault}");

    // 1.9 GB stayed.
    let home = &target.home;
    let most = before + before / 5;
    eprintln!("{} MiB before, {} MiB after", before >> 20, resident_bytes(pid) >> 20);
    tokio::task::block_in_place(|| {
        eventually("nothing is held for requests and responses any more", || {
            let held = home.metrics(["strandline_request_memory_bytes", "strandline_response_memory_bytes"]);
            (held == [0.0, 0.0]).then_some(())
        });
        eventually("memory goes back to the system", || (resident_bytes(pid) < most).then_some(()));
    });
    eprintln!("{} MiB in the end", resident_bytes(pid) >> 20);
}

/// Four connections that read nothing held all memory of responses, and four that held their answers back all that batches wait in: nobody
/// else was answered for as long as they stayed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_that_read_nothing_give_way_to_those_that_do() {
    let target = Target::start(Scale { is_full: false, ..Scale::of_environment() }).await;
    let mut log = wire::log(target.address());
    for _ in 0..20 {
        let batch = wire::batch(&[&vec![7; 1 << 20]]);
        wire::append(&mut log, wire::append_batch("t", 0, batch)).await.expect("it takes records");
    }
    let place = FetchPartition { topic: "t".to_owned(), ..Default::default() };
    let fetch = FetchRequest { partitions: vec![place.clone()], max_bytes: 16 << 20, ..Default::default() };
    let read = ReadRequest { partitions: vec![place.clone()], max_bytes: 16 << 20, plain: true, ..Default::default() };
    let append = |correlation| {
        let append = wire::append_batch("t", 1, wire::batch(&[&vec![7; 4 << 20]]));
        framed(&ProduceRequest { correlation, append: Some(append) }.encode_to_vec())
    };
    let produce: Vec<_> = (0..8).map(append).collect();
    let (fetch, read) = (framed(&fetch.encode_to_vec()), framed(&read.encode_to_vec()));
    let calls =
        [("/strandline.v1.Log/Fetch", vec![fetch]), ("/strandline.v1.Log/Produce", produce), (READ, vec![read])];
    let mut attackers = JoinSet::new();
    for number in 0..12 {
        let window = if number % 2 == 0 { 0 } else { 65_535 };
        let (endpoint, calls) = (endpoint(target.address()).initial_stream_window_size(window), calls.clone());
        attackers.spawn(async move {
            loop {
                let Ok(channel) = endpoint.connect().await else { continue };
                let (mut alive, mut streams) = (Vec::new(), JoinSet::new());
                for (path, pieces) in calls.clone().into_iter().cycle().take(60) {
                    let (sender, gone) = oneshot::channel();
                    alive.push(sender);
                    let (channel, body) = (channel.clone(), open(pieces.clone(), gone));
                    streams.spawn(async move { (call(channel, path, body).await, future::pending::<()>().await) });
                }
                // It is back when its connection was closed.
                while call(channel.clone(), READ, whole(&[])).await.is_some() {
                    tokio::time::sleep(Duration::from_millis(500)).await;
                }
            }
        });
    }
    let held = |home: &Home| home.metric("strandline_response_memory_bytes");
    tokio::task::block_in_place(|| eventually("they hold much", || (held(&target.home) > 60e6).then_some(())));

    let end = clock::monotonic() + Duration::from_secs(20);
    let (mut reads, mut appends, mut slowest) = (0, 0, Duration::ZERO);
    let request = FetchRequest { partitions: vec![place], max_bytes: 4 << 20, ..Default::default() };
    while clock::monotonic() < end {
        let began = clock::monotonic();
        let streamed = log.fetch(stream::iter([request.clone()])).await.expect("a stream");
        let mut answers = streamed.into_inner();
        while answers.message().await.expect("not broken").expect("no end").partitions[0].chunks.is_empty() {}
        drop(answers);
        (reads, slowest) = (reads + 1, slowest.max(began.elapsed()));
        let batch = wire::append_batch("t", 2, wire::batch(&[&vec![7; 1 << 20]]));
        appends += usize::from(wire::append(&mut log, batch).await.is_ok());
    }
    eprintln!("{reads} reads and {appends} appends in 20 s, the slowest read took {slowest:?}");
    assert!(reads > 2 && appends > 2, "{reads} reads and {appends} appends");
    assert!(target.home.metric("strandline_connections_closed_unread_total") > 0.0);
    attackers.shutdown().await;
}

/// A message that has `inner` at the end of the messages that these fields nest.
fn nested(before: &[u8], fields: &[u32], inner: &[u8]) -> Vec<u8> {
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
