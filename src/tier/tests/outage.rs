//! An outage of the store.

use std::time::Duration;

use futures::FutureExt as _;

use super::*;

/// Regression: during an outage, each maintenance step waited for two seconds. With 10,000 partitions and four workers,
/// each partition was visited once in 80 minutes. Steps must wait only until the outage has lasted for the given time.
#[tokio::test]
async fn step_waits_only_at_the_start_of_an_outage() {
    let keys = AccessKeys { access_key_id: "id".to_owned(), secret_access_key: "secret".to_owned() };
    let options = ObjectStoreOptions {
        endpoint: Some("http://127.0.0.1:9".to_owned()),
        keys: Some(keys),
        retry_for: Duration::ZERO,
        ..ObjectStoreOptions::new("s3://bucket/prefix")
    };
    let tier = open(&options);
    assert!(tier.store().get("object").await.is_err());
    let wait = Duration::from_secs(1);
    assert!(tier.wait_until_unavailable_for(wait).now_or_never().is_none(), "the outage may be short");
    tier.wait_until_unavailable_for(wait).await;
    assert!(tier.wait_until_unavailable_for(wait).now_or_never().is_some());
    tier.store().stop().await;
}
