//! Pings over a link: callers outside the link's task check that the follower's process runs.

use tokio::sync::watch;

/// Pings of one link, by number. While a ping is pending, all callers wait for its response, so any number of callers
/// costs one ping.
#[derive(Debug, Default)]
pub struct LinkProbe {
    /// Newest requested ping.
    requested: watch::Sender<u64>,
    /// Newest ping with a response; never above `requested`.
    responded: watch::Sender<u64>,
}

/// Error of a response to a ping that was never sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct UnsentPing;

impl LinkProbe {
    /// Requests a ping, unless one is pending, and waits until the follower has responded to it; without end if the
    /// follower never responds.
    pub async fn ping_and_wait(&self) {
        let mut number = 0;
        self.requested.send_modify(|requested| {
            if *requested == *self.responded.borrow() {
                *requested += 1;
            }
            number = *requested;
        });
        let mut responded = self.responded.subscribe();
        responded.wait_for(|responded| *responded >= number).await.expect("this probe owns the sender");
    }

    /// Returns a channel with the number of the newest requested ping. It changes whenever a ping has to be sent.
    pub(super) fn pings(&self) -> watch::Receiver<u64> {
        let mut pings = self.requested.subscribe();
        // A caller may have requested a ping before the link's task started.
        if *pings.borrow() > 0 {
            pings.mark_changed();
        }
        pings
    }

    /// Applies the follower's response to a ping, and wakes the callers that wait for it.
    ///
    /// # Errors
    /// No caller has requested a ping with this number. The link has to end.
    pub(super) fn on_pong(&self, number: u64) -> Result<(), UnsentPing> {
        if number > *self.requested.borrow() {
            return Err(UnsentPing);
        }
        self.responded.send_if_modified(|responded| {
            let is_newer = number > *responded;
            *responded = number.max(*responded);
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
        assert_eq!(probe.on_pong(1), Err(UnsentPing));
        let (mut first, mut second) = (Box::pin(probe.ping_and_wait()), Box::pin(probe.ping_and_wait()));
        assert!((&mut first).now_or_never().is_none() && (&mut second).now_or_never().is_none());
        assert_eq!(*pings.borrow_and_update(), 1);
        assert!(!pings.has_changed().expect("open"), "one ping serves both callers");
        assert_eq!((probe.on_pong(0), probe.on_pong(1)), (Ok(()), Ok(())));
        assert!(first.now_or_never().is_some() && second.now_or_never().is_some());
        assert!(probe.ping_and_wait().now_or_never().is_none(), "a response serves no later caller");
        assert_eq!(*pings.borrow_and_update(), 2);
    }
}
