//! Counts the repeated elements of a request in its encoded bytes, before the request is decoded. A record of two
//! encoded bytes becomes a struct of a hundred bytes.
//!
//! The counter uses the descriptors of the messages and reads only keys and lengths. At bytes that are not a message
//! the counter stops, and the decoder then rejects the request.

use std::{collections::BTreeMap, sync::Arc};

use prost::Message as _;
use prost_types::{
    DescriptorProto, FileDescriptorSet,
    field_descriptor_proto::{Label, Type},
};

use super::CLIENT_DESCRIPTORS;

/// Maximum nesting depth at which elements are counted. Requests have four levels.
const MAX_DEPTH: usize = 16;

/// Repeated fields of the requests of all client calls.
#[derive(Debug)]
pub struct RequestSchemas {
    messages: Arc<Vec<Fields>>,
    /// Index in `messages` of the request of each call, by the path `/package.Service/Method`.
    requests: BTreeMap<String, usize>,
}

/// Repeated fields and message fields of a message, by number.
type Fields = BTreeMap<u32, Field>;

/// Field of a message.
#[derive(Clone, Copy, Debug)]
struct Field {
    repeated: bool,
    /// Index of the field's message type in [`RequestSchemas::messages`]; `None` for bytes, text and numbers.
    message: Option<usize>,
    /// True for packed numbers, where each byte can be an element.
    packed: bool,
}

impl RequestSchemas {
    /// Creates the schemas of all client services.
    pub fn of_clients() -> Self {
        let files = FileDescriptorSet::decode(CLIENT_DESCRIPTORS).expect("written by the build script");
        let mut named = BTreeMap::new();
        for file in &files.file {
            for message in &file.message_type {
                collect(&format!(".{}", file.package()), message, &mut named);
            }
        }
        let numbers: BTreeMap<&str, usize> = named.keys().enumerate().map(|(n, name)| (name.as_str(), n)).collect();
        let messages = named.values().map(|message| fields(message, &numbers)).collect();
        let mut requests = BTreeMap::new();
        for file in &files.file {
            for service in &file.service {
                for method in &service.method {
                    let path = format!("/{}.{}/{}", file.package(), service.name(), method.name());
                    requests.extend(numbers.get(method.input_type()).map(|message| (path, *message)));
                }
            }
        }
        Self { messages: Arc::new(messages), requests }
    }

    /// Returns a counter for requests of the call at `path`, or `None` for an unknown call.
    pub fn counter(&self, path: &str) -> Option<PartCounter> {
        let root = *self.requests.get(path)?;
        Some(PartCounter {
            messages: Arc::clone(&self.messages),
            root,
            levels: Vec::new(),
            at: 0,
            token: Token::Key,
            value: 0,
            shift: 0,
        })
    }
}

/// Adds a message and its nested messages to `named`, by full name.
fn collect(scope: &str, message: &DescriptorProto, named: &mut BTreeMap<String, DescriptorProto>) {
    let name = format!("{scope}.{}", message.name());
    for nested in &message.nested_type {
        collect(&name, nested, named);
    }
    named.insert(name, message.clone());
}

