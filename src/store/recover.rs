//! The start: what stands in the directory, whether it is whole, and how the journal goes on.
//!
//! Every file is surveyed before a record of it is believed, so that a refusal names all that is
//! wrong at once. Then the records are read, the newest segment is put in order, and what a
//! snapshot has replaced is removed.
//!
//! # Torn tail or damage
//!
//! Octets that are no valid frame are a *torn tail* when nothing shows that they were ever
//! synced: they stand in the newest segment, and no frame behind them was written after a sync
//! that covered them (its `synced` offset says so). Only a batch that was never acknowledged
//! looks so after a crash, whose pages may reach the disk in any order. A torn tail is cut from
//! the beginning of its batch, and reported.
//!
//! Everything else is *damage*: acknowledged records are lost with it, and a start refuses until
//! somebody accepts that. Then all that can be read is merged into a new snapshot, and the
//! damaged files are set aside.

use std::{fs, ops::Range, path::PathBuf, sync::Arc, sync::atomic::AtomicBool};

use tracing::warn;

use super::{
    Damage, Journal, Options, Progress, Record, Recovery, StoreError,
    error::Trying,
    files::{File, Files, STAGED},
    format::{Payload, Reader, Unreadable},
    frame::{BadHeader, HEADER_LEN, Header, Kind, Place, StoreId},
    journal::{Found, Segment},
    outbox::Outbox,
    snapshot::{Closed, DAMAGED, Plan, Shared, compact, superseded},
    walk::{Piece, Walk, read_header},
};
use crate::metrics::Metrics;

/// Progress is reported each time so many octets were read.
const PROGRESS_EVERY: u64 = 4 << 20;

/// A start of the store.
pub(super) struct Start<'o> {
    pub(super) files: Arc<dyn Files>,
    pub(super) dir: PathBuf,
    pub(super) lock: Option<fs::File>,
    pub(super) options: &'o Options,
    pub(super) metrics: Arc<Metrics>,
}

/// Which files count, and which do not any more.
#[derive(Debug, Default)]
struct Layout {
    snapshot: Option<u64>,
    /// Behind the snapshot, in order.
    segments: Vec<u64>,
    needless: Vec<String>,
}

impl Layout {
    fn of(names: Vec<String>) -> Self {
        let mut layout = Self::default();
        let places: Vec<Place> = names.iter().filter_map(|name| Place::of(name)).collect();
        layout.snapshot = places.iter().filter(|place| place.kind == Kind::Snapshot).map(|place| place.number).max();
        let needless = |place: Place| layout.snapshot.is_some_and(|newest| superseded(place, newest));
        let segments = places.iter().filter(|place| place.kind == Kind::Journal && !needless(**place));
        layout.segments = segments.map(|place| place.number).collect();
        layout.segments.sort_unstable();
        layout.needless = names
            .into_iter()
            .filter(|name| match name.strip_suffix(STAGED) {
                Some(stem) => Place::of(stem).is_some(),
                None => Place::of(name).is_some_and(needless),
            })
            .collect();
        layout
    }
}

/// Octets of a file that are no frame, with the generations on either side.
#[derive(Debug)]
struct Bad {
    octets: Range<u64>,
    after: Option<u64>,
    before: Option<u64>,
}

impl Bad {
    fn loss(&self) -> String {
        match (self.after, self.before) {
            (Some(after), Some(before)) => format!("what changed after generation {after} and before {before}"),
            (Some(after), None) => format!("what changed after generation {after}"),
            (None, Some(before)) => format!("what changed before generation {before}"),
            (None, None) => "everything in the file".into(),
        }
    }
}

/// What one file is, before any record of it is believed.
#[derive(Debug)]
struct Survey {
    place: Place,
    file: Box<dyn File>,
    len: u64,
    header: Result<Header, BadHeader>,
    bad: Vec<Bad>,
    /// Everything before this offset was on the disk once.
    proven: u64,
    /// Where the last whole batch ends that has nothing bad before it.
    whole: u64,
    /// Where the last valid frame ends.
    valid: u64,
    /// The last valid frame is the end of a snapshot.
    ended: bool,
    /// Records are taken up to here; 0 for none.
    limit: u64,
}

impl Survey {
    /// Whether all that is wrong, if anything, stands where nothing was ever known to be synced.
    fn tail_is_torn(&self) -> bool {
        self.bad.first().map_or(self.whole, |bad| bad.octets.start) >= self.proven
    }
}

