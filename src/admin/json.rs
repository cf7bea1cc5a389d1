//! JSON responses of any length, rendered page by page as the peer reads them.
//!
//! A list of a million services takes hundreds of megabytes of JSON. At most one page of it exists at
//! once, and rendering stops when the peer disconnects.

use std::{
    convert::Infallible,
    io::{self, Write as _},
    ops::{Deref, Range},
};

use axum::{
    body::{Body, Bytes},
    http::{StatusCode, header},
    response::{IntoResponse, Response},
};
use futures::stream;
use serde::Serialize;

use crate::{
    model::view::{InstanceView, ServiceHead, TrafficShares},
    registry::Snapshot,
};

/// Bytes of one page. The instance that reaches this size is the last of its page.
const PAGE_BYTES: usize = 64 * 1024;

/// Responds with `{"services": […]}`, 200: the services of `range`.
pub(super) fn services<S>(snapshot: S, range: Range<usize>) -> Response
where
    S: Deref<Target = Snapshot> + Send + 'static,
{
    respond(Pages::new(snapshot, range, "{\"services\":[", "]}\n"))
}

/// Responds with the one service of `snapshot`, 200.
pub(super) fn service(snapshot: Snapshot) -> Response {
    respond(Pages::new(Box::new(snapshot), 0..1, "", "\n"))
}

/// Responds with `{"error": "…"}`.
pub(super) fn error(status: StatusCode, err: &str) -> Response {
    (status, axum::Json(serde_json::json!({ "error": err }))).into_response()
}

fn respond<S: Deref<Target = Snapshot> + Send + 'static>(pages: Pages<S>) -> Response {
    let pages = stream::unfold(pages, async |mut pages| {
        // A page takes some 100 µs to render, and a fast reader makes its task always ready: without the
        // budget the task would not yield to other connections.
        tokio::task::consume_budget().await;
        let page = pages.next_page()?;
        Some((Ok::<_, Infallible>(page), pages))
    });
    ([(header::CONTENT_TYPE, "application/json")], Body::from_stream(pages)).into_response()
}

/// Renders services, page by page.
struct Pages<S> {
    snapshot: S,
    remaining: Range<usize>,
    /// The rank of the next instance of the first remaining service, if a part of it is rendered.
    partly_rendered: Option<(usize, TrafficShares)>,
    /// The text before the next service.
    separator: &'static str,
    /// The text after the last service; `None` when the response is complete.
    end: Option<&'static str>,
}

impl<S: Deref<Target = Snapshot>> Pages<S> {
    fn new(snapshot: S, range: Range<usize>, start: &'static str, end: &'static str) -> Self {
        Self { snapshot, remaining: range, partly_rendered: None, separator: start, end: Some(end) }
    }

    fn next_page(&mut self) -> Option<Bytes> {
        self.end?;
        // With room for the instance that goes beyond the page, so that the buffer does not double for it.
        let mut page = Vec::with_capacity(PAGE_BYTES + PAGE_BYTES / 8);
        self.render(&mut page).expect("a Vec takes everything, and these values are JSON");
        Some(page.into())
    }

    fn render(&mut self, page: &mut Vec<u8>) -> io::Result<()> {
        while page.len() < PAGE_BYTES {
            let services = self.snapshot.services();
            let Some((key, service)) = services.get(self.remaining.clone()).and_then(|rest| rest.first()) else {
                // Without a service, the start of the list has not been written yet.
                if self.separator != "," {
                    page.write_all(self.separator.as_bytes())?;
                }
                page.write_all(self.end.take().unwrap_or_default().as_bytes())?;
                break;
            };
            let (rank, shares) = match self.partly_rendered.take() {
                Some(partly) => partly,
                None => {
                    page.write_all(std::mem::replace(&mut self.separator, ",").as_bytes())?;
                    write_json(page, &ServiceHead { key, service })?;
                    // The object stays open for its instances.
                    page.pop();
                    page.write_all(b",\"instances\":[")?;
                    // Once for each service and not for each page: it walks all instances.
                    (0, TrafficShares::of(service))
                }
            };
            let mut next = rank;
            for instance in service.instances.iter_from(rank) {
                if page.len() >= PAGE_BYTES {
                    break;
                }
                if next > 0 {
                    page.push(b',');
                }
                write_json(page, &InstanceView { instance, share: Some(shares.share(instance)) })?;
                next += 1;
            }
            if next < service.instances.len() {
                self.partly_rendered = Some((next, shares));
            } else {
                page.write_all(b"]}")?;
                self.remaining.start += 1;
            }
        }
        Ok(())
    }
}

fn write_json(page: &mut Vec<u8>, value: &impl Serialize) -> io::Result<()> {
    serde_json::to_writer(page, value).map_err(io::Error::from)
}
