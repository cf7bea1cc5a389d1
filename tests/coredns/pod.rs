//! What a pod sees: a `resolv.conf` as the kubelet writes it, CoreDNS behind it, and the resolvers that programs use.
//! `docs/coredns.md` has the table.

use std::{
    collections::BTreeSet,
    env, fs,
    io::{BufRead as _, BufReader, Write as _},
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
};

use tempfile::TempDir;

use super::without_kubernetes;
use crate::support::{
    coredns::{CoreDns, corefile},
    namespace,
    server::Server,
    stream::Stream,
    tools::{self, ROOT},
    wait_until,
};

/// The Service of CoreDNS.
const COREDNS: &str = "10.96.0.10:53";

/// Instances of a service whose answer fits into no datagram.
const MANY: usize = 100;

/// What stands behind CoreDNS for all other names: they do not exist.
const ELSEWHERE: &str = "    template ANY ANY {\n        rcode NXDOMAIN\n    }\n";

/// A resolver: a program that reads names, one a line, and prints their addresses.
struct Resolver {
    name: &'static str,
    command: Vec<PathBuf>,
    /// Whether it completes short names by the `search` of resolv.conf.
    searches: bool,
    /// Whether it asks again over TCP for an answer that was truncated. Without, it shows what fits into 512 octets.
    tcp: bool,
    /// Whether it remembers that a name did not exist.
    caches: bool,
}

/// All resolvers that are there; Node and Java are no tools of these tests, but most machines have them.
fn resolvers() -> Option<Vec<Resolver>> {
    let sources = Path::new(ROOT).join("tests/tools");
    let usual = |name, command| Resolver { name, command, searches: true, tcp: true, caches: false };
    let mut all = vec![
        usual("glibc", vec![tools::require("lookup-glibc")?]),
        // Debian 12 has musl 1.2.3; 1.2.4 was the first that asks over TCP.
        Resolver { tcp: false, ..usual("musl", vec![tools::require("lookup-musl")?]) },
        usual("Go", vec![tools::require("gotool")?, "names".into()]),
    ];
    if let Some(node) = on_path("node") {
        let script = sources.join("node/lookup.js");
        all.push(usual("Node lookup", vec![node.clone(), script.clone(), "lookup".into()]));
        let resolve = usual("Node resolve", vec![node, script, "resolve".into()]);
        all.push(Resolver { searches: false, ..resolve });
    }
    if let Some(java) = on_path("java") {
        let java = usual("Java", vec![java, sources.join("java/Lookup.java")]);
        all.push(Resolver { caches: true, ..java });
    }
    Some(all)
}

fn on_path(program: &str) -> Option<PathBuf> {
    let found = env::split_paths(&env::var_os("PATH")?).map(|dir| dir.join(program)).find(|path| path.exists());
    if found.is_none() {
        println!("{program} is not on this machine");
    }
    found
}

/// A pod of one namespace. Its programs have its resolv.conf, and the network of the test.
struct Pod<'a> {
    namespace: &'static str,
    dir: &'a TempDir,
}

impl<'a> Pod<'a> {
    fn new(dir: &'a TempDir, namespace: &'static str) -> Self {
        let pod = Self { namespace, dir };
        let resolv_conf = format!(
            "search {namespace}.svc.cluster.local svc.cluster.local cluster.local\nnameserver 10.96.0.10\noptions ndots:5\n"
        );
        fs::write(pod.resolv_conf(), resolv_conf).expect("a file");
        pod
    }

    fn resolv_conf(&self) -> PathBuf {
        self.dir.path().join(self.namespace)
    }

    /// A program with these arguments in a mount namespace of its own.
    fn command<S: AsRef<std::ffi::OsStr>>(&self, command: impl IntoIterator<Item = S>) -> Command {
        let mut unshare = Command::new("unshare");
        unshare.args(["--mount", "--", "sh", "-c", "mount --bind \"$0\" /etc/resolv.conf && exec \"$@\""]);
        unshare.arg(self.resolv_conf()).args(command);
        unshare
    }

    fn stdout<const N: usize>(&self, command: [&str; N]) -> String {
        let output = self.command(command).stdin(Stdio::null()).output().expect("unshare runs");
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "{command:?}: {said}{}", String::from_utf8_lossy(&output.stderr));
        said
    }
}

