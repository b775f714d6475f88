//! What each call needs, in one table that names every RPC.

use crate::registry::access::Action;
use crate::registry::names::{Place, RepoName};
use berth_proto::api::{Role, RoleBinding};

/// What a call needs of its caller.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Needs {
    /// Nothing: joining, renewing, health.
    Nobody,
    /// Any user.
    User,
    /// A role in the namespace the request names; the handler asks for that one.
    Role(Role),
    /// A role in all namespaces, for what belongs to none of them: hosts, users, audit, the server.
    Everywhere(Role),
    /// The permission to run commands.
    Exec,
    /// A host's certificate.
    Host,
}

use Needs::{Everywhere as All, Exec, Host, Nobody, Role as R, User};

/// Every RPC. A test fails when the protos and this table do not name the same.
pub const TABLE: &[(&str, Needs)] = &[
    ("berth.v1.DeploymentService/Apply", R(Role::Operator)),
    ("berth.v1.DeploymentService/Plan", R(Role::Viewer)),
    ("berth.v1.DeploymentService/GetDeployment", R(Role::Viewer)),
    ("berth.v1.DeploymentService/ListDeployments", R(Role::Viewer)),
    ("berth.v1.DeploymentService/WatchDeployment", R(Role::Viewer)),
    ("berth.v1.DeploymentService/Scale", R(Role::Operator)),
    ("berth.v1.DeploymentService/Restart", R(Role::Operator)),
    ("berth.v1.DeploymentService/Undo", R(Role::Operator)),
    ("berth.v1.DeploymentService/Delete", R(Role::Operator)),
    ("berth.v1.DeploymentService/ListReleases", R(Role::Viewer)),
    ("berth.v1.DeploymentService/GetRelease", R(Role::Viewer)),
    ("berth.v1.DeploymentService/ListReplicas", R(Role::Viewer)),
    ("berth.v1.HostService/GetHost", R(Role::Viewer)),
    ("berth.v1.HostService/ListHosts", R(Role::Viewer)),
    ("berth.v1.HostService/LabelHost", All(Role::Admin)),
    ("berth.v1.HostService/CordonHost", All(Role::Admin)),
    ("berth.v1.HostService/DrainHost", All(Role::Admin)),
    ("berth.v1.HostService/RemoveHost", All(Role::Admin)),
    ("berth.v1.HostService/ApproveHost", All(Role::Admin)),
    ("berth.v1.HostService/ReleaseQuarantine", All(Role::Admin)),
    ("berth.v1.HostService/CreateJoinToken", All(Role::Admin)),
    ("berth.v1.HostService/ListJoinTokens", All(Role::Admin)),
    ("berth.v1.HostService/RevokeJoinToken", All(Role::Admin)),
    ("berth.v1.HostService/ListOrphans", All(Role::Admin)),
    ("berth.v1.HostService/ResolveOrphans", All(Role::Admin)),
    ("berth.v1.ModelService/RegisterVersion", R(Role::Operator)),
    ("berth.v1.ModelService/GetModel", R(Role::Viewer)),
    ("berth.v1.ModelService/ListModels", R(Role::Viewer)),
    ("berth.v1.ModelService/GetVersion", R(Role::Viewer)),
    ("berth.v1.ModelService/ListVersions", R(Role::Viewer)),
    ("berth.v1.ModelService/DeleteVersion", R(Role::Operator)),
    ("berth.v1.ModelService/SetAlias", R(Role::Operator)),
    ("berth.v1.ModelService/DeleteAlias", R(Role::Operator)),
    ("berth.v1.ModelService/ListAliasMoves", R(Role::Viewer)),
    ("berth.v1.EventService/WatchEvents", R(Role::Viewer)),
    ("berth.v1.EventService/ListAudit", All(Role::Admin)),
    ("berth.v1.LogService/StreamLogs", R(Role::Viewer)),
    ("berth.v1.LogService/Exec", Exec),
    ("berth.v1.LogService/ReadUsage", R(Role::Viewer)),
    ("berth.v1.UserService/CreateUser", All(Role::Admin)),
    ("berth.v1.UserService/ListUsers", All(Role::Admin)),
    ("berth.v1.UserService/CreateUserToken", All(Role::Admin)),
    ("berth.v1.UserService/RevokeUser", All(Role::Admin)),
    ("berth.v1.UserService/WhoAmI", User),
    ("berth.v1.UserService/RenewCertificate", User),
    ("berth.v1.SystemService/GetServerInfo", User),
    ("berth.v1.SystemService/CreatePageLink", R(Role::Viewer)),
    ("berth.v1.SystemService/Backup", All(Role::Admin)),
    ("berth.v1.SystemService/StreamBackup", All(Role::Admin)),
    ("berth.v1.SystemService/CollectGarbage", All(Role::Admin)),
    ("berth.v1.SystemService/GetRoots", All(Role::Admin)),
    ("berth.v1.SystemService/BeginRootRotation", All(Role::Admin)),
    ("berth.v1.SystemService/FinishRootRotation", All(Role::Admin)),
    ("berth.agent.v1.AgentService/Session", Host),
    ("berth.agent.v1.JoinService/Join", Nobody),
    ("berth.agent.v1.JoinService/BeginRenewal", Nobody),
    ("berth.agent.v1.JoinService/Renew", Nobody),
];

