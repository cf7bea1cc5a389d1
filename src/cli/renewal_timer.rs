//! The systemd timer that renews a certificate on a machine where no command runs.

use std::{
    env, fs, io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use super::joined::{is_root, user_config};

/// Exists where systemd is the init system (sd_booted(3)).
const SYSTEMD_RUNS: &str = "/run/systemd/system";

const SERVICE_FILE: &str = "gangplank-renew.service";
const TIMER_FILE: &str = "gangplank-renew.timer";

/// What to do where there is no timer.
const BY_HAND: &str =
    "every gangplank command renews the certificate; where none runs, run `gangplank renew` once a day";

/// Installs the timer where systemd is. Returns a line that says what was done, or what to do.
pub(super) fn install(config_dir: Option<&Path>) -> String {
    if !Path::new(SYSTEMD_RUNS).is_dir() {
        return format!("no timer was installed, because systemd does not run here: {BY_HAND}\n");
    }
    match install_units(config_dir) {
        Ok(dir) => format!("{TIMER_FILE} in {} renews it\n", dir.display()),
        Err(reason) => format!("no timer was installed: {reason}; {BY_HAND}\n"),
    }
}

fn install_units(config_dir: Option<&Path>) -> Result<PathBuf, String> {
    let binary = env::current_exe().map_err(|err| err.to_string())?;
    let (dir, user) = if is_root() {
        // systemd will run it as root.
        if let Some(path) = writable_by_others(&binary) {
            return Err(format!("others than root may write {}: install the binary in /usr/local/bin", path.display()));
        }
        (PathBuf::from("/etc/systemd/system"), false)
    } else {
        (user_config().ok_or("HOME is not set")?.join("systemd/user"), true)
    };
    write_units(&dir, &binary, config_dir).map_err(|err| format!("{}: {err}", dir.display()))?;
    let systemctl = |arguments: &[&str]| {
        let mut command = Command::new("systemctl");
        // Without an input: a question would wait for an answer that no script gives.
        command.args(user.then_some("--user")).args(arguments).stdin(Stdio::null());
        match command.output() {
            Ok(output) if output.status.success() => Ok(()),
            Ok(output) => Err(format!("systemctl: {}", String::from_utf8_lossy(&output.stderr).trim())),
            Err(err) => Err(format!("systemctl: {err}")),
        }
    };
    systemctl(&["daemon-reload"])?;
    systemctl(&["enable", "--now", TIMER_FILE])?;
    Ok(dir)
}

/// The program, or a directory above it, that others than root may change.
fn writable_by_others(binary: &Path) -> Option<&Path> {
    binary
        .ancestors()
        // Directories, too: who may rename the program's directory decides what root runs.
        .find(|path| path.metadata().is_ok_and(|metadata| metadata.uid() != 0 || metadata.mode() & 0o022 != 0))
}

fn write_units(dir: &Path, binary: &Path, config_dir: Option<&Path>) -> io::Result<()> {
    fs::create_dir_all(dir)?;
    fs::write(dir.join(SERVICE_FILE), service_unit(binary, config_dir))?;
    fs::write(dir.join(TIMER_FILE), TIMER_UNIT)
}

const TIMER_UNIT: &str = "\
[Unit]
Description=Renews the certificate of gangplank

[Timer]
OnBootSec=2min
OnUnitInactiveSec=1h
RandomizedDelaySec=10min

[Install]
WantedBy=timers.target
";

fn service_unit(binary: &Path, config_dir: Option<&Path>) -> String {
    let environment =
        config_dir.map(|dir| format!("Environment={}\n", quoted(&format!("GANGPLANK_CONFIG_DIR={}", dir.display()))));
    format!(
        "[Unit]\nDescription=Renews the certificate of gangplank\nWants=network-online.target\nAfter=network-online.target\n\n\
         [Service]\nType=oneshot\n{}ExecStart={} renew\n",
        environment.unwrap_or_default(),
        quoted(&binary.display().to_string())
    )
}

/// One word of a unit file (systemd.syntax(7)): `%` begins a specifier, `$` a variable.
fn quoted(text: &str) -> String {
    let escaped = text.replace('\\', "\\\\").replace('"', "\\\"").replace('%', "%%").replace('$', "$$");
    format!("\"{escaped}\"")
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn binary_that_others_may_change_is_found() {
        let dir = tempfile::tempdir().expect("a directory");
        let binary = dir.path().join("gangplank");
        fs::write(&binary, "").expect("written");
        // Also where this runs as root, and all above it is root's.
        fs::set_permissions(&binary, fs::Permissions::from_mode(0o757)).expect("ours");
        assert_eq!(writable_by_others(&binary), Some(&*binary));
        assert_eq!(writable_by_others(Path::new("/")), None);
    }

    #[test]
    fn units_name_the_binary_and_the_directory() {
        let dir = tempfile::tempdir().expect("a directory");
        let units = dir.path().join("systemd/user");
        write_units(&units, Path::new("/opt/50%/gangplank"), Some(Path::new("/run/a b"))).expect("written");
        let service = fs::read_to_string(units.join(SERVICE_FILE)).expect("there");
        assert!(service.contains("ExecStart=\"/opt/50%%/gangplank\" renew\n"), "{service}");
        assert!(service.contains("Environment=\"GANGPLANK_CONFIG_DIR=/run/a b\"\n"), "{service}");
        assert!(!service_unit(Path::new("/usr/bin/gangplank"), None).contains("Environment"));
        assert_eq!(fs::read_to_string(units.join(TIMER_FILE)).expect("there"), TIMER_UNIT);
    }

    /// By systemd's own checker, which CI has.
    #[test]
    fn systemd_has_no_complaint_about_the_units() {
        let dir = tempfile::tempdir().expect("a directory");
        let complaints = || {
            let units = [SERVICE_FILE, TIMER_FILE].map(|file| dir.path().join(file));
            let checked = Command::new("systemd-analyze").arg("verify").args(units).output().ok()?;
            let said = String::from_utf8_lossy(&checked.stderr).into_owned();
            let of_ours = said.lines().filter(|line| line.contains("gangplank-renew")).map(str::to_owned);
            Some(of_ours.collect::<Vec<_>>())
        };
        let binary = env::current_exe().expect("a test has a path");
        for config_dir in [None, Some(Path::new("/run/a b%"))] {
            write_units(dir.path(), &binary, config_dir).expect("written");
            let Some(found) = complaints() else {
                assert!(env::var_os("CI").is_none(), "systemd-analyze is missing");
                return;
            };
            assert_eq!(found, [""; 0]);
        }
        write_units(dir.path(), Path::new("/missing/gangplank"), None).expect("written");
        fs::write(dir.path().join(TIMER_FILE), TIMER_UNIT.replace("=1h", "=often")).expect("written");
        let found = complaints().expect("it was there").join("\n");
        assert!(found.contains("/missing/gangplank") && found.contains("often"), "{found}");
    }
}
