//! Lines of a byte stream, with unchanged bytes and bounded memory.

use std::io;

use tokio::io::{AsyncRead, AsyncReadExt as _};

/// Minimum free buffer space before each read, in bytes.
const READ_BYTES: usize = 256 << 10;

/// Line reader that splits at `\n` only: a carriage return stays, an empty line is a line, and the last line needs no
/// `\n`.
pub(super) struct LineReader<R> {
    input: R,
    buffer: Vec<u8>,
    /// Start of the bytes in the buffer that were not returned yet.
    start: usize,
    /// Position up to which the bytes that were not returned contain no `\n`.
    searched: usize,
    max_line_bytes: usize,
    /// True once the input has ended; the buffer may still hold lines.
    is_ended: bool,
    /// Number of lines returned so far.
    pub(super) number: u64,
}

impl<R: AsyncRead + Unpin> LineReader<R> {
    /// Creates a reader that fails if more than `max_line_bytes` bytes are buffered without a `\n`.
    pub(super) fn new(input: R, max_line_bytes: usize) -> Self {
        Self { input, buffer: Vec::new(), start: 0, searched: 0, max_line_bytes, is_ended: false, number: 0 }
    }

    /// Returns the next line without its `\n`; `None` at the end of the input. Fails if a line is too long. Dropping
    /// the future loses no bytes.
    pub(super) async fn next(&mut self) -> io::Result<Option<&[u8]>> {
        loop {
            if let Some(line_end) = self.buffer[self.searched..].iter().position(|byte| *byte == b'\n') {
                let (start, end) = (self.start, self.searched + line_end);
                self.start = end + 1;
                self.searched = self.start;
                self.number += 1;
                return Ok(Some(&self.buffer[start..end]));
            }
            self.searched = self.buffer.len();
            if self.is_ended {
                let start = std::mem::replace(&mut self.start, self.buffer.len());
                let rest = &self.buffer[start..];
                self.number += u64::from(!rest.is_empty());
                return Ok((!rest.is_empty()).then_some(rest));
            }
            self.fill().await?;
        }
    }

    /// Drops the returned bytes from the buffer and reads more. Fails if the buffered line is too long.
    async fn fill(&mut self) -> io::Result<()> {
        self.buffer.drain(..self.start);
        self.searched -= self.start;
        self.start = 0;
        if self.buffer.len() > self.max_line_bytes {
            let message = format!(
                "line {} is longer than {} bytes, the maximum record size",
                self.number + 1,
                self.max_line_bytes
            );
            return Err(io::Error::new(io::ErrorKind::InvalidData, message));
        }
        self.buffer.reserve(READ_BYTES);
        self.is_ended = self.input.read_buf(&mut self.buffer).await? == 0;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn split(input: &[u8]) -> Vec<Vec<u8>> {
        let mut lines = LineReader::new(input, 1 << 20);
        let mut found = Vec::new();
        while let Some(line) = lines.next().await.expect("memory can be read") {
            found.push(line.to_vec());
        }
        assert_eq!(lines.number, u64::try_from(found.len()).expect("few"));
        found
    }

    #[tokio::test]
    async fn lines_are_split_without_changing_bytes() {
        assert_eq!(split(b"").await, [b""; 0]);
        assert_eq!(split(b"\n").await, [b""]);
        assert_eq!(split(b"a").await, [b"a"]);
        assert_eq!(split(b"a\n").await, [b"a"]);
        assert_eq!(split(b"a\r\n\n\xff\0b").await, [&b"a\r"[..], b"", b"\xff\0b"]);
        let long = vec![b'x'; 3 * READ_BYTES];
        assert_eq!(split(&[&long[..], b"\ny"].concat()).await, [&long[..], b"y"]);
    }

    #[tokio::test]
    async fn endless_line_uses_bounded_memory() {
        let mut lines = LineReader::new(tokio::io::repeat(b'x'), 1 << 20);
        let error = lines.next().await.expect_err("the input never ends");
        assert!(error.to_string().contains("line 1 is longer"), "{error}");
        assert!(lines.buffer.capacity() < 4 << 20);
    }
}
