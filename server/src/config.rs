//! The server's settings: flags over environment over a TOML file over defaults.
//!
//! [`Options`] is what may be given, everything optional, read by clap (flags, then environment)
//! and by serde (the file) into the same type; [`Settings`] is what holds, checked across options.
//! An unknown key in the file is refused by name.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

/// What may be given on the command line, in the environment or in the file.
#[derive(Debug, Clone, Default, clap::Args, serde::Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct Options {
    /// Folder that holds the ledger, keys and blobs; made when it does not exist. Default:
    /// /var/lib/berth.
    #[arg(long, env = "BERTHD_DATA_DIR", value_name = "DIR", global = true)]
    pub data_dir: Option<PathBuf>,
    /// Address of the control and API door (gRPC for agents, `berth` and services). Default:
    /// 127.0.0.1:7443.
    #[arg(long, env = "BERTHD_LISTEN", value_name = "ADDR:PORT")]
    pub listen: Option<SocketAddr>,
    /// Address of the registry door (HTTPS `/v2/` for docker, podman, skopeo). Default:
    /// 127.0.0.1:7444.
    #[arg(long, env = "BERTHD_REGISTRY_LISTEN", value_name = "ADDR:PORT")]
    pub registry_listen: Option<SocketAddr>,
    /// Address of the gateway door (Open Inference Protocol v2, HTTPS and gRPC). Default:
    /// 127.0.0.1:7445.
    #[arg(long, env = "BERTHD_GATEWAY_LISTEN", value_name = "ADDR:PORT")]
    pub gateway_listen: Option<SocketAddr>,
    /// Address of the page and metrics door. Default: 127.0.0.1:7446.
    #[arg(long, env = "BERTHD_PAGE_LISTEN", value_name = "ADDR:PORT")]
    pub page_listen: Option<SocketAddr>,
    /// Host name or address that agents and clients are told, without a port. Required when a door
    /// listens on another address than loopback. May be given several times. Default: the address of
    /// `--listen`.
    #[arg(long, env = "BERTHD_ADVERTISE", value_name = "HOST", value_delimiter = ',')]
    pub advertise: Option<Vec<String>>,
    /// The operator's own certificate chain (PEM) for the registry door, so that docker needs no
    /// extra root. Without it the cluster's own CA signs one; agents and `berth` are shown that one
    /// in any case. A file that changes is read again within the hour.
    #[arg(long, env = "BERTHD_TLS_CERT", value_name = "FILE")]
    pub tls_cert: Option<PathBuf>,
    /// Key (PEM) of `--tls-cert`.
    #[arg(long, env = "BERTHD_TLS_KEY", value_name = "FILE")]
    pub tls_key: Option<PathBuf>,
    /// How logs are written: `text` or `json`. Default: text.
    #[arg(long, env = "BERTHD_LOG_FORMAT", value_name = "FORMAT")]
    pub log_format: Option<LogFormat>,
    /// What is logged, e.g. `info` or `berth_server=debug,info`. Default: info.
    #[arg(long, env = "BERTHD_LOG", value_name = "FILTER")]
    pub log: Option<String>,
    /// Size in MiB of the ballast file that is given up when the disk is full, so that deleting and
    /// cleaning still work. 0: none. Default: 256.
    #[arg(long, env = "BERTHD_BALLAST_MIB", value_name = "MIB")]
    pub ballast_mib: Option<u64>,
    /// Uploads to the registry stop when less than so many per cent of the disk are free. Default: 10.
    #[arg(long, env = "BERTHD_MIN_FREE_PERCENT", value_name = "PERCENT")]
    pub min_free_percent: Option<u8>,
    /// Seconds between pings of a session. Default: 10.
    #[arg(long, env = "BERTHD_PING_SECONDS", value_name = "SECONDS")]
    pub ping_seconds: Option<u64>,
    /// Seconds of silence after which a host is away. Default: three times the seconds between pings,
    /// which makes 30.
    #[arg(long, env = "BERTHD_IDLE_SECONDS", value_name = "SECONDS")]
    pub idle_seconds: Option<u64>,
    /// Days past its certificate's end within which a host may renew by itself. 0: by hand only.
    /// Default: 90.
    #[arg(long, env = "BERTHD_REKEY_GRACE_DAYS", value_name = "DAYS")]
    pub rekey_grace_days: Option<u64>,
    /// Runtime image for ONNX models, as a reference in Berth's own registry. Default:
    /// runtimes/onnx:latest.
    #[arg(long, env = "BERTHD_ONNX_RUNTIME", value_name = "REPOSITORY:TAG")]
    pub onnx_runtime: Option<String>,
}

