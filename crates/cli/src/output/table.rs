//! Tables that fit the terminal: first the widest cells are cut, then columns go to a further table below.

use std::fmt::Write as _;

use unicode_width::{UnicodeWidthChar, UnicodeWidthStr};

use super::{clean, style::Style};

const GAP: &str = "  ";
/// A column is never cut below this: eight digits of an id still tell two forks apart.
const LEAST: usize = 9;

/// A column.
#[derive(Debug, Clone, Copy)]
pub struct Column {
    title: &'static str,
    right: bool,
    shrinks: bool,
}

impl Column {
    /// Text; may be cut.
    #[must_use]
    pub fn text(title: &'static str) -> Self {
        Self { title, right: false, shrinks: true }
    }

    /// What must stay whole: a name that will be typed.
    #[must_use]
    pub fn whole(title: &'static str) -> Self {
        Self { title, right: false, shrinks: false }
    }

    /// Numbers: to the right, never cut.
    #[must_use]
    pub fn number(title: &'static str) -> Self {
        Self { title, right: true, shrinks: false }
    }
}

/// A table. Cells are cleaned as they are added.
#[derive(Debug, Clone)]
pub struct Table {
    titles: Vec<String>,
    columns: Vec<Column>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// Without rows.
    #[must_use]
    pub fn new(columns: &[Column]) -> Self {
        let titles = columns.iter().map(|column| column.title.to_owned()).collect();
        Self { titles, columns: columns.to_vec(), rows: Vec::new() }
    }

    /// Adds a column whose title is only known now.
    pub fn column(&mut self, title: &str) {
        self.titles.push(clean::line(title));
        self.columns.push(Column::text(""));
    }

    /// Adds a row.
    pub fn row<I: IntoIterator<Item = S>, S: AsRef<str>>(&mut self, cells: I) {
        let mut row: Vec<String> = cells.into_iter().map(|cell| clean::line(cell.as_ref())).collect();
        row.resize(self.columns.len(), String::new());
        self.rows.push(row);
    }

    /// Whether it has no rows.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// As text. Without `width` nothing is cut.
    #[must_use]
    pub fn render(&self, width: Option<usize>, style: Style) -> String {
        let natural: Vec<usize> = (0..self.columns.len())
            .map(|index| self.cells(index).map(UnicodeWidthStr::width).max().unwrap_or(0))
            .collect();
        let Some(width) = width else {
            return self.block(&(0..self.columns.len()).collect::<Vec<_>>(), &natural, style);
        };
        let mut text = String::new();
        for block in self.split(&natural, width) {
            if !text.is_empty() {
                text.push('\n');
            }
            let widths = self.shrink(&block, &natural, width);
            text.push_str(&self.block(&block, &widths, style));
        }
        text
    }

    fn cells(&self, index: usize) -> impl Iterator<Item = &str> {
        self.rows.iter().map(move |row| row[index].as_str()).chain([self.titles[index].as_str()])
    }

    /// Which columns stand in which table: as many as fit at their least width; the first column stands in each.
    fn split(&self, natural: &[usize], width: usize) -> Vec<Vec<usize>> {
        let least = |index: usize| if self.columns[index].shrinks { natural[index].min(LEAST) } else { natural[index] };
        let mut blocks = vec![Vec::new()];
        let mut used = 0;
        for index in 0..self.columns.len() {
            let need = least(index) + GAP.len();
            let Some(block) = blocks.last_mut() else { break };
            if block.len() > 1 && used + need > width + GAP.len() {
                blocks.push(vec![0, index]);
                used = least(0) + GAP.len() + need;
            } else {
                block.push(index);
                used += need;
            }
        }
        blocks
    }

