//! `Retry-After` of every answer, whoever made the request.
//!
//! kube reads how long to wait from the Status in the body and drops the header. API priority and
//! fairness, and any proxy in front of an API server, set only the header. So a layer below kube
//! copies the header into the Status, where requests, lists and watches look for it.

use http::{
    HeaderMap, Response,
    header::{CONTENT_LENGTH, RETRY_AFTER},
};
use kube::{
    Client,
    client::Body,
    core::{Status, response::StatusDetails},
};

/// `client`, with the header of failed answers copied into `details.retryAfterSeconds`.
pub(super) fn honoured_by(client: Client) -> Client {
    let namespace = client.default_namespace().to_owned();
    let service = tower::service_fn(move |request| {
        let client = client.clone();
        async move { copied_into_status(client.send(request).await?).await }
    });
    Client::new(service, namespace)
}

async fn copied_into_status(response: Response<Body>) -> kube::Result<Response<Body>> {
    let Some(seconds) = seconds(response.headers()).filter(|_| !response.status().is_success()) else {
        return Ok(response);
    };
    let (mut head, body) = response.into_parts();
    let body = body.collect_bytes().await?;
    let mut status: Status = serde_json::from_slice(&body)
        .unwrap_or_else(|_| Status { message: String::from_utf8_lossy(&body).trim().to_owned(), ..Status::default() });
    status.code = head.status.as_u16();
    status.details.get_or_insert_with(no_details).retry_after_seconds = seconds;
    // The body is another one now.
    head.headers.remove(CONTENT_LENGTH);
    Ok(Response::from_parts(head, Body::from(serde_json::to_vec(&status).map_err(kube::Error::SerdeError)?)))
}

fn no_details() -> StatusDetails {
    StatusDetails {
        name: String::new(),
        group: String::new(),
        kind: String::new(),
        uid: String::new(),
        causes: Vec::new(),
        retry_after_seconds: 0,
    }
}

/// RFC 9110 §10.2.3 also allows a date, which API servers do not send.
fn seconds(headers: &HeaderMap) -> Option<u32> {
    headers.get(RETRY_AFTER)?.to_str().ok()?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn status_of(code: u16, header: Option<&str>, body: &str) -> (u32, String) {
        let mut response = Response::builder().status(code);
        if let Some(header) = header {
            response = response.header(RETRY_AFTER, header);
        }
        let response = response.body(Body::from(body.as_bytes().to_vec())).expect("valid");
        let answer = copied_into_status(response).await.expect("the body is there");
        assert_eq!(answer.status().as_u16(), code);
        let body = answer.into_body().collect_bytes().await.expect("the body is there");
        let seconds = serde_json::from_slice::<Status>(&body)
            .map_or(0, |status| status.details.map_or(0, |details| details.retry_after_seconds));
        (seconds, String::from_utf8_lossy(&body).into_owned())
    }

    #[tokio::test]
    async fn header_is_copied_into_the_status() {
        assert_eq!(status_of(429, Some("7"), r#"{"message":"too many"}"#).await.0, 7);
        let (seconds, body) = status_of(503, Some(" 3 "), "upstream is away\n").await;
        assert_eq!(seconds, 3);
        assert!(body.contains("\"upstream is away\"") && body.contains("503"), "{body}");
        let both = r#"{"message":"m","details":{"retryAfterSeconds":1}}"#;
        assert_eq!(status_of(429, Some("9"), both).await.0, 9, "the header is the nearer one");
    }

    #[tokio::test]
    async fn answers_without_a_usable_header_pass_unchanged() {
        for (code, header, body) in [
            (429, None, "plain"),
            (429, Some("Fri, 31 Dec 1999 23:59:59 GMT"), "plain"),
            (429, Some("-1"), "plain"),
            (200, Some("7"), "an object"),
        ] {
            assert_eq!(status_of(code, header, body).await, (0, body.to_owned()), "{code} {header:?}");
        }
    }
}
