//! Connects to the cluster, and converts client errors into messages that name a remedy.

use std::time::Duration;

use anyhow::anyhow;

use super::{CommonArgs, DEFAULT_BOOTSTRAP};
use crate::{
    client::{Admin, CallError, Client, ClientOptions, ConnectError, ConsumeError, SendError},
    config::suggest::closest_names,
    proto::error::ErrorCode,
};

/// Maximum age of the routing metadata, and thus the time until a command uses new partitions.
pub(super) const METADATA_REFRESH_INTERVAL: Duration = Duration::from_secs(5);

/// Maximum number of topic names that a message lists.
const MAX_NAMES: usize = 5;

/// Connects to the cluster at the bootstrap addresses of the command line or the environment.
pub(super) async fn connect(common: &CommonArgs) -> anyhow::Result<Client> {
    let options = ClientOptions { metadata_age: METADATA_REFRESH_INTERVAL, ..ClientOptions::default() };
    match Client::connect(&common.bootstrap(), options).await {
        Ok(client) => Ok(client),
        Err(error) => Err(explain_call(&error)),
    }
}

/// Returns the error message for a failed request. If no broker responded, the message states how to name or start one.
/// For a request about a topic, see [`explain`].
pub(super) fn explain_call(error: &CallError) -> anyhow::Error {
    match error {
        // Only the default address was tried: the user probably named no cluster, and there may be none.
        CallError::Connect(ConnectError::NoResponse { tried })
            if tried.iter().all(|(address, _)| address == DEFAULT_BOOTSTRAP) =>
        {
            anyhow!("{error}; start a broker with `strandline dev`, or name one with --bootstrap")
        }
        CallError::Connect(ConnectError::NoResponse { .. }) => {
            anyhow!("{error}; start the brokers, or name other gRPC addresses of the cluster with --bootstrap")
        }
        _ => anyhow!("{error}"),
    }
}

/// Returns the error message for a failed request about a topic. For an unknown topic, the message lists similar names,
/// or else topics of the cluster.
pub(super) async fn explain(admin: &Admin, topic: &str, error: CallError) -> anyhow::Error {
    if error.code() != Some(ErrorCode::UnknownTopic) {
        return explain_call(&error);
    }
    let names = match admin.list_topics().await {
        Ok(topics) => topics.into_iter().map(|topic| topic.name).collect(),
        Err(_) => Vec::new(),
    };
    anyhow!("{}", unknown_topic_message(topic, &names))
}

/// Returns the error message for a failed send of `produce`, with the option that sets its time limit. The error of a
/// topic lookup is explained by [`explain`].
pub(super) async fn explain_send(admin: &Admin, topic: &str, error: SendError) -> anyhow::Error {
    match error {
        SendError::Lookup(error) => explain(admin, topic, error).await,
        error @ SendError::Expired { .. } => anyhow!("{error}; raise the limit with --timeout"),
        error => anyhow!("{error}"),
    }
}

/// Returns the error message for a failed read, with the options that avoid the error. The error of a topic lookup is
/// explained by [`explain`].
pub(super) async fn explain_read(admin: &Admin, topic: &str, error: ConsumeError) -> anyhow::Error {
    match error {
        ConsumeError::Lookup(error) => explain(admin, topic, error).await,
        ConsumeError::OutOfRange { topic, partition, offset, start, end } => anyhow!(
            "{topic}/{partition}: offset {offset} is out of range: partition {partition} has {start} up to, but not \
             including, {end}; start with --from earliest or --from latest, or select partitions that have offset \
             {offset} with --partition"
        ),
        error @ ConsumeError::Undecodable { partition, next, .. } => anyhow!(
            "{error}; start there with --partition {partition} --from {next}, or skip such batches with --skip-corrupt"
        ),
        error @ ConsumeError::Gap { partition, found, .. } => {
            anyhow!("{error} with --partition {partition} --from {found}")
        }
        error => anyhow!("{error}"),
    }
}

/// Returns the error message for an unknown topic. `names` are the topics of the cluster; similar names are suggested,
/// else some names are listed.
fn unknown_topic_message(topic: &str, names: &[String]) -> String {
    let similar = closest_names(topic, names, |name| name.as_str(), MAX_NAMES);
    let list = |names: Vec<&String>| {
        let mut text = names.iter().take(MAX_NAMES).map(|name| name.as_str()).collect::<Vec<_>>().join(", ");
        if names.len() > MAX_NAMES {
            text += ", …";
        }
        text
    };
    match (similar.is_empty(), names.is_empty()) {
        (false, _) => {
            format!("topic {topic:?} does not exist; did you mean {}?", list(similar))
        }
        (true, false) => format!(
            "topic {topic:?} does not exist; the cluster has {}; create it with `strandline topic create {topic}`",
            list(names.iter().collect())
        ),
        (true, true) => {
            format!(
                "topic {topic:?} does not exist, and the cluster has no topics; create it with `strandline topic \
                create {topic}`"
            )
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_topic_error_names_similar_topics_or_a_command() {
        let names = ["orders".to_owned(), "audit".to_owned()];
        assert_eq!(unknown_topic_message("ordres", &names), "topic \"ordres\" does not exist; did you mean orders?");
        let short = unknown_topic_message("lgo", &["log".to_owned()]);
        assert_eq!(short, "topic \"lgo\" does not exist; did you mean log?");
        let far = unknown_topic_message("zzz", &names);
        assert!(far.contains("the cluster has orders, audit") && far.contains("strandline topic create zzz"), "{far}");
        assert!(unknown_topic_message("t", &[]).contains("strandline topic create t"));
    }
}
