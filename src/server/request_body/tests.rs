//! Request bodies: content with any fragmentation, limits, and charged memory.

use futures::{FutureExt as _, StreamExt as _, future::poll_fn};
use prost::Message as _;

use super::*;
use crate::{
    broker::Budgets,
    proto::v1::{self, append_request::Payload},
};

const APPEND: &str = RECORD_CALLS[0];
const PRODUCE: &str = PRODUCE_PATH;
const READ: &str = "/strandline.v1.Log/Read";

fn framed(message: &[u8]) -> Vec<u8> {
    let len = u32::try_from(message.len()).expect("small");
    [&[0], &len.to_be_bytes()[..], message].concat()
}

/// Returns a body of these pieces. With `open`, the body never ends.
fn body(pieces: Vec<Vec<u8>>, open: bool, path: &str, memory: &CallMemory) -> RequestBody {
    let pieces = futures::stream::iter(pieces.into_iter().map(|piece| Ok::<_, BoxError>(Bytes::from(piece))));
    let inner =
        if open { Body::from_stream(pieces.chain(futures::stream::pending())) } else { Body::from_stream(pieces) };
    RequestBody::new(inner, path, memory.clone(), &RequestSchemas::of_clients())
}

async fn frame(body: &mut RequestBody) -> Option<Result<Bytes, ApiError>> {
    let frame = poll_fn(|cx| Pin::new(&mut *body).poll_frame(cx)).await?;
    let refused = |error: BoxError| ApiError::from(&*error.downcast::<Status>().expect("a status"));
    Some(frame.map(|frame| frame.into_data().expect("data")).map_err(refused))
}

fn memory(budgets: &Budgets) -> CallMemory {
    CallMemory::new(budgets.clone(), budgets.open_connection(|| {}))
}

#[tokio::test(start_paused = true)]
async fn messages_are_unchanged_by_fragmentation() {
    let budgets = Budgets::new(64 << 20, 1 << 20);
    let batch = |bytes: usize| [&[0x2a][..], &prost_len(bytes), &vec![7; bytes]].concat();
    let messages = [vec![], batch(10), batch(300_000), batch(70_000), vec![]].map(|message| framed(&message));
    for size in [1, 3, 5, 4096, 100_000, usize::MAX] {
        let cut = |sent: &[u8]| sent.chunks(size.min(sent.len())).map(<[u8]>::to_vec).collect();
        let memory = memory(&budgets);
        let mut stream = body(cut(&messages.concat()), false, PRODUCE, &memory);
        assert!(all_of(&mut stream).await == messages.concat(), "in pieces of {size}");
        for message in &messages {
            // A unary call takes one message. It waits neither for the bytes after the message nor for an end that
            // never arrives.
            let mut call = body(cut(&[&message[..], &framed(&batch(80_000))].concat()), true, APPEND, &memory);
            assert!(all_of(&mut call).await == *message && call.is_end_stream(), "in pieces of {size}");
            assert!(budgets.taken().0 > message.len() / 2, "read bytes stay charged until the handler takes them");
            drop(memory.take_request());
        }
        drop(memory);
        assert_eq!(budgets.taken().0, 0);
    }
}

/// Returns all bytes that are passed on.
async fn all_of(body: &mut RequestBody) -> Vec<u8> {
    let mut received = Vec::new();
    while let Some(piece) = frame(body).await {
        received.extend_from_slice(&piece.expect("a valid body"));
    }
    received
}

fn prost_len(bytes: usize) -> Vec<u8> {
    let mut len = Vec::new();
    prost::encoding::encode_varint(bytes as u64, &mut len);
    len
}

/// The bytes that a length announces are charged when they arrive. A request whose bytes do not arrive fails if
/// complete requests need its memory. Regression: lengths of 60 MiB on many streams took 6 GB, and lengths of 65 MiB on
/// 10,000 streams took 1.8 GB.
#[tokio::test(start_paused = true)]
async fn announced_bytes_are_charged_on_arrival_and_yield() {
    let budgets = Budgets::new(96 << 20, 1 << 20);
    let announced = [&[0][..], &(60_u32 << 20).to_be_bytes()].concat();
    let mut bodies: Vec<_> = (0..400).map(|_| body(vec![announced.clone()], true, APPEND, &memory(&budgets))).collect();
    for body in &mut bodies {
        let pending = poll_fn(|cx| Poll::Ready(Pin::new(&mut *body).poll_frame(cx).is_pending())).await;
        assert!(pending, "no frame is passed on");
    }
    assert!(budgets.taken().0 <= 96 << 20, "{:?}", budgets.taken());
    let memory = memory(&budgets);
    let mut honest = body(vec![framed(&[0x2a, 1, 7])], false, APPEND, &memory);
    let mut ended = tokio::task::JoinSet::new();
    ended.spawn(async move {
        let all = bodies.iter_mut().map(|body| Box::pin(frame(body)));
        futures::future::select_all(all).await.0
    });
    assert_eq!(frame(&mut honest).await, Some(Ok(framed(&[0x2a, 1, 7]).into())), "the request is served");
    let ended = ended
        .join_next()
        .await
        .expect("a task ends")
        .expect("no panic")
        .expect("a response")
        .expect_err("the request is refused");
    assert_eq!((ended.code, ended.retryable), (ErrorCode::Overloaded, true));
    assert!(ended.message.contains("limits.request_memory_bytes"), "{ended}");
}

