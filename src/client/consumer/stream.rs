//! Fetch stream of a consumer to one broker.

use std::pin::Pin;

use futures::{Stream, StreamExt as _, TryStreamExt as _};
use tokio::sync::mpsc;

use super::super::{
    Client,
    connection::{BrokerAddress, log_client},
};
use crate::proto::{
    error::{ApiError, ErrorCode},
    v1,
};

/// Event of a stream.
pub(super) enum StreamEvent {
    /// The broker accepted the request.
    Opened,
    Response(v1::FetchResponse),
}

pub(super) type ResponseStream = Pin<Box<dyn Stream<Item = Result<StreamEvent, ApiError>> + Send>>;

/// Returns the events of one stream to one broker. The last item is the error that ended the stream.
pub(super) fn responses(
    client: Client,
    address: BrokerAddress,
    requests: mpsc::Receiver<v1::FetchRequest>,
) -> ResponseStream {
    let name = address.clone();
    let open = async move {
        let channel =
            client.wire(&address).await.map_err(|error| ApiError::new(ErrorCode::NotReady, error.problem()))?;
        let requests = tokio_stream::wrappers::ReceiverStream::new(requests);
        let response = log_client(channel).fetch(requests).await.map_err(|status| ApiError::from(&status))?;
        let responses = response.into_inner().map_ok(StreamEvent::Response).map_err(|status| ApiError::from(&status));
        Ok::<_, ApiError>(futures::stream::once(async { Ok(StreamEvent::Opened) }).chain(responses))
    };
    let ended = futures::stream::once(async { Err(ApiError::new(ErrorCode::NotReady, "the broker ended the stream")) });
    let stream = futures::stream::once(open).try_flatten().chain(ended);
    let named = move |error: ApiError| ApiError { message: format!("{}: {}", name.as_str(), error.message), ..error };
    Box::pin(stream.map_err(named))
}
