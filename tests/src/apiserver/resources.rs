//! The objects of one kind that a stub kube-apiserver lists, and the events of its watches.

use std::{
    collections::{BTreeMap, VecDeque},
    path::Path,
};

use anyhow::{Context, bail};
use bytes::Bytes;
use hyper::StatusCode;
use serde_json::{Value, json};
use tokio::sync::mpsc;

use super::{Fault, read, status_object};

/// A kind of object that is served.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    Nodes,
    Pods,
    Services,
    EndpointSlices,
    ServiceAccounts,
}

impl Kind {
    /// The kinds that routes are made of.
    pub const ALL: [Self; 4] = [Self::Nodes, Self::Pods, Self::Services, Self::EndpointSlices];
    pub(super) const SERVED: [Self; 5] =
        [Self::Nodes, Self::Pods, Self::Services, Self::EndpointSlices, Self::ServiceAccounts];

    /// Where objects of all namespaces are listed.
    pub fn path(self) -> &'static str {
        match self {
            Self::Nodes => "/api/v1/nodes",
            Self::Pods => "/api/v1/pods",
            Self::Services => "/api/v1/services",
            Self::EndpointSlices => "/apis/discovery.k8s.io/v1/endpointslices",
            Self::ServiceAccounts => "/api/v1/serviceaccounts",
        }
    }

    /// The resource's name: `nodes`.
    pub fn plural(self) -> &'static str {
        self.path().rsplit('/').next().unwrap_or_default()
    }

    /// The name of one: `Node`.
    pub fn singular(self) -> &'static str {
        match self {
            Self::Nodes => "Node",
            Self::Pods => "Pod",
            Self::Services => "Service",
            Self::EndpointSlices => "EndpointSlice",
            Self::ServiceAccounts => "ServiceAccount",
        }
    }

    pub fn api_version(self) -> &'static str {
        match self {
            Self::Nodes | Self::Pods | Self::Services | Self::ServiceAccounts => "v1",
            Self::EndpointSlices => "discovery.k8s.io/v1",
        }
    }
}

/// Namespace and name; no namespace is an empty one.
type Key = (String, String);
type Watch = mpsc::UnboundedSender<std::io::Result<Bytes>>;

/// The objects of a kind, and what happened to them since the list was read.
pub(super) struct Resource {
    kind: Kind,
    /// The list as it was read, for as long as nothing has happened.
    unchanged: Option<Bytes>,
    objects: BTreeMap<Key, Value>,
    /// The version from which on `history` is known.
    oldest: String,
    /// Events as they were sent, each with the version that it leads to.
    history: Vec<(String, Bytes)>,
    recorded: VecDeque<Bytes>,
    watches: Vec<Watch>,
    /// Events that the watches get later, while they are held back.
    held: Option<Vec<Bytes>>,
    /// Versions given to objects that came without one.
    given: u64,
    pub list_fault: Option<Fault>,
    pub watch_fault: Option<Fault>,
}

impl Resource {
    pub fn read(directory: &Path, kind: Kind) -> anyhow::Result<Self> {
        let file = |end: &str| read(&directory.join(format!("{}.{end}", kind.plural())));
        let events = file("watch.jsonl")?;
        let lines = events.split_inclusive(|byte| *byte == b'\n');
        let mut resource = Self {
            kind,
            unchanged: None,
            objects: BTreeMap::new(),
            oldest: String::new(),
            history: Vec::new(),
            recorded: lines.map(Bytes::copy_from_slice).collect(),
            watches: Vec::new(),
            held: None,
            given: 0,
            list_fault: None,
            watch_fault: None,
        };
        resource.replace(&file("list.json")?)?;
        Ok(resource)
    }

    pub fn replace(&mut self, list: &[u8]) -> anyhow::Result<()> {
        let value: Value = serde_json::from_slice(list).context("a list is JSON")?;
        let version =
            value["metadata"]["resourceVersion"].as_str().context("a list has a resourceVersion")?;
        if version == self.version() {
            bail!("the list's resourceVersion {version} must be a new one");
        }
        self.end();
        self.objects.clear();
        for object in value["items"].as_array().context("a list has items")? {
            self.objects.insert(key(object), object.clone());
        }
        self.unchanged = Some(Bytes::copy_from_slice(list));
        version.clone_into(&mut self.oldest);
        self.history.clear();
        Ok(())
    }

    pub fn list(&self) -> Bytes {
        if let Some(bytes) = &self.unchanged {
            return bytes.clone();
        }
        let list = json!({
            "kind": format!("{}List", self.kind.singular()),
            "apiVersion": self.kind.api_version(),
            "metadata": {"resourceVersion": self.version()},
            "items": self.objects.values().collect::<Vec<_>>(),
        });
        list.to_string().into()
    }

    pub fn get(&self, namespace: &str, name: &str) -> Option<Value> {
        let mut object = self.objects.get(&(namespace.to_owned(), name.to_owned()))?.clone();
        self.name_kind(&mut object);
        Some(object)
    }

