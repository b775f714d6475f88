//! The form people write: YAML or JSON documents of `kind: Deployment`.
//!
//! Every problem of every document is listed at once, with its path and, for a name that is not
//! known, the nearest one that is. What is shown as YAML can be applied again and changes nothing.

use crate::api;
use crate::convert::{Problem, Problems, duration, duration_ms};
use crate::quantity::{
    format_bytes, format_cpu, format_duration_ms, parse_bytes, parse_cpu, parse_duration_ms,
};
use serde_json::{Map, Value, json};
use serde_saphyr::MessageFormatter as _;
use std::fmt::Write as _;

/// A manifest of more bytes is refused before it is read.
pub const MAX_BYTES: usize = 1024 * 1024;
/// Documents in one text.
pub const MAX_DOCUMENTS: usize = 500;

/// One deployment as written.
#[derive(Debug, Clone, PartialEq)]
pub struct Written {
    /// Name.
    pub name: String,
    /// Namespace; empty: not written.
    pub namespace: String,
    /// Labels.
    pub labels: std::collections::BTreeMap<String, String>,
    /// What is wanted.
    pub spec: api::DeploymentSpec,
    /// Where it stands, e.g. `iris.yaml#2`.
    pub origin: String,
}

/// The nearest of some names, when it is near enough to be meant.
#[must_use]
pub fn nearest<'a>(name: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let enough = name.chars().count().div_ceil(3).clamp(1, 3);
    known
        .into_iter()
        .map(|other| (strsim::damerau_levenshtein(name, other), other))
        .min()
        .filter(|(distance, _)| *distance <= enough)
        .map(|(_, other)| other)
}

struct Object<'a> {
    map: &'a Map<String, Value>,
    path: String,
}

impl<'a> Object<'a> {
    fn open(value: &'a Value, path: &str, known: &[&str], p: &mut Problems) -> Option<Self> {
        let Some(map) = value.as_object() else {
            p.add(path, "must be a mapping");
            return None;
        };
        for key in map.keys().filter(|key| !known.contains(&key.as_str())) {
            let hint = match nearest(key, known.iter().copied()) {
                Some(name) => format!("did you mean \"{name}\"?"),
                None => format!("known are: {}", known.join(", ")),
            };
            p.add_hint(join(path, key), "is not known", hint);
        }
        Some(Self { map, path: path.to_owned() })
    }

    fn get(&self, key: &str) -> Option<&'a Value> {
        self.map.get(key).filter(|v| !v.is_null())
    }

    fn at(&self, key: &str) -> String {
        join(&self.path, key)
    }

    fn text(&self, key: &str, p: &mut Problems) -> String {
        match self.get(key) {
            None => String::new(),
            Some(Value::String(text)) => text.clone(),
            Some(Value::Number(n)) => n.to_string(),
            Some(Value::Bool(b)) => b.to_string(),
            Some(Value::Null | Value::Array(_) | Value::Object(_)) => {
                p.add(self.at(key), "must be text");
                String::new()
            }
        }
    }

    fn flag(&self, key: &str, p: &mut Problems) -> bool {
        match self.get(key) {
            None => false,
            Some(Value::Bool(b)) => *b,
            Some(_) => {
                p.add(self.at(key), "must be true or false");
                false
            }
        }
    }

    fn number(&self, key: &str, p: &mut Problems) -> Option<u32> {
        let value = self.get(key)?;
        let number = value.as_u64().and_then(|n| u32::try_from(n).ok());
        if number.is_none() {
            p.add(self.at(key), "must be a whole number, 0 or greater");
        }
        number
    }

    fn quantity<E: std::fmt::Display>(
        &self,
        key: &str,
        parse: impl Fn(&str) -> Result<u64, E>,
        p: &mut Problems,
    ) -> Option<u64> {
        self.get(key)?;
        let text = self.text(key, p);
        p.take(self.at(key), parse(&text))
    }

    fn time(&self, key: &str, p: &mut Problems) -> Option<prost_types::Duration> {
        self.quantity(key, parse_duration_ms, p).map(duration)
    }

    fn list(&self, key: &str, p: &mut Problems) -> Vec<(String, &'a Value)> {
        match self.get(key) {
            None => Vec::new(),
            Some(Value::Array(items)) => items
                .iter()
                .enumerate()
                .map(|(i, item)| (format!("{}[{i}]", self.at(key)), item))
                .collect(),
            Some(_) => {
                p.add(self.at(key), "must be a list");
                Vec::new()
            }
        }
    }

    fn words(&self, key: &str, p: &mut Problems) -> Vec<String> {
        let mut words = Vec::new();
        for (path, item) in self.list(key, p) {
            match item {
                Value::String(text) => words.push(text.clone()),
                Value::Number(n) => words.push(n.to_string()),
                Value::Null | Value::Bool(_) | Value::Array(_) | Value::Object(_) => {
                    p.add(path, "must be text");
                }
            }
        }
        words
    }

    fn map(&self, key: &str, p: &mut Problems) -> std::collections::BTreeMap<String, String> {
        let mut out = std::collections::BTreeMap::new();
        let Some(value) = self.get(key) else { return out };
        let Some(map) = value.as_object() else {
            p.add(self.at(key), "must be a mapping of names to text");
            return out;
        };
        for (name, value) in map {
            match value {
                Value::String(text) => {
                    out.insert(name.clone(), text.clone());
                }
                Value::Number(n) => {
                    out.insert(name.clone(), n.to_string());
                }
                Value::Bool(b) => {
                    out.insert(name.clone(), b.to_string());
                }
                Value::Null | Value::Array(_) | Value::Object(_) => {
                    p.add(join(&self.at(key), name), "must be text");
                }
            }
        }
        out
    }

    fn object(&self, key: &str, known: &[&str], p: &mut Problems) -> Option<Object<'a>> {
        Object::open(self.get(key)?, &self.at(key), known, p)
    }

    fn choice(&self, key: &str, choices: &[(&str, i32)], p: &mut Problems) -> i32 {
        if self.get(key).is_none() {
            return 0;
        }
        let text = self.text(key, p);
        match choices.iter().find(|(name, _)| *name == text) {
            Some((_, value)) => *value,
            None => {
                let names: Vec<&str> = choices.iter().map(|(name, _)| *name).collect();
                p.add(self.at(key), format!("must be one of {}", names.join(", ")));
                0
            }
        }
    }
}

