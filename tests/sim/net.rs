//! A network in memory: calls go straight to a broker's services, their bodies frame by frame through links that delay, stall and break.
//!
//! The request's body is moved by tasks of the caller's process, the response and its body by tasks of the broker's: when one of them is
//! killed, what it had not sent yet is gone, and the other side sees a connection that broke. Each pair of machines has two ways, which
//! can be cut one without the other: nothing is refused then and nothing is lost, as with TCP, until somebody gives up.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicBool, Ordering},
    },
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
use tokio::sync::{Notify, mpsc, oneshot};
use tonic::{Status, body::Body, codegen::Service as _, codegen::http, service::Routes};

/// How long it takes at most until what waits on a link that was cut goes on.
const GOES_ON_US: u64 = 5000;

/// How long a connection may take to come up.
const CONNECTING: Duration = Duration::from_secs(3);

/// Whom nobody hears for so long is not waited for any more: pings, and their time.
pub(crate) const SILENCE: Duration = Duration::from_secs(4);

/// All links and who listens. Clones share it.
#[derive(Clone, Default)]
pub(crate) struct Net {
    state: Arc<Mutex<State>>,
    /// Told when something comes through again.
    healed: Arc<Notify>,
}

#[derive(Default)]
struct State {
    /// The listeners of each machine, by the address for clients.
    listening: BTreeMap<String, Listener>,
    /// Without power: not even a refusal comes from there.
    dark: BTreeSet<String>,
    /// From one to the other, nothing comes through.
    cut: BTreeSet<(String, String)>,
    /// What a frame takes in addition, at most.
    slow_us: BTreeMap<(String, String), u64>,
    /// What connects two that spoke to each other, in the order of their names, until it breaks.
    cables: BTreeMap<(String, String), Cable>,
}

#[derive(Clone)]
struct Listener {
    /// For clients; `None` while the broker starts.
    routes: Option<Routes>,
    /// For other brokers.
    peer_routes: Option<Routes>,
    /// Of the broker's process.
    tasks: Tasks,
}

/// All connections between two, from one break to the next.
#[derive(Clone, Default)]
struct Cable {
    up: Tasks,
    /// It did not break: nobody was heard any more.
    silent: Arc<AtomicBool>,
}

impl Cable {
    fn broken(&self) -> Status {
        if !self.silent.load(Ordering::Relaxed) {
            return Status::unavailable("connection reset");
        }
        let mut status = Status::unavailable("keep-alive timed out");
        status.set_source(Arc::new(io::Error::new(io::ErrorKind::TimedOut, "keep-alive timed out")));
        status
    }
}

impl Net {
    /// From now on calls to `address` reach these services. Called inside the broker's process.
    pub(crate) fn listen(&self, address: &str, routes: Routes) {
        self.add_listener(address, |listener| listener.routes = Some(routes));
    }

    /// From now on calls to the [`peer_address`] of `address` reach these services. Called inside the broker's process.
    pub(crate) fn listen_for_peers(&self, address: &str, routes: Routes) {
        self.add_listener(address, |listener| listener.peer_routes = Some(routes));
    }

    fn add_listener(&self, address: &str, add: impl FnOnce(&mut Listener)) {
        let mut state = self.state();
        state.dark.remove(address);
        let none = || Listener { routes: None, peer_routes: None, tasks: Tasks::new() };
        add(state.listening.entry(address.to_owned()).or_insert_with(none));
        self.healed.notify_waiters();
    }

    /// Nobody listens there any more. Its connections break; without power nobody is told.
    pub(crate) fn hang_up(&self, address: &str, power: bool) {
        let mut state = self.state();
        state.listening.remove(address);
        if !power {
            state.dark.insert(address.to_owned());
        }
        drop(state);
        // Where the power is gone the others notice it a little later than at once. They may as well notice it now.
        self.break_where(|one, other| one == address || other == address, !power);
    }

