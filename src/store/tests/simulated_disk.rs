//! A disk whose power can be cut: files that forget what was not synced, names that forget
//! what their directory was not synced for, and a disk whose operations fail on demand.

use std::{
    collections::BTreeMap,
    io,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard},
};

use fastrand::Rng;
use rustix::io::Errno;

use super::super::disk::{Directory, File, FileIdentity};

/// What a disk writes at once: a cut tears writes at any of these, or at any byte.
const SECTOR: usize = 512;

/// An operation that can fail on demand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Operation {
    List,
    Create,
    Open,
    /// Length and identity.
    Stat,
    Read,
    Write,
    Sync,
    SyncDir,
    Rename,
    Link,
    Remove,
    Truncate,
}

#[derive(Debug, Clone)]
enum FileChange {
    Write(u64, Vec<u8>),
    Truncate(u64),
}

impl FileChange {
    fn apply(&self, to: &mut Vec<u8>) {
        match self {
            Self::Truncate(len) => to.truncate(index(*len)),
            Self::Write(offset, bytes) => {
                let end = index(*offset) + bytes.len();
                if to.len() < end {
                    to.resize(end, 0);
                }
                to[index(*offset)..end].copy_from_slice(bytes);
            }
        }
    }
}

#[derive(Debug, Clone)]
enum NameChange {
    Link(String, usize),
    Unlink(String),
    /// From, to, and what is meant: the entry itself is what a directory writes.
    Rename(String, String, usize),
}

impl NameChange {
    fn apply(&self, names: &mut BTreeMap<String, usize>) {
        match self {
            Self::Link(name, inode) => {
                names.insert(name.clone(), *inode);
            }
            Self::Unlink(name) => {
                names.remove(name);
            }
            Self::Rename(from, to, inode) => {
                if names.get(from) == Some(inode) {
                    names.remove(from);
                }
                names.insert(to.clone(), *inode);
            }
        }
    }
}

#[derive(Debug, Default, Clone)]
struct Inode {
    cached: Vec<u8>,
    durable: Vec<u8>,
    pending: Vec<FileChange>,
}

#[derive(Debug, Default)]
struct DiskState {
    inodes: Vec<Inode>,
    names: BTreeMap<String, usize>,
    durable_names: BTreeMap<String, usize>,
    pending_names: Vec<NameChange>,
    /// Operations until the power goes.
    left: Option<u64>,
    off: bool,
    /// What fails, how, and how many times more.
    fault: Option<(Operation, DiskFault, u32)>,
    /// How many operations of any kind succeed before one fails.
    fault_after: Option<(u64, DiskFault)>,
    /// The operation that failed after those, and the name of its file.
    failed: Option<(Operation, String)>,
}

impl DiskState {
    /// The error of an operation that is to fail. `name` is the file's, empty for the directory.
    fn fault(&mut self, operation: Operation, name: &str) -> Option<io::Error> {
        if let Some((failing, fault, times)) = &mut self.fault
            && *failing == operation
            && *times > 0
        {
            *times -= 1;
            return Some((*fault).into());
        }
        let (left, fault) = self.fault_after.as_mut()?;
        if *left > 0 {
            *left -= 1;
            return None;
        }
        let err = (*fault).into();
        self.fault_after = None;
        self.failed = Some((operation, name.into()));
        Some(err)
    }

    /// As [`Self::fault`], for an operation that changes nothing and is no place for a power cut.
    fn read_only(&mut self, operation: Operation, name: &str) -> io::Result<()> {
        if self.off { Err(off()) } else { self.fault(operation, name).map_or(Ok(()), Err) }
    }
}

/// The system's error of an operation that fails.
#[derive(Debug, Clone, Copy)]
pub(super) enum DiskFault {
    FileKind(io::ErrorKind),
    Number(Errno),
}

impl From<io::ErrorKind> for DiskFault {
    fn from(kind: io::ErrorKind) -> Self {
        Self::FileKind(kind)
    }
}

