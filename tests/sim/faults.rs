//! Faults of a run and their durations. Each kind of component has its own loop of faults, so faults overlap.
//!
//! Most runs mix all faults. Some errors need one kind of fault repeatedly, at the right moment, and no other faults.
//! So about one run in four of several brokers has another [`FaultProfile`] than `All`.

use std::{sync::Arc, time::Duration};

use strandline::{
    cluster::{Compare, KeyValue, Keys, MetaStore as _, PartitionValue, Transaction, Value as _},
    task::{clock, random},
};
use tokio::{
    sync::{Mutex, OwnedMutexGuard},
    time::Instant,
};

use crate::{
    disks,
    machine::{Machine, Shared},
    meta::SimMeta,
    net::{KEEPALIVE_TIMEOUT, Net},
    run::Topology,
};

/// Network name of the clients.
pub(crate) const OUTSIDE: &str = "clients";

/// Fault profile of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FaultProfile {
    /// All faults, at random times.
    All,
    /// Leases of leaders end, and leadership moves between running brokers. One broker receives metadata changes late
    /// and its links to peers are slow. A replaced leader may lead again before the acknowledgements of its first epoch
    /// arrive.
    Leases,
    /// One broker is killed, restarts, and is killed again while a leader admits it. Meanwhile transactions of all
    /// brokers are lost or late.
    Admissions,
    /// All faults, but one machine at a time loses power: the other replicas hold the records that its page cache lost.
    OneDown,
}

/// Faults of one run.
pub(crate) struct FaultPlan {
    until: Instant,
    theme: FaultProfile,
    /// Number of the broker that [`FaultProfile::Admissions`] kills.
    victim: u32,
    /// True if acknowledged records survive a power loss on any machine at any time.
    power: bool,
    /// Lock of [`FaultProfile::OneDown`], held for a machine that is down or may lose its lease until every replica is
    /// in sync again. While the lock is held, that machine may lose power, because no other machine has a fault by
    /// which its replicas fail their startup verification or leave the ISR.
    down: Option<Arc<Mutex<()>>>,
    /// Held from the check that a disk is not needed until its broker has started without the data. Otherwise two disks
    /// could be replaced at a time, each because the other one holds the records.
    replacing: Mutex<()>,
}

impl FaultPlan {
    /// Draws the faults of a run that starts now.
    pub(crate) fn draw(shape: Topology, power: bool) -> Self {
        let drawn = match random::in_range(0..8) {
            _ if shape.brokers == 1 => FaultProfile::All,
            0 => FaultProfile::Leases,
            1 => FaultProfile::Admissions,
            2 if !power => FaultProfile::OneDown,
            _ => FaultProfile::All,
        };
        let theme = shape.theme.unwrap_or(drawn);
        Self {
            until: clock::monotonic() + shape.fault_duration,
            theme,
            victim: random::in_range(1..=shape.brokers),
            power,
            down: (theme == FaultProfile::OneDown).then(Arc::default),
            replacing: Mutex::default(),
        }
    }

    /// Returns true if the fault phase is over.
    pub(crate) fn is_over(&self) -> bool {
        clock::monotonic() >= self.until
    }

    /// Waits until no other machine is down and every replica is in sync, or the fault phase is over. Returns the guard
    /// with which this machine may go down. Returns `None` at once unless the profile is [`FaultProfile::OneDown`].
    async fn alone_down(&self, meta: &SimMeta) -> Option<OwnedMutexGuard<()>> {
        let alone = Arc::clone(self.down.as_ref()?).lock_owned().await;
        wait_until_in_sync(meta, self).await;
        Some(alone)
    }
}

pub(crate) async fn pause(from_ms: u64, to_ms: u64) {
    tokio::time::sleep(Duration::from_millis(random::in_range(from_ms..to_ms))).await;
}

