//! Inbound replication streams: admission of the follower's broker, and at most one link per broker.
//!
//! A link with a newer broker epoch ends the previous link. A link with the same epoch does that only if the previous link does not respond
//! to a ping. Brokers do not authenticate, so the second one may be foreign. The new link starts after every partition has processed the
//! end of the previous link. Late messages of an old link therefore never undo a subscription on the new link.

use std::{
    collections::BTreeMap,
    pin::Pin,
    sync::{Arc, MutexGuard, PoisonError},
    time::Duration,
};

use futures::Stream;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};

use super::Peering;
use crate::{
    broker::following::VERSION,
    client::peers::{self, How, PeerError},
    cluster::Revision,
    model::BrokerId,
    partition::{
        leader::insync::Peer,
        session::{self, Ended, Led, LinkProbe},
    },
    proto::{
        error::{ApiError, ErrorCode},
        v1::{self, to_follower, to_leader},
    },
    task::{Tasks, clock},
    telemetry::LogThrottle,
};

/// Timeout for the Hello of a new stream.
const HELLO: Duration = Duration::from_secs(5);

/// Maximum time for the follower's broker to take the error with which its stream ends.
const LAST_WORD: Duration = Duration::from_millis(500);

/// Timeout of a ping on the existing link, sent when another link with the same broker epoch arrives.
const PING_TIMEOUT: Duration = Duration::from_secs(1);

/// Maximum number of messages that wait for the connection. The session does the batching.
const QUEUE: usize = 1;

pub(super) type Answers = Pin<Box<dyn Stream<Item = Result<v1::ToFollower, Status>> + Send>>;

/// Inbound link of one broker.
pub(super) struct Incoming {
    epoch: Revision,
    probe: Arc<LinkProbe>,
    /// Cancels the link.
    link: Tasks,
    /// Closed when the link has ended and every partition has processed that.
    ended: watch::Receiver<()>,
}

impl Peering {
    /// Serves the stream of a follower's broker in its own task, until the stream ends.
    pub(super) fn replicate(self: &Arc<Self>, incoming: Streaming<v1::ToLeader>) -> Answers {
        let (outgoing, messages) = mpsc::channel(QUEUE);
        let peering = Arc::clone(self);
        self.tasks.spawn("replicate", async move {
            if let Err(fault) = peering.serve(incoming, &outgoing).await {
                // The stream ends with the error. A peer that is gone does not receive the error.
                let _gone = tokio::time::timeout(LAST_WORD, outgoing.send(Err(fault.into()))).await;
            }
        });
        Box::pin(ReceiverStream::new(messages))
    }

    async fn serve(&self, mut incoming: Streaming<v1::ToLeader>, outgoing: &session::Outgoing) -> Result<(), ApiError> {
        let first = tokio::select! {
            biased;
            () = self.tasks.cancelled() => return Err(stopping()),
            first = tokio::time::timeout(HELLO, incoming.message()) => first,
        };
        let hello = match first {
            Ok(Ok(Some(v1::ToLeader { is: Some(to_leader::Is::Hello(hello)), .. }))) => hello,
            Ok(Ok(_)) => return Err(invalid("a replication stream begins with Hello".to_owned())),
            Ok(Err(status)) => return Err(ApiError::from(&status)),
            Err(_) => return Err(invalid(format!("no Hello came in {HELLO:?}"))),
        };
        let (peer, own) = self.admit(&hello).await?;
        self.neighbours.clocks.compare(peer.broker, hello.wall_ms);
        let link = self.tasks.child();
        let (ends, ended) = watch::channel(());
        let probe = Arc::new(LinkProbe::default());
        let to_be = Incoming { epoch: peer.epoch, probe: Arc::clone(&probe), link: link.clone(), ended };
        self.take_place(peer, to_be).await?;
        let served = self.follow(peer, own, probe, incoming, outgoing, &link).await;
        drop(ends);
        let mut links = self.links();
        if links.get(&peer.broker).is_some_and(|known| known.ended.has_changed().is_err()) {
            links.remove(&peer.broker);
        }
        served
    }

    /// Verifies a Hello. Returns the follower's broker and this broker's own broker epoch.
    async fn admit(&self, hello: &v1::Hello) -> Result<(Peer, Revision), ApiError> {
        let (me, broker) = (self.neighbours.me(), BrokerId(hello.broker));
        if hello.version != VERSION {
            return Err(invalid(format!("version {} of the protocol is not spoken here, {VERSION} is", hello.version)));
        }
        self.is_of_this_cluster(&hello.cluster)?;
        if hello.to != me.0 {
            return Err(invalid(format!("this is broker {me}, and broker {} was called", hello.to)));
        }
        if broker == me {
            return Err(invalid(format!("broker {broker} calls itself: two processes run under one number")));
        }
        let Some(own) = self.neighbours.own() else {
            return Err(ApiError::new(ErrorCode::NotReady, format!("broker {me} is not registered yet")));
        };
        let epoch = Revision(hello.broker_epoch);
        self.neighbours.confirm(broker, epoch).await?;
        Ok((Peer { broker, epoch }, own))
    }

