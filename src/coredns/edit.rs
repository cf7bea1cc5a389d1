//! Puts lines between markers into a Corefile, and takes them out.

use std::ops::Range;

use super::{
    CorefileError, Plan, Wiring,
    blocks::{INDENT, REVERSE_ZONES, push},
    caddyfile::{CaddyToken, Caddyfile, Comment, ServerBlock, Statement},
    fall_through, stub_domain,
};

/// The marker before added lines. Only its beginning is looked at.
const BEGIN: &str = "# gangplank coredns: begin";

/// What follows it in the same comment.
const BEGIN_NOTE: &str = "; `gangplank coredns --remove` takes out all to the end";

/// The marker after them.
const END: &str = "# gangplank coredns: end";

/// The marker with a line that was replaced, as it was.
const WAS: &str = "# gangplank coredns: was:";

/// One change of a text: `replaced` becomes `by`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct TextEdit {
    pub(super) replaced: Range<usize>,
    pub(super) by: String,
}

impl TextEdit {
    /// Adds `lines` at `at`, the beginning of a line.
    pub(super) fn add(at: usize, indent: &str, lines: &[String]) -> Self {
        Self { replaced: at..at, by: marked(indent, None, lines) }
    }

    /// Replaces the line at `replaced` by `lines`.
    fn replace(file: &Caddyfile<'_>, replaced: Range<usize>, indent: &str, lines: &[String]) -> Self {
        let was = file.text[replaced.clone()].trim_end_matches('\n');
        Self { replaced, by: marked(indent, Some(was), lines) }
    }

    /// Adds `lines` to the block of a plugin, which gets one if it has none.
    pub(super) fn add_properties(
        file: &Caddyfile<'_>,
        plugin: &Statement<'_>,
        lines: &[String],
    ) -> Result<Self, CorefileError> {
        let (name, line) = (&plugin.name().text, plugin.name().line);
        let Some(indent) = file.indentation(plugin.name().start) else {
            return Err(CorefileError::at(line, format!("`{name}` does not begin its line")));
        };
        let deeper = format!("{indent}{INDENT}");
        if let Some(block) = &plugin.block {
            if file.indentation(block.close.start).is_none() {
                return Err(CorefileError::at(
                    block.close.line,
                    format!("the `}}` of `{name}` does not begin its line"),
                ));
            }
            let inner = block.statements.first().and_then(|first| file.indentation(first.name().start));
            return Ok(Self::add(file.line_start(block.close.start), inner.unwrap_or(&deeper), lines));
        }
        let whole = file.line_start(plugin.name().start)..file.line_end(plugin.end());
        let head = &file.text[plugin.name().start..plugin.end()];
        if head.contains('\n') {
            return Err(CorefileError::at(line, format!("`{name}` has an argument over several lines")));
        }
        let mut all = vec![format!("{head} {{")];
        all.extend(lines.iter().map(|line| format!("{INDENT}{line}")));
        all.push("}".into());
        Ok(Self::replace(file, whole, indent, &all))
    }
}

/// Lines between their markers.
fn marked(indent: &str, was: Option<&str>, lines: &[String]) -> String {
    let mut text = format!("{indent}{BEGIN}{BEGIN_NOTE}\n");
    if let Some(was) = was {
        // The line as it was, with its indentation and what is at its end.
        text.push_str(&format!("{indent}{WAS}{was}\n"));
    }
    push(&mut text, indent, lines);
    text.push_str(&format!("{indent}{END}\n"));
    text
}

/// The text with what the plan wants between markers, in place of what an earlier plan put there.
///
/// # Errors
/// When the text does not follow the syntax, or when the place is not certain.
pub fn apply(text: &str, plan: &Plan) -> Result<String, CorefileError> {
    // From the text without an earlier plan: applying twice changes nothing, and another plan takes its place.
    let base = remove(text)?;
    let file = Caddyfile::parse(&base)?;
    let edits = match &plan.wiring {
        Wiring::StubDomain { namespaces } => vec![stub_domain::edit(&file, plan, namespaces)?],
        Wiring::FallThrough { reverse } => fall_through::edits(&file, plan, *reverse)?,
    };
    let edited = spliced(&base, edits);
    // What is written must be possible to take out again, and CoreDNS must be able to read it.
    if remove(&edited).as_deref() != Ok(base.as_str()) {
        return Err(CorefileError::missing("the lines could not be taken out again: a fault of gangplank"));
    }
    Ok(edited)
}

/// The text without the markers and what is between them; lines that were replaced are there again.
///
/// # Errors
/// When the text does not follow the syntax, or when a marker lacks its counterpart.
pub fn remove(text: &str) -> Result<String, CorefileError> {
    let file = Caddyfile::parse(text)?;
    let marks = marks(&file)?;
    if marks.is_empty() {
        return Ok(text.to_owned());
    }
    let edits = marks.into_iter().map(|mark| {
        let mut replaced = mark.range;
        let mut by: String = mark.was.iter().map(|line| format!("{line}\n")).collect();
        // At the end of a text without a final line feed, the line feed before was added too.
        let last = replaced.end == text.len() && !text.ends_with('\n');
        if last && by.pop().is_none() && text[..replaced.start].ends_with('\n') {
            replaced.start -= 1;
        }
        TextEdit { replaced, by }
    });
    let removed = spliced(text, edits.collect());
    // Markers that somebody moved may hold half of a block.
    Caddyfile::parse(&removed).map_err(|err| {
        CorefileError::missing(format!("without the lines between the markers it would be invalid: {err}"))
    })?;
    Ok(removed)
}