/// Injects the faults of one machine that the fault profile has.
pub(crate) async fn inject_on_machine(machine: &mut Machine, plan: &FaultPlan) {
    match plan.theme {
        FaultProfile::All | FaultProfile::OneDown => inject_all_on_machine(machine, plan).await,
        FaultProfile::Admissions if machine.id.0 == plan.victim => kill_during_admission(machine, plan).await,
        FaultProfile::Admissions | FaultProfile::Leases => {}
    }
}

/// Injects kills, power losses, stops, a full disk, slow syncs, failing syncs and clock jumps.
async fn inject_all_on_machine(machine: &mut Machine, plan: &FaultPlan) {
    let calm_ms = if machine.standalone { 1200 } else { 5000 };
    loop {
        pause(50, calm_ms).await;
        if plan.is_over() {
            return;
        }
        let kind = random::in_range(0..10);
        let falls = matches!(kind, 0..=4 | 7 | 9);
        let alone_down = if falls { plan.alone_down(&machine.meta).await } else { None };
        // The wait may have ended because the fault phase was over, before every replica was in sync.
        if alone_down.is_some() && plan.is_over() {
            return;
        }
        match kind {
            0..=3 if plan.power || alone_down.is_some() => machine.kill(Some(random::bits())),
            0..=3 | 7 => machine.kill(None),
            4 => machine.stop().await,
            5 => {
                machine.record(format_args!("has a full disk"));
                machine.disk.set_capacity(Some(machine.disk_bytes() + random::in_range(0..20_000)));
                pause(1, 2000).await;
                machine.disk.set_capacity(None);
            }
            8 => disks::slow_down(machine).await,
            9 => disks::fail_syncs_until_stop(machine, plan.power || alone_down.is_some(), calm_ms).await,
            _ => machine.set_clock_offset(random::in_range(-7_200_000..7_200_000)),
        }
        if !machine.is_running() {
            pause(1, calm_ms).await;
            let mut replaces = None;
            if random::in_range(0..4) == 0 {
                // After this pause, the broker's lease has expired, and the pending proposals of its peers are
                // completed.
                pause(4000, 5000).await;
                // A disk is replaced only in runs with `power`. In other runs, a kill alone makes the startup
                // verification of a `replicated` replica fail. So the additional loss of a disk could lose committed
                // records.
                let only = plan.replacing.lock().await;
                if plan.power && is_spare(machine).await {
                    machine.wipe();
                    replaces = Some(only);
                }
            }
            machine.start().await;
            drop(replaces);
        }
        if alone_down.is_some() {
            wait_until_in_sync(&machine.meta, plan).await;
        }
    }
}

/// Kills the broker for long enough that its peers may remove it from the ISR, and restarts it. Then kills it when its
/// leaders may be about to admit it to the ISR, and restarts it at once.
async fn kill_during_admission(machine: &mut Machine, plan: &FaultPlan) {
    loop {
        pause(100, 1500).await;
        if plan.is_over() {
            return;
        }
        machine.kill(None);
        pause(300, 1500).await;
        machine.start().await;
        pause(0, 200).await;
        machine.kill(None);
        pause(0, 20).await;
        machine.start().await;
    }
}

/// Returns all partition values in the metadata store, read without the faults of the link.
pub(crate) async fn partition_values(meta: &SimMeta) -> Vec<PartitionValue> {
    let keys = Keys::new("strandline").unwrap();
    let entries = meta.direct_store().list(&format!("{}partitions/", keys.prefix())).await.unwrap().entries;
    entries.iter().map(|entry| PartitionValue::decode(&entry.key, &entry.value).unwrap()).collect()
}

/// Waits until every replica is in sync, or the fault phase is over.
async fn wait_until_in_sync(meta: &SimMeta, plan: &FaultPlan) {
    let whole = |value: &PartitionValue| value.isr.len() == value.replicas.len() && value.leader.is_some();
    while !plan.is_over() && !partition_values(meta).await.iter().all(whole) {
        pause(20, 100).await;
    }
}

