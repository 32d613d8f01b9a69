//! Ids for idempotent producers, handed out from blocks that no other broker has.

use std::ops::Range;

use tokio::sync::Mutex;

use crate::cluster::{StoreError, Topics};

/// What is left of the last block.
#[derive(Default)]
pub(super) struct ProducerIds {
    block: Mutex<Range<i64>>,
}

impl ProducerIds {
    /// An id that nobody was given before.
    pub(super) async fn next(&self, topics: &Topics) -> Result<i64, StoreError> {
        let mut block = self.block.lock().await;
        if let Some(id) = block.next() {
            return Ok(id);
        }
        *block = topics.producer_ids().await?;
        Ok(block.next().expect("a block holds ids"))
    }
}
