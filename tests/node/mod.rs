//! The chart on a real node, with kubelet, containerd, kube-proxy, CoreDNS and pods: `make node`.
//!
//! `tests/node/run` makes the node in namespaces of its own and runs these tests there, one after the other. Each installs
//! gangplank and takes it away again. Everywhere else they are ignored: they need root.

mod queries;

use std::{
    env, fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    thread,
    time::Instant,
};

use crate::support::tools::ROOT;
use queries::Queries;

/// Of the node, as `tests/node/outside` has them.
const COREDNS: &str = "10.96.0.10:53";

/// What `tests/node/run` says where its state is.
fn state() -> PathBuf {
    env::var_os("GANGPLANK_TEST_NODE").expect("`make node` runs this test, beside a node").into()
}

/// What a shell command printed to both, and whether it succeeded.
fn shell(command: &str) -> (String, bool) {
    let Output { status, stdout, .. } = Command::new("bash")
        .args(["-c", &format!("{{ {command}\n}} 2>&1")])
        .current_dir(ROOT)
        .stdin(Stdio::null())
        .output()
        .expect("there is a bash");
    (String::from_utf8(stdout).expect("it prints UTF-8"), status.success())
}

/// What a command that succeeds printed.
fn run(command: &str) -> String {
    let begun = Instant::now();
    let (printed, succeeded) = shell(command);
    assert!(succeeded, "`{command}` failed:\n{printed}");
    println!("{:5.1} s: {command}", begun.elapsed().as_secs_f64());
    printed
}

/// `command` as it is typed on the VM, a machine outside of the cluster.
fn on_vm(command: &str) -> String {
    let (file, settings) = (state().join("vm.sh"), state().join("vm"));
    fs::write(&file, command).expect("the state can be written");
    format!("GANGPLANK_CONFIG_DIR={} ip netns exec vm bash -e {}", settings.display(), file.display())
}

/// A page whose commands are for a cluster: each is run as it is, and what it prints is compared.
pub(crate) fn replay(page: &str) {
    let text = fs::read_to_string(Path::new(ROOT).join(page)).expect("a page is UTF-8");
    let installed = Installed;
    let (begun, mut token, mut commands) = (Instant::now(), None, 0);
    for step in crate::docs::steps(&text) {
        let command = crate::docs::with_token(&step.command, token.as_deref());
        let typed = if step.vm { on_vm(&command) } else { command.clone() };
        let since = Instant::now();
        let (printed, _) = shell(&typed);
        println!("{:5.1} s: {command}", since.elapsed().as_secs_f64());
        let settings = state().join("vm").display().to_string();
        let lines = |text: &str| text.trim_end().lines().map(masked).collect::<Vec<_>>();
        assert_eq!(
            lines(&step.printed.join("\n")),
            lines(&printed.replace(&settings, "CONFIG_DIR")),
            "{page}:{}: `{command}` printed:\n{printed}\n",
            step.line
        );
        token = crate::docs::printed_token(&printed).or(token);
        commands += 1;
    }
    assert!(commands > 5, "{page} shows commands");
    println!("{page}: {commands} commands, {:.0} s", begun.elapsed().as_secs_f64());
    nothing_is_left();
    drop(installed);
}

/// A line without what differs from run to run: also durations, the addresses that the cluster chooses, and the names of pods.
fn masked(line: &str) -> String {
    let chosen = |word: &str| {
        let pod = word.strip_prefix("gangplank-").is_some_and(|rest| rest.len() > 14 && rest.contains('-'));
        pod || (word.starts_with("10.96.") && !word.starts_with("10.96.0.")) || word.starts_with("10.244.")
    };
    let line = crate::docs::masked(line);
    let (mut masked, mut duration) = (Vec::new(), false);
    for word in line.split(' ') {
        masked.push(if chosen(word) || (duration && word.parse::<u32>().is_ok()) { "~" } else { word });
        duration = word == "after";
    }
    masked.join(" ")
}

/// An installed chart with `web.shop` registered, which is what the queries ask for. Taken away when it is dropped.
struct Installed;

impl Installed {
    /// From a folder with the chart.
    fn of(chart: &str) -> Self {
        let installed = Self;
        run(&format!("helm install gangplank {chart} -n gangplank --create-namespace"));
        run("kubectl rollout status deployment/gangplank -n gangplank --timeout=90s");
        run("kubectl create namespace shop");
        register("web", "10.250.1.2");
        run(
            "gangplank coredns --server $(kubectl get service gangplank-dns -n gangplank -o jsonpath='{.spec.clusterIP}'):53 \
             --apply --yes",
        );
        // Sooner than the kubelet and `reload` would.
        run("kubectl rollout restart deployment/coredns -n kube-system");
        run("kubectl rollout status deployment/coredns -n kube-system --timeout=60s");
        installed
    }
}

impl Drop for Installed {
    fn drop(&mut self) {
        if thread::panicking() {
            println!("{}", shell("kubectl get pods -A -o wide; kubectl get events -n gangplank | tail -n 40").0);
            println!(
                "{}",
                shell("kubectl logs -n gangplank -l app.kubernetes.io/component=server --prefix --tail 40").0
            );
        }
        for command in [
            "gangplank coredns --remove --yes",
            "helm uninstall gangplank -n gangplank --wait",
            "kubectl delete namespace gangplank shop",
        ] {
            shell(command);
        }
    }
}

