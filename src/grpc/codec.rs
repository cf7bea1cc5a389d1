//! The protobuf codec with small buffers.
//!
//! tonic keeps two buffers for every open stream, each as large as the largest chunk that it ever held.
//! With tonic's defaults, a stream that once sent a full chunk keeps 64 KiB.

use prost::Message;
use tonic::codec::{BufferSettings, Codec};
use tonic_prost::{ProstCodec, ProstDecoder, ProstEncoder};

/// Bytes of a new buffer: some ten registrations.
const BUFFER_BYTES: usize = 1024;

/// Bytes of encoded responses from which on they are passed to the transport. The buffer doubles while it
/// grows, so this many and one more response fit into 4 KiB, which is what such a chunk is charged.
const CHUNK_BYTES: usize = 3 * 1024;

/// Encodes `T`, decodes `U`.
#[derive(Debug)]
pub(crate) struct SmallBufferCodec<T, U>(std::marker::PhantomData<(T, U)>);

impl<T, U> Default for SmallBufferCodec<T, U> {
    fn default() -> Self {
        Self(std::marker::PhantomData)
    }
}

fn buffers() -> BufferSettings {
    BufferSettings::new(BUFFER_BYTES, CHUNK_BYTES)
}

impl<T, U> Codec for SmallBufferCodec<T, U>
where
    T: Message + Send + 'static,
    U: Message + Default + Send + 'static,
{
    type Encode = T;
    type Decode = U;
    type Encoder = ProstEncoder<T>;
    type Decoder = ProstDecoder<U>;

    fn encoder(&mut self) -> Self::Encoder {
        ProstCodec::<T, U>::raw_encoder(buffers())
    }

    fn decoder(&mut self) -> Self::Decoder {
        ProstCodec::<T, U>::raw_decoder(buffers())
    }
}
