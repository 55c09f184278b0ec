mod defaults;
mod describe;

use std::{
    fmt,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    time::Duration,
};

use super::{context::Listener, section::nearest, *};
use proto::Target;

fn read<T>(text: &str, read: impl FnOnce(&Section<'_>) -> Option<T>) -> Result<T, Errors> {
    parse(text, Source { origin: "f.yaml", base_dir: Path::new("/base"), check_files: false }, read)
}

fn field<T: Value>(text: &str) -> Result<T, String> {
    read(&format!("v: {text}"), |s| s.required("v")).map_err(|e| e.to_string())
}

#[test]
fn values_in_all_their_spellings() {
    assert_eq!(field("1h 30m"), Ok(Duration::from_secs(5400)));
    assert_eq!(field("\"250ms\""), Ok(Duration::from_millis(250)));
    assert_eq!(field("true"), Ok(true));
    assert_eq!(field("65535"), Ok(65535u16));
    assert_eq!(field("\"0660\""), Ok(Mode(0o660)));
    assert_eq!(field("0660"), Ok(Mode(0o660)));
    assert_eq!(field("80"), Ok(Ports(vec![80..=80])));
    assert_eq!(field("80 - 90"), Ok(Ports(vec![80..=90])));
    assert_eq!(field("[80, '90-99']"), Ok(Ports(vec![80..=80, 90..=99])));
    assert_eq!(field("\"[::1]:22\""), Ok("[::1]:22".parse::<SocketAddr>().unwrap()));
    assert_eq!(field("\"::ffff:10.0.0.1\""), Ok(IpAddr::from([10, 0, 0, 1])));
    assert_eq!(field("N1.example:22"), Ok("n1.example:22".parse::<Target>().unwrap()));
    assert_eq!(field("fd00::/64"), Ok("fd00::/64".parse::<ipnet::IpNet>().unwrap()));
    assert_eq!(field("sub/file"), Ok(PathBuf::from("/base/sub/file")));
    // Text is what is written, whatever YAML would make of it.
    for text in ["yes", "1_000", "0x10", "1.50", "2024-01-01"] {
        assert_eq!(field(text), Ok(text.to_owned()));
    }
    assert_eq!(field("'null'"), Ok("null".to_owned()));
}

#[test]
fn values_that_are_refused() {
    fn refused<T: Value + fmt::Debug>(texts: &[&str]) {
        for text in texts {
            let shown = field::<T>(text).unwrap_err();
            assert!(shown.starts_with("f.yaml:1:"), "{text}: {shown}");
            assert_eq!(shown.lines().count(), 1, "{text}: {shown}");
        }
    }
    refused::<bool>(&["yes", "True", "'true'", "1", "[true]", "~", ""]);
    refused::<usize>(&["-1", "1.0", "'1'", "1e3", "0x10", "+1", "99999999999999999999", "{}"]);
    refused::<u16>(&["65536"]);
    refused::<Duration>(&["15", "1.5", "'15'", "s", "15 parsecs", "-1s", "''", "[1s]"]);
    refused::<Mode>(&["660", "'660'", "'0o660'", "0880", "'00660'", "rw"]);
    refused::<Ports>(&["0", "65536", "1-", "-1", "9-8", "[]", "[1, 0]", "+80", "80,90", "{}"]);
    refused::<SocketAddr>(&["22", "localhost:22", "::1:22", "1.2.3.4"]);
    refused::<PathBuf>(&["''", "\"a\\0b\""]);
    refused::<Target>(&["a", "a:", "a:0", "fd00::1:22"]);
    refused::<String>(&["", "''", "null", "[a]", "!!str a", "!mine a", "&a b"]);
}

#[test]
fn yaml_that_is_refused() {
    let deep = format!("v: {}", "[".repeat(1000));
    let long = format!("v: {}1{}", "[".repeat(40), "]".repeat(40));
    let bomb = "a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\n";
    for (text, expected) in [
        ("v: 1\nv: 2", "f.yaml:2:1: \"v\" is given twice, first on line 1"),
        ("v: [", "f.yaml:1:4: not YAML: unclosed bracket"),
        ("v: a: b", "f.yaml:1:5: not YAML: mapping values are not allowed"),
        ("{---", "f.yaml:1:1: not YAML"),
        (&deep, "f.yaml:1:"),
        (&long, "f.yaml:1:36: nested more than 32 deep"),
        (bomb, "f.yaml:1:7: anchors are not supported"),
        ("v: 1\n---\nv: 2", "f.yaml:2:1: a second document begins here"),
        ("? [v]\n: 1", "f.yaml:1:3: a field's name must be a word"),
        ("- v", "f.yaml:1:1: expected a section of fields, found a list"),
        ("v", "f.yaml:1:1: expected a section of fields, found a single value"),
        ("<<: {v: 1}", "f.yaml:1:1: <<: unknown field"),
        ("v: \"\u{1}\"", "f.yaml:1:"),
    ] {
        let shown = read(text, |s| Some(s.optional::<String>("v"))).unwrap_err().to_string();
        assert!(
            shown.lines().any(|line| line.starts_with(expected)),
            "{text}\nexpected {expected}\ngot {shown}"
        );
    }
}

#[test]
fn an_empty_document_is_an_empty_section() {
    for text in ["", "# nothing\n", "---\n", "{}", "\u{feff}"] {
        assert_eq!(read(text, |s| Some(s.or("v", 7usize))), Ok(7), "{text:?}");
    }
    let shown = read("", |s| s.required::<String>("v")).unwrap_err().to_string();
    assert_eq!(shown, "f.yaml:1:1: v: is required");
}

#[test]
fn no_more_than_a_hundred_errors_are_shown() {
    let text: String = (0..1000).map(|i| format!("k{i}: 1\n")).collect();
    let errors = read(&text, |_| Some(())).unwrap_err();
    assert_eq!(errors.iter().count(), 101);
    assert!(errors.to_string().ends_with("f.yaml: and 900 more errors"));
}

#[test]
fn misspelt_fields_get_a_suggestion() {
    let known = ["keepalive_interval", "keepalive_max", "listen", "to"];
    for (key, expected) in [
        ("keepalive-max", Some("keepalive_max")),
        ("keepAliveMax", Some("keepalive_max")),
        ("keepalive_intervall", Some("keepalive_interval")),
        ("lisen", Some("listen")),
        ("at", None),
        ("colour", None),
        ("", None),
    ] {
        assert_eq!(nearest(key, &known), expected, "{key}");
    }
}

#[test]
fn listeners_clash_where_the_kernel_would_refuse_the_second() {
    for (a, b, clash) in [
        ("127.0.0.1:1", "127.0.0.1:1", true),
        ("127.0.0.1:1", "127.0.0.1:2", false),
        ("127.0.0.1:1", "127.0.0.2:1", false),
        ("0.0.0.0:1", "127.0.0.2:1", true),
        ("[::]:1", "127.0.0.2:1", true),
        ("0.0.0.0:1", "[::1]:1", false),
        ("[::]:1", "0.0.0.0:1", true),
        ("0.0.0.0:0", "0.0.0.0:0", false),
    ] {
        let listener = |text: &str| Listener::Tcp(text.parse().unwrap());
        assert_eq!(listener(a).clashes(&listener(b)), clash, "{a} {b}");
        assert_eq!(listener(b).clashes(&listener(a)), clash, "{b} {a}");
    }
}

/// Whatever the text, reading it ends in a value or in errors.
#[test]
fn arbitrary_text_never_panics() {
    let seeds = [
        "a: {b: [c, d], v: \"f\\n\"}\n",
        "v:\n  - name: n1 # c\n    'x': >-\n      fold\n? k\n: |\n  text\n",
    ];
    let alphabet: Vec<char> = "{}[]-?:,&*!|>'\"%@` \n\t#ab~\\.\u{e9}\0".chars().collect();
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let mut random = move |below: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        usize::try_from(state % u64::try_from(below).unwrap()).unwrap()
    };
    for round in 0..20_000 {
        let mut text: Vec<char> = seeds[round % 2].chars().collect();
        for _ in 0..1 + random(10) {
            let at = random(text.len() + 1);
            match random(3) {
                0 if at < text.len() => drop(text.remove(at)),
                1 if at < text.len() => text[at] = alphabet[random(alphabet.len())],
                _ => text.insert(at, alphabet[random(alphabet.len())]),
            }
        }
        let text: String = text.into_iter().collect();
        let _ = read(&text, |s| {
            s.section("a", |s| Some(s.list::<String>("b")));
            let items = s.items("v");
            items.iter().map(|at| at.section(|s| s.required::<String>("name"))).collect::<Option<Vec<_>>>()
        });
    }
}
