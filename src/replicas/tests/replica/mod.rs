//! One replica: the protocol's pieces put together, with every effect as an [`Output`].

mod hand_over;
mod mirror;

use std::collections::BTreeMap;

use super::super::{
    confirm::Confirmations,
    election::{Action, Deposed, Election, Role, Tenure},
    lease::{DirectoryId, LeaseRecord, LeaseWrite, ObservedLease, Opened, RequestId, ResourceVersion},
    rules::Rules,
    slice::{Judgement, SliceRecord, Writer},
    takeover::{self, Directory, HigherTerm},
    time::{BootTime, Now},
    word::{AgeLimit, Merged, TombstoneLifetime, Word},
};
use crate::model::Stamp;

/// An instance: its service, whose slice holds it, and its address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Key {
    pub(super) slice: usize,
    pub(super) address: usize,
}

pub(super) type Value = u32;
pub(super) type Record = SliceRecord<Key, Value>;

/// A slice as it was read, with its version.
pub(super) type Observed = (u64, Record);

/// The environment of one step.
#[derive(Debug, Clone, Copy)]
pub(super) struct Clocks {
    pub(super) now: Now,
    /// Microseconds since the Unix epoch.
    pub(super) wall: u64,
}

#[derive(Debug, Clone)]
pub(super) enum Output {
    ReadLease(RequestId),
    WriteLease {
        id: RequestId,
        expected: Option<ResourceVersion>,
        record: LeaseRecord,
    },
    /// A quorum list for a take-over.
    List(u64),
    ReadSlice {
        id: u64,
        slice: usize,
    },
    WriteSlice {
        id: u64,
        slice: usize,
        expected: Option<u64>,
        record: Record,
    },
    DeleteSlice {
        id: u64,
        slice: usize,
        expected: u64,
    },
    Answer {
        op: usize,
        status: u16,
    },
    HandOver {
        holder: DirectoryId,
        words: Vec<(Key, Word<Value>)>,
    },
    HandedOver {
        to: usize,
        words: Vec<(Key, Stamp)>,
    },
    /// Words that are too old to count: an Event, a metric and a line in the server.
    Refused(Vec<(Key, Word<Value>)>),
    Serving,
    /// The writer is one no more; what it had not taken yet is refused.
    Stepped,
}

/// What became of a write of a slice.
#[derive(Debug, Clone)]
pub(super) enum SliceWrite {
    Written(u64),
    Deleted,
    Failed,
}

#[derive(Debug, Clone, Default)]
struct SliceState {
    observed: Option<Observed>,
    /// The highest version that was seen, of the slice or of its deletion.
    version: u64,
    /// The one request that is under way.
    in_flight: Option<u64>,
    /// `version`, and the generation, when that request was sent.
    sent_at: (u64, u64),
    /// The record that the request writes.
    writing: Option<Record>,
    /// The record that was sent last in this term.
    sent: Option<Record>,
    /// Its outcome is not known: read before writing.
    unknown: bool,
    /// It has to be written in this term even if it says the same.
    rewrite: bool,
}

/// A change that was applied and waits for Kubernetes.
#[derive(Debug, Clone)]
struct Waiting {
    op: usize,
    slice: usize,
    generation: u64,
    status: u16,
}

/// Words that a peer handed over and that wait for Kubernetes.
#[derive(Debug, Clone)]
struct HandedIn {
    from: usize,
    words: Vec<(Key, Stamp)>,
    needs: Vec<(usize, u64)>,
}

#[derive(Debug)]
pub(super) struct Replica {
    rules: Rules,
    lifetime: TombstoneLifetime,
    /// Tombstones that a slice has room for.
    room: usize,
    pub(super) election: Election,
    /// What is durable: changed only together with what an output promises.
    pub(super) directory: Directory<Key, Value>,
    slices: Vec<SliceState>,
    confirmations: Confirmations<usize>,
    waiting: Vec<Waiting>,
    handed_in: Vec<HandedIn>,
    /// When a hand-over that got no answer is repeated.
    hand_over_after: BootTime,
    last_request: u64,
    list: Option<u64>,
    outputs: Vec<Output>,
}

/// A hand-over without an answer is repeated after this time.
const HAND_OVER_INTERVAL: std::time::Duration = std::time::Duration::from_secs(5);

