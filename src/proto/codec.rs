//! The message codec with buffers that suit batches: measured, the buffer size matters more than HTTP/2's windows.

use std::marker::PhantomData;

use prost::Message;
use tonic::{
    Status,
    codec::{BufferSettings, Codec, EncodeBuf, Encoder},
};
use tonic_prost::ProstDecoder;

/// Bytes that the codec hands to HTTP/2 at a time.
const YIELD_BYTES: usize = 1 << 20;

/// Room that a stream begins with, before it is known what comes. It grows to what a message needs.
const FIRST_BYTES: usize = 64 << 10;

/// Prost messages through large buffers.
#[derive(Clone, Copy, Debug)]
pub struct Tuned<T, U>(PhantomData<(T, U)>);

impl<T, U> Default for Tuned<T, U> {
    fn default() -> Self {
        Self(PhantomData)
    }
}

impl<T, U> Codec for Tuned<T, U>
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
        ProstDecoder::new(BufferSettings::new(FIRST_BYTES, YIELD_BYTES))
    }
}

/// Makes room for a whole message before it writes it: a buffer that doubles until a message fits takes up to twice its size, and copies
/// what was written each time.
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
        BufferSettings::new(FIRST_BYTES, YIELD_BYTES)
    }
}