fn join(path: &str, key: &str) -> String {
    if path.is_empty() { key.to_owned() } else { format!("{path}.{key}") }
}

const RESTART: [(&str, i32); 3] = [("always", 1), ("onFailure", 2), ("never", 3)];
const ON_FAILURE: [(&str, i32); 2] = [("rollback", 1), ("pause", 2)];
const ON_LOSS: [(&str, i32); 2] = [("replace", 1), ("keep", 2)];

/// What is wrong with a text that is no YAML: one line, with the place as compilers write it.
fn unread(origin: &str, error: &serde_saphyr::Error) -> Problem {
    let place = match error.location() {
        Some(at) if at.line() > 0 => format!("{origin}:{}:{}", at.line(), at.column()),
        Some(_) | None => origin.to_owned(),
    };
    let words = serde_saphyr::DefaultMessageFormatter.format_message(error.without_snippet());
    let words = words.split_whitespace().collect::<Vec<_>>().join(" ");
    Problem { path: place, message: format!("cannot be read: {words}"), hint: None }
}

/// Reads all documents of a text.
///
/// # Errors
/// Everything that is wrong with all of them.
pub fn parse(text: &str, origin: &str) -> Result<Vec<Written>, Problems> {
    let mut p = Problems::default();
    if text.len() > MAX_BYTES {
        p.add(origin, format!("is larger than {MAX_BYTES} bytes"));
        return Err(p);
    }
    let documents: Vec<Value> = match serde_saphyr::from_multiple::<Value>(text) {
        Ok(documents) => documents.into_iter().filter(|d| !d.is_null()).collect(),
        Err(error) => {
            p.0.push(unread(origin, &error));
            return Err(p);
        }
    };
    if documents.is_empty() {
        p.add(origin, "holds no deployment");
    }
    if documents.len() > MAX_DOCUMENTS {
        p.add(origin, format!("holds more than {MAX_DOCUMENTS} documents"));
        return Err(p);
    }
    let many = documents.len() > 1;
    let mut out = Vec::new();
    for (i, document) in documents.iter().enumerate() {
        let origin = if many { format!("{origin}#{}", i + 1) } else { origin.to_owned() };
        let mut own = Problems::default();
        if let Some(written) = deployment(document, &origin, &mut own) {
            out.push(written);
        }
        for mut problem in own.0 {
            problem.path = format!("{origin}: {}", problem.path);
            p.0.push(problem);
        }
    }
    p.finish(out)
}

