//! People and services.

use super::{ask, confirm, connect, pages, write};
use crate::args::{Global, User as UserVerb, UserRole};
use crate::client;
use crate::error::{Error, Kind, Result};
use crate::output::{moment, print, put, say, word};
use crate::whole::Whole;
use berth_proto::api::*;
use berth_proto::manifest;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::time::Duration;

fn token_words(token: &UserToken) -> String {
    if token.deployment.is_empty() {
        token.id.clone()
    } else {
        format!("{} (only {})", token.id, token.deployment)
    }
}

fn token_json(token: &UserToken) -> Value {
    json!({"id": token.id, "expireTime": moment(token.expire_time.as_ref()), "deployment": token.deployment})
}

/// A role with where it holds, and whether it may run commands.
fn role(binding: &RoleBinding) -> String {
    let role = word(binding.role().as_str_name(), "ROLE_");
    let exec = if binding.exec { " with exec" } else { "" };
    match binding.namespace.as_str() {
        "" => format!("{role}{exec}"),
        namespace => format!("{role}{exec} in {namespace}"),
    }
}

/// What is revoked, in words.
fn revoked(name: &str, token: Option<&String>) -> String {
    match token {
        Some(id) => format!("token {id} of \"{name}\""),
        None => format!("\"{name}\" with all its tokens"),
    }
}

/// So long after now.
fn end_after(now: time::OffsetDateTime, expires: Duration) -> Result<prost_types::Timestamp> {
    let end = time::Duration::try_from(expires).ok().and_then(|expires| now.checked_add(expires));
    let end = end.ok_or_else(|| {
        Error::new(Kind::Usage, "--expires reaches beyond the year 9999")
            .hint("for ten years write 3650d")
    })?;
    Ok(prost_types::Timestamp { seconds: end.unix_timestamp(), nanos: 0 })
}

/// An error of a file that came after the user was made: its context was printed then, or is lost.
fn shown_instead(error: Error, name: &str, printed: Result<()>) -> Error {
    let words = format!("\"{name}\" is made, but {}", error.message);
    match printed {
        Ok(()) => Error::user(words)
            .hint("its context is on standard output, and is not shown again: keep it in a file"),
        Err(unread) => {
            Error::user(format!("{words}; nor was its context printed: {}", unread.message))
                .hint(format!("`berth user revoke {name}` takes it away; then make it again"))
        }
    }
}