    /// Nobody listens anywhere any more. Brokers hold the network, and it holds theirs: without this, what it reaches would never be freed.
    pub(crate) fn close(&self) {
        let listening = std::mem::take(&mut self.state().listening);
        drop(listening);
    }

    /// The machine has its power back: it refuses what nobody there listens for.
    pub(crate) fn power(&self, address: &str) {
        self.state().dark.remove(address);
        self.healed.notify_waiters();
    }

    /// Breaks every link. New ones can be made.
    pub(crate) fn reset(&self) {
        self.break_where(|_, _| true, false);
    }

    /// Lets nothing through from one to the other, or all again.
    pub(crate) fn cut(&self, from: &str, to: &str, cut: bool) {
        let way = (from.to_owned(), to.to_owned());
        if cut {
            self.state().cut.insert(way);
        } else {
            self.state().cut.remove(&way);
            self.healed.notify_waiters();
        }
    }

    /// Makes frames from one to the other take up to so much longer.
    pub(crate) fn slow(&self, from: &str, to: &str, us: u64) {
        self.state().slow_us.insert((from.to_owned(), to.to_owned()), us);
    }

    /// The two have not heard each other for too long.
    pub(crate) fn give_up(&self, one: &str, other: &str) {
        let pair = pair(one, other);
        self.break_where(|one, other| (one, other) == (pair.0.as_str(), pair.1.as_str()), true);
    }

    /// The way to others from `name`.
    pub(crate) fn from(&self, name: &str) -> Socket {
        Socket { net: self.clone(), name: name.to_owned() }
    }

    fn break_where(&self, which: impl Fn(&str, &str) -> bool, silent: bool) {
        let mut broken = Vec::new();
        self.state().cables.retain(|(one, other), cable| {
            let breaks = which(one, other);
            if breaks {
                broken.push(cable.clone());
            }
            !breaks
        });
        for cable in broken {
            cable.silent.store(silent, Ordering::Relaxed);
            cable.up.cancel();
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    fn cable(&self, one: &str, other: &str) -> Cable {
        self.state()
            .cables
            .entry(pair(one, other))
            .or_insert_with(|| Cable { up: Tasks::new(), ..Cable::default() })
            .clone()
    }

    /// What one frame takes.
    async fn delay(&self, from: &str, to: &str) {
        let way = (from.to_owned(), to.to_owned());
        let slow = self.state().slow_us.get(&way).copied().unwrap_or(0);
        tokio::time::sleep(Duration::from_micros(random::in_range(50..1500) + random::in_range(0..=slow))).await;
        while self.is_cut(&way) {
            // Nothing else runs between the look and this.
            self.healed.notified().await;
            tokio::time::sleep(Duration::from_micros(random::in_range(0..GOES_ON_US))).await;
        }
    }

    fn is_cut(&self, way: &(String, String)) -> bool {
        let state = self.state();
        state.cut.contains(way) || state.dark.contains(&way.0) || state.dark.contains(&way.1)
    }

    /// Moves a body until its end, or until the cable or whoever reads it is gone.
    async fn pump(self, mut body: Body, way: (String, String), cable: Cable, to: mpsc::Sender<Piece>) {
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
            () = cable.up.cancelled() => {}
            () = to.closed() => {}
            () = moved => {}
        }
    }
}

/// The port of the listeners for clients, and of those for brokers.
const CLIENT_PORT: &str = ":9460";
const PEER_PORT: &str = ":9470";

/// Where other brokers reach the machine that clients reach at `address`.
pub(crate) fn peer_address(address: &str) -> String {
    address.replace(CLIENT_PORT, PEER_PORT)
}

/// Which machine an address is of, and whether it is the one for brokers. Links are between machines.
fn machine(address: &str) -> (String, bool) {
    (address.replace(PEER_PORT, CLIENT_PORT), address.ends_with(PEER_PORT))
}

fn pair(one: &str, other: &str) -> (String, String) {
    let (one, other) = if one < other { (one, other) } else { (other, one) };
    (one.to_owned(), other.to_owned())
}

/// How one machine reaches the others.
#[derive(Clone)]
pub(crate) struct Socket {
    net: Net,
    name: String,
}

impl Connect for Socket {
    fn connect(&self, to: &Address) -> BoxFuture<'_, Result<Wire, ConnectError>> {
        let (to, is_peer) = machine(to.as_str());
        Box::pin(async move {
            let no_answer = |problem: &str| ConnectError::NoAnswer { tried: vec![(to.clone(), problem.to_owned())] };
            let shaken = async {
                self.net.delay(&self.name, &to).await;
                self.net.delay(&to, &self.name).await;
            };
            if tokio::time::timeout(CONNECTING, shaken).await.is_err() {
                return Err(no_answer("connection timed out"));
            }
            if !self.net.state().listening.contains_key(&to) {
                return Err(no_answer("connection refused"));
            }
            Ok(Wire::new(End { from: self.clone(), to, is_peer }))
        })
    }
}

