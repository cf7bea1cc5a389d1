//! Slices: bringing them to what they should be, what is seen of them, and what that confirms.

use super::*;

impl Replica {
    fn wanted(&self, slice: usize, at: Clocks) -> Option<Record> {
        let words: WordMap = self
            .directory
            .words
            .iter()
            .filter(|(key, word)| key.slice == slice && (!word.is_tombstone() || self.rules.tombstones_in_slices))
            .map(|(key, word)| (*key, *word))
            .collect();
        let mut record = Record {
            term: self.directory.term,
            generation: self.directory.generation,
            writer: self.directory.id,
            words,
            refuse_before: self.directory.refuse_before.get(&slice).copied().unwrap_or(0),
        };
        record.shrink(self.room);
        let expired_before = self.lifetime.expired_before(self.directory.clock.now(at.wall));
        record.is_needed(expired_before).then_some(record)
    }

    /// Brings one slice to what it should be, one request at a time.
    pub(super) fn mirror(&mut self, slice: usize, at: Clocks) {
        if !self.is_writer() {
            return;
        }
        if self.slices[slice].in_flight.is_some()
            || (self.rules.write_only_while_safe && !self.election.is_safe(at.now.boot))
        {
            return;
        }
        if self.slices[slice].unknown {
            let id = self.request();
            self.slices[slice].in_flight = Some(id);
            self.slices[slice].sent_at = (self.slices[slice].version, self.directory.generation);
            self.outputs.push(Output::ReadSlice { id, slice });
            return;
        }
        let wanted = self.wanted(slice, at);
        let generation = self.directory.generation;
        let state = &self.slices[slice];
        let observed = state.observed.as_ref().map(|(_, record)| record);
        let same = observed.map(|record| &record.words) == wanted.as_ref().map(|record| &record.words)
            && observed.map(|record| record.refuse_before) == wanted.as_ref().map(|record| record.refuse_before);
        let awaited = self.waiting.iter().any(|waiting| waiting.slice == slice)
            || self.received.iter().any(|handed| handed.needs.iter().any(|need| need.0 == slice));
        // Whoever wrote it: every request that a former writer may still have under way expects this version, or an older one, and
        // says what this version says, or something younger.
        if same && !state.rewrite {
            if awaited || self.directory.outbox.keys().any(|key| key.slice == slice) {
                self.shown(slice, generation, at);
            }
            return;
        }
        let id = self.request();
        let expected = self.slices[slice].observed.as_ref().map(|(version, _)| *version);
        let output = match (wanted, expected) {
            (Some(record), expected) => {
                self.slices[slice].writing = Some(record.clone());
                self.slices[slice].sent = Some(record.clone());
                Output::WriteSlice { id, slice, expected, record }
            }
            (None, Some(expected)) => Output::DeleteSlice { id, slice, expected },
            (None, None) => {
                self.slices[slice].rewrite = false;
                return self.shown(slice, generation, at);
            }
        };
        self.slices[slice].in_flight = Some(id);
        self.slices[slice].sent_at = (self.slices[slice].version, self.directory.generation);
        self.outputs.push(output);
    }

    pub(in super::super) fn slice_written(&mut self, at: Clocks, id: u64, slice: usize, written: SliceWrite) {
        let state = &mut self.slices[slice];
        if state.in_flight != Some(id) || self.election.writing().is_none() {
            return;
        }
        state.in_flight = None;
        let record = state.writing.take();
        match written {
            SliceWrite::Failed => state.unknown = true,
            SliceWrite::Written(version) => {
                let record = record.expect("what was written");
                // The term may have grown meanwhile: then this was written under the one before.
                if Some(record.term) == self.election.writing() {
                    state.rewrite = false;
                }
                let generation = record.generation;
                let counts = Some(record.term) == self.election.writing();
                if version > state.version {
                    state.version = version;
                    state.observed = Some((version, record));
                }
                if counts {
                    self.shown(slice, generation, at);
                }
            }
            SliceWrite::Deleted => {
                let (version, generation) = state.sent_at;
                state.rewrite = false;
                // The watch has shown something since, before the deletion or after it.
                state.unknown = state.version != version;
                state.observed = None;
                // Words said since the request was sent are not in what was deleted, nor anywhere else.
                self.shown(slice, generation, at);
            }
        }
        self.mirror(slice, at);
    }

    pub(in super::super) fn slice_read(&mut self, at: Clocks, id: u64, slice: usize, read: Option<Option<Observed>>) {
        let state = &mut self.slices[slice];
        if state.in_flight != Some(id) || self.election.writing().is_none() {
            return;
        }
        state.in_flight = None;
        // What the watch has shown since the request was sent may be younger than the answer.
        let current = state.version == state.sent_at.0;
        if let Some(found) = read.filter(|_| current) {
            state.unknown = false;
            if let Some((version, _)) = &found {
                state.version = state.version.max(*version);
            }
            self.observe(at, slice, found);
        }
    }

    /// The watch, or a list behind it, shows a slice. `version` is that of the slice or of its deletion.
    pub(in super::super) fn slice_changed(&mut self, at: Clocks, slice: usize, version: u64, found: Option<Observed>) {
        if version <= self.slices[slice].version {
            return;
        }
        self.slices[slice].version = version;
        self.observe(at, slice, found);
    }

