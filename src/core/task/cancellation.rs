//! A future that runs until it completes or is cancelled.

use std::{
    future::Future,
    pin::Pin,
    task::{Context, Poll},
};

use pin_project_lite::pin_project;

pin_project! {
    /// Completes with the output of `future`, or with `None` once `cancelled` completes. A cancellation precedes a
    /// completion: `future` is not polled again. The combinators of `tokio-util` poll the future first, and an async
    /// block with `select!` holds it twice.
    #[must_use = "futures do nothing unless polled"]
    pub(super) struct UntilCancelled<C, F> {
        #[pin]
        cancelled: C,
        #[pin]
        future: F,
    }
}

impl<C, F> UntilCancelled<C, F> {
    pub(super) fn new(cancelled: C, future: F) -> Self {
        Self { cancelled, future }
    }
}

impl<C: Future<Output = ()>, F: Future> Future for UntilCancelled<C, F> {
    type Output = Option<F::Output>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        match this.cancelled.poll(cx) {
            Poll::Ready(()) => Poll::Ready(None),
            Poll::Pending => this.future.poll(cx).map(Some),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{future, pin::pin};

    use crate::task::Tasks;

    #[tokio::test]
    async fn future_that_could_complete_is_dropped_if_the_set_is_cancelled() {
        let tasks = Tasks::new();
        assert_eq!(tasks.run_until_cancelled(future::ready(1)).await, Some(1));
        let (send, receive) = tokio::sync::oneshot::channel();
        let mut waiting = pin!(tasks.run_until_cancelled(receive));
        assert!(futures::poll!(&mut waiting).is_pending());
        send.send(2).unwrap();
        tasks.cancel();
        assert!(waiting.await.is_none());
        assert_eq!(tasks.run_until_cancelled(future::ready(3)).await, None);
    }
}
