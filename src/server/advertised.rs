//! Checks at the start of a broker that an advertised host name resolves on this machine, and logs a warning if not.

use std::time::Duration;

use crate::task::Tasks;

/// Maximum time of a name lookup.
const LOOKUP_TIMEOUT: Duration = Duration::from_secs(10);

/// Resolves the host of `address` in the background. Logs a warning with `remedy` if the lookup fails, because clients
/// or peers connect to that address.
pub(super) fn check(address: &str, remedy: &'static str, tasks: &Tasks) {
    let (address, stop) = (address.to_owned(), tasks.clone());
    tasks.spawn("advertised-address", async move {
        let Some(resolved) = stop.run_until_cancelled(resolve(&address)).await else {
            return;
        };
        if let Err(error) = resolved {
            tracing::warn!(address, problem = error, "cannot resolve an advertised address on this machine: {remedy}");
        }
    });
}

async fn resolve(address: &str) -> Result<(), String> {
    match tokio::time::timeout(LOOKUP_TIMEOUT, tokio::net::lookup_host(address)).await {
        Ok(Ok(mut addresses)) => addresses.next().map(drop).ok_or_else(|| "the name has no address".to_owned()),
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err(format!("no response within {LOOKUP_TIMEOUT:?}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn reserved_name_does_not_resolve() {
        assert_eq!(resolve("127.0.0.1:9460").await, Ok(()));
        assert_eq!(resolve("[::1]:9460").await, Ok(()));
        // RFC 2606 reserves `.invalid`.
        assert!(resolve("broker-1.invalid:9460").await.is_err());
    }
}
