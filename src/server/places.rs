//! Decides which connections of one listener have a place. It knows numbers and addresses; `connection` has the sockets.
//!
//! # Invariants
//!
//! - A connection on which a call or a stream is open never makes room for another one, but in the pool of probes.
//! - At most `places` connections are in the common pool, and at most `per_address` of them come from one origin.
//! - At most `max_calls` calls are open, and beyond them each connection's equal share of as many, [`MIN_CALLS`] at least: nobody takes them
//!   all.
//! - The other two pools are beyond that: [`LOOPBACK_PLACES`] for this machine, [`PROBE_PLACES`] for connections that serve
//!   nothing but probes. In the latter the address with the most connections always makes room with its oldest, of several such addresses the
//!   newcomer's: a probe always finds a place, and connections without end from one or two addresses do not take it.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv6Addr},
};

/// Places beyond the common ones for connections from this machine.
pub(super) const LOOPBACK_PLACES: usize = 8;

/// Places beyond the common ones for connections of which only probes are answered.
pub(super) const PROBE_PLACES: usize = 4;

/// Calls that a connection may have open whatever others have, however many connections there are.
const MIN_CALLS: usize = 4;

/// Leading bits of an IPv6 address that count as one origin: whoever has one address has all of its /64.
const IPV6_PREFIX: u128 = !0 << 64;

/// Where a connection comes from, as far as limits are concerned.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Origin {
    address: IpAddr,
    /// Whether it comes from this machine.
    local: bool,
}

impl Origin {
    /// The origin of a connection from `peer` to the address `own` of this machine.
    pub(super) fn of(peer: IpAddr, own: Option<IpAddr>) -> Self {
        let peer = peer.to_canonical();
        let local = peer.is_loopback() || own.is_some_and(|own| own.to_canonical() == peer);
        let address = match peer {
            IpAddr::V6(address) => IpAddr::V6(Ipv6Addr::from_bits(address.to_bits() & IPV6_PREFIX)),
            v4 @ IpAddr::V4(_) => v4,
        };
        Self { address, local }
    }
}

/// Which of the bounds a connection did not fit into.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Bound {
    /// All common places have calls open.
    Places,
    /// This address has as many connections as one may have, and all have calls open.
    Address,
}

/// What a place may be used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pool {
    /// Everything.
    Common,
    /// Everything; beyond the common limit.
    Loopback,
    /// Probes, until there is room in the common pool.
    Probe,
}

/// A connection that has a place.
#[derive(Debug)]
pub(super) struct Admitted<T> {
    /// Its number.
    pub(super) id: u64,
    /// Why it has no common place; `None` when it has one.
    pub(super) bound: Option<Bound>,
    pub(super) pool: Pool,
    /// The connection that made room for it, which is to be closed.
    pub(super) evicted: Option<T>,
}

/// The connections of a listener, each with a handle `T` that is given back when it is to be closed.
#[derive(Debug)]
pub(super) struct Places<T> {
    places: usize,
    per_address: usize,
    max_calls: usize,
    /// Open calls of all connections.
    calls: usize,
    /// Connections with an open call.
    active: usize,
    next: u64,
    connections: BTreeMap<u64, Occupant<T>>,
    /// How many of the common pool come from an origin, and which of them are idle.
    origins: BTreeMap<IpAddr, Share>,
    common: usize,
    /// In the order in which they became idle.
    idle: BTreeMap<u64, u64>,
    loopback: usize,
    loopback_idle: BTreeMap<u64, u64>,
    /// In the order in which they came.
    probes: BTreeMap<u64, u64>,
}

#[derive(Debug)]
struct Occupant<T> {
    handle: T,
    origin: Origin,
    pool: Pool,
    calls: usize,
    /// Its place in the order of the idle ones of its pool; in the pool of probes in that of all.
    order: u64,
}

#[derive(Debug, Default)]
struct Share {
    connections: usize,
    idle: BTreeMap<u64, u64>,
}

impl<T> Places<T> {
    pub(super) fn new(places: usize, per_address: usize, max_calls: usize) -> Self {
        Self {
            places,
            per_address: per_address.clamp(1, places.max(1)),
            max_calls,
            calls: 0,
            active: 0,
            next: 0,
            connections: BTreeMap::new(),
            origins: BTreeMap::new(),
            common: 0,
            idle: BTreeMap::new(),
            loopback: 0,
            loopback_idle: BTreeMap::new(),
            probes: BTreeMap::new(),
        }
    }

    /// Gives a new connection a place. It is idle until a call is open on it.
    pub(super) fn admit(&mut self, origin: Origin, handle: T) -> Admitted<T> {
        let (pool, bound, evicted) = match self.room_in_common(origin) {
            Ok(idle) => (Pool::Common, None, idle),
            Err(bound) => {
                let longest = self.loopback_idle.first_key_value().map(|(_, id)| *id);
                if origin.local && (self.loopback < LOOPBACK_PLACES || longest.is_some()) {
                    (Pool::Loopback, Some(bound), longest.filter(|_| self.loopback >= LOOPBACK_PLACES))
                } else {
                    (Pool::Probe, Some(bound), self.room_among_probes(origin))
                }
            }
        };
        let evicted = evicted.and_then(|id| self.remove(id));
        let id = self.stamp();
        self.connections.insert(id, Occupant { handle, origin, pool, calls: 0, order: 0 });
        self.count_in(id);
        Admitted { id, bound, pool, evicted }
    }