/// How logs are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LogFormat {
    /// Lines for people.
    Text,
    /// One JSON object a line.
    Json,
}

/// What holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// Folder of the ledger, keys and blobs.
    pub data_dir: PathBuf,
    /// The control and API door.
    pub listen: SocketAddr,
    /// The registry door.
    pub registry_listen: SocketAddr,
    /// The gateway door.
    pub gateway_listen: SocketAddr,
    /// The page and metrics door.
    pub page_listen: SocketAddr,
    /// What agents and clients are told, at least one.
    pub advertise: Vec<String>,
    /// Certificate and key for the registry door.
    pub registry_tls: Option<(PathBuf, PathBuf)>,
    /// How logs are written.
    pub log_format: LogFormat,
    /// What is logged.
    pub log: String,
    /// Bytes of the ballast file.
    pub ballast_bytes: u64,
    /// Uploads stop below this.
    pub min_free_percent: u8,
    /// Between pings.
    pub ping: Duration,
    /// Silence that makes a host away.
    pub idle: Duration,
    /// Renewal past the end.
    pub rekey_grace: Duration,
    /// Reference of the ONNX runtime's image.
    pub onnx_runtime: String,
}

/// Why settings do not hold.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the configuration file {}", path.display())]
    Read {
        /// Which file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The file is not understood.
    #[error("the configuration file {} is not right", path.display())]
    Parse {
        /// Which file.
        path: PathBuf,
        /// What and where; names unknown keys and those known.
        #[source]
        source: Box<toml::de::Error>,
    },
    /// A door is reachable from elsewhere, but nobody knows under which name.
    #[error(
        "--advertise is needed because {door} listens on {addr}: give the host name or address \
         that agents and clients shall use, e.g. --advertise berth.example.org"
    )]
    AdvertiseMissing {
        /// The door's flag.
        door: &'static str,
        /// Its address.
        addr: SocketAddr,
    },
    /// What agents and clients would be told is neither a name nor an address.
    #[error(
        "--advertise \"{text}\" is neither a host name nor an address; give it without scheme and \
         port, which the doors add, e.g. --advertise berth.example.org"
    )]
    Advertise {
        /// As it was given.
        text: String,
    },
    /// A certificate without its key, or the other way round.
    #[error("--{given} is given without --{missing}; the registry's certificate needs both")]
    TlsHalf {
        /// The option there is.
        given: &'static str,
        /// The option there is not.
        missing: &'static str,
    },
    /// Two doors on one address.
    #[error("{first} and {second} both listen on {addr}")]
    SameDoor {
        /// One flag.
        first: &'static str,
        /// The other flag.
        second: &'static str,
        /// The address.
        addr: SocketAddr,
    },
    /// What is to be logged is not understood.
    #[error("--log \"{text}\" is not right; e.g. info, or berth_server=debug,info")]
    Log {
        /// As it was given.
        text: String,
        /// What is wrong.
        #[source]
        source: tracing_subscriber::filter::ParseError,
    },
    /// A number is out of bounds.
    #[error("{option} must be {bounds}")]
    OutOfBounds {
        /// The option.
        option: &'static str,
        /// What it may be.
        bounds: &'static str,
    },
}

