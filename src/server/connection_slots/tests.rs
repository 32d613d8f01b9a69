//! Admission and eviction of connections.

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;

fn from(number: u8) -> Origin {
    Origin::of(IpAddr::from([10, 0, 0, number]), Some(IpAddr::from([10, 0, 0, 254])))
}

fn loopback() -> Origin {
    Origin::of(IpAddr::from([127, 0, 0, 1]), None)
}

#[test]
fn longest_idle_connection_is_evicted() {
    let mut slots = ConnectionSlots::new(3, 3, usize::MAX);
    let ids = ["a", "b", "c"].map(|name| slots.admit(from(1), name).id);
    // `a` became idle after `c`, and `b` has an open call.
    slots.begin_call(ids[0]);
    slots.end_call(ids[0]);
    slots.begin_call(ids[1]);
    let first = slots.admit(from(2), "d");
    assert_eq!((first.evicted, first.pool, first.bound), (Some("c"), Pool::Common, None));
    assert_eq!(slots.admit(from(2), "e").evicted, Some("a"));
    assert_eq!(slots.connections.len(), 3);
}

#[test]
fn connection_with_open_call_is_not_evicted() {
    let mut slots = ConnectionSlots::new(4, 2, usize::MAX);
    for number in [1, 1, 2, 2] {
        let id = slots.admit(from(number), number).id;
        // One of two calls ends; the other stays open.
        slots.begin_call(id);
        slots.begin_call(id);
        slots.end_call(id);
    }
    let third = slots.admit(from(1), 1);
    assert_eq!((third.bound, third.pool, third.evicted), (Some(SlotLimit::Address), Pool::Probe, None));
    let other = slots.admit(from(3), 3);
    assert_eq!((other.bound, other.pool, other.evicted), (Some(SlotLimit::Connections), Pool::Probe, None));
    assert_eq!(slots.promote(other.id), Err(SlotLimit::Connections), "all slots are in use");
}

/// An address at its limit evicts an idle connection of its own. Otherwise it could evict those of all other addresses.
#[test]
fn address_at_its_limit_evicts_own_connection() {
    let mut slots = ConnectionSlots::new(10, 2, usize::MAX);
    let honest = slots.admit(from(9), 9).id;
    for n in 0..50 {
        let admitted = slots.admit(from(1), 1);
        assert_eq!((admitted.pool, admitted.evicted), (Pool::Common, (n >= 2).then_some(1)));
    }
    assert_eq!(slots.remove(honest), Some(9));
}

#[test]
fn loopback_has_eight_additional_slots() {
    let mut slots = ConnectionSlots::new(4, 2, usize::MAX);
    let busy = |slots: &mut ConnectionSlots<u32>, origin| {
        let admitted = slots.admit(origin, 0);
        slots.begin_call(admitted.id);
        admitted
    };
    for _ in 0..2 {
        assert_eq!(busy(&mut slots, loopback()).pool, Pool::Common);
    }
    for _ in 0..LOOPBACK_SLOTS {
        let admitted = busy(&mut slots, loopback());
        assert_eq!((admitted.pool, admitted.bound), (Pool::Loopback, Some(SlotLimit::Address)));
    }
    let ninth = slots.admit(loopback(), 7);
    assert_eq!(ninth.pool, Pool::Probe);
    // Once one of the eight connections of the loopback pool is idle, it is evicted for the next connection.
    let idle = slots.connections.iter().find(|(_, occupant)| occupant.pool == Pool::Loopback).map(|(id, _)| *id);
    slots.end_call(idle.expect("one of eight"));
    let tenth = slots.admit(loopback(), 8);
    assert_eq!((tenth.pool, tenth.evicted), (Pool::Loopback, Some(0)));
}

/// Regression: new connections of an attacker evicted a probe before its request had arrived.
#[test]
fn connection_flood_does_not_evict_probes() {
    // Number of attacking addresses, and the addresses of the probes that arrive meanwhile.
    for (attackers, probers) in [(1_u8, &[2, 2][..]), (2, &[2]), (2, &[2, 3]), (1, &[2, 3, 4])] {
        let mut slots = ConnectionSlots::new(1, 1, usize::MAX);
        let holder = slots.admit(from(1), 0).id;
        slots.begin_call(holder);
        let attack = |slots: &mut ConnectionSlots<u32>, round: u8| slots.admit(from(10 + round % attackers), 0);
        for round in 0..50 {
            attack(&mut slots, round);
        }
        let probes: Vec<u64> = probers.iter().map(|address| slots.admit(from(*address), 7).id).collect();
        for round in 0..200 {
            let admitted = attack(&mut slots, round);
            assert_eq!((admitted.pool, admitted.evicted), (Pool::Probe, Some(0)), "{attackers}, {probers:?}: {round}");
        }
        assert!(probes.iter().all(|probe| slots.remove(*probe) == Some(7)), "{attackers}, {probers:?}");
    }
}

