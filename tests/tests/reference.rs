//! `deploy/reference` says what the code says. `UPDATE=1 cargo test -p tests --test reference` writes it anew.

use std::{collections::BTreeSet, path::Path};

use proto_config::{Field, defaults};
use serde_json::Value;
use tests::{
    metrics::root,
    reference::{configuration_files, reference, schema},
};

#[test]
fn the_reference_is_that_of_the_code() {
    let folder = root().join("deploy/reference");
    let update = std::env::var_os("UPDATE").is_some();
    if update {
        std::fs::create_dir_all(&folder).unwrap();
    }
    let mut different = Vec::new();
    for (name, text) in reference() {
        let path = folder.join(&name);
        if update {
            std::fs::write(&path, &text).unwrap();
        }
        if std::fs::read_to_string(&path).unwrap_or_default() != text {
            different.push(name);
        }
    }
    assert!(different.is_empty(), "set UPDATE=1 to write these anew: {different:?}");
}

/// The paths of fields whose meaning nobody states.
fn without_meaning(fields: &[Field], path: &str, found: &mut Vec<String>) {
    for field in fields {
        let path = format!("{path}.{}", field.name);
        if field.about.is_empty() && field.name != "[]" {
            found.push(path.clone());
        }
        without_meaning(&field.fields, &path, found);
    }
}

#[test]
fn every_field_has_a_meaning() {
    let mut found = Vec::new();
    for file in configuration_files() {
        without_meaning(&file.fields, file.name, &mut found);
    }
    assert!(found.is_empty(), "{found:#?}");
}

fn count(fields: &[Field]) -> usize {
    fields.iter().map(|field| count(&field.fields) + usize::from(field.name != "[]")).sum()
}

/// A reader that gives up early would leave out the fields behind.
#[test]
fn the_samples_fit_the_schemas() {
    for (file, least) in configuration_files().into_iter().zip([200, 40, 13]) {
        assert!(count(&file.fields) >= least, "{}: only {} fields", file.name, count(&file.fields));
        let path = root().join("deploy/config").join(file.name).with_extension("yaml");
        let sample: Value = serde_saphyr::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
        let mut wrong = Vec::new();
        unknown(&schema(&file), &sample, file.name, &mut wrong);
        misfits(&schema(&file), &sample, file.name, &mut wrong);
        assert!(wrong.is_empty(), "{wrong:#?}");
    }
}

/// Whether a text has a field of this name, in a comment or not.
fn shows(text: &str, field: &str) -> bool {
    text.match_indices(&format!("{field}:")).any(|(at, _)| {
        let before = text[..at].chars().next_back();
        before.is_none_or(|c| !c.is_alphanumeric() && !['_', '-'].contains(&c))
    })
}

/// The names of all fields, at any depth.
fn names<'f>(fields: &'f [Field], found: &mut BTreeSet<&'f str>) {
    for field in fields {
        found.insert(&field.name);
        names(&field.fields, found);
    }
}

#[test]
fn the_samples_show_every_field() {
    let samples = root().join("deploy/config");
    let text = |name: &str| std::fs::read_to_string(samples.join(name).with_extension("yaml")).unwrap();
    let inventory = text("inventory");
    for file in configuration_files() {
        let sample = text(file.name);
        let is_shown = |name: &str| {
            // The cluster's nodes have the same host keys as those of the inventory, whose sample shows them.
            let elsewhere = ["pins", "known_hosts", "first_use"].contains(&name) && shows(&inventory, name);
            elsewhere || shows(&sample, name)
        };
        let mut known = BTreeSet::new();
        names(&file.fields, &mut known);
        let missing: Vec<_> = known.into_iter().filter(|name| *name != "[]" && !is_shown(name)).collect();
        assert!(missing.is_empty(), "{}.yaml does not show {missing:?}", file.name);
    }
}

