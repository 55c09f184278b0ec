//! The architecture, read from the code: which file of the agents uses which. Files do not use each other in cycles,
//! and a layer uses only itself and the layers below it. There are no exceptions.
//!
//! A file uses another when one of its paths leads to an item of the other: in a `use`, an expression, a type or the
//! arguments of a macro, beginning with `crate`, `super`, `self`, a child module or one of our crates. Unit tests are
//! left out.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
};

use proc_macro2::{Delimiter, TokenStream, TokenTree};
use quote::ToTokens;
use syn::{Attribute, Item};
use tests::process::TempDir;

/// The layers from top to bottom. Layers on one line may not use each other. The first place that matches a file
/// decides; a place that ends with a slash stands for everything below it.
const LAYERS: &[&[(&str, &[&str])]] = &[
    &[(
        "app",
        &[
            "master-agent/src/main.rs",
            "master-agent/src/lib.rs",
            "master-agent/src/admin/",
            "master-agent/src/app/",
            "master-agent/src/cli.rs",
            "master-agent/src/config.rs",
            "master-agent/src/joined.rs",
        ],
    )],
    &[(
        "ui",
        &[
            "master-agent/src/admin_client.rs",
            "master-agent/src/compare/",
            "master-agent/src/drain.rs",
            "master-agent/src/page/",
            "master-agent/src/sshd_config.rs",
            "master-agent/src/table.rs",
            "master-agent/src/top/",
        ],
    )],
    &[("egress", &["master-agent/src/egress/"]), ("front_end", &["master-agent/src/front_end/"])],
    &[("tunnels", &["master-agent/src/tunnels/"])],
    &[
        ("routing", &["master-agent/src/routing/", "master-agent/src/kubernetes/"]),
        ("identity", &["master-agent/src/identity/"]),
    ],
    &[(
        "observe",
        &[
            "master-agent/src/activity.rs",
            "master-agent/src/metrics/",
            "master-agent/src/stream/",
            "master-agent/src/traces/",
        ],
    )],
    &[(
        "shared",
        &[
            "master-agent/src/admin_api.rs",
            "master-agent/src/directory.rs",
            "master-agent/src/fields.rs",
            "master-agent/src/host_trust.rs",
            "master-agent/src/http/",
            "master-agent/src/input.rs",
        ],
    )],
    &[("access", &["master-agent/access/src/"])],
    &[(
        "app of the node",
        &[
            "node-agent/src/main.rs",
            "node-agent/src/lib.rs",
            "node-agent/src/app.rs",
            "node-agent/src/cli.rs",
            "node-agent/src/config.rs",
        ],
    )],
    &[("node", &["node-agent/src/"])],
    &[("I/O of both", &["proto/net/src/"])],
    &[("configuration reader", &["proto/config/src/"])],
    &[("proto", &["proto/src/"])],
];

/// The folders of the crates, each with the name of its package.
const CRATES: &[(&str, &str)] = &[
    ("proto", "proto"),
    ("proto-config", "proto/config"),
    ("proto-net", "proto/net"),
    ("access", "master-agent/access"),
    ("node-agent", "node-agent"),
    ("master-agent", "master-agent"),
];

/// From a file to one that it uses.
type Arrow = (String, String);

#[derive(Default)]
struct Crate {
    /// The file of each module, by its path from the root.
    modules: BTreeMap<Vec<String>, String>,
}

struct Reader<'a> {
    root: &'a Path,
    crates: BTreeMap<&'static str, Crate>,
    /// Modules with what is in them: crate, module, file, tokens.
    bodies: Vec<(&'static str, Vec<String>, String, TokenStream)>,
}

fn is_test(attributes: &[Attribute]) -> bool {
    attributes.iter().any(|a| a.meta.to_token_stream().to_string() == "cfg (test)")
}

