//! Conversion of text to typed values. Every source provides text; the kind of the setting defines the valid texts.

use std::{net::SocketAddr, time::Duration};

use super::setting::ValueKind;

/// Returns true if the text is a value of this kind.
pub(super) fn valid(kind: ValueKind, text: &str) -> bool {
    match kind {
        ValueKind::Text | ValueKind::Path => !text.is_empty() && !text.contains('\0'),
        ValueKind::Listen => text.parse::<SocketAddr>().is_ok(),
        ValueKind::HostPort => host_port(text).is_some(),
        ValueKind::Number { least, most } => {
            let digits = text.bytes().all(|byte| byte.is_ascii_digit());
            digits && text.parse::<u64>().is_ok_and(|number| (least..=most).contains(&number))
        }
        ValueKind::Bytes { least, most } => bytes(text).is_some_and(|number| (least..=most).contains(&number)),
        ValueKind::Time { least, most } => {
            let within = |time: Duration| (Duration::from_secs(least)..=Duration::from_secs(most)).contains(&time);
            duration(text).is_some_and(within)
        }
        ValueKind::Flag => matches!(text, "true" | "false"),
        ValueKind::Word(words) => words.contains(&text),
        ValueKind::Urls => urls(text).iter().all(|url| web_url(url)) && !text.is_empty(),
    }
}

/// Parses a number of bytes, with or without a binary unit.
pub(super) fn bytes(text: &str) -> Option<u64> {
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

/// Formats a number of bytes in the largest unit that divides it.
pub(super) fn size(bytes: u64) -> String {
    for (shift, name) in [(40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")] {
        let unit = 1 << shift;
        if bytes >= unit && bytes.is_multiple_of(unit) {
            return format!("{}{name}", bytes / unit);
        }
    }
    bytes.to_string()
}

/// Parses a time with its unit.
pub(super) fn duration(text: &str) -> Option<Duration> {
    humantime::parse_duration(text).ok()
}

/// Splits an address into host and port. An IPv6 address must be in brackets.
pub(super) fn host_port(text: &str) -> Option<(&str, u16)> {
    let (host, port) = text.rsplit_once(':')?;
    let bracketed = host.starts_with('[') && host.ends_with(']') && host.len() > 2;
    let plain = !host.is_empty() && host.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_'));
    let legal = if bracketed { text.parse::<SocketAddr>().is_ok() } else { plain };
    if legal { Some((host, port.parse().ok()?)) } else { None }
}

/// Splits a comma-separated list of URLs.
pub(super) fn urls(text: &str) -> Vec<String> {
    text.split(',').map(str::trim).filter(|url| !url.is_empty()).map(str::to_owned).collect()
}

/// Returns true if the text is an `http` or `https` URL with a host.
pub(super) fn web_url(text: &str) -> bool {
    let host = text.strip_prefix("http://").or_else(|| text.strip_prefix("https://"));
    host.is_some_and(|host| !host.is_empty() && !host.starts_with('/') && !host.contains(char::is_whitespace))
}

/// Masks the user and password of each URL in a comma-separated text, for everything that is printed.
pub(super) fn masked(text: &str) -> String {
    let one = |part: &str| match part.split_once("://") {
        Some((scheme, rest)) => {
            let end = rest.find('/').unwrap_or(rest.len());
            match rest[..end].rfind('@') {
                Some(at) => format!("{scheme}://***@{}", &rest[at + 1..]),
                None => part.to_owned(),
            }
        }
        None => part.to_owned(),
    };
    text.split(',').map(one).collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_take_binary_units_and_never_overflow() {
        assert_eq!(bytes("0"), Some(0));
        assert_eq!(bytes("64MiB"), Some(64 << 20));
        assert_eq!(bytes("1 GiB"), Some(1 << 30));
        for bad in ["", "MiB", "1MB", "-1", "1.5GiB", "99999999999TiB", "18446744073709551616"] {
            assert_eq!(bytes(bad), None, "{bad}");
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
        assert_eq!(masked("http://u:p@a:1,https://b"), "http://***@a:1,https://b");
        assert_eq!(masked("s3://key:se@cret@bucket/a@b"), "s3://***@bucket/a@b");
        assert_eq!(masked("plain@text"), "plain@text");
    }
}
