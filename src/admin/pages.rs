//! The pages and their handlers.

use axum::{
    Router,
    extract::{Path, Query, State, rejection::QueryRejection},
    http::{HeaderMap, StatusCode, Uri, header},
    middleware,
    response::{IntoResponse, Response},
    routing::get,
};
use serde::Deserialize;

use super::{
    Admin,
    host::{self, AllowedHosts},
    json,
    readiness::Readiness,
};
use crate::{
    model::{Namespace, ServiceKey, ServiceName},
    registry::{ListError, Phase, Unavailable},
};

/// The text of `GET /` and of every unknown path. A test requests each page that it names.
pub(super) const INDEX: &str = "\
GET /metrics                                        counters and gauges, OpenMetrics text
GET /livez                                          200 while the process runs
GET /readyz                                         200 when DNS can answer, else 503 and why
GET /readyz/registrations                           200 when registrations are accepted too
GET /api/v1/replica                                 what this process is among the replicas, JSON
GET /api/v1/services                                every service with its instances, JSON
GET /api/v1/namespaces/{namespace}/services         those of one namespace
GET /api/v1/namespaces/{namespace}/services/{name}  one service

Both readyz pages answer in JSON to ?format=json or `Accept: application/json`.
";

/// The content type of OpenMetrics text (OpenMetrics 1.0 §4.1).
const OPENMETRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

pub(super) fn router(admin: Admin) -> Router {
    let hosts = AllowedHosts::new(&admin.hosts);
    Router::new()
        .route("/", get(async || format!("gangplank {}\n\n{INDEX}", env!("CARGO_PKG_VERSION"))))
        .route("/metrics", get(metrics))
        .route("/livez", get(async || "alive\n"))
        .route("/readyz", get(readyz))
        .route("/readyz/registrations", get(readyz_registrations))
        .route("/api/v1/replica", get(replica))
        .route("/api/v1/services", get(services))
        .route("/api/v1/namespaces/{namespace}/services", get(services_of_namespace))
        .route("/api/v1/namespaces/{namespace}/services/{name}", get(service))
        .fallback(async || (StatusCode::NOT_FOUND, format!("404: no such page. There are:\n\n{INDEX}")))
        .layer(middleware::from_fn_with_state(hosts, host::check))
        .with_state(admin)
}

async fn metrics(State(admin): State<Admin>) -> Response {
    let kubernetes = &admin.metrics.kubernetes;
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
