//! What goes wrong, with which requests, how often.

use std::{
    fmt,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
    },
};

use tokio::sync::watch;

use super::Call;
use crate::support::wait_until;

/// What happens to a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// It is answered here, with a Kubernetes Status of this code, and does not reach the API server.
    Answer {
        /// The status code, such as 409, 410, 429, 500, 503.
        code: u16,
        /// The header of that name, in seconds.
        retry_after: Option<u32>,
    },
    /// A watch is answered here: 200, one event ERROR with a Status of this code, the end.
    ErrorEvent(u16),
    /// It is taken and never answered, and does not reach the API server. Lifting closes the connection.
    Hang,
    /// It is carried out and never answered. Lifting closes the connection.
    HangAfter,
    /// The connection closes, and the API server hears nothing of it.
    Drop,
    /// It is carried out; then the connection closes without an answer.
    DropAfter,
    /// What of its answer has not come yet does not come, and the connection stays open: a watch that
    /// died in silence. Watches that run already stall too; after lifting, what was held back follows.
    Stall,
}

impl Fault {
    /// [`Fault::Answer`] with this code.
    pub(crate) fn answer(code: u16) -> Self {
        Self::Answer { code, retry_after: None }
    }

    /// Adds the header Retry-After to an answer.
    pub(crate) fn retry_after(self, seconds: u32) -> Self {
        match self {
            Self::Answer { code, .. } => Self::Answer { code, retry_after: Some(seconds) },
            other => panic!("only an answer can carry Retry-After, not {other:?}"),
        }
    }
}

type Matches = Box<dyn Fn(&Call) -> bool + Send + Sync>;

/// A rule that is in force until [`Injected::lift`], whether or not this is kept.
#[derive(Clone)]
pub(crate) struct Injected {
    rule: Arc<Rule>,
    changed: watch::Sender<()>,
}

struct Rule {
    fault: Fault,
    matches: Matches,
    most: usize,
    hits: AtomicUsize,
    lifted: AtomicBool,
}

impl Injected {
    /// Ends it: requests pass, what hangs is dropped, what stalls flows again.
    pub(crate) fn lift(&self) {
        self.rule.lifted.store(true, SeqCst);
        self.changed.send_replace(());
    }

    /// How many requests it has hit.
    pub(crate) fn hits(&self) -> usize {
        self.rule.hits.load(SeqCst)
    }

    /// Waits until it has hit so many.
    pub(crate) fn wait_hits(&self, times: usize) {
        wait_until(&format!("{times} requests are hit by {:?}", self.rule.fault), || {
            (self.hits() >= times).then_some(())
        });
    }

    pub(super) fn fault(&self) -> Fault {
        self.rule.fault
    }

    /// Waits for [`Injected::lift`].
    pub(super) async fn lifted(&self) {
        // It fails only without a sender, and there is one here.
        let _ = self.changed.subscribe().wait_for(|()| self.rule.lifted.load(SeqCst)).await;
    }
}

impl fmt::Debug for Injected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}, {} hits", self.rule.fault, self.hits())
    }
}

impl Rule {
    /// Counts a hit, unless it has had all of them.
    fn hit(&self) -> bool {
        self.hits.fetch_update(SeqCst, SeqCst, |hits| (hits < self.most).then_some(hits + 1)).is_ok()
    }
}

/// All rules, oldest first.
#[derive(Default)]
pub(super) struct Rules {
    rules: Mutex<Vec<Arc<Rule>>>,
    changed: watch::Sender<()>,
}

impl Rules {
    fn lock(&self) -> MutexGuard<'_, Vec<Arc<Rule>>> {
        self.rules.lock().expect("a test's matcher does not panic")
    }

    pub(super) fn add(&self, fault: Fault, most: usize, matches: Matches) -> Injected {
        let rule = Rule { fault, matches, most, hits: 0.into(), lifted: false.into() };
        let rule = Arc::new(rule);
        self.lock().push(Arc::clone(&rule));
        Injected { rule, changed: self.changed.clone() }
    }

    /// The rule that holds for a request that has just come, if any; counts it.
    pub(super) fn strike(&self, call: &Call) -> Option<Injected> {
        let rule = self.find(call, |rule| rule.fault != Fault::Stall && rule.hit())?;
        Some(Injected { rule, changed: self.changed.clone() })
    }

    /// Waits as long as a rule stalls the answer to this request.
    pub(super) async fn flows(&self, call: &Call) {
        while let Some(rule) = self.find(call, |rule| rule.fault == Fault::Stall && rule.hit()) {
            Injected { rule, changed: self.changed.clone() }.lifted().await;
        }
    }

    fn find(&self, call: &Call, holds: impl Fn(&Rule) -> bool) -> Option<Arc<Rule>> {
        let mut rules = self.lock();
        rules.retain(|rule| !rule.lifted.load(SeqCst));
        rules.iter().find(|rule| (rule.matches)(call) && holds(rule)).cloned()
    }
}
