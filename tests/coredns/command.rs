//! `gangplank coredns` against a real API server, and a real CoreDNS that reads its Corefile again when the ConfigMap
//! changes, as in a cluster. A thread does what the kubelet does: it keeps the file equal to the ConfigMap.

use std::{
    fs,
    net::{Ipv4Addr, SocketAddr},
    path::Path,
    process::{Command, Output, Stdio},
    sync::{
        atomic::{AtomicUsize, Ordering},
        mpsc,
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use gangplank::kubernetes::api::{ConfigMapClient, ConfigMapError, ConfigMapKey};
use hickory_proto::{
    op::{Message, ResponseCode},
    rr::{RData, RecordType},
};
use serde_json::{Value, json};

use crate::{
    mirror::ClusterLock,
    support::{
        cluster::{CONTEXT, Cluster, Who},
        coredns::CoreDns,
        dns::{Over, answers, ask},
        free_ports,
        proxy::{Fault, Proxy},
        server::{BINARY, Server},
        stream::Stream,
        tools, wait_until,
    },
};

/// How often the thread compares: the kubelet's own interval is up to a minute.
const SYNC_INTERVAL: Duration = Duration::from_millis(50);

/// A cluster's DNS with gangplank beside it, not wired yet.
struct Front {
    cluster: &'static Cluster,
    namespace: &'static str,
    gangplank: Server,
    /// Behind the general `forward`; knows 10.9.9.9.
    _elsewhere: Server,
    coredns: CoreDns,
    stop: Option<mpsc::Sender<()>>,
    kubelet: Option<JoinHandle<()>>,
}

impl Front {
    /// `None` without the programs, which is reported. `namespace` is the test's own.
    fn start(namespace: &'static str) -> Option<Self> {
        let program = tools::require("coredns")?;
        let cluster = Cluster::shared()?;
        cluster.create_namespace(namespace);
        cluster.kubectl(&["create", "service", "clusterip", "native", "--tcp=80", "-n", namespace]);
        let (gangplank, elsewhere) = (Server::start(), Server::start());
        gangplank.register(namespace, "web", "10.91.0.1", "http=8080");
        gangplank.register(namespace, "web", "2001:db8::1", "http=8080");
        let mut stream = Stream::open(gangplank.grpc);
        for last in 1..=100 {
            assert_eq!(stream.register(namespace, "many", &format!("10.1.0.{last}")).0, 201);
        }
        elsewhere.register("other", "far", "10.9.9.9", "http=8080");
        let [port] = free_ports();
        let kubeconfig = cluster.kubeconfig_admin();
        let text = format!(
            "# made by hand\n.:{port} {{\n    bind 127.0.0.1\n    errors\n    kubernetes cluster.local in-addr.arpa ip6.arpa {{\n       \
             kubeconfig {} {CONTEXT}\n       pods insecure\n       fallthrough in-addr.arpa ip6.arpa\n    }}\n    forward . {}\n    \
             cache 30\n    reload 2s 0s\n}}\n",
            kubeconfig.display(),
            elsewhere.dns
        );
        config_map(cluster, namespace, &text);
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        let coredns = CoreDns::start_at(&program, address, &text);
        let (stop, stopped) = mpsc::channel();
        let file = coredns.corefile();
        let kubelet = thread::spawn(move || {
            while stopped.recv_timeout(SYNC_INTERVAL) == Err(mpsc::RecvTimeoutError::Timeout) {
                let text = corefile(cluster, namespace);
                if fs::read_to_string(&file).expect("it is there") != text {
                    // In one step, as the kubelet does.
                    let staged = file.with_extension("new");
                    fs::write(&staged, text).and_then(|()| fs::rename(&staged, &file)).expect("it can be written");
                }
            }
        });
        let front = Self {
            cluster,
            namespace,
            gangplank,
            _elsewhere: elsewhere,
            coredns,
            stop: Some(stop),
            kubelet: Some(kubelet),
        };
        wait_until("CoreDNS has read the cluster", || (front.addresses("native").len() == 1).then_some(()));
        Some(front)
    }

    /// Runs the command on the ConfigMap of this test.
    fn command(&self, flags: &[&str]) -> Output {
        command(&self.cluster.kubeconfig_admin(), self.namespace, flags)
    }

    /// The same, and waits until CoreDNS has taken it.
    fn command_and_wait(&self, flags: &[&str]) -> String {
        let dns = self.coredns.address.to_string();
        let output = self.command(&[flags, &["--yes", "--dns", &dns, "--timeout", "60s"]].concat());
        let printed = said(&output);
        assert!(output.status.success() && printed.contains("CoreDNS has taken it"), "{flags:?}: {printed}");
        printed
    }

    fn text(&self) -> String {
        corefile(self.cluster, self.namespace)
    }

    fn name(&self, service: &str) -> String {
        format!("{service}.{}.svc.cluster.local.", self.namespace)
    }

    /// What CoreDNS answers.
    fn ask(&self, name: &str, rtype: RecordType) -> Message {
        ask(self.coredns.address, Over::Udp, name, rtype)
    }

    /// The IPv4 addresses of a service of the namespace, by CoreDNS.
    fn addresses(&self, service: &str) -> Vec<String> {
        answers(self.coredns.address, Over::Udp, &self.name(service), RecordType::A)
    }

    fn rcode(&self, service: &str) -> ResponseCode {
        self.ask(&self.name(service), RecordType::A).response_code
    }

    /// Every kind of answer comes through as gangplank gave it. The kubernetes plugin keeps SOA questions to itself.
    fn compare_answers(&self, soa: bool) {
        let web = self.name("web");
        let names = [
            web.clone(),
            web.to_uppercase(),
            format!("_http._tcp.{web}"),
            format!("_tcp.{web}"),
            format!("10-91-0-1.{web}"),
            format!("2001-db8--1.{web}"),
            self.name("nothing"),
            format!("nothing.{web}"),
            format!("{web}{}", self.name("x")),
        ];
        let types = [
            RecordType::A,
            RecordType::AAAA,
            RecordType::SRV,
            RecordType::TXT,
            RecordType::SOA,
            RecordType::MX,
            RecordType::ANY,
            RecordType::PTR,
        ];
        let (mut records, mut no_data, mut no_name) = (0, 0, 0);
        for name in &names {
            for rtype in types.into_iter().filter(|rtype| soa || *rtype != RecordType::SOA) {
                for over in [Over::Udp, Over::Tcp] {
                    let [through, direct] = [self.coredns.address, self.gangplank.dns]
                        .map(|server| content(&ask(server, over, name, rtype)));
                    assert_eq!(through, direct, "{name} {rtype} {over:?}");
                    match direct {
                        (ResponseCode::NoError, answers, _) if answers.is_empty() => no_data += 1,
                        (ResponseCode::NoError, ..) => records += 1,
                        (ResponseCode::NXDomain, ..) => no_name += 1,
                        other => panic!("{name} {rtype}: {other:?}"),
                    }
                }
            }
        }
        assert!(records > 20 && no_data > 40 && no_name > 40, "{records} {no_data} {no_name}");

        // 100 addresses: truncated over UDP, all of them over TCP.
        let many = self.name("many");
        let truncated = self.ask(&many, RecordType::A);
        assert!(truncated.truncation && truncated.answers.len() < 100, "{}", truncated.answers.len());
        assert_eq!(answers(self.coredns.address, Over::Tcp, &many, RecordType::A).len(), 100);
    }

    /// Names that are asked for before they are registered, and at once after.
    fn no_negative_answer_is_cached(&self) {
        let mut stream = Stream::open(self.gangplank.grpc);
        for number in 0..50 {
            let service = format!("late-{number}");
            assert_eq!(self.rcode(&service), ResponseCode::NXDomain);
            assert_eq!(stream.register(self.namespace, &service, "10.2.0.1").0, 201);
            assert_eq!(self.addresses(&service), ["10.2.0.1"], "{service} right after its registration");
            assert_eq!(stream.remove(self.namespace, &service, "10.2.0.1").0, 204);
            assert_eq!(self.rcode(&service), ResponseCode::NXDomain, "{service} right after its removal");
        }
    }
}

impl Drop for Front {
    fn drop(&mut self) {
        drop(self.stop.take());
        let _ = self.kubelet.take().map(JoinHandle::join);
    }
}

/// Response code, answers and whether there is a SOA: what does not change from query to query.
fn content(message: &Message) -> (ResponseCode, Vec<String>, bool) {
    let mut data: Vec<String> = message.answers.iter().map(|record| RData::to_string(&record.data)).collect();
    data.sort();
    (message.response_code, data, message.authorities.iter().any(|record| record.record_type() == RecordType::SOA))
}

fn command(kubeconfig: &Path, namespace: &str, flags: &[&str]) -> Output {
    let key = format!("{namespace}/coredns");
    Command::new(BINARY)
        .arg("coredns")
        .args(flags)
        .args(["--configmap", &key, "--kubeconfig"])
        .arg(kubeconfig)
        .stdin(Stdio::null())
        .output()
        .expect("the binary can be run")
}

fn said(output: &Output) -> String {
    [&output.stdout, &output.stderr].map(|text| String::from_utf8_lossy(text).into_owned()).concat()
}

fn path(namespace: &str) -> String {
    format!("/api/v1/namespaces/{namespace}/configmaps/coredns")
}

/// Creates the ConfigMap, with more in it than the Corefile.
fn config_map(cluster: &Cluster, namespace: &str, corefile: &str) {
    let object = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "coredns"},
        "data": {"Corefile": corefile, "other": "kept"}});
    let path = format!("/api/v1/namespaces/{namespace}/configmaps");
    let (status, answer) = cluster.request(Who::Admin, "POST", &path, Some(&object)).expect("the API server runs");
    assert_eq!(status, 201, "{answer}");
}

