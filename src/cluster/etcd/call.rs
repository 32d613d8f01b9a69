//! One call to etcd: as many attempts as are safe, each at one member.

use std::{collections::BTreeMap, future::Future, time::Duration};

use etcd_client::Error;

use super::members::{Line, Members};
use crate::{
    cluster::store::{LeaseId, Op, Regression, Revision, StoreError, Transaction},
    proto::status::{Code, in_full, never_sent},
    task::clock,
};

/// How long a call goes on from member to member.
pub(super) const PATIENCE: Duration = Duration::from_secs(5);

/// The waits after each round in which no member answered.
const WAITS: (Duration, Duration) = (Duration::from_millis(50), Duration::from_millis(800));

/// When a request may be sent again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Repeat {
    /// After every failure: done twice it does no more than once.
    Always,
    /// Only when it surely was not done.
    WhenNotDone,
}

/// What is known of a request that failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Class {
    /// It was not done, and another member or a later attempt may do it.
    NotDone,
    /// It may have been done, or will be.
    Unknown,
    /// It was not done, and no member would do it.
    Refused,
    /// It was not done for want of space, and no member would do it before a person has made some.
    NoSpace,
    /// It was not done for want of a valid token.
    Token,
    /// It was not done: etcd has no users.
    NoLogins,
    /// The lease that it names has ended.
    LeaseGone,
    /// The revision that it names is no longer kept.
    Compacted,
    /// The answer was larger than we take.
    TooLong,
}

/// Why one attempt failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Refusal {
    pub(super) class: Class,
    pub(super) why: String,
}

/// Why a call failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Failed {
    Unavailable {
        why: String,
        unknown: bool,
    },
    Refused(String),
    NoSpace(String),
    /// A member of another etcd cluster answered.
    Regressed(Regression),
    LeaseGone,
    Compacted,
    TooLong(String),
}

/// Words of etcd by which its errors are told apart, and what they mean. Its codes alone do not say it: `UNAVAILABLE` is
/// both a request that no leader took and one whose leader fell. Source: etcd's `api/v3rpc/rpctypes/error.go`, 3.4 to 3.6.
const WORDS: &[(&str, Class)] = &[
    // Before the request is looked at. A proposal that no leader took in time says "request timed out" instead.
    ("etcdserver: no leader", Class::NotDone),
    ("etcdserver: not capable", Class::NotDone),
    ("etcdserver: too many requests", Class::NotDone),
    ("etcdserver: rpc not supported for learner", Class::NotDone),
    ("etcdserver: invalid auth token", Class::Token),
    ("etcdserver: revision of auth store is old", Class::Token),
    // Asked without a token: etcd's users were switched on after we had come.
    ("etcdserver: user name is empty", Class::Token),
    // 3.4 says this of a watch whose token has ended.
    ("etcdserver: permission denied", Class::Token),
    ("etcdserver: authentication is not enabled", Class::NoLogins),
    ("etcdserver: mvcc: database space exceeded", Class::NoSpace),
    ("etcdserver: requested lease not found", Class::LeaseGone),
    ("etcdserver: mvcc: required revision has been compacted", Class::Compacted),
    // Of the transport, on our side.
    ("decoded message length too large", Class::TooLong),
];

/// What a failed request's status says of it. Whatever is not known for certain is unknown.
pub(super) fn classify(code: Code, message: &str, never_sent: bool) -> Class {
    if never_sent {
        return Class::NotDone;
    }
    if let Some((_, class)) = WORDS.iter().find(|(words, _)| message.contains(words)) {
        return *class;
    }
    match code {
        // etcd checks these before anything is proposed. Something that is no etcd says `Unimplemented`.
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
                Self { class, why: in_full(status) }
            }
            // `etcd_client`'s own words for an answer whose lease has no time left.
            Error::LeaseKeepAliveError(why) if why == "lease not found" => {
                Self { class: Class::LeaseGone, why: why.clone() }
            }
            // How a watch is refused: by a message on its stream.
            Error::WatchError(why) => Self { class: classify(Code::Unknown, why, false), why: why.clone() },
            other => Self::unknown(other.to_string()),
        }
    }

    /// The same, where no token will be renewed any more.
    pub(super) fn without_token(self) -> Self {
        match self.class {
            Class::Token | Class::NoLogins => {
                let why = format!("{}: check the user that etcd is told, and what it may do", self.why);
                Self { class: Class::Refused, why }
            }
            _ => self,
        }
    }

    /// The same of a login: the request that it was for was not sent.
    pub(super) fn at_login(self, user: &str) -> Self {
        let class = if self.class == Class::Refused { Class::Refused } else { Class::NotDone };
        Self { class, why: format!("logging in as {user:?}: {}", self.why) }
    }
}

impl Members {
    /// Asks members, one after the other, until one answers or [`PATIENCE`] is over. `ask` is called for each attempt.
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

/// What each member said last.
fn in_one_line(said: &BTreeMap<String, String>) -> String {
    said.iter().map(|(endpoint, why)| format!("{endpoint}: {why}")).collect::<Vec<_>>().join("; ")
}

impl Failed {
    /// Of a call that changes nothing.
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

    /// Of a transaction.
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
            // Its answer holds next to nothing; whatever this is, it is none of a transaction's.
            Self::Compacted => StoreError::unknown("etcd speaks of a compaction where no revision was named"),
            Self::TooLong(why) => StoreError::unknown(why),
        }
    }

    /// Of a lease's end or longer life, which may have come about all the same.
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

    /// Of a watch that was to begin at a revision.
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
    fn only_what_surely_was_not_done_may_be_repeated() {
        for (code, message, sent, class) in [
            (Code::Unavailable, "tcp connect error", false, Class::NotDone),
            // A server may use the same words.
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
    fn a_refused_watch_and_a_lease_without_time_are_understood() {
        let refused = "rpc error: code = PermissionDenied desc = etcdserver: permission denied";
        assert_eq!(Refusal::of(&Error::WatchError(refused.to_owned())).class, Class::Token);
        assert_eq!(Refusal::of(&Error::WatchError("closed".to_owned())).class, Class::Unknown);
        assert_eq!(Refusal::of(&Error::LeaseKeepAliveError("lease not found".to_owned())).class, Class::LeaseGone);
        assert_eq!(Refusal::of(&Error::LeaseKeepAliveError("channel closed".to_owned())).class, Class::Unknown);
    }

    #[test]
    fn a_login_that_fails_leaves_the_request_not_done() {
        let login = |class| Refusal { class, why: "why".to_owned() }.at_login("broker");
        assert_eq!(login(Class::Unknown).class, Class::NotDone);
        assert_eq!(login(Class::Refused).class, Class::Refused);
        assert!(login(Class::Refused).why.contains("\"broker\": why"));
        let twice = Refusal { class: Class::Token, why: "etcdserver: invalid auth token".to_owned() }.without_token();
        assert!(twice.class == Class::Refused && twice.why.contains("check the user"), "{twice:?}");
    }
}