#[tokio::test(start_paused = true)]
async fn size_and_parts_of_requests_are_limited() {
    let budgets = Budgets::new(512 << 20, 1 << 20);
    let large = [&[0][..], &(5_u32 << 20).to_be_bytes()].concat();
    let refused = frame(&mut body(vec![large.clone()], true, READ, &memory(&budgets))).await;
    let refused = refused.expect("a response").expect_err("too large");
    assert_eq!(refused.code, ErrorCode::RequestTooLarge);
    assert!(refused.message.contains("5242880") && refused.message.contains("4194304"), "{refused}");
    // Regression: 33 million empty records of two bytes each took 4.7 GB.
    let records = [0x0a, 0].repeat(limits::MAX_REQUEST_PARTS + 1);
    let message = [&[0x32][..], &prost_len(records.len()), &records].concat();
    let memory = memory(&budgets);
    let mut many = body(framed(&message).chunks(1 << 14).map(<[u8]>::to_vec).collect(), false, APPEND, &memory);
    let refused = loop {
        match frame(&mut many).await {
            Some(Ok(_)) => {}
            Some(Err(error)) => break error,
            None => panic!("the request was accepted"),
        }
    };
    assert_eq!(refused.code, ErrorCode::InvalidRequest);
    assert!(refused.message.contains(&limits::MAX_REQUEST_PARTS.to_string()), "{refused}");
    assert_eq!(budgets.taken().0, 0, "all memory is released");
}

/// Values of `limits.request_memory_bytes` for a `limits.memory_bytes` of 512 MiB and of 64 MiB.
const REQUEST_BYTES: [u64; 2] = [96 << 20, 12 << 20];
const FETCH: &str = FETCH_PATH;

fn pieces(message: &impl prost::Message) -> Vec<Vec<u8>> {
    framed(&message.encode_to_vec()).chunks(1 << 14).map(<[u8]>::to_vec).collect()
}

fn append(records: usize, bytes: usize) -> v1::AppendRequest {
    let record = v1::Record { value: Some(vec![7; bytes].into()), ..Default::default() };
    let records = v1::RecordList { records: vec![record; records] };
    v1::AppendRequest { payload: Some(Payload::Records(records)), ..Default::default() }
}

fn fetch(partitions: usize) -> v1::FetchRequest {
    let partition = v1::FetchPartition { topic: "orders".to_owned(), ..Default::default() };
    v1::FetchRequest { partitions: vec![partition; partitions], ..Default::default() }
}

/// Reads a body to its end. Returns the number of bytes.
async fn read(mut body: RequestBody) -> Result<usize, ApiError> {
    let mut bytes = 0;
    while let Some(piece) = frame(&mut body).await {
        bytes += piece?.len();
    }
    Ok(bytes)
}

/// Regression: parts took memory from the pool of their message, so appends with many parts were always rejected.
#[tokio::test(start_paused = true)]
async fn requests_with_many_parts_are_accepted() {
    let large = [(APPEND, pieces(&append(30 << 10, 1 << 10))), (APPEND, pieces(&append(100_000, 3)))];
    for bytes in REQUEST_BYTES {
        let budgets = Budgets::new(bytes, 1 << 20);
        let connection = budgets.open_connection(|| {});
        let mut reads = tokio::task::JoinSet::new();
        for (path, sent) in large.iter().cloned().chain([(FETCH, pieces(&fetch(10_000)))]) {
            for _ in 0..3 {
                let memory = CallMemory::new(budgets.clone(), connection.clone());
                let (body, sent_bytes) = (body(sent.clone(), false, path, &memory), sent.concat().len());
                reads.spawn(async move {
                    assert_eq!(read(body).await, Ok(sent_bytes));
                    memory.take_request();
                });
            }
        }
        while let Some(read) = reads.join_next().await {
            read.expect("all requests are accepted, even concurrently on one connection");
        }
        assert_eq!(budgets.taken().0, 0);
    }
}