/// A program in a pod that resolves names until it is dropped.
struct Running {
    child: Child,
    names: ChildStdin,
    found: BufReader<ChildStdout>,
}

impl Running {
    fn start(pod: &Pod<'_>, resolver: &Resolver) -> Self {
        let mut command = pod.command(&resolver.command);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("unshare runs");
        let names = child.stdin.take().expect("it is piped");
        let found = BufReader::new(child.stdout.take().expect("it is piped"));
        Self { child, names, found }
    }

    /// The addresses of a name, or the resolver's error.
    fn find(&mut self, name: &str) -> Result<BTreeSet<IpAddr>, String> {
        writeln!(self.names, "{name}").expect("it reads names");
        let mut line = String::new();
        self.found.read_line(&mut line).expect("it prints UTF-8");
        assert!(line.ends_with('\n'), "it has ended at {name}");
        match line.strip_prefix("error: ") {
            Some(err) => Err(err.trim().to_owned()),
            None => Ok(line.split_whitespace().map(|address| address.parse().expect("an address")).collect()),
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn addresses(all: &[&str]) -> BTreeSet<IpAddr> {
    all.iter().map(|address| address.parse().expect("an address")).collect()
}

/// A server, whose services have the addresses of this network namespace, and a folder for the pods.
fn server() -> (Server, TempDir) {
    // Not of loopback: with AI_ADDRCONFIG a resolver asks only for the families of which the machine has an address.
    let own = ["10.96.0.10/32", "10.0.0.1/32", "10.0.0.2/32", "2001:db8::1/128 nodad"];
    namespace::ip(
        ["link set lo up".to_owned()].into_iter().chain(own.map(|address| format!("addr add dev lo {address}"))),
    );
    let server = Server::start();
    for address in ["10.0.0.1", "10.0.0.2", "2001:db8::1"] {
        server.register("prod", "web", address, "http=8080");
    }
    server.register("test", "web", "10.0.1.1", "http=8080");
    (server, TempDir::new().expect("a folder"))
}

/// Every resolver, in pods of two namespaces that have a service of the same name.
fn every_resolver_finds(server: &Server, dir: &TempDir, program: &Path, corefile: &str) {
    let Some(resolvers) = resolvers() else { return };
    let coredns: SocketAddr = COREDNS.parse().expect("an address");
    let corefile = corefile.replace(":53 {\n", &format!(":53 {{\n    bind {}\n", coredns.ip()));
    let _coredns = CoreDns::start_at(program, coredns, &corefile);
    let of = |namespace: &str| match namespace {
        "prod" => addresses(&["10.0.0.1", "10.0.0.2", "2001:db8::1"]),
        _ => addresses(&["10.0.1.1"]),
    };
    let mut stream = Stream::open(server.grpc);
    for resolver in &resolvers {
        for (own, other) in [("prod", "test"), ("test", "prod")] {
            let mut running = Running::start(&Pod::new(dir, own), resolver);
            let what = format!("{} in {own}", resolver.name);
            for (name, namespace) in
                [("web".to_owned(), own), (format!("web.{other}"), other), (format!("web.{other}.svc"), other)]
            {
                let found = running.find(&name);
                match resolver.searches {
                    true => assert_eq!(found, Ok(of(namespace)), "{what}: {name}"),
                    false => assert!(found.is_err(), "{what}: {name}: {found:?}"),
                }
            }
            for dot in ["", "."] {
                let name = format!("web.{other}.svc.cluster.local{dot}");
                assert_eq!(running.find(&name), Ok(of(other)), "{what}: {name}");
            }
            let found = running.find("many.prod.svc.cluster.local").expect("addresses").len();
            // 512 octets: the header, the question, and records of 16.
            let fits = (512 - 12 - 32) / 16;
            assert_eq!(found, if resolver.tcp { MANY } else { fits }, "{what}: many");

            // Asked for too early, then registered, then removed: nothing in between keeps an answer.
            let late = format!("late-{}", resolver.name.to_lowercase().replace(' ', "-"));
            let name = format!("{late}.{own}.svc.cluster.local.");
            assert!(running.find(&name).is_err(), "{what}: {name}");
            assert_eq!(stream.register(own, &late, "10.0.2.1").0, 201);
            match resolver.caches {
                true => wait_until("its cache has forgotten", || running.find(&name).ok()),
                false => running.find(&name).unwrap_or_else(|err| panic!("{what}: {name}: {err}")),
            };
            assert_eq!(stream.remove(own, &late, "10.0.2.1").0, 204);
            if !resolver.caches {
                assert!(running.find(&name).is_err(), "{what}: {name} was removed");
            }
        }
        println!("{} finds all", resolver.name);
    }
}

/// Registers the service of many addresses.
fn register_many(server: &Server) {
    let mut stream = Stream::open(server.grpc);
    for n in 0..MANY {
        assert_eq!(stream.register("prod", "many", &format!("10.1.0.{n}")).0, 201);
    }
}

#[test]
fn resolvers_of_pods_find_services_behind_a_stub_domain() {
    if !namespace::entered("coredns::pod::resolvers_of_pods_find_services_behind_a_stub_domain") {
        return;
    }
    let Some(program) = tools::require("coredns") else { return };
    let (server, dir) = server();
    register_many(&server);
    let dns = server.dns.to_string();
    let printed =
        server.run(&["coredns", "--wiring", "stub-domain", "-n", "prod", "-n", "test", "--server", &dns]).stdout;
    let stub_domains = String::from_utf8(printed).expect("UTF-8");
    every_resolver_finds(&server, &dir, &program, &format!("{stub_domains}.:53 {{\n{ELSEWHERE}}}\n"));
}

#[test]
fn resolvers_of_pods_find_services_behind_a_fall_through() {
    if !namespace::entered("coredns::pod::resolvers_of_pods_find_services_behind_a_fall_through") {
        return;
    }
    let Some(program) = tools::require("coredns") else { return };
    let (server, dir) = server();
    register_many(&server);
    let corefile = without_kubernetes(&corefile("fall-through.Corefile", server.dns));
    let elsewhere = CoreDns::start(&program, &format!(".:53 {{\n{ELSEWHERE}}}\n"));
    let corefile = corefile.replace("/etc/resolv.conf", &elsewhere.address.to_string());
    every_resolver_finds(&server, &dir, &program, &corefile);
}

#[test]
fn programs_in_pods_use_short_names() {
    if !namespace::entered("coredns::pod::programs_in_pods_use_short_names") {
        return;
    }
    let Some(program) = tools::require("coredns") else { return };
    let (server, dir) = server();
    let coredns: SocketAddr = COREDNS.parse().expect("an address");
    let stub = corefile("stub-domain.Corefile", server.dns).replace(":53 {\n", ":53 {\n    bind 10.96.0.10\n");
    let _coredns = CoreDns::start_at(&program, coredns, &stub);
    let pod = Pod::new(&dir, "prod");
    let all = addresses(&["10.0.0.1", "10.0.0.2", "2001:db8::1"]);

    let said = pod.stdout(["getent", "ahosts", "web"]);
    let found = said.lines().filter_map(|line| line.split_whitespace().next()?.parse().ok());
    assert_eq!(found.collect::<BTreeSet<IpAddr>>(), all, "{said}");

    let Some(nslookup) = tools::require("nslookup") else { return };
    let said = pod.stdout([nslookup.to_str().expect("UTF-8"), "web"]);
    let found = said.lines().filter_map(|line| line.strip_prefix("Address: ")?.parse().ok());
    assert_eq!(found.collect::<BTreeSet<IpAddr>>(), all, "{said}");

    // A gRPC client takes the addresses in turn.
    let Some(gotool) = tools::require("gotool") else { return };
    let backends = ["10.0.0.1:8080", "10.0.0.2:8080", "[2001:db8::1]:8080"];
    let [first, second, third] = backends;
    let said = pod.stdout([gotool.to_str().expect("UTF-8"), "balance", "dns:///web:8080", "30", first, second, third]);
    let calls: serde_json::Value = serde_json::from_str(&said).expect("JSON");
    assert_eq!(calls, serde_json::json!({ first: 10, second: 10, third: 10 }));
}