pub async fn user(global: &Global, verb: UserVerb) -> Result<()> {
    let now = time::OffsetDateTime::now_utc();
    if let UserVerb::Revoke { name, token } = &verb {
        // People think as long as they like: no connection waits for that.
        confirm(global, &format!("revoke {}", revoked(name, token.as_ref())))?;
    }
    let client = connect(global).await?;
    let mut users = client.users();
    let bindings = |list: &[RoleBinding]| -> Vec<Value> {
        list.iter().map(|b| json!({"role": word(b.role().as_str_name(), "ROLE_"), "namespace": b.namespace, "exec": b.exec})).collect()
    };
    match verb {
        UserVerb::Create { name, role, expires, exec, out } => {
            // Where the context cannot be written no user is made.
            let file = out.as_deref().map(Whole::begin).transpose()?;
            let role = match role {
                UserRole::Admin => Role::Admin,
                UserRole::Operator => Role::Operator,
                UserRole::Viewer => Role::Viewer,
            };
            let (key, csr_pem) = berth_proto::tls::key_and_request()?;
            let request = CreateUserRequest {
                write: write(),
                name: name.clone(),
                bindings: vec![RoleBinding {
                    role: role as i32,
                    namespace: global.namespace().to_owned(),
                    exec,
                }],
                expire_time: Some(end_after(now, expires)?),
                csr_pem,
            };
            let made = ask(global, users.create_user(request)).await?;
            let context = client::Context {
                user: name.clone(),
                cluster: made.cluster,
                endpoints: made.endpoints,
                registry: client.context.registry.clone(),
                gateway: client.context.gateway.clone(),
                roots: made.roots_pem,
                certificate: made.certificate_pem,
                key,
            };
            let config = client::Config {
                current: "default".to_owned(),
                contexts: BTreeMap::from([("default".to_owned(), context)]),
            };
            // A secret: shown once, to be kept in ~/.config/berth/config.toml over there.
            let text = toml::to_string(&config)?;
            let Some(mut file) = file else { return put(&text) };
            let path = file.path.display().to_string();
            let kept = file.write(text.as_bytes()).and_then(|()| file.finish());
            kept.map_err(|error| shown_instead(error, &name, put(&text)))?;
            let words = format!("{name}: made, its context is in {path}");
            say(global, &words, &json!({"name": name, "file": path}))
        }
        UserVerb::List => {
            let all = pages!(global, users, |page| users.list_users(ListUsersRequest { page }));
            let rows = all
                .iter()
                .map(|u| {
                    let until =
                        u.expire_time.as_ref().map(crate::output::rfc3339).unwrap_or_default();
                    let roles = u.bindings.iter().map(role).collect::<Vec<_>>().join(", ");
                    let state = if u.revoked { "revoked" } else { "" };
                    vec![
                        u.meta.clone().unwrap_or_default().name,
                        roles,
                        until,
                        u.tokens.to_string(),
                        state.to_owned(),
                        u.live_tokens.iter().map(token_words).collect::<Vec<_>>().join(", "),
                    ]
                })
                .collect();
            let value = all.iter().map(|u| json!({"name": u.meta.clone().unwrap_or_default().name, "bindings": bindings(&u.bindings), "expireTime": moment(u.expire_time.as_ref()), "revoked": u.revoked, "tokens": u.tokens, "liveTokens": u.live_tokens.iter().map(token_json).collect::<Vec<_>>()})).collect();
            print(
                global,
                &["NAME", "ROLES", "EXPIRES", "TOKENS", "STATE", "TOKEN IDS"],
                5,
                rows,
                &Value::Array(value),
            )
        }
        UserVerb::Token { name, mut deployment, expires } => {
            // The API makes a token for a deployment that comes later; a slip here would not be noticed.
            if !deployment.is_empty() {
                // Callers of the gateway write `<namespace>.<deployment>`; names have no dot.
                let (namespace, name) = match deployment.split_once('.') {
                    Some((namespace, name)) => (namespace.to_owned(), name.to_owned()),
                    None => (client.namespace.clone(), deployment.clone()),
                };
                let request = GetDeploymentRequest { namespace, name };
                ask(global, client.deployments().get_deployment(request)).await?;
            }
            // By the name that callers of the gateway use.
            if let Some(namespace) = global.namespace.as_deref().filter(|n| *n != "default")
                && !deployment.is_empty()
                && !deployment.contains('.')
            {
                deployment = format!("{namespace}.{deployment}");
            }
            let expire_time = expires.map(|expires| end_after(now, expires)).transpose()?;
            let request = CreateUserTokenRequest { write: write(), name, expire_time, deployment };
            let made = ask(global, users.create_user_token(request)).await?;
            say(global, &made.secret, &json!({"id": made.id, "secret": made.secret}))
        }
        UserVerb::Revoke { name, token } => {
            let what = revoked(&name, token.as_ref());
            let request = RevokeUserRequest {
                write: write(),
                name: name.clone(),
                token_id: token.clone().unwrap_or_default(),
                ..Default::default()
            };
            ask(global, users.revoke_user(request)).await?;
            let value = json!({"name": name, "token": token, "revoked": true});
            say(global, &format!("{what}: revoked"), &value)
        }
        UserVerb::Whoami => {
            let me = ask(global, users.who_am_i(WhoAmIRequest {})).await?;
            let value = json!({"subject": me.subject, "bindings": bindings(&me.bindings), "expireTime": moment(me.expire_time.as_ref())});
            say(global, manifest::to_yaml(&value).trim_end(), &value)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_context_whose_file_cannot_be_written_is_shown_instead() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ci.toml");
        let failed = || {
            let file = Whole::begin(&path).unwrap();
            // Somebody else's comes between.
            std::fs::write(&path, "another").unwrap();
            let error = file.finish().unwrap_err();
            std::fs::remove_file(&path).unwrap();
            error
        };
        let error = shown_instead(failed(), "ci", Ok(()));
        assert_eq!(error.kind, Kind::User);
        assert!(error.message.starts_with("\"ci\" is made, but cannot make"), "{}", error.message);
        assert!(error.hint.unwrap().contains("on standard output"));
        // Nobody read it there: that is no quiet end.
        let gone = Error::new(Kind::ReaderGone, "nobody reads the answer");
        let error = shown_instead(failed(), "ci", Err(gone));
        assert_eq!(error.kind, Kind::User);
        assert!(error.hint.unwrap().contains("berth user revoke ci"));
    }

    #[test]
    fn a_role_is_told_with_where_it_holds() {
        let told = |role: Role, namespace: &str, exec| {
            super::role(&RoleBinding { role: role as i32, namespace: namespace.to_owned(), exec })
        };
        assert_eq!(told(Role::Admin, "", false), "admin");
        assert_eq!(told(Role::Operator, "team", true), "operator with exec in team");
    }

    #[test]
    fn an_end_that_no_calendar_has_is_refused() {
        let now = time::OffsetDateTime::UNIX_EPOCH;
        let days = |n: u64| Duration::from_secs(n * 86_400);
        assert_eq!(end_after(now, days(365)).unwrap().seconds, 365 * 86_400);
        for much in [days(3_000_000), Duration::MAX] {
            assert_eq!(end_after(now, much).unwrap_err().kind, Kind::Usage);
        }
    }
}
