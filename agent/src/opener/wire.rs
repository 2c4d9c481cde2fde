// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The messages between an agent and its opener.
//!
//! Both are frames of [`pageferry_protocol::control::frame`]. A request is a frame whose first
//! descriptor is a socket for the answer; the others belong to the request. Its code is that of an
//! [`Op`]. The answer is a frame with the same code: an errno, 0 for success, and a sentence if the
//! error has one. With it comes a descriptor or, after a look-up, the addresses.
//!
//! The two may be of different versions after an upgrade of the agent, whose opener stays. So a
//! code keeps its meaning for ever, and an opener answers ENOSYS to one that it does not know.

use pageferry_protocol::control::codec::{DecodeError, Decoder, Encoder};
use rustix::fs::OFlags;
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

/// Longest path in bytes (`PATH_MAX`).
const MAX_PATH: usize = 4096;
/// Longest `HOST:PORT` in bytes.
const MAX_NAME: usize = 1024;
/// Most addresses of a name.
const MAX_ADDRESSES: usize = 256;

/// What the opener is asked to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Op {
    /// Remember what the descriptors name ([`super::named`]).
    Grant,
    /// Say whether the path would be opened.
    IsNamed { path: PathBuf, write: bool },
    /// `open`. Answered with the descriptor.
    Open { path: PathBuf, flags: u32, mode: u32 },
    /// Open the file of the descriptor once more. Answered with the new one.
    Reopen { flags: u32 },
    /// Give the file of the descriptor this name.
    Link { path: PathBuf },
    /// `renameat2`.
    Rename { from: PathBuf, to: PathBuf, flags: u32 },
    /// `unlink`.
    Unlink { path: PathBuf },
    /// Bind a UNIX stream socket, whose file gets the mode. Answered with the socket.
    BindUnix { path: PathBuf, mode: u32 },
    /// Connect a UNIX stream socket. Answered with the socket.
    ConnectUnix { path: PathBuf },
    /// Begin to connect a TCP socket. Answered with the socket.
    ConnectTcp { address: SocketAddr },
    /// Listen on the first address that can be bound. Answered with the socket.
    ListenTcp { addresses: Vec<SocketAddr> },
    /// Look `HOST:PORT` up. Answered with addresses.
    LookUp { name: String },
    /// Connect to the service manager, whose name must be that in the opener's environment.
    /// Answered with the socket.
    ConnectManager { name: PathBuf },
    /// Make a socket that listens, and its only connection. Answered with the two.
    ListeningPair,
    /// Remember what the descriptors name as long as the opener runs: the options of the agent name
    /// it.
    GrantForGood,
    /// Start a service of stores. Answered with a socket to it.
    StoreService,
    /// Open or make the base of an image. Answered with it, for the agent and for the VMM.
    Base { name: String, length: u64, reserved: u64 },
    /// Open a base, whose descriptor comes with it, to be read and written.
    BaseAgain,
}

impl fmt::Display for Op {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (does, path) = match self {
            Self::Grant | Self::GrantForGood => return formatter.write_str("take what was named"),
            Self::IsNamed { path, .. } | Self::Open { path, .. } => ("open", path),
            Self::Reopen { .. } => return formatter.write_str("open a file once more"),
            Self::Link { path } => ("make", path),
            Self::Rename { to, .. } => ("rename a file to", to),
            Self::Unlink { path } => ("remove", path),
            Self::BindUnix { path, .. } => ("make the socket", path),
            Self::ConnectUnix { path } | Self::ConnectManager { name: path } => {
                ("connect to", path)
            }
            Self::ConnectTcp { address } => return write!(formatter, "connect to {address}"),
            Self::ListenTcp { addresses } => return write!(formatter, "listen at {addresses:?}"),
            Self::LookUp { name } => return write!(formatter, "look up {name}"),
            Self::ListeningPair => return formatter.write_str("make a socket that listens"),
            Self::StoreService => return formatter.write_str("start the service of stores"),
            Self::Base { name, .. } => return write!(formatter, "open base {name}"),
            Self::BaseAgain => return formatter.write_str("open the base of a VMM"),
        };
        write!(formatter, "{does} {}", path.display())
    }
}

impl Op {
    /// What must exist for this to be done: a file, or the folder of one that is made.
    pub(super) fn needs(&self) -> Option<&Path> {
        match self {
            Self::Open { path, flags, .. }
                if !OFlags::from_bits_retain(*flags).contains(OFlags::CREATE) =>
            {
                Some(path)
            }
            Self::ConnectUnix { path } | Self::Unlink { path } => Some(path),
            Self::Open { path, .. }
            | Self::Link { path }
            | Self::BindUnix { path, .. }
            | Self::Rename { to: path, .. } => match path.parent()? {
                here if here.as_os_str().is_empty() => Some(Path::new(".")),
                folder => Some(folder),
            },
            _ => None,
        }
    }

