//! Claims about which hosts a plan chooses, and what it says of the others.

use super::tests::{edit_host, one_on};
use super::*;
use crate::miniature::World;
use berth_proto::api;

#[test]
fn each_label_operator_chooses_the_hosts_it_says() {
    // h0 and h2 are in zone a, h1 and h3 in zone b; h3 has a GPU.
    for (require, expected) in [
        ("zone=b", "h1"),
        ("zone!=a", "h1"),
        ("zone in (b, c)", "h1"),
        ("zone notin (a, c)", "h1"),
        ("gpu", "h3"),
        ("!zone", ""),
        ("host=host-2", "h2"),
        ("arch=amd64", "h0"),
    ] {
        let mut w = World::new(4);
        edit_host(&mut w, 3, |r| {
            r.meta.as_mut().unwrap().labels.insert("gpu".into(), String::new());
        });
        let (hosts, pending) = one_on(&mut w, |spec| {
            spec.placement =
                Some(api::Placement { require: vec![require.into()], spread: String::new() });
        });
        if expected.is_empty() {
            assert_eq!(pending, [format!("no host fits: 4 without label {require}")]);
        } else {
            assert_eq!(hosts, [expected], "{require}");
        }
    }
}

#[test]
fn a_rare_label_is_found_by_the_index_and_the_others_are_counted_all_the_same() {
    let mut w = World::new(40);
    edit_host(&mut w, 17, |r| {
        r.meta.as_mut().unwrap().labels.insert("gpu".into(), "big".into());
    });
    let gpu = |spec: &mut api::DeploymentSpec| {
        spec.placement =
            Some(api::Placement { require: vec!["gpu=big".into()], spread: String::new() });
    };
    assert_eq!(one_on(&mut w, gpu).0, ["h17"]);
    edit_host(&mut w, 17, |r| {
        r.spec = Some(api::HostSpec { cordoned: true, draining: false });
    });
    let mut other = World::spec("two");
    other.replicas = Some(1);
    gpu(&mut other);
    w.apply_as("other", other);
    let uid = w.view.deployments().find(|d| d.name.as_str() == "other").unwrap().uid.clone();
    let plan = plan(&w.view, &w.live, &uid, w.now, &mut || "x".parse().unwrap());
    assert_eq!(
        plan.report.pending.into_keys().collect::<Vec<_>>(),
        ["no host fits: 39 without label gpu=big, 1 cordoned"]
    );
}

#[test]
fn a_host_of_another_platform_or_short_of_cpu_or_with_the_port_taken_is_passed_over() {
    let mut w = World::new(4);
    edit_host(&mut w, 0, |r| r.facts.as_mut().unwrap().arch = "arm64".into());
    edit_host(&mut w, 1, |r| {
        r.facts.as_mut().unwrap().capacity.as_mut().unwrap().cpu_millis = 100;
    });
    edit_host(&mut w, 2, |r| r.facts.as_mut().unwrap().used_ports = vec![8080]);
    let wants = |spec: &mut api::DeploymentSpec| {
        spec.resources =
            Some(api::Resources { cpu_millis: 500, memory_bytes: 0, gpu_memory_bytes: 0 });
        spec.ports = vec![api::Port {
            name: "http".into(),
            container: 80,
            host_port: 8080,
            bind: "127.0.0.1".into(),
        }];
    };
    assert_eq!(one_on(&mut w, wants).0, ["h3"]);
    let mut two = World::spec("one");
    two.replicas = Some(2);
    wants(&mut two);
    w.apply(two);
    let words: Vec<String> = w.plan().report.pending.into_keys().collect();
    assert_eq!(
        words,
        ["no host fits: 2 with host port 8080 taken, \
          1 of platform linux/arm64, for which there is no image, 1 short of cpu"]
    );
}

#[test]
fn a_host_whose_policy_forbids_it_is_passed_over_and_says_so() {
    let mut w = World::new(1);
    let (hosts, pending) = one_on(&mut w, |spec| {
        spec.privileges = Some(api::Privileges { privileged: true, ..Default::default() });
    });
    assert_eq!(hosts, Vec::<String>::new());
    assert_eq!(pending, ["no host fits: 1 whose policy forbids privileged containers"]);
}

