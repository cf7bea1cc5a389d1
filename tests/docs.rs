//! Every `console` block of the README and of `docs/` is run against the real binary, and its output
//! compared.
//!
//! A page is one session from top to bottom. `make run` starts the server, on free ports, and
//! again on the same data; `kill -9 …` and `kill -TERM …` signal that server; every other command
//! is run by a shell. After `vm$` it is run on a machine that knows nothing of the server, where the last
//! token that was printed takes the place of the page's. Default ports in commands are replaced by the real ones, and back in their
//! output; generations, times and process ids compare as equal, and so do runs of blanks.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use tempfile::TempDir;

use crate::{
    identity::pki::TestCa,
    mirror, node,
    support::{
        server::{BINARY, Server},
        tools::{self, ROOT},
    },
};

/// The default drain time would only slow the tests down.
const QUICK: [&str; 2] = ["--drain", "100ms"];

#[test]
fn readme() {
    replay("README.md", &["dig", "nslookup"]);
}

#[test]
fn docs_registry_api() {
    if tools::require_python().is_none() {
        return;
    }
    replay("docs/registry-api.md", &["dig"]);
}

#[test]
fn docs_dns() {
    replay("docs/dns.md", &["dig"]);
}

#[test]
fn docs_joining() {
    replay("docs/joining.md", &["dig"]);
}

#[test]
fn docs_operations() {
    replay("docs/operations.md", &["dig", "curl"]);
}

#[test]
fn docs_troubleshooting() {
    replay("docs/troubleshooting.md", &[]);
}

#[test]
fn docs_architecture() {
    replay("docs/architecture.md", &["dig"]);
}

/// On a real node.
#[test]
#[ignore = "needs root and containerd: make node"]
fn docs_install() {
    node::replay("docs/install.md");
}

/// Rows of the form "file | functions | …".
#[test]
fn functions_of_the_walks_exist_in_their_files() {
    let page = fs::read_to_string(Path::new(ROOT).join("docs/architecture.md")).expect("a page is UTF-8");
    let rows = page.lines().filter(|line| line.starts_with("| `src/"));
    let mut functions = 0;
    for row in rows {
        let cells: Vec<&str> = row.split('|').map(str::trim).collect();
        let file = cells[1].trim_matches('`');
        let source = fs::read_to_string(Path::new(ROOT).join(file)).unwrap_or_else(|err| panic!("{file}: {err}"));
        for name in cells[2].split(", ").map(|cell| cell.trim_matches('`').trim_end_matches("()")) {
            assert!(
                source.contains(&format!("fn {name}(")) || source.contains(&format!("fn {name}<")),
                "{file}: {name}"
            );
            functions += 1;
        }
    }
    assert!(functions > 30, "{functions} functions");
}

#[test]
fn docs_kubernetes() {
    let Some(turn) = mirror::ClusterLock::take() else { return };
    let (mine, theirs) = (turn.cluster.kubeconfig_for_gangplank(), turn.cluster.kubeconfig_admin());
    let page =
        Page { kubeconfig: Some((mine, theirs)), kubectl: Some(turn.cluster.kubectl_folder()), ..Page::default() };
    page.replay("docs/kubernetes.md", &["dig"]);
}

/// The cluster's Corefile is that of kubeadm.
#[test]
fn docs_coredns() {
    let Some(turn) = mirror::ClusterLock::take() else { return };
    let corefile = concat!(
        "kind: ConfigMap\napiVersion: v1\nmetadata: {name: coredns, namespace: kube-system}\ndata:\n  Corefile: |\n",
        include_str!("fixtures/kubeadm.Corefile")
    );
    turn.cluster.apply(corefile);
    let (mine, theirs) = (turn.cluster.kubeconfig_for_gangplank(), turn.cluster.kubeconfig_admin());
    Page { kubeconfig: Some((mine, theirs)), ..Page::default() }.replay("docs/coredns.md", &[]);
}

