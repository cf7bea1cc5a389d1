//! Recovery: reads the directory at the start, checks it, and opens the journal.
//!
//! Every file is scanned ([`scan`](super::scan)) before any record is used, so that a refusal names
//! everything that is wrong at once. Then the records are replayed, the active segment is repaired,
//! and obsolete files are removed. If somebody accepts a loss, everything that can be read is merged
//! into a new snapshot, and the corrupt files are set aside.

use std::{
    io::ErrorKind,
    ops::Range,
    path::PathBuf,
    sync::{Arc, atomic::AtomicBool},
};

use tracing::warn;

use super::{
    Corruption, DirectoryTerm, Journal, Record, RecoveryProgress, RecoveryReport, StoreError, StoreOptions,
    clean_stop::{CLEAN_STOP, CleanStop},
    compaction::{CORRUPT_SUFFIX, ClosedFile, CompactionPlan, StoreContext, compact},
    disk::Directory,
    error::IoContext,
    format::{DecodeError, Payload, RecordDecoder},
    frame::{FileId, FileKind, HEADER_LEN, HeaderError, StoreId},
    journal::{LiveFiles, Segment},
    outbox::Outbox,
    reader::{FrameReader, ScanItem},
    scan::{FileScan, FileSet, classify, missing_segments},
};
use crate::metrics::Metrics;

/// Bytes between two progress reports.
const PROGRESS_INTERVAL: u64 = 4 << 20;

/// What a recovery works with.
pub(super) struct StoreOpener<'o> {
    pub(super) files: Arc<dyn Directory>,
    pub(super) dir: PathBuf,
    pub(super) options: &'o StoreOptions,
    pub(super) metrics: Arc<Metrics>,
}

