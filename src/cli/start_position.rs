//! Start positions in a log as a user types them: `earliest`, `latest`, an offset, or `@` with a time.

use std::time::UNIX_EPOCH;

use crate::{client::OffsetSpec, model::Offset};

/// Start of the year 2000 in milliseconds since 1970. Smaller numbers are probably seconds.
const YEAR_2000_MS: i64 = 946_684_800_000;

/// Position at which reading starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum StartPosition {
    /// The earliest offset, the latest offset, or the offset at a time, looked up in each partition.
    At(OffsetSpec),
    /// The same offset in each partition.
    Offset(Offset),
}

impl std::str::FromStr for StartPosition {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "earliest" => return Ok(Self::At(OffsetSpec::Earliest)),
            "latest" => return Ok(Self::At(OffsetSpec::Latest)),
            _ => {}
        }
        if let Some(time) = text.strip_prefix('@') {
            if time.parse().is_ok_and(|ms: i64| (1..YEAR_2000_MS).contains(&ms)) {
                return Err(format!(
                    "{time} milliseconds since 1970 is before 2000 and looks like seconds: write milliseconds \
                     (@{time}000), or RFC 3339 such as @2026-01-31T12:00:00Z"
                ));
            }
            return time_ms(time).map(|ms| Self::At(OffsetSpec::Time(ms))).ok_or_else(|| {
                format!(
                    "{time:?} is not a time: write milliseconds since 1970, or RFC 3339 such as \
                    @2026-01-31T12:00:00Z"
                )
            });
        }
        match text.parse().ok().and_then(Offset::new) {
            Some(offset) => Ok(Self::Offset(offset)),
            None => Err("write earliest, latest, an offset, or @ with a time (milliseconds or RFC 3339)".to_owned()),
        }
    }
}

/// Parses a time, in milliseconds or in RFC 3339 with `Z` or a numeric zone offset, into milliseconds since 1970.
/// Returns `None` for other text.
fn time_ms(text: &str) -> Option<i64> {
    if let Ok(ms) = text.parse() {
        return Some(ms);
    }
    // `humantime` parses only `Z`, so the zone offset is cut off and subtracted afterwards.
    let (utc, zone_offset_minutes) = match text.len().checked_sub(6).and_then(|at| text.split_at_checked(at)) {
        Some((time, zone)) if zone.as_bytes()[0] == b'+' || zone.as_bytes()[0] == b'-' => {
            let (hours, minutes) = zone[1..].split_once(':')?;
            let (hours, minutes): (i64, i64) = (hours.parse().ok()?, minutes.parse().ok()?);
            if !(0..24).contains(&hours) || !(0..60).contains(&minutes) {
                return None;
            }
            let sign = if zone.starts_with('+') { 1 } else { -1 };
            (format!("{time}Z"), sign * (hours * 60 + minutes))
        }
        _ => (text.to_owned(), 0),
    };
    let time = humantime::parse_rfc3339(&utc).ok()?;
    let ms = match time.duration_since(UNIX_EPOCH) {
        Ok(after) => i64::try_from(after.as_millis()).ok()?,
        Err(before) => -i64::try_from(before.duration().as_millis()).ok()?,
    };
    Some(ms - zone_offset_minutes * 60_000)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_form_of_a_start_position_is_parsed() {
        let time = |ms| Ok(StartPosition::At(OffsetSpec::Time(ms)));
        for (text, position) in [
            ("earliest", Ok(StartPosition::At(OffsetSpec::Earliest))),
            ("latest", Ok(StartPosition::At(OffsetSpec::Latest))),
            ("0", Ok(StartPosition::Offset(Offset::ZERO))),
            ("@0", time(0)),
            ("@1767225600000", time(1_767_225_600_000)),
            ("@2026-01-01T00:00:00Z", time(1_767_225_600_000)),
            ("@2026-01-01T00:00:00.250Z", time(1_767_225_600_250)),
            ("@2026-01-01T02:30:00+02:30", time(1_767_225_600_000)),
            ("@2025-12-31T19:00:00-05:00", time(1_767_225_600_000)),
        ] {
            assert_eq!(text.parse::<StartPosition>(), position, "{text}");
        }
        for text in ["", "yesterday", "-1", "9223372036854775808", "@", "@noon", "@2026-01-01T00:00:00+25:00", "@é:00"]
        {
            assert!(text.parse::<StartPosition>().is_err(), "{text}");
        }
        let seconds = "@1767225600".parse::<StartPosition>().expect_err("in January 1970");
        assert!(seconds.contains("seconds") && seconds.contains("@1767225600000"), "{seconds}");
        assert_eq!(
            "@1999-12-31T23:59:59Z".parse::<StartPosition>(),
            time(946_684_799_000),
            "RFC 3339 times before 2000 are accepted"
        );
    }
}
