//! A circuit breaker for uploads: where the store answers and takes no objects, uploads do not hold the workers that retention needs.
//!
//! A store that is away is known as such, and no step waits for it. A store that answers reads and refuses writes (a full disk below a
//! folder, a quota, 5xx to one kind of request) lets each upload try on until its retries are used up, which takes 20 s. With thousands
//! of partitions the few workers did nothing else, and nothing was deleted meanwhile. So once an upload has failed like that, one
//! partition at a time tries, and the others carry out the rest of their upkeep, until an upload succeeds.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::UpkeepError;
use crate::tier::{StoreError, UploadError};

/// Whether uploads succeed, of all partitions of a broker. Clones share it.
#[derive(Clone, Debug, Default)]
pub(super) struct UploadBreaker {
    state: Arc<Mutex<State>>,
}

#[derive(Debug, Default)]
struct State {
    /// Why the last upload failed; `None` while uploads succeed.
    why: Option<String>,
    /// While uploads fail: one is under way.
    tried: bool,
}

impl UploadBreaker {
    /// Carries out an upload. Where uploads fail, and one is under way already, this one is refused.
    pub(super) async fn attempt<T>(
        &self,
        upload: impl Future<Output = Result<T, UpkeepError>>,
    ) -> Result<T, UpkeepError> {
        let _trial = self.admit()?;
        let done = upload.await;
        match &done {
            Ok(_) => self.lock().why = None,
            Err(error @ UpkeepError::Upload(UploadError::Store(StoreError::Unavailable { .. }))) => {
                self.lock().why = Some(error.to_string());
            }
            // Of this partition alone.
            Err(_) => {}
        }
        done
    }

    fn admit(&self) -> Result<Option<Trial<'_>>, UpkeepError> {
        let mut state = self.lock();
        let Some(why) = &state.why else { return Ok(None) };
        if state.tried {
            return Err(UpkeepError::UploadsFail { why: why.clone() });
        }
        state.tried = true;
        Ok(Some(Trial { of: self }))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The one upload that is tried while uploads fail.
struct Trial<'a> {
    of: &'a UploadBreaker,
}

impl Drop for Trial<'_> {
    fn drop(&mut self) {
        self.of.lock().tried = false;
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt as _;

    use super::*;

    async fn fail(reason: &str) -> Result<(), UpkeepError> {
        let store = StoreError::Unavailable { object: "segment".to_owned(), reason: reason.to_owned() };
        Err(UpkeepError::Upload(store.into()))
    }

    #[tokio::test]
    async fn one_upload_at_a_time_is_tried_after_one_that_failed() {
        let breaker = UploadBreaker::default();
        let mut first = Box::pin(breaker.attempt(std::future::pending::<Result<(), UpkeepError>>()));
        assert!(first.as_mut().now_or_never().is_none());
        breaker.attempt(async { Ok(()) }).await.expect("while uploads succeed there may be many");

        breaker.attempt(fail("quota")).await.expect_err("as it was told");
        let mut trial = Box::pin(breaker.attempt(std::future::pending::<Result<(), UpkeepError>>()));
        assert!(trial.as_mut().now_or_never().is_none(), "one is tried");
        let refused = breaker.attempt(async { Ok(()) }).await.expect_err("another one is under way");
        assert!(matches!(&refused, UpkeepError::UploadsFail { why } if why.contains("quota")), "{refused}");

        drop(trial);
        breaker.attempt(fail("quota")).await.expect_err("the next one is tried");
        breaker.attempt(async { Ok(()) }).await.expect("and the next");
        let mut many = Box::pin(breaker.attempt(std::future::pending::<Result<(), UpkeepError>>()));
        assert!(many.as_mut().now_or_never().is_none());
        breaker.attempt(async { Ok(()) }).await.expect("uploads succeed again");
    }
}
