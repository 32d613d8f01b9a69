//! The rack of a consumer. A consumer reads from in-sync replicas in its own rack if there are any.

use clap::Args;

use crate::{
    client::{Client, ConsumerOptions},
    model::near,
};

/// Environment variable with the rack. The option has precedence.
const VARIABLE: &str = "STRANDLINE_RACK";

/// Maximum number of racks that a message lists.
const MOST_RACKS: usize = 5;

#[derive(Clone, Debug, Args)]
pub(super) struct Rack {
    /// The rack, or zone, where this runs, as brokers name theirs: in-sync replicas there are read, and leaders elsewhere only
    /// while there are none; else that of the environment's STRANDLINE_RACK
    // `options()` reads the variable, not clap, for the same reason as with `--bootstrap`.
    #[arg(long = "rack", value_name = "NAME")]
    name: Option<String>,
}

impl Rack {
    /// Returns the options of a consumer in this rack. Prints a warning on standard error if no broker is in the rack.
    pub(super) async fn options(&self, client: &Client) -> ConsumerOptions {
        // An empty option or variable sets no rack.
        let given = self.name.clone().or_else(|| std::env::var(VARIABLE).ok()).filter(|rack| !rack.is_empty());
        let Some(rack) = given else { return ConsumerOptions::default() };
        // An error is ignored here, because the reads that follow report it.
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

/// Returns a warning if no broker is in `rack`. `racks` are the racks of all brokers, empty for a broker without a
/// rack.
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
    fn rack_without_a_broker_is_reported_with_similar_racks() {
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
