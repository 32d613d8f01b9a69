//! Produce stream to one leader: sends the task's requests in order and forwards the broker's responses as events.

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
        codec::LargeBufferCodec,
        error::{ApiError, ErrorCode},
        produce_request::ProduceRequestParts,
        v1,
    },
};

/// Runs the stream until it ends, and sends its end as an event. `number` identifies the stream in events.
pub(super) async fn run(
    client: Client,
    address: Address,
    number: u64,
    requests: mpsc::Receiver<ProduceRequestParts>,
    events: mpsc::Sender<Event>,
) {
    let wire = match client.wire(&address).await {
        Ok(wire) => wire,
        Err(error) => {
            let problem = match error {
                ConnectError::NoAnswer { .. } => error.to_string(),
                other => format!("{}: {other}", address.as_str()),
            };
            let fault = ApiError::new(ErrorCode::NotReady, problem);
            let _ = events.send(Event::Ended { stream: number, delivered: false, fault }).await;
            return;
        }
    };
    let fault = match open(wire, requests).await {
        Ok(answers) => forward(answers.into_inner(), number, &events).await,
        Err(status) => ApiError::from(&status),
    };
    let fault = ApiError { message: format!("{}: {}", address.as_str(), fault.message), ..fault };
    let _ = events.send(Event::Ended { stream: number, delivered: true, fault }).await;
}

/// Calls `Produce` as the generated client does, but with [`ProduceRequestParts`] as the request type.
async fn open(
    wire: Wire,
    requests: mpsc::Receiver<ProduceRequestParts>,
) -> Result<tonic::Response<tonic::Streaming<v1::ProduceResponse>>, Status> {
    let mut grpc = Grpc::new(wire)
        .max_decoding_message_size(limits::MAX_MESSAGE_BYTES)
        .max_encoding_message_size(limits::MAX_MESSAGE_BYTES);
    let path = PathAndQuery::from_static("/strandline.v1.Log/Produce");
    let request = ReceiverStream::new(requests).into_streaming_request();
    grpc.streaming(request, path, LargeBufferCodec::<ProduceRequestParts, v1::ProduceResponse>::default()).await
}

/// Forwards responses as events until the stream ends. Returns the reason for the end.
async fn forward(
    mut answers: tonic::Streaming<v1::ProduceResponse>,
    stream: u64,
    events: &mpsc::Sender<Event>,
) -> ApiError {
    loop {
        match answers.message().await {
            Ok(Some(answer)) => {
                if events.send(Event::Answer { stream, answer }).await.is_err() {
                    return ApiError::new(ErrorCode::NotReady, "the producer has ended");
                }
            }
            Ok(None) => return ApiError::new(ErrorCode::NotReady, "the broker ended the stream"),
            Err(status) => return ApiError::from(&status),
        }
    }
}
