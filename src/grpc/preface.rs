//! Waits for the preface of HTTP/2, so that a connection costs no more than its socket until its peer has spoken: h2
//! allocates some 24 KiB of buffers for each.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll},
};

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, ReadBuf};

/// What every HTTP/2 client sends first (RFC 9113 §3.4).
pub(super) const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// A stream with what was read from it put back.
pub(super) struct Prefaced<T> {
    io: T,
    read: [u8; PREFACE.len()],
    /// The part of `read` that is not taken yet.
    start: usize,
    end: usize,
}

impl<T: AsyncRead + Unpin> Prefaced<T> {
    /// Reads until the preface is complete, or is none: h2 then says so to the peer.
    pub(super) async fn read_from(io: T) -> io::Result<Self> {
        let mut this = Self { io, read: [0; PREFACE.len()], start: 0, end: 0 };
        // A peer that speaks another protocol, TLS or HTTP/1, is passed on at its first wrong byte: h2 answers it with
        // the right error.
        while this.end < PREFACE.len() && PREFACE.starts_with(&this.read[..this.end]) {
            match this.io.read(&mut this.read[this.end..]).await? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                count => this.end += count,
            }
        }
        Ok(this)
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Prefaced<T> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if this.start == this.end {
            return Pin::new(&mut this.io).poll_read(cx, buf);
        }
        // h2 reads the preface again, from here.
        let rest = &this.read[this.start..this.end];
        let count = rest.len().min(buf.remaining());
        buf.put_slice(&rest[..count]);
        this.start += count;
        Poll::Ready(Ok(()))
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Prefaced<T> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(cx, bytes)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::duplex;

    use super::*;

    /// What is read of a stream that is sent in `pieces`.
    async fn read(pieces: &[&[u8]]) -> io::Result<Vec<u8>> {
        let (mut client, server) = duplex(1);
        let send = async {
            for piece in pieces {
                tokio::io::AsyncWriteExt::write_all(&mut client, piece).await.expect("read");
            }
            drop(client);
        };
        let receive = async {
            let mut all = Vec::new();
            Prefaced::read_from(server).await?.read_to_end(&mut all).await?;
            Ok(all)
        };
        tokio::join!(send, receive).1
    }

    #[tokio::test]
    async fn what_was_read_is_read_again() {
        let whole = [PREFACE, b"and frames"].concat();
        assert_eq!(read(&[&whole]).await.expect("a preface"), whole);
        assert_eq!(read(&[&whole[..3], &whole[3..]]).await.expect("a preface"), whole);
        assert_eq!(read(&[b"GET / HTTP/1.1\r\n"]).await.expect("passed on"), b"GET / HTTP/1.1\r\n");
        assert_eq!(read(&[b"PRX"]).await.expect("passed on"), b"PRX");
        for part in [0, 1, 23] {
            let err = read(&[&PREFACE[..part]]).await.expect_err("no preface");
            assert_eq!(err.kind(), io::ErrorKind::UnexpectedEof);
        }
    }
}
