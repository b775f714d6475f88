//! What to do about an error: a hint for each of the server's stable reasons, and for a name that
//! does not exist the nearest one that does.
//!
//! Never decides by a message's words.

use crate::args::Global;
use crate::client::Client;
use crate::error::Error;
use berth_proto::api::*;
use berth_proto::manifest::nearest;
use std::time::Duration;
use tonic::Code;

/// How long looking for a better name may hold up an error.
const LOOK: Duration = Duration::from_secs(3);

/// What to do about a reason, or else about a code.
pub fn of(reason: &str, code: Code) -> Option<&'static str> {
    let by_reason = match reason {
        "DEPLOYMENT_NOT_FOUND" => {
            "`berth deployment list` shows what there is; -n names another namespace"
        }
        "RELEASE_NOT_FOUND" | "NO_EARLIER_RELEASE" | "NO_RELEASE" => {
            "`berth release list DEPLOYMENT` shows them"
        }
        "REPLICA_NOT_FOUND" | "REPLICA_NOT_RUNNING" => "`berth ps -o wide` shows replicas",
        "HOST_NOT_FOUND" => "`berth host list` shows them",
        "MODEL_NOT_FOUND" => "`berth model list` shows them; `berth model push` makes one",
        "VERSION_NOT_FOUND" | "ALIAS_NOT_FOUND" => "`berth model show NAME` shows them",
        "USER_NOT_FOUND" => "`berth user list` shows them",
        "TOKEN_NOT_FOUND" => {
            "`berth host token list` shows join tokens, `berth user list -o wide` those of users"
        }
        "IMAGE_NOT_FOUND" => "`berth image push`, `berth build` or `docker push` bring one",
        "RUNTIME_NOT_FOUND" => {
            "`berth image push LOCAL runtimes/NAME:latest` brings one; spec.runtime names it"
        }
        "MANIFEST_MISSING" => "push the content first: `berth model push` does both",
        "REVISION_MISMATCH" => "read it again, then retry",
        "USER_EXISTS" => {
            "`berth user token` makes another token; for another context `berth user revoke` comes first"
        }
        "VERSION_EXISTS" => "versions never change: push it under another version",
        "VERSION_IN_USE" => "move its aliases and deployments to another version first",
        "HOST_HAS_REPLICAS" => {
            "`berth host drain NAME` moves them away, and `berth host show NAME` tells when it is \
             drained; --force does not wait"
        }
        "EVERY_HOST" => "its number is that of the hosts that fit; change spec.placement",
        "DEPLOYMENT_DELETING" => "wait until it is gone: `berth deployment list`",
        "EXEC_NEEDED" => "an admin gives it: `berth user create NAME --exec`",
        "EXEC_FORBIDDEN" => {
            "the host's owner decides: `forbid-exec` in /etc/berth/agent.toml there"
        }
        "TOKEN_LIMITED" => "this token is good for one deployment's gateway only",
        "CERTIFICATE_UNKNOWN" | "USER_UNKNOWN" => {
            "an admin of the server can make a new context: `berth user create`"
        }
        "DISK_FULL" => "`berth registry gc` frees what nothing names",
        "HOSTS_NOT_TOLD" => {
            "`berth root list` shows them; remove those that are gone for good, or --force"
        }
        "NO_ROTATION" => "`berth root rotate` begins one",
        "ROOT_RETIRED" | "CERTIFICATE_NEEDED" => {
            "`berth context renew` in time, or a new context from an admin: `berth user create`"
        }
        "EVENTS_EXPIRED" => "begin anew, without a token",
        "HOST_AWAY" => "`berth host show NAME` shows when it was last seen",
        "SERVER_STOPPING" | "LEDGER_BUSY" => "the same command may work in a moment",
        _ => "",
    };
    if !by_reason.is_empty() {
        return Some(by_reason);
    }
    let by_code = match code {
        Code::PermissionDenied => "`berth user whoami` shows what you may do",
        Code::Unauthenticated => {
            "the context is not accepted: `berth context show` names it, and an admin of the \
             server can make a new one with `berth user create`"
        }
        Code::Unavailable | Code::DeadlineExceeded => {
            "the same command may work in a moment; --request-timeout sets how long to wait"
        }
        Code::Unimplemented => {
            "is the server older than this command line? See `berth server info`"
        }
        Code::Internal => "the server's log says more",
        Code::Ok
        | Code::Cancelled
        | Code::Unknown
        | Code::InvalidArgument
        | Code::NotFound
        | Code::AlreadyExists
        | Code::ResourceExhausted
        | Code::FailedPrecondition
        | Code::Aborted
        | Code::OutOfRange
        | Code::DataLoss => return None,
    };
    Some(by_code)
}

