//! The searches: small ones with every test run, large ones by `make model`, and one for each broken rule.

use super::{
    explore,
    world::{Budget, Setup},
};
use crate::{
    model::Durability,
    partition::mutation::{self, Mutation},
};

const NOTHING: Budget = Budget {
    appends: 0,
    epochs: 0,
    kills: 0,
    losses: 0,
    wipes: 0,
    expiries: 0,
    handovers: 0,
    unknowns: 0,
    breaks: 0,
    lags: 0,
    lowerings: 0,
};

#[test]
fn probe() {
    let most = std::env::var("STATES").map_or(100_000, |n| n.parse().unwrap());
    for durability in [Durability::Persisted, Durability::Replicated] {
        for min_insync in [1, 2] {
            let budget = Budget { appends: 1, epochs: 1, kills: 1, ..NOTHING };
            let setup = Setup { durability, min_insync, in_sync: 2, budget };
            let at = std::time::Instant::now();
            let found = explore(setup, most);
            println!("{durability} {min_insync}: {found:#?} {:?}", at.elapsed());
        }
    }
    let _ = mutation::with(Some(Mutation::ElrIgnored), || 0);
}
