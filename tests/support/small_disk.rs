//! A file system of a test's own.

use std::{path::Path, process::Command};

use tempfile::TempDir;

/// A file system of half a megabyte, unmounted on drop.
pub(crate) struct SmallDisk(TempDir);

impl SmallDisk {
    /// Needs the right to mount; where that is missing the test says so, and fails in CI.
    pub(crate) fn mount() -> Option<Self> {
        let dir = TempDir::new().expect("a temporary directory");
        let mounted =
            Command::new("mount").args(["-t", "tmpfs", "-o", "size=512k", "gangplank-test"]).arg(dir.path()).output();
        if mounted.as_ref().is_ok_and(|output| output.status.success()) {
            return Some(Self(dir));
        }
        assert!(std::env::var_os("CI").is_none(), "this test has to mount a small file system: {mounted:?}");
        eprintln!("a small file system cannot be mounted here, so this test checked nothing: {mounted:?}");
        None
    }

    pub(crate) fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(self.0.path()).status();
    }
}
