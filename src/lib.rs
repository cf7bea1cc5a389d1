//! gangplank: DNS inside Kubernetes for services that live outside it.
//!
//! Services on VMs and bare metal register over gRPC and are answered as
//! `<service>.<namespace>.svc.<zone>` over DNS at once. This page is the design; each module's
//! own page has the rest.
//!
//! 1. **One way in.** Whoever wants a change, a stream, a unary call, a probe, hands commands to
//!    the [`registry`]'s handle. Text was checked before, once, at the door
//!    ([`model::Validator`]): behind it are only types that cannot hold a bad value.
//! 2. **Durable, then visible, then acknowledged.** One writer takes all submissions that wait
//!    as one batch: one sync of the journal ([`store`]), one publication ([`zone`]), one new
//!    generation, then every answer. An acknowledged registration survives `kill -9` and already
//!    resolves.
//! 3. **Queries never wait for registrations.** The zone is one immutable value per service in
//!    a lock-free map. [`dns`] answers with one pure function, packet in, packet out, which takes
//!    no lock and allocates nothing; UDP and TCP are thin loops around it.
//! 4. **Facts, not records.** The zone keeps addresses, targets, weights; wire records are
//!    rendered while they are copied out. A lookup ends in a closed set of DNS words, and
//!    response code, AA bit and SOA follow from the word.
//! 5. **Generations order everything.** A number that grows by one per published batch and never
//!    goes back for one data directory. Its low 32 bits are the SOA serial, answers to
//!    registrants carry it, and the change feed is ordered by it.
//! 6. **Readers read for themselves.** The catalog and the change feed serve lists and watches
//!    without the writer noticing; who falls behind is told to begin again.
//! 7. **What is not known is not denied.** Until recovery is complete a miss is SERVFAIL, never
//!    NXDOMAIN, and registrations are refused as "try again". When the disk fails, registrations
//!    stop and DNS goes on.
//! 8. **Every long task is joined** ([`app`]). The first part that fails stops the others:
//!    a half-dead server must not stay ready.
//! 9. **Imports point down only**: `main → app → dns, grpc, kubernetes, admin → registry → store, zone →
//!    model`, and `main → cli → grpc::client`. Transports do not know each other; `metrics` is a
//!    leaf. A test holds this.
//!
//! 10. **Kubernetes follows, and is never in front.** With a cluster, [`kubernetes`] writes what is
//!     registered into headless Services and EndpointSlices, level-triggered, and tells the registry
//!     what the cluster says, as facts. DNS has a change before the API server hears of it; the
//!     registrant's answer waits for the slice for a second at most. The slices alone restore a lost
//!     data directory.
//!
//! Where things will be that are not there yet: probes set readiness (`health`), names of instances
//! are looked up (`upstream`), TLS turns accepted connections into identities where [`grpc`] accepts them,
//! encrypted DNS stands beside UDP and TCP in [`dns`].

pub mod admin;
pub mod app;
pub mod cli;
pub mod config;
pub mod dns;
pub mod grpc;
pub mod kubernetes;
pub mod metrics;
pub mod model;
pub mod registry;
pub mod store;
pub mod telemetry;
pub mod zone;
