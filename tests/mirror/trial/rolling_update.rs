//! Three processes are replaced, one after the other, as a Deployment does it: a new one answers before an old one is stopped.
//!
//! `GANGPLANK_TRIAL_QUERIES` and `GANGPLANK_TRIAL_REGISTRATIONS` set how many are offered each second; `make trial`
//! offers 10 000 and 1 000.

use std::time::{Duration, Instant};

use super::{ClusterLock, Pace, Trial, empty, number, queries::Queries};

const PROCESSES: usize = 3;

/// Offered each second by default, in all.
const QUERIES: usize = 600;
const REGISTRATIONS: usize = 200;

/// Of each service: no two registrants say a word on one at a time.
const INSTANCES: usize = 250;

/// For how long registrations may be refused when the writer is stopped, on a machine that is not busy: what the slowest of the DNS
/// answers took meanwhile is added, of which each takes some microseconds of work.
const MAX_GAP: Duration = Duration::from_secs(1);

/// What one registrant says each second: it waits until Kubernetes has its words.
const PER_REGISTRANT: usize = 6;

#[test]
fn rolling_update_of_three_loses_no_answer_and_hands_over() {
    let Some(lock) = ClusterLock::take() else { return };
    let queries = number("GANGPLANK_TRIAL_QUERIES", QUERIES);
    let registrations = number("GANGPLANK_TRIAL_REGISTRATIONS", REGISTRATIONS);
    // All seats have registrants, the empty ones too.
    let seats = 2 * PROCESSES;
    let each = registrations.div_ceil(PER_REGISTRANT * seats);
    let interval = Duration::from_secs_f64((each * seats) as f64 / registrations as f64);
    let pace = Pace { registrants: each, interval, roams: true };
    let mut trial = Trial::begin(lock.cluster, "rolling", (PROCESSES, PROCESSES), (INSTANCES, pace));
    let load = trial.load(1);
    let (begun, words) = (Instant::now(), trial.words.promised());
    for _ in 0..PROCESSES {
        // Each step removes the first one.
        let new = PROCESSES;
        trial.start(new, empty(), None);
        trial.replica(new).wait_until_it_follows();
        // As long as a client needs to notice.
        trial.wait_for_words(registrations / 2);
        let rate = u32::try_from(queries / PROCESSES).expect("not that many");
        let asked: Vec<_> =
            (1..=new).map(|seat| Queries::start(trial.replica(seat).dns, trial.namespace, rate)).collect();
        let wrote = trial.writes(0);
        trial.wait_for_words(registrations / 2);
        trial.words.forget_gap();
        let (old, _) = trial.take(0);
        old.terminate();
        trial.seats.remove(0);
        trial.wait_for_words(registrations / 2);
        let gap = trial.words.take_gap();
        println!("stopped a {}: no word was taken for {gap:.2?}", if wrote { "writer" } else { "follower" });
        let answers: Vec<_> = asked.into_iter().map(Queries::end).collect();
        let slowest = answers.iter().map(|answers| answers.slowest).max().unwrap_or_default();
        assert!(gap < MAX_GAP + slowest, "{gap:?}, and the slowest answer took {slowest:?}");
        for answers in answers {
            println!("{answers:?}, {:.0} a second", answers.asked as f64 / answers.took.as_secs_f64());
            assert!(answers.asked > 0 && answers.lost == 0 && answers.wrong == 0, "{answers:?}");
        }
    }
    let (took, words) = (begun.elapsed(), trial.words.promised() - words);
    load.join(&trial.runtime);
    println!("{:.0} words taken a second, {words} in {took:.1?}", words as f64 / took.as_secs_f64());
    println!("by status: {:?}", trial.words.statuses());
    trial.wait_until_settled();
    trial.check("after the rolling update");
}
