//! The two text formats of metrics, and the choice between them by the `Accept` header.

use std::fmt::Write as _;

/// A text format of metrics.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MetricsFormat {
    /// OpenMetrics 1.0.0.
    OpenMetrics,
    /// Prometheus text format 0.0.4, the default. Every scraper reads this format.
    Prometheus,
}

impl MetricsFormat {
    /// Returns OpenMetrics if the values of the `Accept` header rate it above 0 and at least as high as the Prometheus
    /// text format. Otherwise returns the Prometheus text format.
    pub fn accepted<'a>(values: impl IntoIterator<Item = &'a str>) -> Self {
        // Highest quality that the header gives each format; 0 if the header excludes or does not name the format.
        let (mut open_metrics, mut prometheus) = (0.0, 0.0);
        for range in values.into_iter().flat_map(|value| value.split(',')) {
            let mut parts = range.split(';').map(str::trim);
            let media = parts.next().unwrap_or_default().to_ascii_lowercase();
            let quality = parts.find_map(|part| part.strip_prefix("q=")).map_or(Ok(1.0), str::parse).unwrap_or(0.0);
            match media.as_str() {
                "application/openmetrics-text" => open_metrics = f64::max(open_metrics, quality),
                "text/plain" | "text/*" | "*/*" => prometheus = f64::max(prometheus, quality),
                _ => {}
            }
        }
        if open_metrics > 0.0 && open_metrics >= prometheus { Self::OpenMetrics } else { Self::Prometheus }
    }

    pub const fn content_type(self) -> &'static str {
        match self {
            Self::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
            Self::Prometheus => "text/plain; version=0.0.4; charset=utf-8",
        }
    }
}

/// Converts OpenMetrics to the Prometheus text format. In the Prometheus format, the HELP and TYPE lines of a counter
/// name it with the suffix `_total` of its samples. That format has no `# EOF` line.
pub(super) fn to_prometheus(open_metrics: &str) -> String {
    let mut out = String::with_capacity(open_metrics.len());
    // Name and text of the last HELP line. The next line contains the type, which determines the name in the output.
    let mut help: Option<(&str, &str)> = None;
    for line in open_metrics.lines() {
        if let Some(described) = line.strip_prefix("# HELP ") {
            help = described.split_once(' ');
        } else if let Some((name, kind)) = line.strip_prefix("# TYPE ").and_then(|typed| typed.split_once(' ')) {
            let suffix = if kind == "counter" { "_total" } else { "" };
            if let Some((_, text)) = help.take().filter(|(described, _)| *described == name) {
                let _ = writeln!(out, "# HELP {name}{suffix} {text}");
            }
            let _ = writeln!(out, "# TYPE {name}{suffix} {kind}");
        } else if !line.starts_with('#') {
            let _ = writeln!(out, "{line}");
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accept_header_selects_format() {
        let prometheus = "application/openmetrics-text;version=1.0.0;q=0.5,application/openmetrics-text;version=0.0.1;q=0.4,\
                          text/plain;version=0.0.4;q=0.3,*/*;q=0.2";
        for (accept, format) in [
            (vec![], MetricsFormat::Prometheus),
            (vec!["*/*"], MetricsFormat::Prometheus),
            (vec!["text/plain"], MetricsFormat::Prometheus),
            (vec![prometheus], MetricsFormat::OpenMetrics),
            (
                vec!["text/plain;q=0.3", "Application/OpenMetrics-Text; version=1.0.0; q=0.5"],
                MetricsFormat::OpenMetrics,
            ),
            (vec!["application/openmetrics-text;q=0.2, text/plain;q=0.9"], MetricsFormat::Prometheus),
            (vec!["application/openmetrics-text;q=0"], MetricsFormat::Prometheus),
            (vec!["application/openmetrics-text;q=x, ;;,"], MetricsFormat::Prometheus),
        ] {
            assert_eq!(MetricsFormat::accepted(accept.clone()), format, "{accept:?}");
        }
    }

    #[test]
    fn prometheus_format_has_counter_suffix_and_no_end_marker() {
        let open = "# HELP a_b Help # here.\n# TYPE a_b counter\na_b_total{x=\"# HELP\"} 1\n\
                    # HELP c Level.\n# TYPE c gauge\nc 2\n# EOF\n";
        let text = "# HELP a_b_total Help # here.\n# TYPE a_b_total counter\na_b_total{x=\"# HELP\"} 1\n\
                    # HELP c Level.\n# TYPE c gauge\nc 2\n";
        assert_eq!(to_prometheus(open), text);
    }
}