impl From<Errno> for DiskFault {
    fn from(number: Errno) -> Self {
        Self::Number(number)
    }
}

impl From<DiskFault> for io::Error {
    fn from(fault: DiskFault) -> Self {
        match fault {
            DiskFault::FileKind(kind) => kind.into(),
            DiskFault::Number(number) => number.into(),
        }
    }
}

/// The disk. Clones are the same one.
#[derive(Debug, Clone, Default)]
pub(super) struct SimulatedDisk(Arc<Mutex<DiskState>>);

impl SimulatedDisk {
    fn state(&self) -> MutexGuard<'_, DiskState> {
        self.0.lock().expect("no test panics while it holds this")
    }

    /// Has the power go off during one of the next operations.
    pub(super) fn cut_after(&self, operations: u64) {
        self.state().left = Some(operations);
    }

    pub(super) fn is_off(&self) -> bool {
        self.state().off
    }

    /// Has an operation fail some times.
    pub(super) fn fail(&self, operation: Operation, fault: impl Into<DiskFault>, times: u32) {
        self.state().fault = Some((operation, fault.into(), times));
    }

    /// Has the operation after the next `operations` ones fail, whichever it is.
    pub(super) fn fail_after(&self, operations: u64, fault: impl Into<DiskFault>) {
        self.state().fault_after = Some((operations, fault.into()));
    }

    /// The operation that failed because of [`Self::fail_after`], and the name of its file; empty for
    /// the directory.
    pub(super) fn failed(&self) -> Option<(Operation, String)> {
        self.state().failed.clone()
    }

    pub(super) fn clear_faults(&self) {
        let state = &mut *self.state();
        (state.fault, state.fault_after) = (None, None);
    }

    /// Cuts the power and starts the disk again: of what was not synced, any part may be left.
    pub(super) fn power_cut(&self, rng: &mut Rng) {
        let state = &mut *self.state();
        // A disk may write in the order of the requests, or in any: the store has to survive both.
        let in_order = rng.bool();
        for name_change in kept(&std::mem::take(&mut state.pending_names), in_order, rng) {
            name_change.apply(&mut state.durable_names);
        }
        state.names = state.durable_names.clone();
        for inode in &mut state.inodes {
            let pending = std::mem::take(&mut inode.pending);
            if in_order {
                let whole = rng.usize(..=pending.len());
                pending[..whole].iter().for_each(|change| change.apply(&mut inode.durable));
                if let Some(FileChange::Write(offset, bytes)) = pending.get(whole) {
                    let torn = bytes[..rng.usize(..=bytes.len())].to_vec();
                    FileChange::Write(*offset, torn).apply(&mut inode.durable);
                }
            } else {
                for change in sectors(&pending).iter().filter(|_| rng.bool()) {
                    change.apply(&mut inode.durable);
                }
            }
            inode.cached = inode.durable.clone();
        }
        (state.off, state.left, state.fault, state.fault_after) = (false, None, None, None);
    }

    /// Starts only the process again: what the system has cached is still there.
    pub(super) fn restart(&self) {
        let state = &mut *self.state();
        (state.off, state.left, state.fault, state.fault_after) = (false, None, None, None);
    }

    /// The files as they can be read now.
    pub(super) fn contents(&self) -> BTreeMap<String, Vec<u8>> {
        let state = self.state();
        state.names.iter().map(|(name, inode)| (name.clone(), state.inodes[*inode].cached.clone())).collect()
    }

    /// A disk that holds exactly these files, all of them durable.
    pub(super) fn holding(contents: &BTreeMap<String, Vec<u8>>) -> Self {
        let mut state = DiskState::default();
        for (name, bytes) in contents {
            state.names.insert(name.clone(), state.inodes.len());
            state.inodes.push(Inode { cached: bytes.clone(), durable: bytes.clone(), pending: Vec::new() });
        }
        state.durable_names = state.names.clone();
        Self(Arc::new(Mutex::new(state)))
    }

    /// Counts an operation, and fails the one that is to fail. If the power goes during it, it may have had a part of its
    /// effect.
    fn operate(state: &mut DiskState, operation: Operation, name: &str) -> Result<(), OperationError> {
        if state.off {
            return Err(OperationError::NoEffect(off()));
        }
        if let Some(err) = state.fault(operation, name) {
            return Err(OperationError::Partial(err));
        }
        match &mut state.left {
            Some(0) => {
                state.off = true;
                Err(OperationError::Partial(off()))
            }
            Some(left) => {
                *left -= 1;
                Ok(())
            }
            None => Ok(()),
        }
    }
}

