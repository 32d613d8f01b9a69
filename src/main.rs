//! The `strandline` binary: broker, operator's tool and command-line client.

use std::process::ExitCode;

/// Measured (docs/performance.md): the system's allocator gives the codec's buffers back to the kernel after every
/// message, which cost a quarter of a busy broker's CPU.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    strandline::cli::main()
}
