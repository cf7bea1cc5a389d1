//! Words that were accepted and cannot count, until somebody is told: whoever said them was answered 202.

use std::{
    fmt, mem,
    sync::{Mutex, PoisonError},
};

use tokio::sync::Notify;

use super::KubernetesRefusal;
use crate::model::{InstanceId, ServiceKey};

/// Words that are kept until they are taken; further ones are in the log and the metric only.
const MAX_WORDS: usize = 4096;

/// A word that was accepted and does not count. Nobody repeats it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RefusedWord {
    /// The service of the instance.
    pub service: ServiceKey,
    /// Which instance; of a removal perhaps every one at the address.
    pub id: InstanceId,
    /// Why it does not count.
    pub reason: WordRefusal,
}

/// Why a word does not count.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum WordRefusal {
    /// A registration whose removal may be forgotten.
    TooOld,
    /// The cluster, as it is now, forbids it.
    Forbidden(KubernetesRefusal),
    /// The limit of registered instances is reached.
    Full,
    /// Its stamp is ahead of the clock of this machine.
    ClockAhead,
}

impl fmt::Display for WordRefusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::TooOld => "too old to count",
            Self::Forbidden(KubernetesRefusal::Reserved) => "in a namespace, or of a name, that is Kubernetes' own",
            Self::Forbidden(KubernetesRefusal::NamespaceAbsent) => "in a namespace that does not exist",
            Self::Forbidden(KubernetesRefusal::ForeignService) => "of a Service that gangplank does not manage",
            Self::Full => "beyond the limit of registered instances",
            Self::ClockAhead => "made by a clock that was ahead",
        })
    }
}

/// Refused words that nobody has taken yet.
#[derive(Debug, Default)]
pub struct RefusedWords {
    words: Mutex<Vec<RefusedWord>>,
    added: Notify,
}

impl RefusedWords {
    pub(super) fn add(&self, refused: impl IntoIterator<Item = RefusedWord>) {
        let mut words = self.words.lock().unwrap_or_else(PoisonError::into_inner);
        // Bounded, because nobody takes them while the API server is away. Cannot underflow: only this function adds.
        let room = MAX_WORDS - words.len();
        words.extend(refused.into_iter().take(room));
        drop(words);
        self.added.notify_one();
    }

    /// Takes all of them; waits until there is one. Cancelling loses nothing.
    pub async fn take(&self) -> Vec<RefusedWord> {
        loop {
            let words = mem::take(&mut *self.words.lock().unwrap_or_else(PoisonError::into_inner));
            if !words.is_empty() {
                return words;
            }
            self.added.notified().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt as _;

    use super::*;
    use crate::model::testing::{instance, key, spec};

    #[test]
    fn refused_words_are_kept_up_to_a_limit_and_taken_once() {
        let refused = RefusedWords::default();
        let (service, id) = (key("web.prod"), instance(&spec("10.0.0.1", &["http:80"])).id());
        let word = RefusedWord { service, id, reason: WordRefusal::TooOld };
        refused.add(vec![word.clone(); MAX_WORDS - 1]);
        refused.add(vec![word; 2]);
        assert_eq!(refused.take().now_or_never().map(|words| words.len()), Some(MAX_WORDS));
        assert_eq!(refused.take().now_or_never(), None);
    }
}
