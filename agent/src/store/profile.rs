// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What the profile of the AWS tools says: `~/.aws/credentials` and `~/.aws/config`.
//!
//! `AWS_PROFILE` names the profile, otherwise it is `default`. Both files can be elsewhere:
//! `AWS_SHARED_CREDENTIALS_FILE`, `AWS_CONFIG_FILE`.

use object_store::aws::AmazonS3ConfigKey;
use std::path::PathBuf;

/// Longest file that is read, in bytes.
const LONGEST: u64 = 1 << 20;

/// The settings of the profile, those of the credentials first.
pub(super) fn settings() -> Vec<(AmazonS3ConfigKey, String)> {
    let profile = variable("AWS_PROFILE").unwrap_or_else(|| "default".into());
    let mut found = Vec::new();
    for (place, file) in
        [("AWS_SHARED_CREDENTIALS_FILE", "credentials"), ("AWS_CONFIG_FILE", "config")]
    {
        let home = || Some(PathBuf::from(variable("HOME")?).join(".aws").join(file));
        let Some(path) = variable(place).map(PathBuf::from).or_else(home) else { continue };
        if path.metadata().is_ok_and(|file| file.len() <= LONGEST)
            && let Ok(text) = std::fs::read_to_string(path)
        {
            found.extend(of_profile(&text, &profile));
        }
    }
    found
}

/// True for settings that belong together: of a key that is in one place, no part is taken from
/// another.
pub(super) fn is_credential(key: &AmazonS3ConfigKey) -> bool {
    use AmazonS3ConfigKey::{AccessKeyId, SecretAccessKey, Token};
    matches!(key, AccessKeyId | SecretAccessKey | Token)
}

fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

/// The settings of one profile in such a file. In one of them a section is `[NAME]`, in the other
/// `[profile NAME]`.
fn of_profile(text: &str, profile: &str) -> Vec<(AmazonS3ConfigKey, String)> {
    let (mut is_inside, mut found) = (false, Vec::new());
    for line in text.lines() {
        if let Some(section) = line.trim().strip_prefix('[') {
            let section = section.trim_end_matches(']').trim();
            is_inside = section.strip_prefix("profile ").unwrap_or(section).trim() == profile;
            continue;
        }
        // An indented line belongs to a setting of several lines, of which none is used here.
        if !is_inside || line.starts_with([' ', '\t', '#', ';']) {
            continue;
        }
        let Some((name, value)) = line.split_once('=') else { continue };
        let key = match name.trim() {
            "aws_access_key_id" => AmazonS3ConfigKey::AccessKeyId,
            "aws_secret_access_key" => AmazonS3ConfigKey::SecretAccessKey,
            "aws_session_token" => AmazonS3ConfigKey::Token,
            "region" => AmazonS3ConfigKey::Region,
            "endpoint_url" => AmazonS3ConfigKey::Endpoint,
            _ => continue,
        };
        found.push((key, value.trim().to_owned()));
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_settings_of_the_named_profile_are_read() {
        let text = "[default]\naws_access_key_id = a\n# aws_session_token = no\n\
                    [profile other]\nregion=eu-west-1\ns3 =\n  endpoint_url = nested\n\
                    endpoint_url = https://store\nunknown = x\n";
        let default = of_profile(text, "default");
        assert_eq!(default, [(AmazonS3ConfigKey::AccessKeyId, "a".to_owned())]);
        let other = of_profile(text, "other");
        let expected = [
            (AmazonS3ConfigKey::Region, "eu-west-1".to_owned()),
            (AmazonS3ConfigKey::Endpoint, "https://store".to_owned()),
        ];
        assert_eq!(other, expected);
        assert_eq!(of_profile(text, "third"), []);
    }
}
