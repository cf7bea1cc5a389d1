//! Third-party programs; `make tools` installs them.

use std::{
    env,
    ffi::OsStr,
    io::{Write as _, stderr},
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    thread,
};

/// The repository.
pub(crate) const ROOT: &str = env!("CARGO_MANIFEST_DIR");

/// Where `tests/tools/install.sh` puts programs.
pub(crate) fn bin() -> PathBuf {
    Path::new(ROOT).join("target/tools/bin")
}

/// The program `name`. If it is missing, the test reports so and passes; in CI it fails.
pub(crate) fn require(name: &str) -> Option<PathBuf> {
    require_file(name, bin().join(name))
}

/// The Python that has grpcio.
pub(crate) fn require_python() -> Option<PathBuf> {
    require_file("python", Path::new(ROOT).join("target/tools/venv/bin/python"))
}

fn require_file(name: &str, path: PathBuf) -> Option<PathBuf> {
    if path.exists() {
        return Some(path);
    }
    not_run(&format!("{name} is missing: `make tools` installs it"));
    None
}

/// Reports which test did not run, and why. In CI that is a failure.
pub(crate) fn not_run(err: &str) {
    let current = thread::current();
    let said = format!("NOT RUN: {}: {err}", current.name().unwrap_or("a test"));
    assert!(env::var_os("CI").is_none(), "{said}");
    // To stderr itself: the harness captures `eprintln!` of tests that pass.
    let _ = writeln!(stderr(), "{said}");
}

/// What a program prints to stdout. A failure of the program fails the test.
pub(crate) fn stdout<S: AsRef<OsStr>>(program: &Path, arguments: impl IntoIterator<Item = S>) -> String {
    let mut command = Command::new(program);
    let Output { status, stdout, stderr } =
        command.args(arguments).stdin(Stdio::null()).output().expect("the program can be run");
    let stdout = String::from_utf8(stdout).expect("it prints UTF-8");
    assert!(status.success(), "{command:?}: {status}\n{stdout}\n{}", String::from_utf8_lossy(&stderr));
    stdout
}
