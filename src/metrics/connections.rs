//! Metrics of the TCP connections of every listener.

use std::sync::atomic::AtomicU64;

use prometheus_client::{
    metrics::{counter::Counter, gauge::Gauge},
    registry::Registry,
};

use super::labels::{EnumCounter, EnumGauge, label_enum};

label_enum! {
    /// What a listener serves.
    pub enum ListenerKind {
        /// Registrants and readers.
        Grpc => "grpc",
        /// DNS over TCP.
        Dns => "dns",
        /// The operator's HTTP.
        Admin => "admin",
    }
}

label_enum! {
    /// Why the server refused or ended a connection.
    pub enum CloseReason {
        /// The limit is reached, and no connection can be evicted.
        Full => "full",
        /// The limit of the peer is reached.
        PeerFull => "peer_full",
        /// Closed for a new connection, or for memory.
        Evicted => "evicted",
        /// No request for too long.
        Idle => "idle",
        /// The maximum age is reached.
        MaxAge => "max_age",
        /// A request took too long to arrive.
        SlowRequest => "slow_request",
        /// The peer took too long to read its answers.
        SlowReader => "slow_reader",
        /// The octets are not a request, or break a rule of the protocol; or it reset too many calls.
        Malformed => "malformed",
    }
}

label_enum! {
    /// Why a TLS handshake failed.
    pub enum HandshakeFailure {
        /// Not complete within the deadline.
        Timeout => "timeout",
        /// Given up for another, as the oldest of too many.
        Evicted => "evicted",
        /// The client sent more than a handshake takes.
        TooLarge => "too_large",
        /// The client's certificate is expired, not valid yet, or of another CA.
        BadCertificate => "bad_certificate",
        /// The octets are not TLS.
        NotTls => "not_tls",
        /// No common version or cipher, or another fault of the protocol.
        Protocol => "protocol",
        /// The client refused, for example because it does not know the CA of the server.
        RefusedByPeer => "refused_by_peer",
        /// The client ended the connection.
        Closed => "closed",
        /// This server has no certificate yet.
        NotReady => "not_ready",
    }
}

/// Connections of all listeners.
#[derive(Debug)]
pub struct ConnectionMetrics {
    /// Open.
    pub open: EnumGauge<ListenerKind>,
    /// The most that may be open.
    pub max: EnumGauge<ListenerKind>,
    /// Accepted and admitted.
    pub accepted: EnumCounter<ListenerKind>,
    /// Failed accepts.
    pub accept_errors: EnumCounter<ListenerKind>,
    /// Refused or ended by the server.
    pub closed: EnumCounter<(ListenerKind, CloseReason)>,
    /// Bytes that are held for TCP peers of DNS: answers that they do not read, questions that they
    /// do not finish.
    pub dns_held_bytes: Gauge<u64, AtomicU64>,
    /// TLS handshakes that succeeded.
    pub handshakes: Counter,
    /// TLS handshakes that failed.
    pub handshakes_failed: EnumCounter<HandshakeFailure>,
    /// Times that a changed file of TLS was invalid.
    pub tls_reload_errors: Counter,
}

impl ConnectionMetrics {
    pub(super) fn register(all: &mut Registry) -> Self {
        let all = all.sub_registry_with_prefix("gangplank");
        let dns_held_bytes = Gauge::default();
        all.register(
            "dns_tcp_held_bytes",
            "Answers that TCP peers do not read and questions that they do not finish, in bytes",
            dns_held_bytes.clone(),
        );
        let (handshakes, tls_reload_errors) = (Counter::default(), Counter::default());
        all.register("tls_handshakes", "TLS handshakes that succeeded", handshakes.clone());
        all.register(
            "tls_reload_errors",
            "Times that a changed certificate, key or CA file was invalid, so that the last valid one stays in use",
            tls_reload_errors.clone(),
        );
        Self {
            open: EnumGauge::register(all, "connections", "listener", "Open TCP connections"),
            max: EnumGauge::register(all, "connections_max", "listener", "The most TCP connections that may be open"),
            accepted: EnumCounter::register(all, "connections_accepted", "listener", "TCP connections accepted"),
            accept_errors: EnumCounter::register(
                all,
                "accept_errors",
                "listener",
                "Times that a connection could not be accepted",
            ),
            closed: EnumCounter::register(
                all,
                "connections_closed",
                ("listener", "reason"),
                "TCP connections that the server refused or ended, by reason",
            ),
            dns_held_bytes,
            handshakes,
            handshakes_failed: EnumCounter::register(
                all,
                "tls_handshakes_failed",
                "reason",
                "TLS handshakes that failed, by reason",
            ),
            tls_reload_errors,
        }
    }
}
