//! Kinds of values: accepted texts, bounds, and the notation in files, messages and documentation.
//!
//! Every source provides text. [`ValueKind`] decides which texts a setting accepts, and [`SettingValue`] converts an
//! accepted text to the type of the field.

use std::{net::SocketAddr, ops::RangeInclusive, path::PathBuf, time::Duration};

use toml::de::DeValue;

use crate::{cluster::Keys, model::BrokerId, telemetry::LogFormat};

/// Values that a setting accepts, and their notation.
#[derive(Clone, Debug)]
pub(super) enum ValueKind {
    /// Any text that is not empty and contains no NUL.
    Text,
    ClusterName,
    /// A path. A relative path starts at the working directory of the broker.
    Path,
    /// `ip:port`.
    Listen,
    /// `host:port`.
    HostPort,
    Number(RangeInclusive<u64>),
    /// A number of bytes, optionally with B, KiB, MiB, GiB or TiB.
    Bytes(RangeInclusive<u64>),
    /// A time with a unit, such as `500ms` or `7d`. The bounds are in milliseconds.
    Time(RangeInclusive<u64>),
    Flag,
    /// One of these names.
    Name(&'static [&'static str]),
    /// URLs: an array in the file, a comma-separated list elsewhere.
    Urls,
}

impl ValueKind {
    /// Returns true if the text is a value of this kind.
    pub(super) fn accepts(&self, text: &str) -> bool {
        match self {
            Self::Text | Self::Path => !text.is_empty() && !text.contains('\0'),
            Self::ClusterName => Keys::new(text).is_ok(),
            Self::Listen => text.parse::<SocketAddr>().is_ok(),
            Self::HostPort => host_port(text).is_some(),
            Self::Number(range) => {
                let digits = text.bytes().all(|byte| byte.is_ascii_digit());
                digits && text.parse().is_ok_and(|number| range.contains(&number))
            }
            Self::Bytes(range) => parse_bytes(text).is_some_and(|bytes| range.contains(&bytes)),
            Self::Time(range) => {
                let (min, max) = (Duration::from_millis(*range.start()), Duration::from_millis(*range.end()));
                parse_duration(text).is_some_and(|time| (min..=max).contains(&time))
            }
            Self::Flag => matches!(text, "true" | "false"),
            Self::Name(names) => names.contains(&text),
            Self::Urls => split_urls(text).iter().all(|url| is_web_url(url)) && !text.is_empty(),
        }
    }

    /// Describes the accepted values, for errors and documentation.
    pub(super) fn describe(&self) -> String {
        match self {
            Self::Text => "a text that is not empty".to_owned(),
            Self::ClusterName => "a text of 1 to 100 characters from a-z, A-Z, 0-9, '.', '_' and '-'".to_owned(),
            Self::Path => "a path".to_owned(),
            Self::Listen => "an IP address and a port, like 127.0.0.1:9460 or [::1]:9460".to_owned(),
            Self::HostPort => "a host name or IP address and a port, like broker-1.example:9460".to_owned(),
            Self::Number(range) => format!("a whole number from {} to {}", range.start(), range.end()),
            Self::Bytes(range) => {
                let (min, max) = (format_bytes(*range.start()), format_bytes(*range.end()));
                format!("a number of bytes from {min} to {max}, like 1048576 or 64MiB")
            }
            Self::Time(range) => {
                let (min, max) = (format_ms(*range.start()), format_ms(*range.end()));
                format!("a time with its unit from {min} to {max}, like 500ms, 30s, 5m, 1h or 7d")
            }
            Self::Flag => "true or false".to_owned(),
            Self::Name(names) => names.join(" or "),
            Self::Urls => "URLs like http://127.0.0.1:2379".to_owned(),
        }
    }

    /// Returns the text of a TOML value; `None` if this kind does not accept the TOML type. An array with a URL that
    /// contains a comma is not accepted, because a comma separates URLs in the text.
    pub(super) fn text_of(&self, value: &DeValue<'_>) -> Option<String> {
        match (self, value) {
            (Self::Number(_) | Self::Bytes(_), DeValue::Integer(number)) => {
                decimal_text(number.as_str(), number.radix())
            }
            (Self::Flag, DeValue::Boolean(flag)) => Some(flag.to_string()),
            (Self::Urls, DeValue::Array(urls)) => {
                let url = |value: &DeValue<'_>| value.as_str().filter(|url| !url.contains(',')).map(str::to_owned);
                let urls = urls.iter().map(|value| url(value.get_ref())).collect::<Option<Vec<_>>>()?;
                Some(urls.join(","))
            }
            (Self::Number(_) | Self::Flag, _) => None,
            (_, DeValue::String(text)) => Some(text.to_string()),
            _ => None,
        }
    }

