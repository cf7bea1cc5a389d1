//! The pages and their handlers.

use std::{fmt::Write as _, sync::Arc};

use axum::{
    Router,
    extract::{Path, Query, State, rejection::QueryRejection},
    http::{HeaderMap, StatusCode, Uri, header},
    middleware,
    response::{IntoResponse, Response},
    routing::{MethodRouter, get},
};
use serde::Deserialize;

use super::{
    Admin, access,
    host::{self, AllowedHosts},
    json,
    readiness::Readiness,
    status::ProcessStatus,
};
use crate::{
    model::{Namespace, ServiceKey, ServiceName},
    registry::{ListError, Phase, Unavailable},
};

/// One page.
#[derive(Debug, Clone, Copy)]
pub(super) struct Page {
    /// Its route, whose parameters are in braces.
    pub(super) path: &'static str,
    /// What it shows, for the index.
    pub(super) shows: &'static str,
    pub(super) contents: PageContents,
    handler: fn() -> MethodRouter<Admin>,
}

/// What is on a page, which says who may see it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum PageContents {
    /// That the process is well: for everybody.
    Health,
    /// What the process does.
    Operation,
    /// What is registered, in the namespace and the service of the path.
    Instances,
}

/// All pages. The router, the index, and who may see what are made of this.
pub(super) const PAGES: [Page; 10] = [
    Page {
        path: "/",
        shows: "this list",
        contents: PageContents::Operation,
        handler: || get(async || format!("gangplank {}\n\n{}", env!("CARGO_PKG_VERSION"), index())),
    },
    Page {
        path: "/metrics",
        shows: "counters and gauges, OpenMetrics text",
        contents: PageContents::Operation,
        handler: || get(metrics),
    },
    Page {
        path: "/livez",
        shows: "200 while the process runs",
        contents: PageContents::Health,
        handler: || get(async || "alive\n"),
    },
    Page {
        path: "/readyz",
        shows: "200 when DNS can answer, else 503 and why",
        contents: PageContents::Health,
        handler: || get(readyz),
    },
    Page {
        path: "/readyz/registrations",
        shows: "200 when registrations are accepted too",
        contents: PageContents::Health,
        handler: || get(readyz_registrations),
    },
    Page {
        path: "/api/v1/replica",
        shows: "what this process is among the replicas, JSON",
        contents: PageContents::Operation,
        handler: || get(replica),
    },
    Page {
        path: "/api/v1/status",
        shows: "zone, clock, disk, mirror and flags, for gangplank check, JSON",
        contents: PageContents::Operation,
        handler: || get(status),
    },
    Page {
        path: "/api/v1/services",
        shows: "every service with its instances, JSON",
        contents: PageContents::Instances,
        handler: || get(services),
    },
    Page {
        path: "/api/v1/namespaces/{namespace}/services",
        shows: "those of one namespace",
        contents: PageContents::Instances,
        handler: || get(services_of_namespace),
    },
    Page {
        path: "/api/v1/namespaces/{namespace}/services/{name}",
        shows: "one service",
        contents: PageContents::Instances,
        handler: || get(service),
    },
];

/// Whether everybody may see what is at `path`.
pub(super) fn is_open(path: &str) -> bool {
    PAGES.iter().any(|page| page.contents == PageContents::Health && page.path == path)
}

/// The namespace and the service whose instances are at `path`, each `None` for all; `None` if it shows no instances. What
/// is at a path of no page counts as everything.
pub(super) fn instances_at(path: &str) -> Option<(Option<&str>, Option<&str>)> {
    for page in PAGES {
        if let Some([namespace, service]) = parameters(page.path, path) {
            return (page.contents == PageContents::Instances).then_some((namespace, service));
        }
    }
    // Fails closed: what no page is known for needs the right to everything.
    Some((None, None))
}

/// What is in `path` in the place of the parameters of `route`; `None` for another route.
fn parameters<'a>(route: &str, path: &'a str) -> Option<[Option<&'a str>; 2]> {
    let (mut expected, mut segments, mut found) = (route.split('/'), path.split('/'), [None; 2]);
    let mut places = found.iter_mut();
    loop {
        match (expected.next(), segments.next()) {
            (None, None) => return Some(found),
            // Not an empty segment: the router does not match it either, and both must mean the same page.
            (Some(parameter), Some(segment)) if parameter.starts_with('{') && !segment.is_empty() => {
                *places.next()? = Some(segment);
            }
            (Some(one), Some(other)) if one == other => {}
            _ => return None,
        }
    }
}

/// The text of `GET /` and of every unknown path.
pub(super) fn index() -> String {
    let mut index = String::new();
    for Page { path, shows, .. } in PAGES {
        writeln!(index, "GET {path:<51} {shows}").expect("a String takes everything");
    }
    index + "\nBoth readyz pages answer in JSON to ?format=json or `Accept: application/json`.\n"
}

/// The content type of OpenMetrics text (OpenMetrics 1.0 §4.1).
const OPENMETRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

pub(super) fn router(admin: Admin) -> Router {
    let hosts = AllowedHosts::new(&admin.hosts);
    let security = Arc::clone(&admin.security);
    let router = PAGES.iter().fold(Router::new(), |router, page| router.route(page.path, (page.handler)()));
    router
        .fallback(async || (StatusCode::NOT_FOUND, format!("404: no such page. There are:\n\n{}", index())))
        .layer(middleware::from_fn_with_state(security, access::check))
        // The last one is the first that a request passes.
        .layer(middleware::from_fn_with_state(hosts, host::check))
        .with_state(admin)
}

