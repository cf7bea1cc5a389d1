//! Tokens and registrants: what changes them, as pure functions. Time is an argument.

use std::{
    collections::{BTreeMap, HashMap},
    time::{Duration, SystemTime},
};

use sha2::{Digest as _, Sha256};
use subtle::ConstantTimeEq as _;

use super::{Scope, Secret, TokenId};

/// Tokens that can exist at once.
const MAX_TOKENS: usize = 1_000;

/// Registrants that can exist at once, revoked ones included.
const MAX_REGISTRANTS: usize = 20_000;

/// How long a token that has expired is remembered, to say so.
const EXPIRED_TOKEN_MEMORY: Duration = Duration::from_secs(24 * 60 * 60);

/// How long after its end a certificate may still be renewed.
pub(super) const RENEWAL_GRACE: Duration = Duration::from_secs(7 * 24 * 60 * 60);

/// How long after the end of its last certificate a registrant is remembered: until then it can keep its name by joining again,
/// and one that was revoked is known.
const REGISTRANT_MEMORY: Duration = Duration::from_secs(90 * 24 * 60 * 60);

/// How every user name of a registrant begins.
pub(super) const USER_PREFIX: &str = "gangplank:registrant:";

/// SHA-256 of a secret. The secret has 256 random bits, so nothing slower is needed.
pub(super) type SecretHash = [u8; 32];

pub(super) fn hash(secret: &[u8]) -> SecretHash {
    Sha256::digest(secret).into()
}

/// A token, without its secret.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Token {
    /// What may be done with it.
    pub scope: Scope,
    /// Who created it.
    pub created_by: String,
    /// When.
    pub created: SystemTime,
    /// From when on it is refused.
    pub expires: SystemTime,
    /// How often it may be used in all.
    pub uses: u32,
    /// How often it was used.
    pub used: u32,
    pub(super) secret: SecretHash,
}

/// A machine that joined.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JoinedRegistrant {
    /// What it may do.
    pub scope: Scope,
    /// What it called itself.
    pub host: String,
    /// With which token it joined.
    pub token: TokenId,
    /// When.
    pub joined: SystemTime,
    /// When its last certificate ends.
    pub expires: SystemTime,
    /// When it was revoked.
    pub revoked: Option<SystemTime>,
}

/// Why a token is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TokenRefused {
    /// No such token, or another secret.
    #[error("the token is unknown: it was mistyped, revoked, or is of another server")]
    Unknown,
    /// Too old.
    #[error("the token has expired: create another")]
    Expired,
    /// No uses are left.
    #[error("the token was used already: create another")]
    Used,
}

/// No more can be kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Full {
    /// Too many tokens.
    #[error("there are {MAX_TOKENS} tokens, and no more can be: revoke some")]
    Tokens,
    /// Too many registrants.
    #[error("there are {MAX_REGISTRANTS} registrants, and no more can be")]
    Registrants,
}

/// All of them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct JoiningState {
    pub(super) tokens: BTreeMap<TokenId, Token>,
    /// By user name.
    pub(super) registrants: HashMap<String, JoinedRegistrant>,
}

impl JoiningState {
    /// Forgets what has no meaning any more.
    pub(super) fn purge(&mut self, now: SystemTime) {
        self.tokens.retain(|_, token| now < token.expires + EXPIRED_TOKEN_MEMORY);
        self.registrants.retain(|_, registrant| now < registrant.expires + REGISTRANT_MEMORY);
    }

    pub(super) fn add_token(&mut self, id: TokenId, token: Token) -> Result<(), Full> {
        if self.tokens.len() >= MAX_TOKENS {
            return Err(Full::Tokens);
        }
        self.tokens.insert(id, token);
        Ok(())
    }