fn deployment(value: &Value, origin: &str, p: &mut Problems) -> Option<Written> {
    let top = Object::open(value, "", &["apiVersion", "kind", "metadata", "spec", "status"], p)?;
    if top.text("apiVersion", p) != "berth/v1" {
        p.add("apiVersion", "must be berth/v1");
    }
    if top.text("kind", p) != "Deployment" {
        p.add("kind", "must be Deployment");
    }
    let Some(meta) = top.object("metadata", &["name", "namespace", "labels"], p) else {
        p.add("metadata.name", "is missing");
        return None;
    };
    let name = meta.text("name", p);
    if let Err(error) = name.parse::<crate::ids::Name>() {
        p.add("metadata.name", error.to_string());
    }
    let namespace = meta.text("namespace", p);
    let labels = meta.map("labels", p);
    crate::selector::check_labels(&labels, "metadata.labels", p);
    let Some(spec) = top.get("spec") else {
        p.add("spec", "is missing");
        return None;
    };
    let spec = read_spec(spec, p)?;
    if let Err(problems) = crate::convert::deployment_spec_to_write(&spec) {
        // What could not be read is not told a second time as missing or out of bounds.
        let told: std::collections::BTreeSet<String> =
            p.0.iter().map(|problem| problem.path.clone()).collect();
        p.0.extend(problems.0.into_iter().filter(|problem| !told.contains(&problem.path)));
    }
    Some(Written { name, namespace, labels, spec, origin: origin.to_owned() })
}

const SPEC: [&str; 22] = [
    "model",
    "image",
    "runtime",
    "servedModel",
    "replicas",
    "everyHost",
    "placement",
    "resources",
    "ports",
    "env",
    "mounts",
    "health",
    "restart",
    "rollout",
    "onHostLoss",
    "stopGrace",
    "command",
    "args",
    "user",
    "readOnlyRoot",
    "log",
    "privileges",
];

fn read_spec(value: &Value, p: &mut Problems) -> Option<api::DeploymentSpec> {
    let s = Object::open(value, "spec", &SPEC, p)?;
    let (model, image) = (s.text("model", p), s.text("image", p));
    let source = match (model.is_empty(), image.is_empty()) {
        (false, false) => {
            p.add("spec", "names both a model and an image; one of them is served");
            None
        }
        (false, true) => Some(api::deployment_spec::Source::Model(model)),
        (true, false) => Some(api::deployment_spec::Source::Image(image)),
        (true, true) => None,
    };
    let resources =
        s.object("resources", &["cpu", "memory", "gpuMemory"], p).map(|r| api::Resources {
            cpu_millis: r.quantity("cpu", parse_cpu, p).unwrap_or(0),
            memory_bytes: r.quantity("memory", parse_bytes, p).unwrap_or(0),
            gpu_memory_bytes: r.quantity("gpuMemory", parse_bytes, p).unwrap_or(0),
        });
    let mut ports = Vec::new();
    for (path, item) in s.list("ports", p) {
        if let Some(o) = Object::open(item, &path, &["name", "container", "hostPort", "bind"], p) {
            ports.push(api::Port {
                name: o.text("name", p),
                container: o.number("container", p).unwrap_or(0),
                host_port: o.number("hostPort", p).unwrap_or(0),
                bind: o.text("bind", p),
            });
        }
    }
    let mut mounts = Vec::new();
    for (path, item) in s.list("mounts", p) {
        if let Some(o) = Object::open(item, &path, &["source", "target", "writable"], p) {
            mounts.push(api::Mount {
                source: o.text("source", p),
                target: o.text("target", p),
                writable: o.flag("writable", p),
            });
        }
    }
    let mut spec = api::DeploymentSpec {
        source,
        runtime: s.text("runtime", p),
        served_model: s.text("servedModel", p),
        replicas: s.number("replicas", p),
        every_host: s.flag("everyHost", p),
        placement: s.object("placement", &["require", "spread"], p).map(|o| api::Placement {
            require: o.words("require", p),
            spread: o.text("spread", p),
        }),
        resources,
        ports,
        env: s.map("env", p),
        mounts,
        health: health(&s, p),
        restart: s.object("restart", &["policy", "minBackoff", "maxBackoff"], p).map(|o| {
            api::RestartPolicy {
                condition: o.choice("policy", &RESTART, p),
                min_backoff: o.time("minBackoff", p),
                max_backoff: o.time("maxBackoff", p),
            }
        }),
        rollout: s
            .object(
                "rollout",
                &["maxSurge", "maxUnavailable", "readyFor", "progressDeadline", "onFailure"],
                p,
            )
            .map(|o| api::RolloutPolicy {
                max_surge: o.number("maxSurge", p),
                max_unavailable: o.number("maxUnavailable", p),
                ready_for: o.time("readyFor", p),
                progress_deadline: o.time("progressDeadline", p),
                on_failure: o.choice("onFailure", &ON_FAILURE, p),
            }),
        on_host_loss: s.object("onHostLoss", &["after", "do"], p).map(|o| api::HostLossPolicy {
            after: o.time("after", p),
            action: o.choice("do", &ON_LOSS, p),
        }),
        stop_grace: s.time("stopGrace", p),
        command: s.words("command", p),
        args: s.words("args", p),
        user: s.text("user", p),
        read_only_root: s.flag("readOnlyRoot", p),
        log: s.object("log", &["maxSize", "maxFiles"], p).map(|o| api::LogOptions {
            max_size_bytes: o.quantity("maxSize", parse_bytes, p).unwrap_or(0),
            max_files: o.number("maxFiles", p).unwrap_or(0),
        }),
        privileges: s
            .object("privileges", &["privileged", "hostNetwork", "addCapabilities", "devices"], p)
            .map(|o| api::Privileges {
                privileged: o.flag("privileged", p),
                host_network: o.flag("hostNetwork", p),
                add_capabilities: o.words("addCapabilities", p),
                devices: o.words("devices", p),
            }),
    };
    // An empty mapping says what its absence says; so that what is shown and applied again is the same.
    drop_empty(&mut spec.placement);
    drop_empty(&mut spec.resources);
    drop_empty(&mut spec.restart);
    drop_empty(&mut spec.rollout);
    drop_empty(&mut spec.on_host_loss);
    drop_empty(&mut spec.log);
    drop_empty(&mut spec.privileges);
    Some(spec)
}

