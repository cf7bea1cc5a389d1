//! The few file operations that the store needs, behind two traits, so that tests can replace the
//! disk by one that forgets what was not synced, is full, or fails.
//!
//! File names are relative to the data directory. This module does not know what the files hold.

use std::{
    fmt, fs, io,
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::PathBuf,
};

use rustix::io::Errno;

/// Ending of a file that is still being written.
pub(super) const TEMP_SUFFIX: &str = ".tmp";

/// The data directory.
pub(super) trait Directory: fmt::Debug + Send + Sync {
    /// The names of all files.
    fn list(&self) -> io::Result<Vec<String>>;
    /// Creates an empty file and replaces a file of the same name.
    fn create(&self, name: &str) -> io::Result<Box<dyn File>>;
    /// Opens a file for reading and writing.
    fn open(&self, name: &str) -> io::Result<Box<dyn File>>;
    /// Renames a file and replaces the one that has the new name.
    fn rename(&self, from: &str, to: &str) -> io::Result<()>;
    /// Removes a file.
    fn remove(&self, name: &str) -> io::Result<()>;
    /// Syncs the directory itself: file names are durable when this returns.
    fn sync_dir(&self) -> io::Result<()>;
}

/// An open file. A rename does not affect it.
pub(super) trait File: fmt::Debug + Send {
    /// Length in bytes.
    fn len(&self) -> io::Result<u64>;
    /// Reads from `offset` and returns the number of bytes read; 0 at the end.
    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<usize>;
    /// Writes all of `bytes` at `offset`. An append writes at the end.
    fn write_at(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()>;
    /// Shortens the file to `len` bytes.
    fn truncate(&mut self, len: u64) -> io::Result<()>;
    /// Syncs the contents and the length: both are durable when this returns.
    fn sync(&mut self) -> io::Result<()>;
}

/// Creates the file `name` so that a crash leaves either all of it or nothing.
pub(super) fn write_atomically<E: From<io::Error>>(
    files: &dyn Directory,
    name: &str,
    write: impl FnOnce(&mut dyn File) -> Result<(), E>,
) -> Result<Box<dyn File>, E> {
    let temporary = format!("{name}{TEMP_SUFFIX}");
    let mut file = files.create(&temporary)?;
    write(&mut *file)?;
    file.sync()?; // 1. the bytes, before a name points at them
    files.rename(&temporary, name)?; // 2. the name
    files.sync_dir()?; // 3. the directory that holds it
    Ok(file)
}

/// Whether a file could not be opened because this process, or the system, has too many open
/// files. Then [`write_atomically`] has changed nothing: none of its later steps opens a file.
pub(super) fn is_out_of_descriptors(err: &io::Error) -> bool {
    matches!(Errno::from_io_error(err), Some(Errno::MFILE | Errno::NFILE))
}

/// A directory of the operating system.
#[derive(Debug)]
pub(super) struct OsDirectory {
    path: PathBuf,
    /// Kept open for [`Directory::sync_dir`], which must not fail for want of a descriptor.
    dir: fs::File,
}

impl OsDirectory {
    pub(super) fn open(path: PathBuf) -> io::Result<Self> {
        let dir = fs::File::open(&path)?;
        Ok(Self { path, dir })
    }
}

impl Directory for OsDirectory {
    fn list(&self) -> io::Result<Vec<String>> {
        // The store writes no name that is not UTF-8.
        let names = fs::read_dir(&self.path)?.map(|entry| Ok(entry?.file_name().into_string().ok()));
        names.filter_map(Result::transpose).collect()
    }

    fn create(&self, name: &str) -> io::Result<Box<dyn File>> {
        let mut options = fs::OpenOptions::new();
        options.read(true).write(true).create(true).truncate(true).mode(0o600);
        Ok(Box::new(options.open(self.path.join(name))?))
    }

    fn open(&self, name: &str) -> io::Result<Box<dyn File>> {
        Ok(Box::new(fs::OpenOptions::new().read(true).write(true).open(self.path.join(name))?))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        fs::rename(self.path.join(from), self.path.join(to))
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        fs::remove_file(self.path.join(name))
    }

    fn sync_dir(&self) -> io::Result<()> {
        self.dir.sync_all()
    }
}

impl File for fs::File {
    fn len(&self) -> io::Result<u64> {
        Ok(self.metadata()?.len())
    }

    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<usize> {
        FileExt::read_at(self, into, offset)
    }

    fn write_at(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.write_all_at(bytes, offset)
    }

    fn truncate(&mut self, len: u64) -> io::Result<()> {
        self.set_len(len)
    }

    fn sync(&mut self) -> io::Result<()> {
        // fdatasync: of the metadata only the length, which is all that reading needs.
        self.sync_data()
    }
}