/// One connection: it mends itself with the next call.
struct End {
    from: Socket,
    to: String,
    /// Whether it goes to the machine's listener for brokers.
    is_peer: bool,
}

impl Call for End {
    fn call(&self, request: http::Request<Body>) -> BoxFuture<'static, Answered> {
        let (Socket { net, name }, to, is_peer, here) =
            (self.from.clone(), self.to.clone(), self.is_peer, Tasks::new());
        Box::pin(async move {
            let cable = net.cable(&name, &to);
            tokio::select! {
                biased;
                () = cable.up.cancelled() => return Err(cable.broken().into()),
                () = net.delay(&name, &to) => {}
            }
            let listener = net.state().listening.get(&to).cloned();
            let routes = |listener: Listener| {
                let routes = if is_peer { listener.peer_routes } else { listener.routes };
                routes.map(|routes| (routes, listener.tasks))
            };
            let Some((mut routes, tasks)) = listener.and_then(routes) else {
                return Err(Unsent::new("connection refused").into());
            };
            let (head, body) = request.into_parts();
            let (there, back) = ((name.clone(), to.clone()), (to.clone(), name.clone()));
            let (pipe, request_body) = pipe(&cable);
            here.spawn("request", net.clone().pump(body, there, cable.clone(), pipe));
            let request = http::Request::from_parts(head, request_body);
            let (mut answer, answered) = oneshot::channel();
            let reply = cable.clone();
            tasks.spawn("call", async move {
                let response = tokio::select! {
                    biased;
                    () = reply.up.cancelled() => return,
                    () = answer.closed() => return,
                    response = routes.call(request) => response.unwrap(),
                };
                tokio::select! {
                    biased;
                    () = reply.up.cancelled() => return,
                    () = net.delay(&back.0, &back.1) => {}
                }
                let (head, body) = response.into_parts();
                let (pipe, response_body) = self::pipe(&reply);
                if answer.send(http::Response::from_parts(head, response_body)).is_ok() {
                    net.pump(body, back, reply, pipe).await;
                }
            });
            answered.await.map_err(|_| cable.broken().into())
        })
    }
}

enum Piece {
    Frame(Result<Frame<Bytes>, Status>),
    End,
}

/// A body, and where its pieces go in. Without an end it has broken.
fn pipe(cable: &Cable) -> (mpsc::Sender<Piece>, Body) {
    let (sender, pieces) = mpsc::channel(4);
    let frames = stream::unfold(Some((pieces, cable.clone())), |open| async {
        let (mut pieces, cable): (mpsc::Receiver<Piece>, Cable) = open?;
        match pieces.recv().await {
            Some(Piece::Frame(frame)) => Some((frame, Some((pieces, cable)))),
            Some(Piece::End) => None,
            None => Some((Err(cable.broken()), None)),
        }
    });
    (sender, Body::new(StreamBody::new(frames.boxed())))
}