/// By the pod that writes, as an operator does.
fn register(service: &str, address: &str) {
    let (writer, _) = writer_and_other();
    run(&format!(
        "kubectl exec -n gangplank {writer} -- gangplank register {service} {address} -n shop --port http=8080"
    ));
}

/// Where the processes are asked themselves: the Service, as kube-proxy leads to them.
fn service() -> SocketAddr {
    let address = run("kubectl get service gangplank-dns -n gangplank -o jsonpath='{.spec.clusterIP}'");
    format!("{address}:53").parse().expect("an address")
}

fn coredns() -> SocketAddr {
    COREDNS.parse().expect("an address")
}

/// Waits until two new pods are ready, and the old ones have ended: they answer while they drain.
fn rolled() {
    run("kubectl rollout status deployment/gangplank -n gangplank --timeout=120s");
    let pods = "kubectl get pods -n gangplank -l app.kubernetes.io/component=server -o name | wc -l";
    crate::support::wait_until("the old pods have ended", || (shell(pods).0.trim() == "2").then_some(()));
}

/// The pods, of which one has the Lease: `(holder, another)`.
fn writer_and_other() -> (String, String) {
    let lease = run("kubectl get lease gangplank-writer -n gangplank -o jsonpath='{.spec.holderIdentity}'");
    let pods = run(
        "kubectl get pods -n gangplank -l app.kubernetes.io/component=server -o jsonpath='{.items[*].metadata.name}'",
    );
    let (writer, others): (Vec<&str>, Vec<&str>) = pods.split_whitespace().partition(|&pod| lease.starts_with(pod));
    (writer.first().expect("one writes").to_string(), others.first().expect("another one follows").to_string())
}

/// The version before: the chart as it was when it was first there, or in the commit that the environment names.
fn chart_before() -> String {
    let folder = state().join("before");
    let first = "git log --diff-filter=A --format=%H -- deploy/helm/gangplank/Chart.yaml | tail -n 1";
    let commit = env::var("GANGPLANK_NODE_BEFORE").unwrap_or_else(|_| run(first));
    fs::create_dir_all(&folder).expect("the state can be written");
    run(&format!("git archive {} deploy/helm | tar -x -C {}", commit.trim(), folder.display()));
    folder.join("deploy/helm/gangplank").display().to_string()
}

/// Every answer is counted that CoreDNS gives, and the processes themselves.
#[test]
#[ignore = "needs root and containerd: make node"]
fn updates_lose_no_answer_and_kills_few() {
    let before = chart_before();
    let installed = Installed::of(&before);
    let servers = [("CoreDNS", coredns()), ("gangplank", service())];
    // The version before, this one, and back. Only CoreDNS is asked: the first chart let nobody ask for DNS over IPv4.
    for step in
        ["upgrade gangplank deploy/helm/gangplank", "rollback gangplank 1", "upgrade gangplank deploy/helm/gangplank"]
    {
        let queries = Queries::start(&servers[..1]);
        run(&format!("helm {step} -n gangplank"));
        rolled();
        queries.stop(step).assert_none_lost();
    }
    let queries = Queries::start(&servers);
    run("kubectl rollout restart deployment/gangplank -n gangplank");
    rolled();
    queries.stop("rollout restart").assert_none_lost();
    // What follows a kill is asked of whoever is left: nobody may say that the name does not exist.
    let (writer, other) = writer_and_other();
    for (pod, whose) in [(other, "that follows"), (writer, "that writes")] {
        let queries = Queries::start(&servers);
        run(&format!("kubectl delete pod {pod} -n gangplank --grace-period=0 --force"));
        rolled();
        queries.stop(&format!("pod {whose} deleted without grace")).assert_none_wrong();
    }
    let (writer, _) = writer_and_other();
    let queries = Queries::start(&servers);
    // Not its pod's first process, which has the same name in its environment.
    let of_pod = format!("grep -qz HOSTNAME={writer} /proc/$pid/environ && kill -9 $pid");
    run(&format!(
        "for pid in $(grep -lx gangplank /proc/[0-9]*/comm 2>/dev/null | cut -d/ -f3); do {of_pod} || :; done"
    ));
    rolled();
    wait_for_restart(&writer);
    queries.stop("kill -9 of the process that writes").assert_none_wrong();
    drop(installed);
    nothing_is_left();
}

fn wait_for_restart(pod: &str) {
    crate::support::wait_until("the container is started again and ready", || {
        let seen = format!(
            "kubectl get pod {pod} -n gangplank -o jsonpath='{{.status.containerStatuses[0].restartCount}} {{.status.containerStatuses[0].ready}}'"
        );
        (shell(&seen).0 == "1 true").then_some(())
    });
}

/// Of gangplank in the cluster.
fn nothing_is_left() {
    let kinds = run("kubectl api-resources --verbs=list -o name | grep -v events | paste -sd,");
    let (listed, _) = shell(&format!("kubectl get {} -A -o name 2>/dev/null | grep -i gangplank", kinds.trim()));
    assert_eq!(listed, "", "objects are left");
    let corefile = run("kubectl get configmap coredns -n kube-system -o jsonpath='{.data.Corefile}'");
    assert!(!corefile.contains("gangplank"), "{corefile}");
}
