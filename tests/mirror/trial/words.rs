//! What registrants said to several processes, and what may be registered after that.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    net::SocketAddr,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use super::found::Found;

pub(super) const SERVICES: usize = 4;

/// Between two words on an instance: they are stamped by different processes, in milliseconds.
const MIN_DISTANCE: Duration = Duration::from_millis(5);

/// Where a process takes words, and which data directory it has.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Target {
    pub(super) grpc: SocketAddr,
    pub(super) directory: usize,
}

/// What a registration sets besides the instance. Every word has a priority of its own, as long as 16 bits last.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Attributes {
    pub(super) priority: u16,
    pub(super) weight: u16,
    /// Another name moves the instance to another slice.
    pub(super) port_name: &'static str,
}

pub(super) const PORT_NAMES: [&str; 2] = ["http", "web"];

/// Registered so, or not.
pub(super) type State = Option<Attributes>;

/// What an answer promises.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Promise {
    /// 200, 201, 204, 404: Kubernetes has it.
    Confirmed,
    /// 202: it counts as long as this data directory is not lost.
    Durable,
    /// There was no answer: it may count, at any later time.
    None,
}

#[derive(Debug)]
pub(super) struct Word {
    pub(super) state: State,
    pub(super) promise: Promise,
    /// Of the process that was told.
    pub(super) directory: usize,
    pub(super) said: Instant,
    pub(super) answered: Instant,
    /// How far the clocks of the processes may be apart.
    pub(super) apart: Duration,
}

impl Word {
    /// Whether an earlier word may win over this one all the same: two processes stamped them, the second of which had not seen
    /// the first one's word, and their clocks are further apart than the words.
    fn may_lose_to(&self, earlier: &Self) -> bool {
        let ordered = self.directory == earlier.directory
            || (self.promise == Promise::Confirmed && earlier.promise == Promise::Confirmed);
        !ordered && self.said.saturating_duration_since(earlier.answered) < self.apart
    }
}

/// The words on one instance, in order, from the last confirmed one on.
#[derive(Debug, Default)]
pub(super) struct Instance(Vec<Word>);

impl Instance {
    /// Whether the next word may be said: the last one is long enough ago.
    pub(super) fn is_free(&self) -> bool {
        self.0.last().is_none_or(|word| word.answered.elapsed() >= MIN_DISTANCE)
    }

    /// Whether Kubernetes has the last word.
    pub(super) fn is_confirmed(&self) -> bool {
        self.0.last().is_some_and(|word| word.promise == Promise::Confirmed)
    }

    pub(super) fn add(&mut self, word: Word) {
        if word.promise == Promise::Confirmed {
            self.0.retain(|earlier| earlier.promise == Promise::None || word.may_lose_to(earlier));
        }
        self.0.push(word);
    }

    /// The states that keep every promise.
    fn allowed(&self, lost: &HashSet<usize>) -> BTreeSet<State> {
        let unanswered = self.0.iter().filter(|word| word.promise == Promise::None).map(|word| word.state);
        let mut allowed: BTreeSet<State> = unanswered.collect();
        for (at, word) in self.0.iter().enumerate().rev() {
            match word.promise {
                Promise::None => {}
                Promise::Durable if lost.contains(&word.directory) => drop(allowed.insert(word.state)),
                Promise::Durable | Promise::Confirmed => {
                    allowed.insert(word.state);
                    allowed.extend(self.0[..at].iter().filter(|earlier| word.may_lose_to(earlier)).map(|it| it.state));
                    return allowed;
                }
            }
        }
        allowed.insert(None);
        allowed
    }
}

/// The key of an instance: its service and its address.
pub(super) fn place(index: usize) -> (String, String) {
    let (service, instance) = (index % SERVICES, index / SERVICES);
    (format!("s{service}"), format!("10.200.{}.{}", instance / 250, instance % 250 + 1))
}

/// Which instance of a service has this address.
pub(super) fn index_of(service: usize, address: &str) -> Option<usize> {
    let mut octets = address.strip_prefix("10.200.")?.split('.').map(|octet| octet.parse::<usize>().ok());
    let (high, low) = (octets.next()??, octets.next()??);
    Some((high * 250 + low.checked_sub(1)?) * SERVICES + service)
}

/// All words.
#[derive(Debug)]
pub(super) struct Words {
    pub(super) instances: Vec<tokio::sync::Mutex<Instance>>,
    tally: Mutex<Tally>,
}

#[derive(Debug, Default)]
struct Tally {
    /// Directories that do not exist any more, or went back to an older copy.
    lost: HashSet<usize>,
    apart: Duration,
    /// How many words got each status; 0 is no answer.
    statuses: BTreeMap<u32, usize>,
    promised: usize,
    /// Answers that nothing explains.
    unexpected: Vec<String>,
    /// When the last word was answered with a promise, and the longest time between two of them.
    gap: (Option<Instant>, Duration),
}

impl Words {
    pub(super) fn new(instances_per_service: usize) -> Self {
        let instances = SERVICES * instances_per_service;
        Self { instances: (0..instances).map(|_| tokio::sync::Mutex::default()).collect(), tally: Mutex::default() }
    }

    fn tally(&self) -> MutexGuard<'_, Tally> {
        self.tally.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn lose(&self, directory: usize) {
        self.tally().lost.insert(directory);
    }

    /// How far the clocks are apart from now on.
    pub(super) fn set_apart(&self, apart: Duration) {
        self.tally().apart = apart;
    }

    pub(super) fn apart(&self) -> Duration {
        self.tally().apart
    }

