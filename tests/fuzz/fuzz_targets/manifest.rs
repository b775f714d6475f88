//! A manifest is read or refused, and what was read is written such that it reads the same again.
#![no_main]

use berth_proto::api;
use berth_proto::manifest::{parse, to_json, to_yaml};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    let Ok(all) = parse(text, "fuzz.yaml") else { return };
    for one in all {
        let meta = api::ObjectMeta {
            name: one.name.clone(),
            namespace: one.namespace.clone(),
            labels: one.labels.clone().into_iter().collect(),
            ..Default::default()
        };
        let shown = api::Deployment {
            meta: Some(meta),
            spec: Some(one.spec.clone()),
            ..Default::default()
        };
        let yaml = to_yaml(&to_json(&shown));
        let again = parse(&yaml, "again.yaml").unwrap_or_else(|e| panic!("{e}\n{yaml}"));
        assert_eq!(again.len(), 1, "{yaml}");
        assert_eq!((&again[0].name, &again[0].labels), (&one.name, &one.labels), "{yaml}");
        assert_eq!(again[0].spec, one.spec, "{yaml}");
    }
});
