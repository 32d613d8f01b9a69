//! Ports for servers that tests start. All tests of a process use this one counter, because two counters would return
//! equal ports.

use std::{
    net::{Ipv4Addr, TcpListener},
    sync::atomic::{AtomicU32, Ordering::Relaxed},
};

/// Returns a free port of the loopback interface. The port is below the kernel's ephemeral ports, so that no client
/// connection can take it while its server is down.
pub(crate) fn free_port() -> u16 {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    loop {
        let step = NEXT.fetch_add(1, Relaxed);
        let port = 12_000 + std::process::id().wrapping_mul(37).wrapping_add(step) % 18_000;
        let port = u16::try_from(port).expect("the port is below 65,536");
        if TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok() {
            return port;
        }
    }
}
