//! The `strandline` binary: broker, operator's tool and command-line client.

fn main() {}
