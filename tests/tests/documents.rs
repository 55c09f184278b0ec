//! The documents of the repository name tests and files that exist.

use std::path::{Path, PathBuf};

use tests::metrics::root;

/// All Rust files below a directory, with their text.
fn sources(directory: &Path, found: &mut Vec<(PathBuf, String)>) {
    for entry in std::fs::read_dir(directory).unwrap().flatten() {
        let path = entry.path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|end| end == "rs") {
            let text = std::fs::read_to_string(&path).unwrap();
            found.push((path, text));
        }
    }
}

/// Whether a file holds the module of that name, or a part of it.
fn is_in(path: &Path, module: &str) -> bool {
    path.with_extension("").components().any(|part| part.as_os_str() == module)
}

/// The words of the documents that are set as code, each with the name of its document.
fn quoted() -> Vec<(&'static str, String)> {
    let mut words = Vec::new();
    for document in ["ARCHITECTURE.md", "CONTRIBUTING.md", "SECURITY.md"] {
        let text = std::fs::read_to_string(root().join(document)).unwrap();
        for line in text.lines() {
            words.extend(line.split('`').skip(1).step_by(2).map(|word| (document, word.to_owned())));
        }
    }
    words
}

/// `module::name` is an end-to-end test, and a name of five words or more is any test.
#[test]
fn the_documents_name_tests_that_exist() {
    let mut files = Vec::new();
    for part in ["master-agent", "node-agent", "proto", "tests/src", "tests/tests"] {
        sources(&root().join(part), &mut files);
    }
    let end_to_end = root().join("tests/tests/e2e");
    let (mut named, mut missing) = (0, Vec::new());
    for (document, quoted) in quoted() {
        let word = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
        let (module, name) = match quoted.split_once("::") {
            Some((module, name)) => (Some(module), name),
            None => (None, quoted.as_str()),
        };
        let is_name = name.matches('_').count() >= if module.is_some() { 2 } else { 4 };
        if !is_name || !name.chars().chain(module.unwrap_or_default().chars()).all(word) {
            continue;
        }
        named += 1;
        let there = files.iter().any(|(path, text)| {
            let right = module.is_none_or(|module| path.starts_with(&end_to_end) && is_in(path, module));
            right && text.contains(&format!("fn {name}("))
        });
        if !there {
            missing.push(format!("{document}: {quoted}"));
        }
    }
    assert!(named > 80, "only {named} tests are named");
    assert!(missing.is_empty(), "{missing:#?}");
}

/// A path is below the root, or below the sources of master-agent or of its crate `access`.
#[test]
fn the_documents_name_files_that_exist() {
    let bases = ["", "master-agent/src", "master-agent/access/src"].map(|base| root().join(base));
    let (mut named, mut missing) = (0, Vec::new());
    for (document, quoted) in quoted() {
        let is_path = |c: char| c.is_ascii_alphanumeric() || "_-./".contains(c);
        let is_file = [".rs", ".md", ".sh", ".yaml"].iter().any(|end| quoted.ends_with(end));
        // A name in capitals stands for one that the reader chooses.
        let stem = Path::new(&quoted).file_stem().unwrap_or_default().to_string_lossy();
        let is_given = !["NAME", "TARGET"].contains(&&*stem);
        if !quoted.contains('/') || !is_file || !is_given || !quoted.chars().all(is_path) {
            continue;
        }
        named += 1;
        let path = quoted.strip_prefix("access/").unwrap_or(&quoted);
        if !bases.iter().any(|base| base.join(path).exists()) {
            missing.push(format!("{document}: {quoted}"));
        }
    }
    assert!(named > 200, "only {named} files are named");
    assert!(missing.is_empty(), "{missing:#?}");
}
