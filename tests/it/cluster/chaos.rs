//! Brokers and etcd's members on machines of their own, and a bucket over the network, under faults drawn from a seed: what was
//! acknowledged stays, once and in order, and how long clients waited after each kind of fault is printed.
//!
//! `STRANDLINE_CHAOS_MINUTES` says how long (`make chaos MINUTES=N`), `STRANDLINE_CHAOS_ONLY` picks faults by their words
//! (`ONLY="cut off"`), `STRANDLINE_SEED` repeats a run's choices, though not the scheduler's.

use std::{collections::BTreeMap, fmt, thread, time::Duration};

use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};
use strandline::task::clock;

use super::{
    failover::create,
    members::Cluster,
    network::{Network, inside},
};
use crate::{
    broker::Home,
    crash::{PARTITIONS, setting},
    crash_client::{TOPIC, Work},
    etcd::{Etcd, Place},
    patience::eventually,
    s3::S3,
};

const BROKERS: u32 = 3;
const MEMBERS: u8 = 3;

/// Longer than a lease lives.
const LONG: Duration = Duration::from_secs(9);

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Fault {
    Kill,
    Freeze,
    CutOff,
    DeafOneWay,
    MuteOneWay,
    CutFromEtcd,
    EtcdKilled,
    EtcdCutOff,
    DiskLost,
    BucketGone,
}

const FAULTS: [Fault; 10] = [
    Fault::Kill,
    Fault::Freeze,
    Fault::CutOff,
    Fault::DeafOneWay,
    Fault::MuteOneWay,
    Fault::CutFromEtcd,
    Fault::EtcdKilled,
    Fault::EtcdCutOff,
    Fault::DiskLost,
    Fault::BucketGone,
];

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Kill => "broker killed",
            Self::Freeze => "broker frozen for longer than its lease",
            Self::CutOff => "broker cut off from the other brokers and from etcd",
            Self::DeafOneWay => "nothing reaches a broker from another",
            Self::MuteOneWay => "nothing reaches another broker from it",
            Self::CutFromEtcd => "broker cut off from etcd",
            Self::EtcdKilled => "member of etcd killed",
            Self::EtcdCutOff => "member of etcd cut off",
            Self::DiskLost => "broker killed, its disk lost",
            Self::BucketGone => "bucket gone",
        })
    }
}

struct World {
    network: Network,
    s3: S3,
    cluster: Cluster,
}

fn broker_name(id: u32) -> String {
    format!("b{id}")
}

fn member_name(member: u8) -> String {
    format!("e{member}")
}

fn broker_ip(id: u32) -> std::net::Ipv4Addr {
    std::net::Ipv4Addr::new(10, 77, 0, u8::try_from(id).expect("few brokers"))
}

fn member_ip(member: u8) -> std::net::Ipv4Addr {
    std::net::Ipv4Addr::new(10, 77, 0, 100 + member)
}

impl World {
    fn make() -> Self {
        let network = Network::make();
        let s3 = S3::at(Network::HUB);
        let place = |member| {
            let ip = network.add(&member_name(member), 100 + member);
            Place { ip, namespace: Some(member_name(member)) }
        };
        let mut cluster = Cluster::over(Etcd::placed((0..MEMBERS).map(place).collect()));
        for id in 1..=BROKERS {
            let ip = network.add(&broker_name(id), u8::try_from(id).expect("few brokers"));
            let home = Home::member(id, &cluster.etcd).in_namespace(&broker_name(id), ip).object_store(&s3);
            // As a broker has it that nobody has told otherwise.
            cluster.add(id, home.setting("metadata.session_timeout", "\"6s\""));
        }
        cluster.ready();
        create(&cluster);
        Self { network, s3, cluster }
    }

    /// Cuts both directions between a broker and another machine, or mends them.
    fn part(&self, one: (&str, std::net::Ipv4Addr), other: (&str, std::net::Ipv4Addr), cut: bool) {
        if cut {
            self.network.cut(one.0, other.1);
            self.network.cut(other.0, one.1);
        } else {
            self.network.mend(one.0, other.1);
            self.network.mend(other.0, one.1);
        }
    }

    fn part_from_etcd(&self, id: u32, cut: bool) {
        for member in 0..MEMBERS {
            self.part((&broker_name(id), broker_ip(id)), (&member_name(member), member_ip(member)), cut);
        }
    }

    fn part_from_brokers(&self, id: u32, cut: bool) {
        for other in (1..=BROKERS).filter(|other| *other != id) {
            self.part((&broker_name(id), broker_ip(id)), (&broker_name(other), broker_ip(other)), cut);
        }
    }

