//! Produce stream to one leader: sends the task's requests in order and forwards the broker's responses as events.

use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{IntoStreamingRequest as _, Status, client::Grpc, codegen::http::uri::PathAndQuery};

use super::{
    super::{Client, address::BrokerAddress, call::convert_status, error::ConnectError, transport::BrokerChannel},
    driver_event::DriverEvent,
    produce_request::ProduceRequestParts,
};
use crate::{
    limits,
    proto::{
        codec::LargeBufferCodec,
        error::{ApiError, ErrorCode},
        v1,
    },
};

/// Connects and runs the stream until it ends. Sends each response and the end as events, in which `number` identifies
/// the stream.
pub(super) async fn run(
    client: Client,
    address: BrokerAddress,
    number: u64,
    requests: mpsc::Receiver<ProduceRequestParts>,
    events: mpsc::Sender<DriverEvent>,
) {
    let channel = match client.channel(&address).await {
        Ok(channel) => channel,
        Err(error) => {
            let problem = match error {
                ConnectError::NoResponse { .. } => error.to_string(),
                other => format!("{}: {other}", address.as_str()),
            };
            let error = ApiError::new(ErrorCode::NotReady, problem);
            let _ = events.send(DriverEvent::StreamEnded { stream: number, delivered: false, error }).await;
            return;
        }
    };
    let error = match open(channel, requests).await {
        Ok(responses) => forward(responses.into_inner(), number, &events).await,
        Err(status) => convert_status(&status),
    };
    let error = ApiError { message: format!("{}: {}", address.as_str(), error.message), ..error };
    let _ = events.send(DriverEvent::StreamEnded { stream: number, delivered: true, error }).await;
}

/// Calls `Produce` as the generated client does, but with [`ProduceRequestParts`] as the request type, whose encoding
/// copies each payload once less.
async fn open(
    channel: BrokerChannel,
    requests: mpsc::Receiver<ProduceRequestParts>,
) -> Result<tonic::Response<tonic::Streaming<v1::ProduceResponse>>, Status> {
    let mut grpc = Grpc::new(channel)
        .max_decoding_message_size(limits::MAX_MESSAGE_BYTES)
        .max_encoding_message_size(limits::MAX_MESSAGE_BYTES);
    let path = PathAndQuery::from_static("/strandline.v1.Log/Produce");
    let request = ReceiverStream::new(requests).into_streaming_request();
    grpc.streaming(request, path, LargeBufferCodec::<ProduceRequestParts, v1::ProduceResponse>::default()).await
}

/// Forwards responses as events until the stream ends. Returns the reason for the end.
async fn forward(
    mut responses: tonic::Streaming<v1::ProduceResponse>,
    stream: u64,
    events: &mpsc::Sender<DriverEvent>,
) -> ApiError {
    loop {
        match responses.message().await {
            Ok(Some(response)) => {
                if events.send(DriverEvent::Response { stream, response }).await.is_err() {
                    return ApiError::new(ErrorCode::NotReady, "the producer has ended");
                }
            }
            Ok(None) => return ApiError::new(ErrorCode::NotReady, "the broker ended the stream"),
            Err(status) => return convert_status(&status),
        }
    }
}
