//! Errors of requests to etcd: their classification, and the conversion to errors of the metadata store. Pure.

use etcd_client::Error;

use crate::{
    cluster::store::{LeaseId, MetaStoreError, Regression, Revision, Transaction, TxnOp},
    proto::status::{Code, format_with_sources, never_sent},
};

/// Outcome of a failed request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ErrorClass {
    /// Not executed; another member or a later attempt may execute it.
    NotDone,
    /// Possibly executed, or executed later.
    Unknown,
    /// Not executed, and every member would reject it.
    Refused,
    /// Not executed for lack of space; every member rejects writes until an operator frees space.
    NoSpace,
    /// Not executed: the request had no valid authentication token. A new login may help.
    Token,
    /// Login not executed: authentication is disabled in etcd.
    NoLogins,
    /// The lease of the request has ended.
    LeaseGone,
    /// The revision of the request is compacted.
    Compacted,
    /// The response exceeded the size limit.
    TooLong,
}

/// Error of one attempt at one member.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct EtcdAttemptError {
    pub(super) class: ErrorClass,
    pub(super) reason: String,
}

/// Error of a call, after all of its attempts. The texts contain the errors of the members.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum EtcdCallError {
    Unavailable {
        reason: String,
        /// True if the request may have been executed, and must not be executed twice.
        outcome_unknown: bool,
    },
    Refused(String),
    NoSpace(String),
    /// A member of another etcd cluster responded.
    Regressed(Regression),
    LeaseGone,
    Compacted,
    TooLong(String),
}

/// Texts that identify etcd's errors, with their class. The gRPC codes alone are ambiguous: etcd returns `UNAVAILABLE`
/// for a request that no leader accepted, and for a request whose leader failed. Source: etcd's
/// `api/v3rpc/rpctypes/error.go`, 3.4 to 3.6.
const ERROR_CLASSES: &[(&str, ErrorClass)] = &[
    // etcd returns these four before it processes the request. For a proposal that no leader accepted in time, it
    // returns "request timed out" instead.
    ("etcdserver: no leader", ErrorClass::NotDone),
    ("etcdserver: not capable", ErrorClass::NotDone),
    ("etcdserver: too many requests", ErrorClass::NotDone),
    ("etcdserver: rpc not supported for learner", ErrorClass::NotDone),
    ("etcdserver: invalid auth token", ErrorClass::Token),
    ("etcdserver: revision of auth store is old", ErrorClass::Token),
    // For a request without a token: authentication was enabled after this client connected.
    ("etcdserver: user name is empty", ErrorClass::Token),
    // etcd 3.4 returns this error also for a watch whose token has expired.
    ("etcdserver: permission denied", ErrorClass::Token),
    ("etcdserver: authentication is not enabled", ErrorClass::NoLogins),
    ("etcdserver: mvcc: database space exceeded", ErrorClass::NoSpace),
    ("etcdserver: requested lease not found", ErrorClass::LeaseGone),
    ("etcdserver: mvcc: required revision has been compacted", ErrorClass::Compacted),
    // From the transport on the client side.
    ("decoded message length too large", ErrorClass::TooLong),
];

/// Classifies a failed request by its gRPC status. `never_sent` is true if the request did not leave this process. The
/// class is `Unknown` unless another class is certain.
pub(super) fn classify(code: Code, message: &str, never_sent: bool) -> ErrorClass {
    if never_sent {
        return ErrorClass::NotDone;
    }
    if let Some((_, class)) = ERROR_CLASSES.iter().find(|(text, _)| message.contains(text)) {
        return *class;
    }
    match code {
        // etcd returns these before a proposal. A server other than etcd returns `Unimplemented`.
        Code::InvalidArgument | Code::FailedPrecondition | Code::PermissionDenied => ErrorClass::Refused,
        Code::Unimplemented => ErrorClass::Refused,
        Code::Unauthenticated => ErrorClass::Token,
        _ => ErrorClass::Unknown,
    }
}

impl EtcdAttemptError {
    /// Returns the error of a request that may have been executed.
    pub(super) fn unknown(reason: String) -> Self {
        Self { class: ErrorClass::Unknown, reason }
    }

    /// Classifies an error of `etcd_client`.
    pub(super) fn from_client(error: &Error) -> Self {
        match error {
            Error::GRpcStatus(status) => {
                let class = classify(status.code(), status.message(), never_sent(status));
                Self { class, reason: format_with_sources(status) }
            }
            // `etcd_client`'s error for a keepalive response with no time left.
            Error::LeaseKeepAliveError(reason) if reason == "lease not found" => {
                Self { class: ErrorClass::LeaseGone, reason: reason.clone() }
            }
            // A watch is rejected by a message on its stream.
            Error::WatchError(reason) => Self { class: classify(Code::Unknown, reason, false), reason: reason.clone() },
            other => Self::unknown(other.to_string()),
        }
    }

