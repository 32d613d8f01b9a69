//! The message codec with buffers that suit batches: they are as large as the message that they hold.

use std::marker::PhantomData;

use prost::Message;
use tonic::{
    Status,
    codec::{BufferSettings, Codec, EncodeBuf, Encoder},
};
use tonic_prost::ProstDecoder;

/// Bytes that the codec hands to HTTP/2 at a time.
const YIELD_BYTES: usize = 1 << 20;

/// Bytes that each call's buffer begins with: enough for a small message. It grows to what a message needs. A call that waits holds it,
/// so 10,000 of them with 64 KiB held 640 MB.
const FIRST_BYTES: usize = 1 << 10;

/// Prost messages through buffers of their size.
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
