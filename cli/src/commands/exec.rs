//! A command in a replica, with this terminal or without one.

use super::{connect, named};
use crate::args::{Exec, Global};
use crate::error::{Error, Kind, Result};
use crate::style::Stream;
use berth_proto::api::*;
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};
use std::io::{IsTerminal as _, Read as _, Write as _};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

/// Messages on their way; standard input is read no faster than they are taken.
const QUEUE: usize = 8;
/// Bytes of standard input in one message, as the contract says.
const PIECE: usize = 64 * 1024;

/// This terminal without its own handling of keys, until it is dropped.
struct Raw {
    before: Termios,
}

impl Raw {
    fn enter() -> Result<Self> {
        let before = tcgetattr(std::io::stdin()).map_err(std::io::Error::from)?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(std::io::stdin(), OptionalActions::Flush, &raw).map_err(std::io::Error::from)?;
        Ok(Self { before })
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        let _ = tcsetattr(std::io::stdin(), OptionalActions::Flush, &self.before);
    }
}

fn size() -> Option<TerminalSize> {
    let size = tcgetwinsize(std::io::stdin()).ok()?;
    Some(TerminalSize { width: size.ws_col.into(), height: size.ws_row.into() })
}

fn message(item: exec_request::Item) -> ExecRequest {
    ExecRequest { item: Some(item) }
}

/// Standard input into the stream. A thread of its own: a read of a terminal cannot be given up.
fn feed(out: mpsc::Sender<ExecRequest>) {
    std::thread::spawn(move || {
        let mut buffer = vec![0; PIECE];
        loop {
            let read = std::io::stdin().lock().read(&mut buffer).unwrap_or(0);
            // Empty says that it has ended.
            let bytes = buffer[..read].to_vec();
            if out.blocking_send(message(exec_request::Item::Stdin(bytes))).is_err() || read == 0 {
                return;
            }
        }
    });
}

/// Tells each new size of the terminal.
fn resize(out: mpsc::Sender<ExecRequest>) -> Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut changes = signal(SignalKind::window_change())?;
    tokio::spawn(async move {
        while changes.recv().await.is_some() {
            let Some(size) = size() else { continue };
            if out.send(message(exec_request::Item::Resize(size))).await.is_err() {
                return;
            }
        }
    });
    Ok(())
}

pub async fn exec(global: &Global, args: Exec) -> Result<u8> {
    if args.tty && !(std::io::stdin().is_terminal() && Stream::Stdout.is_terminal()) {
        return Err(Error::new(Kind::Usage, "-t needs a terminal on both ends of this command")
            .hint("leave -t out to run it in a pipe"));
    }
    let (deployment, replica) =
        named::replica(global, &args.deployment, args.replica, None).await?;
    let client = connect(global).await?;
    let start = ExecStart {
        namespace: client.namespace.clone(),
        deployment,
        replica: replica.unwrap_or_default(),
        command: args.command,
        tty: args.tty,
        size: if args.tty { size() } else { None },
    };
    let (tx, rx) = mpsc::channel(QUEUE);
    let _ = tx.try_send(message(exec_request::Item::Start(start)));
    let asking = client.logs();
    let opening = async move {
        let mut asking = asking;
        asking.exec(ReceiverStream::new(rx)).await
    };
    let opened = tokio::time::timeout(global.request_timeout, opening).await;
    let mut stream = match opened {
        Ok(answer) => answer?.into_inner(),
        Err(_) => return Err(Error::new(Kind::Unavailable, "the host did not answer in time")),
    };
    // Only once it runs: an error is told on a terminal that still works as it did.
    let raw = if args.tty { Some(Raw::enter()?) } else { None };
    if args.tty {
        resize(tx.clone())?;
    }
    if args.tty || !std::io::stdin().is_terminal() {
        feed(tx.clone());
    } else {
        // Nobody types into a command without a terminal of its own.
        let _ = tx.try_send(message(exec_request::Item::Stdin(Vec::new())));
    }
    let result = async {
        while let Some(next) = stream.message().await? {
            match next.item {
                Some(exec_response::Item::Stdout(bytes)) => crate::output::raw(&bytes)?,
                Some(exec_response::Item::Stderr(bytes)) => std::io::stderr().write_all(&bytes)?,
                Some(exec_response::Item::ExitCode(code)) => return Ok(Some(code)),
                None => {}
            }
        }
        Ok::<_, Error>(None)
    }
    .await;
    drop(raw);
    match result? {
        Some(code) => Ok(exit_code(code)),
        None => Err(Error::new(Kind::Unavailable, "the command's end was not told")
            .hint("it may still run; `berth ps` shows its replica")),
    }
}

/// The program's own code; what does not fit into one is 1.
fn exit_code(code: i32) -> u8 {
    u8::try_from(code).unwrap_or(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_programs_exit_code_is_passed_on() {
        assert_eq!((exit_code(0), exit_code(7), exit_code(137)), (0, 7, 137));
        // Not told, or none that a process can have: never taken for success.
        assert_eq!((exit_code(-1), exit_code(256)), (1, 1));
    }
}
