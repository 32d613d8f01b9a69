//! Result of one batch, shared by all its records. A record's [`Delivery`] is a reference-counted pointer and an index,
//! without an allocation of its own.

use std::{
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, Waker},
};

use tokio::time::Instant;

use super::super::error::SendError;
use crate::{
    model::{AckDurability, LeaderEpoch, Offset},
    proto::v1,
    task::lock::Mutex,
};

/// Returns the durability in a response. An unknown value, as of a newer broker, is taken as the weakest: the leader's
/// memory.
pub(super) fn durability(durability: i32, replicas: u32) -> AckDurability {
    match v1::AckDurability::try_from(durability) {
        Ok(v1::AckDurability::PageCache) => AckDurability::PageCache(replicas),
        Ok(v1::AckDurability::Persisted) => AckDurability::Persisted(replicas),
        Ok(v1::AckDurability::Tiered) => AckDurability::Tiered(replicas),
        _ => AckDurability::Memory,
    }
}

/// Acknowledgement of a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ack {
    /// Partition of the record.
    pub partition: u32,
    /// Offset of the record; `None` with `acks=0`.
    pub offset: Option<Offset>,
    /// First offset of the record's batch; `None` with `acks=0`.
    pub base_offset: Option<Offset>,
    /// Number of records in the batch.
    pub count: u32,
    /// Leader epoch in which the batch was appended; 0 with `acks=0`.
    pub leader_epoch: LeaderEpoch,
    /// Timestamp that the broker assigned, in milliseconds since 1970; `None` unless the topic uses LogAppendTime.
    pub append_time_ms: Option<i64>,
    /// Storage of the record at the time of the acknowledgement.
    pub durability: AckDurability,
    /// True if the broker had already appended an earlier attempt of the batch.
    pub duplicate: bool,
    /// Arrival time of the response, not the time at which the [`Delivery`] was awaited.
    pub received: Instant,
}

impl Ack {
    /// Returns a description of the record's storage.
    pub fn meaning(&self) -> String {
        self.durability.to_string()
    }
}

#[derive(Debug, Default)]
struct CompletionState {
    /// Result of the batch; its `offset` is that of the first record.
    result: Option<Result<Ack, SendError>>,
    wakers: Vec<Waker>,
}

/// Result of a batch; unset until the batch is acknowledged or has failed.
#[derive(Debug, Default)]
pub(super) struct Completion {
    state: Mutex<CompletionState>,
}

impl Completion {
    /// Sets the result and wakes all deliveries of the batch. Only the first call has an effect.
    pub(super) fn complete(&self, result: Result<Ack, SendError>) {
        let wakers = {
            let mut state = self.state.lock();
            if state.result.is_some() {
                return;
            }
            state.result = Some(result);
            std::mem::take(&mut state.wakers)
        };
        for waker in wakers {
            waker.wake();
        }
    }
}

/// Future of one record's result; it resolves when the record is acknowledged or has failed. Dropping the future does
/// not cancel the record.
#[derive(Debug)]
#[must_use = "the record may fail: await the delivery, or flush the producer"]
pub struct Delivery {
    completion: Arc<Completion>,
    /// Index of the record in its batch.
    index: u32,
    /// Index of this future's waker in [`CompletionState::wakers`]; `None` before the first poll.
    waker_index: Option<usize>,
}

impl Delivery {
    pub(super) fn new(completion: Arc<Completion>, index: u32) -> Self {
        Self { completion, index, waker_index: None }
    }
}

impl Future for Delivery {
    type Output = Result<Ack, SendError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = &mut *self;
        let mut state = this.completion.state.lock();
        if let Some(result) = &state.result {
            let index = u64::from(this.index);
            return Poll::Ready(result.clone().map(|ack| Ack { offset: ack.offset.map(|o| o.plus(index)), ..ack }));
        }
        match this.waker_index {
            Some(waker_index) => state.wakers[waker_index].clone_from(cx.waker()),
            None => {
                this.waker_index = Some(state.wakers.len());
                state.wakers.push(cx.waker().clone());
            }
        }
        Poll::Pending
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn records_of_a_batch_get_their_own_offsets() {
        let completion = Arc::new(Completion::default());
        let deliveries: Vec<Delivery> = (0..3).map(|index| Delivery::new(completion.clone(), index)).collect();
        let ack = Ack {
            partition: 1,
            offset: Offset::new(10),
            base_offset: Offset::new(10),
            count: 3,
            leader_epoch: LeaderEpoch(2),
            append_time_ms: None,
            durability: AckDurability::Persisted(1),
            duplicate: false,
            received: crate::task::clock::monotonic(),
        };
        let (results, ()) = tokio::join!(futures::future::join_all(deliveries), async {
            tokio::task::yield_now().await;
            completion.complete(Ok(ack));
            completion.complete(Err(SendError::Closed));
        });
        let offsets: Vec<_> = results.into_iter().map(|result| result.expect("acknowledged").offset).collect();
        assert_eq!(offsets, [Offset::new(10), Offset::new(11), Offset::new(12)]);
    }

    #[test]
    fn unknown_durability_promises_nothing() {
        assert_eq!(durability(v1::AckDurability::Persisted.into(), 2), AckDurability::Persisted(2));
        assert_eq!(durability(99, 2), AckDurability::Memory);
    }
}
