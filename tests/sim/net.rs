//! A network in memory: calls go directly to a broker's services, and bodies go frame by frame through links that
//! delay, stall and break.
//!
//! Tasks of the caller's process move the request body; tasks of the broker's process move the response. If a process
//! is killed, its unsent frames are lost and the peer receives a broken connection. Each direction between two machines
//! can be blocked alone. As with TCP, a blocked direction delays frames, and loses none until one side times out. Here
//! a frame is an HTTP body frame, not a journal frame.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use futures::{StreamExt as _, future::BoxFuture, stream};
use http_body_util::{BodyExt as _, StreamBody};
use hyper::body::Frame;
use strandline::{
    client::{BrokerAddress, BrokerChannel, CallResult, ConnectError, Connector, NotSent, RpcTransport},
    task::{Tasks, lock::Mutex, random},
};
use tokio::sync::{Notify, mpsc, oneshot};
use tonic::{Status, body::Body, codegen::Service as _, codegen::http, service::Routes};

/// Maximum delay until frames pass again after a direction is unblocked, in microseconds.
const MAX_RESUME_DELAY_US: u64 = 5000;

/// Timeout of a connection attempt.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);

/// Time without a frame after which a peer closes the connection: the keep-alive interval plus the keep-alive timeout.
pub(crate) const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(4);

/// All links and listeners. Clones share them.
#[derive(Clone, Default)]
pub(crate) struct Net {
    state: Arc<Mutex<State>>,
    /// Notified when a direction is unblocked or a machine gets power or a listener.
    healed: Arc<Notify>,
}

#[derive(Default)]
struct State {
    /// Listeners of each machine, by its address for clients.
    listening: BTreeMap<String, Listener>,
    /// Machines without power: connections to them time out instead of being refused.
    dark: BTreeSet<String>,
    /// Blocked directions: no frame passes from the first machine to the second.
    cut: BTreeSet<(String, String)>,
    /// Maximum additional delay of a frame, in microseconds, by direction.
    slow_us: BTreeMap<(String, String), u64>,
    /// Connections of each pair of machines, until they break. The two names of a pair are in ascending order.
    links: BTreeMap<(String, String), SimLink>,
}

#[derive(Clone)]
struct Listener {
    /// Services for clients; `None` while the broker starts.
    routes: Option<Routes>,
    /// Services for other brokers.
    peer_routes: Option<Routes>,
    /// Tasks of the broker's process.
    tasks: Tasks,
}

/// All connections between two machines. They break together; later connections have another link.
#[derive(Clone, Default)]
struct SimLink {
    up: Tasks,
    /// True if the connections timed out; false if they were reset.
    silent: Arc<AtomicBool>,
}

impl SimLink {
    /// Returns the error of a call on this link after a break: a timeout or a reset.
    fn broken_error(&self) -> Status {
        if !self.silent.load(Ordering::Relaxed) {
            return Status::unavailable("connection reset");
        }
        let mut status = Status::unavailable("keep-alive timed out");
        status.set_source(Arc::new(io::Error::new(io::ErrorKind::TimedOut, "keep-alive timed out")));
        status
    }
}

impl Net {
    /// Makes calls to `address` reach these services from now on. Called inside the broker's process.
    pub(crate) fn listen(&self, address: &str, routes: Routes) {
        self.add_listener(address, |listener| listener.routes = Some(routes));
    }

    /// Makes calls to the [`peer_address`] of `address` reach these services from now on. Called inside the broker's
    /// process.
    pub(crate) fn listen_for_peers(&self, address: &str, routes: Routes) {
        self.add_listener(address, |listener| listener.peer_routes = Some(routes));
    }

    /// Changes the listener of a machine by `add`. If there is none, creates one whose tasks belong to the current
    /// process.
    fn add_listener(&self, address: &str, add: impl FnOnce(&mut Listener)) {
        let mut state = self.state.lock();
        state.dark.remove(address);
        let none = || Listener { routes: None, peer_routes: None, tasks: Tasks::new() };
        add(state.listening.entry(address.to_owned()).or_insert_with(none));
        self.healed.notify_waiters();
    }

    /// Removes the listeners of a machine and breaks its connections. `power` is true if the machine keeps its power:
    /// its peers then receive a reset, else a timeout.
    pub(crate) fn hang_up(&self, address: &str, power: bool) {
        let mut state = self.state.lock();
        state.listening.remove(address);
        if !power {
            state.dark.insert(address.to_owned());
        }
        drop(state);
        // In reality, peers time out some time after a power loss. An immediate timeout is as valid.
        self.break_where(|one, other| one == address || other == address, !power);
    }

