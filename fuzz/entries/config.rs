//! Fuzz entry of the configuration file and the environment variables.

use std::path::Path;

use strandline::{
    config::{Config, ConfigSources, LoadedConfig},
    model::{ConfigMap, TopicConfig},
};

/// Loads a file and, after a zero byte, environment variables, one per line.
pub(crate) fn config(input: &[u8]) -> bool {
    let mut parts = input.splitn(2, |byte| *byte == 0);
    let text = |bytes: Option<&[u8]>| String::from_utf8_lossy(bytes.unwrap_or_default()).into_owned();
    let (file, environment) = (text(parts.next()), text(parts.next()));
    let variables = environment.lines().filter_map(|line| line.split_once('='));
    let variables = variables.map(|(name, value)| (name.to_owned(), value.to_owned()));
    let sources = ConfigSources::new().file(Path::new("strandline.toml"), file).environment(variables);
    match sources.load() {
        Ok(settings) => {
            printed(&settings);
            true
        }
        Err(errors) => {
            assert!(!errors.to_string().is_empty());
            false
        }
    }
}

/// Checks that the output of `config print` is a file with the same configuration.
fn printed(settings: &LoadedConfig) {
    let text = settings.print();
    // Passwords are masked, so the printed configuration differs.
    if text.contains("***@") {
        return;
    }
    match ConfigSources::new().file(Path::new("printed.toml"), text.as_str()).load() {
        Ok(mut reloaded) => {
            // Every default is printed, and so is set in the printed file. The effective topic configuration is equal.
            let topics = |config: &Config| TopicConfig::resolve(&config.topic_defaults, &ConfigMap::new());
            assert_eq!(topics(&reloaded.config), topics(&settings.config), "{text}");
            reloaded.config.topic_defaults.clone_from(&settings.config.topic_defaults);
            assert_eq!(reloaded.config, settings.config, "{text}");
        }
        Err(errors) => panic!("the printed file is refused: {errors}\n{text}"),
    }
}
