//! Changes the Corefile in its ConfigMap: shows the difference, asks, replaces the text in the version that was
//! shown, and takes it back.

use std::io::{self, IsTerminal as _, Write as _};

use similar::TextDiff;

use super::{
    CorefileEdit, Observation, Observer,
    observer::{Expected, RolloutOutcome},
};
use crate::{
    cli::{
        error::{CommandError, ErrorKind},
        output::print,
    },
    coredns::{self, Plan, Wiring},
    kubernetes::api::{ConfigMapClient, ConfigMapError, ConfigMapKey},
};

/// Attempts against somebody who changes the ConfigMap at the same time.
const MAX_ATTEMPTS: usize = 10;

/// Where CoreDNS says why it does not read a Corefile.
const LOG_HINT: &str = "why:  kubectl logs -n kube-system -l k8s-app=kube-dns";

/// One change of the Corefile.
#[derive(Debug)]
pub(super) struct CorefileChange {
    pub(super) client: ConfigMapClient,
    pub(super) key: ConfigMapKey,
    pub(super) edit: CorefileEdit,
    pub(super) dry_run: bool,
    pub(super) yes: bool,
}

impl CorefileChange {
    pub(super) async fn run(self, observation: Option<Observation>) -> Result<(), CommandError> {
        let Some((before, after, observer)) = self.replace(observation).await? else { return Ok(()) };
        if !coredns::reads_changes(&after) {
            print("without `reload` in its Corefile CoreDNS reads it only when it is restarted:\n")?;
            print("  kubectl rollout restart -n kube-system deployment/coredns\n")?;
        }
        let Some(observer) = observer else {
            return print(&format!(
                "{} changed; CoreDNS reads it within two minutes, which --dns ADDR would have waited for\n",
                self.key
            ));
        };
        note(&format!("{} changed; waiting for CoreDNS, up to {}", self.key, observer.timeout()));
        match observer.wait().await {
            RolloutOutcome::Taken(after) => {
                print(&format!("{} changed; CoreDNS has taken it after {} s\n", self.key, after.as_secs()))
            }
            RolloutOutcome::Held => print(&format!(
                "{} changed; CoreDNS answers as before the change, which took {} to see\n",
                self.key,
                observer.timeout()
            )),
            RolloutOutcome::Broken(why) => {
                let failure = CommandError::new(ErrorKind::Failed, format!("CoreDNS stopped answering: {why}"));
                Err(self.take_back(failure, &before, &after).await.hint(LOG_HINT))
            }
            RolloutOutcome::Expired(why) => {
                let message = format!("CoreDNS has not taken the change within {}: {why}", observer.timeout());
                let failure = CommandError::new(ErrorKind::WaitExpired, message);
                let failure = match self.edit {
                    // What is left is the Corefile as it was without gangplank.
                    CorefileEdit::Remove => failure.hint(format!("{} stays as it is now, without gangplank", self.key)),
                    // A Corefile that CoreDNS cannot read would keep it from starting again.
                    CorefileEdit::Apply(_) => self.take_back(failure, &before, &after).await,
                };
                let failure = match &self.edit {
                    CorefileEdit::Apply(Plan { wiring: Wiring::FallThrough { reverse: true }, .. }) => {
                        failure.hint("for CoreDNS before 1.12 (Kubernetes 1.33):  --no-reverse")
                    }
                    _ => failure,
                };
                Err(failure.hint(LOG_HINT))
            }
        }
    }

