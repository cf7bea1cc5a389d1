//! A token or a registrant as a Secret.
//!
//! | Secret | type | key | holds |
//! |---|---|---|---|
//! | `gangplank-token-ID` | `gangplank.dev/token` | `token.json` | the token, with the SHA-256 of its secret |
//! | | | `last-use` | what its last use is known by |
//! | `gangplank-registrant-NAME` | `gangplank.dev/registrant` | `registrant.json` | the registrant |
//!
//! Secrets and not objects of another kind: whoever may change one decides who has an identity, and few may write Secrets.

use std::collections::BTreeMap;

use super::super::{JoinedRegistrant, Token, TokenId, format, state::USER_PREFIX};
use crate::kubernetes::secrets::{NewSecret, SharedSecret};

/// A token; its name follows.
pub(super) const TOKEN: NewSecret<'static> =
    NewSecret { name: "gangplank-token-", kind: "token", type_: "gangplank.dev/token" };

/// A registrant; its name follows.
pub(super) const REGISTRANT: NewSecret<'static> =
    NewSecret { name: "gangplank-registrant-", kind: "registrant", type_: "gangplank.dev/registrant" };

const TOKEN_KEY: &str = "token.json";
const LAST_USE_KEY: &str = "last-use";
const REGISTRANT_KEY: &str = "registrant.json";

/// What a Secret holds.
pub(super) type SecretData = BTreeMap<String, Vec<u8>>;

/// A token, and by what its last use is known.
#[derive(Debug)]
pub(super) struct SharedToken {
    pub(super) token: Token,
    pub(super) last_use: String,
}

impl SharedToken {
    /// The token of this name in a Secret: a copy under another name is none.
    pub(super) fn read(id: TokenId, secret: &SharedSecret) -> Result<Self, String> {
        let (named, token) = format::decode_token(value(secret, TOKEN_KEY)?)?;
        if named != id {
            return Err(format!("it holds the token {named}"));
        }
        let last_use = secret.data.get(LAST_USE_KEY).map(|text| String::from_utf8_lossy(text).into_owned());
        Ok(Self { token, last_use: last_use.unwrap_or_default() })
    }

    pub(super) fn data(&self, id: TokenId) -> SecretData {
        let token = (TOKEN_KEY.to_owned(), format::encode_token(id, &self.token));
        BTreeMap::from([token, (LAST_USE_KEY.to_owned(), self.last_use.clone().into_bytes())])
    }
}

/// The registrant of this name in a Secret.
pub(super) fn read_registrant(user: &str, secret: &SharedSecret) -> Result<JoinedRegistrant, String> {
    let (named, registrant) = format::decode_registrant(value(secret, REGISTRANT_KEY)?)?;
    if named == user { Ok(registrant) } else { Err(format!("it holds the registrant {named:?}")) }
}

pub(super) fn registrant_data(user: &str, registrant: &JoinedRegistrant) -> SecretData {
    BTreeMap::from([(REGISTRANT_KEY.to_owned(), format::encode_registrant(user, registrant))])
}

fn value<'a>(secret: &'a SharedSecret, key: &str) -> Result<&'a [u8], String> {
    secret.data.get(key).map(Vec::as_slice).ok_or_else(|| format!("it has no {key}"))
}

pub(super) fn token_name(id: TokenId) -> String {
    format!("{}{id}", TOKEN.name)
}

/// The token that a Secret of this name is of.
pub(super) fn token_id(name: &str) -> Option<TokenId> {
    name.strip_prefix(TOKEN.name)?.parse().ok()
}

/// The Secret of a registrant; `None` for a user that no registrant has.
pub(super) fn registrant_name(user: &str) -> Option<String> {
    let own = user.strip_prefix(USER_PREFIX).filter(|own| is_own_name(own))?;
    Some(format!("{}{own}", REGISTRANT.name))
}

/// The user that a Secret of this name is of.
pub(super) fn user(name: &str) -> Option<String> {
    let own = name.strip_prefix(REGISTRANT.name).filter(|own| is_own_name(own))?;
    Some(format!("{USER_PREFIX}{own}"))
}

/// Only what the server itself gives: the name is a part of a path.
fn is_own_name(own: &str) -> bool {
    own.len() == 2 * super::super::NAME_BYTES && own.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_that_the_server_gives_become_names_of_secrets() {
        let user_name = format!("{USER_PREFIX}0a1b2c3d4e5f");
        assert_eq!(registrant_name(&user_name).as_deref(), Some("gangplank-registrant-0a1b2c3d4e5f"));
        assert_eq!(user("gangplank-registrant-0a1b2c3d4e5f"), Some(user_name));
        for bad in ["", "0a1b", "0a1b2c3d4e5g", "../../secrets", "0A1B2C3D4E5F"] {
            assert_eq!(registrant_name(&format!("{USER_PREFIX}{bad}")), None, "{bad}");
            assert_eq!(user(&format!("gangplank-registrant-{bad}")), None, "{bad}");
        }
        assert_eq!(registrant_name("gangplank"), None);
        let id = TokenId::generate();
        assert_eq!(token_id(&token_name(id)), Some(id));
        assert_eq!(token_id("gangplank-token-x"), None);
    }
}
