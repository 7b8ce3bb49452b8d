//! Chats to text, through the model's own template. A template is a program of a stranger: its steps are counted, and where the
//! program asked for it ([`isolate`]) it runs in a child process that may take so much memory and time and no more.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Mutex, OnceLock};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::error::{Error, Result};

/// Longest chat template, in bytes; those of models have up to thirty thousand.
const TEMPLATE_BYTES: usize = 128 << 10;
/// Longest text that a template may make of one chat, in bytes.
const TEXT_BYTES: usize = 64 << 20;
/// Steps that a template may take per chat.
const FUEL: u64 = 2_000_000;
/// Stack for the deepest template of that length.
const STACK_BYTES: usize = 1 << 30;
/// Address space that a child process may have, its stack included.
pub const CHILD_BYTES: u64 = STACK_BYTES as u64 + (1 << 29);
/// How long a child process may work on one chat.
const PATIENCE: Duration = Duration::from_secs(8);
/// What the program is called with to be that child process.
pub const CHILD_VERB: &str = "render-chats";

/// The program to start for rendering.
static PROGRAM: OnceLock<PathBuf> = OnceLock::new();

/// Renders all templates of this process in children that run `program` with [`CHILD_VERB`], which must call [`serve`].
pub fn isolate(program: PathBuf) {
    PROGRAM.get_or_init(|| program);
}

/// A chat template with what it is given beside messages.
#[derive(Debug, Serialize, Deserialize)]
pub struct Template {
    /// Its text, in Jinja.
    pub text: String,
    bos_token: String,
    eos_token: String,
}

/// A template where it is to be rendered.
#[derive(Debug)]
pub struct Renderer {
    template: Template,
    /// The file that holds it.
    path: PathBuf,
    running: Mutex<Option<Running>>,
}

/// A child process and what it answers.
#[derive(Debug)]
struct Running {
    child: Child,
    asked: ChildStdin,
    answers: Receiver<std::io::Result<String>>,
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Renderer {
    /// A renderer of the template that `path` holds.
    ///
    /// # Errors
    /// When the template is too long.
    pub fn new(text: String, [bos_token, eos_token]: [String; 2], path: PathBuf) -> Result<Self> {
        if text.len() > TEMPLATE_BYTES {
            return Err(Error::input(format!("chat template: {} bytes, the limit is {TEMPLATE_BYTES}", text.len())).file(&path));
        }
        Ok(Self { template: Template { text, bos_token, eos_token }, path, running: Mutex::new(None) })
    }

    /// The template's text.
    pub fn text(&self) -> &str {
        &self.template.text
    }

    /// Messages as the template writes them.
    ///
    /// # Errors
    /// When the template fails, or takes too long or too much memory.
    pub fn render(&self, messages: &Value) -> Result<String> {
        let rendered = match PROGRAM.get() {
            None => self.template.render(messages),
            Some(program) => self.ask(program, messages).map_err(|error| error.file(&self.path))?,
        };
        rendered.map_err(|what| Error::input(format!("chat template: {what}")).file(&self.path))
    }

    /// As the child answers.
    fn ask(&self, program: &PathBuf, messages: &Value) -> Result<Result<String, String>> {
        let failed = |what: String| Error::run(format!("chat template: the process that renders it: {what}"));
        let mut running = self.running.lock().map_err(|_| failed("it failed before".into()))?;
        let mut child = match running.take() {
            Some(child) => child,
            None => start(program, &self.template).map_err(|error| failed(error.to_string()))?,
        };
        let asked = serde_json::to_string(messages).map_err(|error| failed(error.to_string()))?;
        let written = child.asked.write_all(format!("{asked}\n").as_bytes()).and_then(|()| child.asked.flush());
        let answer = match child.answers.recv_timeout(PATIENCE) {
            Ok(Ok(answer)) if written.is_ok() => answer,
            Err(RecvTimeoutError::Timeout) => return Ok(Err(format!("it takes more than {} seconds for one chat", PATIENCE.as_secs()))),
            _ => return Ok(Err("it takes too much memory or makes the template library fail".into())),
        };
        *running = Some(child);
        serde_json::from_str(&answer).map_err(|error| failed(error.to_string()))
    }
}

/// Starts a child and gives it the template.
fn start(program: &PathBuf, template: &Template) -> std::io::Result<Running> {
    let mut command = Command::new(program);
    // A signal from the terminal is the parent's to notice; the child ends when its input does.
    command.arg(CHILD_VERB).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).process_group(0);
    let mut child = command.spawn()?;
    let (sender, answers) = channel();
    let (Some(asked), Some(answered)) = (child.stdin.take(), child.stdout.take()) else {
        return Err(std::io::Error::other("it has no pipes"));
    };
    let mut running = Running { child, asked, answers };
    std::thread::Builder::new().spawn(move || BufReader::new(answered).lines().try_for_each(|line| sender.send(line)))?;
    running.asked.write_all(format!("{}\n", serde_json::to_string(template)?).as_bytes())?;
    Ok(running)
}

