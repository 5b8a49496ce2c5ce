//! Attributes of tests, which `testing` exports.
//!
//! The invariant: what a test is run on is written at the test, and in no list elsewhere. A function
//! without the attribute is dead code, of which the compiler warns.

use proc_macro::{TokenStream, TokenTree};

/// The server's runtimes, as `--runtime` names them, and the feature of the tested crate that each
/// takes.
const RUNTIMES: [(&str, Option<&str>); 3] = [
    ("uring", None),
    ("tokio", None),
    ("tokio-uring", Some("tokio-uring")),
];

/// Makes a test of a function for each runtime: `NAME::uring`, `NAME::tokio` and, in crates with the
/// feature `tokio-uring`, `NAME::tokio_uring`:
///
/// ```text
/// #[each_runtime]
/// fn lookup_of_root_succeeds(runtime: &str) { … }
/// ```
///
/// With an argument, a function of this name is called with the runtime and the test:
///
/// ```text
/// #[each_runtime(run)]
/// async fn read_past_the_end_is_short() { … }
///
/// fn run<F: Future<Output = ()>>(runtime: &str, test: impl FnOnce() -> F) { … }
/// ```
#[proc_macro_attribute]
pub fn each_runtime(run: TokenStream, function: TokenStream) -> TokenStream {
    let mut tokens = function.clone().into_iter();
    let name = loop {
        match tokens.next() {
            Some(TokenTree::Ident(word)) if word.to_string() == "fn" => break tokens.next(),
            Some(_) => {}
            None => break None,
        }
    };
    let Some(name) = name else {
        return tokens_of("compile_error!(\"each_runtime is an attribute of a function\");");
    };
    let tests = RUNTIMES.map(|(runtime, feature)| {
        let call = if run.is_empty() {
            format!("super::{name}(\"{runtime}\")")
        } else {
            format!("super::{run}(\"{runtime}\", super::{name})")
        };
        let feature = feature.map_or(String::new(), |name| {
            format!("#[cfg(feature = \"{name}\")]")
        });
        let test = runtime.replace('-', "_");
        format!("{feature} #[test] fn {test}() {{ {call}; }}")
    });
    let tests = tokens_of(&format!("mod {name} {{ {} }}", tests.concat()));
    function.into_iter().chain(tests).collect()
}

fn tokens_of(code: &str) -> TokenStream {
    code.parse()
        .expect("invariant: made of a name and of code that parses")
}