/// What a call needs; `None`: nobody may call it. Health needs nothing; reflection any user.
#[must_use]
pub fn needs(path: &str) -> Option<Needs> {
    let path = path.strip_prefix('/').unwrap_or(path);
    if path.starts_with("grpc.health.v1.Health/") {
        return Some(Nobody);
    }
    if path.starts_with("grpc.reflection.") {
        return Some(User);
    }
    TABLE.iter().find(|(name, _)| *name == path).map(|(_, needs)| *needs)
}

/// Whether bindings give a role in a namespace; with an empty one, in all.
#[must_use]
pub fn has_role(bindings: &[RoleBinding], role: Role, namespace: &str) -> bool {
    bindings
        .iter()
        .filter(|b| b.namespace.is_empty() || b.namespace == namespace)
        .any(|b| b.role() as i32 >= role as i32)
}

/// Whether bindings let a caller run commands in a namespace.
#[must_use]
pub fn may_exec(bindings: &[RoleBinding], namespace: &str) -> bool {
    bindings.iter().any(|b| b.exec && (b.namespace.is_empty() || b.namespace == namespace))
}

/// Whether bindings let a user do something in a repository of the registry.
///
/// A namespace's viewers read what is its, its operators write it. What all share is read by
/// whoever may read anything, and written by operators of all namespaces.
#[must_use]
pub fn may_in_repository(bindings: &[RoleBinding], repository: &RepoName, action: Action) -> bool {
    let role = match action {
        Action::Pull => Role::Viewer,
        Action::Push | Action::Delete => Role::Operator,
    };
    match (repository.place(), action) {
        (Place::Namespace(namespace), _) => has_role(bindings, role, namespace),
        (Place::Shared, Action::Pull) => bindings.iter().any(|b| b.role() as i32 >= role as i32),
        (Place::Shared, Action::Push | Action::Delete) => has_role(bindings, role, ""),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use prost::Message as _;
    use std::collections::BTreeSet;

    #[test]
    fn the_table_names_every_rpc_and_no_other() {
        let set = prost_types::FileDescriptorSet::decode(berth_proto::FILE_DESCRIPTOR_SET).unwrap();
        let mut all = BTreeSet::new();
        for file in &set.file {
            let package = file.package();
            for service in &file.service {
                for method in &service.method {
                    all.insert(format!("{package}.{}/{}", service.name(), method.name()));
                }
            }
        }
        // Served by agents and by the gateway, not by this door.
        all.retain(|name| !name.starts_with("berth.agent.v1.HostService/"));
        all.retain(|name| !name.starts_with("inference."));
        let table: BTreeSet<String> = TABLE.iter().map(|(name, _)| (*name).to_owned()).collect();
        assert_eq!(table.len(), TABLE.len(), "a row is there twice");
        assert_eq!(all, table);
    }

    #[test]
    fn a_binding_counts_in_its_namespace_only() {
        let bind = |role: Role, namespace: &str| RoleBinding {
            role: role as i32,
            namespace: namespace.into(),
            exec: false,
        };
        let one = [bind(Role::Operator, "prod")];
        assert!(has_role(&one, Role::Viewer, "prod"));
        assert!(!has_role(&one, Role::Admin, "prod"));
        assert!(!has_role(&one, Role::Viewer, "default"));
        assert!(!has_role(&one, Role::Viewer, ""));
        assert!(has_role(&[bind(Role::Admin, "")], Role::Operator, "default"));
        assert!(!may_exec(&[bind(Role::Admin, "")], "default"));
    }
    #[test]
    fn a_role_in_one_namespace_opens_its_repositories_and_no_others() {
        use Action::{Delete, Pull, Push};
        let bind = |role: Role, namespace: &str| RoleBinding {
            role: role as i32,
            namespace: namespace.into(),
            exec: false,
        };
        let edge = [bind(Role::Operator, "edge")];
        let looks = [bind(Role::Viewer, "default")];
        let all = [bind(Role::Operator, "")];
        let both = [bind(Role::Viewer, ""), bind(Role::Operator, "edge")];
        let cases: [(&[RoleBinding], &str, &[Action]); 15] = [
            (&edge, "edge/app", &[Pull, Push, Delete]),
            (&edge, "edge/models/iris", &[Pull, Push, Delete]),
            (&edge, "edgy/app", &[]),
            (&edge, "app", &[]),
            (&edge, "models/iris", &[]),
            (&edge, "models/edge/iris", &[]),
            (&edge, "runtimes/onnx", &[Pull]),
            (&looks, "models/iris", &[Pull]),
            (&looks, "app", &[Pull]),
            (&looks, "edge/app", &[]),
            (&all, "edge/app", &[Pull, Push, Delete]),
            (&all, "runtimes/onnx", &[Pull, Push, Delete]),
            (&both, "app", &[Pull]),
            (&both, "edge/app", &[Pull, Push, Delete]),
            (&[], "runtimes/onnx", &[]),
        ];
        for (bindings, name, may) in cases {
            for action in [Pull, Push, Delete] {
                let repository = RepoName::parse(name).unwrap();
                let allowed = may_in_repository(bindings, &repository, action);
                assert_eq!(allowed, may.contains(&action), "{bindings:?}: {action} {name}");
            }
        }
    }
}
