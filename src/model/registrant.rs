//! Who registered an instance.

use std::{collections::HashSet, fmt, sync::Arc};

/// The user name of the identity that registered an instance, and alone may change it. Clones share the text: a million
/// instances of one registrant hold it once.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Registrant(Arc<str>);

/// A text is no user name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("registrant: must be a user name of 1 to {} bytes without control characters", Registrant::MAX_BYTES)]
pub struct RegistrantError;

impl Registrant {
    /// Most bytes of a user name: those of the longest SPIFFE ID (SPIFFE ID specification, §2.3).
    pub const MAX_BYTES: usize = 2048;

    /// Takes a user name.
    ///
    /// # Errors
    /// When it is empty, too long, or contains control characters.
    pub fn new(name: Arc<str>) -> Result<Self, RegistrantError> {
        if Self::is_name(&name) { Ok(Self(name)) } else { Err(RegistrantError) }
    }

    /// Whether `text` is one that logs and rules can hold.
    #[must_use]
    pub fn is_name(text: &str) -> bool {
        // Control characters would forge lines of the log.
        !text.is_empty() && text.len() <= Self::MAX_BYTES && !text.chars().any(char::is_control)
    }

    /// The name.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Registrant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Makes equal names of what is read share one allocation.
#[derive(Debug, Default)]
pub struct RegistrantPool(HashSet<Arc<str>>);

impl RegistrantPool {
    /// The registrant that `text` names; `None` if it is empty, which says that there is none.
    ///
    /// # Errors
    /// When it is no user name.
    pub fn get(&mut self, text: &str) -> Result<Option<Registrant>, RegistrantError> {
        if text.is_empty() {
            return Ok(None);
        }
        if let Some(known) = self.0.get(text) {
            return Ok(Some(Registrant(Arc::clone(known))));
        }
        let registrant = Registrant::new(text.into())?;
        self.0.insert(Arc::clone(&registrant.0));
        Ok(Some(registrant))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_logs_cannot_hold_are_refused() {
        for bad in ["a\nb", "\u{7f}", &"x".repeat(Registrant::MAX_BYTES + 1)] {
            assert_eq!(RegistrantPool::default().get(bad), Err(RegistrantError), "{bad:?}");
        }
        assert_eq!(RegistrantPool::default().get(""), Ok(None));
        assert!(Registrant::new("x".repeat(Registrant::MAX_BYTES).into()).is_ok());
    }

    #[test]
    fn equal_names_share_one_allocation() {
        let mut pool = RegistrantPool::default();
        let mut get = |text| pool.get(text).expect("valid").expect("a name");
        let (one, same, other) = (get("vm-1"), get("vm-1"), get("vm-2"));
        assert!(Arc::ptr_eq(&one.0, &same.0));
        assert_ne!(one, other);
    }
}
