//! TLS by a CA of gangplank's own: a certificate for the names of this server, renewed while it runs.

use std::{
    collections::BTreeSet,
    fmt, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::{Arc, Mutex, PoisonError},
};

use tokio::sync::watch;

use crate::{
    dns,
    identity::{CurrentCa, PublicKeyHash, ServerCertificate, ServerNames},
    model::{ServerAddress, wall_clock},
    net::tls::{TlsContents, TlsFileError, TlsFiles, TlsPart, TlsSource},
};

/// The name that every server has on its own machine.
const LOCALHOST: &str = "localhost";

/// The own CA as the source of a listener's certificate. A certificate lasts for the process: each start makes one.
#[derive(Debug)]
pub(super) struct OwnTls {
    ca: Arc<CurrentCa>,
    names: ServerNames,
    /// With the CA that has signed it.
    issued: Mutex<Option<(PublicKeyHash, ServerCertificate)>>,
}

impl OwnTls {
    pub(super) fn new(ca: Arc<CurrentCa>, names: ServerNames) -> Self {
        Self { ca, names, issued: Mutex::new(None) }
    }
}

impl fmt::Display for OwnTls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the CA in {}", self.ca.place())
    }
}

impl TlsSource for OwnTls {
    fn read(&self) -> Result<TlsContents, TlsFileError> {
        let now = wall_clock();
        let ca = self.ca.get().map_err(|err| TlsFileError::Pending(err.to_string()))?;
        let hash = *ca.public_key_hash();
        let mut issued = self.issued.lock().unwrap_or_else(PoisonError::into_inner);
        // Under the lock, so that two listeners that read at once get one certificate.
        let current = match issued.take().filter(|(signer, issued)| *signer == hash && !issued.is_due(now)) {
            Some(current) => current,
            None => {
                let new = ca.issue_server(&self.names, now);
                (hash, new.map_err(|err| TlsFileError::Own(err.to_string()))?)
            }
        };
        let (_, ServerCertificate { chain, key, .. }) = issued.insert(current);
        let ca = Some(ca.pem().as_bytes().to_vec());
        let (cert, key) = (chain.clone().into_bytes(), key.clone().into_bytes());
        Ok(TlsContents { cert, key, client_ca: ca.clone(), own_ca: ca.clone(), server_ca: ca })
    }

    fn invalid(&self, _part: TlsPart, reason: String) -> TlsFileError {
        TlsFileError::Own(reason)
    }

    fn changes(&self) -> Option<watch::Receiver<u64>> {
        Some(self.ca.changes())
    }
}

/// Files as the source of a listener's certificate, beside the own CA, which signs for machines that join.
#[derive(Debug)]
pub(super) struct FilesWithOwnCa {
    files: TlsFiles,
    ca: Arc<CurrentCa>,
}

impl FilesWithOwnCa {
    pub(super) const fn new(files: TlsFiles, ca: Arc<CurrentCa>) -> Self {
        Self { files, ca }
    }
}

impl fmt::Display for FilesWithOwnCa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, and for machines that join the CA in {}", self.files, self.ca.place())
    }
}

impl TlsSource for FilesWithOwnCa {
    fn read(&self) -> Result<TlsContents, TlsFileError> {
        // Others than machines that joined do without it.
        let own_ca = self.ca.get().ok().map(|ca| ca.pem().as_bytes().to_vec());
        Ok(TlsContents { own_ca, ..self.files.read()? })
    }

    fn invalid(&self, part: TlsPart, reason: String) -> TlsFileError {
        self.files.invalid(part, reason)
    }

    fn changes(&self) -> Option<watch::Receiver<u64>> {
        Some(self.ca.changes())
    }
}

/// The names of this server: what it is reached at, where it listens, and those of every machine for itself.
pub(super) fn names(advertised: &[ServerAddress], listeners: &[SocketAddr]) -> io::Result<ServerNames> {
    let mut names = ServerNames { dns: vec![LOCALHOST.into()], ip: Vec::new() };
    for name in advertised.iter().filter_map(ServerAddress::name) {
        if !names.dns.contains(&name) {
            names.dns.push(name);
        }
    }
    // Tools on the machine itself ask over loopback, by name and by address.
    let mut ips = BTreeSet::from([IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)]);
    ips.extend(advertised.iter().filter_map(ServerAddress::ip));
    ips.extend(listeners.iter().map(SocketAddr::ip).filter(|ip| !ip.is_unspecified()));
    ips.extend(reachable_ips(listeners)?);
    names.ip = ips.into_iter().collect();
    Ok(names)
}

/// Where other machines reach the listeners.
pub(super) fn reachable(listeners: &[SocketAddr]) -> io::Result<Vec<ServerAddress>> {
    let mut all = Vec::new();
    for listener in listeners {
        all.extend(reachable_ips(&[*listener])?.into_iter().map(|ip| ServerAddress::new(ip, listener.port())));
    }
    Ok(all)
}

fn reachable_ips(listeners: &[SocketAddr]) -> io::Result<Vec<IpAddr>> {
    let mut bound = listeners.to_vec();
    // IPv4 connections arrive at a socket of IPv6, too.
    let dual = listeners.iter().filter(|listener| listener.ip() == IpAddr::V6(Ipv6Addr::UNSPECIFIED));
    bound.extend(dual.map(|listener| SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), listener.port())));
    dns::reachable(&bound)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{identity::CertificateAuthority, metrics::Metrics, net::tls::ServerTls};

    #[test]
    fn names_are_the_advertised_ones_and_the_listeners() {
        let advertised = ["gp.example.com:9080", "10.0.0.9:9080", "localhost:1"];
        let advertised = advertised.map(|text| ServerAddress::parse(text, 1).expect("valid"));
        let names = names(&advertised, &["10.0.0.2:9080".parse().expect("an address")]).expect("a list");
        assert_eq!(names.dns, ["localhost", "gp.example.com"]);
        let expected = ["10.0.0.2", "10.0.0.9", "127.0.0.1", "::1"];
        assert_eq!(names.ip, expected.map(|ip| ip.parse::<IpAddr>().expect("an address")));
    }

    #[test]
    fn certificate_stays_until_it_is_due() {
        let dir = tempfile::tempdir().expect("a directory");
        let ca = CertificateAuthority::open(dir.path(), wall_clock()).expect("created");
        let own = OwnTls::new(CurrentCa::in_directory(ca), ServerNames { dns: vec![LOCALHOST.into()], ip: Vec::new() });
        let first = own.read().expect("issued");
        assert_eq!(own.read().expect("the same"), first);
        let past = wall_clock() - std::time::Duration::from_secs(70 * 24 * 60 * 60);
        let ca = own.ca.get().expect("there is one");
        let due = ca.issue_server(&own.names, past).expect("issued");
        *own.issued.lock().expect("no panic") = Some((*ca.public_key_hash(), due.clone()));
        let renewed = own.read().expect("issued");
        assert!(
            renewed.cert != due.chain.as_bytes() && renewed.cert != first.cert,
            "renewed at two thirds of its life"
        );
        ServerTls::load(own, Metrics::new().connections).expect("what a listener can use");
    }
}
