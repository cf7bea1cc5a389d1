//! One replica: the protocol's pieces put together, with every effect as an [`Output`].

mod directory;
mod hand_over;
mod mirror;

use std::collections::BTreeMap;

use super::super::{
    confirm::Confirmations,
    election::{Action, Deposed, Election, Role, Tenure},
    lease::{DirectoryId, LeaseRecord, LeaseWrite, ObservedLease, Opened, RequestId, ResourceVersion},
    rules::Rules,
    slice::{Judgement, JudgingWriter, SliceRecord, dropped_to},
    takeover::{DirectoryAge, Merge, Rank, TakenDirectory, Words},
    time::{BootTime, Now},
    word::{Merged, TombstoneLifetime, Word},
};
use crate::model::{HybridClock, Stamp};
pub(super) use directory::Directory;
use directory::{HigherTerm, Receiver};

/// An instance: its service, whose slice holds it, its address and its ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Key {
    pub(super) slice: usize,
    pub(super) address: usize,
    /// [`EVERY`] in a removal of the whole address.
    pub(super) ports: usize,
}

/// As [`PortSet::every`](crate::model::PortSet::every).
const EVERY: usize = usize::MAX;

impl Key {
    /// Every instance of the address.
    pub(super) fn every(self) -> Self {
        Self { ports: EVERY, ..self }
    }

    pub(super) fn is_every(self) -> bool {
        self.ports == EVERY
    }

    /// Whether a word on `self` is one on `other`, too.
    pub(super) fn covers(self, other: Self) -> bool {
        self == other || self == other.every()
    }
}

pub(super) type Value = u32;
pub(super) type WordMap = BTreeMap<Key, Word<Value>>;

/// The last word on an instance: one of its own, or the removal of its whole address.
pub(super) fn last_word(words: &WordMap, key: Key) -> Option<Word<Value>> {
    let (own, every) = (words.get(&key), words.get(&key.every()));
    own.into_iter().chain(every).max_by_key(|word| word.stamp).copied()
}

/// What an instance is; 0 where it is not registered.
pub(super) fn value_of(words: &WordMap, key: Key) -> Value {
    last_word(words, key).and_then(|word| word.value).unwrap_or(0)
}
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
struct ReceivedWords {
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
    pub(super) directory: Directory,
    slices: Vec<SliceState>,
    confirmations: Confirmations<usize>,
    waiting: Vec<Waiting>,
    received: Vec<ReceivedWords>,
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
        directory: Directory,
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
            received: Vec::new(),
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
        if self.may_accept() {
            value_of(&self.directory.words, key)
        } else {
            self.slices[key.slice].observed.as_ref().map_or(0, |(_, record)| value_of(&record.words, key))
        }
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
                        (self.directory.term, self.directory.published) = (term, self.directory.generation);
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
        self.received.clear();
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
        let highest_term = self.election.highest_term(at.now);
        let taken = self.directory.take_over(tenure, list, highest_term, self.merge(at));
        let (directory, refused) = match taken {
            Ok(taken) => taken,
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
        self.directory = directory;
        (0..self.slices.len()).for_each(|slice| self.directory.shrink(slice, self.room));
        self.election.published(self.directory.generation);
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
        let removed = match value {
            None => self.directory.registered(key),
            Some(_) => Vec::new(),
        };
        let current = value_of(&self.directory.words, key);
        let (status, write) = match value {
            None if removed.is_empty() => (404, self.rules.tombstone_for_absent),
            None => (204, true),
            Some(new) if new == current => (200, self.rules.stamp_unchanged),
            Some(_) if current != 0 => (200, true),
            Some(_) => (201, true),
        };
        if write {
            // That of the address comes after those of its instances.
            removed.into_iter().filter(|one| *one != key).for_each(|one| self.say(at, one, None));
            self.say(at, key, value);
            self.directory.shrink(key.slice, self.room);
            self.election.published(self.directory.generation);
        }
        status
    }

    /// A word of this replica's own.
    fn say(&mut self, at: Clocks, key: Key, value: Option<Value>) {
        let term = self.directory.term;
        self.directory.generation += 1;
        if self.is_writer() {
            self.directory.published = self.directory.generation;
        }
        let stamp = Stamp { clock: self.directory.clock.next(at.wall), term, generation: self.directory.generation };
        let word = Word { value, stamp };
        self.directory.apply(&key, &word);
        self.directory.outbox.insert(key, word);
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
