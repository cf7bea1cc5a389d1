//! The structure of the sources: which module may import which, which crates stay in one module, what
//! is banned. Each rule is a function from a source to its faults, and is shown a bad source too.

mod source;

use std::path::Path;

use source::{Source, line, words};

use crate::support::tools::ROOT;

/// Imports point down: what each module may name of the crate, besides itself. `module::item`
/// allows only that item. `app` joins everything and is not here.
const DOWN: &[(&str, &[&str])] = &[
    ("main", &["app", "cli", "config", "telemetry"]),
    (
        "config",
        &["dns", "grpc", "identity", "kubernetes", "model", "net", "registry", "security", "store", "upstream", "zone"],
    ),
    ("telemetry", &[]),
    ("cli", &["admin::client", "coredns", "grpc::client", "kubernetes::api", "model"]),
    ("coredns", &["model"]),
    ("dns", &["metrics", "model", "net", "zone"]),
    ("grpc", &["identity", "metrics", "model", "net", "registry", "security"]),
    ("security", &["identity", "metrics", "net"]),
    (
        "identity",
        &["kubernetes::api", "kubernetes::secrets", "metrics", "model", "net::backoff", "net::peer_group", "net::tls"],
    ),
    ("admin", &["identity", "metrics", "model", "net", "registry", "security", "zone"]),
    ("kubernetes", &["metrics", "model", "net::backoff", "registry", "replicas"]),
    ("registry", &["metrics", "model", "replicas", "store", "zone"]),
    ("store", &["metrics", "model", "replicas::word"]),
    ("net", &["metrics"]),
    ("zone", &["model"]),
    ("upstream", &["metrics", "model", "net::backoff"]),
    ("metrics", &["model::Rcode", "model::RecordType"]),
    ("replicas", &["model"]),
    ("model", &[]),
];

/// The rooms of `kubernetes`, and what each may import of the others. Its `mod.rs` joins them.
const KUBERNETES_ROOMS: &[(&str, &[&str])] = &[
    ("objects", &[]),
    ("api", &["objects"]),
    ("cache", &["objects", "api"]),
    ("secrets", &["objects", "api", "cache"]),
    ("replicas", &["objects", "api"]),
    ("watch", &["objects", "api", "cache", "secrets"]),
    ("mirror", &["objects", "api", "cache"]),
];

/// Crates that stay in some modules, with the crates whose names continue after `_`, and those modules.
const PLACES: &[(&str, &[&str])] = &[
    ("anyhow", &["main", "app", "config", "telemetry"]),
    ("axum", &["admin"]),
    ("clap", &["main", "cli", "config", "telemetry"]),
    ("hickory", &["cli::check", "cli::coredns", "cli::resolve", "upstream"]),
    ("k8s_openapi", &["kubernetes"]),
    ("kube", &["kubernetes"]),
    ("nix", &["dns::wildcard"]),
    ("prometheus_client", &["metrics", "admin"]),
    ("prost", &["grpc", "store::format"]),
    ("rcgen", &["identity"]),
    ("ring", &["identity"]),
    ("rustls", &["identity", "net::tls"]),
    ("sha2", &["identity", "kubernetes", "net::tls"]),
    ("subtle", &["identity"]),
    (
        "tokio",
        &[
            "main",
            "app",
            "admin",
            "cli",
            "dns",
            "grpc",
            "identity",
            "kubernetes",
            "net",
            "registry",
            "security",
            "upstream",
        ],
    ),
    ("toml", &["identity"]),
    ("tonic", &["grpc"]),
    ("x509_parser", &["identity", "net::tls"]),
];

/// Files that may contain `unsafe`: the program that counts allocations.
const UNSAFE: &[&str] = &["benches/allocations.rs"];

/// What is banned in code, below which path, and why.
const BANNED: &[(&str, &str, &str)] = &[
    ("todo!", "", "unfinished"),
    ("unimplemented!", "", "unfinished"),
    ("#[ignore]", "", "a test that nothing runs needs its reason"),
    ("tokio::spawn", "", "a task that nobody joins"),
    ("allow(dead_code", "", "delete it instead"),
    ("allow(unused", "", "delete it instead"),
    ("thread::sleep", "tests/", "wait for a state"),
    ("time::sleep", "tests/", "wait for a state"),
];

