//! Asks CoreDNS, before and after a change: have names that were answered stopped being answered, and is it gangplank
//! that answers its names?
//!
//! Behind one address there may be several CoreDNS, each of which reads its Corefile at its own time. So a change counts
//! as taken only when it shows in [`CONFIRMATIONS`] answers in a row, each asked from a new port.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use hickory_proto::{
    op::ResponseCode,
    rr::{Name, RecordType},
};
use tokio::time::sleep;

use crate::{
    cli::{
        error::{CommandError, ErrorKind},
        resolve::query::{Reply, query},
    },
    coredns::Wired,
    model::DnsName,
};

/// Answers in a row that must show the change.
const CONFIRMATIONS: usize = 20;

/// How often CoreDNS is asked.
const ROUND_INTERVAL: Duration = Duration::from_secs(1);

/// How long a question may go without its answer. A CoreDNS that reads its Corefile again may drop one.
const BROKEN_AFTER: Duration = Duration::from_secs(10);

/// Whom to ask, and for how long.
#[derive(Debug, Clone)]
pub(super) struct Observation {
    pub(super) servers: Vec<SocketAddr>,
    pub(super) tcp: bool,
    pub(super) controls: Vec<String>,
    pub(super) zone: DnsName,
    pub(super) timeout: Duration,
}

/// Who shall answer after the change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Expected {
    Gangplank,
    /// CoreDNS itself, or another server.
    Other,
}

/// How a change has ended.
#[derive(Debug)]
pub(super) enum RolloutOutcome {
    /// CoreDNS has taken it.
    Taken(Duration),
    /// The answers before the change do not differ from those after it, and they kept coming.
    Held,
    /// Questions that were answered before are not answered any more.
    Broken(String),
    /// The time is over.
    Expired(String),
}

/// Asks CoreDNS since before the change.
#[derive(Debug)]
pub(super) struct Observer {
    observation: Observation,
    expected: Expected,
    controls: Vec<Control>,
    probes: Vec<Probe>,
    /// NSID that CoreDNS itself puts into answers.
    own_nsid: Option<String>,
    /// Whether the probes were answered before the change.
    probes_answered: bool,
    /// Whether they were answered before as they shall be after it.
    already: bool,
}

/// A name that has to be answered with records.
#[derive(Debug)]
struct Control {
    name: Name,
    kind: RecordType,
}

/// A question whose answer shows whether gangplank gave it.
#[derive(Debug)]
enum Probe {
    /// A name below this one that nobody has. Gangplank's NSID (RFC 5001) comes through, because the server block has no cache.
    StubDomain(Name),
    /// `dns.ZONE A`: CoreDNS says that there is no such name, and gangplank that it has no address: RFC 8020. The cache
    /// plugin drops the NSID.
    FallThrough(Name),
}

/// What an answer to a probe shows.
#[derive(Debug, PartialEq, Eq)]
enum ProbeResult {
    By(Expected),
    Failed(String),
}

impl Observer {
    /// Asks for everything once, before the change.
    pub(super) async fn begin(
        observation: Observation,
        wired: &[Wired],
        expected: Expected,
    ) -> Result<Self, CommandError> {
        let default = [format!("kubernetes.default.svc.{}", observation.zone)];
        let names = if observation.controls.is_empty() { &default[..] } else { &observation.controls };
        let names = names.iter().map(|name| fqdn(name)).collect::<Result<Vec<_>, _>>()?;
        let probes = wired.iter().map(|wired| match wired {
            Wired::StubDomain(zone) => Ok(Probe::StubDomain(fqdn(zone)?)),
            Wired::FallThrough(zone) => Ok(Probe::FallThrough(fqdn(&format!("dns.{zone}"))?)),
        });
        let probes = probes.collect::<Result<Vec<_>, CommandError>>()?;
        let (probes_answered, already) = (true, false);
        let controls = Vec::new();
        let mut observer = Self { observation, expected, controls, probes, own_nsid: None, probes_answered, already };
        for name in names {
            let control = observer.control(name).await?;
            observer.controls.push(control);
        }
        let seen = observer.seen().await;
        observer.probes_answered = !seen.iter().any(|seen| matches!(seen, ProbeResult::Failed(_)));
        observer.already = seen.iter().all(|seen| *seen == ProbeResult::By(expected));
        Ok(observer)
    }

    /// How long it waits.
    pub(super) fn timeout(&self) -> String {
        humantime::format_duration(self.observation.timeout).to_string()
    }

    /// Waits for the change to show.
    pub(super) async fn wait(&self) -> RolloutOutcome {
        let begun = Instant::now();
        let mut failing_since: Option<Instant> = None;
        loop {
            let (failure, shows) = self.round().await;
            match &failure {
                Some(why) => {
                    let since = *failing_since.get_or_insert_with(Instant::now);
                    if since.elapsed() >= BROKEN_AFTER {
                        return RolloutOutcome::Broken(why.clone());
                    }
                }
                None => {
                    // A lost answer is no outage: it has to go on failing.
                    failing_since = None;
                    // Not where the answers looked so before: then only time shows that nothing broke.
                    if shows && !self.already && self.confirmed().await {
                        return RolloutOutcome::Taken(begun.elapsed());
                    }
                }
            }
            if begun.elapsed() >= self.observation.timeout {
                return match failure {
                    None if self.already && shows => RolloutOutcome::Held,
                    None => RolloutOutcome::Expired("its answers have not changed".into()),
                    Some(why) => RolloutOutcome::Expired(why),
                };
            }
            sleep(ROUND_INTERVAL).await;
        }
    }

