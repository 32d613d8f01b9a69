//! A network in memory: calls go straight to a broker's services, their bodies frame by frame through links that delay, stall and break.
//!
//! The request's body is moved by tasks of the caller's process, the response and its body by tasks of the broker's: when one of them is
//! killed, what it had not sent yet is gone, and the other side sees a connection that broke.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use bytes::Bytes;
use futures::{StreamExt as _, future::BoxFuture, stream};
use http_body_util::{BodyExt as _, StreamBody};
use hyper::body::Frame;
use strandline::{
    client::{Address, Answered, Call, Connect, ConnectError, Unsent, Wire},
    task::{Tasks, random},
};
use tokio::sync::{mpsc, oneshot};
use tonic::{Status, body::Body, codegen::Service as _, codegen::http, service::Routes};

/// How often somebody on a stalled link looks again.
const LOOK: Duration = Duration::from_millis(5);

/// All links and who listens. Clones share it.
#[derive(Clone, Default)]
pub(crate) struct Net(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    listening: BTreeMap<String, Listener>,
    stalled: bool,
    /// Those of the links that are up; cancelled when they break.
    links: Tasks,
}

#[derive(Clone)]
struct Listener {
    routes: Routes,
    /// Of the broker's process.
    tasks: Tasks,
}

impl Net {
    /// From now on calls to `address` reach these services. Called inside the broker's process.
    pub(crate) fn listen(&self, address: &str, routes: Routes) {
        let listener = Listener { routes, tasks: Tasks::new() };
        self.state().listening.insert(address.to_owned(), listener);
    }

    /// Nobody listens there any more, and what was under way breaks.
    pub(crate) fn hang_up(&self, address: &str) {
        self.state().listening.remove(address);
        self.reset();
    }

    /// Breaks every link. New ones can be made.
    pub(crate) fn reset(&self) {
        let links = std::mem::take(&mut self.state().links);
        links.cancel();
    }

    /// Lets nothing through, or all again. Nothing is lost and nothing refused.
    pub(crate) fn stall(&self, stalled: bool) {
        self.state().stalled = stalled;
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }

    /// What one frame takes.
    async fn delay(&self) {
        tokio::time::sleep(Duration::from_micros(random::in_range(50..1500))).await;
        while self.state().stalled {
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Moves a body until its end, or until the link or whoever reads it is gone.
    async fn pump(self, mut body: Body, link: Tasks, to: mpsc::Sender<Piece>) {
        let moved = async {
            while let Some(frame) = body.frame().await {
                self.delay().await;
                if to.send(Piece::Frame(frame)).await.is_err() {
                    return;
                }
            }
            let _gone = to.send(Piece::End).await;
        };
        tokio::select! {
            biased;
            () = link.cancelled() => {}
            () = to.closed() => {}
            () = moved => {}
        }
    }
}

impl Connect for Net {
    fn connect(&self, to: &Address) -> BoxFuture<'_, Result<Wire, ConnectError>> {
        let to = to.as_str().to_owned();
        Box::pin(async move {
            self.delay().await;
            if !self.state().listening.contains_key(&to) {
                return Err(ConnectError::NoAnswer { tried: vec![(to, "connection refused".to_owned())] });
            }
            Ok(Wire::new(End { net: self.clone(), to }))
        })
    }
}

/// One connection: it mends itself with the next call.
struct End {
    net: Net,
    to: String,
}

impl Call for End {
    fn call(&self, request: http::Request<Body>) -> BoxFuture<'static, Answered> {
        let (net, to, here) = (self.net.clone(), self.to.clone(), Tasks::new());
        Box::pin(async move {
            net.delay().await;
            let (listener, link) = {
                let state = net.state();
                (state.listening.get(&to).cloned(), state.links.clone())
            };
            let Some(mut listener) = listener else { return Err(Unsent::new("connection refused").into()) };
            let (head, body) = request.into_parts();
            let (pipe, request_body) = pipe();
            here.spawn("request", net.clone().pump(body, link.clone(), pipe));
            let request = http::Request::from_parts(head, request_body);
            let (mut answer, answered) = oneshot::channel();
            let there = listener.tasks.clone();
            there.spawn("call", async move {
                let response = tokio::select! {
                    biased;
                    () = link.cancelled() => return,
                    () = answer.closed() => return,
                    response = listener.routes.call(request) => response.unwrap(),
                };
                net.delay().await;
                let (head, body) = response.into_parts();
                let (pipe, response_body) = self::pipe();
                if answer.send(http::Response::from_parts(head, response_body)).is_ok() {
                    net.pump(body, link, pipe).await;
                }
            });
            answered.await.map_err(|_| broken().into())
        })
    }
}

enum Piece {
    Frame(Result<Frame<Bytes>, Status>),
    End,
}

/// A body, and where its pieces go in. Without an end it has broken.
fn pipe() -> (mpsc::Sender<Piece>, Body) {
    let (sender, pieces) = mpsc::channel(4);
    let frames = stream::unfold(Some(pieces), |pieces| async {
        let mut pieces: mpsc::Receiver<Piece> = pieces?;
        match pieces.recv().await {
            Some(Piece::Frame(frame)) => Some((frame, Some(pieces))),
            Some(Piece::End) => None,
            None => Some((Err(broken()), None)),
        }
    });
    (sender, Body::new(StreamBody::new(frames.boxed())))
}

fn broken() -> Status {
    Status::unavailable("connection reset")
}
