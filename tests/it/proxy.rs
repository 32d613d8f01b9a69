//! A network that loses or corrupts responses: a proxy in front of a broker, whose connections can be muted and then cut. Between brokers,
//! the proxy can also corrupt responses: see [`Link::damage`].
//!
//! While a link is muted, requests reach the broker and its responses are dropped. A cut ends every connection. In this sequence, the
//! client's request was executed, and its response never arrives.

use std::{net::SocketAddr, time::Duration};

use strandline::task::Tasks;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{
        TcpListener, TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::watch,
};

/// Byte of which corruptible records are made. Bytes are changed only in long runs of this byte, so that the surrounding frames stay
/// intact.
pub(crate) const FILLER: u8 = b'#';

/// Length of such a run in bytes.
const RUN: usize = 256;

/// One of this number of reads with such a run is corrupted.
const DAMAGED: u32 = 3;

#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Weather {
    muted: bool,
    damaging: bool,
    /// Number of times that all connections were cut.
    cuts: u32,
}

/// A bound proxy without a target.
pub(crate) struct Proxy {
    listener: TcpListener,
    address: SocketAddr,
}

/// A running proxy. [`Link::stop`] ends the proxy.
pub(crate) struct Link {
    weather: watch::Sender<Weather>,
    tasks: Tasks,
}

impl Proxy {
    /// Binds a port, so that a broker can advertise the address.
    pub(crate) async fn bind() -> Self {
        let listener = TcpListener::bind(crate::broker::free_address()).await.expect("a free port");
        let address = listener.local_addr().expect("it is bound");
        Self { listener, address }
    }

    /// Returns the address for clients.
    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Forwards every connection to `target`.
    pub(crate) fn carry_to(self, target: SocketAddr) -> Link {
        let (weather, watched) = watch::channel(Weather::default());
        let tasks = Tasks::new();
        tasks.spawn("proxy", accept(self.listener, target, watched, tasks.clone()));
        Link { weather, tasks }
    }
}

impl Link {
    /// Drops responses for a while, then cuts every connection. New connections are forwarded as before.
    pub(crate) async fn lose_answers(&self, duration: Duration) {
        self.weather.send_modify(|weather| weather.muted = true);
        tokio::time::sleep(duration).await;
        self.weather.send_modify(|weather| *weather = Weather { muted: false, cuts: weather.cuts + 1, ..*weather });
    }

    /// Enables or disables occasional byte changes in data from the broker.
    pub(crate) fn damage(&self, damaging: bool) {
        self.weather.send_modify(|weather| weather.damaging = damaging);
    }

    /// Ends the proxy and its connections.
    pub(crate) async fn stop(&self) {
        self.tasks.stop().await;
    }
}

async fn accept(listener: TcpListener, target: SocketAddr, weather: watch::Receiver<Weather>, tasks: Tasks) {
    loop {
        tokio::select! {
            biased;
            () = tasks.cancelled() => return,
            accepted = listener.accept() => {
                let (client, _) = accepted.expect("the listener goes on");
                // If the broker does not listen, the client's connection ends, as it would without the proxy.
                if let Ok(broker) = TcpStream::connect(target).await {
                    tasks.spawn("carry", carry(client, broker, weather.clone(), tasks.clone()));
                }
            }
        }
    }
}

/// Forwards one connection until either side or a cut ends the connection.
async fn carry(client: TcpStream, broker: TcpStream, mut weather: watch::Receiver<Weather>, tasks: Tasks) {
    let _ = (client.set_nodelay(true), broker.set_nodelay(true));
    let began = weather.borrow().cuts;
    let (from_client, to_client) = client.into_split();
    let (from_broker, to_broker) = broker.into_split();
    let watched = weather.clone();
    tokio::select! {
        biased;
        () = tasks.cancelled() => {}
        _ = weather.wait_for(|weather| weather.cuts != began) => {}
        () = pass(from_client, to_broker, Weather::default) => {}
        () = pass(from_broker, to_client, || *watched.borrow()) => {}
    }
}

/// Forwards bytes, drops them while muted, or changes some.
async fn pass(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, weather: impl Fn() -> Weather) {
    let (mut bytes, mut runs) = (vec![0; 64 << 10], 0);
    while let Ok(read) = from.read(&mut bytes).await {
        let Weather { muted, damaging, .. } = weather();
        if damaging && let Some(byte) = in_a_run(&mut bytes[..read]) {
            if runs % DAMAGED == 0 {
                *byte ^= 1;
            }
            runs += 1;
        }
        if read == 0 || (!muted && to.write_all(&bytes[..read]).await.is_err()) {
            return;
        }
    }
}

/// Returns a byte in the middle of the first long run of the filler.
fn in_a_run(bytes: &mut [u8]) -> Option<&mut u8> {
    let at = bytes.windows(RUN).position(|window| window.iter().all(|byte| *byte == FILLER))?;
    bytes.get_mut(at + RUN / 2)
}

#[tokio::test]
async fn muted_link_forwards_requests_and_drops_responses() {
    let server = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let proxy = Proxy::bind().await;
    let address = proxy.address();
    let link = proxy.carry_to(server.local_addr().expect("bound"));
    let mut client = TcpStream::connect(address).await.expect("the proxy listens");
    let (mut broker, _) = server.accept().await.expect("the proxy connects");
    let mut byte = [0];
    client.write_all(b"a").await.expect("sent");
    broker.read_exact(&mut byte).await.expect("carried");
    broker.write_all(b"b").await.expect("answered");
    client.read_exact(&mut byte).await.expect("carried back");
    assert_eq!(byte, *b"b");

    let muted = link.lose_answers(Duration::from_millis(50));
    let exchange = async {
        client.write_all(b"c").await.expect("sent");
        broker.read_exact(&mut byte).await.expect("carried while muted");
        broker.write_all(b"d").await.expect("answered");
    };
    tokio::join!(muted, exchange);
    assert_eq!(byte, *b"c");
    assert!(matches!(client.read(&mut byte).await, Ok(0) | Err(_)), "cut, and the answer never came");
    let mut again = TcpStream::connect(address).await.expect("it goes on");
    let (mut broker, _) = server.accept().await.expect("it goes on");
    again.write_all(b"e").await.expect("sent");
    broker.read_exact(&mut byte).await.expect("carried");
    assert_eq!(byte, *b"e");
    link.stop().await;
}
