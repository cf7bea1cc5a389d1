//! The DNS protocol numbers that gangplank names: record types and response codes. The one table of
//! each: lookups, answers and metrics all read it.

/// Declares an enum of assigned numbers with one catch-all variant, and its table.
macro_rules! assigned_numbers {
    (
        $(#[$meta:meta])*
        $name:ident { $($(#[$doc:meta])* $variant:ident = $number:literal $text:literal,)+ }
    ) => {
        $(#[$meta])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum $name {
            $($(#[$doc])* #[doc = concat!($text, ", ", stringify!($number))] $variant,)+
        }

        impl $name {
            /// Every variant, in the order of `self as usize`.
            pub const ALL: &[Self] = &[$(Self::$variant,)+];

            /// The name as presentation format and metrics write it.
            #[must_use]
            pub fn name(self) -> &'static str {
                match self { $(Self::$variant => $text,)+ }
            }

            /// The assigned number.
            #[must_use]
            pub fn number(self) -> u16 {
                match self { $(Self::$variant => $number,)+ }
            }

            /// The variant with this number, if it is named here.
            #[must_use]
            pub fn from_number(number: u16) -> Option<Self> {
                match number { $($number => Some(Self::$variant),)+ _ => None }
            }
        }
    };
}

assigned_numbers! {
    /// Types that a question may have (IANA "Resource Record (RR) TYPEs"). Every other type is one of
    /// which there is nothing here (RFC 3597).
    RecordType {
        A = 1 "A",
        Ns = 2 "NS",
        Cname = 5 "CNAME",
        Soa = 6 "SOA",
        Ptr = 12 "PTR",
        Mx = 15 "MX",
        Txt = 16 "TXT",
        Aaaa = 28 "AAAA",
        Srv = 33 "SRV",
        Naptr = 35 "NAPTR",
        Ds = 43 "DS",
        Svcb = 64 "SVCB",
        Https = 65 "HTTPS",
        /// A transfer of changes (RFC 1995).
        Ixfr = 251 "IXFR",
        /// A transfer of the whole zone (RFC 5936).
        Axfr = 252 "AXFR",
        /// Every type: answered with one RRset (RFC 8482 §4.1).
        Any = 255 "ANY",
    }
}

assigned_numbers! {
    /// Response codes that gangplank sends (IANA "DNS RCODEs").
    Rcode {
        NoError = 0 "NOERROR",
        FormErr = 1 "FORMERR",
        ServFail = 2 "SERVFAIL",
        NxDomain = 3 "NXDOMAIN",
        NotImp = 4 "NOTIMP",
        Refused = 5 "REFUSED",
        /// OPT carries its upper eight bits (RFC 6891 §6.1.3).
        BadVers = 16 "BADVERS",
    }
}
