//! Members with scripted responses: errors that decide about retries, and responses that no etcd sends.

use std::{
    convert::Infallible,
    sync::atomic::{AtomicU32, Ordering::SeqCst},
};

use bytes::{BufMut as _, Bytes, BytesMut};
use futures::StreamExt as _;
use http_body_util::StreamBody;
use hyper::{HeaderMap, Request, Response, body::Frame, body::Incoming, service::service_fn};
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::conn::auto,
};
use prost::Message;
use tokio::net::TcpListener;

use super::*;
use crate::proto::status::Code;

// Messages of etcd's gRPC interface, with the fields that these responses need.

#[derive(Clone, PartialEq, Message)]
struct ResponseHeader {
    #[prost(uint64, tag = "1")]
    cluster_id: u64,
    #[prost(int64, tag = "3")]
    revision: i64,
}

#[derive(Clone, PartialEq, Message)]
struct KeyValue {
    #[prost(bytes = "vec", tag = "1")]
    key: Vec<u8>,
    #[prost(int64, tag = "2")]
    create_revision: i64,
    #[prost(int64, tag = "3")]
    mod_revision: i64,
    #[prost(int64, tag = "4")]
    version: i64,
}

#[derive(Clone, PartialEq, Message)]
struct RangeResponse {
    #[prost(message, optional, tag = "1")]
    header: Option<ResponseHeader>,
    #[prost(message, repeated, tag = "2")]
    kvs: Vec<KeyValue>,
    #[prost(bool, tag = "3")]
    more: bool,
}

#[derive(Clone, PartialEq, Message)]
struct EmptyMessage {}

#[derive(Clone, PartialEq, Message)]
struct TxnResponse {
    #[prost(message, optional, tag = "1")]
    header: Option<ResponseHeader>,
    #[prost(bool, tag = "2")]
    succeeded: bool,
    /// One message per operation. These messages are empty, although etcd always sets the operation's response.
    #[prost(message, repeated, tag = "3")]
    responses: Vec<EmptyMessage>,
}

#[derive(Clone, PartialEq, Message)]
struct EventMessage {
    #[prost(int32, tag = "1")]
    kind: i32,
    #[prost(message, optional, tag = "2")]
    kv: Option<KeyValue>,
}

#[derive(Clone, PartialEq, Message)]
struct WatchResponse {
    #[prost(message, optional, tag = "1")]
    header: Option<ResponseHeader>,
    #[prost(bool, tag = "3")]
    created: bool,
    #[prost(bool, tag = "4")]
    canceled: bool,
    #[prost(string, tag = "6")]
    reason: String,
    #[prost(message, repeated, tag = "11")]
    events: Vec<EventMessage>,
}

#[derive(Clone, PartialEq, Message)]
struct LeaseGrantResponse {
    #[prost(message, optional, tag = "1")]
    header: Option<ResponseHeader>,
    #[prost(int64, tag = "2")]
    id: i64,
    #[prost(int64, tag = "3")]
    ttl: i64,
}

const HEADER: Option<ResponseHeader> = Some(ResponseHeader { cluster_id: 7, revision: 9 });

/// Response to one request: gRPC messages, then a status.
#[derive(Clone)]
struct ScriptedResponse {
    messages: Vec<Vec<u8>>,
    /// Pause after the first message.
    pause: Duration,
    code: Code,
    message: &'static str,
}

impl ScriptedResponse {
    fn of(message: &impl Message) -> Self {
        Self::stream(vec![message.encode_to_vec()])
    }

    fn stream(messages: Vec<Vec<u8>>) -> Self {
        Self { messages, pause: Duration::ZERO, code: Code::Ok, message: "" }
    }

    fn error(code: Code, message: &'static str) -> Self {
        Self { messages: Vec::new(), pause: Duration::ZERO, code, message }
    }

    /// Returns the HTTP/2 body: each message with its gRPC length prefix, then the status as trailers.
    fn into_body(self) -> StreamBody<impl futures::Stream<Item = Result<Frame<Bytes>, Infallible>>> {
        let framed = |message: Vec<u8>| {
            let mut frame = BytesMut::new();
            frame.put_u8(0);
            frame.put_u32(u32::try_from(message.len()).expect("short"));
            frame.put_slice(&message);
            Frame::data(frame.freeze())
        };
        let mut trailers = HeaderMap::new();
        trailers.insert("grpc-status", i32::from(self.code).into());
        trailers.insert("grpc-message", self.message.parse().expect("printable"));
        let frames: Vec<_> = self.messages.into_iter().map(framed).chain([Frame::trailers(trailers)]).collect();
        let pause = self.pause;
        StreamBody::new(futures::stream::iter(frames).enumerate().then(move |(index, frame)| async move {
            if index == 1 {
                tokio::time::sleep(pause).await;
            }
            Ok(frame)
        }))
    }
}

/// A server that responds as its script does. The script gets the path of a request and the number of earlier requests.
struct ScriptedMember {
    endpoint: String,
    requests: Arc<AtomicU32>,
    tasks: Tasks,
}

