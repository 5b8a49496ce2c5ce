//! The requests of HTTP that a scraper sends, and the heads of the replies.
//!
//! There is one resource, `/metrics`. The invariant: whatever the bytes are, the decision takes a time
//! that is bounded by the longest head.

/// The longest head of a request in bytes.
pub(super) const MAX_HEAD: usize = 8 << 10;
/// The most headers of a request.
const MAX_HEADERS: usize = 64;

/// What to do with the bytes that have come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Decision {
    /// Wait for more of them.
    More,
    /// Reply.
    Reply(Reply),
}

/// A reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Reply {
    pub(super) status: Status,
    /// Bytes of the request's head.
    pub(super) consumed: usize,
    /// No body is sent.
    pub(super) head_only: bool,
    /// The connection ends with this reply.
    pub(super) closes: bool,
}

/// The status of a reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Status {
    Ok,
    BadRequest,
    NotFound,
    MethodNotAllowed,
    HeadTooLarge,
}

impl Status {
    /// The status line's number and words.
    pub(super) fn line(self) -> &'static str {
        match self {
            Self::Ok => "200 OK",
            Self::BadRequest => "400 Bad Request",
            Self::NotFound => "404 Not Found",
            Self::MethodNotAllowed => "405 Method Not Allowed",
            Self::HeadTooLarge => "431 Request Header Fields Too Large",
        }
    }
}

/// Decides on the bytes that have come on a connection.
pub(super) fn decide(bytes: &[u8]) -> Decision {
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut request = httparse::Request::new(&mut headers);
    let refuse = |status| {
        Decision::Reply(Reply {
            status,
            consumed: bytes.len(),
            head_only: false,
            closes: true,
        })
    };
    let consumed = match request.parse(bytes) {
        Ok(httparse::Status::Complete(consumed)) => consumed,
        Ok(httparse::Status::Partial) if bytes.len() < MAX_HEAD => return Decision::More,
        Ok(httparse::Status::Partial) | Err(httparse::Error::TooManyHeaders) => {
            return refuse(Status::HeadTooLarge);
        }
        Err(_malformed) => return refuse(Status::BadRequest),
    };
    let header = |name: &str| {
        let mut headers = request.headers.iter();
        let header = headers.find(|header| header.name.eq_ignore_ascii_case(name))?;
        Some(header.value.trim_ascii())
    };
    let connection = header("connection").unwrap_or_default();
    let asks = |word: &[u8]| {
        let mut words = connection.split(|byte| *byte == b',');
        words.any(|it| it.trim_ascii().eq_ignore_ascii_case(word))
    };
    let stays = match request.version {
        Some(1) => !asks(b"close"),
        _ => asks(b"keep-alive"),
    };
    // A body would have to be read before the next request.
    let has_body = header("transfer-encoding").is_some()
        || header("content-length").is_some_and(|len| len != b"0");
    let method = request.method.unwrap_or_default();
    let path = request.path.unwrap_or_default();
    let path = path.split_once('?').map_or(path, |(path, _)| path);
    let status = match method {
        _ if path != "/metrics" => Status::NotFound,
        "GET" | "HEAD" => Status::Ok,
        _ => Status::MethodNotAllowed,
    };
    Decision::Reply(Reply {
        status,
        consumed,
        head_only: method == "HEAD",
        closes: has_body || !stays,
    })
}

/// The head of a reply whose body has `len` bytes.
pub(super) fn head(reply: &Reply, media_type: &str, len: usize) -> String {
    let line = reply.status.line();
    let connection = if reply.closes { "close" } else { "keep-alive" };
    let allow = match reply.status {
        Status::MethodNotAllowed => "Allow: GET, HEAD\r\n",
        _ => "",
    };
    format!(
        "HTTP/1.1 {line}\r\nContent-Type: {media_type}\r\nContent-Length: {len}\r\n{allow}\
         Cache-Control: no-store\r\nConnection: {connection}\r\n\r\n"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reply(text: &str) -> (Status, bool, bool) {
        match decide(text.as_bytes()) {
            Decision::Reply(reply) => (reply.status, reply.head_only, reply.closes),
            Decision::More => panic!("{text} is no whole request"),
        }
    }

    #[test]
    fn only_get_and_head_of_the_one_resource_succeed() {
        for (text, expected) in [
            ("GET /metrics HTTP/1.1\r\n\r\n", (Status::Ok, false, false)),
            (
                "GET /metrics?x=1 HTTP/1.1\r\nHost: a\r\n\r\n",
                (Status::Ok, false, false),
            ),
            ("HEAD /metrics HTTP/1.1\r\n\r\n", (Status::Ok, true, false)),
            ("GET /metrics HTTP/1.0\r\n\r\n", (Status::Ok, false, true)),
            (
                "GET /metrics HTTP/1.0\r\nConnection: Keep-Alive\r\n\r\n",
                (Status::Ok, false, false),
            ),
            (
                "GET /metrics HTTP/1.1\r\nConnection: te, close\r\n\r\n",
                (Status::Ok, false, true),
            ),
            ("GET / HTTP/1.1\r\n\r\n", (Status::NotFound, false, false)),
            (
                "GET /metrics/ HTTP/1.1\r\n\r\n",
                (Status::NotFound, false, false),
            ),
            (
                "POST /metrics HTTP/1.1\r\nContent-Length: 3\r\n\r\n",
                (Status::MethodNotAllowed, false, true),
            ),
            ("\0\x01\r\n\r\n", (Status::BadRequest, false, true)),
        ] {
            assert_eq!(reply(text), expected, "{text:?}");
        }
    }

    #[test]
    fn incomplete_request_waits_until_it_is_too_long() {
        let start = "GET /metrics HTTP/1.1\r\nX: ";
        for len in 0..start.len() {
            assert_eq!(decide(&start.as_bytes()[..len]), Decision::More);
        }
        let long = format!("{start}{}", "a".repeat(MAX_HEAD));
        assert_eq!(reply(&long).0, Status::HeadTooLarge);
        let many = format!("GET /metrics HTTP/1.1\r\n{}\r\n", "A: b\r\n".repeat(65));
        assert_eq!(reply(&many).0, Status::HeadTooLarge);
    }

    #[test]
    fn second_request_behind_the_first_stays() {
        let one = "GET /metrics HTTP/1.1\r\n\r\n";
        match decide(one.repeat(2).as_bytes()) {
            Decision::Reply(reply) => assert_eq!(reply.consumed, one.len()),
            Decision::More => panic!(),
        }
    }

    #[test]
    fn refused_method_is_told_which_are_allowed() {
        let Decision::Reply(reply) = decide(b"PUT /metrics HTTP/1.1\r\n\r\n") else {
            panic!();
        };
        let head = head(&reply, "text/plain", 3);
        assert!(
            head.starts_with("HTTP/1.1 405 Method Not Allowed\r\n"),
            "{head}"
        );
        assert!(head.contains("\r\nAllow: GET, HEAD\r\n"), "{head}");
        assert!(head.ends_with("\r\n\r\n"), "{head}");
    }
}
