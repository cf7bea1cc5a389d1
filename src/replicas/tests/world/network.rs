//! The network and the API server: compare-and-swap, requests that are late, lost, or carried out unseen, watches that lag.

use super::*;

impl World {
    pub(super) fn cut_off_until(&self, machine: usize) -> Micros {
        self.machines[machine].cut_off_until.max(self.down_until)
    }

    pub(super) fn delay(&mut self) -> Micros {
        if self.time >= self.chaos_until {
            return self.random.between(500, 12 * MILLISECOND);
        }
        match self.random.between(0, 100) {
            0..55 => self.random.between(MILLISECOND, 30 * MILLISECOND),
            55..80 => self.random.between(30 * MILLISECOND, 3 * SECOND),
            80..92 => self.random.between(3 * SECOND, 12 * SECOND),
            _ => self.random.between(10 * SECOND, 60 * SECOND),
        }
    }

    pub(super) fn send(&mut self, machine: usize, request: Request) {
        let writes = matches!(request, Request::WriteSlice(..) | Request::DeleteSlice(..));
        let mut executed = Some(self.time + self.delay());
        let cut = self.cut_off_until(machine);
        if cut > self.time {
            // Lost, or on the wire until the partition heals.
            let late = cut + self.random.between(0, 2 * SECOND);
            executed = (!self.random.percent(70) && late - self.time < 60 * SECOND).then_some(late);
        }
        if !self.healed && writes && self.random.percent(5) {
            executed = Some(self.time + self.random.between(SECOND, 60 * SECOND));
        }
        let call = self.calls.len();
        let epoch = self.machines[machine].epoch;
        let began = self.boot(machine);
        let sent = self.time;
        self.calls.push(Call { replica: machine, epoch, request, sent, began, response: None, answered: false });
        if let Some(executed) = executed {
            self.at(executed, SimulatedEvent::Execute(call));
        }
        let timeout = 10 * SECOND * 1_000 / self.machines[machine].rate;
        self.at(self.time + timeout, SimulatedEvent::TimedOut(call));
    }

    pub(super) fn execute(&mut self, call: usize) {
        if self.down_until > self.time {
            let late = self.down_until + self.random.between(0, SECOND);
            // No request is on its way for longer than a minute.
            if self.random.percent(50) && late < self.calls[call].sent + 60 * SECOND {
                self.at(late, SimulatedEvent::Execute(call));
            }
            return;
        }
        let response = match self.calls[call].request.clone() {
            Request::ReadLease(_) => Response::Lease(self.lease.clone()),
            Request::WriteLease(_, expected, record) => {
                if self.lease.as_ref().map(|lease| lease.version) == expected {
                    self.version += 1;
                    let version = ResourceVersion(self.version);
                    self.lease = Some(ObservedLease { version, record });
                    Response::Written(self.version)
                } else {
                    Response::Conflict
                }
            }
            Request::List(_) => {
                self.edits_are_listed();
                Response::List(self.slices.clone(), self.log.len())
            }
            Request::ListAndWatch => Response::List(self.slices.clone(), self.log.len()),
            Request::ReadSlice(_, slice) => Response::Slice(self.slices[slice].clone()),
            Request::WriteSlice(_, slice, expected, record) => {
                let stands = self.slices[slice].as_ref().map(|(version, _)| *version) == expected;
                if stands && !self.namespace_is_away(slice) {
                    self.version += 1;
                    self.put_right(slice, &record);
                    self.change(slice, Some((self.version, record)));
                    Response::Written(self.version)
                } else {
                    Response::Conflict
                }
            }
            Request::DeleteSlice(_, slice, expected) => {
                if self.slices[slice].as_ref().is_some_and(|(version, _)| *version == expected) {
                    self.version += 1;
                    self.change(slice, None);
                    Response::Written(self.version)
                } else {
                    Response::Conflict
                }
            }
        };
        self.calls[call].response = Some(response);
        let machine = self.calls[call].replica;
        let cut = self.cut_off_until(machine);
        if cut <= self.time || self.random.percent(30) {
            let arrives = cut.max(self.time) + self.delay();
            self.at(arrives, SimulatedEvent::Answered(call));
        }
    }

    pub(super) fn change(&mut self, slice: usize, found: Option<Observed>) {
        self.tell(|| format!("slice {slice} := {found:?}"));
        self.slices[slice].clone_from(&found);
        self.log.push((slice, self.version, found));
        for machine in 0..self.machines.len() {
            self.announce(machine);
        }
    }