/// Returns true if the machine's disk is not needed: every partition has a member of ISR or ELR besides this broker.
async fn is_spare(machine: &Machine) -> bool {
    let spared = |value: &PartitionValue| value.isr.iter().chain(&value.elr).any(|id| *id != machine.id);
    partition_values(&machine.meta).await.iter().all(spared)
}

/// Injects faults of the links between the named machines, and of the object store, unless the fault profile has none.
pub(crate) async fn inject_on_network(shared: &Shared, names: &[String], plan: &FaultPlan) {
    if matches!(plan.theme, FaultProfile::Leases | FaultProfile::Admissions) {
        return;
    }
    let net = &shared.net;
    loop {
        pause(100, 3000).await;
        if plan.is_over() {
            return;
        }
        let one = &names[random::in_range(0..names.len())];
        let other = &names[random::in_range(0..names.len())];
        match random::in_range(0..6) {
            0 => {
                shared.trace.record(format_args!("all links break"));
                net.reset();
            }
            1 => {
                let us = random::in_range(5_000..300_000);
                shared.trace.record(format_args!("delays of up to {us} us from {one} to {other}"));
                net.slow(one, other, us);
                pause(100, 3000).await;
                net.slow(one, other, 0);
            }
            2 => {
                shared.trace.record(format_args!("no frames from {one} to {other}"));
                cut_for_a_while(net, &[(one, other)]).await;
            }
            3 => {
                shared.trace.record(format_args!("no frames between {one} and {other}"));
                cut_for_a_while(net, &[(one, other), (other, one)]).await;
            }
            4 => {
                shared.trace.record(format_args!("{one} is isolated"));
                let others = names.iter().filter(|name| *name != one);
                let ways: Vec<_> = others.flat_map(|name| [(one, name), (name, one)]).collect();
                cut_for_a_while(net, &ways).await;
            }
            _ => {
                shared.trace.record(format_args!("the object store fails"));
                shared.objects.fail(random::in_range(10..100));
                pause(100, 6000).await;
                shared.objects.fail(0);
            }
        }
    }
}

/// Blocks these directions between machines for a random time. After [`KEEPALIVE_TIMEOUT`], the connections between the
/// two machines of each direction time out.
async fn cut_for_a_while(net: &Net, ways: &[(&String, &String)]) {
    for (from, to) in ways {
        net.cut(from, to, true);
    }
    let lasts = Duration::from_millis(random::in_range(10..8000));
    tokio::time::sleep(lasts.min(KEEPALIVE_TIMEOUT)).await;
    if lasts > KEEPALIVE_TIMEOUT {
        for (from, to) in ways {
            net.time_out_connections(from, to);
        }
        tokio::time::sleep(lasts - KEEPALIVE_TIMEOUT).await;
    }
    for (from, to) in ways {
        net.cut(from, to, false);
    }
}

/// Injects the faults of the brokers' links to the metadata store, and of leases, that the fault profile has.
pub(crate) async fn inject_on_metadata(shared: &Shared, metas: &[SimMeta], plan: &FaultPlan) {
    match plan.theme {
        FaultProfile::All | FaultProfile::OneDown => inject_all_on_metadata(shared, metas, plan).await,
        FaultProfile::Leases => end_leases(shared, metas, plan).await,
        FaultProfile::Admissions => fail_transactions(metas, plan).await,
    }
}

/// Makes most transactions of all brokers fail for short periods: requests or responses are lost, or requests are late.
async fn fail_transactions(metas: &[SimMeta], plan: &FaultPlan) {
    while !plan.is_over() {
        pause(10, 800).await;
        metas.iter().for_each(|meta| meta.fail(90));
        pause(50, 500).await;
        metas.iter().for_each(|meta| meta.fail(0));
    }
}

