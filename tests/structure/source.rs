//! Rust sources as far as the structure tests need them: code without comments and literals, the
//! comments and literals alone, and the paths that the code names.

use std::{
    fs,
    path::{Path, PathBuf},
};

/// One source file.
#[derive(Debug)]
pub(super) struct Source {
    /// Relative to the repository, with slashes.
    pub(super) path: String,
    /// The code, comments and literals blanked, line for line.
    pub(super) code: String,
    /// The comments and literals, code blanked, line for line.
    pub(super) prose: String,
}

impl Source {
    pub(super) fn new(path: &str, text: &str) -> Self {
        let code = blank(text);
        Self { path: path.to_owned(), prose: inverse(text, &code), code }
    }

    /// Every source below `folders` of the repository, in order.
    pub(super) fn all(root: &Path, folders: &[&str]) -> Vec<Self> {
        let mut paths = Vec::new();
        for folder in folders {
            collect(&root.join(folder), &mut paths);
        }
        paths.sort();
        paths
            .into_iter()
            .map(|path| {
                let text = fs::read_to_string(&path).expect("a source is UTF-8");
                let path = path.strip_prefix(root).expect("it was found below the root");
                Self::new(path.to_str().expect("file names are ASCII"), &text)
            })
            .collect()
    }

    /// The code before the tests at its end; nothing of a file that is all tests.
    pub(super) fn shipped(&self) -> &str {
        if self.path.ends_with("/tests.rs") || self.path.contains("/tests/") {
            return "";
        }
        let tests = self.code.match_indices("#[cfg(test)]").find(|(at, attribute)| {
            let next = self.code[at + attribute.len()..].trim_start();
            next.starts_with("mod ") && next.find('{') < next.find(';').or(Some(usize::MAX))
        });
        tests.map_or(&self.code, |(at, _)| &self.code[..at])
    }

    /// The module of a file below `src`, for instance `["dns", "udp"]`; empty for the crate's root.
    pub(super) fn module(&self) -> Vec<&str> {
        let inner = self.path.strip_prefix("src/").unwrap_or(&self.path);
        let inner = inner.strip_suffix(".rs").unwrap_or(inner);
        let inner = inner.strip_suffix("/mod").unwrap_or(inner);
        if inner == "lib" { Vec::new() } else { inner.split('/').collect() }
    }

    /// What the shipped code names below the crate's root, as `module` or `module::item`.
    pub(super) fn crate_paths(&self) -> Vec<String> {
        let code = self.shipped();
        let mut roots = vec!["crate::".to_owned()];
        if let depth @ 1.. = self.module().len() {
            roots.push("super::".repeat(depth)); // as many steps up as lead to the root
        }
        if self.path == "src/main.rs" {
            roots.push("gangplank::".to_owned());
        }
        let mut found = Vec::new();
        for root in roots {
            for at in words(code, &root) {
                let before = &code[..at];
                if !before.ends_with("::") {
                    branches(&code[at + root.len()..], &mut found);
                }
            }
        }
        found
    }

    /// What the shipped code names below the module `parent`, which is `depth` steps below the root.
    pub(super) fn paths_below(&self, parent: &str, depth: usize) -> Vec<String> {
        let code = self.shipped();
        let up = "super::".repeat(self.module().len() - depth); // as many steps up as lead to the parent
        let mut found = Vec::new();
        for at in words(code, &up).filter(|&at| !code[..at].ends_with("::")) {
            branches(&code[at + up.len()..], &mut found);
        }
        let down = format!("{parent}::");
        words(code, &down).for_each(|at| branches(&code[at + down.len()..], &mut found));
        // Further steps up from the parent are the business of `crate_paths`.
        found.retain(|path| !path.starts_with("super"));
        found
    }
}

/// Where `word`, not as the end of a longer word, stands in `code`.
pub(super) fn words<'a>(code: &'a str, word: &'a str) -> impl Iterator<Item = usize> + 'a {
    let inside = |c: char| c.is_alphanumeric() || c == '_';
    code.match_indices(word).map(|(at, _)| at).filter(move |&at| {
        let after = code[at + word.len()..].chars().next();
        let ends = !word.ends_with(inside) || !after.is_some_and(inside);
        ends && !code[..at].ends_with(inside)
    })
}

/// The line of an offset, from 1.
pub(super) fn line(code: &str, at: usize) -> usize {
    code[..at].matches('\n').count() + 1
}

fn collect(folder: &Path, into: &mut Vec<PathBuf>) {
    let Ok(entries) = fs::read_dir(folder) else { return };
    for entry in entries {
        let path = entry.expect("a folder can be read to its end").path();
        if path.is_dir() {
            collect(&path, into);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            into.push(path);
        }
    }
}