/// With certificates of a CA like the reader's, and the policy as the page shows it.
#[test]
fn docs_security() {
    let files = tempfile::tempdir().expect("a directory");
    let ca = TestCa::new();
    let write = |name: &str, text: &str| fs::write(files.path().join(name), text).expect("a file");
    write("ca.crt", &ca.pem);
    for (name, user, groups) in
        [("server", "gangplank", &[][..]), ("vm-1", "vm-1", &[]), ("ada", "ada", &["operators"])]
    {
        let signed = ca.sign(user, groups);
        write(&format!("{name}.crt"), &signed.cert);
        write(&format!("{name}.key"), &signed.key);
    }
    let text = fs::read_to_string(Path::new(ROOT).join("docs/security.md")).expect("a page is UTF-8");
    let (_, policy) = text.split_once("```toml\n").expect("the page shows a policy");
    write("policy.toml", policy.split_once("```").expect("the block ends").0);
    let page = Page { folder: Some(files.path().to_owned()), ..Page::default() };
    page.replay("docs/security.md", &["curl"]);
}

#[test]
fn every_page_is_replayed_and_has_next_steps() {
    for entry in fs::read_dir(Path::new(ROOT).join("docs")).expect("there is a folder of pages") {
        let page = entry.expect("it can be read").file_name().into_string().expect("ASCII");
        let replayed = include_str!("docs.rs").contains(&format!("replay(\"docs/{page}\""));
        assert!(replayed, "docs/{page} is replayed by no test");
        let text = fs::read_to_string(Path::new(ROOT).join("docs").join(&page)).expect("a page is UTF-8");
        let last = text.lines().rfind(|line| line.starts_with("## ")).unwrap_or_default();
        assert_eq!(last, "## Next", "the last section of docs/{page}");
    }
}

#[test]
fn every_make_command_that_a_page_names_exists() {
    let makefile = fs::read_to_string(Path::new(ROOT).join("Makefile")).expect("there is a Makefile");
    for page in ["README.md", "CONTRIBUTING.md", "docs/operations.md"] {
        let text = fs::read_to_string(Path::new(ROOT).join(page)).expect("a page is UTF-8");
        let named = text.match_indices("make ").map(|(at, make)| {
            let rest = &text[at + make.len()..];
            (&text[..at], &rest[..rest.find(|c: char| !c.is_ascii_lowercase() && c != '-').unwrap_or(rest.len())])
        });
        let mut commands = 0;
        for (_, name) in named.filter(|(before, name)| before.ends_with(['`', '\n']) && !name.is_empty()) {
            assert!(makefile.contains(&format!("\n{name}:")), "{page} names `make {name}`");
            commands += 1;
        }
        assert!(commands > 0, "{page} names commands");
    }
}

/// One command and what the page says it prints.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Step {
    pub(crate) line: usize,
    pub(crate) command: String,
    /// Whether it is typed on a machine that joins.
    pub(crate) vm: bool,
    pub(crate) printed: Vec<String>,
}

fn replay(page: &str, needed: &[&str]) {
    Page { vm: TempDir::new().ok(), ..Page::default() }.replay(page, needed);
}

/// What the commands of a page run with.
#[derive(Debug, Default)]
struct Page {
    /// Gangplank's and the reader's.
    kubeconfig: Option<(PathBuf, PathBuf)>,
    kubectl: Option<PathBuf>,
    /// Where its commands run, and its files are; else in the project's root.
    folder: Option<PathBuf>,
    /// The configuration of the machine that joins.
    vm: Option<TempDir>,
}

impl Page {
    fn replay(&self, page: &str, needed: &[&str]) {
        if needed.iter().any(|tool| tools::require(tool).is_none()) {
            return;
        }
        let text = fs::read_to_string(Path::new(ROOT).join(page)).expect("a page is UTF-8");
        let steps = steps(&text);
        assert!(steps.len() > 2, "{page} shows commands");
        let (mut server, mut exported): (Option<Server>, Vec<(String, String)>) = (None, Vec::new());
        let mut token = None;
        for Step { line, command, vm, printed } in steps {
            let command = with_token(&command, token.as_deref());
            // A machine that joins knows nothing of the server.
            let set = if vm { Vec::new() } else { server_variables(server.as_ref()) };
            let (out, real) = self.carry_out(&command, &set, &mut server, &mut exported);
            token = printed_token(&real).or(token);
            let real = real.replace(&self.vm_dir(), "CONFIG_DIR");
            let real = if let Some(server) = &server { as_documented(&real, server) } else { real };
            let lines = |text: &str| text.trim_end().lines().map(masked).collect::<Vec<_>>();
            let (shown, got) = (lines(&printed.join("\n")), lines(&real));
            assert_eq!(shown, got, "{page}:{line}: `{command}` ({out}) printed:\n{real}\n");
        }
    }

