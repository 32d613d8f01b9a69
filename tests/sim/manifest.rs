//! The objects that a partition's manifest references, read from the object store without the brokers and without
//! faults.

use std::collections::BTreeSet;

use bytes::Bytes;
use strandline::{
    model::PartitionId,
    tier::{
        TierState,
        manifest::{ManifestPage, ManifestRoot, SegmentEntry},
        name,
    },
};

use crate::objects::Objects;

/// Objects that a tier state references.
#[derive(Default)]
pub(crate) struct ReferencedObjects {
    /// Names of the manifest, its pages, and the segments with readable records. These objects must exist.
    pub(crate) objects: BTreeSet<String>,
    /// All segments that the manifest lists, oldest first, with their object names. A segment below the log start may
    /// be deleted.
    pub(crate) segments: Vec<(String, SegmentEntry)>,
}

/// Reads the manifest that a state references; returns no objects if there is none. The manifest must match the state,
/// and its segments must be contiguous from its first offset to its end.
///
/// # Errors
/// The manifest or one of its pages is missing or invalid, its segments are not contiguous, or it does not match the
/// state.
pub(crate) fn referenced_objects(
    objects: &Objects,
    id: PartitionId,
    state: &TierState,
) -> Result<ReferencedObjects, String> {
    let Some(manifest) = state.manifest else { return Ok(ReferencedObjects::default()) };
    let path = |name: String| format!("{}/{name}", name::partition_folder(id));
    let read = |object: &str| {
        objects.read(object).ok_or_else(|| format!("{object} is referenced but not in the object store"))
    };
    let object = path(manifest.to_string());
    let root = ManifestRoot::parse(&read(&object)?).map_err(|error| format!("{object}: {error}"))?;
    let mut named = ReferencedObjects { objects: BTreeSet::from([object.clone()]), segments: Vec::new() };
    for entry in root.pages() {
        let page = path(entry.stamp.page());
        let content = ManifestPage::parse(&read(&page)?, id, entry).map_err(|error| format!("{page}: {error}"))?;
        named.segments.extend(content.segments().iter().map(|entry| (path(entry.stamp.segment()), *entry)));
        named.objects.insert(page);
    }
    named.segments.extend(root.segments().iter().map(|entry| (path(entry.stamp.segment()), *entry)));
    // A segment below the log start may be deleted although the manifest still lists it.
    let read = named.segments.iter().filter(|(_, entry)| entry.stamp.end > state.log_start);
    named.objects.extend(read.map(|(segment, _)| segment.clone()));
    let mut next = root.base();
    for (segment, entry) in &named.segments {
        if entry.stamp.base != next {
            return Err(format!("{object} lists {segment}, but offset {next} is next"));
        }
        next = entry.stamp.end;
    }
    // The log start moves first in the tier state, then in the manifest, so the manifest's may be lower.
    let log_start = state.log_start.min(state.tiered_end);
    let counts = named.segments.iter().filter(|(_, entry)| entry.stamp.end > log_start);
    let bytes: u64 = counts.map(|(_, entry)| entry.data_bytes).sum();
    let expected = (id, state.version(), state.tiered_end, log_start, state.bytes);
    let is = (root.partition(), root.version(), next, root.log_start().max(log_start), bytes);
    if expected != is || root.log_start() > log_start || root.end() != next || root.epoch() != manifest.epoch {
        return Err(format!("{object} is of {is:?} and ends at {}, but the metadata has {expected:?}", root.end()));
    }
    Ok(named)
}

/// Returns the batches of a segment object. The length and checksum of the object must match its manifest entry.
///
/// # Errors
/// The object is missing, or its length or checksum does not match.
pub(crate) fn data_of(objects: &Objects, segment: &str, entry: &SegmentEntry) -> Result<Bytes, String> {
    let object = objects.read(segment).ok_or_else(|| format!("{segment} is referenced but not in the object store"))?;
    let (len, crc) = (object.len() as u64, crc32c::crc32c(&object));
    if (len, crc) != (entry.object_bytes(), entry.crc) {
        return Err(format!(
            "{segment} has {len} bytes with the checksum {crc:#010x}, but its manifest entry is {entry:?}"
        ));
    }
    Ok(object.slice(..usize::try_from(entry.data_bytes).unwrap()))
}
