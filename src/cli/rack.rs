//! Where a reader stands, and what that means for it.

use clap::Args;

use crate::{
    client::{Client, ConsumerOptions},
    model::near,
};

/// What names the rack where no option does.
const VARIABLE: &str = "STRANDLINE_RACK";

/// Most racks that are worth reading.
const MOST_RACKS: usize = 5;

#[derive(Clone, Debug, Args)]
pub(super) struct Rack {
    /// The rack, or zone, where this runs, as brokers name theirs: in-sync replicas there are read, and leaders elsewhere only
    /// while there are none; else that of the environment's STRANDLINE_RACK
    // Read by hand, as --bootstrap is.
    #[arg(long = "rack", value_name = "NAME")]
    name: Option<String>,
}

impl Rack {
    /// How a consumer here reads. Says on standard error when no broker stands in its rack, once.
    pub(super) async fn options(&self, client: &Client) -> ConsumerOptions {
        // A variable, or an option, that is set and empty counts as not set.
        let given = self.name.clone().or_else(|| std::env::var(VARIABLE).ok()).filter(|rack| !rack.is_empty());
        let Some(rack) = given else { return ConsumerOptions::default() };
        // Who does not answer now is told of by what comes next.
        if let Ok(cluster) = client.admin().cluster().await {
            let mut racks: Vec<String> = cluster.brokers.into_iter().map(|broker| broker.rack).collect();
            racks.sort_unstable();
            racks.dedup();
            if let Some(said) = nobody_there(&rack, &racks) {
                eprintln!("{said}");
            }
        }
        ConsumerOptions::default().rack(rack)
    }
}

/// What is said when no broker stands there.
fn nobody_there(rack: &str, racks: &[String]) -> Option<String> {
    let named: Vec<&str> = racks.iter().map(String::as_str).filter(|name| !name.is_empty()).collect();
    if named.contains(&rack) {
        return None;
    }
    let near = near::nearest(rack, named.iter().copied(), |name| name, MOST_RACKS);
    let there = match (near.is_empty(), named.is_empty()) {
        (false, _) => format!("did you mean {}?", near.join(", ")),
        (true, false) => format!("they stand in {}", named[..named.len().min(MOST_RACKS)].join(", ")),
        (true, true) => "none names a rack (broker.rack)".to_owned(),
    };
    Some(format!("no broker stands in rack {rack:?} now, so leaders are read wherever they stand: {there}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rack_without_a_broker_is_said_with_the_near_ones() {
        let said = |rack, racks: &[&str]| {
            let racks: Vec<String> = racks.iter().map(|&rack| rack.to_owned()).collect();
            nobody_there(rack, &racks).unwrap_or_default()
        };
        assert_eq!(said("zone-a", &["", "zone-a"]), "");
        assert!(said("zone-d", &["zone-a", "zone-b"]).ends_with("did you mean zone-a, zone-b?"));
        assert!(said("paris", &["", "zone-a"]).ends_with("they stand in zone-a"));
        assert!(said("zone-a", &[""]).ends_with("none names a rack (broker.rack)"));
    }
}
