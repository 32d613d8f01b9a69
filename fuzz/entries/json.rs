//! Fuzz entry of JSON that an operator may have edited, in the object store and in the metadata store, and of names.

use strandline::{
    cluster::{
        BrokerValue, ControllerValue, Keys, PartitionValue, ProducerIdsValue, TombstoneValue, TopicValue, Value,
    },
    tier::{ManifestName, TierState, fuzzing, name::ObjectId},
};

/// Decodes the input as the type that the first byte selects.
pub(crate) fn json(input: &[u8]) -> bool {
    let Some((&kind, content)) = input.split_first() else { return false };
    match kind % 12 {
        0 => stable(content, fuzzing::owner),
        1 => stable(content, fuzzing::topic),
        2 => value::<TierState>(content),
        3 => value::<TopicValue>(content),
        4 => value::<PartitionValue>(content),
        5 => value::<BrokerValue>(content),
        6 => value::<ControllerValue>(content),
        7 => value::<TombstoneValue>(content),
        8 => value::<ProducerIdsValue>(content),
        9 => path(content),
        10 => name(content),
        _ => cluster(content),
    }
}

fn stable(content: &[u8], recode: fn(&[u8]) -> Option<Vec<u8>>) -> bool {
    let Some(encoded) = recode(content) else { return false };
    assert_eq!(recode(&encoded).as_ref(), Some(&encoded), "the encoded value decodes to another value");
    true
}

fn value<T: Value + PartialEq + std::fmt::Debug>(content: &[u8]) -> bool {
    match T::decode("key", content) {
        Ok(value) => {
            assert_eq!(
                T::decode("key", &value.encode()).as_ref(),
                Ok(&value),
                "a value differs after encoding and decoding"
            );
            true
        }
        Err(error) => {
            assert!(error.to_string().contains("key"));
            false
        }
    }
}

/// Parses a path of the metadata store. Each key has exactly one path.
fn path(content: &[u8]) -> bool {
    let Ok(text) = std::str::from_utf8(content) else { return false };
    let keys = Keys::new("test").expect("the cluster name is valid");
    let path = format!("{}{text}", keys.prefix());
    let Some(key) = keys.parse(&path) else { return false };
    assert_eq!(keys.path(&key), path, "a key has one path");
    true
}

/// Parses the file name of an object. Each object has exactly one name.
fn name(content: &[u8]) -> bool {
    let Ok(text) = std::str::from_utf8(content) else { return false };
    let segment = ObjectId::from_segment(text).map(|stamp| stamp.segment());
    let page = ObjectId::from_page(text).map(|stamp| stamp.page());
    let manifest = text.parse::<ManifestName>().map(|name| name.to_string());
    let names = [segment, page, manifest];
    assert!(names.iter().flatten().all(|name| name == text), "one object has one name");
    names.iter().any(Result::is_ok)
}

fn cluster(content: &[u8]) -> bool {
    let Ok(text) = std::str::from_utf8(content) else { return false };
    Keys::new(text).is_ok_and(|keys| keys.prefix() == format!("/strandline/{text}/"))
}
