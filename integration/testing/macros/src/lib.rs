//! Attributes of tests, which `testing` exports.
//!
//! The invariant: what a test is run on is written at the test, and in no list elsewhere. A function
//! without the attribute is dead code, of which the compiler warns.

use proc_macro::{TokenStream, TokenTree};

/// The server's runtimes, as `--runtime` names them.
const RUNTIMES: [&str; 2] = ["uring", "tokio"];

/// Makes two tests of a function, `NAME::uring` and `NAME::tokio`:
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
    let tests = RUNTIMES.map(|runtime| {
        let call = if run.is_empty() {
            format!("super::{name}(\"{runtime}\")")
        } else {
            format!("super::{run}(\"{runtime}\", super::{name})")
        };
        format!("#[test] fn {runtime}() {{ {call}; }}")
    });
    let tests = tokens_of(&format!("mod {name} {{ {} }}", tests.concat()));
    function.into_iter().chain(tests).collect()
}

fn tokens_of(code: &str) -> TokenStream {
    code.parse()
        .expect("invariant: made of a name and of code that parses")
}