    /// Removes all listeners. Brokers reference the network, and the network references the brokers' services, so
    /// without this call neither is freed.
    pub(crate) fn close(&self) {
        let listening = std::mem::take(&mut self.state.lock().listening);
        drop(listening);
    }

    /// Restores the power of a machine, which then refuses connections to ports without a listener.
    pub(crate) fn power_on(&self, address: &str) {
        self.state.lock().dark.remove(address);
        self.healed.notify_waiters();
    }

    /// Resets every connection of all machines. New connections are possible at once.
    pub(crate) fn reset(&self) {
        self.break_where(|_, _| true, false);
    }

    /// Blocks the direction `from` one machine `to` another if `cut`, else unblocks it.
    pub(crate) fn cut(&self, from: &str, to: &str, cut: bool) {
        let way = (from.to_owned(), to.to_owned());
        if cut {
            self.state.lock().cut.insert(way);
        } else {
            self.state.lock().cut.remove(&way);
            self.healed.notify_waiters();
        }
    }

    /// Sets the maximum additional delay of frames in one direction.
    pub(crate) fn slow(&self, from: &str, to: &str, us: u64) {
        self.state.lock().slow_us.insert((from.to_owned(), to.to_owned()), us);
    }

    /// Breaks the connections between two machines, with the error of a timeout at both ends.
    pub(crate) fn time_out_connections(&self, one: &str, other: &str) {
        let pair = pair(one, other);
        self.break_where(|one, other| (one, other) == (pair.0.as_str(), pair.1.as_str()), true);
    }

    /// Returns the connector by which the machine `name` reaches other machines.
    pub(crate) fn from(&self, name: &str) -> Socket {
        Socket { net: self.clone(), name: name.to_owned() }
    }

    /// Breaks the connections between the machines that `which` selects: by a timeout if `silent`, else by a reset.
    fn break_where(&self, which: impl Fn(&str, &str) -> bool, silent: bool) {
        let mut broken = Vec::new();
        self.state.lock().links.retain(|(one, other), link| {
            let breaks = which(one, other);
            if breaks {
                broken.push(link.clone());
            }
            !breaks
        });
        for link in broken {
            link.silent.store(silent, Ordering::Relaxed);
            link.up.cancel();
        }
    }

    /// Returns the link between two machines. Creates it if there is none, or if the last one broke.
    fn link(&self, one: &str, other: &str) -> SimLink {
        self.state
            .lock()
            .links
            .entry(pair(one, other))
            .or_insert_with(|| SimLink { up: Tasks::new(), ..SimLink::default() })
            .clone()
    }

    /// Waits for the delay of one frame, and while the direction is blocked or one of the machines has no power.
    async fn delay(&self, from: &str, to: &str) {
        let way = (from.to_owned(), to.to_owned());
        let slow = self.state.lock().slow_us.get(&way).copied().unwrap_or(0);
        tokio::time::sleep(Duration::from_micros(random::in_range(50..1500) + random::in_range(0..=slow))).await;
        while self.is_cut(&way) {
            // No other task runs between the check and this call, so no notification is lost.
            self.healed.notified().await;
            tokio::time::sleep(Duration::from_micros(random::in_range(0..MAX_RESUME_DELAY_US))).await;
        }
    }

    fn is_cut(&self, way: &(String, String)) -> bool {
        let state = self.state.lock();
        state.cut.contains(way) || state.dark.contains(&way.0) || state.dark.contains(&way.1)
    }

    /// Passes the frames of a body to `to`, each with the delay of the link. Stops at the end of the body, when the
    /// connection breaks, or when the reader is dropped.
    async fn pump(self, mut body: Body, way: (String, String), link: SimLink, to: mpsc::Sender<Piece>) {
        let moved = async {
            while let Some(frame) = body.frame().await {
                self.delay(&way.0, &way.1).await;
                if to.send(Piece::Frame(frame)).await.is_err() {
                    return;
                }
            }
            let _gone = to.send(Piece::End).await;
        };
        tokio::select! {
            biased;
            () = link.up.cancelled() => {}
            () = to.closed() => {}
            () = moved => {}
        }
    }
}

/// Port of the listeners for clients.
const CLIENT_PORT: &str = ":9460";
/// Port of the listeners for other brokers.
const PEER_PORT: &str = ":9470";

/// Returns the address at which other brokers reach the machine with this address for clients.
pub(crate) fn peer_address(address: &str) -> String {
    address.replace(CLIENT_PORT, PEER_PORT)
}

