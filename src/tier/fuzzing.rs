//! Entry points of the fuzzers (`fuzz/entries`) to parsers that are private to this module. Each function decodes an
//! object's content and encodes the result again. `None` means that the content was rejected.

use serde::{Serialize, de::DeserializeOwned};

use super::{cluster_marker::ClusterMarker, store::TopicRecord};

/// Decodes and encodes `cluster.json`.
pub fn owner(content: &[u8]) -> Option<Vec<u8>> {
    reencode::<ClusterMarker>(content)
}

/// Decodes and encodes `topic.json`.
pub fn topic(content: &[u8]) -> Option<Vec<u8>> {
    reencode::<TopicRecord>(content)
}

/// Decodes a JSON value and encodes it again.
fn reencode<T: Serialize + DeserializeOwned>(content: &[u8]) -> Option<Vec<u8>> {
    let value: T = serde_json::from_slice(content).ok()?;
    Some(serde_json::to_vec(&value).expect("a plain struct is valid JSON"))
}
