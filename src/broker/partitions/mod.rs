//! The partitions that this broker hosts: the table, its only writer, and the look-ups.

pub(super) mod lookup;
pub(super) mod maintenance_failures;
mod opener;
pub(super) mod reconciler;
pub(super) mod stray_cleaner;
pub(super) mod table;
