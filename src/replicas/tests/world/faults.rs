//! What a plan does to the world: changes by clients, and faults.

use super::*;

impl World {
    /// A replica that takes registrations.
    pub(super) fn writer(&mut self) -> Option<usize> {
        let writes = |machine: &Machine| machine.replica.as_ref().is_some_and(Replica::may_accept);
        let writers: Vec<usize> = (0..self.machines.len()).filter(|index| writes(&self.machines[*index])).collect();
        (!writers.is_empty()).then(|| writers[self.random.between(0, writers.len() as u64) as usize])
    }

    pub(super) fn submit(&mut self, machine: usize, key: Key, value: Value) {
        let op = self.checker.invoked(key, value, machine, self.time);
        self.tell(|| format!("change {op} for replica {machine}: {key:?} := {value}"));
        let delay = self.random.between(200, 5 * MILLISECOND);
        self.at(self.time + delay, SimulatedEvent::Arrive(machine, op));
    }

    pub(super) fn sustain(&mut self, key: Key) {
        let Some((value, _)) = self.sustained.get(&key).copied() else { return };
        match self.writer().filter(|writer| self.machines[*writer].paused_until <= self.time) {
            Some(writer) => {
                self.sustained.insert(key, (value, writer));
                self.submit(writer, key, value);
            }
            None => {
                let later = self.time + self.random.between(SECOND, 3 * SECOND);
                self.at(later, SimulatedEvent::Sustain(key));
            }
        }
    }

    pub(super) fn break_streams(&mut self, machine: usize) {
        let mut broken: Vec<Key> =
            self.sustained.iter().filter(|(_, (_, on))| *on == machine).map(|(key, _)| *key).collect();
        broken.sort_unstable();
        for key in broken {
            let later = self.time + self.random.between(100 * MILLISECOND, 3 * SECOND);
            self.at(later, SimulatedEvent::Sustain(key));
        }
    }

    pub(super) fn fault(&mut self, fault: Fault) {
        if !fault.is_change() {
            self.tell(|| format!("fault: {fault:?}"));
        }
        match fault {
            Fault::Register { key, sustained } => {
                let Some(writer) = self.writer() else { return };
                let value = self.next_value;
                self.next_value += 1;
                self.sustained.remove(&key);
                if sustained {
                    self.sustained.insert(key, (value, writer));
                }
                self.submit(writer, key, value);
            }
            Fault::RegisterAgain { key } => {
                let Some(writer) = self.writer() else { return };
                let value = self.machines[writer].replica.as_ref().map_or(0, |replica| replica.answers(key));
                if value != 0 {
                    self.submit(writer, key, value);
                }
            }
            Fault::Remove { key } => {
                let Some(writer) = self.writer() else { return };
                self.sustained.retain(|other, _| !key.covers(*other));
                self.submit(writer, key, 0);
            }
            Fault::Crash { machine, time, disk, boots } => {
                let Some(machine) = self.target(machine) else { return };
                if self.machines[machine].replica.is_some() {
                    self.crash(machine);
                    self.lose(machine, disk);
                    self.machines[machine].boots += u32::from(boots);
                    self.at(self.time + time, SimulatedEvent::Restart(machine));
                }
            }
            Fault::CrashAll { time } => {
                for machine in 0..self.machines.len() {
                    if self.machines[machine].replica.is_some() {
                        self.crash(machine);
                        let back = self.time + time + self.random.between(0, 20 * SECOND);
                        self.at(back, SimulatedEvent::Restart(machine));
                    }
                }
            }
            Fault::Pause { machine, time } => {
                let Some(machine) = self.target(machine) else { return };
                if self.machines[machine].paused_until < self.time {
                    self.pause(machine, time);
                }
            }
            Fault::CutOff { machine, time } => {
                let Some(machine) = self.target(machine) else { return };
                self.machines[machine].cut_off_until = self.time + time;
            }
            Fault::Alone { machine, time } => self.machines[machine].alone_until = self.time + time,
            Fault::Chaos { time } => self.chaos_until = self.time + time,
            Fault::Down { time } => self.down_until = self.time + time,
            Fault::Copy { machine } => {
                let machine = &mut self.machines[machine];
                machine.copies.push((machine.directory.clone(), machine.opened));
            }
            Fault::Release { machine } => self.release(machine),
            Fault::Edit { slice, edit, annotations } => self.edit(slice, edit, annotations),
            Fault::EditLease => {
                self.version += 1;
                if let Some(lease) = &mut self.lease {
                    lease.version = ResourceVersion(self.version);
                    lease.record.term = u64::MAX - self.random.between(0, 2);
                }
            }
            Fault::DeleteNamespace { slice } => self.delete_namespace(slice),
            Fault::DeleteLease => {
                self.version += 1;
                self.lease = None;
            }
        }
    }