impl Start<'_> {
    /// Does everything that [`DataDir::recover`](super::DataDir::recover) says.
    pub(super) fn run(
        mut self,
        record: &mut dyn FnMut(Record),
        progress: &mut dyn FnMut(Progress),
    ) -> Result<(Journal, Recovery), StoreError> {
        let layout = Layout::of(self.files.list().trying("list", &self.dir)?);
        let mut repairs = Vec::new();
        let mut damages = gaps(&layout, &self.dir);
        let mut surveys = Vec::new();
        let places = layout.snapshot.map(Place::snapshot).into_iter();
        for place in places.chain(layout.segments.iter().map(|number| Place::journal(*number))) {
            surveys.push(self.survey(place)?);
        }
        let id = surveys.iter().find_map(|survey| Some(survey.header.as_ref().ok()?.id));
        let id = id.unwrap_or_else(StoreId::draw);
        self.judge(&mut surveys, id, &mut damages, &mut repairs);
        self.refuse(&damages)?;

        let mut outbox = Outbox::new(self.options.outbox);
        let generation = self.read(&surveys, id, &mut damages, &mut outbox, record, progress)?;
        for damage in &damages {
            repairs.push(format!("given up: {damage}"));
        }
        let shared = Shared {
            files: Arc::clone(&self.files),
            dir: self.dir.clone(),
            id,
            outbox: self.options.outbox,
            metrics: Arc::clone(&self.metrics),
        };
        let mut journal = self.journal(&shared, surveys, layout.snapshot, generation, &mut repairs)?;
        let forgets = !self.options.outbox && outbox.term > 0;
        if forgets && let Err(err) = journal.append(generation, &[Record::Term { term: 0 }]) {
            // The term stands, so no snapshot may forget what it is about; and none is made.
            warn!(dir = %self.dir.display(), %err, "cannot take back the term under which Kubernetes was written to");
        }
        if !damages.is_empty() {
            set_aside(&shared, &mut journal, &damages)?;
        }
        self.clean(&layout.needless);
        if !forgets || journal.usable().is_ok() {
            journal.compact();
        }
        let term = if forgets { 0 } else { outbox.term };
        Ok((journal, Recovery { generation, repairs, term, outbox: outbox.into_records() }))
    }

    /// Goes through a file once, for its checksums only.
    fn survey(&self, place: Place) -> Result<Survey, StoreError> {
        let path = self.dir.join(place.name());
        let file = self.files.open(&place.name()).trying("open", &path)?;
        let len = file.len().trying("read", &path)?;
        let header = read_header(&*file, place).trying("read", &path)?;
        if let Err(BadHeader::Newer(version)) = header {
            return Err(StoreError::Newer { path, what: format!("format version {version}") });
        }
        let start = HEADER_LEN as u64;
        let (mut bad, mut proven, mut whole, mut valid, mut ended) = (Vec::<Bad>::new(), start, start, start, false);
        let mut last = None;
        let mut walk = Walk::new(&*file, place, len);
        while let Some(piece) = walk.next().trying("read", &path)? {
            match piece {
                Piece::Bad(octets) => bad.push(Bad { octets, after: last, before: None }),
                Piece::Frame { frame, .. } if frame.unknown_flags != 0 => {
                    return Err(StoreError::Newer { path, what: format!("frame flags {:#x}", frame.unknown_flags) });
                }
                Piece::Frame { at, frame, .. } => {
                    if let Some(bad) = bad.last_mut() {
                        bad.before.get_or_insert(frame.generation);
                    } else if !frame.more {
                        whole = at.end;
                    }
                    proven = proven.max(frame.synced);
                    ended = frame.end && at.end == len;
                    valid = at.end;
                    last = Some(frame.generation);
                }
            }
        }
        drop(walk);
        Ok(Survey { place, file, len, header, bad, proven, whole, valid, ended, limit: len })
    }

    /// Tells damage from a torn tail.
    fn judge(&self, surveys: &mut [Survey], id: StoreId, damages: &mut Vec<Damage>, repairs: &mut Vec<String>) {
        for index in 0..surveys.len() {
            // What the file after it says of this one's length; 0 when that cannot be read.
            let next = surveys.get(index + 1).map(|next| match &next.header {
                Ok(header) if header.id == id => header.previous_len,
                _ => 0,
            });
            let survey = &mut surveys[index];
            let newest = survey.place.kind == Kind::Journal && next.is_none();
            let path = self.dir.join(survey.place.name());
            let mut damage = |octets: Option<Range<u64>>, what: &str, loss: String| {
                damages.push(Damage { path: path.clone(), octets, what: what.into(), loss });
            };
            match &survey.header {
                Ok(header) if header.id == id => {}
                Ok(_) => {
                    damage(None, "belongs to the data directory of another gangplank", "everything in the file".into());
                    survey.limit = 0;
                    continue;
                }
                Err(_) => {
                    let end = survey.len.min(HEADER_LEN as u64);
                    damage(Some(0..end), "the header is not what was written", "nothing if the rest is whole".into());
                }
            }
            if newest && survey.tail_is_torn() {
                let (cut, kept) = (survey.len.saturating_sub(survey.whole), survey.whole);
                if cut > 0 {
                    repairs.push(format!(
                        "{}: cut {cut} octets from offset {kept} on: they look like a batch that was being written when \
                         gangplank or the machine stopped, and nothing shows that it was acknowledged; kept the \
                         {kept} octets before it",
                        path.display(),
                    ));
                }
                survey.limit = kept;
                continue;
            }
            if newest {
                // If the loss is accepted, everything valid is taken and the rest of the tail cut.
                survey.limit = survey.valid;
            }
            for bad in &survey.bad {
                damage(Some(bad.octets.clone()), "the checksum does not match", bad.loss());
            }
            match (survey.place.kind, next) {
                (Kind::Snapshot, _) if !survey.ended => damage(
                    Some(survey.len..survey.len),
                    "the snapshot ends too early",
                    "the instances that stood behind it, in order of namespace and name".into(),
                ),
                (Kind::Journal, Some(closed @ 1..)) if survey.len < closed => {
                    damage(Some(survey.len..closed), "octets are missing at the end", "what they held".into());
                }
                (Kind::Journal, Some(closed @ 1..)) if survey.len > closed => {
                    let beyond = "octets stand behind the end at which it was closed";
                    damage(Some(closed..survey.len), beyond, "nothing acknowledged".into());
                    survey.limit = closed;
                }
                _ => {}
            }
        }
    }

    /// Gives every instance's record to `record`, the others to the outbox alone, and says which generation is the highest.
    fn read(
        &self,
        surveys: &[Survey],
        id: StoreId,
        damages: &mut Vec<Damage>,
        outbox: &mut Outbox,
        record: &mut dyn FnMut(Record),
        progress: &mut dyn FnMut(Progress),
    ) -> Result<u64, StoreError> {
        let total = surveys.iter().map(|survey| survey.limit).sum();
        let (mut generation, mut before, mut reported) = (0, 0, 0);
        for survey in surveys {
            if survey.header.as_ref().is_ok_and(|header| header.id != id) {
                continue;
            }
            let path = self.dir.join(survey.place.name());
            let mut reader = Reader::default();
            let mut walk = Walk::new(&*survey.file, survey.place, survey.limit);
            while let Some(piece) = walk.next().trying("read", &path)? {
                let Piece::Frame { at, frame, payload } = piece else { continue };
                generation = generation.max(frame.generation);
                let mut bad = |err| self.unreadable(&path, at.clone(), frame.generation, err, damages);
                match Payload::read(payload) {
                    Ok(payload) => {
                        for entry in payload.entries {
                            let slot = outbox.slot(&entry, frame.generation);
                            match reader.record(entry) {
                                Ok(read) => outbox.take(slot, read).into_iter().for_each(&mut *record),
                                Err(err) => bad(err)?,
                            }
                        }
                    }
                    Err(err) => bad(err)?,
                }
                let read = before + at.end;
                if read - reported >= PROGRESS_EVERY {
                    reported = read;
                    progress(Progress { read, total });
                }
            }
            before += survey.limit;
        }
        progress(Progress { read: total, total });
        Ok(generation)
    }

    /// A checksum is right and yet the record is none.
    fn unreadable(
        &self,
        path: &std::path::Path,
        octets: Range<u64>,
        generation: u64,
        err: Unreadable,
        damages: &mut Vec<Damage>,
    ) -> Result<(), StoreError> {
        match err {
            Unreadable::Newer(what) => Err(StoreError::Newer { path: path.into(), what }),
            Unreadable::Invalid(err) => {
                damages.push(Damage {
                    path: path.into(),
                    octets: Some(octets),
                    what: format!("a record is not one that gangplank would write: {err}"),
                    loss: format!("that record, of generation {generation}"),
                });
                self.refuse(damages)
            }
        }
    }

    /// Refuses to go on over damage that nobody has accepted.
    fn refuse(&self, damages: &[Damage]) -> Result<(), StoreError> {
        if damages.is_empty() || self.options.accept_loss {
            return Ok(());
        }
        Err(StoreError::Damaged { dir: self.dir.clone(), damages: damages.to_vec() })
    }

    /// Opens the journal at the end of the newest segment.
    fn journal(
        &mut self,
        shared: &Shared,
        mut surveys: Vec<Survey>,
        snapshot: Option<u64>,
        generation: u64,
        repairs: &mut Vec<String>,
    ) -> Result<Journal, StoreError> {
        let newest = surveys.pop_if(|survey| survey.place.kind == Kind::Journal && survey.limit > 0);
        let closed = |kind| {
            surveys
                .iter()
                .filter(move |survey| survey.place.kind == kind)
                .map(|survey| Closed { number: survey.place.number, len: survey.limit })
        };
        let found =
            Found { closed: closed(Kind::Journal).collect(), snapshot: closed(Kind::Snapshot).next(), generation };
        let last = found.closed.last().map(|segment| segment.number).or(snapshot).unwrap_or(0);
        let mut settled = Ok(());
        let segment = match newest {
            // Nothing was ever appended to it. It is made once more, in case the directory was
            // not synced when it was made.
            Some(Survey { place, header: Ok(header), limit, .. }) if limit == HEADER_LEN as u64 => {
                match Segment::create(shared, place.number, header.previous_len) {
                    Ok(segment) => segment,
                    Err(err) => {
                        let file = self.files.open(&place.name()).trying("open", self.dir.join(place.name()))?;
                        settled = Err(err);
                        Segment::unsettled(place, file, limit)
                    }
                }
            }
            Some(newest) => {
                let (segment, done) = Segment::resume(newest.place, newest.file, newest.proven, newest.limit);
                settled = done;
                segment
            }
            None => {
                let previous_len = found.closed.last().map_or(0, |segment| segment.len);
                let name = Place::journal(last + 1).name();
                Segment::create(shared, last + 1, previous_len).trying("create", self.dir.join(name))?
            }
        };
        let mut journal = Journal::open(shared.clone(), segment, found, self.options.segment_octets, self.lock.take());
        let opened = match settled {
            Ok(()) => journal.mark(),
            Err(err) => Err(journal.unsettled(err)),
        };
        // What is stored can be served even so.
        if let Err(err) = opened {
            repairs.push(format!("not repaired: {err}"));
        }
        Ok(journal)
    }

    /// Removes what no start reads any more.
    fn clean(&self, needless: &[String]) {
        if needless.is_empty() {
            return;
        }
        // The name of the snapshot that replaces them must be on the disk first.
        let removed = self.files.sync_dir().and_then(|()| needless.iter().try_for_each(|name| self.files.remove(name)));
        if let Err(err) = removed {
            warn!(dir = %self.dir.display(), %err, "cannot remove files that a snapshot has replaced; they cost only space");
        }
    }
}