impl StoreOpener<'_> {
    /// See [`DataDir::recover`](super::DataDir::recover).
    pub(super) fn open(
        mut self,
        record: &mut dyn FnMut(Record),
        progress: &mut dyn FnMut(RecoveryProgress),
    ) -> Result<(Journal, RecoveryReport), StoreError> {
        let set = FileSet::of(self.files.list().io_context("list", &self.dir)?);
        let mut repairs = Vec::new();
        let mut corruptions = Vec::new();
        let clean_stop = self.clean_stop(&mut corruptions)?;
        corruptions.extend(missing_segments(&set, clean_stop, &self.dir));
        let mut scans = Vec::new();
        let ids = set.snapshot.map(FileId::snapshot).into_iter();
        for file_id in ids.chain(set.segments.iter().map(|number| FileId::journal(*number))) {
            scans.push(FileScan::read(&*self.files, &self.dir, file_id)?);
        }
        // Every file but a corrupt one has the id, so any header will do. Without a valid header the id is
        // that of the clean-stop file, so that the file is not taken for another store's.
        let id = scans.iter().find_map(|scan| Some(scan.header.as_ref().ok()?.id));
        let id = id.or_else(|| clean_stop.map(|stop| stop.id)).unwrap_or_else(StoreId::random);
        let clean_stop = clean_stop.filter(|stop| {
            let same_store = stop.id == id;
            if !same_store {
                corruptions.push(self.clean_stop_corruption("belongs to the data directory of another gangplank"));
            }
            same_store
        });
        // Up to the refusal nothing is written: a start that is refused leaves the directory as it was.
        classify(&self.dir, &mut scans, id, clean_stop, &mut corruptions, &mut repairs);
        self.refuse(&corruptions)?;

        let mut outbox = Outbox::new(self.options.outbox);
        let mut changed = 0;
        let mut count = |generation: u64, read| {
            changed = changed.max(generation);
            record(read);
        };
        let generation = self.read(&scans, id, &mut corruptions, &mut outbox, &mut count, progress)?;
        for corruption in &corruptions {
            repairs.push(format!("loss accepted: {corruption}"));
        }
        let tombstones = self.options.outbox || outbox.term.is_some();
        let context = StoreContext {
            files: Arc::clone(&self.files),
            dir: self.dir.clone(),
            id,
            outbox: self.options.outbox,
            tombstones,
            metrics: Arc::clone(&self.metrics),
        };
        let mut journal = self.journal(&context, scans, set.snapshot, generation, &mut repairs)?;
        // Without the outbox later snapshots do not say what is unmirrored. Term 0 makes the next start with Kubernetes count everything.
        let drops_outbox = !self.options.outbox && outbox.term.is_some_and(|term| term.term > 0);
        if drops_outbox && let Err(err) = journal.append(generation, &[Record::Term(DirectoryTerm::default())]) {
            // The stored term still vouches for the outbox, so no snapshot may drop it: none is made.
            warn!(dir = %self.dir.display(), %err, "cannot reset the term under which Kubernetes was written to");
        }
        if !corruptions.is_empty() {
            quarantine(&context, &mut journal, &corruptions)?;
        }
        // If the journal cannot be written, for a reason that the repairs name, neither can the rest.
        if journal.usable().is_ok() {
            self.remove_obsolete(&set.obsolete);
            journal.compact();
        }
        let mut term = outbox.term.filter(|_| !drops_outbox).unwrap_or_default();
        if !corruptions.is_empty() && term.term > 0 {
            // Kubernetes may have what was lost: the directory is not the newest state any more.
            term.followed = true;
            journal.append(generation, &[Record::Term(term)])?;
        }
        let outbox = outbox.into_records();
        Ok((journal, RecoveryReport { generation, changed, repairs, term, outbox, tombstones }))
    }

    /// Reads the clean-stop file, if there is one.
    fn clean_stop(&self, corruptions: &mut Vec<Corruption>) -> Result<Option<CleanStop>, StoreError> {
        let path = self.dir.join(CLEAN_STOP);
        match CleanStop::read(&*self.files).io_context("read", &path)? {
            None => Ok(None),
            Some(Ok(stop)) => Ok(Some(stop)),
            Some(Err(HeaderError::Newer(version))) => {
                Err(StoreError::Newer { path, what: format!("format version {version}") })
            }
            Some(Err(_)) => {
                corruptions.push(self.clean_stop_corruption("the checksum does not match"));
                Ok(None)
            }
        }
    }

    fn clean_stop_corruption(&self, what: &str) -> Corruption {
        let loss = "nothing if the journal is intact".into();
        Corruption { path: self.dir.join(CLEAN_STOP), bytes: None, what: what.into(), loss }
    }

    /// Passes the records of instances to `record`, each with the generation of its frame, and all to the outbox. Returns the
    /// highest generation.
    fn read(
        &self,
        scans: &[FileScan],
        id: StoreId,
        corruptions: &mut Vec<Corruption>,
        outbox: &mut Outbox,
        record: &mut dyn FnMut(u64, Record),
        progress: &mut dyn FnMut(RecoveryProgress),
    ) -> Result<u64, StoreError> {
        let total = scans.iter().map(|scan| scan.replay_end).sum();
        let (mut generation, mut before, mut reported) = (0, 0, 0);
        for scan in scans {
            if scan.header.as_ref().is_ok_and(|header| header.id != id) {
                continue;
            }
            let path = self.dir.join(scan.file_id.file_name());
            let mut reader = RecordDecoder::default();
            let mut frames = FrameReader::new(&*scan.file, scan.file_id, scan.replay_end);
            while let Some(item) = frames.next().io_context("read", &path)? {
                let ScanItem::Frame { at, frame, payload } = item else { continue };
                generation = generation.max(frame.generation);
                let mut reject = |err| self.reject(&path, at.clone(), frame.generation, err, corruptions);
                match Payload::read(payload) {
                    Ok(payload) => {
                        for entry in payload.entries {
                            let outbox_key = outbox.outbox_key(&entry, frame.generation);
                            match reader.record(entry) {
                                Ok(read) => outbox
                                    .take(outbox_key, read)
                                    .into_iter()
                                    .for_each(|read| record(frame.generation, read)),
                                Err(err) => reject(err)?,
                            }
                        }
                    }
                    Err(err) => reject(err)?,
                }
                let read = before + at.end;
                if read - reported >= PROGRESS_INTERVAL {
                    reported = read;
                    progress(RecoveryProgress { read, total });
                }
            }
            before += scan.replay_end;
        }
        progress(RecoveryProgress { read: total, total });
        Ok(generation)
    }

    /// Handles a record that cannot be used although its checksum is right.
    fn reject(
        &self,
        path: &std::path::Path,
        bytes: Range<u64>,
        generation: u64,
        err: DecodeError,
        corruptions: &mut Vec<Corruption>,
    ) -> Result<(), StoreError> {
        match err {
            // Not even where losses are accepted: the newer version can read the record, so nothing needs to be lost.
            DecodeError::Newer(what) => Err(StoreError::Newer { path: path.into(), what }),
            DecodeError::Invalid(err) => {
                corruptions.push(Corruption {
                    path: path.into(),
                    bytes: Some(bytes),
                    what: format!("a record is not one that gangplank would write: {err}"),
                    loss: format!("that record, of generation {generation}"),
                });
                self.refuse(corruptions)
            }
        }
    }

    /// Fails if anything is corrupt, unless the loss is accepted.
    fn refuse(&self, corruptions: &[Corruption]) -> Result<(), StoreError> {
        if corruptions.is_empty() || self.options.accept_loss {
            return Ok(());
        }
        Err(StoreError::Corrupt { dir: self.dir.clone(), corruptions: corruptions.to_vec() })
    }

    /// Opens the journal at the end of the active segment.
    fn journal(
        &mut self,
        context: &StoreContext,
        mut scans: Vec<FileScan>,
        snapshot: Option<u64>,
        generation: u64,
        repairs: &mut Vec<String>,
    ) -> Result<Journal, StoreError> {
        let active = scans.pop_if(|scan| scan.file_id.kind == FileKind::Journal && scan.replay_end > 0);
        let closed = |kind| {
            scans
                .iter()
                .filter(move |scan| scan.file_id.kind == kind)
                .map(|scan| ClosedFile { number: scan.file_id.number, len: scan.replay_end })
        };
        let found = LiveFiles {
            closed: closed(FileKind::Journal).collect(),
            snapshot: closed(FileKind::Snapshot).next(),
            generation,
        };
        let last = found.closed.last().map(|segment| segment.number).or(snapshot).unwrap_or(0);
        let mut repaired = Ok(());
        let segment = match active {
            // Nothing was appended to it. It is created again, in case the directory was not synced
            // when it was created.
            Some(FileScan { file_id, header: Ok(header), replay_end, .. }) if replay_end == HEADER_LEN as u64 => {
                match Segment::create(context, file_id.number, header.previous_len) {
                    Ok(segment) => segment,
                    Err(err) => {
                        let file = self
                            .files
                            .open(&file_id.file_name())
                            .io_context("open", self.dir.join(file_id.file_name()))?;
                        repaired = Err(err);
                        Segment::unwritable(file_id, file, replay_end)
                    }
                }
            }
            Some(active) => {
                let (segment, done) = Segment::resume(active.file_id, active.file, active.synced, active.replay_end);
                repaired = done;
                segment
            }
            // A new directory, or one whose active segment is among the accepted losses.
            None => {
                let previous_len = found.closed.last().map_or(0, |segment| segment.len);
                let name = FileId::journal(last + 1).file_name();
                Segment::create(context, last + 1, previous_len).io_context("create", self.dir.join(name))?
            }
        };
        let mut journal = Journal::open(context.clone(), segment, found, self.options.segment_bytes);
        let opened = match repaired {
            Ok(()) => journal.append_sync_marker(),
            Err(err) => Err(journal.fail_repair(err)),
        };
        // What is stored can be served all the same.
        if let Err(err) = opened {
            repairs.push(format!("not repaired: {err}"));
        }
        Ok(journal)
    }

    /// Removes files that no start reads any more.
    fn remove_obsolete(&self, obsolete: &[String]) {
        if obsolete.is_empty() {
            return;
        }
        // The name of the snapshot that replaces them must be on the disk first.
        let removed = self.files.sync_dir().and_then(|()| obsolete.iter().try_for_each(|name| self.files.remove(name)));
        if let Err(err) = removed {
            warn!(dir = %self.dir.display(), %err, "cannot remove files that a snapshot has replaced; they only take space");
        }
    }
}

