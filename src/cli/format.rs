//! Output formats of records for `consume`, and their escapes for terminals.

use std::io::{self, Write};

use serde_json::{Value, json};

use crate::client::ConsumedRecord;

/// Output format of a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum RecordFormat {
    /// The value and a line end; a null value is an empty line
    Value,
    /// The key, a tab, the value and a line end
    KeyValue,
    /// One JSON object per line, with all fields
    Json,
}

/// Printer of records in one format.
#[derive(Clone, Copy, Debug)]
pub(super) struct Printer {
    pub(super) format: RecordFormat,
    /// True if control characters, and bytes that are not UTF-8, are printed as escapes. A record must not move the
    /// user's cursor, make the terminal type text, or show its text in another order.
    pub(super) escapes: bool,
}

impl Printer {
    /// Writes a record and a line end.
    pub(super) fn write(self, consumed: &ConsumedRecord, out: &mut impl Write) -> io::Result<()> {
        let record = &consumed.record;
        match self.format {
            RecordFormat::Value => self.write_bytes(record.value.as_deref(), out)?,
            RecordFormat::KeyValue => {
                self.write_bytes(record.key.as_deref(), out)?;
                out.write_all(b"\t")?;
                self.write_bytes(record.value.as_deref(), out)?;
            }
            RecordFormat::Json if self.escapes => {
                out.write_all(json_for_terminal(&record_json(consumed)).as_bytes())?;
            }
            RecordFormat::Json => serde_json::to_writer(&mut *out, &record_json(consumed))?,
        }
        out.write_all(b"\n")
    }

    /// Writes a key or value; with `escapes`, control characters and bytes that are not UTF-8 as escapes. A null key or
    /// value writes nothing.
    fn write_bytes(self, bytes: Option<&[u8]>, out: &mut impl Write) -> io::Result<()> {
        let bytes = bytes.unwrap_or_default();
        if !self.escapes {
            return out.write_all(bytes);
        }
        for chunk in bytes.utf8_chunks() {
            escape(chunk.valid(), out, |character, out| match u32::from(character) {
                code @ ..=0xff => write!(out, "\\x{code:02x}"),
                code => write!(out, "\\u{{{code:x}}}"),
            })?;
            for byte in chunk.invalid() {
                write!(out, "\\x{byte:02x}")?;
            }
        }
        Ok(())
    }
}

/// Returns a value as JSON in which all control characters are escaped. JSON itself allows control characters from
/// U+007F on, and characters that change the direction of text.
pub(super) fn json_for_terminal(value: &Value) -> String {
    let mut line = Vec::new();
    // The text of a JSON value contains these characters only inside strings, where an escape stands for the character.
    escape(&value.to_string(), &mut line, |character, line| write!(line, "\\u{:04x}", u32::from(character)))
        .expect("memory can be written");
    String::from_utf8(line).expect("escapes are ASCII")
}

/// Writes `text`, and passes every control character except tab and line end to `write_escape`.
fn escape<W: Write>(text: &str, out: &mut W, write_escape: impl Fn(char, &mut W) -> io::Result<()>) -> io::Result<()> {
    let mut rest = text;
    while let Some(at) = rest.find(|character| is_control(character) && !matches!(character, '\t' | '\n')) {
        let (before, from) = rest.split_at(at);
        out.write_all(before.as_bytes())?;
        let mut characters = from.chars();
        write_escape(characters.next().expect("a control character is at this position"), out)?;
        rest = characters.as_str();
    }
    out.write_all(rest.as_bytes())
}

/// Returns true for a character that a terminal executes instead of showing. This is a control character, or a
/// character that changes the direction of text (Unicode's `Bidi_Control`).
fn is_control(character: char) -> bool {
    let changes_direction = matches!(
        character,
        '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}'
    );
    character.is_control() || changes_direction
}

/// Returns a record as JSON, with all its fields.
fn record_json(consumed: &ConsumedRecord) -> Value {
    let record = &consumed.record;
    let headers = record
        .headers
        .iter()
        .map(|header| json!({ "key": header.key, "value": bytes_as_json(header.value.as_deref()) }));
    json!({
        "topic": &*consumed.topic,
        "partition": consumed.partition,
        "offset": consumed.offset,
        "timestamp_ms": record.timestamp_ms,
        "key": bytes_as_json(record.key.as_deref()),
        "value": bytes_as_json(record.value.as_deref()),
        "headers": headers.collect::<Vec<_>>(),
    })
}

