//! The model's chat template (Jinja, from tokenizer_config.json or chat_template.jinja).

use std::path::Path;

use minijinja::syntax::SyntaxConfig;
use minijinja::{Environment, ErrorKind, context};
use serde_json::Value;

use crate::{Error, Result};

const CHAT: &str = "chat_template";
/// What the environment calls the bare prompt.
const BARE: &str = "bare";

/// Renders messages the way the model was trained to see them.
#[derive(Debug, Clone)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    /// [`CHAT`] or [`BARE`].
    name: &'static str,
    origin: String,
    bos_token: String,
    eos_token: String,
}

impl ChatTemplate {
    /// Reads the template of a model directory. A model without one gets the bare prompt, behind its beginning-of-text
    /// token if the tokenizer is set to add it.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::ModelFile`] for JSON that does not parse, [`Error::Template`] for Jinja that does not.
    pub fn open(model_dir: &Path) -> Result<ChatTemplate> {
        let config_path = model_dir.join("tokenizer_config.json");
        let config: Value = match std::fs::read(&config_path) {
            Ok(bytes) => serde_json::from_slice(&bytes)
                .map_err(|error| Error::model_file(&config_path, format!("not valid JSON: {error}")))?,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Value::Null,
            Err(source) => return Err(Error::io("read", config_path, source)),
        };
        let jinja_path = model_dir.join("chat_template.jinja");
        let (source, origin) = match std::fs::read_to_string(&jinja_path) {
            Ok(text) => (Some(text), jinja_path),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                (template_in_config(&config["chat_template"]), config_path)
            }
            Err(source) => return Err(Error::io("read", jinja_path, source)),
        };

        let mut environment = Environment::new();
        // What transformers sets: Python's string methods, trimmed blocks, and a way for a template to refuse.
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(|error| template_error("chat template", &error))?);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", |message: String| -> std::result::Result<String, _> {
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
        });
        let origin = origin.display().to_string();
        let bos_token = token_text(&config["bos_token"]);
        let bare = match config["add_bos_token"].as_bool() {
            Some(true) => "{{ bos_token }}{{ messages[-1].content }}",
            _ => "{{ messages[-1].content }}",
        };
        let name = if source.is_some() { CHAT } else { BARE };
        let sources = [(BARE, Some(bare.to_owned())), (CHAT, source)];
        for (name, source) in sources.into_iter().filter_map(|(name, source)| Some((name, source?))) {
            environment.add_template_owned(name, source).map_err(|error| template_error(&origin, &error))?;
        }
        Ok(ChatTemplate { environment, name, origin, bos_token, eos_token: token_text(&config["eos_token"]) })
    }

    /// The bare prompt of the same model, as if it brought no template.
    pub fn bare(&self) -> ChatTemplate {
        ChatTemplate { name: BARE, ..self.clone() }
    }

    /// The rendered conversation of one user message, ending with the header of the assistant's turn.
    ///
    /// As in the reference an empty system message goes first; templates that refuse a system role get none.
    ///
    /// # Errors
    /// [`Error::Template`] with the template's own words.
    pub fn render(&self, user_message: &str) -> Result<String> {
        let user = context! { role => "user", content => user_message };
        let system = context! { role => "system", content => "" };
        self.render_messages(vec![system, user.clone()]).or_else(|_| self.render_messages(vec![user]))
    }

    fn render_messages(&self, messages: Vec<minijinja::Value>) -> Result<String> {
        let values = context! {
            messages => messages,
            add_generation_prompt => true,
            bos_token => &self.bos_token,
            eos_token => &self.eos_token,
        };
        self.environment
            .get_template(self.name)
            .and_then(|template| template.render(values))
            .map_err(|error| template_error(&self.origin, &error))
    }

    /// Whether a template of the model's own is rendered, not the bare prompt.
    pub fn has_template(&self) -> bool {
        self.name == CHAT
    }

    /// The file the template came from, for messages.
    pub(crate) fn origin(&self) -> &str {
        &self.origin
    }
}

/// `chat_template` is a string, or a list of named templates of which "default" is meant for plain chat.
fn template_in_config(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Array(named) => named
            .iter()
            .find(|entry| entry["name"] == "default")
            .or(named.first())
            .and_then(|entry| entry["template"].as_str().map(str::to_owned)),
        _ => None,
    }
}

/// Special tokens are spelled as a string, or as an object that says how they are matched.
fn token_text(value: &Value) -> String {
    value.as_str().or_else(|| value["content"].as_str()).unwrap_or_default().to_owned()
}

fn template_error(origin: &str, error: &minijinja::Error) -> Error {
    Error::Template { origin: origin.into(), message: format!("the chat template failed: {error:#}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with_template(template: &str) -> Result<ChatTemplate> {
        let folder = tempfile::tempdir().unwrap();
        let config =
            serde_json::json!({ "chat_template": template, "bos_token": {"content": "<s>"}, "eos_token": "</s>" });
        std::fs::write(folder.path().join("tokenizer_config.json"), config.to_string()).unwrap();
        ChatTemplate::open(folder.path())
    }

    #[test]
    fn falls_back_when_a_template_refuses_the_system_role() {
        let chat = with_template(
            "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}[INST] {{ m['content'].strip() }} [/INST]{% endfor %}",
        )
        .unwrap();
        assert_eq!(chat.render(" hello ").unwrap(), "<s>[INST] hello [/INST]");
        assert_eq!(chat.bare().render(" hello ").unwrap(), " hello ");
    }

    #[test]
    fn a_template_that_does_not_parse_is_named() {
        let error = with_template("{% for %}").unwrap_err();
        assert!(error.to_string().contains("tokenizer_config.json"), "{error}");
    }

    #[test]
    fn a_model_without_a_template_gets_the_bare_prompt() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("tokenizer_config.json"), r#"{"bos_token": "<s>", "add_bos_token": true}"#)
            .unwrap();
        let chat = ChatTemplate::open(folder.path()).unwrap();
        assert!(!chat.has_template());
        assert_eq!(chat.render("hi").unwrap(), "<s>hi");
    }
}