/// Repeatedly chooses a broker that receives metadata changes late and sends frames to its peers late. Meanwhile other
/// leaders lose their leases, or leadership moves, one after the other.
async fn end_leases(shared: &Shared, metas: &[SimMeta], plan: &FaultPlan) {
    while !plan.is_over() {
        let late = random::in_range(0..metas.len());
        let name = |number: usize| format!("b{}:9460", number + 1);
        shared.trace.record(format_args!("broker {} is late, and leases end", late + 1));
        let slow = |us: u64| {
            for other in (0..metas.len()).filter(|other| *other != late) {
                shared.net.slow(&name(late), &name(other), us);
            }
        };
        metas[late].lag(2_000_000);
        slow(random::in_range(50_000..1_000_000));
        for _ in 0..random::in_range(2..8) {
            pause(10, 200).await;
            if random::in_range(0..2) == 0 {
                move_leadership(&metas[late]).await;
                continue;
            }
            let leaders = partition_values(&metas[late]).await.into_iter().filter_map(|value| value.leader);
            let leaders: Vec<_> =
                leaders.map(|id| usize::try_from(id.0 - 1).unwrap()).filter(|id| *id != late).collect();
            if !leaders.is_empty() {
                metas[leaders[random::in_range(0..leaders.len())]].end_lease().await;
            }
        }
        pause(10, 1500).await;
        metas[late].lag(0);
        slow(0);
        pause(100, 1500).await;
    }
}

/// Elects another ISR member of a random partition, as the controller may at any time. Does nothing if there is no
/// other member.
async fn move_leadership(meta: &SimMeta) {
    let (store, keys) = (meta.direct_store(), Keys::new("strandline").unwrap());
    let mut entries = store.list(&format!("{}partitions/", keys.prefix())).await.unwrap().entries;
    let KeyValue { key, value, mod_revision, .. } = entries.swap_remove(random::in_range(0..entries.len()));
    let value = PartitionValue::decode(&key, &value).unwrap();
    let others: Vec<_> = value.isr.iter().filter(|id| Some(**id) != value.leader).copied().collect();
    if others.is_empty() {
        return;
    }
    if let Some(moved) = value.elect(others[random::in_range(0..others.len())], |_| true, usize::MAX) {
        let compared = Transaction::new().when(Compare::ModRevision(key.clone(), mod_revision));
        store.transact(compared.put(key, moved.encode())).await.unwrap();
    }
}

/// Injects random faults of the links to the metadata store, and ends leases, until the fault phase is over.
async fn inject_all_on_metadata(shared: &Shared, metas: &[SimMeta], plan: &FaultPlan) {
    loop {
        pause(100, 4000).await;
        if plan.is_over() {
            return;
        }
        let one = random::in_range(0..metas.len());
        let meta = &metas[one];
        let kind = random::in_range(0..6);
        let ends_leases = matches!(kind, 0 | 1 | 5);
        let alone_down = if ends_leases { plan.alone_down(meta).await } else { None };
        if alone_down.is_some() && plan.is_over() {
            return;
        }
        match kind {
            0 => {
                shared.trace.record(format_args!("broker {} loses the metadata store", one + 1));
                meta.cut(true);
                pause(10, 6000).await;
                meta.cut(false);
            }
            1 => {
                shared.trace.record(format_args!("the metadata store is unavailable"));
                metas.iter().for_each(|meta| meta.cut(true));
                pause(10, 6000).await;
                metas.iter().for_each(|meta| meta.cut(false));
            }
            2 => {
                shared.trace.record(format_args!("transactions of broker {} fail", one + 1));
                meta.fail(random::in_range(10..100));
                pause(100, 4000).await;
                meta.fail(0);
            }
            3 => {
                let us = random::in_range(10_000..2_000_000);
                shared.trace.record(format_args!("broker {} receives changes up to {us} us late", one + 1));
                meta.lag(us);
                pause(100, 5000).await;
                meta.lag(0);
            }
            4 => {
                shared.trace.record(format_args!("broker {} must relist the metadata", one + 1));
                meta.compact();
            }
            _ => {
                shared.trace.record(format_args!("the lease of broker {} ends", one + 1));
                meta.end_lease().await;
            }
        }
        if alone_down.is_some() {
            // After this pause, the controller has received the change.
            pause(500, 1000).await;
            wait_until_in_sync(meta, plan).await;
        }
    }
}
