//! One batch's answer, shared by all its records: a record's [`Delivery`] is a counted pointer and a number, and
//! nothing is allocated for it.

use std::{
    future::Future,
    pin::Pin,
    sync::{Arc, Mutex},
    task::{Context, Poll, Waker},
};

use tokio::time::Instant;

use super::super::{error::SendError, lock::lock};
use crate::{
    model::{LeaderEpoch, Offset},
    proto::v1,
};

/// Where an acknowledged record was at the moment of the acknowledgement.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Held {
    /// Accepted, in the leader's memory.
    Memory,
    /// In the page cache of that many machines.
    PageCache,
    /// On stable storage of that many machines.
    Synced,
    /// In the bucket as well.
    Tiered,
}

impl Held {
    pub(super) fn from_wire(durability: i32) -> Self {
        match v1::Durability::try_from(durability) {
            Ok(v1::Durability::PageCache) => Self::PageCache,
            Ok(v1::Durability::Synced) => Self::Synced,
            Ok(v1::Durability::Tiered) => Self::Tiered,
            // An unknown word promises nothing.
            _ => Self::Memory,
        }
    }

    /// The same in words.
    pub fn words(self, replicas: u32) -> String {
        let s = if replicas == 1 { "" } else { "s" };
        match self {
            Self::Memory => "in memory of the leader".to_owned(),
            Self::PageCache => format!("in the page cache of {replicas} replica{s}"),
            Self::Synced => format!("synced on {replicas} replica{s}"),
            Self::Tiered => "in the bucket".to_owned(),
        }
    }
}

/// A record's acknowledgement.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ack {
    /// The partition that it went to.
    pub partition: u32,
    /// Its offset; none with `acks=0`.
    pub offset: Option<Offset>,
    /// The first offset of the batch that it came in; none with `acks=0`.
    pub base_offset: Option<Offset>,
    /// How many records the batch held.
    pub count: u32,
    /// The epoch of the leader that took it.
    pub leader_epoch: LeaderEpoch,
    /// The time that the broker gave the record, where the topic says LogAppendTime.
    pub append_time_ms: Option<i64>,
    /// Where it was when it was acknowledged.
    pub held: Held,
    /// On how many replicas.
    pub replicas: u32,
    /// An earlier try had been appended already.
    pub duplicate: bool,
    /// When the answer came, however late it is looked at.
    pub received: Instant,
}

impl Ack {
    /// What the acknowledgement meant, in words.
    pub fn meaning(&self) -> String {
        self.held.words(self.replicas)
    }
}

#[derive(Debug, Default)]
struct State {
    /// The batch's answer; its `offset` is that of the first record.
    answer: Option<Result<Ack, SendError>>,
    wakers: Vec<Waker>,
}

/// A batch's answer, once there is one.
#[derive(Debug, Default)]
pub(super) struct Completion {
    state: Mutex<State>,
}

impl Completion {
    /// Answers everyone who waits for the batch. The first answer stays.
    pub(super) fn complete(&self, answer: Result<Ack, SendError>) {
        let wakers = {
            let mut state = lock(&self.state);
            if state.answer.is_some() {
                return;
            }
            state.answer = Some(answer);
            std::mem::take(&mut state.wakers)
        };
        for waker in wakers {
            waker.wake();
        }
    }
}

/// The answer to one record: a future that resolves when the record is acknowledged or has failed for good. Dropping
/// it does not take the record back.
#[derive(Debug)]
#[must_use = "a record that nobody waits for may have failed; await the delivery, or flush"]
pub struct Delivery {
    completion: Arc<Completion>,
    /// The record's place in its batch.
    index: u32,
    /// Where this future's waker is in the list.
    slot: Option<usize>,
}

impl Delivery {
    pub(super) fn new(completion: Arc<Completion>, index: u32) -> Self {
        Self { completion, index, slot: None }
    }
}

impl Future for Delivery {
    type Output = Result<Ack, SendError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = &mut *self;
        let mut state = lock(&this.completion.state);
        if let Some(answer) = &state.answer {
            let index = u64::from(this.index);
            return Poll::Ready(answer.clone().map(|ack| Ack { offset: ack.offset.map(|o| o.plus(index)), ..ack }));
        }
        match this.slot {
            Some(slot) => state.wakers[slot].clone_from(cx.waker()),
            None => {
                this.slot = Some(state.wakers.len());
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
    async fn every_record_of_a_batch_gets_its_own_offset_from_one_answer() {
        let completion = Arc::new(Completion::default());
        let waiting: Vec<Delivery> = (0..3).map(|index| Delivery::new(completion.clone(), index)).collect();
        let ack = Ack {
            partition: 1,
            offset: Offset::new(10),
            base_offset: Offset::new(10),
            count: 3,
            leader_epoch: LeaderEpoch(2),
            append_time_ms: None,
            held: Held::Synced,
            replicas: 1,
            duplicate: false,
            received: crate::task::clock::monotonic(),
        };
        let (answers, ()) = tokio::join!(futures::future::join_all(waiting), async {
            tokio::task::yield_now().await;
            completion.complete(Ok(ack));
            completion.complete(Err(SendError::Closed));
        });
        let offsets: Vec<_> = answers.into_iter().map(|answer| answer.expect("acknowledged").offset).collect();
        assert_eq!(offsets, [Offset::new(10), Offset::new(11), Offset::new(12)]);
    }

    #[test]
    fn an_acknowledgement_says_what_it_meant() {
        assert_eq!(Held::Memory.words(1), "in memory of the leader");
        assert_eq!(Held::PageCache.words(2), "in the page cache of 2 replicas");
        assert_eq!(Held::Synced.words(1), "synced on 1 replica");
        assert_eq!(Held::Tiered.words(3), "in the bucket");
        assert_eq!(Held::from_wire(99), Held::Memory);
    }
}
