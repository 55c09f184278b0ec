//! What a description of a configuration contains.

use std::{path::Path, time::Duration};

use crate::{
    Alternative, Field, FieldKind, Mode, Section, Shape, Source, describe, description::Written, parse,
};

#[derive(Debug)]
enum Animal {
    Cat,
    Dog,
}

const KINDS: [Alternative<Animal>; 2] = [
    ("cat", |at| at.section(|s| s.required::<String>("name")).map(|_| Animal::Cat)),
    ("dog", |at| at.text().map(|_| Animal::Dog)),
];

fn read_animal(s: &Section<'_>) -> Option<Animal> {
    s.document(&[("cat", "A cat."), ("dog", "A dog.")]);
    s.one_of(&KINDS).unwrap_or_else(|given| {
        s.section_error(format!("expected one animal, found {given}"));
        None
    })
}

fn read(s: &Section<'_>) -> Option<()> {
    s.document(&[("max", "How many there may be."), ("unread", "No reader asks for this.")]);
    s.listen("listen", ([127, 0, 0, 1], 80).into());
    s.number("max", 5, 1..=10);
    s.duration("wait", Duration::from_secs(90), Duration::ZERO..=Duration::from_secs(3600));
    s.section_or_default("tuning", |s| s.or("fast", false));
    s.section("unix", |s| {
        s.or("mode", Mode(0o660));
        s.required::<String>("path")
    });
    for at in s.items("animals") {
        at.section(read_animal);
    }
    s.list::<usize>("numbers");
    s.word("colour", &["red", "blue"]);
    s.required::<String>("missing").map(|_| ())
}

fn find<'f>(fields: &'f [Field], path: &[&str]) -> &'f Field {
    let (name, rest) = path.split_first().unwrap();
    let field = fields.iter().find(|field| field.name == *name).unwrap();
    if rest.is_empty() { field } else { find(&field.fields, rest) }
}

#[test]
fn every_field_that_a_reader_names_is_described_in_its_order() {
    let fields = describe(read);
    let names: Vec<_> = fields.iter().map(|field| field.name.as_str()).collect();
    assert_eq!(names, ["listen", "max", "wait", "tuning", "unix", "animals", "numbers", "colour", "missing"]);
    let max = find(&fields, &["max"]);
    assert_eq!(max.about, "How many there may be.");
    assert_eq!(max.kind, FieldKind::Value(Shape::Integer));
    assert_eq!(max.default.as_deref(), Some("5"));
    assert_eq!(max.range, Some(("1".to_owned(), "10".to_owned())));
    assert!(!max.required);
    assert_eq!(find(&fields, &["listen"]).default.as_deref(), Some("127.0.0.1:80"));
    assert_eq!(find(&fields, &["wait"]).default.as_deref(), Some("90s"));
    assert_eq!(find(&fields, &["wait"]).range, Some(("0s".to_owned(), "1h".to_owned())));
    assert_eq!(find(&fields, &["colour"]).kind, FieldKind::Value(Shape::Words(&["red", "blue"])));
    assert!(find(&fields, &["missing"]).required);
}

#[test]
fn sections_lists_and_alternatives_are_visited() {
    let fields = describe(read);
    assert_eq!(find(&fields, &["tuning"]).default.as_deref(), Some("{}"));
    assert_eq!(find(&fields, &["tuning", "fast"]).default.as_deref(), Some("false"));
    assert_eq!(find(&fields, &["unix"]).default, None);
    assert_eq!(find(&fields, &["unix", "mode"]).default.as_deref(), Some("0660"));
    assert!(find(&fields, &["unix", "path"]).required);
    assert_eq!(find(&fields, &["numbers"]).kind, FieldKind::List);
    assert_eq!(find(&fields, &["numbers", "[]"]).kind, FieldKind::Value(Shape::Integer));
    let animal = find(&fields, &["animals", "[]"]);
    assert_eq!(animal.kind, FieldKind::Choice);
    assert_eq!(find(&animal.fields, &["cat"]).about, "A cat.");
    assert!(find(&animal.fields, &["cat", "name"]).required);
    assert_eq!(find(&animal.fields, &["dog"]).kind, FieldKind::Value(Shape::text("text")));
}

#[test]
fn durations_are_written_in_whole_units() {
    for (millis, expected) in
        [(0, "0s"), (250, "250ms"), (1500, "1500ms"), (90_000, "90s"), (600_000, "10m"), (86_400_000, "24h")]
    {
        assert_eq!(Written(Duration::from_millis(millis)).to_string(), expected);
    }
}

#[test]
fn a_word_is_one_of_those_that_are_allowed() {
    let read_text = |text: &str| {
        let source = Source { origin: "f.yaml", base_dir: Path::new("/base"), check_files: false };
        let read = |s: &Section<'_>| Some(s.word("colour", &["red", "blue"]));
        parse(text, source, read).map_err(|errors| errors.to_string())
    };
    assert_eq!(read_text("colour: blue"), Ok(Some("blue")));
    assert_eq!(read_text("{}"), Ok(None));
    assert_eq!(read_text("colour: green"), Err("f.yaml:1:9: colour: expected red or blue".to_owned()));
}

#[test]
fn exactly_one_alternative_is_read() {
    let read_text = |text: &str| {
        let source = Source { origin: "f.yaml", base_dir: Path::new("/base"), check_files: false };
        parse(text, source, read_animal).map_err(|errors| errors.to_string())
    };
    assert!(matches!(read_text("cat: {name: a}"), Ok(Animal::Cat)));
    assert!(matches!(read_text("dog: a"), Ok(Animal::Dog)));
    assert!(read_text("{}").unwrap_err().contains("found 0"));
    assert!(read_text("{dog: a, cat: {name: a}}").unwrap_err().contains("found 2"));
    assert!(read_text("{dog: a, bird: b}").unwrap_err().contains("bird: unknown field"));
}