impl Options {
    /// Reads the file's options.
    ///
    /// # Errors
    /// When the file cannot be read or holds what is not known.
    pub fn from_file(path: &std::path::Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path)
            .map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
        toml::from_str(&text).map_err(|source| ConfigError::Parse {
            path: path.to_owned(),
            source: Box::new(source),
        })
    }

    /// These options, with `under` where nothing was given.
    #[must_use]
    pub fn over(self, under: Self) -> Self {
        Self {
            data_dir: self.data_dir.or(under.data_dir),
            listen: self.listen.or(under.listen),
            registry_listen: self.registry_listen.or(under.registry_listen),
            gateway_listen: self.gateway_listen.or(under.gateway_listen),
            page_listen: self.page_listen.or(under.page_listen),
            advertise: self.advertise.or(under.advertise),
            tls_cert: self.tls_cert.or(under.tls_cert),
            tls_key: self.tls_key.or(under.tls_key),
            log_format: self.log_format.or(under.log_format),
            log: self.log.or(under.log),
            ballast_mib: self.ballast_mib.or(under.ballast_mib),
            min_free_percent: self.min_free_percent.or(under.min_free_percent),
            ping_seconds: self.ping_seconds.or(under.ping_seconds),
            idle_seconds: self.idle_seconds.or(under.idle_seconds),
            rekey_grace_days: self.rekey_grace_days.or(under.rekey_grace_days),
            onnx_runtime: self.onnx_runtime.or(under.onnx_runtime),
        }
    }

    /// Checks the options against each other and fills in the defaults.
    ///
    /// # Errors
    /// The first rule that does not hold.
    pub fn settle(self) -> Result<Settings, ConfigError> {
        let loopback = |port| SocketAddr::from(([127, 0, 0, 1], port));
        let listen = self.listen.unwrap_or_else(|| loopback(7443));
        let registry_listen = self.registry_listen.unwrap_or_else(|| loopback(7444));
        let gateway_listen = self.gateway_listen.unwrap_or_else(|| loopback(7445));
        let page_listen = self.page_listen.unwrap_or_else(|| loopback(7446));
        let doors = [
            ("--listen", listen),
            ("--registry-listen", registry_listen),
            ("--gateway-listen", gateway_listen),
            ("--page-listen", page_listen),
        ];
        let advertise = self.advertise.unwrap_or_default();
        let is_host = |text: &str| rustls_pki_types::ServerName::try_from(text).is_ok();
        if let Some(text) = advertise.iter().find(|text| !is_host(text)) {
            return Err(ConfigError::Advertise { text: text.clone() });
        }
        // Each may come from elsewhere: a flag, the environment, the file.
        let registry_tls = match (self.tls_cert, self.tls_key) {
            (Some(certificate), Some(key)) => Some((certificate, key)),
            (None, None) => None,
            (Some(_), None) => {
                return Err(ConfigError::TlsHalf { given: "tls-cert", missing: "tls-key" });
            }
            (None, Some(_)) => {
                return Err(ConfigError::TlsHalf { given: "tls-key", missing: "tls-cert" });
            }
        };
        for (i, (first, addr)) in doors.iter().enumerate() {
            if let Some((second, _)) =
                doors[i + 1..].iter().find(|(_, other)| other == addr && addr.port() != 0)
            {
                return Err(ConfigError::SameDoor { first, second, addr: *addr });
            }
            if !addr.ip().is_loopback() && advertise.is_empty() {
                return Err(ConfigError::AdvertiseMissing { door: first, addr: *addr });
            }
        }
        let advertise =
            if advertise.is_empty() { vec![listen.ip().to_string()] } else { advertise };
        let bounded = |value: u64, low, high, option, bounds| {
            if (low..=high).contains(&value) {
                Ok(value)
            } else {
                Err(ConfigError::OutOfBounds { option, bounds })
            }
        };
        let ping = bounded(self.ping_seconds.unwrap_or(10), 1, 3600, "ping-seconds", "1 to 3600")?;
        let idle =
            bounded(self.idle_seconds.unwrap_or(3 * ping), 2, 7200, "idle-seconds", "2 to 7200")?;
        if idle <= ping {
            return Err(ConfigError::OutOfBounds {
                option: "idle-seconds",
                bounds: "greater than ping-seconds",
            });
        }
        let min_free_percent = self.min_free_percent.unwrap_or(10);
        bounded(min_free_percent.into(), 0, 90, "min-free-percent", "0 to 90")?;
        let grace = self.rekey_grace_days.unwrap_or(90);
        bounded(grace, 0, 3650, "rekey-grace-days", "0 to 3650")?;
        let ballast = self.ballast_mib.unwrap_or(256);
        bounded(ballast, 0, 1 << 20, "ballast-mib", "0 to 1048576")?;
        let log = self.log.unwrap_or_else(|| "info".to_owned());
        if let Err(source) = tracing_subscriber::EnvFilter::try_new(&log) {
            return Err(ConfigError::Log { text: log, source });
        }
        Ok(Settings {
            data_dir: self.data_dir.unwrap_or_else(|| PathBuf::from("/var/lib/berth")),
            listen,
            registry_listen,
            gateway_listen,
            page_listen,
            advertise,
            registry_tls,
            log_format: self.log_format.unwrap_or(LogFormat::Text),
            log,
            ballast_bytes: ballast << 20,
            min_free_percent,
            ping: Duration::from_secs(ping),
            idle: Duration::from_secs(idle),
            rekey_grace: Duration::from_secs(grace * 86_400),
            onnx_runtime: self.onnx_runtime.unwrap_or_else(|| "runtimes/onnx:latest".to_owned()),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flag_wins_over_the_file_and_the_file_over_the_default() {
        let file: Options = toml::from_str("ping-seconds = 7\nidle-seconds = 40").unwrap();
        let flags = Options { ping_seconds: Some(3), ..Options::default() };
        let settings = flags.over(file).settle().unwrap();
        assert_eq!(settings.ping, Duration::from_secs(3));
        assert_eq!(settings.idle, Duration::from_secs(40));
        assert_eq!(settings.min_free_percent, 10);
    }

    #[test]
    fn an_unknown_key_is_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("berthd.toml");
        std::fs::write(&path, "data-dri = \"/x\"\n").unwrap();
        let error = Options::from_file(&path).unwrap_err();
        let text = crate::error::Chain(&error).to_string();
        assert!(text.contains("data-dri") && text.contains("data-dir"), "{text}");
    }

    #[test]
    fn listening_off_loopback_needs_a_name_to_be_told() {
        let open = Options { listen: Some("0.0.0.0:7443".parse().unwrap()), ..Options::default() };
        assert!(matches!(
            open.clone().settle(),
            Err(ConfigError::AdvertiseMissing { door: "--listen", .. })
        ));
        let named = Options { advertise: Some(vec!["berth.example".into()]), ..open };
        assert_eq!(named.settle().unwrap().advertise, ["berth.example"]);
    }

    #[test]
    fn what_is_told_is_a_name_or_an_address_without_a_port() {
        let told = |text: &str| {
            let advertise = Some(vec!["berth.example".to_owned(), text.to_owned()]);
            Options { advertise, ..Options::default() }.settle().map(|settings| settings.advertise)
        };
        for good in ["berth-1.example.org", "localhost", "192.0.2.7", "2001:db8::7"] {
            assert_eq!(told(good).unwrap()[1], good);
        }
        for bad in [
            "",
            "berth.example.org:7443",
            "192.0.2.7:7443",
            "[2001:db8::7]",
            "https://berth.example.org",
            "a b",
        ] {
            let error = told(bad).unwrap_err();
            assert!(error.to_string().contains(&format!("--advertise \"{bad}\"")), "{error}");
        }
    }

    #[test]
    fn a_certificate_and_its_key_may_come_from_two_places_but_not_one_alone() {
        /// A command line with the options of this file, as `berthd` has them.
        #[derive(clap::Parser)]
        struct Flags {
            #[command(flatten)]
            options: Options,
        }
        let settle = |flags: &[&str], file: &str| {
            let flags = <Flags as clap::Parser>::try_parse_from(flags).unwrap().options;
            flags.over(toml::from_str(file).unwrap()).settle()
        };
        let flag = ["berthd", "--tls-cert", "flag.crt"];
        let both = settle(&flag, "tls-cert = 'file.crt'\ntls-key = 'file.key'").unwrap();
        assert_eq!(both.registry_tls, Some(("flag.crt".into(), "file.key".into())));
        let half = |flags: &[&str], file| match settle(flags, file) {
            Err(ConfigError::TlsHalf { given, missing }) => (given, missing),
            other => panic!("{other:?}"),
        };
        assert_eq!(half(&flag, ""), ("tls-cert", "tls-key"));
        assert_eq!(half(&["berthd"], "tls-cert = 'file.crt'"), ("tls-cert", "tls-key"));
        assert_eq!(half(&["berthd"], "tls-key = 'file.key'"), ("tls-key", "tls-cert"));
    }

    #[test]
    fn a_log_that_is_not_understood_is_refused_and_not_taken_for_another() {
        let log = |text: &str| Options { log: Some(text.into()), ..Options::default() }.settle();
        assert_eq!(log("berth_server=debug,info").unwrap().log, "berth_server=debug,info");
        assert!(matches!(log("berth_server=lots"), Err(ConfigError::Log { .. })));
    }

    #[test]
    fn two_doors_on_one_address_are_refused_but_not_two_free_ports() {
        let addr: SocketAddr = "127.0.0.1:7443".parse().unwrap();
        let same = Options { page_listen: Some(addr), ..Options::default() };
        assert!(matches!(same.settle(), Err(ConfigError::SameDoor { .. })));
        let free: SocketAddr = "127.0.0.1:0".parse().unwrap();
        let any = Options { page_listen: Some(free), listen: Some(free), ..Options::default() };
        assert!(any.settle().is_ok());
    }
}