impl ScriptedMember {
    async fn start(script: impl Fn(&str, u32) -> ScriptedResponse + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let endpoint = format!("http://{}", listener.local_addr().expect("bound"));
        let (requests, tasks, script) = (Arc::new(AtomicU32::new(0)), Tasks::new(), Arc::new(script));
        let (counted, group) = (requests.clone(), tasks.clone());
        tasks.spawn("scripted-member", async move {
            loop {
                let (socket, _) = tokio::select! {
                    biased;
                    () = group.cancelled() => return,
                    accepted = listener.accept() => accepted.expect("listening"),
                };
                let (counted, script, stop) = (counted.clone(), script.clone(), group.clone());
                group.spawn("scripted-connection", async move {
                    let service = service_fn(move |request: Request<Incoming>| {
                        let reply = script(request.uri().path(), counted.fetch_add(1, SeqCst));
                        let response = Response::builder().header("content-type", "application/grpc");
                        let response = response.body(reply.into_body()).expect("a response");
                        async move { Ok::<_, Infallible>(response) }
                    });
                    let builder = auto::Builder::new(TokioExecutor::new());
                    let connection = builder.serve_connection(TokioIo::new(socket), service);
                    tokio::select! {
                        biased;
                        () = stop.cancelled() => {}
                        _result = connection => {}
                    }
                });
            }
        });
        Self { endpoint, requests, tasks }
    }

    async fn store(&self) -> EtcdStore {
        EtcdStore::open(EtcdOptions::new([self.endpoint.as_str()])).await.expect("valid options")
    }

    /// Stops the member and returns the number of requests that it received.
    async fn stop(self) -> u32 {
        self.tasks.stop().await;
        self.requests.load(SeqCst)
    }
}

#[tokio::test]
async fn only_unexecuted_requests_are_sent_again() {
    let success = |path: &str| match path {
        "/etcdserverpb.KV/Txn" => {
            ScriptedResponse::of(&TxnResponse { header: HEADER, succeeded: true, responses: Vec::new() })
        }
        _ => ScriptedResponse::of(&RangeResponse { header: HEADER, ..RangeResponse::default() }),
    };
    for (code, message, is_retried) in [
        (Code::Unavailable, "etcdserver: no leader", true),
        (Code::ResourceExhausted, "etcdserver: too many requests", true),
        (Code::Unavailable, "etcdserver: leader changed", false),
        (Code::Unavailable, "etcdserver: request timed out", false),
        (Code::Unavailable, "etcdserver: server stopped", false),
        (Code::Unknown, "raft proposal dropped", false),
    ] {
        let first_fails =
            move |path: &str, before| if before == 0 { ScriptedResponse::error(code, message) } else { success(path) };
        let member = ScriptedMember::start(first_fails).await;
        let outcome = put(&member.store().await, "n", "1").await;
        match is_retried {
            true => assert_eq!(outcome, Ok(Revision(9)), "{message}"),
            false => assert!(outcome.is_err_and(|error| error.outcome_unknown()), "{message}"),
        }
        assert_eq!(member.stop().await, if is_retried { 2 } else { 1 }, "{message}");
        let member = ScriptedMember::start(first_fails).await;
        member.store().await.get("n").await.expect("reads are always retried");
        assert_eq!(member.stop().await, 2, "{message}");
    }
}

#[tokio::test]
async fn request_that_all_members_reject_is_sent_once() {
    let full = "etcdserver: mvcc: database space exceeded";
    let member = ScriptedMember::start(move |_, _| ScriptedResponse::error(Code::ResourceExhausted, full)).await;
    let error = put(&member.store().await, "n", "1").await.expect_err("no space");
    assert!(!error.outcome_unknown() && error.to_string().contains(full), "{error}");
    assert_eq!(member.stop().await, 1);
}

#[tokio::test]
async fn missing_operation_responses_are_not_needed() {
    let script = |path: &str, _| match path {
        "/etcdserverpb.KV/Txn" => {
            ScriptedResponse::of(&TxnResponse { header: HEADER, succeeded: false, responses: vec![EmptyMessage {}; 2] })
        }
        _ => ScriptedResponse::of(&RangeResponse { header: HEADER, ..RangeResponse::default() }),
    };
    let member = ScriptedMember::start(script).await;
    let transaction = Transaction::new().when(Compare::Exists("a".to_owned())).else_get("a").else_get("b");
    let outcome = member.store().await.transact(transaction).await;
    assert_eq!(outcome, Ok(TxnOutcome::CompareFailed { revision: Revision(9), found: vec![None, None] }));
    member.stop().await;
}