    fn observe(&mut self, at: Clocks, slice: usize, found: Option<Observed>) {
        let writing = self.election.writing();
        self.slices[slice].observed.clone_from(&found);
        if let Some((_, record)) = &found
            && record.term <= self.election.highest_term(at.now)
            && (self.rules.slice_deposes || !self.is_writer())
        {
            let actions = self.election.outranked(record.term);
            self.act(at, actions);
        }
        let Some(term) = writing.filter(|_| self.is_writer()) else { return };
        if let Some((_, record)) = found {
            match self.judge(slice, &record, term, at) {
                Judgement::Late if self.rules.merge_late_writes => self.merge_late(at, slice, &record),
                Judgement::Own => self.shown(slice, record.generation, at),
                // The annotations are repaired, too.
                Judgement::Altered | Judgement::Forged => self.slices[slice].rewrite = true,
                Judgement::Late | Judgement::Outranks => {}
            }
        }
        self.mirror(slice, at);
    }

    fn judge(&self, slice: usize, record: &Record, term: u64, at: Clocks) -> Judgement {
        let highest_term = self.election.highest_term(at.now);
        let sent = self.slices[slice].sent.as_ref();
        match record.judge(JudgingWriter { id: self.directory.id, term, highest_term, sent }) {
            Judgement::Altered
                if !self.rules.confirm_only_what_was_sent && record.generation <= self.directory.generation =>
            {
                Judgement::Own
            }
            judgement => judgement,
        }
    }

    /// The namespace of `slice` was deleted: that counts as the removal of everything in it, and nothing of it is left.
    /// Returns whether this replica writes, and so has forgotten it.
    pub(in super::super) fn namespace_deleted(&mut self, slice: usize) -> bool {
        if !self.is_writer() {
            return false;
        }
        self.directory.words.retain(|key, _| key.slice != slice);
        self.directory.outbox.retain(|key, _| key.slice != slice);
        self.directory.generation += 1;
        self.directory.published = self.directory.generation;
        self.election.published(self.directory.generation);
        for waiting in self.waiting.extract_if(.., |waiting| waiting.slice == slice) {
            self.outputs.push(Output::Answer { op: waiting.op, status: 202 });
        }
        true
    }

    /// Words of a request that a former writer sent and that was carried out late. Its age limit is about what is not in it.
    fn merge_late(&mut self, at: Clocks, slice: usize, record: &Record) {
        let mut refused = Vec::new();
        for (key, word) in &record.words {
            let merge = self.merge(at);
            if merge.merge(&mut Receiver(&mut self.directory), key, word) == Merged::TooOld {
                refused.push((*key, *word));
            }
        }
        self.directory.raise_refuse_before(slice, record.refuse_before);
        self.directory.shrink(slice, self.room);
        self.election.published(self.directory.generation);
        if !refused.is_empty() {
            self.outputs.push(Output::Refused(refused));
        }
    }

    pub(super) fn merge(&self, at: Clocks) -> Merge {
        Merge { clock: self.directory.clock, wall: at.wall, lifetime: self.lifetime, rules: self.rules }
    }

    fn shown(&mut self, slice: usize, generation: u64, at: Clocks) {
        let safe = !self.rules.confirm_only_while_safe || self.election.is_safe(at.now.boot);
        if self.confirmations.shown(&slice, generation, at.now.boot, safe) {
            self.confirmed(slice, generation, at);
        } else if !self.rules.outbox_waits_for_confirmation {
            self.clear_outbox(slice, at);
        }
    }

    pub(super) fn confirmed(&mut self, slice: usize, generation: u64, at: Clocks) {
        self.clear_outbox(slice, at);
        let (done, waiting) = std::mem::take(&mut self.waiting)
            .into_iter()
            .partition(|waiting: &Waiting| waiting.slice == slice && waiting.generation <= generation);
        self.waiting = waiting;
        self.outputs.extend(done.iter().map(|done| Output::Answer { op: done.op, status: done.status }));
        let confirmations = &self.confirmations;
        let complete = |handed: &ReceivedWords| {
            handed.needs.iter().all(|(slice, generation)| confirmations.of(slice) >= *generation)
        };
        let (done, received) = std::mem::take(&mut self.received).into_iter().partition(complete);
        self.received = received;
        let done: Vec<ReceivedWords> = done;
        self.outputs
            .extend(done.into_iter().map(|ReceivedWords { from, words, .. }| Output::HandedOver { to: from, words }));
    }

    /// An entry goes only when its slice carries its stamp or a younger one.
    fn clear_outbox(&mut self, slice: usize, at: Clocks) {
        let expired_before = self.lifetime.expired_before(self.directory.clock.now(at.wall));
        let shown = self.slices[slice].observed.as_ref().map(|(_, record)| record);
        let tombstones = self.rules.tombstones_in_slices;
        let words = &self.directory.words;
        self.directory.outbox.retain(|key, word| {
            if key.slice != slice {
                return true;
            }
            match shown.and_then(|record| last_word(&record.words, *key)) {
                Some(shown) => shown.stamp < word.stamp,
                None => {
                    // A tombstone that the slice had no room for, or may not hold.
                    let dropped = shown.is_some_and(|record| record.refuse_before >= word.stamp.clock);
                    let expired = word.stamp.clock < expired_before;
                    !word.is_tombstone() || (tombstones && !dropped && !expired && last_word(words, *key).is_some())
                }
            }
        });
    }

    /// Forgets tombstones that no word can be older than any more.
    pub(super) fn expire(&mut self, at: Clocks) {
        let before = self.lifetime.expired_before(self.directory.clock.now(at.wall));
        let outbox = &self.directory.outbox;
        self.directory
            .words
            .retain(|key, word| !word.is_tombstone() || word.stamp.clock >= before || outbox.contains_key(key));
    }
}
