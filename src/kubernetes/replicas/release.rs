//! Giving the Lease up, although answers of the API server get lost.

use std::time::Duration;

use tokio::time::{Instant, sleep, timeout, timeout_at};

use super::lease::{LeaseClient, LeaseRead};
use crate::replicas::lease::{LeaseRecord, LeaseWrite, ResourceVersion};

/// How long one request may take: the others get their time too.
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(1);

/// How long to wait after a failure. A lost answer must not cost another process more.
const RETRY_INTERVAL: Duration = Duration::from_millis(100);

/// What became of the Lease.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Released {
    /// Nobody holds it.
    Yes,
    /// It was this process's no more.
    Lost,
    /// The API server did not say until the deadline.
    Unknown,
}

/// Writes `record`, a released Lease, over version `expected`, until the API server has it.
pub(super) async fn release(
    client: &LeaseClient,
    mut expected: Option<ResourceVersion>,
    record: &LeaseRecord,
    deadline: Instant,
) -> Released {
    let attempts = async {
        loop {
            let write = timeout(ATTEMPT_TIMEOUT, client.write(expected, record)).await;
            match write.map_or(LeaseWrite::Unknown, |(written, _)| written) {
                LeaseWrite::Written(_) => return Released::Yes,
                // A renewal, or an earlier attempt, was carried out and its answer is lost; or somebody has edited the Lease.
                LeaseWrite::Conflict => {
                    if let Ok(Ok(LeaseRead { observed, .. })) = timeout(ATTEMPT_TIMEOUT, client.read()).await {
                        // Another term: somebody else has taken it.
                        let Some(lease) = observed.filter(|lease| lease.record.term == record.term) else {
                            return Released::Lost;
                        };
                        if lease.record.released {
                            return Released::Yes;
                        }
                        if lease.record.holder != record.holder {
                            return Released::Lost;
                        }
                        // A newer version than the one that was tried: again at once, because somebody waits for the
                        // Lease.
                        if expected.replace(lease.version) != Some(lease.version) {
                            continue;
                        }
                    }
                }
                LeaseWrite::Unknown => {}
            }
            sleep(RETRY_INTERVAL).await;
        }
    };
    timeout_at(deadline, attempts).await.unwrap_or(Released::Unknown)
}

#[cfg(test)]
mod tests {
    use std::{
        collections::VecDeque,
        sync::{Arc, Mutex},
    };

    use http::{Request, Response};
    use kube::{Client, client::Body};
    use serde_json::{Value, json};

    use super::*;
    use crate::replicas::lease::DirectoryId;

    const ME: DirectoryId = DirectoryId(42);
    const MINE: &str = "host_0000000000000000000000000000002a";

    fn lease(version: u64, term: u64, holder: &str) -> Value {
        json!({
            "apiVersion": "coordination.k8s.io/v1", "kind": "Lease",
            "metadata": {
                "name": "gangplank-writer", "namespace": "gangplank", "resourceVersion": version.to_string(),
                "annotations": { "gangplank.dev/term": term.to_string(), "gangplank.dev/generation": "9" },
            },
            "spec": { "holderIdentity": holder },
        })
    }

    fn failure(code: u16) -> (u16, Value) {
        (
            code,
            json!({ "kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code, "reason": "", "message": "" }),
        )
    }

    /// Releases the Lease of term 7 and version 5 at an API server that gives these answers. Returns the requests, with the
    /// version that each write expected.
    async fn release_at(answers: Vec<(u16, Value)>) -> (Released, Vec<String>) {
        let (answers, calls) = (Arc::new(Mutex::new(VecDeque::from(answers))), Arc::new(Mutex::new(Vec::new())));
        let seen = Arc::clone(&calls);
        let service = tower::service_fn(move |request: Request<Body>| {
            let (answers, seen) = (Arc::clone(&answers), Arc::clone(&seen));
            async move {
                let method = request.method().clone();
                let body = request.into_body().collect_bytes().await?;
                let sent: Value = serde_json::from_slice(&body).unwrap_or_default();
                let version = sent["metadata"]["resourceVersion"].as_str().unwrap_or_default();
                seen.lock().expect("no panic").push(format!("{method} {version}").trim().to_owned());
                let (status, answer) = answers.lock().expect("no panic").pop_front().expect("no more requests");
                let body = Body::from(serde_json::to_vec(&answer).expect("JSON"));
                Ok::<_, kube::Error>(Response::builder().status(status).body(body).expect("a response"))
            }
        });
        let client =
            LeaseClient::new(Client::new(service, "gangplank"), "gangplank".into(), ME, "host".into(), Vec::new());
        let record = LeaseRecord { term: 7, holder: ME, generation: 9, released: true };
        let deadline = Instant::now() + Duration::from_secs(60);
        let released = release(&client, Some(ResourceVersion(5)), &record, deadline).await;
        (released, calls.lock().expect("no panic").clone())
    }

    #[tokio::test]
    async fn lease_is_released_although_answers_get_lost() {
        let refused = vec![failure(429), failure(503), (200, lease(6, 7, ""))];
        assert_eq!(release_at(refused).await, (Released::Yes, ["PUT 5"; 3].map(String::from).into()));
        // A renewal was carried out.
        let renewed = vec![failure(409), (200, lease(6, 7, MINE)), (200, lease(7, 7, ""))];
        assert_eq!(release_at(renewed).await, (Released::Yes, ["PUT 5", "GET", "PUT 6"].map(String::from).into()));
        // The first attempt was.
        let done = vec![failure(500), failure(409), (200, lease(6, 7, ""))];
        assert_eq!(release_at(done).await, (Released::Yes, ["PUT 5", "PUT 5", "GET"].map(String::from).into()));
    }

    #[tokio::test]
    async fn lease_of_another_process_is_left_alone() {
        for taken in [lease(6, 8, "other_00000000000000000000000000000001"), lease(6, 7, "by hand"), lease(6, 8, MINE)]
        {
            let answers = vec![failure(409), (200, taken)];
            assert_eq!(release_at(answers).await, (Released::Lost, ["PUT 5", "GET"].map(String::from).into()));
        }
        let gone = vec![failure(404), failure(404)];
        assert_eq!(release_at(gone).await.0, Released::Lost);
    }
}