#[tokio::test]
async fn non_text_keys_and_unknown_change_kinds_are_skipped() {
    let kv = |key: &[u8], version| KeyValue { key: key.to_vec(), create_revision: -1, mod_revision: 9, version };
    let script = move |path: &str, before| match path {
        "/etcdserverpb.KV/Range" => {
            let kvs = vec![kv(b"\xFF", 1), kv(b"", 1), kv(b"text", 1)];
            ScriptedResponse::of(&RangeResponse { header: HEADER, kvs, more: false })
        }
        // The first watch stream returns changes. Each later one is rejected, which ends the store's watch.
        _ if before <= 1 => {
            let events = vec![
                EventMessage { kind: 7, kv: None },
                EventMessage { kind: 7, kv: Some(kv(b"unknown", 1)) },
                EventMessage { kind: 0, kv: Some(kv(b"\xFF", 1)) },
                EventMessage { kind: 1, kv: Some(kv(b"gone", 0)) },
            ];
            let created_response = WatchResponse { header: HEADER, created: true, ..WatchResponse::default() };
            let changed = WatchResponse { header: HEADER, events, ..WatchResponse::default() };
            ScriptedResponse::stream(vec![created_response.encode_to_vec(), changed.encode_to_vec()])
        }
        _ => {
            let reason = "etcdserver: mvcc: required revision has been compacted".to_owned();
            ScriptedResponse::of(&WatchResponse {
                header: HEADER,
                created: true,
                canceled: true,
                reason,
                ..WatchResponse::default()
            })
        }
    };
    let member = ScriptedMember::start(script).await;
    let store = member.store().await;
    let listing = store.list("").await.expect("the other entries are returned");
    let keys: Vec<_> = listing.entries.iter().map(|entry| entry.key.as_str()).collect();
    assert_eq!(keys, ["", "text"]);
    assert_eq!(listing.entries[1].create_revision, Revision::ZERO);
    let mut watch = store.watch("", Revision(9)).await.expect("the watch starts");
    let events = next(&mut watch).await.expect("the other entries are returned");
    assert_eq!(events.len(), 2, "{events:?}");
    assert_eq!(events[1], WatchEvent::Delete { key: "gone".to_owned(), revision: Revision(9) });
    let error = next(&mut watch).await.expect_err("the resumed watch is rejected");
    assert!(matches!(error, MetaStoreError::Compacted { from: Revision(10), .. }), "{error:?}");
    member.stop().await;
}

/// A watch whose streams time out before their first response ends with a retryable error, after which the metadata
/// cache relists. Regression: the watch opened the same stream again and again.
#[tokio::test]
async fn watch_without_response_in_time_ends_for_a_relist() {
    let slow = |path: &str, _: u32| match path {
        "/etcdserverpb.Watch/Watch" => {
            let created = WatchResponse { header: HEADER, created: true, ..WatchResponse::default() };
            let progress = WatchResponse { header: HEADER, ..WatchResponse::default() };
            let messages = vec![created.encode_to_vec(), progress.encode_to_vec()];
            ScriptedResponse { pause: Duration::from_secs(6), ..ScriptedResponse::stream(messages) }
        }
        _ => ScriptedResponse::of(&RangeResponse { header: HEADER, ..RangeResponse::default() }),
    };
    let member = ScriptedMember::start(slow).await;
    let mut watch = member.store().await.watch("n", Revision(9)).await.expect("the watch starts");
    let error = next(&mut watch).await.expect_err("no stream of the watch lasts until its first response");
    assert!(matches!(error, MetaStoreError::Unavailable { .. }) && error.retryable(), "{error:?}");
    member.stop().await;
}

#[tokio::test]
async fn invalid_response_is_an_error_of_every_call() {
    let no_header = |path: &str, _: u32| match path {
        "/etcdserverpb.KV/Range" => ScriptedResponse::of(&RangeResponse::default()),
        "/etcdserverpb.KV/Txn" => ScriptedResponse::of(&TxnResponse { succeeded: true, ..TxnResponse::default() }),
        "/etcdserverpb.Watch/Watch" => {
            ScriptedResponse::of(&WatchResponse { created: true, ..WatchResponse::default() })
        }
        "/etcdserverpb.Lease/LeaseGrant" => ScriptedResponse::of(&LeaseGrantResponse { header: HEADER, id: 0, ttl: 5 }),
        _ => ScriptedResponse::stream(Vec::new()),
    };
    let garbage = |_: &str, _: u32| ScriptedResponse::stream(vec![vec![0xFF; 40]]);
    let (no_header, garbage) = tokio::join!(ScriptedMember::start(no_header), ScriptedMember::start(garbage));
    for member in [no_header, garbage] {
        let store = member.store().await;
        let lease = LeaseId(1);
        let (get, list, put, watch, grant, keep_alive, revoke) = tokio::join!(
            store.get("n"),
            store.list("n"),
            put(&store, "n", "1"),
            store.watch("n", Revision(1)),
            store.grant(Duration::from_secs(5)),
            store.keep_alive(lease),
            store.revoke(lease),
        );
        assert!(put.as_ref().is_err_and(MetaStoreError::outcome_unknown), "{put:?}");
        let errors = [get.err(), list.err(), put.err(), watch.err(), grant.err(), keep_alive.err(), revoke.err()];
        for error in errors {
            assert!(error.as_ref().is_some_and(MetaStoreError::retryable), "{error:?}");
        }
        member.stop().await;
    }
}
