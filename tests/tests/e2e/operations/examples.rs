//! The examples for kube-apiserver are accepted by it, and lead to where the sample configuration listens.

use std::{fs, path::Path};

use serde_json::Value;

fn yaml(path: &Path) -> Vec<Value> {
    let text = fs::read_to_string(path).unwrap();
    let document = |text| serde_saphyr::from_str(text).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    text.split("\n---\n").map(document).collect()
}

fn deploy() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy")
}

/// As kube-apiserver validates it (k8s.io/apiserver, server/egressselector/config.go).
fn check_selector(config: &Value) {
    assert_eq!(config["apiVersion"], "apiserver.k8s.io/v1beta1");
    assert_eq!(config["kind"], "EgressSelectorConfiguration");
    let selections = config["egressSelections"].as_array().unwrap();
    let names: Vec<_> = selections.iter().map(|s| s["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["cluster", "controlplane", "etcd"]);
    for selection in selections {
        let connection = &selection["connection"];
        let (uds, tcp) = (&connection["transport"]["uds"], &connection["transport"]["tcp"]);
        match connection["proxyProtocol"].as_str().unwrap() {
            "Direct" => assert!(connection["transport"].is_null()),
            "GRPC" => assert!(uds["udsName"].as_str().unwrap().starts_with('/') && tcp.is_null()),
            "HTTPConnect" if tcp.is_null() => assert!(uds["udsName"].as_str().unwrap().starts_with('/')),
            "HTTPConnect" => {
                assert!(uds.is_null() && tcp["url"].as_str().unwrap().starts_with("https://"));
                for file in ["caBundle", "clientCert", "clientKey"] {
                    assert!(tcp["tlsConfig"][file].as_str().unwrap().starts_with('/'), "{file}");
                }
            }
            other => panic!("{other}"),
        }
    }
}

#[test]
fn the_egress_selectors_lead_to_the_sample_configuration() {
    let sample = &yaml(&deploy().join("config/master-agent.yaml"))[0];
    let port = |listen: &Value| listen.as_str().unwrap().rsplit(':').next().unwrap().to_owned();
    let mut modes = Vec::new();
    for file in fs::read_dir(deploy().join("kubernetes")).unwrap().flatten() {
        let name = file.file_name().into_string().unwrap();
        let Some(mode) = name.strip_prefix("egress-selector-").and_then(|n| n.strip_suffix(".yaml")) else {
            continue;
        };
        let config = &yaml(&file.path())[0];
        check_selector(config);
        let cluster = &config["egressSelections"][0]["connection"];
        let transport = &cluster["transport"];
        match (cluster["proxyProtocol"].as_str().unwrap(), transport["tcp"].is_null()) {
            ("HTTPConnect", true) => {
                assert_eq!(transport["uds"]["udsName"], sample["http_connect"]["unix"]["path"]);
            }
            ("HTTPConnect", false) => {
                assert_eq!(port(&transport["tcp"]["url"]), port(&sample["http_connect"]["tls"]["listen"]));
            }
            ("GRPC", _) => assert_eq!(transport["uds"]["udsName"], sample["konnectivity"]["unix"]["path"]),
            (other, _) => panic!("{name}: {other}"),
        }
        let text = fs::read_to_string(file.path()).unwrap();
        for flag in ["--egress-selector-config-file=", "--kubelet-certificate-authority="] {
            assert!(text.contains(flag), "{name}: {flag}");
        }
        modes.push(mode.to_owned());
    }
    modes.sort();
    assert_eq!(modes, ["grpc", "http-connect-tls", "http-connect-uds"]);
}

/// It may list and watch what is followed, have tokens reviewed, and do nothing else.
#[test]
fn the_role_allows_what_is_asked_and_no_more() {
    let objects = yaml(&deploy().join("kubernetes/rbac.yaml"));
    let role = objects.iter().find(|o| o["kind"] == "ClusterRole").unwrap();
    let mut allowed = Vec::new();
    for rule in role["rules"].as_array().unwrap() {
        if rule["resources"] == serde_json::json!(["tokenreviews"]) {
            assert_eq!(rule["verbs"], serde_json::json!(["create"]));
            continue;
        }
        assert_eq!(rule["verbs"], serde_json::json!(["list", "watch"]));
        allowed.extend(rule["resources"].as_array().unwrap().iter().map(|r| r.as_str().unwrap().to_owned()));
    }
    let routed = tests::apiserver::Kind::ALL.into_iter();
    let followed = routed.chain([tests::apiserver::Kind::ServiceAccounts]);
    let mut followed: Vec<_> = followed.map(|kind| kind.plural().to_owned()).collect();
    allowed.sort();
    followed.sort();
    assert_eq!(allowed, followed);
    let binding = objects.iter().find(|o| o["kind"] == "ClusterRoleBinding").unwrap();
    assert_eq!(binding["roleRef"]["name"], role["metadata"]["name"]);
}
