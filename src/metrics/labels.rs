//! Labels whose values are a closed set, and families with one series for each value.
//!
//! [`label_enum!`] writes the enum and the list of its values from one declaration, so that no
//! value can be missing from the list; a family makes every series when it is registered, so that
//! each is there at 0 before its first event, and an observation is one atomic addition.

use std::{fmt, sync::atomic::AtomicU64};

use prometheus_client::{
    encoding::EncodeMetric,
    metrics::{MetricType, TypedMetric, counter::Counter, family::Family, gauge::Gauge},
    registry::Registry,
};

/// One label with a closed set of values.
pub trait LabelEnum: Copy + fmt::Debug + Send + Sync + 'static {
    /// Every value, in the order of [`LabelEnum::index`].
    const ALL: &'static [Self];

    /// The value as it is exposed.
    fn as_str(self) -> &'static str;

    /// The position in [`LabelEnum::ALL`].
    fn index(self) -> usize;
}

/// Declares an enum and implements [`LabelEnum`] for it: `Variant => "value"`.
macro_rules! label_enum {
    ($(#[$attribute:meta])* $visibility:vis enum $name:ident {
        $($(#[$variant_attribute:meta])* $variant:ident => $text:literal),+ $(,)?
    }) => {
        $(#[$attribute])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        $visibility enum $name {
            $($(#[$variant_attribute])* $variant,)+
        }

        impl $crate::metrics::LabelEnum for $name {
            const ALL: &'static [Self] = &[$(Self::$variant),+];

            fn as_str(self) -> &'static str {
                match self {
                    $(Self::$variant => $text,)+
                }
            }

            fn index(self) -> usize {
                self as usize
            }
        }
    };
}
pub(crate) use label_enum;

/// What a family is indexed by: one [`LabelEnum`], or a pair of them.
pub trait LabelValues: Copy + 'static {
    /// The names of the labels.
    type Names: Copy;

    /// Every combination, in the order of [`LabelValues::position`].
    fn all() -> Vec<Self>;

    /// The position in [`LabelValues::all`].
    fn position(self) -> usize;

    /// Names and values, as the encoder takes them.
    fn labels(self, names: Self::Names) -> Vec<(&'static str, &'static str)>;
}

impl<E: LabelEnum> LabelValues for E {
    type Names = &'static str;

    fn all() -> Vec<Self> {
        E::ALL.to_vec()
    }

    fn position(self) -> usize {
        self.index()
    }

    fn labels(self, name: Self::Names) -> Vec<(&'static str, &'static str)> {
        vec![(name, self.as_str())]
    }
}

impl<A: LabelEnum, B: LabelEnum> LabelValues for (A, B) {
    type Names = (&'static str, &'static str);

    fn all() -> Vec<Self> {
        A::ALL.iter().flat_map(|&a| B::ALL.iter().map(move |&b| (a, b))).collect()
    }

    fn position(self) -> usize {
        self.0.index() * B::ALL.len() + self.1.index()
    }

    fn labels(self, names: Self::Names) -> Vec<(&'static str, &'static str)> {
        vec![(names.0, self.0.as_str()), (names.1, self.1.as_str())]
    }
}

/// A metric for each value of `L`.
#[derive(Debug)]
pub struct EnumFamily<L, M> {
    series: Box<[M]>,
    of: std::marker::PhantomData<fn(L)>,
}

/// A counter for each value of `L`.
pub type EnumCounter<L> = EnumFamily<L, Counter>;

/// A gauge for each value of `L`.
pub type EnumGauge<L> = EnumFamily<L, Gauge<u64, AtomicU64>>;

impl<L, M> EnumFamily<L, M>
where
    L: LabelValues,
    M: Clone + Default + EncodeMetric + TypedMetric + fmt::Debug + Send + Sync + 'static,
{
    /// Makes every series and adds the family to `all` under `name`. The encoder adds `_total` to
    /// the name of a counter.
    pub(super) fn register(all: &mut Registry, name: &str, names: L::Names, help: &str) -> Self {
        // `Default` makes a histogram without buckets, which would count and show nothing.
        const { assert!(!matches!(M::TYPE, MetricType::Histogram), "a histogram needs its buckets") };
        let family = Family::<Vec<(&'static str, &'static str)>, M>::default();
        // In the order of `position`, so that `at` is an index and needs no lookup by label.
        let series = L::all().into_iter().map(|values| family.get_or_create_owned(&values.labels(names))).collect();
        all.register(name, help, family);
        Self { series, of: std::marker::PhantomData }
    }

    /// The series of `values`.
    pub fn at(&self, values: L) -> &M {
        &self.series[values.position()]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    label_enum! {
        enum Colour { Red => "red", Green => "green", Blue => "blue" }
    }
    label_enum! {
        enum Size { Small => "small", Large => "large" }
    }

    fn encoded(all: &Registry) -> String {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, all).expect("a String takes everything");
        text
    }

    #[test]
    fn every_value_has_a_series_before_its_first_event() {
        let mut all = Registry::default();
        let colours = EnumGauge::<Colour>::register(&mut all, "colours", "colour", "Colours");
        for (number, colour) in Colour::ALL.iter().enumerate().skip(1) {
            colours.at(*colour).set(number as u64);
        }
        let text = encoded(&all);
        for line in ["colours{colour=\"red\"} 0", "colours{colour=\"green\"} 1", "colours{colour=\"blue\"} 2"] {
            assert!(text.lines().any(|found| found == line), "no line {line:?} in\n{text}");
        }
    }

    #[test]
    fn pairs_of_labels_have_a_series_for_each_combination() {
        let mut all = Registry::default();
        let shirts =
            EnumCounter::<(Colour, Size)>::register(&mut all, "shirts", ("colour", "size"), "Shirts sold, by kind");
        let kinds = <(Colour, Size)>::all();
        assert_eq!(kinds.len(), 6);
        for (number, kind) in kinds.into_iter().enumerate() {
            assert_eq!(kind.position(), number);
            shirts.at(kind).inc_by(number as u64);
        }
        let text = encoded(&all);
        for (number, (colour, size)) in <(Colour, Size)>::all().into_iter().enumerate() {
            let line = format!("shirts_total{{colour=\"{}\",size=\"{}\"}} {number}", colour.as_str(), size.as_str());
            assert!(text.lines().any(|found| found == line), "no line {line:?} in\n{text}");
        }
    }
}
