//! The charts of a report as SVG. Colours are names of the page's style, so that one chart is read in light and in dark, and
//! differences are told by place, length, lightness and words as well.

use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

/// Width of a chart in its own units; it is scaled to the page.
const WIDTH: u32 = 440;

/// Size of text.
const TEXT: f64 = 13.0;

/// Dashes and gaps of lines, so that they are told apart without colours; the first is whole.
const DASHES: [(u32, u32); 5] = [(0, 0), (9, 4), (3, 3), (14, 5), (5, 7)];

/// Steps of lightness of a heat map.
const STEPS: u8 = 9;

/// Colours that stand for names of the page's style.
const INK: RGBColor = RGBColor(1, 1, 1);
const MUTED: RGBColor = RGBColor(2, 2, 2);
const GRID: RGBColor = RGBColor(3, 3, 3);

fn series(number: usize) -> RGBColor {
    RGBColor(4, 4, number as u8 % 6)
}

fn heat(step: u8) -> RGBColor {
    RGBColor(5, 5, step.min(STEPS - 1))
}

fn on_heat(step: u8) -> RGBColor {
    RGBColor(6, 6, step.min(STEPS - 1))
}

/// What cannot be drawn.
type Failed = Box<dyn std::error::Error>;

/// A chart with its name for those who do not see it; nothing where it cannot be drawn.
fn drawn(
    name: &str,
    height: u32,
    draw: impl FnOnce(&DrawingArea<SVGBackend<'_>, plotters::coord::Shift>) -> Result<(), Failed>,
) -> Option<String> {
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, (WIDTH, height)).into_drawing_area();
        draw(&root).ok()?;
        root.present().ok()?;
    }
    Some(styled(&svg, name, height))
}

/// Turns colours into names of the style, and names the chart.
fn styled(svg: &str, name: &str, height: u32) -> String {
    let escaped = name.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;");
    let body = svg.split_once('>').map_or("", |(_, body)| body);
    let mut out = format!("<svg viewBox=\"0 0 {WIDTH} {height}\" role=\"img\" aria-label=\"{escaped}\"><title>{escaped}</title>{body}");
    let mut names = vec![("#010101".to_string(), "ink".to_string()), ("#020202".into(), "muted".into()), ("#030303".into(), "grid".into())];
    names.extend((0..6).map(|number| (format!("#0404{number:02X}"), format!("s{number}"))));
    names.extend((0..STEPS).map(|step| (format!("#0505{step:02X}"), format!("h{step}"))));
    names.extend((0..STEPS).map(|step| (format!("#0606{step:02X}"), format!("t{step}"))));
    for (color, name) in names {
        for property in ["fill", "stroke"] {
            out = out.replace(&format!("{property}=\"{color}\""), &format!("style=\"{property}:var(--{name})\""));
        }
    }
    out
}

fn words(color: &RGBColor, horizontal: HPos) -> TextStyle<'static> {
    ("sans-serif", TEXT).into_font().color(color).pos(Pos::new(horizontal, VPos::Center))
}

/// A part of a bar: its name and its bytes before and after.
pub type Part = (String, u64, u64);

/// Two bars of stacked parts, before and after.
pub fn sizes(parts: &[Part]) -> Option<String> {
    let total = |of: fn(&Part) -> u64| parts.iter().map(of).sum::<u64>();
    let (before, after) = (total(|part| part.1), total(|part| part.2));
    let widest = before.max(after);
    if widest == 0 {
        return None;
    }
    let name = format!("Size before {} and after {}, by kind of layer", super::bytes(before), super::bytes(after));
    drawn(&name, 150, |root| {
        let (left, full) = (64, f64::from(WIDTH - 64 - 8));
        for (row, (label, of)) in
            [("before", (|part: &Part| part.1) as fn(&Part) -> u64), ("after", |part: &Part| part.2)].into_iter().enumerate()
        {
            let y = 12 + 40 * row as i32;
            root.draw(&Text::new(label, (left - 8, y + 14), words(&INK, HPos::Right)))?;
            let mut x = 0.0;
            for (number, part) in parts.iter().enumerate() {
                let width = of(part) as f64 / widest as f64 * full;
                let corners = [(left + x as i32, y), (left + (x + width) as i32, y + 28)];
                root.draw(&Rectangle::new(corners, series(number).filled()))?;
                x += width;
            }
        }
        let mut x = left;
        for (number, (label, ..)) in parts.iter().enumerate() {
            let y = 110 + 22 * (number as i32 / 3);
            if number % 3 == 0 {
                x = left;
            }
            root.draw(&Rectangle::new([(x, y - 6), (x + 12, y + 6)], series(number).filled()))?;
            root.draw(&Text::new(label.clone(), (x + 18, y), words(&INK, HPos::Left)))?;
            x += 125;
        }
        Ok(())
    })
}

/// A table of numbers by row and column; cells without a number stay empty.
#[derive(Debug, Clone, Default)]
pub struct Grid {
    /// Names of the columns.
    pub columns: Vec<String>,
    /// Names of the rows with their cells.
    pub rows: Vec<(String, Vec<Option<f64>>)>,
}