    /// Cuts the widest column by one until all fit.
    fn shrink(&self, block: &[usize], natural: &[usize], width: usize) -> Vec<usize> {
        let mut widths = natural.to_vec();
        let gaps = GAP.len() * block.len().saturating_sub(1);
        while block.iter().map(|&index| widths[index]).sum::<usize>() + gaps > width {
            let shrinkable = block.iter().filter(|&&index| self.columns[index].shrinks && widths[index] > LEAST);
            let Some(&widest) = shrinkable.max_by_key(|&&index| widths[index]) else { break };
            widths[widest] -= 1;
        }
        widths
    }

    fn block(&self, block: &[usize], widths: &[usize], style: Style) -> String {
        let mut text = style.bold(&self.one_row(block, widths, &self.titles));
        text.push('\n');
        for row in &self.rows {
            let _ = writeln!(text, "{}", self.one_row(block, widths, row));
        }
        text
    }

    fn one_row(&self, block: &[usize], widths: &[usize], cells: &[String]) -> String {
        let padded = block.iter().map(|&index| {
            let cell = cut(&cells[index], widths[index]);
            let space = " ".repeat(widths[index].saturating_sub(cell.width()));
            if self.columns[index].right { format!("{space}{cell}") } else { format!("{cell}{space}") }
        });
        padded.collect::<Vec<_>>().join(GAP).trim_end().to_owned()
    }
}

fn cut(cell: &str, width: usize) -> String {
    if cell.width() <= width {
        return cell.to_owned();
    }
    let mut left = width.saturating_sub(1);
    let mut short = String::new();
    for character in cell.chars() {
        let Some(rest) = left.checked_sub(character.width().unwrap_or(0)) else { break };
        left = rest;
        short.push(character);
    }
    short.push('…');
    short
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table() -> Table {
        let mut table = Table::new(&[Column::whole("NAME"), Column::text("ID"), Column::number("MS")]);
        table.row(["worker-1", "0123456789abcdef0123", "12.5"]);
        table.row(["w", "ffffffffffffffffffff", "7"]);
        table
    }

    #[test]
    fn a_table_without_a_terminal_is_whole_and_plain() {
        let text = table().render(None, Style::PLAIN);
        let expected = "\
NAME      ID                      MS
worker-1  0123456789abcdef0123  12.5
w         ffffffffffffffffffff     7
";
        assert_eq!(text, expected);
    }

    #[test]
    fn what_does_not_fit_is_cut_but_names_and_numbers_are_whole() {
        let text = table().render(Some(30), Style::PLAIN);
        assert!(text.lines().all(|line| line.width() <= 30), "{text}");
        assert!(text.contains("worker-1") && text.contains("12.5") && text.contains("0123456789abc…"), "{text}");
    }

    #[test]
    fn columns_that_do_not_fit_stand_below_with_the_first_column_again() {
        let mut table = Table::new(&[Column::whole("SUBJECT")]);
        for field in ["one", "two", "three", "four", "five"] {
            table.column(field);
        }
        table.row(["fork", &"a".repeat(30), &"b".repeat(30), &"c".repeat(30), &"d".repeat(30), "e"]);
        let text = table.render(Some(40), Style::PLAIN);
        assert!(text.lines().all(|line| line.width() <= 40), "{text}");
        assert_eq!(text.matches("SUBJECT").count(), 2, "{text}");
        assert!(text.contains("five"));
    }

    #[test]
    fn a_cell_can_not_drive_the_terminal_or_break_the_row() {
        let mut table = Table::new(&[Column::text("LABEL")]);
        table.row(["\x1b[2Jred\nnext"]);
        let text = table.render(None, Style::PLAIN);
        assert_eq!(text, "LABEL\n\\u{1b}[2Jred\\nnext\n");
    }

    #[test]
    fn wide_characters_count_as_they_show() {
        let mut table = Table::new(&[Column::text("A"), Column::text("B")]);
        table.row(["日本", "x"]);
        table.row(["abcd", "y"]);
        assert_eq!(table.render(None, Style::PLAIN), "A     B\n日本  x\nabcd  y\n");
    }
}
