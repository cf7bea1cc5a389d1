//! The few file operations that the store needs, behind two traits, so that tests can replace the
//! disk by one that forgets what was not synced, is full, or fails.
//!
//! File names are relative to the data directory. This module does not know what the files hold.

use std::{
    fmt, fs, io,
    os::unix::fs::{FileExt, MetadataExt},
    path::{Path, PathBuf},
};

use rustix::{
    fs::{AtFlags, Dir, Mode, OFlags, Stat, linkat, openat, renameat, stat, statat, unlinkat},
    io::Errno,
};

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
    /// Adds the name `to` to a file. Fails if a file has that name.
    fn link(&self, from: &str, to: &str) -> io::Result<()>;
    /// Removes a file.
    fn remove(&self, name: &str) -> io::Result<()>;
    /// Syncs the directory itself: file names are durable when this returns.
    fn sync_dir(&self) -> io::Result<()>;
    /// The directory, its lock or the open file `name`, if one of them is no longer at its path.
    fn find_missing(&self, name: &str, identity: FileIdentity) -> io::Result<Option<PathBuf>>;
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
    /// Which file it is, whatever its name.
    fn identity(&self) -> io::Result<FileIdentity>;
}

/// Distinguishes a file from every other one that exists at the same time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct FileIdentity {
    pub(super) device: u64,
    pub(super) inode: u64,
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

/// The data directory on a file system, with the lock on it.
///
/// All operations are relative to the open directory. If its path leads elsewhere one day, nothing
/// is written or removed there.
#[derive(Debug)]
pub(super) struct OsDirectory {
    path: PathBuf,
    dir: fs::File,
    identity: FileIdentity,
    /// Held while this value lives. `None` for the lock file of a read-only file system that has none.
    lock: Option<(&'static str, FileIdentity)>,
    _locked: fs::File,
}

impl OsDirectory {
    /// `dir` is the open directory `path`, and `locked` holds the lock: the file `lock` in it, or
    /// the directory itself.
    pub(super) fn new(path: PathBuf, dir: fs::File, lock: Option<&'static str>, locked: fs::File) -> io::Result<Self> {
        let lock = lock.map(|name| Ok::<_, io::Error>((name, File::identity(&locked)?))).transpose()?;
        Ok(Self { path, identity: File::identity(&dir)?, dir, lock, _locked: locked })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    fn open_at(&self, name: &str, flags: OFlags) -> io::Result<fs::File> {
        // For the owner alone, whatever the umask is.
        Ok(openat(&self.dir, name, flags | OFlags::CLOEXEC, Mode::RUSR | Mode::WUSR)?.into())
    }

    /// Whether `name` in the directory is the file with that identity.
    fn holds(&self, name: &str, identity: FileIdentity) -> io::Result<bool> {
        // A symlink in the place of the file is a replacement, wherever it leads.
        is_same(statat(&self.dir, name, AtFlags::SYMLINK_NOFOLLOW), identity)
    }
}

/// Whether what was looked up is the file with that identity, and not another one or none.
fn is_same(found: rustix::io::Result<Stat>, identity: FileIdentity) -> io::Result<bool> {
    match found {
        Ok(stat) => Ok(identity == FileIdentity { device: stat.st_dev, inode: stat.st_ino }),
        Err(Errno::NOENT | Errno::NOTDIR) => Ok(false),
        Err(err) => Err(err.into()),
    }
}

impl Directory for OsDirectory {
    fn list(&self) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in Dir::read_from(&self.dir)? {
            // The store writes no name that is not UTF-8.
            names.extend(entry?.file_name().to_str().ok().map(str::to_owned));
        }
        Ok(names)
    }

    fn create(&self, name: &str) -> io::Result<Box<dyn File>> {
        Ok(Box::new(self.open_at(name, OFlags::RDWR | OFlags::CREATE | OFlags::TRUNC)?))
    }

    fn open(&self, name: &str) -> io::Result<Box<dyn File>> {
        match self.open_at(name, OFlags::RDWR) {
            Ok(file) => Ok(Box::new(file)),
            // What is stored can be served all the same. Every write then fails for that reason.
            Err(err) if err.kind() == io::ErrorKind::ReadOnlyFilesystem => {
                Ok(Box::new(ReadOnlyFile(self.open_at(name, OFlags::RDONLY)?)))
            }
            Err(err) => Err(err),
        }
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        Ok(renameat(&self.dir, from, &self.dir, to)?)
    }

    fn link(&self, from: &str, to: &str) -> io::Result<()> {
        Ok(linkat(&self.dir, from, &self.dir, to, AtFlags::empty())?)
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        Ok(unlinkat(&self.dir, name, AtFlags::empty())?)
    }

    fn sync_dir(&self) -> io::Result<()> {
        self.dir.sync_all()
    }

    fn find_missing(&self, name: &str, identity: FileIdentity) -> io::Result<Option<PathBuf>> {
        // An inode that is open here cannot be reused, so a new file has another identity.
        // The path may lead through symlinks, which is the operator's choice. Only where it ends counts.
        if !is_same(stat(&self.path), self.identity)? {
            return Ok(Some(self.path.clone()));
        }
        if let Some((lock, identity)) = self.lock
            && !self.holds(lock, identity)?
        {
            return Ok(Some(self.path.join(lock)));
        }
        Ok(if self.holds(name, identity)? { None } else { Some(self.path.join(name)) })
    }
}

/// A file on a read-only file system.
#[derive(Debug)]
struct ReadOnlyFile(fs::File);

impl ReadOnlyFile {
    fn refusal<T>() -> io::Result<T> {
        Err(Errno::ROFS.into())
    }
}

impl File for ReadOnlyFile {
    fn len(&self) -> io::Result<u64> {
        File::len(&self.0)
    }

    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<usize> {
        File::read_at(&self.0, offset, into)
    }

    fn write_at(&mut self, _offset: u64, _bytes: &[u8]) -> io::Result<()> {
        Self::refusal()
    }

    fn truncate(&mut self, _len: u64) -> io::Result<()> {
        Self::refusal()
    }

    fn sync(&mut self) -> io::Result<()> {
        Self::refusal()
    }

    fn identity(&self) -> io::Result<FileIdentity> {
        File::identity(&self.0)
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

    fn identity(&self) -> io::Result<FileIdentity> {
        let metadata = self.metadata()?;
        Ok(FileIdentity { device: metadata.dev(), inode: metadata.ino() })
    }
}
