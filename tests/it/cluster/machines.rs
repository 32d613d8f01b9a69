//! Three brokers and three etcd members, each on a simulated machine of its own ([`network`](super::network)). Their
//! links can be cut. The object store is on the test's machine.

use std::net::Ipv4Addr;

use super::{members::Cluster, network::Network};
use crate::{
    broker::BrokerInstance,
    etcd::{Etcd, MemberHost},
    s3::S3,
};

pub(crate) const BROKERS: u32 = 3;
pub(crate) const MEMBERS: u8 = 3;

/// The machines and the processes on them. Cut links between machines do not affect the test process: it reaches all
/// machines.
pub(crate) struct Machines {
    pub(crate) network: Network,
    pub(crate) s3: S3,
    pub(crate) cluster: Cluster,
}

pub(crate) fn broker_name(id: u32) -> String {
    format!("b{id}")
}

pub(crate) fn broker_ip(id: u32) -> Ipv4Addr {
    Ipv4Addr::new(10, 77, 0, u8::try_from(id).expect("few brokers"))
}

fn member_name(member: u8) -> String {
    format!("e{member}")
}

fn member_ip(member: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 77, 0, 100 + member)
}

impl Machines {
    /// Starts all machines and waits until they are ready. Requires a process for which
    /// [`run_inside`](super::network::run_inside) returns true.
    pub(crate) fn make() -> Self {
        let network = Network::make();
        let s3 = S3::at(Network::HUB);
        let host = |member| {
            let ip = network.add(&member_name(member), 100 + member);
            MemberHost { ip, namespace: Some(member_name(member)) }
        };
        let mut cluster = Cluster::with_etcd(Etcd::on_hosts((0..MEMBERS).map(host).collect()));
        for id in 1..=BROKERS {
            let ip = network.add(&broker_name(id), u8::try_from(id).expect("few brokers"));
            let instance =
                BrokerInstance::member(id, &cluster.etcd).in_namespace(&broker_name(id), ip).object_store(&s3);
            // The default of this setting instead of the short lease of other tests.
            cluster.add(id, instance.setting("metadata.session_timeout", "\"6s\""));
        }
        cluster.wait_until_ready();
        Self { network, s3, cluster }
    }

    /// Cuts both directions between a broker and all etcd members, or restores them if `cut` is false.
    pub(crate) fn part_from_etcd(&self, id: u32, cut: bool) {
        for member in 0..MEMBERS {
            self.part((&broker_name(id), broker_ip(id)), (&member_name(member), member_ip(member)), cut);
        }
    }

    /// Cuts both directions between a broker and the other brokers, or restores them if `cut` is false.
    pub(crate) fn part_from_brokers(&self, id: u32, cut: bool) {
        for other in (1..=BROKERS).filter(|other| *other != id) {
            self.part((&broker_name(id), broker_ip(id)), (&broker_name(other), broker_ip(other)), cut);
        }
    }

    /// Cuts both directions between an etcd member and the other members, or restores them if `cut` is false.
    pub(crate) fn part_member(&self, member: u8, cut: bool) {
        for other in (0..MEMBERS).filter(|other| *other != member) {
            self.part((&member_name(member), member_ip(member)), (&member_name(other), member_ip(other)), cut);
        }
    }

    fn part(&self, one: (&str, Ipv4Addr), other: (&str, Ipv4Addr), cut: bool) {
        if cut {
            self.network.cut(one.0, other.1);
            self.network.cut(other.0, one.1);
        } else {
            self.network.mend(one.0, other.1);
            self.network.mend(other.0, one.1);
        }
    }
}
