//! What a failed call says about itself, for callers that may not know the transport.

use std::error::Error as _;

pub use tonic::{Code, Status};

/// Whether a call surely never left this process: no connection could be made for it. Of any other failure the server
/// may have seen the request.
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

/// The status and what is behind it, innermost last, in one line. Of a connection that was refused nothing but that.
pub fn in_full(status: &Status) -> String {
    if never_sent(status) && was_refused(status) {
        return "connection refused".to_owned();
    }
    let mut text = if status.message().is_empty() { status.code().to_string() } else { status.message().to_owned() };
    let mut source = status.source();
    while let Some(error) = source {
        let said = error.to_string();
        if !text.contains(&said) {
            text.push_str(": ");
            text.push_str(&said);
        }
        source = error.source();
    }
    text
}

fn was_refused(status: &Status) -> bool {
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
    fn only_a_connection_that_was_not_made_proves_that_nothing_was_sent() {
        let refused = std::io::Error::from(std::io::ErrorKind::ConnectionRefused);
        let status = Status::from_error(Box::new(tonic::ConnectError(Box::new(refused))));
        assert_eq!((status.code(), never_sent(&status)), (Code::Unavailable, true));
        assert_eq!(in_full(&status), "connection refused");
        let reset = std::io::Error::from(std::io::ErrorKind::ConnectionReset);
        assert!(!never_sent(&Status::from_error(Box::new(reset))));
        assert!(!never_sent(&Status::unavailable("tcp connect error")), "a server may say anything");
    }
}
