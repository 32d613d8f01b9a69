//! The gRPC interface: what `proto/` generates, the codec that carries it, and how errors travel.

pub mod codec;
pub mod fault;
pub mod frame;
#[cfg(feature = "server")]
pub mod parts;
pub mod status;

/// The generated messages, clients and (with `server`) service traits of `proto/strandline/v1`.
#[allow(missing_docs, unreachable_pub, clippy::all, clippy::pedantic, clippy::disallowed_methods, reason = "generated")]
pub mod v1 {
    tonic::include_proto!("strandline.v1");
}

/// The encoded `FileDescriptorSet` of what clients may call, for server reflection.
pub const CLIENT_DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/client-descriptors.bin"));
