//! Fetch stream of a consumer to one broker.

use std::pin::Pin;

use futures::{Stream, StreamExt as _, TryStreamExt as _};
use tokio::sync::mpsc;

use super::super::{
    Client,
    connection::{Address, log_client},
};
use crate::proto::{
    error::{ApiError, ErrorCode},
    v1,
};

/// Event of a stream.
pub(super) enum Heard {
    /// The broker accepted the request.
    Opened,
    Response(v1::FetchResponse),
}

pub(super) type Responses = Pin<Box<dyn Stream<Item = Result<Heard, ApiError>> + Send>>;

/// Returns the events of one stream to one broker. The last item is the error that ended the stream.
pub(super) fn responses(client: Client, address: Address, requests: mpsc::Receiver<v1::FetchRequest>) -> Responses {
    let name = address.clone();
    let open = async move {
        let wire = client.wire(&address).await.map_err(|error| ApiError::new(ErrorCode::NotReady, error.problem()))?;
        let requests = tokio_stream::wrappers::ReceiverStream::new(requests);
        let answer = log_client(wire).fetch(requests).await.map_err(|status| ApiError::from(&status))?;
        let responses = answer.into_inner().map_ok(Heard::Response).map_err(|status| ApiError::from(&status));
        Ok::<_, ApiError>(futures::stream::once(async { Ok(Heard::Opened) }).chain(responses))
    };
    let ended = futures::stream::once(async { Err(ApiError::new(ErrorCode::NotReady, "the broker ended the stream")) });
    let stream = futures::stream::once(open).try_flatten().chain(ended);
    let named = move |fault: ApiError| ApiError { message: format!("{}: {}", name.as_str(), fault.message), ..fault };
    Box::pin(stream.map_err(named))
}