    pub(super) fn target(&self, target: Target) -> Option<usize> {
        match target {
            Target::Machine(machine) => Some(machine),
            Target::Holder => {
                let holder = self.lease.as_ref()?.record.holder;
                let named = |index: &usize| self.machines[*index].directory.id == holder;
                // A copy of the directory that was not opened yet has the same id.
                (0..self.machines.len()).filter(named).max_by_key(|index| self.machines[*index].replica.is_some())
            }
        }
    }

    pub(super) fn crash(&mut self, index: usize) {
        // What was in the writer's queue may be in the journal, or not.
        for op in std::mem::take(&mut self.machines[index].arrived) {
            let (key, value) = self.checker.change(op);
            if self.random.percent(50) {
                let epoch = self.machines[index].epoch;
                self.step(index, epoch, |replica, at| {
                    if replica.may_accept() {
                        replica.decide(at, key, (value != 0).then_some(value));
                    }
                });
            }
        }
        let machine = &mut self.machines[index];
        machine.replica = None;
        machine.epoch += 1;
        self.lose_watch(index);
        self.break_streams(index);
    }

    pub(super) fn lose(&mut self, index: usize, disk: Disk) {
        let machine = &self.machines[index];
        let (directory, opened) = match disk {
            Disk::Kept => return,
            Disk::Lost => {
                self.next_directory += 1;
                (Directory::new(DirectoryId(self.next_directory)), (index, machine.boots))
            }
            Disk::Copy => {
                if machine.copies.is_empty() {
                    return;
                }
                let chosen = self.random.between(0, self.machines[index].copies.len() as u64) as usize;
                self.machines[index].copies[chosen].clone()
            }
            Disk::CopyOf(of) => {
                let Some(of) = self.target(of).filter(|of| *of != index) else { return };
                (self.machines[of].directory.clone(), self.machines[of].opened)
            }
        };
        // A 202 that only the lost directory had is lost with it, as it says.
        let lost: Vec<Key> = self.machines[index]
            .directory
            .outbox
            .iter()
            .filter(|(key, word)| directory.outbox.get(key) != Some(word))
            .map(|(key, _)| *key)
            .collect();
        lost.into_iter().for_each(|key| self.checker.lost_with_directory(key, index));
        self.machines[index].directory = directory;
        self.machines[index].opened = opened;
    }

    pub(super) fn restart(&mut self, index: usize) {
        if self.machines[index].replica.is_some() {
            return;
        }
        let Setup { rules, lifetime, room, slices, .. } = self.setup;
        let machine = &mut self.machines[index];
        let here = (index, machine.boots);
        let resume = std::mem::replace(&mut machine.opened, here) == here;
        if !resume && rules.renew_identity {
            self.next_directory += 1;
            machine.directory.id = DirectoryId(self.next_directory);
        }
        machine.epoch += 1;
        machine.watch += 1;
        (machine.watching, machine.listing) = (false, false);
        let mut directory = machine.directory.clone();
        directory.clock = HybridClock::after(directory.clock.last());
        // As in the server: ahead of the generations of a directory that was lost.
        let seconds = (EPOCH + self.time) / SECOND;
        directory.generation = (directory.generation + 1).max(seconds);
        machine.replica = Some(Replica::start(directory, slices, rules, lifetime, room, resume));
        let epoch = machine.epoch;
        let begin = self.time + self.random.between(0, 300 * MILLISECOND);
        self.at(begin, SimulatedEvent::Tick(index, epoch));
    }

    pub(super) fn release(&mut self, machine: usize) {
        let mut released = false;
        let epoch = self.machines[machine].epoch;
        self.step(machine, epoch, |replica, at| {
            if replica.is_writer() || replica.is_taking_over() {
                released = replica.release(at);
            }
        });
        if released {
            self.crash(machine);
            self.at(self.time + 5 * SECOND, SimulatedEvent::Restart(machine));
        }
    }

    pub(super) fn heal(&mut self) {
        self.tell(|| "everything heals".to_owned());
        self.healed = true;
        (self.chaos_until, self.down_until) = (0, 0);
        for index in 0..self.machines.len() {
            let now = self.time;
            let machine = &mut self.machines[index];
            (machine.cut_off_until, machine.alone_until) = (0, 0);
            machine.paused_until = machine.paused_until.min(now);
            if machine.replica.is_none() {
                self.at(now + SECOND, SimulatedEvent::Restart(index));
            }
        }
    }
}
