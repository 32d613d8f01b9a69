//! Random faults on brokers and etcd members, each on a simulated machine of its own, and on an object store.
//! Acknowledged records are kept, once and in order. The test prints how long clients waited after each kind of fault.
//!
//! `STRANDLINE_CHAOS_MINUTES` is the duration (`make chaos MINUTES=N`). `STRANDLINE_CHAOS_ONLY` selects faults by parts
//! of their names (`ONLY="broker killed, etcd member isolated"`). `STRANDLINE_SEED` repeats the choices of a run, but
//! not the scheduler's.

use std::{collections::BTreeMap, fmt, thread, time::Duration};

use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};
use strandline::task::clock;

use super::{
    failover::create_with,
    machines::{BROKERS, MEMBERS, Machines, broker_ip, broker_name},
    network::run_inside,
};
use crate::{
    crash::{PARTITIONS, setting},
    crash_client::{ClientLoad, TOPIC},
    test_timeout::eventually,
};

/// Minimum duration of every fault that does not kill a broker. Longer than a lease.
const FAULT_INTERVAL: Duration = Duration::from_secs(9);

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum InjectedFault {
    Kill,
    Freeze,
    Isolated,
    ReceiveCut,
    SendCut,
    IsolatedFromEtcd,
    EtcdKilled,
    EtcdIsolated,
    DiskLost,
    ObjectStoreDown,
    ObjectStoreUnreliable,
}

const FAULTS: [InjectedFault; 11] = [
    InjectedFault::Kill,
    InjectedFault::Freeze,
    InjectedFault::Isolated,
    InjectedFault::ReceiveCut,
    InjectedFault::SendCut,
    InjectedFault::IsolatedFromEtcd,
    InjectedFault::EtcdKilled,
    InjectedFault::EtcdIsolated,
    InjectedFault::DiskLost,
    InjectedFault::ObjectStoreDown,
    InjectedFault::ObjectStoreUnreliable,
];

impl fmt::Display for InjectedFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Kill => "broker killed",
            Self::Freeze => "broker frozen for longer than its lease",
            Self::Isolated => "broker isolated from the other brokers and from etcd",
            Self::ReceiveCut => "broker receives no packets from another broker",
            Self::SendCut => "broker sends no packets to another broker",
            Self::IsolatedFromEtcd => "broker isolated from etcd",
            Self::EtcdKilled => "etcd member killed",
            Self::EtcdIsolated => "etcd member isolated",
            Self::DiskLost => "broker killed, its disk lost",
            Self::ObjectStoreDown => "object store down",
            Self::ObjectStoreUnreliable => "object store fails, stalls or loses responses",
        })
    }
}

/// Starts a fault at a random broker or etcd member, or at the object store. Waits until clients are served again while
/// the fault lasts, and ends the fault. `wait_for_clients` waits until clients are served and returns how long they
/// waited, which is also the result.
fn inject(
    on: &mut Machines,
    fault: InjectedFault,
    rng: &mut StdRng,
    wait_for_clients: &mut dyn FnMut() -> Duration,
) -> Duration {
    let broker = rng.random_range(1..=BROKERS);
    let other = broker % BROKERS + 1;
    let member = rng.random_range(0..MEMBERS);
    println!("chaos: {fault}: broker {broker}, other broker {other}, etcd member {member}");
    match fault {
        InjectedFault::Kill | InjectedFault::DiskLost => {
            on.cluster.kill(broker);
            let waited = wait_for_clients();
            if fault == InjectedFault::DiskLost {
                on.cluster.wipe(broker);
            }
            on.cluster.restart(broker);
            waited
        }
        InjectedFault::Freeze => {
            on.cluster.broker(broker).freeze(true);
            let waited = wait_during_fault(FAULT_INTERVAL, wait_for_clients);
            on.cluster.broker(broker).freeze(false);
            waited
        }
        InjectedFault::Isolated => {
            on.part_from_brokers(broker, true);
            on.part_from_etcd(broker, true);
            let waited = wait_during_fault(FAULT_INTERVAL, wait_for_clients);
            on.part_from_brokers(broker, false);
            on.part_from_etcd(broker, false);
            waited
        }
        InjectedFault::ReceiveCut | InjectedFault::SendCut => {
            let (from, to) = if fault == InjectedFault::ReceiveCut { (other, broker) } else { (broker, other) };
            on.network.cut(&broker_name(from), broker_ip(to));
            let waited = wait_during_fault(FAULT_INTERVAL, wait_for_clients);
            on.network.mend(&broker_name(from), broker_ip(to));
            waited
        }
        InjectedFault::IsolatedFromEtcd => {
            on.part_from_etcd(broker, true);
            let waited = wait_during_fault(FAULT_INTERVAL, wait_for_clients);
            on.part_from_etcd(broker, false);
            waited
        }
        InjectedFault::EtcdKilled => {
            on.cluster.etcd.kill(usize::from(member));
            let waited = wait_during_fault(FAULT_INTERVAL, wait_for_clients);
            on.cluster.etcd.run(usize::from(member));
            waited
        }
        InjectedFault::EtcdIsolated => {
            on.part_member(member, true);
            let waited = wait_during_fault(FAULT_INTERVAL, wait_for_clients);
            on.part_member(member, false);
            waited
        }
        InjectedFault::ObjectStoreDown => {
            on.s3.faults().set_down(true);
            let waited = wait_during_fault(FAULT_INTERVAL, wait_for_clients);
            on.s3.faults().set_down(false);
            waited
        }
        InjectedFault::ObjectStoreUnreliable => {
            on.s3.faults().set_unreliable(true);
            let waited = wait_during_fault(FAULT_INTERVAL, wait_for_clients);
            on.s3.faults().set_unreliable(false);
            waited
        }
    }
}

