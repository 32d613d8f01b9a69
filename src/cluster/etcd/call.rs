//! One call to etcd: as many attempts as are safe, each at one member.

use std::{collections::BTreeMap, future::Future, time::Duration};

use etcd_client::Error;

use super::members::{Line, Members};
use crate::{
    cluster::store::{LeaseId, Op, Regression, Revision, StoreError, Transaction},
    proto::status::{Code, format_with_sources, never_sent},
    task::clock,
};

/// Maximum time for which a call tries members.
pub(super) const PATIENCE: Duration = Duration::from_secs(5);

/// Pauses after each pass in which no member responded: the first and the longest.
const WAITS: (Duration, Duration) = (Duration::from_millis(50), Duration::from_millis(800));

/// Condition for another attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Repeat {
    /// After every failure: a second execution has no further effect.
    Always,
    /// Only if the request was certainly not executed.
    WhenNotDone,
}

/// Outcome of a failed request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Class {
    /// Not executed; another member or a later attempt may execute it.
    NotDone,
    /// Possibly executed, or executed later.
    Unknown,
    /// Not executed, and every member would reject it.
    Refused,
    /// Not executed for lack of space; every member rejects it until an operator frees space.
    NoSpace,
    /// Not executed for lack of a valid token.
    Token,
    /// Not executed: etcd has authentication disabled.
    NoLogins,
    /// The lease of the request has ended.
    LeaseGone,
    /// The revision of the request is compacted.
    Compacted,
    /// The response exceeded the size limit.
    TooLong,
}

/// Error of one attempt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Refusal {
    pub(super) class: Class,
    pub(super) why: String,
}

/// Error of a call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Failed {
    Unavailable {
        why: String,
        unknown: bool,
    },
    Refused(String),
    NoSpace(String),
    /// A member of another etcd cluster responded.
    Regressed(Regression),
    LeaseGone,
    Compacted,
    TooLong(String),
}

/// Texts that identify etcd's errors, with their class. The codes alone are ambiguous: `UNAVAILABLE` is both a request
/// that no leader accepted and one whose leader failed. Source: etcd's `api/v3rpc/rpctypes/error.go`, 3.4 to 3.6.
const WORDS: &[(&str, Class)] = &[
    // Sent before the request is processed. A proposal that no leader accepted in time returns "request timed out"
    // instead.
    ("etcdserver: no leader", Class::NotDone),
    ("etcdserver: not capable", Class::NotDone),
    ("etcdserver: too many requests", Class::NotDone),
    ("etcdserver: rpc not supported for learner", Class::NotDone),
    ("etcdserver: invalid auth token", Class::Token),
    ("etcdserver: revision of auth store is old", Class::Token),
    // A request without a token: authentication was enabled after this client connected.
    ("etcdserver: user name is empty", Class::Token),
    // etcd 3.4 sends this for a watch whose token has expired.
    ("etcdserver: permission denied", Class::Token),
    ("etcdserver: authentication is not enabled", Class::NoLogins),
    ("etcdserver: mvcc: database space exceeded", Class::NoSpace),
    ("etcdserver: requested lease not found", Class::LeaseGone),
    ("etcdserver: mvcc: required revision has been compacted", Class::Compacted),
    // From the transport on the client side.
    ("decoded message length too large", Class::TooLong),
];

/// Classifies a failed request by its status. Without certainty the class is `Unknown`.
pub(super) fn classify(code: Code, message: &str, never_sent: bool) -> Class {
    if never_sent {
        return Class::NotDone;
    }
    if let Some((_, class)) = WORDS.iter().find(|(words, _)| message.contains(words)) {
        return *class;
    }
    match code {
        // etcd checks these before a proposal. A server other than etcd returns `Unimplemented`.
        Code::InvalidArgument | Code::FailedPrecondition | Code::PermissionDenied => Class::Refused,
        Code::Unimplemented => Class::Refused,
        Code::Unauthenticated => Class::Token,
        _ => Class::Unknown,
    }
}

impl Refusal {
    pub(super) fn unknown(why: String) -> Self {
        Self { class: Class::Unknown, why }
    }

    pub(super) fn of(error: &Error) -> Self {
        match error {
            Error::GRpcStatus(status) => {
                let class = classify(status.code(), status.message(), never_sent(status));
                Self { class, why: format_with_sources(status) }
            }
            // `etcd_client`'s error for a keepalive response with no time left.
            Error::LeaseKeepAliveError(why) if why == "lease not found" => {
                Self { class: Class::LeaseGone, why: why.clone() }
            }
            // A watch is rejected by a message on its stream.
            Error::WatchError(why) => Self { class: classify(Code::Unknown, why, false), why: why.clone() },
            other => Self::unknown(other.to_string()),
        }
    }