/// Files that must be there and are not.
fn gaps(layout: &Layout, dir: &std::path::Path) -> Vec<Damage> {
    if layout.snapshot.is_none() && layout.segments.is_empty() {
        return Vec::new(); // a new directory
    }
    let mut expected = layout.snapshot.unwrap_or(0) + 1;
    let mut missing = Vec::new();
    // Behind a snapshot there is always a segment: it was begun before.
    let end = layout.segments.last().map_or(expected + 1, |last| last + 1);
    for number in layout.segments.iter().copied().chain([end]) {
        if number > expected {
            let what = match number - expected {
                1 => "is missing".into(),
                more => format!("is missing, and so are the {} segments after it", more - 1),
            };
            let path = dir.join(Place::journal(expected).name());
            missing.push(Damage { path, octets: None, what, loss: "everything in it".into() });
        }
        expected = number + 1;
    }
    missing
}

/// Goes on without what is damaged: everything that can be read becomes a new snapshot.
fn set_aside(shared: &Shared, journal: &mut Journal, damages: &[Damage]) -> Result<(), StoreError> {
    journal.rotate()?;
    let (snapshot, segments) = journal.closed();
    let names = damages.iter().filter_map(|damage| Place::of(damage.path.file_name()?.to_str()?));
    let plan = Plan { snapshot, segments, lossy: true, keep: names.collect() };
    match compact(shared, &plan, &AtomicBool::new(false)) {
        Ok(snapshot) => {
            journal.replaced_by(snapshot);
            Ok(())
        }
        Err(err) => Err(StoreError::Io {
            doing: "write a new snapshot without the damaged files in",
            path: shared.dir.clone(),
            source: Arc::new(std::io::Error::other(format!("{err} (damaged files keep the ending {DAMAGED})"))),
        }),
    }
}
