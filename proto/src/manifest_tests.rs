//! Claims about reading and writing manifests.

use super::*;
use crate::convert;

const GOOD: &str = "
apiVersion: berth/v1
kind: Deployment
metadata: {name: iris, labels: {team: vision}}
spec:
  model: iris@champion
  servedModel: iris-sklearn
  replicas: 3
  placement: {require: [\"arch=amd64\", \"zone in (eu, us)\"], spread: zone}
  resources: {cpu: 500m, memory: 256MiB}
  ports: [{name: http, container: 8080}]
  env: {LOG_LEVEL: info, N: 3}
  health: {http: {path: /v2/health/ready, port: http}, interval: 5s}
  restart: {policy: onFailure, maxBackoff: 5m}
  rollout: {maxSurge: 1, maxUnavailable: 0, readyFor: 10s, onFailure: pause}
  onHostLoss: {after: 5m, do: keep}
  stopGrace: 10s
";

#[test]
fn what_is_shown_as_yaml_is_read_as_the_same() {
    let written = parse(GOOD, "iris.yaml").unwrap().remove(0);
    let shown = api::Deployment {
        meta: Some(api::ObjectMeta {
            name: written.name.clone(),
            labels: written.labels.clone(),
            ..Default::default()
        }),
        spec: Some(written.spec.clone()),
        status: None,
    };
    let again = parse(&to_yaml(&to_json(&shown)), "iris.yaml").unwrap().remove(0);
    assert_eq!(again, written);
}

#[test]
fn an_empty_mapping_is_its_absence() {
    let text = GOOD.replace(
        "onHostLoss: {after: 5m, do: keep}",
        "onHostLoss: {}\n  privileges: {privileged: false, devices: []}\n  log: {}",
    );
    let spec = parse(&text, "x").unwrap().remove(0).spec;
    assert_eq!((spec.on_host_loss, spec.privileges, spec.log), (None, None, None));
}

#[test]
fn values_out_of_bounds_are_told_beside_unknown_names() {
    let text = GOOD
        .replace("stopGrace: 10s", "stopGrace: 10s\n  imag: x")
        .replace("container: 8080", "container: 99999")
        .replace("cpu: 500m, memory: 256MiB", "cpu: 5m, memory: 4MiB")
        .replace("readyFor: 10s", "readyFor: 10m")
        .replace("{team: vision}", "{team: a b}");
    let all = parse(&text, "f").unwrap_err().to_string();
    assert!(all.contains("spec.imag: is not known"), "{all}");
    assert!(all.contains("spec.ports[0].container"), "{all}");
    assert!(all.contains("spec.resources.cpu: must be at least 10m"), "{all}");
    assert!(all.contains("spec.resources.memory: must be at least 6MiB"), "{all}");
    assert!(all.contains("spec.rollout.progressDeadline: must be longer than readyFor"), "{all}");
    assert!(all.contains("metadata.labels.team: label value \"a b\""), "{all}");
}

fn any_json() -> impl proptest::strategy::Strategy<Value = Value> {
    use proptest::prelude::*;
    let text = prop_oneof![
        any::<String>(),
        "[ -~\\n\\t]{0,12}",
        Just("no".to_owned()),
        Just("1e3".to_owned()),
        Just("a\u{85}b\u{2028}c".to_owned()),
    ];
    let leaf = prop_oneof![
        any::<bool>().prop_map(Value::from),
        any::<i32>().prop_map(Value::from),
        text.clone().prop_map(Value::from),
    ];
    leaf.prop_recursive(3, 24, 4, move |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 1..4).prop_map(Value::from),
            prop::collection::btree_map(text.clone(), inner, 1..4)
                .prop_map(|map| Value::Object(map.into_iter().collect())),
        ]
    })
}

proptest::proptest! {
    /// Whatever a manifest holds is shown so that it reads back as the same.
    #[test]
    fn yaml_reads_back(value in any_json()) {
        let text = to_yaml(&serde_json::json!({ "top": value }));
        let back: Vec<Value> = serde_saphyr::from_multiple(&text)
            .map_err(|e| proptest::test_runner::TestCaseError::fail(format!("{e}: {text}")))?;
        proptest::prop_assert_eq!(&back[0]["top"], &value, "{}", text);
    }
}

#[test]
fn every_problem_of_every_document_is_listed_with_a_suggestion() {
    let text = "
apiVersion: berth/v1
kind: Deployment
metadata: {name: Iris}
spec: {modle: iris, replicas: -1, health: {htp: {}}, stopGrace: soon}
---
apiVersion: berth/v2
kind: Pod
metadata: {name: b}
spec: {image: x, ports: [{nam: http}]}
";
    let problems = parse(text, "f.yaml").unwrap_err();
    let all = problems.to_string();
    for part in [
        "f.yaml#1: metadata.name",
        "f.yaml#1: spec.modle: is not known (did you mean \"model\"?)",
        "f.yaml#1: spec.replicas",
        "f.yaml#1: spec.health.htp",
        "f.yaml#1: spec.stopGrace",
        "f.yaml#2: apiVersion",
        "f.yaml#2: kind",
        "f.yaml#2: spec.ports[0].nam",
    ] {
        assert!(all.contains(part), "{part} is not in:\n{all}");
    }
}