fn attributes(item: &Item) -> &[Attribute] {
    match item {
        Item::Const(i) => &i.attrs,
        Item::Enum(i) => &i.attrs,
        Item::Fn(i) => &i.attrs,
        Item::Impl(i) => &i.attrs,
        Item::Macro(i) => &i.attrs,
        Item::Mod(i) => &i.attrs,
        Item::Static(i) => &i.attrs,
        Item::Struct(i) => &i.attrs,
        Item::Trait(i) => &i.attrs,
        Item::Type(i) => &i.attrs,
        Item::Use(i) => &i.attrs,
        _ => &[],
    }
}

impl Reader<'_> {
    fn read_file(&mut self, name: &'static str, module: Vec<String>, file: &Path) {
        let source = std::fs::read_to_string(file).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
        let parsed = syn::parse_file(&source).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
        // Where the files of child modules are.
        let stem = file.file_stem().unwrap().to_str().unwrap();
        let parent = file.parent().unwrap();
        let children =
            if ["lib", "main", "mod"].contains(&stem) { parent.to_owned() } else { parent.join(stem) };
        self.read_items(name, module, file, &children, parsed.items);
    }

    fn read_items(
        &mut self,
        name: &'static str,
        module: Vec<String>,
        file: &Path,
        children: &Path,
        items: Vec<Item>,
    ) {
        let shown = file.strip_prefix(self.root).unwrap().to_str().unwrap().to_owned();
        self.crates.entry(name).or_default().modules.insert(module.clone(), shown.clone());
        let mut body = TokenStream::new();
        for item in items {
            if is_test(attributes(&item)) {
                continue;
            }
            let Item::Mod(child) = item else {
                item.to_tokens(&mut body);
                continue;
            };
            let child_name = child.ident.to_string();
            let path = [&module[..], std::slice::from_ref(&child_name)].concat();
            match child.content {
                Some((_, items)) => self.read_items(name, path, file, &children.join(&child_name), items),
                None => {
                    let flat = children.join(format!("{child_name}.rs"));
                    let file = if flat.exists() { flat } else { children.join(&child_name).join("mod.rs") };
                    self.read_file(name, path, &file);
                }
            }
        }
        self.bodies.push((name, module, shown, body));
    }

    /// The file that a path leads to from a module: that of the longest part of it that names a module.
    fn resolve(&self, name: &'static str, module: &[String], path: &[String]) -> Option<&str> {
        let mut krate = name;
        let mut at: Vec<String>;
        let mut rest = path;
        let first = rest.first()?.as_str();
        match first {
            "crate" => at = Vec::new(),
            "self" | "super" => at = module.to_vec(),
            _ => {
                let child = [module, &rest[..1]].concat();
                if self.crates[name].modules.contains_key(&child) {
                    at = module.to_vec();
                } else {
                    krate = *self.crates.keys().find(|k| k.replace('-', "_") == first)?;
                    at = Vec::new();
                    rest = &rest[1..];
                }
            }
        }
        while let Some(segment) = rest.first() {
            match segment.as_str() {
                "crate" | "self" => {}
                "super" => {
                    at.pop();
                }
                _ => {
                    let deeper = [&at[..], std::slice::from_ref(segment)].concat();
                    if !self.crates[krate].modules.contains_key(&deeper) {
                        break;
                    }
                    at = deeper;
                }
            }
            rest = &rest[1..];
        }
        // `self` alone is a value, and `super` or a module alone leads to no item.
        self.crates[krate].modules.get(&at).map(String::as_str).filter(|_| path.len() > 1)
    }
}

