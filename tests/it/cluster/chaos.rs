//! Random faults on brokers and etcd members on machines of their own, with an object store over the network. Acknowledged records are
//! kept, once and in order. The test prints how long clients waited after each kind of fault.
//!
//! `STRANDLINE_CHAOS_MINUTES` is the duration (`make chaos MINUTES=N`). `STRANDLINE_CHAOS_ONLY` selects faults by parts of their names
//! (`ONLY="broker killed, etcd cut off"`). `STRANDLINE_SEED` repeats the choices of a run, but not the scheduler's.

use std::{collections::BTreeMap, fmt, thread, time::Duration};

use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};
use strandline::task::clock;

use super::{
    failover::create_with,
    machines::{BROKERS, MEMBERS, Machines, broker_ip, broker_name},
    network::inside,
};
use crate::{
    crash::{PARTITIONS, setting},
    crash_client::{TOPIC, Work},
    test_timeout::eventually,
};

/// Duration of a fault, longer than a lease.
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
    BucketAils,
}

const FAULTS: [Fault; 11] = [
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
    Fault::BucketAils,
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
            Self::BucketAils => "bucket fails, stalls or loses answers",
        })
    }
}

/// Starts a fault, waits while the fault lasts, and ends it. `goes_on` waits until clients are served again. Returns how long clients
/// waited.
fn strike(on: &mut Machines, fault: Fault, rng: &mut StdRng, goes_on: &mut dyn FnMut() -> Duration) -> Duration {
    let broker = rng.random_range(1..=BROKERS);
    let other = broker % BROKERS + 1;
    let member = rng.random_range(0..MEMBERS);
    println!("chaos: {fault}: broker {broker}, the other {other}, member {member}");
    match fault {
        Fault::Kill | Fault::DiskLost => {
            on.cluster.kill(broker);
            let waited = goes_on();
            if fault == Fault::DiskLost {
                on.cluster.wipe(broker);
            }
            on.cluster.restart(broker);
            waited
        }
        Fault::Freeze => {
            on.cluster.broker(broker).freeze(true);
            let waited = lasting(LONG, goes_on);
            on.cluster.broker(broker).freeze(false);
            waited
        }
        Fault::CutOff => {
            on.part_from_brokers(broker, true);
            on.part_from_etcd(broker, true);
            let waited = lasting(LONG, goes_on);
            on.part_from_brokers(broker, false);
            on.part_from_etcd(broker, false);
            waited
        }
        Fault::DeafOneWay | Fault::MuteOneWay => {
            let (from, to) = if fault == Fault::DeafOneWay { (other, broker) } else { (broker, other) };
            on.network.cut(&broker_name(from), broker_ip(to));
            let waited = lasting(LONG, goes_on);
            on.network.mend(&broker_name(from), broker_ip(to));
            waited
        }
        Fault::CutFromEtcd => {
            on.part_from_etcd(broker, true);
            let waited = lasting(LONG, goes_on);
            on.part_from_etcd(broker, false);
            waited
        }
        Fault::EtcdKilled => {
            on.cluster.etcd.kill(usize::from(member));
            let waited = lasting(LONG, goes_on);
            on.cluster.etcd.run(usize::from(member));
            waited
        }
        Fault::EtcdCutOff => {
            on.part_member(member, true);
            let waited = lasting(LONG, goes_on);
            on.part_member(member, false);
            waited
        }
        Fault::BucketGone => {
            on.s3.faults().set_down(true);
            let waited = lasting(LONG, goes_on);
            on.s3.faults().set_down(false);
            waited
        }
        Fault::BucketAils => {
            on.s3.faults().set_ailing(true);
            let waited = lasting(LONG, goes_on);
            on.s3.faults().set_ailing(false);
            waited
        }
    }
}

/// Lets the fault last for `time`. Clients must then be served again while the fault still lasts, however long they take.
fn lasting(time: Duration, goes_on: &mut dyn FnMut() -> Duration) -> Duration {
    thread::sleep(time);
    goes_on()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn random_faults_lose_duplicate_or_reorder_no_records() {
    const NAME: &str = "cluster::chaos::random_faults_lose_duplicate_or_reorder_no_records";
    if !tokio::task::block_in_place(|| inside(NAME)) {
        return;
    }
    let seed = setting("STRANDLINE_SEED", clock::wall_ms().unsigned_abs());
    let time = Duration::from_secs(60 * setting("STRANDLINE_CHAOS_MINUTES", 2));
    println!("chaos: {time:?}, STRANDLINE_SEED={seed}");
    let only = std::env::var("STRANDLINE_CHAOS_ONLY").unwrap_or_default();
    let wanted = |fault: &Fault| only.split(',').any(|words| fault.to_string().contains(words.trim()));
    let faults: Vec<Fault> = FAULTS.into_iter().filter(wanted).collect();
    assert!(!faults.is_empty(), "no fault is called {only:?}");
    let mut rng = StdRng::seed_from_u64(seed);
    let mut machines = tokio::task::block_in_place(|| {
        let machines = Machines::make();
        // The segments are so large that uploads keep up with the load for hours. A broker with a lost disk copies all records that are not
        // in the object store.
        create_with(&machines.cluster, 1 << 20, 2000);
        machines
    });
    let work = Work::on_topic(&machines.cluster.bootstrap(), machines.cluster.addresses(), &mut rng).await;
    let mut waits: BTreeMap<Fault, Vec<Duration>> = BTreeMap::new();
    let (until, mut strikes) = (clock::monotonic() + time, 0);
    let mut left = Vec::new();
    while clock::monotonic() < until {
        work.load.moment(&mut rng).await;
        // Each fault happens once before any happens again, so that a short run covers all faults.
        if left.is_empty() {
            left.clone_from(&faults);
        }
        let fault = left.swap_remove(rng.random_range(0..left.len()));
        let since = clock::monotonic();
        let mut goes_on = || {
            let logs = (0..PARTITIONS).map(|partition| (0, partition));
            let waited = logs.map(|log| eventually("clients go on", || work.load.longest_silence(log, since)));
            waited.max().unwrap_or_default()
        };
        let waited = tokio::task::block_in_place(|| {
            let waited = strike(&mut machines, fault, &mut rng, &mut goes_on);
            machines.cluster.in_sync(TOPIC, BROKERS as usize);
            waited
        });
        println!("chaos: clients waited {waited:?}");
        waits.entry(fault).or_default().push(waited);
        strikes += 1;
    }
    for (fault, waits) in &mut waits {
        waits.sort_unstable();
        let at = |percent: usize| waits[(waits.len() * percent / 100).min(waits.len() - 1)];
        println!(
            "chaos: {fault}: {} times, 10 % {:?}, median {:?}, 90 % {:?}, longest {:?}",
            waits.len(),
            at(10),
            at(50),
            at(90),
            at(100)
        );
    }
    let total = work.finish(strikes).await;
    println!("chaos: {total} records delivered once across {strikes} faults");
}
