//! Who writes: one replica at a time holds the Lease, and each tenure has a term of its own.
//!
//! A pure state machine: it is told what was read, written and seen, with the time, and returns what to do
//! next. It never reads a clock and never performs I/O, so that the server and the simulation run the same code.
//!
//! Two clocks are compared nowhere. A candidate measures on its own clock for how long the Lease has not changed; a writer
//! measures on its own clock since when its last successful renewal began. With the constants below a writer stops
//! confirming five seconds before anybody else may begin, whatever the offset between the clocks, as long as they run
//! at rates that differ by less than a fifth.
//!
//! A process that starts while the API server is away goes on with what its directory holds: it answers from it and takes
//! registrations with 202 ([`Election::may_accept`]). It stops as soon as it reads a Lease that another directory holds, or sees
//! a higher term than its directory's, and the directory remembers that. While it acquires its own Lease, or one that is
//! missing, it goes on. Several replicas may accept at a time; of two words on one instance the younger stamp counts in the end.

use std::time::Duration;

pub use super::role::{Action, Deposed, Role, Tenure};
use super::{
    lease::{DirectoryId, LeaseRecord, LeaseWrite, ObservedLease, Opened, RequestId, ResourceVersion},
    rules::Rules,
    time::{BootTime, Now},
};

/// How long a Lease must not change before another replica takes it (client-go: `LeaseDuration`).
pub const LEASE_DURATION: Duration = Duration::from_secs(15);

/// For how long after the begin of its last successful renewal a writer confirms and writes slices (client-go:
/// `RenewDeadline`). Less than [`LEASE_DURATION`] by more than clocks drift apart meanwhile.
pub const RENEW_DEADLINE: Duration = Duration::from_secs(10);

/// How often the Lease is renewed by its holder, and read by everybody else (client-go: `RetryPeriod`).
pub const RETRY_PERIOD: Duration = Duration::from_secs(2);

/// How long a Lease that was there must be missing before somebody else than its holder makes it again: two renewals. A follower
/// would have to hold it for [`LEASE_DURATION`] first, in which nobody writes.
pub const MISSING_PERIOD: Duration = Duration::from_secs(4);

/// One replica's part in the election.
#[derive(Debug, Clone)]
pub struct Election {
    rules: Rules,
    me: DirectoryId,
    role: Role,
    /// The highest term that was ever seen anywhere.
    known_term: u64,
    /// The directory's term, if this process, which has not written yet, goes on with the directory: it answers from it, and
    /// takes registrations.
    accepting: Option<u64>,
    /// The highest generation that this replica published, for the Lease.
    generation: u64,
    /// The Lease's version when it last changed, and when that was noticed.
    unchanged: Option<(Option<ResourceVersion>, BootTime)>,
    /// The Lease as it was last read or written.
    lease: Option<LeaseRecord>,
    /// Whether there ever was one.
    had_lease: bool,
    /// The version that the next renewal expects.
    version: Option<ResourceVersion>,
    /// When the last successful renewal began.
    renewed: Option<BootTime>,
    /// What is under way: the election has one request at a time.
    pending: Option<(RequestId, Pending)>,
    last_request: RequestId,
    /// Whether the Lease may be taken at once if its record names this directory: the process before this one
    /// is certainly gone (same boot, and this process holds the directory's lock).
    resume: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Pending {
    /// A follower's look.
    Observe,
    Acquire,
    Renew,
    /// A holder's look after a renewal that was refused.
    Inspect,
    Release,
}

impl Election {
    /// A replica with the directory `me`.
    #[must_use]
    pub const fn new(me: DirectoryId, opened: Opened, rules: Rules) -> Self {
        let Opened { term, followed, resume } = opened;
        Self {
            rules,
            me,
            role: Role::Follower,
            known_term: term,
            accepting: if term > 0 && !followed { Some(term) } else { None },
            generation: 0,
            unchanged: None,
            lease: None,
            had_lease: false,
            version: None,
            renewed: None,
            pending: None,
            last_request: RequestId(0),
            resume,
        }
    }

    /// What this replica is.
    #[must_use]
    pub const fn role(&self) -> &Role {
        &self.role
    }

    /// The term of the writer that this replica is.
    #[must_use]
    pub const fn writing(&self) -> Option<u64> {
        match self.role {
            Role::Writer { term } => Some(term),
            _ => None,
        }
    }