    /// Converts a token error to a refusal; returns other errors unchanged. For the last attempt at a member, after
    /// which no new login follows.
    pub(super) fn token_error_to_refusal(self) -> Self {
        match self.class {
            ErrorClass::Token | ErrorClass::NoLogins => {
                let reason = format!("{}: check the etcd user and its permissions", self.reason);
                Self { class: ErrorClass::Refused, reason }
            }
            _ => self,
        }
    }

    /// Converts the error of a login to the error of the attempt: the attempt's request was not sent.
    pub(super) fn into_login_error(self, user: &str) -> Self {
        let class = if self.class == ErrorClass::Refused { ErrorClass::Refused } else { ErrorClass::NotDone };
        Self { class, reason: format!("logging in as {user:?}: {}", self.reason) }
    }
}

impl EtcdCallError {
    /// Converts the error of a read, a grant or the start of a watch. A grant whose outcome is unknown needs no care:
    /// its lease expires unused.
    pub(super) fn into_read_error(self) -> MetaStoreError {
        match self {
            Self::Unavailable { reason, .. } | Self::TooLong(reason) => MetaStoreError::unavailable(reason),
            Self::Refused(reason) => MetaStoreError::Refused { reason },
            Self::NoSpace(reason) => MetaStoreError::NoSpace { reason },
            Self::Regressed(regression) => MetaStoreError::Regressed(regression),
            Self::Compacted => MetaStoreError::unavailable("etcd compacted the revision of the list at every attempt"),
            Self::LeaseGone => {
                MetaStoreError::unavailable("etcd reported a missing lease for a request without a lease")
            }
        }
    }

    /// Converts the error of a transaction.
    pub(super) fn into_transaction_error(self, transaction: &Transaction) -> MetaStoreError {
        match self {
            Self::Unavailable { reason, outcome_unknown } => MetaStoreError::Unavailable { reason, outcome_unknown },
            Self::Refused(reason) => MetaStoreError::Refused { reason },
            Self::NoSpace(reason) => MetaStoreError::NoSpace { reason },
            Self::Regressed(regression) => MetaStoreError::Regressed(regression),
            Self::LeaseGone => match transaction.ops.iter().find_map(lease_of) {
                Some(lease) => MetaStoreError::LeaseGone { lease },
                None => MetaStoreError::unavailable("etcd reported a missing lease for a request without a lease"),
            },
            // Neither error can result from a transaction: it requests no earlier revision, and its response is small.
            Self::Compacted => MetaStoreError::unknown("etcd reported a compaction for a request without a revision"),
            Self::TooLong(reason) => MetaStoreError::unknown(reason),
        }
    }

    /// Converts the error of a revocation or keepalive, which may have been executed.
    pub(super) fn into_lease_error(self, lease: LeaseId) -> MetaStoreError {
        match self {
            Self::LeaseGone => MetaStoreError::LeaseGone { lease },
            Self::Refused(reason) => MetaStoreError::Refused { reason },
            Self::NoSpace(reason) => MetaStoreError::NoSpace { reason },
            Self::Regressed(regression) => MetaStoreError::Regressed(regression),
            Self::Unavailable { reason, .. } | Self::TooLong(reason) => MetaStoreError::unknown(reason),
            Self::Compacted => MetaStoreError::unknown("etcd reported a compaction for a request without a revision"),
        }
    }

    /// Converts the error of a watch that was to start at `from`. etcd's error for a compacted revision does not
    /// contain the oldest available one, so `oldest` is only a lower bound.
    pub(super) fn into_watch_error(self, from: Revision) -> MetaStoreError {
        match self {
            Self::Compacted => MetaStoreError::Compacted { from, oldest: from.next() },
            other => other.into_read_error(),
        }
    }
}