/// A heat map, on a logarithmic scale where `logarithmic`; every cell says its number.
pub fn heat_map(grid: &Grid, name: &str, logarithmic: bool, show: impl Fn(f64) -> String) -> Option<String> {
    let scale = |value: f64| if logarithmic { value.max(1e-12).ln() } else { value };
    let values: Vec<f64> = grid.rows.iter().flat_map(|(_, cells)| cells).flatten().map(|value| scale(*value)).collect();
    let (low, high) = (values.iter().copied().fold(f64::INFINITY, f64::min), values.iter().copied().fold(f64::NEG_INFINITY, f64::max));
    if values.is_empty() || grid.columns.is_empty() {
        return None;
    }
    let (left, top, row_height) = (44, 30, 24);
    // Of many columns only some are named, and their cells have no gaps.
    let width = f64::from(WIDTH as i32 - left) / grid.columns.len() as f64;
    let (gap, named) = (i32::from(width >= 8.0), (28.0 / width).ceil().max(1.0) as usize);
    let at = |column: f64| left + (width * column) as i32;
    let height = top + row_height * grid.rows.len() as i32 + 4;
    drawn(name, height as u32, |root| {
        for (column, label) in grid.columns.iter().enumerate().step_by(named) {
            root.draw(&Text::new(label.clone(), (at(column as f64 + 0.5), top / 2), words(&MUTED, HPos::Center)))?;
        }
        for (row, (label, cells)) in grid.rows.iter().enumerate() {
            let y = top + row_height * row as i32;
            root.draw(&Text::new(label.clone(), (left - 8, y + row_height / 2), words(&MUTED, HPos::Right)))?;
            for (column, value) in cells.iter().enumerate() {
                let Some(value) = value else { continue };
                let share = if high > low { (scale(*value) - low) / (high - low) } else { 0.0 };
                let step = (share * f64::from(STEPS - 1)).round() as u8;
                let corners = [(at(column as f64) + gap, y + 1), (at(column as f64 + 1.0) - gap, y + row_height - 1)];
                root.draw(&Rectangle::new(corners, heat(step).filled()))?;
                if named == 1 {
                    let middle = (at(column as f64 + 0.5), y + row_height / 2);
                    root.draw(&Text::new(show(*value), middle, words(&on_heat(step), HPos::Center)))?;
                }
            }
        }
        Ok(())
    })
}

/// Bars with a word below each.
pub fn bars(bars: &[(String, f64)], name: &str) -> Option<String> {
    let highest = bars.iter().map(|(_, value)| *value).fold(0.0, f64::max);
    if highest <= 0.0 {
        return None;
    }
    drawn(name, 240, |root| {
        let (floor, top, width) = (200, 24, WIDTH as i32 / bars.len() as i32);
        for (number, (label, value)) in bars.iter().enumerate() {
            let x = width * number as i32;
            let height = (value / highest * f64::from(floor - top)) as i32;
            root.draw(&Rectangle::new([(x + 3, floor - height), (x + width - 3, floor)], series(0).filled()))?;
            root.draw(&Text::new(format!("{value}"), (x + width / 2, floor - height - 10), words(&INK, HPos::Center)))?;
            root.draw(&Text::new(label.clone(), (x + width / 2, floor + 16), words(&MUTED, HPos::Center)))?;
        }
        Ok(())
    })
}

/// A line through points; several are told apart by their words, their dashes and their colours.
#[derive(Debug, Clone)]
pub struct Line {
    /// What it is.
    pub label: String,
    /// Its points, from left to right.
    pub points: Vec<(f64, f64)>,
    /// Whether only points are drawn.
    pub dots: bool,
}

