//! The frozen formats: where a blob lies, and what the index holds for a key. Pure: no I/O.

pub mod placement;
pub mod record;