/// Returns the lease under which an operation writes its key; `None` if it deletes the key or uses no lease.
fn lease_of(op: &TxnOp) -> Option<LeaseId> {
    match op {
        TxnOp::Put { lease, .. } => *lease,
        TxnOp::Delete { .. } => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_certainly_unexecuted_requests_are_retried() {
        for (code, message, sent, class) in [
            (Code::Unavailable, "tcp connect error", false, ErrorClass::NotDone),
            // A server may send the same text after it has executed the request.
            (Code::Unavailable, "tcp connect error", true, ErrorClass::Unknown),
            (Code::Unavailable, "etcdserver: no leader", true, ErrorClass::NotDone),
            (Code::Unavailable, "etcdserver: not capable", true, ErrorClass::NotDone),
            (Code::ResourceExhausted, "etcdserver: too many requests", true, ErrorClass::NotDone),
            (Code::Unavailable, "etcdserver: leader changed", true, ErrorClass::Unknown),
            (Code::Unavailable, "etcdserver: request timed out", true, ErrorClass::Unknown),
            (
                Code::Unavailable,
                "etcdserver: request timed out, possibly due to previous leader failure",
                true,
                ErrorClass::Unknown,
            ),
            (
                Code::Unavailable,
                "etcdserver: request timed out, possibly due to connection lost",
                true,
                ErrorClass::Unknown,
            ),
            (Code::Unavailable, "etcdserver: server stopped", true, ErrorClass::Unknown),
            (Code::DeadlineExceeded, "context deadline exceeded", true, ErrorClass::Unknown),
            (Code::Cancelled, "operation was canceled", true, ErrorClass::Unknown),
            (Code::Unknown, "h2 protocol error: http2 error", true, ErrorClass::Unknown),
            (Code::Internal, "", true, ErrorClass::Unknown),
            (Code::Unknown, "raft proposal dropped", true, ErrorClass::Unknown),
            (Code::DataLoss, "etcdserver: corrupt cluster", true, ErrorClass::Unknown),
            (Code::Unauthenticated, "etcdserver: invalid auth token", true, ErrorClass::Token),
            (Code::InvalidArgument, "etcdserver: revision of auth store is old", true, ErrorClass::Token),
            (Code::InvalidArgument, "etcdserver: user name is empty", true, ErrorClass::Token),
            (Code::FailedPrecondition, "etcdserver: authentication is not enabled", true, ErrorClass::NoLogins),
            (
                Code::InvalidArgument,
                "etcdserver: authentication failed, invalid user ID or password",
                true,
                ErrorClass::Refused,
            ),
            (Code::ResourceExhausted, "etcdserver: mvcc: database space exceeded", true, ErrorClass::NoSpace),
            (Code::InvalidArgument, "etcdserver: too many operations in txn request", true, ErrorClass::Refused),
            (Code::Unimplemented, "", true, ErrorClass::Refused),
            (Code::NotFound, "etcdserver: requested lease not found", true, ErrorClass::LeaseGone),
            (Code::OutOfRange, "etcdserver: mvcc: required revision has been compacted", true, ErrorClass::Compacted),
            (
                Code::OutOfRange,
                "Error, decoded message length too large: found 9 bytes, the limit is: 8",
                true,
                ErrorClass::TooLong,
            ),
        ] {
            assert_eq!(classify(code, message, !sent), class, "{code:?} {message:?}");
        }
    }

    #[test]
    fn rejected_watch_and_expired_lease_are_classified() {
        let refused = "rpc error: code = PermissionDenied desc = etcdserver: permission denied";
        assert_eq!(EtcdAttemptError::from_client(&Error::WatchError(refused.to_owned())).class, ErrorClass::Token);
        assert_eq!(EtcdAttemptError::from_client(&Error::WatchError("closed".to_owned())).class, ErrorClass::Unknown);
        assert_eq!(
            EtcdAttemptError::from_client(&Error::LeaseKeepAliveError("lease not found".to_owned())).class,
            ErrorClass::LeaseGone
        );
        assert_eq!(
            EtcdAttemptError::from_client(&Error::LeaseKeepAliveError("channel closed".to_owned())).class,
            ErrorClass::Unknown
        );
    }

    #[test]
    fn failed_login_means_request_was_not_executed() {
        let login = |class| EtcdAttemptError { class, reason: "why".to_owned() }.into_login_error("broker");
        assert_eq!(login(ErrorClass::Unknown).class, ErrorClass::NotDone);
        assert_eq!(login(ErrorClass::Refused).class, ErrorClass::Refused);
        assert!(login(ErrorClass::Refused).reason.contains("\"broker\": why"));
        let rejected_twice =
            EtcdAttemptError { class: ErrorClass::Token, reason: "etcdserver: invalid auth token".to_owned() }
                .token_error_to_refusal();
        assert!(
            rejected_twice.class == ErrorClass::Refused && rejected_twice.reason.contains("check the etcd user"),
            "{rejected_twice:?}"
        );
    }
}