fn corefile(cluster: &Cluster, namespace: &str) -> String {
    cluster.get_json(&path(namespace))["data"]["Corefile"].as_str().expect("text").to_owned()
}

/// Somebody edits the Corefile.
fn edit_by_hand(cluster: &Cluster, namespace: &str, edit: impl Fn(&str) -> String) {
    let mut object = cluster.get_json(&path(namespace));
    object["data"]["Corefile"] = Value::from(edit(object["data"]["Corefile"].as_str().expect("text")));
    let written = cluster.request(Who::Admin, "PUT", &path(namespace), Some(&object)).expect("the API server runs");
    assert_eq!(written.0, 200, "{}", written.1);
}

#[test]
fn fall_through_is_applied_and_removed() {
    let Some(front) = Front::start("front-fall-through") else { return };
    let before = front.text();
    let server = front.gangplank.dns.to_string();
    assert_eq!(front.rcode("web"), ResponseCode::NXDomain);
    let apply = ["--server", &server, "--apply"];

    let dry = front.command(&[&apply[..], &["--dry-run"]].concat());
    assert!(dry.status.success() && said(&dry).contains("+    forward cluster.local"), "{}", said(&dry));
    assert_eq!(front.text(), before);

    let printed = front.command_and_wait(&apply);
    assert!(printed.contains("-    cache 30\n") && printed.contains("+    cache 30 {\n"), "{printed}");
    front.compare_answers(false);
    front.no_negative_answer_is_cached();
    assert_eq!(front.addresses("native").len(), 1, "nothing is hidden");
    let reverse = |name| answers(front.coredns.address, Over::Udp, name, RecordType::PTR);
    assert_eq!(reverse("1.0.91.10.in-addr.arpa."), [format!("10-91-0-1.{}", front.name("web"))]);
    assert_eq!(reverse("9.9.9.10.in-addr.arpa."), ["10-9-9-9.far.other.svc.cluster.local."], "goes on");
    assert_eq!(reverse("1.0.96.10.in-addr.arpa."), ["kubernetes.default.svc.cluster.local."], "not taken over");

    // Again: nothing to do.
    let (applied, version) = (front.text(), version(&front));
    let again = front.command(&[&apply[..], &["--yes"]].concat());
    assert_eq!(
        (again.status.code(), said(&again).as_str()),
        (Some(0), "configmap front-fall-through/coredns unchanged\n")
    );
    assert_eq!((front.text(), self::version(&front)), (applied, version));

    // Edits around it survive.
    edit_by_hand(front.cluster, front.namespace, |text| {
        text.replace("    errors\n", "    errors\n    log # by hand\n")
    });
    front.command_and_wait(&["--remove"]);
    assert_eq!(front.text(), before.replace("    errors\n", "    errors\n    log # by hand\n"));
    assert_eq!(front.rcode("web"), ResponseCode::NXDomain, "as before");
    assert_eq!(front.addresses("native").len(), 1);
    assert_eq!(reverse("9.9.9.10.in-addr.arpa."), ["10-9-9-9.far.other.svc.cluster.local."]);
    let again = front.command(&["--remove", "--yes"]);
    assert_eq!(
        (again.status.code(), said(&again).as_str()),
        (Some(0), "configmap front-fall-through/coredns unchanged\n")
    );
    assert_eq!(front.cluster.get_json(&path(front.namespace))["data"]["other"], "kept");
}