    /// True if this connection may begin one more call.
    pub(super) fn has_room_for_call(&self, id: u64) -> bool {
        let calls = self.connections.get(&id).map_or(0, |occupant| occupant.calls);
        self.calls < self.max_calls
            || calls < MIN_CALLS.max(self.max_calls / (self.active + usize::from(calls == 0)).max(1))
    }

    /// A call begins. Returns the pool that the connection is in.
    pub(super) fn begin_call(&mut self, id: u64) -> Option<Pool> {
        let occupant = self.connections.get_mut(&id)?;
        occupant.calls += 1;
        self.calls += 1;
        let (pool, first) = (occupant.pool, occupant.calls == 1);
        self.active += usize::from(first);
        if first && pool != Pool::Probe {
            self.set_idle(id, false);
        }
        Some(pool)
    }

    /// A call has ended.
    pub(super) fn end_call(&mut self, id: u64) {
        let Some(occupant) = self.connections.get_mut(&id) else { return };
        let was_open = occupant.calls > 0;
        occupant.calls = occupant.calls.saturating_sub(1);
        self.calls -= usize::from(was_open);
        self.active -= usize::from(was_open && occupant.calls == 0);
        if was_open && occupant.calls == 0 && occupant.pool != Pool::Probe {
            self.set_idle(id, true);
        }
    }

    /// Moves a connection of the pool of probes to the common one, where there is room by now: `Ok` with the connection that made it.
    pub(super) fn promote(&mut self, id: u64) -> Result<Option<T>, Bound> {
        let Some(occupant) = self.connections.get(&id).filter(|occupant| occupant.pool == Pool::Probe) else {
            return Ok(None);
        };
        let idle = self.room_in_common(occupant.origin)?;
        let evicted = idle.and_then(|idle| self.remove(idle));
        self.count_out(id);
        if let Some(occupant) = self.connections.get_mut(&id) {
            occupant.pool = Pool::Common;
        }
        self.count_in(id);
        Ok(evicted)
    }

    /// Takes a connection out: it has ended.
    pub(super) fn remove(&mut self, id: u64) -> Option<T> {
        self.count_out(id);
        let occupant = self.connections.remove(&id)?;
        self.calls -= occupant.calls;
        self.active -= usize::from(occupant.calls > 0);
        Some(occupant.handle)
    }

    /// Whether one more from this origin fits into the common pool: `Ok` with the idle connection that has to make room.
    fn room_in_common(&self, origin: Origin) -> Result<Option<u64>, Bound> {
        if let Some(share) = self.origins.get(&origin.address).filter(|share| share.connections >= self.per_address) {
            return share.idle.first_key_value().map(|(_, id)| Some(*id)).ok_or(Bound::Address);
        }
        if self.common < self.places {
            return Ok(None);
        }
        self.idle.first_key_value().map(|(_, id)| Some(*id)).ok_or(Bound::Places)
    }

    /// The connection of the pool of probes that makes room for one from this origin, where there is none.
    fn room_among_probes(&self, origin: Origin) -> Option<u64> {
        if self.probes.len() < PROBE_PLACES {
            return None;
        }
        let addresses = || self.probes.values().filter_map(|id| Some((id, self.connections.get(id)?.origin.address)));
        let held = |address: IpAddr| addresses().filter(|(_, other)| *other == address).count();
        // Of addresses that hold the same the newcomer's own. Of equals `max_by_key` takes the last one, which in reverse is the oldest.
        let ranked = addresses().map(|(id, address)| ((held(address), address == origin.address), *id));
        ranked.rev().max_by_key(|(rank, _)| *rank).map(|(_, id)| id)
    }

    fn stamp(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    fn count_in(&mut self, id: u64) {
        let order = self.stamp();
        let Some(occupant) = self.connections.get_mut(&id) else { return };
        match occupant.pool {
            Pool::Common => {
                self.common += 1;
                self.origins.entry(occupant.origin.address).or_default().connections += 1;
            }
            Pool::Loopback => self.loopback += 1,
            Pool::Probe => {
                occupant.order = order;
                self.probes.insert(order, id);
                return;
            }
        }
        if occupant.calls == 0 {
            self.set_idle(id, true);
        }
    }

    fn count_out(&mut self, id: u64) {
        let Some(occupant) = self.connections.get(&id) else { return };
        let (pool, order, address) = (occupant.pool, occupant.order, occupant.origin.address);
        match pool {
            Pool::Probe => drop(self.probes.remove(&order)),
            Pool::Loopback => {
                self.set_idle(id, false);
                self.loopback -= 1;
            }
            Pool::Common => {
                self.set_idle(id, false);
                self.common -= 1;
                if let Some(share) = self.origins.get_mut(&address) {
                    share.connections -= 1;
                    if share.connections == 0 {
                        self.origins.remove(&address);
                    }
                }
            }
        }
    }

    fn set_idle(&mut self, id: u64, idle: bool) {
        let order = self.stamp();
        let Some(occupant) = self.connections.get_mut(&id) else { return };
        let before = std::mem::replace(&mut occupant.order, order);
        let put = |list: &mut BTreeMap<u64, u64>| {
            if idle {
                list.insert(order, id);
            } else {
                list.remove(&before);
            }
        };
        match occupant.pool {
            Pool::Common => {
                put(&mut self.idle);
                put(&mut self.origins.entry(occupant.origin.address).or_default().idle);
            }
            Pool::Loopback => put(&mut self.loopback_idle),
            Pool::Probe => {}
        }
    }
}

#[cfg(test)]
mod tests;