/// Lets a fault last for `time`, and longer until clients are served again. Returns how long they waited.
fn wait_during_fault(time: Duration, wait_for_clients: &mut dyn FnMut() -> Duration) -> Duration {
    thread::sleep(time);
    wait_for_clients()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn random_faults_lose_duplicate_or_reorder_no_records() {
    const NAME: &str = "cluster::chaos::random_faults_lose_duplicate_or_reorder_no_records";
    if !tokio::task::block_in_place(|| run_inside(NAME)) {
        return;
    }
    let seed = setting("STRANDLINE_SEED", clock::wall_ms().unsigned_abs());
    let time = Duration::from_secs(60 * setting("STRANDLINE_CHAOS_MINUTES", 2));
    println!("chaos: {time:?}, STRANDLINE_SEED={seed}");
    let only = std::env::var("STRANDLINE_CHAOS_ONLY").unwrap_or_default();
    let wanted = |fault: &InjectedFault| only.split(',').any(|words| fault.to_string().contains(words.trim()));
    let faults: Vec<InjectedFault> = FAULTS.into_iter().filter(wanted).collect();
    assert!(!faults.is_empty(), "no fault is called {only:?}");
    let mut rng = StdRng::seed_from_u64(seed);
    let mut machines = tokio::task::block_in_place(|| {
        let machines = Machines::make();
        // Segments of 1 MiB, so large that uploads keep up with the load for hours. A broker with a lost disk copies
        // all records that are not in the object store.
        create_with(&machines.cluster, 1 << 20, 2000);
        machines
    });
    let work = ClientLoad::on_topic(&machines.cluster.bootstrap(), machines.cluster.addresses(), &mut rng).await;
    let mut waits: BTreeMap<InjectedFault, Vec<Duration>> = BTreeMap::new();
    let (until, mut fault_count) = (clock::monotonic() + time, 0);
    let mut remaining_faults = Vec::new();
    while clock::monotonic() < until {
        work.load.wait_for_random_progress(&mut rng).await;
        // Each kind of fault happens once before any happens again, so that a short run covers all kinds.
        if remaining_faults.is_empty() {
            remaining_faults.clone_from(&faults);
        }
        let fault = remaining_faults.swap_remove(rng.random_range(0..remaining_faults.len()));
        let since = clock::monotonic();
        let mut wait_for_clients = || {
            let logs = (0..PARTITIONS).map(|partition| (0, partition));
            let waited = logs.map(|log| eventually("clients continue", || work.load.longest_silence(log, since)));
            waited.max().unwrap_or_default()
        };
        let waited = tokio::task::block_in_place(|| {
            let waited = inject(&mut machines, fault, &mut rng, &mut wait_for_clients);
            machines.cluster.wait_until_in_sync(TOPIC, BROKERS as usize);
            waited
        });
        println!("chaos: clients waited {waited:?}");
        waits.entry(fault).or_default().push(waited);
        fault_count += 1;
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
    let total = work.finish(fault_count).await;
    println!("chaos: {total} records delivered once across {fault_count} faults");
}
