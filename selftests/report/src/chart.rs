// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The phases of several rows as bars, one below the other.

use std::collections::BTreeMap;
use std::path::Path;

use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use crate::phase::Phase;
use crate::{Error, Result, read, write};

/// The file's first lines.
const HEAD: &str = "# Instructions of the host per access, by phase; written by scripts/cost \
                    breakdown.\nhost,row,phase,instructions\n";

/// Colours that people who see fewer of them can tell apart, ours the strong ones.
const COLOURS: [RGBColor; Phase::ALL.len()] = [
    RGBColor(0xb0, 0xc4, 0xde),
    RGBColor(0xd9, 0xd9, 0xd9),
    RGBColor(0x8f, 0xa8, 0xc8),
    RGBColor(0x5b, 0x7d, 0xa8),
    RGBColor(0xd5, 0x5e, 0x00),
    RGBColor(0xe6, 0x9f, 0x00),
    RGBColor(0xf0, 0xe4, 0x42),
    RGBColor(0x00, 0x9e, 0x73),
    RGBColor(0xcc, 0x79, 0xa7),
    RGBColor(0x99, 0x99, 0x99),
];

const WIDTH: i32 = 960;
const LEFT: i32 = 210;
const RIGHT: i32 = 70;
const BAR: i32 = 18;
const STEP: i32 = 26;

/// A bar of the file.
struct Bar {
    host: String,
    row: String,
    phases: BTreeMap<String, f64>,
}

fn parse(path: &Path) -> Result<Vec<Bar>> {
    let text = read(path)?;
    let mut bars: Vec<Bar> = Vec::new();
    for line in text.lines().filter(|line| !line.starts_with('#')).skip(1) {
        let words: Vec<&str> = line.split(',').collect();
        let parsed = match words[..] {
            [host, row, phase, count] => count.parse().ok().map(|count| (host, row, phase, count)),
            _ => None,
        };
        let (host, row, phase, count) =
            parsed.ok_or_else(|| Error::Content(path.into(), format!("what is '{line}'?")))?;
        if !matches!(bars.last(), Some(bar) if bar.host == host && bar.row == row) {
            bars.push(Bar {
                host: host.to_string(),
                row: row.to_string(),
                phases: BTreeMap::new(),
            });
        }
        if let Some(bar) = bars.last_mut() {
            bar.phases.insert(phase.to_string(), count);
        }
    }
    Ok(bars)
}

/// Puts the phases of a host's row into the file, where it was or at the host's end.
pub fn save(path: &Path, host: &str, row: &str, phases: &BTreeMap<Phase, f64>) -> Result<()> {
    let mut bars = if path.exists() {
        parse(path)?
    } else {
        Vec::new()
    };
    let phases = phases
        .iter()
        .map(|(phase, count)| (phase.name().to_string(), *count))
        .collect();
    match bars
        .iter_mut()
        .find(|bar| bar.host == host && bar.row == row)
    {
        Some(bar) => bar.phases = phases,
        None => {
            let end = bars.iter().rposition(|bar| bar.host == host);
            let bar = Bar {
                host: host.to_string(),
                row: row.to_string(),
                phases,
            };
            bars.insert(end.map_or(bars.len(), |end| end + 1), bar);
        }
    }
    let mut text = HEAD.to_string();
    for bar in &bars {
        for phase in Phase::ALL {
            if let Some(count) = bar.phases.get(phase.name()) {
                text.push_str(&format!(
                    "{},{},{},{count:.0}\n",
                    bar.host,
                    bar.row,
                    phase.name()
                ));
            }
        }
    }
    write(path, &text)
}

pub fn draw(data: &Path, svg: &Path) -> Result<()> {
    let bars = parse(data)?;
    let used: Vec<usize> = (0..Phase::ALL.len())
        .filter(|&index| {
            let name = Phase::ALL[index].name();
            bars.iter()
                .any(|bar| bar.phases.get(name).is_some_and(|count| *count >= 0.5))
        })
        .collect();
    let legend = used
        .iter()
        .map(|&index| (Phase::ALL[index].name().to_string(), COLOURS[index]))
        .collect();
    let mut chart = Chart {
        title: "Instructions of the host per access".to_string(),
        legend,
        groups: Vec::new(),
    };
    for bar in bars {
        let parts = used.iter().enumerate().map(|(at, &index)| {
            let count = bar.phases.get(Phase::ALL[index].name()).copied();
            (at, count.unwrap_or(0.0))
        });
        chart.add(bar.host, bar.row, parts.collect());
    }
    write(svg, &chart.svg()?)
}

/// Bars in groups, one below the other.
pub struct Chart {
    pub title: String,
    /// What the parts of bars are, and their colours.
    pub legend: Vec<(String, RGBColor)>,
    groups: Vec<Group>,
}

