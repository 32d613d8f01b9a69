//! What brokers say of themselves and of their replicas: this one at once, the others by a call.
//!
//! A broker that does not answer in time costs a description that time once, however many partitions it leads.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use futures::future;

use super::Broker;
use crate::{
    model::{BrokerId, LeaderEpoch, PartitionId, Watermarks},
    partition::Partition,
    proto::{
        fault::{Fault, Reason},
        v1,
    },
};

/// How long another broker may take.
const ANSWER: Duration = Duration::from_secs(1);

/// What a broker says of one replica.
#[derive(Clone, Debug)]
pub(super) struct Told {
    /// Its marks.
    pub(super) marks: Watermarks,
    /// The epoch of its last batch; none in an empty log.
    pub(super) last_epoch: Option<LeaderEpoch>,
    /// Bytes on the disk and in the bucket.
    pub(super) local_bytes: u64,
    pub(super) tiered_bytes: u64,
    /// Why it takes no writes.
    pub(super) failed: Option<String>,
}

/// What a broker says of replicas that it was asked for. One that it does not hold is left out.
pub(super) type Answer = Result<BTreeMap<PartitionId, Told>, Fault>;

impl Broker {
    /// Asks brokers for replicas of theirs, all at the same time.
    pub(super) async fn ask_marks(&self, wanted: BTreeMap<BrokerId, Vec<PartitionId>>) -> BTreeMap<BrokerId, Answer> {
        let asked = wanted.into_iter().map(async |(broker, ids)| (broker, self.marks_at(broker, ids).await));
        future::join_all(asked).await.into_iter().collect()
    }

    async fn marks_at(&self, broker: BrokerId, ids: Vec<PartitionId>) -> Answer {
        if broker == self.settings.id {
            return Ok(ids.into_iter().filter_map(|id| Some((id, told(&self.hosted.by_id(id)?)))).collect());
        }
        Err(silent(broker))
    }

    /// Asks brokers for their figures, all at the same time.
    pub(super) async fn ask_figures(
        &self,
        brokers: Vec<BrokerId>,
    ) -> BTreeMap<BrokerId, Result<v1::BrokerFigures, Fault>> {
        let asked = brokers.into_iter().map(async |broker| (broker, self.figures_of(broker).await));
        future::join_all(asked).await.into_iter().collect()
    }

    async fn figures_of(&self, broker: BrokerId) -> Result<v1::BrokerFigures, Fault> {
        if broker == self.settings.id {
            return Ok(self.figures());
        }
        Err(silent(broker))
    }

    /// What this broker says of itself.
    pub(super) fn figures(&self) -> v1::BrokerFigures {
        let (open, status) = (self.hosted.open(), self.log.status());
        v1::BrokerFigures {
            segment_bytes: open.iter().map(|partition| partition.local_bytes()).sum(),
            free_bytes: status.free_bytes,
            tier_lag_records: open.iter().map(|partition| self.tier_lag(partition)).sum(),
            failed: status.failed.unwrap_or_default(),
        }
    }
}

/// What this broker says of a replica of its own.
fn told(partition: &Arc<Partition>) -> Told {
    Told {
        marks: partition.marks(),
        last_epoch: None,
        local_bytes: partition.local_bytes(),
        tiered_bytes: partition.tiered_bytes(),
        failed: partition.fault().map(|why| why.to_string()),
    }
}

fn silent(broker: BrokerId) -> Fault {
    Fault::new(Reason::NotReady, format!("broker {broker} did not answer within {ANSWER:?}"))
}
