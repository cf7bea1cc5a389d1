//! Labels and annotations: what gangplank writes on its objects and looks for on others.
//!
//! Objects in clusters carry them, so none of them ever changes.

/// Annotation of a namespace: how many instances it may have.
pub const MAX_INSTANCES: &str = "gangplank.dev/max-instances";

/// Annotation of a namespace: which addresses may be registered in it, networks and `own` with commas.
pub const ADDRESSES: &str = "gangplank.dev/addresses";

/// Label of Services that represent something outside the cluster.
pub const SERVICE_TYPE: &str = "service-type";

/// Value of [`SERVICE_TYPE`].
pub const EXTERNAL: &str = "external";

/// Label of a Service (and of an Endpoints object) that says whether gangplank manages it: [`OWNED`]
/// or [`JOINED`].
pub const SERVICE: &str = "gangplank.dev/service";

/// Value of [`SERVICE`]: gangplank created it and reverts external changes.
pub const OWNED: &str = "owned";

/// Value of [`SERVICE`]: a Service of somebody else that external instances can join.
pub const JOINED: &str = "joined";

/// Label of an EndpointSlice that names its Service.
pub const SERVICE_NAME: &str = "kubernetes.io/service-name";

/// Label of an EndpointSlice that names its controller.
pub const MANAGED_BY: &str = "endpointslice.kubernetes.io/managed-by";

/// Value of [`MANAGED_BY`] on our slices.
pub const MANAGER: &str = "gangplank.dev";

/// Value of [`MANAGED_BY`] on the slices of the Service that leads registrants to the writer. Not [`MANAGER`]: they
/// hold no registration.
pub const WRITER_MANAGER: &str = "writer.gangplank.dev";

/// Label with an empty value that keeps every kube-proxy from watching the object.
pub const HEADLESS: &str = "service.kubernetes.io/headless";

/// Label of an Endpoints object that keeps the mirroring controller from making slices of it.
pub const SKIP_MIRROR: &str = "endpointslice.kubernetes.io/skip-mirror";

/// Annotation of a slice: attributes that endpoints have no field for, as JSON by address.
pub const INSTANCES: &str = "gangplank.dev/instances";

/// Annotation of a slice that holds the ports of one protocol only: all ports of its instances,
/// as JSON.
pub const PORTS: &str = "gangplank.dev/ports";

/// Annotation of a slice that holds the addresses of DNS names, as they were looked up: no instances. Its value is `true`.
pub const RESOLVED: &str = "gangplank.dev/resolved";

/// Annotation of the slice of tombstones: the removals of a service that are remembered, as JSON.
pub const TOMBSTONES: &str = "gangplank.dev/tombstones";

/// Annotation of the slice of tombstones: the clock of the latest tombstone that there was no room for.
pub const REFUSE_BEFORE: &str = "gangplank.dev/refuse-before";

/// Annotation of a slice: the term in which it was last written.
pub const TERM: &str = "gangplank.dev/term";

/// Annotation of the Lease: where its holder takes registrations, with commas.
pub const ADDRESS: &str = "gangplank.dev/address";

/// Annotation of a slice: the generation that it shows.
pub const GENERATION: &str = "gangplank.dev/generation";

/// Annotation of a slice: when it was last written, RFC 3339.
pub const UPDATED: &str = "gangplank.dev/updated";

/// Annotation of a slice: who wrote it last.
pub const WRITER: &str = "gangplank.dev/writer";

/// Annotation of an Endpoints object that could not take all addresses; its value is
/// [`TRUNCATED`].
pub const OVER_CAPACITY: &str = "endpoints.kubernetes.io/over-capacity";

/// Value of [`OVER_CAPACITY`].
pub const TRUNCATED: &str = "truncated";

/// Label of the Secrets that processes share, which says what each holds: the CA, a join token or a registrant.
pub const JOINING: &str = "gangplank.dev/joining";