/// Writes everything that can be read into a new snapshot. An operator can inspect the corrupt files under
/// their second names.
fn quarantine(context: &StoreContext, journal: &mut Journal, corruptions: &[Corruption]) -> Result<(), StoreError> {
    // A compaction reads closed segments only. The active one may be corrupt too, and is set aside then.
    journal.rotate()?;
    let (snapshot, segments) = journal.compaction_input();
    let mut names: Vec<FileId> =
        corruptions.iter().filter_map(|corruption| FileId::parse(corruption.path.file_name()?.to_str()?)).collect();
    names.dedup();
    names.retain(|file_id| !link_corrupt(&*context.files, &file_id.file_name()));
    // Before the snapshot has its name: from then on a start removes the files that the snapshot replaces.
    context.files.sync_dir().io_context("sync", &context.dir)?;
    let plan = CompactionPlan { snapshot, segments, lossy: true, keep: names };
    match compact(context, &plan, &AtomicBool::new(false)) {
        Ok(snapshot) => {
            journal.install_snapshot(snapshot);
            // Only now, when nothing is missing any more: until then every start has to ask again.
            CleanStop::remove(&*context.files).io_context("remove", context.dir.join(CLEAN_STOP))
        }
        Err(err) => Err(StoreError::Io {
            operation: "leave out what is corrupt and write",
            path: context.dir.join(plan.snapshot_id().file_name()),
            source: Arc::new(std::io::Error::other(err.to_string())),
        }),
    }
}

/// Gives a corrupt file its second name. Returns false where the file system has no hard links, or the file
/// is missing.
fn link_corrupt(files: &dyn Directory, name: &str) -> bool {
    let kept = format!("{name}{CORRUPT_SUFFIX}");
    let linked = match files.link(name, &kept) {
        // Of an earlier start that was killed, or of an older copy of this directory.
        Err(err) if err.kind() == ErrorKind::AlreadyExists => {
            files.remove(&kept).and_then(|()| files.link(name, &kept))
        }
        linked => linked,
    };
    linked.is_ok()
}
