//! Interface to an object store that the checks use.

use std::ops::Range;

use bytes::Bytes;

/// Result of a conditional put.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::tier) enum ConditionalPutResult {
    /// The object was written.
    Written,
    /// The object exists, and was not written.
    Exists,
    /// The store does not support the condition, with its error.
    Unsupported(String),
}

/// Requests that the checks send to an object store. Errors are texts for the report.
pub(in crate::tier) trait StoreProbe {
    async fn put(&self, key: &str, body: Bytes) -> Result<(), String>;
    /// Puts an object on condition that none of this name exists.
    async fn put_new(&self, key: &str, body: Bytes) -> Result<ConditionalPutResult, String>;
    async fn get(&self, key: &str, range: Range<u64>) -> Result<Bytes, String>;
    /// Returns the object's length and its modification time by the store's clock, in milliseconds since 1970.
    async fn head(&self, key: &str) -> Result<(u64, i64), String>;
    /// Returns the keys of the objects in a folder, with the store's prefix.
    async fn list(&self, folder: &str) -> Result<Vec<String>, String>;
    async fn delete(&self, key: &str) -> Result<(), String>;
    /// Uploads an object in these parts.
    async fn multipart(&self, key: &str, parts: Vec<Bytes>) -> Result<(), String>;
}
