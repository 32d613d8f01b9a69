//! The gRPC interface: the types generated from `strandline/v1/*.proto`, the message codec, and API errors.

pub mod codec;
pub mod error;
#[cfg(feature = "server")]
pub mod parts;
pub mod status;

/// Generated messages, clients and (with the feature `server`) service traits of `strandline/v1`.
#[allow(missing_docs, unreachable_pub, clippy::all, clippy::pedantic, clippy::disallowed_methods, reason = "generated")]
pub mod v1 {
    tonic::include_proto!("strandline.v1");
}

/// Encoded `FileDescriptorSet` of the client services, for server reflection.
pub const CLIENT_DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/client-descriptors.bin"));
