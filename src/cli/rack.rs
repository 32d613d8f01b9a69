//! The rack of a consumer. A consumer reads from in-sync replicas in its own rack if there are any.

use clap::Args;

use crate::{
    client::{Client, ConsumerOptions},
    config::suggest::closest_names,
};

/// Environment variable with the rack. The option has precedence.
const VARIABLE: &str = "STRANDLINE_RACK";

/// Maximum number of racks that a message lists.
const MAX_RACKS: usize = 5;

#[derive(Clone, Debug, Args)]
pub(super) struct RackArgs {
    /// Rack of this client, as in broker.rack: reads use in-sync replicas in this rack, and leaders in other racks only
    /// while there are none; default: STRANDLINE_RACK of the environment
    // `options()` reads the variable, not clap: clap's usage lines show an option that the environment sets as
    // required.
    #[arg(long = "rack", value_name = "NAME")]
    name: Option<String>,
}

impl RackArgs {
    /// Returns the options of a consumer in this rack. Prints a warning on standard error if no broker is in the rack.
    pub(super) async fn options(&self, client: &Client) -> ConsumerOptions {
        // An empty option or variable sets no rack.
        let rack = self.name.clone().or_else(|| std::env::var(VARIABLE).ok()).filter(|rack| !rack.is_empty());
        let Some(rack) = rack else { return ConsumerOptions::default() };
        // An error is ignored here, because the reads that follow report it.
        if let Ok(cluster) = client.admin().cluster().await {
            let mut racks: Vec<String> = cluster.brokers.into_iter().map(|broker| broker.rack).collect();
            racks.sort_unstable();
            racks.dedup();
            if let Some(warning) = unknown_rack_warning(&rack, &racks) {
                eprintln!("{warning}");
            }
        }
        ConsumerOptions::default().rack(rack)
    }
}

/// Returns a warning if no broker is in `rack`. `racks` are the racks of all brokers, empty for a broker without a
/// rack.
fn unknown_rack_warning(rack: &str, racks: &[String]) -> Option<String> {
    let named: Vec<&str> = racks.iter().map(String::as_str).filter(|name| !name.is_empty()).collect();
    if named.contains(&rack) {
        return None;
    }
    let similar = closest_names(rack, named.iter().copied(), |name| name, MAX_RACKS);
    let hint = match (similar.is_empty(), named.is_empty()) {
        (false, _) => format!("did you mean {}?", similar.join(", ")),
        (true, false) => format!("racks of the brokers: {}", named[..named.len().min(MAX_RACKS)].join(", ")),
        (true, true) => "no broker has a rack (broker.rack)".to_owned(),
    };
    Some(format!("no broker is in rack {rack:?}, so reads go to leaders in any rack: {hint}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rack_without_a_broker_is_reported_with_similar_racks() {
        let warning = |rack, racks: &[&str]| {
            let racks: Vec<String> = racks.iter().map(|&rack| rack.to_owned()).collect();
            unknown_rack_warning(rack, &racks).unwrap_or_default()
        };
        assert_eq!(warning("zone-a", &["", "zone-a"]), "");
        assert!(warning("zone-d", &["zone-a", "zone-b"]).ends_with("did you mean zone-a, zone-b?"));
        assert!(warning("paris", &["", "zone-a"]).ends_with("racks of the brokers: zone-a"));
        assert!(warning("zone-a", &[""]).ends_with("no broker has a rack (broker.rack)"));
    }
}