fn drop_empty<T: Default + PartialEq>(value: &mut Option<T>) {
    if value.as_ref().is_some_and(|v| *v == T::default()) {
        *value = None;
    }
}

fn health(s: &Object<'_>, p: &mut Problems) -> Option<api::HealthCheck> {
    use api::health_check::Check;
    let kinds = ["http", "tcp", "grpc", "exec"];
    let mut known = kinds.to_vec();
    known.extend(["interval", "timeout", "failures", "startup", "restartAfter"]);
    let o = s.object("health", &known, p)?;
    if kinds.iter().filter(|kind| o.get(kind).is_some()).count() > 1 {
        p.add("spec.health", "has more than one of http, tcp, grpc and exec");
    }
    let check = if let Some(h) = o.object("http", &["path", "port"], p) {
        Some(Check::Http(api::HttpCheck { path: h.text("path", p), port: h.text("port", p) }))
    } else if let Some(t) = o.object("tcp", &["port"], p) {
        Some(Check::Tcp(api::TcpCheck { port: t.text("port", p) }))
    } else if let Some(g) = o.object("grpc", &["port", "service"], p) {
        Some(Check::Grpc(api::GrpcCheck { port: g.text("port", p), service: g.text("service", p) }))
    } else {
        o.object("exec", &["command"], p)
            .map(|e| Check::Exec(api::ExecCheck { command: e.words("command", p) }))
    };
    Some(api::HealthCheck {
        check,
        interval: o.time("interval", p),
        timeout: o.time("timeout", p),
        failures: o.number("failures", p).unwrap_or(0),
        startup: o.time("startup", p),
        restart_after: o.time("restartAfter", p),
    })
}

fn time_text(value: Option<&prost_types::Duration>) -> Option<Value> {
    Some(Value::String(format_duration_ms(duration_ms(value?)?)))
}

fn set(map: &mut Map<String, Value>, key: &str, value: Option<Value>) {
    let empty = match &value {
        None => true,
        Some(Value::String(text)) => text.is_empty(),
        Some(Value::Array(items)) => items.is_empty(),
        Some(Value::Object(fields)) => fields.is_empty(),
        Some(Value::Bool(flag)) => !flag,
        Some(Value::Null) => true,
        Some(Value::Number(_)) => false,
    };
    if let (Some(value), false) = (value, empty) {
        map.insert(key.to_owned(), value);
    }
}