#[test]
fn a_host_is_refused_for_each_thing_that_its_policy_does_not_list() {
    use berth_proto::values::{DeploymentSpec, HostPolicy};
    type Case =
        (fn(&mut api::DeploymentSpec), &'static str, fn(&mut HostPolicy), fn(&mut HostPolicy));
    fn privileges(spec: &mut api::DeploymentSpec) -> &mut api::Privileges {
        spec.privileges.get_or_insert_default()
    }
    fn mount(spec: &mut api::DeploymentSpec, source: &str) {
        let (source, target) = (source.into(), "/data".into());
        spec.mounts.push(api::Mount { source, target, writable: false });
    }
    fn publish(spec: &mut api::DeploymentSpec, bind: &str) {
        let (name, bind) = ("http".into(), bind.into());
        spec.ports.push(api::Port { name, container: 80, host_port: 8080, bind });
    }
    // What is wanted, what the refusal names, a policy that comes near, and one that allows it.
    let cases: [Case; 10] = [
        (
            |spec| privileges(spec).privileged = true,
            "privileged containers",
            |policy| policy.allow_host_network = true,
            |policy| policy.allow_privileged = true,
        ),
        (
            |spec| privileges(spec).host_network = true,
            "the host's network",
            |policy| policy.allow_privileged = true,
            |policy| policy.allow_host_network = true,
        ),
        (
            |spec| privileges(spec).add_capabilities = vec!["NET_ADMIN".into(), "SYS_TIME".into()],
            "capability SYS_TIME",
            |policy| policy.allow_capabilities = ["NET_ADMIN".into()].into(),
            |policy| policy.allow_capabilities = ["NET_ADMIN".into(), "SYS_TIME".into()].into(),
        ),
        (
            |spec| privileges(spec).devices = vec!["/dev/nvidia0".into()],
            "device /dev/nvidia0",
            |policy| policy.allow_devices = ["/dev/nvidia".into(), "/dev/nvidia1".into()].into(),
            |policy| policy.allow_devices = ["/dev/nvidia0".into()].into(),
        ),
        (
            |spec| mount(spec, "/srv/models"),
            "mounting /srv/models",
            |policy| policy.mount_folders = vec!["/srv/models/in".into()],
            |policy| policy.mount_folders = vec!["/srv/models/".into()],
        ),
        (
            |spec| mount(spec, "/srv/models2/a"),
            "mounting /srv/models2/a",
            |policy| policy.mount_folders = vec!["/srv/models".into()],
            |policy| policy.mount_folders = vec!["/srv/models".into(), "/srv/models2".into()],
        ),
        (
            |spec| mount(spec, "/srv/models/a/b"),
            "mounting /srv/models/a/b",
            |policy| policy.mount_folders = vec!["/srv/models2".into()],
            |policy| policy.mount_folders = vec!["/srv/models".into()],
        ),
        (
            |spec| mount(spec, "/etc"),
            "mounting /etc",
            |policy| policy.mount_folders = vec!["/etcetera".into()],
            |policy| policy.mount_folders = vec!["/".into()],
        ),
        (
            |spec| publish(spec, "0.0.0.0"),
            "publishing on 0.0.0.0",
            |policy| policy.publish_addresses = ["127.0.0.1".parse().unwrap()].into(),
            |policy| policy.publish_addresses = ["0.0.0.0".parse().unwrap()].into(),
        ),
        (
            |spec| publish(spec, "127.0.0.1"),
            "publishing on 127.0.0.1",
            |policy| policy.forbid_publish = true,
            |policy| policy.forbid_publish = false,
        ),
    ];
    for (want, named, near, enough) in cases {
        let mut written = World::spec("one");
        want(&mut written);
        let spec: DeploymentSpec =
            berth_proto::convert::deployment_spec_from_api(&written).unwrap();
        let refused = |list: fn(&mut HostPolicy)| {
            let mut policy = HostPolicy::default();
            list(&mut policy);
            crate::placement::policy_refusal(&spec, &policy)
        };
        assert_eq!(refused(near).as_deref(), Some(named));
        assert_eq!(refused(enough), None, "{named}");
    }
    // Nothing is mounted where no folder is listed; ports go on any address where none is.
    let judge = |edit: fn(&mut api::DeploymentSpec)| {
        let mut written = World::spec("one");
        edit(&mut written);
        let spec = berth_proto::convert::deployment_spec_from_api(&written).unwrap();
        crate::placement::policy_refusal(&spec, &HostPolicy::default())
    };
    assert_eq!(judge(|spec| mount(spec, "/srv")).as_deref(), Some("mounting /srv"));
    assert_eq!(judge(|spec| publish(spec, "0.0.0.0")), None);
}

#[test]
fn a_model_goes_only_where_the_agent_fetches_artifacts() {
    let mut w = World::new(2);
    let mut spec = World::spec("one");
    spec.replicas = Some(1);
    w.apply(spec);
    let release = w.view.release(&w.uid(), ReleaseNumber(1)).unwrap();
    let mut record = release.to_record();
    record.source.as_mut().unwrap().artifact = Some(api::ResolvedArtifact {
        digest: berth_proto::ids::Digest::of(b"model").to_string(),
        ..Default::default()
    });
    let release = crate::objects::Release::new(record).unwrap();
    w.change(vec![Change::PutRelease(Arc::new(release))]);
    edit_host(&mut w, 0, |r| r.facts.as_mut().unwrap().features = vec!["else".into()]);
    let pending: Vec<String> = w.plan().report.pending.into_keys().collect();
    assert_eq!(pending, ["no host fits: 2 whose agent lacks feature artifact"]);
    edit_host(&mut w, 1, |r| {
        r.facts.as_mut().unwrap().features = vec![crate::release::FEATURE_ARTIFACT.into()];
    });
    let steps = w.plan().steps;
    let hosts: Vec<&str> = steps.iter().map(|step| step.host.as_str()).collect();
    assert_eq!(hosts, ["h1"]);
}

#[test]
fn a_replica_checked_by_network_goes_where_its_agent_reaches_it() {
    use api::health_check::Check;
    let unreached = |w: &mut World, n| {
        edit_host(w, n, |r| r.facts.as_mut().unwrap().container_network_reachable = false);
    };
    let by_network = |spec: &mut api::DeploymentSpec| {
        spec.ports = vec![api::Port { name: "http".into(), container: 80, ..Default::default() }];
        let check = Some(Check::Tcp(api::TcpCheck { port: "http".into() }));
        spec.health = Some(api::HealthCheck { check, ..Default::default() });
    };
    let mut w = World::new(2);
    unreached(&mut w, 0);
    assert_eq!(one_on(&mut w, by_network).0, ["h1"]);
    let mut w = World::new(1);
    unreached(&mut w, 0);
    let words = "no host fits: 1 where the agent does not reach containers, as the health check needs \
                 it to";
    assert_eq!(one_on(&mut w, by_network), (vec![], vec![words.to_owned()]));
    // What is checked inside, or not at all, runs there.
    let mut w = World::new(1);
    unreached(&mut w, 0);
    assert_eq!(one_on(&mut w, |_| {}).0, ["h0"]);
}
