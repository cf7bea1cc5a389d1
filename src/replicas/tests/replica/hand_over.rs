//! Words of a replica that writes no more, on their way to the one that does.

use super::*;

impl Replica {
    pub(super) fn hand_over(&mut self, at: Clocks) {
        let Some(lease) = self.election.lease() else { return };
        let holder = lease.holder;
        if self.directory.outbox.is_empty()
            || lease.released
            || holder == self.directory.id
            || at.now.boot < self.hand_over_after
        {
            return;
        }
        self.hand_over_after = BootTime(at.now.boot.0 + HAND_OVER_INTERVAL);
        let words = self.directory.outbox.iter().map(|(key, word)| (*key, *word)).collect();
        self.outputs.push(Output::HandOver { holder, words });
    }

    /// A deposed writer hands its words over.
    pub(in super::super) fn take_in(&mut self, at: Clocks, from: usize, words: Vec<(Key, Word<Value>)>) {
        if !self.is_writer() {
            return;
        }
        let mut needs = Vec::new();
        let mut refused = Vec::new();
        for &(key, word) in &words {
            let merge = self.merge(at);
            if merge.merge(&mut Receiver(&mut self.directory), &key, &word) == Merged::TooOld {
                refused.push((key, word));
            }
            self.directory.shrink(key.slice, self.room);
            needs.push((key.slice, self.directory.generation));
        }
        self.election.published(self.directory.generation);
        if !refused.is_empty() {
            self.outputs.push(Output::Refused(refused));
        }
        let stamps = words.iter().map(|(key, word)| (*key, word.stamp)).collect();
        if self.rules.acknowledge_hand_over_when_confirmed {
            self.received.push(ReceivedWords { from, words: stamps, needs: needs.clone() });
        } else {
            self.outputs.push(Output::HandedOver { to: from, words: stamps });
        }
        for (slice, _) in needs {
            self.mirror(slice, at);
        }
    }

    /// The writer has these words.
    pub(in super::super) fn handed_over(&mut self, words: &[(Key, Stamp)]) {
        self.hand_over_after = BootTime::default();
        if self.is_writer() {
            return;
        }
        for (key, stamp) in words {
            if self.directory.outbox.get(key).is_some_and(|word| word.stamp == *stamp) {
                self.directory.outbox.remove(key);
            }
        }
    }
}
