//! The `strandline` binary: broker, operator tool and command-line client.

use std::process::ExitCode;

/// Global allocator. The system's allocator returns the codec's buffers to the kernel after every message, which takes
/// a quarter of a busy broker's CPU (docs/performance.md).
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    strandline::cli::main()
}