/// The paths of a value's fields that a schema does not have.
fn unknown(schema: &Value, value: &Value, path: &str, wrong: &mut Vec<String>) {
    for (name, value) in value.as_object().into_iter().flatten() {
        match schema["properties"].get(name) {
            Some(schema) => unknown(schema, value, &format!("{path}.{name}"), wrong),
            None => wrong.push(format!("{path}.{name} is unknown")),
        }
    }
    for (i, item) in value.as_array().into_iter().flatten().enumerate() {
        unknown(&schema["items"], item, &format!("{path}[{i}]"), wrong);
    }
}

/// Checks a value against the part of JSON Schema that the reference uses, but for patterns and unknown fields.
fn misfits(schema: &Value, value: &Value, path: &str, wrong: &mut Vec<String>) {
    if let Some(words) = schema["enum"].as_array()
        && !words.contains(value)
    {
        wrong.push(format!("{path}: {value} is none of {words:?}"));
    }
    if let Some(number) = value.as_f64() {
        let least = schema["minimum"].as_f64().unwrap_or(f64::MIN);
        let greatest = schema["maximum"].as_f64().unwrap_or(f64::MAX);
        if !(least..=greatest).contains(&number) {
            wrong.push(format!("{path}: {value} is not in the range {least} to {greatest}"));
        }
    }
    let types: Vec<&str> = match &schema["type"] {
        Value::Array(types) => types.iter().filter_map(Value::as_str).collect(),
        one => one.as_str().into_iter().collect(),
    };
    let is = |name: &&str| match *name {
        "object" => value.is_object(),
        "array" => value.is_array(),
        "boolean" => value.is_boolean(),
        "integer" => value.is_u64(),
        "number" => value.is_number(),
        "string" => value.is_string(),
        other => panic!("{other}"),
    };
    if !types.is_empty() && !types.iter().any(is) {
        wrong.push(format!("{path}: {value} is none of {types:?}"));
    }
    for (name, value) in value.as_object().into_iter().flatten() {
        misfits(&schema["properties"][name], value, &format!("{path}.{name}"), wrong);
    }
    for (i, item) in value.as_array().into_iter().flatten().enumerate() {
        misfits(&schema["items"], item, &format!("{path}[{i}]"), wrong);
    }
}

#[test]
fn the_printed_defaults_are_the_defaults() {
    let base = Path::new("/etc");
    let master =
        |text: &str| master_agent::config::Config::parse(text, "defaults", base).map_err(|e| e.to_string());
    let printed = defaults(&master_agent::config::Config::describe());
    assert_eq!(master(&printed), master(""), "{printed}");
    assert!(master("").is_ok());

    let node =
        |text: &str| node_agent::config::Config::parse(text, "defaults", base).map_err(|e| e.to_string());
    let printed = defaults(&node_agent::config::Config::describe());
    let listen = "listen: 0.0.0.0:22\n";
    assert_eq!(node(&(printed.clone() + listen)), node(listen), "{printed}");
    assert!(node(listen).is_ok());
}

/// Removes the `#` before fields that are commented out. Prose has one space behind its `#`.
fn uncommented(text: &str) -> String {
    let line = |line: &str| {
        let mut shown = line.to_owned();
        while let Some((before, behind)) = shown.split_once('#') {
            let is_prose = behind.starts_with(' ') && !behind.starts_with("  ");
            if is_prose || !before.trim().is_empty() {
                break;
            }
            shown = format!("{before}{behind}");
        }
        shown + "\n"
    };
    text.lines().map(line).collect()
}

#[test]
fn the_printed_defaults_show_every_section_once_uncommented() {
    for file in configuration_files() {
        let all = uncommented(&defaults(&file.fields));
        let value: Value = serde_saphyr::from_str(&all).unwrap_or_else(|e| panic!("{e}\n{all}"));
        let shown: BTreeSet<&str> = value.as_object().unwrap().keys().map(String::as_str).collect();
        let there: BTreeSet<&str> = file.fields.iter().map(|field| field.name.as_str()).collect();
        assert_eq!(shown, there, "{all}");
        let mut wrong = Vec::new();
        unknown(&schema(&file), &value, file.name, &mut wrong);
        assert!(wrong.is_empty(), "{wrong:#?}\n{all}");
    }
}