    /// Counts an answer. Returns what it promises, if it promises anything or was none.
    pub(super) fn note(&self, registered: bool, status: Option<u32>) -> Option<Promise> {
        let mut tally = self.tally();
        *tally.statuses.entry(status.unwrap_or(0)).or_default() += 1;
        let promise = match (status, registered) {
            (None, _) => return Some(Promise::None),
            (Some(200 | 201), true) | (Some(204 | 404), false) => Promise::Confirmed,
            (Some(202), _) => Promise::Durable,
            (Some(503), _) => return None,
            (Some(status), _) => {
                tally.unexpected.push(format!("{status} for a {}", if registered { "REGISTER" } else { "UNREGISTER" }));
                return None;
            }
        };
        tally.promised += 1;
        let before = tally.gap.0.replace(Instant::now());
        tally.gap.1 = tally.gap.1.max(before.map_or(Duration::ZERO, |before| before.elapsed()));
        Some(promise)
    }

    /// Words that were answered with a promise.
    pub(super) fn promised(&self) -> usize {
        self.tally().promised
    }

    /// How many words got each status; 0 is no answer.
    pub(super) fn statuses(&self) -> BTreeMap<u32, usize> {
        self.tally().statuses.clone()
    }

    /// The longest time between two answers with a promise since the last call, whoever gave them; it may not be over.
    pub(super) fn take_gap(&self) -> Duration {
        let mut tally = self.tally();
        let open = tally.gap.0.map_or(Duration::ZERO, |last| last.elapsed());
        std::mem::take(&mut tally.gap.1).max(open)
    }

    /// The next answer begins anew, without a gap before it.
    pub(super) fn forget_gap(&self) {
        self.tally().gap = (Some(Instant::now()), Duration::ZERO);
    }

    /// Compares what is registered with what was promised. Returns what is wrong.
    pub(super) fn check(&self, found: &Found) -> Vec<String> {
        let tally = self.tally();
        let mut wrong = tally.unexpected.clone();
        wrong.extend(found.strange().map(|what| format!("nobody registered {what}")));
        for (index, instance) in self.instances.iter().enumerate() {
            let Ok(instance) = instance.try_lock() else {
                wrong.push("words are under way".into());
                continue;
            };
            let (service, address) = place(index);
            match found.state(index) {
                Ok(state) if instance.allowed(&tally.lost).contains(&state) => {}
                state => wrong.push(format!("{service} {address} is {state:?}; {:?}", instance.0)),
            }
        }
        wrong
    }

    /// The instances whose state is not known.
    pub(super) fn open(&self) -> Vec<usize> {
        let tally = self.tally();
        let is_open = |index: &usize| {
            let instance = self.instances[*index].try_lock();
            instance.map_or(true, |instance| instance.allowed(&tally.lost).len() > 1)
        };
        (0..self.instances.len()).filter(is_open).collect()
    }

    /// The last word on the instance was confirmed when no process had any other left: nothing before it can count.
    pub(super) async fn close(&self, index: usize) {
        let mut instance = self.instances[index].lock().await;
        let last = instance.0.pop();
        instance.0.clear();
        instance.0.extend(last);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Priority, promise, directory.
    type Said = (Option<u16>, Promise, usize);

    fn word(at: Instant, millis: u64, (state, promise, directory): Said) -> Word {
        let said = at + Duration::from_millis(millis);
        let state = state.map(|priority| Attributes { priority, weight: 1, port_name: PORT_NAMES[0] });
        Word { state, promise, directory, said, answered: said, apart: Duration::from_millis(800) }
    }

    /// The priorities that are allowed after these words, of which each was said so many milliseconds after the first; the
    /// directory 9 is lost.
    fn allowed(words: &[(u64, Said)]) -> Vec<Option<u16>> {
        let (mut instance, now) = (Instance::default(), Instant::now());
        words.iter().for_each(|&(millis, of)| instance.add(word(now, millis, of)));
        let states = instance.allowed(&HashSet::from([9]));
        states.into_iter().map(|state| state.map(|attributes| attributes.priority)).collect()
    }

    #[test]
    fn acknowledged_word_must_hold_until_the_next_one() {
        use Promise::{Confirmed, Durable, None as Unanswered};
        let put = |priority: u16, promise, directory| (Some(priority), promise, directory);
        assert_eq!(allowed(&[]), [None]);
        assert_eq!(allowed(&[(0, put(1, Confirmed, 1)), (5, put(2, Confirmed, 2))]), [Some(2)]);
        assert_eq!(allowed(&[(0, put(1, Durable, 1)), (5, (None, Confirmed, 1))]), [None]);
        assert_eq!(allowed(&[(0, put(1, Confirmed, 1)), (5, (None, Unanswered, 1))]), [None, Some(1)]);
        // What a lost directory alone had may have been handed over before, or not.
        assert_eq!(allowed(&[(0, put(1, Confirmed, 1)), (5, put(2, Durable, 9))]), [Some(1), Some(2)]);
        assert_eq!(allowed(&[(0, put(1, Durable, 9))]), [None, Some(1)]);
        // Clocks of two processes apart: either order, until they are further apart than the clocks.
        assert_eq!(allowed(&[(0, put(1, Durable, 1)), (700, put(2, Confirmed, 2))]), [Some(1), Some(2)]);
        assert_eq!(allowed(&[(0, put(1, Confirmed, 1)), (700, put(2, Durable, 2))]), [Some(1), Some(2)]);
        assert_eq!(allowed(&[(0, put(1, Durable, 1)), (900, put(2, Confirmed, 2))]), [Some(2)]);
    }
}