    /// Begins a fault, waits as long as it lasts while `goes_on` says when clients are served again, and ends it. What clients waited.
    fn strike(&mut self, fault: Fault, rng: &mut StdRng, goes_on: &mut dyn FnMut() -> Duration) -> Duration {
        let broker = rng.random_range(1..=BROKERS);
        let other = broker % BROKERS + 1;
        let member = rng.random_range(0..MEMBERS);
        println!("chaos: {fault}: broker {broker}, the other {other}, member {member}");
        match fault {
            Fault::Kill | Fault::DiskLost => {
                self.cluster.kill(broker);
                let waited = goes_on();
                if fault == Fault::DiskLost {
                    self.cluster.wipe(broker);
                }
                self.cluster.restart(broker);
                waited
            }
            Fault::Freeze => {
                self.cluster.broker(broker).freeze(true);
                let waited = lasting(LONG, goes_on);
                self.cluster.broker(broker).freeze(false);
                waited
            }
            Fault::CutOff => {
                self.part_from_brokers(broker, true);
                self.part_from_etcd(broker, true);
                let waited = lasting(LONG, goes_on);
                self.part_from_brokers(broker, false);
                self.part_from_etcd(broker, false);
                waited
            }
            Fault::DeafOneWay | Fault::MuteOneWay => {
                let (from, to) = if fault == Fault::DeafOneWay { (other, broker) } else { (broker, other) };
                self.network.cut(&broker_name(from), broker_ip(to));
                let waited = lasting(LONG, goes_on);
                self.network.mend(&broker_name(from), broker_ip(to));
                waited
            }
            Fault::CutFromEtcd => {
                self.part_from_etcd(broker, true);
                let waited = lasting(LONG, goes_on);
                self.part_from_etcd(broker, false);
                waited
            }
            Fault::EtcdKilled => {
                self.cluster.etcd.kill(usize::from(member));
                let waited = lasting(LONG, goes_on);
                self.cluster.etcd.run(usize::from(member));
                waited
            }
            Fault::EtcdCutOff => {
                let cut = |world: &Self, cut| {
                    for to in (0..MEMBERS).filter(|to| *to != member) {
                        world.part((&member_name(member), member_ip(member)), (&member_name(to), member_ip(to)), cut);
                    }
                };
                cut(self, true);
                let waited = lasting(LONG, goes_on);
                cut(self, false);
                waited
            }
            Fault::BucketGone => {
                self.s3.faults().set_down(true);
                let waited = lasting(LONG, goes_on);
                self.s3.faults().set_down(false);
                waited
            }
        }
    }
}

/// Clients must be served again while the fault lasts, however long they take.
fn lasting(time: Duration, goes_on: &mut dyn FnMut() -> Duration) -> Duration {
    thread::sleep(time);
    goes_on()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_lost_doubled_or_turned_round_by_any_fault() {
    const NAME: &str = "cluster::chaos::nothing_is_lost_doubled_or_turned_round_by_any_fault";
    if !tokio::task::block_in_place(|| inside(NAME)) {
        return;
    }
    let seed = setting("STRANDLINE_SEED", clock::wall_ms().unsigned_abs());
    let time = Duration::from_secs(60 * setting("STRANDLINE_CHAOS_MINUTES", 2));
    println!("chaos: {time:?}, STRANDLINE_SEED={seed}");
    let only = std::env::var("STRANDLINE_CHAOS_ONLY").unwrap_or_default();
    let faults: Vec<Fault> = FAULTS.into_iter().filter(|fault| fault.to_string().contains(&only)).collect();
    assert!(!faults.is_empty(), "no fault is called {only:?}");
    let mut rng = StdRng::seed_from_u64(seed);
    let mut world = tokio::task::block_in_place(World::make);
    let work = Work::on_topic(&world.cluster.bootstrap(), world.cluster.addresses(), &mut rng).await;
    let mut waits: BTreeMap<Fault, Vec<Duration>> = BTreeMap::new();
    let (until, mut strikes) = (clock::monotonic() + time, 0);
    while clock::monotonic() < until {
        work.load.moment(&mut rng).await;
        let fault = faults[rng.random_range(0..faults.len())];
        let since = clock::monotonic();
        let mut goes_on = || {
            let logs = (0..PARTITIONS).map(|partition| (0, partition));
            let waited = logs.map(|log| eventually("clients go on", || work.load.longest_silence(log, since)));
            waited.max().unwrap_or_default()
        };
        let waited = tokio::task::block_in_place(|| {
            let waited = world.strike(fault, &mut rng, &mut goes_on);
            world.cluster.in_sync(TOPIC, BROKERS as usize);
            waited
        });
        println!("chaos: clients waited {waited:?}");
        waits.entry(fault).or_default().push(waited);
        strikes += 1;
    }
    for (fault, waits) in &mut waits {
        waits.sort_unstable();
        println!(
            "chaos: {fault}: {} times, median {:?}, longest {:?}",
            waits.len(),
            waits[waits.len() / 2],
            waits[waits.len() - 1]
        );
    }
    let total = work.finish(strikes).await;
    println!("chaos: {total} records delivered once across {strikes} faults");
}
