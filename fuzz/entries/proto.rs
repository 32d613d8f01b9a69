//! Fuzz entry of produce requests: the generated message, and the encoding that this package writes by hand in its
//! place.

use bytes::Bytes;
use prost::Message;
use strandline::{
    client::producer::produce_request::ProduceRequestParts,
    proto::{
        error::ApiError,
        v1::{self, append_request::Payload},
    },
    record::Batch,
};

/// Decodes a produce request, and the same bytes as an error.
pub(crate) fn produce(input: &[u8]) -> bool {
    error(input);
    let Ok(request) = v1::ProduceRequest::decode(Bytes::copy_from_slice(input)) else { return false };
    let decoded = v1::ProduceRequest::decode(&request.encode_to_vec()[..]);
    assert_eq!(decoded.as_ref(), Ok(&request), "a message differs after encoding and decoding");
    let as_is = framed(&request);
    framed(&with_right_batch(request)) || as_is
}

/// Checks that the hand-written encoding of a request with a valid batch decodes to the same request. Returns false
/// without a valid batch.
fn framed(request: &v1::ProduceRequest) -> bool {
    let Some(append) = &request.append else { return false };
    let Some(Payload::Batch(batch)) = &append.payload else { return false };
    let Ok(batch) = Batch::parse(batch.clone()) else { return false };
    let frame = ProduceRequestParts {
        correlation_id: request.correlation_id,
        topic: append.topic.as_str().into(),
        partition: append.partition,
        acks: append.acks,
        timeout_ms: append.timeout_ms,
        batch,
        topic_id: append.topic_id.as_str().into(),
    };
    let bytes = frame.encode_to_vec();
    assert_eq!(bytes.len(), frame.encoded_len());
    assert_eq!(v1::ProduceRequest::decode(&bytes[..]).as_ref(), Ok(request), "a frame is the message on the wire");
    true
}

fn with_right_batch(mut request: v1::ProduceRequest) -> v1::ProduceRequest {
    if let Some(v1::AppendRequest { payload: Some(Payload::Batch(batch)), .. }) = &mut request.append {
        let mut corrected = batch.to_vec();
        super::record::renew_crc(&mut corrected);
        *batch = corrected.into();
    }
    request
}

/// Decodes an error of a stream. An error code that is unknown to this version keeps its message.
fn error(input: &[u8]) {
    let Ok(error) = v1::Error::decode(input) else { return };
    let fault = ApiError::from(error.clone());
    assert_eq!((&fault.message, fault.retryable), (&error.message, error.retryable));
    assert_eq!(ApiError::from(v1::Error::from(fault.clone())), fault);
}
