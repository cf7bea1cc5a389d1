//! gangplank: DNS inside Kubernetes for services that live outside it.
//!
//! Services on VMs and bare metal register over gRPC and are answered at once over DNS, as
//! `<service>.<namespace>.svc.<zone>`. This page has the design in points that hold everywhere;
//! `docs/architecture.md` has a picture of the modules, the two paths through them, and the
//! glossary.
//!
//! 1. **One writer.** Every change, from a stream, a unary call or Kubernetes, is a message to the
//!    [`registry`]'s writer. Text is parsed and checked once, where it enters
//!    ([`model::Validator`]); behind that there are only types that cannot hold an invalid value.
//! 2. **Durable, then visible, then acknowledged.** The writer takes all submissions that wait as
//!    one batch: one sync of the journal ([`store`]), one publication ([`zone`]), one new
//!    generation, then every answer. So an acknowledged registration survives `kill -9`, and DNS
//!    answers with it.
//! 3. **Queries never wait for registrations.** The zone is one immutable value per service in a
//!    lock-free map. [`dns`] answers with one pure function, packet in, packet out, which takes no
//!    lock and allocates nothing; UDP and TCP are thin loops around it.
//! 4. **The zone holds records, not packets.** Addresses, SRV targets and weights are counted when
//!    an instance changes, and rendered when a query asks. A lookup ends in one of a few cases, and
//!    response code, AA bit and SOA follow from the case.
//! 5. **Generations order everything.** The generation grows by one with each published batch and
//!    never decreases for one data directory. Its low 32 bits are the SOA serial, answers to
//!    registrants carry it, and the change feed is ordered by it.
//! 6. **Readers do not disturb the writer.** Lists read the catalog, watches the change feed. A
//!    watch that falls further behind than the feed reaches ends with a restart message.
//! 7. **Unknown is not absent.** Until the store is recovered, a name that is not found gets
//!    SERVFAIL, never NXDOMAIN, and registrations get "try again". When the disk fails,
//!    registrations stop and DNS continues.
//! 8. **Every long task is joined** ([`app`]). The first part that fails stops the others, because
//!    half a server must not stay ready.
//! 9. **Imports point down only**: `main → app → dns, grpc, kubernetes, admin → registry → store,
//!    zone → model`, and `main → cli → grpc::client, coredns`. No transport imports another. A test checks
//!    this.
//! 10. **Kubernetes follows.** With a cluster, [`kubernetes`] mirrors registrations into headless
//!     Services and EndpointSlices, level-triggered, and sends the registry facts about the
//!     cluster. DNS has a change before the API server does; the answer to a registrant waits for
//!     the slice for at most a second. The slices alone restore a lost data directory.
//!
//! 11. **One door.** A connection becomes an identity in one function ([`security`]), and an identity gets a
//!     yes or a no in one other ([`identity`]); every call and every page passes both, and tests ask the
//!     server for its calls and pages. Only the two calls with which a machine joins, and the pages that
//!     probes ask for, need no identity.
//!
//! 12. **Names ahead of need.** An instance may be a DNS name. [`upstream`] looks it up before anybody asks, and the
//!     registry's writer publishes what it leads to like any other change, so that a query still reads memory only.
//!
//! Not implemented yet, and where it will go: probes set readiness (`health`), the addresses of names are written into
//! EndpointSlices ([`kubernetes`]), encrypted DNS joins UDP and TCP in [`dns`].

pub mod admin;
pub mod app;
pub mod cli;
pub mod config;
pub mod coredns;
pub mod dns;
pub mod grpc;
pub mod identity;
pub mod kubernetes;
pub mod metrics;
pub mod model;
pub mod net;
pub mod registry;
pub mod replicas;
pub mod security;
pub mod store;
pub mod telemetry;
pub mod upstream;
pub mod zone;
