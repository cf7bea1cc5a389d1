//! Three processes are replaced, one after the other, as a Deployment does it: a new one answers before an old one is stopped.

use std::time::Duration;

use super::{ClusterLock, Trial, empty};
use crate::mirror::dns_probe::DnsProbe;

const PROCESSES: usize = 3;

/// Nobody waited until the Lease expired, which takes 15 s. How short it was is printed: a timed test is flaky by design.
const MAX_GAP: Duration = Duration::from_secs(10);

#[test]
fn rolling_update_of_three_loses_no_answer_and_hands_over() {
    let Some(lock) = ClusterLock::take() else { return };
    let mut trial = Trial::begin(&lock, "rolling", (PROCESSES, PROCESSES), 1);
    let load = trial.load();
    for _ in 0..PROCESSES {
        // Each step removes the first one.
        let new = PROCESSES;
        trial.start(new, empty(), None);
        trial.replica(new).wait_until_it_follows();
        trial.wait_for_words();
        let probes: Vec<_> = (1..=new).map(|seat| DnsProbe::start(trial.replica(seat).dns, trial.namespace)).collect();
        let wrote = trial.writes(0);
        trial.words.take_gap();
        let (old, _) = trial.take(0);
        old.terminate();
        trial.seats.remove(0);
        trial.wait_for_words();
        let gap = trial.words.take_gap();
        println!("stopped a {}: no word was taken for {gap:.2?}", if wrote { "writer" } else { "follower" });
        assert!(gap < MAX_GAP, "{gap:?}");
        probes.into_iter().for_each(DnsProbe::end);
    }
    load.join(&trial.runtime);
    trial.wait_until_settled();
    trial.check("after the rolling update");
}
