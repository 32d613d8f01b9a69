//! Binds the port of a listener. An error names the cause and the remedy.

use std::{io, net::SocketAddr};

use tokio::net::TcpListener;

/// Error for a port that cannot be bound.
#[derive(Debug, thiserror::Error)]
#[error("cannot listen on {address} for {purpose}: {reason}: {remedy}")]
pub(super) struct ListenError {
    address: SocketAddr,
    purpose: &'static str,
    reason: String,
    remedy: String,
}

/// Binds `address`. `purpose` names the listener in the error message, and `flag` the flag or setting of its address.
pub(super) async fn listen(address: SocketAddr, purpose: &'static str, flag: &str) -> Result<TcpListener, ListenError> {
    TcpListener::bind(address).await.map_err(|error| {
        let (reason, remedy) = match error.kind() {
            io::ErrorKind::AddrInUse => (
                format!("port {} is in use by another process", address.port()),
                format!("stop that process, or choose another port with {flag}"),
            ),
            io::ErrorKind::AddrNotAvailable => (
                format!("{} is not an address of this machine", address.ip()),
                format!("choose another address with {flag}, or 0.0.0.0 for all addresses"),
            ),
            io::ErrorKind::PermissionDenied => (
                format!("this user may not use port {}", address.port()),
                format!("choose a port above 1023 with {flag}"),
            ),
            _ => (error.to_string(), format!("choose another address with {flag}")),
        };
        ListenError { address, purpose, reason, remedy }
    })
}
