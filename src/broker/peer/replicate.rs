//! The stream over which another broker follows: who it is, and that there is one of it.
//!
//! A broker has one link here. The next one that it makes ends the one before, and begins when every partition knows of that end: what is
//! late of an old link never undoes a join on the new one.

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

use super::{Peering, clocks::compare_clocks};
use crate::{
    broker::following::VERSION,
    client::peers::{self, How, PeerError},
    cluster::Revision,
    model::BrokerId,
    partition::{
        leader::insync::Peer,
        session::{self, Ended, Led},
    },
    proto::{
        fault::{Fault, Reason},
        v1::{self, to_follower, to_leader},
    },
    task::{Tasks, clock},
    telemetry::LogThrottle,
};

/// How long whoever opened a stream may take to say who it is.
const HELLO: Duration = Duration::from_secs(5);

/// How long a follower's broker may take to take the reason for which its stream ends.
const LAST_WORD: Duration = Duration::from_millis(500);

/// Messages that wait for the connection: batching is the session's.
const QUEUE: usize = 1;

pub(super) type Answers = Pin<Box<dyn Stream<Item = Result<v1::ToFollower, Status>> + Send>>;

/// One broker's link.
pub(super) struct Incoming {
    epoch: Revision,
    /// Ends it.
    link: Tasks,
    /// Closed when it has ended, and every partition knows.
    ended: watch::Receiver<()>,
}

impl Peering {
    /// Serves a follower's broker in a task of its own, until the stream ends.
    pub(super) fn replicate(self: &Arc<Self>, incoming: Streaming<v1::ToLeader>) -> Answers {
        let (outgoing, messages) = mpsc::channel(QUEUE);
        let peering = Arc::clone(self);
        self.tasks.spawn("replicate", async move {
            if let Err(fault) = peering.serve(incoming, &outgoing).await {
                // The stream ends with the reason. Who has gone does not hear it.
                let _gone = tokio::time::timeout(LAST_WORD, outgoing.send(Err(fault.into()))).await;
            }
        });
        Box::pin(ReceiverStream::new(messages))
    }

    async fn serve(&self, mut incoming: Streaming<v1::ToLeader>, outgoing: &session::Outgoing) -> Result<(), Fault> {
        let first = tokio::select! {
            biased;
            () = self.tasks.cancelled() => return Err(stopping()),
            first = tokio::time::timeout(HELLO, incoming.message()) => first,
        };
        let hello = match first {
            Ok(Ok(Some(v1::ToLeader { is: Some(to_leader::Is::Hello(hello)) }))) => hello,
            Ok(Ok(_)) => return Err(invalid("a replication stream begins with Hello".to_owned())),
            Ok(Err(status)) => return Err(Fault::from(&status)),
            Err(_) => return Err(invalid(format!("no Hello came in {HELLO:?}"))),
        };
        let (peer, own) = self.admit(&hello)?;
        compare_clocks(peer.broker, hello.wall_ms);
        let link = self.tasks.child();
        let (ends, ended) = watch::channel(());
        self.replace(peer, Incoming { epoch: peer.epoch, link: link.clone(), ended }).await?;
        let served = self.follow(peer, own, incoming, outgoing, &link).await;
        drop(ends);
        let mut links = self.links();
        if links.get(&peer.broker).is_some_and(|known| known.ended.has_changed().is_err()) {
            links.remove(&peer.broker);
        }
        served
    }

    /// Who says hello, and this broker's own broker epoch.
    fn admit(&self, hello: &v1::Hello) -> Result<(Peer, Revision), Fault> {
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
        let not_yet = |message: String| Err(Fault::new(Reason::NotReady, message));
        let Some(own) = self.neighbours.own() else {
            return not_yet(format!("broker {me} is not registered yet"));
        };
        // The view may lag behind whoever calls, and never runs ahead of the store.
        match self.neighbours.get(broker).map(|known| known.epoch.0) {
            None => not_yet(format!("broker {broker} is not registered, as far as is known here")),
            Some(known) if known > hello.broker_epoch => Err(invalid(format!(
                "broker {broker} calls in its uptime {}, and has registered as {known} since",
                hello.broker_epoch
            ))),
            Some(_) => Ok((Peer { broker, epoch: Revision(hello.broker_epoch) }, own)),
        }
    }

    pub(super) fn is_of_this_cluster(&self, cluster: &str) -> Result<(), Fault> {
        let ours = self.neighbours.cluster();
        if cluster == ours {
            return Ok(());
        }
        let theirs: String = cluster.chars().take(200).collect();
        Err(invalid(format!("this broker belongs to cluster {ours:?}, not to {theirs:?}")))
    }

    /// Takes the place of the broker's earlier link, once that has ended.
    async fn replace(&self, peer: Peer, link: Incoming) -> Result<(), Fault> {
        let before = {
            let mut links = self.links();
            let newer = links.get(&peer.broker).map(|known| known.epoch).filter(|known| *known > peer.epoch);
            if let Some(newer) = newer {
                let message = format!("broker {} follows here in a newer uptime, {newer}", peer.broker);
                return Err(invalid(message));
            }
            links.insert(peer.broker, link)
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
        incoming: Streaming<v1::ToLeader>,
        outgoing: &session::Outgoing,
        link: &Tasks,
    ) -> Result<(), Fault> {
        let welcome =
            v1::Welcome { broker: self.neighbours.me().0, broker_epoch: own.0, wall_ms: Some(clock::wall_ms()) };
        let welcome = v1::ToFollower { is: Some(to_follower::Is::Welcome(welcome)) };
        let _gone = outgoing.try_send(Ok(welcome));
        if let Some(links) = self.link_log(peer, |log| log.occur(clock::monotonic())) {
            tracing::info!(follower = %peer.broker, epoch = %peer.epoch, links, "a broker follows here");
        }
        let (find, sent) = (self.neighbours.find(), self.sent.of(peer.broker.0));
        let led = Led { peer, find, catch_up: Arc::clone(&self.catch_up), sent };
        let ended = tokio::select! {
            biased;
            // Pending for ever once it has cancelled the link.
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

    /// What of a broker's links is logged: of those that come and go many times a second, few.
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

fn invalid(message: String) -> Fault {
    Fault::new(Reason::InvalidRequest, message)
}

fn stopping() -> Fault {
    Fault::new(Reason::NotReady, "this link ends here: the broker stops, or another one takes its place")
}
