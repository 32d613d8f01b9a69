//! Clients that hold the HTTP port, and responses before the broker is ready.

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    time::Duration,
};

use super::target::PREFACE;
use crate::{
    broker::{Broker, BrokerInstance, http_get},
    etcd::Etcd,
    test_timeout::eventually,
};

/// Returns the header and the body of a response. Sends `accept` if it is not empty.
fn get(address: SocketAddr, path: &str, accept: &str) -> (String, String) {
    let mut stream = TcpStream::connect(address).expect("the port is open");
    stream.set_read_timeout(Some(Duration::from_secs(10))).expect("a timeout can be set");
    let accept = if accept.is_empty() { String::new() } else { format!("Accept: {accept}\r\n") };
    let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\n{accept}Connection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).expect("the request is sent");
    let mut response = String::new();
    stream.read_to_string(&mut response).expect("a response");
    let (head, body) = response.split_once("\r\n\r\n").expect("a head");
    (head.to_ascii_lowercase(), body.to_owned())
}

/// Regression: the port also served HTTP/2, without a bound on the memory of its streams.
#[test]
fn pages_are_served_by_http_1_alone() {
    let mut instance = BrokerInstance::new();
    let _broker = instance.start();
    let mut stream = TcpStream::connect(instance.http()).expect("the port is open");
    stream.set_read_timeout(Some(Duration::from_secs(10))).expect("a timeout can be set");
    stream.write_all(PREFACE).expect("the request is sent");
    let mut response = Vec::new();
    // The connection may be reset after the response.
    let _ended = stream.read_to_end(&mut response);
    assert!(response.is_empty() || response.starts_with(b"HTTP/1.1 4"), "{response:?}");
    assert_eq!(http_get(instance.http(), "/healthz").expect("a response").0, 200);
}

/// Regression: 256 idle connections filled the port, and `/healthz` got no response.
#[test]
fn probes_are_served_beside_stalled_connections() {
    let mut instance = BrokerInstance::new();
    let mut broker = instance.start();
    let address = instance.http();
    let page = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n";
    let hang = |number: usize| {
        let mut stream = TcpStream::connect(address).expect("the port is open");
        let sent = match number % 5 {
            // No request, or less than half of one.
            0 => Ok(()),
            1 => stream.write_all(b"GET /healthz HTTP/1.1\r\nHo"),
            // A connection that stays open after its request, or a body that never arrives.
            2 => stream.write_all(b"GET /readyz HTTP/1.1\r\nHost: x\r\n\r\n"),
            3 => stream.write_all(b"GET /healthz HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n"),
            // Many requests for a page, without reading any response.
            _ => stream.write_all(&page.repeat(20)),
        };
        // A connection that was closed for a later one is acceptable.
        drop(sent);
        stream
    };
    let mut hanging: Vec<TcpStream> = (0..400).map(hang).collect();
    for round in 0..20 {
        for path in ["/healthz", "/readyz"] {
            let (code, page) =
                http_get(address, path).unwrap_or_else(|error| panic!("{path} in round {round}: {error}"));
            assert_eq!((code, page.as_str()), (200, "ok\n"));
        }
        // The attack continues meanwhile.
        for stream in &mut hanging {
            drop(stream.write_all(b"x"));
        }
        hanging.extend((0..10).map(hang));
    }
    assert!(instance.metric("strandline_connections_evicted_total") > 0.0);
    assert!(broker.is_running());
}

/// Regression: the page was empty, with the type of OpenMetrics and without its end marker, which is invalid. The page
/// was never text, whatever the client requested.
#[test]
fn metrics_before_readiness_have_both_formats() {
    let mut etcd = Etcd::begin(1, "http", &[]);
    etcd.kill(0);
    let instance = BrokerInstance::member(1, &etcd);
    let broker = instance.spawn();
    eventually("the port is open", || http_get(instance.http(), "/healthz").ok());
    let (code, page) = http_get(instance.http(), "/readyz").expect("a response");
    assert_eq!((code, page.as_str()), (503, "not ready: starting\n"));
    check_both_formats(instance.http());
    assert!(broker.terminate().success());
}

#[test]
fn metrics_of_a_ready_broker_have_both_formats() {
    let mut instance = BrokerInstance::new();
    let _broker: Broker = instance.start();
    check_both_formats(instance.http());
    let (_, text) = get(instance.http(), "/metrics", "");
    assert!(text.contains("\nstrandline_partitions 0\n"), "{text}");
}

fn check_both_formats(address: SocketAddr) {
    let prometheus = "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.3,*/*;q=0.2";
    let (head, open) = get(address, "/metrics", prometheus);
    assert!(head.starts_with("http/1.1 200"), "{head}");
    assert!(head.contains("content-type: application/openmetrics-text; version=1.0.0; charset=utf-8"), "{head}");
    assert!(open.ends_with("\n# EOF\n"), "{open}");
    assert!(open.contains("# TYPE strandline_produce_bytes counter\nstrandline_produce_bytes_total 0\n"), "{open}");
    for accept in ["", "text/plain", "*/*"] {
        let (head, text) = get(address, "/metrics", accept);
        assert!(head.contains("content-type: text/plain; version=0.0.4; charset=utf-8"), "{accept}: {head}");
        assert!(!text.contains("# EOF"), "{text}");
        let counter = "# TYPE strandline_produce_bytes_total counter\nstrandline_produce_bytes_total 0\n";
        assert!(text.contains(counter), "{text}");
    }
}
