//! A proxy in front of a broker, which simulates a network that loses or corrupts responses. Its connections can be
//! muted and then cut ([`Link::drop_responses`]), or change bytes ([`Link::set_corrupting`]).
//!
//! While a link is muted, requests reach the broker, and its responses are dropped. A cut ends every connection. So a
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

/// Byte that fills the values of records which may be corrupted. Only long runs of this byte are changed, so the
/// structure of the surrounding messages stays intact.
pub(crate) const FILLER: u8 = b'#';

/// Minimum length of a run of [`FILLER`] that may be changed, in bytes.
const RUN: usize = 256;

/// One of this number of socket reads with such a run is corrupted.
const CORRUPTED_ONE_IN: u32 = 3;

#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct LinkFaults {
    muted: bool,
    corrupting: bool,
    /// Number of times that all connections were cut.
    cuts: u32,
}

/// A proxy that is bound to its address and does not forward yet.
pub(crate) struct Proxy {
    listener: TcpListener,
    address: SocketAddr,
}

/// A proxy that forwards connections, until [`Link::stop`].
pub(crate) struct Link {
    faults: watch::Sender<LinkFaults>,
    tasks: Tasks,
}

impl Proxy {
    /// Binds a free port. A broker can advertise the address before it is started.
    pub(crate) async fn bind() -> Self {
        let listener = TcpListener::bind(crate::broker::free_address()).await.expect("a free port");
        let address = listener.local_addr().expect("the listener is bound");
        Self { listener, address }
    }

    /// Returns the address to which clients connect.
    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Forwards every connection to `target`.
    pub(crate) fn forward_to(self, target: SocketAddr) -> Link {
        let (faults, watched_faults) = watch::channel(LinkFaults::default());
        let tasks = Tasks::new();
        tasks.spawn("proxy", accept(self.listener, target, watched_faults, tasks.clone()));
        Link { faults, tasks }
    }
}

impl Link {
    /// Drops responses for a while, then cuts every connection. New connections are forwarded as before.
    pub(crate) async fn drop_responses(&self, duration: Duration) {
        self.faults.send_modify(|faults| faults.muted = true);
        tokio::time::sleep(duration).await;
        self.faults.send_modify(|faults| *faults = LinkFaults { muted: false, cuts: faults.cuts + 1, ..*faults });
    }

    /// Enables or disables the corruption of data from the broker.
    pub(crate) fn set_corrupting(&self, corrupting: bool) {
        self.faults.send_modify(|faults| faults.corrupting = corrupting);
    }

    /// Ends the proxy and its connections.
    pub(crate) async fn stop(&self) {
        self.tasks.stop().await;
    }
}

/// Accepts connections and forwards each of them in a task, until the tasks are cancelled.
async fn accept(listener: TcpListener, target: SocketAddr, faults: watch::Receiver<LinkFaults>, tasks: Tasks) {
    loop {
        tokio::select! {
            biased;
            () = tasks.cancelled() => return,
            accepted = listener.accept() => {
                let (client, _) = accepted.expect("the listener continues");
                // If the broker does not listen, the client's connection is closed.
                if let Ok(broker) = TcpStream::connect(target).await {
                    tasks.spawn("forward", forward(client, broker, faults.clone(), tasks.clone()));
                }
            }
        }
    }
}

/// Forwards one connection until either side or a cut ends the connection.
async fn forward(client: TcpStream, broker: TcpStream, mut faults: watch::Receiver<LinkFaults>, tasks: Tasks) {
    let _ = (client.set_nodelay(true), broker.set_nodelay(true));
    let cuts_before = faults.borrow().cuts;
    let (from_client, to_client) = client.into_split();
    let (from_broker, to_broker) = broker.into_split();
    let watched_faults = faults.clone();
    tokio::select! {
        biased;
        () = tasks.cancelled() => {}
        _ = faults.wait_for(|faults| faults.cuts != cuts_before) => {}
        () = pass(from_client, to_broker, LinkFaults::default) => {}
        () = pass(from_broker, to_client, || *watched_faults.borrow()) => {}
    }
}

/// Forwards bytes in one direction until either socket ends. Drops them while muted, and changes some while corrupting.
async fn pass(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, faults: impl Fn() -> LinkFaults) {
    let (mut bytes, mut runs) = (vec![0; 64 << 10], 0);
    while let Ok(read) = from.read(&mut bytes).await {
        let LinkFaults { muted, corrupting, .. } = faults();
        if corrupting && let Some(byte) = find_run(&mut bytes[..read]) {
            if runs % CORRUPTED_ONE_IN == 0 {
                *byte ^= 1;
            }
            runs += 1;
        }
        if read == 0 || (!muted && to.write_all(&bytes[..read]).await.is_err()) {
            return;
        }
    }
}

/// Returns a byte inside the first run of at least [`RUN`] filler bytes; `None` if there is no such run.
fn find_run(bytes: &mut [u8]) -> Option<&mut u8> {
    let at = bytes.windows(RUN).position(|window| window.iter().all(|byte| *byte == FILLER))?;
    bytes.get_mut(at + RUN / 2)
}

#[tokio::test]
async fn muted_link_forwards_requests_and_drops_responses() {
    let server = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let proxy = Proxy::bind().await;
    let address = proxy.address();
    let link = proxy.forward_to(server.local_addr().expect("bound"));
    let mut client = TcpStream::connect(address).await.expect("the proxy listens");
    let (mut broker, _) = server.accept().await.expect("the proxy connects");
    let mut byte = [0];
    client.write_all(b"a").await.expect("sent");
    broker.read_exact(&mut byte).await.expect("the byte is forwarded");
    broker.write_all(b"b").await.expect("the response is sent");
    client.read_exact(&mut byte).await.expect("the byte is forwarded");
    assert_eq!(byte, *b"b");

    let muted = link.drop_responses(Duration::from_millis(50));
    let exchange = async {
        client.write_all(b"c").await.expect("sent");
        broker.read_exact(&mut byte).await.expect("the request is forwarded while muted");
        broker.write_all(b"d").await.expect("the response is sent");
    };
    tokio::join!(muted, exchange);
    assert_eq!(byte, *b"c");
    assert!(matches!(client.read(&mut byte).await, Ok(0) | Err(_)), "the connection is cut, and the response is lost");
    let mut second = TcpStream::connect(address).await.expect("the proxy continues");
    let (mut broker, _) = server.accept().await.expect("the proxy continues");
    second.write_all(b"e").await.expect("sent");
    broker.read_exact(&mut byte).await.expect("the byte is forwarded");
    assert_eq!(byte, *b"e");
    link.stop().await;
}