/// How an operation ended that did not succeed.
enum OperationError {
    /// It had no effect.
    NoEffect(io::Error),
    /// It may have had a part of its effect.
    Partial(io::Error),
}

impl From<OperationError> for io::Error {
    fn from(err: OperationError) -> Self {
        match err {
            OperationError::NoEffect(err) | OperationError::Partial(err) => err,
        }
    }
}

fn off() -> io::Error {
    io::Error::other("the power is off")
}

fn index(offset: u64) -> usize {
    usize::try_from(offset).expect("test files are small")
}

/// The part of the changes that reached the disk: the first ones, or any.
fn kept<T: Clone>(changes: &[T], in_order: bool, rng: &mut Rng) -> Vec<T> {
    if in_order {
        return changes[..rng.usize(..=changes.len())].to_vec();
    }
    changes.iter().filter(|_| rng.bool()).cloned().collect()
}

/// The changes with every write split where a disk may tear it.
fn sectors(changes: &[FileChange]) -> Vec<FileChange> {
    let mut split = Vec::new();
    for change in changes {
        let FileChange::Write(offset, bytes) = change else {
            split.push(change.clone());
            continue;
        };
        let mut at = 0;
        while at < bytes.len() {
            let to_boundary = SECTOR - (index(*offset) + at) % SECTOR;
            let end = bytes.len().min(at + to_boundary);
            split.push(FileChange::Write(offset + at as u64, bytes[at..end].to_vec()));
            at = end;
        }
    }
    split
}

impl Directory for SimulatedDisk {
    fn list(&self) -> io::Result<Vec<String>> {
        let state = &mut *self.state();
        state.read_only(Operation::List, "")?;
        Ok(state.names.keys().cloned().collect())
    }

    fn create(&self, name: &str) -> io::Result<Box<dyn File>> {
        let state = &mut *self.state();
        Self::operate(state, Operation::Create, name)?;
        if let Some(&inode) = state.names.get(name) {
            let handle = SimulatedFile { disk: self.clone(), inode, name: name.into() };
            handle.change(state, FileChange::Truncate(0));
            return Ok(Box::new(handle));
        }
        let inode = state.inodes.len();
        state.inodes.push(Inode::default());
        let name_change = NameChange::Link(name.into(), inode);
        name_change.apply(&mut state.names);
        state.pending_names.push(name_change);
        Ok(Box::new(SimulatedFile { disk: self.clone(), inode, name: name.into() }))
    }

    fn open(&self, name: &str) -> io::Result<Box<dyn File>> {
        let state = &mut *self.state();
        state.read_only(Operation::Open, name)?;
        let inode = *state.names.get(name).ok_or(io::ErrorKind::NotFound)?;
        Ok(Box::new(SimulatedFile { disk: self.clone(), inode, name: name.into() }))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        let inode = *self.state().names.get(from).ok_or(io::ErrorKind::NotFound)?;
        self.rename_names(Operation::Rename, from, NameChange::Rename(from.into(), to.into(), inode))
    }

    fn link(&self, from: &str, to: &str) -> io::Result<()> {
        let inode = {
            let state = self.state();
            if state.names.contains_key(to) {
                return Err(io::ErrorKind::AlreadyExists.into());
            }
            *state.names.get(from).ok_or(io::ErrorKind::NotFound)?
        };
        self.rename_names(Operation::Link, from, NameChange::Link(to.into(), inode))
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        self.rename_names(Operation::Remove, name, NameChange::Unlink(name.into()))
    }

