//! Files for one user's eyes: keys, and what is known of tokens and registrants.

use std::{
    fs,
    io::{self, Read as _, Write as _},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::Path,
};

/// Ending of a file that is still being written. A data directory removes such files at its next start.
const TEMP_SUFFIX: &str = "tmp";

/// Creates the directory `path` if it is absent, for this user only.
///
/// # Errors
/// When it cannot be created.
pub fn create_dir(path: &Path) -> io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(path)
}

/// Writes a file that only this user can read, so that a crash leaves the old contents or the new ones.
///
/// # Errors
/// When a step fails; then the file is as it was.
pub fn write(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".");
    temporary.push(TEMP_SUFFIX);
    let temporary = Path::new(&temporary);
    // A file that a crash left has the mode of its creation, which may be another one.
    match fs::remove_file(temporary) {
        Err(err) if err.kind() != io::ErrorKind::NotFound => return Err(err),
        _ => {}
    }
    let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(temporary)?;
    file.write_all(bytes)?;
    file.sync_all()?; // 1. the bytes, before a name points at them
    fs::rename(temporary, path)?; // 2. the name
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or_else(|| Path::new("."));
    fs::File::open(directory)?.sync_all() // 3. the directory that holds it
}

/// Reads a file of at most `max` bytes; `None` if there is none.
///
/// # Errors
/// When it cannot be read, or is larger.
pub fn read(path: &Path, max: u64) -> io::Result<Option<Vec<u8>>> {
    let file = match fs::File::open(path) {
        Err(err) if err.kind() == io::ErrorKind::NotFound => return Ok(None),
        opened => opened?,
    };
    let mut bytes = Vec::new();
    file.take(max + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > max {
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, format!("it has more than {max} bytes")));
    }
    Ok(Some(bytes))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn file_is_replaced_whole_and_is_private() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("ca.key");
        // What a crash left, readable by all.
        fs::write(dir.path().join("ca.key.tmp"), "half").expect("written");
        for text in ["one", "two"] {
            write(&path, text.as_bytes()).expect("written");
            assert_eq!(read(&path, 3).expect("read").as_deref(), Some(text.as_bytes()));
            assert_eq!(fs::metadata(&path).expect("there").permissions().mode() & 0o777, 0o600);
        }
        assert_eq!(fs::read_dir(dir.path()).expect("a directory").count(), 1, "nothing temporary is left");
        assert!(read(&path, 2).is_err(), "larger than allowed");
        assert!(read(&dir.path().join("none"), 3).expect("no error").is_none());
    }
}
