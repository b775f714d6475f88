//! What end-to-end tests deploy: a program that serves, fails or ends as its environment says.
//!
//! Static and without any crate, so that its image is one small file FROM scratch. `DO` is
//!
//! - `serve` (the default): answers on port 8080, 200 on `/healthy` and 503 elsewhere, and writes a
//!   line when it starts and one a second;
//! - `model:NAME`: answers on port 8080 as a server of the Open Inference Protocol does that knows one
//!   model, by this name;
//! - `exit:CODE`: writes a line and ends at once;
//! - `flood:LINES`: writes so many lines of 1,000 bytes, then serves;
//! - `read:PATH`: writes a line with what is in a file, then serves;
//! - `dial:ADDRESS`: writes a line that says whether something takes a connection there, then serves.

use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::process::ExitCode;
use std::time::Duration;

fn answer(mut stream: TcpStream, model: Option<&str>) {
    let request = request(&mut stream);
    let path = request.split(' ').nth(1).unwrap_or_default();
    let (status, body) = match model {
        None if path == "/healthy" => ("200 OK", String::new()),
        None => ("503 Service Unavailable", String::new()),
        Some(_) if path == "/v2/health/ready" => ("200 OK", String::new()),
        Some(name) if path == format!("/v2/models/{name}") => {
            ("200 OK", format!(r#"{{"name":"{name}","versions":["1"],"platform":"none"}}"#))
        }
        Some(name) if path == format!("/v2/models/{name}/infer") => {
            ("200 OK", format!(r#"{{"model_name":"{name}","model_version":"1","outputs":[]}}"#))
        }
        Some(_) => ("404 Not Found", format!(r#"{{"error":"nothing is at {path}"}}"#)),
    };
    let length = body.len();
    let kind = "Content-Type: application/json\r\nConnection: close";
    let head = format!("HTTP/1.1 {status}\r\nContent-Length: {length}\r\n{kind}\r\n\r\n");
    // A caller that is gone needs no answer.
    let _ = stream.write_all((head + &body).as_bytes());
}

/// All of a request: closed with some of it unread, the connection would be reset.
fn request(stream: &mut TcpStream) -> String {
    let mut request = Vec::new();
    let mut piece = [0_u8; 1024];
    loop {
        let text = String::from_utf8_lossy(&request).into_owned();
        if let Some((head, body)) = text.split_once("\r\n\r\n") {
            let length = head.lines().find_map(|line| {
                let (name, value) = line.split_once(':')?;
                let is_it = name.eq_ignore_ascii_case("content-length");
                is_it.then(|| value.trim().parse::<usize>().ok())?
            });
            if body.len() >= length.unwrap_or(0) {
                return text;
            }
        }
        match stream.read(&mut piece) {
            Ok(0) | Err(_) => return text,
            Ok(read) => request.extend_from_slice(&piece[..read]),
        }
    }
}

fn main() -> ExitCode {
    let what = std::env::var("DO").unwrap_or_else(|_| "serve".to_owned());
    if let Some(code) = what.strip_prefix("exit:") {
        println!("stand-in leaves with {code}");
        return ExitCode::from(code.parse::<u8>().unwrap_or(1));
    }
    if let Some(lines) = what.strip_prefix("flood:") {
        let mut out = std::io::stdout().lock();
        for line in 0..lines.parse::<u32>().unwrap_or(1) {
            // A reader that is gone is the engine; there is nobody to tell.
            let _ = writeln!(out, "stand-in floods {line:0983}");
        }
    }
    if let Some(path) = what.strip_prefix("read:") {
        println!("stand-in reads {:?}", std::fs::read_to_string(path));
    }
    if let Some(address) = what.strip_prefix("dial:") {
        let dialled = match address.parse() {
            Ok(address) => TcpStream::connect_timeout(&address, Duration::from_secs(3)).map(|_| ()),
            Err(error) => Err(std::io::Error::other(error)),
        };
        println!("stand-in dials {address}: {dialled:?}");
    }
    let listener = match TcpListener::bind(("0.0.0.0", 8080)) {
        Ok(listener) => listener,
        Err(error) => {
            eprintln!("stand-in cannot listen: {error}");
            return ExitCode::FAILURE;
        }
    };
    println!("stand-in is up");
    std::thread::spawn(|| {
        let (_tx, rx) = std::sync::mpsc::channel::<()>();
        for second in 1_u64.. {
            let _ = rx.recv_timeout(Duration::from_secs(1));
            println!("stand-in second {second}");
        }
    });
    for stream in listener.incoming().flatten() {
        answer(stream, what.strip_prefix("model:"));
    }
    ExitCode::SUCCESS
}
