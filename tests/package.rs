//! What a package installs beside the program, completions and manual pages, and the Debian package itself.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
    process::{Command, Output, Stdio},
};

use crate::support::{
    server::BINARY,
    tools::{self, ROOT, stdout},
};

fn gangplank(arguments: &[&str]) -> String {
    let output = Command::new(BINARY).args(arguments).stdin(Stdio::null()).output().expect("it can be run");
    assert!(output.status.success(), "{arguments:?}: {output:?}");
    String::from_utf8(output.stdout).expect("UTF-8")
}

/// What `bash` offers for `words`, of which the last is not finished.
fn completed(words: &[&str]) -> BTreeSet<String> {
    let script = r#"
        source "$1"; shift
        COMP_WORDS=("$@") COMP_CWORD=$(($# - 1)) COMP_LINE="$*" COMP_POINT=${#COMP_LINE}
        function=$(complete -p gangplank); function=${function##* -F }; function=${function%% *}
        "$function" gangplank "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD - 1]}"
        printf '%s\n' "${COMPREPLY[@]}""#;
    let folder = tempfile::tempdir().expect("a directory");
    let file = folder.path().join("gangplank.bash");
    fs::write(&file, gangplank(&["completions", "bash"])).expect("written");
    let mut bash = Command::new("bash");
    bash.args(["--norc", "-euc", script, "bash"]).arg(&file).args(words).stdin(Stdio::null());
    let output = bash.output().expect("there is a bash");
    assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
    String::from_utf8(output.stdout).expect("UTF-8").lines().map(str::to_owned).collect()
}

/// The commands that `--help` lists.
fn commands(of: &[&str]) -> Vec<String> {
    let help = gangplank(&[of, &["--help"]].concat());
    let Some((_, list)) = help.split_once("\nCommands:\n") else { return Vec::new() };
    let list = list.split("\n\n").next().unwrap_or_default();
    let names = list.lines().filter(|line| !line.starts_with("   ")).filter_map(|line| line.split_whitespace().next());
    names.filter(|name| *name != "help").map(str::to_owned).collect()
}

#[test]
fn bash_completes_commands_and_flags() {
    let set = |words: &[&str]| words.iter().map(|&word| word.to_owned()).collect::<BTreeSet<_>>();
    assert_eq!(completed(&["gangplank", "dereg"]), set(&["deregister"]));
    assert_eq!(completed(&["gangplank", "token", "cr"]), set(&["create"]));
    assert_eq!(completed(&["gangplank", "serve", "--data-d"]), set(&["--data-dir"]));
    assert_eq!(completed(&["gangplank", "ls", "-o", "js"]), set(&["json"]));
    assert!(completed(&["gangplank", ""]).is_superset(&commands(&[]).into_iter().collect()));
}

#[test]
fn other_shells_get_every_command() {
    for (shell, first) in [("zsh", "#compdef gangplank"), ("fish", "# ")] {
        let script = gangplank(&["completions", shell]);
        assert!(script.starts_with(first), "{shell}: {}", script.lines().next().unwrap_or_default());
        for command in commands(&[]) {
            assert!(script.contains(&command), "{shell}: {command}");
        }
        // Its own judgement, where it is installed.
        let file = tempfile::NamedTempFile::new().expect("a file");
        fs::write(file.path(), script).expect("written");
        if let Ok(output) = Command::new(shell).arg("-n").arg(file.path()).stdin(Stdio::null()).output() {
            assert!(output.status.success(), "{output:?}");
        }
    }
}

#[test]
fn every_command_has_a_page() {
    let folder = tempfile::tempdir().expect("a directory");
    let directory = folder.path().join("man1");
    gangplank(&["man", "--directory", directory.to_str().expect("UTF-8")]);
    let files: BTreeSet<String> = fs::read_dir(&directory)
        .expect("it was made")
        .map(|entry| entry.expect("it can be read").file_name().into_string().expect("UTF-8"))
        .collect();
    let mut expected = BTreeSet::from(["gangplank.1".to_owned()]);
    for command in commands(&[]) {
        for below in commands(&[&command]) {
            expected.insert(format!("gangplank-{command}-{below}.1"));
        }
        expected.insert(format!("gangplank-{command}.1"));
    }
    assert!(expected.len() > 15 && expected.contains("gangplank-token-create.1"), "{expected:?}");
    assert_eq!(files, expected);
    for file in &files {
        let page = fs::read_to_string(directory.join(file)).expect("UTF-8");
        for section in [".SH NAME", ".SH SYNOPSIS", ".SH DESCRIPTION"] {
            assert!(page.contains(section), "{file} has no {section}");
        }
        // Nothing of the machine that makes the package.
        let here = std::env::var("HOME").expect("there is a home");
        assert!(here.len() < 4 || !page.contains(&here), "{file} names {here}");
    }
    let serve = fs::read_to_string(directory.join("gangplank-serve.1")).expect("UTF-8");
    assert!(serve.contains("GANGPLANK_DATA_DIR") && serve.contains(r"\-\-data\-dir"), "{serve}");
    let printed = gangplank(&["man", "token", "create"]);
    assert_eq!(printed, fs::read_to_string(directory.join("gangplank-token-create.1")).expect("UTF-8"));
    let unknown = Command::new(BINARY).args(["man", "nothing"]).output().expect("it can be run");
    assert_eq!(unknown.status.code(), Some(3), "{unknown:?}");
}

/// groff's own judgement, with every warning.
#[test]
fn pages_are_set_without_a_warning() {
    let folder = tempfile::tempdir().expect("a directory");
    gangplank(&["man", "--directory", folder.path().to_str().expect("UTF-8")]);
    let mut with_examples = 0;
    for entry in fs::read_dir(folder.path()).expect("it was made") {
        let file = entry.expect("it can be read").path();
        let mut groff = Command::new("groff");
        groff.args(["-man", "-ww", "-Kutf8", "-Tutf8", "-P-cbou"]).arg(&file);
        let Ok(output) = groff.stdin(Stdio::null()).output() else {
            return tools::not_run("groff is missing");
        };
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && said.is_empty(), "{}: {said}", file.display());
        let shown = String::from_utf8(output.stdout).expect("UTF-8");
        assert!(shown.contains("SYNOPSIS"), "{shown}");
        // What follows the flags in --help keeps its lines.
        if fs::read_to_string(&file).expect("UTF-8").contains("Exit codes:") {
            let line = |start: &str| shown.lines().any(|line| line.trim_start().starts_with(start));
            assert!(line("Examples:") && line("gangplank ") && line("Exit codes:"), "{shown}");
            with_examples += 1;
        }
    }
    assert!(with_examples > 10, "{with_examples} pages have examples");
}

/// Runs `script` as root of a copy of this machine, whose parts are in memory and go with it, and which has `file` as
/// `/tmp/package.deb`. `None` where the kernel does not allow that, which is reported.
fn in_a_copy_of_the_machine(script: &str, file: &Path) -> Option<Output> {
    // Not one overlay over `/`: what is mounted below it cannot be taken along.
    let enter = r#"
        scratch=$1 root=$1/root
        mount -t tmpfs none "$scratch" &&
        mkdir -p "$scratch"/{upper,work} "$root"/{usr,etc,var/lib,var/log,dev,proc,run,tmp} &&
        mount -t overlay none -o "lowerdir=/usr,upperdir=$scratch/upper,workdir=$scratch/work" "$root/usr" &&
        mount -t proc none "$root/proc" && touch "$root/dev/null" && mount --bind /dev/null "$root/dev/null" &&
        cp -P /bin /sbin /lib* "$root/" && cp -r /var/lib/dpkg "$root/var/lib/" && cp "$2" "$root/tmp/package.deb" || exit 77
        cp -r /etc/. "$root/etc/" 2>/dev/null || true # without what only the real root may read
        # Such an overlay cannot rename folders, which dpkg does with new ones.
        dpkg-deb --fsys-tarfile "$2" | tar -tf - | grep '/$' | (cd "$root" && xargs mkdir -p)
        exec chroot "$root" bash -euc "$3""#;
    let scratch = tempfile::tempdir().expect("a directory");
    let mut unshare = Command::new("unshare");
    unshare.args(["--map-root-user", "--mount", "--pid", "--fork", "bash", "-c", enter, "bash"]).arg(scratch.path());
    unshare.arg(file).arg(script).env("LC_ALL", "C").env("DEBIAN_FRONTEND", "noninteractive");
    let output = unshare.stdin(Stdio::null()).output().expect("there is an unshare");
    if [Some(77), Some(1)].contains(&output.status.code()) && output.stdout.is_empty() {
        tools::not_run(&format!("no copy of this machine: {}", String::from_utf8_lossy(&output.stderr)));
        return None;
    }
    Some(output)
}

#[test]
fn debian_package_is_installed_and_purged() {
    let Some(_) = tools::require("cargo-deb") else { return };
    if Command::new("dpkg-deb").arg("--version").output().is_err() {
        return tools::not_run("dpkg is missing");
    }
    let folder = tempfile::tempdir().expect("a directory");
    let package = folder.path().join("gangplank.deb");
    // The program of these tests, so that nothing is built.
    let made = Command::new(Path::new(ROOT).join("deploy/deb.sh"))
        .args([Path::new(BINARY), &package])
        .args(["--fast", "--profile", "dev"])
        .stdin(Stdio::null())
        .output()
        .expect("it can be run");
    assert!(made.status.success(), "{made:?}");
    let dpkg = |arguments: &[&str]| stdout(Path::new("dpkg-deb"), arguments.iter().map(Path::new).chain([&*package]));
    let fields = dpkg(&["--info"]);
    for field in [
        "Package: gangplank".to_owned(),
        format!("Version: {}-1", env!("CARGO_PKG_VERSION")),
        "Section: net".into(),
        "Description: DNS inside Kubernetes".into(),
    ] {
        assert!(fields.contains(&field), "{field}: {fields}");
    }
    // That of these tests is linked with glibc; the one of `make deb` needs nothing.
    assert!(fields.contains("Depends: libc6"), "{fields}");
    // The unit is stopped before it is removed, and an update restarts it if it runs.
    for script in ["postinst", "prerm", "postrm"] {
        assert!(fields.contains(script), "{script}: {fields}");
    }
    let listed = dpkg(&["--contents"]);
    let files: BTreeMap<&str, &str> = listed
        .lines()
        .filter(|line| !line.ends_with('/'))
        .map(|line| (line.rsplit_once(" ./").expect("a path").1, &line[..10]))
        .collect();
    let pages = files.keys().filter(|file| file.starts_with("usr/share/man/man1/gangplank")).count();
    assert!(pages > 15, "{pages} pages: {listed}");
    for (file, mode) in [
        ("usr/bin/gangplank", "-rwxr-xr-x"),
        ("etc/default/gangplank", "-rw-r--r--"),
        ("usr/lib/systemd/system/gangplank.service", "-rw-r--r--"),
        ("usr/share/man/man1/gangplank-token-create.1.gz", "-rw-r--r--"),
        ("usr/share/bash-completion/completions/gangplank", "-rw-r--r--"),
        ("usr/share/zsh/vendor-completions/_gangplank", "-rw-r--r--"),
        ("usr/share/fish/vendor_completions.d/gangplank.fish", "-rw-r--r--"),
        ("usr/share/doc/gangplank/copyright", "-rw-r--r--"),
        ("usr/share/doc/gangplank/changelog.Debian.gz", "-rw-r--r--"),
        ("usr/share/doc/gangplank/examples/alerts.yaml", "-rw-r--r--"),
    ] {
        assert_eq!(files.get(file), Some(&mode), "{file}: {listed}");
    }
    let script = r#"
        exec 2>&1
        dpkg --no-triggers --install /tmp/package.deb && dpkg --verify gangplank && dpkg-query --show --showformat='${Status}\n' gangplank
        gangplank --version
        set -a && . /etc/default/gangplank && gangplank serve --help >/tmp/help
        echo '# ours' >>/etc/default/gangplank && mkdir -p /var/lib/gangplank
        dpkg --no-triggers --remove gangplank && tail -1 /etc/default/gangplank && ! test -e /usr/bin/gangplank
        dpkg --no-triggers --purge gangplank && ! test -e /etc/default/gangplank && test -d /var/lib/gangplank
        ! dpkg-query --listfiles gangplank >/dev/null 2>&1 && echo purged"#;
    let Some(output) = in_a_copy_of_the_machine(script, &package) else { return };
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{output:?}");
    let version = format!("gangplank {}", env!("CARGO_PKG_VERSION"));
    for line in ["install ok installed", &version, "# ours", "purged"] {
        assert!(said.lines().any(|said| said == line), "no {line} in {said}");
    }
}