/// Lines over a common axis, on a logarithmic scale where `logarithmic`.
pub fn lines(lines: &[Line], name: &str, axes: (&str, &str), logarithmic: bool) -> Option<String> {
    let usable = |(x, y): &&(f64, f64)| x.is_finite() && y.is_finite() && (!logarithmic || *y > 0.0);
    let points: Vec<(f64, f64)> = lines.iter().flat_map(|line| line.points.iter().filter(usable).copied()).collect();
    let range = |of: fn(&(f64, f64)) -> f64| {
        let values = points.iter().map(of);
        (values.clone().fold(f64::INFINITY, f64::min), values.fold(f64::NEG_INFINITY, f64::max))
    };
    let ((left, right), (low, high)) = (range(|point| point.0), range(|point| point.1));
    if points.len() < 2 || right <= left {
        return None;
    }
    // Where all values are equal a line still needs room above and below.
    let (low, high) = match (logarithmic, high > low) {
        (true, true) => (low / 1.3, high * 1.3),
        (true, false) => (low / 2.0, high * 2.0),
        (false, true) => ((low - 0.08 * (high - low)).min(low.max(0.0)), high + 0.08 * (high - low)),
        (false, false) => (low - 1.0, high + 1.0),
    };
    let scale = |value: f64| if logarithmic { value.log10() } else { value };
    drawn(name, 300, |root| {
        let mut chart = ChartBuilder::on(root)
            .margin(8)
            .margin_top(if lines.len() > 1 { 8 + 20 * lines.len().div_ceil(3) as u32 } else { 8 })
            .margin_right(16)
            .x_label_area_size(44)
            .y_label_area_size(74)
            .build_cartesian_2d(left..right, scale(low)..scale(high))?;
        chart
            .configure_mesh()
            .disable_x_mesh()
            .light_line_style(TRANSPARENT)
            .bold_line_style(GRID)
            .axis_style(MUTED)
            .x_desc(axes.0)
            .y_desc(axes.1)
            .x_labels(8)
            .y_labels(6)
            .axis_desc_style(("sans-serif", TEXT).into_font().color(&INK))
            .label_style(("sans-serif", TEXT - 1.0).into_font().color(&MUTED))
            .x_label_formatter(&|value| short(*value))
            .y_label_formatter(&|value| short(if logarithmic { 10f64.powf(*value) } else { *value }))
            .draw()?;
        for (number, line) in lines.iter().enumerate() {
            let color = series(number);
            let points: Vec<(f64, f64)> = line.points.iter().filter(usable).map(|&(x, y)| (x, scale(y))).collect();
            if !line.dots {
                match DASHES[number % DASHES.len()] {
                    (0, _) => chart.draw_series(LineSeries::new(points.clone(), color.stroke_width(2)))?,
                    (dash, gap) => chart.draw_series(DashedLineSeries::new(points.clone(), dash, gap, color.stroke_width(2)))?,
                };
            }
            if line.dots || points.len() <= 64 {
                let size = if line.dots { 6 } else { 3 };
                chart.draw_series(points.iter().map(|&point| Circle::new(point, size, mark(line, number))))?;
            }
        }
        if lines.len() > 1 {
            legend(root, lines)?;
        }
        Ok(())
    })
}

/// Points of a line are filled; of those that stand alone every second one is a ring.
fn mark(line: &Line, number: usize) -> ShapeStyle {
    if line.dots && number.is_multiple_of(2) { series(number).stroke_width(3) } else { series(number).filled() }
}

/// Names of lines above their chart, three in a row.
fn legend(root: &DrawingArea<SVGBackend<'_>, plotters::coord::Shift>, lines: &[Line]) -> Result<(), Failed> {
    for (number, line) in lines.iter().enumerate() {
        let (x, y) = (16 + 142 * (number as i32 % 3), 12 + 20 * (number as i32 / 3));
        if line.dots {
            root.draw(&Circle::new((x + 6, y), 6, mark(line, number)))?;
        } else {
            let (dash, gap) = DASHES[number % DASHES.len()];
            let (dash, gap) = if dash == 0 { (28, 0) } else { (dash as i32, gap as i32) };
            for start in (0..28).step_by((dash + gap) as usize) {
                root.draw(&Rectangle::new([(x + start, y - 1), (x + (start + dash).min(28), y + 1)], series(number).filled()))?;
            }
        }
        root.draw(&Text::new(line.label.clone(), (x + 34, y), words(&INK, HPos::Left)))?;
    }
    Ok(())
}

/// A number on an axis.
fn short(value: f64) -> String {
    match value.abs() {
        0.0 => "0".into(),
        size if !(1e-3..1e5).contains(&size) => format!("{value:.0e}"),
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 1.0 => trimmed(format!("{value:.2}")),
        _ => trimmed(format!("{value:.4}")),
    }
}

fn trimmed(text: String) -> String {
    if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').into() } else { text }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn charts_name_themselves_escape_words_and_take_colours_from_the_style() {
        let parts = [("a<b>\"c\"".to_string(), 100, 50), ("rest".to_string(), 10, 10)];
        let grid = Grid { columns: vec!["q<x>".into()], rows: vec![("0".into(), vec![Some(0.5)]), ("1".into(), vec![None])] };
        let line = Line { label: "<script>".into(), points: vec![(0.0, 1.0), (1.0, 0.1), (2.0, f64::NAN)], dots: false };
        let charts = [
            sizes(&parts).unwrap(),
            heat_map(&grid, "a <script> & \"b\"", true, |value| format!("{value}")).unwrap(),
            bars(&[("1".into(), 3.0), ("2".into(), 0.0)], "bars").unwrap(),
            lines(&[line.clone(), line], "lines", ("x", "y"), true).unwrap(),
        ];
        for chart in charts {
            assert!(chart.starts_with("<svg viewBox") && chart.contains("role=\"img\"") && chart.trim_end().ends_with("</svg>"), "{chart}");
            assert!(!chart.contains("<script>") && !chart.contains("<x>") && !chart.contains("<b>"), "{chart}");
            assert!(!chart.contains("=\"#0") && chart.contains("var(--"), "{chart}");
            assert!(!chart.contains("http"), "{chart}");
        }
        assert!(sizes(&[]).is_none() && bars(&[], "x").is_none() && lines(&[], "x", ("", ""), false).is_none());
    }
}