impl Replica {
    pub(super) fn start(
        directory: Directory<Key, Value>,
        slices: usize,
        rules: Rules,
        lifetime: TombstoneLifetime,
        room: usize,
        resume: bool,
    ) -> Self {
        Self {
            rules,
            lifetime,
            room,
            election: Election::new(
                directory.id,
                Opened { term: directory.term, followed: directory.followed, resume },
                rules,
            ),
            directory,
            slices: vec![SliceState::default(); slices],
            confirmations: Confirmations::default(),
            waiting: Vec::new(),
            handed_in: Vec::new(),
            hand_over_after: BootTime::default(),
            last_request: 0,
            list: None,
            outputs: Vec::new(),
        }
    }

    pub(super) fn outputs(&mut self) -> Vec<Output> {
        std::mem::take(&mut self.outputs)
    }

    pub(super) fn is_writer(&self) -> bool {
        self.election.writing().is_some()
    }

    pub(super) fn may_accept(&self) -> bool {
        self.election.may_accept()
    }

    pub(super) fn is_taking_over(&self) -> bool {
        matches!(self.election.role(), Role::TakingOver(_))
    }

    /// What this replica answers for `key`.
    pub(super) fn answers(&self, key: Key) -> Value {
        let word = if self.may_accept() {
            self.directory.words.get(&key)
        } else {
            self.slices[key.slice].observed.as_ref().and_then(|(_, record)| record.words.get(&key))
        };
        word.and_then(|word| word.value).unwrap_or(0)
    }

    /// Whether nothing is left that Kubernetes may not have.
    pub(super) fn outbox_is_empty(&self) -> bool {
        self.directory.outbox.is_empty()
    }

    pub(super) fn is_idle(&self) -> bool {
        self.waiting.is_empty()
    }

    pub(super) fn tick(&mut self, at: Clocks) {
        let actions = self.election.tick(at.now);
        self.act(at, actions);
        match self.election.role() {
            Role::Follower => self.hand_over(at),
            Role::Writer { .. } => {
                self.expire(at);
                for slice in 0..self.slices.len() {
                    self.mirror(slice, at);
                }
            }
            Role::Acquiring(_) | Role::TakingOver(_) => {}
        }
    }

    pub(super) fn lease_read(
        &mut self,
        at: Clocks,
        id: RequestId,
        began: BootTime,
        read: Option<Option<ObservedLease>>,
    ) {
        let actions = self.election.lease_read(id, began, at.now, read);
        self.act(at, actions);
    }

    pub(super) fn lease_written(&mut self, at: Clocks, id: RequestId, began: BootTime, written: LeaseWrite) {
        let actions = self.election.lease_written(id, began, written);
        self.act(at, actions);
    }

    fn act(&mut self, at: Clocks, actions: Vec<Action>) {
        for action in actions {
            match action {
                Action::ReadLease(id) => self.outputs.push(Output::ReadLease(id)),
                Action::WriteLease { id, expected, record } => {
                    self.outputs.push(Output::WriteLease { id, expected, record });
                }
                Action::TakeOver => {
                    let id = self.request();
                    self.list = Some(id);
                    self.outputs.push(Output::List(id));
                }
                Action::Rewrite => {
                    if let Some(term) = self.election.writing() {
                        self.directory.term = term;
                    }
                    self.slices.iter_mut().for_each(|slice| slice.rewrite = true);
                }
                Action::Renewed(began) => self.renewed(began, at),
                Action::Deposed(reason) => self.deposed(reason),
                Action::Followed => {
                    self.directory.followed = true;
                    self.outputs.push(Output::Stepped);
                }
            }
        }
    }

    fn request(&mut self) -> u64 {
        self.last_request += 1;
        self.last_request
    }

    fn renewed(&mut self, began: BootTime, at: Clocks) {
        if !self.is_writer() {
            return;
        }
        for (slice, generation) in self.confirmations.renewed(began) {
            self.confirmed(slice, generation, at);
        }
        for slice in 0..self.slices.len() {
            self.mirror(slice, at);
        }
    }

    fn deposed(&mut self, reason: Deposed) {
        for waiting in std::mem::take(&mut self.waiting) {
            self.outputs.push(Output::Answer { op: waiting.op, status: 202 });
        }
        self.handed_in.clear();
        self.confirmations.clear();
        self.list = None;
        for slice in &mut self.slices {
            (slice.in_flight, slice.writing) = (None, None);
        }
        match reason {
            // What this directory holds besides its outbox is an older copy of what the new writer holds.
            Deposed::Outranked(_) => {
                self.directory.words.clear();
                self.directory.followed = true;
            }
            Deposed::LeaseLost => {}
            Deposed::NotAcquired => return,
        }
        self.outputs.push(Output::Stepped);
    }

