//! What is on the screen: a line for all servers, a table of them, and what the selected one does.
//!
//! It is drawn to a buffer, so tests and `--batch` need no terminal. The invariant: the columns fit
//! into any width from 40 on; the names of shares and files get what is left.

use std::time::{Duration, Instant};

use ratatui::buffer::Buffer;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::Line;
use ratatui::widgets::{Cell, Paragraph, Row, Table, Widget};

use super::rates::Rates;
use super::share::{Files, Share, State};
use super::table::{Column, bytes, duration, number};
use crate::metrics::SessionState;

/// How many rows `--batch` prints beside those of the shares: the header lines, and operations.
pub(super) const BATCH_ROWS: u16 = 18;

/// The width of a column of numbers.
const NUMBER: u16 = 7;

/// The least width of a name.
const NAME: u16 = 12;

/// Tables are no wider, so that numbers stay near their names, unless a name needs it.
const WIDE: u16 = 80;

/// What is shown of the selected server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Detail {
    Operations,
    Files,
}

/// The screen.
#[derive(Debug)]
pub(super) struct View {
    shares: Vec<Share>,
    interval: Duration,
    sorted_by: Column,
    reversed: bool,
    /// Among the servers as they were given; the first in the order unless one was selected.
    selected: Option<usize>,
    detail: Detail,
    paused_at: Option<Instant>,
    /// The last line names the keys.
    shows_keys: bool,
}

impl View {
    pub(super) fn new(interval: Duration) -> Self {
        Self {
            shares: Vec::new(),
            interval,
            sorted_by: Column::Operations,
            reversed: false,
            selected: None,
            detail: Detail::Operations,
            paused_at: None,
            shows_keys: true,
        }
    }

    /// The same without a line that names the keys.
    pub(super) fn without_keys(mut self) -> Self {
        self.shows_keys = false;
        self
    }

    pub(super) fn set_shares(&mut self, shares: Vec<Share>) {
        self.shares = shares;
    }

    pub(super) fn interval(&self) -> Duration {
        self.interval
    }

    pub(super) fn is_paused(&self) -> bool {
        self.paused_at.is_some()
    }

    pub(super) fn detail(&self) -> Detail {
        self.detail
    }

    pub(super) fn toggle_pause(&mut self) {
        self.paused_at = match self.paused_at {
            None => Some(Instant::now()),
            Some(_) => None,
        };
    }

    pub(super) fn toggle_files(&mut self) {
        self.detail = match self.detail {
            Detail::Operations => Detail::Files,
            Detail::Files => Detail::Operations,
        };
    }

    pub(super) fn sort_by(&mut self, column: Column) {
        self.reversed = self.sorted_by == column && !self.reversed;
        self.sorted_by = column;
    }

    pub(super) fn sort_by_next(&mut self) {
        let all = Column::ALL;
        let at = all.iter().position(|column| *column == self.sorted_by);
        self.reversed = false;
        self.sorted_by = all[at.map_or(0, |at| (at + 1) % all.len())];
    }

    pub(super) fn reverse(&mut self) {
        self.reversed = !self.reversed;
    }

    /// The servers in the order in which they are shown.
    fn order(&self) -> Vec<usize> {
        let mut order: Vec<_> = (0..self.shares.len()).collect();
        order.sort_by(|one, other| {
            let compared = self
                .sorted_by
                .compare(&self.shares[*one], &self.shares[*other]);
            if self.reversed {
                compared.reverse()
            } else {
                compared
            }
        });
        order
    }

    /// The selected server, among the servers as they were given.
    pub(super) fn selected(&self) -> Option<usize> {
        let first = || self.order().first().copied();
        self.selected
            .or_else(first)
            .filter(|at| *at < self.shares.len())
    }

    pub(super) fn select_next(&mut self) {
        self.select(1);
    }

    pub(super) fn select_previous(&mut self) {
        self.select(-1);
    }

