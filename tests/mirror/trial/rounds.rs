//! A round: load, a fault, and what must hold after it.

use std::time::{Duration, Instant};

use super::{
    Trial, WORDS, copy, empty,
    plan::{FAR_OFF, Fault, Plan, SHIFT},
    report::Round,
};
use crate::support::{WAIT_TIMEOUT, proxy::Fault as Injected, wait_until};

/// A writer that nobody hears of has lost the Lease for the others, which they see at their next reading.
const LEASE_IS_FREE: Duration = Duration::from_secs(20);

/// Both have milliseconds.
const CLOCK_MARGIN: Duration = Duration::from_millis(20);

impl Trial<'_> {
    pub(super) fn round(&mut self, number: usize, plan: Plan) -> Round {
        let begun = Instant::now();
        let writer = self.wait_for_writer(None);
        let mut seat = if plan.hits_writer { writer } else { (writer + 1) % self.seats.len() };
        if plan.fault == Fault::ClockApart {
            // No more than one clock is shifted at a time.
            seat = self.seats.iter().position(|seat| seat.offset != 0).unwrap_or(seat);
        }
        let is_writer = seat == writer;
        let what = format!("round {number}: {:?} of the {}", plan.fault, if is_writer { "writer" } else { "follower" });
        let load = self.load(plan.load);
        self.wait_for_words(WORDS);
        pause(plan.delay);
        self.words.forget_gap();
        let struck = Instant::now();
        self.fault(plan, seat, is_writer);
        let healed = Instant::now();
        let (load, equal) = if plan.ends_load {
            load.join(&self.runtime);
            wait_until("all DNS answers alike", || {
                let found = self.found_by_dns();
                found.iter().all(|one| *one == found[0]).then_some(())
            });
            let equal = healed.elapsed();
            (self.load(plan.load.wrapping_add(1 << 32)), Some(equal))
        } else {
            (load, None)
        };
        self.wait_for_writer(None);
        self.wait_for_words(WORDS);
        let gap = self.words.take_gap();
        load.join(&self.runtime);
        let writer = self.wait_until_settled();
        let settled = healed.elapsed();
        self.check(&what);
        // And nothing comes back late.
        self.settle(writer, plan.load);
        self.check(&what);
        if self.seats.iter().all(|seat| seat.offset == 0) {
            self.words.set_apart(Duration::ZERO);
        }
        let equal_text = equal.map_or_else(String::new, |equal| format!(", DNS alike {equal:.2?} after it"));
        println!(
            "{what}, {:.1?}: no word was taken for {gap:.1?}; settled {settled:.1?} after it{equal_text}; {:.1?} in all",
            healed - struck,
            begun.elapsed()
        );
        Round { what, took: begun.elapsed(), equal, gap }
    }

    /// Under load; the fault is over when this returns.
    fn fault(&mut self, plan: Plan, seat: usize, is_writer: bool) {
        let others_take_over = |trial: &Self| {
            if is_writer {
                trial.wait_for_writer(Some(seat));
            }
            trial.wait_for_words(WORDS);
        };
        match plan.fault {
            Fault::Partition | Fault::SilentPartition => {
                let silent = plan.fault == Fault::SilentPartition;
                let proxy = &self.seats[seat].proxy;
                let cut = proxy.inject(if silent { Injected::Hang } else { Injected::Drop }, |_| true);
                proxy.drop_connections();
                others_take_over(self);
                cut.lift();
            }
            Fault::Pause { .. } => {
                self.replica(seat).signal("STOP");
                pause(plan.pause);
                self.replica(seat).signal("CONT");
            }
            Fault::Kill => {
                let (replica, directory) = self.take(seat);
                let data = replica.kill();
                if plan.others_take_over {
                    others_take_over(self);
                }
                self.start(seat, data, Some(directory));
                self.wait_for_dns(seat);
            }
            Fault::OldCopy => {
                let old = copy(self.replica(seat).data_dir());
                self.wait_for_words(WORDS);
                let (replica, directory) = self.take(seat);
                drop(replica.kill());
                self.words.lose(directory);
                if plan.others_take_over {
                    others_take_over(self);
                }
                self.start(seat, old, None);
                self.wait_for_dns(seat);
            }
            Fault::LostDisk => {
                let (replica, directory) = self.take(seat);
                drop(replica.kill());
                self.words.lose(directory);
                self.start(seat, empty(), None);
                self.wait_for_dns(seat);
            }
            Fault::Restart => self.restart(seat, false),
            Fault::LostLease => {
                self.cluster.kubectl(&["delete", "lease", "gangplank-writer", "-n", "gangplank"]);
            }
            Fault::ClockApart => {
                // What was said under the old clock may be handed over after the change.
                self.words.set_apart(Duration::from_millis(SHIFT.unsigned_abs()) + CLOCK_MARGIN);
                let seat_of = &mut self.seats[seat];
                seat_of.offset = if seat_of.offset == 0 { plan.offset } else { 0 };
                self.restart(seat, plan.kills);
            }
            Fault::ClockFarOff => self.clock_far_off(seat, plan),
        }
    }

    /// Ends a process, and starts it again with the clock of its seat.
    fn restart(&mut self, seat: usize, kills: bool) {
        let (replica, directory) = self.take(seat);
        let data = if kills { replica.kill() } else { replica.terminate() };
        self.start(seat, data, Some(directory));
        self.wait_for_dns(seat);
    }

    /// A process whose clock is far off follows, and does not take the Lease when it is free.
    fn clock_far_off(&mut self, seat: usize, plan: Plan) {
        let before = std::mem::replace(&mut self.seats[seat].offset, plan.offset.signum() * FAR_OFF);
        self.restart(seat, plan.kills);
        self.replica(seat).wait_until_it_follows();
        self.wait_for_writer(Some(seat));
        let others: Vec<_> = (0..self.seats.len()).filter(|other| *other != seat).collect();
        others.iter().for_each(|other| self.replica(*other).signal("STOP"));
        let begun = Instant::now();
        wait_until("the Lease was free for a while", || {
            assert!(!self.writes(seat), "a process whose clock is an hour off took the Lease");
            self.wait_for_dns(seat);
            (begun.elapsed() >= LEASE_IS_FREE).then_some(())
        });
        others.iter().for_each(|other| self.replica(*other).signal("CONT"));
        self.wait_for_writer(Some(seat));
        self.wait_for_words(WORDS);
        let said = self.replica(seat).stderr();
        assert!(said.contains("more than a second from the API server's"), "it says so: {said}");
        assert!(!said.contains("this process writes"), "it did not: {said}");
        self.seats[seat].offset = before;
        self.restart(seat, plan.kills);
    }
}

/// Under load: what is waited for is the end of a time.
fn pause(time: Duration) {
    let begun = Instant::now();
    while begun.elapsed() < time {
        assert!(begun.elapsed() < 2 * WAIT_TIMEOUT);
        std::thread::park_timeout(time.saturating_sub(begun.elapsed()));
    }
}