/// Returns the repeated fields and message fields of a message. `numbers` are the indexes of all message types by name.
fn fields(message: &DescriptorProto, numbers: &BTreeMap<&str, usize>) -> Fields {
    let field = |field: &prost_types::FieldDescriptorProto| {
        let repeated = field.label() == Label::Repeated;
        let message = if field.r#type() == Type::Message { numbers.get(field.type_name()).copied() } else { None };
        let packed = repeated && !matches!(field.r#type(), Type::Message | Type::String | Type::Bytes);
        (repeated || message.is_some())
            .then(|| (u32::try_from(field.number()).unwrap_or_default(), Field { repeated, message, packed }))
    };
    message.field.iter().filter_map(field).collect()
}

/// Kind of the next bytes.
#[derive(Clone, Copy, Debug)]
enum Token {
    /// Key of a field: its number and its type.
    Key,
    /// Length of this field.
    Length { field: u32 },
    /// Value of a number.
    Number,
    /// This number of bytes without keys or lengths.
    Skip(usize),
    /// The bytes are not a message. The counter ignores the rest.
    Opaque,
}

/// Counts the repeated elements of successive requests.
#[derive(Debug)]
pub struct PartCounter {
    messages: Arc<Vec<Fields>>,
    root: usize,
    /// Nested messages at the current position: index of the type, and end position.
    levels: Vec<(usize, usize)>,
    /// Position in the request.
    at: usize,
    token: Token,
    /// Value and number of bits of the varint that is being read.
    value: u64,
    shift: u32,
}

impl PartCounter {
    /// Resets the counter for the next request.
    pub fn reset(&mut self) {
        self.levels.clear();
        (self.at, self.token, self.value, self.shift) = (0, Token::Key, 0, 0);
    }

    /// Returns the number of elements that start in the next bytes of the request.
    pub fn count(&mut self, bytes: &[u8]) -> usize {
        let (mut parts, mut rest) = (0, bytes);
        while let Some(first) = rest.first() {
            match self.token {
                Token::Opaque => return parts,
                Token::Skip(remaining) => {
                    let skipped = remaining.min(rest.len());
                    rest = &rest[skipped..];
                    self.at += skipped;
                    self.token = if skipped == remaining { Token::Key } else { Token::Skip(remaining - skipped) };
                }
                Token::Key | Token::Length { .. } | Token::Number => {
                    rest = &rest[1..];
                    self.at += 1;
                    if let Some(value) = self.varint(*first) {
                        parts += self.on_number(value);
                    }
                }
            }
            if matches!(self.token, Token::Key) && self.shift == 0 {
                while self.levels.last().is_some_and(|(_, end)| self.at >= *end) {
                    self.levels.pop();
                }
            }
        }
        parts
    }

    /// Reads one byte of a varint. Returns the value after the last byte. A varint of more than ten bytes makes the
    /// rest of the request [`Token::Opaque`].
    fn varint(&mut self, byte: u8) -> Option<u64> {
        self.value |= u64::from(byte & 0x7f) << self.shift;
        self.shift += 7;
        if byte & 0x80 == 0 {
            self.shift = 0;
            return Some(std::mem::take(&mut self.value));
        }
        if self.shift >= 64 {
            self.token = Token::Opaque;
        }
        None
    }

    /// Returns the field with this number of the message at the current position. Returns `None` for an unknown field,
    /// and for a field that is neither repeated nor a message.
    fn field(&self, number: u32) -> Option<Field> {
        let message = self.levels.last().map_or(self.root, |(message, _)| *message);
        self.messages[message].get(&number).copied()
    }

    /// Processes a complete varint: a key, a length or a value. Returns the number of repeated elements that the varint
    /// starts.
    fn on_number(&mut self, value: u64) -> usize {
        match self.token {
            Token::Key => {
                let field = u32::try_from(value >> 3).unwrap_or_default();
                self.token = match value & 7 {
                    // 0 is not a field number.
                    _ if field == 0 => Token::Opaque,
                    0 => Token::Number,
                    1 => Token::Skip(8),
                    2 => Token::Length { field },
                    // The fields of a group are read one by one.
                    3 | 4 => Token::Key,
                    5 => Token::Skip(4),
                    _ => Token::Opaque,
                };
                // Elements of a packed field may also be encoded one by one, each with its own key.
                usize::from(value & 7 != 2 && self.field(field).is_some_and(|field| field.repeated))
            }
            Token::Length { field } => {
                let field = self.field(field);
                let length = usize::try_from(value).unwrap_or(usize::MAX);
                self.token = Token::Skip(length);
                if length == 0 {
                    self.token = Token::Key;
                } else if let Some(message) = field.and_then(|field| field.message) {
                    self.token = if self.levels.len() < MAX_DEPTH { Token::Key } else { Token::Opaque };
                    self.levels.push((message, self.at.saturating_add(length)));
                }
                match field {
                    Some(field) if field.packed => length,
                    Some(field) => usize::from(field.repeated),
                    None => 0,
                }
            }
            _ => {
                self.token = Token::Key;
                0
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::v1::{self, append_request::Payload};

    /// Returns the count of a request, and checks that the count is the same if the request arrives in small chunks.
    fn parts(path: &str, request: &impl prost::Message) -> usize {
        let (schemas, bytes) = (RequestSchemas::of_clients(), request.encode_to_vec());
        let mut counter = schemas.counter(path).expect("a call");
        let total = counter.count(&bytes);
        for size in [1, 2, 3, 7] {
            counter.reset();
            let sum: usize = bytes.chunks(size).map(|chunk| counter.count(chunk)).sum();
            assert_eq!(sum, total, "in chunks of {size}");
        }
        total
    }

    const APPEND: &str = "/strandline.v1.Log/Append";

    fn append(payload: Payload) -> v1::AppendRequest {
        v1::AppendRequest { topic: "t".repeat(200), timeout_ms: 30_000, payload: Some(payload), ..Default::default() }
    }

    #[test]
    fn repeated_fields_of_requests_are_counted() {
        let header = v1::Header { key: "k".to_owned(), value: Some(Bytes::from_static(b"v")) };
        let record =
            v1::Record { headers: vec![header; 3], value: Some(Bytes::from(vec![9; 300])), ..Default::default() };
        let records = vec![record, v1::Record::default(), v1::Record::default()];
        assert_eq!(parts(APPEND, &append(Payload::Records(v1::RecordList { records }))), 6);
        let partitions = vec![v1::FetchPartition { topic: "t".to_owned(), offset: -1, ..Default::default() }; 40];
        assert_eq!(parts("/strandline.v1.Log/Read", &v1::ReadRequest { partitions, ..Default::default() }), 40);
        let topics = vec![String::new(); 1000];
        let names = v1::GetMetadataRequest { topics, ..Default::default() };
        assert_eq!(parts("/strandline.v1.Admin/GetMetadata", &names), 1000);
        let config = (0..20).map(|n| (n.to_string(), "v".to_owned())).collect();
        let create = v1::CreateTopicRequest { name: "t".to_owned(), config, ..Default::default() };
        assert_eq!(parts("/strandline.v1.Admin/CreateTopic", &create), 20);
    }

    #[test]
    fn bytes_of_a_batch_are_not_counted() {
        let batch = vec![0x0a; 100_000];
        let inner = append(Payload::Batch(batch.into()));
        assert_eq!(parts(APPEND, &inner), 0);
        let request = v1::ProduceRequest { correlation_id: u64::MAX, append: Some(inner) };
        assert_eq!(parts("/strandline.v1.Log/Produce", &request), 0);
    }

    #[test]
    fn invalid_message_ends_the_count() {
        let schemas = RequestSchemas::of_clients();
        assert!(schemas.counter("/strandline.v1.Peer/Replicate").is_none());
        let mut counter = schemas.counter(APPEND).expect("a call");
        for bytes in
            [&[0xff; 64][..], &[0x0f, 1, 2], &[0x32, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1, 0x0a, 0]]
        {
            counter.reset();
            assert!(counter.count(bytes) <= 1);
        }
        // No field has the number 0.
        let mut counter = schemas.counter("/strandline.v1.Admin/GetMetadata").expect("a call");
        assert_eq!(counter.count(&[0x0a, 0, 0, 0, 0x0a, 0]), 1);
    }
}