fn name_of(choices: &[(&str, i32)], value: i32) -> Option<Value> {
    choices.iter().find(|(_, v)| *v == value).map(|(name, _)| json!(name))
}

/// A spec as people write it: only what was written.
#[must_use]
pub fn spec_to_json(spec: &api::DeploymentSpec) -> Value {
    let mut out = Map::new();
    match &spec.source {
        Some(api::deployment_spec::Source::Model(text)) => {
            set(&mut out, "model", Some(json!(text)))
        }
        Some(api::deployment_spec::Source::Image(text)) => {
            set(&mut out, "image", Some(json!(text)))
        }
        None => {}
    }
    let o = &mut out;
    set(o, "runtime", Some(json!(spec.runtime)));
    set(o, "servedModel", Some(json!(spec.served_model)));
    set(o, "replicas", spec.replicas.map(|n| json!(n)));
    set(o, "everyHost", Some(json!(spec.every_host)));
    if let Some(placement) = &spec.placement {
        let mut map = Map::new();
        set(&mut map, "require", Some(json!(placement.require)));
        set(&mut map, "spread", Some(json!(placement.spread)));
        set(o, "placement", Some(Value::Object(map)));
    }
    if let Some(r) = &spec.resources {
        let mut map = Map::new();
        let some = |n: u64, text: String| (n > 0).then(|| json!(text));
        set(&mut map, "cpu", some(r.cpu_millis, format_cpu(r.cpu_millis)));
        set(&mut map, "memory", some(r.memory_bytes, format_bytes(r.memory_bytes)));
        set(&mut map, "gpuMemory", some(r.gpu_memory_bytes, format_bytes(r.gpu_memory_bytes)));
        set(o, "resources", Some(Value::Object(map)));
    }
    let ports = spec.ports.iter().map(|port| {
        let mut map = Map::new();
        set(&mut map, "name", Some(json!(port.name)));
        set(&mut map, "container", Some(json!(port.container)));
        set(&mut map, "hostPort", (port.host_port > 0).then(|| json!(port.host_port)));
        set(&mut map, "bind", Some(json!(port.bind)));
        Value::Object(map)
    });
    set(o, "ports", Some(Value::Array(ports.collect())));
    set(o, "env", Some(json!(spec.env)));
    let mounts = spec.mounts.iter().map(|m| {
        let mut map = Map::new();
        set(&mut map, "source", Some(json!(m.source)));
        set(&mut map, "target", Some(json!(m.target)));
        set(&mut map, "writable", Some(json!(m.writable)));
        Value::Object(map)
    });
    set(o, "mounts", Some(Value::Array(mounts.collect())));
    set(o, "health", spec.health.as_ref().map(health_to_json));
    if let Some(r) = &spec.restart {
        let mut map = Map::new();
        set(&mut map, "policy", name_of(&RESTART, r.condition));
        set(&mut map, "minBackoff", time_text(r.min_backoff.as_ref()));
        set(&mut map, "maxBackoff", time_text(r.max_backoff.as_ref()));
        set(o, "restart", Some(Value::Object(map)));
    }
    if let Some(r) = &spec.rollout {
        let mut map = Map::new();
        set(&mut map, "maxSurge", r.max_surge.map(|n| json!(n)));
        set(&mut map, "maxUnavailable", r.max_unavailable.map(|n| json!(n)));
        set(&mut map, "readyFor", time_text(r.ready_for.as_ref()));
        set(&mut map, "progressDeadline", time_text(r.progress_deadline.as_ref()));
        set(&mut map, "onFailure", name_of(&ON_FAILURE, r.on_failure));
        set(o, "rollout", Some(Value::Object(map)));
    }
    if let Some(l) = &spec.on_host_loss {
        let mut map = Map::new();
        set(&mut map, "after", time_text(l.after.as_ref()));
        set(&mut map, "do", name_of(&ON_LOSS, l.action));
        set(o, "onHostLoss", Some(Value::Object(map)));
    }
    set(o, "stopGrace", time_text(spec.stop_grace.as_ref()));
    set(o, "command", Some(json!(spec.command)));
    set(o, "args", Some(json!(spec.args)));
    set(o, "user", Some(json!(spec.user)));
    set(o, "readOnlyRoot", Some(json!(spec.read_only_root)));
    if let Some(l) = &spec.log {
        let mut map = Map::new();
        let size = (l.max_size_bytes > 0).then(|| json!(format_bytes(l.max_size_bytes)));
        set(&mut map, "maxSize", size);
        set(&mut map, "maxFiles", (l.max_files > 0).then(|| json!(l.max_files)));
        set(o, "log", Some(Value::Object(map)));
    }
    if let Some(x) = &spec.privileges {
        let mut map = Map::new();
        set(&mut map, "privileged", Some(json!(x.privileged)));
        set(&mut map, "hostNetwork", Some(json!(x.host_network)));
        set(&mut map, "addCapabilities", Some(json!(x.add_capabilities)));
        set(&mut map, "devices", Some(json!(x.devices)));
        set(o, "privileges", Some(Value::Object(map)));
    }
    Value::Object(out)
}

