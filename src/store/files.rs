//! The one door to the disk: the few file operations the store needs, so that tests can put a
//! disk behind it that forgets what was not synced, is full, or fails.
//!
//! Names are names within the data directory. Nothing here knows what the files hold.

use std::{
    fmt, fs, io,
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::PathBuf,
};

use rustix::io::Errno;

/// What a name ends in until the file is whole.
pub(super) const STAGED: &str = ".tmp";

/// A directory.
pub(super) trait Files: fmt::Debug + Send + Sync {
    /// The names of all files.
    fn list(&self) -> io::Result<Vec<String>>;
    /// Makes an empty file, in place of one that has the name.
    fn create(&self, name: &str) -> io::Result<Box<dyn File>>;
    /// Opens a file for reading and writing.
    fn open(&self, name: &str) -> io::Result<Box<dyn File>>;
    /// Gives a file another name, in place of the file that has it.
    fn rename(&self, from: &str, to: &str) -> io::Result<()>;
    /// Takes a name away.
    fn remove(&self, name: &str) -> io::Result<()>;
    /// When it returns, the names are on the disk.
    fn sync_dir(&self) -> io::Result<()>;
}

/// An open file. It stays the same file when its name changes.
pub(super) trait File: fmt::Debug + Send {
    /// Octets in the file.
    fn len(&self) -> io::Result<u64>;
    /// Reads from `offset` and says how many octets that gave; 0 at the end.
    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<usize>;
    /// Writes all of `bytes` at `offset`. Appending is writing at the end.
    fn write_at(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()>;
    /// Cuts the file down to `len` octets.
    fn truncate(&mut self, len: u64) -> io::Result<()>;
    /// When it returns, the octets are on the disk.
    fn sync(&mut self) -> io::Result<()>;
}

/// Makes the file `name` so that after a crash it is there whole or not at all.
pub(super) fn publish<E: From<io::Error>>(
    files: &dyn Files,
    name: &str,
    write: impl FnOnce(&mut dyn File) -> Result<(), E>,
) -> Result<Box<dyn File>, E> {
    let staged = format!("{name}{STAGED}");
    let mut file = files.create(&staged)?;
    write(&mut *file)?;
    file.sync()?; // 1. the octets, before a name points at them
    files.rename(&staged, name)?; // 2. the name
    files.sync_dir()?; // 3. the directory that holds it
    Ok(file)
}

/// Whether a file could not be opened because there are too many open ones, here or in the whole
/// system. Of what was asked nothing was done: no other step of [`publish`] needs a descriptor.
pub(super) fn no_descriptor(err: &io::Error) -> bool {
    matches!(Errno::from_io_error(err), Some(Errno::MFILE | Errno::NFILE))
}

/// A real directory.
#[derive(Debug)]
pub(super) struct Disk {
    path: PathBuf,
    /// Open all the time, so that [`Files::sync_dir`] cannot fail for want of a descriptor.
    dir: fs::File,
}

impl Disk {
    pub(super) fn open(path: PathBuf) -> io::Result<Self> {
        let dir = fs::File::open(&path)?;
        Ok(Self { path, dir })
    }
}

impl Files for Disk {
    fn list(&self) -> io::Result<Vec<String>> {
        // A name that is not UTF-8 is none of ours.
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
        // fdatasync: the octets, and of the metadata the length, which is all that reading needs.
        self.sync_data()
    }
}