    fn select(&mut self, by: isize) {
        let order = self.order();
        let selected = self.selected();
        let at = order.iter().position(|share| Some(*share) == selected);
        let at = at.unwrap_or(0).saturating_add_signed(by);
        if let Some(share) = order.get(at.min(order.len().saturating_sub(1))) {
            self.selected = Some(*share);
        }
    }

    pub(super) fn draw(&self, area: Rect, buffer: &mut Buffer) {
        let shares = u16::try_from(self.shares.len()).unwrap_or(u16::MAX);
        // Half of the screen at most, so that there is room for what the selected one does.
        let most = area.height.saturating_sub(3) / 2;
        let rows = shares.saturating_add(1).min(most.max(2));
        let [header, table, gap, detail, footer] = Layout::vertical([
            Constraint::Length(1),
            Constraint::Length(rows),
            Constraint::Length(1),
            Constraint::Fill(1),
            Constraint::Length(u16::from(self.shows_keys)),
        ])
        .areas(area);
        self.draw_header(header, buffer);
        self.draw_shares(table, buffer);
        let heading = Style::new().add_modifier(Modifier::BOLD);
        match self.selected().map(|at| &self.shares[at]) {
            None => {}
            Some(share) => {
                Paragraph::new(self.heading(share))
                    .style(heading)
                    .render(gap, buffer);
                self.draw_detail(share, detail, buffer);
            }
        }
        Paragraph::new("q quit  space pause  ↑↓ select  s sort  r reverse  f files")
            .style(Style::new().add_modifier(Modifier::DIM))
            .render(footer, buffer);
    }

    fn draw_header(&self, area: Rect, buffer: &mut Buffer) {
        let serving = self.shares.iter().filter_map(rates_of);
        let sum = |get: fn(&Rates) -> f64| serving.clone().map(get).sum::<f64>();
        let gone = self.shares.iter().filter(|share| is_gone(share)).count();
        let mut text = format!(
            "ringfsd top: {} {}, {} ops/s, {}/s read, {}/s written",
            self.shares.len(),
            match self.shares.len() {
                1 => "share",
                _ => "shares",
            },
            number(sum(|rates| rates.operations)),
            bytes(sum(|rates| rates.bytes_read)),
            bytes(sum(|rates| rates.bytes_written)),
        );
        if gone != 0 {
            text += &format!(", {gone} gone");
        }
        let mut style = Style::new().add_modifier(Modifier::REVERSED);
        if let Some(since) = self.paused_at {
            text = format!("PAUSED for {} s  {text}", since.elapsed().as_secs());
            style = style.fg(Color::Yellow);
        }
        Paragraph::new(text).style(style).render(area, buffer);
    }

    /// The columns for which there is room.
    fn columns(width: u16) -> Vec<Column> {
        let all = Column::ALL.into_iter();
        all.take(fitting(width, Column::ALL.len() - 1) + 1)
            .collect()
    }

    fn draw_shares(&self, area: Rect, buffer: &mut Buffer) {
        let names = self.shares.iter().map(|share| share.name.as_str());
        let area = narrowed(area, names, Column::ALL.len() - 1);
        let columns = Self::columns(area.width);
        let title = |column: &Column| {
            let mark = match (*column == self.sorted_by, self.reversed) {
                (false, _) => "",
                (true, false) => "▼",
                (true, true) => "▲",
            };
            cell(*column, format!("{mark}{}", column.title()))
        };
        let header = Row::new(columns.iter().map(title));
        let order = self.order();
        // The selected row stays in sight.
        let room = usize::from(area.height.saturating_sub(1)).max(1);
        let selected = self.selected();
        let at = order.iter().position(|share| Some(*share) == selected);
        let first = at.unwrap_or(0).saturating_sub(room - 1);
        let rows = order.iter().skip(first).take(room).map(|at| {
            let share = &self.shares[*at];
            let row = self.row(share, &columns, area.width);
            if Some(*at) == selected {
                row.style(Style::new().add_modifier(Modifier::REVERSED))
            } else if is_gone(share) {
                row.style(Style::new().fg(Color::Red))
            } else {
                row
            }
        });
        let widths = columns.iter().map(|column| match column {
            Column::Share => Constraint::Fill(1),
            _ => Constraint::Length(NUMBER),
        });
        let table = Table::new(rows, widths)
            .header(header.style(Style::new().add_modifier(Modifier::BOLD)));
        Widget::render(table, area, buffer);
    }

