//! What each call needs, in one table that names every RPC.

use berth_proto::api::{Role, RoleBinding};

/// What a call needs of its caller.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Needs {
    /// Nothing: joining, renewing, health.
    Nobody,
    /// Any user.
    User,
    /// A role, in the namespace the request names where it names one.
    Role(Role),
    /// The permission to run commands.
    Exec,
    /// A host's certificate.
    Host,
}

use Needs::{Exec, Host, Nobody, Role as R, User};

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
    ("berth.v1.HostService/LabelHost", R(Role::Admin)),
    ("berth.v1.HostService/CordonHost", R(Role::Admin)),
    ("berth.v1.HostService/DrainHost", R(Role::Admin)),
    ("berth.v1.HostService/RemoveHost", R(Role::Admin)),
    ("berth.v1.HostService/ApproveHost", R(Role::Admin)),
    ("berth.v1.HostService/ReleaseQuarantine", R(Role::Admin)),
    ("berth.v1.HostService/CreateJoinToken", R(Role::Admin)),
    ("berth.v1.HostService/ListJoinTokens", R(Role::Admin)),
    ("berth.v1.HostService/RevokeJoinToken", R(Role::Admin)),
    ("berth.v1.HostService/ListOrphans", R(Role::Admin)),
    ("berth.v1.HostService/ResolveOrphans", R(Role::Admin)),
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
    ("berth.v1.EventService/ListAudit", R(Role::Admin)),
    ("berth.v1.LogService/StreamLogs", R(Role::Viewer)),
    ("berth.v1.LogService/Exec", Exec),
    ("berth.v1.UserService/CreateUser", R(Role::Admin)),
    ("berth.v1.UserService/ListUsers", R(Role::Admin)),
    ("berth.v1.UserService/CreateUserToken", R(Role::Admin)),
    ("berth.v1.UserService/RevokeUser", R(Role::Admin)),
    ("berth.v1.UserService/WhoAmI", User),
    ("berth.v1.SystemService/GetServerInfo", User),
    ("berth.v1.SystemService/Backup", R(Role::Admin)),
    ("berth.v1.SystemService/CollectGarbage", R(Role::Admin)),
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
}
