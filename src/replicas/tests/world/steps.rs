//! What replicas do, and what becomes of everything that a step wants done.

use super::*;

impl World {
    /// One step of a replica, and everything that it wants done.
    pub(super) fn step(&mut self, machine: usize, epoch: u32, act: impl FnOnce(&mut Replica, Clocks)) {
        if self.machines[machine].epoch != epoch {
            return;
        }
        let at = self.clocks(machine);
        let Some(mut replica) = self.machines[machine].replica.take() else { return };
        act(&mut replica, at);
        let outputs = replica.outputs();
        self.machines[machine].directory.clone_from(&replica.directory);
        self.machines[machine].replica = Some(replica);
        for output in outputs {
            self.carry_out(machine, output);
        }
    }

    pub(super) fn carry_out(&mut self, machine: usize, output: Output) {
        match output {
            Output::ReadLease(id) => self.send(machine, Request::ReadLease(id)),
            Output::WriteLease { id, expected, record } => {
                self.send(machine, Request::WriteLease(id, expected, record));
            }
            Output::List(id) => self.send(machine, Request::List(id)),
            Output::ReadSlice { id, slice } => self.send(machine, Request::ReadSlice(id, slice)),
            Output::WriteSlice { id, slice, expected, record } => {
                self.send(machine, Request::WriteSlice(id, slice, expected, record));
            }
            Output::DeleteSlice { id, slice, expected } => {
                self.send(machine, Request::DeleteSlice(id, slice, expected));
            }
            Output::Answer { op, status } => self.answer(machine, op, status),
            Output::HandOver { holder, words } => self.hand_over(machine, holder, words),
            Output::HandedOver { to, words } => {
                let epoch = self.machines[to].epoch;
                let delay = self.random.between(MILLISECOND, 20 * MILLISECOND);
                self.at(self.time + delay, SimulatedEvent::HandedOver { to, epoch, words });
            }
            Output::Refused(words) => {
                self.tell(|| format!("replica {machine} refuses {words:?}"));
                // Not silent: whoever said them is told by an Event and a metric.
                words.into_iter().for_each(|(key, word)| self.checker.refused(key, word.value.unwrap_or(0)));
            }
            Output::Serving => {
                self.takeovers += 1;
                self.tell(|| format!("replica {machine} writes"));
                self.check_writer(machine);
            }
            Output::Stepped => {
                self.tell(|| format!("replica {machine} follows"));
                for op in std::mem::take(&mut self.machines[machine].arrived) {
                    self.checker.answered(op, 503, self.time);
                }
                self.lose_watch(machine);
                self.break_streams(machine);
            }
        }
    }

    pub(super) fn lose_watch(&mut self, machine: usize) {
        let machine = &mut self.machines[machine];
        machine.watching = false;
        machine.listing = false;
        machine.watch += 1;
    }

    /// What a new writer begins with must not undo what was confirmed.
    pub(super) fn check_writer(&mut self, machine: usize) {
        let Some(replica) = &self.machines[machine].replica else { return };
        let answers: Vec<(Key, Value)> = self.keys().map(|key| (key, replica.answers(key))).collect();
        for (key, value) in answers {
            self.checker.check_takeover(key, value, self.time);
        }
    }

    pub(super) fn answer(&mut self, machine: usize, op: usize, status: u16) {
        let mut delay = self.random.between(10, 200);
        // Between the check and the answer is where a pause hurts most.
        if !self.healed && status != 202 && self.random.percent(3) {
            let pause = self.random.between(SECOND, 60 * SECOND);
            self.pause(machine, pause);
            delay = 1;
        }
        let epoch = self.machines[machine].epoch;
        self.at(self.time + delay, SimulatedEvent::Reply(machine, epoch, op, status));
    }

    pub(super) fn pause(&mut self, machine: usize, time: Micros) {
        let machine = &mut self.machines[machine];
        machine.paused_until = self.time + time;
        machine.stopped += time;
    }

    pub(super) fn hand_over(&mut self, from: usize, holder: DirectoryId, words: Vec<(Key, Word<Value>)>) {
        let reachable = |machine: &Machine| machine.alone_until <= self.time;
        let Some(to) = self.machines.iter().position(|machine| machine.directory.id == holder) else { return };
        if !reachable(&self.machines[from]) || !reachable(&self.machines[to]) {
            return;
        }
        let epoch = self.machines[from].epoch;
        let delay = self.random.between(MILLISECOND, 20 * MILLISECOND);
        self.at(self.time + delay, SimulatedEvent::HandOver { to, from, epoch, words });
    }

    pub(super) fn commit(&mut self, machine: usize, epoch: u32, op: usize) {
        if self.machines[machine].epoch != epoch || !self.machines[machine].arrived.contains(&op) {
            return;
        }
        self.machines[machine].arrived.retain(|other| *other != op);
        let (key, value) = self.checker.change(op);
        let value = (value != 0).then_some(value);
        let mut taken = false;
        self.step(machine, epoch, |replica, at| taken = replica.submit(at, op, key, value));
        if taken {
            let second = SECOND * 1_000 / self.machines[machine].rate;
            self.at(self.time + second, SimulatedEvent::Overdue(machine, epoch, op));
        } else {
            self.checker.answered(op, 503, self.time);
        }
    }

    pub(super) fn tick(&mut self, machine: usize, epoch: u32) {
        if self.machines[machine].epoch != epoch {
            return;
        }
        let next = (2 * SECOND + self.random.between(0, 200 * MILLISECOND)) * 1_000 / self.machines[machine].rate;
        self.at(self.time + next, SimulatedEvent::Tick(machine, epoch));
        if !self.machines[machine].watching && !self.machines[machine].listing {
            self.machines[machine].listing = true;
            self.send(machine, Request::ListAndWatch);
        }
        self.step(machine, epoch, Replica::tick);
        // A take-over is the worst moment to sleep.
        let takes_over = |machine: &Machine| machine.replica.as_ref().is_some_and(Replica::is_taking_over);
        if !self.healed && takes_over(&self.machines[machine]) && self.random.percent(5) {
            let pause = self.random.between(SECOND, 60 * SECOND);
            self.pause(machine, pause);
        }
    }
}