    /// The flags of a server that a page starts, with the paths of this run.
    fn flags(&self, command: &str) -> Vec<String> {
        // Where the tests start every server.
        let command = command.replace(" --grpc-listen 127.0.0.1:9080", "").replace(":9443", ":0");
        let words = command.split_whitespace().skip(2).filter(|&word| word != "\\");
        let path = |word: &str| match (&self.kubeconfig, &self.folder) {
            (Some((kubeconfig, _)), _) if word == "~/.kube/config" => kubeconfig.clone(),
            (_, Some(folder)) if folder.join(word).exists() => folder.join(word),
            _ => word.into(),
        };
        words.map(|word| path(word).into_os_string().into_string().expect("a path in UTF-8")).collect()
    }

    fn vm_dir(&self) -> String {
        self.vm.as_ref().map_or_else(|| "no machine joins".into(), |dir| dir.path().display().to_string())
    }

    /// How it ended, and what it printed on stdout and stderr.
    fn carry_out(
        &self,
        command: &str,
        variables: &[(&str, String)],
        server: &mut Option<Server>,
        exported: &mut Vec<(String, String)>,
    ) -> (String, String) {
        match command {
            "make run" => {
                let started = server.take().map_or_else(|| Server::start_with(&QUICK), Server::restart);
                let greeting = started.greeting.join("\n");
                *server = Some(started);
                ("started".into(), greeting)
            }
            serve if serve.starts_with("gangplank serve ") => {
                let flags = self.flags(serve);
                let flags: Vec<&str> = flags.iter().map(String::as_str).chain(QUICK).collect();
                let started = Server::start_with(&flags);
                let greeting = started.greeting.join("\n");
                *server = Some(started);
                ("started".into(), greeting)
            }
            signal if signal.starts_with("kill -") => {
                let server = server.as_mut().expect("the page starts the server first");
                match signal {
                    "kill -9 $(pidof gangplank)" => server.kill9(),
                    "kill -TERM $(pidof gangplank)" => {
                        assert!(server.terminate().success(), "it ends with exit code 0");
                    }
                    other => panic!("the test does not know the signal of `{other}`"),
                }
                ("signalled".into(), String::new())
            }
            export if export.starts_with("export GANGPLANK_") => {
                let server = server.as_ref().expect("the page starts the server first");
                let variables = as_running(export, server);
                let variables =
                    variables.split_whitespace().skip(1).map(|word| word.split_once('=').expect("NAME=VALUE"));
                exported.extend(variables.map(|(name, value)| (name.to_owned(), value.to_owned())));
                ("exported".into(), String::new())
            }
            command => {
                let server = server.as_ref().expect("the page starts the server first");
                let command = format!("{{ {}\n}} 2>&1", as_running(command, server));
                let programs = Path::new(BINARY).parent().expect("a file is in a folder");
                let mut path = format!("{}:{}", programs.display(), tools::bin().display());
                path.extend(self.kubectl.iter().map(|folder| format!(":{}", folder.display())));
                path.extend(std::env::var("PATH").map(|rest| format!(":{rest}")));
                let theirs = self.kubeconfig.iter().map(|(_, theirs)| ("KUBECONFIG", theirs));
                let output = Command::new("bash")
                    .args(["-c", &command])
                    .env("PATH", path)
                    .envs(theirs)
                    .env("GANGPLANK_CONFIG_DIR", self.vm_dir())
                    .envs(variables.iter().map(|(name, value)| (name, value)))
                    .env("GANGPLANK_DNS", server.dns.to_string())
                    .envs(exported.iter().map(|(name, value)| (name, value)))
                    .current_dir(self.folder.as_deref().unwrap_or_else(|| Path::new(ROOT)))
                    .stdin(Stdio::null())
                    .output()
                    .expect("there is a bash");
                (output.status.to_string(), String::from_utf8(output.stdout).expect("it prints UTF-8"))
            }
        }
    }
}

