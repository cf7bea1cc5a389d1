//! The judge: it knows every change that a client asked for and what it was told, and nothing of the protocol.
//!
//! A value is explained by a change that asked for it. It contradicts an acknowledged change of the same key that was
//! asked for only after everything that explains the value was answered: that change was undone.

use super::{
    replica::{Key, Value},
    world::Micros,
};

/// What went wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Violation {
    NotOneWriter,
    AnswersDiffer,
    OutboxLeft,
    /// A value that no client asked for.
    UnknownValue,
    /// A 200 or 201 is gone.
    RegistrationLost,
    /// A 200 or 201 was overwritten by what was there before.
    RegistrationOverwritten,
    /// What a 204 removed is back.
    RemovalUndone,
    /// What a 404 said is not there is back.
    AbsenceUndone,
    /// A 202 registration is gone though its directory is not.
    AcceptedRegistrationLost,
    AcceptedRemovalUndone,
    /// A new writer began with a state that undoes a confirmed change.
    TakeoverUndone,
}

/// What a client asked for, of one instance.
#[derive(Debug, Clone)]
struct Change {
    /// Which request asked for it; `None` where a hand made it.
    op: Option<usize>,
    key: Key,
    /// 0 for a removal.
    value: Value,
    machine: usize,
    asked: Micros,
    answered: Option<(u16, Micros)>,
    /// Nothing is promised of it: its directory is lost, or its sender was told that it is too old.
    exempt: bool,
}

#[derive(Debug)]
pub(super) struct Checker {
    /// By request: the key, which may be a whole address, and the value.
    requests: Vec<(Key, Value)>,
    changes: Vec<Change>,
    violations: Vec<Violation>,
    /// Changes closer together than this may stand in either order.
    margin: Micros,
    /// Sets of ports of each address: the removal of an address is one of each of its instances.
    ports: usize,
}

impl Checker {
    pub(super) fn new(margin: Micros, ports: usize) -> Self {
        Self { requests: Vec::new(), changes: Vec::new(), violations: Vec::new(), margin, ports }
    }

    pub(super) fn invoked(&mut self, key: Key, value: Value, machine: usize, asked: Micros) -> usize {
        let op = self.requests.len();
        self.requests.push((key, value));
        let change = |key| Change { op: Some(op), key, value, machine, asked, answered: None, exempt: false };
        if key.is_every() {
            self.changes.extend((0..self.ports).map(|ports| change(Key { ports, ..key })));
        } else {
            self.changes.push(change(key));
        }
        op
    }

    pub(super) fn change(&self, op: usize) -> (Key, Value) {
        self.requests[op]
    }

    pub(super) fn answered(&mut self, op: usize, status: u16, time: Micros) {
        for change in self.changes.iter_mut().filter(|change| change.op == Some(op)) {
            change.answered.get_or_insert((status, time));
        }
    }

    /// The directory that alone held the last word on `key` is gone.
    pub(super) fn lost_with_directory(&mut self, key: Key, machine: usize) {
        for change in &mut self.changes {
            let accepted = change.answered.is_none_or(|(status, _)| status == 202);
            if key.covers(change.key) && change.machine == machine && accepted {
                change.exempt = true;
            }
        }
    }

    /// The word that set `key` to `value` was refused as too old, and that was told. Words that were only accepted (202) and that it had
    /// outranked before go with it.
    pub(super) fn refused(&mut self, key: Key, value: Value) {
        let Some(last) = self.changes.iter().rposition(|change| change.key == key && change.value == value) else {
            return;
        };
        // Before: its change may have been applied at any time until it was answered.
        let until = self.changes[last].answered.map_or(Micros::MAX, |(_, time)| time);
        for change in &mut self.changes {
            let accepted = change.answered.is_none_or(|(status, _)| status == 202);
            if change.key == key && change.asked <= until && accepted {
                change.exempt = true;
            }
        }
    }

    /// What a hand made of `key` stood when a take-over began: changes asked for before the hand's count no more. `value` is one that
    /// the hand wrote.
    pub(super) fn edited(&mut self, key: Key, edited: Micros, value: Option<Value>, listed: Micros) {
        for change in self.changes.iter_mut().filter(|change| change.key == key && change.asked <= edited) {
            change.exempt = true;
        }
        if let Some(value) = value {
            let answered = Some((0, listed));
            self.changes.push(Change {
                op: None,
                key,
                value,
                machine: usize::MAX,
                asked: edited,
                answered,
                exempt: true,
            });
        }
    }

    /// The namespace of `key` was deleted at `deleted`, and the writer has forgotten what was in it at `seen`: a removal, if nothing
    /// but the writer's directory and Kubernetes held the last word. A word that was accepted elsewhere may still come.
    pub(super) fn namespace_deleted(&mut self, key: Key, deleted: Micros, seen: Micros) {
        let mut certain = true;
        for change in self.changes.iter_mut().filter(|change| change.key == key) {
            change.exempt = true;
            certain &= match change.answered {
                Some((200 | 201 | 204 | 404, time)) => time < deleted,
                Some((503, _)) => true,
                _ => false,
            };
        }
        if certain {
            let answered = Some((204, seen));
            let machine = usize::MAX;
            self.changes.push(Change { op: None, key, value: 0, machine, asked: deleted, answered, exempt: false });
        }
    }

    /// An acknowledged change that `value` contradicts.
    fn undone(&self, key: Key, value: Value, now: Micros, confirmed_only: bool) -> Result<(), Violation> {
        let mut explained = (value == 0).then_some(0);
        for change in self.changes.iter().filter(|change| change.key == key && change.value == value) {
            let until = match change.answered {
                Some((503, _)) => continue,
                Some((_, time)) if time <= now => time,
                _ => Micros::MAX,
            };
            explained = explained.max(Some(until));
        }
        let Some(explained) = explained else { return Err(Violation::UnknownValue) };
        for change in self.changes.iter().filter(|change| change.key == key && change.value != value && !change.exempt)
        {
            let Some((status, answered)) = change.answered else { continue };
            if answered > now || change.asked <= explained.saturating_add(self.margin) {
                continue;
            }
            match status {
                200 | 201 if value == 0 => return Err(Violation::RegistrationLost),
                200 | 201 => return Err(Violation::RegistrationOverwritten),
                204 => return Err(Violation::RemovalUndone),
                404 => return Err(Violation::AbsenceUndone),
                202 if confirmed_only => {}
                202 if change.value == 0 => return Err(Violation::AcceptedRemovalUndone),
                202 => return Err(Violation::AcceptedRegistrationLost),
                _ => {}
            }
        }
        Ok(())
    }

    pub(super) fn check_takeover(&mut self, key: Key, value: Value, now: Micros) {
        if self.undone(key, value, now, true).is_err() {
            self.violations.push(Violation::TakeoverUndone);
        }
    }

    pub(super) fn check_end(&mut self, key: Key, value: Value, now: Micros) {
        if let Err(violation) = self.undone(key, value, now, false) {
            self.violations.push(violation);
        }
    }

    pub(super) fn violations(&self) -> Vec<Violation> {
        self.violations.clone()
    }
}
