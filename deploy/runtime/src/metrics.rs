//! What is counted, and its form for Prometheus.
//!
//! Every number is an atomic, so that counting never waits. The set of labels is fixed: no request
//! can make the page grow.

use std::fmt::Write as _;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use crate::error::Outcome;

/// Seconds: from a tenth of a millisecond, which a tiny model takes, to the default time limit.
const SECONDS: [f64; 14] =
    [0.0001, 0.000_25, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 5.0, 30.0];

/// Powers of two, as batches are sized.
const COUNTS: [f64; 9] = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0];

/// How a request came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// JSON or binary over HTTP.
    Http,
    /// gRPC.
    Grpc,
}

impl Protocol {
    const ALL: [Self; 2] = [Self::Http, Self::Grpc];

    fn label(self) -> &'static str {
        match self {
            Self::Http => "http",
            Self::Grpc => "grpc",
        }
    }
}

/// A histogram with fixed bounds.
#[derive(Debug)]
pub struct Histogram {
    bounds: &'static [f64],
    /// One more than the bounds: the last counts what is above them all.
    buckets: Vec<AtomicU64>,
    /// Millionths, so that it can be an integer.
    sum: AtomicU64,
}

impl Histogram {
    fn new(bounds: &'static [f64]) -> Self {
        let buckets = (0..=bounds.len()).map(|_| AtomicU64::new(0)).collect();
        Self { bounds, buckets, sum: AtomicU64::new(0) }
    }

    /// Counts one value; negative ones as zero.
    pub fn observe(&self, value: f64) {
        let place = self.bounds.iter().position(|bound| value <= *bound);
        self.buckets[place.unwrap_or(self.bounds.len())].fetch_add(1, Relaxed);
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "the conversion saturates"
        )]
        self.sum.fetch_add((value * 1e6) as u64, Relaxed);
    }

    /// Counts one whole number.
    pub fn observe_count(&self, count: usize) {
        #[expect(clippy::cast_precision_loss, reason = "counts are small")]
        self.observe(count as f64);
    }

    /// How many values were counted.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.buckets.iter().map(|bucket| bucket.load(Relaxed)).sum()
    }

    fn print(&self, page: &mut String, name: &str, labels: &str) {
        let comma = if labels.is_empty() { "" } else { "," };
        let mut total = 0;
        for (place, bucket) in self.buckets.iter().enumerate() {
            total += bucket.load(Relaxed);
            let bound = self.bounds.get(place).map_or_else(|| "+Inf".to_owned(), f64::to_string);
            line(page, &format!("{name}_bucket{{{labels}{comma}le=\"{bound}\"}}"), total);
        }
        let braces = if labels.is_empty() { String::new() } else { format!("{{{labels}}}") };
        #[expect(clippy::cast_precision_loss, reason = "a sum of seconds needs no more digits")]
        let sum = self.sum.load(Relaxed) as f64 / 1e6;
        line(page, &format!("{name}_sum{braces}"), sum);
        line(page, &format!("{name}_count{braces}"), total);
    }
}

/// All that is counted.
#[derive(Debug)]
pub struct Metrics {
    requests: [[AtomicU64; Outcome::ALL.len()]; 2],
    latency: [Histogram; 2],
    /// Seconds in the queue, one value a request.
    pub waited: Histogram,
    /// Seconds in the model, one value a run.
    pub ran: Histogram,
    /// Rows of a run.
    pub batch_rows: Histogram,
    /// Requests of a run.
    pub batch_requests: Histogram,
}

/// What the page says besides, as it is at the moment.
#[derive(Clone, Copy, Debug)]
pub struct Now<'a> {
    /// The model's name.
    pub model: &'a str,
    /// The model's version.
    pub version: &'a str,
    /// Whether the server is ready.
    pub ready: bool,
    /// Whether requests are joined.
    pub joining: bool,
    /// Requests in progress.
    pub in_progress: usize,
    /// How many may be.
    pub limit: usize,
    /// Seconds from the start until the model was ready; 0 before.
    pub load_seconds: f64,
}

impl Default for Metrics {
    fn default() -> Self {
        Self {
            requests: Default::default(),
            latency: [Histogram::new(&SECONDS), Histogram::new(&SECONDS)],
            waited: Histogram::new(&SECONDS),
            ran: Histogram::new(&SECONDS),
            batch_rows: Histogram::new(&COUNTS),
            batch_requests: Histogram::new(&COUNTS),
        }
    }
}

impl Metrics {
    /// Counts one inference request.
    pub fn request(&self, protocol: Protocol, outcome: Outcome, seconds: f64) {
        self.requests[protocol as usize][outcome as usize].fetch_add(1, Relaxed);
        self.latency[protocol as usize].observe(seconds);
    }

    /// How many inference requests of a protocol ended so.
    #[must_use]
    pub fn requests(&self, protocol: Protocol, outcome: Outcome) -> u64 {
        self.requests[protocol as usize][outcome as usize].load(Relaxed)
    }

