//! Reads the gRPC status of a failed call, for callers that do not depend on the transport.

use std::error::Error as _;

pub use tonic::{Code, Status};

/// Returns true if the request was certainly not sent, because no connection was established. After any other failure
/// the server may have received the request.
pub fn never_sent(status: &Status) -> bool {
    let mut source = status.source();
    while let Some(error) = source {
        if error.is::<tonic::ConnectError>() {
            return true;
        }
        source = error.source();
    }
    false
}

/// Formats the status and the chain of its sources in one line. A refused connection is described as
/// "connection refused".
pub fn format_with_sources(status: &Status) -> String {
    if never_sent(status) && is_connection_refused(status) {
        return "connection refused".to_owned();
    }
    let mut text = if status.message().is_empty() { status.code().to_string() } else { status.message().to_owned() };
    let mut source = status.source();
    while let Some(error) = source {
        let source_text = error.to_string();
        if !text.contains(&source_text) {
            text.push_str(": ");
            text.push_str(&source_text);
        }
        source = error.source();
    }
    text
}

/// Returns true if a refused connection is among the causes of the status.
fn is_connection_refused(status: &Status) -> bool {
    let mut source = status.source();
    while let Some(error) = source {
        if error.downcast_ref::<std::io::Error>().is_some_and(|io| io.kind() == std::io::ErrorKind::ConnectionRefused) {
            return true;
        }
        source = error.source();
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_failed_connect_counts_as_never_sent() {
        let refused = std::io::Error::from(std::io::ErrorKind::ConnectionRefused);
        let status = Status::from_error(Box::new(tonic::ConnectError(Box::new(refused))));
        assert_eq!((status.code(), never_sent(&status)), (Code::Unavailable, true));
        assert_eq!(format_with_sources(&status), "connection refused");
        let reset = std::io::Error::from(std::io::ErrorKind::ConnectionReset);
        assert!(!never_sent(&Status::from_error(Box::new(reset))));
        assert!(!never_sent(&Status::unavailable("tcp connect error")), "a server can send any message");
    }
}
