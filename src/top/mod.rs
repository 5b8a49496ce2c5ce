//! The command `ringfsd top`: shows in a terminal what one or many servers do.
//!
//! One thread for each server asks it for its counters; the main thread draws and reads keys. The
//! invariant: a server that doesn't answer delays neither the others nor the keys.

mod rates;
mod share;
mod table;
mod view;

use std::io::{self, Write};
use std::time::{Duration, Instant};

use ratatui::buffer::Buffer;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEvent, KeyEventKind, KeyModifiers};
use ratatui::layout::Rect;

use self::share::Watched;
use self::table::Column;
use self::view::{Detail, View};
use crate::cli::Top;
use crate::ctl;

/// How often the screen is drawn at least, so that a pause and the end of a server show soon.
const REDRAW: Duration = Duration::from_millis(500);

/// Why nothing can be shown.
#[derive(Debug, thiserror::Error)]
pub enum TopError {
    /// There is no socket.
    #[error(
        "no control socket is named, and there is none in /run/ringfsd: name those of --control \
         unix:PATH"
    )]
    NoSocket,
    /// The terminal can't be used.
    #[error("using the terminal; --batch does without")]
    Terminal(#[source] io::Error),
}

/// Shows servers until a key asks to end, or as often as asked for.
///
/// # Errors
///
/// The terminal can't be used, or no server is given and none is found.
pub fn run(top: &Top) -> Result<(), TopError> {
    let sockets: Vec<_> = match &*top.sockets {
        [] => ctl::sockets(),
        named => named.iter().map(|name| ctl::socket(name)).collect(),
    };
    if sockets.is_empty() {
        return Err(TopError::NoSocket);
    }
    let shares: Vec<_> = sockets
        .into_iter()
        .map(|socket| Watched::start(socket, top.interval))
        .collect();
    let view = View::new(top.interval);
    let view = match top.batch {
        Some(_) => view.without_keys(),
        None => view,
    };
    let screen = Screen { shares, view };
    match top.batch {
        Some(count) => screen.print(count, top.width, top.interval),
        None => screen.show(),
    }
    .map_err(TopError::Terminal)
}

/// The servers, and how they are shown.
struct Screen {
    shares: Vec<Watched>,
    view: View,
}

impl Screen {
    fn show(mut self) -> io::Result<()> {
        let mut terminal = ratatui::try_init()?;
        let shown = loop {
            self.update();
            if let Err(error) = terminal.draw(|frame| {
                let area = frame.area();
                self.view.draw(area, frame.buffer_mut());
            }) {
                break Err(error);
            }
            match self.keys() {
                Ok(true) => {}
                Ok(false) => break Ok(()),
                Err(error) => break Err(error),
            }
        };
        ratatui::try_restore()?;
        shown
    }

    /// Takes what the servers have last said, unless the view is paused.
    fn update(&mut self) {
        if !self.view.is_paused() {
            let shares = self.shares.iter().map(Watched::latest).collect();
            self.view.set_shares(shares);
        }
        let selected = self.view.selected();
        for (at, share) in self.shares.iter().enumerate() {
            let wanted = self.view.detail() == Detail::Files && selected == Some(at);
            share.watch_files(wanted);
        }
    }

    /// Handles keys until it is time to draw again. Returns whether to go on.
    fn keys(&mut self) -> io::Result<bool> {
        let until = Instant::now() + REDRAW.min(self.view.interval());
        loop {
            let left = until.saturating_duration_since(Instant::now());
            if !event::poll(left)? {
                return Ok(true);
            }
            match event::read()? {
                Event::Key(key) if key.kind != KeyEventKind::Release => {
                    return Ok(self.handle_key(key));
                }
                Event::Resize(..) => return Ok(true),
                _ => {}
            }
        }
    }

    fn handle_key(&mut self, key: KeyEvent) -> bool {
        let control = key.modifiers.contains(KeyModifiers::CONTROL);
        match key.code {
            KeyCode::Char('q') | KeyCode::Esc => return false,
            KeyCode::Char('c') if control => return false,
            KeyCode::Char(' ' | 'p') => self.view.toggle_pause(),
            KeyCode::Char('s') => self.view.sort_by_next(),
            KeyCode::Char('r') => self.view.reverse(),
            KeyCode::Char('f') => self.view.toggle_files(),
            KeyCode::Up | KeyCode::Char('k') => self.view.select_previous(),
            KeyCode::Down | KeyCode::Char('j') => self.view.select_next(),
            KeyCode::Char(digit) => {
                let digit = digit.to_digit(10).and_then(|it| usize::try_from(it).ok());
                let column = digit.and_then(|digit| digit.checked_sub(1));
                if let Some(column) = column.and_then(|at| Column::ALL.get(at)) {
                    self.view.sort_by(*column);
                }
            }
            _ => {}
        }
        true
    }

    /// Prints updates as text.
    fn print(mut self, count: u32, width: u16, interval: Duration) -> io::Result<()> {
        let rows = u16::try_from(self.shares.len()).unwrap_or(u16::MAX);
        // The shares, the operations of one, and what is around them.
        let height = rows.saturating_add(view::BATCH_ROWS);
        for number in 0..count {
            if number != 0 {
                std::thread::sleep(interval);
            }
            let end = Instant::now() + interval.max(REDRAW) * 4;
            while self.shares.iter().any(|share| share.updates() <= number) && Instant::now() < end
            {
                std::thread::sleep(Duration::from_millis(10));
            }
            self.update();
            let area = Rect::new(0, 0, width, height);
            let mut buffer = Buffer::empty(area);
            self.view.draw(area, &mut buffer);
            // Whoever closes the pipe early has read enough.
            if writeln!(io::stdout(), "{}", text_of(&buffer)).is_err() {
                break;
            }
        }
        Ok(())
    }
}

/// What a buffer shows, without colours, and without empty lines at the end.
fn text_of(buffer: &Buffer) -> String {
    let mut lines: Vec<String> = Vec::new();
    for row in buffer.area.rows() {
        let cells = row
            .columns()
            .filter_map(|cell| buffer.cell((cell.x, cell.y)));
        let line: String = cells.map(|cell| cell.symbol()).collect();
        lines.push(line.trim_end().to_owned());
    }
    while lines.last().is_some_and(String::is_empty) {
        lines.pop();
    }
    lines.join("\n")
}
