//! The text of a join token: where the server is, how to know it, and a secret.
//!
//! `gp1.` and, in base64url without padding: 8 bytes of id, 32 of secret, 32 of the hash of the CA's key, the addresses with
//! commas, and 4 bytes of CRC32C of all before, which finds what was not copied whole.

use std::{fmt, str::FromStr};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};

use crate::{
    identity::{PublicKeyHash, random},
    model::{ServerAddress, hex},
};

/// How every token begins. The number grows with the form.
const PREFIX: &str = "gp1.";

/// Bytes of a token's id.
const ID_BYTES: usize = 8;

/// Bytes of the secret: nobody guesses it.
const SECRET_BYTES: usize = 32;

const HASH_BYTES: usize = 32;

const CHECKSUM_BYTES: usize = 4;

/// Most characters of a token: eight addresses of 253 and their ports take some 2 900.
const MAX_TOKEN: usize = 4096;

/// The secret of a token. Its Debug output does not have it.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret([u8; SECRET_BYTES]);

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}

impl Secret {
    /// A new one.
    #[must_use]
    pub fn generate() -> Self {
        Self(random())
    }

    /// The bytes, to be sent to a server that was verified.
    #[must_use]
    pub const fn expose(&self) -> &[u8] {
        &self.0
    }
}

/// A join token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JoinToken {
    /// Its id, which is no secret: 16 hexadecimal digits.
    pub id: TokenId,
    /// Its secret.
    pub secret: Secret,
    /// By which the server is known.
    pub ca: PublicKeyHash,
    /// Where the server is; one at least.
    pub addresses: Vec<ServerAddress>,
}

/// The id of a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TokenId([u8; ID_BYTES]);

impl TokenId {
    /// A new one.
    #[must_use]
    pub fn generate() -> Self {
        Self(random())
    }
}

impl fmt::Display for TokenId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(&self.0))
    }
}

impl FromStr for TokenId {
    type Err = InvalidToken;

    fn from_str(text: &str) -> Result<Self, InvalidToken> {
        super::from_hex(text).map(Self).ok_or(InvalidToken("the id of a token has 16 hexadecimal digits"))
    }
}

/// Why a text is not a token. Never a part of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct InvalidToken(&'static str);

impl fmt::Display for JoinToken {
    /// The text of the token, with its secret.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut bytes = [&self.id.0[..], &self.secret.0, &self.ca].concat();
        bytes.extend_from_slice(ServerAddress::list(&self.addresses, ",").as_bytes());
        bytes.extend_from_slice(&crc32c::crc32c(&bytes).to_be_bytes());
        write!(f, "{PREFIX}{}", URL_SAFE_NO_PAD.encode(&bytes))
    }
}

impl FromStr for JoinToken {
    type Err = InvalidToken;

    fn from_str(text: &str) -> Result<Self, InvalidToken> {
        let incomplete = InvalidToken("the token is not whole, or mistyped: copy it again");
        let body = text.trim().strip_prefix(PREFIX);
        let body = body.ok_or(InvalidToken("not a join token: one begins with gp1."))?;
        if body.len() > MAX_TOKEN {
            return Err(incomplete);
        }
        let bytes = URL_SAFE_NO_PAD.decode(body).map_err(|_| incomplete)?;
        let (bytes, checksum) = bytes.split_last_chunk::<CHECKSUM_BYTES>().ok_or(incomplete)?;
        if crc32c::crc32c(bytes).to_be_bytes() != *checksum {
            return Err(incomplete);
        }
        let (id, rest) = bytes.split_first_chunk::<ID_BYTES>().ok_or(incomplete)?;
        let (secret, rest) = rest.split_first_chunk::<SECRET_BYTES>().ok_or(incomplete)?;
        let (ca, addresses) = rest.split_first_chunk::<HASH_BYTES>().ok_or(incomplete)?;
        let addresses = ServerAddress::parse_list(std::str::from_utf8(addresses).map_err(|_| incomplete)?);
        if addresses.is_empty() {
            return Err(InvalidToken("the token names no server"));
        }
        Ok(Self { id: TokenId(*id), secret: Secret(*secret), ca: *ca, addresses })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token() -> JoinToken {
        JoinToken {
            id: TokenId([1; ID_BYTES]),
            secret: Secret([2; SECRET_BYTES]),
            ca: [3; HASH_BYTES],
            addresses: ServerAddress::parse_list("10.0.0.1:9080,[2001:db8::1]:9080,gp.example.com:1"),
        }
    }

    #[test]
    fn token_is_one_word_and_parses() {
        let text = token().to_string();
        assert!(text.chars().all(|c| c.is_ascii_alphanumeric() || "._-".contains(c)), "{text}");
        assert_eq!(text.parse(), Ok(token()));
        assert_eq!(format!(" {text}\n").parse(), Ok(token()));
        assert_eq!(token().id.to_string(), "0101010101010101");
        assert_eq!("0101010101010101".parse(), Ok(token().id));
        assert!("01".parse::<TokenId>().is_err());
    }

    #[test]
    fn token_that_is_not_whole_is_refused() {
        let text = token().to_string();
        for end in 0..text.len() {
            assert!(text[..end].parse::<JoinToken>().is_err(), "{end}");
        }
        let wrong = text.replace("gp1.A", "gp1.B");
        assert!(wrong != text && wrong.parse::<JoinToken>().is_err());
        assert!(format!("gp1.{}", "A".repeat(5000)).parse::<JoinToken>().is_err());
    }

    #[test]
    fn secret_is_in_no_debug_output() {
        let text = format!("{:?}", token());
        assert!(text.contains("Secret(…)") && !text.contains("2, 2"), "{text}");
    }
}