/// All paths in tokens, the members of `{}` in `use` with what stands before it.
fn paths(tokens: TokenStream, found: &mut Vec<Vec<String>>) {
    let tokens: Vec<TokenTree> = tokens.into_iter().collect();
    let mut i = 0;
    while i < tokens.len() {
        match &tokens[i] {
            TokenTree::Group(group) => paths(group.stream(), found),
            TokenTree::Ident(first) => {
                let mut path = vec![first.to_string()];
                while is_colons(&tokens, i + 1) {
                    match tokens.get(i + 3) {
                        Some(TokenTree::Ident(next)) => path.push(next.to_string()),
                        Some(TokenTree::Group(group)) if group.delimiter() == Delimiter::Brace => {
                            let mut members = Vec::new();
                            paths(group.stream(), &mut members);
                            found.extend(members.into_iter().map(|member| [&path[..], &member[..]].concat()));
                            path.clear();
                            i += 3;
                            break;
                        }
                        Some(TokenTree::Punct(p)) if p.as_char() == '*' => path.push("*".to_owned()),
                        _ => break,
                    }
                    i += 3;
                }
                if !path.is_empty() {
                    found.push(path);
                }
            }
            TokenTree::Punct(_) | TokenTree::Literal(_) => {}
        }
        i += 1;
    }
}

fn is_colons(tokens: &[TokenTree], at: usize) -> bool {
    let colon = |i: usize| matches!(tokens.get(i), Some(TokenTree::Punct(p)) if p.as_char() == ':');
    colon(at) && colon(at + 1)
}

/// Every arrow between the files of the crates below `root`.
fn arrows(root: &Path) -> BTreeSet<Arrow> {
    let mut reader = Reader { root, crates: BTreeMap::new(), bodies: Vec::new() };
    for (name, folder) in CRATES {
        reader.read_file(name, Vec::new(), &root.join(folder).join("src/lib.rs"));
    }
    // A binary is a crate of its own, that uses its library by name.
    for (name, library) in [("node-agent binary", "node-agent"), ("master-agent binary", "master-agent")] {
        reader.read_file(name, Vec::new(), &root.join(library).join("src/main.rs"));
    }
    let mut arrows = BTreeSet::new();
    for (name, module, file, body) in &reader.bodies {
        let mut found = Vec::new();
        paths(body.clone(), &mut found);
        for path in found {
            if let Some(to) = reader.resolve(name, module, &path)
                && to != file
            {
                arrows.insert((file.clone(), to.to_owned()));
            }
        }
    }
    arrows
}

/// The layer of a file: its place from the top, and its name.
fn layer(file: &str) -> (usize, &'static str) {
    for (depth, layers) in LAYERS.iter().enumerate() {
        for (name, places) in *layers {
            if places
                .iter()
                .any(|place| if place.ends_with('/') { file.starts_with(place) } else { file == *place })
            {
                return (depth, name);
            }
        }
    }
    panic!("{file} is in no layer: add it to LAYERS");
}

fn goes_up((from, to): &Arrow) -> bool {
    let ((from_depth, from_layer), (to_depth, to_layer)) = (layer(from), layer(to));
    to_depth < from_depth || to_depth == from_depth && from_layer != to_layer
}

/// The groups of files that use each other in cycles.
fn cycles(arrows: &BTreeSet<Arrow>) -> Vec<Vec<String>> {
    let mut uses: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for (from, to) in arrows {
        uses.entry(from).or_default().push(to);
        uses.entry(to).or_default();
    }
    let reach = |start: &str| {
        let mut seen = BTreeSet::new();
        let mut next = uses[start].clone();
        while let Some(file) = next.pop() {
            if seen.insert(file) {
                next.extend(&uses[file]);
            }
        }
        seen
    };
    let reached: BTreeMap<&str, BTreeSet<&str>> = uses.keys().map(|file| (*file, reach(file))).collect();
    let mut groups = BTreeSet::new();
    for (file, reaches) in &reached {
        if reaches.contains(file) {
            groups.insert(
                reaches
                    .iter()
                    .filter(|other| reached[**other].contains(file))
                    .map(|f| (*f).to_owned())
                    .collect::<Vec<_>>(),
            );
        }
    }
    groups.into_iter().collect()
}

/// What is wrong with the arrows.
fn faults(arrows: &BTreeSet<Arrow>) -> Vec<String> {
    let upward = arrows.iter().filter(|arrow| goes_up(arrow));
    let mut faults: Vec<String> = upward
        .map(|(from, to)| format!("{from} ({}) may not use {to} ({})", layer(from).1, layer(to).1))
        .collect();
    let cycles = cycles(arrows).into_iter();
    faults.extend(cycles.map(|files| format!("these use each other in a cycle: {}", files.join(", "))));
    faults
}

fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

#[test]
fn files_use_each_other_in_no_cycle_and_layers_only_those_below() {
    let faults = faults(&arrows(&workspace()));
    assert!(faults.is_empty(), "\n{}\n", faults.join("\n"));
}

/// Writes a tree of sources in which `text` is added to one file.
fn tree_with(file: &str, text: &str) -> TempDir {
    let dir = TempDir::new("architecture").unwrap();
    for (path, source) in [
        ("proto/src/lib.rs", "pub mod name;"),
        ("proto/config/src/lib.rs", ""),
        ("proto/net/src/lib.rs", "pub mod link;"),
        ("master-agent/access/src/lib.rs", ""),
        ("proto/net/src/link.rs", "use proto::name::Name;"),
        ("proto/src/name.rs", "pub struct Name;"),
        ("node-agent/src/lib.rs", "mod session;"),
        ("node-agent/src/main.rs", "fn main() { node_agent::run() }"),
        ("node-agent/src/session.rs", ""),
        ("master-agent/src/lib.rs", "pub mod page;\npub mod routing;"),
        ("master-agent/src/main.rs", ""),
        ("master-agent/src/page/mod.rs", "use crate::routing::{self, choice::Choice};"),
        ("master-agent/src/routing/mod.rs", "pub mod choice;"),
        ("master-agent/src/routing/choice.rs", "use proto::name::Name;\nuse proto_net::link;"),
    ] {
        let to = dir.path().join(path);
        std::fs::create_dir_all(to.parent().unwrap()).unwrap();
        let text = if path == file { text } else { "" };
        std::fs::write(to, format!("{source}\n{text}\n")).unwrap();
    }
    dir
}

#[test]
fn every_way_to_break_the_rules_is_found() {
    let clean = arrows(tree_with("", "").path());
    assert!(faults(&clean).is_empty());
    assert_eq!(clean.len(), 6, "{clean:?}");
    for (file, text, fault) in [
        (
            "proto/src/name.rs",
            "use proto_net::link::Link;",
            "proto/src/name.rs (proto) may not use proto/net/src/link.rs",
        ),
        (
            "proto/src/name.rs",
            "use proto_net::{link::Link as L};",
            "cycle: proto/net/src/link.rs, proto/src/name.rs",
        ),
        (
            "master-agent/src/routing/choice.rs",
            "fn f() { crate::page::show() }",
            "may not use master-agent/src/page/mod.rs (ui)",
        ),
        (
            "master-agent/src/routing/choice.rs",
            "fn f() -> super::super::page::Page {}",
            "may not use master-agent/src/page/mod.rs (ui)",
        ),
        (
            "master-agent/src/routing/choice.rs",
            "fn f() { log!(debug, [crate::page::A]) }",
            "may not use master-agent/src/page/mod.rs (ui)",
        ),
        (
            "master-agent/src/routing/choice.rs",
            "mod inner { use super::super::super::page::*; }",
            "may not use master-agent/src/page/mod.rs (ui)",
        ),
        (
            "master-agent/src/routing/mod.rs",
            "use choice::Choice; mod inner { struct Inner(super::choice::Choice); }",
            "",
        ),
        ("master-agent/src/routing/choice.rs", "use super::Routing;", ""),
        (
            "node-agent/src/session.rs",
            "use master_agent::page;",
            "may not use master-agent/src/page/mod.rs (ui)",
        ),
        ("proto/src/name.rs", "#[cfg(test)] mod tests { use proto_net::link::Link; }", ""),
    ] {
        let found = faults(&arrows(tree_with(file, text).path()));
        match fault {
            "" => assert!(found.is_empty(), "{file}: {text}: {found:?}"),
            _ => assert!(found.iter().any(|f| f.contains(fault)), "{file}: {text}: {found:?}"),
        }
    }
}
