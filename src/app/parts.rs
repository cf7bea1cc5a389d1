//! The tasks that make up the server, by name.

use std::{pin::pin, time::Duration};

use anyhow::anyhow;
use tokio::{
    task::{JoinError, JoinSet},
    time::sleep,
};
use tracing::error;

/// The running parts. None of them ends before it is told to, unless it failed; then the others must
/// not go on as if the server were whole.
#[derive(Debug, Default)]
pub(super) struct Parts(JoinSet<(&'static str, anyhow::Result<()>)>);

impl Parts {
    pub(super) fn spawn<E: Into<anyhow::Error>>(
        &mut self,
        name: &'static str,
        part: impl Future<Output = Result<(), E>> + Send + 'static,
    ) {
        self.0.spawn(async move { (name, part.await.map_err(Into::into)) });
    }

    /// Waits for the first part that ends, and returns why.
    pub(super) async fn first_end(&mut self) -> anyhow::Error {
        match self.0.join_next().await {
            Some(Ok((name, Ok(())))) => anyhow!("{name} ended without being told to"),
            Some(ended) => failure(ended).expect("the other case of success is above"),
            None => anyhow!("nothing was started"),
        }
    }

    /// Lets the parts go on for `time`, in which some of them end, and returns the first failure.
    pub(super) async fn drain(&mut self, time: Duration) -> Option<anyhow::Error> {
        let mut first = None;
        let mut time = pin!(sleep(time));
        loop {
            tokio::select! {
                () = &mut time => return first,
                Some(ended) = self.0.join_next() => note(&mut first, failure(ended)),
            }
        }
    }

    /// Waits for all that are left, now that they are to stop. The first failure goes into `first`, unless there is one: it
    /// stays known when the caller waits no longer.
    pub(super) async fn end(&mut self, first: &mut Option<anyhow::Error>) {
        while let Some(ended) = self.0.join_next().await {
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

fn failure(ended: Result<(&'static str, anyhow::Result<()>), JoinError>) -> Option<anyhow::Error> {
    match ended {
        Ok((_, Ok(()))) => None,
        Ok((name, Err(err))) => Some(err.context(format!("{name} failed"))),
        Err(err) => Some(anyhow!(err).context("a part of the server panicked")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn failure_in_the_drain_is_returned_and_the_others_go_on() {
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
        let failed = failed.expect("the failure of the first");
        assert_eq!(format!("{failed:#}"), "the first failed: no more disk");
    }
}
