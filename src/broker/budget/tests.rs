//! Tests of request and response memory: the shares of connections, and the ends of requests and connections whose
//! clients do not send or read.

use super::{connections::UNREAD_TIMEOUT, queue::MAX_ENDED_BYTES, *};
use crate::{
    limits,
    task::{clock, lock::Mutex},
};

const MIB: usize = 1 << 20;

fn call(budgets: &Budgets) -> CallMemory {
    CallMemory::new(budgets.clone(), budgets.open_connection(|| {}))
}

#[tokio::test(start_paused = true)]
async fn connection_takes_only_its_share_of_memory() {
    let budgets = Budgets::new(72 * MIB as u64, 64 * MIB as u64);
    let first = call(&budgets);
    let mut held: Vec<_> = (0..8).map(|_| first.try_request(MIB).expect("within the share")).collect();
    assert!(first.try_request(MIB).is_none(), "the share is a quarter of the large pool");
    let other = call(&budgets);
    held.extend((0..8).map(|_| other.try_request(MIB).expect("within the share")));
    let refused = first.clone().request(MIB).await.expect_err("the requests of the connection hold its share");
    assert_eq!(refused.code, ErrorCode::Overloaded);
    for part in ["1048576", "75497472", "limits.request_memory_bytes"] {
        assert!(refused.message.contains(part), "{part}: {refused}");
    }
    drop(held);
    assert_eq!(budgets.taken(), (0, 0));
    first.request(MIB).await.expect("memory was freed");
}

#[tokio::test(start_paused = true)]
async fn stalled_requests_end_when_others_wait_for_memory() {
    let budgets = Budgets::new(72 * MIB as u64, MIB as u64);
    for bytes in [SMALL_BYTES, 8 * MIB] {
        let full: Vec<_> = std::iter::from_fn(|| {
            let call = call(&budgets);
            let grant = call.try_request(bytes)?;
            Some((call.register_incomplete(bytes, clock::monotonic()), grant))
        })
        .collect();
        assert!(full.len() >= 4);
        let mut waits = tokio::task::JoinSet::new();
        waits.spawn(call(&budgets).request(1000.max(bytes / 2)));
        let oldest = &full[0].0;
        std::future::poll_fn(|cx| match oldest.check(cx.waker()) {
            Ok(()) => std::task::Poll::Pending,
            Err(error) => std::task::Poll::Ready(error),
        })
        .await;
        let ended = |(guard, _): &(IncompleteGuard, Grant)| guard.check(std::task::Waker::noop()).is_err();
        assert_eq!(full.iter().filter(|request| ended(request)).count(), 1, "one ended request is enough");
        drop(full);
        waits.join_next().await.expect("one task").expect("no panic").expect("memory was freed");
    }
}

/// Many waiting requests together end at most `MAX_ENDED_BYTES` of incomplete requests per search. Regression: each
/// waiting request ended as many as it needed, and clients that sent the ended requests again took all of the CPU.
#[tokio::test(start_paused = true)]
async fn incomplete_requests_end_at_bounded_rate() {
    let budgets = Budgets::new(96 * MIB as u64, MIB as u64);
    let mut full: Vec<_> = std::iter::from_fn(|| {
        let call = call(&budgets);
        let grant = call.try_request(SMALL_BYTES)?;
        Some((call.register_incomplete(SMALL_BYTES, clock::monotonic()), grant))
    })
    .collect();
    let mut waits: tokio::task::JoinSet<_> = (0..200).map(|_| call(&budgets).request(SMALL_BYTES)).collect();
    let (mut served, mut max) = (Vec::new(), 0);
    while served.len() < 200 {
        tokio::time::sleep(SMALL_ARRIVAL_TIMEOUT).await;
        let before = full.len();
        full.retain(|(guard, _)| guard.check(std::task::Waker::noop()).is_ok());
        max = max.max(before - full.len());
        tokio::task::yield_now().await;
        let ended = std::iter::from_fn(|| waits.try_join_next());
        served.extend(ended.map(|wait| wait.expect("no panic").expect("memory was freed")));
    }
    assert!(max <= MAX_ENDED_BYTES.div_ceil(SMALL_BYTES), "{max} requests ended at once");
}

#[tokio::test(start_paused = true)]
async fn request_parts_have_separate_memory() {
    let budgets = Budgets::new(512 * MIB as u64, MIB as u64);
    let call = call(&budgets);
    let message = call.clone().request(512 * MIB).await.expect("the only request fits");
    let parts = call.try_parts(limits::MAX_REQUEST_PARTS).expect("the maximum number of parts fits");
    assert!(call.try_parts(limits::MAX_REQUEST_PARTS).is_none(), "the share of the connection is used up");
    let (waiting, small) = (call.clone().parts(limits::MAX_REQUEST_PARTS), call.try_parts(1));
    assert!(small.is_some(), "a small list of parts does not wait for a large one");
    drop(small);
    let with_parts = budgets.taken().0;
    call.deliver(0, [message]);
    drop(call.take_request());
    assert!(with_parts > budgets.taken().0);
    assert_eq!(budgets.taken().0, limits::MAX_REQUEST_PARTS * PART_BYTES);
    let refused = call.clone().parts(limits::MAX_REQUEST_PARTS).await.expect_err("the memory is held for too long");
    assert_eq!(refused.code, ErrorCode::Overloaded);
    drop(parts);
    drop(waiting.await.expect("memory was freed"));
    assert_eq!(budgets.taken(), (0, 0));
}