    /// The quorum list for a take-over; `None` when it failed.
    pub(super) fn listed(&mut self, at: Clocks, id: u64, list: Option<&[Option<Observed>]>) {
        if self.list != Some(id) {
            return;
        }
        self.list = None;
        let Role::TakingOver(tenure) = self.election.role().clone() else { return };
        let Some(list) = list else {
            let actions =
                if self.election.is_safe(at.now.boot) { vec![Action::TakeOver] } else { self.election.give_up() };
            return self.act(at, actions);
        };
        self.take_over(at, &tenure, list);
    }

    fn take_over(&mut self, at: Clocks, tenure: &Tenure, list: &[Option<Observed>]) {
        let records = list.iter().flatten().map(|(_, record)| record);
        let truth = match takeover::merge(
            tenure,
            records,
            &self.directory,
            self.election.highest_term(at.now),
            at.wall,
            self.lifetime,
            self.rules,
        ) {
            Ok(truth) => truth,
            Err(HigherTerm(term)) => {
                let actions = self.election.outranked(term);
                return self.act(at, actions);
            }
        };
        let actions = self.election.taken_over(at.now.boot);
        if !self.is_writer() {
            return self.act(at, actions);
        }
        self.act(at, actions);
        let takeover::Truth { words, outbox, refused, generation, clock, refuse_before } = truth;
        self.directory = Directory {
            id: self.directory.id,
            term: tenure.term,
            followed: false,
            generation,
            clock,
            words,
            outbox,
            refuse_before,
        };
        self.election.published(generation);
        if !refused.is_empty() {
            self.outputs.push(Output::Refused(refused));
        }
        for (state, found) in self.slices.iter_mut().zip(list) {
            let version = found.as_ref().map_or(0, |(version, _)| *version);
            let observed = if version >= state.version { found.clone() } else { state.observed.take() };
            *state = SliceState { observed, version: state.version.max(version), ..SliceState::default() };
        }
        self.outputs.push(Output::Serving);
        for slice in 0..self.slices.len() {
            self.mirror(slice, at);
        }
    }

    /// A registration or a removal (`value` is `None`) from a client.
    pub(super) fn submit(&mut self, at: Clocks, op: usize, key: Key, value: Option<Value>) -> bool {
        if !self.may_accept() {
            return false;
        }
        let status = self.decide(at, key, value);
        if !self.is_writer() {
            self.outputs.push(Output::Answer { op, status: 202 });
            return true;
        }
        self.waiting.push(Waiting { op, slice: key.slice, generation: self.directory.generation, status });
        self.mirror(key.slice, at);
        true
    }

    /// Applies a change to the directory. Returns the status that confirms it.
    pub(super) fn decide(&mut self, at: Clocks, key: Key, value: Option<Value>) -> u16 {
        let current = self.directory.words.get(&key).and_then(|word| word.value);
        let (status, write) = match (value, current) {
            (None, None) => (404, self.rules.tombstone_for_absent),
            (None, Some(_)) => (204, true),
            (Some(new), Some(old)) if new == old => (200, self.rules.stamp_unchanged),
            (Some(_), Some(_)) => (200, true),
            (Some(_), None) => (201, true),
        };
        if write {
            let term = self.directory.term;
            self.directory.generation += 1;
            let stamp =
                Stamp { clock: self.directory.clock.next(at.wall), term, generation: self.directory.generation };
            let word = Word { value, stamp };
            self.directory.words.insert(key, word);
            self.directory.outbox.insert(key, word);
            self.election.published(self.directory.generation);
        }
        status
    }

    /// A second has passed since `op` was submitted.
    pub(super) fn overdue(&mut self, op: usize) {
        if let Some(found) = self.waiting.iter().position(|waiting| waiting.op == op) {
            self.waiting.swap_remove(found);
            self.outputs.push(Output::Answer { op, status: 202 });
        }
    }

    /// Gives the Lease up, if nothing waits and it is safely held.
    pub(super) fn release(&mut self, at: Clocks) -> bool {
        if !self.is_idle() || !self.election.is_safe(at.now.boot) {
            return false;
        }
        let actions = self.election.release();
        let released = !actions.is_empty();
        self.act(at, actions);
        released
    }
}