    fn row(&self, share: &Share, columns: &[Column], width: u16) -> Row<'static> {
        let room = name_width(width, columns.len() - 1);
        let cells = columns.iter().map(|column| {
            let text = match (column, &share.state) {
                (Column::Share, _) => end_of(&share.name, room),
                (column, State::Serving { rates, .. }) => column.cell(rates),
                (Column::Operations, State::Starting) => "…".to_owned(),
                (Column::Operations, State::Gone { .. }) => "gone".to_owned(),
                (Column::P50, State::Gone { since, .. }) => self.ago(*since),
                _ => String::new(),
            };
            cell(*column, text)
        });
        Row::new(cells)
    }

    /// How long ago something happened, as seen when the view was paused.
    fn ago(&self, since: Instant) -> String {
        let now = self.paused_at.unwrap_or_else(Instant::now);
        let seconds = now.saturating_duration_since(since).as_secs();
        match seconds {
            0..1000 => format!("{seconds} s"),
            seconds => format!("{} min", seconds / 60),
        }
    }

    /// The line above what the selected server does.
    fn heading(&self, share: &Share) -> String {
        let what = match self.detail {
            Detail::Operations => "operations",
            Detail::Files => "files",
        };
        let session = match &share.state {
            State::Starting => ", which has not answered yet".to_owned(),
            State::Gone { since, reason } => format!(", gone for {}: {reason}", self.ago(*since)),
            State::Serving { session, .. } => match session {
                SessionState::Waiting => ": no VMM is connected".to_owned(),
                _ => String::new(),
            },
        };
        format!("Busiest {what} of {}{session}", share.name)
    }

    fn draw_detail(&self, share: &Share, area: Rect, buffer: &mut Buffer) {
        let State::Serving { rates, files, .. } = &share.state else {
            return;
        };
        match (self.detail, files) {
            (Detail::Operations, _) => draw_operations(rates, area, buffer),
            (Detail::Files, Some(files)) => draw_files(files, area, buffer),
            (Detail::Files, None) => Paragraph::new("…").render(area, buffer),
        }
    }
}

fn rates_of(share: &Share) -> Option<&Rates> {
    match &share.state {
        State::Serving { rates, .. } => Some(rates),
        State::Starting | State::Gone { .. } => None,
    }
}

fn is_gone(share: &Share) -> bool {
    matches!(share.state, State::Gone { .. })
}

/// A cell of the shares: names on the left, numbers on the right.
fn cell(column: Column, text: String) -> Cell<'static> {
    match column {
        Column::Share => Cell::new(text),
        _ => right(text),
    }
}

fn right(text: String) -> Cell<'static> {
    Cell::new(Line::from(text).right_aligned())
}

fn draw_operations(rates: &Rates, area: Rect, buffer: &mut Buffer) {
    let names = rates.by_operation.iter().map(|it| it.name.as_str());
    let area = narrowed(area, names, 5);
    let all: f64 = rates.by_operation.iter().map(|it| it.time).sum();
    let titles = ["OPS/s", "P50", "P99", "ERR/s", "TIME"];
    let titles = titles.map(|title| right(title.to_owned()));
    let header = Row::new([Cell::new("OPERATION")].into_iter().chain(titles));
    let rows = rates.by_operation.iter().map(|operation| {
        let part = match all > 0.0 {
            true => format!("{:.0}%", operation.time / all * 100.0),
            false => "-".to_owned(),
        };
        let cells = [
            number(operation.operations),
            duration(operation.p50),
            duration(operation.p99),
            number(operation.errors),
            part,
        ];
        let name = Cell::new(operation.name.clone());
        Row::new([name].into_iter().chain(cells.map(right)))
    });
    draw_table(header, rows.collect(), 5, area, buffer);
}

