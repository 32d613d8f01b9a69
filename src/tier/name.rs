//! Names of objects. A name describes the content of its object, so that an object store can be read and restored
//! without metadata.
//!
//! # Format
//!
//! ```text
//! {prefix}/cluster.json
//! {prefix}/clock.json
//! {prefix}/topics/{topic-id}/topic.json
//! {prefix}/topics/{topic-id}/{n}/{base:020}-{end:020}-{epoch:010}-{uuid}.segment
//! {prefix}/topics/{topic-id}/{n}/{base:020}-{end:020}-{epoch:010}-{uuid}.page
//! {prefix}/topics/{topic-id}/{n}/manifest-{version:020}-{epoch:010}-{uuid}
//! ```
//!
//! Every name but the three `.json` contains a UUID, the *attempt*, that is drawn for one upload and shared by its
//! retries. Without the UUID, a second upload of a manifest version (after a failed commit) would overwrite an object
//! that may be referenced. A late duplicate of the first upload's request could also replace the second object. Pure,
//! except for [`ObjectId::draw`] and [`ManifestName::draw`].

use std::{fmt, str::FromStr};

use uuid::Uuid;

use crate::{
    model::{LeaderEpoch, Offset, PartitionId, TopicId},
    task::random,
};

/// Name of the cluster marker, which names the prefix's owner.
pub const CLUSTER: &str = "cluster.json";

/// Name of the object that is written to read the store's clock.
pub const CLOCK: &str = "clock.json";

/// Name of the folder of all topics.
pub const TOPICS: &str = "topics";

/// Error for a text that is not the name of an object of the expected kind.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{name:?} is not the name of a {kind}")]
pub struct InvalidName {
    /// The text, truncated to 200 characters.
    pub name: String,
    /// Expected kind.
    pub kind: &'static str,
}

impl InvalidName {
    fn new(name: &str, kind: &'static str) -> Self {
        Self { name: name.chars().take(200).collect(), kind }
    }
}

/// Identity of a segment or page object: its offsets, its writer's leader epoch, and the UUID of its upload.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ObjectId {
    /// First offset of the object.
    pub base: Offset,
    /// Offset after the last record of the object.
    pub end: Offset,
    /// Leader epoch of the writer.
    pub epoch: LeaderEpoch,
    /// UUID of the upload, which its retries share.
    pub attempt: Uuid,
}

impl ObjectId {
    /// Creates the id of an object that is uploaded now, with a new UUID.
    pub fn draw(base: Offset, end: Offset, epoch: LeaderEpoch) -> Self {
        Self { base, end, epoch, attempt: random::uuid() }
    }

    /// Returns the file name of the segment object with this id.
    pub fn segment(&self) -> String {
        format!("{self}.segment")
    }

    /// Returns the file name of the manifest page with this id.
    pub fn page(&self) -> String {
        format!("{self}.page")
    }

    /// Parses the file name of a segment object.
    pub fn from_segment(name: &str) -> Result<Self, InvalidName> {
        Self::parse_with_suffix(name, ".segment", "segment object")
    }

    /// Parses the file name of a manifest page.
    pub fn from_page(name: &str) -> Result<Self, InvalidName> {
        Self::parse_with_suffix(name, ".page", "manifest page")
    }

    /// Parses the file name of an object of this kind, which ends in `suffix`.
    fn parse_with_suffix(name: &str, suffix: &str, kind: &'static str) -> Result<Self, InvalidName> {
        let stamp = name.strip_suffix(suffix).and_then(|text| {
            let mut parts = text.splitn(4, '-');
            let base = Offset::new(digits(parts.next()?, 20)?)?;
            let end = Offset::new(digits(parts.next()?, 20)?)?;
            let epoch = epoch(parts.next()?)?;
            let attempt = attempt(parts.next()?)?;
            (base < end).then_some(Self { base, end, epoch, attempt })
        });
        stamp.ok_or_else(|| InvalidName::new(name, kind))
    }
}

impl fmt::Display for ObjectId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { base, end, epoch, attempt } = self;
        write!(f, "{:020}-{:020}-{:010}-{}", base.get(), end.get(), epoch.0, attempt.hyphenated())
    }
}

/// Name of a manifest's root: its version, its writer's leader epoch, and the UUID of its upload.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ManifestName {
    /// Version of the manifest. It grows by one with each manifest that is committed.
    pub version: u64,
    /// Leader epoch of the writer.
    pub epoch: LeaderEpoch,
    /// UUID of the upload, which its retries share.
    pub attempt: Uuid,
}

impl ManifestName {
    /// Creates the name of a manifest that is uploaded now as `version`, with a new UUID.
    pub fn draw(version: u64, epoch: LeaderEpoch) -> Self {
        Self { version, epoch, attempt: random::uuid() }
    }
}

impl fmt::Display for ManifestName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "manifest-{:020}-{:010}-{}", self.version, self.epoch.0, self.attempt.hyphenated())
    }
}

impl FromStr for ManifestName {
    type Err = InvalidName;