/// Regression: while one large request waited, every small request with a part failed.
#[tokio::test(start_paused = true)]
async fn small_requests_pass_while_large_ones_wait() {
    for bytes in REQUEST_BYTES {
        let budgets = Budgets::new(bytes, 1 << 20);
        let connection = budgets.open_connection(|| {});
        let call = || CallMemory::new(budgets.clone(), connection.clone());
        let held = (call().try_request(65 << 20), call().try_parts(limits::MAX_REQUEST_PARTS));
        assert!(held.0.is_some() && held.1.is_some());
        let large = body(pieces(&append(30 << 10, 1 << 10)), false, APPEND, &call());
        // The request is small, but has more parts than there is free memory for.
        let many = body(pieces(&fetch(5000)), false, FETCH, &call());
        let mut waiting = [Box::pin(read(large)), Box::pin(read(many))];
        for request in &mut waiting {
            assert!(futures::poll!(request).is_pending(), "the request waits");
        }
        let began = clock::monotonic();
        read(body(pieces(&append(1, 100)), false, APPEND, &call())).await.expect("a small append passes");
        read(body(pieces(&fetch(3)), false, FETCH, &call())).await.expect("a small fetch passes");
        assert_eq!(clock::monotonic(), began, "small requests do not wait");
        drop(held);
        let served = futures::future::join_all(waiting).await;
        assert!(served.iter().all(Result::is_ok), "all requests are served: {served:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn last_bytes_wait_for_memory_of_parts() {
    let budgets = Budgets::new(REQUEST_BYTES[0], 1 << 20);
    let other_call = memory(&budgets);
    let held = other_call.try_parts(limits::MAX_REQUEST_PARTS).expect("capacity");
    let sent = pieces(&append(100_000, 3));
    let mut refused = body(sent.clone(), false, APPEND, &memory(&budgets));
    let (mut passed, began) = (0, clock::monotonic());
    let error = loop {
        match frame(&mut refused).await.expect("no end") {
            Ok(piece) => passed += piece.len(),
            Err(error) => break error,
        }
    };
    assert_eq!((error.code, error.retryable), (ErrorCode::Overloaded, true));
    assert_eq!(passed, sent[..sent.len() - 1].concat().len());
    assert!(clock::monotonic() - began >= std::time::Duration::from_secs(10));
    drop(held);
    assert_eq!(budgets.taken().0, 0);
}

/// Regression: if the handler of a stream took no memory, the stream held the memory of all of its messages.
#[tokio::test(start_paused = true)]
async fn streams_hold_memory_for_one_message() {
    let budgets = Budgets::new(REQUEST_BYTES[0], 1 << 20);
    let sent = vec![framed(&fetch(30).encode_to_vec()); 5];
    let memory = memory(&budgets);
    let mut stream = body(sent, true, FETCH, &memory);
    let mut max_taken = 0;
    for _ in 0..5 {
        frame(&mut stream).await.expect("a message").expect("the message is accepted");
        max_taken = max_taken.max(budgets.taken().0);
        assert_eq!(budgets.taken().0, max_taken, "the charge is that of one message");
    }
    let pending = poll_fn(|cx| Poll::Ready(Pin::new(&mut stream).poll_frame(cx).is_pending())).await;
    assert!(pending && budgets.taken().0 == 0, "all messages are handled");
}

/// Regression: the first frame of each request was kept while the request waited for memory, and was not charged.
/// 10,000 waiting requests held 600 MB.
#[tokio::test(start_paused = true)]
async fn waiting_requests_hold_little_memory() {
    let budgets = Budgets::new(REQUEST_BYTES[1], 1 << 20);
    let calls: Vec<_> = (0..8).map(|_| memory(&budgets)).collect();
    let full: Vec<_> = calls.iter().flat_map(|call| std::iter::from_fn(|| call.try_request(SMALL_BYTES))).collect();
    let before = budgets.taken().0;
    let mut message = framed(&append(1, 60_000).encode_to_vec());
    message.pop();
    let mut waiting: Vec<_> =
        (0..100).map(|_| Box::pin(read(body(vec![message.clone()], true, APPEND, &memory(&budgets))))).collect();
    for request in &mut waiting {
        assert!(futures::poll!(request).is_pending(), "the request waits");
    }
    // The first of these requests got the memory that was still free.
    let held = budgets.taken().0 - before;
    assert!(held as u64 <= REQUEST_BYTES[1] / 16 + SMALL_BYTES as u64, "{held}");
    let began = clock::monotonic();
    read(body(pieces(&append(1, 100)), false, APPEND, &memory(&budgets))).await.expect("a complete request");
    assert_eq!(clock::monotonic(), began, "a complete request does not wait for incomplete ones");
    let [first, last] = [&framed(&[0x2a, 1, 7])[..7], &[7]].map(<[u8]>::to_vec);
    let mut small = Box::pin(read(body(vec![first, last], false, APPEND, &memory(&budgets))));
    assert!(futures::poll!(&mut small).is_pending(), "a request in pieces waits");
    tokio::time::sleep(REFUSAL_DELAY).await;
    let refused = waiting.iter_mut().filter_map(|request| request.as_mut().now_or_never());
    assert!(
        refused
            .map(|outcome| outcome.expect_err("refused").code)
            .filter(|reason| *reason == ErrorCode::Overloaded)
            .count()
            > 80
    );
    drop(full);
    small.await.expect("a small request gets memory");
}

/// Regression: received requests of a stream were not charged while its handler processed an earlier one, 250 KB per
/// stream.
#[tokio::test(start_paused = true)]
async fn requests_sent_ahead_are_charged() {
    let budgets = Budgets::new(REQUEST_BYTES[1], 1 << 20);
    let message = framed(&fetch(3).encode_to_vec());
    let first_bytes = message.len();
    let [whole, split] = [0, first_bytes / 2].map(|cut| {
        let mut sent = [&message[..], &message.repeat(200_000 / first_bytes)].concat();
        let frame = sent.split_off(cut);
        if cut == 0 { vec![frame] } else { vec![sent, frame] }
    });
    for frames in [whole, split] {
        let (mut streams, mut refused) = (Vec::new(), 0);
        for _ in 0..200 {
            let mut stream = Box::pin(body(frames.clone(), true, FETCH, &memory(&budgets)));
            let (mut first, end) = (0, clock::monotonic() + 2 * REFUSAL_DELAY);
            while first < first_bytes && clock::monotonic() < end {
                match tokio::time::timeout_at(end, frame(&mut stream)).await {
                    Ok(Some(Ok(piece))) => first += piece.len(),
                    Ok(Some(Err(error))) => {
                        assert_eq!((error.code, error.retryable), (ErrorCode::Overloaded, true));
                        refused += 1;
                        break;
                    }
                    _ => break,
                }
            }
            streams.push(stream);
        }
        let held: usize = streams.iter().map(|stream| stream.rest.len()).sum();
        assert!(refused > 100, "{refused} of 200");
        assert!(held > 1 << 20 && held <= budgets.taken().0 + 200 * WAITING_BYTES, "{held}, {:?}", budgets.taken());
        drop(streams);
        assert_eq!(budgets.taken().0, 0);
    }
    // A handler that takes all messages frees the memory of the bytes behind them.
    let mut stream = body(vec![message.repeat(2000)], true, FETCH, &memory(&budgets));
    for _ in 0..2000 {
        frame(&mut stream).await.expect("a message").expect("the message is accepted");
    }
    assert!(stream.rest.is_empty() && stream.ahead.is_none());
}

/// Regression: trailers were kept for as long as their call was open. The response to a reflection request of 4 MB
/// contained that request twice.
#[tokio::test]
async fn trailers_end_a_body_and_requests_for_names_are_small() {
    use http_body_util::{BodyExt as _, Full};

    let budgets = Budgets::new(64 << 20, 1 << 20);
    let message = framed(&[0x2a, 1, 7]);
    let trailers = async { Some(Ok(tonic::codegen::http::HeaderMap::new())) };
    let inner = Body::new(Full::new(Bytes::from(message.clone())).with_trailers(trailers));
    let mut stream = RequestBody::new(inner, PRODUCE, memory(&budgets), &RequestSchemas::of_clients());
    assert_eq!(all_of(&mut stream).await, message);

    let path = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo";
    for (bytes, is_taken) in [(MAX_NAMES_BYTES, true), (MAX_NAMES_BYTES + 1, false)] {
        let taken = frame(&mut body(vec![framed(&vec![7; bytes])], true, path, &memory(&budgets))).await;
        let reason = taken.expect("a response").err().map(|error| error.code);
        assert_eq!(reason, (!is_taken).then_some(ErrorCode::RequestTooLarge), "{bytes}");
    }
}
