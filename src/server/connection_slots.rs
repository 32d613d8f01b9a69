//! Decides which connections of one listener get a slot. This module handles only numbers and addresses; `connection`
//! owns the sockets.
//!
//! # Invariants
//!
//! - A connection with an open call or stream is never evicted, except from the probe pool.
//! - The common pool contains at most `slots` connections, and at most `per_address` of them from one origin.
//! - While `max_calls` calls are open, a connection may begin a call only below its equal share of `max_calls` or below
//!   [`MIN_CALLS`]. So the calls of one connection never keep another one from calls.
//! - The slots of the other two pools are additional: [`LOOPBACK_SLOTS`] for this machine, and [`PROBE_SLOTS`] for
//!   connections that serve only probes.
//! - If the probe pool is full, a new connection evicts the oldest one of the address with the most connections. If
//!   several addresses have the most, the new connection's own address is preferred. So a probe always gets a slot,
//!   and a flood from one or two addresses does not evict it.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv6Addr},
};

/// Number of additional slots for connections from this machine.
pub(super) const LOOPBACK_SLOTS: usize = 8;

/// Number of additional slots for connections that serve only probes.
pub(super) const PROBE_SLOTS: usize = 4;

/// Number of calls that each connection may have open, regardless of other connections.
const MIN_CALLS: usize = 4;

/// Mask of the bits of an IPv6 address that form its origin: the owner of one address has all addresses of its /64.
const IPV6_PREFIX: u128 = !0 << 64;

/// Source of a connection: connections of one origin share the limit of an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Origin {
    address: IpAddr,
    /// True for a connection from this machine.
    local: bool,
}

impl Origin {
    /// Returns the origin of a connection from `peer` to the address `own` of this machine.
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

/// Limit that keeps a connection out of the common pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SlotLimit {
    /// The common pool is full, and each connection in it has an open call.
    Connections,
    /// The address has the maximum number of connections in the common pool, each with an open call.
    Address,
}

/// Pool of slots, by permitted use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pool {
    /// Serves all calls.
    Common,
    /// Serves all calls. Its slots for connections from this machine are additional to the common pool.
    Loopback,
    /// Serves only probes. [`ConnectionSlots::promote`] moves a connection to the common pool once that has a free slot
    /// or an idle connection.
    Probe,
}

/// A connection that was admitted just now.
#[derive(Debug)]
pub(super) struct Admitted<T> {
    /// Number of the connection.
    pub(super) id: u64,
    /// Limit that keeps the connection out of the common pool; `None` if the connection is in it.
    pub(super) bound: Option<SlotLimit>,
    pub(super) pool: Pool,
    /// Handle of the connection that was evicted for this one. The caller closes that connection.
    pub(super) evicted: Option<T>,
}

/// Connections of a listener, each with a handle `T`. An evicted or removed connection's handle is returned to the
/// caller.
#[derive(Debug)]
pub(super) struct ConnectionSlots<T> {
    slots: usize,
    per_address: usize,
    max_calls: usize,
    /// Number of open calls of all connections.
    calls: usize,
    /// Number of connections with an open call.
    active: usize,
    /// Last number that was drawn, as the id of a connection or as a key of one of the lists.
    last_number: u64,
    connections: BTreeMap<u64, Occupant<T>>,
    /// Number and idle connections of each address in the common pool.
    origins: BTreeMap<IpAddr, AddressShare>,
    /// Number of connections in the common pool.
    common: usize,
    /// Ids of the idle connections of the common pool, in the order in which they became idle.
    idle: BTreeMap<u64, u64>,
    /// Number of connections in the loopback pool.
    loopback: usize,
    /// Ids of the idle connections of the loopback pool, in the order in which they became idle.
    loopback_idle: BTreeMap<u64, u64>,
    /// Ids of the connections of the probe pool, in the order of their arrival.
    probes: BTreeMap<u64, u64>,
}

/// An open connection and its slot.
#[derive(Debug)]
struct Occupant<T> {
    handle: T,
    origin: Origin,
    pool: Pool,
    calls: usize,
    /// Key of the connection in the list of the idle connections of its pool, while it is idle. In the probe pool, its
    /// key in the list of all connections.
    order: u64,
}

/// Connections in the common pool from one address.
#[derive(Debug, Default)]
struct AddressShare {
    connections: usize,
    /// Ids of the idle connections, in the order in which they became idle.
    idle: BTreeMap<u64, u64>,
}

impl<T> ConnectionSlots<T> {
    pub(super) fn new(slots: usize, per_address: usize, max_calls: usize) -> Self {
        Self {
            slots,
            per_address: per_address.clamp(1, slots.max(1)),
            max_calls,
            calls: 0,
            active: 0,
            last_number: 0,
            connections: BTreeMap::new(),
            origins: BTreeMap::new(),
            common: 0,
            idle: BTreeMap::new(),
            loopback: 0,
            loopback_idle: BTreeMap::new(),
            probes: BTreeMap::new(),
        }
    }

