//! All integration tests, in one binary. Files are named by what they test.

mod check;
mod clients;
mod cluster;
mod coredns;
mod crash;
mod deploy;
mod docs;
mod hygiene;
mod identity;
mod knot;
mod kubernetes_watch;
mod lifecycle;
mod listeners;
mod longer_zone;
mod metrics;
mod mirror;
mod monitoring;
mod names;
mod node;
mod package;
mod process;
mod read_your_writes;
mod rfc8906;
mod stopping;
mod structure;
mod support;