/// What the group is called, and its bars: what they are called, and their parts of the legend.
type Group = (String, Vec<(String, Vec<(usize, f64)>)>);

impl Chart {
    pub fn new(title: &str, legend: &[(&str, RGBColor)]) -> Self {
        let legend = legend.iter();
        Chart {
            title: title.to_string(),
            legend: legend
                .map(|&(name, colour)| (name.to_string(), colour))
                .collect(),
            groups: Vec::new(),
        }
    }

    /// Adds a bar to the last group, or to a new one of another name.
    pub fn add(&mut self, group: String, bar: String, parts: Vec<(usize, f64)>) {
        if !matches!(self.groups.last(), Some((name, _)) if *name == group) {
            self.groups.push((group, Vec::new()));
        }
        if let Some((_, bars)) = self.groups.last_mut() {
            bars.push((bar, parts));
        }
    }

    /// The picture.
    pub fn svg(&self) -> Result<String> {
        let mut text = String::new();
        let drawn = self.draw(&mut text);
        drawn.map_err(|error| Error::Chart(error.to_string()))?;
        Ok(text)
    }

    fn draw(&self, svg: &mut String) -> std::result::Result<(), Box<dyn std::error::Error>> {
        let bars = || self.groups.iter().flat_map(|(_, bars)| bars);
        let legend_rows = self.legend.len().div_ceil(5) as i32;
        let heads = self.groups.len() as i32 * 34;
        let height = 40 + legend_rows * 22 + heads + bars().count() as i32 * STEP + 12;
        let sum = |parts: &[(usize, f64)]| parts.iter().map(|(_, count)| count).sum::<f64>();
        let most = bars().map(|(_, parts)| sum(parts)).fold(1.0, f64::max);
        let scale = f64::from(WIDTH - LEFT - RIGHT) / most;

        let area = SVGBackend::with_string(svg, (WIDTH as u32, height as u32)).into_drawing_area();
        area.fill(&WHITE)?;
        let text = |size: i32| ("sans-serif", size).into_font().color(&BLACK);
        let middle = |style: TextStyle<'static>, h| style.pos(Pos::new(h, VPos::Center));
        let put = |words: &str, x, y, style: &TextStyle<'_>| {
            area.draw(&Text::new(words.to_string(), (x, y), style.clone()))
        };

        let (title, label) = (text(19), text(16));
        put(&self.title, 12, 12, &title)?;
        for (place, (name, colour)) in self.legend.iter().enumerate() {
            let x = 12 + (place % 5) as i32 * 185;
            let y = 42 + (place / 5) as i32 * 22;
            area.draw(&Rectangle::new([(x, y), (x + 14, y + 14)], colour.filled()))?;
            put(name, x + 20, y + 7, &middle(label.clone(), HPos::Left))?;
        }

        let mut y = 40 + legend_rows * 22;
        for (group, bars) in &self.groups {
            put(group, 12, y + 10, &title)?;
            y += 34;
            for (bar, parts) in bars {
                let right = middle(label.clone(), HPos::Right);
                put(bar, LEFT - 10, y + BAR / 2, &right)?;
                let mut sum = 0.0;
                for &(part, count) in parts {
                    if count <= 0.0 {
                        continue;
                    }
                    let ends = [sum, sum + count].map(|sum| LEFT + (sum * scale).round() as i32);
                    let corners = [(ends[0], y), (ends[1], y + BAR)];
                    area.draw(&Rectangle::new(corners, self.legend[part].1.filled()))?;
                    sum += count;
                }
                let x = LEFT + (sum * scale).round() as i32 + 6;
                let left = middle(label.clone(), HPos::Left);
                put(&format!("{sum:.0}"), x, y + BAR / 2, &left)?;
                y += STEP;
            }
        }
        area.present()?;
        drop(area);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::{env, fs, process};

    use super::*;

    #[test]
    fn saved_rows_stay_in_their_place() {
        let path = env::temp_dir().join(format!("cost-{}.csv", process::id()));
        let phases = |count| BTreeMap::from([(Phase::Bus, count)]);
        for (host, row, count) in [
            ("x86_64", "one", 1.0),
            ("arm64", "one", 2.0),
            ("x86_64", "two", 3.0),
            ("x86_64", "one", 4.0),
        ] {
            save(&path, host, row, &phases(count)).unwrap();
        }
        let text = fs::read_to_string(&path).unwrap();
        fs::remove_file(&path).unwrap();
        let lines: Vec<&str> = text.lines().skip(2).collect();
        assert_eq!(
            lines,
            ["x86_64,one,bus,4", "x86_64,two,bus,3", "arm64,one,bus,2"]
        );
    }
}
