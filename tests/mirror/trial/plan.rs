//! What goes wrong in a round, drawn from the seed: the same seed and number give the same plan.

use std::time::Duration;

use fastrand::Rng;

/// Within what the protocol allows: a process whose clock is more than a second from the API server's does not take the Lease.
pub(super) const SHIFT: i64 = 800;

/// An hour, in milliseconds.
pub(super) const FAR_OFF: i64 = 3_600_000;

#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Fault {
    /// The API server cannot be reached, until another process has taken over, if it is the writer. Connections close.
    Partition,
    /// The same, and requests hang.
    SilentPartition,
    /// SIGSTOP for so many seconds, or for less than that.
    Pause {
        seconds: u64,
        at_most: bool,
    },
    /// SIGKILL; then it starts again on its directory, on an older copy, or on an empty one.
    Kill,
    OldCopy,
    LostDisk,
    /// SIGTERM, and a new start.
    Restart,
    /// The Lease is deleted.
    LostLease,
    /// It starts again with a clock that is [`SHIFT`] ahead or behind, and keeps it until this fault comes again.
    ClockApart,
    /// It starts again with a clock that is [`FAR_OFF`]: it never writes, not even when nobody else does.
    ClockFarOff,
}

const fn pause(seconds: u64) -> Fault {
    Fault::Pause { seconds, at_most: false }
}

/// In this order at first, so that the short form knows what it gets; then in a drawn one.
const FAULTS: [Fault; 13] = [
    Fault::Partition,
    Fault::ClockApart,
    Fault::Restart,
    pause(5),
    Fault::OldCopy,
    Fault::ClockFarOff,
    Fault::LostDisk,
    pause(20),
    Fault::LostLease,
    Fault::SilentPartition,
    Fault::Kill,
    pause(60),
    Fault::Pause { seconds: 9, at_most: true },
];

/// A round.
#[derive(Debug, Clone, Copy)]
pub(super) struct Plan {
    pub(super) fault: Fault,
    /// Whether it hits the process that writes; else, the one after it. Mostly the writer: a follower has little to lose.
    pub(super) hits_writer: bool,
    /// The load goes on for so long before the fault.
    pub(super) delay: Duration,
    /// How long a pause is.
    pub(super) pause: Duration,
    /// Whether a process that was killed starts again only when another one writes.
    pub(super) others_take_over: bool,
    /// Whether a process ends by SIGKILL where both would do.
    pub(super) kills: bool,
    /// The shift of a clock, in milliseconds.
    pub(super) offset: i64,
    /// Whether the load ends with the fault, so that it can be measured when all DNS is the same; else it goes on.
    pub(super) ends_load: bool,
    /// For what the registrants say.
    pub(super) load: u64,
}

impl Plan {
    pub(super) fn draw(seed: u64, processes: usize, number: usize) -> Self {
        let mut faults = FAULTS;
        let cycle = number / FAULTS.len();
        if cycle > 0 {
            rng(seed, processes, usize::MAX - cycle).shuffle(&mut faults);
        }
        let fault = faults[number % FAULTS.len()];
        let mut rng = rng(seed, processes, number);
        let pause = match fault {
            Fault::Pause { seconds, at_most: true } => Duration::from_millis(rng.u64(100..seconds * 1_000)),
            Fault::Pause { seconds, .. } => Duration::from_secs(seconds),
            _ => Duration::ZERO,
        };
        Self {
            fault,
            hits_writer: number < 4 || rng.usize(..5) > 0,
            delay: Duration::from_millis(rng.u64(..500)),
            pause,
            others_take_over: rng.bool(),
            kills: rng.bool(),
            offset: if rng.bool() { SHIFT } else { -SHIFT },
            ends_load: rng.bool(),
            load: rng.u64(..),
        }
    }
}

fn rng(seed: u64, processes: usize, number: usize) -> Rng {
    let mixed = [seed, processes as u64, number as u64].iter().fold(0, |mixed: u64, part| {
        // The constant of Fibonacci hashing: neighbouring numbers get unlike seeds.
        (mixed ^ part).wrapping_mul(0x9E37_79B9_7F4A_7C15).rotate_left(31)
    });
    Rng::with_seed(mixed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plan_follows_from_the_seed_and_has_every_fault() {
        let plan = |seed, number| format!("{:?}", Plan::draw(seed, 2, number));
        assert!((0..50).all(|number| plan(1, number) == plan(1, number)));
        assert!((0..50).any(|number| plan(1, number) != plan(2, number)));
        let faults: Vec<_> = (26..39).map(|number| Plan::draw(7, 3, number).fault).collect();
        assert!(FAULTS.iter().all(|fault| faults.contains(fault)), "{faults:?}");
    }
}