/// Adds a suggestion to an error about a name that does not exist.
pub async fn suggest(global: &Global, error: Error) -> Error {
    let Some(name) = error.named.clone() else { return error };
    let looking = names(global, &error.reason);
    let Ok(Some(known)) = tokio::time::timeout(LOOK, looking).await else {
        return error;
    };
    let Some(near) = another(&name, &known) else { return error };
    let words = format!("did you mean \"{near}\"?");
    match &error.hint {
        Some(hint) => {
            let hint = format!("{words} {hint}");
            error.hint(hint)
        }
        None => error.hint(words),
    }
}

/// The nearest of other names: one that is there is missing something else than its name.
fn another<'a>(name: &str, known: &'a [String]) -> Option<&'a str> {
    nearest(name, known.iter().map(String::as_str)).filter(|near| *near != name)
}

/// The names that there are of what a reason says is missing.
async fn names(global: &Global, reason: &str) -> Option<Vec<String>> {
    let page = || Some(Page { page_size: 1000, ..Page::default() });
    let client = Client::connect(global).await.ok()?;
    let namespace = client.namespace.clone();
    let of = |meta: Option<ObjectMeta>| meta.map(|m| m.name);
    let known = match reason {
        "DEPLOYMENT_NOT_FOUND" => {
            let request = ListDeploymentsRequest { namespace, page: page() };
            let answer = client.deployments().list_deployments(request).await.ok()?.into_inner();
            answer.deployments.into_iter().filter_map(|d| of(d.meta)).collect()
        }
        "HOST_NOT_FOUND" => {
            let request = ListHostsRequest { page: page() };
            let answer = client.hosts().list_hosts(request).await.ok()?.into_inner();
            answer.hosts.into_iter().filter_map(|h| of(h.meta)).collect()
        }
        "MODEL_NOT_FOUND" => {
            let request = ListModelsRequest { namespace, page: page() };
            let answer = client.models().list_models(request).await.ok()?.into_inner();
            answer.models.into_iter().filter_map(|m| of(m.meta)).collect()
        }
        "USER_NOT_FOUND" => {
            let request = ListUsersRequest { page: page() };
            let answer = client.users().list_users(request).await.ok()?.into_inner();
            answer.users.into_iter().filter_map(|u| of(u.meta)).collect()
        }
        _ => return None,
    };
    Some(known)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_is_pointed_to_the_name_that_was_given() {
        let known = ["iris".to_owned(), "digits".to_owned()];
        assert_eq!(another("iriss", &known), Some("iris"));
        assert_eq!(another("iris", &known), None);
    }

    #[test]
    fn a_reason_comes_before_a_code() {
        assert!(of("HOST_NOT_FOUND", Code::NotFound).unwrap().contains("berth host list"));
        assert!(of("EXEC_FORBIDDEN", Code::PermissionDenied).unwrap().contains("forbid-exec"));
        assert!(of("ROLE_NEEDED", Code::PermissionDenied).unwrap().contains("whoami"));
        assert_eq!(of("", Code::NotFound), None);
    }
}
