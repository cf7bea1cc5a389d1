//! What `deploy/` has for a container and for a machine: the image, and the unit of systemd.

use std::{
    fs,
    path::Path,
    process::{Command, Output, Stdio},
};

use serde_json::Value;
use sha2::{Digest as _, Sha256};

use crate::support::{
    server::BINARY,
    tools::{self, ROOT, stdout},
};

fn make_image(binary: &Path, out: &Path) -> Output {
    let mut command = Command::new("python3");
    command.arg(Path::new(ROOT).join("deploy/image.py")).arg(binary).arg("gangplank:test").arg(out);
    command.stdin(Stdio::null()).output().expect("there is a Python")
}

#[test]
fn image_holds_the_program_and_nothing_else() {
    // A program without a loader, whatever it does.
    let Some(program) = tools::require("lookup-musl") else { return };
    let folder = tempfile::tempdir().expect("a directory");
    let [image, again] = ["image.tar", "again.tar"].map(|name| folder.path().join(name));
    for out in [&image, &again] {
        let made = make_image(&program, out);
        assert!(made.status.success(), "{made:?}");
    }
    let read = |path: &Path| fs::read(path).expect("it was written");
    assert!(read(&image) == read(&again), "the same program makes the same image");

    let unpacked = folder.path().join("unpacked");
    fs::create_dir(&unpacked).expect("a directory");
    let tar = |arguments: &[&str]| stdout(Path::new("tar"), arguments);
    let text = |path: &Path| path.to_str().expect("UTF-8").to_owned();
    tar(&["-xf", &text(&image), "-C", &text(&unpacked)]);
    // Every blob is what its name says.
    let blob = |descriptor: &Value| {
        let digest = descriptor["digest"].as_str().expect("a digest").strip_prefix("sha256:").expect("SHA-256");
        let path = unpacked.join("blobs/sha256").join(digest);
        let data = read(&path);
        let real: String = Sha256::digest(&data).iter().map(|octet| format!("{octet:02x}")).collect();
        assert_eq!((real.as_str(), descriptor["size"].as_u64()), (digest, Some(data.len() as u64)));
        (path, data)
    };
    let json = |data: &[u8]| serde_json::from_slice::<Value>(data).expect("JSON");
    let index = json(&read(&unpacked.join("index.json")));
    assert_eq!(json(&read(&unpacked.join("oci-layout")))["imageLayoutVersion"], "1.0.0");
    let manifest = json(&blob(&index["manifests"][0]).1);
    let config = json(&blob(&manifest["config"]).1);
    let (layer, _) = blob(&manifest["layers"][0]);
    assert_eq!(config["rootfs"]["diff_ids"][0], manifest["layers"][0]["digest"]);
    assert_eq!(tar(&["-tf", &text(&layer)]), "usr/\nusr/bin/\nusr/bin/gangplank\n");
    tar(&["-xf", &text(&layer), "-C", &text(folder.path())]);
    assert!(read(&folder.path().join("usr/bin/gangplank")) == read(&program));

    // As the Dockerfile says.
    let dockerfile = fs::read_to_string(Path::new(ROOT).join("deploy/Dockerfile")).expect("it is there");
    let run = &config["config"];
    for (line, said) in [
        ("ENTRYPOINT", run["Entrypoint"].to_string()),
        ("USER", run["User"].as_str().expect("text").to_owned()),
        ("ENV", run["Env"][0].as_str().expect("text").to_owned()),
    ] {
        assert!(dockerfile.lines().any(|one| one == format!("{line} {said}")), "{line} {said}");
    }

    let refused = make_image(Path::new(BINARY), &folder.path().join("refused.tar"));
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success() && said.contains("needs a dynamic loader"), "{said}");
}

/// systemd's own judgement; `None` if it is not here, which is reported.
fn systemd(arguments: &[&str], unit: &Path) -> Option<(bool, String)> {
    let mut command = Command::new("systemd-analyze");
    let Ok(output) = command.args(arguments).arg(unit).stdin(Stdio::null()).output() else {
        tools::not_run("systemd-analyze is missing");
        return None;
    };
    let said = [output.stdout, output.stderr].concat();
    Some((output.status.success(), String::from_utf8_lossy(&said).into_owned()))
}

#[test]
fn unit_of_systemd_is_hardened() {
    let unit = Path::new(ROOT).join("deploy/systemd/gangplank.service");
    // Exposure in tenths, 0..=100; systemd calls 20 and less "OK", and a unit without any of this 96 "UNSAFE".
    let Some((hardened, said)) = systemd(&["security", "--offline=true", "--threshold=13"], &unit) else { return };
    assert!(hardened, "{said}");
    let folder = tempfile::tempdir().expect("a directory");
    let text = fs::read_to_string(&unit).expect("it is there");
    let soft = folder.path().join("gangplank.service");
    fs::write(&soft, text.replace("PrivateUsers=yes\n", "").replace("SystemCallFilter=@system-service\n", ""))
        .expect("written");
    let (hardened, said) = systemd(&["security", "--offline=true", "--threshold=13"], &soft).expect("it is here");
    assert!(!hardened, "{said}");

    // No complaint, where the program is; it knows the command.
    let here = text.replace("/usr/bin/gangplank", BINARY);
    fs::write(&soft, &here).expect("written");
    let complaints = |said: &str| said.lines().filter(|line| line.contains("gangplank.service")).count();
    let (_, said) = systemd(&["verify"], &soft).expect("it is here");
    assert_eq!(complaints(&said), 0, "{said}");
    fs::write(&soft, here.replace("RestartSec=1s", "RestartSec=soon")).expect("written");
    let (_, said) = systemd(&["verify"], &soft).expect("it is here");
    assert_eq!(complaints(&said), 1, "{said}");
    let command = text.lines().find_map(|line| line.strip_prefix("ExecStart=/usr/bin/gangplank ")).expect("a command");
    let known =
        Command::new(BINARY).args(command.split(' ')).arg("--help").env_clear().output().expect("it can be run");
    assert!(known.status.success(), "{known:?}");
}