    /// Converts a token error to a refusal, for an attempt after which no token is renewed.
    pub(super) fn without_token(self) -> Self {
        match self.class {
            Class::Token | Class::NoLogins => {
                let why = format!("{}: check the user that etcd is told, and what it may do", self.why);
                Self { class: Class::Refused, why }
            }
            _ => self,
        }
    }

    /// Converts an error of a login: the request itself was not sent.
    pub(super) fn at_login(self, user: &str) -> Self {
        let class = if self.class == Class::Refused { Class::Refused } else { Class::NotDone };
        Self { class, why: format!("logging in as {user:?}: {}", self.why) }
    }
}

impl Members {
    /// Sends a request to one member after another until one responds or [`PATIENCE`] is over. `ask` runs once per
    /// attempt.
    pub(super) async fn call<T, F>(&self, repeat: Repeat, ask: impl Fn(Line) -> F) -> Result<T, Failed>
    where
        F: Future<Output = Result<T, Error>>,
    {
        let end = clock::monotonic() + PATIENCE;
        let mut said = BTreeMap::new();
        let mut wait = WAITS.0;
        loop {
            for member in self.in_turn() {
                let Refusal { class, why } = match member.ask(&ask).await {
                    Ok(answer) => {
                        self.answered(member);
                        return Ok(answer);
                    }
                    Err(refusal) => refusal,
                };
                tracing::debug!(endpoint = member.endpoint(), ?class, why, "etcd did not do as asked");
                if let Some(regression) = self.regression() {
                    return Err(Failed::Regressed(regression));
                }
                match class {
                    Class::LeaseGone => return Err(Failed::LeaseGone),
                    Class::Compacted => return Err(Failed::Compacted),
                    Class::TooLong => return Err(Failed::TooLong(why)),
                    Class::NoSpace => return Err(Failed::NoSpace(format!("{}: {why}", member.endpoint()))),
                    Class::NotDone | Class::Unknown | Class::Refused | Class::Token | Class::NoLogins => {}
                }
                said.insert(member.endpoint().to_owned(), why);
                let unknown = class == Class::Unknown && repeat == Repeat::WhenNotDone;
                if class == Class::Refused {
                    return Err(Failed::Refused(in_one_line(&said)));
                }
                self.pass_on(member);
                if unknown || clock::monotonic() >= end {
                    return Err(Failed::Unavailable { why: in_one_line(&said), unknown });
                }
            }
            if clock::monotonic() + wait >= end {
                return Err(Failed::Unavailable { why: in_one_line(&said), unknown: false });
            }
            tokio::time::sleep(wait).await;
            wait = (wait * 2).min(WAITS.1);
        }
    }
}

/// Returns the last error of each member in one line.
fn in_one_line(said: &BTreeMap<String, String>) -> String {
    said.iter().map(|(endpoint, why)| format!("{endpoint}: {why}")).collect::<Vec<_>>().join("; ")
}

impl Failed {
    /// Converts the error of a call that changes nothing.
    pub(super) fn of_read(self) -> StoreError {
        match self {
            Self::Unavailable { why, .. } | Self::TooLong(why) => StoreError::unavailable(why),
            Self::Refused(why) => StoreError::Refused { why },
            Self::NoSpace(why) => StoreError::NoSpace { why },
            Self::Regressed(regression) => StoreError::Regressed(regression),
            Self::Compacted => StoreError::unavailable("etcd compacted what was being read, again and again"),
            Self::LeaseGone => StoreError::unavailable("etcd speaks of a lease where none was named"),
        }
    }

    /// Converts the error of a transaction.
    pub(super) fn of_transaction(self, transaction: &Transaction) -> StoreError {
        match self {
            Self::Unavailable { why, unknown } => StoreError::Unavailable { why, outcome_unknown: unknown },
            Self::Refused(why) => StoreError::Refused { why },
            Self::NoSpace(why) => StoreError::NoSpace { why },
            Self::Regressed(regression) => StoreError::Regressed(regression),
            Self::LeaseGone => match transaction.ops.iter().find_map(lease_of) {
                Some(lease) => StoreError::LeaseGone { lease },
                None => StoreError::unavailable("etcd speaks of a lease where none was named"),
            },
            // The response to a transaction is small and names no revision, so neither error can come from it.
            Self::Compacted => StoreError::unknown("etcd speaks of a compaction where no revision was named"),
            Self::TooLong(why) => StoreError::unknown(why),
        }
    }

    /// Converts the error of a revocation or keepalive, which may have been executed.
    pub(super) fn of_lease(self, lease: LeaseId) -> StoreError {
        match self {
            Self::LeaseGone => StoreError::LeaseGone { lease },
            Self::Refused(why) => StoreError::Refused { why },
            Self::NoSpace(why) => StoreError::NoSpace { why },
            Self::Regressed(regression) => StoreError::Regressed(regression),
            Self::Unavailable { why, .. } | Self::TooLong(why) => StoreError::unknown(why),
            Self::Compacted => StoreError::unknown("etcd speaks of a compaction where no revision was named"),
        }
    }