    /// Asks for everything once: what is not answered any more, and whether the change shows.
    async fn round(&self) -> (Option<String>, bool) {
        for (server, tcp) in self.ways() {
            for Control { name, kind } in &self.controls {
                if let Err(why) = answered(server, name, *kind, tcp).await {
                    return (Some(format!("{name} {kind} at {server}: {why}")), false);
                }
            }
        }
        let seen = self.seen().await;
        let failed = seen.iter().find_map(|seen| match seen {
            // What was not answered before shows nothing now.
            ProbeResult::Failed(why) if self.probes_answered => Some(why.clone()),
            _ => None,
        });
        (failed, seen.iter().all(|seen| *seen == ProbeResult::By(self.expected)))
    }

    async fn confirmed(&self) -> bool {
        for _ in 0..CONFIRMATIONS {
            if self.seen().await.iter().any(|seen| *seen != ProbeResult::By(self.expected)) {
                return false;
            }
        }
        true
    }

    /// Every address over each transport.
    fn ways(&self) -> Vec<(SocketAddr, bool)> {
        let transports = if self.observation.tcp { &[true][..] } else { &[false, true] };
        self.observation.servers.iter().flat_map(|server| transports.iter().map(|tcp| (*server, *tcp))).collect()
    }

    /// What each probe shows at each address, over each transport.
    async fn seen(&self) -> Vec<ProbeResult> {
        let mut seen = Vec::new();
        for (server, tcp) in self.ways() {
            for probe in &self.probes {
                let name = match probe {
                    Probe::StubDomain(zone) => random_name(zone),
                    Probe::FallThrough(name) => name.clone(),
                };
                seen.push(match query(server, &name, RecordType::A, tcp).await {
                    Ok(reply) => self.shown(probe, &reply).map_or_else(
                        |why| ProbeResult::Failed(format!("{name} A at {server}: {why}")),
                        ProbeResult::By,
                    ),
                    Err(err) => ProbeResult::Failed(format!("{name} A at {server}: {err}")),
                });
            }
        }
        seen
    }

    fn shown(&self, probe: &Probe, reply: &Reply) -> Result<Expected, ResponseCode> {
        let rcode = reply.rcode();
        if !matches!(rcode, ResponseCode::NoError | ResponseCode::NXDomain) {
            return Err(rcode);
        }
        let gangplank = match probe {
            // CoreDNS can have an NSID of its own (its plugin `nsid`), which must not pass for gangplank's.
            Probe::StubDomain(_) => reply.nsid().is_some_and(|nsid| self.own_nsid.as_ref() != Some(&nsid)),
            // NXDOMAIN is CoreDNS' own answer: `dns.ZONE` exists in gangplank's zone only.
            Probe::FallThrough(_) => rcode == ResponseCode::NoError,
        };
        Ok(if gangplank { Expected::Gangplank } else { Expected::Other })
    }

    /// Finds a type of address that the name has everywhere before the change.
    async fn control(&mut self, name: Name) -> Result<Control, CommandError> {
        let mut last = String::new();
        // A cluster may have one family only.
        for kind in [RecordType::A, RecordType::AAAA] {
            let mut all = true;
            for (server, tcp) in self.ways() {
                match answered(server, &name, kind, tcp).await {
                    Ok(nsid) => self.own_nsid = nsid.or_else(|| self.own_nsid.take()),
                    Err(why) => {
                        all = false;
                        last = format!("{name} {kind} at {server}{}: {why}", if tcp { " over TCP" } else { "" });
                        break;
                    }
                }
            }
            if all {
                return Ok(Control { name, kind });
            }
        }
        let message = format!("nothing was changed: CoreDNS does not answer the name to compare with: {last}");
        Err(CommandError::new(ErrorKind::Failed, message)
            .hint("where CoreDNS is:        kubectl get service kube-dns -n kube-system")
            .hint("a name that it answers:  --control NAME")
            .hint("without comparing:       leave out --dns"))
    }
}

/// Whether the answer has records; its NSID, or why not.
async fn answered(server: SocketAddr, name: &Name, kind: RecordType, tcp: bool) -> Result<Option<String>, String> {
    let reply = query(server, name, kind, tcp).await.map_err(|err| err.to_string())?;
    match reply.rcode() {
        ResponseCode::NoError if reply.message.answers.is_empty() => Err("no such record".into()),
        ResponseCode::NoError => Ok(reply.nsid()),
        rcode => Err(rcode.to_string()),
    }
}

/// A name below `zone` that nobody has asked for, so that no cache has it.
fn random_name(zone: &Name) -> Name {
    let label = format!("gangplank-{:016x}", fastrand::u64(..));
    zone.prepend_label(label).unwrap_or_else(|_| zone.clone())
}

fn fqdn(text: &str) -> Result<Name, CommandError> {
    let name = Name::from_ascii(text)
        .map_err(|err| CommandError::new(ErrorKind::Usage, format!("{text:?} is not a DNS name: {err}")))?;
    let mut name = name.to_lowercase();
    name.set_fqdn(true);
    Ok(name)
}