fn version(front: &Front) -> Value {
    front.cluster.get_json(&path(front.namespace))["metadata"]["resourceVersion"].clone()
}

#[test]
fn stub_domain_is_applied_and_removed() {
    let Some(front) = Front::start("front-stub") else { return };
    let before = front.text();
    let server = front.gangplank.dns.to_string();
    let apply = ["--wiring", "stub-domain", "-n", front.namespace, "--server", &server, "--apply"];
    front.command_and_wait(&apply);
    front.compare_answers(true);
    front.no_negative_answer_is_cached();
    assert_eq!(front.rcode("native"), ResponseCode::NXDomain, "hidden, as the page says");
    let others = || answers(front.coredns.address, Over::Udp, "kubernetes.default.svc.cluster.local.", RecordType::A);
    assert_eq!(others().len(), 1, "other namespaces are not");

    // The other wiring takes its place.
    let replaced = front.command(&["--server", &server, "--apply", "--yes"]);
    assert!(replaced.status.success(), "{}", said(&replaced));
    wait_until("CoreDNS has read it", || (front.addresses("native").len() == 1).then_some(()));
    assert_eq!(front.addresses("web"), ["10.91.0.1"]);
    front.command_and_wait(&["--remove"]);
    assert_eq!(front.text(), before);
    assert_eq!(front.rcode("web"), ResponseCode::NXDomain);
    assert_eq!(others().len(), 1);
}

