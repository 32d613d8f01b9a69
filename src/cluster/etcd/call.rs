//! One call to etcd: as many attempts as are safe, each at one member.

use std::{collections::BTreeMap, future::Future, time::Duration};

use etcd_client::Error;

use super::{
    error::{ErrorClass, EtcdAttemptError, EtcdCallError},
    members::{MemberChannel, Members},
};
use crate::task::{Backoff, clock};

/// Maximum time for which a call tries members.
pub(super) const CALL_DEADLINE: Duration = Duration::from_secs(5);

/// Pauses after each pass in which no member responded.
const MIN_RETRY_DELAY: Duration = Duration::from_millis(50);

/// Longest such pause.
const MAX_RETRY_DELAY: Duration = Duration::from_millis(800);

/// Condition for another attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum RetryPolicy {
    /// After every failure: a second execution has no further effect.
    Always,
    /// Only if the request was certainly not executed.
    WhenNotDone,
}

impl Members {
    /// Sends a request to one member after another until one responds or [`CALL_DEADLINE`] is over. `request` runs once
    /// per attempt.
    pub(super) async fn call<T, F>(
        &self,
        policy: RetryPolicy,
        request: impl Fn(MemberChannel) -> F,
    ) -> Result<T, EtcdCallError>
    where
        F: Future<Output = Result<T, Error>>,
    {
        let end = clock::monotonic() + CALL_DEADLINE;
        let mut errors = BTreeMap::new();
        let mut backoff = Backoff::new(MIN_RETRY_DELAY, MAX_RETRY_DELAY);
        loop {
            for member in self.in_turn() {
                let EtcdAttemptError { class, reason } = match member.call_member(&request).await {
                    Ok(response) => {
                        self.on_reply(member);
                        return Ok(response);
                    }
                    Err(error) => error,
                };
                tracing::debug!(endpoint = member.endpoint(), ?class, reason, "a request to etcd failed");
                if let Some(regression) = self.regression() {
                    return Err(EtcdCallError::Regressed(regression));
                }
                match class {
                    ErrorClass::LeaseGone => return Err(EtcdCallError::LeaseGone),
                    ErrorClass::Compacted => return Err(EtcdCallError::Compacted),
                    ErrorClass::TooLong => return Err(EtcdCallError::TooLong(reason)),
                    ErrorClass::NoSpace => {
                        return Err(EtcdCallError::NoSpace(format!("{}: {reason}", member.endpoint())));
                    }
                    ErrorClass::NotDone
                    | ErrorClass::Unknown
                    | ErrorClass::Refused
                    | ErrorClass::Token
                    | ErrorClass::NoLogins => {}
                }
                errors.insert(member.endpoint().to_owned(), reason);
                let unknown = class == ErrorClass::Unknown && policy == RetryPolicy::WhenNotDone;
                if class == ErrorClass::Refused {
                    return Err(EtcdCallError::Refused(format_errors(&errors)));
                }
                self.use_next_member(member);
                if unknown || clock::monotonic() >= end {
                    return Err(EtcdCallError::Unavailable { reason: format_errors(&errors), unknown });
                }
            }
            let pause = backoff.next_pause();
            if clock::monotonic() + pause >= end {
                return Err(EtcdCallError::Unavailable { reason: format_errors(&errors), unknown: false });
            }
            tokio::time::sleep(pause).await;
        }
    }
}

/// Returns the last error of each member in one line.
fn format_errors(errors: &BTreeMap<String, String>) -> String {
    errors.iter().map(|(endpoint, reason)| format!("{endpoint}: {reason}")).collect::<Vec<_>>().join("; ")
}