/// In the probe pool, the oldest connection is evicted even if it has an open call. Otherwise open calls of an attacker
/// would keep probes out.
#[test]
fn oldest_probe_is_evicted_despite_open_call() {
    let mut slots = ConnectionSlots::new(1, 1, usize::MAX);
    let holder = slots.admit(from(1), 0).id;
    slots.begin_call(holder);
    let mut last = None;
    for n in 1..=20 {
        let admitted = slots.admit(from(2), n);
        slots.begin_call(admitted.id);
        assert_eq!(admitted.pool, Pool::Probe);
        assert_eq!(admitted.evicted, (n > PROBE_SLOTS).then(|| n - PROBE_SLOTS));
        last = Some(admitted.id);
    }
    slots.remove(holder);
    let last = last.expect("twenty connections");
    assert_eq!(slots.promote(last), Ok(None), "a slot is free");
    assert_eq!(slots.begin_call(last), Some(Pool::Common));
}

/// Regression: the streams of one client took the memory of all clients. At the limit of calls, a connection may begin
/// a call only below its share.
#[test]
fn connection_below_its_share_may_begin_call() {
    for (max_calls, share) in [(12, 6), (6, MIN_CALLS)] {
        let mut slots = ConnectionSlots::new(8, 8, max_calls);
        let [many, few] = [1, 2].map(|number| slots.admit(from(number), number).id);
        for _ in 0..max_calls {
            assert!(slots.has_capacity_for_call(many));
            slots.begin_call(many);
        }
        assert!(!slots.has_capacity_for_call(many));
        for _ in 0..share {
            assert!(slots.has_capacity_for_call(few));
            slots.begin_call(few);
        }
        assert!(!slots.has_capacity_for_call(few));
        slots.end_call(few);
        assert!(slots.has_capacity_for_call(few));
        // The calls of a removed connection no longer count.
        slots.remove(many);
        slots.begin_call(few);
        assert!(slots.has_capacity_for_call(few));
    }
}

#[test]
fn ipv6_network_and_mapped_address_are_one_origin() {
    let of = |text: &str| Origin::of(text.parse().expect("an address"), None);
    assert_eq!(of("2001:db8::1"), of("2001:db8::ffff:1"));
    assert_ne!(of("2001:db8::1"), of("2001:db8:0:1::1"));
    assert_eq!(of("::ffff:10.0.0.1"), of("10.0.0.1"));
    assert!(of("::1").local && of("127.0.0.9").local && of("::ffff:127.0.0.1").local && !of("10.0.0.1").local);
    let own = "10.0.0.1".parse().expect("an address");
    assert!(Origin::of(own, Some(own)).local, "this machine by its own address");
}

#[derive(Clone, Debug)]
enum Event {
    Admit(u8),
    Begin(usize),
    End(usize),
    Promote(usize),
    Remove(usize),
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        4 => (0..4_u8).prop_map(Event::Admit),
        3 => any::<usize>().prop_map(Event::Begin),
        2 => any::<usize>().prop_map(Event::End),
        1 => any::<usize>().prop_map(Event::Promote),
        2 => any::<usize>().prop_map(Event::Remove),
    ]
}

proptest! {
    #[test]
    fn counts_and_lists_match_connections(
        slots in 1..6_usize, per_address in 1..6_usize, events in prop::collection::vec(event(), 1..200)
    ) {
        let mut all = ConnectionSlots::new(slots, per_address, usize::MAX);
        let mut ids: Vec<u64> = Vec::new();
        let mut number = 0_u64;
        for event in events {
            let pick = |n: usize| (!ids.is_empty()).then(|| ids[n % ids.len()]);
            match event {
                Event::Admit(address) => {
                    let origin = if address == 0 { loopback() } else { from(address) };
                    number += 1;
                    let busy: BTreeSet<u64> =
                        all.connections.values().filter(|o| o.calls > 0 && o.pool != Pool::Probe).map(|o| o.handle).collect();
                    let admitted = all.admit(origin, number);
                    if let Some(evicted) = admitted.evicted {
                        prop_assert!(!busy.contains(&evicted), "a connection with an open call was evicted");
                    }
                    ids.push(admitted.id);
                }
                Event::Begin(n) => if let Some(id) = pick(n) { all.begin_call(id); },
                Event::End(n) => if let Some(id) = pick(n) { all.end_call(id); },
                Event::Promote(n) => if let Some(id) = pick(n) { let _bound = all.promote(id); },
                Event::Remove(n) => if let Some(id) = pick(n) { all.remove(id); },
            }
            prop_assert_eq!(all.active, all.connections.values().filter(|o| o.calls > 0).count());
            prop_assert_eq!(all.calls, all.connections.values().map(|o| o.calls).sum::<usize>());
            let of = |pool| all.connections.values().filter(move |o| o.pool == pool);
            prop_assert!(of(Pool::Common).count() == all.common && all.common <= slots);
            prop_assert!(of(Pool::Loopback).count() == all.loopback && all.loopback <= LOOPBACK_SLOTS);
            prop_assert!(of(Pool::Probe).count() == all.probes.len() && all.probes.len() <= PROBE_SLOTS);
            prop_assert_eq!(all.idle.len(), of(Pool::Common).filter(|o| o.calls == 0).count());
            prop_assert_eq!(all.loopback_idle.len(), of(Pool::Loopback).filter(|o| o.calls == 0).count());
            for (address, share) in &all.origins {
                prop_assert!(share.connections > 0 && share.connections <= per_address);
                prop_assert_eq!(share.connections, of(Pool::Common).filter(|o| o.origin.address == *address).count());
                let idle = of(Pool::Common).filter(|o| o.origin.address == *address && o.calls == 0).count();
                prop_assert_eq!(share.idle.len(), idle);
            }
        }
    }
}