#[test]
fn broken_answers_are_taken_back() {
    let Some(front) = Front::start("front-broken") else { return };
    let before = front.text();
    let dns = front.coredns.address.to_string();
    let apply = |server: &str, control: &str| {
        let flags = ["--wiring", "stub-domain", "-n", front.namespace, "--server", server, "--apply", "--yes"];
        front.command(&[&flags[..], &["--dns", &dns, "--timeout", "60s", "--control", control]].concat())
    };
    // The control is a native Service of the namespace, which a stub domain hides.
    let native = front.name("native");
    let output = apply(&front.gangplank.dns.to_string(), &native);
    assert_eq!(output.status.code(), Some(1), "{}", said(&output));
    for part in ["error: CoreDNS stopped answering", &native, "is as it was before", "kubectl logs"] {
        assert!(said(&output).contains(part), "no {part} in {}", said(&output));
    }
    assert_eq!(front.text(), before);
    wait_until("it is answered again", || (front.addresses("native").len() == 1).then_some(()));

    // Nobody listens where gangplank is said to be.
    let [nowhere] = free_ports();
    let output = apply(&format!("127.0.0.1:{nowhere}"), "kubernetes.default.svc.cluster.local");
    assert_eq!(output.status.code(), Some(1), "{}", said(&output));
    assert!(said(&output).contains("Server Failure"), "{}", said(&output));
    assert_eq!(front.text(), before);
    wait_until("it is answered again", || (front.addresses("native").len() == 1).then_some(()));

    // A Corefile that CoreDNS does not read: it goes on with the old one, and would not start with the new one.
    let bad = |text: &str| text.replace("    errors\n", "    errors\n    nothing_like_it\n");
    edit_by_hand(front.cluster, front.namespace, bad);
    let server = front.gangplank.dns.to_string();
    let flags = ["--server", server.as_str(), "--apply", "--yes", "--dns", &dns, "--timeout", "6s"];
    let output = front.command(&flags);
    assert_eq!(output.status.code(), Some(4), "{}", said(&output));
    for part in ["has not taken the change within 6s", "is as it was before", "--no-reverse"] {
        assert!(said(&output).contains(part), "no {part} in {}", said(&output));
    }
    assert_eq!(front.text(), bad(&before));

    // Without an answer before the change there is nothing to compare with, and nothing is changed.
    let output = apply(&server, "nothing.example");
    assert_eq!(output.status.code(), Some(1), "{}", said(&output));
    assert!(said(&output).contains("nothing was changed"), "{}", said(&output));
    assert_eq!(front.text(), bad(&before));
}

/// What a pod sees while gangplank is away, as the page says.
#[test]
fn while_gangplank_is_away_other_names_are_answered() {
    let Some(mut front) = Front::start("front-away") else { return };
    let server = front.gangplank.dns.to_string();
    front.command_and_wait(&["--server", &server, "--apply"]);
    front.gangplank.kill9();
    for service in ["web", "nothing"] {
        assert_eq!(front.rcode(service), ResponseCode::ServFail, "{service}: unknown is not absent");
    }
    assert_eq!(front.addresses("native").len(), 1);
    let far = answers(front.coredns.address, Over::Udp, "far.other.svc.cluster.local.", RecordType::A);
    assert!(far.is_empty(), "the zone is not asked of the general forward");
}

