//! What a person sees of TLS: commands with certificates, and what they say when something is wrong.

use std::process::{Command, Output};

use super::{Credential, SecuredServer, TestCa};
use crate::support::{secrets, server::BINARY};

impl SecuredServer {
    /// Runs a command that shows `credential` to the server.
    fn run_as(&self, credential: Option<&Credential>, ca: &str, arguments: &[&str]) -> Output {
        let mut command = Command::new(BINARY);
        command.args(arguments).env("GANGPLANK_SERVER", self.url()).env("GANGPLANK_CACERT", self.file(ca));
        if let Some(Credential { cert, key }) = credential {
            secrets::remember(key);
            command.env("GANGPLANK_CERT", self.write("client.crt", cert));
            command.env("GANGPLANK_KEY", self.write("client.key", key));
        }
        command.output().expect("the binary can be run")
    }
}

#[test]
fn commands_show_a_certificate() {
    let secured = SecuredServer::start();
    let vm = secured.ca.sign("vm-1", &[]);
    let registered = secured.run_as(Some(&vm), "ca.crt", &["register", "web", "10.1.0.1", "-n", "shop"]);
    assert!(registered.status.success(), "{registered:?}");
    let listed = secured.run_as(Some(&secured.ca.sign("ada", &["ops"])), "ca.crt", &["ls", "-A"]);
    assert!(String::from_utf8_lossy(&listed.stdout).contains("web"), "{listed:?}");
}

#[test]
fn errors_say_what_is_missing() {
    let secured = SecuredServer::start();
    secured.write("other.crt", &TestCa::new().pem);
    let vm = secured.ca.sign("vm-1", &[]);
    for (credential, ca, arguments, code, expected) in [
        (None, "ca.crt", &["ls"][..], 1, "needs a client certificate, or a token"),
        (Some(&vm), "ca.crt", &["ls", "-A"], 1, "vm-1 may not list instances of all namespaces"),
        (
            Some(&vm),
            "ca.crt",
            &["register", "web", "10.9.0.1", "-n", "shop"],
            1,
            "may not register the address 10.9.0.1",
        ),
        (Some(&vm), "other.crt", &["ls"], 1, "invalid peer certificate: UnknownIssuer"),
        (Some(&vm), "missing.crt", &["ls"], 2, "missing.crt cannot be read"),
    ] {
        let output = secured.run_as(credential, ca, arguments);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(said.contains(expected), "{arguments:?}: {said}");
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {said}");
    }
}