    /// The code of its frame.
    pub(super) fn code(&self) -> u32 {
        match self {
            Self::Grant => 1,
            Self::IsNamed { .. } => 2,
            Self::Open { .. } => 3,
            Self::Reopen { .. } => 4,
            Self::Link { .. } => 5,
            Self::Rename { .. } => 6,
            Self::Unlink { .. } => 7,
            Self::BindUnix { .. } => 8,
            Self::ConnectUnix { .. } => 9,
            Self::ConnectTcp { .. } => 10,
            Self::ListenTcp { .. } => 11,
            Self::LookUp { .. } => 12,
            Self::ConnectManager { .. } => 13,
            Self::ListeningPair => 14,
            Self::GrantForGood => 15,
            Self::StoreService => 16,
            Self::Base { .. } => 17,
            Self::BaseAgain => 18,
        }
    }

    /// The body of its frame.
    pub(super) fn encode(&self) -> Vec<u8> {
        let body = Encoder::new();
        match self {
            Self::Grant
            | Self::GrantForGood
            | Self::ListeningPair
            | Self::StoreService
            | Self::BaseAgain => body,
            Self::IsNamed { path, write } => put_path(body, path).u8(u8::from(*write)),
            Self::Open { path, flags, mode } => put_path(body, path).u32(*flags).u32(*mode),
            Self::Reopen { flags } => body.u32(*flags),
            Self::Link { path }
            | Self::Unlink { path }
            | Self::ConnectManager { name: path }
            | Self::ConnectUnix { path } => put_path(body, path),
            Self::BindUnix { path, mode } => put_path(body, path).u32(*mode),
            Self::Rename { from, to, flags } => put_path(put_path(body, from), to).u32(*flags),
            Self::ConnectTcp { address } => put_addresses(body, &[*address]),
            Self::ListenTcp { addresses } => put_addresses(body, addresses),
            Self::LookUp { name } => body.text(name),
            Self::Base { name, length, reserved } => body.text(name).u64(*length).u64(*reserved),
        }
        .finish()
    }

    /// Reads a request. `None` if the code is not known.
    ///
    /// # Errors
    /// The field that is wrong.
    pub(super) fn decode(code: u32, body: &[u8]) -> Result<Option<Self>, DecodeError> {
        let mut body = Decoder::new(body);
        let op = match code {
            1 => Self::Grant,
            2 => {
                let path = take_path(&mut body)?;
                Self::IsNamed { path, write: body.u8("write")? != 0 }
            }
            3 => {
                let (path, flags) = (take_path(&mut body)?, body.u32("flags")?);
                Self::Open { path, flags, mode: body.u32("mode")? }
            }
            4 => Self::Reopen { flags: body.u32("flags")? },
            5 => Self::Link { path: take_path(&mut body)? },
            6 => {
                let (from, to) = (take_path(&mut body)?, take_path(&mut body)?);
                Self::Rename { from, to, flags: body.u32("flags")? }
            }
            7 => Self::Unlink { path: take_path(&mut body)? },
            8 => {
                let path = take_path(&mut body)?;
                Self::BindUnix { path, mode: body.u32("mode")? }
            }
            9 => Self::ConnectUnix { path: take_path(&mut body)? },
            10 => {
                let addresses = take_addresses(&mut body)?;
                let [address] = addresses[..] else {
                    let (field, value) = ("addresses", addresses.len() as u64);
                    return Err(DecodeError::InvalidValue { field, value, allowed: "1" });
                };
                Self::ConnectTcp { address }
            }
            11 => Self::ListenTcp { addresses: take_addresses(&mut body)? },
            12 => Self::LookUp { name: body.text("name", MAX_NAME)?.to_owned() },
            13 => Self::ConnectManager { name: take_path(&mut body)? },
            14 => Self::ListeningPair,
            15 => Self::GrantForGood,
            16 => Self::StoreService,
            17 => {
                let name = body.text("name", MAX_NAME)?.to_owned();
                Self::Base { name, length: body.u64("length")?, reserved: body.u64("reserved")? }
            }
            18 => Self::BaseAgain,
            _ => return Ok(None),
        };
        body.finish()?;
        Ok(Some(op))
    }
}

/// The answer of the opener, without its descriptor.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Reply {
    /// 0, or the errno.
    pub(super) errno: i32,
    /// What else is known of the error; empty if nothing is.
    pub(super) sentence: String,
    /// What a look-up has found.
    pub(super) addresses: Vec<SocketAddr>,
}

impl Reply {
    /// The body of its frame.
    pub(super) fn encode(&self) -> Vec<u8> {
        let body = Encoder::new().u32(self.errno.cast_unsigned());
        let sentence = pageferry_protocol::control::codec::truncate_text(&self.sentence, MAX_NAME);
        put_addresses(body.text(sentence), &self.addresses).finish()
    }

    /// Reads an answer.
    ///
    /// # Errors
    /// The field that is wrong.
    pub(super) fn decode(body: &[u8]) -> Result<Self, DecodeError> {
        let mut body = Decoder::new(body);
        let errno = body.u32("errno")?.cast_signed();
        let sentence = body.text("sentence", MAX_NAME)?.to_owned();
        let addresses = take_addresses(&mut body)?;
        body.finish()?;
        Ok(Self { errno, sentence, addresses })
    }
}

