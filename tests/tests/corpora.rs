//! Replays the inputs that the fuzz targets in `tests/fuzz` keep.

use std::{collections::BTreeSet, path::Path};

#[path = "../fuzz/decoders/mod.rs"]
mod decoders;

fn fuzz() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz")
}

#[test]
fn every_input_that_is_kept_is_decoded_or_refused() {
    for (name, check) in decoders::ALL {
        let folder = fuzz().join("corpora").join(name);
        let mut inputs = 0;
        for entry in std::fs::read_dir(&folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display())) {
            let path = entry.unwrap().path();
            println!("{}", path.display());
            check(&std::fs::read(path).unwrap());
            inputs += 1;
        }
        assert!(inputs > 0, "{} is empty", folder.display());
    }
}

/// A function without a target would never be fuzzed.
#[test]
fn every_function_has_its_target() {
    let manifest = std::fs::read_to_string(fuzz().join("Cargo.toml")).unwrap();
    let targets: BTreeSet<&str> = manifest
        .lines()
        .filter_map(|line| line.strip_prefix("path = \"targets/")?.strip_suffix(".rs\""))
        .collect();
    assert_eq!(targets, decoders::ALL.iter().map(|(name, _)| *name).collect());
    for name in targets {
        let target = std::fs::read_to_string(fuzz().join(format!("targets/{name}.rs"))).unwrap();
        assert!(target.contains(&format!("decoders::{name}(bytes)")), "{name}");
    }
}