/// Words that comments and messages do not use, and what they say instead.
const BANNED_WORDS: &[(&str, &str)] = &[
    ("give back", "return"),
    ("gives back", "returns"),
    ("given back", "returned"),
    ("stand so", "say what the state is"),
    ("stands so", "say what the state is"),
    ("cannot stand", "is invalid"),
    ("mend", "fix"),
    ("mended", "fixed"),
    ("mends", "fixes"),
    ("other hand", "somebody else"),
    ("another hand", "somebody else"),
    ("put right", "reverted, or repaired"),
    ("as it stands", "as it is"),
    ("as they stand", "as they are"),
];

/// Beginnings of constants' names, which are `MAX_…` instead.
const BANNED_PREFIXES: &[&str] = &["MOST_", "LONGEST_", "LARGEST_"];

/// Lines that a file may have before its tests; one that needs more is two.
const MAX_LINES: usize = 500;

#[test]
fn imports_point_down() {
    holds(&["src"], upward_imports);
    let bad = |path, text: &str| upward_imports(&Source::new(path, text));
    assert_eq!(bad("src/zone/mod.rs", "use crate::{\n    model::Label,\n    registry::Catalog,\n};").len(), 1);
    assert_eq!(bad("src/model/name.rs", "fn f() { super::super::zone::x(); }").len(), 1);
    assert_eq!(bad("src/dns/tcp.rs", "use crate::grpc::client;").len(), 1, "transports do not know each other");
    assert_eq!(bad("src/cli/ls.rs", "use crate::grpc::{client::Client, proto};").len(), 1, "only the client");
    assert_eq!(bad("src/cli/ls.rs", "use crate::{cli::table, grpc::client::Client};").len(), 0);
    assert_eq!(bad("src/unheard_of.rs", "").len(), 1, "a module that is not in the table");
}

#[test]
fn rooms_of_kubernetes_point_down() {
    holds(&["src/kubernetes"], upward_rooms);
    let bad = |path, text: &str| upward_rooms(&Source::new(path, text));
    assert_eq!(bad("src/kubernetes/cache/mod.rs", "use crate::{kubernetes::{watch::X, objects::Y}, model};").len(), 1);
    assert_eq!(bad("src/kubernetes/watch/mod.rs", "use super::mirror::Mirror;").len(), 1);
    assert_eq!(bad("src/kubernetes/mirror/reconcile/mod.rs", "use super::super::watch;").len(), 1);
    assert_eq!(bad("src/kubernetes/mirror/reconcile/mod.rs", "use super::Options;").len(), 0);
    assert_eq!(bad("src/kubernetes/attic.rs", "").len(), 1, "a room without a place in the table");
    assert_eq!(bad("src/kubernetes/mod.rs", "use self::{mirror::Mirror, watch::Watch};").len(), 0);
}

#[test]
fn third_party_crates_stay_in_their_modules() {
    holds(&["src"], strayed_crates);
    let bad = |path, text: &str| strayed_crates(&Source::new(path, text));
    assert_eq!(bad("src/registry/writer.rs", "fn f(_: tonic::Status) {}").len(), 1);
    assert_eq!(bad("src/store/mod.rs", "use prost::Message;").len(), 1);
    assert_eq!(bad("src/store/format.rs", "use prost::Message;").len(), 0);
    assert_eq!(bad("src/zone/lookup.rs", "#[cfg(test)]\nmod tests {\n    use hickory_proto::op;\n}").len(), 0);
    assert_eq!(bad("src/app.rs", "use crate::{kubernetes::Mirror, admin};").len(), 0, "a module of ours");
    assert_eq!(bad("src/zone/lookup.rs", "use {hickory_proto::op, std::io};").len(), 1);
}