fn health_to_json(health: &api::HealthCheck) -> Value {
    use api::health_check::Check;
    let mut map = Map::new();
    match &health.check {
        Some(Check::Http(c)) => {
            set(&mut map, "http", Some(json!({"path": c.path, "port": c.port})))
        }
        Some(Check::Tcp(c)) => set(&mut map, "tcp", Some(json!({"port": c.port}))),
        Some(Check::Grpc(c)) => {
            let mut grpc = Map::new();
            set(&mut grpc, "port", Some(json!(c.port)));
            set(&mut grpc, "service", Some(json!(c.service)));
            set(&mut map, "grpc", Some(Value::Object(grpc)));
        }
        Some(Check::Exec(c)) => set(&mut map, "exec", Some(json!({"command": c.command}))),
        None => {}
    }
    set(&mut map, "interval", time_text(health.interval.as_ref()));
    set(&mut map, "timeout", time_text(health.timeout.as_ref()));
    set(&mut map, "failures", (health.failures > 0).then(|| json!(health.failures)));
    set(&mut map, "startup", time_text(health.startup.as_ref()));
    set(&mut map, "restartAfter", time_text(health.restart_after.as_ref()));
    Value::Object(map)
}

/// A deployment as a manifest.
#[must_use]
pub fn to_json(deployment: &api::Deployment) -> Value {
    let meta = deployment.meta.clone().unwrap_or_default();
    let mut metadata = Map::new();
    set(&mut metadata, "name", Some(json!(meta.name)));
    set(&mut metadata, "namespace", Some(json!(meta.namespace)));
    set(&mut metadata, "labels", Some(json!(meta.labels)));
    json!({
        "apiVersion": "berth/v1",
        "kind": "Deployment",
        "metadata": metadata,
        "spec": deployment.spec.as_ref().map(spec_to_json),
    })
}

/// Any JSON as YAML that reads back as the same: block style, text quoted where it must be.
#[must_use]
pub fn to_yaml(value: &Value) -> String {
    let mut out = String::new();
    yaml(value, 0, &mut out);
    out
}

fn yaml(value: &Value, depth: usize, out: &mut String) {
    let pad = "  ".repeat(depth);
    match value {
        Value::Object(map) if !map.is_empty() => {
            for (key, value) in map {
                let _ = write!(out, "{pad}{}:", scalar(&Value::String(key.clone())));
                nested(value, depth, out);
            }
        }
        Value::Array(items) if !items.is_empty() => {
            for item in items {
                let _ = write!(out, "{pad}-");
                nested(item, depth, out);
            }
        }
        Value::Null
        | Value::Bool(_)
        | Value::Number(_)
        | Value::String(_)
        | Value::Array(_)
        | Value::Object(_) => {
            let _ = writeln!(out, "{pad}{}", scalar(value));
        }
    }
}

fn nested(value: &Value, depth: usize, out: &mut String) {
    let block = match value {
        Value::Object(map) => !map.is_empty(),
        Value::Array(items) => !items.is_empty(),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => false,
    };
    if block {
        out.push('\n');
        yaml(value, depth + 1, out);
    } else {
        let _ = writeln!(out, " {}", scalar(value));
    }
}

fn scalar(value: &Value) -> String {
    match value {
        Value::String(text) => {
            let plain = !text.is_empty()
                && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_./@".contains(&b))
                && text.starts_with(|c: char| c.is_ascii_alphabetic())
                && !["true", "false", "null", "yes", "no", "on", "off", "y", "n"]
                    .contains(&text.to_ascii_lowercase().as_str());
            // JSON's quoting is YAML's double quoting.
            if plain { text.clone() } else { value.to_string() }
        }
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::Array(_) | Value::Object(_) => {
            value.to_string()
        }
    }
}

#[cfg(test)]
#[path = "manifest_tests.rs"]
mod tests;
