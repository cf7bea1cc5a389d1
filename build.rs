//! Compiles `proto/` without a `protoc` binary: protox, in pure Rust, reads the files into a
//! `FileDescriptorSet`, and tonic generates code straight from that set.

use std::{error::Error, fs, path::PathBuf};

use protox::prost::Message as _;

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=proto");
    println!("cargo:rerun-if-changed=build.rs");

    let files = protox::compile(
        ["proto/registry.proto", "proto/discovery.proto", "proto/handover.proto", "proto/joining.proto"],
        ["proto"],
    )?;

    // The reflection service serves this set. tonic's own option for it needs protoc.
    let out = PathBuf::from(std::env::var_os("OUT_DIR").ok_or("OUT_DIR is not set")?);
    fs::write(out.join("descriptors.bin"), files.encode_to_vec())?;

    tonic_prost_build::configure()
        .build_client(true)
        .build_server(true)
        .codec_path("crate::grpc::codec::SmallBufferCodec")
        // Otherwise each empty word, two bytes on the wire, would take half a KiB of memory.
        .boxed(".gangplank.internal.v1.Word.message")
        .compile_fds(files)?;
    Ok(())
}