#[test]
fn unsafe_stays_in_its_files() {
    holds(&["src", "tests", "benches"], unsafe_code);
    assert_eq!(unsafe_code(&Source::new("src/dns/tcp.rs", "fn f() { unsafe { g() } } // unsafe")).len(), 1);
    assert_eq!(unsafe_code(&Source::new("benches/allocations.rs", "fn f() { unsafe { g() } }")).len(), 0);
    assert_eq!(unsafe_code(&Source::new("src/lib.rs", "#![deny(unsafe_code)] // unsafe")).len(), 0);
}

#[test]
fn code_contains_nothing_banned() {
    holds(&["src", "tests", "benches"], banned);
    assert_eq!(banned(&Source::new("src/app.rs", "fn f() { todo!() } // todo!()")).len(), 1);
    assert_eq!(banned(&Source::new("tests/x.rs", "std::thread::sleep(second);")).len(), 1);
    assert_eq!(
        banned(&Source::new("src/app.rs", "fn f() {}\n#[cfg(test)]\nmod tests { tokio::time::sleep(x); }")).len(),
        1
    );
}

#[test]
fn files_have_at_most_500_lines() {
    holds(&["src", "tests", "benches"], too_long);
    assert_eq!(too_long(&Source::new("src/a.rs", &"x();\n".repeat(MAX_LINES + 1))).len(), 1);
    let tests = format!("x();\n#[cfg(test)]\nmod tests {{\n{}}}", "x();\n".repeat(MAX_LINES));
    assert_eq!(too_long(&Source::new("src/a.rs", &tests)).len(), 0);
}

#[test]
fn comments_use_plain_words() {
    holds(&["src", "tests", "benches"], poetry);
    let faults = |text: &str| poetry(&Source::new("src/a.rs", text)).len();
    assert_eq!(faults("/// Gives back the length.\nfn f() {}"), 1);
    assert_eq!(faults("// It stands\n// so now, and a reader\n// gives\n// back."), 2, "across lines");
    assert_eq!(faults("fn f() { say(\"a field cannot stand\") }"), 1, "messages too");
    assert_eq!(faults("// an amendment\nfn mend() {}"), 0);
}

#[test]
fn limits_are_named_max() {
    holds(&["src", "tests", "benches"], superlatives);
    assert_eq!(superlatives(&Source::new("src/a.rs", "const MOST_PORTS: usize = 1; // MOST_X")).len(), 1);
    assert_eq!(superlatives(&Source::new("src/a.rs", "const MAX_PORTS: usize = ALMOST_ALL;")).len(), 0);
}

#[test]
fn modules_with_submodules_are_folders() {
    let sources = Source::all(Path::new(ROOT), &["src", "tests", "benches"]);
    assert_eq!(beside_their_folder(&sources), Vec::<&str>::new());
    let mixed = [Source::new("src/a.rs", "mod b;"), Source::new("src/a/b.rs", ""), Source::new("src/ab.rs", "")];
    assert_eq!(beside_their_folder(&mixed), ["src/a.rs"]);
}

#[test]
fn no_allowance_is_stale() {
    let sources = Source::all(Path::new(ROOT), &["src", "tests", "benches"]);
    assert_eq!(stale_allowances(&sources), Vec::<String>::new());
    let none = stale_allowances(&[]);
    let all = DOWN.iter().map(|(_, below)| below.len()).sum::<usize>()
        + PLACES.iter().map(|(_, places)| places.len()).sum::<usize>()
        + UNSAFE.len();
    assert_eq!(none.len(), all, "without sources nothing is used");
}

#[test]
fn every_source_is_declared() {
    for folder in ["src", "tests"] {
        let sources = Source::all(Path::new(ROOT), &[folder]);
        assert_eq!(undeclared(&sources, &[&format!("{folder}/main.rs"), "src/lib.rs"]), Vec::<String>::new());
    }
    let orphan =
        [Source::new("src/lib.rs", "mod a;\n// mod b;"), Source::new("src/a.rs", ""), Source::new("src/b.rs", "")];
    assert_eq!(undeclared(&orphan, &["src/lib.rs"]), ["src/b.rs"]);
    let nested =
        [Source::new("src/lib.rs", "pub mod a;"), Source::new("src/a/mod.rs", ""), Source::new("src/a/b.rs", "")];
    assert_eq!(undeclared(&nested, &["src/lib.rs"]), ["src/a/b.rs"]);
}