    /// The page in Prometheus' text format.
    #[must_use]
    pub fn page(&self, now: Now<'_>) -> String {
        let mut page = String::with_capacity(8 << 10);
        let p = &mut page;
        head(p, "berth_runtime_info", "gauge", "The program and the model it serves; always 1.");
        line(
            p,
            &format!(
                "berth_runtime_info{{version=\"{}\",model=\"{}\",model_version=\"{}\"}}",
                env!("CARGO_PKG_VERSION"),
                now.model,
                now.version
            ),
            1,
        );
        head(p, "berth_runtime_ready", "gauge", "1 when the model is loaded and warm.");
        line(p, "berth_runtime_ready", u8::from(now.ready));
        head(p, "berth_runtime_batching", "gauge", "1 when requests are joined.");
        line(p, "berth_runtime_batching", u8::from(now.joining));
        head(p, "berth_runtime_load_seconds", "gauge", "Time from the start to readiness.");
        line(p, "berth_runtime_load_seconds", now.load_seconds);
        head(p, "berth_runtime_requests_in_progress", "gauge", "Inference requests in progress.");
        line(p, "berth_runtime_requests_in_progress", now.in_progress);
        head(p, "berth_runtime_requests_limit", "gauge", "Requests that may be in progress.");
        line(p, "berth_runtime_requests_limit", now.limit);

        let name = "berth_runtime_requests_total";
        head(p, name, "counter", "Inference requests by protocol and outcome.");
        for protocol in Protocol::ALL {
            for outcome in Outcome::ALL {
                let count = self.requests(protocol, outcome);
                let (protocol, outcome) = (protocol.label(), outcome.label());
                line(p, &format!("{name}{{protocol=\"{protocol}\",outcome=\"{outcome}\"}}"), count);
            }
        }
        let name = "berth_runtime_request_duration_seconds";
        head(p, name, "histogram", "Time from a request's head to its answer.");
        for protocol in Protocol::ALL {
            let labels = format!("protocol=\"{}\"", protocol.label());
            self.latency[protocol as usize].print(p, name, &labels);
        }
        for (name, help, histogram) in [
            ("queue_duration_seconds", "Time a request waited for the model.", &self.waited),
            ("run_duration_seconds", "Time of one run of the model.", &self.ran),
            ("batch_rows", "Rows in one run of the model.", &self.batch_rows),
            ("batch_requests", "Requests in one run of the model.", &self.batch_requests),
        ] {
            let name = format!("berth_runtime_{name}");
            head(p, &name, "histogram", help);
            histogram.print(p, &name, "");
        }
        if let Some(bytes) = resident_bytes() {
            let name = "process_resident_memory_bytes";
            head(p, name, "gauge", "Resident memory of the process.");
            line(p, name, bytes);
        }
        page
    }
}

fn head(page: &mut String, name: &str, kind: &str, help: &str) {
    // Writing to a string does not fail.
    let _ = writeln!(page, "# HELP {name} {help}\n# TYPE {name} {kind}");
}

fn line(page: &mut String, name: &str, value: impl std::fmt::Display) {
    let _ = writeln!(page, "{name} {value}");
}

/// `None` where there is no /proc.
fn resident_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let kib = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    kib.trim().trim_end_matches("kB").trim().parse::<u64>().ok().map(|kib| kib * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn now() -> Now<'static> {
        Now {
            model: "iris",
            version: "2",
            ready: true,
            joining: true,
            in_progress: 3,
            limit: 8,
            load_seconds: 0.5,
        }
    }

    #[test]
    fn the_index_of_an_outcome_is_its_place_in_the_list() {
        for (place, outcome) in Outcome::ALL.into_iter().enumerate() {
            assert_eq!(outcome as usize, place);
        }
    }

    #[test]
    fn histograms_are_cumulative_and_end_in_infinity() {
        let histogram = Histogram::new(&COUNTS);
        for count in [1, 3, 3, 1000] {
            histogram.observe_count(count);
        }
        let mut page = String::new();
        histogram.print(&mut page, "rows", "");
        assert!(page.contains("rows_bucket{le=\"1\"} 1\n"), "{page}");
        assert!(page.contains("rows_bucket{le=\"4\"} 3\n"), "{page}");
        assert!(page.contains("rows_bucket{le=\"+Inf\"} 4\n"), "{page}");
        assert!(page.contains("rows_sum 1007\nrows_count 4\n"), "{page}");
    }

    #[test]
    fn each_series_stands_once_and_has_a_type() {
        let metrics = Metrics::default();
        metrics.request(Protocol::Grpc, Outcome::Invalid, 0.01);
        let page = metrics.page(now());
        let mut seen = std::collections::BTreeSet::new();
        for line in page.lines().filter(|line| !line.starts_with('#')) {
            let (series, value) = line.rsplit_once(' ').unwrap();
            assert!(value.parse::<f64>().is_ok(), "{line}");
            assert!(seen.insert(series), "{series} stands twice");
            let base = series.split('{').next().unwrap();
            let base = ["_bucket", "_sum", "_count"]
                .iter()
                .find_map(|end| base.strip_suffix(end))
                .unwrap_or(base);
            assert!(page.contains(&format!("# TYPE {base} ")), "{base} has no type");
        }
        let wanted = "berth_runtime_requests_total{protocol=\"grpc\",outcome=\"invalid\"} 1";
        assert!(page.contains(wanted), "{page}");
    }
}
