// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The names of stores, and connections to them.
//!
//! Credentials come as programs of each store expect: from the environment, from the profile of
//! the AWS tools ([`super::profile`]), from the role of the machine. The library does all of that
//! but for profiles.

use super::error::{StoreError, StoreErrorKind};
use super::profile;
use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey};
use object_store::azure::MicrosoftAzureBuilder;
use object_store::gcp::GoogleCloudStorageBuilder;
use object_store::local::LocalFileSystem;
use object_store::path::Path;
use object_store::{BackoffConfig, ObjectStore, ObjectStoreScheme, RetryConfig};
use rustix::fs::Mode;
use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use url::Url;

/// For so long a request that failed is made again.
const RETRY: Duration = Duration::from_secs(10);

/// An object of a store.
#[derive(Debug, Clone)]
pub(super) struct Object {
    /// The store, or the bucket of it.
    pub(super) store: Arc<dyn ObjectStore>,
    /// Where the object is in it.
    pub(super) path: Path,
    /// The name of the store: what comes before the path.
    root: String,
}

impl fmt::Display for Object {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}/{}", self.root, self.path)
    }
}

impl Object {
    /// Another object of the same store.
    pub(super) fn at(&self, path: Path) -> Self {
        Self { path, ..self.clone() }
    }

    /// The folder with the packs of all uploads of this image.
    pub(super) fn parts(&self) -> Path {
        Path::from(format!("{}.parts", self.path))
    }

    /// An error about this object.
    pub(super) fn failed(&self, error: &object_store::Error) -> StoreError {
        StoreError::of(self, error)
    }
}

/// The stores that are connected. Their connections are used again.
#[derive(Debug, Default)]
pub(super) struct Stores(Mutex<HashMap<String, Arc<dyn ObjectStore>>>);

/// A name in its parts, as the library takes it: whatever can be written in several ways is
/// written in one.
#[derive(Debug, Clone)]
pub(super) struct Name {
    url: Url,
    scheme: ObjectStoreScheme,
    root: String,
    path: Path,
}

impl Name {
    /// The parts of this name.
    ///
    /// # Errors
    /// If it is no name of a store.
    pub(super) fn parse(name: &str) -> Result<Self, StoreError> {
        let refused = |what: &dyn fmt::Display| {
            StoreError::new(StoreErrorKind::Refused, format!("{name}: {what}"))
        };
        let url = Url::parse(name).map_err(|error| refused(&error))?;
        if !url.username().is_empty() || url.query().is_some() || url.fragment().is_some() {
            return Err(refused(&"only SCHEME://BUCKET/NAME: keys belong into the environment"));
        }
        let (scheme, path) = ObjectStoreScheme::parse(&url).map_err(|error| refused(&error))?;
        let root = url[..url::Position::BeforePath].to_owned();
        Ok(Self { url, scheme, root, path })
    }

    /// True if `other` is this name or below it.
    pub(super) fn contains(&self, other: &Self) -> bool {
        self.root == other.root && other.path.prefix_matches(&self.path)
    }
}

impl Stores {
    /// The object with this name.
    ///
    /// # Errors
    /// If the environment does not say how to reach its store.
    pub(super) fn find(&self, name: &Name) -> Result<Object, StoreError> {
        let Name { url, scheme, root, path } = name;
        let refused = |what: &dyn fmt::Display| {
            StoreError::new(StoreErrorKind::Refused, format!("{url}: {what}"))
        };
        let mut stores = crate::lock::lock(&self.0);
        let store = match stores.get(root) {
            Some(store) => store.clone(),
            None => {
                let store = connect(scheme, url).map_err(|error| match error {
                    object_store::Error::Generic { source, .. } => refused(&source),
                    error => refused(&error),
                })?;
                stores.insert(root.clone(), store.clone());
                store
            }
        };
        Ok(Object { store, path: path.clone(), root: root.clone() })
    }
}

fn connect(
    scheme: &ObjectStoreScheme, url: &Url,
) -> Result<Arc<dyn ObjectStore>, object_store::Error> {
    // Of the process; the first call holds, and all are the same.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let backoff = BackoffConfig {
        init_backoff: Duration::from_millis(50),
        max_backoff: Duration::from_secs(2),
        base: 2.0,
    };
    let retry = RetryConfig { backoff, max_retries: 12, retry_timeout: RETRY };
    Ok(match scheme {
        ObjectStoreScheme::Local => {
            // They hold the memory of guests, as image files do.
            rustix::process::umask(Mode::RWXG | Mode::RWXO);
            Arc::new(LocalFileSystem::new().with_fsync(true).with_automatic_cleanup(true))
        }
        ObjectStoreScheme::AmazonS3 => {
            let mut builder = AmazonS3Builder::from_env().with_url(url.as_str()).with_retry(retry);
            // The environment counts more, and keys of the two do not go together.
            let has_key = builder.get_config_value(&AmazonS3ConfigKey::AccessKeyId).is_some();
            for (key, value) in profile::settings() {
                let is_secret = profile::is_credential(&key);
                if builder.get_config_value(&key).is_none() && !(has_key && is_secret) {
                    builder = builder.with_config(key, value);
                }
            }
            Arc::new(builder.build()?)
        }
        ObjectStoreScheme::GoogleCloudStorage => {
            let builder = GoogleCloudStorageBuilder::from_env().with_url(url.as_str());
            Arc::new(builder.with_retry(retry).build()?)
        }
        ObjectStoreScheme::MicrosoftAzure => {
            let builder = MicrosoftAzureBuilder::from_env().with_url(url.as_str());
            Arc::new(builder.with_retry(retry).build()?)
        }
        _ => {
            let source = "only s3, gs, az and file are stores of images".into();
            return Err(object_store::Error::NotSupported { source });
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_below_another_however_it_is_written() {
        let contains = |one: &str, other: &str| {
            Name::parse(one).unwrap().contains(&Name::parse(other).unwrap())
        };
        assert!(contains("s3://images", "s3://images/vm/guest"));
        assert!(contains("file:///x/store/", "file:///x/store/a/../guest"));
        for outside in [
            "file:///x/secret",
            "file:///x/store/../secret",
            "file:///x/store/%2e%2e/secret",
            "file:///x/store/\\..\\..\\secret",
            "file:///x/store/.\t./secret",
            "file:///x/store2/guest",
        ] {
            assert!(!contains("file:///x/store", outside), "{outside}");
        }
        assert!(!contains("s3://images/vm", "s3://other/vm/guest"));
        assert!(Name::parse("s3://key:secret@images/guest").is_err());
    }
}