/// Runs a rule over the repository's sources.
fn holds(folders: &[&str], rule: fn(&Source) -> Vec<String>) {
    let sources = Source::all(Path::new(ROOT), folders);
    assert!(sources.iter().any(|source| source.path.starts_with("src/")), "the sources are found");
    let faults: Vec<String> = sources.iter().flat_map(rule).collect();
    assert!(faults.is_empty(), "\n{}\n", faults.join("\n"));
}

fn upward_imports(source: &Source) -> Vec<String> {
    let module = source.module();
    let Some(&top) = module.first().filter(|&&top| top != "app") else { return Vec::new() };
    let Some((_, below)) = DOWN.iter().find(|(name, _)| *name == top) else {
        return vec![format!("{}: module `{top}` is not in the table of imports", source.path)];
    };
    let allowed = |path: &str| {
        let first = path.split("::").next().unwrap_or(path);
        first == top || below.iter().any(|&one| one == first || one == path)
    };
    let paths = source.crate_paths().into_iter().filter(|path| !allowed(path));
    paths.map(|path| format!("{}: `{top}` may not import `{path}`", source.path)).collect()
}

fn upward_rooms(source: &Source) -> Vec<String> {
    let module = source.module();
    let [_, room, ..] = module[..] else { return Vec::new() };
    let Some((_, below)) = KUBERNETES_ROOMS.iter().find(|(name, _)| *name == room) else {
        return vec![format!("{}: room `{room}` has no place in the table of rooms", source.path)];
    };
    let paths = source.paths_below("kubernetes", 1).into_iter();
    let upward = paths.filter(|path| {
        let first = path.split("::").next().unwrap_or(path);
        first != room && !below.contains(&first)
    });
    upward.map(|path| format!("{}: `{room}` may not import `{path}`", source.path)).collect()
}

fn strayed_crates(source: &Source) -> Vec<String> {
    let module = source.module().join("::");
    let home = |places: &[&str]| {
        places
            .iter()
            .any(|&place| module == place || module.strip_prefix(place).is_some_and(|rest| rest.starts_with("::")))
    };
    let strays = PLACES
        .iter()
        .filter(|(_, places)| !home(places))
        .flat_map(|&(name, _)| crate_names(source, name).into_iter().map(move |at| (name, at)));
    strays
        .map(|(name, at)| format!("{}:{}: `{name}` is not allowed here", source.path, line(source.shipped(), at)))
        .collect()
}

/// Where the shipped code names the crate `name`, or one whose name continues after `_`.
fn crate_names(source: &Source, name: &str) -> Vec<usize> {
    let code = source.shipped();
    let matches = code.match_indices(name).map(|(at, _)| at).filter(|&at| {
        let own = !code[..at].ends_with(|c: char| c.is_alphanumeric() || "_:.".contains(c));
        let rest = code[at..].trim_start_matches(|c: char| c.is_alphanumeric() || c == '_');
        let family = &code[at + name.len()..code.len() - rest.len()];
        own && (family.is_empty() || family.starts_with('_'))
            && (rest.starts_with("::") || code[..at].ends_with("use "))
    });
    matches.collect()
}

/// Rows of the tables above that no source needs any more.
fn stale_allowances(sources: &[Source]) -> Vec<String> {
    let sources_of = |module: &str| {
        let module = module.to_owned();
        sources.iter().filter(move |source| {
            let path = source.module().join("::");
            source.path.starts_with("src/") && (path == module || path.starts_with(&format!("{module}::")))
        })
    };
    let mut stale = Vec::new();
    for (module, below) in DOWN {
        let used: Vec<String> = sources_of(module).flat_map(Source::crate_paths).collect();
        let unused =
            below.iter().filter(|&&one| !used.iter().any(|path| path == one || path.split("::").next() == Some(one)));
        stale.extend(unused.map(|one| format!("`{module}` does not import `{one}`")));
    }
    for (name, places) in PLACES {
        let unused =
            places.iter().filter(|place| !sources_of(place).any(|source| !crate_names(source, name).is_empty()));
        stale.extend(unused.map(|place| format!("`{place}` does not use `{name}`")));
    }
    let unsafe_files = UNSAFE.iter().filter(|&&file| {
        !sources.iter().any(|source| source.path == file && words(&source.code, "unsafe").next().is_some())
    });
    stale.extend(unsafe_files.map(|file| format!("{file} has no unsafe code")));
    stale
}

