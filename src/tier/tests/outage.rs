//! A store that is away.

use std::time::Duration;

use futures::FutureExt as _;

use super::*;

/// Each step of upkeep waited for two seconds: with 10,000 partitions and four workers, each was planned once in 80 minutes.
#[tokio::test]
async fn a_step_waits_for_a_store_while_its_outage_is_new_and_no_longer() {
    let keys = Keys { access_key_id: "id".to_owned(), secret_access_key: "secret".to_owned() };
    let options = StoreOptions {
        endpoint: Some("http://127.0.0.1:9".to_owned()),
        keys: Some(keys),
        retry_for: Duration::ZERO,
        ..StoreOptions::new("s3://bucket/prefix")
    };
    let tier = open(&options);
    assert!(tier.store().get("object").await.is_err());
    let wait = Duration::from_secs(1);
    assert!(tier.until_away_for(wait).now_or_never().is_none(), "it may be back in a moment");
    tier.until_away_for(wait).await;
    assert!(tier.until_away_for(wait).now_or_never().is_some());
    tier.store().stop().await;
}
