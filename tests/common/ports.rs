//! Ports for servers that tests start. All tests of a process take theirs here: two counters would give the same ones.

use std::{
    net::{Ipv4Addr, TcpListener},
    sync::atomic::{AtomicU32, Ordering::Relaxed},
};

/// A port of the loopback that is free. It lies below those that the kernel hands out by itself, so that no client's connection can take it
/// while its server is down.
pub(crate) fn free_port() -> u16 {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    loop {
        let step = NEXT.fetch_add(1, Relaxed);
        let port = 12_000 + std::process::id().wrapping_mul(37).wrapping_add(step) % 18_000;
        let port = u16::try_from(port).expect("below 65,536");
        if TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok() {
            return port;
        }
    }
}
