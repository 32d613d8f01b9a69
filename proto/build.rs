//! Generates the gRPC code from the .proto files, in pure Rust: the build needs no protoc. For `make etcd-protos` it
//! also describes the files of `etcd-client`, whose own build script runs `tools/protoc` instead.

use std::{env, error::Error, fs, path::PathBuf};

use prost::Message as _;

/// Files of the services that clients may call, and their imports.
const CLIENT_FILES: [&str; 3] = ["strandline/v1/types.proto", "strandline/v1/log.proto", "strandline/v1/admin.proto"];

/// Files of the services between brokers.
const PEER_FILES: [&str; 1] = ["strandline/v1/peer.proto"];

/// Files that the build script of `etcd-client` passes to protoc.
const ETCD_FILES: [&str; 5] = [
    "etcd/api/authpb/auth.proto",
    "etcd/api/etcdserverpb/rpc.proto",
    "etcd/api/mvccpb/kv.proto",
    "etcd/server/etcdserver/api/v3election/v3electionpb/v3election.proto",
    "etcd/server/etcdserver/api/v3lock/v3lockpb/v3lock.proto",
];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=strandline");
    let descriptors = protox::compile(CLIENT_FILES.iter().chain(&PEER_FILES), ["."])?;
    let out = PathBuf::from(env::var("OUT_DIR")?);
    fs::write(out.join("client-descriptors.bin"), protox::compile(CLIENT_FILES, ["."])?.encode_to_vec())?;
    tonic_prost_build::configure()
        .bytes(".")
        .codec_path("crate::codec::LargeBufferCodec")
        .build_server(env::var_os("CARGO_FEATURE_SERVER").is_some())
        .compile_fds(descriptors)?;
    describe_etcd()
}

/// Writes the descriptor set of the .proto files below `STRANDLINE_ETCD_PROTOS` to `STRANDLINE_ETCD_SET`. Both paths
/// are absolute, because a build script runs in the folder of its package.
fn describe_etcd() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-env-changed=STRANDLINE_ETCD_PROTOS");
    println!("cargo:rerun-if-env-changed=STRANDLINE_ETCD_SET");
    let path = |name| env::var_os(name).map(PathBuf::from);
    let (Some(protos), Some(set)) = (path("STRANDLINE_ETCD_PROTOS"), path("STRANDLINE_ETCD_SET")) else {
        return Ok(());
    };
    println!("cargo:rerun-if-changed={}", set.display());
    let mut compiler = protox::Compiler::new([protos])?;
    // Comments would only become unused documentation.
    compiler.include_imports(true).include_source_info(false).open_files(ETCD_FILES)?;
    fs::write(set, compiler.file_descriptor_set().encode_to_vec())?;
    Ok(())
}