    /// Returns an accepted text as a TOML value. Passwords in URLs are masked.
    pub(super) fn to_toml(&self, text: &str) -> String {
        match self {
            // The environment accepts spellings that TOML rejects, such as `007`.
            Self::Number(_) => text.parse::<u64>().map_or_else(|_| text.to_owned(), |number| number.to_string()),
            Self::Flag => text.to_owned(),
            Self::Urls => {
                let urls: Vec<_> = split_urls(&mask_passwords(text)).iter().map(|url| quote(url)).collect();
                format!("[{}]", urls.join(", "))
            }
            _ => quote(&mask_passwords(text)),
        }
    }
}

/// Type of a field of the configuration.
pub(super) trait SettingValue: Sized {
    /// Converts the text of a setting; `text` is `None` if the setting is unset. Returns `None` if the type cannot
    /// represent the text, or cannot represent an unset setting.
    fn from_text(text: Option<&str>) -> Option<Self>;

    /// Returns true for a zero. An optional number or time becomes `None` for a zero, which means "no limit" or
    /// "never".
    fn is_zero(&self) -> bool {
        false
    }
}

impl<T: SettingValue> SettingValue for Option<T> {
    fn from_text(text: Option<&str>) -> Option<Self> {
        let Some(text) = text else { return Some(None) };
        T::from_text(Some(text)).map(|value| Some(value).filter(|value| !value.is_zero()))
    }
}

impl SettingValue for Vec<String> {
    fn from_text(text: Option<&str>) -> Option<Self> {
        Some(text.map(split_urls).unwrap_or_default())
    }
}

macro_rules! setting_values {
    ($($type:ty: $parse:expr $(, zero $zero:expr)?;)*) => {$(
        impl SettingValue for $type {
            fn from_text(text: Option<&str>) -> Option<Self> {
                text.and_then($parse)
            }

            $(fn is_zero(&self) -> bool {
                *self == $zero
            })?
        }
    )*};
}

setting_values! {
    String: |text| Some(text.to_owned());
    PathBuf: |text| Some(text.into());
    SocketAddr: |text| text.parse().ok();
    bool: |text| text.parse().ok();
    u64: parse_bytes, zero 0;
    u32: |text| parse_bytes(text)?.try_into().ok(), zero 0;
    usize: |text| parse_bytes(text)?.try_into().ok(), zero 0;
    Duration: parse_duration, zero Duration::ZERO;
    BrokerId: |text| text.parse().ok().map(BrokerId);
    LogFormat: LogFormat::from_name;
}

/// Parses a number of bytes, with or without a binary unit; `None` if the text is anything else or exceeds `u64`.
pub(super) fn parse_bytes(text: &str) -> Option<u64> {
    let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let (number, unit) = text.split_at(digits);
    let shift = match unit.trim() {
        "" | "B" => 0,
        "KiB" => 10,
        "MiB" => 20,
        "GiB" => 30,
        "TiB" => 40,
        _ => return None,
    };
    number.parse::<u64>().ok()?.checked_mul(1 << shift)
}

