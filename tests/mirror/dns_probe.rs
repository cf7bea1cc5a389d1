//! DNS is asked for one name again and again while something else goes wrong.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use hickory_proto::rr::RecordType;

use super::dns_name;
use crate::support::dns::{Over, answers};

/// Asks until it is ended; every answer has to be right and fast.
pub(super) struct DnsProbe {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<(usize, Duration)>,
}

impl DnsProbe {
    /// The service `first` of [`make_namespace`](super::make_namespace).
    pub(super) fn start(dns: SocketAddr, namespace: &str) -> Self {
        let (stop, name) = (Arc::new(AtomicBool::new(false)), dns_name(namespace, "first"));
        let stopped = Arc::clone(&stop);
        let thread = thread::spawn(move || {
            let (mut asked, mut slowest) = (0, Duration::ZERO);
            while !stopped.load(SeqCst) {
                let begun = Instant::now();
                assert_eq!(answers(dns, Over::Udp, &name, RecordType::A), ["10.9.9.9"]);
                (asked, slowest) = (asked + 1, slowest.max(begun.elapsed()));
                thread::park_timeout(Duration::from_millis(5));
            }
            (asked, slowest)
        });
        Self { stop, thread }
    }

    /// Every answer was right and came at once.
    pub(super) fn end(self) {
        self.stop.store(true, SeqCst);
        let (asked, slowest) = self.thread.join().expect("every answer was right");
        println!("{asked} questions meanwhile, the slowest answer after {slowest:?}");
        assert!(asked > 0 && slowest < Duration::from_secs(2), "{asked} questions, {slowest:?}");
    }
}
