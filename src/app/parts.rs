//! The tasks that make up the server, by name.

use std::{collections::HashMap, pin::pin, time::Duration};

use anyhow::anyhow;
use tokio::{
    task::{Id, JoinError, JoinSet},
    time::sleep,
};
use tracing::error;

/// The running parts. A part ends before the stop only if it fails; then all others are stopped too.
#[derive(Debug, Default)]
pub(super) struct Parts {
    tasks: JoinSet<anyhow::Result<()>>,
    names: HashMap<Id, &'static str>,
}

/// A part that has ended, by name, and how.
type Ended = (&'static str, Result<anyhow::Result<()>, JoinError>);

impl Parts {
    pub(super) fn spawn<E: Into<anyhow::Error>>(
        &mut self,
        name: &'static str,
        part: impl Future<Output = Result<(), E>> + Send + 'static,
    ) {
        let task = self.tasks.spawn(async move { part.await.map_err(Into::into) });
        self.names.insert(task.id(), name);
    }

    /// The parts that have not ended, sorted.
    pub(super) fn running(&self) -> Vec<&'static str> {
        let mut names: Vec<_> = self.names.values().copied().collect();
        names.sort_unstable();
        names
    }

    /// The next part that ends. Cancelling loses nothing.
    async fn join_next(&mut self) -> Option<Ended> {
        let (id, ended) = match self.tasks.join_next_with_id().await? {
            Ok((id, ended)) => (id, Ok(ended)),
            Err(err) => (err.id(), Err(err)),
        };
        let name = self.names.remove(&id).expect("every part has a name");
        Some((name, ended))
    }

    /// Waits for the first part that ends, and returns its failure.
    pub(super) async fn first_end(&mut self) -> anyhow::Error {
        match self.join_next().await {
            // No part ends by itself. One that does without an error has a fault that it does not know of.
            Some((name, Ok(Ok(())))) => anyhow!("{name} ended before the stop"),
            Some(ended) => failure(ended).expect("the other case of success is above"),
            None => anyhow!("nothing was started"),
        }
    }

    /// Waits for `time`, in which some parts end. Returns the first failure.
    pub(super) async fn drain(&mut self, time: Duration) -> Option<anyhow::Error> {
        let mut first = None;
        let mut time = pin!(sleep(time));
        loop {
            tokio::select! {
                () = &mut time => return first,
                Some(ended) = self.join_next() => note(&mut first, failure(ended)),
            }
        }
    }

    /// Waits for the end of all remaining parts, after their stop. The first failure is stored in `first`,
    /// unless that has one already. It is not returned, because the caller may cancel the wait.
    pub(super) async fn end(&mut self, first: &mut Option<anyhow::Error>) {
        while let Some(ended) = self.join_next().await {
            note(first, failure(ended));
        }
    }
}

/// Keeps the first failure for the exit; all are logged.
fn note(first: &mut Option<anyhow::Error>, failure: Option<anyhow::Error>) {
    let Some(err) = failure else { return };
    error!("while stopping: {err:#}");
    first.get_or_insert(err);
}

fn failure((name, ended): Ended) -> Option<anyhow::Error> {
    match ended {
        Ok(ended) => ended.err().map(|err| err.context(format!("{name} failed"))),
        Err(err) => Some(anyhow!(err).context(format!("{name} panicked"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn failure_in_the_drain_is_returned_and_the_others_continue() {
        let mut parts = Parts::default();
        let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
        parts.spawn("the first", async { Err(anyhow!("no more disk")) });
        parts.spawn("the second", async { Ok::<_, anyhow::Error>(()) });
        parts.spawn("the third", async move { stopped.await.map_err(anyhow::Error::from) });
        let failed = parts.drain(Duration::from_millis(50)).await.expect("the failure of the first");
        assert_eq!(format!("{failed:#}"), "the first failed: no more disk");
        stop.send(()).expect("the third still runs");
        let mut last = None;
        parts.end(&mut last).await;
        assert!(last.is_none());
    }

    #[tokio::test]
    async fn failure_after_the_drain_is_known_though_another_part_hangs() {
        let mut parts = Parts::default();
        parts.spawn("the first", async { Err(anyhow!("no more disk")) });
        parts.spawn("the second", std::future::pending::<anyhow::Result<()>>());
        let mut failed = None;
        let ended = tokio::time::timeout(Duration::from_millis(50), parts.end(&mut failed)).await;
        assert!(ended.is_err(), "the second hangs");
        assert_eq!(parts.running(), ["the second"]);
        let failed = failed.expect("the failure of the first");
        assert_eq!(format!("{failed:#}"), "the first failed: no more disk");
    }
}