fn draw_files(files: &Files, area: Rect, buffer: &mut Buffer) {
    let files = match files {
        Ok(files) => files,
        Err(reason) => {
            Paragraph::new(reason.as_str()).render(area, buffer);
            return;
        }
    };
    let area = narrowed(area, files.iter().map(|file| file.path.as_str()), 3);
    let titles = ["OPS/s", "READ/s", "WRITE/s"];
    let titles = titles.map(|title| right(title.to_owned()));
    let header = Row::new([Cell::new("FILE")].into_iter().chain(titles));
    let rows = files.iter().map(|file| {
        let cells = [
            number(file.operations),
            bytes(file.bytes_read),
            bytes(file.bytes_written),
        ];
        let name = Cell::new(end_of(
            &file.path,
            name_width(area.width, fitting(area.width, 3)),
        ));
        Row::new([name].into_iter().chain(cells.map(right)))
    });
    draw_table(header, rows.collect(), 3, area, buffer);
}

/// The part of `area` that a table of these names with so many numbers takes.
fn narrowed<'a>(area: Rect, names: impl Iterator<Item = &'a str>, numbers: usize) -> Rect {
    let longest = names.map(|name| name.chars().count()).max().unwrap_or(0);
    let needed = longest + numbers * usize::from(NUMBER + 1);
    let needed = u16::try_from(needed).unwrap_or(u16::MAX);
    Rect {
        width: area.width.min(needed.max(WIDE)),
        ..area
    }
}

/// How many of so many numbers fit beside a name.
fn fitting(width: u16, numbers: usize) -> usize {
    let room = width.saturating_sub(NAME) / (NUMBER + 1);
    usize::from(room).clamp(1, numbers.max(1))
}

/// The width of the names beside so many numbers.
fn name_width(width: u16, numbers: usize) -> usize {
    usize::from(width).saturating_sub(numbers * usize::from(NUMBER + 1))
}

/// The end of a path, which tells it from others, if there is no room for all of it.
fn end_of(path: &str, room: usize) -> String {
    let surplus = path.chars().count().saturating_sub(room);
    if surplus == 0 {
        return path.to_owned();
    }
    let rest = path.chars().skip(surplus + 1);
    std::iter::once('…').chain(rest).collect()
}