    /// Converts the error of a watch that was to start at `from`.
    pub(super) fn of_watch(self, from: Revision) -> StoreError {
        match self {
            Self::Compacted => StoreError::Compacted { from, oldest: from.next() },
            other => other.of_read(),
        }
    }
}

fn lease_of(op: &Op) -> Option<LeaseId> {
    match op {
        Op::Put { lease, .. } => *lease,
        Op::Delete { .. } => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_certainly_unexecuted_requests_are_retried() {
        for (code, message, sent, class) in [
            (Code::Unavailable, "tcp connect error", false, Class::NotDone),
            // A server may send the same text.
            (Code::Unavailable, "tcp connect error", true, Class::Unknown),
            (Code::Unavailable, "etcdserver: no leader", true, Class::NotDone),
            (Code::Unavailable, "etcdserver: not capable", true, Class::NotDone),
            (Code::ResourceExhausted, "etcdserver: too many requests", true, Class::NotDone),
            (Code::Unavailable, "etcdserver: leader changed", true, Class::Unknown),
            (Code::Unavailable, "etcdserver: request timed out", true, Class::Unknown),
            (
                Code::Unavailable,
                "etcdserver: request timed out, possibly due to previous leader failure",
                true,
                Class::Unknown,
            ),
            (Code::Unavailable, "etcdserver: request timed out, possibly due to connection lost", true, Class::Unknown),
            (Code::Unavailable, "etcdserver: server stopped", true, Class::Unknown),
            (Code::DeadlineExceeded, "context deadline exceeded", true, Class::Unknown),
            (Code::Cancelled, "operation was canceled", true, Class::Unknown),
            (Code::Unknown, "h2 protocol error: http2 error", true, Class::Unknown),
            (Code::Internal, "", true, Class::Unknown),
            (Code::Unknown, "raft proposal dropped", true, Class::Unknown),
            (Code::DataLoss, "etcdserver: corrupt cluster", true, Class::Unknown),
            (Code::Unauthenticated, "etcdserver: invalid auth token", true, Class::Token),
            (Code::InvalidArgument, "etcdserver: revision of auth store is old", true, Class::Token),
            (Code::InvalidArgument, "etcdserver: user name is empty", true, Class::Token),
            (Code::FailedPrecondition, "etcdserver: authentication is not enabled", true, Class::NoLogins),
            (
                Code::InvalidArgument,
                "etcdserver: authentication failed, invalid user ID or password",
                true,
                Class::Refused,
            ),
            (Code::ResourceExhausted, "etcdserver: mvcc: database space exceeded", true, Class::NoSpace),
            (Code::InvalidArgument, "etcdserver: too many operations in txn request", true, Class::Refused),
            (Code::Unimplemented, "", true, Class::Refused),
            (Code::NotFound, "etcdserver: requested lease not found", true, Class::LeaseGone),
            (Code::OutOfRange, "etcdserver: mvcc: required revision has been compacted", true, Class::Compacted),
            (
                Code::OutOfRange,
                "Error, decoded message length too large: found 9 bytes, the limit is: 8",
                true,
                Class::TooLong,
            ),
        ] {
            assert_eq!(classify(code, message, !sent), class, "{code:?} {message:?}");
        }
    }

    #[test]
    fn rejected_watch_and_expired_lease_are_classified() {
        let refused = "rpc error: code = PermissionDenied desc = etcdserver: permission denied";
        assert_eq!(Refusal::of(&Error::WatchError(refused.to_owned())).class, Class::Token);
        assert_eq!(Refusal::of(&Error::WatchError("closed".to_owned())).class, Class::Unknown);
        assert_eq!(Refusal::of(&Error::LeaseKeepAliveError("lease not found".to_owned())).class, Class::LeaseGone);
        assert_eq!(Refusal::of(&Error::LeaseKeepAliveError("channel closed".to_owned())).class, Class::Unknown);
    }

    #[test]
    fn failed_login_means_request_was_not_executed() {
        let login = |class| Refusal { class, why: "why".to_owned() }.at_login("broker");
        assert_eq!(login(Class::Unknown).class, Class::NotDone);
        assert_eq!(login(Class::Refused).class, Class::Refused);
        assert!(login(Class::Refused).why.contains("\"broker\": why"));
        let twice = Refusal { class: Class::Token, why: "etcdserver: invalid auth token".to_owned() }.without_token();
        assert!(twice.class == Class::Refused && twice.why.contains("check the user"), "{twice:?}");
    }
}
