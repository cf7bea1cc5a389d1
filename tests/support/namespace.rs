//! A network namespace for one test: whatever the test does to interfaces and addresses, nobody else
//! notices.

use std::{
    env,
    io::Write as _,
    process::{Command, Stdio},
};

use super::tools;

/// Set inside of a namespace, to the test's name.
const INSIDE: &str = "GANGPLANK_TEST_NAMESPACE";

/// Whether the caller is inside of its own namespace, as root of it. If not, this runs `test`, the
/// caller's whole name, in one, in a process of its own, and reports where that is not permitted.
pub(crate) fn entered(test: &str) -> bool {
    if env::var_os(INSIDE).is_some_and(|inside| inside == test) {
        return true;
    }
    let unshare = || {
        let mut command = Command::new("unshare");
        command.args(["--map-root-user", "--net", "--"]).stdin(Stdio::null());
        command
    };
    if !unshare().args(["ip", "link", "set", "lo", "up"]).output().is_ok_and(|output| output.status.success()) {
        tools::not_run("network namespaces need unshare, ip and the permission to make one");
        return false;
    }
    let output = unshare()
        .arg(env::current_exe().expect("a test has a path"))
        .args([test, "--exact", "--nocapture"])
        .env(INSIDE, test)
        .output()
        .expect("it could be run before");
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said);
    println!("{said}");
    assert!(output.status.success() && said.contains("1 passed"), "the test failed in its namespace");
    false
}

/// Runs commands of ip(8), one each, in the caller's namespace.
pub(crate) fn ip<S: AsRef<str>>(commands: impl IntoIterator<Item = S>) {
    let mut ip =
        Command::new("ip").args(["-batch", "-"]).stdin(Stdio::piped()).spawn().expect("it could be run before");
    let mut stdin = ip.stdin.take().expect("it is piped");
    for command in commands {
        writeln!(stdin, "{}", command.as_ref()).expect("it reads");
    }
    drop(stdin);
    assert!(ip.wait().expect("it ends").success(), "ip(8) says why");
}