    /// A watch delivers its events in order, now or later.
    pub(super) fn announce(&mut self, machine: usize) {
        let lags = self.time < self.chaos_until && self.random.percent(15);
        let delay =
            if lags { self.random.between(0, 20 * SECOND) } else { self.random.between(MILLISECOND, 15 * MILLISECOND) };
        let Machine { epoch, watch, last_watch, .. } = self.machines[machine];
        let arrives = (self.time + delay).max(last_watch + 1);
        self.machines[machine].last_watch = arrives;
        self.at(arrives, SimulatedEvent::Watch(machine, epoch, watch));
    }

    pub(super) fn watch(&mut self, index: usize, epoch: u32, watch: u32) {
        let cut = self.cut_off_until(index) > self.time;
        let machine = &mut self.machines[index];
        if machine.epoch != epoch || machine.watch != watch || !machine.watching {
            return;
        }
        if cut {
            machine.watching = false;
            return;
        }
        let Some((slice, version, found)) = self.log.get(machine.position).cloned() else { return };
        machine.position += 1;
        if found.is_none() {
            self.show_namespace(index, epoch, slice, version);
        }
        self.step(index, epoch, |replica, at| replica.slice_changed(at, slice, version, found));
    }

    pub(super) fn answered(&mut self, call: usize, response: Option<Response>) {
        let Call { replica: machine, epoch, ref request, began, answered, .. } = self.calls[call];
        if answered {
            return;
        }
        let request = request.clone();
        self.calls[call].answered = true;
        match request {
            Request::ReadLease(id) => {
                let read = response.map(|response| match response {
                    Response::Lease(lease) => lease,
                    _ => unreachable!("a read of the Lease is answered with it"),
                });
                self.step(machine, epoch, |replica, at| replica.lease_read(at, id, began, read));
            }
            Request::WriteLease(id, ..) => {
                let written = match response {
                    Some(Response::Written(version)) => LeaseWrite::Written(ResourceVersion(version)),
                    Some(_) => LeaseWrite::Conflict,
                    None => LeaseWrite::Unknown,
                };
                self.step(machine, epoch, |replica, at| replica.lease_written(at, id, began, written));
            }
            Request::List(id) => {
                let list = match &response {
                    Some(Response::List(list, _)) => Some(list.as_slice()),
                    _ => None,
                };
                self.step(machine, epoch, |replica, at| replica.listed(at, id, list));
                if let Some(Response::List(list, position)) = response {
                    self.watch_behind(machine, epoch, list, position);
                }
            }
            Request::ListAndWatch => {
                if self.machines[machine].epoch == epoch {
                    self.machines[machine].listing = false;
                }
                if let Some(Response::List(list, position)) = response
                    && !self.machines[machine].watching
                {
                    self.watch_behind(machine, epoch, list, position);
                }
            }
            Request::ReadSlice(id, slice) => {
                let read = response.map(|response| match response {
                    Response::Slice(found) => found,
                    _ => unreachable!("a read of a slice is answered with it"),
                });
                self.step(machine, epoch, |replica, at| replica.slice_read(at, id, slice, read));
            }
            Request::WriteSlice(id, slice, ..) => {
                let written = match response {
                    Some(Response::Written(version)) => SliceWrite::Written(version),
                    _ => SliceWrite::Failed,
                };
                self.step(machine, epoch, |replica, at| replica.slice_written(at, id, slice, written));
            }
            Request::DeleteSlice(id, slice, _) => {
                let written = match response {
                    Some(Response::Written(_)) => SliceWrite::Deleted,
                    _ => SliceWrite::Failed,
                };
                self.step(machine, epoch, |replica, at| replica.slice_written(at, id, slice, written));
            }
        }
    }

    /// Shows the replica a list, and what comes behind it.
    pub(super) fn watch_behind(&mut self, index: usize, epoch: u32, list: Vec<Option<Observed>>, position: usize) {
        let machine = &mut self.machines[index];
        if machine.epoch != epoch {
            return;
        }
        machine.watch += 1;
        machine.position = position;
        machine.watching = true;
        for _ in position..self.log.len() {
            self.announce(index);
        }
        // What is not in the list was deleted at some time before its version.
        let listed = self.log[..position].iter().map(|(_, version, _)| *version).max().unwrap_or(0);
        for (slice, found) in list.into_iter().enumerate() {
            let version = found.as_ref().map_or(listed, |(version, _)| *version);
            self.step(index, epoch, |replica, at| replica.slice_changed(at, slice, version, found));
        }
    }
}
