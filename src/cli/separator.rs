//! Separators as a user types them, with escapes for bytes that are hard to type in a shell.

use std::{fmt, str::FromStr};

/// Bytes between two parts of a line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Separator {
    bytes: Vec<u8>,
    /// Text that the user typed, for messages.
    typed: String,
}

impl Separator {
    /// Returns the two parts of a line around its first separator; `None` if the line contains no separator.
    pub(super) fn split<'a>(&self, line: &'a [u8]) -> Option<(&'a [u8], &'a [u8])> {
        let at = line.windows(self.bytes.len()).position(|window| window == self.bytes)?;
        Some((&line[..at], &line[at + self.bytes.len()..]))
    }
}

impl fmt::Display for Separator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.typed)
    }
}

impl FromStr for Separator {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (mut bytes, mut rest) = (Vec::new(), text.chars());
        while let Some(char) = rest.next() {
            if char != '\\' {
                bytes.extend_from_slice(char.encode_utf8(&mut [0; 4]).as_bytes());
                continue;
            }
            bytes.push(match rest.next() {
                Some('t') => b'\t',
                Some('n') => b'\n',
                Some('r') => b'\r',
                Some('\\') => b'\\',
                Some('x') => {
                    let digits =
                        rest.as_str().get(..2).filter(|digits| digits.bytes().all(|digit| digit.is_ascii_hexdigit()));
                    let byte = digits.and_then(|digits| u8::from_str_radix(digits, 16).ok());
                    let byte = byte.ok_or("\\x needs two hexadecimal digits, such as \\x1f")?;
                    rest = rest.as_str()[2..].chars();
                    byte
                }
                Some(letter) => {
                    return Err(format!(
                        "\\{letter} is not an escape: write \\t, \\n, \\r, \\\\ or \\xNN; \\\\ is one backslash"
                    ));
                }
                None => return Err("the separator ends with a single backslash: write \\\\ for a backslash".to_owned()),
            });
        }
        match bytes.is_empty() {
            true => Err("the separator is empty: write at least one character".to_owned()),
            false => Ok(Self { bytes, typed: text.to_owned() }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn separator_escapes_are_parsed_into_bytes() {
        for (typed, bytes) in [
            (":", &b":"[..]),
            (r"\t", b"\t"),
            (r"a\n\rb", b"a\n\rb"),
            (r"\\t", br"\t"),
            (r"\x1f", b"\x1f"),
            (r"\xFFé\x00", b"\xff\xc3\xa9\x00"),
            ("\t", b"\t"),
        ] {
            assert_eq!(typed.parse::<Separator>().expect(typed).bytes, bytes, "{typed}");
        }
        for wrong in ["", r"\", r"a\", r"\q", r"\x", r"\x1", r"\xé", r"\x+1", r"\x1g"] {
            assert!(wrong.parse::<Separator>().is_err(), "{wrong:?}");
        }
        assert!(r"\q".parse::<Separator>().expect_err("unknown").contains(r"\t"));
    }

    #[test]
    fn line_is_split_at_the_first_separator() {
        let tab: Separator = r"\t".parse().expect("valid");
        assert_eq!(tab.split(b"k\ta\tb"), Some((&b"k"[..], &b"a\tb"[..])));
        assert_eq!(tab.split(br"k\tv"), None, "the two characters are not a tab");
        assert_eq!(tab.split(b"\t"), Some((&b""[..], &b""[..])));
    }
}
