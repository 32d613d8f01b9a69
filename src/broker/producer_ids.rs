//! Ids for idempotent producers, handed out from blocks that no other broker has.
//!
//! A broker of several takes blocks before it needs them: a producer that begins while the metadata store is away gets its id all the
//! same.

use std::{
    collections::VecDeque,
    ops::Range,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::sync::Notify;

use super::Broker;
use crate::cluster::{StoreError, Topics};

/// With fewer ids left than this, another block is taken.
const LOW: i64 = 500;

/// Pause before the store is asked again.
const AGAIN: Duration = Duration::from_secs(1);

/// What is left of the blocks that were taken.
#[derive(Default)]
pub(super) struct ProducerIds {
    blocks: Mutex<VecDeque<Range<i64>>>,
    /// Of many who find nothing left one takes a block.
    filling: tokio::sync::Mutex<()>,
    low: Notify,
}

impl ProducerIds {
    /// An id that nobody was given before.
    pub(super) async fn next(&self, topics: &Topics) -> Result<i64, StoreError> {
        loop {
            if let Some(id) = self.take() {
                return Ok(id);
            }
            self.fill(topics, 1).await?;
        }
    }

    fn blocks(&self) -> MutexGuard<'_, VecDeque<Range<i64>>> {
        self.blocks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(&self) -> Option<i64> {
        let mut blocks = self.blocks();
        let id = loop {
            match blocks.front_mut()?.next() {
                Some(id) => break id,
                None => drop(blocks.pop_front()),
            }
        };
        if left(&blocks) < LOW {
            self.low.notify_one();
        }
        Some(id)
    }

    /// Takes a block where fewer than `least` are left.
    async fn fill(&self, topics: &Topics, least: i64) -> Result<(), StoreError> {
        let _one_at_a_time = self.filling.lock().await;
        if left(&self.blocks()) < least {
            let block = topics.producer_ids().await?;
            self.blocks().push_back(block);
        }
        Ok(())
    }
}

fn left(blocks: &VecDeque<Range<i64>>) -> i64 {
    blocks.iter().map(|block| block.end - block.start).sum()
}

/// Keeps a block at hand until the broker stops.
pub(super) async fn keep(broker: Arc<Broker>) {
    let ids = &broker.producer_ids;
    let kept = async {
        loop {
            match ids.fill(&broker.topics, LOW).await {
                Ok(()) => ids.low.notified().await,
                Err(error) => {
                    tracing::debug!(%error, "no ids for producers can be taken yet");
                    tokio::time::sleep(AGAIN).await;
                }
            }
        }
    };
    tokio::select! {
        biased;
        () = broker.tasks.cancelled() => {}
        () = kept => {}
    }
}
