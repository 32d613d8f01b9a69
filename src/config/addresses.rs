//! Addresses of the listeners: the default of `peer.listen`, the addresses advertised to clients and brokers, and
//! checks.

use std::net::{IpAddr, SocketAddr};

use super::{
    error::ValueSource,
    settings::{Config, GrpcConfig, PEER_PORT, PeerListenerConfig, Setting},
    sources::ResolvedValues,
    value::host_port,
};

impl GrpcConfig {
    /// Returns the address at which clients connect, for a listener that is bound to `bound`. This is `advertise`, with
    /// the port of `bound` in place of port 0, or `bound` if `advertise` is unset.
    pub fn advertised(&self, bound: SocketAddr) -> String {
        self.advertise.as_ref().map_or_else(|| bound.to_string(), |advertise| with_port_of(advertise, bound))
    }
}

impl PeerListenerConfig {
    /// Returns the address at which other brokers connect, for a peer listener that is bound to `bound`. This is
    /// `advertise`, with the port of `bound` in place of port 0. If `advertise` is unset, the port is that of `bound`,
    /// and the host is that of `grpc.advertise`. If `grpc.advertise` is unset or does not apply, the host is that of
    /// `bound`, or that of `grpc.listen` if `bound` stands for all addresses.
    pub fn advertised(&self, bound: SocketAddr, grpc: &GrpcConfig) -> String {
        if let Some(advertise) = &self.advertise {
            return with_port_of(advertise, bound);
        }
        let is_all_addresses = bound.ip().is_unspecified();
        // If the system chooses the port, nothing outside this machine can forward that port to the listener. So the
        // host of `grpc.advertise` applies only if the listener is bound to all addresses.
        let client_address = grpc.advertise.as_deref().filter(|_| is_all_addresses || self.listen.port() != 0);
        match client_address.and_then(host_port) {
            Some((host, _)) => format!("{host}:{}", bound.port()),
            None if is_all_addresses => {
                // Only the port is replaced: `grpc.listen` may have the scope id of an IPv6 address.
                let mut address = grpc.listen;
                address.set_port(bound.port());
                address.to_string()
            }
            None => bound.to_string(),
        }
    }
}

impl ResolvedValues {
    /// Sets `peer.listen`, if no source sets it, to the IP address of `grpc.listen` with [`PEER_PORT`].
    pub(super) fn apply_peer_default(&mut self) {
        let listen = self.text("grpc.listen").and_then(|text| text.parse::<SocketAddr>().ok());
        if let Some((mut listen, setting)) = listen.zip(Setting::find("peer.listen")) {
            listen.set_port(PEER_PORT);
            self.set_default(setting, listen.to_string());
        }
    }

    /// Adds an error in these cases:
    /// - two listeners on one port
    /// - an advertised address that stands for all addresses of a machine
    /// - a derived peer address that the peer listener does not accept
    pub(super) fn check_addresses(&mut self, config: &Config) {
        self.check_ports(config);
        if let Some(advertise) = config.peer.advertise.as_ref().filter(|advertise| is_unspecified_host(advertise)) {
            let reason =
                format!("peer.advertise {advertise} is not an address that brokers can connect to: name a host");
            self.reject("peer.advertise", reason);
        }
        if config.peer.advertise.is_none() && !config.metadata.etcd.is_empty() {
            self.check_derived_peer_address(config);
        }
        let listen = config.grpc.listen;
        match &config.grpc.advertise {
            None if listen.ip().is_unspecified() => {
                let reason = format!(
                    "grpc.listen {listen} stands for all addresses of this machine, which is not an address that \
                     clients can connect to: set grpc.advertise to the host:port for clients"
                );
                self.reject("grpc.listen", reason);
            }
            Some(advertise) if is_unspecified_host(advertise) => {
                let reason =
                    format!("grpc.advertise {advertise} is not an address that clients can connect to: name a host");
                self.reject("grpc.advertise", reason);
            }
            _ => {}
        }
    }

    /// Adds an error for two listeners with one port on the same address, or on two addresses of which one stands for
    /// all. A standalone broker opens no peer listener, so `peer.listen` is then not checked. The error names the
    /// source of the second setting of the pair, or of the first if the second has its default.
    fn check_ports(&mut self, config: &Config) {
        let (grpc, http) = (("grpc.listen", config.grpc.listen), ("http.listen", config.http.listen));
        let peer = ("peer.listen", config.peer.listen);
        let pairs = [(grpc, http), (grpc, peer), (http, peer)];
        let opened = if config.metadata.etcd.is_empty() { &pairs[..1] } else { &pairs[..] };
        for &((key_a, a), (key_b, b)) in opened {
            let overlap = a.ip() == b.ip() || a.ip().is_unspecified() || b.ip().is_unspecified();
            if overlap && a.port() == b.port() && a.port() != 0 {
                let reason = format!("{key_a} {a} and {key_b} {b} are the same port: choose two ports");
                self.reject(if self.source(key_b) == ValueSource::Default { key_a } else { key_b }, reason);
            }
        }
    }

    /// Checks the peer address if `peer.advertise` is unset. Other brokers could not reach a loopback listener at a
    /// non-loopback address, or a listener of one IP version at an address of the other. Called only with etcd.
    fn check_derived_peer_address(&mut self, config: &Config) {
        let listen = config.peer.listen;
        let advertised = config.peer.advertised(listen, &config.grpc);
        let Some((host, _)) = host_port(&advertised) else { return };
        let ip = advertised.parse::<SocketAddr>().ok().map(|address| address.ip());
        let is_loopback = ip.map_or(host == "localhost", |ip| ip.is_loopback());
        let is_other_family = match (listen.ip(), ip) {
            (IpAddr::V4(_), Some(IpAddr::V6(_))) => true,
            // `[::]` accepts IPv4 as well.
            (IpAddr::V6(listen), Some(IpAddr::V4(_))) => !listen.is_unspecified(),
            _ => false,
        };
        let limitation = match listen.ip() {
            listen if listen.is_loopback() && !is_loopback => "loopback",
            IpAddr::V4(_) if is_other_family => "IPv4",
            IpAddr::V6(_) if is_other_family => "IPv6",
            _ => return,
        };
        let reason = format!(
            "peer.listen {listen} is {limitation}, but brokers would connect to {advertised}: set peer.advertise"
        );
        // The default of `peer.listen` is derived from `grpc.listen`.
        let is_default = self.source("peer.listen") == ValueSource::Default;
        self.reject(if is_default { "grpc.listen" } else { "peer.listen" }, reason);
    }
}

/// Returns `advertise`, with the port of `bound` if its own port is 0.
fn with_port_of(advertise: &str, bound: SocketAddr) -> String {
    match host_port(advertise) {
        Some((host, 0)) => format!("{host}:{}", bound.port()),
        _ => advertise.to_owned(),
    }
}

/// Returns true if the host of the address is `0.0.0.0` or `[::]`, which stand for all addresses of a machine.
fn is_unspecified_host(advertise: &str) -> bool {
    host_port(advertise).is_some_and(|(host, _)| matches!(host, "0.0.0.0" | "[::]"))
}