/// Returns bytes as a JSON string if they are UTF-8, else as an object with base64. Returns null for `None`.
pub(super) fn bytes_as_json(bytes: Option<&[u8]>) -> Value {
    use base64::{Engine as _, engine::general_purpose::STANDARD};
    match bytes {
        None => Value::Null,
        Some(bytes) => match std::str::from_utf8(bytes) {
            Ok(text) => Value::from(text),
            Err(_) => json!({ "base64": STANDARD.encode(bytes) }),
        },
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::{
        model::Offset,
        record::{Header, Record},
    };

    fn printed(format: RecordFormat, record: Record) -> Vec<u8> {
        let consumed =
            ConsumedRecord { topic: "t".into(), partition: 2, offset: Offset::new(7).expect("small"), record };
        let mut out = Vec::new();
        Printer { format, escapes: false }.write(&consumed, &mut out).expect("memory can be written");
        let mut escaped = Vec::new();
        Printer { format, escapes: true }.write(&consumed, &mut escaped).expect("memory can be written");
        let escaped = String::from_utf8(escaped).expect("escaped output is UTF-8");
        assert!(!escaped.trim_end_matches('\n').contains(|c: char| c.is_control() && c != '\t'), "{escaped:?}");
        out
    }

    #[test]
    fn terminal_escapes_do_not_change_the_json_value() {
        let value = Bytes::from_static("a\tb\x1b[2J\r\x07é\u{9b}31m\x7f\u{202e}".as_bytes());
        let record = Record { value: Some([&value[..], b"\xff\x9b"].concat().into()), ..Record::default() };
        let consumed = ConsumedRecord { topic: "t".into(), partition: 0, offset: Offset::ZERO, record };
        let printed = |format, escapes| {
            let mut out = Vec::new();
            Printer { format, escapes }.write(&consumed, &mut out).expect("memory can be written");
            out
        };
        let text = String::from_utf8(printed(RecordFormat::Value, true)).expect("text");
        assert_eq!(text, "a\tb\\x1b[2J\\x0d\\x07é\\x9b31m\\x7f\\u{202e}\\xff\\x9b\n");
        let record = Record { value: Some(value), ..Record::default() };
        let consumed = ConsumedRecord { record, ..consumed.clone() };
        let lines = [true, false].map(|escapes| {
            let mut out = Vec::new();
            Printer { format: RecordFormat::Json, escapes }.write(&consumed, &mut out).expect("memory can be written");
            out
        });
        assert_ne!(lines[0], lines[1]);
        let [escaped, plain] = lines.map(|line| serde_json::from_slice::<Value>(&line).expect("JSON"));
        assert_eq!(escaped, plain);
    }

    #[test]
    fn json_distinguishes_null_empty_text_and_bytes() {
        let record = Record {
            timestamp_ms: 5,
            key: None,
            value: Some(Bytes::from_static(b"\xff\xfe")),
            headers: vec![
                Header { key: "a".into(), value: None },
                Header { key: "a".into(), value: Some(Bytes::from_static(b"1")) },
            ],
        };
        let line = printed(RecordFormat::Json, record);
        assert_eq!(line.iter().filter(|byte| **byte == b'\n').count(), 1);
        let value: Value = serde_json::from_slice(&line).expect("JSON");
        assert_eq!(
            value,
            json!({
                "topic": "t", "partition": 2, "offset": 7, "timestamp_ms": 5, "key": null,
                "value": {"base64": "//4="},
                "headers": [{"key": "a", "value": null}, {"key": "a", "value": "1"}],
            })
        );
        let empty = Record { key: Some(Bytes::new()), value: None, ..Record::default() };
        let value: Value = serde_json::from_slice(&printed(RecordFormat::Json, empty)).expect("JSON");
        assert_eq!((&value["key"], &value["value"]), (&json!(""), &Value::Null));
    }

    #[test]
    fn value_is_printed_as_raw_bytes() {
        let record = Record {
            key: Some(Bytes::from_static(b"k")),
            value: Some(Bytes::from_static(b"a\r\xff")),
            ..Record::default()
        };
        assert_eq!(printed(RecordFormat::Value, record.clone()), b"a\r\xff\n");
        assert_eq!(printed(RecordFormat::KeyValue, record), b"k\ta\r\xff\n");
    }
}
