//! Content of the object store, checked at each tier commit of a leader. From then on no broker may change or delete a
//! referenced object (`Objects::keep`).

use std::collections::BTreeSet;

use strandline::{
    model::{LeaderEpoch, Offset, PartitionId},
    record::Batch,
    tier::TierState,
};

use super::{RuleViolation, partition::Partition};
use crate::{
    manifest::{self, ReferencedObjects},
    objects::Objects,
};

pub(super) struct StoredObjects {
    objects: Objects,
    /// Names of the segment objects that were checked. A name is never used for another object, so each is checked
    /// once.
    read: BTreeSet<String>,
}

impl StoredObjects {
    pub(super) fn new(objects: Objects) -> Self {
        Self { objects, read: BTreeSet::new() }
    }

    /// Checks a committed tier state: its manifest must be valid, and its readable segments must exist and hold the
    /// committed batches. Marks the manifest, its pages and these segments as referenced.
    pub(super) fn check_tier_commit(
        &mut self,
        id: PartitionId,
        state: &TierState,
        model: &Partition,
    ) -> Result<(), RuleViolation> {
        let ReferencedObjects { objects, segments } = manifest::referenced_objects(&self.objects, id, state)?;
        for (segment, entry) in segments {
            if objects.contains(&segment) && self.read.insert(segment.clone()) {
                let mut data = manifest::data_of(&self.objects, &segment, &entry)?;
                let mut next = entry.stamp.base;
                while !data.is_empty() {
                    let batch = Batch::split_from(&mut data).map_err(|error| format!("{segment}: {error}"))?;
                    next =
                        check_committed(&batch, next, model).map_err(|violation| format!("{segment}: {violation}"))?;
                }
                if next != entry.stamp.end {
                    return Err(format!("{segment} ends at {next}"));
                }
            }
        }
        self.objects.keep(id, objects);
        Ok(())
    }

    /// Removes the references of a deleted partition, whose objects may then be deleted.
    pub(super) fn remove_references(&self, id: PartitionId) {
        self.objects.keep(id, BTreeSet::new());
    }
}

/// Checks that this batch is the committed one at `next`. Returns its end, at which the next batch must begin.
fn check_committed(batch: &Batch, next: Offset, model: &Partition) -> Result<Offset, RuleViolation> {
    let (base, end, epoch) = (batch.base_offset(), batch.end_offset(), batch.leader_epoch());
    let found = (base, epoch, end, batch.crc());
    let committed = model.committed_at(next);
    let is: Option<(Offset, Option<LeaderEpoch>, Offset, u32)> =
        committed.map(|(epoch, batch)| (next, Some(epoch), batch.end, batch.crc));
    if is == Some(found) { Ok(end) } else { Err(format!("contains {found:?}, but the committed batch is {is:?}")) }
}
