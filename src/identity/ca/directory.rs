//! The CA in the data directory.
//!
//! ```text
//! ca.key   its key, readable by the user of the process only
//! ca.crt   its certificate; made anew from the key if it is missing
//! ```

use std::{io, path::Path, time::SystemTime};

use rcgen::KeyPair;

use super::{CaError, CaPem, CertificateAuthority, InvalidCa, certificate_of, new_key};
use crate::identity::private_file;

const KEY_FILE: &str = "ca.key";
const CERTIFICATE_FILE: &str = "ca.crt";

/// Ending of the files of a CA that is not used any more: see [`retire`].
const RETIRED: &str = "retired";

/// Most bytes of either file.
const MAX_FILE_BYTES: u64 = 64 * 1024;

impl CertificateAuthority {
    /// Reads the CA in `dir`, or creates one. The caller has the lock of the directory.
    ///
    /// # Errors
    /// Names the file that cannot be read or written, or that does not hold what it should.
    pub fn open(dir: &Path, now: SystemTime) -> Result<Self, CaError> {
        let pem = match read(dir, now)? {
            Some(pem) => pem,
            None => {
                let key = new_key()?;
                write(&dir.join(KEY_FILE), &key.serialize_pem())?;
                with_certificate(dir, &key, now)?
            }
        };
        parse(dir, pem)
    }
}

/// The CA in `dir`, if there is one, with its certificate made anew if that is missing.
pub(super) fn read(dir: &Path, now: SystemTime) -> Result<Option<CaPem>, CaError> {
    let key_path = dir.join(KEY_FILE);
    match (text(&key_path)?, text(&dir.join(CERTIFICATE_FILE))?) {
        (Some(key), Some(certificate)) => Ok(Some(CaPem { key, certificate })),
        (Some(key), None) => {
            let key = KeyPair::from_pem(&key).map_err(|_| invalid(&key_path, "holds no private key in PEM"))?;
            with_certificate(dir, &key, now).map(Some)
        }
        (None, None) => Ok(None),
        (None, Some(_)) => {
            let reason =
                "is missing. Put it back; or remove ca.crt too, after which every registrant has to join again";
            Err(invalid(&key_path, reason))
        }
    }
}

/// Says which file is wrong.
pub(super) fn parse(dir: &Path, pem: CaPem) -> Result<CertificateAuthority, CaError> {
    CertificateAuthority::parse(pem).map_err(|err| match err {
        InvalidCa::Key(reason) => invalid(&dir.join(KEY_FILE), reason),
        InvalidCa::Certificate(reason) => invalid(&dir.join(CERTIFICATE_FILE), reason),
    })
}

/// Renames the files of the CA in `dir`, so that nothing uses it any more.
pub(super) fn retire(dir: &Path) -> Result<(), CaError> {
    for file in [KEY_FILE, CERTIFICATE_FILE] {
        let path = dir.join(file);
        match std::fs::rename(&path, dir.join(format!("{file}.{RETIRED}"))) {
            Err(err) if err.kind() != io::ErrorKind::NotFound => return Err(io_error(&path, err)),
            _ => {}
        }
    }
    Ok(())
}

/// Writes the certificate of a key.
fn with_certificate(dir: &Path, key: &KeyPair, now: SystemTime) -> Result<CaPem, CaError> {
    let certificate = certificate_of(key, now)?;
    write(&dir.join(CERTIFICATE_FILE), &certificate)?;
    Ok(CaPem { key: key.serialize_pem(), certificate })
}

/// What a file holds, if there is one.
pub(super) fn text(path: &Path) -> Result<Option<String>, CaError> {
    let bytes = private_file::read(path, MAX_FILE_BYTES).map_err(|err| io_error(path, err))?;
    bytes.map(|bytes| String::from_utf8(bytes).map_err(|_| invalid(path, "is not PEM"))).transpose()
}

pub(super) fn write(path: &Path, text: &str) -> Result<(), CaError> {
    private_file::write(path, text.as_bytes()).map_err(|err| io_error(path, err))
}

fn io_error(path: &Path, err: io::Error) -> CaError {
    CaError::Io { path: path.to_owned(), err }
}

fn invalid(path: &Path, reason: impl Into<String>) -> CaError {
    CaError::Invalid { path: path.to_owned(), reason: reason.into() }
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::PermissionsExt as _, time::Duration};

    use rustls::pki_types::{CertificateDer, pem::PemObject as _};

    use super::*;
    use crate::identity::ServerNames;

    const DAY: Duration = Duration::from_secs(24 * 60 * 60);

    fn now() -> SystemTime {
        SystemTime::UNIX_EPOCH + 20_000 * DAY
    }

    fn names() -> ServerNames {
        ServerNames { dns: vec!["localhost".into()], ip: vec!["10.0.0.1".parse().expect("an address")] }
    }

    #[test]
    fn ca_is_the_same_after_a_restart_and_its_key_is_private() {
        let dir = tempfile::tempdir().expect("a directory");
        let first = CertificateAuthority::open(dir.path(), now()).expect("created");
        let again = CertificateAuthority::open(dir.path(), now() + DAY).expect("read");
        assert_eq!((first.pem(), first.public_key_hash()), (again.pem(), again.public_key_hash()));
        for file in [KEY_FILE, CERTIFICATE_FILE] {
            let mode = fs::metadata(dir.path().join(file)).expect("there").permissions().mode();
            assert_eq!(mode & 0o777, 0o600, "{file}");
        }
        // A crash between the two files.
        fs::remove_file(dir.path().join(CERTIFICATE_FILE)).expect("removed");
        let repaired = CertificateAuthority::open(dir.path(), now()).expect("made from the key");
        assert_eq!(repaired.public_key_hash(), first.public_key_hash());
        let signed = first.issue_server(&names(), now()).expect("signed");
        let certificate = CertificateDer::from_pem_slice(signed.chain.as_bytes()).expect("a certificate");
        assert!(repaired.has_signed(&certificate));
        assert!(!format!("{first:?} {signed:?}").contains("PRIVATE"));
        retire(dir.path()).expect("renamed");
        assert_eq!(read(dir.path(), now()).expect("no error"), None);
        retire(dir.path()).expect("nothing to do");
    }

    #[test]
    fn files_that_do_not_belong_together_are_refused() {
        let (dir, other) = (tempfile::tempdir().expect("a directory"), tempfile::tempdir().expect("a directory"));
        let ca = CertificateAuthority::open(dir.path(), now()).expect("created");
        let foreign = CertificateAuthority::open(other.path(), now()).expect("created");
        let leaf = foreign.issue_server(&names(), now()).expect("signed");
        assert!(!ca.has_signed(&CertificateDer::from_pem_slice(leaf.chain.as_bytes()).expect("a certificate")));

        let refused = |why: &str| {
            let err = CertificateAuthority::open(dir.path(), now()).expect_err("refused").to_string();
            assert!(err.contains(why), "{err:?} should contain {why:?}");
        };
        fs::copy(other.path().join(KEY_FILE), dir.path().join(KEY_FILE)).expect("copied");
        refused("ca.crt: is not the certificate of the key");
        fs::write(dir.path().join(KEY_FILE), &leaf.key).expect("written");
        fs::write(dir.path().join(CERTIFICATE_FILE), &leaf.chain).expect("written");
        refused("ca.crt: is not the certificate of a CA");
        fs::write(dir.path().join(KEY_FILE), "junk").expect("written");
        refused("ca.key: holds no private key in PEM");
        fs::remove_file(dir.path().join(KEY_FILE)).expect("removed");
        refused("ca.key: is missing");
    }
}
