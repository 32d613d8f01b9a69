//! One stream of a consumer to one broker.

use std::pin::Pin;

use futures::{Stream, StreamExt as _, TryStreamExt as _};
use tokio::sync::mpsc;

use super::super::{
    Client,
    connection::{Address, log_client},
};
use crate::proto::{
    fault::{Fault, Reason},
    v1,
};

/// What comes of a stream.
pub(super) enum Heard {
    /// The broker has taken the request.
    Opened,
    Response(v1::FetchResponse),
}

pub(super) type Responses = Pin<Box<dyn Stream<Item = Result<Heard, Fault>> + Send>>;

/// The responses of one stream to one broker; its last item says why it ended.
pub(super) fn responses(client: Client, address: Address, requests: mpsc::Receiver<v1::FetchRequest>) -> Responses {
    let name = address.clone();
    let open = async move {
        let wire = client.wire(&address).await.map_err(|error| Fault::new(Reason::NotReady, error.problem()))?;
        let requests = tokio_stream::wrappers::ReceiverStream::new(requests);
        let answer = log_client(wire).fetch(requests).await.map_err(|status| Fault::from(&status))?;
        let responses = answer.into_inner().map_ok(Heard::Response).map_err(|status| Fault::from(&status));
        Ok::<_, Fault>(futures::stream::once(async { Ok(Heard::Opened) }).chain(responses))
    };
    let ended = futures::stream::once(async { Err(Fault::new(Reason::NotReady, "the broker ended the stream")) });
    let stream = futures::stream::once(open).try_flatten().chain(ended);
    let named = move |fault: Fault| Fault { message: format!("{}: {}", name.as_str(), fault.message), ..fault };
    Box::pin(stream.map_err(named))
}
