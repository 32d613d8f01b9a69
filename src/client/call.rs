//! One unary call to one broker: its timeout, and the classification of its failure.

use std::{error::Error as _, future::Future, time::Duration};

use tonic::Status;

use super::{
    address::BrokerAddress,
    error::{ConnectError, root_cause},
    transport,
};
use crate::proto::error::{ApiError, ErrorCode, is_broker_status};

/// A call to one broker that failed.
pub(super) enum AttemptError {
    /// No connection to the broker.
    NoConnection(ConnectError),
    /// The connection exists, and the call failed.
    CallFailed(NoResponse),
}

/// Waits for the response to one call, for at most `timeout`.
pub(super) async fn with_timeout<R, T>(timeout: Duration, call: R) -> Result<T, NoResponse>
where
    R: Future<Output = Result<tonic::Response<T>, Status>>,
{
    match tokio::time::timeout(timeout, call).await {
        Ok(Ok(response)) => Ok(response.into_inner()),
        Ok(Err(status)) => Err(classify_status(&status)),
        Err(_) => Err(NoResponse::TimedOut(timeout)),
    }
}

/// A unary call without a successful response.
#[derive(Debug)]
pub(super) enum NoResponse {
    /// The connection could not be made: the broker never received the call.
    NotSent(String),
    /// The other end is no broker, or a broker that does not implement the call: nothing was done.
    NoBroker(ApiError),
    /// The connection broke, or an intermediary responded: the broker may have received the call.
    Broken(ApiError),
    /// No response arrived within this time.
    TimedOut(Duration),
    /// The broker's own error.
    Refused(ApiError),
}

impl NoResponse {
    /// Returns true if a broker may have received the call.
    pub(super) const fn may_have_arrived(&self) -> bool {
        matches!(self, Self::Broken(_) | Self::TimedOut(_))
    }

    /// Converts into an [`ApiError`] without the address.
    pub(super) fn into_error(self) -> ApiError {
        match self {
            Self::NotSent(problem) => ApiError::new(ErrorCode::NotReady, problem),
            Self::TimedOut(timeout) => ApiError::new(ErrorCode::Timeout, format!("no response in {timeout:?}")),
            Self::NoBroker(error) | Self::Broken(error) | Self::Refused(error) => error,
        }
    }

    /// Converts into an [`ApiError`] whose message starts with the address. The broker's own errors need no address.
    pub(super) fn with_address(self, address: &BrokerAddress) -> ApiError {
        match self {
            Self::Refused(error) => error,
            other => {
                let error = other.into_error();
                ApiError { message: format!("{}: {}", address.as_str(), error.message), ..error }
            }
        }
    }
}

/// Classifies the status of a failed call: not sent, rejected by the broker, no broker, or a broken connection.
fn classify_status(status: &Status) -> NoResponse {
    if let Some(problem) = transport::unsent(status) {
        return NoResponse::NotSent(problem);
    }
    let error = convert_status(status);
    match (is_broker_status(status), status.code()) {
        (true, _) => NoResponse::Refused(error),
        (false, tonic::Code::Unimplemented) => NoResponse::NoBroker(error),
        (false, _) => NoResponse::Broken(error),
    }
}

/// Converts the status that ended a call or a stream, as [`ApiError::from`] does. If the connection failed, the message
/// is the cause of that instead of the description of the gRPC code.
pub(super) fn convert_status(status: &Status) -> ApiError {
    let error = ApiError::from(status);
    if is_broker_status(status) {
        return error;
    }
    // A status that the gRPC library created for a failed connection has the cause as its source.
    let failed = || status.source().map(|source| format!("the connection failed: {}", root_cause(source)));
    match transport::unsent(status).or_else(failed) {
        Some(message) => ApiError { message, ..error },
        None => error,
    }
}

#[cfg(test)]
mod tests {
    use std::{io, sync::Arc};

    use super::*;

    #[test]
    fn only_failed_connection_is_described_by_its_cause() {
        let mut broken = Status::unknown("h2 protocol error: http2 error");
        broken.set_source(Arc::new(io::Error::from_raw_os_error(104)));
        assert_eq!(convert_status(&broken).message, "the connection failed: connection reset by peer");
        let refused = Status::from(ApiError::new(ErrorCode::DiskFull, "the disk is full"));
        assert_eq!(convert_status(&refused).message, "the disk is full");
        let proxy = Status::unavailable("bad gateway");
        assert_eq!(convert_status(&proxy), ApiError::from(&proxy));
    }
}