#[tokio::test(start_paused = true)]
async fn response_is_charged_until_sent() {
    let budgets = Budgets::new(MIB as u64, 256 * MIB as u64);
    let call = call(&budgets);
    let (grant, bytes) = call.response(32 * MIB, MIB).await;
    assert_eq!(bytes, 32 * MIB);
    call.complete_response(grant, MIB);
    assert_eq!(budgets.taken().1, MIB);
    let sending = call.begin_sending(MIB).unwrap();
    assert_eq!(budgets.taken().1, MIB, "the response is not sent yet");
    let (_held, bytes) = call.response(40 * MIB, MIB).await;
    assert_eq!(bytes, 40 * MIB);
    let (_small, bytes) = call.response(40 * MIB, MIB).await;
    assert_eq!(bytes, MIB, "the share is used up: only a small response");
    drop(sending);
    assert_eq!(budgets.taken().1, 41 * MIB, "the response was sent");
}

/// While another call waits for response memory, connections whose clients do not read are closed. Regression: four
/// such connections held all response memory for ever.
#[tokio::test(start_paused = true)]
async fn unread_connections_are_closed_when_others_wait() {
    let budgets = Budgets::new(64 * MIB as u64, 74 * MIB as u64);
    let closed = Arc::new(Mutex::new(Vec::new()));
    let connection = |number: usize| {
        let closed = Arc::clone(&closed);
        budgets.open_connection(move || closed.lock().push(number))
    };
    let mut calls = Vec::new();
    for (number, bytes) in [12 * MIB, 11 * MIB, 10 * MIB, 12 * MIB].into_iter().enumerate() {
        let call = CallMemory::new(budgets.clone(), connection(number));
        let (grant, _) = call.response(bytes, MIB).await;
        call.complete_response(grant, bytes);
        let sending = call.begin_sending(bytes).unwrap();
        calls.push(Some((call, sending)));
    }
    // The client of the first connection reads its response. Its next response holds memory, but nothing is unread.
    let (first, sending) = calls[0].take().unwrap();
    drop(sending);
    let held = first.response(12 * MIB, MIB).await;
    tokio::time::advance(UNREAD_TIMEOUT * 10).await;
    assert!(closed.lock().is_empty(), "no other call waits for memory");

    let honest = CallMemory::new(budgets.clone(), connection(4));
    let ((_grant, bytes), ()) = tokio::join!(honest.response(12 * MIB, 12 * MIB), async {
        while closed.lock().is_empty() {
            tokio::time::sleep(SEARCH_INTERVAL).await;
        }
        calls[3] = None;
    });
    assert_eq!(bytes, 12 * MIB);
    let closed: std::collections::BTreeSet<_> = closed.lock().iter().copied().collect();
    assert_eq!(closed, [1, 2, 3].into(), "the connections that do not read");
    drop(held);
}

/// A client that takes data within `UNREAD_TIMEOUT` again and again is not closed, although another call waits for
/// memory.
#[tokio::test(start_paused = true)]
async fn reading_client_is_not_closed() {
    let budgets = Budgets::new(64 * MIB as u64, 4 * MIB as u64);
    let reading = CallMemory::new(budgets.clone(), budgets.open_connection(|| panic!("the client reads")));
    let (grant, _) = reading.response(SMALL_BYTES, SMALL_BYTES).await;
    reading.complete_response(grant, SMALL_BYTES);
    let _held = reading.begin_sending(SMALL_BYTES).unwrap();
    let all: Vec<_> = std::iter::from_fn(|| {
        let connection = budgets.open_connection(|| {});
        let taken = Pools::try_take(&connection.0.responses, &budgets.0.responses, SMALL_BYTES + 1)?;
        Some((connection, taken))
    })
    .collect();
    assert!(!all.is_empty());
    let waiting = call(&budgets);
    let mut waits = std::pin::pin!(waiting.response(2 * MIB, 2 * MIB));
    for _ in 0..20 {
        let _sending = reading.begin_sending(0).unwrap();
        let waited = tokio::time::timeout(UNREAD_TIMEOUT / 2, &mut waits).await;
        assert!(waited.is_err(), "other calls hold the memory");
    }
}

#[test]
fn tiered_appends_of_one_connection_are_bounded() {
    let budgets = Budgets::new(MIB as u64, MIB as u64);
    let (first, second) = (call(&budgets), call(&budgets));
    let mut permits: Vec<_> = std::iter::from_fn(|| first.tiered_append()).collect();
    assert_eq!(permits.len(), limits::MAX_TIERED_APPENDS_PER_CONNECTION);
    assert!(second.tiered_append().is_some());
    permits.pop();
    assert!(first.tiered_append().is_some());
}
