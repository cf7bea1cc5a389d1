//! Metrics of the process as a whole: which version it is and when it started.

use std::time::{SystemTime, UNIX_EPOCH};

use prometheus_client::{
    metrics::{gauge::ConstGauge, info::Info},
    registry::Registry,
};

/// Adds the metrics to `all`. They are constant, so no handle is kept.
pub(super) fn register(all: &mut Registry) {
    // The encoder adds `_info` to the name.
    all.register(
        "gangplank_build",
        "A metric with a constant value of 1, labelled with the version of the build",
        Info::new(vec![("version", env!("CARGO_PKG_VERSION"))]),
    );
    // The metrics are made when the process starts; the name is the one every exporter uses.
    let started = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    all.register(
        "process_start_time_seconds",
        "Start time of the process since the Unix epoch in seconds",
        ConstGauge::new(started.as_secs_f64()),
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn version_and_start_time_are_exposed() {
        let mut all = Registry::default();
        register(&mut all);
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &all).expect("a String takes everything");
        let build = format!("gangplank_build_info{{version=\"{}\"}} 1", env!("CARGO_PKG_VERSION"));
        assert!(text.lines().any(|line| line == build), "{text}");
        let start = text.lines().find_map(|line| line.strip_prefix("process_start_time_seconds "));
        let start: f64 = start.expect("the start time").parse().expect("a number");
        let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_secs_f64();
        assert!((0.0..60.0).contains(&(now - start)), "{start} is not about {now}");
    }
}
