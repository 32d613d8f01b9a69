//! A network that loses or damages answers: a proxy in front of a broker whose connections can be muted, then cut.
//!
//! Between brokers it can damage what comes back as well: see [`Link::damage`].
//!
//! Muted, requests still reach the broker and its answers are thrown away; cut, every connection ends. One after the
//! other is what a client fears most: its request was carried out, and it will never hear of it.

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

/// The byte of which records are made that are to be damaged: only in long runs of it bytes are changed, so that the frames around
/// them stay whole.
pub(crate) const FILLER: u8 = b'#';

/// So many of it in a row.
const RUN: usize = 256;

/// Of so many reads with such a run one is damaged.
const DAMAGED: u32 = 3;

#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Weather {
    muted: bool,
    damaging: bool,
    /// How often all connections were cut.
    cuts: u32,
}

/// A proxy that was bound and knows no broker yet.
pub(crate) struct Proxy {
    listener: TcpListener,
    address: SocketAddr,
}

/// A proxy that carries. It ends with [`Link::stop`].
pub(crate) struct Link {
    weather: watch::Sender<Weather>,
    tasks: Tasks,
}

impl Proxy {
    /// Takes a port, so that a broker can be told to advertise it.
    pub(crate) async fn bind() -> Self {
        let listener = TcpListener::bind(crate::broker::free_address()).await.expect("a free port");
        let address = listener.local_addr().expect("it is bound");
        Self { listener, address }
    }

    /// Where clients connect.
    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Carries every connection to `target`.
    pub(crate) fn carry_to(self, target: SocketAddr) -> Link {
        let (weather, watched) = watch::channel(Weather::default());
        let tasks = Tasks::new();
        tasks.spawn("proxy", accept(self.listener, target, watched, tasks.clone()));
        Link { weather, tasks }
    }
}

impl Link {
    /// Throws answers away for a while, then cuts every connection. New ones are carried as before.
    pub(crate) async fn lose_answers(&self, duration: Duration) {
        self.weather.send_modify(|weather| weather.muted = true);
        tokio::time::sleep(duration).await;
        self.weather.send_modify(|weather| *weather = Weather { muted: false, cuts: weather.cuts + 1, ..*weather });
    }

    /// From now on changes a byte, now and then, in what comes from the broker; or does not.
    pub(crate) fn damage(&self, damaging: bool) {
        self.weather.send_modify(|weather| weather.damaging = damaging);
    }

    /// Ends it with its connections.
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
                // Nobody there: the client sees its connection end, as it would without us.
                if let Ok(broker) = TcpStream::connect(target).await {
                    tasks.spawn("carry", carry(client, broker, weather.clone(), tasks.clone()));
                }
            }
        }
    }
}

/// One connection, until either side ends it or it is cut.
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

/// Passes bytes on, drops them while muted, or changes some.
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

/// A byte in the middle of the first long run of the filler.
fn in_a_run(bytes: &mut [u8]) -> Option<&mut u8> {
    let at = bytes.windows(RUN).position(|window| window.iter().all(|byte| *byte == FILLER))?;
    bytes.get_mut(at + RUN / 2)
}

#[tokio::test]
async fn a_muted_link_carries_requests_and_loses_answers() {
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
