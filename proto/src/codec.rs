//! Message codec whose buffers grow to the size of the message.

use std::marker::PhantomData;

use prost::Message;
use tonic::{
    Status,
    codec::{BufferSettings, Codec, EncodeBuf, Encoder},
};
use tonic_prost::ProstDecoder;

/// Number of encoded bytes after which the codec passes them to HTTP/2. A larger message is passed as one piece.
const YIELD_BYTES: usize = 1 << 20;

/// Initial size of the buffers of a call: enough for a small message. A waiting call keeps its buffers, so larger ones
/// would add up: at 64 KiB, 10,000 waiting calls kept 640 MB.
const INITIAL_BYTES: usize = 1 << 10;

/// Codec of prost messages with one buffer of the size of the message.
#[derive(Clone, Copy, Debug)]
pub struct LargeBufferCodec<T, U>(PhantomData<(T, U)>);

impl<T, U> Default for LargeBufferCodec<T, U> {
    fn default() -> Self {
        Self(PhantomData)
    }
}

impl<T, U> Codec for LargeBufferCodec<T, U>
where
    T: Message + Send + 'static,
    U: Message + Default + Send + 'static,
{
    type Encode = T;
    type Decode = U;
    type Encoder = SizedEncoder<T>;
    type Decoder = ProstDecoder<U>;

    fn encoder(&mut self) -> Self::Encoder {
        SizedEncoder(PhantomData)
    }

    fn decoder(&mut self) -> Self::Decoder {
        ProstDecoder::new(BufferSettings::new(INITIAL_BYTES, YIELD_BYTES))
    }
}

/// Reserves the length of a message before it encodes the message. A buffer that doubles takes up to twice the length
/// and copies the encoded bytes each time.
#[derive(Clone, Copy, Debug)]
pub struct SizedEncoder<T>(PhantomData<T>);

impl<T: Message> Encoder for SizedEncoder<T> {
    type Item = T;
    type Error = Status;

    fn encode(&mut self, message: T, buf: &mut EncodeBuf<'_>) -> Result<(), Status> {
        buf.reserve(message.encoded_len());
        message.encode_raw(buf);
        Ok(())
    }

    fn buffer_settings(&self) -> BufferSettings {
        BufferSettings::new(INITIAL_BYTES, YIELD_BYTES)
    }
}
