//! What goes wrong in a run, and for how long. Each kind of thing has its own misfortune, so several go wrong at the same time.

use std::time::Duration;

use strandline::{
    cluster::{Keys, MetaStore as _, PartitionValue, Value as _},
    task::{clock, random},
};
use tokio::time::Instant;

use crate::{
    machine::{Machine, Shared},
    meta::SimMeta,
    net::{Net, SILENCE},
};

/// The clients' place in the network.
pub(crate) const OUTSIDE: &str = "clients";

async fn pause(from_ms: u64, to_ms: u64) {
    tokio::time::sleep(Duration::from_millis(random::in_range(from_ms..to_ms))).await;
}

/// One machine's misfortunes until then: kills, power losses, stops, a full disk, a clock that jumps.
pub(crate) async fn of_machine(machine: &mut Machine, until: Instant, power: bool) {
    let calm_ms = if machine.alone { 1200 } else { 5000 };
    loop {
        pause(50, calm_ms).await;
        if clock::monotonic() >= until {
            return;
        }
        match random::in_range(0..8) {
            0..=3 if power => machine.kill(Some(random::bits())),
            0..=3 | 7 => machine.kill(None),
            4 => machine.stop().await,
            5 => {
                machine.note(format_args!("has a full disk"));
                machine.disk.set_capacity(Some(machine.disk_bytes() + random::in_range(0..20_000)));
                pause(1, 2000).await;
                machine.disk.set_capacity(None);
            }
            _ => machine.jump(random::in_range(-7_200_000..7_200_000)),
        }
        if !machine.is_running() {
            pause(1, calm_ms).await;
            if random::in_range(0..4) == 0 {
                // Its lease has ended by then, and what others had proposed has happened.
                pause(4000, 5000).await;
                // Where a kill alone takes a `replicated` replica's proof, a lost disk may be one loss too many.
                if power && is_spare(machine).await {
                    machine.wipe();
                }
            }
            machine.start().await;
        }
    }
}

/// Whether other brokers hold all that this one must hold.
async fn is_spare(machine: &Machine) -> bool {
    let keys = Keys::new("strandline").unwrap();
    let entries = machine.meta.truth().list(&format!("{}partitions/", keys.prefix())).await.unwrap().entries;
    entries.iter().all(|entry| {
        let value = PartitionValue::decode(&entry.key, &entry.value).unwrap();
        value.isr.iter().chain(&value.elr).any(|id| *id != machine.id)
    })
}

/// The network's misfortunes until then, between each two of these.
pub(crate) async fn of_network(shared: &Shared, names: &[String], until: Instant) {
    let net = &shared.net;
    loop {
        pause(100, 3000).await;
        if clock::monotonic() >= until {
            return;
        }
        let one = &names[random::in_range(0..names.len())];
        let other = &names[random::in_range(0..names.len())];
        match random::in_range(0..6) {
            0 => {
                shared.trace.note(format_args!("every link breaks"));
                net.reset();
            }
            1 => {
                let us = random::in_range(5_000..300_000);
                shared.trace.note(format_args!("from {one} to {other} it takes up to {us} us"));
                net.slow(one, other, us);
                pause(100, 3000).await;
                net.slow(one, other, 0);
            }
            2 => {
                shared.trace.note(format_args!("nothing goes from {one} to {other}"));
                cut(net, &[(one, other)]).await;
            }
            3 => {
                shared.trace.note(format_args!("nothing goes between {one} and {other}"));
                cut(net, &[(one, other), (other, one)]).await;
            }
            4 => {
                shared.trace.note(format_args!("{one} is cut off"));
                let others = names.iter().filter(|name| *name != one);
                let ways: Vec<_> = others.flat_map(|name| [(one, name), (name, one)]).collect();
                cut(net, &ways).await;
            }
            _ => {
                shared.trace.note(format_args!("the bucket fails"));
                shared.objects.fail(random::in_range(10..100));
                pause(100, 6000).await;
                shared.objects.fail(0);
            }
        }
    }
}

/// Cuts some ways for a while. Who hears nothing for too long gives the connection up.
async fn cut(net: &Net, ways: &[(&String, &String)]) {
    for (from, to) in ways {
        net.cut(from, to, true);
    }
    let lasts = Duration::from_millis(random::in_range(10..8000));
    tokio::time::sleep(lasts.min(SILENCE)).await;
    if lasts > SILENCE {
        for (from, to) in ways {
            net.give_up(from, to);
        }
        tokio::time::sleep(lasts - SILENCE).await;
    }
    for (from, to) in ways {
        net.cut(from, to, false);
    }
}

/// The metadata store's misfortunes until then, as each broker sees it.
pub(crate) async fn of_metadata(shared: &Shared, metas: &[SimMeta], until: Instant) {
    loop {
        pause(100, 4000).await;
        if clock::monotonic() >= until {
            return;
        }
        let one = random::in_range(0..metas.len());
        let meta = &metas[one];
        match random::in_range(0..6) {
            0 => {
                shared.trace.note(format_args!("broker {} loses the metadata store", one + 1));
                meta.cut(true);
                pause(10, 6000).await;
                meta.cut(false);
            }
            1 => {
                shared.trace.note(format_args!("the metadata store is away"));
                metas.iter().for_each(|meta| meta.cut(true));
                pause(10, 6000).await;
                metas.iter().for_each(|meta| meta.cut(false));
            }
            2 => {
                shared.trace.note(format_args!("transactions of broker {} go astray", one + 1));
                meta.fail(random::in_range(10..100));
                pause(100, 4000).await;
                meta.fail(0);
            }
            3 => {
                let us = random::in_range(10_000..2_000_000);
                shared.trace.note(format_args!("broker {} hears of changes up to {us} us late", one + 1));
                meta.lag(us);
                pause(100, 5000).await;
                meta.lag(0);
            }
            4 => {
                shared.trace.note(format_args!("broker {} must list the metadata again", one + 1));
                meta.compact();
            }
            _ => {
                shared.trace.note(format_args!("the lease of broker {} ends", one + 1));
                meta.end_lease().await;
            }
        }
    }
}
