//! A byte stream to a replica's port, carried by the agent's `Dial` call.

use crate::session::reverse::{HostClient, LinkState, ReverseError, ReverseHub};
use berth_proto::agent::{DialRequest, DialResponse, DialStart, ReverseKind, dial_request};
use berth_proto::ids::{HostUid, ReplicaUid};
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::mpsc;
use tokio_stream::Stream as _;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::PollSender;
use tonic::{Code, Streaming};

/// The contract's bound on one frame.
const FRAME: usize = 64 * 1024;
/// Frames under way to the agent before the writer waits: half a stream window.
const QUEUE: usize = 2;

/// Why a replica could not be dialled. Nothing of the request was sent.
#[derive(Debug, thiserror::Error)]
pub enum DialError {
    /// The host cannot be called.
    #[error("the host cannot be called")]
    Host(#[from] ReverseError),
    /// The agent says no: the replica is gone, or refuses the port.
    #[error("the replica cannot be reached: {0}")]
    Replica(String),
    /// No answer in time.
    #[error("the replica was not reached in time")]
    TimedOut,
}

/// Opens a byte stream to a replica's port.
///
/// # Errors
/// When the host or the replica cannot be reached within `deadline`.
pub async fn dial(
    hub: &ReverseHub,
    host: &HostUid,
    replica: &ReplicaUid,
    port: &str,
    deadline: Duration,
) -> Result<DialIo, DialError> {
    let (client, link) = hub.link(host, ReverseKind::Gateway, deadline).await?;
    tokio::time::timeout(deadline, start(client, link, replica, port))
        .await
        .map_err(|_| DialError::TimedOut)?
}

async fn start(
    mut client: HostClient,
    link: LinkState,
    replica: &ReplicaUid,
    port: &str,
) -> Result<DialIo, DialError> {
    let (tx, rx) = mpsc::channel(QUEUE);
    let start = DialStart { replica_uid: replica.to_string(), port: port.to_owned() };
    // The queue is empty and has room for two.
    let _ = tx.try_send(DialRequest { item: Some(dial_request::Item::Start(start)) });
    let refused = |status: tonic::Status| DialError::Replica(status.message().to_owned());
    let mut answer = client.dial(ReceiverStream::new(rx)).await.map_err(refused)?.into_inner();
    // The first message says that the connection stands.
    match answer.message().await.map_err(refused)? {
        Some(first) => Ok(DialIo {
            tx: PollSender::new(tx),
            rx: answer,
            link,
            read: first.data,
            at: 0,
            ended: false,
        }),
        None => Err(DialError::Replica("the agent ended the connection".to_owned())),
    }
}

/// The byte stream.
pub struct DialIo {
    tx: PollSender<DialRequest>,
    rx: Streaming<DialResponse>,
    link: LinkState,
    read: Vec<u8>,
    at: usize,
    ended: bool,
}

impl DialIo {
    /// The link to the host that carries this stream.
    #[must_use]
    pub fn link(&self) -> LinkState {
        self.link.clone()
    }
}

impl AsyncRead for DialIo {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            let this = &mut *self;
            if this.at < this.read.len() {
                let take = buf.remaining().min(this.read.len() - this.at);
                buf.put_slice(&this.read[this.at..this.at + take]);
                this.at += take;
                return Poll::Ready(Ok(()));
            }
            if this.ended {
                return Poll::Ready(Ok(()));
            }
            match ready!(Pin::new(&mut this.rx).poll_next(cx)) {
                Some(Ok(frame)) => {
                    this.read = frame.data;
                    this.at = 0;
                }
                None => this.ended = true,
                Some(Err(status)) => {
                    this.ended = true;
                    // The program closed its socket: an end, not a failure of the tunnel.
                    if status.code() != Code::Ok {
                        let kind = io::ErrorKind::ConnectionReset;
                        return Poll::Ready(Err(io::Error::new(kind, status.message())));
                    }
                }
            }
        }
    }
}

fn gone() -> io::Error {
    io::Error::from(io::ErrorKind::BrokenPipe)
}

impl AsyncWrite for DialIo {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        if ready!(self.tx.poll_reserve(cx)).is_err() {
            return Poll::Ready(Err(gone()));
        }
        let take = bytes.len().min(FRAME);
        let data = dial_request::Item::Data(bytes[..take].to_vec());
        match self.tx.send_item(DialRequest { item: Some(data) }) {
            Ok(()) => Poll::Ready(Ok(take)),
            Err(_) => Poll::Ready(Err(gone())),
        }
    }
    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
    fn poll_shutdown(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.tx.close();
        Poll::Ready(Ok(()))
    }
}