    /// Shows the difference, asks, and replaces the text. The text before and after, and who observes it; `None` if
    /// nothing was changed.
    async fn replace(
        &self,
        observation: Option<Observation>,
    ) -> Result<Option<(String, String, Option<Observer>)>, CommandError> {
        let mut shown = None;
        let mut observer = None;
        for _ in 0..MAX_ATTEMPTS {
            let read = self.client.read(&self.key).await.map_err(|err| self.failed(err))?;
            let edited = self.edit.of(&read.text).map_err(|err| {
                CommandError::new(ErrorKind::Failed, format!("{}: Corefile not changed: {err}", self.key)).hint(
                    format!("the lines:  kubectl get configmap {} -n {} -o yaml", self.key.name, self.key.namespace),
                )
            })?;
            if edited == read.text {
                print(&format!("{} unchanged\n", self.key))?;
                return Ok(None);
            }
            // Of what was not shown nothing is written.
            if shown.as_ref() != Some(&(read.text.clone(), edited.clone())) {
                print(&difference(&read.text, &edited))?;
                if self.dry_run {
                    return Ok(None);
                }
                self.confirm()?;
                shown = Some((read.text.clone(), edited.clone()));
            }
            if let Some(observation) = &observation {
                // Before the change, to compare with.
                let (wired, expected) = match self.edit {
                    CorefileEdit::Apply(_) => (&edited, Expected::Gangplank),
                    CorefileEdit::Remove => (&read.text, Expected::Other),
                };
                let wired = coredns::wired(wired).unwrap_or_default();
                observer = Some(Observer::begin(observation.clone(), &wired, expected).await?);
            }
            match self.client.replace(&self.key, &read, &edited).await {
                Ok(()) => return Ok(Some((read.text, edited, observer))),
                Err(ConfigMapError::Conflict) => {}
                Err(err) => return Err(self.failed(err)),
            }
        }
        Err(self.failed(ConfigMapError::Conflict))
    }

    fn confirm(&self) -> Result<(), CommandError> {
        if self.yes {
            return Ok(());
        }
        let unchanged = || CommandError::new(ErrorKind::Failed, format!("{} not changed", self.key));
        if !io::stdin().is_terminal() {
            return Err(unchanged().hint("there is no terminal to ask on; --yes changes it without asking"));
        }
        let mut err = io::stderr().lock();
        write!(err, "change {}? [y/N] ", self.key).and_then(|()| err.flush())?;
        let mut answer = String::new();
        io::stdin().read_line(&mut answer)?;
        if ["y", "yes"].contains(&answer.trim().to_ascii_lowercase().as_str()) { Ok(()) } else { Err(unchanged()) }
    }

    /// Restores the text, if it is still the one that was written, and adds to the error what became of it.
    async fn take_back(&self, failure: CommandError, before: &str, written: &str) -> CommandError {
        for _ in 0..MAX_ATTEMPTS {
            let read = match self.client.read(&self.key).await {
                Ok(read) => read,
                Err(err) => return failure.hint(format!("it could not be taken back: {}", self.failed(err))),
            };
            if read.text != written {
                return failure
                    .hint(format!("{} was changed meanwhile by somebody else, and not taken back", self.key))
                    .hint("take out what was added:  gangplank coredns --remove");
            }
            match self.client.replace(&self.key, &read, before).await {
                Ok(()) => {
                    return failure
                        .hint(format!("{} is as it was before; CoreDNS reads it again within two minutes", self.key));
                }
                Err(ConfigMapError::Conflict) => {}
                Err(err) => return failure.hint(format!("it could not be taken back: {}", self.failed(err))),
            }
        }
        failure.hint("it could not be taken back: somebody else changes it all the time")
    }

    fn failed(&self, err: ConfigMapError) -> CommandError {
        let ConfigMapKey { namespace, name, .. } = &self.key;
        let message = format!("{}, at {}: {err}", self.key, self.client.server());
        match err {
            ConfigMapError::NotFound(_) => CommandError::new(ErrorKind::NotFound, message)
                .hint("name another one:  --configmap NAMESPACE/NAME"),
            ConfigMapError::Forbidden(_) => CommandError::new(ErrorKind::Failed, message)
                .hint("rights that suffice:")
                .hint(format!(
                    "kubectl create role gangplank-coredns -n {namespace} --verb=get,patch --resource=configmaps --resource-name={name}"
                ))
                .hint(format!("kubectl create rolebinding gangplank-coredns -n {namespace} --role=gangplank-coredns --user=USER")),
            ConfigMapError::Conflict => {
                CommandError::new(ErrorKind::Failed, message).hint("try again; what was written last has not been replaced")
            }
            ConfigMapError::Failed(_) => CommandError::new(ErrorKind::Failed, message)
                .hint("another cluster:  --kubeconfig FILE, and --context NAME"),
        }
    }
}

/// The difference as `diff -u` shows it.
fn difference(before: &str, after: &str) -> String {
    TextDiff::from_lines(before, after)
        .unified_diff()
        .header("Corefile", "Corefile with the change")
        .missing_newline_hint(false)
        .to_string()
}

/// What happens meanwhile: on a terminal only, for nobody else waits.
fn note(line: &str) {
    if io::stderr().is_terminal() {
        let _ = writeln!(io::stderr(), "{line}");
    }
}
