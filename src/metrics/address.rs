//! Where the counters can be read.
//!
//! The invariant: an address is reached from this host alone, since whoever connects can read.

use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;

/// An address to listen on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// A unix socket, which only the server's user can connect to.
    Unix(PathBuf),
    /// A port of a loopback address.
    Tcp(SocketAddr),
}

/// Why a string is no address.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AddressError {
    /// It has neither form.
    #[error("expected unix:PATH, 127.0.0.1:PORT or [::1]:PORT")]
    Form,
    /// Other hosts could connect.
    #[error(
        "{0} can be reached from other hosts, and whoever connects can read: use 127.0.0.1, [::1] or \
         unix:PATH, with a proxy where others are to read"
    )]
    NotLoopback(SocketAddr),
}

impl FromStr for Address {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        if let Some(path) = text.strip_prefix("unix:") {
            return match path {
                "" => Err(AddressError::Form),
                path => Ok(Self::Unix(path.into())),
            };
        }
        let address: SocketAddr = text.parse().map_err(|_malformed| AddressError::Form)?;
        if address.ip().is_loopback() {
            Ok(Self::Tcp(address))
        } else {
            Err(AddressError::NotLoopback(address))
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Tcp(address) => address.fmt(f),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_of_this_host_are_accepted_and_others_refused() {
        for text in [
            "unix:/run/m.sock",
            "127.0.0.1:9100",
            "[::1]:0",
            "127.8.0.1:1",
        ] {
            assert_eq!(text.parse::<Address>().unwrap().to_string(), text);
        }
        for text in [
            "",
            "unix:",
            "/run/m.sock",
            "127.0.0.1",
            "localhost:9100",
            ":9100",
            "::1:9",
        ] {
            assert_eq!(text.parse::<Address>(), Err(AddressError::Form), "{text}");
        }
        for text in ["0.0.0.0:9100", "[::]:9100", "192.0.2.1:9100"] {
            let refused = text.parse::<Address>();
            assert!(
                matches!(refused, Err(AddressError::NotLoopback(_))),
                "{text}"
            );
        }
    }
}
