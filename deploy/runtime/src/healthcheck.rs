//! A health check from inside the container: one HTTP request with nothing but the standard library.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::time::Instant;

use crate::args::Healthcheck;

/// Enough for a status line and the answer's body, which says why.
const ANSWER: u64 = 4096;

/// Why the server is not healthy.
#[derive(Debug, thiserror::Error)]
pub enum Unhealthy {
    /// Nothing answers.
    #[error("no answer from {address}{path}")]
    NoAnswer {
        /// The address that was asked.
        address: SocketAddr,
        /// The path that was asked for.
        path: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The answer is not 200.
    #[error("{address}{path} answers: {answer}")]
    Answered {
        /// The address that was asked.
        address: SocketAddr,
        /// The path that was asked for.
        path: String,
        /// Status line and body, on one line.
        answer: String,
    },
}

/// Asks once.
///
/// # Errors
///
/// When there is no answer in time, or one that is not 200.
pub fn check(args: &Healthcheck) -> Result<(), Unhealthy> {
    let address = reachable(args.listen);
    let answer = ask(address, args).map_err(|source| Unhealthy::NoAnswer {
        address,
        path: args.path.clone(),
        source,
    })?;
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
    let status = head.lines().next().unwrap_or_default();
    if status.split(' ').nth(1) == Some("200") {
        return Ok(());
    }
    let answer = format!("{status} {}", body.trim());
    Err(Unhealthy::Answered { address, path: args.path.clone(), answer })
}

fn ask(address: SocketAddr, args: &Healthcheck) -> std::io::Result<String> {
    let late = || std::io::Error::from(std::io::ErrorKind::TimedOut);
    let start = Instant::now();
    let left = || {
        args.timeout.checked_sub(start.elapsed()).filter(|left| !left.is_zero()).ok_or_else(late)
    };
    let mut stream = TcpStream::connect_timeout(&address, left()?)?;
    stream.set_write_timeout(Some(left()?))?;
    let path = &args.path;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n")?;
    let mut answer = Vec::new();
    let mut part = [0; 1024];
    // Read by read, because the time limit of a socket starts anew with each of them.
    while (answer.len() as u64) < ANSWER {
        stream.set_read_timeout(Some(left()?))?;
        match stream.read(&mut part) {
            Ok(0) => break,
            Ok(count) => answer.extend_from_slice(&part[..count]),
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => return Err(late()),
            Err(e) => return Err(e),
        }
    }
    Ok(String::from_utf8_lossy(&answer).into_owned())
}

/// The address to ask for a server that listens on `listen`.
fn reachable(listen: SocketAddr) -> SocketAddr {
    let ip = match listen.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => IpAddr::V4(Ipv4Addr::LOCALHOST),
        IpAddr::V6(ip) if ip.is_unspecified() => IpAddr::V6(Ipv6Addr::LOCALHOST),
        ip @ (IpAddr::V4(_) | IpAddr::V6(_)) => ip,
    };
    SocketAddr::new(ip, listen.port())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_on_all_addresses_is_asked_on_loopback() {
        let of = |text: &str| reachable(text.parse().unwrap()).to_string();
        assert_eq!(of("0.0.0.0:80"), "127.0.0.1:80");
        assert_eq!(of("[::]:80"), "[::1]:80");
        assert_eq!(of("10.0.0.1:80"), "10.0.0.1:80");
    }

    #[test]
    fn a_closed_port_and_a_silent_server_are_unhealthy() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let args = |listen| Healthcheck {
            listen,
            path: "/v2/health/ready".to_owned(),
            timeout: std::time::Duration::from_millis(50),
        };
        let address = listener.local_addr().unwrap();
        // Connects through the backlog, but nobody answers.
        let start = Instant::now();
        assert!(matches!(check(&args(address)), Err(Unhealthy::NoAnswer { .. })));
        assert!(start.elapsed() < std::time::Duration::from_secs(5));
        drop(listener);
        assert!(matches!(check(&args(address)), Err(Unhealthy::NoAnswer { .. })));
    }
}
