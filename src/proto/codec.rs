//! The message codec with buffers that suit batches: measured, the buffer size matters more than HTTP/2's windows.

use std::marker::PhantomData;

use prost::Message;
use tonic::codec::{BufferSettings, Codec};
use tonic_prost::{ProstDecoder, ProstEncoder};

/// Bytes that the codec reads and hands to HTTP/2 at a time.
const BUFFER_BYTES: usize = 1 << 20;

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
    type Encoder = ProstEncoder<T>;
    type Decoder = ProstDecoder<U>;

    fn encoder(&mut self) -> Self::Encoder {
        ProstEncoder::new(BufferSettings::new(BUFFER_BYTES, BUFFER_BYTES))
    }

    fn decoder(&mut self) -> Self::Decoder {
        ProstDecoder::new(BufferSettings::new(BUFFER_BYTES, BUFFER_BYTES))
    }
}