#[test]
fn the_examples_are_manifests() {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/examples");
    let mut seen = 0;
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|e| e == "yaml") {
            let text = std::fs::read_to_string(&path).unwrap();
            if let Err(problems) = parse(&text, &path.display().to_string()) {
                panic!("{problems}");
            }
            seen += 1;
        }
    }
    assert!(seen >= 3);
}

/// The manifest of the contract, letter by letter.
const CONTRACT: &str = "
apiVersion: berth/v1
kind: Deployment
metadata:
  name: iris
  namespace: default
  labels: {team: vision}
spec:
  model: iris@champion            # or iris:1.2, or  image: 10.0.0.5:7444/iris-app:1.2
  runtime: onnx                   # default: from the model's format
  replicas: 3                     # or everyHost: true; absent keeps the present number, so `scale` and `apply` do not fight
  placement:
    require: [\"arch=amd64\", \"zone in (eu, us)\", \"gpu\"]
    spread: zone
  resources: {cpu: 500m, memory: 256MiB}
  ports: [{name: http, container: 8080}]        # add hostPort and bind to publish
  env: {LOG_LEVEL: info}
  mounts: []
  health: {http: {path: /v2/health/ready, port: http}, interval: 5s, timeout: 2s, failures: 3, startup: 60s}
  restart: {policy: always, minBackoff: 1s, maxBackoff: 5m}
  rollout: {maxSurge: 1, maxUnavailable: 0, readyFor: 10s, progressDeadline: 10m, onFailure: rollback}
  onHostLoss: {after: 5m, do: replace}
  stopGrace: 10s
";

#[test]
fn the_contracts_own_manifest_is_read_as_it_says() {
    let written = parse(CONTRACT, "iris.yaml").unwrap().remove(0);
    assert_eq!((written.name.as_str(), written.namespace.as_str()), ("iris", "default"));
    assert_eq!(written.labels["team"], "vision");
    let spec = convert::deployment_spec_from_api(&written.spec).unwrap();
    // What it spells out besides the deployment's own are the defaults: leaving it away is the same.
    let short = "
apiVersion: berth/v1
kind: Deployment
metadata: {name: iris, labels: {team: vision}}
spec:
  model: iris@champion
  runtime: onnx
  replicas: 3
  placement: {require: [\"arch=amd64\", \"zone in (eu, us)\", \"gpu\"], spread: zone}
  resources: {cpu: 500m, memory: 256MiB}
  ports: [{name: http, container: 8080}]
  env: {LOG_LEVEL: info}
  health: {http: {path: /v2/health/ready, port: http}}
";
    let short = parse(short, "iris.yaml").unwrap().remove(0);
    assert_eq!(convert::deployment_spec_from_api(&short.spec).unwrap(), spec);
    // A number that is not written keeps the present one.
    let keeps = parse(&CONTRACT.replace("  replicas: 3", "  #"), "x").unwrap().remove(0).spec;
    assert_eq!((keeps.replicas, keeps.every_host), (None, false));
}

#[test]
fn a_slip_is_mended_and_another_name_is_not() {
    let known = ["iris", "digits", "speech"];
    assert_eq!(nearest("irsi", known), Some("iris"));
    assert_eq!(nearest("digit", known), Some("digits"));
    assert_eq!(nearest("x", known), None);
    assert_eq!(nearest("vision", known), None);
}

#[test]
fn the_example_of_every_option_is_taken_and_a_number_in_env_becomes_text() {
    let text = include_str!("../../deploy/examples/all-options.yaml");
    let written = parse(text, "all-options.yaml").unwrap();
    assert_eq!(written[0].spec.env["BERTH_MAX_BATCH"], "32");
}

#[test]
fn what_is_no_yaml_is_one_problem_in_one_line_with_its_place() {
    let torn = "apiVersion: berth/v1\nkind: Deployment\nmetadata:\n  name: [a\nspec: {image: x}\n";
    for text in [torn, "a: b: c\n", "a: 1\na: 2\n", "a: *nothing\n"] {
        let found = parse(text, "iris.yaml").unwrap_err();
        let [problem] = found.0.as_slice() else { panic!("{found}") };
        let place = problem.path.strip_prefix("iris.yaml:").unwrap_or_else(|| panic!("{found}"));
        assert!(place.split(':').all(|number| number.parse::<u32>().is_ok()), "{found}");
        assert_eq!(found.to_string().lines().count(), 1, "{found}");
        assert!(!found.to_string().contains("<input>"), "{found}");
    }
}
