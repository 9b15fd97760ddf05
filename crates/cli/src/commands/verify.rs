//! `verify`

use std::collections::BTreeSet;

use host::{
    engines, stop,
    verify::{self, Row, Verdict},
};

use super::{Outcome, block_on, failed, open_to_make, pool};
use crate::{
    args::Verify,
    error::{FAILED, Failure},
    output::{
        Output, PrintError, clean, format,
        progress::Reporter,
        table::{Column, Table},
    },
};

pub fn run(args: &Verify, output: &Output) -> Outcome {
    let (home, store) = open_to_make()?;
    let template = store.get(&args.tag)?;
    let engine = engines::for_template(template.manifest())?;
    let mut reporter = Reporter::new(output);
    let verdict = block_on(async {
        let mut show = |progress| reporter.show(&progress);
        tokio::select! {
            verdict = verify::verify(&home, engine.as_ref(), &template, args.count, &mut show) => verdict.map_err(failed),
            // The forks go with the future that holds them.
            signal = stop::wait() => Err(Failure::interrupted(signal, "interrupted; nothing is left behind")),
        }
    });
    drop(reporter);
    pool::fill_later(&home, &args.tag);
    let verdict = verdict?;
    if output.json {
        output.document(&verdict)?;
    } else {
        print(&verdict, output)?;
    }
    Ok(if verdict.passed { 0 } else { FAILED })
}

/// As text.
pub fn print(verdict: &Verdict, output: &Output) -> Result<(), PrintError> {
    if !output.quiet {
        output.table(&table(&verdict.rows))?;
        output.line("")?;
    }
    let bad = output.style.bad("FAIL");
    for shared in &verdict.shared {
        let (field, value) = (clean::line(&shared.field), clean::line(&shared.value));
        output.line(&format!("{bad}  {field}: {value:?} is shared by {}", shared.subjects.join(", ")))?;
    }
    for problem in &verdict.problems {
        output.line(&format!("{bad}  {}", clean::line(problem)))?;
    }
    if verdict.passed {
        output.line(&format!("{}  {}", output.style.good("PASS"), summary(&verdict.rows)))?;
    }
    Ok(())
}

fn summary(rows: &[Row]) -> String {
    let pairs = rows.len() * rows.len().saturating_sub(1) / 2;
    let forks = rows.len().saturating_sub(1);
    let worst = rows.iter().filter_map(|row| row.clock_error_ms).map(f64::abs).fold(0.0, f64::max);
    format!(
        "{} and the template: {} compared in {}, nothing shared; clocks at most {} ms off",
        format::count(forks, "fork"),
        format::count(fields(rows).len(), "field"),
        format::count(pairs, "pair"),
        format::float_millis(worst),
    )
}

fn table(rows: &[Row]) -> Table {
    let mut table =
        Table::new(&[Column::whole("SUBJECT"), Column::number("ACKED MS"), Column::number("CLOCK ERROR MS")]);
    let fields = fields(rows);
    for field in &fields {
        table.column(field);
    }
    let number = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), format::float_millis);
    for row in rows {
        let values = fields.iter().map(|field| row.values.get(*field).cloned().unwrap_or_else(|| "-".into()));
        let first = [row.subject.clone(), number(row.acked_ms), number(row.clock_error_ms)];
        table.row(first.into_iter().chain(values));
    }
    table
}

fn fields(rows: &[Row]) -> BTreeSet<&str> {
    rows.iter().flat_map(|row| row.values.keys()).map(String::as_str).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::output::style::Style;

    fn row(subject: &str, values: &[(&str, &str)]) -> Row {
        let values = values.iter().map(|(field, value)| ((*field).into(), (*value).into())).collect();
        Row { subject: subject.into(), id: None, acked_ms: None, clock_error_ms: Some(-12.0), values }
    }

    #[test]
    fn every_field_of_every_subject_has_its_cell() {
        let rows = [row("template", &[("hostname", "t")]), row("a", &[("hostname", "a"), ("random", "0.5")])];
        let text = table(&rows).render(None, Style::PLAIN);
        let lines: Vec<Vec<&str>> = text.lines().map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(lines[1], ["template", "-", "-12.0", "t", "-"]);
        assert_eq!(lines[2], ["a", "-", "-12.0", "a", "0.5"]);
        assert!(summary(&rows).contains("1 fork and the template: 2 fields compared in 1 pair"));
    }
}
