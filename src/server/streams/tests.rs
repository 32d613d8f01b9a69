//! Streams of messages: content with any fragmentation, ends and errors, and the lifetime of buffers.

use std::sync::Arc;

use futures::{FutureExt as _, future::poll_fn};

use super::*;
use crate::{
    proto::v1::{ProduceRequest, ProduceResponse},
    task::lock::Mutex,
};

fn framed(message: &impl Message) -> Vec<u8> {
    let mut out = BytesMut::new();
    put_message(message, &mut out);
    out.to_vec()
}

/// Returns a body in pieces of `size`. With `open`, the body never ends.
fn body(bytes: &[u8], size: usize, open: bool) -> Body {
    let pieces: Vec<_> = bytes.chunks(size).map(|piece| Ok::<_, Status>(Bytes::copy_from_slice(piece))).collect();
    let pieces = stream::iter(pieces);
    if open { Body::from_stream(pieces.chain(stream::pending())) } else { Body::from_stream(pieces) }
}

fn numbered(correlation_id: u64) -> ProduceRequest {
    ProduceRequest { correlation_id, append: None }
}

/// Returns a response in which each message has the number of its request.
fn response_to(request: Request) -> Response {
    let to_response =
        |request: ProduceRequest| ProduceResponse { correlation_id: request.correlation_id, result: None };
    serve(request, move |requests| requests.into_inner().map(move |request| Ok(to_response(request?))))
}

/// Returns the bytes of a response and its final status.
async fn all_of(mut response: Response) -> (Vec<u8>, Status) {
    let mut received = Vec::new();
    loop {
        let frame =
            poll_fn(|cx| Pin::new(response.body_mut()).poll_frame(cx)).await.expect("the body ends with trailers");
        match frame.expect("never an error").into_data() {
            Ok(data) => received.extend_from_slice(&data),
            Err(end) => {
                let trailers = end.into_trailers().expect("data or trailers");
                assert!(poll_fn(|cx| Pin::new(response.body_mut()).poll_frame(cx)).await.is_none());
                return (received, Status::from_header_map(&trailers).expect("a status"));
            }
        }
    }
}

#[tokio::test]
async fn messages_are_unchanged_by_fragmentation() {
    let numbers = [0, 1, 300, u64::MAX];
    let sent: Vec<u8> = numbers.iter().flat_map(|number| framed(&numbered(*number))).collect();
    let expected: Vec<u8> =
        numbers.iter().flat_map(|number| framed(&ProduceResponse { correlation_id: *number, result: None })).collect();
    for size in 1..=sent.len() {
        let response = response_to(Request::new(body(&sent, size, false)));
        assert_eq!(response.headers()[CONTENT_TYPE], "application/grpc");
        let (received, end) = all_of(response).await;
        assert_eq!((received, end.code()), (expected.clone(), Code::Ok), "in pieces of {size}");
    }
}

#[tokio::test]
async fn unreadable_stream_ends_with_error_after_responses() {
    let (valid_request, response) =
        (framed(&numbered(7)), framed(&ProduceResponse { correlation_id: 7, result: None }));
    let cases: [(&[u8], Code, &str); 5] = [
        (&[0, 0, 0], Code::Internal, "the body ends within a message"),
        (&[0, 0, 0, 0, 2, 8], Code::Internal, "the body ends within a message"),
        (&[1, 0, 0, 0, 0], Code::Unimplemented, "compressed"),
        (&[9, 0, 0, 0, 0], Code::Internal, "flag of a message is 9"),
        (&[0, 0, 0, 0, 2, 0xff, 0xff], Code::Internal, "varint"),
    ];
    for (bytes, code, text) in cases {
        let (received, end) =
            all_of(response_to(Request::new(body(&[&valid_request[..], bytes].concat(), 4, false)))).await;
        assert_eq!((received, end.code()), (response.clone(), code), "{bytes:?}");
        assert!(end.message().contains(text), "{bytes:?}: {}", end.message());
    }
    let mut request = Request::new(body(&valid_request, 10, false));
    request.headers_mut().insert("grpc-encoding", HeaderValue::from_static("gzip"));
    let refused = Status::from_header_map(response_to(request).headers()).expect("a status");
    assert_eq!(refused.code(), Code::Unimplemented);
    assert!(refused.message().contains("compressed") && refused.message().contains("gzip"), "{refused}");
}

/// After a reset by the client, the requests end without an error that metrics would count.
#[tokio::test]
async fn reset_ends_requests_without_error() {
    let pieces = [Ok(Bytes::from(framed(&numbered(7)))), Err(Status::cancelled("reset"))];
    let (_, end) = all_of(response_to(Request::new(Body::from_stream(stream::iter(pieces))))).await;
    assert_eq!(end.code(), Code::Ok);
}

/// Regression: an idle stream kept the buffer of a request of 64 MiB, and each idle consumer kept the buffer of its
/// last response.
#[tokio::test]
async fn idle_stream_keeps_no_message_buffers() {
    let batch = Bytes::from(vec![7; 1 << 20]);
    let append = crate::proto::v1::AppendRequest {
        payload: Some(crate::proto::v1::append_request::Payload::Batch(batch)),
        ..Default::default()
    };
    let sent = framed(&ProduceRequest { correlation_id: 1, append: Some(append) });
    let taken = Arc::new(Mutex::new(None));
    let took = Arc::clone(&taken);
    let mut response = serve(Request::new(body(&sent, 30_000, true)), move |requests| {
        requests.into_inner().map(move |request: Result<ProduceRequest, Status>| {
            let request = request?;
            *took.lock() = Some(request.clone());
            Ok(request)
        })
    });
    let frame = poll_fn(|cx| Pin::new(response.body_mut()).poll_frame(cx)).await.expect("no end").expect("no error");
    assert!(poll_fn(|cx| Pin::new(response.body_mut()).poll_frame(cx)).now_or_never().is_none(), "the stream is open");
    let frame = frame.into_data().expect("data");
    assert_eq!(frame.len(), sent.len());
    assert!(frame.is_unique(), "the stream keeps the buffer of its last response");
    let request = taken.lock().take().expect("the request arrived");
    let Some(crate::proto::v1::append_request::Payload::Batch(batch)) =
        request.append.and_then(|append| append.payload)
    else {
        panic!("the batch that was sent");
    };
    assert!(batch.is_unique(), "the stream keeps the buffer of its last request");
}