#[test]
fn invalid_corefiles_and_closed_terminals_change_nothing() {
    let Some(cluster) = Cluster::shared() else { return };
    let namespace = "front-invalid";
    cluster.create_namespace(namespace);
    let admin = cluster.kubeconfig_admin();
    let apply = ["--server", "10.96.0.53:1053", "--apply"];
    let run = |flags: &[&str]| {
        let output = command(&admin, namespace, flags);
        (output.status.code(), said(&output))
    };
    let (code, said) = run(&apply);
    assert!(code == Some(3) && said.contains("it does not exist"), "{code:?} {said}");
    let invalid = ".:53 {\n    errors\n    kubernetes cluster.local {\n        pods \"insecure\n    }\n}\n";
    config_map(cluster, namespace, invalid);
    for flags in [&[&apply[..], &["--yes"]].concat()[..], &["--remove", "--yes"]] {
        let (code, said) = run(flags);
        assert!(code == Some(1) && said.contains("Corefile not changed: line 4: a quote"), "{code:?} {said}");
        assert_eq!(corefile(cluster, namespace), invalid);
    }
    let valid = invalid.replace('"', "");
    edit_by_hand(cluster, namespace, |_| valid.clone());
    let (code, said) = run(&apply);
    assert!(code == Some(1) && said.contains("no terminal to ask on; --yes"), "{code:?} {said}");
    assert!(said.contains("+    forward cluster.local"), "the difference is shown first: {said}");
    assert_eq!(corefile(cluster, namespace), valid);
    let (code, said) = run(&[&apply[..], &["--context", "nobody"]].concat());
    assert!(code == Some(2) && said.contains("nobody"), "{code:?} {said}");
}

#[test]
fn missing_rights_are_named_and_suffice() {
    let Some(lock) = ClusterLock::take() else { return };
    let (cluster, namespace) = (lock.cluster, "front-rights");
    cluster.create_namespace(namespace);
    config_map(cluster, namespace, ".:53 {\n    kubernetes cluster.local\n}\n");
    let proxy = Proxy::start(cluster);
    let apply = ["--server", "10.96.0.53:1053", "--apply", "--yes"];
    let run = || command(proxy.kubeconfig(), namespace, &apply);
    let refused = run();
    assert_eq!(refused.status.code(), Some(1));
    let named = said(&refused);
    let commands = named.lines().filter_map(|line| line.trim().strip_prefix("kubectl create role"));
    for rest in commands {
        let command = format!("create role{rest}").replace("USER", "system:serviceaccount:gangplank:gangplank");
        cluster.kubectl(&command.split_whitespace().collect::<Vec<_>>());
    }
    // RBAC follows what it watches.
    wait_until("the account may read the ConfigMap", || {
        let (status, _) = cluster.request(Who::Gangplank, "GET", &path(namespace), None).expect("the API server runs");
        (status == 200).then_some(())
    });

    // Somebody else changes it between reading and writing: it is read again, and both changes are there.
    let patches = AtomicUsize::new(0);
    proxy.inject_first(1, Fault::Drop, move |call| {
        let conflict = call.is("patch", "configmaps") && patches.fetch_add(1, Ordering::SeqCst) == 0;
        if conflict {
            edit_by_hand(cluster, "front-rights", |text| format!("{text}# by hand\n"));
        }
        false // it is passed on, and is a conflict
    });
    let applied = run();
    assert!(applied.status.success(), "{}", said(&applied));
    let calls = proxy.calls();
    let patches = calls.iter().filter(|call| call.is("patch", "configmaps"));
    assert_eq!(patches.map(|call| call.status).collect::<Vec<_>>(), [Some(409), Some(200)]);
    let text = corefile(cluster, namespace);
    assert!(text.contains("# by hand\n") && text.contains("forward cluster.local"), "{text}");
}

#[tokio::test]
async fn outdated_text_is_not_written() {
    let Some(cluster) = Cluster::shared() else { return };
    let namespace = "front-conflict";
    cluster.create_namespace(namespace);
    config_map(cluster, namespace, "one");
    let client = ConfigMapClient::connect(Some(&cluster.kubeconfig_admin()), None).await.expect("a kubeconfig");
    let key = |key: &str| ConfigMapKey { namespace: namespace.into(), name: "coredns".into(), key: key.into() };
    let read = client.read(&key("Corefile")).await.expect("it is there");
    assert_eq!(read.text, "one");
    client.replace(&key("Corefile"), &read, "two").await.expect("nobody else writes");
    assert_eq!(client.replace(&key("Corefile"), &read, "three").await, Err(ConfigMapError::Conflict));
    assert_eq!(corefile(cluster, namespace), "two");
    assert!(matches!(client.read(&key("nothing")).await, Err(ConfigMapError::NotFound(_))));
}