    pub fn step(&mut self) -> Option<Value> {
        let line = self.recorded.pop_front()?;
        let event: Value = serde_json::from_slice(&line).expect("a recorded event is JSON");
        self.apply(event["type"].as_str().unwrap_or_default(), event["object"].clone(), line);
        Some(event)
    }

    pub fn happen(&mut self, event: &str, mut object: Value) -> Value {
        self.name_kind(&mut object);
        if object["metadata"]["resourceVersion"].is_null() {
            self.given += 1;
            object["metadata"]["resourceVersion"] = json!((1_000_000 + self.given).to_string());
        }
        let line = line(event, &object);
        self.apply(event, object.clone(), line);
        object
    }

    fn apply(&mut self, event: &str, mut object: Value, line: Bytes) {
        let version = object["metadata"]["resourceVersion"].as_str().unwrap_or_default().to_owned();
        // Within a list, objects don't say their kind.
        if let Some(fields) = object.as_object_mut() {
            fields.remove("kind");
            fields.remove("apiVersion");
        }
        match event {
            "ADDED" | "MODIFIED" => drop(self.objects.insert(key(&object), object)),
            "DELETED" => drop(self.objects.remove(&key(&object))),
            _ => panic!("{event} is no event that changes a list: send it as bytes"),
        }
        self.unchanged = None;
        self.tell(&line);
        self.history.push((version, line));
    }

    /// A watch with these parameters: what has happened since its version, then what happens.
    pub fn watch(
        &mut self,
        query: &BTreeMap<String, String>,
    ) -> mpsc::UnboundedReceiver<std::io::Result<Bytes>> {
        let (watch, events) = mpsc::unbounded_channel();
        let send = |line: Bytes| drop(watch.send(Ok(line)));
        let from = query.get("resourceVersion").map_or("", String::as_str);
        let initial = query.get("sendInitialEvents").is_some_and(|value| value == "true");
        if initial || matches!(from, "" | "0") {
            for object in self.objects.values() {
                let mut object = object.clone();
                self.name_kind(&mut object);
                send(line("ADDED", &object));
            }
            if initial {
                send(self.bookmark_line(json!({"k8s.io/initial-events-end": "true"})));
            }
        } else if let Some(index) = self.position(from) {
            for (_, line) in &self.history[index..] {
                send(line.clone());
            }
        } else {
            send(self.expired_line());
            return events;
        }
        self.watches.push(watch);
        events
    }

    /// Where the history goes on for one who knows `version`.
    fn position(&self, version: &str) -> Option<usize> {
        let last = self.history.iter().rposition(|(v, _)| v == version).map(|index| index + 1);
        last.or((version == self.oldest).then_some(0))
    }

    fn version(&self) -> &str {
        self.history.last().map_or(&self.oldest, |(version, _)| version)
    }

    pub fn bookmark(&mut self) {
        let line = self.bookmark_line(json!({}));
        self.tell(&line);
    }

    fn bookmark_line(&self, annotations: Value) -> Bytes {
        let mut object = json!({"metadata": {"resourceVersion": self.version(), "annotations": annotations}});
        self.name_kind(&mut object);
        line("BOOKMARK", &object)
    }

    fn expired_line(&self) -> Bytes {
        let message = format!("too old resource version ({})", self.version());
        line("ERROR", &status_object(StatusCode::GONE, "Expired", &message))
    }

    pub fn compact(&mut self) {
        let expired = self.expired_line();
        self.tell(&expired);
        self.end();
        self.oldest = self.version().to_owned();
        self.history.clear();
    }

    /// Watches that are open hear nothing of what happens until they are released.
    pub fn hold(&mut self) {
        self.held.get_or_insert_default();
    }

    pub fn release(&mut self) {
        for line in self.held.take().unwrap_or_default() {
            self.tell(&line);
        }
    }

    /// Those of a namespace, or of none.
    pub fn names(&self, namespace: &str) -> Vec<String> {
        let keys = self.objects.keys().filter(|(of, _)| of == namespace);
        keys.map(|(_, name)| name.clone()).collect()
    }

    pub fn tell(&mut self, line: &Bytes) {
        if let Some(held) = &mut self.held {
            held.push(line.clone());
            return;
        }
        self.watches.retain(|watch| watch.send(Ok(line.clone())).is_ok());
    }

    pub fn end(&mut self) {
        self.watches.clear();
    }

    pub fn cut(&mut self) {
        for watch in self.watches.drain(..) {
            let _ = watch.send(Err(std::io::ErrorKind::ConnectionAborted.into()));
        }
    }

    pub fn watches(&mut self) -> usize {
        self.watches.retain(|watch| !watch.is_closed());
        self.watches.len()
    }

    fn name_kind(&self, object: &mut Value) {
        object["kind"] = self.kind.singular().into();
        object["apiVersion"] = self.kind.api_version().into();
    }
}

fn key(object: &Value) -> Key {
    let field = |name: &str| object["metadata"][name].as_str().unwrap_or_default().to_owned();
    (field("namespace"), field("name"))
}

fn line(event: &str, object: &Value) -> Bytes {
    format!("{}\n", json!({"type": event, "object": object})).into()
}
