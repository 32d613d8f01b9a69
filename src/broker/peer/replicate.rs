//! The stream over which another broker follows: who it is, and that there is one of it.
//!
//! A broker has one link here. The next one that it makes ends the one before, and begins when every partition knows of that end: what is
//! late of an old link never undoes a join on the new one.

use std::{
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
        session::{self, Ended, Led},
    },
    proto::{
        fault::{Fault, Reason},
        v1::{self, to_follower, to_leader},
    },
    task::Tasks,
};

/// How long whoever opened a stream may take to say who it is.
const HELLO: Duration = Duration::from_secs(5);

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
            let stopped = peering.tasks.clone();
            let refused = tokio::select! {
                biased;
                () = stopped.cancelled() => Some(stopping()),
                served = peering.serve(incoming, &outgoing) => served.err(),
            };
            if let Some(fault) = refused {
                // The stream ends with the reason; who has gone does not hear it.
                let _gone = tokio::time::timeout(HELLO, outgoing.send(Err(fault.into()))).await;
            }
        });
        Box::pin(ReceiverStream::new(messages))
    }
}