fn unsafe_code(source: &Source) -> Vec<String> {
    if UNSAFE.contains(&source.path.as_str()) {
        return Vec::new();
    }
    words(&source.code, "unsafe").map(|at| format!("{}:{}: unsafe", source.path, line(&source.code, at))).collect()
}

fn banned(source: &Source) -> Vec<String> {
    let mut faults = Vec::new();
    for (word, place, why) in BANNED {
        // Test code inside src counts as tests.
        let code = &source.code;
        let from = if source.path.starts_with(place) { 0 } else { source.shipped().len() };
        let found = code[from..].match_indices(word).map(|(at, _)| from + at);
        faults.extend(found.map(|at| format!("{}:{}: {word}: {why}", source.path, line(code, at))));
    }
    faults
}

fn too_long(source: &Source) -> Vec<String> {
    let lines = source.shipped().lines().count();
    if lines > MAX_LINES { vec![format!("{}: {lines} lines before its tests", source.path)] } else { Vec::new() }
}

fn poetry(source: &Source) -> Vec<String> {
    if source.path.starts_with("tests/structure/") {
        return Vec::new(); // the bad examples
    }
    // One line, so that a phrase is found across a line break; comment signs are no words.
    let prose = source.prose.to_lowercase().replace(['\n', '/', '!'], " ");
    let prose = prose.split_whitespace().collect::<Vec<_>>().join(" ");
    let found = |phrase: &'static str| words(&prose, phrase).count();
    let faults = BANNED_WORDS.iter().flat_map(|&(phrase, instead)| {
        std::iter::repeat_n(format!("{}: {phrase:?}: write {instead:?}", source.path), found(phrase))
    });
    faults.collect()
}

fn superlatives(source: &Source) -> Vec<String> {
    let starts = BANNED_PREFIXES.iter().flat_map(|&prefix| source.code.match_indices(prefix));
    let starts = starts.filter(|(at, _)| !source.code[..*at].ends_with(|c: char| c.is_alphanumeric() || c == '_'));
    starts.map(|(at, prefix)| format!("{}:{}: {prefix}…", source.path, line(&source.code, at))).collect()
}

/// Files `a.rs` beside a folder `a`.
fn beside_their_folder(sources: &[Source]) -> Vec<&str> {
    let has_folder = |path: &str| {
        let folder = path.strip_suffix(".rs").map(|stem| format!("{stem}/"));
        folder.is_some_and(|folder| sources.iter().any(|source| source.path.starts_with(&folder)))
    };
    sources.iter().map(|source| source.path.as_str()).filter(|path| has_folder(path)).collect()
}

/// Files that their parent does not declare with `mod`.
fn undeclared(sources: &[Source], roots: &[&str]) -> Vec<String> {
    let declares = |parent: &str, name: &str| {
        let declaration = format!("mod {name};");
        sources.iter().any(|source| source.path == parent && words(&source.code, &declaration).next().is_some())
    };
    let orphan = |path: &str| {
        let (folder, name) = path.rsplit_once('/').expect("a folder");
        let name = name.strip_suffix(".rs").expect("a Rust file");
        // `a/mod.rs` is module `a` of the folder above.
        let (folder, name) = if name == "mod" { folder.rsplit_once('/').expect("a folder") } else { (folder, name) };
        let mut parents = vec![format!("{folder}/mod.rs"), format!("{folder}.rs")];
        parents.extend(["lib", "main"].map(|root| format!("{folder}/{root}.rs")));
        !parents.iter().any(|parent| declares(parent, name))
    };
    let files = sources.iter().map(|source| source.path.as_str()).filter(|path| !roots.contains(path));
    files.filter(|path| orphan(path)).map(str::to_owned).collect()
}
