//! Reports of brokers about themselves and about their replicas: the local ones at once, those of peers by a request.
//!
//! A broker that does not respond in time delays a description by that time once, for any number of partitions.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use futures::future;

use super::{Broker, others::Others};
use crate::{
    client::peers::{PeerError, Peers},
    limits,
    model::{BrokerId, LeaderEpoch, Offset, PartitionId, Watermarks},
    partition::Partition,
    proto::{
        error::{ApiError, ErrorCode},
        v1,
    },
};

/// Timeout of a request to a peer.
const ANSWER: Duration = Duration::from_secs(1);

/// Report of a broker about one replica.
#[derive(Clone, Debug)]
pub(super) struct Told {
    pub(super) marks: Watermarks,
    /// Epoch of the last batch; `None` for an empty log.
    pub(super) last_epoch: Option<LeaderEpoch>,
    /// Bytes on the disk and in the object store.
    pub(super) local_bytes: u64,
    pub(super) tiered_bytes: u64,
    /// Reason why the replica accepts no writes.
    pub(super) failed: Option<String>,
}

/// Reports of a broker about the requested replicas, or the reason why a replica is unusable. Replicas that the broker does not have are
/// left out.
pub(super) type Answer = Result<BTreeMap<PartitionId, Result<Told, String>>, ApiError>;

impl Broker {
    /// Requests replica reports from brokers, concurrently.
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

    /// Requests stats from brokers, concurrently.
    pub(super) async fn ask_figures(
        &self,
        brokers: Vec<BrokerId>,
    ) -> BTreeMap<BrokerId, Result<v1::BrokerFigures, ApiError>> {
        let asked = brokers.into_iter().map(async |broker| (broker, self.figures_of(broker).await));
        future::join_all(asked).await.into_iter().collect()
    }

    async fn figures_of(&self, broker: BrokerId) -> Result<v1::BrokerFigures, ApiError> {
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

    fn way_to(&self, broker: BrokerId) -> Result<(&Peers, String), ApiError> {
        let state = self.view.state();
        let known = state.brokers().get(&broker);
        let address = known.and_then(|known| known.value.listeners.peer().map(str::to_owned));
        let way = self.others.as_ref().map(Others::peers).zip(address);
        way.ok_or_else(|| {
            let why = if known.is_some() { "registered without an address for other brokers" } else { "not alive" };
            ApiError::new(ErrorCode::NotReady, format!("broker {broker} is {why}"))
        })
    }
}

/// Returns the report about a local replica.
fn told(partition: &Arc<Partition>) -> Told {
    Told {
        marks: partition.marks(),
        last_epoch: partition.last_epoch(),
        local_bytes: partition.local_bytes(),
        tiered_bytes: partition.tiered_bytes(),
        failed: partition.fault().map(|why| why.to_string()),
    }
}

/// Parses a peer's report about its replica. Returns `None` if the peer has none.
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

/// Returns the error for a replica that its broker cannot open.
pub(super) fn useless(broker: BrokerId, why: &str) -> ApiError {
    ApiError::new(ErrorCode::StorageFailed, format!("the replica on broker {broker} cannot be used: {why}"))
}

fn silent(broker: BrokerId, error: PeerError) -> ApiError {
    ApiError::new(ErrorCode::NotReady, format!("broker {broker} does not answer: {error}"))
}
