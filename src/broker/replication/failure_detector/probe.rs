//! Probes the process of a broker at its peer address. A refused connection, or the response of another incarnation,
//! shows that the process is gone; a timeout proves nothing.

use std::time::Duration;

use crate::{
    broker::replication::peer_client::{DisconnectReason, PeerClient, PeerError},
    cluster::BrokerValue,
    model::BrokerId,
    proto::v1,
    task::clock,
};

/// Timeout of a probe.
const PROBE_TIMEOUT: Duration = Duration::from_millis(200);

/// Pause between two probes. Two refused probes in a row are required, because a port may refuse connections for a
/// moment while a process takes it over.
pub(super) const PROBE_INTERVAL: Duration = Duration::from_millis(50);

/// Time after which an inconclusive probe is not repeated.
const INCONCLUSIVE_TIMEOUT: Duration = Duration::from_secs(1);

/// Result of a probe.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ProbeResult {
    /// No process listens at the address.
    Refused,
    /// Another incarnation of the same broker responds.
    Replaced,
    /// The registered process responds, also if it responds with an error.
    Alive,
    /// The connection broke, no response arrived in time, another broker or cluster responds, or there is no valid
    /// address.
    Inconclusive,
}

impl ProbeResult {
    /// Returns the text of the result for the log and for failure reports.
    pub(super) fn describe(self) -> &'static str {
        match self {
            Self::Refused => "connections are refused",
            Self::Replaced => "another process responds",
            Self::Alive => "the process responds",
            Self::Inconclusive => "no conclusive response",
        }
    }

    /// Returns true if the registered process has exited.
    fn has_exited(self) -> bool {
        matches!(self, Self::Refused | Self::Replaced)
    }
}

/// A broker whose process may be gone.
#[derive(Clone, Copy)]
pub(super) struct SuspectedPeer<'a> {
    pub(super) cluster: &'a str,
    pub(super) broker: BrokerId,
    pub(super) registered: &'a BrokerValue,
}

/// Probes a process repeatedly and returns the last result. The last probe is one that reaches the process, the second
/// in a row that finds no such process, or an inconclusive one after [`INCONCLUSIVE_TIMEOUT`].
pub(super) async fn probe(peers: &PeerClient, suspect: SuspectedPeer<'_>) -> ProbeResult {
    let deadline = clock::monotonic() + INCONCLUSIVE_TIMEOUT;
    let mut had_exited = false;
    loop {
        let result = probe_once(peers, suspect).await;
        let is_last = match result {
            ProbeResult::Alive => true,
            ProbeResult::Refused | ProbeResult::Replaced => had_exited,
            ProbeResult::Inconclusive => clock::monotonic() >= deadline,
        };
        if is_last {
            return result;
        }
        had_exited = result.has_exited();
        tokio::time::sleep(PROBE_INTERVAL).await;
    }
}

/// Makes one probe. A broker without a peer address cannot be probed, which is inconclusive.
async fn probe_once(peers: &PeerClient, suspect: SuspectedPeer<'_>) -> ProbeResult {
    let Some(address) = suspect.registered.listeners.peer() else { return ProbeResult::Inconclusive };
    suspect.evaluate(&peers.get_identity(address, PROBE_TIMEOUT).await)
}

impl SuspectedPeer<'_> {
    /// Derives the result of a probe from the response at the address.
    fn evaluate(self, response: &Result<v1::GetIdentityResponse, PeerError>) -> ProbeResult {
        let Self { cluster, broker, registered } = self;
        match response {
            // A response of another broker at the address proves nothing about the suspected process.
            Ok(identity) if identity.cluster != cluster || identity.broker_id != broker.0 => ProbeResult::Inconclusive,
            Ok(identity) if identity.incarnation != registered.incarnation => ProbeResult::Replaced,
            Ok(_) | Err(PeerError::Refused(_)) => ProbeResult::Alive,
            Err(PeerError::Lost { reason: DisconnectReason::Refused, .. }) => ProbeResult::Refused,
            Err(PeerError::Lost { .. } | PeerError::Address(_)) => ProbeResult::Inconclusive,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use tokio::net::TcpListener;

    use super::*;
    use crate::client::TcpConnector;

    fn suspect(registered: &BrokerValue) -> SuspectedPeer<'_> {
        SuspectedPeer { cluster: "test", broker: BrokerId(1), registered }
    }

    /// Returns a listener and a broker that is registered at its address.
    async fn listening() -> (PeerClient, TcpListener, BrokerValue) {
        let wait = Duration::from_secs(5);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let registered = BrokerValue::running_at(listener.local_addr().unwrap().to_string());
        (PeerClient::new(Arc::new(TcpConnector::between_brokers(wait)), wait), listener, registered)
    }

    /// A killed process accepts connections until its listener is closed, which may be after its other sockets.
    /// Regression: a probe at that moment was inconclusive and not repeated, so partitions had no leader until the
    /// lease expired.
    #[tokio::test]
    async fn process_exiting_during_probe_is_detected() {
        let (peers, listener, registered) = listening().await;
        let (result, ()) = tokio::join!(probe(&peers, suspect(&registered)), async {
            // The first connection breaks, the second gets no response, and then the listener is closed.
            drop(listener.accept().await.unwrap());
            let silent = listener.accept().await.unwrap();
            tokio::time::sleep(PROBE_TIMEOUT).await;
            drop((listener, silent));
        });
        assert_eq!(result, ProbeResult::Refused);
    }

    #[test]
    fn response_of_other_broker_or_cluster_is_inconclusive() {
        let registered = BrokerValue::running_at("127.0.0.1:9470".to_owned());
        let evaluate = |cluster: &str, broker, incarnation: &str| {
            let response = v1::GetIdentityResponse {
                cluster: cluster.to_owned(),
                broker_id: broker,
                incarnation: incarnation.to_owned(),
                ..Default::default()
            };
            suspect(&registered).evaluate(&Ok(response))
        };
        assert_eq!(evaluate("test", 1, &registered.incarnation), ProbeResult::Alive);
        assert_eq!(evaluate("test", 1, "another"), ProbeResult::Replaced);
        assert_eq!(evaluate("other", 1, "another"), ProbeResult::Inconclusive, "an address that two clusters use");
        assert_eq!(evaluate("test", 2, "another"), ProbeResult::Inconclusive, "an address that two brokers use");
    }

    #[tokio::test]
    async fn unresponsive_process_is_not_declared_gone() {
        let (peers, _listener, registered) = listening().await;
        assert_eq!(probe(&peers, suspect(&registered)).await, ProbeResult::Inconclusive);
    }
}