/// Returns the machine of an address, named by its address for clients, and true if the address is that for other
/// brokers. Links are between machines, not between ports.
fn machine(address: &str) -> (String, bool) {
    (address.replace(PEER_PORT, CLIENT_PORT), address.ends_with(PEER_PORT))
}

fn pair(one: &str, other: &str) -> (String, String) {
    let (one, other) = if one < other { (one, other) } else { (other, one) };
    (one.to_owned(), other.to_owned())
}

/// Connector of one machine to other machines.
#[derive(Clone)]
pub(crate) struct Socket {
    net: Net,
    name: String,
}

impl Connector for Socket {
    fn connect(&self, to: &BrokerAddress) -> BoxFuture<'_, Result<BrokerChannel, ConnectError>> {
        let (to, is_peer) = machine(to.as_str());
        Box::pin(async move {
            let no_answer = |problem: &str| ConnectError::NoResponse { tried: vec![(to.clone(), problem.to_owned())] };
            let shaken = async {
                self.net.delay(&self.name, &to).await;
                self.net.delay(&to, &self.name).await;
            };
            if tokio::time::timeout(CONNECT_TIMEOUT, shaken).await.is_err() {
                return Err(no_answer("connection timed out"));
            }
            if !self.net.state.lock().listening.contains_key(&to) {
                return Err(no_answer("connection refused"));
            }
            Ok(BrokerChannel::new(End { from: self.clone(), to, is_peer }))
        })
    }
}

/// One connection from a machine to another. If the connection is broken, the next call connects again.
struct End {
    from: Socket,
    to: String,
    /// True for a connection to the machine's listener for brokers.
    is_peer: bool,
}

impl RpcTransport for End {
    fn call(&self, request: http::Request<Body>) -> BoxFuture<'static, CallResult> {
        let (Socket { net, name }, to, is_peer, here) =
            (self.from.clone(), self.to.clone(), self.is_peer, Tasks::new());
        Box::pin(async move {
            let link = net.link(&name, &to);
            tokio::select! {
                biased;
                () = link.up.cancelled() => return Err(link.broken_error().into()),
                () = net.delay(&name, &to) => {}
            }
            let listener = net.state.lock().listening.get(&to).cloned();
            let routes = |listener: Listener| {
                let routes = if is_peer { listener.peer_routes } else { listener.routes };
                routes.map(|routes| (routes, listener.tasks))
            };
            let Some((mut routes, tasks)) = listener.and_then(routes) else {
                return Err(NotSent::new("connection refused").into());
            };
            let (head, body) = request.into_parts();
            let (there, back) = ((name.clone(), to.clone()), (to.clone(), name.clone()));
            let (pipe, request_body) = pipe(&link);
            here.spawn("request", net.clone().pump(body, there, link.clone(), pipe));
            let request = http::Request::from_parts(head, request_body);
            let (mut response_sender, response) = oneshot::channel();
            let reply = link.clone();
            tasks.spawn("call", async move {
                let response = tokio::select! {
                    biased;
                    () = reply.up.cancelled() => return,
                    () = response_sender.closed() => return,
                    response = routes.call(request) => response.unwrap(),
                };
                tokio::select! {
                    biased;
                    () = reply.up.cancelled() => return,
                    () = net.delay(&back.0, &back.1) => {}
                }
                let (head, body) = response.into_parts();
                let (pipe, response_body) = self::pipe(&reply);
                if response_sender.send(http::Response::from_parts(head, response_body)).is_ok() {
                    net.pump(body, back, reply, pipe).await;
                }
            });
            response.await.map_err(|_| link.broken_error().into())
        })
    }
}

enum Piece {
    Frame(Result<Frame<Bytes>, Status>),
    End,
}

/// Returns a body and the sender of its pieces. The body breaks if the sender is dropped without [`Piece::End`].
fn pipe(link: &SimLink) -> (mpsc::Sender<Piece>, Body) {
    let (sender, pieces) = mpsc::channel(4);
    let frames = stream::unfold(Some((pieces, link.clone())), |open| async {
        let (mut pieces, link): (mpsc::Receiver<Piece>, SimLink) = open?;
        match pieces.recv().await {
            Some(Piece::Frame(frame)) => Some((frame, Some((pieces, link)))),
            Some(Piece::End) => None,
            None => Some((Err(link.broken_error()), None)),
        }
    });
    (sender, Body::new(StreamBody::new(frames.boxed())))
}
