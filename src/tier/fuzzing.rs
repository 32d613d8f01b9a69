//! Doors for the fuzzers (`fuzz/entries`) to what this room reads from the bucket and shows to nobody else. Each takes an
//! object's content and writes again what it understood; `None` is a refusal.

use serde::{Serialize, de::DeserializeOwned};

use super::{claim::Card, store::TopicRecord};

/// `cluster.json`.
pub fn owner(content: &[u8]) -> Option<Vec<u8>> {
    again::<Card>(content)
}

/// `topic.json`.
pub fn topic(content: &[u8]) -> Option<Vec<u8>> {
    again::<TopicRecord>(content)
}

fn again<T: Serialize + DeserializeOwned>(content: &[u8]) -> Option<Vec<u8>> {
    let value: T = serde_json::from_slice(content).ok()?;
    Some(serde_json::to_vec(&value).expect("a plain struct"))
}