    /// Whether this replica answers from its directory and takes registrations: the writer, and a process that has read no
    /// Lease but its directory's own since it started, if nobody is known to have written after that directory. Only the writer
    /// confirms: others answer 202.
    #[must_use]
    pub const fn may_accept(&self) -> bool {
        self.accepting.is_some() || self.writing().is_some()
    }

    /// The highest term that was seen.
    #[must_use]
    pub const fn known_term(&self) -> u64 {
        self.known_term
    }

    /// The highest term that a Lease can have handed out by now. A slice with a higher one was written by a hand.
    #[must_use]
    pub fn highest_term(&self, now: Now) -> u64 {
        now.highest_term(self.known_term)
    }

    /// The Lease as it was last read or written.
    #[must_use]
    pub const fn lease(&self) -> Option<&LeaseRecord> {
        self.lease.as_ref()
    }

    /// Whether nobody else can hold the Lease at `now`: only then slices are written and answers confirmed.
    #[must_use]
    pub fn is_safe(&self, now: BootTime) -> bool {
        self.renewed.is_some_and(|began| now.since(began) < RENEW_DEADLINE)
    }

    /// When the last successful renewal began.
    #[must_use]
    pub const fn renewed_at(&self) -> Option<BootTime> {
        self.renewed
    }

    /// This replica has published up to `generation`; the next renewal says so.
    pub const fn published(&mut self, generation: u64) {
        if generation > self.generation {
            self.generation = generation;
        }
    }

    /// Every [`RETRY_PERIOD`].
    #[must_use]
    pub fn tick(&mut self, now: Now) -> Vec<Action> {
        if self.pending.is_some() {
            return Vec::new();
        }
        match &self.role {
            Role::Follower => {
                vec![Action::ReadLease(self.request(Pending::Observe))]
            }
            Role::Acquiring(_) => Vec::new(),
            Role::TakingOver(tenure) => {
                let due = tenure.listed_after.is_some_and(|after| now.boot >= after);
                let term = tenure.term;
                let mut actions = vec![self.renew(term)];
                if due {
                    if let Role::TakingOver(tenure) = &mut self.role {
                        tenure.listed_after = None;
                    }
                    actions.push(Action::TakeOver);
                }
                actions
            }
            Role::Writer { term } => {
                let term = *term;
                vec![self.renew(term)]
            }
        }
    }

    /// The answer to [`Action::ReadLease`], whose request began at `began`. `None` where there was none.
    #[must_use]
    pub fn lease_read(
        &mut self,
        id: RequestId,
        began: BootTime,
        now: Now,
        read: Option<Option<ObservedLease>>,
    ) -> Vec<Action> {
        match self.answered(id) {
            Some(Pending::Inspect) => self.inspected(now, read),
            Some(Pending::Observe) => self.observed(began, now, read),
            _ => Vec::new(),
        }
    }

    fn request(&mut self, pending: Pending) -> RequestId {
        self.last_request.0 += 1;
        self.pending = Some((self.last_request, pending));
        self.last_request
    }

    /// What the request was that `id` answers, if anybody waits for it.
    fn answered(&mut self, id: RequestId) -> Option<Pending> {
        self.pending.take_if(|(waiting, _)| *waiting == id).map(|(_, pending)| pending)
    }

