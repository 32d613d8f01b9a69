//! Results of a benchmark, for people and for programs.

use std::{collections::BTreeSet, time::Duration};

use hdrhistogram::Histogram;
use serde_json::{Value, json};

use super::super::output::{self, OutputFormat};

/// Maximum latency in microseconds that the histogram distinguishes. Longer latencies count as this value.
const MAX_LATENCY_US: u64 = 600_000_000;

/// Measurements of one sender or reader.
#[derive(Debug)]
pub(super) struct BenchStats {
    pub(super) records: u64,
    pub(super) bytes: u64,
    pub(super) errors: u64,
    pub(super) first_error: Option<String>,
    /// Latencies in microseconds.
    latency: Histogram<u64>,
    /// Meanings of the acknowledgements, such as `persisted on 1 replica`.
    pub(super) meanings: BTreeSet<String>,
}

impl Default for BenchStats {
    fn default() -> Self {
        Self {
            records: 0,
            bytes: 0,
            errors: 0,
            first_error: None,
            latency: Histogram::new_with_bounds(1, MAX_LATENCY_US, 3).expect("the bounds are constants"),
            meanings: BTreeSet::new(),
        }
    }
}

impl BenchStats {
    /// Adds one measured latency.
    pub(super) fn add_latency(&mut self, latency: Duration) {
        self.latency.saturating_record(u64::try_from(latency.as_micros()).unwrap_or(MAX_LATENCY_US).max(1));
    }

    /// Counts an error, and keeps the text of the first one.
    pub(super) fn add_error(&mut self, error: &dyn std::fmt::Display) {
        self.errors += 1;
        self.first_error.get_or_insert_with(|| error.to_string());
    }

    pub(super) fn merge(&mut self, other: Self) {
        self.records += other.records;
        self.bytes += other.bytes;
        self.errors += other.errors;
        self.first_error = self.first_error.take().or(other.first_error);
        self.latency.add(&other.latency).expect("both have the same bounds");
        self.meanings.extend(other.meanings);
    }

    /// Returns the latency in milliseconds that the share `quantile` of the measurements does not exceed.
    #[expect(clippy::cast_precision_loss, reason = "numbers for people")]
    fn ms(&self, quantile: f64) -> f64 {
        self.latency.value_at_quantile(quantile) as f64 / 1000.0
    }

    /// Returns the result fields on which programs rely.
    #[expect(clippy::cast_precision_loss, reason = "numbers for people")]
    pub(super) fn result_json(&self, elapsed: Duration) -> Value {
        let seconds = elapsed.as_secs_f64().max(1e-9);
        json!({
            "records": self.records,
            "bytes": self.bytes,
            "seconds": round(seconds),
            "mb_per_s": round(self.bytes as f64 / 1e6 / seconds),
            "records_per_s": round(self.records as f64 / seconds),
            "p50_ms": self.ms(0.5),
            "p99_ms": self.ms(0.99),
            "p999_ms": self.ms(0.999),
            "max_ms": self.latency.max() as f64 / 1000.0,
            "errors": self.errors,
        })
    }

    /// Joins the meanings of the acknowledgements. A run with several meanings reads `A; some B`.
    pub(super) fn meaning(&self) -> String {
        self.meanings.iter().cloned().collect::<Vec<_>>().join("; some ")
    }
}

/// Rounds to three decimal places.
pub(super) fn round(value: f64) -> f64 {
    (value * 1000.0).round() / 1000.0
}

/// Prints the results. `extra` is added to the JSON object; `notes` are further lines of the text output.
pub(super) fn print(mut result: Value, extra: Value, notes: &[String], output: OutputFormat) -> std::io::Result<()> {
    if output == OutputFormat::Json {
        if let (Some(result), Value::Object(extra)) = (result.as_object_mut(), extra) {
            result.extend(extra);
        }
        return output::json(&result);
    }
    output::line(&format!(
        "{}, {} bytes in {} s: {} MB/s, {} records/s",
        output::count(result["records"].as_u64().unwrap_or(0), "record"),
        result["bytes"],
        result["seconds"],
        result["mb_per_s"],
        result["records_per_s"]
    ))?;
    output::line(&format!(
        "latency p50 {} ms, p99 {} ms, p99.9 {} ms, max {} ms; errors {}",
        result["p50_ms"], result["p99_ms"], result["p999_ms"], result["max_ms"], result["errors"]
    ))?;
    for note in notes {
        output::line(note)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn result_contains_promised_fields_and_values() {
        let mut stats = BenchStats { records: 1000, bytes: 2_000_000, ..BenchStats::default() };
        for ms in 1..=1000 {
            stats.add_latency(Duration::from_millis(ms));
        }
        stats.add_error(&"one");
        let mut other = BenchStats::default();
        other.add_latency(Duration::from_millis(5000));
        stats.merge(other);
        let result = stats.result_json(Duration::from_secs(2));
        assert_eq!(
            (&result["records"], &result["bytes"], &result["errors"]),
            (&json!(1000), &json!(2_000_000), &json!(1))
        );
        assert_eq!((&result["mb_per_s"], &result["records_per_s"]), (&json!(1.0), &json!(500.0)));
        let about = |name: &str, wanted: f64| {
            let value = result[name].as_f64().expect("a number");
            assert!((value - wanted).abs() / wanted < 0.01, "{name} is {value}");
        };
        about("p50_ms", 501.0);
        about("p99_ms", 991.0);
        about("p999_ms", 1000.0);
        about("max_ms", 5000.0);
    }
}