async fn metrics(State(admin): State<Admin>) -> Response {
    let kubernetes = &admin.metrics.kubernetes;
    // Ages grow by themselves, so they are set when somebody looks.
    kubernetes.set_ages(admin.status.staleness(), admin.status.replica().lease_age());
    let mut text = String::new();
    match prometheus_client::encoding::text::encode(&mut text, admin.metrics.all()) {
        Ok(()) => ([(header::CONTENT_TYPE, OPENMETRICS)], text).into_response(),
        Err(err) => {
            (StatusCode::INTERNAL_SERVER_ERROR, format!("the metrics cannot be written: {err}\n")).into_response()
        }
    }
}

async fn readyz(State(admin): State<Admin>, uri: Uri, headers: HeaderMap) -> Response {
    show(&Readiness::of_dns(&admin), &uri, &headers)
}

async fn readyz_registrations(State(admin): State<Admin>, uri: Uri, headers: HeaderMap) -> Response {
    show(&Readiness::of_registrations(&admin), &uri, &headers)
}

/// Renders as text or JSON. Unknown query parameters are ignored: a misspelt parameter must not fail a
/// probe, because a failed probe restarts the process.
fn show(readiness: &Readiness, uri: &Uri, headers: &HeaderMap) -> Response {
    let status = if readiness.is_ready() { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let asked = uri.query().is_some_and(|query| query.split('&').any(|pair| pair == "format=json"));
    let accept = headers.get(header::ACCEPT).and_then(|accept| accept.to_str().ok());
    if asked || accept.is_some_and(|accept| accept.contains("application/json")) {
        return (status, axum::Json(readiness)).into_response();
    }
    (status, readiness.to_text()).into_response()
}

async fn replica(State(admin): State<Admin>) -> Response {
    axum::Json(admin.status.describe(&admin.metrics)).into_response()
}

async fn status(State(admin): State<Admin>) -> Response {
    axum::Json(ProcessStatus::of(&admin)).into_response()
}

/// The list has no parameters. Unknown ones are refused: a client must not take an unfiltered list for a
/// filtered one.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct NoParameters {}

async fn services(State(admin): State<Admin>, query: Result<Query<NoParameters>, QueryRejection>) -> Response {
    match query {
        Ok(Query(NoParameters {})) => list(&admin, None).await,
        Err(err) => json::error(StatusCode::BAD_REQUEST, &err.body_text()),
    }
}

async fn services_of_namespace(State(admin): State<Admin>, Path(namespace): Path<String>) -> Response {
    match Namespace::parse(&namespace) {
        Ok(_) => list(&admin, Some(&namespace)).await,
        Err(err) => json::error(StatusCode::BAD_REQUEST, &format!("namespace: {err}")),
    }
}

/// 503 during the recovery: a part of the services would look like all of them.
fn recovering(admin: &Admin) -> Option<Response> {
    // Only then: afterwards the stored services are complete, also while Kubernetes is compared with them.
    let recovering = admin.status.phase() == Phase::Recovering;
    recovering.then(|| json::error(StatusCode::SERVICE_UNAVAILABLE, &Unavailable::NotReady.to_string()))
}

async fn list(admin: &Admin, namespace: Option<&str>) -> Response {
    if let Some(response) = recovering(admin) {
        return response;
    }
    match admin.snapshots.list().await {
        Ok(list) => {
            let range = namespace.map_or_else(|| 0..list.services().len(), |namespace| list.namespace(namespace));
            json::services(list, range)
        }
        Err(err) => {
            let status = match err {
                ListError::Overloaded | ListError::Lagged(_) => StatusCode::SERVICE_UNAVAILABLE,
                ListError::Failed(_) => StatusCode::INTERNAL_SERVER_ERROR,
            };
            json::error(status, &err.to_string())
        }
    }
}

async fn service(State(admin): State<Admin>, Path((namespace, name)): Path<(String, String)>) -> Response {
    let key = match (Namespace::parse(&namespace), ServiceName::parse(&name)) {
        (Ok(namespace), Ok(name)) => ServiceKey::new(namespace, name),
        (Err(err), _) => return json::error(StatusCode::BAD_REQUEST, &format!("namespace: {err}")),
        (_, Err(err)) => return json::error(StatusCode::BAD_REQUEST, &format!("service_name: {err}")),
    };
    if let Some(response) = recovering(&admin) {
        return response;
    }
    match admin.snapshots.service(&key).await {
        Ok(snapshot) if snapshot.services().is_empty() => {
            json::error(StatusCode::NOT_FOUND, &format!("there is no service {key}"))
        }
        Ok(snapshot) => json::service(snapshot),
        Err(err) => json::error(StatusCode::SERVICE_UNAVAILABLE, &err.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_path_but_those_of_other_pages_shows_instances() {
        let all = Some((None, None));
        assert_eq!(instances_at("/api/v1/services"), all);
        assert_eq!(instances_at("/api/v1/namespaces/shop/services"), Some((Some("shop"), None)));
        assert_eq!(instances_at("/api/v1/namespaces/shop/services/web"), Some((Some("shop"), Some("web"))));
        assert_eq!(
            instances_at("/api/v1/namespaces/%73hop/services"),
            Some((Some("%73hop"), None)),
            "as it is written"
        );
        for page in PAGES.iter().filter(|page| page.contents != PageContents::Instances) {
            assert_eq!(instances_at(page.path), None, "{}", page.path);
        }
        for odd in ["", "*", "/api/v1/namespaces//services", "/api/v1/services/", "//metrics", "/metrics/", "/api/v2"] {
            assert_eq!(instances_at(odd), all, "{odd}");
        }
    }
}