    /// The token with this secret, if it may be used now. Whoever does not know the secret learns nothing of the token.
    pub(super) fn check_token(&self, id: TokenId, secret: &[u8], now: SystemTime) -> Result<&Token, TokenRefused> {
        let token = self.tokens.get(&id);
        // Compared for an unknown token, too, so that the time of the answer does not tell it from a known one.
        let expected = token.map_or_else(|| hash(Secret::generate().expose()), |token| token.secret);
        let equal = bool::from(hash(secret).ct_eq(&expected));
        match token {
            Some(token) if equal && now >= token.expires => Err(TokenRefused::Expired),
            Some(token) if equal && token.used >= token.uses => Err(TokenRefused::Used),
            Some(token) if equal => Ok(token),
            _ => Err(TokenRefused::Unknown),
        }
    }

    /// Uses the token once for a registrant, who may be known already.
    pub(super) fn add_registrant(&mut self, user: String, registrant: JoinedRegistrant) -> Result<(), Full> {
        if self.registrants.len() >= MAX_REGISTRANTS && !self.registrants.contains_key(&user) {
            return Err(Full::Registrants);
        }
        if let Some(token) = self.tokens.get_mut(&registrant.token) {
            token.used += 1;
        }
        self.registrants.insert(user, registrant);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::joining::ScopeSpec;

    const TTL: Duration = Duration::from_secs(3600);

    fn now() -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000)
    }

    fn scope() -> Scope {
        Scope::parse(&ScopeSpec { namespace: "shop".into(), ..ScopeSpec::default() }).expect("valid")
    }

    fn token(secret: &Secret) -> Token {
        let (created, expires) = (now(), now() + TTL);
        let secret = hash(secret.expose());
        Token { scope: scope(), created_by: "ada".into(), created, expires, uses: 1, used: 0, secret }
    }

    fn registrant(token: TokenId) -> JoinedRegistrant {
        let expires = now() + 24 * TTL;
        JoinedRegistrant { scope: scope(), host: "vm".into(), token, joined: now(), expires, revoked: None }
    }

    #[test]
    fn token_is_good_for_its_secret_its_time_and_its_uses() {
        let (mut state, id, secret) = (JoiningState::default(), TokenId::generate(), Secret::generate());
        state.add_token(id, token(&secret)).expect("there is room");
        let check = |state: &JoiningState, secret: &[u8], at| state.check_token(id, secret, at).map(drop);
        assert_eq!(check(&state, secret.expose(), now()), Ok(()));
        assert_eq!(check(&state, secret.expose(), now() + TTL), Err(TokenRefused::Expired));
        for wrong in [&[][..], &[0; 32], Secret::generate().expose(), &secret.expose()[1..]] {
            assert_eq!(check(&state, wrong, now()), Err(TokenRefused::Unknown));
            assert_eq!(check(&state, wrong, now() + TTL), Err(TokenRefused::Unknown), "it tells nothing");
        }
        assert_eq!(state.check_token(TokenId::generate(), secret.expose(), now()), Err(TokenRefused::Unknown));
        state.add_registrant("a".into(), registrant(id)).expect("there is room");
        assert_eq!(check(&state, secret.expose(), now()), Err(TokenRefused::Used));
    }

    #[test]
    fn numbers_are_bounded_and_the_past_is_forgotten() {
        let (mut state, secret) = (JoiningState::default(), Secret::generate());
        for _ in 0..MAX_TOKENS {
            state.add_token(TokenId::generate(), token(&secret)).expect("there is room");
        }
        assert_eq!(state.add_token(TokenId::generate(), token(&secret)), Err(Full::Tokens));
        for number in 0..MAX_REGISTRANTS {
            state.add_registrant(number.to_string(), registrant(TokenId::generate())).expect("there is room");
        }
        assert_eq!(state.add_registrant("one more".into(), registrant(TokenId::generate())), Err(Full::Registrants));
        state.purge(now() + TTL);
        assert_eq!((state.tokens.len(), state.registrants.len()), (MAX_TOKENS, MAX_REGISTRANTS));
        state.purge(now() + TTL + EXPIRED_TOKEN_MEMORY);
        assert_eq!((state.tokens.len(), state.registrants.len()), (0, MAX_REGISTRANTS));
        state.purge(now() + 24 * TTL + REGISTRANT_MEMORY);
        assert_eq!(state.registrants.len(), 0);
    }
}