/// Draws names with so many numbers.
fn draw_table(
    header: Row<'_>,
    rows: Vec<Row<'_>>,
    numbers: usize,
    area: Rect,
    buffer: &mut Buffer,
) {
    let widths = [Constraint::Fill(1)].into_iter().chain(std::iter::repeat_n(
        Constraint::Length(NUMBER),
        fitting(area.width, numbers),
    ));
    let header = header.style(Style::new().add_modifier(Modifier::BOLD));
    Widget::render(Table::new(rows, widths).header(header), area, buffer);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::top::rates::OperationRate;
    use crate::top::share::FileRate;

    fn serving(name: &str, operations: f64) -> Share {
        let by_operation = (0..30).map(|number| OperationRate {
            name: format!("op{number}"),
            operations,
            errors: 0.0,
            p50: Some(2000.0),
            p99: Some(9e6),
            time: 1.0,
        });
        Share {
            name: name.to_owned(),
            state: State::Serving {
                rates: Box::new(Rates {
                    operations,
                    bytes_read: 5e6,
                    p50: Some(1500.0),
                    by_operation: by_operation.collect(),
                    ..Rates::default()
                }),
                session: SessionState::Waiting,
                files: Some(Ok(vec![FileRate {
                    path: "/dir/file".to_owned(),
                    operations: 7.0,
                    bytes_read: 4096.0,
                    bytes_written: 0.0,
                }])),
            },
        }
    }

    fn gone(name: &str) -> Share {
        Share {
            name: name.to_owned(),
            state: State::Gone {
                since: Instant::now(),
                reason: "no server".to_owned(),
            },
        }
    }

    fn view(shares: Vec<Share>) -> View {
        let mut view = View::new(Duration::from_secs(1));
        view.set_shares(shares);
        view
    }

    fn shown(view: &View, width: u16, height: u16) -> Vec<String> {
        let area = Rect::new(0, 0, width, height);
        let mut buffer = Buffer::empty(area);
        view.draw(area, &mut buffer);
        let text = crate::top::text_of(&buffer);
        text.lines().map(str::to_owned).collect()
    }

    #[test]
    fn busiest_share_is_first_and_those_that_are_gone_are_last() {
        let mut view = view(vec![gone("/c"), serving("/a", 10.0), serving("/b", 2000.0)]);
        let lines = shown(&view, 80, 24);
        assert!(lines[0].contains("3 shares, 2.0k ops/s"), "{lines:#?}");
        assert!(lines[0].contains("1 gone"));
        assert!(lines[1].contains("▼OPS/s"));
        let names = |lines: &[String]| -> Vec<String> {
            let rows = lines[2..5].iter();
            rows.map(|row| row[..2].to_owned()).collect()
        };
        assert_eq!(names(&lines), ["/b", "/a", "/c"]);
        assert!(lines[4].contains("gone"));
        view.reverse();
        assert_eq!(names(&shown(&view, 80, 24)), ["/c", "/a", "/b"]);
        view.sort_by(Column::Share);
        assert_eq!(names(&shown(&view, 80, 24)), ["/a", "/b", "/c"]);
    }

    #[test]
    fn every_size_shows_the_selected_share_and_the_keys() {
        let shares = (0..40).map(|number| serving(&format!("/share{number:02}"), 1.0));
        let mut view = view(shares.collect());
        for _ in 0..25 {
            view.select_next();
        }
        for (width, height) in [(80, 24), (120, 40), (60, 15), (40, 10)] {
            let lines = shown(&view, width, height);
            assert!(lines.len() <= usize::from(height));
            assert!(
                lines.iter().any(|line| line.starts_with("/share25")),
                "{lines:#?}"
            );
            assert!(lines.last().unwrap().starts_with("q quit"), "{lines:#?}");
            assert!(
                lines
                    .iter()
                    .all(|line| line.chars().count() <= usize::from(width))
            );
            assert!(
                lines.iter().any(|line| line.starts_with("op0")),
                "{lines:#?}"
            );
        }
        assert_eq!(View::columns(80), Column::ALL);
        assert!(View::columns(60).len() >= 6);
    }

    #[test]
    fn wide_screen_keeps_numbers_near_names_and_shows_long_ones() {
        let width = |name: &str| {
            let rows = shown(&view(vec![serving(name, 10.0)]), 200, 50);
            rows[2].trim_end().chars().count()
        };
        assert_eq!(width("/a"), 80);
        let long = format!("/srv/{}/one", "x".repeat(100));
        assert_eq!(width(&long), long.len() + 7 * 8);
        assert_eq!(width(&"x".repeat(1000)), 200);
    }

    #[test]
    fn files_are_shown_on_request_and_a_pause_says_so() {
        let mut view = view(vec![serving("/a", 10.0)]);
        assert!(!shown(&view, 80, 24).join("\n").contains("/dir/file"));
        view.toggle_files();
        view.toggle_pause();
        let text = shown(&view, 80, 24).join("\n");
        assert!(text.contains("top: 1 share, "), "{text}");
        assert!(
            text.contains("/dir/file") && text.contains("PAUSED"),
            "{text}"
        );
        assert!(text.contains("no VMM is connected"), "{text}");
    }

    #[test]
    fn long_paths_are_shown_by_their_ends() {
        assert_eq!(end_of("/a/b", 4), "/a/b");
        assert_eq!(end_of("/srv/machines/one", 8), "…nes/one");
        let long = format!("/srv/{}/one", "x".repeat(100));
        let view = view(vec![serving(&long, 1.0)]);
        let row = &shown(&view, 80, 24)[2];
        assert!(row.starts_with('…') && row.contains("/one "), "{row}");
    }

    #[test]
    fn nothing_is_shown_of_no_share() {
        let view = view(Vec::new());
        assert_eq!(view.selected(), None);
        assert!(shown(&view, 80, 24)[0].contains("0 shares"));
    }
}