/// Formats a number of bytes in the largest unit that divides the number without a remainder.
pub(super) fn format_bytes(bytes: u64) -> String {
    format_in_unit(bytes, &[(1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"), (1, "")])
}

/// Formats a number of milliseconds in the largest unit that divides the number without a remainder.
fn format_ms(ms: u64) -> String {
    match ms {
        0 => "0s".to_owned(),
        _ => format_in_unit(ms, &[(86_400_000, "d"), (3_600_000, "h"), (1000, "s"), (1, "ms")]),
    }
}

/// Formats a number in the largest unit that divides the number without a remainder. `units` starts with the largest.
fn format_in_unit(number: u64, units: &[(u64, &str)]) -> String {
    let unit = units.iter().find(|(unit, _)| number.is_multiple_of(*unit) && number >= *unit);
    let (unit, name) = unit.unwrap_or(&(1, ""));
    format!("{}{name}", number / unit)
}

/// Parses a time with its unit.
fn parse_duration(text: &str) -> Option<Duration> {
    humantime::parse_duration(text).ok()
}

/// Splits an address into host and port; `None` if the text is not `host:port`. An IPv6 address must be in brackets.
pub(super) fn host_port(text: &str) -> Option<(&str, u16)> {
    let (host, port) = text.rsplit_once(':')?;
    let is_bracketed = host.starts_with('[') && host.ends_with(']') && host.len() > 2;
    let is_name =
        !host.is_empty() && host.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_'));
    let is_valid = if is_bracketed { text.parse::<SocketAddr>().is_ok() } else { is_name };
    if is_valid { Some((host, port.parse().ok()?)) } else { None }
}

/// Splits a comma-separated list of URLs. Spaces around a URL and empty parts are dropped.
fn split_urls(text: &str) -> Vec<String> {
    text.split(',').map(str::trim).filter(|url| !url.is_empty()).map(str::to_owned).collect()
}

/// Returns true if the text is an `http` or `https` URL with a host.
pub(super) fn is_web_url(text: &str) -> bool {
    let host = text.strip_prefix("http://").or_else(|| text.strip_prefix("https://"));
    host.is_some_and(|host| !host.is_empty() && !host.starts_with('/') && !host.contains(char::is_whitespace))
}

/// Masks the user and password of each URL in a comma-separated text, for everything that is printed.
pub(super) fn mask_passwords(text: &str) -> String {
    let mask = |url: &str| match url.split_once("://") {
        Some((scheme, rest)) => {
            let end = rest.find('/').unwrap_or(rest.len());
            match rest[..end].rfind('@') {
                Some(at) => format!("{scheme}://***@{}", &rest[at + 1..]),
                None => url.to_owned(),
            }
        }
        None => url.to_owned(),
    };
    text.split(',').map(mask).collect::<Vec<_>>().join(",")
}

/// Returns true if a URL contains a user or a password.
pub(super) fn has_password(url: &str) -> bool {
    mask_passwords(url) != url
}

/// Returns the text as a quoted TOML string.
pub(super) fn quote(text: &str) -> String {
    toml::Value::String(text.to_owned()).to_string()
}

/// Formats a TOML value of any type, for a message or for a topic configuration.
pub(super) fn format_toml(value: &DeValue<'_>) -> String {
    match value {
        DeValue::String(text) => text.to_string(),
        DeValue::Integer(number) => {
            decimal_text(number.as_str(), number.radix()).unwrap_or_else(|| number.as_str().to_owned())
        }
        DeValue::Float(number) => number.as_str().to_owned(),
        DeValue::Boolean(flag) => flag.to_string(),
        DeValue::Datetime(time) => time.to_string(),
        DeValue::Array(values) => {
            let values: Vec<_> = values.iter().map(|value| format_toml(value.get_ref())).collect();
            format!("[{}]", values.join(", "))
        }
        DeValue::Table(_) => "a table".to_owned(),
    }
}

/// Returns an integer of TOML, such as `0x10`, as decimal text; `None` if it is out of the range of `i64`.
fn decimal_text(digits: &str, radix: u32) -> Option<String> {
    i64::from_str_radix(digits, radix).ok().map(|number| number.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_take_binary_units_and_never_overflow() {
        assert_eq!(parse_bytes("0"), Some(0));
        assert_eq!(parse_bytes("64MiB"), Some(64 << 20));
        assert_eq!(parse_bytes("1 GiB"), Some(1 << 30));
        for bad in ["", "MiB", "1MB", "-1", "1.5GiB", "99999999999TiB", "18446744073709551616"] {
            assert_eq!(parse_bytes(bad), None, "{bad}");
        }
    }

    #[test]
    fn advertised_addresses_are_a_host_and_a_port() {
        for good in ["a:1", "broker-1.example:9460", "10.0.0.1:65535", "[::1]:9460"] {
            assert!(host_port(good).is_some(), "{good}");
        }
        for bad in ["", "a", ":1", "a:", "a:65536", "::1:9460", "http://a:1", "a b:1", "[]:1", "[zz]:1"] {
            assert!(host_port(bad).is_none(), "{bad}");
        }
    }

    #[test]
    fn passwords_in_urls_are_masked() {
        assert_eq!(mask_passwords("http://u:p@a:1,https://b"), "http://***@a:1,https://b");
        assert_eq!(mask_passwords("s3://key:se@cret@bucket/a@b"), "s3://***@bucket/a@b");
        assert_eq!(mask_passwords("plain@text"), "plain@text");
    }
}
