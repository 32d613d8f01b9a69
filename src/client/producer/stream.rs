//! One Produce stream to one leader: what the producer's task puts in goes out in order, what the broker answers comes
//! back as events.

use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{IntoStreamingRequest as _, Status, client::Grpc, codegen::http::uri::PathAndQuery};

use super::{
    super::{Client, connection::Address, error::ConnectError, transport::Wire},
    driver::Event,
};
use crate::{
    limits,
    proto::{
        codec::Tuned,
        fault::{Fault, Reason},
        frame::ProduceFrame,
        v1,
    },
};

/// Runs the stream until it ends, and says how. `number` names it in events.
pub(super) async fn run(
    client: Client,
    address: Address,
    number: u64,
    requests: mpsc::Receiver<ProduceFrame>,
    events: mpsc::Sender<Event>,
) {
    let wire = match client.wire(&address).await {
        Ok(wire) => wire,
        Err(error) => {
            let problem = match error {
                ConnectError::NoAnswer { .. } => error.to_string(),
                other => format!("{}: {other}", address.as_str()),
            };
            let fault = Fault::new(Reason::NotReady, problem);
            let _ = events.send(Event::Ended { stream: number, delivered: false, fault }).await;
            return;
        }
    };
    let fault = match open(wire, requests).await {
        Ok(answers) => forward(answers.into_inner(), number, &events).await,
        Err(status) => Fault::from(&status),
    };
    let fault = Fault { message: format!("{}: {}", address.as_str(), fault.message), ..fault };
    let _ = events.send(Event::Ended { stream: number, delivered: true, fault }).await;
}

/// Calls `Produce` as the generated client does, but with frames.
async fn open(
    wire: Wire,
    requests: mpsc::Receiver<ProduceFrame>,
) -> Result<tonic::Response<tonic::Streaming<v1::ProduceResponse>>, Status> {
    let mut grpc = Grpc::new(wire)
        .max_decoding_message_size(limits::MAX_MESSAGE_BYTES)
        .max_encoding_message_size(limits::MAX_MESSAGE_BYTES);
    let path = PathAndQuery::from_static("/strandline.v1.Log/Produce");
    let request = ReceiverStream::new(requests).into_streaming_request();
    grpc.streaming(request, path, Tuned::<ProduceFrame, v1::ProduceResponse>::default()).await
}

/// Hands the answers on until the stream ends; the end's reason.
async fn forward(
    mut answers: tonic::Streaming<v1::ProduceResponse>,
    stream: u64,
    events: &mpsc::Sender<Event>,
) -> Fault {
    loop {
        match answers.message().await {
            Ok(Some(answer)) => {
                if events.send(Event::Answer { stream, answer }).await.is_err() {
                    return Fault::new(Reason::NotReady, "the producer has ended");
                }
            }
            Ok(None) => return Fault::new(Reason::NotReady, "the broker ended the stream"),
            Err(status) => return Fault::from(&status),
        }
    }
}
