//! Which lines of the server block with the kubernetes plugin change so that it falls through to gangplank.

use super::{
    CorefileError, Plan,
    blocks::{INDENT, REVERSE_ZONES, cache_properties, fallthrough_property, forwards},
    caddyfile::{Caddyfile, ServerBlock, Statement},
    edit::{TextEdit, normal, within, zones},
};

pub(super) fn edits(file: &Caddyfile<'_>, plan: &Plan, reverse: bool) -> Result<Vec<TextEdit>, CorefileError> {
    let (server, kubernetes) = kubernetes(file, plan)?;
    let served = zones(server);
    let reverse_zones = REVERSE_ZONES.iter().copied().filter(|zone| served.iter().any(|one| within(zone, one)));
    let reverse_zones: Vec<&str> = if reverse { reverse_zones.collect() } else { Vec::new() };
    let mut edits = Vec::new();
    let missing = fallthrough_zones(kubernetes, plan, reverse);
    if let Some(zones) = missing {
        let zones: Vec<&str> = zones.iter().map(String::as_str).collect();
        edits.push(TextEdit::add_properties(file, kubernetes, &fallthrough_property(&zones))?);
    }
    edits.push(forward_edit(file, plan, server, &reverse_zones)?);
    for cache in server.body.statements.iter().filter(|one| one.is("cache")) {
        if let Some(properties) = cached_zones(cache, plan) {
            edits.push(TextEdit::add_properties(file, cache, &properties)?);
        }
    }
    Ok(edits)
}

/// The server block in which the kubernetes plugin serves the zone, and that plugin.
fn kubernetes<'f, 't>(
    file: &'f Caddyfile<'t>,
    plan: &Plan,
) -> Result<(&'f ServerBlock<'t>, &'f Statement<'t>), CorefileError> {
    let zone = plan.zone.as_str();
    let mut found: Option<(&ServerBlock<'t>, &Statement<'t>)> = None;
    for server in &file.servers {
        for plugin in server.body.statements.iter().filter(|one| one.is("kubernetes")) {
            let arguments: Vec<String> = plugin.arguments().map(normal).collect();
            if !(if arguments.is_empty() { zones(server) } else { arguments }).iter().any(|one| one == zone) {
                continue;
            }
            // Which of the two blocks pods ask depends on ports and views, which a text alone does not show.
            if let Some((_, other)) = found {
                let reason = format!(
                    "a second `kubernetes {zone}`, after line {}: which one pods ask is not certain",
                    other.name().line
                );
                return Err(CorefileError::at(plugin.name().line, reason));
            }
            found = Some((server, plugin));
        }
    }
    found.ok_or_else(|| {
        CorefileError::missing(format!(
            "no server block has `kubernetes {zone}`: the zone is another one, or the plugin is imported"
        ))
    })
}

/// The zones of a `fallthrough` that has to be added, with those of the one that counts now.
fn fallthrough_zones(kubernetes: &Statement<'_>, plan: &Plan, reverse: bool) -> Option<Vec<String>> {
    let last = kubernetes.properties().iter().rfind(|property| property.is("fallthrough"));
    // The last `fallthrough` replaces earlier ones in CoreDNS, so what it has must be repeated.
    let mut zones: Vec<String> = last.map(|last| last.arguments().map(str::to_owned).collect()).unwrap_or_default();
    if last.is_some() && zones.is_empty() {
        return None; // every zone
    }
    let is_reverse = |zone: &str| zone.contains('/') || REVERSE_ZONES.iter().any(|one| within(zone, one));
    let mut wanted = vec![plan.zone.as_str().to_owned()];
    // Of the reverse zones those that the plugin serves; others do not reach it.
    wanted.extend(kubernetes.arguments().filter(|zone| reverse && is_reverse(&normal(zone))).map(str::to_owned));
    let before = zones.len();
    for zone in wanted {
        if !zones.iter().any(|one| within(&normal(&zone), &normal(one))) {
            zones.push(zone);
        }
    }
    (zones.len() > before).then_some(zones)
}

fn forward_edit(
    file: &Caddyfile<'_>,
    plan: &Plan,
    server: &ServerBlock<'_>,
    reverse_zones: &[&str],
) -> Result<TextEdit, CorefileError> {
    let statements = &server.body.statements;
    for forward in statements.iter().filter(|one| one.is("forward")) {
        if let Some(zone) = forward.arguments().next().filter(|zone| within(&normal(zone), plan.zone.as_str())) {
            let reason =
                format!("there is a `forward {zone}` already, which the new one would replace: take it out first");
            return Err(CorefileError::at(forward.name().line, reason));
        }
    }
    // An import may hold a `forward` for everything.
    let next = statements.iter().find(|one| one.is("forward") || one.is("import"));
    let (at, line) = match next {
        Some(next) => (next.name().start, next.name().line),
        None => (server.body.close.start, server.body.close.line),
    };
    let Some(indent) = file.indentation(at) else {
        return Err(CorefileError::at(line, "two things in this line: break it before the second one"));
    };
    let deeper = format!("{indent}{INDENT}");
    let indent = if next.is_some() { indent } else { &deeper };
    Ok(TextEdit::add(file.line_start(at), indent, &forwards(plan, reverse_zones)))
}

/// The properties of a cache that has to leave out the zone and does not yet.
fn cached_zones(cache: &Statement<'_>, plan: &Plan) -> Option<Vec<String>> {
    let zone = plan.zone.as_str();
    // The first argument may be the longest TTL and no zone.
    let cached = cache.arguments().enumerate().filter(|(at, word)| *at > 0 || word.parse::<i64>().is_err());
    let cached: Vec<String> = cached.map(|(_, zone)| normal(zone)).collect();
    // A cache of other zones keeps nothing of this one.
    if !cached.is_empty() && !cached.iter().any(|one| within(zone, one) || within(one, zone)) {
        return None;
    }
    let mut disabled = Vec::new();
    for kind in ["success", "denial"] {
        // As with `fallthrough`, the last `disable` of a kind counts.
        let last = cache.properties().iter().rfind(|one| one.is("disable") && one.arguments().next() == Some(kind));
        let zones: Vec<&str> = last.map(|last| last.arguments().skip(1).collect()).unwrap_or_default();
        let every = last.is_some() && zones.is_empty();
        if !every && !zones.iter().any(|one| within(zone, &normal(one))) {
            disabled.push((kind, zones.into_iter().chain([zone]).collect()));
        }
    }
    (!disabled.is_empty()).then(|| cache_properties(&disabled))
}