    fn sync_dir(&self) -> io::Result<()> {
        let state = &mut *self.state();
        Self::operate(state, Operation::SyncDir, "")?;
        for name_change in std::mem::take(&mut state.pending_names) {
            name_change.apply(&mut state.durable_names);
        }
        Ok(())
    }

    fn find_missing(&self, name: &str, identity: FileIdentity) -> io::Result<Option<PathBuf>> {
        let state = &mut *self.state();
        state.read_only(Operation::Stat, name)?;
        let there = state.names.get(name).is_some_and(|inode| *inode as u64 == identity.inode);
        Ok((!there).then(|| PathBuf::from("data").join(name)))
    }
}

impl SimulatedDisk {
    fn rename_names(&self, operation: Operation, name: &str, name_change: NameChange) -> io::Result<()> {
        let state = &mut *self.state();
        let done = Self::operate(state, operation, name);
        // If the power went, it may have happened. An error while the power is on means that it has not.
        if matches!(done, Ok(()) | Err(OperationError::Partial(_))) && (done.is_ok() || state.off) {
            name_change.apply(&mut state.names);
            state.pending_names.push(name_change);
        }
        Ok(done?)
    }
}

#[derive(Debug)]
struct SimulatedFile {
    disk: SimulatedDisk,
    inode: usize,
    /// Its name when it was opened.
    name: String,
}

impl SimulatedFile {
    fn change(&self, state: &mut DiskState, change: FileChange) {
        let inode = &mut state.inodes[self.inode];
        change.apply(&mut inode.cached);
        inode.pending.push(change);
    }
}

impl File for SimulatedFile {
    fn len(&self) -> io::Result<u64> {
        let state = &mut *self.disk.state();
        state.read_only(Operation::Stat, &self.name)?;
        Ok(state.inodes[self.inode].cached.len() as u64)
    }

    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<usize> {
        let state = &mut *self.disk.state();
        state.read_only(Operation::Read, &self.name)?;
        let there = &state.inodes[self.inode].cached;
        let from = index(offset).min(there.len());
        let len = into.len().min(there.len() - from);
        into[..len].copy_from_slice(&there[from..from + len]);
        Ok(len)
    }

    fn write_at(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let state = &mut *self.disk.state();
        let done = SimulatedDisk::operate(state, Operation::Write, &self.name);
        match &done {
            Ok(()) => self.change(state, FileChange::Write(offset, bytes.to_vec())),
            // The disk is full or gone in the middle of it.
            Err(OperationError::Partial(_)) => {
                self.change(state, FileChange::Write(offset, bytes[..bytes.len() / 2].to_vec()));
            }
            Err(OperationError::NoEffect(_)) => {}
        }
        Ok(done?)
    }

    fn truncate(&mut self, len: u64) -> io::Result<()> {
        let state = &mut *self.disk.state();
        let done = SimulatedDisk::operate(state, Operation::Truncate, &self.name);
        if done.is_ok() || state.off {
            self.change(state, FileChange::Truncate(len));
        }
        Ok(done?)
    }

    fn sync(&mut self) -> io::Result<()> {
        let state = &mut *self.disk.state();
        let done = SimulatedDisk::operate(state, Operation::Sync, &self.name);
        let off = state.off;
        let inode = &mut state.inodes[self.inode];
        match &done {
            Ok(()) => {
                for change in std::mem::take(&mut inode.pending) {
                    change.apply(&mut inode.durable);
                }
            }
            // As Linux has it: after a failed fsync the pages count as clean. They can still be
            // read, and will never be written unless they are changed again.
            Err(OperationError::Partial(_)) if !off => inode.pending.clear(),
            Err(_) => {}
        }
        Ok(done?)
    }

    fn identity(&self) -> io::Result<FileIdentity> {
        Ok(FileIdentity { device: 0, inode: self.inode as u64 })
    }
}
