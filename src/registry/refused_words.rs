//! Registrations that were too old to count, until somebody is told: whoever made them was answered 202.

use std::{
    mem,
    sync::{Mutex, PoisonError},
};

use tokio::sync::Notify;

use crate::model::{InstanceId, ServiceKey};

/// Words that are kept until they are taken; further ones are in the log and the metric only.
const MAX_WORDS: usize = 4096;

/// Refused words that nobody has taken yet.
#[derive(Debug, Default)]
pub struct RefusedWords {
    words: Mutex<Vec<(ServiceKey, InstanceId)>>,
    added: Notify,
}

impl RefusedWords {
    pub(super) fn add(&self, refused: impl IntoIterator<Item = (ServiceKey, InstanceId)>) {
        let mut words = self.words.lock().unwrap_or_else(PoisonError::into_inner);
        let room = MAX_WORDS - words.len();
        words.extend(refused.into_iter().take(room));
        drop(words);
        self.added.notify_one();
    }

    /// Takes all of them; waits until there is one. Cancelling loses nothing.
    pub async fn take(&self) -> Vec<(ServiceKey, InstanceId)> {
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
        let word = (key("web.prod"), instance(&spec("10.0.0.1", &["http:80"])).id());
        refused.add(vec![word.clone(); MAX_WORDS - 1]);
        refused.add(vec![word; 2]);
        assert_eq!(refused.take().now_or_never().map(|words| words.len()), Some(MAX_WORDS));
        assert_eq!(refused.take().now_or_never(), None);
    }
}