/// What a child does: reads a template and then messages, one object of JSON per line, and answers each of the latter.
///
/// # Errors
/// When a line is not what it should be, or the other side has gone.
pub fn serve(input: impl BufRead, mut output: impl Write) -> std::io::Result<()> {
    let mut lines = input.lines();
    let Some(template) = lines.next() else { return Ok(()) };
    let template: Template = serde_json::from_str(&template?)?;
    for line in lines {
        let answer = template.render(&serde_json::from_str(&line?)?);
        serde_json::to_writer(&mut output, &answer)?;
        output.write_all(b"\n")?;
        output.flush()?;
    }
    Ok(())
}

impl Template {
    /// Messages as the template writes them, in this process.
    fn render(&self, messages: &Value) -> Result<String, String> {
        let mut environment = minijinja::Environment::new();
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment.set_fuel(Some(FUEL));
        environment.add_function("raise_exception", |message: String| -> Result<String, minijinja::Error> {
            Err(minijinja::Error::new(minijinja::ErrorKind::InvalidOperation, message))
        });
        // A fixed date keeps the calibration of a model the same every day.
        environment.add_function("strftime_now", |_: String| "01 Jan 2025".to_string());
        let context = minijinja::context! {
            messages => minijinja::Value::from_serialize(messages),
            add_generation_prompt => false,
            bos_token => self.bos_token,
            eos_token => self.eos_token,
        };
        // The library goes down as deep as a template is nested, and a hostile one is nested deeply.
        let rendered = std::thread::scope(|scope| {
            let render = || environment.render_str(&self.text, context);
            let thread = std::thread::Builder::new().stack_size(STACK_BYTES).spawn_scoped(scope, render);
            thread.map(std::thread::ScopedJoinHandle::join)
        });
        match rendered {
            Ok(Ok(Ok(text))) if text.len() > TEXT_BYTES => {
                Err(format!("it makes {} bytes of one chat, the limit is {TEXT_BYTES}", text.len()))
            }
            Ok(Ok(Ok(text))) => Ok(text),
            Ok(Ok(Err(error))) => Err(error.to_string()),
            Ok(Err(_)) => Err("it makes the template library fail".into()),
            Err(error) => Err(format!("no thread for it: {error}")),
        }
    }
}

/// Messages as lines `role: content`, for models without a chat template.
pub fn plain_chat(messages: &Value) -> String {
    let line = |message: &Value| format!("{}: {}\n", message["role"].as_str().unwrap_or("?"), message["content"].as_str().unwrap_or(""));
    messages.as_array().into_iter().flatten().map(line).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_child_answers_every_chat_with_its_text_or_its_error() {
        let text = "{{ bos_token }}{% for m in messages %}{% if m.role == 'no' %}{{ raise_exception('not this') }}{% endif %}{{ m.content }};{% endfor %}";
        let template = Template { text: text.into(), bos_token: "<s>".into(), eos_token: String::new() };
        let lines = [json!(template), json!([{"role": "a", "content": "b\nc"}]), json!([{"role": "no"}])];
        let input: String = lines.iter().map(|line| format!("{line}\n")).collect();
        let mut output = Vec::new();
        serve(input.as_bytes(), &mut output).unwrap();
        let answers: Vec<Result<String, String>> =
            String::from_utf8(output).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(answers[0], Ok("<s>b\nc;".into()));
        assert!(answers[1].as_ref().unwrap_err().contains("not this") && answers.len() == 2);
    }
}
