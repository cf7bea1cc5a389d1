//! Where the server block of a stub domain goes, and what it has in common with the block that served its names before.

use super::{
    CorefileError, Plan,
    blocks::{stub_domain, stub_zones},
    caddyfile::{Caddyfile, ServerBlock},
    edit::{ServerBlockKey, TextEdit, within},
};

/// A server block at the end of the file.
pub(super) fn edit(file: &Caddyfile<'_>, plan: &Plan, namespaces: &[String]) -> Result<TextEdit, CorefileError> {
    let (mut keys, mut binds) = (Vec::new(), Vec::new());
    for zone in stub_zones(plan, namespaces) {
        let (server, ports) = serves(file, &zone)?;
        keys.extend(ports.into_iter().map(|port| match port {
            Some(port) => format!("{zone}:{port}"),
            None => zone.clone(),
        }));
        // On the same sockets: a block without `bind` would listen on every address.
        for bind in server.body.statements.iter().filter(|one| one.is("bind")) {
            let line = &file.text[bind.name().start..bind.end()];
            if !binds.contains(&line) {
                binds.push(line);
            }
        }
    }
    let mut edit = TextEdit::add(file.text.len(), "", &stub_domain(&keys, &binds, plan));
    if !file.text.ends_with('\n') {
        // The line feed moves from the end to the beginning, which `remove` reverts.
        edit.by.pop();
        edit.by.insert(0, '\n');
    }
    Ok(edit)
}

/// The server block that pods' questions in `zone` reach now, and its ports.
fn serves<'f, 't>(
    file: &'f Caddyfile<'t>,
    zone: &str,
) -> Result<(&'f ServerBlock<'t>, Vec<Option<String>>), CorefileError> {
    let mut best: Option<(&ServerBlock<'t>, String, Vec<Option<String>>)> = None;
    for server in &file.servers {
        for key in server.keys.iter().filter_map(ServerBlockKey::of).filter(|key| within(zone, &key.zone)) {
            let line = server.keys[0].line;
            if key.zone == zone {
                return Err(CorefileError::at(line, format!("there is a server block for {zone} already")));
            }
            match &mut best {
                // CoreDNS takes the longest zone that matches. All of these end the same name, so the longest text is
                // it.
                Some((_, found, _)) if found.len() > key.zone.len() => {}
                Some((same, found, ports)) if *found == key.zone => {
                    // One block may name the zone twice, with two ports. Two blocks with one zone differ by port or
                    // `bind`.
                    if !std::ptr::eq(*same, server) {
                        let reason = format!(
                            "a second server block, after line {}, serves {zone}: which one pods ask is not certain",
                            same.keys[0].line
                        );
                        return Err(CorefileError::at(line, reason));
                    }
                    if !ports.contains(&key.port) {
                        ports.push(key.port);
                    }
                }
                _ => best = Some((server, key.zone, vec![key.port])),
            }
        }
    }
    let Some((server, _, ports)) = best else {
        return Err(CorefileError::missing(format!("no server block serves {zone}: nobody would ask the new one")));
    };
    Ok((server, ports))
}
