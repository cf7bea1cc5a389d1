//! Gauges that count what exists right now.

use std::sync::atomic::AtomicU64;

use prometheus_client::metrics::gauge::{Atomic, Gauge};

/// Adds one to a gauge until it is dropped, also when the future that holds it is cancelled.
#[derive(Debug)]
pub struct GaugeGuard<N = u64, A = AtomicU64>(Gauge<N, A>)
where
    A: Atomic<N>;

impl<N, A: Atomic<N>> GaugeGuard<N, A> {
    /// Adds one to `gauge` now.
    #[must_use]
    pub fn new(gauge: &Gauge<N, A>) -> Self {
        gauge.inc();
        Self(gauge.clone())
    }
}

impl<N, A: Atomic<N>> Drop for GaugeGuard<N, A> {
    fn drop(&mut self) {
        self.0.dec();
    }
}