/// What is forwarded between the markers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Wired {
    /// All questions below this name.
    StubDomain(String),
    /// Questions in this zone that Kubernetes does not know.
    FallThrough(String),
}

/// What is forwarded between the markers, in the order of the text.
///
/// # Errors
/// As [`remove`].
pub fn wired(text: &str) -> Result<Vec<Wired>, CorefileError> {
    let file = Caddyfile::parse(text)?;
    let marks = marks(&file)?;
    let marked = |at: usize| marks.iter().any(|mark| mark.range.contains(&at));
    let mut found = Vec::new();
    for server in &file.servers {
        if marked(server.keys[0].start) {
            found.extend(server.keys.iter().filter_map(ServerBlockKey::of).map(|key| Wired::StubDomain(key.zone)));
            continue;
        }
        let forwards = server.body.statements.iter().filter(|one| one.is("forward") && marked(one.name().start));
        let zones = forwards.filter_map(|forward| forward.arguments().next());
        let zones = zones.filter(|zone| !REVERSE_ZONES.contains(zone));
        found.extend(zones.map(|zone| Wired::FallThrough(zone.to_owned())));
    }
    Ok(found)
}

/// Whether CoreDNS reads this file again when it changes, as far as the file itself says: imported files may say so too.
#[must_use]
pub fn reads_changes(text: &str) -> bool {
    let Ok(file) = Caddyfile::parse(text) else { return false };
    let blocks = || file.servers.iter().chain(&file.snippets);
    file.imports || blocks().any(|block| block.body.statements.iter().any(|one| one.is("reload") || one.is("import")))
}

/// Added lines with their markers.
struct Mark<'t> {
    /// From the beginning of the first marker's line to the end of the last one's.
    range: Range<usize>,
    was: Vec<&'t str>,
}

fn marks<'t>(file: &Caddyfile<'t>) -> Result<Vec<Mark<'t>>, CorefileError> {
    let mut marks: Vec<Mark<'t>> = Vec::new();
    let mut open: Option<(Mark<'t>, usize)> = None;
    for &Comment { start, end, line } in &file.comments {
        let comment = &file.text[start..end];
        // A comment behind other words: markers stand in lines of their own, so it is somebody's text about them.
        if file.indentation(start).is_none() {
            continue;
        }
        if comment.starts_with(BEGIN) {
            if open.is_some() {
                return Err(CorefileError::at(line, format!("`{BEGIN}` again, before `{END}`")));
            }
            open = Some((Mark { range: file.line_start(start)..0, was: Vec::new() }, line));
        } else if comment.starts_with(END) {
            let Some((mut mark, _)) = open.take() else {
                return Err(CorefileError::at(line, format!("`{END}` without `{BEGIN}`")));
            };
            mark.range.end = file.line_end(start);
            marks.push(mark);
        } else if let (Some((mark, _)), Some(was)) = (&mut open, comment.strip_prefix(WAS)) {
            mark.was.push(was);
        }
    }
    match open {
        Some((_, line)) => Err(CorefileError::at(line, format!("`{BEGIN}` without `{END}`"))),
        None => Ok(marks),
    }
}

fn spliced(text: &str, mut edits: Vec<TextEdit>) -> String {
    // By place: each edit knows offsets of the text before any of them.
    edits.sort_by_key(|edit| edit.replaced.start);
    let (mut result, mut at) = (String::with_capacity(text.len()), 0);
    for TextEdit { replaced, by } in edits {
        result.push_str(&text[at..replaced.start]);
        result.push_str(&by);
        at = replaced.end;
    }
    result + &text[at..]
}

/// The zone and the port that a server block names, if that is plain DNS.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ServerBlockKey {
    /// In lower case, without the final dot; empty for the root.
    pub(super) zone: String,
    pub(super) port: Option<String>,
}

impl ServerBlockKey {
    /// `None` for another transport, an address block, or a name that depends on the environment.
    pub(super) fn of(word: &CaddyToken<'_>) -> Option<Self> {
        let text = word.text.strip_prefix("dns://").unwrap_or(&word.text);
        if text.contains("://") || text.contains('/') || text.contains('{') {
            return None;
        }
        let (zone, port) = match text.rsplit_once(':') {
            Some((zone, port)) if !port.is_empty() && port.bytes().all(|b| b.is_ascii_digit()) => {
                (zone, Some(port.to_owned()))
            }
            _ => (text, None),
        };
        Some(Self { zone: normal(zone), port })
    }
}

/// A zone in lower case, without the final dot.
pub(super) fn normal(zone: &str) -> String {
    zone.strip_suffix('.').unwrap_or(zone).to_ascii_lowercase()
}

/// Whether `name` is `zone` or below it. Both are [`normal`].
pub(super) fn within(name: &str, zone: &str) -> bool {
    // At a dot: `notcluster.local` ends in `cluster.local` and is not below it.
    zone.is_empty() || name.strip_suffix(zone).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
}

/// The zones of a server block, where they are known.
pub(super) fn zones(server: &ServerBlock<'_>) -> Vec<String> {
    server.keys.iter().filter_map(ServerBlockKey::of).map(|key| key.zone).collect()
}