/// The commands of all `console` blocks. A line that ends in `\` goes on in the next.
pub(crate) fn steps(page: &str) -> Vec<Step> {
    let mut steps: Vec<Step> = Vec::new();
    let (mut inside, mut open) = (false, false);
    for (number, line) in (1..).zip(page.lines()) {
        if line.starts_with("```") {
            inside = !inside && line == "```console";
            open = false;
        } else if inside && open {
            let step = steps.last_mut().expect("it was opened");
            step.command.push('\n');
            step.command.push_str(line);
            open = line.ends_with('\\');
        } else if let Some((prompt, command)) =
            line.split_once("$ ").filter(|(prompt, _)| inside && ["", "vm"].contains(prompt))
        {
            let vm = prompt == "vm";
            steps.push(Step { line: number, command: command.to_owned(), vm, printed: Vec::new() });
            open = line.ends_with('\\');
        } else if inside {
            steps.last_mut().expect("a block begins with a command").printed.push(line.to_owned());
        }
    }
    steps
}

/// How a command on the server's machine finds it.
fn server_variables(server: Option<&Server>) -> Vec<(&'static str, String)> {
    server.map(|server| ("GANGPLANK_SERVER", format!("http://{}", server.grpc))).into_iter().collect()
}

/// The join token in what was printed.
pub(crate) fn printed_token(text: &str) -> Option<String> {
    text.split_whitespace().find(|word| word.starts_with("gp1.")).map(str::to_owned)
}

/// A command with `token` in the place of the page's.
pub(crate) fn with_token(command: &str, token: Option<&str>) -> String {
    let real = |word| if str::starts_with(word, "gp1.") { token.unwrap_or(word) } else { word };
    command.split(' ').map(real).collect::<Vec<_>>().join(" ")
}

/// Documented port and real port of each listener.
fn ports(server: &Server) -> [(&'static str, String); 3] {
    [("9080", server.grpc), ("1053", server.dns), ("9153", server.admin)]
        .map(|(documented, real)| (documented, real.port().to_string()))
}

fn as_running(command: &str, server: &Server) -> String {
    ports(server).iter().fold(command.to_owned(), |command, (documented, real)| command.replace(documented, real))
}

fn as_documented(printed: &str, server: &Server) -> String {
    let printed = printed.replace(&server.data_dir().display().to_string(), "DATA_DIR");
    let printed = ports(server).iter().fold(printed, |printed, (documented, real)| printed.replace(real, documented));
    // A second gRPC listener.
    let second = server.greeting.iter().filter(|line| line.starts_with("listening grpc ")).nth(1);
    match second.and_then(|line| line.rsplit(':').next()) {
        Some(port) => printed.replace(port, "9443"),
        None => printed,
    }
}

/// A line without what differs from run to run.
pub(crate) fn masked(line: &str) -> String {
    let word = |word: &str| {
        let bare = word.trim_matches(|c: char| "\",:;()".contains(c));
        let digits = bare.chars().filter(char::is_ascii_digit).count();
        let age = bare.len() > 1
            && bare.ends_with(['s', 'm'])
            && bare.trim_end_matches(|c: char| "ums".contains(c)).chars().all(|c| c.is_ascii_digit() || c == '.');
        let generation = digits >= 10 && digits == bare.len();
        let time = bare.len() >= 20 && bare.contains('T') && bare.ends_with('Z');
        // A token, its id, and the name of who joined with it.
        let hexadecimal = |text: &str| !text.is_empty() && text.chars().all(|c| c.is_ascii_hexdigit());
        let id = bare.len() == 16 && hexadecimal(bare);
        let registrant = bare.strip_prefix("gangplank:registrant:").is_some_and(hexadecimal);
        if age || generation || time || id || registrant || bare.starts_with("gp1.") {
            word.replace(bare, "~")
        } else {
            word.to_owned()
        }
    };
    line.split_whitespace().map(word).collect::<Vec<_>>().join(" ")
}

#[test]
fn commands_and_outputs_of_a_page_are_found() {
    let page = "```sh\n$ not this\n```\n```console\n$ a \\\n  b\nx  1\n\ny\n$ c\n```\n";
    let step = |line, command: &str, printed: &[&str]| Step {
        line,
        command: command.into(),
        vm: false,
        printed: printed.iter().map(|&line| line.to_owned()).collect(),
    };
    assert_eq!(steps(page), [step(5, "a \\\n  b", &["x  1", "", "y"]), step(10, "c", &[])]);
    assert_eq!(masked("registered, generation 1795256400"), "registered, generation ~");
    assert_eq!(masked("web   2  12s"), "web 2 ~");
    assert_eq!(masked("a 5 IN A 10.0.0.1 1234.5"), "a 5 IN A 10.0.0.1 1234.5");
}