    /// Gives a new connection a slot, for which another connection may be evicted. The connection is idle until a call
    /// begins.
    pub(super) fn admit(&mut self, origin: Origin, handle: T) -> Admitted<T> {
        let (pool, bound, evicted) = match self.find_common_slot(origin) {
            Ok(idle) => (Pool::Common, None, idle),
            Err(bound) => {
                let longest_idle = self.loopback_idle.first_key_value().map(|(_, id)| *id);
                let has_free_slot = self.loopback < LOOPBACK_SLOTS;
                if origin.local && (has_free_slot || longest_idle.is_some()) {
                    (Pool::Loopback, Some(bound), longest_idle.filter(|_| !has_free_slot))
                } else {
                    (Pool::Probe, Some(bound), self.find_probe_to_evict(origin))
                }
            }
        };
        let evicted = evicted.and_then(|id| self.remove(id));
        let id = self.next_number();
        self.connections.insert(id, Occupant { handle, origin, pool, calls: 0, order: 0 });
        self.add_to_pool(id);
        Admitted { id, bound, pool, evicted }
    }

    /// Returns true if this connection may begin one more call. Either fewer than `max_calls` are open, or the
    /// connection has fewer than its equal share of `max_calls` or than [`MIN_CALLS`].
    pub(super) fn has_capacity_for_call(&self, id: u64) -> bool {
        let calls = self.connections.get(&id).map_or(0, |occupant| occupant.calls);
        self.calls < self.max_calls
            || calls < MIN_CALLS.max(self.max_calls / (self.active + usize::from(calls == 0)).max(1))
    }

    /// Counts a call that begins. Returns the pool of its connection; `None` if the connection was removed.
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

    /// Counts a call that has ended.
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

    /// Moves a connection from the probe pool to the common pool, if the common pool has a free slot or an idle
    /// connection by now. Returns the handle of the idle connection that was evicted, if any. Fails with the limit that
    /// prevents the move. Has no effect on a connection of another pool.
    pub(super) fn promote(&mut self, id: u64) -> Result<Option<T>, SlotLimit> {
        let Some(occupant) = self.connections.get(&id).filter(|occupant| occupant.pool == Pool::Probe) else {
            return Ok(None);
        };
        let idle = self.find_common_slot(occupant.origin)?;
        let evicted = idle.and_then(|idle| self.remove(idle));
        self.remove_from_pool(id);
        if let Some(occupant) = self.connections.get_mut(&id) {
            occupant.pool = Pool::Common;
        }
        self.add_to_pool(id);
        Ok(evicted)
    }

    /// Removes a connection. Returns its handle.
    pub(super) fn remove(&mut self, id: u64) -> Option<T> {
        self.remove_from_pool(id);
        let occupant = self.connections.remove(&id)?;
        self.calls -= occupant.calls;
        self.active -= usize::from(occupant.calls > 0);
        Some(occupant.handle)
    }

    /// Returns the idle connection that one more connection from this origin evicts from the common pool; `None` if a
    /// slot is free. Fails with the limit if no connection can be evicted.
    fn find_common_slot(&self, origin: Origin) -> Result<Option<u64>, SlotLimit> {
        if let Some(share) = self.origins.get(&origin.address).filter(|share| share.connections >= self.per_address) {
            return share.idle.first_key_value().map(|(_, id)| Some(*id)).ok_or(SlotLimit::Address);
        }
        if self.common < self.slots {
            return Ok(None);
        }
        self.idle.first_key_value().map(|(_, id)| Some(*id)).ok_or(SlotLimit::Connections)
    }

    /// Returns the connection that one more connection from this origin evicts from the probe pool; `None` if a slot
    /// is free.
    fn find_probe_to_evict(&self, origin: Origin) -> Option<u64> {
        if self.probes.len() < PROBE_SLOTS {
            return None;
        }
        let addresses = || self.probes.values().filter_map(|id| Some((id, self.connections.get(id)?.origin.address)));
        let count_of = |address: IpAddr| addresses().filter(|(_, other)| *other == address).count();
        // Among addresses with equally many connections, the new connection's own address ranks first. Among
        // connections of equal rank, `max_by_key` returns the last, which is the oldest because the order is reversed.
        let ranked = addresses().map(|(id, address)| ((count_of(address), address == origin.address), *id));
        ranked.rev().max_by_key(|(rank, _)| *rank).map(|(_, id)| id)
    }

    /// Returns a number above all earlier ones.
    fn next_number(&mut self) -> u64 {
        self.last_number += 1;
        self.last_number
    }

    /// Adds a connection to the counts and lists of its pool.
    fn add_to_pool(&mut self, id: u64) {
        let order = self.next_number();
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

    /// Removes a connection from the counts and lists of its pool.
    fn remove_from_pool(&mut self, id: u64) {
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

    /// Adds a connection to the idle ones of its pool, as the one that became idle last, or removes it from the idle
    /// ones. The probe pool has no list of idle connections.
    fn set_idle(&mut self, id: u64, idle: bool) {
        let order = self.next_number();
        let Some(occupant) = self.connections.get_mut(&id) else { return };
        let previous_order = std::mem::replace(&mut occupant.order, order);
        let update = |list: &mut BTreeMap<u64, u64>| {
            if idle {
                list.insert(order, id);
            } else {
                list.remove(&previous_order);
            }
        };
        match occupant.pool {
            Pool::Common => {
                update(&mut self.idle);
                update(&mut self.origins.entry(occupant.origin.address).or_default().idle);
            }
            Pool::Loopback => update(&mut self.loopback_idle),
            Pool::Probe => {}
        }
    }
}

#[cfg(test)]
mod tests;