/// The first two segments of each path in `{a, b::{c, d::e}}` or `a::b::c`, a `use` tree or a path.
fn branches(tree: &str, into: &mut Vec<String>) {
    let tree = tree.trim_start();
    let Some(inner) = tree.strip_prefix('{') else {
        let first = segment(tree);
        let rest = tree[first.len()..].strip_prefix("::").map(str::trim_start);
        match rest {
            Some(rest) if rest.starts_with('{') => {
                into.extend(group(&rest[1..]).iter().map(|one| format!("{first}::{}", segment(one))));
            }
            Some(rest) => into.push(format!("{first}::{}", segment(rest))),
            None => into.push(first.to_owned()),
        }
        return;
    };
    for one in group(inner) {
        branches(one, into);
    }
}

/// What stands between commas up to the closing brace.
fn group(inner: &str) -> Vec<&str> {
    let (mut depth, mut start, mut parts) = (0, 0, Vec::new());
    for (at, c) in inner.char_indices() {
        match c {
            '{' => depth += 1,
            '}' if depth == 0 => {
                parts.push(inner[start..at].trim());
                break;
            }
            '}' => depth -= 1,
            ',' if depth == 0 => {
                parts.push(inner[start..at].trim());
                start = at + 1;
            }
            _ => {}
        }
    }
    parts.retain(|part| !part.is_empty());
    parts
}

fn segment(path: &str) -> &str {
    let end = path.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(path.len());
    &path[..end]
}

/// `text` with everything inside comments, strings and characters replaced by blanks; lines stay.
fn blank(text: &str) -> String {
    let mut code = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(c) = rest.chars().next() {
        let length = literal(rest, code.chars().next_back()).unwrap_or(0);
        if length == 0 {
            code.push(c);
            rest = &rest[c.len_utf8()..];
        } else {
            code.extend(rest[..length].chars().map(|c| if c == '\n' { '\n' } else { ' ' }));
            rest = &rest[length..];
        }
    }
    code
}

/// What [`blank`] took out of `text`, everything else blanked.
fn inverse(text: &str, code: &str) -> String {
    let keep = |(original, left): (char, char)| if original != left || original == '\n' { original } else { ' ' };
    text.chars().zip(code.chars()).map(keep).collect()
}

/// The length of the comment or literal that begins `rest`, if one does.
fn literal(rest: &str, before: Option<char>) -> Option<usize> {
    let to = |end: &str, from: usize| rest[from..].find(end).map_or(rest.len(), |at| from + at + end.len());
    if rest.starts_with("//") {
        return Some(rest.find('\n').unwrap_or(rest.len()));
    }
    if rest.starts_with("/*") {
        return Some(to("*/", 2));
    }
    if rest.starts_with('"') {
        return Some(quoted(rest, '"'));
    }
    if rest.starts_with('r') && !before.is_some_and(|c| c.is_alphanumeric() && c != 'b' || c == '_') {
        let hashes = rest[1..].len() - rest[1..].trim_start_matches('#').len();
        if rest[1 + hashes..].starts_with('"') {
            return Some(to(&format!("\"{}", "#".repeat(hashes)), 2 + hashes));
        }
    }
    // A character, not a lifetime: closed after one character, or escaped.
    let mut inner = rest.strip_prefix('\'')?.chars();
    let (first, second) = (inner.next()?, inner.next()?);
    (first == '\\' || second == '\'').then(|| quoted(rest, '\''))
}

/// The length of a literal between `quote`s with escapes.
fn quoted(rest: &str, quote: char) -> usize {
    let mut escaped = false;
    for (at, c) in rest.char_indices().skip(1) {
        if escaped {
            escaped = false;
        } else if c == '\\' {
            escaped = true;
        } else if c == quote {
            return at + c.len_utf8();
        }
    }
    rest.len()
}

#[test]
fn comments_and_literals_are_no_code() {
    let text = "a(\"x // \\\" y\"); // b\n/* c\n */ d('\"', '\\'', b\"e\", r#\"f\"g\"#); let h: &'static str;";
    let code = blank(text);
    assert_eq!(code.lines().count(), text.lines().count());
    let left: String = code.split_whitespace().collect::<Vec<_>>().join("");
    assert_eq!(left, "a();d(,,b,);leth:&'staticstr;");
    let prose = inverse(text, &code);
    assert_eq!(prose.lines().count(), text.lines().count());
    let left: String = prose.split_whitespace().collect::<Vec<_>>().join("");
    assert_eq!(left, "\"x//\\\"y\"//b/*c*/'\"''\\''\"e\"r#\"f\"g\"#");
}

#[test]
fn paths_are_found_in_every_form() {
    let source = Source::new(
        "src/dns/udp.rs",
        "use crate::{a::{b, c::d}, e, f::g as h};\npub(crate) fn x() { crate::i::j(); super::super::k::l(); super::m(); }\n\
         #[cfg(test)]\nuse crate::t;\n#[cfg(test)]\nmod tests { use crate::unseen; }",
    );
    assert_eq!(source.crate_paths(), ["a::b", "a::c", "e", "f::g", "i::j", "t", "k::l"]);
    assert_eq!(source.module(), ["dns", "udp"]);
}
