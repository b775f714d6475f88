//! Changed numbers of replicas, and what is left of a cluster whose server died.

use berth_tests::bench::stand_in_image;
use berth_tests::{Cluster, docker_containers, has_docker};

/// Replicas that are ready.
fn ready(cluster: &Cluster) -> usize {
    let all = cluster.berth_json(&["ps", "app"]).unwrap();
    all.as_array().unwrap().iter().filter(|r| r["state"] == "ready").count()
}

#[test]
fn whoever_waits_for_a_raised_number_waits_until_it_is_there_or_hears_why_not() {
    if !has_docker("whoever_waits_for_a_raised_number") {
        return;
    }
    let mut cluster = Cluster::start().unwrap();
    cluster.add_agent("one", &[]).unwrap();
    let _image = stand_in_image(&cluster, "app:1").unwrap();
    let manifest = cluster.dir.path().join("app.yaml");
    let write = |replicas: u32, require: &str| {
        let text = format!(
            "apiVersion: berth/v1\nkind: Deployment\nmetadata: {{name: app}}\nspec:\n  \
             image: app:1\n  replicas: {replicas}\n  placement: {{require: [{require}]}}\n  \
             ports: [{{name: http, container: 8080}}]\n  \
             health: {{http: {{path: /healthy, port: http}}, interval: 500ms}}\n  \
             rollout: {{readyFor: 0s}}\n  stopGrace: 0s\n"
        );
        std::fs::write(&manifest, text).unwrap();
    };
    let file = manifest.to_str().unwrap();
    write(1, "");
    cluster.berth_ok(&["apply", "-f", file, "--timeout", "90s"]).unwrap();
    write(3, "");
    let said = cluster.berth_ok(&["apply", "-f", file, "--timeout", "90s"]).unwrap();
    assert!(said.contains("adjusted") && said.contains("3/3"), "{said}");
    assert_eq!(ready(&cluster), 3);
    cluster.berth_ok(&["scale", "app", "4", "--wait", "--timeout", "90s"]).unwrap();
    assert_eq!(ready(&cluster), 4);

    // Those that run stay where they are; for one more there is no place.
    write(5, "zone=mars");
    let late = cluster.berth(&["apply", "-f", file, "--timeout", "3s"]).unwrap();
    let said = String::from_utf8_lossy(&late.stderr);
    assert_eq!(late.status.code(), Some(5), "{said}");
    assert!(said.contains("no host fits: 1 without label zone=mars"), "{said}");
    // Nor is it there for whoever applies the same once more.
    let again = cluster.berth(&["apply", "-f", file, "--timeout", "3s"]).unwrap();
    let said = String::from_utf8_lossy(&again.stderr);
    assert_eq!(again.status.code(), Some(5), "{said}");
    assert!(said.contains("unchanged") && said.contains("4/5 ready"), "{said}");

    // What is left in the engine is found by the uid that was noted.
    let uid = cluster.uid().unwrap();
    assert!(!docker_containers(&uid, false).unwrap().is_empty());
    cluster.server().kill();
    drop(cluster);
    assert_eq!(docker_containers(&uid, false).unwrap(), Vec::<String>::new());
}