    fn from_str(name: &str) -> Result<Self, InvalidName> {
        let parsed = name.strip_prefix("manifest-").and_then(|text| {
            let mut parts = text.splitn(3, '-');
            let version = digits(parts.next()?, 20)?;
            let epoch = epoch(parts.next()?)?;
            let attempt = attempt(parts.next()?)?;
            Some(Self { version, epoch, attempt })
        });
        parsed.ok_or_else(|| InvalidName::new(name, "manifest"))
    }
}

impl serde::Serialize for ManifestName {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> serde::Deserialize<'de> for ManifestName {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// Returns the folder of a topic, below the store's prefix.
pub fn topic_folder(topic: TopicId) -> String {
    format!("{TOPICS}/{topic}")
}

/// Returns the name of the object with a topic's record.
pub fn topic_object(topic: TopicId) -> String {
    format!("{TOPICS}/{topic}/topic.json")
}

/// Returns the folder of a partition, below the store's prefix.
pub fn partition_folder(partition: PartitionId) -> String {
    format!("{TOPICS}/{}/{}", partition.topic, partition.number)
}

/// Returns true if an object's name, below the store's prefix, is that of a partition's segment.
pub fn is_segment(object: &str) -> bool {
    let mut parts = object.split('/');
    let (Some(TOPICS), Some(topic), Some(number), Some(file), None) =
        (parts.next(), parts.next(), parts.next(), parts.next(), parts.next())
    else {
        return false;
    };
    let folder = topic.parse::<TopicId>().ok().zip(number.parse::<u32>().ok());
    // Only the spelling of `partition_folder` is accepted: another spelling is another key, which no broker wrote.
    folder.is_some_and(|(topic, number)| {
        object == format!("{}/{file}", partition_folder(PartitionId::new(topic, number)))
    }) && ObjectId::from_segment(file).is_ok()
}

/// Parses exactly `width` digits.
fn digits(text: &str, width: usize) -> Option<u64> {
    (text.len() == width && text.bytes().all(|b| b.is_ascii_digit())).then(|| text.parse().ok())?
}

/// Parses a leader epoch of ten digits.
fn epoch(text: &str) -> Option<LeaderEpoch> {
    u32::try_from(digits(text, 10)?).ok().map(LeaderEpoch)
}

/// Parses the UUID of an upload. Accepts only the spelling that names have: lower case, with hyphens.
fn attempt(text: &str) -> Option<Uuid> {
    let attempt = Uuid::try_parse(text).ok()?;
    (attempt.hyphenated().to_string() == text).then_some(attempt)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn name_round_trips(
            base in 0..=u64::MAX / 4, len in 1..1_000_000u64, epoch: u32, version: u64, id: u128,
        ) {
            let (base, epoch, attempt) = (Offset::new(base).unwrap(), LeaderEpoch(epoch), Uuid::from_u128(id));
            let stamp = ObjectId { base, end: base.plus(len), epoch, attempt };
            prop_assert_eq!(ObjectId::from_segment(&stamp.segment()).unwrap(), stamp);
            prop_assert_eq!(ObjectId::from_page(&stamp.page()).unwrap(), stamp);
            let name = ManifestName { version, epoch, attempt };
            prop_assert_eq!(name.to_string().parse::<ManifestName>().unwrap(), name);
        }

        #[test]
        fn parsed_name_is_written_identically(text in "(manifest-)?[0-9a-f-]{0,90}(\\.segment|\\.page)?") {
            if let Ok(stamp) = ObjectId::from_segment(&text) { prop_assert_eq!(stamp.segment(), text.clone()) }
            if let Ok(stamp) = ObjectId::from_page(&text) { prop_assert_eq!(stamp.page(), text.clone()) }
            if let Ok(name) = text.parse::<ManifestName>() { prop_assert_eq!(name.to_string(), text) }
        }
    }

    #[test]
    fn segment_name_requires_a_partition_folder() {
        let topic = TopicId::from_bytes([0xab; 16]);
        let stamp = ObjectId::draw(Offset::new(0).unwrap(), Offset::new(9).unwrap(), LeaderEpoch(1));
        let (segment, page) = (stamp.segment(), stamp.page());
        let folder = partition_folder(PartitionId::new(topic, 3));
        assert!(is_segment(&format!("{folder}/{segment}")));
        for other in [
            format!("{folder}/{page}"),
            format!("{folder}/deeper/{segment}"),
            format!("other/{folder}/{segment}"),
            format!("/{folder}/{segment}"),
            format!("topics/{topic}/03/{segment}"),
            format!("topics/{}/3/{segment}", topic.to_string().to_uppercase()),
            format!("topics/{topic}/{segment}"),
            topic_object(topic),
            segment.clone(),
        ] {
            assert!(!is_segment(&other), "{other}");
        }
    }

    #[test]
    fn invalid_names_are_rejected() {
        let id = Uuid::from_u128(7);
        let zero = "0".repeat(20);
        for bad in [
            String::new(),
            format!("{zero}-{zero}-0000000000-{id}.segment"),
            format!("{zero}-00000000000000000001-9999999999-{id}.segment"),
            format!("{zero}-00000000000000000001-+000000001-{id}.segment"),
            format!("{zero}-99999999999999999999-0000000001-{id}.segment"),
        ] {
            assert!(ObjectId::from_segment(&bad).is_err(), "{bad}");
        }
    }
}