fn put_path(body: Encoder, path: &Path) -> Encoder {
    let bytes = path.as_os_str().as_bytes();
    body.u32(bytes.len() as u32).bytes(bytes)
}

fn take_path(body: &mut Decoder<'_>) -> Result<PathBuf, DecodeError> {
    let length = body.u32("path")?;
    if length == 0 || length as usize > MAX_PATH {
        let (field, value) = ("path", length.into());
        return Err(DecodeError::InvalidValue { field, value, allowed: "1 to 4096 bytes" });
    }
    let bytes = body.bytes("path", length as usize)?.to_vec();
    Ok(std::ffi::OsString::from_vec(bytes).into())
}

fn put_addresses(body: Encoder, addresses: &[SocketAddr]) -> Encoder {
    let addresses = &addresses[..addresses.len().min(MAX_ADDRESSES)];
    addresses.iter().fold(body.u32(addresses.len() as u32), |body, address| match address.ip() {
        IpAddr::V4(ip) => body.u8(4).u16(address.port()).bytes(&ip.octets()),
        IpAddr::V6(ip) => {
            let scope = if let SocketAddr::V6(address) = address { address.scope_id() } else { 0 };
            body.u8(6).u16(address.port()).bytes(&ip.octets()).u32(scope)
        }
    })
}

fn take_addresses(body: &mut Decoder<'_>) -> Result<Vec<SocketAddr>, DecodeError> {
    let count = body.u32("addresses")?;
    if count as usize > MAX_ADDRESSES {
        let (field, value) = ("addresses", count.into());
        return Err(DecodeError::InvalidValue { field, value, allowed: "at most 256" });
    }
    let mut addresses = Vec::new();
    for _ in 0..count {
        let (family, port) = (body.u8("family")?, body.u16("port")?);
        addresses.push(match family {
            4 => (body.array::<4>("address")?, port).into(),
            6 => {
                let ip = body.array::<16>("address")?.into();
                std::net::SocketAddrV6::new(ip, port, 0, body.u32("scope")?).into()
            }
            family => {
                let (field, value) = ("family", family.into());
                return Err(DecodeError::InvalidValue { field, value, allowed: "4 or 6" });
            }
        });
    }
    Ok(addresses)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn ops() -> impl Strategy<Value = Op> {
        let path = || "/[a-z/]{1,40}".prop_map(PathBuf::from);
        let address = || {
            prop_oneof![
                any::<([u8; 4], u16)>().prop_map(SocketAddr::from),
                any::<([u8; 16], u16)>().prop_map(SocketAddr::from)
            ]
        };
        prop_oneof![
            Just(Op::Grant),
            (path(), any::<bool>()).prop_map(|(path, write)| Op::IsNamed { path, write }),
            (path(), any::<u32>(), any::<u32>()).prop_map(|(path, flags, mode)| Op::Open {
                path,
                flags,
                mode
            }),
            any::<u32>().prop_map(|flags| Op::Reopen { flags }),
            path().prop_map(|path| Op::Link { path }),
            (path(), path(), any::<u32>()).prop_map(|(from, to, flags)| Op::Rename {
                from,
                to,
                flags
            }),
            path().prop_map(|path| Op::Unlink { path }),
            (path(), any::<u32>()).prop_map(|(path, mode)| Op::BindUnix { path, mode }),
            path().prop_map(|path| Op::ConnectUnix { path }),
            address().prop_map(|address| Op::ConnectTcp { address }),
            proptest::collection::vec(address(), 0..5)
                .prop_map(|addresses| Op::ListenTcp { addresses }),
            "[a-z:0-9]{0,40}".prop_map(|name| Op::LookUp { name }),
            path().prop_map(|name| Op::ConnectManager { name }),
            Just(Op::ListeningPair),
            Just(Op::GrantForGood),
            Just(Op::StoreService),
            Just(Op::BaseAgain),
            ("[0-9a-f]{0,40}", any::<[u64; 2]>()).prop_map(|(name, [length, reserved])| Op::Base {
                name,
                length,
                reserved
            }),
        ]
    }

    proptest! {
        #[test]
        fn every_request_survives_the_wire(op in ops()) {
            prop_assert_eq!(Op::decode(op.code(), &op.encode()).unwrap(), Some(op));
        }

        #[test]
        fn any_bytes_are_read_or_refused(code in 0..19u32, body in any::<Vec<u8>>()) {
            let _ = Op::decode(code, &body);
            let _ = Reply::decode(&body);
        }
    }

    #[test]
    fn an_answer_survives_the_wire() {
        let addresses = vec!["1.2.3.4:5".parse().unwrap(), "[fe80::1%3]:5".parse().unwrap()];
        let reply = Reply { errno: 13, sentence: "no".into(), addresses };
        assert_eq!(Reply::decode(&reply.encode()).unwrap(), reply);
    }
}