    pub(super) fn is_of_this_cluster(&self, cluster: &str) -> Result<(), ApiError> {
        let ours = self.neighbours.cluster();
        if cluster == ours {
            return Ok(());
        }
        let theirs: String = cluster.chars().take(200).collect();
        Err(invalid(format!("this broker belongs to cluster {ours:?}, not to {theirs:?}")))
    }

    /// Replaces the broker's previous link, once that link has ended.
    async fn take_place(&self, peer: Peer, link: Incoming) -> Result<(), ApiError> {
        let mut silent: Option<Arc<LinkProbe>> = None;
        let before = loop {
            let (probe, mut ended) = {
                let mut links = self.links();
                match links.get(&peer.broker) {
                    Some(known) if known.epoch > peer.epoch => {
                        let message = format!("broker {} follows here in a newer uptime, {}", peer.broker, known.epoch);
                        return Err(invalid(message));
                    }
                    Some(known)
                        if known.epoch == peer.epoch
                            && !silent.as_ref().is_some_and(|silent| Arc::ptr_eq(silent, &known.probe)) =>
                    {
                        (Arc::clone(&known.probe), known.ended.clone())
                    }
                    _ => break links.insert(peer.broker, link),
                }
            };
            tokio::select! {
                biased;
                // The value never changes: this resolves when the channel is closed.
                _closed = ended.changed() => {}
                () = probe.answered() => {
                    let message = format!("broker {} follows here over another link, which answers", peer.broker);
                    return Err(ApiError::new(ErrorCode::NotReady, message));
                }
                () = tokio::time::sleep(PING_TIMEOUT) => {}
            }
            silent = Some(probe);
        };
        if let Some(mut before) = before {
            before.link.cancel();
            while before.ended.changed().await.is_ok() {}
        }
        Ok(())
    }

    async fn follow(
        &self,
        peer: Peer,
        own: Revision,
        probe: Arc<LinkProbe>,
        incoming: Streaming<v1::ToLeader>,
        outgoing: &session::Outgoing,
        link: &Tasks,
    ) -> Result<(), ApiError> {
        let welcome =
            v1::Welcome { broker: self.neighbours.me().0, broker_epoch: own.0, wall_ms: Some(clock::wall_ms()) };
        let welcome = v1::ToFollower { is: Some(to_follower::Is::Welcome(welcome)), ..Default::default() };
        let _gone = outgoing.try_send(Ok(welcome));
        if let Some(links) = self.link_log(peer, |log| log.occur(clock::monotonic())) {
            tracing::info!(follower = %peer.broker, epoch = %peer.epoch, links, "a broker follows here");
        }
        let (find, sent) = (self.neighbours.find(), self.sent.of(peer.broker.0));
        let stored_epoch = Arc::clone(&self.questions.stored_epoch);
        let led = Led { peer, find, catch_up: Arc::clone(&self.catch_up), probe, stored_epoch, sent };
        let ended = tokio::select! {
            biased;
            // Pending for ever after it has cancelled the link.
            () = async {
                self.neighbours.cancel_at_change(own, peer.broker, peer.epoch, link).await;
                std::future::pending().await
            } => Ended::Stopped,
            ended = session::lead(led, incoming, outgoing.clone(), link) => ended,
        };
        if self.link_log(peer, LogThrottle::recover).is_some() {
            tracing::info!(follower = %peer.broker, epoch = %peer.epoch, why = %ended, "a broker does not follow here any more");
        }
        match ended {
            Ended::Stopped => Err(stopping()),
            Ended::Bad(fault) => Err(fault),
            Ended::Closed => {
                self.neighbours.lost(peer.broker, peer.epoch, How::Ended);
                Ok(())
            }
            Ended::Broken(status) => {
                if let PeerError::Lost { how, .. } = peers::lost("", &status) {
                    self.neighbours.lost(peer.broker, peer.epoch, how);
                }
                Ok(())
            }
        }
    }

    /// Applies `act` to the log throttle of a broker's links, because links may open and break many times a second.
    fn link_log<T>(&self, peer: Peer, act: impl FnOnce(&mut LogThrottle) -> T) -> T {
        let mut logs = self.link_logs.lock().unwrap_or_else(PoisonError::into_inner);
        let (epoch, log) = logs.entry(peer.broker).or_default();
        if *epoch != peer.epoch {
            (*epoch, *log) = (peer.epoch, LogThrottle::default());
        }
        act(log)
    }

    fn links(&self) -> MutexGuard<'_, BTreeMap<BrokerId, Incoming>> {
        self.links.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn invalid(message: String) -> ApiError {
    ApiError::new(ErrorCode::InvalidRequest, message)
}

fn stopping() -> ApiError {
    ApiError::new(ErrorCode::NotReady, "this link ends here: the broker stops, or another one takes its place")
}