    fn observed(&mut self, began: BootTime, now: Now, read: Option<Option<ObservedLease>>) -> Vec<Action> {
        let Some(found) = read else { return Vec::new() };
        if self.role != Role::Follower {
            return Vec::new();
        }
        let version = found.as_ref().map(|lease| lease.version);
        let record = found.map(|lease| lease.record);
        let mut actions = Vec::new();
        // A term that nobody can have handed out is a hand's: it says nothing, but the Lease is respected as any other.
        let highest = self.highest_term(now);
        let lease_term = record.as_ref().map(|record| record.term).filter(|term| *term <= highest);
        self.known_term = self.known_term.max(lease_term.unwrap_or(0));
        if let Some(record) = &record {
            // A released one names nobody.
            let elsewhere = !record.released && record.holder != self.me;
            actions = self.seen(lease_term.unwrap_or(0), elsewhere);
        }
        self.lease.clone_from(&record);
        // Measured from the end of the first reading to the begin of the last: both ends on the safe side.
        let still_since = match &self.unchanged {
            Some((before, since)) if *before == version => *since,
            _ => now.boot,
        };
        self.unchanged = Some((version, still_since));
        self.had_lease |= record.is_some();
        let wait = match &record {
            None if self.had_lease => MISSING_PERIOD,
            None => Duration::ZERO,
            Some(record) if record.released || (self.resume && record.holder == self.me) => Duration::ZERO,
            Some(_) => LEASE_DURATION,
        };
        if !now.eligible || began.since(still_since) < wait {
            return actions;
        }
        let term = match lease_term {
            Some(_) => self.known_term + 1,
            // Whatever terms were handed out under a Lease that was deleted, or overwritten by a hand, and that nobody here has seen, they were
            // lower: terms grow by less than one a second.
            None => self.known_term.max(now.unix_seconds) + 1,
        };
        let generation = self.generation.max(record.as_ref().map_or(0, |record| record.generation));
        self.generation = generation;
        self.version = version;
        // A missing Lease does not say since when it is missing: its last holder may go on for RENEW_DEADLINE.
        let hold = record.is_none() && self.rules.hold_after_missing_lease;
        let listed_after = hold.then_some(BootTime(Duration::MAX));
        actions.push(self.acquire(Tenure { term, previous: record, listed_after }));
        actions
    }

    /// `term` was seen; `elsewhere` if it is another replica's.
    fn seen(&mut self, term: u64, elsewhere: bool) -> Vec<Action> {
        let stops = self.accepting.take_if(|directory| elsewhere || term > *directory).is_some();
        if stops { vec![Action::Followed] } else { Vec::new() }
    }

    /// The answer to [`Action::WriteLease`], whose request began at `began`.
    #[must_use]
    pub fn lease_written(&mut self, id: RequestId, began: BootTime, written: LeaseWrite) -> Vec<Action> {
        match self.answered(id) {
            Some(Pending::Acquire) => self.acquired(began, written),
            Some(Pending::Renew) => self.renewed(began, written),
            _ => Vec::new(),
        }
    }

    fn acquired(&mut self, began: BootTime, written: LeaseWrite) -> Vec<Action> {
        let Role::Acquiring(tenure) = &self.role else { return Vec::new() };
        let mut tenure = tenure.clone();
        let LeaseWrite::Written(version) = written else { return self.give_up() };
        self.version = Some(version);
        self.renewed = Some(began);
        self.known_term = self.known_term.max(tenure.term);
        self.had_lease = true;
        self.lease = Some(self.record(tenure.term));
        self.resume = false;
        let now_or_later = if tenure.listed_after.is_some() {
            tenure.listed_after = Some(BootTime(began.0 + LEASE_DURATION));
            Vec::new()
        } else {
            vec![Action::TakeOver]
        };
        self.role = Role::TakingOver(tenure);
        now_or_later
    }

    fn renewed(&mut self, began: BootTime, written: LeaseWrite) -> Vec<Action> {
        match (&self.role, written) {
            (Role::TakingOver(_) | Role::Writer { .. }, LeaseWrite::Written(version)) => {
                self.version = Some(version);
                // An answer that was overtaken by a later one says nothing new.
                if self.renewed.is_none_or(|before| before < began) {
                    self.renewed = Some(began);
                }
                vec![Action::Renewed(began)]
            }
            (Role::TakingOver(_) | Role::Writer { .. }, LeaseWrite::Conflict) => {
                vec![Action::ReadLease(self.request(Pending::Inspect))]
            }
            // Unknown: the next tick tries again. If this one was carried out, that one conflicts, and the look
            // after it finds the Lease to be this replica's own.
            _ => Vec::new(),
        }
    }

