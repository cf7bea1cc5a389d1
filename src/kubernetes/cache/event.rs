//! The events of a watch.

/// What a list or watch reports of objects of one kind, as kube's `watcher::Event`.
#[derive(Debug, Clone, PartialEq)]
pub(in crate::kubernetes) enum ObjectEvent<T> {
    /// A list begins: each object follows as [`InitApply`](Self::InitApply).
    Init,
    /// An object of the list.
    InitApply(T),
    /// The list is complete, as of this resourceVersion. What it did not name is gone.
    InitDone(String),
    /// The object was created or changed.
    Apply(T),
    /// The object was deleted, or left the selector of the watch.
    Delete(T),
}

impl<T> ObjectEvent<T> {
    /// The object, if the event is about one.
    pub(in crate::kubernetes) fn object(&self) -> Option<&T> {
        match self {
            Self::InitApply(object) | Self::Apply(object) | Self::Delete(object) => Some(object),
            Self::Init | Self::InitDone(_) => None,
        }
    }

    /// The same event about what `map` makes of the object; `None` where `map` returns `None`.
    pub(in crate::kubernetes) fn filter_map<U>(&self, map: impl FnOnce(&T) -> Option<U>) -> Option<ObjectEvent<U>> {
        match self {
            Self::Init => Some(ObjectEvent::Init),
            Self::InitDone(version) => Some(ObjectEvent::InitDone(version.clone())),
            Self::InitApply(object) => map(object).map(ObjectEvent::InitApply),
            Self::Apply(object) => map(object).map(ObjectEvent::Apply),
            Self::Delete(object) => map(object).map(ObjectEvent::Delete),
        }
    }
}
