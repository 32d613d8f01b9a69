//! Checks over a link that its follower responds, for callers outside the link's task.

use tokio::sync::watch;

/// Pings of one link. A caller that comes while a ping is pending waits for its response: any number of callers costs no more than one.
#[derive(Debug, Default)]
pub struct LinkProbe {
    /// Newest requested ping.
    asked: watch::Sender<u64>,
    /// Newest ping with a response; never above `asked`.
    answered: watch::Sender<u64>,
}

/// Response to a ping that was never sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct NeverAsked;

impl LinkProbe {
    /// Returns once the follower has responded to a ping. Pending for as long as it does not.
    pub async fn answered(&self) {
        let mut number = 0;
        self.asked.send_modify(|asked| {
            if *asked == *self.answered.borrow() {
                *asked += 1;
            }
            number = *asked;
        });
        let mut answered = self.answered.subscribe();
        answered.wait_for(|answered| *answered >= number).await.expect("its sender lives as long as this");
    }

    /// Returns the pings to send.
    pub(super) fn pings(&self) -> watch::Receiver<u64> {
        let mut pings = self.asked.subscribe();
        // A ping may have been requested before the link's task began.
        if *pings.borrow() > 0 {
            pings.mark_changed();
        }
        pings
    }

    /// Applies the follower's response to a ping.
    pub(super) fn on_pong(&self, number: u64) -> Result<(), NeverAsked> {
        if number > *self.asked.borrow() {
            return Err(NeverAsked);
        }
        self.answered.send_if_modified(|answered| {
            let is_newer = number > *answered;
            *answered = number.max(*answered);
            is_newer
        });
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt as _;

    use super::*;

    #[tokio::test]
    async fn one_ping_serves_all_waiting_callers_and_no_later_one() {
        let probe = LinkProbe::default();
        let mut pings = probe.pings();
        assert_eq!(probe.on_pong(1), Err(NeverAsked));
        let (mut one, mut other) = (Box::pin(probe.answered()), Box::pin(probe.answered()));
        assert!((&mut one).now_or_never().is_none() && (&mut other).now_or_never().is_none());
        assert_eq!(*pings.borrow_and_update(), 1);
        assert!(!pings.has_changed().expect("open"), "one is enough for both");
        assert_eq!((probe.on_pong(0), probe.on_pong(1)), (Ok(()), Ok(())));
        assert!(one.now_or_never().is_some() && other.now_or_never().is_some());
        assert!(probe.answered().now_or_never().is_none(), "an answer is of its time");
        assert_eq!(*pings.borrow_and_update(), 2);
    }
}
