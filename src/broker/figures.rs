//! What brokers say of themselves and of their replicas: this one at once, the others by a call.
//!
//! A broker that does not answer in time costs a description that time once, however many partitions it leads.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use futures::future;

use super::{Broker, others::Others};
use crate::{
    client::peers::{PeerError, Peers},
    limits,
    model::{BrokerId, LeaderEpoch, Offset, PartitionId, Watermarks},
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

/// What a broker says of replicas that it was asked for, or why one is of no use. One that it does not hold is left out.
pub(super) type Answer = Result<BTreeMap<PartitionId, Result<Told, String>>, Fault>;

impl Broker {
    /// Asks brokers for replicas of theirs, all at the same time.
    pub(super) async fn ask_marks(&self, wanted: BTreeMap<BrokerId, Vec<PartitionId>>) -> BTreeMap<BrokerId, Answer> {
        let asked = wanted.into_iter().map(async |(broker, ids)| (broker, self.marks_at(broker, &ids).await));
        future::join_all(asked).await.into_iter().collect()
    }

    async fn marks_at(&self, broker: BrokerId, ids: &[PartitionId]) -> Answer {
        if broker == self.settings.id {
            let told = |id| match self.hosted.by_id(id) {
                Some(partition) => Some(Ok(told(&partition))),
                None => self.unusable(id).map(Err),
            };
            return Ok(ids.iter().filter_map(|id| Some((*id, told(*id)?))).collect());
        }
        let (peers, address) = self.way_to(broker)?;
        let mut answer = BTreeMap::new();
        for ids in ids.chunks(limits::MAX_PEER_REPLICAS) {
            let names = ids
                .iter()
                .map(|id| v1::ReplicaName { topic_id: id.topic.to_string(), partition: id.number.cast_signed() });
            let request = v1::MarksRequest { replicas: names.collect() };
            let marks = peers.marks(&address, request, ANSWER).await.map_err(|error| silent(broker, error))?;
            answer.extend(ids.iter().zip(marks.replicas).filter_map(|(id, marks)| Some((*id, heard(marks)?))));
        }
        Ok(answer)
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
        let status = if broker == self.settings.id {
            self.status()
        } else {
            let (peers, address) = self.way_to(broker)?;
            peers.status(&address, ANSWER).await.map_err(|error| silent(broker, error))?
        };
        Ok(v1::BrokerFigures {
            segment_bytes: status.segment_bytes,
            free_bytes: status.free_bytes,
            tier_lag_records: status.tier_lag_records,
            failed: status.failed,
            object_store: status.object_store,
            upkeep: status.upkeep,
            impaired: status.impaired,
            not_ready: status.not_ready,
            metadata_regressed: status.metadata_regressed,
            future_timestamps: status.future_timestamps,
        })
    }

    fn way_to(&self, broker: BrokerId) -> Result<(&Peers, String), Fault> {
        let state = self.view.state();
        let known = state.brokers().get(&broker);
        let address = known.and_then(|known| known.value.listeners.peer().map(str::to_owned));
        let way = self.others.as_ref().map(Others::peers).zip(address);
        way.ok_or_else(|| {
            let why = if known.is_some() { "registered without an address for other brokers" } else { "not alive" };
            Fault::new(Reason::NotReady, format!("broker {broker} is {why}"))
        })
    }
}

/// What this broker says of a replica of its own.
fn told(partition: &Arc<Partition>) -> Told {
    Told {
        marks: partition.marks(),
        last_epoch: partition.last_epoch(),
        local_bytes: partition.local_bytes(),
        tiered_bytes: partition.tiered_bytes(),
        failed: partition.fault().map(|why| why.to_string()),
    }
}

/// What another one said of a replica of its own; nothing where it has none.
fn heard(marks: v1::ReplicaMarks) -> Option<Result<Told, String>> {
    let failed = Some(marks.failed).filter(|why| !why.is_empty());
    if !marks.here {
        return failed.map(Err);
    }
    let offset = |value| Offset::from_i64(value).unwrap_or(Offset::ZERO);
    Some(Ok(Told {
        marks: Watermarks {
            log_start: offset(marks.log_start),
            local_start: offset(marks.local_start),
            tiered_end: offset(marks.tiered_end),
            high_watermark: offset(marks.high_watermark),
            persisted_end: offset(marks.persisted_end),
            log_end: offset(marks.log_end),
        },
        last_epoch: marks.last_epoch.and_then(LeaderEpoch::from_i32),
        local_bytes: marks.local_bytes,
        tiered_bytes: marks.tiered_bytes,
        failed,
    }))
}

/// A replica that its broker cannot open.
pub(super) fn useless(broker: BrokerId, why: &str) -> Fault {
    Fault::new(Reason::StorageFailed, format!("the replica on broker {broker} cannot be used: {why}"))
}

fn silent(broker: BrokerId, error: PeerError) -> Fault {
    Fault::new(Reason::NotReady, format!("broker {broker} does not answer: {error}"))
}
