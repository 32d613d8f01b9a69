//! One call to etcd: as many attempts as are safe, each at one member.

use std::{collections::BTreeMap, future::Future, time::Duration};

use etcd_client::Error;

use super::{
    error::{ErrorClass, EtcdAttemptError, EtcdCallError},
    members::{MemberChannel, Members},
};
use crate::task::{Backoff, clock};

/// Time after which a call starts no further attempt.
pub(super) const CALL_DEADLINE: Duration = Duration::from_secs(5);

/// Pause after the first pass over all members without a response. The pauses after later passes grow.
const MIN_RETRY_DELAY: Duration = Duration::from_millis(50);

/// Longest pause between two passes over all members.
const MAX_RETRY_DELAY: Duration = Duration::from_millis(800);

/// Condition for another attempt after a failed one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum RetryPolicy {
    /// After every failure, except one that every member would return. For requests whose second execution does no
    /// harm.
    Always,
    /// Only if the request was certainly not executed.
    WhenNotDone,
}

impl Members {
    /// Sends a request to one member after another until one responds or [`CALL_DEADLINE`] has passed. `request` sends
    /// one attempt to one member.
    ///
    /// # Errors
    /// An error that every member would return ends the call at once, and so does a response of another etcd cluster.
    /// Under [`RetryPolicy::WhenNotDone`], an attempt with an unknown outcome also ends the call. At the deadline, the
    /// call fails with `Unavailable`, which contains the last error of each member.
    pub(super) async fn call<T, F>(
        &self,
        policy: RetryPolicy,
        request: impl Fn(MemberChannel) -> F,
    ) -> Result<T, EtcdCallError>
    where
        F: Future<Output = Result<T, Error>>,
    {
        let deadline = clock::monotonic() + CALL_DEADLINE;
        // The last error of each member, by endpoint.
        let mut errors = BTreeMap::new();
        let mut backoff = Backoff::new(MIN_RETRY_DELAY, MAX_RETRY_DELAY);
        loop {
            for member in self.in_call_order() {
                let EtcdAttemptError { class, reason } = match member.call_member(&request).await {
                    Ok(response) => {
                        self.on_response(member);
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
                    ErrorClass::Refused => {
                        errors.insert(member.endpoint().to_owned(), reason);
                        return Err(EtcdCallError::Refused(format_errors(&errors)));
                    }
                    // The next member may execute the request. `call_member` returns no token errors: it converts them.
                    ErrorClass::NotDone | ErrorClass::Unknown | ErrorClass::Token | ErrorClass::NoLogins => {}
                }
                errors.insert(member.endpoint().to_owned(), reason);
                self.use_next_member(member);
                let outcome_unknown = class == ErrorClass::Unknown && policy == RetryPolicy::WhenNotDone;
                if outcome_unknown || clock::monotonic() >= deadline {
                    return Err(EtcdCallError::Unavailable { reason: format_errors(&errors), outcome_unknown });
                }
            }
            let pause = backoff.next_pause();
            if clock::monotonic() + pause >= deadline {
                return Err(EtcdCallError::Unavailable { reason: format_errors(&errors), outcome_unknown: false });
            }
            tokio::time::sleep(pause).await;
        }
    }
}

/// Returns the last error of each member in one line.
fn format_errors(errors: &BTreeMap<String, String>) -> String {
    errors.iter().map(|(endpoint, reason)| format!("{endpoint}: {reason}")).collect::<Vec<_>>().join("; ")
}