    fn inspected(&mut self, now: Now, read: Option<Option<ObservedLease>>) -> Vec<Action> {
        let (Role::Writer { term } | Role::TakingOver(Tenure { term, .. })) = self.role else { return Vec::new() };
        let Some(found) = read else { return Vec::new() };
        match found {
            Some(ObservedLease { record, .. }) if record.term > term && record.term <= self.highest_term(now) => {
                let mut actions = self.seen(record.term, true);
                self.known_term = self.known_term.max(record.term);
                actions.extend(self.depose(Deposed::Outranked(record.term)));
                self.lease = Some(record);
                actions
            }
            Some(ObservedLease { version, record }) if record.term == term && record.holder == self.me => {
                self.version = Some(version);
                vec![self.renew(term)]
            }
            // Deleted, set back to a backup, or written by a hand. Who still holds it safely is the only one who can: nobody could have
            // taken it meanwhile. Anybody else cannot know.
            lower if !self.rules.recreate_only_while_safe || self.is_safe(now.boot) => {
                let mut next = self.known_term + 1;
                if lower.is_none() {
                    next = next.max(now.unix_seconds + 1);
                }
                if let Role::TakingOver(tenure) = &self.role {
                    // It has no state of its own yet: the slices are listed again.
                    let tenure = Tenure { term: next, ..tenure.clone() };
                    self.version = lower.map(|lease| lease.version);
                    return vec![self.acquire(tenure)];
                }
                self.known_term = next;
                self.role = Role::Writer { term: next };
                self.version = lower.map(|lease| lease.version);
                vec![Action::Rewrite, self.renew(next)]
            }
            lower => {
                let reason = if self.writing().is_some() { Deposed::LeaseLost } else { Deposed::NotAcquired };
                self.lease = lower.map(|lease| lease.record);
                self.depose(reason)
            }
        }
    }

    /// The slices were listed and merged, and the result is in the journal. Serves from now on, if the Lease is still safely held.
    #[must_use]
    pub fn taken_over(&mut self, now: BootTime) -> Vec<Action> {
        let Role::TakingOver(tenure) = &self.role else { return Vec::new() };
        // Without this check a process that was paused during the take-over would serve beside a higher term.
        if self.rules.serve_only_while_safe && !self.is_safe(now) {
            return self.give_up();
        }
        self.accepting = None;
        self.role = Role::Writer { term: tenure.term };
        Vec::new()
    }

    /// A slice, or a peer, shows `term`.
    #[must_use]
    pub fn outranked(&mut self, term: u64) -> Vec<Action> {
        self.known_term = self.known_term.max(term);
        match &self.role {
            Role::Writer { term: mine } if term > *mine => {
                // If the Lease names this process all the same, somebody has edited the slice. Then nobody else can hold the Lease, and this process
                // has stopped to write: it takes it at once, with a higher term than the slice's, and lists.
                self.resume = true;
                self.depose(Deposed::Outranked(term))
            }
            // A take-over that finds a slice of its own term or a higher one takes a higher term, then lists again.
            Role::TakingOver(tenure) if term >= tenure.term => {
                let tenure = Tenure { term: self.known_term + 1, ..tenure.clone() };
                let mut actions = self.seen(term, false);
                // A renewal may be under way with the same version: one of the two conflicts. Nobody waits for its answer.
                actions.push(self.acquire(tenure));
                actions
            }
            Role::Writer { .. } => Vec::new(),
            Role::Follower | Role::Acquiring(_) | Role::TakingOver(_) => self.seen(term, false),
        }
    }

    /// Gives the Lease up, after all answers were given. A Lease that was missing before is not: who takes it now has to wait
    /// for the last holder as well.
    #[must_use]
    pub fn release(&mut self) -> Vec<Action> {
        let (Role::Writer { term } | Role::TakingOver(Tenure { term, listed_after: None, .. })) = self.role else {
            return Vec::new();
        };
        let id = self.request(Pending::Release);
        self.role = Role::Follower;
        self.unchanged = None;
        self.renewed = None;
        let record = LeaseRecord { released: true, ..self.record(term) };
        vec![Action::WriteLease { id, expected: self.version, record }]
    }

    /// The take-over failed: the slices could not be listed in time.
    #[must_use]
    pub fn give_up(&mut self) -> Vec<Action> {
        self.depose(Deposed::NotAcquired)
    }

    fn depose(&mut self, reason: Deposed) -> Vec<Action> {
        self.role = Role::Follower;
        self.pending = None;
        self.unchanged = None;
        self.renewed = None;
        vec![Action::Deposed(reason)]
    }

    /// Writes the Lease, if its version is still the one that is known.
    fn acquire(&mut self, tenure: Tenure) -> Action {
        let record = self.record(tenure.term);
        self.role = Role::Acquiring(tenure);
        let id = self.request(Pending::Acquire);
        Action::WriteLease { id, expected: self.version, record }
    }

    fn renew(&mut self, term: u64) -> Action {
        let id = self.request(Pending::Renew);
        Action::WriteLease { id, expected: self.version, record: self.record(term) }
    }

    const fn record(&self, term: u64) -> LeaseRecord {
        LeaseRecord { term, holder: self.me, generation: self.generation, released: false }
    }
}
