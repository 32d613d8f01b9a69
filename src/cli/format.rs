//! How `consume` prints a record.

use std::io::{self, Write};

use serde_json::{Value, json};

use crate::client::ConsumedRecord;

/// The form of a printed record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Format {
    /// The value and a line end; a null value is an empty line
    Value,
    /// The key, a tab, the value and a line end
    KeyValue,
    /// One JSON object per line, with all there is
    Json,
}

impl Format {
    pub(super) fn write(self, consumed: &ConsumedRecord, out: &mut impl Write) -> io::Result<()> {
        let record = &consumed.record;
        match self {
            Self::Value => out.write_all(record.value.as_deref().unwrap_or_default())?,
            Self::KeyValue => {
                out.write_all(record.key.as_deref().unwrap_or_default())?;
                out.write_all(b"\t")?;
                out.write_all(record.value.as_deref().unwrap_or_default())?;
            }
            Self::Json => serde_json::to_writer(&mut *out, &object(consumed))?,
        }
        out.write_all(b"\n")
    }
}

fn object(consumed: &ConsumedRecord) -> Value {
    let record = &consumed.record;
    let headers =
        record.headers.iter().map(|header| json!({ "key": header.key, "value": text(header.value.as_deref()) }));
    json!({
        "topic": &*consumed.topic,
        "partition": consumed.partition,
        "offset": consumed.offset,
        "timestamp": record.timestamp_ms,
        "key": text(record.key.as_deref()),
        "value": text(record.value.as_deref()),
        "headers": headers.collect::<Vec<_>>(),
    })
}

/// A string where the bytes are one, base64 where they are not.
pub(super) fn text(bytes: Option<&[u8]>) -> Value {
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

    fn printed(format: Format, record: Record) -> Vec<u8> {
        let consumed =
            ConsumedRecord { topic: "t".into(), partition: 2, offset: Offset::new(7).expect("small"), record };
        let mut out = Vec::new();
        format.write(&consumed, &mut out).expect("memory can be written");
        out
    }

    #[test]
    fn json_tells_null_empty_text_and_bytes_apart() {
        let record = Record {
            timestamp_ms: 5,
            key: None,
            value: Some(Bytes::from_static(b"\xff\xfe")),
            headers: vec![
                Header { key: "a".into(), value: None },
                Header { key: "a".into(), value: Some(Bytes::from_static(b"1")) },
            ],
        };
        let line = printed(Format::Json, record);
        assert_eq!(line.iter().filter(|byte| **byte == b'\n').count(), 1);
        let value: Value = serde_json::from_slice(&line).expect("JSON");
        assert_eq!(
            value,
            json!({
                "topic": "t", "partition": 2, "offset": 7, "timestamp": 5, "key": null, "value": {"base64": "//4="},
                "headers": [{"key": "a", "value": null}, {"key": "a", "value": "1"}],
            })
        );
        let empty = Record { key: Some(Bytes::new()), value: None, ..Record::default() };
        let value: Value = serde_json::from_slice(&printed(Format::Json, empty)).expect("JSON");
        assert_eq!((&value["key"], &value["value"]), (&json!(""), &Value::Null));
    }

    #[test]
    fn a_value_is_printed_as_its_bytes() {
        let record = Record {
            key: Some(Bytes::from_static(b"k")),
            value: Some(Bytes::from_static(b"a\r\xff")),
            ..Record::default()
        };
        assert_eq!(printed(Format::Value, record.clone()), b"a\r\xff\n");
        assert_eq!(printed(Format::KeyValue, record), b"k\ta\r\xff\n");
    }
}
